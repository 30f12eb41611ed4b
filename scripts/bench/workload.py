"""The model, the tokenizer and the rows that every bench works on: small, synthetic, the same for everyone.

A Llama of 15.7 million parameters of which 12.6 million are the tied vocabulary matrix (V = 49152, d = 256, 4 layers):
as in a small real model, the output head dominates. Text is random words, one token each, so that both sides tokenise
the same strings to the same ids.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VOCABULARY = 49152
HIDDEN = 256
LAYERS = 4
WINDOW = 2048
SPECIAL = ("<pad>", "<eos>", "<unk>")
SEED = 0


def model_folder() -> Path:
    """The model and its tokenizer, built at the first use and kept in the temporary directory."""
    folder = Path(tempfile.gettempdir()) / f"mmalign-bench-llama2-{VOCABULARY}-{HIDDEN}-{LAYERS}"
    if not (folder / "tokenizer_config.json").is_file():
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            _build(Path(partial) / "model")
            if not folder.exists():
                (Path(partial) / "model").rename(folder)
    return folder


def _build(folder: Path) -> None:
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    model = spread(LlamaForCausalLM(llama_config()))
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def spread(model: Any, factor: float = 3.0) -> Any:
    """Larger matrices in the body: with the customary ones a tied model merely repeats its input."""
    import torch

    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)
    return model


def llama_config(*, vocabulary: int = VOCABULARY) -> Any:
    """The model's configuration."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=688, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=WINDOW, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1,
        pad_token_id=0,
    )


def build_tokenizer(*, vocabulary: int = VOCABULARY) -> Any:
    """One token per word: ``w3`` ... up to the size of the vocabulary, after three special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {token: index for index, token in enumerate(SPECIAL)}
    words |= {f"w{index}": index for index in range(len(SPECIAL), vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )


def words(generator: random.Random, count: int, *, vocabulary: int = VOCABULARY) -> str:
    """``count`` random words."""
    return " ".join(f"w{generator.randrange(len(SPECIAL), vocabulary)}" for _ in range(count))


def preference_rows(
    count: int, prompt: tuple[int, int], answer: tuple[int, int], *, seed: int = SEED, vocabulary: int = VOCABULARY,
) -> list[dict[str, str]]:
    """Pairs with uniform lengths in words."""
    draw = random.Random(seed)
    return [
        {"prompt": words(draw, draw.randint(*prompt), vocabulary=vocabulary),
         **{name: " " + words(draw, draw.randint(*answer), vocabulary=vocabulary) for name in ("chosen", "rejected")}}
        for _ in range(count)
    ]


def completion_rows(count: int, *, seed: int = SEED, vocabulary: int = VOCABULARY) -> list[dict[str, str]]:
    """Prompts and completions with long-tailed (log-normal) lengths: median 30 words each, one in ten above 100."""
    draw = random.Random(seed)

    def length() -> int:
        return min(400, max(4, round(draw.lognormvariate(3.4, 1.0))))

    return [{"prompt": words(draw, length(), vocabulary=vocabulary),
             "completion": " " + words(draw, length(), vocabulary=vocabulary)} for _ in range(count)]


def prompt_rows(
    count: int, prompt: tuple[int, int], *, seed: int = SEED, vocabulary: int = VOCABULARY,
) -> list[dict[str, str]]:
    """Prompts with uniform lengths in words."""
    draw = random.Random(seed)
    return [{"prompt": words(draw, draw.randint(*prompt), vocabulary=vocabulary)} for _ in range(count)]


def even_share(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward: the share of words that end in an even digit."""
    return [sum(word[-1] in "02468" for word in text.split()) / max(1, len(text.split())) for text in completions]


def write_rows(rows: Sequence[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    """The rows as a JSON-lines file in this process's own folder."""
    path = Path(os.environ.get("MMALIGN_BENCH_FOLDER", tempfile.mkdtemp(prefix="mmalign-bench-"))) / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def visiting_order(count: int, needed: int, *, seed: int = SEED) -> list[int]:
    """The first ``needed`` row numbers that our data experience visits, so that a peer can be fed the same batches."""
    from mmalign.data.mixture import EpochSampler

    return EpochSampler(count, seed=seed, shuffle=True).take(needed)


def flop(tokens: float, scored: float, *, body_passes: float, head_passes: float) -> float:
    """Operations of a step's matrix products: ``2 N T`` per pass through the body, ``2 V d S`` per pass of the head."""
    body = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * 688)
    return 2 * body * tokens * body_passes + 2 * VOCABULARY * HIDDEN * scored * head_passes
