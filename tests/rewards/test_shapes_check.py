"""The pixel checker: exact on rendered truth, robust to blur and noise, graded when something is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from mmalign.core.seeding import generator
from mmalign.data.shapes import (
    COLORS,
    POSITIONS,
    SHAPES,
    Scene,
    SceneObject,
    caption_grid,
    make_shapes,
    parse_caption,
    render,
    sample_scene,
)
from mmalign.errors import RewardError
from mmalign.rewards.shapes_check import _components, check_image, detect_objects, shapes_match


def picture(*things: tuple[str, str, float, float, float], size: int = 32, background=(255, 255, 255)) -> Image.Image:
    return render(Scene(tuple(SceneObject(*thing) for thing in things), background), size)


@pytest.mark.parametrize(
    ("size", "seed", "n"),
    [(32, 0, 168), (24, 1, 84), (64, 2, 56), (128, 3, 28), pytest.param(32, 4, 1680, marks=pytest.mark.slow)],
)
def test_rendered_truth_is_always_right(size: int, seed: int, n: int) -> None:
    for row in make_shapes(n, size, seed):
        scores = check_image(row["image"], row["prompt"])
        assert scores["all"] == 1.0, row["id"]
        assert scores["count"] == 1.0
        assert scores["score"] > 0.9


@pytest.mark.parametrize("radius", [0.6, 1.0])
def test_a_decoder_like_blur_does_not_matter(radius: float) -> None:
    for row in make_shapes(84, 32, 7):
        assert check_image(row["image"].filter(ImageFilter.GaussianBlur(radius)), row["prompt"])["all"] == 1.0


def test_noise_and_tinted_backgrounds_do_not_matter() -> None:
    noise = generator(0, "test", "noise")
    for index, text in enumerate(caption_grid()[::2]):
        tint = [(235, 240, 230), (250, 250, 245), (200, 200, 200)][index % 3]
        image = render(sample_scene(generator(1, "test", index), text, background=tint), 32)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        pixels = pixels + 0.03 * torch.randn(pixels.shape, generator=noise)
        assert check_image(pixels, text)["all"] == 1.0


@given(st.sampled_from(caption_grid()), st.sampled_from(caption_grid()), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_only_the_true_caption_passes_and_each_score_falls_for_its_own_attribute(shown: str, asked: str, seed: int) -> None:
    truth, wanted = parse_caption(shown), parse_caption(asked)
    assert truth is not None
    assert wanted is not None
    scores = check_image(render(sample_scene(generator(seed, "test"), shown), 32), asked)
    assert scores["all"] == float(truth == wanted)
    assert all(value is None or 0.0 <= value <= 1.0 for value in scores.values())
    assert (scores["color"] > 0.9) == (truth.color == wanted.color)
    assert (scores["shape"] > 0.5) == (truth.shape == wanted.shape)
    assert scores["count"] == 1 - abs(truth.count - wanted.count) / 2
    assert (scores["position"] is None) == (wanted.position is None)
    if truth.count == 1 and wanted.position is not None:
        assert (scores["position"] > 0.5) == (truth.position == wanted.position)


def test_the_reward_orders_pictures_by_how_much_is_right() -> None:
    asked = "a red circle on the left"
    images = [
        picture(("circle", "red", 0.28, 0.5, 0.18)),
        picture(("circle", "red", 0.36, 0.5, 0.18)),
        picture(("circle", "red", 0.72, 0.5, 0.18)),
        picture(("circle", "green", 0.72, 0.5, 0.18)),
        picture(("square", "green", 0.72, 0.5, 0.18)),
        picture(),
    ]
    rewards = shapes_match([asked] * len(images), images)
    assert rewards == sorted(rewards, reverse=True)
    assert len(set(rewards)) == len(rewards)
    assert rewards[0] > 0.97
    assert rewards[-1] == 0.0


def test_scores_move_smoothly_with_colour_shape_and_place() -> None:
    red, blue = np.array([220, 40, 40]), np.array([40, 70, 225])
    base = np.asarray(picture(("circle", "red", 0.5, 0.5, 0.2)), dtype=float)
    inside = np.abs(base - red).sum(axis=2) < 1
    color_scores = []
    for share in np.linspace(0, 1, 7):
        mixed = base.copy()
        mixed[inside] = (1 - share) * red + share * blue
        color_scores.append(check_image(Image.fromarray(mixed.astype(np.uint8)), "a red circle")["color"])
    assert color_scores == sorted(color_scores, reverse=True)
    assert 0.1 < color_scores[3] < 0.9

    places = [check_image(picture(("star", "cyan", x, 0.5, 0.18)), "a cyan star on the left") for x in (0.3, 0.38, 0.46)]
    assert places[0]["position"] > places[1]["position"] > places[2]["position"]

    star, circle = (np.asarray(picture((shape, "blue", 0.5, 0.5, 0.2)), dtype=float) for shape in ("star", "circle"))
    morph = [(1 - share) * star + share * circle for share in (0.0, 0.5, 1.0)]
    scores = [check_image(Image.fromarray(image.astype(np.uint8)), "a blue star")["shape"] for image in morph]
    assert scores[0] > scores[1] > scores[2]


def test_shortcuts_do_not_pay() -> None:
    """A flat colour, pure noise and a picture full of copies must not earn what a plain wrong object earns."""
    asked = "a red circle in the center"
    flat = torch.tensor([220.0, 40.0, 40.0])[:, None, None].expand(3, 32, 32) / 255
    assert check_image(flat, asked)["score"] == 0.0
    noise = torch.rand(3, 32, 32, generator=generator(0, "test"))
    assert check_image(noise, asked)["all"] == 0.0
    assert check_image(noise, asked)["score"] < 0.75
    grid = picture(*(("circle", "red", x, y, 0.1) for x in (0.2, 0.5, 0.8) for y in (0.2, 0.5, 0.8)))
    scores = check_image(grid, asked)
    assert scores["count"] == 0.0
    assert scores["all"] == 0.0


def test_specks_and_faint_ghosts_are_not_objects() -> None:
    pixels = np.asarray(picture(("square", "green", 0.5, 0.5, 0.18))).copy()
    pixels[2, 2] = (40, 165, 60)
    assert len(detect_objects(Image.fromarray(pixels))) == 1
    ghost = (255 - 0.15 * (255 - np.asarray(picture(("square", "green", 0.5, 0.5, 0.18)), dtype=float))).astype(np.uint8)
    assert detect_objects(Image.fromarray(ghost)) == []


def test_detections_measure_area_centre_and_kind() -> None:
    found = detect_objects(picture(("triangle", "purple", 0.3, 0.3, 0.18), ("star", "yellow", 0.7, 0.68, 0.14)))
    assert [(item.shape, item.color) for item in found] == [("triangle", "purple"), ("star", "yellow")]
    assert found[0].center == pytest.approx((0.3, 0.3), abs=0.01)
    assert found[1].center == pytest.approx((0.7, 0.68), abs=0.01)
    assert found[0].area == pytest.approx(3 * 3**0.5 / 4 * 1.3**2 * 0.18**2, rel=0.05)
    assert sum(found[0].shapes.values()) == pytest.approx(1)
    assert set(found[0].shapes) == set(SHAPES)
    assert sum(found[0].colors.values()) == pytest.approx(1)
    assert set(found[0].colors) == set(COLORS)


@given(st.integers(0, 2**31), st.floats(0.2, 0.7))
@settings(max_examples=30, deadline=None)
def test_components_agree_with_a_flood_fill(seed: int, density: float) -> None:
    mask = np.random.default_rng(seed).random((12, 17)) < density
    expected, count = np.zeros(mask.shape, int), 0
    for start in zip(*np.nonzero(mask), strict=True):
        if expected[start]:
            continue
        count, stack = count + 1, [start]
        while stack:
            row, column = stack.pop()
            if 0 <= row < 12 and 0 <= column < 17 and mask[row, column] and not expected[row, column]:
                expected[row, column] = count
                stack += [(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    labels = _components(mask)
    assert ((labels > 0) == mask).all()
    pairs = set(zip(labels[mask].tolist(), expected[mask].tolist(), strict=True))
    assert len(pairs) == count == len({left for left, _ in pairs})


def test_tensor_batches_pil_images_and_lists_agree() -> None:
    rows = make_shapes(6, 32, 9)
    images, prompts = [row["image"] for row in rows], [row["prompt"] for row in rows]
    batch = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255
    from_pil = shapes_match(prompts, images, ids=list(range(6)))
    assert shapes_match(prompts, batch) == pytest.approx(from_pil, abs=1e-6)
    assert shapes_match(prompts, list(batch)) == pytest.approx(from_pil, abs=1e-6)
    assert shapes_match(prompts, images, key="all") == [1.0] * 6
    assert shapes_match(prompts, images) == from_pil


def test_a_prompt_outside_the_grammar_is_not_applicable() -> None:
    image = picture(("circle", "red", *POSITIONS["left"], 0.18))
    rewards = shapes_match(["a photo of a dog", "a red circle on the left"], [image, image])
    assert rewards[0] is None
    assert rewards[1] > 0.95
    assert shapes_match(["two red circles"], [image], key="position") == [None]


def test_bad_input_is_named() -> None:
    image = picture()
    with pytest.raises(RewardError, match="2 prompts but 1 completions"):
        shapes_match(["a red circle", "a red circle"], [image])
    with pytest.raises(RewardError, match="key='colour'"):
        shapes_match(["a red circle"], [image], key="colour")
    with pytest.raises(RewardError, match="a dog"):
        check_image(image, "a dog")
    with pytest.raises(RewardError, match="NaN"):
        check_image(torch.full((3, 32, 32), float("nan")), "a red circle")
    with pytest.raises(RewardError, match=r"\(1, 32, 32\)"):
        check_image(torch.zeros(1, 32, 32), "a red circle")
    with pytest.raises(RewardError, match="uint8"):
        check_image(torch.zeros(3, 32, 32, dtype=torch.uint8), "a red circle")
    with pytest.raises(RewardError, match="str"):
        check_image("picture.png", "a red circle")
