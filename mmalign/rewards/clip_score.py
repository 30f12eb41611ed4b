"""CLIPScore: how well a picture fits its caption according to a CLIP model from transformers or open_clip."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.errors import ConfigError, RewardError
from mmalign.rewards.inputs import to_tensor
from mmalign.rewards.registry import reward

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass
class _Towers:
    """The two encoders of a CLIP model and its image preprocessing, whichever library it came from."""

    module: nn.Module
    encode_image: Callable[[Tensor], Tensor]
    encode_text: Callable[[list[str]], Tensor]
    image_size: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD


@reward("clip_score", differentiable=True, accepts="any")
class ClipScore:
    """``scale * max(cos(image, caption), 0)`` (Hessel et al. 2021, arXiv 2104.08718, eq. 1, where scale is 2.5).

    Args:
        model: a transformers CLIP folder or hub id, a folder with ``open_clip_config.json``, or
            ``hf-hub:<id>`` for an open_clip model of the hub (either must be on this machine when it is offline).
        scale: 2.5 is the paper's; 100 gives the numbers of torchmetrics and diffusers.
        clip: False keeps negative cosines (a gradient everywhere).
        device: where the model runs; None takes CUDA when there is one.
        rows_per_forward: pictures encoded together.
        revision: branch, tag or commit of a hub id.

    Pictures are PIL images or float tensors ``[3, H, W]`` in [0, 1]; resized to the model's size on the shorter side
    (bicubic, anti-aliased), centre-cropped, normalised. Captions are cut at the model's context length. With tensors
    that require a gradient the score is differentiable; the model's own parameters are frozen.
    """

    def __init__(
        self, model: str, *, scale: float = 2.5, clip: bool = True, device: str | None = None,
        rows_per_forward: int = 32, revision: str | None = None,
    ) -> None:
        if not scale > 0:
            raise ConfigError(f"clip_score: scale={scale} must be positive")
        if rows_per_forward < 1:
            raise ConfigError(f"clip_score: rows_per_forward={rows_per_forward} must be at least 1")
        self.model, self.scale, self.clip, self.revision = model, scale, clip, revision
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.rows_per_forward = rows_per_forward
        self.range = (0.0, scale) if clip else (-scale, scale)
        self._towers: _Towers | None = None

    @property
    def towers(self) -> _Towers:
        """The loaded model; loading happens at the first use, so that a configuration can be read without it."""
        if self._towers is None:
            self._towers = load_towers(self.model, self.revision)
            self._towers.module.to(self.device).eval().requires_grad_(False)
        return self._towers

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any] | Tensor, **columns: Any) -> Tensor:
        """``[B]`` float32 scores."""
        captions = [_caption(prompt) for prompt in prompts]
        if len(captions) != len(completions):
            raise RewardError(f"clip_score: {len(captions)} captions for {len(completions)} pictures")
        distinct = list(dict.fromkeys(captions))  # a group shares its caption
        texts = torch.cat([
            self.towers.encode_text(distinct[i : i + self.rows_per_forward])
            for i in range(0, len(distinct), self.rows_per_forward)
        ])
        where = {caption: i for i, caption in enumerate(distinct)}
        images = torch.cat([
            self.encode_images(completions[i : i + self.rows_per_forward])
            for i in range(0, len(completions), self.rows_per_forward)
        ])
        texts = nn.functional.normalize(texts.float(), dim=-1)[[where[c] for c in captions]]
        cosine = (images * texts).sum(-1)
        return self.scale * (cosine.clamp(min=0) if self.clip else cosine)

    def encode_images(self, images: Sequence[Any] | Tensor) -> Tensor:
        """``[B, D]`` float32 normalised embeddings of pictures of any sizes."""
        pixels = torch.stack([self.preprocess(to_tensor(image)) for image in images])
        return nn.functional.normalize(self.towers.encode_image(pixels).float(), dim=-1)

    def preprocess(self, image: Tensor) -> Tensor:
        """``[3, S, S]`` normalised pixels of one ``[3, H, W]`` picture in [0, 1]."""
        if image.dim() != 3 or image.shape[0] != 3:
            raise RewardError(f"clip_score: a picture must be [3, H, W], not {tuple(image.shape)}")
        size = self.towers.image_size
        image = image.to(self.device, torch.float32)
        height, width = image.shape[1:]
        if min(height, width) != size:
            # The longer side is rounded down, as torchvision and the processors of both libraries do.
            shape = (size, width * size // height) if height <= width else (height * size // width, size)
            image = nn.functional.interpolate(image[None], size=shape, mode="bicubic", antialias=True)[0].clamp(0, 1)
        top, left = (image.shape[1] - size) // 2, (image.shape[2] - size) // 2
        image = image[:, top : top + size, left : left + size]
        mean, std = (image.new_tensor(v)[:, None, None] for v in (self.towers.mean, self.towers.std))
        return (image - mean) / std


def _caption(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    from mmalign.rewards.inputs import is_messages
    from mmalign.rewards.text import message_text

    if is_messages(prompt):
        return message_text(prompt[-1])
    raise RewardError(f"clip_score: prompt {prompt!r:.100} is neither a caption nor messages")


def load_towers(model: str, revision: str | None = None) -> _Towers:
    """The CLIP model at ``model``; open_clip for its folders and ``hf-hub:`` ids, transformers for all else.

    Raises ConfigError that says what to do when the model is not on this machine.
    """
    folder = Path(model)
    if (folder / "open_clip_config.json").is_file() or model.startswith("hf-hub:"):
        return _open_clip(model)
    try:
        return _transformers(model, revision)
    except OSError as error:
        raise ConfigError(
            f"clip_score: model={model!r} is neither a folder with a CLIP model nor in the local cache, and could not be "
            f"fetched. On a machine with network run `hf download {model}`, copy the folder here, and set model to its "
            f"path. ({str(error).splitlines()[0]})"
        ) from None


def _transformers(model: str, revision: str | None) -> _Towers:
    from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessor, CLIPModel

    source: dict[str, Any] = {"pretrained_model_name_or_path": model, "revision": revision or "main"}
    config = AutoConfig.from_pretrained(**source)
    if config.model_type != "clip":
        raise ConfigError(f"clip_score: {model!r} is a {config.model_type!r} model; a transformers CLIPModel is needed")
    network = CLIPModel.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    limit = config.text_config.max_position_embeddings
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    with contextlib.suppress(OSError):  # a folder without preprocessor_config.json has CLIP's own constants
        processor = CLIPImageProcessor.from_pretrained(**source)
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)

    def encode_image(pixels: Tensor) -> Tensor:
        return _pooled(network.get_image_features(pixel_values=pixels))

    def encode_text(texts: list[str]) -> Tensor:
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(network.device)
        return _pooled(network.get_text_features(
            input_ids=encoded["input_ids"], attention_mask=encoded.get("attention_mask"),
        ))

    return _Towers(network, encode_image, encode_text, config.vision_config.image_size, mean, std)


def _open_clip(model: str) -> _Towers:
    try:
        import open_clip
    except ImportError:
        raise ConfigError("clip_score: an open_clip model needs `pip install mmalign[clip]`") from None
    folder = Path(model)
    if folder.is_dir():
        network, preprocess = _open_clip_folder(folder)
        settings = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
        context = settings["model_cfg"]["text_cfg"].get("context_length", 77)
        name = f"local-dir:{folder}"
    else:
        network, _ = open_clip.create_model_from_pretrained(model)
        preprocess, context, name = getattr(network.visual, "preprocess_cfg", {}), None, model
    try:
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, KeyError, ValueError, AssertionError):  # open_clip 2.x knows no local-dir
        tokenizer = open_clip.SimpleTokenizer(context_length=context or 77)
    size = network.visual.image_size
    return _Towers(
        network, network.encode_image, lambda texts: network.encode_text(tokenizer(texts).to(next(network.parameters()).device)),
        size[0] if isinstance(size, (tuple, list)) else size,
        tuple(preprocess.get("mean") or CLIP_MEAN), tuple(preprocess.get("std") or CLIP_STD),
    )


def _open_clip_folder(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Model and preprocessing of a local open_clip folder, built from its configuration so that 2.x and 3.x both work."""
    import open_clip
    from safetensors.torch import load_file

    settings = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    weights = folder / "open_clip_model.safetensors"
    if not weights.is_file():
        raise ConfigError(f"clip_score: {folder} has open_clip_config.json but no open_clip_model.safetensors")
    arguments = {k: v for k, v in settings["model_cfg"].items() if k not in ("custom_text", "multimodal_cfg")}
    build = open_clip.model.CustomTextCLIP if settings["model_cfg"].get("custom_text") else open_clip.model.CLIP
    network = build(**arguments)
    network.load_state_dict(load_file(weights))
    return network, settings.get("preprocess_cfg", {})


def _pooled(output: Any) -> Tensor:
    # transformers 5 returns an output object where earlier versions returned the projected embeddings.
    return output if isinstance(output, Tensor) else output.pooler_output

