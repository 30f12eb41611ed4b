"""The shapes asset: captions, rasteriser, data sets, and the ray-cast 3D variant."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.core.seeding import generator
from mmalign.data import shapes, shapes_3d
from mmalign.errors import DataError


def attributes_strategy() -> st.SearchStrategy[shapes.ShapeAttributes]:
    single = st.tuples(st.just(1), st.sampled_from([None, *shapes.POSITIONS]))
    layout = st.one_of(single, st.sampled_from([(2, None), (3, None)]))
    return st.builds(
        lambda shape, color, layout: shapes.ShapeAttributes(shape, color, *layout),
        st.sampled_from(shapes.SHAPES),
        st.sampled_from(shapes.COLORS),
        layout,
    )


@given(attributes_strategy())
def test_parsing_inverts_the_caption(attributes: shapes.ShapeAttributes) -> None:
    assert shapes.parse_caption(attributes.caption) == attributes


@given(attributes_strategy(), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_a_sampled_scene_has_the_caption_it_was_sampled_for(attributes: shapes.ShapeAttributes, seed: int) -> None:
    scene = shapes.sample_scene(generator(seed, "test"), attributes)
    truth = shapes.attributes_of(scene)
    assert (truth.shape, truth.color, truth.count) == (attributes.shape, attributes.color, attributes.count)
    if attributes.position is not None:
        assert shapes.caption(scene) == attributes.caption
    for thing in scene.objects:
        reach = shapes.EXTENT * thing.radius
        assert reach <= min(thing.x, thing.y, 1 - thing.x, 1 - thing.y) + 1e-9


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  A Red   circle on the LEFT. ", shapes.ShapeAttributes("circle", "red", 1, "left")),
        ("a cyan star in the middle", shapes.ShapeAttributes("star", "cyan", 1, "center")),
        ("2 blue squares", shapes.ShapeAttributes("square", "blue", 2)),
        ("one green triangle", shapes.ShapeAttributes("triangle", "green", 1)),
        ("two red circles on the left", None),
        ("a red dog", None),
        ("not a red circle on the left", None),
        ("a red circle on the left of a blue square", None),
        ("", None),
    ],
)
def test_what_the_parser_accepts(text: str, expected: shapes.ShapeAttributes | None) -> None:
    assert shapes.parse_caption(text) == expected


def test_the_split_is_a_partition_that_holds_out_one_layout_of_each_pair() -> None:
    everything, train, test = (shapes.caption_grid(split) for split in ("all", "train", "test"))
    assert len(everything) == len(set(everything)) == 168
    assert len(test) == 24
    assert not set(train) & set(test)
    assert set(train) | set(test) == set(everything)
    pairs = {(found.color, found.shape) for text in test if (found := shapes.parse_caption(text))}
    assert len(pairs) == 24
    assert {word for text in test for word in text.split()} <= {word for text in train for word in text.split()}
    with pytest.raises(DataError, match="split='dev'"):
        shapes.caption_grid("dev")


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_coverage_has_the_area_and_centroid_of_the_shape(shape: str) -> None:
    exact = {
        "circle": math.pi,
        "square": 4 * 0.88**2,
        "triangle": 3 * math.sqrt(3) / 4 * 1.3**2,
        "star": 5 * 1.3 * (0.45 * 1.3) * math.sin(math.pi / 5),
    }[shape]
    assert shapes.unit_area(shape) == pytest.approx(exact, rel=1e-3)
    alpha = shapes.coverage(shape, 20.3, 17.6, 9.0, 40, 44, oversample=8)
    assert alpha.shape == (40, 44)
    assert alpha.min() == 0
    assert alpha.max() == 1
    assert alpha.sum() == pytest.approx(exact * 81, rel=1e-2)
    rows, columns = np.arange(40) + 0.5, np.arange(44) + 0.5
    assert (alpha.sum(axis=1) @ rows) / alpha.sum() == pytest.approx(17.6, abs=0.05)
    assert (alpha.sum(axis=0) @ columns) / alpha.sum() == pytest.approx(20.3, abs=0.05)


def test_a_triangle_points_up() -> None:
    alpha = shapes.coverage("triangle", 32, 32, 16, 64)
    widths = alpha.sum(axis=1)
    assert widths[15] < widths[30] < widths[38]


def test_rendering_agrees_between_sizes() -> None:
    scene = shapes.sample_scene(generator(3, "test"), "three purple stars")
    small = np.asarray(shapes.render(scene, 16), dtype=float)
    large = np.asarray(shapes.render(scene, 128), dtype=float)
    assert np.abs(large.reshape(16, 8, 16, 8, 3).mean(axis=(1, 3)) - small).mean() < 1.0


def test_later_objects_cover_earlier_ones_and_the_background_shows() -> None:
    below = shapes.SceneObject("square", "red", 0.5, 0.5, 0.3)
    above = shapes.SceneObject("circle", "blue", 0.5, 0.5, 0.1)
    picture = np.asarray(shapes.render(shapes.Scene((below, above), (10, 20, 30)), 32))
    assert tuple(picture[16, 16]) == shapes.PALETTE["blue"]
    assert tuple(picture[16, 9]) == shapes.PALETTE["red"]
    assert tuple(picture[0, 0]) == (10, 20, 30)


def test_a_data_set_is_deterministic_balanced_and_extends_a_shorter_one() -> None:
    short, long = shapes.make_shapes(30, 16, 5), shapes.make_shapes(168, 16, 5)
    assert [row["id"] for row in long[:30]] == [row["id"] for row in short]
    for left, right in zip(short, long, strict=False):
        assert left["prompt"] == right["prompt"]
        assert left["image"].tobytes() == right["image"].tobytes()
    assert sorted(row["prompt"] for row in long) == sorted(shapes.caption_grid())
    assert any(a["image"].tobytes() != b["image"].tobytes() for a, b in zip(short, shapes.make_shapes(30, 16, 6)))
    first = long[0]
    assert set(first) == {"prompt", "image", "shape", "color", "count", "position", "id"}
    parsed = shapes.parse_caption(first["prompt"])
    assert parsed == shapes.ShapeAttributes(first["shape"], first["color"], first["count"], first["position"])
    assert {row["prompt"] for row in shapes.make_shapes(48, 16, split="test")} == set(shapes.caption_grid("test"))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(DataError, match="size=8"):
        shapes.render(shapes.Scene(()), 8)
    with pytest.raises(DataError, match="color='pink'"):
        shapes.SceneObject("circle", "pink", 0.5, 0.5, 0.1)
    with pytest.raises(DataError, match="count=4"):
        shapes.ShapeAttributes("circle", "red", 4)
    with pytest.raises(DataError, match="position='left'"):
        shapes.ShapeAttributes("circle", "red", 2, "left")
    with pytest.raises(DataError, match="2 kinds"):
        shapes.caption(shapes.Scene(tuple(shapes.SceneObject("circle", color, 0.5, 0.5, 0.1) for color in ("red", "blue"))))
    with pytest.raises(DataError, match="a pink dog"):
        shapes.make_shapes(1, captions=["a pink dog"])
    with pytest.raises(DataError, match="0 captions"):
        shapes.make_shapes(1, captions=[])


# --- 3D


def silhouette(image: object) -> np.ndarray:
    return np.asarray(image).min(axis=2) < 250


def test_a_sphere_is_seen_where_the_pinhole_camera_puts_it() -> None:
    center = np.array([0.3, -0.2, 0.25])
    scene = shapes_3d.Scene3D((shapes_3d.Solid("sphere", "red", tuple(center), 0.1),))
    for azimuth, elevation in ((0, 0), (90, 20), (210, -35)):
        pose = shapes_3d.camera_to_world(azimuth, elevation)
        assert np.allclose(pose[:, :3].T @ pose[:, :3], np.eye(3))
        assert np.linalg.det(pose[:, :3]) == pytest.approx(1)
        x, y, z = pose[:, :3].T @ (center - pose[:, 3])
        focal = 64 / math.tan(math.radians(25))
        mask = silhouette(shapes_3d.render_3d(scene, azimuth, elevation, 128, oversample=1))
        rows, columns = np.nonzero(mask)
        assert columns.mean() + 0.5 == pytest.approx(64 + focal * x / -z, abs=0.5)
        assert rows.mean() + 0.5 == pytest.approx(64 - focal * y / -z, abs=0.5)
        # A small sphere's outline is nearly a disk of radius focal * r / distance.
        assert mask.sum() == pytest.approx(math.pi * (focal * 0.1 / -z) ** 2, rel=0.1)


@pytest.mark.parametrize("kind", shapes_3d.KINDS)
def test_turning_the_camera_is_turning_the_object_the_other_way(kind: str) -> None:
    def scene(turn: float) -> shapes_3d.Scene3D:
        angle = math.radians(40 + turn)
        center = (0.4 * math.cos(angle), 0.4 * math.sin(angle), 0.1)
        return shapes_3d.Scene3D((shapes_3d.Solid(kind, "green", center, 0.3, yaw=10 + turn),))

    moved_camera = silhouette(shapes_3d.render_3d(scene(0), 75, 20, 48))
    moved_object = silhouette(shapes_3d.render_3d(scene(-75), 0, 20, 48))
    assert moved_camera.sum() > 50
    assert (moved_camera != moved_object).sum() <= 1


def test_the_nearer_solid_hides_the_farther_one() -> None:
    front, back = (shapes_3d.Solid("sphere", color, (x, 0, 0), 0.3) for color, x in (("red", 0.5), ("blue", -0.5)))
    scene = shapes_3d.Scene3D((front, back))
    from_front, from_back = (np.asarray(shapes_3d.render_3d(scene, a, 0, 32))[16, 16] for a in (0, 180))
    assert from_front.argmax() == 0
    assert from_back.argmax() == 2


def test_a_box_seen_face_on_is_a_square_of_one_shade_per_face() -> None:
    scene = shapes_3d.Scene3D((shapes_3d.Solid("box", "yellow", (0, 0, 0), 0.4),))
    picture = shapes_3d.render_3d(scene, 0, 0, 64, oversample=1)
    mask = silhouette(picture)
    side = 2 * 0.4 * (32 / math.tan(math.radians(25))) / (2.7 - 0.4)
    assert math.sqrt(mask.sum()) == pytest.approx(side, abs=1.0)
    assert len(np.unique(np.asarray(picture)[mask], axis=0)) == 1


def test_sampled_3d_scenes_are_disjoint_visible_and_captioned() -> None:
    for index in range(30):
        scene = shapes_3d.sample_scene_3d(generator(0, "test", index), 1 + index % 3)
        reach = [solid.size * (1 if solid.kind == "sphere" else math.sqrt(3)) for solid in scene.solids]
        centers = [np.array(solid.center) for solid in scene.solids]
        for i in range(len(centers)):
            assert np.linalg.norm(centers[i]) + reach[i] <= 1.0
            for j in range(i):
                assert np.linalg.norm(centers[i] - centers[j]) > reach[i] + reach[j] - 1e-9
        assert len(shapes_3d.caption_3d(scene).split(" and ")) == len(scene.solids)
        views = shapes_3d.render_views(scene, (0, 90, 180, 270), size=32)
        border = [np.concatenate([m[0], m[-1], m[:, 0], m[:, -1]]) for m in map(silhouette, views)]
        assert all(silhouette(view).sum() > 10 for view in views)
        assert not np.any(border)


def test_3d_refusals_name_the_argument() -> None:
    with pytest.raises(DataError, match="kind='cone'"):
        shapes_3d.Solid("cone", "red", (0, 0, 0), 0.3)
    with pytest.raises(DataError, match="elevation=90"):
        shapes_3d.camera_to_world(0, 90)
    with pytest.raises(DataError, match="count=4"):
        shapes_3d.sample_scene_3d(torch.Generator(), 4)


# --- the packaged base model


@pytest.fixture(scope="module")
def base() -> object:
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(shapes.shapes_base_path(), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_base_model_loads_in_single_precision_and_is_small(base) -> None:
    assert {base.unet.dtype, base.vae.dtype, base.text_encoder.dtype} == {torch.float32}
    assert base.safety_checker is None
    assert base.scheduler.config.prediction_type == "epsilon"
    assert not base.scheduler.config.clip_sample
    files = [path for path in shapes.shapes_base_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8_000_000
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl")]


def test_every_caption_word_is_one_token_and_other_text_falls_apart_without_unknowns(base) -> None:
    for text in shapes.caption_grid():
        ids = base.tokenizer(text).input_ids
        assert len(ids) == len(text.split()) + 2
        assert base.tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    strange = base.tokenizer("an élan of 17 zebras, cyanotic!").input_ids
    assert base.tokenizer.eos_token_id not in strange[:-1]
    assert len(strange) > 12
    long = base.tokenizer("a red circle " * 40, truncation=True).input_ids
    assert len(long) == base.tokenizer.model_max_length


def test_the_base_model_knows_colours_and_guidance_helps(base) -> None:
    from mmalign.rewards.shapes_check import shapes_match

    prompts = shapes.caption_grid("test")
    scores = {}
    for guidance in (0.0, 3.0):
        images = base(
            prompts if guidance else [""] * len(prompts),
            num_inference_steps=10,
            guidance_scale=guidance,
            generator=generator(0, "test", "base"),
            height=32,
            width=32,
        ).images
        scores[guidance] = np.mean(shapes_match(prompts, images))
    assert scores[3.0] > 0.7 > 0.55 > scores[0.0]


def test_the_autoencoder_has_unit_variance_latents_and_keeps_every_attribute(base) -> None:
    from mmalign.rewards.shapes_check import check_image

    rows = shapes.make_shapes(48, 32, 77)
    pixels = torch.from_numpy(np.stack([np.asarray(row["image"]) for row in rows])).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        latents = base.vae.encode(2 * pixels - 1).latent_dist.sample(generator(0, "test", "vae"))
        decoded = base.vae.decode(latents).sample / 2 + 0.5
    assert float((latents * base.vae.config.scaling_factor).std()) == pytest.approx(1, abs=0.1)
    right = [check_image(image, row["prompt"])["all"] for image, row in zip(decoded, rows, strict=True)]
    assert np.mean(right) >= 0.95
