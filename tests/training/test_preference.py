"""The preference objective: closed forms, invariances, statistics of the update, and scores of other modalities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Bandit, BanditPolicy

from mmalign.core.denoising import denoising_logratio
from mmalign.core.logprobs import ActionScores
from mmalign.core.preference import PREFERENCE_LOSSES
from mmalign.core.reduce import reduce
from mmalign.data.rows import Rows
from mmalign.errors import ConfigError, DataError
from mmalign.training.objective import LossTerm, TrainState, UpdateBatch
from mmalign.training.preference import PairOptions, Preference

LN2 = math.log(2)


def policy_of(seed: int, contexts: int = 4, actions: int = 5) -> BanditPolicy:
    bandit = Bandit(contexts, actions)
    with torch.no_grad():
        bandit.logits.copy_(torch.randn(contexts, actions, generator=torch.Generator().manual_seed(seed)))
    return BanditPolicy(bandit)


def pair_rows(count: int = 6, seed: int = 0, fields=("chosen", "rejected"), **columns) -> Rows:
    g = torch.Generator().manual_seed(seed)

    def choices() -> list[list[int]]:
        return [torch.randint(0, 5, (int(torch.randint(1, 4, (1,), generator=g)),), generator=g).tolist() for _ in range(count)]

    context = torch.randint(0, 4, (count,), generator=g)
    return Rows({"context": context, **{f"{field}_choice": choices() for field in fields}, **columns})


def point_rows(count: int = 6, seed: int = 0, **columns) -> Rows:
    rows = pair_rows(count, seed, fields=("x",))
    label = [i % 2 == 0 for i in range(count)]
    return Rows({"context": rows["context"], "choice": rows["x_choice"], "label": label, **columns})


def loss_of(objective: Preference, rows: Rows, micro_batches: int = 1) -> torch.Tensor:
    update, state = UpdateBatch({"train": rows}), TrainState(0, 1)
    shared, counts = objective.prepare(update, state), objective.counts(update)
    total = torch.zeros(())
    for index in torch.arange(len(rows)).tensor_split(micro_batches):
        for term in objective.loss(update.take({"train": index}), shared, state)[0]:
            total = total + term.weight * reduce(term.values, term.mask, how=term.reduction, denominator=counts[term.name])
    return total


def sums(policy: BanditPolicy, rows: Rows, field: str) -> torch.Tensor:
    return policy.log_probs(rows.field(field)).sequence()[0]


class TestTraps:
    def test_reference_equal_to_the_policy_gives_the_constants(self):
        rows = pair_rows()
        for name, value in (("sigmoid", LN2), ("hinge", 1.0), ("nca", 2 * LN2), ("apo_zero", 1.0), ("bco", 2 * LN2)):
            objective = Preference(policy_of(0), [LossTerm(name)], reference=policy_of(0))
            assert float(loss_of(objective, rows).detach()) == pytest.approx(value, abs=1e-6), name

    @settings(max_examples=20, deadline=None)
    @given(st.integers(1, 6), st.sampled_from(["sigmoid", "ipo", "simpo", "bco"]), st.integers(0, 10**6))
    def test_splitting_the_update_changes_nothing(self, micro_batches, name, seed):
        """Accumulation neither multiplies the loss nor depends on where the rows are cut."""
        rows, reference = pair_rows(seed=seed), policy_of(9)
        gradients = []
        for parts in (1, micro_batches):
            policy = policy_of(1)
            terms = [LossTerm(name), LossTerm("nll", weight=0.5, on="chosen")]
            objective = Preference(policy, terms, reference=reference, rows_per_forward=7 - parts)
            loss_of(objective, rows, parts).backward()
            gradients.append(policy.module.logits.grad)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)

    def test_tokens_shared_by_both_samples_have_exactly_no_gradient_in_losses_of_the_difference(self):
        """Preference pairs of one style cannot teach the style; a loss of each side on its own can."""
        policy, reference = policy_of(1), policy_of(2)
        rows = Rows({"context": torch.tensor([0]), "chosen_choice": [[3, 3, 1]], "rejected_choice": [[3, 3, 2]]})
        for name, zero in (("sigmoid", True), ("ipo", True), ("exo", True), ("nca", False), ("apo_zero", False)):
            table = (policy.module.logits[0].detach().log_softmax(-1)).clone()
            leaf = torch.stack([table[3], table[3], table[1], table[2]]).requires_grad_()

            class Leaves(BanditPolicy):
                def log_probs(self, rows, *, draw=None, temperature=1.0, want=(), leaf=leaf):
                    picked = torch.stack([leaf[[0, 1, 2]], leaf[[0, 1, 3]]])
                    return ActionScores(logp=picked, mask=torch.ones(2, 3, dtype=torch.bool))

            objective = Preference(Leaves(policy.module), [LossTerm(name)], reference=reference)
            loss_of(objective, rows).backward()
            assert (leaf.grad[:2].abs().max() == 0) == zero, name
            assert leaf.grad[2] != 0

    def test_a_term_of_weight_zero_is_neither_computed_nor_asked_of_the_data(self):
        with_gold = Preference(policy_of(0), [LossTerm("cpo"), LossTerm("nll", weight=0.0, on="gold")])
        assert with_gold.fields == ("chosen", "rejected")
        assert not Preference(policy_of(0), [LossTerm("cpo"), LossTerm("sigmoid", weight=0.0)]).needs_reference
        with pytest.raises(ConfigError, match="losses"):
            Preference(policy_of(0), [LossTerm("cpo", weight=0.0)])


class TestVariants:
    def test_margins_are_subtracted_from_beta_times_the_difference(self):
        margin = [0.0, 0.5, 1.0, -0.3, 2.0, 0.1]
        rows, policy, reference = pair_rows(margin=margin), policy_of(1), policy_of(2)
        for name, beta in (("sigmoid", 0.3), ("hinge", 0.3), ("cdpo", 0.3)):
            objective = Preference(policy, [LossTerm(name, {"beta": beta})], reference=reference, pairs=PairOptions(margin=True))
            difference = sums(policy, rows, "chosen") - sums(reference, rows, "chosen") \
                - sums(policy, rows, "rejected") + sums(reference, rows, "rejected")
            expected = PREFERENCE_LOSSES.get(name).function(
                difference - torch.tensor(margin) / beta, torch.zeros(6), beta=beta).mean()
            torch.testing.assert_close(loss_of(objective, rows), expected)

    def test_weights_multiply_rows(self):
        rows, reference = pair_rows(weight=[1.0, 0, 0, 0, 0, 0]), policy_of(2)
        weighted = Preference(policy_of(1), [LossTerm("sigmoid")], reference=reference, pairs=PairOptions(weights="column"))
        single = Preference(policy_of(1), [LossTerm("sigmoid")], reference=reference)
        torch.testing.assert_close(loss_of(weighted, rows) * 6, loss_of(single, rows.take([0])))

    def test_a_tail_of_weight_one_is_the_plain_loss_and_of_weight_zero_forgets_what_the_shorter_sample_lacks(self):
        policy, reference = policy_of(1), policy_of(2)
        rows = Rows({"context": torch.tensor([0]), "chosen_choice": [[1, 2, 3]], "rejected_choice": [[4]]})
        short = Rows({"context": torch.tensor([0]), "chosen_choice": [[1]], "rejected_choice": [[4]]})

        def value(rows: Rows, tail: float) -> torch.Tensor:
            return loss_of(Preference(policy, [LossTerm("sigmoid")], reference=reference,
                                      pairs=PairOptions(tail_weight=tail)), rows)

        torch.testing.assert_close(value(rows, 0.0), value(short, 1.0))
        assert float((value(rows, 1.0) - value(short, 1.0)).detach().abs()) > 1e-4

    @pytest.mark.parametrize(("name", "pairs", "key"), [
        ("nca", {"divergence": "js"}, "pairs.divergence"), ("simpo", {"divergence": "js"}, "pairs.divergence"),
        ("nca", {"margin": True}, "pairs.margin"), ("aot", {"weights": "wpo"}, "pairs.weights"),
    ])
    def test_combinations_without_a_meaning_are_refused(self, name, pairs, key):
        with pytest.raises(ConfigError, match=key):
            Preference(policy_of(0), [LossTerm(name)], reference=policy_of(0), pairs=PairOptions(**pairs))

    def test_missing_columns_are_named(self):
        for pairs, column in (({"margin": True}, "margin"), ({"weights": "column"}, "weight")):
            objective = Preference(policy_of(0), [LossTerm("sigmoid")], reference=policy_of(0), pairs=PairOptions(**pairs))
            assert column in objective.columns
            with pytest.raises(ConfigError, match=column):
                loss_of(objective, pair_rows())


class TestStatistics:
    def test_running_shift_is_the_mean_of_everything_seen_and_survives_a_checkpoint(self):
        policy, reference = policy_of(1), policy_of(2)
        first, second = point_rows(4, seed=1), point_rows(6, seed=2)
        ratios = [(policy.log_probs(rows).sequence()[0] - reference.log_probs(rows).sequence()[0]).detach() * 0.5
                  for rows in (first, second)]
        whole = Preference(policy, [LossTerm("bco", {"beta": 0.5})], reference=reference, unpaired=True)
        state = TrainState(0, 1)
        one = whole.prepare(UpdateBatch({"train": first}), state)["shift/bco"]
        assert one == pytest.approx(float(ratios[0].mean()), abs=1e-6)
        resumed = Preference(policy, [LossTerm("bco", {"beta": 0.5})], reference=reference, unpaired=True)
        resumed.load_state_dict(whole.state_dict())
        for objective in (whole, resumed):
            two = objective.prepare(UpdateBatch({"train": second}), state)["shift/bco"]
            assert two == pytest.approx(float(torch.cat(ratios).mean()), abs=1e-6)

    def test_kto_offset_without_prompts_is_the_clamped_mean_log_ratio(self):
        rows = point_rows()
        for first, second in ((1, 2), (2, 1)):
            policy, reference = policy_of(first), policy_of(second)
            objective = Preference(policy, [LossTerm("kto")], reference=reference, unpaired=True, rows_per_forward=4)
            mean = (policy.log_probs(rows).sequence()[0] - reference.log_probs(rows).sequence()[0]).mean()
            found = objective.prepare(UpdateBatch({"train": rows}), TrainState(0, 1))["kl/kto"]
            assert found == pytest.approx(max(0.0, float(mean.detach())), abs=1e-6)

    def test_kto_needs_two_rows_where_prompts_are_swapped(self):
        class Swapping(BanditPolicy):
            def mismatched_rows(self, rows):
                return rows

        objective = Preference(Swapping(), [LossTerm("kto")], reference=policy_of(1), unpaired=True)
        with pytest.raises(DataError, match="examples_per_update"):
            objective.prepare(UpdateBatch({"train": point_rows(1)}), TrainState(0, 1))

    def test_order_of_rows_does_not_matter_to_unpaired_losses(self):
        rows, order = point_rows(), torch.tensor([4, 2, 0, 5, 1, 3])
        for name in ("kto", "bco", "apo_zero_unpaired"):
            objective = Preference(policy_of(1), [LossTerm(name)], reference=policy_of(2), unpaired=True)
            values = []
            for ordered in (rows, rows.take(order)):
                objective.running.clear()
                values.append(float(loss_of(objective, ordered).detach()))
            assert values[0] == pytest.approx(values[1], abs=1e-6)


class Scores(BanditPolicy):
    """A scorer whose A = 1 scores are given: denoising errors, reward models, anything that orders samples."""

    def log_probs(self, rows, *, draw=None, temperature=1.0, want=()):
        return ActionScores(logp=torch.as_tensor(rows["score"])[:, None], mask=torch.ones(len(rows), 1, dtype=torch.bool))

    def action_mask(self, rows):
        return torch.ones(len(rows), 1, dtype=torch.bool)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "hinge", "nca", "robust"])
def test_margins_of_other_modalities_reach_the_same_functions(name):
    """Denoising errors enter as ``-(error - reference error) / 2``; scores of a reward model as they are."""
    error, base = torch.tensor([[0.3, 0.7], [0.5, 0.4]]), torch.tensor([[0.4, 0.6], [0.6, 0.6]])
    ratios = [denoising_logratio(error[i], base[i]) for i in range(2)]
    rows = Rows({"chosen_score": -0.5 * error[0], "rejected_score": -0.5 * error[1]})
    reference_rows = Rows({"chosen_score": -0.5 * base[0], "rejected_score": -0.5 * base[1]})

    class Fixed(Scores):
        def log_probs(self, rows, *, draw=None, temperature=1.0, want=()):
            both = torch.cat([reference_rows["chosen_score"], reference_rows["rejected_score"]])
            return ActionScores(logp=both[:, None], mask=torch.ones(4, 1, dtype=torch.bool))

    objective = Preference(Scores(), [LossTerm(name, {"beta": 2.0})], reference=Fixed())
    torch.testing.assert_close(loss_of(objective, rows), PREFERENCE_LOSSES.get(name).function(*ratios, beta=2.0).mean())


def test_scores_of_a_reward_model_with_a_margin_column():
    chosen, rejected, margin = torch.tensor([1.0, 0.2]), torch.tensor([0.4, 0.6]), torch.tensor([0.5, 0.0])
    objective = Preference(Scores(), [LossTerm("bt_reward_margin", {"center_coef": 0.01})])
    rows = Rows({"chosen_score": chosen, "rejected_score": rejected, "margin": margin})
    expected = (-torch.nn.functional.logsigmoid(chosen - rejected - margin) + 0.01 * (chosen + rejected) ** 2).mean()
    torch.testing.assert_close(loss_of(objective, rows), expected)
