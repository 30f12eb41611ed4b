"""Methods that are pipelines: expansion into stages, names, references, outputs, seeds, and what is refused before any work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmalign.config import Options
from mmalign.errors import ConfigError
from mmalign.methods.registry import METHODS, Method, Pipeline
from mmalign.stages import make_plan


class TwoStepOptions(Options):
    """Options of the test's pipeline."""

    model: str
    steps: int = 1


def two_step(options: TwoStepOptions) -> Pipeline:
    data = {"path": "asset:arithmetic", "limit": 4}
    first = {"name": "first", "method": "sft", "model": {"path": options.model}, "data": data, "steps": options.steps}
    second = {**first, "name": "second", "model": {"path": "${stages.first.model}"}}
    return Pipeline([first, second], {"model": "second.model"})


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    METHODS.names()  # before the table is touched
    METHODS.register("two_step")(Method("two_step", TwoStepOptions, two_step, "text", "pipeline", "none", "For tests."))
    yield
    METHODS._entries.pop("two_step")  # type: ignore[attr-defined]


def plan(tree: dict[str, Any], tmp_path: Path) -> Any:
    return make_plan({"run_dir": str(tmp_path), **tree}, config_folder=tmp_path, default_name="run")


def test_a_run_that_is_a_pipeline_has_its_stages(tmp_path):
    made = plan({"method": "two_step", "model": "asset:tiny_llama"}, tmp_path)
    assert [(s.name, s.kind) for s in made.stages] == [("first", "sft"), ("second", "sft")]
    assert not made.single
    assert made.stages[1].tree["model"]["path"] == "${stages.first.model}"
    assert made.stages[0].seed != made.stages[1].seed


def test_a_pipeline_among_other_stages_is_prefixed_and_offers_its_outputs(tmp_path):
    first = {"name": "base", "method": "sft", "model": {"path": "asset:tiny_llama"},
             "data": {"path": "asset:arithmetic", "limit": 4}}
    last = {**first, "name": "more", "model": {"path": "${stages.two.model}"}}
    made = plan({"stages": [first, {"name": "two", "method": "two_step", "model": "${stages.base.model}"}, last]}, tmp_path)
    assert [s.name for s in made.stages] == ["base", "two-first", "two-second", "more"]
    assert made.stages[1].tree["model"]["path"] == "${stages.base.model}"
    assert made.stages[2].tree["model"]["path"] == "${stages.two-first.model}"
    assert made.stages[3].tree["model"]["path"] == "${stages.two-second.model}"


def test_a_seed_given_to_the_pipeline_decides_the_seeds_of_its_stages(tmp_path):
    def seeds(seed: int) -> list[int]:
        entry = {"name": "two", "method": "two_step", "model": "asset:tiny_llama", "seed": seed}
        return [s.seed for s in plan({"stages": [entry]}, tmp_path).stages]

    assert seeds(1) == seeds(1) != seeds(2)
    assert len(set(seeds(1))) == 2


@pytest.mark.parametrize(("tree", "message"), [
    ({"stages": [{"method": "two_step", "model": "asset:tiny_llama", "stesp": 3}]}, "did you mean stages.two_step.steps"),
    ({"stages": [{"method": "two_step", "model": "asset:tiny_llama", "steps": -1}]}, "two_step-first.*steps"),
    ({"stages": [{"method": "two_step", "model": "${stages.nobody.model}"}]}, "nobody"),
    ({"stages": [{"name": "two", "method": "two_step", "model": "asset:tiny_llama"},
                 {"name": "after", "method": "two_step", "model": "${stages.two.data}"}]}, "no output 'data'"),
    ({"stages": [{"name": "two", "method": "two_step", "model": "asset:tiny_llama"},
                 {"name": "two", "method": "two_step", "model": "asset:tiny_llama"}]}, "used twice"),
])
def test_mistakes_are_found_before_anything_runs(tree, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        plan(tree, tmp_path)
    assert not list(tmp_path.iterdir())
