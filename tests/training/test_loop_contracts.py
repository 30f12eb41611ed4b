"""Each contract of the loop on a toy of its own, so that no method has a reason to write another loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys import BanditPolicy, FixedExperience, QuadraticObjective, bandit_rows, make_loop

from mmalign.errors import CheckpointError, ConfigError, MmalignError
from mmalign.training.controller import FixedWeights, ScheduledWeights, accumulate_gradients
from mmalign.training.experience import BatchOptions, SelectingExperience, resolve_batch
from mmalign.training.objective import LossTerm, Supervised, Term, TrainState, UpdateBatch
from mmalign.training.optimizers import OptimizerOptions, build_optimizers, schedule_factor
from mmalign.training.tracking import read_metrics
from mmalign.training.tuning import FullTuning


def weights(loop: Any) -> dict[str, Tensor]:
    return {f"{m}.{n}": p.detach().clone() for m, net in loop.bare.items() for n, p in net.named_parameters()}


# -- gradient does not depend on the split ---------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(per_forward=st.sampled_from([1, 2, 3, 4, 8]), reduction=st.sampled_from(
    ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "sum"]), seed=st.integers(0, 5))
def test_gradient_is_the_same_however_rows_are_split(tmp_path_factory: Any, per_forward: int, reduction: str, seed: int) -> None:
    gradients = []
    for size in (8, per_forward):
        policy = BanditPolicy()
        policy.module.double()
        objective = Supervised(policy, [LossTerm("nll", reduction=reduction)])
        experience = FixedExperience(bandit_rows(8, seed=seed), 8)
        loop = make_loop(tmp_path_factory.mktemp("split"), objective, experience, policy=policy, per_forward=size,
                         optimizers=[OptimizerOptions(kind="sgd", lr=1.0, max_grad_norm=None)])
        before = policy.module.logits.detach().clone()
        loop.update(UpdateBatch({"train": bandit_rows(8, seed=seed)}))
        gradients.append(before - policy.module.logits.detach())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)
    assert gradients[0].abs().sum() > 0


def test_reported_loss_is_the_global_mean_not_a_mean_of_means(tmp_path: Any) -> None:
    rows = bandit_rows(8, seed=3)
    policy = BanditPolicy()
    scores = policy.log_probs(rows)
    expected = float(-(scores.logp.detach() * scores.mask).sum() / scores.mask.sum())
    for size in (8, 3, 1):
        loop = make_loop(tmp_path / str(size), Supervised(BanditPolicy()), FixedExperience(rows, 8), per_forward=size)
        assert loop.update(UpdateBatch({"train": rows}))["loss"] == pytest.approx(expected, rel=1e-5)


# -- named optimiser groups --------------------------------------------------------------------------------------------


def test_two_optimisers_own_their_modules_and_clip_separately(tmp_path: Any) -> None:
    objective = QuadraticObjective()
    loop = make_loop(tmp_path, objective, FixedExperience(bandit_rows(8), 8), optimizers=[
        OptimizerOptions(name="policy", match=["policy.*"], kind="sgd", lr=0.1, max_grad_norm=0.01),
        OptimizerOptions(name="critic", match=["critic.*"], kind="sgd", lr=0.1, max_grad_norm=None),
    ])
    record = loop.update(next(iter(loop.experience)))
    policy, critic = objective.nets["policy"].weight, objective.nets["critic"].weight
    assert float(policy.detach().norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)  # clipped
    assert float(critic.detach().norm()) > 0.1  # not clipped
    assert {"grad_norm/policy", "grad_norm/critic"} <= set(record)


def test_optimiser_group_that_steps_every_second_update(tmp_path: Any) -> None:
    objective = QuadraticObjective()
    loop = make_loop(tmp_path, objective, FixedExperience(bandit_rows(8), 8), optimizers=[
        OptimizerOptions(name="policy", match=["policy.*"], kind="sgd", lr=0.1),
        OptimizerOptions(name="critic", match=["critic.*"], kind="sgd", lr=0.1, every=2),
    ])
    stream = iter(loop.experience)
    loop.update(next(stream))
    assert float(objective.nets["critic"].weight.detach().abs().sum()) == 0
    loop.update(next(stream))
    assert float(objective.nets["critic"].weight.detach().abs().sum()) > 0


def test_alternating_direction_by_step(tmp_path: Any) -> None:
    objective = QuadraticObjective(alternate=True)
    loop = make_loop(tmp_path, objective, FixedExperience(bandit_rows(8), 8), optimizers=[
        OptimizerOptions(name="policy", match=["policy.*"], kind="sgd", lr=0.1),
        OptimizerOptions(name="critic", match=["critic.*"], kind="sgd", lr=0.1),
    ])
    loop.update(next(iter(loop.experience)))
    assert float(objective.nets["policy"].weight.detach().abs().sum()) > 0
    assert float(objective.nets["critic"].weight.detach().abs().sum()) == 0


@pytest.mark.parametrize(("match", "message"), [
    (["nothing.*"], r"optimizers\[0\].match"), (["policy.*"], "match no group"),
])
def test_optimiser_groups_must_cover_every_parameter(match: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_optimizers(QuadraticObjective().modules(), [OptimizerOptions(match=match)], total_steps=1)


def test_schedules() -> None:
    from mmalign.training.optimizers import ScheduleOptions

    cosine = schedule_factor(ScheduleOptions(name="cosine", warmup=10, min_ratio=0.1), 110)
    assert cosine(0) == pytest.approx(1 / 11)
    assert cosine(10) == pytest.approx(1.0)
    assert cosine(60) == pytest.approx(0.1 + 0.9 * 0.5)
    assert cosine(110) == pytest.approx(0.1)
    linear = schedule_factor(ScheduleOptions(name="linear", warmup=0.5), 100)
    assert linear(49) == pytest.approx(50 / 51)
    assert linear(75) == pytest.approx(0.5)


# -- controller ----------------------------------------------------------------------------------------------------------


class BalanceGradients(FixedWeights):
    """Weighs the critic's term by the ratio of probed gradient norms."""

    match: Sequence[str] = ("policy.*", "critic.*")

    def __init__(self) -> None:
        self.weight, self.calls = 1.0, 0

    def probe(self, state: TrainState) -> tuple[str, ...]:
        return ("policy", "critic")

    def weights(self, state: TrainState) -> dict[str, float]:
        return {"critic": self.weight}

    def update(self, metrics: Mapping[str, float], gradients: Mapping[str, list[Tensor]], state: TrainState) -> None:
        norms = {name: float(torch.stack([g.norm() for g in grads]).norm()) for name, grads in gradients.items()}
        self.weight, self.calls = norms["policy"] / norms["critic"], self.calls + 1

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight, self.calls = state["weight"], state["calls"]


def test_controller_sees_exact_gradients_before_the_weighted_backward(tmp_path: Any) -> None:
    objective, controller = QuadraticObjective(), BalanceGradients()
    loop = make_loop(tmp_path, objective, FixedExperience(bandit_rows(8), 8), controller=controller, per_forward=2,
                     optimizers=[OptimizerOptions(kind="sgd", lr=1e-9, max_grad_norm=None)])
    loop.update(next(iter(loop.experience)))
    # At zero weights the gradients are -2 target mean(x): their norms are in the ratio of the targets 1 and -2.
    assert controller.weight == pytest.approx(0.5, rel=1e-5)
    # The weighted backward that followed used it: both modules moved equally far.
    moved = {name: float(net.weight.detach().norm()) for name, net in objective.nets.items()}
    assert moved["critic"] == pytest.approx(moved["policy"], rel=1e-4)


def test_gradients_add_up_over_forwards_even_where_autograd_shares_or_expands_them() -> None:
    first, second, third = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    total = None
    for weight in (1.0, 10.0):
        loss = weight * ((first + second) ** 2 / 4).sum() + third.sum()
        total = accumulate_gradients(loss, [first, second, third], total)
    assert total is not None
    assert [gradient.tolist() for gradient in total] == [[11.0] * 3, [11.0] * 3, [2.0] * 3]
    assert accumulate_gradients(torch.zeros(()), [first], [total[0]])[0] is total[0]
    assert first.grad is None


def test_scheduled_weights_follow_progress(tmp_path: Any) -> None:
    objective = QuadraticObjective()
    loop = make_loop(tmp_path, objective, FixedExperience(bandit_rows(8), 8), steps=2,
                     controller=ScheduledWeights({"critic": lambda progress: 1.0 if progress >= 0.5 else 0.0}),
                     optimizers=[OptimizerOptions(kind="sgd", lr=0.1)])
    stream = iter(loop.experience)
    loop.update(next(stream))
    assert float(objective.nets["critic"].weight.detach().abs().sum()) == 0
    loop.update(next(stream))
    assert float(objective.nets["critic"].weight.detach().abs().sum()) > 0


# -- selection -----------------------------------------------------------------------------------------------------------


def test_selecting_experience_keeps_the_best_and_counts_after_selection(tmp_path: Any) -> None:
    rows = bandit_rows(16, seed=1)
    policy = BanditPolicy()

    def mean_nll(candidates: Any) -> Tensor:
        scores = policy.log_probs(candidates)
        return -(scores.logp * scores.mask).sum(1) / scores.mask.sum(1)

    selecting = SelectingExperience(FixedExperience(rows, 16), mean_nll, k=4)
    update = next(iter(selecting))
    assert len(update.parts["train"]) == 4
    kept, everything = mean_nll(update.parts["train"]).detach(), mean_nll(rows).detach()
    torch.testing.assert_close(kept.sort().values, everything.sort().values[-4:])
    objective = Supervised(policy)
    assert objective.counts(update)["nll"] == sum(len(c) for c in update.parts["train"]["choice"])
    loop = make_loop(tmp_path, objective, selecting, policy=policy, per_update=4, per_forward=2)
    assert loop.run().step == 4


# -- tuning that acts between backward and step ------------------------------------------------------------------------


class SparseTuning(FullTuning):
    """Trains the k entries with the largest first gradient and nothing else; pulls them to the start."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k, self.mask, self.start = k, torch.empty(0), torch.empty(0)

    def apply(self, policy: Any, *, seed: int) -> None:
        super().apply(policy, seed=seed)
        self.start = policy.module.logits.detach().clone()

    def penalty(self, policy: Any) -> Term | None:
        gap = (policy.module.logits - self.start).abs().reshape(1, -1)
        return Term("l1_to_start", gap, torch.ones_like(gap, dtype=torch.bool), "sum", weight=1e-3)

    def before_step(self, policy: Any, state: TrainState) -> None:
        gradient = policy.module.logits.grad
        if not self.mask.numel():
            top = gradient.abs().flatten().topk(self.k).indices
            self.mask = torch.zeros(gradient.numel()).index_fill(0, top, 1.0).reshape(gradient.shape)
        gradient.mul_(self.mask)

    def state_dict(self) -> dict[str, Any]:
        return {"mask": self.mask, "start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mask, self.start = state["mask"], state["start"]


def test_sparse_tuning_changes_exactly_k_entries_and_resumes(tmp_path: Any) -> None:
    finals = []
    for stop in (6, 3):
        for steps in dict.fromkeys((stop, 6)):
            policy, tuning = BanditPolicy(), SparseTuning(3)
            tuning.apply(policy, seed=0)
            loop = make_loop(tmp_path / str(stop), Supervised(policy), FixedExperience(bandit_rows(16), 8), policy=policy,
                             steps=steps, tuning=tuning, fingerprint="same")
            loop.state.total_steps = steps
            loop.run()
        finals.append(policy.module.logits.detach().clone())
        assert int((finals[-1] != BanditPolicy().module.logits).sum()) == 3
    torch.testing.assert_close(finals[0], finals[1], rtol=0, atol=0)


# -- checkpoints -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "sgd", "rmsprop", "adafactor"])
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(tmp_path: Any, kind: str) -> None:
    def run(folder: Any, steps: int) -> Any:
        objective, controller = QuadraticObjective(), BalanceGradients()
        optimizers = [OptimizerOptions(name="policy", match=["policy.*"], kind=kind, lr=0.05),
                      OptimizerOptions(name="critic", match=["critic.*"], kind=kind, lr=0.02, every=2)]
        loop = make_loop(folder, objective, FixedExperience(bandit_rows(16), 8), controller=controller, steps=steps,
                         optimizers=optimizers, every=1)
        loop.run()
        return objective, controller, loop

    straight, straight_controller, whole = run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 3)
    resumed, resumed_controller, parts = run(tmp_path / "parts", 6)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(parts)[name]), name
    assert straight.seen == resumed.seen
    assert straight_controller.state_dict() == resumed_controller.state_dict()
    logs = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    drop = ("seconds", "examples_per_second")
    plain = [[{k: v for k, v in line.items() if not k.startswith(drop)} for line in log] for log in logs]
    assert plain[0] == plain[1]
    assert [line["step"] for line in plain[1]] == [1, 2, 3, 4, 5, 6]


def test_checkpoint_of_another_configuration_or_model_is_refused(tmp_path: Any) -> None:
    def loop(fingerprint: str, contexts: int = 4) -> Any:
        from toys import Bandit

        policy = BanditPolicy(Bandit(contexts=contexts))
        return make_loop(tmp_path, Supervised(policy), FixedExperience(bandit_rows(8), 8), policy=policy, fingerprint=fingerprint)

    loop("a").run()
    with pytest.raises(CheckpointError, match="another configuration"):
        loop("b").run()
    with pytest.raises(CheckpointError, match="logits"):
        loop("a", contexts=5).run()


def test_corrupt_checkpoint_names_the_file_and_the_way_out(tmp_path: Any) -> None:
    policy = BanditPolicy()
    make_loop(tmp_path, Supervised(policy), FixedExperience(bandit_rows(8), 8), policy=policy).run()
    (tmp_path / "checkpoints" / "step-4" / "state.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match=r"step-4.*delete it"):
        make_loop(tmp_path, Supervised(BanditPolicy()), FixedExperience(bandit_rows(8), 8)).run()


def test_non_finite_gradient_stops_before_the_step(tmp_path: Any) -> None:
    policy = BanditPolicy()
    before = policy.module.logits.detach().clone()
    objective = Supervised(policy)
    original = policy.log_probs
    policy.log_probs = lambda *a, **k: _poison(original(*a, **k))  # type: ignore[method-assign]
    loop = make_loop(tmp_path, objective, FixedExperience(bandit_rows(8), 8), policy=policy)
    with pytest.raises(MmalignError, match="gradient norm is nan"):
        loop.run()
    assert torch.equal(policy.module.logits, before)


def _poison(scores: Any) -> Any:
    scores.logp = scores.logp * float("nan")
    return scores


# -- batch vocabulary ------------------------------------------------------------------------------------------------------


def test_batch_sizes_are_derived() -> None:
    shape = resolve_batch(BatchOptions(prompts_per_rollout=8, completions_per_prompt=4, examples_per_update=16,
                                       examples_per_forward=4, passes_per_rollout=2), world_size=2, rollout=True)
    assert (shape.accumulation, shape.updates_per_rollout) == (2, 4)


@pytest.mark.parametrize(("options", "rollout", "key"), [
    ({"examples_per_update": 0}, False, "examples_per_update"),
    ({"prompts_per_rollout": 3}, False, "prompts_per_rollout"),
    ({"prompts_per_rollout": 4, "completions_per_prompt": 4, "examples_per_update": 6}, True, "examples_per_update"),
    ({"prompts_per_rollout": 4, "completions_per_prompt": 4, "examples_per_update": 2}, True, "completions_per_prompt"),
    ({"examples_per_update": 8, "examples_per_forward": 3}, False, "examples_per_forward"),
    ({"action_fraction": 1.5}, False, "action_fraction"),
])
def test_batch_sizes_that_do_not_divide_are_refused_by_name(options: dict[str, Any], rollout: bool, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        resolve_batch(BatchOptions(**options), world_size=1, rollout=rollout)
