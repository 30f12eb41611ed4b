"""Diffusion models as policies: denoising errors of pictures, Gaussian steps of rollouts, sampling, saving.

Rows come in three forms, and :meth:`DiffusionPolicy.log_probs` tells them apart by their columns:

============ =========================================================== ================= ==========================
rows         columns                                                     made by           score
============ =========================================================== ================= ==========================
data         ``latents`` and the prompt                                  ``encode_rows``   A = 1: ``-scale error(t, noise)``
transition   ``latents``, ``next_latents``, one step's numbers, prompt   ``unfold``        A = 1: ``log N(next; mean, std)``
trajectory   ``trajectory[B, S + 1, ...]``, S steps' numbers, prompt     ``sample``        A = S, 0 at steps without noise
============ =========================================================== ================= ==========================

The prompt is a ``prompt`` column of texts (encoded when needed, from a cache), or the encoded columns themselves
(``prompt_embeds``, ...). Latents are normalised as the network sees them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmalign.core.denoising import denoising_error, denoising_logratio, gaussian_log_prob
from mmalign.core.logprobs import ActionScores
from mmalign.data.rows import Rows
from mmalign.errors import ConfigError, DataError, ExportError
from mmalign.policies import diffusion_export, diffusion_rollout
from mmalign.policies.base import DiffusionSampling, Draw, PreparationReport, Rollout
from mmalign.policies.denoisers import Condition, GuidanceGradient, build_denoiser
from mmalign.policies.diffusion_records import Denoising, Transition, stacked
from mmalign.policies.diffusion_records import DiffusionDraw as DiffusionDraw
from mmalign.policies.diffusion_steps import STEP_COLUMNS, build_schedule
from mmalign.policies.image_examples import fit_image, image_key, plain_image, prepare_images, read_image
from mmalign.policies.latent_codec import LatentCodec
from mmalign.policies.modules import (
    adapter_layers,
    adapter_parameter_names,
    evaluating,
    is_adapted,
    is_peft_model,
    module_identity,
    unwrap,
)
from mmalign.policies.pretrained import default_device
from mmalign.policies.tensor_cache import TensorCache

logger = logging.getLogger(__name__)

PAIR = ("chosen", "rejected")


class DiffusionPolicy:
    """A diffusers pipeline behind the :class:`~mmalign.policies.base.Policy` contract.

    The trained module is the denoising network; text encoders and VAE are frozen and in evaluation mode. The pipeline's
    own scheduler is read (prediction type, betas or sigmas, spacing) and saved back unchanged.

    Args:
        pipe: a loaded pipeline of a family in :data:`mmalign.policies.denoisers.DENOISERS`.
        caption_dropout: probability that a data row is scored without its caption (Wallace et al. 2023, arXiv
            2311.12908, use 0.2).
        error_scale: a data row's score is ``-error_scale * error``. 1/2 gives Diffusion-DPO its published beta, 1 is for
            Diffusion-KTO; with 1/2 the supervised loss is half the mean squared error.
        error_space: ``native`` measures the error in the network's own target, ``epsilon`` converts it to noise, so that
            one beta serves models of different prediction types.
        resolution: side or (height, width) in pixels that pictures are resized and cropped to; None takes the model's.
        guidance_gradient: ``cond_only`` lets no gradient through the unconditional half of guided steps.
        cache_latents: megabytes of encoded pictures kept in memory; 0 encodes anew in every epoch.
        cache_prompts: megabytes of encoded prompts kept in memory.
        rows_per_forward: most network evaluations in one forward when whole trajectories are scored, and pictures
            decoded together.
    """

    modality = "diffusion"

    def __init__(
        self, pipe: Any, *, caption_dropout: float = 0.2, error_scale: float = 0.5,
        error_space: Literal["native", "epsilon"] = "native", resolution: int | tuple[int, int] | None = None,
        guidance_gradient: GuidanceGradient = "both", cache_latents: float = 1024, cache_prompts: float = 512,
        rows_per_forward: int = 16,
    ) -> None:
        if not 0 <= caption_dropout <= 1:
            raise ConfigError(f"caption_dropout: must be in [0, 1], not {caption_dropout}")
        if error_space not in ("native", "epsilon"):
            raise ConfigError(f"error_space: must be native or epsilon, not {error_space!r}")
        if guidance_gradient not in ("both", "cond_only"):
            raise ConfigError(f"guidance_gradient: must be both or cond_only, not {guidance_gradient!r}")
        if not error_scale > 0 or rows_per_forward < 1:
            raise ConfigError(f"error_scale and rows_per_forward must be positive, not {error_scale} and {rows_per_forward}")
        self.denoiser = build_denoiser(pipe)
        self.denoiser.guidance_gradient = guidance_gradient
        self.schedule = build_schedule(pipe.scheduler)
        self.codec = LatentCodec(pipe.vae, patch=self.denoiser.patch, rows_per_forward=rows_per_forward)
        self.caption_dropout, self.error_scale, self.error_space = caption_dropout, error_scale, error_space
        self.rows_per_forward = rows_per_forward
        self.resolution = self._resolution(resolution)
        self.weight_version = 0
        self._latents, self._prompts = TensorCache(cache_latents), TensorCache(cache_prompts)
        self._frozen_identity: str | None = None

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, dtype: str = "float32", device: str | torch.device | None = None,
        revision: str | None = None, variant: str | None = None, adapter: str | Path | None = None,
        merge_adapter: bool = False, components: Mapping[str, Any] | None = None, **settings: Any,
    ) -> DiffusionPolicy:
        """Load a pipeline folder or hub id, and optionally a LoRA on top.

        The module is in training mode; without ``adapter`` every weight of it is trainable, with one only the adapter
        (called "default"), or, when ``merge_adapter`` folds it into the weights, all of them again. ``components`` and
        ``variant`` go to diffusers (:func:`~mmalign.policies.diffusion_export.load_pipeline`), ``settings`` to the class.
        Raises CheckpointError for folders that cannot be used, ConfigError for unknown options.
        """
        pipe = diffusion_export.load_pipeline(
            path, dtype=dtype, revision=revision, variant=variant, components=components)
        if adapter is not None:
            diffusion_export.load_lora(pipe, adapter, merge=merge_adapter)
        policy = cls(pipe, **settings)
        network = policy.module.to(default_device() if device is None else torch.device(device))
        kept = adapter_parameter_names(network)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in kept if kept else True)
        network.train()
        logger.info("loaded %s: %s", path, policy.summary())
        return policy

    # -- the module ------------------------------------------------------------------------------------------------

    @property
    def pipe(self) -> Any:
        """The diffusers pipeline that holds every component."""
        return self.denoiser.pipe

    @property
    def module(self) -> nn.Module:
        """The denoising network, as it is wrapped now."""
        return self.denoiser.network

    def replace_module(self, module: nn.Module) -> None:
        """Predict and save with ``module`` from now on."""
        inner = unwrap(module)
        if is_peft_model(inner):  # the pipeline saves diffusers models, and peft wraps one
            inner = inner.get_base_model()
        setattr(self.pipe, self.denoiser.network_name, inner)
        self.denoiser.network = module

    @property
    def device(self) -> torch.device:
        """Where the network's weights are; encoders and VAE follow it."""
        return self.denoiser.device

    def gradient_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass (or stop doing so)."""
        network = getattr(self.pipe, self.denoiser.network_name)
        if enable:
            network.enable_gradient_checkpointing()
        else:
            network.disable_gradient_checkpointing()

    def summary(self) -> str:
        """One line: pipeline, size, precision, device, prediction type, adapters."""
        parameters = list(self.module.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        kinds = "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
        return (f"{type(self.pipe).__name__}, {sum(p.numel() for p in parameters):,} parameters in the network ({trained:,} "
                f"trained), {kinds} on {self.device}, {self.schedule.prediction}"
                f"{', adapter' if is_adapted(self.module) else ''}")

    def _resolution(self, given: int | tuple[int, int] | None) -> tuple[int, int]:
        if given is None:
            size = self.denoiser.config.sample_size
            if size is None:
                raise ConfigError("resolution: the model does not name its own; set it, in pixels")
            height, width = (size, size) if isinstance(size, int) else size
            return height * self.codec.factor, width * self.codec.factor
        height, width = (given, given) if isinstance(given, int) else given
        self.codec.latent_shape(height, width)
        return height, width

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """``(C, h, w)`` of latents of pictures of the given size (None: the policy's resolution)."""
        return self.codec.latent_shape(
            self.resolution[0] if height is None else height, self.resolution[1] if width is None else width)

    # -- conditions ------------------------------------------------------------------------------------------------

    def conditions(self, prompts: Sequence[str]) -> Condition:
        """Encoded prompts, one row each, on the network's device.

        Each prompt is encoded alone, so that its encoding does not depend, in its last bits, on its neighbours.
        """
        encoded: dict[str, Condition] = {}
        for prompt in dict.fromkeys(prompts):
            found = self._prompts.get(prompt)
            if found is None:
                found = {name: value[0].cpu() for name, value in self.denoiser.encode([prompt]).items()}
                self._prompts.put(prompt, found)
            encoded[prompt] = found
        return {
            name: torch.stack([encoded[prompt][name] for prompt in prompts]).to(self.device)
            for name in self.denoiser.condition_names
        }

    def size_condition(self, rows: int, shape: tuple[int, ...]) -> Condition:
        """The size columns (SDXL's ``time_ids``) of uncropped pictures whose latents have ``shape``; {} for others."""
        size = shape[-2] * self.codec.factor, shape[-1] * self.codec.factor
        return {name: value.expand(rows, -1).clone() for name, value in self.denoiser.geometry(size, (0, 0), size).items()}

    def _row_condition(self, rows: Rows, shape: torch.Size) -> Condition:
        if all(name in rows for name in self.denoiser.condition_names):
            cond = {name: stacked(rows[name]).to(self.device) for name in self.denoiser.condition_names}
        else:
            cond = self.conditions(rows["prompt"])
        if all(name in rows for name in self.denoiser.geometry_names):
            return cond | {name: stacked(rows[name]).to(self.device) for name in self.denoiser.geometry_names}
        return cond | {name: value.to(self.device) for name, value in self.size_condition(len(rows), shape).items()}

    # -- data ------------------------------------------------------------------------------------------------------

    def prepare_dataset(
        self, examples: Sequence[Mapping[str, Any]], *, fields: tuple[str, ...] = (),
    ) -> tuple[Sequence[Mapping[str, Any]], PreparationReport]:
        """Read every picture and caption once; drop pairs without a difference; count captions no encoder reads whole.

        ``fields`` () needs ``prompt`` and ``image`` (or ``images`` of one); ("chosen", "rejected") needs pictures in
        those columns and a ``prompt``, or ``chosen_caption`` and ``rejected_caption``; where only some rows have captions
        of their own, the prompt fills in. The result is lazy: pictures are read again batch by batch.

        Raises:
            DataError: naming column and row of what is missing, unreadable or too small; or when no row is left.
        """
        return prepare_images(examples, fields, smallest=self.codec.factor, truncated=self.denoiser.truncated)

    def check_prompts(self, prompts: Sequence[Any]) -> None:
        """Raise DataError for a prompt that is not text; captions over the encoder's limit are cut when encoded."""
        for row, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise DataError(f"data: the prompt of row {row} is a {type(prompt).__name__}; images are drawn from text")

    def encode_rows(self, examples: Sequence[Mapping[str, Any]]) -> Rows:
        """Data rows of examples: float32 ``latents[B, C, h, w]`` and encoded prompts, on the CPU.

        Pairs give ``chosen_latents`` and ``rejected_latents`` with one ``prompt_embeds``, or, with captions per side,
        ``chosen_prompt_embeds`` and ``rejected_prompt_embeds``. Columns of numbers (``label``, ``margin``, ...) come along.
        """
        examples = list(examples)
        if not examples:
            return Rows({})
        fields = PAIR if all(name in examples[0] for name in PAIR) else ("",)
        columns: dict[str, Any] = {}
        for field in fields:
            prefix = f"{field}_" if field else ""
            pictures = [self._encode_picture(example, field, row) for row, example in enumerate(examples)]
            columns |= {f"{prefix}{name}": torch.stack([picture[name] for picture in pictures]) for name in pictures[0]}
        captions = [f"{field}_caption" for field in fields]
        if fields == PAIR and all(example.get(name) is not None for name in captions for example in examples):
            for field, name in zip(fields, captions):
                encoded = self.conditions([example[name] for example in examples])
                columns |= {f"{field}_{key}": value.cpu() for key, value in encoded.items()}
        else:
            prompts = [example.get("prompt") for example in examples]
            if not all(isinstance(prompt, str) for prompt in prompts):
                raise DataError(f"column 'prompt' is missing or not text; columns are {', '.join(examples[0])}")
            columns |= {name: value.cpu() for name, value in self.conditions([str(p) for p in prompts]).items()}
        for name in examples[0]:
            values = [example.get(name) for example in examples]
            if name not in columns and all(isinstance(value, (bool, int, float)) for value in values):
                columns[name] = torch.tensor(values)
        return Rows(columns)

    def _encode_picture(self, example: Mapping[str, Any], field: str, row: int) -> dict[str, Tensor]:
        value = example.get(field) if field else plain_image(example)
        if value is None:
            raise DataError(f"row {row}: column {field or 'image'!r} is missing or null; columns are {', '.join(example)}")
        key = (image_key(value), self.resolution)
        found = self._latents.get(key)
        if found is None:
            image = read_image(value, where=f"row {row}, column {field or 'image'!r}")
            pixels, original, corner = fit_image(image, *self.resolution)
            found = {"latents": self.codec.encode(pixels[None], self.device)[0]}
            found |= {name: size[0] for name, size in self.denoiser.geometry(original, corner, self.resolution).items()}
            self._latents.put(key, found)
        return found

    # -- scoring ---------------------------------------------------------------------------------------------------

    def action_mask(self, rows: Rows) -> Tensor:
        """``[B, A]`` bool on the CPU: data and transition rows are one action, trajectories one per stochastic step."""
        if "trajectory" in rows:
            return self.schedule.std({name: rows[name].cpu() for name in STEP_COLUMNS}) > 0
        return torch.ones(len(rows), 1, dtype=torch.bool)

    def draw(self, rows: Rows, generator: torch.Generator) -> DiffusionDraw | None:
        """Timestep, noise and caption dropout of data rows (``latents``, or ``chosen_latents``); None for rollout rows.

        Drawn row after row, so that a generator gives the same draws however the rows are split over calls.
        """
        if "trajectory" in rows or "next_latents" in rows:
            return None
        name = next((name for name in ("latents", *(f"{field}_latents" for field in PAIR)) if name in rows), None)
        if name is None:
            raise DataError(f"rows hold no latents (columns: {', '.join(rows)}); make them with encode_rows")
        timesteps, noise, dropped = [], [], []
        for latents in rows[name]:
            timesteps.append(self.schedule.draw_timestep(generator))
            noise.append(torch.randn(latents.shape, generator=generator, device=generator.device))
            dropped.append(float(torch.rand((), generator=generator, device=generator.device)) < self.caption_dropout)
        stacked = torch.stack(noise) if noise else torch.zeros(0)
        return DiffusionDraw(torch.tensor(timesteps, dtype=torch.long), stacked.cpu(), torch.tensor(dropped, dtype=torch.bool))

    def log_probs(
        self, rows: Rows, *, draw: Draw | None = None, temperature: float = 1.0, want: Iterable[str] = (),
    ) -> ActionScores:
        """Score rows of any of the three forms (see the module's table), float32.

        Without gradients the network is in evaluation mode; with them it is in the caller's mode. Steps of rollouts are
        scored with the guidance they were sampled with. ``want`` may hold ``entropy`` (of a step's Gaussian; it does not
        depend on the network). Raises ValueError for data rows without a ``draw``, another ``temperature`` than 1, or
        other fields in ``want``.
        """
        if temperature != 1:
            raise ValueError(f"temperature is {temperature}; a diffusion policy has none, leave it at 1")
        wanted = set(want)
        if unknown := wanted - ({"entropy"} if "latents" not in rows or "next_latents" in rows else set()):
            raise ValueError(f"want: a diffusion policy has no {', '.join(sorted(unknown))} for these rows")
        if not torch.is_grad_enabled():
            with evaluating(self.module):
                return self._log_probs(rows, draw, "entropy" in wanted)
        return self._log_probs(rows, draw, "entropy" in wanted)

    def _log_probs(self, rows: Rows, draw: Draw | None, entropy: bool) -> ActionScores:
        if "trajectory" in rows:
            return self._score_trajectories(rows, entropy)
        if "next_latents" in rows:
            return self._score_transitions(rows, entropy)
        error = self.denoising_error(self.denoise(rows, draw))
        logp = denoising_logratio(error, 0.0, scale=self.error_scale)[:, None]
        return ActionScores(logp, torch.ones_like(logp, dtype=torch.bool))

    def denoise(self, rows: Rows, draw: Draw | None) -> Denoising:
        """Add the draw's noise to data rows and predict, without guidance; dropped captions become the null condition."""
        if draw is None:
            raise ValueError("scoring data rows needs a draw (timesteps and noise); make one with draw(rows, generator) and "
                             "share it between policy, reference and both samples of a pair")
        latents, noise = stacked(rows["latents"]).to(self.device).float(), draw.noise.to(self.device).float()
        if noise.shape != latents.shape:
            raise ValueError(f"the draw has noise of shape {list(noise.shape)}, the rows latents of {list(latents.shape)}")
        timesteps = draw.timesteps.to(self.device)
        cond = self._row_condition(rows, latents.shape)
        dropped = getattr(draw, "drop_caption", None)
        if dropped is not None and bool(dropped.any()):
            cond = self.denoiser.drop(cond, dropped.to(self.device))
        noisy = self.schedule.noise.add_noise(latents, noise, timesteps)
        pred = self.denoiser.predict(noisy, self.schedule.network_time(timesteps), cond)
        target = self.schedule.noise.target(self.schedule.prediction, latents, noise, timesteps)
        return Denoising(pred, target, noisy, timesteps)

    def denoising_error(self, denoising: Denoising) -> Tensor:
        """``[B]`` mean squared error of a forward in the policy's ``error_space``."""
        if self.error_space == "native":
            return denoising_error(denoising.pred, denoising.target)
        pred, target = (
            self.schedule.noise.convert(
                value, denoising.noisy, denoising.timesteps, source=self.schedule.prediction, target="epsilon")
            for value in (denoising.pred, denoising.target)
        )
        return denoising_error(pred, target)

    def transition(self, rows: Rows) -> Transition:
        """The step of every transition row under the current network, with the guidance it was sampled with."""
        x = stacked(rows["latents"]).to(self.device)
        numbers = {name: rows[name].to(self.device) for name in STEP_COLUMNS}
        pred = self.denoiser.predict(
            x, numbers["step_time"], self._row_condition(rows, x.shape), guidance_scale=rows["guidance_scale"])
        mean, std = self.schedule.transition(x.float(), pred, numbers)
        return Transition(mean, std, stacked(rows["next_latents"]).to(self.device).float())

    def _score_transitions(self, rows: Rows, entropy: bool) -> ActionScores:
        dims = set(rows["dims"]) or {"mean"}
        if len(dims) > 1:
            raise ValueError(f"rows of one forward mix log-probs by {' and '.join(sorted(dims))}; score them apart")
        how = dims.pop()
        step = self.transition(rows)
        logp = gaussian_log_prob(step.next_latents, step.mean, step.std, dims=how)[:, None]
        scores = ActionScores(logp, torch.ones_like(logp, dtype=torch.bool))
        if entropy:
            size = step.mean[0].numel() if how == "sum" else 1
            scores.entropy = size * (step.std.log() + 0.5 * math.log(2 * math.pi * math.e))[:, None]
        return scores

    def _score_trajectories(self, rows: Rows, entropy: bool) -> ActionScores:
        """Every stochastic step of every row, a bounded number of network evaluations at a time."""
        mask = self.action_mask(rows)
        sample, step = mask.nonzero(as_tuple=True)
        logp = torch.zeros(mask.shape, device=self.device)
        entropies = torch.zeros_like(logp)
        for at in torch.arange(len(sample)).split(self.rows_per_forward):
            i, s = sample[at], step[at]
            path = rows["trajectory"]
            steps = rows.without({"trajectory", *STEP_COLUMNS}).take(i).with_columns(
                latents=path[i, s], next_latents=path[i, s + 1], **{name: rows[name][i, s] for name in STEP_COLUMNS})
            scores = self._score_transitions(steps, entropy)
            index = i.to(self.device), s.to(self.device)
            logp = logp.index_put(index, scores.logp[:, 0])
            if scores.entropy is not None:
                entropies = entropies.index_put(index, scores.entropy[:, 0])
        return ActionScores(logp, mask.to(self.device), entropy=entropies if entropy else None)

    # -- sampling --------------------------------------------------------------------------------------------------

    def sample(self, prompts: Sequence[Any], n: int, sampling: DiffusionSampling, generator: torch.Generator) -> Rollout:
        """``n`` pictures of every prompt (text), with the log-prob of every stochastic step.

        Noise belongs to the row, so ``rows_per_forward`` changes nothing but rounding. Steps without noise (a last step to
        alpha_bar 1) are kept in the trajectory and masked. With ``eta`` 0 (``noise_level`` 0 for flow models) no step has
        a density: the rollout's rows are data rows of the final latents, its mask is False everywhere, and policy
        gradients refuse it. The network is in evaluation mode; the stored latents are in its precision.
        """
        rollout = diffusion_rollout.sample_rollout(self, prompts, n, sampling, generator)
        rollout.weight_version = self.weight_version
        return rollout

    def unfold(self, rollout: Rollout, *, fraction: float, generator: torch.Generator) -> Rows:
        """One transition row per (sample, stochastic step), a random ``fraction`` of the steps in random order.

        Columns: ``latents`` and ``next_latents`` (lists of views into the rollout), ``step_index[N]``, the step's numbers,
        ``guidance_scale[N]``, ``dims``, ``prompt``, ``old_logp[N, 1]``, ``advantages[N]``, ``group[N]``, ``ref_logp[N, 1]``
        when known, and the rollout's further columns of numbers. Raises ConfigError for a deterministic rollout and
        DataError without an ``advantages`` column (one number per sample, or one per step).
        """
        return diffusion_rollout.unfold_rollout(rollout, fraction=fraction, generator=generator)

    def clean_rows(self, rollout: Rollout) -> Rows:
        """Data rows of the sampled pictures (final latents), for losses that add fresh noise to them."""
        return diffusion_rollout.clean_rows(rollout)

    # -- identity and saving ---------------------------------------------------------------------------------------

    def identity(self) -> str:
        """SHA-256 of everything a score depends on: network, adapters and their strength, encoders, VAE, schedule."""
        if self._frozen_identity is None:
            frozen = [getattr(self.pipe, name, None) for name in (*self.denoiser.encoder_names, "vae")]
            parts = [module_identity(part) for part in frozen if part is not None]
            self._frozen_identity = hashlib.sha256("".join(parts).encode()).hexdigest()
        layers = adapter_layers(unwrap(self.module))
        active = [layer for layer in layers if not layer._disable_adapters]
        strength = [{str(k): float(v) for k, v in getattr(layer, "scaling", {}).items()} for layer in active]
        settings = [self._frozen_identity, strength, dict(self.pipe.scheduler.config), self.error_scale, self.error_space]
        text = json.dumps(settings, sort_keys=True, default=str)
        return hashlib.sha256(f"{module_identity(self.module)} {text}".encode()).hexdigest()

    def save_pretrained(self, folder: Path) -> None:
        """Write the pipeline, or, when the network carries LoRA adapters, the LoRA file with its configuration.

        Either loads with plain diffusers: ``DiffusionPipeline.from_pretrained(folder)``, or
        ``pipe.load_lora_weights(folder)`` on the base pipeline. Raises ExportError for adapters diffusers cannot read, and
        when weights outside of the adapters are trained, which a LoRA file would lose.
        """
        folder = Path(folder)
        if is_adapted(self.module):
            kept = adapter_parameter_names(self.module)
            lost = [name for name, p in self.module.named_parameters() if p.requires_grad and name not in kept]
            if lost:
                raise ExportError(f"{len(lost)} trained weights are not part of the adapter ({', '.join(lost[:3])}, ...); merge "
                                  "the adapter into the weights and export the pipeline")
        folder.mkdir(parents=True, exist_ok=True)
        if is_adapted(self.module):
            diffusion_export.save_lora(
                self.pipe, folder, names=(self.denoiser.network_name, *self.denoiser.encoder_names))
        else:
            diffusion_export.save_pipeline(self.pipe, folder)
