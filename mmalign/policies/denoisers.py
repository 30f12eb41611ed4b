"""One adapter per diffusion family: how prompts become conditions and how the network is called.

A :class:`Denoiser` hides everything in which Stable Diffusion 1/2, XL and 3 differ. Conditions are dictionaries of
tensors with one entry per row, so the rest of the library stacks, repeats and drops them without knowing their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from mmalign.core.denoising import guided_prediction
from mmalign.core.registry import Registry
from mmalign.errors import CheckpointError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Condition: TypeAlias = "dict[str, Tensor]"
"""What the network sees beside the noisy latents: tensors ``[B, ...]`` by name."""

GuidanceGradient = Literal["both", "cond_only"]

DENOISERS: Registry[type[Denoiser]] = Registry("denoiser")
"""Families by name. A third-party family subclasses :class:`Denoiser`, sets ``pipelines`` and registers itself here."""


class Denoiser:
    """Base adapter; subclasses name the pipeline classes they serve and fill in four methods.

    ``pipe`` keeps the loaded pipeline: its network is the trained module, everything else is frozen.
    """

    pipelines: ClassVar[tuple[str, ...]] = ()
    """Class names of the diffusers pipelines this family serves."""
    network_name: ClassVar[str] = "unet"
    """The pipeline component that denoises."""
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    """Frozen components that read the prompt."""
    tokenizer_names: ClassVar[tuple[str, ...]] = ("tokenizer",)
    """Tokenizers whose limit cuts a prompt."""
    condition_names: ClassVar[tuple[str, ...]] = ("prompt_embeds",)
    """Keys of :meth:`encode`, which are also the columns of encoded rows."""
    geometry_names: ClassVar[tuple[str, ...]] = ()
    """Keys of :meth:`geometry`, columns likewise."""

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe: Any = pipe
        self.network: nn.Module = getattr(pipe, self.network_name)
        self.guidance_gradient: GuidanceGradient = "both"
        self._null: Condition | None = None
        for name in (*self.encoder_names, "vae"):
            component = getattr(pipe, name, None)
            if component is not None:
                component.requires_grad_(False).eval()
        self.check()

    @property
    def config(self) -> Any:
        """The network's own configuration."""
        return getattr(self.pipe, self.network_name).config

    @property
    def device(self) -> torch.device:
        """Where the network's weights are."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the network's weights (of the first floating parameter)."""
        return next(p.dtype for p in self.network.parameters() if p.is_floating_point())

    @property
    def patch(self) -> int:
        """Latent height and width must be multiples of this."""
        return 1

    def check(self) -> None:
        """Refuse networks of the right class that this adapter would call wrongly."""

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Conditions of ``prompts`` in their order, without a graph, on the network's device."""
        for name in self.encoder_names:
            component = getattr(self.pipe, name, None)
            if component is not None:
                component.to(self.device)
        # Outside of autocast, so that a prompt has one encoding wherever it is asked for.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self._encode(list(prompts))

    def _encode(self, prompts: list[str]) -> Condition:
        raise NotImplementedError

    def null(self, n: int) -> Condition:
        """The unconditional condition, ``n`` times (a view). The encoders are frozen, so it is computed once."""
        if self._null is None:
            self._null = self._encode_null()
        return {name: value.to(self.device).expand(n, *value.shape[1:]) for name, value in self._null.items()}

    def _encode_null(self) -> Condition:
        return self.encode([""])

    def geometry(self, original: tuple[int, int], corner: tuple[int, int], target: tuple[int, int]) -> Condition:
        """Further one-row conditions made of image sizes: original (h, w), crop corner (y, x) and target (h, w)."""
        return {}

    def _forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def predict(
        self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor], *, guidance_scale: float | Tensor | None = None,
    ) -> Tensor:
        """The network's output ``[B, ...]`` in float32 for noisy latents ``x[B, ...]`` at network timesteps ``t[B]``.

        With a ``guidance_scale`` g (number or ``[B]``) other than 1: ``null + g (cond - null)``, both halves in one
        forward of ``2B`` rows, null first (classifier-free guidance, Ho and Salimans 2022, arXiv 2207.12598). With
        ``guidance_gradient = "cond_only"`` the null half carries no gradient (Liu et al. 2025, arXiv 2505.05470).
        """
        scale = None if guidance_scale is None else torch.as_tensor(guidance_scale, dtype=torch.float32)
        x = x.to(self.dtype)
        moved = {name: value.to(self.device, self.dtype) for name, value in cond.items()}
        if scale is None or bool((scale == 1).all()):
            return self._forward(x, t, moved).float()
        null = self.null(len(x))
        both = {name: torch.cat([null.get(name, value).to(value), value]) for name, value in moved.items()}
        output = self._forward(torch.cat([x, x]), torch.cat([t, t]), both).float()
        unconditional, conditional = output.chunk(2)
        if self.guidance_gradient == "cond_only":
            unconditional = unconditional.detach()
        return guided_prediction(unconditional, conditional, scale.to(x.device))

    def drop(self, cond: Mapping[str, Tensor], dropped: Tensor) -> Condition:
        """``cond`` with the rows where ``dropped[B]`` is True replaced by the null condition."""
        null = self.null(len(dropped))
        result = {}
        for name, value in cond.items():
            if name in null:
                where = dropped.to(value.device).view(-1, *[1] * (value.dim() - 1))
                value = torch.where(where, null[name].to(value), value)
            result[name] = value
        return result

    def truncated(self, prompts: Iterable[str]) -> list[bool]:
        """Whether no encoder reads the whole prompt."""
        found: list[Any] = [getattr(self.pipe, name, None) for name in self.tokenizer_names]
        tokenizers = [tokenizer for tokenizer in found if tokenizer is not None]
        limits = [self._limit(tokenizer) for tokenizer in tokenizers]
        return [
            all(
                len(tokenizer(prompt, truncation=False, verbose=False).input_ids) > limit
                for tokenizer, limit in zip(tokenizers, limits, strict=True)
            )
            for prompt in prompts
        ]

    def _limit(self, tokenizer: Any) -> int:
        return int(tokenizer.model_max_length)


@DENOISERS.register("stable_diffusion", aliases=("sd1", "sd2"))
class StableDiffusionDenoiser(Denoiser):
    """Stable Diffusion 1.x and 2.x: a UNet with one text encoder (Rombach et al. 2022, arXiv 2112.10752)."""

    pipelines = ("StableDiffusionPipeline",)

    def check(self) -> None:
        """Refuse distilled, class-conditional and inpainting networks."""
        config = self.config
        latent_channels = self.pipe.vae.config.latent_channels
        if config.in_channels != latent_channels:
            raise CheckpointError(f"the UNet takes {config.in_channels} channels but the VAE gives {latent_channels}: an "
                                  "inpainting, depth or upscaling model; use the text-to-image model it was made from")
        if config.time_cond_proj_dim is not None:
            raise CheckpointError("the UNet has time_cond_proj_dim (a guidance-distilled model, such as LCM), whose steps "
                                  "are not those of the diffusion it was distilled from; use the base model")
        if config.class_embed_type is not None or config.num_class_embeds:
            raise CheckpointError("the UNet expects class labels, which no prompt gives; use a text-to-image model")

    def _encode(self, prompts: list[str]) -> Condition:
        embeds, _ = self.pipe.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds}

    def _forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        output = self.network(x, t, encoder_hidden_states=cond["prompt_embeds"], return_dict=False)[0]
        assert isinstance(output, Tensor)
        return output


@DENOISERS.register("stable_diffusion_xl", aliases=("sdxl",))
class StableDiffusionXLDenoiser(StableDiffusionDenoiser):
    """SDXL base: two text encoders, a pooled embedding and six size numbers (Podell et al. 2023, arXiv 2307.01952)."""

    pipelines = ("StableDiffusionXLPipeline",)
    encoder_names = ("text_encoder", "text_encoder_2")
    tokenizer_names = ("tokenizer", "tokenizer_2")
    condition_names = ("prompt_embeds", "pooled_prompt_embeds")
    geometry_names = ("time_ids",)

    def check(self) -> None:
        """Also refuse the refiner, whose extra conditions are an aesthetic score."""
        super().check()
        if self.pipe.config.get("requires_aesthetics_score") or self.pipe.text_encoder is None:
            raise CheckpointError("this is an SDXL refiner (it reads an aesthetic score); use the SDXL base model")

    def _encode(self, prompts: list[str]) -> Condition:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def _encode_null(self) -> Condition:
        empty = self.encode([""])
        if self.pipe.config.get("force_zeros_for_empty_prompt", True):
            return {name: torch.zeros_like(value) for name, value in empty.items()}
        return empty

    def geometry(self, original: tuple[int, int], corner: tuple[int, int], target: tuple[int, int]) -> Condition:
        """``time_ids[1, 6]``: original height and width, crop top and left, target height and width."""
        return {"time_ids": torch.tensor([[*original, *corner, *target]], dtype=torch.float32)}

    def _forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        added = {"text_embeds": cond["pooled_prompt_embeds"], "time_ids": cond["time_ids"]}
        output = self.network(
            x, t, encoder_hidden_states=cond["prompt_embeds"], added_cond_kwargs=added, return_dict=False)[0]
        assert isinstance(output, Tensor)
        return output


@DENOISERS.register("stable_diffusion_3", aliases=("sd3",))
class StableDiffusion3Denoiser(Denoiser):
    """SD3 and SD3.5: a transformer that predicts the flow velocity (Esser et al. 2024, arXiv 2403.03206)."""

    pipelines = ("StableDiffusion3Pipeline",)
    network_name = "transformer"
    encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizer_names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    condition_names = ("prompt_embeds", "pooled_prompt_embeds")
    max_sequence_length = 256
    """Tokens the T5 encoder reads."""

    @property
    def patch(self) -> int:
        """Side of a transformer patch in latent cells."""
        return int(self.config.patch_size)

    def _encode(self, prompts: list[str]) -> Condition:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts, None, None, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def _limit(self, tokenizer: Any) -> int:
        return self.max_sequence_length if tokenizer is self.pipe.tokenizer_3 else super()._limit(tokenizer)

    def _forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        output = self.network(
            hidden_states=x, timestep=t, encoder_hidden_states=cond["prompt_embeds"],
            pooled_projections=cond["pooled_prompt_embeds"], return_dict=False)[0]
        assert isinstance(output, Tensor)
        return output


def build_denoiser(pipe: DiffusionPipeline) -> Denoiser:
    """The adapter of a loaded pipeline; raises CheckpointError listing the families when there is none."""
    name = type(pipe).__name__
    for family in DENOISERS:
        adapter = DENOISERS.get(family)
        if name in adapter.pipelines:
            return adapter(pipe)
    known = ", ".join(sorted(p for family in DENOISERS for p in DENOISERS.get(family).pipelines))
    raise CheckpointError(f"no denoiser adapter for {name}; supported pipelines: {known}. Register a subclass of "
                          "mmalign.policies.denoisers.Denoiser in DENOISERS to add a family")
