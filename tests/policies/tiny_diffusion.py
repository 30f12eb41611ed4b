"""Random diffusion pipelines of a few hundred thousand weights, written to a folder in the diffusers format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WORDS = ("a", "red", "blue", "green", "circle", "square", "star", "on", "the", "left", "right", "two")
MAX_LENGTH = 12
START, END = "<|startoftext|>", "<|endoftext|>"


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose pieces are the letters; words of ``WORDS`` are merged into one token."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = [START, END, *letters, *(f"{letter}</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
            vocabulary.append(pieces[0])
    unique = list(dict.fromkeys(vocabulary))
    return CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(unique)}, merges=list(dict.fromkeys(merges)),
        model_max_length=MAX_LENGTH,
    )


def _text_config(tokenizer: CLIPTokenizer, width: int = 32, projection: int = 16) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=MAX_LENGTH, projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )


def _autoencoder(**overrides: Any) -> AutoencoderKL:
    return AutoencoderKL(**{
        "block_out_channels": (8, 16), "in_channels": 3, "out_channels": 3, "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 16, "scaling_factor": 0.3, **overrides,
    }).eval()


def _unet(**overrides: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(**{
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1,
        "cross_attention_dim": 32, "norm_num_groups": 8, "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), **overrides,
    }).eval()


def save_tiny_sd(
    folder: Path, *, prediction_type: str = "epsilon", scheduler: Any = None, seed: int = 0, **unet: Any,
) -> Path:
    """An SD1-like pipeline: 16x16 images, 4x8x8 latents, a PNDM scheduler as in SD1.5 (or ``scheduler``)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        pipeline = StableDiffusionPipeline(
            vae=_autoencoder(), text_encoder=CLIPTextModel(_text_config(tokenizer)).eval(), tokenizer=tokenizer,
            unet=_unet(**unet), scheduler=scheduler or PNDMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
                steps_offset=1, prediction_type=prediction_type,
            ),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def save_tiny_sdxl(folder: Path, *, seed: int = 0) -> Path:
    """An SDXL-like pipeline: two text encoders, pooled embedding and size conditioning."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        pipeline = StableDiffusionXLPipeline(
            vae=_autoencoder(), text_encoder=CLIPTextModel(_text_config(tokenizer)).eval(), tokenizer=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer)).eval(), tokenizer_2=tiny_tokenizer(),
            unet=_unet(
                cross_attention_dim=64, addition_embed_type="text_time", addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + 16, transformer_layers_per_block=1,
                use_linear_projection=True,
            ),
            scheduler=DDIMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                set_alpha_to_one=False, clip_sample=False,
            ),
            force_zeros_for_empty_prompt=True, add_watermarker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def save_tiny_sd3(folder: Path, *, shift: float = 3.0, seed: int = 0) -> Path:
    """An SD3-like flow-matching pipeline without the T5 encoder."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        encoders = [CLIPTextModelWithProjection(_text_config(tokenizer, projection=width)).eval() for width in (16, 16)]
        transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=32,
            pos_embed_max_size=8,
        ).eval()
        pipeline = StableDiffusion3Pipeline(
            vae=_autoencoder(shift_factor=0.1), text_encoder=encoders[0], tokenizer=tokenizer,
            text_encoder_2=encoders[1], tokenizer_2=tiny_tokenizer(), text_encoder_3=None, tokenizer_3=None,
            transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        )
    pipeline.save_pretrained(folder)
    return folder


def add_lora(network: torch.nn.Module, *, rank: int = 4, alpha: float = 4, seed: int = 0, scale: float = 0.5) -> None:
    """Inject a LoRA adapter called "default" whose update is not zero."""
    from peft import LoraConfig, inject_adapter_in_model

    network.requires_grad_(False)
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), network,
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))


def noise_image(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    """A smooth random picture of ``size`` (width, height)."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize(size, Image.Resampling.BICUBIC)


def caption(*words: int) -> str:
    """A caption of known words."""
    return " ".join(WORDS[index % len(WORDS)] for index in words)


def solid(color: Sequence[int], size: tuple[int, int] = (16, 16)) -> Image.Image:
    """A one-colour picture."""
    return Image.new("RGB", size, tuple(color))
