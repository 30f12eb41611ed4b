"""Losses mixed by a controller: what is drawn, what is weighed, when mu moves, and that looking changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tables import Arms, MixedRun, TablePolicy, mixed_run
from toys import FixedExperience, QuadraticObjective, bandit_rows, make_loop

from mmalign.core.gradients import gradient_norm, mixing_gradient
from mmalign.core.reduce import reduce
from mmalign.errors import MmalignError
from mmalign.training.controller import FixedWeights
from mmalign.training.mixing_control import (
    EntropyMixing,
    MetaMixing,
    MixedTerms,
    MixingController,
    MixingOptions,
    MixScheduleOptions,
)
from mmalign.training.objective import LossTerm, Supervised, TrainState

SMALL = Arms(seed=3, contexts=4, length=2, symbols=3)
MOVING: dict[str, Any] = {"mu": 0.8, "warmup_steps": 2, "every": 2, "meta_scale": "cosine", "meta_lr": 0.1, "entropy_lr": 0.05,
                          "entropy_sign": "text"}


def small(folder: Path, options: MixingOptions, **changes: Any) -> MixedRun:
    return mixed_run(folder, SMALL, options, **{"steps": 12, "lr": 1.0, "samples": 4, "prompts": 4, **changes})


def logits(run: MixedRun) -> torch.Tensor:
    return run.policy.module.logits.detach().clone()


# -- what is drawn and weighed ---------------------------------------------------------------------------------------------


def test_share_one_is_imitation_bit_for_bit_and_draws_no_rollout(tmp_path: Path) -> None:
    run = small(tmp_path / "mix", MixingOptions(name="fixed", mu=1.0)).train(6)
    other = small(tmp_path / "plain", MixingOptions(name="fixed", mu=1.0))
    imitation = Supervised(other.policy, [LossTerm("nll", reduction="seq_mean_token_sum")])
    source = other.experience.sources["sft"]
    loop = make_loop(tmp_path / "loop", imitation, source, policy=other.policy, per_update=4, per_forward=4,
                     optimizers=[run.loop.groups[0].options])
    stream = iter(source)
    for _ in range(6):
        loop.update(next(stream))
    assert torch.equal(logits(run), logits(other))
    assert all("reward" not in record and record["mu"] == 1 for record in run.records)
    assert run.experience.sources["train"].sampler.position == 0  # type: ignore[attr-defined]


def test_share_zero_is_the_policy_gradient_bit_for_bit_and_reads_no_demonstration(tmp_path: Path) -> None:
    run = small(tmp_path / "mix", MixingOptions(name="fixed", mu=0.0)).train(6)
    other = small(tmp_path / "plain", MixingOptions(name="fixed", mu=0.0))
    rl, source = other.loop.objective.members["train"], other.experience.sources["train"]  # type: ignore[attr-defined]
    loop = make_loop(tmp_path / "loop", rl, source, policy=other.policy, per_update=16, per_forward=16,
                     optimizers=[run.loop.groups[0].options])
    stream = iter(source)
    for _ in range(6):
        loop.update(next(stream))
        source.state.step += 1
    assert torch.equal(logits(run), logits(other))
    assert run.experience.sources["sft"].sampler.position == 0  # type: ignore[attr-defined]
    assert logits(run).any()


def test_a_constant_share_is_the_weighted_sum_of_both_gradients(tmp_path: Path) -> None:
    run = small(tmp_path, MixingOptions(name="fixed", mu=0.3), lr=1.0)
    update = next(iter(run.experience))
    found = {}
    for part, share in (("train", 0.7), ("sft", 0.3)):
        member = run.loop.objective.members[part]  # type: ignore[attr-defined]
        terms, _ = member.loss(update, {}, run.loop.state)
        total = member.counts(update)[terms[0].name]
        value = reduce(terms[0].values, terms[0].mask, how=terms[0].reduction, denominator=total)
        found[part] = share * torch.autograd.grad(value, run.policy.module.logits)[0]
    before = logits(run)
    record = run.loop.update(update)
    torch.testing.assert_close(before - logits(run), found["train"] + found["sft"])
    assert record["loss"] == pytest.approx(0.3 * record["loss/sft_nll"] + 0.7 * record["loss/policy"])


def test_both_gradient_norms_are_logged_every_so_often(tmp_path: Path) -> None:
    run = small(tmp_path, MixingOptions(name="fixed", mu=0.5, every=3)).train(6)
    assert ["mixing/grad_norm_sft" in record for record in run.records] == [True, False, False] * 2
    assert all(record["mixing/grad_norm_sft"] > 0 for record in run.records[::3])
    assert {"mixing/grad_norm_rl", "mixing/cosine"} <= run.records[0].keys()


@given(per_forward=st.sampled_from([1, 2, 3, 5, 8, 16]))
@settings(max_examples=6, deadline=None)
def test_update_and_controller_do_not_depend_on_the_split(tmp_path_factory: Any, per_forward: int) -> None:
    """Parts of different sizes, some micro-batches without a row of one of them."""
    whole, parts = (small(tmp_path_factory.mktemp("run"), MixingOptions(**MOVING), per_forward=size, samples=6)
                    for size in (24, per_forward))
    whole.train(6), parts.train(6)
    torch.testing.assert_close(logits(whole), logits(parts), rtol=1e-5, atol=1e-6)
    for key in ("mu", "mixing/meta_gradient", "mixing/grad_norm_rl", "mixing/entropy_gradient", "loss"):
        values = [[record[key] for record in run.records if key in record] for run in (whole, parts)]
        assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-6)
        assert values[0]


# -- schedules -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "expected"), [
    ({"shape": "linear"}, [1.0, 0.75, 0.5, 0.25]),
    ({"shape": "linear", "start": 0.2, "end": 0.8, "until": 2}, [0.2, 0.5, 0.8, 0.8]),
    ({"shape": "cosine"}, [1.0, 0.853553, 0.5, 0.146447]),
    ({"shape": "step", "until": 2}, [1.0, 1.0, 0.0, 0.0]),
    ({"shape": "step", "until": 0.25, "end": 0.1}, [1.0, 0.1, 0.1, 0.1]),
])
def test_schedules(options: dict[str, Any], expected: list[float], tmp_path: Path) -> None:
    run = small(tmp_path, MixingOptions(name="schedule", schedule=MixScheduleOptions(**options), every=0), steps=4).train(4)
    assert [record["mu"] for record in run.records] == pytest.approx(expected, abs=1e-6)
    assert ["reward" in record for record in run.records] == [mu < 1 for mu in expected]
    assert ["sft/epoch" in record for record in run.records] == [mu > 0 for mu in expected]


# -- the entropy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sign", "expected"), [("eq6", 0.5 + 0.1 * (1.2 - 0.7)), ("text", 0.5 - 0.1 * (1.2 - 0.7))])
def test_entropy_below_the_target_raises_mu_as_printed_and_lowers_it_as_described(sign: Any, expected: float) -> None:
    controller = EntropyMixing(0.5, MixedTerms({}, {}), low=0.0, high=1.0, warmup=2, every=0, entropy_lr=0.1, entropy_sign=sign)
    controller.update({}, {}, TrainState(0, 10, step=1))  # in the warm-up nothing moves
    controller.update({"entropy": 1.2}, {}, TrainState(0, 10, step=2))  # measures the target
    assert (controller.mu, controller.target) == (0.5, 1.2)
    controller.update({"entropy": 0.7}, {}, TrainState(0, 10, step=3))
    assert controller.mu == pytest.approx(expected)


def test_an_unset_target_is_an_error_not_a_guess() -> None:
    controller = EntropyMixing(0.5, MixedTerms({}, {}), low=0.0, high=1.0, warmup=2, every=0, entropy_lr=0.1)
    with pytest.raises(MmalignError, match=r"controller\.target_entropy is not set"):
        controller.update({"entropy": 1.0}, {}, TrainState(0, 10, step=5))


def test_the_target_is_the_entropy_of_the_warmed_up_policy_on_its_own_samples(tmp_path: Path) -> None:
    run = small(tmp_path, MixingOptions(**MOVING)).train(2)
    policy = logits(run)
    entropy = -(policy.softmax(-1) * policy.log_softmax(-1)).sum(-1)
    assert run.controller.target is None  # type: ignore[attr-defined]
    record = run.train(1).records[-1]
    assert record["mixing/target_entropy"] == pytest.approx(float(entropy.mean()), rel=1e-5)  # every context has as many samples
    assert record["mixing/entropy_gradient"] == 0


# -- the meta-gradient -----------------------------------------------------------------------------------------------------


def test_mu_moves_by_the_formula_at_the_present_weights_before_the_step_that_uses_it(tmp_path: Path) -> None:
    options = MixingOptions(mu=0.5, warmup_steps=0, every=1, meta_lr=3.0, entropy_lr=0.0, mu_min=0.0, mu_max=1.0)
    run = small(tmp_path, options, lr=0.25)
    run.train(3)
    update = next(iter(run.experience))
    assert update.probed == {"validation"}
    gradients, counts = {}, run.loop.objective.counts(update)
    shared = run.loop.objective.prepare(update, run.loop.state)
    for term in run.loop.objective.loss(update, shared, run.loop.state)[0]:
        value = reduce(term.values, term.mask, how=term.reduction, denominator=counts[term.name])
        gradients[term.name] = [torch.autograd.grad(value, run.policy.module.logits)[0]]
    meta = mixing_gradient(gradients["validation_policy"], gradients["sft_nll"], gradients["policy"], step_size=0.25)
    before, mu = logits(run), run.controller.mu
    record = run.loop.update(update)
    assert meta != 0
    assert record["mixing/meta_gradient"] == pytest.approx(meta, rel=1e-4)
    assert record["mu"] == pytest.approx(mu + 3.0 * meta, rel=1e-6)
    assert record["mixing/grad_norm_sft"] == pytest.approx(gradient_norm(gradients["sft_nll"]), rel=1e-5)
    expected = record["mu"] * gradients["sft_nll"][0] + (1 - record["mu"]) * gradients["policy"][0]
    torch.testing.assert_close(before - logits(run), 0.25 * expected)  # the new mu, and nothing of the validation rows


def test_mu_is_clipped_at_both_ends() -> None:
    terms = MixedTerms({"sft_nll": 1.0}, {"policy": 1.0}, "validation_policy")
    for sign, end in ((1.0, 0.95), (-1.0, 0.05)):
        controller = MetaMixing(0.5, terms, meta_lr=100.0, step_size=1.0, low=0.05, high=0.95, warmup=0, every=1, entropy_lr=0.0)
        gradients = {name: [torch.tensor([value])] for name, value in
                     {"sft_nll": 1.0, "policy": 0.0, "validation_policy": sign}.items()}
        controller.update({}, gradients, TrainState(0, 10))
        assert controller.mu == end


def test_gradients_of_either_side_count_the_weights_of_their_terms(tmp_path: Path) -> None:
    terms = MixedTerms({"sft_nll": 2.0}, {"policy": 1.0, "kl": 0.5}, "validation_policy")
    controller = MetaMixing(0.5, terms, meta_lr=1.0, step_size=1.0, low=0.0, high=1.0, warmup=0, every=1, entropy_lr=0.0)
    gradients = {name: [torch.tensor([value])] for name, value in
                 {"sft_nll": 0.1, "policy": 0.3, "kl": 0.2, "validation_policy": 1.0}.items()}
    controller.update({}, gradients, TrainState(0, 10))
    assert controller.mu == pytest.approx(0.5 + (2 * 0.1 - (0.3 + 0.5 * 0.2)))
    assert controller.weights(TrainState(0, 10)) == pytest.approx({"sft_nll": 0.3 * 2, "policy": 0.7, "kl": 0.7 * 0.5})
    assert float(gradients["policy"][0]) == pytest.approx(0.3)  # probed gradients are not changed by summing them


def test_not_finite_gradients_stop_the_run() -> None:
    controller = MetaMixing(0.5, MixedTerms({"a": 1.0}, {"b": 1.0}, "v"), meta_lr=1.0, step_size=1.0, low=0.0, high=1.0, warmup=0,
                            every=1, entropy_lr=0.0)
    with pytest.raises(MmalignError, match="mu became nan"):
        controller.update({}, {name: [torch.tensor([float("nan")])] for name in "abv"}, TrainState(0, 10))


def test_without_step_sizes_it_is_the_plain_mixture_whatever_is_looked_at(tmp_path: Path) -> None:
    """Looking draws nothing from the generators of the run, dropout included."""
    def trained(name: str, options: MixingOptions) -> torch.Tensor:
        torch.manual_seed(5)
        policy = TablePolicy(4, 2, 3, dropout=0.3)
        return logits(small(tmp_path / name, options, policy=policy).train(6))

    plain = trained("plain", MixingOptions(name="fixed", mu=0.6, every=0))
    assert torch.equal(plain, trained("looking", MixingOptions(name="fixed", mu=0.6, every=1)))
    still = {"mu": 0.6, "warmup_steps": 0, "entropy_lr": 0.0}
    assert torch.equal(plain, trained("meta", MixingOptions(every=1, meta_lr=1e-12, **still)).clone())
    assert not torch.equal(plain, trained("moving", MixingOptions(every=1, meta_lr=0.3, meta_scale="cosine", **still)))


def test_validation_rollouts_come_every_k_updates_after_the_warm_up(tmp_path: Path) -> None:
    run = small(tmp_path, MixingOptions(**{**MOVING, "warmup_steps": 3, "every": 4})).train(12)
    assert [i for i, record in enumerate(run.records) if "validation/reward" in record] == [3, 7, 11]
    assert [i for i, record in enumerate(run.records) if "mixing/meta_gradient" in record] == [3, 7, 11]
    assert [record["mu"] for record in run.records[:3]] == [1.0, 1.0, 1.0]
    assert ["reward" in record for record in run.records] == [False] * 3 + [True] * 9


def test_degenerate_range_at_one_is_imitation_alone(tmp_path: Path) -> None:
    moving = small(tmp_path / "a", MixingOptions(mu=1.0, mu_min=1.0, mu_max=1.0, warmup_steps=0, target_entropy=1.0)).train(5)
    fixed = small(tmp_path / "b", MixingOptions(name="fixed", mu=1.0)).train(5)
    assert torch.equal(logits(moving), logits(fixed))
    assert all("reward" not in record for record in moving.records)


# -- state -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
def test_resumed_anywhere_it_goes_on_bit_for_bit(at: int, tmp_path: Path) -> None:
    """Before, at and after the measurement of the target, and between two looks."""
    whole = small(tmp_path / "whole", MixingOptions(**MOVING)).train(8)
    first = small(tmp_path / "parts", MixingOptions(**MOVING)).train(at)
    first.loop.save()
    second = small(tmp_path / "parts", MixingOptions(**MOVING))
    assert second.loop.resume() == at
    second.train(8 - at)
    assert torch.equal(logits(whole), logits(second))
    assert second.controller.state_dict() == whole.controller.state_dict()
    timeless = [[{k: v for k, v in record.items() if "seconds" not in k} for record in run.records] for run in (second, whole)]
    assert timeless[0] == timeless[1][at:]
    assert len({record["mu"] for record in whole.records}) > 4


def test_probed_parts_do_not_disturb_objectives_without_any(tmp_path: Path) -> None:
    """A plain objective with a plain controller logs what it did before."""
    loop = make_loop(tmp_path, QuadraticObjective(), FixedExperience(bandit_rows(8), 8), controller=FixedWeights())
    record = loop.update(next(iter(loop.experience)))
    assert not any(key.startswith("mixing") or key == "mu" for key in record)


# -- refusals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "message"), [
    ({"mu": 0.99}, r"mu must be in \[mu_min, mu_max\]"),
    ({"mu": 0.01}, r"mu must be in \[mu_min, mu_max\]"),
    ({"name": "fixed", "mu": 1.2}, r"mu must be in \[0, 1\]"),
    ({"mu_min": 0.9, "mu_max": 0.1, "mu": 0.5}, "mu_min <= mu_max"),
    ({"warmup_steps": 0}, "target_entropy is not set"),
    ({"name": "entropy", "warmup_steps": 0}, "target_entropy is not set"),
    ({"name": "fixed", "meta_lr": 0.1}, "meta_lr belongs to controllers meta"),
    ({"name": "entropy", "utility": "reward"}, "utility belongs to controllers meta"),
    ({"name": "schedule", "mu": 0.5}, "mu belongs to controllers"),
    ({"every": 0}, "every: 0 never computes"),
    ({"meta_lr": -1.0}, "meta_lr must not be negative"),
    ({"lookahead_lr": 0.0}, "lookahead_lr must be positive"),
    ({"warmup_steps": -1}, "warmup_steps must not be negative"),
    ({"meta_params": []}, "meta_params is empty"),
    ({"name": "schedule", "schedule": {"shape": "step"}}, "until: 1.0"),
    ({"name": "schedule", "schedule": {"start": 1.5}}, r"start must be in \[0, 1\]"),
])
def test_senseless_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MixingOptions(**options)


def test_spellings_of_the_published_configuration() -> None:
    options = MixingOptions.model_validate({"mu_init": 0.7, "meta_update_freq": 10})
    assert (options.mu, options.every, options.warmup, options.entropy_sign, options.meta_scale) == (0.7, 10, 50, "eq6", "raw")
    assert MixingController(0.5, MixedTerms({}, {})).match == ("policy.*",)
