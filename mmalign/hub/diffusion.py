"""Writing diffusers pipelines, single denoisers, and LoRA files that load at the strength they were trained with."""

from __future__ import annotations

import gc
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.errors import CheckpointError, ExportError
from mmalign.hub.gap import Gap, compare
from mmalign.hub.precision import cast_weights
from mmalign.hub.source import Source, read_json, safetensors_headers, stored_dtype
from mmalign.policies.diffusion_export import LORA_FILE, load_lora, load_pipeline, save_pipeline
from mmalign.policies.pretrained import DTYPES

METADATA_KEY = "lora_adapter_metadata"
"""Key of the safetensors header under which diffusers looks for the adapter's configuration."""

DENOISERS = ("unet", "transformer")
"""Names a pipeline gives to the network that denoises."""

PROBE_SIZE = 256
"""Side of the test image in pixels, at most; enough to see a wrong weight, quick on a CPU."""


def load(path: str | Path, components: dict[str, Any] | None = None) -> Any:
    """A float32 pipeline without its progress bar; ExportError when diffusers cannot load it."""
    try:
        pipe = load_pipeline(path, components=components)
    except CheckpointError as error:
        raise ExportError(str(error).replace("model.path: ", "", 1)) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoiser_name(pipe: Any) -> str:
    """Component that denoises: "unet" or "transformer"; ExportError when the pipeline has neither."""
    found = next((name for name in DENOISERS if getattr(pipe, name, None) is not None), None)
    if found is None:
        raise ExportError(f"{type(pipe).__name__} has no unet or transformer; its components are {', '.join(pipe.components)}")
    return found


@torch.no_grad()
def probe_latents(pipe: Any) -> Tensor:
    """Latents after two denoising steps from fixed noise: what two copies of one pipeline must agree on."""
    accepted = inspect.signature(type(pipe).__call__).parameters
    arguments: dict[str, Any] = {
        "prompt": "a red circle", "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }
    config = getattr(pipe, denoiser_name(pipe)).config
    side, factor = getattr(config, "sample_size", None), getattr(pipe, "vae_scale_factor", None)
    if isinstance(side, int) and isinstance(factor, int) and side * factor > PROBE_SIZE:
        arguments |= {"height": PROBE_SIZE, "width": PROBE_SIZE}
    if "prompt" not in accepted:
        arguments["output_type"] = "np"
    output = pipe(**{name: value for name, value in arguments.items() if name in accepted})
    return torch.as_tensor(output.images).float()


def write_pipeline(source: Source, target: Path, *, dtype: str | None, tolerance: float | None) -> Gap:
    """Write a whole pipeline: a trained one, the base with a trained denoiser, or the base with its LoRA fused in.

    The LoRA is fused in float32 and the result cast once. The written pipeline is loaded again and denoises the same
    noise; ExportError when it differs from the live one by more than the tolerance.
    """
    pipe, home = assemble(source)
    expected = probe_latents(pipe)
    if source.kind == "diffusers_lora":
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    name = cast(pipe, home, dtype)
    save_pipeline(pipe, target)
    del pipe
    gc.collect()
    found = probe_latents(load(target))
    return compare({"latents": expected}, {"latents": found}, dtype=name, tolerance=tolerance, what="latents")


def assemble(source: Source) -> tuple[Any, Path | None]:
    """The live float32 pipeline of a source, and the local folder its other components come from."""
    if source.kind == "pipeline":
        return load(source.folder), source.folder
    base = source.need_base("a whole pipeline")
    if source.kind == "unet":
        model = load_denoiser(source.folder)
        names = read_json(Path(base) / "model_index.json") if source.base_folder else {}
        name = next((n for n in DENOISERS if n in names), "transformer" if "Transformer" in type(model).__name__ else "unet")
        return load(base, {name: model}), source.base_folder
    pipe = load(base)
    try:
        load_lora(pipe, source.folder)
    except CheckpointError as error:
        raise ExportError(str(error)) from error
    return pipe, source.base_folder


def load_denoiser(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The diffusers model of a component folder; ExportError when its class is unknown or its files are incomplete."""
    import diffusers

    name = read_json(folder / "config.json").get("_class_name")
    cls = getattr(diffusers, str(name), None)
    if cls is None:
        raise ExportError(f"{folder}/config.json names the class {name!r}, which diffusers {diffusers.__version__} does not have")
    try:
        return cls.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ExportError(f"{folder} cannot be loaded as {name} ({error})") from error


def cast(pipe: Any, home: Path | None, dtype: str | None) -> str:
    """Cast every component to ``dtype``, or back to the precision ``home`` stores it in; the denoiser's precision."""
    denoiser = denoiser_name(pipe)
    chosen = "float32"
    for name, component in pipe.components.items():
        if not isinstance(component, torch.nn.Module):
            continue
        stored = stored_dtype(home / name) if home is not None and (home / name).is_dir() else None
        precision = dtype or stored or "float32"
        cast_weights(component, DTYPES[precision])
        chosen = precision if name == denoiser else chosen
    return chosen


def write_denoiser(source: Source, target: Path, *, dtype: str | None, max_shard_size: str, tolerance: float | None) -> Gap:
    """Write only the denoiser, as ``<Class>.from_pretrained(target)`` reads it; compared weight by weight after reloading."""
    if source.kind == "unet":
        model = load_denoiser(source.folder)
        stored = stored_dtype(source.folder)
    else:
        pipe, home = assemble(source)
        name = denoiser_name(pipe)
        if source.kind == "diffusers_lora":
            pipe.fuse_lora()
            pipe.unload_lora_weights()
        model = getattr(pipe, name)
        stored = stored_dtype(home / name) if home is not None else None
    precision = dtype or stored or "float32"
    expected = {name: tensor.detach() for name, tensor in model.state_dict().items()}  # kept when the cast replaces them
    cast_weights(model, DTYPES[precision])
    model.save_pretrained(target, safe_serialization=True, max_shard_size=max_shard_size)
    return compare(expected, load_denoiser(target).state_dict(), dtype=precision, tolerance=tolerance, what="weights")


def write_lora(source: Source, target: Path, *, dtype: str | None, tolerance: float | None) -> Gap | None:
    """Write a diffusers LoRA file whose header carries the adapter's configuration, and try it on the base.

    Without that configuration diffusers loads an adapter with alpha = rank: the wrong strength for any other alpha, and
    nothing says so. A source that lacks it gets the configuration that diffusers would assume, with a warning. None when
    the base is not on this machine.
    """
    from safetensors.torch import load_file, save_file

    tensors = load_file(source.folder / LORA_FILE)
    metadata = lora_metadata(source.folder)
    if metadata is None:
        metadata = assumed_metadata(tensors)
        source.warnings.append(f"{LORA_FILE} did not say which alpha it was trained with; alpha = rank was written, "
                               "which is what diffusers assumes. If training used another alpha, export from the training run")
    if dtype is not None:
        tensors = {name: t.to(DTYPES[dtype]) if t.is_floating_point() else t for name, t in tensors.items()}
    header = {"format": "pt", METADATA_KEY: json.dumps(metadata, indent=2, sort_keys=True)}
    save_file(tensors, target / LORA_FILE, metadata=header)
    if source.base_folder is None:
        source.warnings.append("the base model is not on this machine, so the LoRA was not tried on it")
        return None
    pipe = load(source.base_folder)
    base = probe_latents(pipe)
    load_lora(pipe, source.folder)
    expected = probe_latents(pipe)
    pipe.unload_lora_weights()
    load_lora(pipe, target)
    check_strength(pipe, metadata)
    found = probe_latents(pipe)
    if torch.equal(found, base):
        source.warnings.append("the LoRA does not change the base model's output: it was not trained, or does not match it")
    return compare({"latents": expected}, {"latents": found}, dtype=dtype or "float32", tolerance=tolerance, what="latents")


def lora_metadata(folder: Path) -> dict[str, Any] | None:
    """The adapter configuration in the header of a LoRA file; None when the file has none."""
    header = safetensors_headers(folder).get(LORA_FILE, {}).get("__metadata__", {})
    if METADATA_KEY not in header:
        return None
    metadata: dict[str, Any] = json.loads(header[METADATA_KEY])
    return metadata


def assumed_metadata(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The configuration diffusers assumes for a file without one: rank from the shapes, alpha = rank.

    Raises ExportError for files with ``.alpha`` entries (other trainers' formats), whose strength they define.
    """
    if any(name.endswith(".alpha") for name in tensors):
        raise ExportError(f"{LORA_FILE} is in another trainer's format (it has .alpha entries); load it into its pipeline and "
                          "save it with save_lora_weights first")
    metadata: dict[str, Any] = {}
    for component in sorted({name.partition(".")[0] for name in tensors}):
        ranks = {
            name.partition(".")[2].rsplit(".lora", 1)[0]: t.shape[0] for name, t in tensors.items()
            if name.startswith(f"{component}.") and (".lora_A." in name or ".lora.down." in name)
        }
        if not ranks:
            raise ExportError(f"{LORA_FILE}: the entries of {component!r} are not LoRA matrices in the diffusers format")
        common = max(set(ranks.values()), key=list(ranks.values()).count)
        patterns = {name: rank for name, rank in ranks.items() if rank != common}
        metadata |= {f"{component}.{key}": value for key, value in {
            "r": common, "lora_alpha": common, "target_modules": sorted(ranks), "rank_pattern": patterns,
            "alpha_pattern": patterns,
        }.items()}
    return metadata


def check_strength(pipe: Any, metadata: dict[str, Any]) -> None:
    """ExportError unless every LoRA layer on ``pipe`` is scaled by its configured alpha / rank."""
    for component in sorted({key.partition(".")[0] for key in metadata}):
        rank, alpha = metadata.get(f"{component}.r"), metadata.get(f"{component}.lora_alpha")
        if not rank or alpha is None or metadata.get(f"{component}.rank_pattern") or metadata.get(f"{component}.alpha_pattern"):
            continue
        wanted = alpha / rank**0.5 if metadata.get(f"{component}.use_rslora") else alpha / rank
        for name, layer in getattr(pipe, component).named_modules():
            for scaling in getattr(layer, "scaling", {}).values() if hasattr(layer, "lora_A") else ():
                if abs(scaling - wanted) > 1e-6 * max(1.0, abs(wanted)):
                    raise ExportError(f"{component}.{name} loads with strength {scaling}, trained with {wanted}")
