"""DisCO on language models: its defaults, what it refuses, split forwards, and resuming."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import prepared_runs
import pytest
from prepared_runs import rollout_tree

from interrupted_runs import kill_at, records
from mmalign.errors import ConfigError, RewardError
from mmalign.stages import load_plan, run_plan
from mmalign.training.objective import UpdateBatch
from text_llm.rl.disco import DiscoLossOptions


def tree(**changes: Any) -> dict[str, Any]:
    batch = {"prompts_per_rollout": 4, "completions_per_prompt": 4, "examples_per_update": 8}
    return rollout_tree(0.6, **{"method": "disco", "batch": batch, **changes})


def prepared(folder: Path, **changes: Any) -> Any:
    return prepared_runs.prepared(tree(**changes), folder)


@pytest.mark.parametrize(("loss", "tau"), [
    ({}, 10.0), ({"score": "likelihood_ratio"}, 1.0), ({"score": "Lratio", "tau": 0.5}, 0.5), ({"name": "disco_b"}, math.inf),
    ({"score": "logL", "tau": math.inf}, math.inf),
])
def test_temperatures_by_score(loss: dict[str, Any], tau: float) -> None:
    assert DiscoLossOptions(**loss).temperature == tau


def test_the_objective_takes_its_options_from_the_configuration(tmp_path: Path) -> None:
    made = prepared(tmp_path, loss={"name": "disco", "score": "Lratio", "tau": 2.0, "normalise_by": "valid"},
                    kl={"radius": 0.01, "penalty": 5.0, "estimator": "k3", "form": "squared"})
    objective = made.parts.objective
    assert (objective.score, objective.tau, objective.groups, objective.temperature) == ("likelihood_ratio", 2.0, "valid", 0.6)
    assert (objective.kl.radius, objective.kl.penalty, objective.kl.form) == (0.01, 5.0, "squared")
    assert objective.coupling == "group"
    assert not objective.on_policy
    assert made.parts.reference is None


@pytest.mark.parametrize("score", ["log_likelihood", "likelihood_ratio"])
def test_the_update_does_not_depend_on_the_forward_size(score: str, tmp_path: Path) -> None:
    records = []
    for size in (8, 4):
        batch = {"prompts_per_rollout": 4, "completions_per_prompt": 4, "examples_per_update": 8, "examples_per_forward": size}
        made = prepared(tmp_path / str(size), batch=batch, loss={"score": score}, positive_threshold=0.3,
                        rewards=[{"name": "length_penalty", "max_length": 8, "weight": -1.0}])
        rows = next(iter(made.parts.experience)).parts["train"]
        signs = (rows["advantages"] * 0 - 1).index_fill(0, (rows["group"] >= 0).nonzero().flatten()[::3], 1.0)
        rows = rows.with_columns(advantages=signs, old_logp=(rows["old_logp"] + 0.02) * rows["action_mask"])
        records.append(made.loop.update(UpdateBatch({"train": rows})))
    for key in ("loss/policy", "loss/kl", "grad_norm", "kl/gate", "score/right"):
        assert records[0][key] == pytest.approx(records[1][key], rel=1e-3, abs=1e-6)
    assert records[0]["kl/gate"] == pytest.approx(1e3 * (0.02 - 1e-4), rel=0.01)


def test_the_gap_between_sampling_and_scoring_is_logged_and_small(tmp_path: Path) -> None:
    made = prepared(tmp_path, batch={"prompts_per_rollout": 4, "completions_per_prompt": 4})
    record = made.loop.update(next(iter(made.parts.experience)))
    assert made.parts.objective.on_policy
    assert record["rollout_gap/max"] < 1e-4
    assert "loss/kl" not in record


def test_killed_between_two_rollouts_it_resumes_bit_for_bit(root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def plan(name: str) -> Any:
        return load_plan(root / "configs/text/disco.yaml", ["steps=7", "checkpoint.every=1"], run_dir=str(tmp_path / name))

    run_plan(plan("whole"), quiet=True)
    # the resumed run trains the last rows of one rollout and then makes another
    kill_at(4, lambda: run_plan(plan("parts"), quiet=True), monkeypatch)
    run_plan(plan("parts"), quiet=True)
    found = [records(tmp_path / name) for name in ("whole", "parts")]
    assert found[0] == found[1]
    assert len({line["reward"] for line in found[0]}) == 2
    assert any(line.get("kl/gate", 0) > 0 for line in found[0])


@pytest.mark.parametrize(("changes", "message"), [
    ({"sampling": {"temperature": 0.0}}, r"sampling\.temperature"),
    ({"sampling": {"top_k": 5}}, r"sampling\.top_k"),
    ({"sampling": {"top_p": 0.9}}, r"sampling\.top_k and sampling\.top_p"),
    ({"sampling": {"min_new_tokens": 3}}, r"sampling\.min_new_tokens"),
    ({"loss": {"tau": 0.0}}, r"loss.*loss\.tau must be positive"),
    ({"loss": {"name": "disco_b", "tau": 1.0}}, r"loss\.tau has no meaning for disco_b"),
    ({"loss": {"score": "likelihood"}}, r"loss\.score"),
    ({"kl": {"radius": -1.0}}, r"kl\.radius"),
    ({"kl": {"penalty": -1.0}}, r"kl\.penalty"),
    ({"kl": {"coef": 0.1}}, r"kl\.coef"),
    ({"kl": {"placement": "loss"}}, r"kl\.placement"),
    ({"advantage": "grpo"}, "advantage"),
    ({"data": {"path": "asset:arithmetic", "limit": 4, "columns": {"prompt": "question"}}}, "column 'prompt' is missing"),
    ({"batch": {"prompts_per_rollout": 4, "completions_per_prompt": 1}}, r"batch\.completions_per_prompt.*at least 2"),
    ({"batch": {"prompts_per_rollout": 4, "completions_per_prompt": 4, "examples_per_forward": 2}},
     r"batch\.examples_per_forward: 2 rows would split the 4 completions"),
    ({"batch": {"prompts_per_rollout": 4, "completions_per_prompt": 4, "examples_per_update": 2}},
     r"batch\.completions_per_prompt"),
])
def test_bad_configurations_are_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError if "column" not in message else ValueError, match=message):
        prepared(tmp_path, **changes)


def test_shaped_rewards_are_refused_without_a_threshold(tmp_path: Path) -> None:
    shaped = [{"name": "length_penalty", "max_length": 8}]
    with pytest.raises(RewardError, match="positive_threshold"):
        next(iter(prepared(tmp_path, rewards=shaped).parts.experience))
    rows = next(iter(prepared(tmp_path, rewards=shaped, positive_threshold=-0.5).parts.experience)).parts["train"]
    assert set(rows["advantages"].tolist()) <= {1.0, -1.0}
