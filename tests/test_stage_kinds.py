"""The stages that make and judge data: what generate, score and select hand to each other, for text and for images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmalign.data.loading import DataOptions, load_rows
from mmalign.errors import DataError, MmalignError
from mmalign.policies.causal_lm import CausalLMPolicy
from mmalign.stage_kinds.records import save_records
from mmalign.stage_kinds.score import rollout_of
from mmalign.stages import make_plan, run_plan


def run(folder: Path, *stages: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return run_plan(make_plan({"run_dir": str(folder), "stages": list(stages)}, config_folder=folder.parent), quiet=True)


def rows_in(path: str) -> list[dict[str, Any]]:
    return [dict(row) for row in load_rows(DataOptions(path=path), seed=0)]


def grey(level: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (level, level, level))


BRIGHTNESS = "def brightness(completions, **columns):\n    return [float(image.getpixel((0, 0))[0]) for image in completions]\n"


def test_image_samples_become_pairs_of_images(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(BRIGHTNESS)
    levels = [(0, 10), (0, 90), (0, 50), (1, 30), (1, 20), (2, 7), (2, 7)]
    save_records([{"prompt": f"p{group}", "image": grey(level), "group": group, "id": str(i)}
                  for i, (group, level) in enumerate(levels)], tmp_path / "samples")
    manifests = run(
        tmp_path / "run",
        {"name": "score", "kind": "score", "data": {"path": str(tmp_path / "samples")},
         "rewards": [{"name": "mine.py:brightness"}]},
        {"name": "pairs", "kind": "select", "data": {"path": "${stages.score.data}"}},
    )
    scored = rows_in(manifests["score"]["outputs"]["data"])
    assert [row["score"] for row in scored] == [10, 90, 50, 30, 20, 7, 7]
    pairs = rows_in(manifests["pairs"]["outputs"]["data"])
    assert [(pair["prompt"], pair["chosen"].getpixel((0, 0))[0], pair["rejected"].getpixel((0, 0))[0]) for pair in pairs] == [
        ("p0", 90, 10), ("p1", 30, 20)]  # the group without a difference gives no pair
    assert manifests["pairs"]["metrics"] == {"rows": 2.0, "share": pytest.approx(2 / 3)}


@pytest.mark.parametrize(("options", "kept"), [({"mode": "best"}, ["bb", "ccc"]), ({"mode": "top_k", "k": 1}, ["ccc"])])
def test_selection_of_text(tmp_path: Path, options: dict[str, Any], kept: list[str]) -> None:
    save_records([{"prompt": "p", "completion": text, "group": g, "id": text, "score": float(len(text))}
                  for g, text in [(0, "a"), (0, "bb"), (1, "ccc")]], tmp_path / "scored")
    manifests = run(tmp_path / "run", {"name": "s", "kind": "select", "data": {"path": str(tmp_path / "scored")}, **options})
    assert [row["completion"] for row in rows_in(manifests["s"]["outputs"]["data"])] == kept


def test_selection_says_what_is_missing(tmp_path: Path) -> None:
    save_records([{"prompt": "p", "completion": "a", "id": "0"}], tmp_path / "rows")
    flat = {"prompt": "p", "completion": "a", "score": 1.0, "group": 0}
    save_records([{**flat, "id": str(i)} for i in range(2)], tmp_path / "flat")
    with pytest.raises(MmalignError, match="needs the column 'score'; run a score stage first"):
        run(tmp_path / "1", {"name": "s", "kind": "select", "data": {"path": str(tmp_path / "rows")}})
    with pytest.raises(MmalignError, match="no row is left"):
        run(tmp_path / "2", {"name": "s", "kind": "select", "data": {"path": str(tmp_path / "flat")}})
    with pytest.raises(MmalignError, match="k: required"):
        run(tmp_path / "3", {"name": "s", "kind": "select", "data": {"path": str(tmp_path / "flat")}, "mode": "top_k"})


def test_rows_without_a_sample_cannot_be_scored() -> None:
    with pytest.raises(DataError, match="completion, image or views is needed; columns are prompt"):
        rollout_of([{"prompt": "p"}])
    with pytest.raises(DataError, match="exactly one"):
        rollout_of([{"prompt": "p", "images": [grey(1), grey(2)]}])


@pytest.mark.parametrize("batches", [1, 3])
def test_a_killed_generation_samples_no_finished_row_again(batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It resumes at the rows that were being decoded, and its samples are those of a run that was not killed."""
    stage = {"name": "samples", "kind": "generate", "model": {"path": "asset:tiny_llama"}, "completions_per_prompt": 2,
             "data": {"path": "asset:arithmetic", "limit": 10}, "sampling": {"max_new_tokens": 4, "rows_per_forward": 4}}
    sampled: list[str] = []
    sample, allowed = CausalLMPolicy.sample, [2 * batches, 10]

    def watched(self: Any, prompts: Any, *arguments: Any, **options: Any) -> Any:
        if len(sampled) == allowed[0]:  # two prompts with two completions each are decoded together
            raise KeyboardInterrupt
        sampled.extend(str(prompt) for prompt in prompts)
        return sample(self, prompts, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(CausalLMPolicy, "sample", watched)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", stage)
        assert len(sampled) == allowed.pop(0)
        resumed = run(tmp_path / "killed", stage)
    whole = run(tmp_path / "whole", stage)
    assert len(sampled) == len(set(sampled)) == 10
    assert rows_in(resumed["samples"]["outputs"]["data"]) == rows_in(whole["samples"]["outputs"]["data"])


def test_generated_text_feeds_a_preference_run(tmp_path: Path) -> None:
    """generate, score, select, dpo: each reads what the one before it wrote."""
    model = {"path": "asset:tiny_llama"}
    manifests = run(
        tmp_path / "run",
        {"name": "samples", "kind": "generate", "model": model, "data": {"path": "asset:arithmetic", "limit": 4},
         "completions_per_prompt": 3, "prompts_per_chunk": 3, "sampling": {"max_new_tokens": 6}},
        {"name": "scored", "kind": "score", "data": {"path": "${stages.samples.data}"},
         "rewards": [{"name": "length_penalty", "unit": "characters", "max_length": 50}]},
        {"name": "pairs", "kind": "select", "data": {"path": "${stages.scored.data}"}},
        {"name": "dpo", "method": "dpo", "model": model, "data": {"path": "${stages.pairs.data}"}, "steps": 1,
         "batch": {"examples_per_update": 2}},
    )
    samples = rows_in(manifests["samples"]["outputs"]["data"])
    assert [row["group"] for row in samples] == [g for g in range(4) for _ in range(3)]
    assert len({row["id"] for row in samples}) == 12
    assert all("answer" in row for row in samples)
    pairs = rows_in(manifests["pairs"]["outputs"]["data"])
    assert all(pair["chosen_score"] > pair["rejected_score"] for pair in pairs)
    assert (Path(manifests["dpo"]["outputs"]["model"]) / "config.json").is_file()
