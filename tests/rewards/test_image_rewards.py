"""CLIPScore with tiny random models of both libraries, JPEG sizes, shapes parts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.data.shapes import Scene, SceneObject, render
from mmalign.errors import ConfigError, RewardError
from mmalign.rewards.base import RewardSet
from mmalign.rewards.clip_score import ClipScore
from mmalign.rewards.images import jpeg_compressibility, jpeg_incompressibility, jpeg_size

CAPTIONS = ["a red circle", "two blue squares", "a red circle"]


def pictures(sizes=((40, 40), (64, 48), (32, 56))) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC) for size in sizes
    ]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A random transformers CLIP with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("clip")
    words = ["<pad>", "<s>", "</s>", "a", "red", "circle", "two", "blue", "squares", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPModel(CLIPConfig(
        text_config={**tower, "vocab_size": 10, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2,
                     "pad_token_id": 0},
        vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=8,
    )).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_agrees_with_transformers_own_processing(clip_folder):
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    model = CLIPModel.from_pretrained(clip_folder).eval()
    tokens = AutoTokenizer.from_pretrained(clip_folder)(CAPTIONS, padding=True, return_tensors="pt")
    pixels = CLIPImageProcessor.from_pretrained(clip_folder)(pictures(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
    cosine = (output.image_embeds * output.text_embeds).sum(-1)
    ours = ClipScore(str(clip_folder), scale=100, clip=False)(CAPTIONS, pictures())
    assert torch.allclose(ours, 100 * cosine, atol=0.3)  # the processor rounds resized pixels to 8 bits
    assert torch.allclose(ClipScore(str(clip_folder))(CAPTIONS, pictures()), 2.5 * (ours / 100).clamp(min=0), atol=1e-5)


def test_split_of_the_batch_and_long_captions_do_not_matter(clip_folder):
    score = ClipScore(str(clip_folder), clip=False)
    whole = score(CAPTIONS, pictures())
    parts = ClipScore(str(clip_folder), clip=False, rows_per_forward=1)(CAPTIONS, pictures())
    assert torch.allclose(whole, parts, atol=1e-5)
    assert torch.isfinite(score(["red " * 50], pictures()[:1])).all()


def test_tensors_give_the_pil_score_and_a_gradient(clip_folder):
    from mmalign.rewards.inputs import to_tensor

    images = torch.stack([to_tensor(p) for p in pictures(((40, 40),) * 3)]).requires_grad_()
    rewards = RewardSet([ClipScore(str(clip_folder), clip=False)])
    total = rewards.score_with_gradient(CAPTIONS, images)
    assert torch.allclose(total, rewards.score_samples(CAPTIONS, pictures(((40, 40),) * 3))[:, 0], atol=1e-5)
    total.sum().backward()
    assert images.grad.abs().sum((1, 2, 3)).min() > 0
    step = images.detach() + 0.05 * images.grad / images.grad.abs().max()
    assert (rewards.score_samples(CAPTIONS, list(step))[:, 0] > total.detach()).all()


def test_a_missing_model_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    score = ClipScore("openai/clip-not-on-this-machine")
    with pytest.raises(ConfigError, match=r"neither a folder.*hf download openai/clip-not-on-this-machine"):
        score.towers


def test_open_clip_folder(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    from safetensors.torch import save_file

    config = {
        "embed_dim": 8, "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1},
    }
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**config).eval()
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    score = ClipScore(str(tmp_path), clip=False, scale=1)
    ours = score(CAPTIONS, pictures())
    tokens = open_clip.SimpleTokenizer(context_length=16)(CAPTIONS)
    with torch.no_grad():
        text = model.encode_text(tokens, normalize=True)
    assert torch.allclose(ours, (score.encode_images(pictures()) * text).sum(-1), atol=1e-5)
    assert score.towers.mean == (0.5, 0.5, 0.5)


def test_jpeg_sizes():
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    flat, noisy = Image.new("RGB", (64, 64)), Image.fromarray(pixels)
    small, large = jpeg_incompressibility(None, [flat, noisy])
    assert large > 4 * small > 0
    assert jpeg_compressibility(None, [noisy], scale=2) == [-2 * large]
    assert jpeg_size(noisy, quality=10) < jpeg_size(noisy, quality=95)
    with pytest.raises(RewardError, match="quality=0"):
        jpeg_size(flat, quality=0)
    with pytest.raises(RewardError, match="not a PIL image"):
        jpeg_size("x")


def test_shapes_parts():
    picture = render(Scene((SceneObject("circle", "red", 0.28, 0.5, 0.15),)), 64)
    names = ["shapes_match", "shapes_color", "shapes_shape", "shapes_count", "shapes_position"]
    rewards = RewardSet(names)
    right = rewards.score_samples(["a red circle on the left"], [picture])[0]
    assert (right > 0.8).all()
    wrong = rewards.score_samples(["two blue circles"], [picture])[0]
    assert wrong[1] < 0.3
    assert wrong[2] > 0.8
    assert wrong[3] == 0.5
    assert wrong[4].isnan()
    assert RewardSet([{"name": "shapes_match", "key": "all"}]).score_samples(["a red circle"], [picture]).item() == 1
    assert rewards.score_samples(["outside the grammar"], [picture]).isnan().all()
