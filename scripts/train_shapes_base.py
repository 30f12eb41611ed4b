"""Trains the packaged ``shapes`` text-to-image model from scratch: a diffusers StableDiffusionPipeline at 32 x 32.

A latent diffusion model in miniature (Rombach et al., 2022, arXiv:2112.10752): a variational autoencoder with 4 x 8 x 8
latents, a word-level CLIP text encoder and a UNet of about one million parameters, trained with the epsilon objective,
dropped captions for classifier-free guidance (Ho and Salimans, 2022, arXiv:2207.12598) and an exponential moving
average of the weights. About ten minutes on two CPU cores::

    python scripts/train_shapes_base.py                       # rebuilds mmalign/data/files/shapes_base
    python scripts/train_shapes_base.py --output /tmp/base --steps 500 --images 1000

The folder loads with ``diffusers.StableDiffusionPipeline.from_pretrained``; ``training.json`` in it has the recipe,
the losses and the scores of the checker in ``mmalign.rewards.shapes_check``.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mmalign.core.seeding import derive_seed, generator
from mmalign.data.shapes import COLORS, SHAPES, caption_grid, make_shapes, shapes_base_path
from mmalign.rewards.shapes_check import check_image

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result; written to ``training.json``."""

    seed: int = 0
    size: int = 32
    images: int = 8000
    vae_steps: int = 1500
    vae_batch: int = 16
    vae_lr: float = 2e-3
    kl_weight: float = 1e-4
    steps: int = 3000
    batch: int = 64
    lr: float = 2e-3
    weight_decay: float = 1e-2
    warmup: int = 100
    ema_decay: float = 0.998
    caption_dropout: float = 0.15
    max_grad_norm: float = 1.0
    sampling_steps: int = 25
    samples_per_caption: int = 4


def word_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, after which every word of the list is one token."""
    pieces = [(*word[:-1], word[-1] + "</w>") for word in sorted(set(words))]
    merges: list[tuple[str, str]] = []
    while any(len(piece) > 1 for piece in pieces):
        pairs = [pair for piece in pieces for pair in itertools.pairwise(piece)]
        best = max(sorted(set(pairs)), key=pairs.count)
        merges.append(best)
        merged = []
        for piece in pieces:
            joined: list[str] = []
            for symbol in piece:
                if joined and (joined[-1], symbol) == best:
                    joined[-1] += symbol
                else:
                    joined.append(symbol)
            merged.append(tuple(joined))
        pieces = merged
    return merges


def build_tokenizer(words: list[str], max_length: int = 24) -> CLIPTokenizer:
    """A CLIP tokenizer with one token per word of the captions; any other text falls back to smaller pieces."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    merges = word_merges(words)
    symbols = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(pair) for pair in merges), BOS, EOS]
    vocabulary = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)


def build_models(tokenizer: CLIPTokenizer, recipe: Recipe) -> tuple[AutoencoderKL, CLIPTextModel, UNet2DConditionModel]:
    """The three networks, freshly initialised from the recipe's seed."""
    torch.manual_seed(derive_seed(recipe.seed, "shapes_base", "init"))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=recipe.size,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=recipe.size // 4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    return vae, text_encoder, unet


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Factor of the peak rate: linear warm-up, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def index_batches(n: int, batch: int, seed: int, purpose: str) -> Iterator[Tensor]:
    """Endless index batches of a fresh permutation per epoch; the incomplete last one is dropped."""
    epoch = 0
    while True:
        order = torch.randperm(n, generator=generator(seed, "shapes_base", purpose, epoch))
        yield from order[: n - n % batch].split(batch)
        epoch += 1


def optimise(loss: Tensor, optimiser: torch.optim.Optimizer, factor: float, peak: float, max_norm: float) -> None:
    """One clipped optimiser step at ``factor * peak``."""
    optimiser.zero_grad()
    loss.backward()
    for group in optimiser.param_groups:
        group["lr"] = factor * peak
        nn.utils.clip_grad_norm_(group["params"], max_norm)
    optimiser.step()


def train_vae(vae: AutoencoderKL, images: Tensor, recipe: Recipe) -> dict[str, float]:
    """Fits the autoencoder to ``images[N, 3, H, W]`` in [-1, 1]: L1 + squared error + a light KL to the unit normal."""
    started = time.perf_counter()
    noise = generator(recipe.seed, "shapes_base", "noise", "vae")
    optimiser = torch.optim.AdamW(vae.parameters(), lr=recipe.vae_lr, weight_decay=0.0)
    batches = index_batches(len(images), recipe.vae_batch, recipe.seed, "vae")
    for step in range(recipe.vae_steps):
        batch = images[next(batches)]
        posterior = vae.encode(batch).latent_dist
        error = vae.decode(posterior.sample(generator=noise)).sample - batch
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = error.abs().mean() + error.square().mean() + recipe.kl_weight * kl
        factor = learning_rate(step, recipe.vae_steps, recipe.warmup)
        optimise(loss, optimiser, factor, recipe.vae_lr, recipe.max_grad_norm)
        if step % 100 == 0 or step == recipe.vae_steps - 1:
            print(f"vae {step:5d}  l1 {error.abs().mean():.4f}  mse {error.square().mean():.5f}  kl {kl:.2f}", flush=True)
    vae.eval().requires_grad_(False)
    return {
        "seconds": time.perf_counter() - started,
        "l1": float(error.detach().abs().mean()),
        "kl_per_latent": float(kl.detach()),
    }


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: Tensor, batch: int = 250) -> Tensor:
    """Posterior parameters ``[N, 8, 8, 8]`` (mean and log-variance) of all images."""
    return torch.cat([vae.encode(chunk).latent_dist.parameters for chunk in images.split(batch)])


def draw_latents(parameters: Tensor, scale: float, noise: torch.Generator) -> Tensor:
    """A sample of the posterior, scaled to unit variance."""
    mean, log_variance = parameters.chunk(2, dim=1)
    deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
    return scale * (mean + deviation * torch.randn(mean.shape, generator=noise))


@torch.no_grad()
def blend(average: nn.Module, current: nn.Module, decay: float) -> None:
    """``average <- decay * average + (1 - decay) * current``."""
    for kept, new in zip(average.parameters(), current.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)


def train_diffusion(pipe: StableDiffusionPipeline, latents: Tensor, captions: list[str], recipe: Recipe) -> dict[str, Any]:
    """Trains UNet and text encoder together on cached latents; the pipeline ends up with the averaged weights."""
    started = time.perf_counter()
    vocabulary = sorted({*captions, ""})
    ids = tokenize(pipe.tokenizer, vocabulary)
    caption_index = torch.tensor([vocabulary.index(text) for text in captions])
    modules = nn.ModuleDict({"unet": pipe.unet, "text_encoder": pipe.text_encoder}).train()
    average = copy.deepcopy(modules).requires_grad_(False)
    optimiser = torch.optim.AdamW(modules.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    noise = generator(recipe.seed, "shapes_base", "noise", "diffusion")
    batches = index_batches(len(latents), recipe.batch, recipe.seed, "diffusion")
    curve: list[float] = []
    recent: list[float] = []
    for step in range(recipe.steps):
        rows = next(batches)
        clean = draw_latents(latents[rows], pipe.vae.config.scaling_factor, noise)
        target = torch.randn(clean.shape, generator=noise)
        timesteps = torch.randint(pipe.scheduler.config.num_train_timesteps, (len(rows),), generator=noise)
        dropped = torch.rand(len(rows), generator=noise) < recipe.caption_dropout
        texts = torch.where(dropped, vocabulary.index(""), caption_index[rows])
        # Few distinct captions fill a batch, so each is encoded once.
        distinct, back = texts.unique(return_inverse=True)
        hidden = pipe.text_encoder(ids[distinct]).last_hidden_state[back]
        predicted = pipe.unet(pipe.scheduler.add_noise(clean, target, timesteps), timesteps, hidden).sample
        loss = F.mse_loss(predicted, target)
        factor = learning_rate(step, recipe.steps, recipe.warmup)
        optimise(loss, optimiser, factor, recipe.lr, recipe.max_grad_norm)
        blend(average, modules, min(recipe.ema_decay, (1 + step) / (10 + step)))
        recent.append(float(loss.detach()))
        if (step + 1) % 100 == 0 or step == recipe.steps - 1:
            curve.append(round(sum(recent) / len(recent), 5))
            print(f"unet {step + 1:5d}  loss {curve[-1]:.4f}  {time.perf_counter() - started:.0f} s", flush=True)
            recent.clear()
    modules.load_state_dict(average.state_dict())
    modules.eval().requires_grad_(False)
    return {"seconds": time.perf_counter() - started, "loss_per_100_steps": curve}


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids ``[N, L]``, padded as the pipeline pads them."""
    encoded = tokenizer(texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt")
    return encoded.input_ids


def mean_scores(images: list[Any], captions: list[str]) -> dict[str, float]:
    """Mean of each checker score over the pictures it applies to."""
    results = [check_image(image, text) for image, text in zip(images, captions, strict=True)]
    names = results[0].keys()
    return {name: round(float(np.mean([value for item in results if (value := item[name]) is not None])), 4) for name in names}


def evaluate(pipe: StableDiffusionPipeline, recipe: Recipe, guidance: float) -> dict[str, Any]:
    """Checker scores of samples for all, training and held-out captions at one guidance scale."""
    started = time.perf_counter()
    report: dict[str, Any] = {}
    collected: dict[str, tuple[list[Any], list[str]]] = {}
    for split in ("train", "test"):
        texts = [text for text in caption_grid(split) for _ in range(recipe.samples_per_caption)]
        images: list[Any] = []
        noise = generator(recipe.seed, "shapes_base", "sampling", split)
        for first in range(0, len(texts), 128):
            images += pipe(
                texts[first : first + 128],
                num_inference_steps=recipe.sampling_steps,
                guidance_scale=guidance,
                height=recipe.size,
                width=recipe.size,
                generator=noise,
            ).images
        collected[split] = (images, texts)
        report[split] = mean_scores(images, texts)
    images, texts = (collected["train"][part] + collected["test"][part] for part in (0, 1))
    report["all"] = mean_scores(images, texts)
    report["seconds"] = round(time.perf_counter() - started, 1)
    return report


def save_samples(pipe: StableDiffusionPipeline, recipe: Recipe, path: Path, guidance: float = 3.0) -> None:
    """A contact sheet: one row per colour, the held-out captions first."""
    from PIL import Image

    texts = caption_grid("test") + caption_grid("train")[:40]
    noise = generator(recipe.seed, "shapes_base", "sampling", "sheet")
    images = pipe(
        texts, num_inference_steps=recipe.sampling_steps, guidance_scale=guidance, height=32, width=32, generator=noise
    ).images
    sheet = Image.new("RGB", (8 * 100, 8 * 100), "gray")
    for index, image in enumerate(images):
        sheet.paste(image.resize((96, 96), Image.Resampling.NEAREST), ((index % 8) * 100, (index // 8) * 100))
    sheet.save(path)


def train(recipe: Recipe) -> tuple[StableDiffusionPipeline, dict[str, Any]]:
    """Builds and trains the pipeline; returns it with the metrics of ``training.json``."""
    started, started_cpu = time.perf_counter(), time.process_time()
    rows = make_shapes(recipe.images, recipe.size, recipe.seed, split="train")
    pixels = np.stack([np.asarray(row["image"]) for row in rows])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    print(f"{len(rows)} images in {time.perf_counter() - started:.0f} s", flush=True)

    words = [word for text in caption_grid() for word in text.split()]
    tokenizer = build_tokenizer([*words, *COLORS, *SHAPES])
    vae, text_encoder, unet = build_models(tokenizer, recipe)
    metrics: dict[str, Any] = {"vae": train_vae(vae, images, recipe)}
    latents = encode_all(vae, images)
    drawn = draw_latents(latents, 1.0, generator(recipe.seed, "shapes_base", "noise", "scale"))
    vae.register_to_config(scaling_factor=float(1 / drawn.std()))

    held_out = make_shapes(240, recipe.size, recipe.seed + 1, split="test")
    truth = torch.from_numpy(np.stack([np.asarray(row["image"]) for row in held_out])).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        decoded = vae.decode(vae.encode(truth * 2 - 1).latent_dist.mode()).sample / 2 + 0.5
    metrics["vae"] |= {
        "scaling_factor": vae.config.scaling_factor,
        "held_out_mse": float(F.mse_loss(decoded, truth)),
        "held_out_psnr_db": float(-10 * torch.log10(F.mse_loss(decoded, truth))),
        "held_out_checker": mean_scores(list(decoded), [row["prompt"] for row in held_out]),
    }
    print(json.dumps(metrics["vae"], indent=1), flush=True)

    # A linear schedule ends at almost pure noise, as sampling starts: small latents need that (no colour leaks in).
    scheduler = DDIMScheduler(
        beta_start=1e-4,
        beta_end=2e-2,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )
    pipe = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    metrics["diffusion"] = train_diffusion(pipe, latents, [row["prompt"] for row in rows], recipe)
    metrics["training_seconds"] = round(time.perf_counter() - started, 1)
    metrics["training_cpu_seconds"] = round(time.process_time() - started_cpu, 1)
    return pipe, metrics


def save(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Writes the pipeline: UNet and autoencoder in half precision, which diffusers widens again on loading.

    The text encoder stays in single precision, because transformers would load it in the precision it is stored in.
    ``vocab.json`` and ``merges.txt`` are written beside ``tokenizer.json`` for readers that know only those.
    """
    pipe.unet.half()
    pipe.vae.half()
    pipe.save_pretrained(folder, safe_serialization=True)
    pipe.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)


def parameter_counts(pipe: StableDiffusionPipeline) -> dict[str, int]:
    """Number of weights of each network."""
    return {name: sum(weight.numel() for weight in getattr(pipe, name).parameters()) for name in ("vae", "text_encoder", "unet")}


def main() -> None:
    """Command line: any field of :class:`Recipe` as an option, ``--output`` and ``--samples``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=shapes_base_path(), help="folder of the pipeline")
    parser.add_argument("--samples", type=Path, default=None, help="PNG file for a contact sheet")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args())
    output, samples, threads = options.pop("output"), options.pop("samples"), options.pop("threads")
    torch.set_num_threads(threads)
    recipe = Recipe(**options)
    pipe, metrics = train(recipe)
    save(pipe, output)
    # The scores are those of the stored weights, as a user loads them.
    pipe = StableDiffusionPipeline.from_pretrained(output, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    metrics["guidance"] = {str(scale): evaluate(pipe, recipe, scale) for scale in (1.0, 3.0)}
    metrics |= {"recipe": asdict(recipe), "parameters": parameter_counts(pipe), "threads": threads}
    (output / "training.json").write_text(json.dumps(metrics, indent=1) + "\n")
    print(json.dumps(metrics["guidance"], indent=1))
    if samples is not None:
        save_samples(pipe, recipe, samples)


if __name__ == "__main__":
    main()
