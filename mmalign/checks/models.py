"""Checks of model folders: what they hold, and whether the plain Hugging Face libraries load them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mmalign.checks.findings import Findings
from mmalign.policies.loading import base_of_adapter, model_kind, resolve_model_path

_KINDS = {
    "text": "a language model", "text_adapter": "a peft adapter of a language model", "diffusion": "a diffusers pipeline",
    "diffusion_adapter": "a diffusers LoRA",
}
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def check_model(target: str, findings: Findings) -> None:
    """Check a model folder as ``mmalign check MODEL_DIR`` does."""
    folder = Path(resolve_model_path(target, key="model"))
    kind = model_kind(str(folder))
    findings.ok(f"{target} is {_KINDS.get(kind, kind)}")
    check_weights(folder, findings)
    if kind.endswith("adapter"):
        findings.ok(f"its base model is {base_of_adapter(folder)}")
    from mmalign.hub.check import check_export

    for check in check_export(folder):
        findings.checks.append(check)


def check_weights(folder: Path, findings: Findings) -> None:
    """Every safetensors file opens; pickled weights are pointed out, because loading them can run code."""
    files = sorted(folder.rglob("*.safetensors"))
    types: Counter[str] = Counter()
    for file in files:
        try:
            with safe_open(file, framework="pt") as reader:
                names = list(reader.keys())
                types.update(reader.get_slice(name).get_dtype() for name in names)
        except (SafetensorError, OSError) as error:
            findings.fail(f"{file.relative_to(folder)} is damaged: {error}")
    if types:
        findings.ok(f"{len(files)} safetensors file{'s' if len(files) != 1 else ''}, {sum(types.values())} tensors "
                    f"({', '.join(f'{count} {name}' for name, count in types.most_common())})")
    elif not files and not any(folder.glob("*.gguf")):
        findings.fail(f"{folder} holds no .safetensors or .gguf weights")
    pickled = sorted({str(path.relative_to(folder)) for pattern in _PICKLED for path in folder.rglob(pattern)})
    if pickled:
        findings.warn(f"pickled files ({', '.join(pickled[:5])}) are never read here, and loading them elsewhere can run code")
