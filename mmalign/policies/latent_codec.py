"""Pixels to latents and back through the frozen autoencoder of a latent diffusion model."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmalign.errors import ConfigError, DataError


class LatentCodec:
    """The VAE of a pipeline: pixels ``[B, 3, H, W]`` in [0, 1] <-> normalised latents ``[B, C, H/f, W/f]``, float32.

    Encoding takes the mode of the posterior, so an image has one latent. Latents are shifted and scaled as the VAE's
    configuration says (``shift_factor``, ``scaling_factor``, or per-channel ``latents_mean`` and ``latents_std``).
    The VAE runs in float32 whatever the network's precision: SDXL's overflows in float16.
    """

    def __init__(self, vae: Any, *, patch: int = 1, rows_per_forward: int = 16) -> None:
        self.vae = vae.float()
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.patch, self.rows_per_forward = patch, rows_per_forward
        config = vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        self.scaling = float(config.scaling_factor)
        self.shift = float(getattr(config, "shift_factor", None) or 0.0)
        self.mean = torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1) if mean is not None else None
        self.std = torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1) if std is not None else None

    @property
    def multiple(self) -> int:
        """Image height and width must be multiples of this."""
        return self.factor * self.patch

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """``(C, h, w)`` of the latents of an image; raises ConfigError when the size does not divide."""
        for name, value in (("height", height), ("width", width)):
            if value <= 0 or value % self.multiple:
                lower = max(self.multiple, value - value % self.multiple)
                raise ConfigError(f"image {name} {value} is not a multiple of {self.multiple}, the pixels of one latent "
                                  f"cell; use {lower}")
        return int(self.vae.config.latent_channels), height // self.factor, width // self.factor

    @torch.no_grad()
    def encode(self, pixels: Tensor, device: torch.device) -> Tensor:
        """Latents of ``pixels[B, 3, H, W]`` in [0, 1], on the CPU.

        One picture at a time, so that a latent does not depend, in its last bits, on what it was encoded with.
        """
        self.vae.to(device)
        with torch.autocast(device.type, enabled=False):
            return torch.cat([
                self._normalise(self.vae.encode(picture.to(device) * 2 - 1).latent_dist.mode()).cpu()
                for picture in pixels.split(1)
            ])

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels ``[B, 3, H, W]`` of latents, not clamped and differentiable: [0, 1] up to what the decoder overshoots."""
        self.vae.to(latents.device)
        with torch.autocast(latents.device.type, enabled=False):
            output = self.vae.decode(self._denormalise(latents.float()), return_dict=False)[0]
        assert isinstance(output, Tensor)
        return output / 2 + 0.5

    @torch.no_grad()
    def images(self, latents: Tensor, device: torch.device) -> list[Image.Image]:
        """Decoded, clamped pictures of ``latents``."""
        return [image for chunk in latents.split(self.rows_per_forward)
                for image in to_images(self.decode(chunk.to(device)))]

    def _normalise(self, raw: Tensor) -> Tensor:
        if self.mean is not None and self.std is not None:
            return (raw - self.mean.to(raw)) * self.scaling / self.std.to(raw)
        return (raw - self.shift) * self.scaling

    def _denormalise(self, latents: Tensor) -> Tensor:
        if self.mean is not None and self.std is not None:
            return latents * self.std.to(latents) / self.scaling + self.mean.to(latents)
        return latents / self.scaling + self.shift


def to_images(pixels: Tensor) -> list[Image.Image]:
    """8-bit pictures of pixels ``[B, 3, H, W]``; values outside [0, 1] are clamped, NaN is refused."""
    if not bool(torch.isfinite(pixels).all()):
        raise DataError("the decoder returned NaN or infinite pixels: the latents have diverged; lower the learning rate or "
                        "the guidance scale, or use float32")
    bytes_ = pixels.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in bytes_]
