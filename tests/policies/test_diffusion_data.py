"""Pictures and captions on their way into a diffusion policy."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_diffusion import caption, noise_image, save_tiny_sd, save_tiny_sdxl, solid

from mmalign.errors import DataError
from mmalign.policies.diffusion import DiffusionPolicy
from mmalign.policies.image_examples import fit_image, image_key, read_image
from mmalign.policies.tensor_cache import TensorCache

TEXT = caption(0, 1, 4)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> DiffusionPolicy:
    return DiffusionPolicy.from_pretrained(save_tiny_sd(tmp_path_factory.mktemp("data") / "sd"), device="cpu")


@pytest.fixture
def encodings(policy: DiffusionPolicy, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every picture that the VAE encodes; caches start empty."""
    calls: list[int] = []
    plain = policy.codec.encode

    def count(pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
        calls.append(len(pixels))
        return plain(pixels, device)

    monkeypatch.setattr(policy.codec, "encode", count)
    monkeypatch.setattr(policy, "_latents", TensorCache(100))
    return calls


# -- reading -----------------------------------------------------------------------------------------------------------


def test_every_form_of_a_picture_reads_the_same(tmp_path: Path) -> None:
    image = noise_image(0)
    image.save(tmp_path / "a.png")
    raw = (tmp_path / "a.png").read_bytes()
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
    for value in (image, tmp_path / "a.png", str(tmp_path / "a.png"), raw, {"bytes": raw, "path": None},
                  {"bytes": None, "path": str(tmp_path / "a.png")}, pixels, np.asarray(image)):
        assert read_image(value).tobytes() == image.tobytes()


def test_transparency_is_white_and_photographs_stand_upright(tmp_path: Path) -> None:
    hidden = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert read_image(hidden).getpixel((0, 0)) == (255, 255, 255)
    tall = Image.new("RGB", (8, 4))
    exif = tall.getexif()
    exif[0x0112] = 6
    tall.save(tmp_path / "rotated.jpg", exif=exif)
    assert read_image(tmp_path / "rotated.jpg").size == (4, 8)


@pytest.mark.parametrize(("value", "reason"), [
    ("missing.png", "cannot be read"), (b"no picture", "cannot be read"), (Image.new("I;16", (16, 16)), "mode I;16"),
    (torch.full((3, 16, 16), 1.5), r"\[0, 1\]"), (torch.zeros(16, 16, 3), r"\[3, H, W\]"), (np.zeros((4, 4)), "uint8"),
    (7, "int is not a picture"),
])
def test_what_is_no_picture_is_named(value: Any, reason: str) -> None:
    with pytest.raises(DataError, match=f"here: .*{reason}"):
        read_image(value, where="here")


def test_a_damaged_file_is_refused_although_its_header_is_whole(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    noise_image(0, (64, 64)).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        read_image(tmp_path / "cut.png")


def test_pictures_are_resized_to_cover_and_cropped_in_the_middle() -> None:
    wide = Image.new("RGB", (64, 16), (255, 0, 0))
    wide.paste((0, 255, 0), (24, 0, 40, 16))
    pixels, original, corner = fit_image(wide, 16, 16)
    assert (original, corner) == ((16, 64), (0, 24))
    assert torch.equal(pixels, torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1).expand(3, 16, 16))
    small, original, corner = fit_image(noise_image(0, (9, 7)), 16, 32)
    assert (small.shape, original) == ((3, 16, 32), (7, 9))
    assert corner[1] == 0
    assert float(small.min()) >= 0
    assert float(small.max()) <= 1


def test_a_picture_s_key_follows_its_contents(tmp_path: Path) -> None:
    noise_image(0).save(tmp_path / "a.png")
    keys = {image_key(noise_image(0)), image_key(noise_image(1)), image_key(str(tmp_path / "a.png"))}
    assert len(keys) == 3
    assert image_key(noise_image(0)) in keys
    before = image_key(tmp_path / "a.png")
    noise_image(1, (32, 32)).save(tmp_path / "a.png")
    assert image_key(tmp_path / "a.png") != before


# -- preparing ---------------------------------------------------------------------------------------------------------


def test_preparing_keeps_rows_lazy_and_counts_cut_captions(policy: DiffusionPolicy) -> None:
    rows = [{"prompt": TEXT, "image": noise_image(0), "answer": "x"},
            {"prompt": " ".join([TEXT] * 6), "images": [noise_image(1)], "answer": "y"}]
    prepared, report = policy.prepare_dataset(rows)
    assert (report.rows, report.kept, report.truncated, report.dropped) == (2, 2, 1, {})
    assert TEXT in report.example
    assert prepared[1]["answer"] == "y"
    assert policy.encode_rows([prepared[0], prepared[1]])["latents"].shape == (2, 4, 8, 8)


def test_pairs_without_a_difference_are_dropped(policy: DiffusionPolicy) -> None:
    rows = [
        {"prompt": TEXT, "chosen": noise_image(0), "rejected": noise_image(1)},
        {"prompt": TEXT, "chosen": noise_image(0), "rejected": noise_image(0)},
    ]
    prepared, report = policy.prepare_dataset(rows, fields=("chosen", "rejected"))
    assert len(prepared) == 1
    assert report.dropped == {"chosen and rejected are the same": 1}
    with pytest.raises(DataError, match="no row is left"):
        policy.prepare_dataset(rows[1:], fields=("chosen", "rejected"))
    captioned = [{**rows[1], "chosen_caption": caption(1), "rejected_caption": caption(2)}]
    assert len(policy.prepare_dataset(captioned, fields=("chosen", "rejected"))[0]) == 1


def test_rows_without_captions_of_their_own_get_the_prompt(policy: DiffusionPolicy) -> None:
    pair = {"prompt": TEXT, "chosen": noise_image(0), "rejected": noise_image(1)}
    none = {**pair, "chosen_caption": None, "rejected_caption": None}
    rows = [none, {**none, "chosen_caption": "a star"}]
    prepared, _ = policy.prepare_dataset(rows, fields=("chosen", "rejected"))
    encoded = policy.encode_rows(list(prepared))
    plain = policy.conditions([TEXT])["prompt_embeds"][0]
    assert torch.equal(encoded["chosen_prompt_embeds"][0], plain)
    assert torch.equal(encoded["rejected_prompt_embeds"][1], plain)
    assert torch.equal(encoded["chosen_prompt_embeds"][1], policy.conditions(["a star"])["prompt_embeds"][0])


def test_a_datasets_table_is_prepared_as_it_is(policy: DiffusionPolicy, tmp_path: Path) -> None:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    for index in range(2):
        noise_image(index).save(tmp_path / f"{index}.png")
    table = Dataset.from_dict(
        {"prompt": [TEXT] * 2, "chosen": [str(tmp_path / "0.png")] * 2, "rejected": [str(tmp_path / f"{i}.png") for i in (1, 0)]},
        features=Features({"prompt": Value("string"), "chosen": ImageFeature(), "rejected": ImageFeature()}),
    )
    prepared, report = policy.prepare_dataset(table, fields=("chosen", "rejected"))  # type: ignore[arg-type]
    assert (report.kept, sum(report.dropped.values())) == (1, 1)
    assert "chosen_latents" in policy.encode_rows([prepared[0]])


@pytest.mark.parametrize(("row", "fields", "reason"), [
    ({"image": solid((0, 0, 0))}, (), "row 0: column 'prompt' is missing"),
    ({"prompt": ["a"], "image": solid((0, 0, 0))}, (), "column 'prompt' is a list"),
    ({"prompt": TEXT}, (), "row 0: column 'image' is missing"),
    ({"prompt": TEXT, "images": [solid((0, 0, 0))] * 2}, (), "column 'image' is missing"),
    ({"prompt": TEXT, "image": solid((0, 0, 0), (1, 16))}, (), "1x16 pixels"),
    ({"prompt": TEXT, "image": "nowhere.png"}, (), "row 0, column 'image': cannot be read"),
    ({"prompt": TEXT, "chosen": solid((0, 0, 0))}, ("chosen", "rejected"), "column 'rejected' is missing"),
    ({"prompt": TEXT, "chosen": solid((0, 0, 0)), "rejected": solid((9, 9, 9)), "chosen_caption": " ",
      "rejected_caption": "a"}, ("chosen", "rejected"), "'chosen_caption' is empty"),
    ({"prompt": TEXT, "image": solid((0, 0, 0))}, ("gold",), "fields="),
])
def test_unusable_rows_are_named(policy: DiffusionPolicy, row: dict[str, Any], fields: tuple[str, ...], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        policy.prepare_dataset([row], fields=fields)


def test_an_empty_data_set_is_refused(policy: DiffusionPolicy) -> None:
    with pytest.raises(DataError, match="empty"):
        policy.prepare_dataset([])


# -- encoding ----------------------------------------------------------------------------------------------------------


def test_latents_are_the_scaled_mode_of_the_posterior(policy: DiffusionPolicy) -> None:
    image = noise_image(5)
    latents = policy.encode_rows([{"prompt": TEXT, "image": image}])["latents"]
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = policy.pipe.vae.encode(pixels).latent_dist.mode() * policy.pipe.vae.config.scaling_factor
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        decoded = policy.pipe.vae.decode(latents / policy.pipe.vae.config.scaling_factor).sample / 2 + 0.5
    torch.testing.assert_close(policy.codec.decode(latents).detach(), decoded, rtol=1e-4, atol=1e-5)


def test_a_picture_is_encoded_once_and_alike_in_any_company(policy: DiffusionPolicy, encodings: list[int]) -> None:
    rows = [{"prompt": TEXT, "image": noise_image(i)} for i in range(3)]
    first = policy.encode_rows(rows)["latents"]
    assert encodings == [1, 1, 1]
    assert torch.equal(policy.encode_rows(rows[1:])["latents"], first[1:])
    assert len(encodings) == 3
    policy._latents = TensorCache(0)
    assert torch.equal(policy.encode_rows(rows[2:])["latents"], first[2:])
    assert len(encodings) == 4


def test_columns_of_numbers_come_along(policy: DiffusionPolicy) -> None:
    rows = policy.encode_rows([
        {"prompt": TEXT, "image": noise_image(i), "label": bool(i), "weight": 0.5 * i, "id": f"r{i}"} for i in range(2)])
    assert rows["label"].tolist() == [False, True]
    assert rows["weight"].tolist() == [0.0, 0.5]
    assert "id" not in rows
    assert len(policy.encode_rows([])) == 0


def test_sdxl_is_told_original_size_crop_and_target(tmp_path: Path) -> None:
    policy = DiffusionPolicy.from_pretrained(save_tiny_sdxl(tmp_path / "xl"), device="cpu")
    rows = policy.encode_rows([
        {"prompt": TEXT, "chosen": noise_image(0, (64, 16)), "rejected": noise_image(1, (16, 16))}])
    assert rows["chosen_time_ids"].tolist() == [[16, 64, 0, 24, 16, 16]]
    assert rows["rejected_time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]]
    assert set(rows.field("chosen").columns) == {"latents", "time_ids", "prompt_embeds", "pooled_prompt_embeds"}


def test_a_cache_forgets_what_was_used_longest_ago() -> None:
    kilobyte = torch.zeros(256)
    cache = TensorCache(2 / 1024)
    for key in ("a", "b"):
        cache.put(key, {"x": kilobyte})
    assert cache.get("a") is not None
    cache.put("c", {"x": kilobyte})
    assert cache.get("b") is None
    assert cache.get("a") is not None
    cache.put("c", {"x": kilobyte})
    assert (len(cache), cache.size) == (2, 2048)
    cache.put("large", {"x": torch.zeros(2048)})
    assert (len(cache), cache.size) == (0, 0)
    with pytest.raises(ValueError, match="negative"):
        TensorCache(-1)
