"""Loading an exported folder in a new Python process that knows nothing but the library it is made for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign.errors import ExportError
from mmalign.hub.source import folder_kind

_SCRIPT = r'''
import hashlib, json, sys
import torch
ask = json.loads(sys.argv[1])
folder, kind, base = ask["folder"], ask["kind"], ask["base"]
answer = {}
if kind in ("transformers", "adapter"):
    import transformers
    if kind == "transformers":
        name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
        model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32)
    elif base is None:
        from peft import AutoPeftModelForCausalLM
        model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        from peft import PeftModel
        name = transformers.AutoConfig.from_pretrained(base).architectures[0]
        model = PeftModel.from_pretrained(getattr(transformers, name).from_pretrained(base, dtype=torch.float32), folder)
    model.eval()
    ids = ask["input_ids"]
    if ids is None:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError):
            tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        prompt = [{"role": "user", "content": ask["prompt"]}]
        if tokenizer.chat_template:
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        else:
            ids = tokenizer(ask["prompt"])["input_ids"]
    ids = torch.tensor([ids])
    with torch.no_grad():
        if model.can_generate():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                 max_new_tokens=ask["max_new_tokens"])
            answer["tokens"] = out[0].tolist() if model.config.is_encoder_decoder else out[0, ids.shape[1]:].tolist()
        logits = model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})).logits
    answer["logits"] = logits[0].reshape(-1, logits.shape[-1])[-1, :8].tolist()
else:
    import diffusers
    def load(path, **parts):
        index = diffusers.DiffusionPipeline.load_config(path)  # parts that were left out have to be named
        absent = {name: None for name, value in index.items() if isinstance(value, list) and value[0] is None}
        return diffusers.DiffusionPipeline.from_pretrained(path, torch_dtype=torch.float32, **{**absent, **parts})
    if kind == "pipeline":
        pipe = load(folder)
    elif kind == "unet":
        cls = getattr(diffusers, json.load(open(folder + "/config.json"))["_class_name"])
        names = diffusers.DiffusionPipeline.load_config(base)
        name = next(n for n in ("unet", "transformer") if n in names)
        pipe = load(base, **{name: cls.from_pretrained(folder, torch_dtype=torch.float32)})
    else:
        pipe = load(base)
        pipe.load_lora_weights(folder)
    pipe.set_progress_bar_config(disable=True)
    size = {k: ask[k] for k in ("height", "width") if ask[k]}
    image = pipe(ask["prompt"], num_inference_steps=ask["steps"], generator=torch.Generator().manual_seed(ask["seed"]),
                 output_type="np", **size).images[0]
    answer["image_hash"] = hashlib.sha256((image * 255).round().astype("uint8").tobytes()).hexdigest()
    answer["mean"] = float(image.mean())
answer["modules"] = sorted({name.partition(".")[0] for name in sys.modules})
print("\n" + json.dumps(answer))
'''


@dataclass(frozen=True)
class FreshLoad:
    """What a folder gave in a process of its own."""

    tokens: list[int] | None
    """Ids of a greedy completion (language models)."""
    logits: list[float] | None
    """First logits after the prompt, float32."""
    image_hash: str | None
    """sha256 of the 8-bit pixels of one picture (diffusion models)."""
    modules: tuple[str, ...]
    """Top-level modules that were imported."""


def load_in_fresh_process(
    folder: str | Path, kind: str | None = None, *, base: str | Path | None = None, prompt: str = "a red circle",
    input_ids: list[int] | None = None, max_new_tokens: int = 16, steps: int = 4, seed: int = 0, height: int | None = None,
    width: int | None = None, timeout: float = 600,
) -> FreshLoad:
    """Load ``folder`` with transformers, peft or diffusers alone, without network, and produce one sample on the CPU.

    ``kind`` is read off the files when not given ("merged" means transformers). ``base`` is the base model of an
    adapter or LoRA; without it an adapter must name one that is on this machine. Raises ExportError with the end of the
    process's output when anything fails.
    """
    folder = Path(folder).resolve()
    kind = folder_kind(folder) if kind in (None, "auto") else {"merged": "transformers"}.get(str(kind), kind)
    if kind in ("unet", "diffusers_lora") and base is None:
        raise ExportError(f"a {kind} folder makes pictures only within its base pipeline; give base=<folder>")
    ask: dict[str, Any] = {
        "folder": str(folder), "kind": kind, "base": None if base is None else str(base), "prompt": prompt,
        "input_ids": input_ids, "max_new_tokens": max_new_tokens, "steps": steps, "seed": seed, "height": height, "width": width,
    }
    # An empty working directory and no PYTHONPATH: a source checkout must not be importable by accident.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as empty:
        try:
            done = subprocess.run(
                [sys.executable, "-c", _SCRIPT, json.dumps(ask)], cwd=empty, env=environment, capture_output=True, text=True,
                timeout=timeout, check=False,
            )
        except subprocess.TimeoutExpired:
            raise ExportError(f"{folder} did not load and produce a sample within {timeout:.0f} s") from None
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise ExportError(f"{folder} does not load as {kind} in a process of its own:\n{tail}")
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    return FreshLoad(answer.get("tokens"), answer.get("logits"), answer.get("image_hash"), tuple(answer["modules"]))
