"""GRPO and its relatives: our objective and rollout experience against TRL's GRPOTrainer on the same completions."""

from __future__ import annotations

import random

import pytest
import torch
from trl_peers import (
    PAIRS,
    arguments,
    as_messages,
    assert_close,
    assert_same_gradients,
    dataset,
    load_model,
    load_policy,
    our_loss,
    tokenizer,
)

from mmalign.core.advantages import ADVANTAGES, combine_rewards
from mmalign.data.rows import Rows
from mmalign.policies.base import TextSampling
from mmalign.policies.engines import RolloutResult
from mmalign.rewards.base import RewardSet
from mmalign.training.experience import BatchShape, RolloutExperience, RolloutSettings
from mmalign.training.objective import TrainState
from mmalign.training.policy_gradient import KLOptions, PolicyGradient, PolicyLoss

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.peer

PROMPTS, GROUP, LONGEST, END = 2, 4, 9, 2
TEMPERATURE = 0.7
NOISE = 0.02
"""Distance of the policy from the one that acted and from the reference, so that some ratios are clipped."""


def completion(row: int) -> list[int]:
    """The stand-in for a sampled completion: 2 to 9 tokens, ended unless it is full; the rows of a group differ."""
    draw = random.Random(row)
    ids = [draw.randrange(10, 300) for _ in range(draw.randint(2, LONGEST))]
    return ids if len(ids) == LONGEST else [*ids[:-1], END]


def length_reward(completions, **columns):
    """Written for TRL: the number of characters, unknown for some."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [None if len(text) % 7 == 3 else float(len(text)) for text in texts]


def vowel_reward(prompts, completions, completion_ids, level, trainer_state=None, **columns):
    """Written for TRL: reads ids and a data column."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(ch in "aeiou" for ch in text) + 0.1 * len(ids) + n
            for text, ids, n in zip(texts, completion_ids, level, strict=True)]


REWARDS, WEIGHTS = [length_reward, vowel_reward], [0.5, 2.0]


@pytest.fixture(scope="module", params=["plain", "conversation"])
def rows(request):
    plain = [{"prompt": row["prompt"]} for row in PAIRS[:PROMPTS]]
    shown = plain if request.param == "plain" else [as_messages(row) for row in plain]
    return [{**row, "level": number} for number, row in enumerate(shown)]


@pytest.fixture(scope="module")
def trainer(model_folder, rows, tmp_path_factory):
    class Replayed(trl.GRPOTrainer):
        """Gives the stand-ins instead of sampling."""

        def _generate_single_turn(self, prompt_ids, *_, **__):
            return [completion(row) for row in range(len(prompt_ids))], None

    config = trl.GRPOConfig(
        **arguments(tmp_path_factory.mktemp("grpo"), PROMPTS * GROUP), num_generations=GROUP, max_completion_length=LONGEST,
        temperature=TEMPERATURE, beta=0.0, reward_weights=WEIGHTS, shuffle_dataset=False,
    )
    trainer = Replayed(load_model(model_folder, noise=NOISE), args=config, reward_funcs=REWARDS, train_dataset=dataset(rows),
                       processing_class=tokenizer(model_folder))
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


@pytest.fixture(scope="module")
def scored(trainer, rows):
    """TRL's inputs of a loss: tokens, masks, advantages."""
    return trainer._generate_and_score_completions([row for row in rows for _ in range(GROUP)])


@pytest.fixture(scope="module")
def behaviour(model_folder, scored):
    """Log-probs of the policy that acted, and of a reference, ``[B, C]``."""
    ours = rows_of(scored)
    policies = load_policy(model_folder), load_policy(model_folder, noise=0.5 * NOISE)
    with torch.no_grad():
        return tuple(policy.log_probs(ours, temperature=TEMPERATURE).logp for policy in policies)


def rows_of(inputs, old=None, reference=None):
    """TRL's padded inputs as our rows."""
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)]
    answers = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["completion_ids"], inputs["completion_mask"], strict=True)]
    columns = {
        "input_ids": [p + a for p, a in zip(prompts, answers, strict=True)],
        "labels": [[-100] * len(p) + a for p, a in zip(prompts, answers, strict=True)],
        "advantages": inputs["advantages"], "group": torch.arange(len(prompts)) // GROUP,
        "old_logp": torch.zeros(inputs["completion_ids"].shape) if old is None else old,
    }
    return Rows(columns if reference is None else {**columns, "ref_logp": reference})


def their_loss(trainer, scored, behaviour=None, reference=None, **settings):
    """TRL's own loss with other settings on the same trainer and completions."""
    defaults = {"loss_type": "dapo", "epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0, "importance_sampling_level": "token",
                "entropy_coef": 0.0, "_entropy_bonus_enabled": False}
    trainer.args.delta = settings.pop("delta", None)
    # On by default in TRL: multiplies the divergence by the ratio (DeepSeek-V3.2). Ours is the plain estimate of GRPO.
    trainer.args.use_bias_correction_kl = False
    for name, value in {**defaults, **settings}.items():
        assert hasattr(trainer, name), name
        setattr(trainer, name, value)
    inputs = dict(scored)
    if behaviour is not None:
        inputs["old_per_token_logps"] = behaviour
    if reference is not None:
        inputs["ref_per_token_logps"] = reference
    trainer.model.zero_grad()
    return trainer.compute_loss(trainer.model, inputs)


AGGREGATIONS = {
    "grpo": ("seq_mean_token_mean", None), "dapo": ("token_mean", None), "bnpo": ("token_mean", None),
    "dr_grpo": ("seq_mean_token_sum_norm", LONGEST),
}


def our_objective(folder, name="ppo_clip", loss_type="dapo", *, on_policy=False, layout="auto", kl=0.0, entropy=0.0, **options):
    reduction, norm = AGGREGATIONS[loss_type]
    policy = load_policy(folder, noise=NOISE, layout=layout)
    objective = PolicyGradient(policy, PolicyLoss(name, options, reduction, norm), temperature=TEMPERATURE,
                               on_policy=on_policy, kl=KLOptions(coef=kl), entropy_coef=entropy)
    return policy, objective


@pytest.mark.parametrize("loss_type", sorted(AGGREGATIONS))
@pytest.mark.parametrize("on_policy", [True, False], ids=["one update", "old log-probs"])
def test_aggregations(trainer, model_folder, scored, behaviour, loss_type, on_policy):
    old = None if on_policy else behaviour[0]
    theirs = their_loss(trainer, scored, old, loss_type=loss_type)
    theirs.backward()
    policy, objective = our_objective(model_folder, loss_type=loss_type, on_policy=on_policy)
    ours = our_loss(objective, rows_of(scored, old))
    ours.backward()
    # Advantages of a group sum to zero, so the loss is a difference of numbers near 1.
    assert_close(ours, theirs, scale=0.3)
    assert_same_gradients(policy.module, trainer.model, relative=2e-5)


@pytest.mark.parametrize(("settings", "options"), [
    ({"epsilon_low": 0.2, "epsilon_high": 0.28}, {"clip_low": 0.2, "clip_high": 0.28}),
    ({"epsilon_low": 0.05, "epsilon_high": 0.05}, {"clip_low": 0.05, "clip_high": 0.05}),
    ({"delta": 1.3}, {"dual_clip": 1.3}),
], ids=["clip higher", "narrow clip", "dual clip"])
def test_clipping(trainer, model_folder, scored, behaviour, settings, options):
    theirs = their_loss(trainer, scored, behaviour[0], **settings)
    policy, objective = our_objective(model_folder, **options)
    ours = our_loss(objective, rows_of(scored, behaviour[0]))
    assert_close(ours, theirs, scale=0.3)
    ratio = (policy.log_probs(rows_of(scored), temperature=TEMPERATURE).logp - behaviour[0]).exp()
    assert bool((ratio > 1.3).any())
    assert bool((ratio < 0.8).any()), "nothing is clipped, so the comparison shows little"


def test_sequence_level_ratios(trainer, model_folder, scored, behaviour):
    """GSPO."""
    theirs = their_loss(trainer, scored, behaviour[0], loss_type="grpo", importance_sampling_level="sequence",
                        epsilon_low=0.03, epsilon_high=0.04)
    theirs.backward()
    policy, objective = our_objective(model_folder, "gspo", "grpo", clip_low=0.03, clip_high=0.04)
    ours = our_loss(objective, rows_of(scored, behaviour[0]))
    ours.backward()
    assert_close(ours, theirs, scale=0.3)
    assert_same_gradients(policy.module, trainer.model, relative=2e-5)


def test_clipped_weights_of_cispo(trainer, model_folder, scored, behaviour):
    theirs = their_loss(trainer, scored, behaviour[0], loss_type="cispo", epsilon_high=1.1)
    _, objective = our_objective(model_folder, "cispo", clip_high=1.1)
    assert_close(our_loss(objective, rows_of(scored, behaviour[0])), theirs, scale=1.0)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_divergence_to_the_reference(trainer, model_folder, scored, behaviour, loss_type):
    old, reference = behaviour
    theirs = their_loss(trainer, scored, old, reference, loss_type=loss_type, beta=0.5)
    theirs.backward()
    policy, objective = our_objective(model_folder, loss_type=loss_type, kl=0.5)
    ours = our_loss(objective, rows_of(scored, old, reference))
    ours.backward()
    assert_close(ours, theirs, scale=0.3)
    assert_same_gradients(policy.module, trainer.model, relative=2e-5)
    without = our_loss(our_objective(model_folder, loss_type=loss_type)[1], rows_of(scored, old))
    assert float(ours.detach()) > float(without.detach())


def test_entropy_bonus(trainer, model_folder, scored, behaviour):
    theirs = their_loss(trainer, scored, behaviour[0], entropy_coef=0.05, _entropy_bonus_enabled=True)
    theirs.backward()
    policy, objective = our_objective(model_folder, entropy=0.05)
    ours = our_loss(objective, rows_of(scored, behaviour[0]))
    ours.backward()
    assert_close(ours, theirs, scale=0.3)
    assert_same_gradients(policy.module, trainer.model, relative=2e-5)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
def test_every_layout_gives_the_gradient(trainer, model_folder, scored, behaviour, layout):
    their_loss(trainer, scored, behaviour[0]).backward()
    policy, objective = our_objective(model_folder, layout=layout)
    our_loss(objective, rows_of(scored, behaviour[0]), micro_batches=2).backward()
    assert_same_gradients(policy.module, trainer.model, relative=2e-5)


# -- rewards and advantages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "name"), [("group", "grpo"), ("none", "dr_grpo"), ("batch", "grpo_batch_std")])
def test_advantages(trainer, rows, scale, name):
    trainer.scale_rewards, trainer.multi_objective_aggregation = scale, "sum_then_normalize"
    theirs = trainer._generate_and_score_completions([row for row in rows for _ in range(GROUP)])["advantages"]
    rewards = torch.stack([torch.tensor(list(trainer._logs["rewards"][r.__name__])[-PROMPTS * GROUP:]) for r in REWARDS], 1)
    total = combine_rewards(rewards, torch.tensor(WEIGHTS))
    ours = ADVANTAGES.get(name)(total, torch.arange(PROMPTS * GROUP) // GROUP)
    trainer.scale_rewards = "group"
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_several_rewards_normalised_one_by_one(trainer, rows):
    """GDPO."""
    trainer.multi_objective_aggregation = "normalize_then_sum"
    theirs = trainer._generate_and_score_completions([row for row in rows for _ in range(GROUP)])["advantages"]
    trainer.multi_objective_aggregation = "sum_then_normalize"
    rewards = torch.stack([torch.tensor(list(trainer._logs["rewards"][r.__name__])[-PROMPTS * GROUP:]) for r in REWARDS], 1)
    group = torch.arange(PROMPTS * GROUP) // GROUP
    total = combine_rewards(rewards, torch.tensor(WEIGHTS), mode="normalize_then_sum", group=group)
    ours = ADVANTAGES.get("reinforce_pp_baseline")(total, group, over="rows", eps=1e-4)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


class Replay:
    """A rollout engine that gives the stand-ins."""

    name = "replay"

    def generate(self, prompts, n, sampling, generator):
        ids = [completion(row) for row in range(len(prompts) * n)]
        return [RolloutResult(list(prompts[row // n]), tokens, [0.0] * len(tokens), "stop" if tokens[-1] == END else "length", 0)
                for row, tokens in enumerate(ids)]


def test_a_rollout_with_rewards_written_for_trl(trainer, scored, model_folder, rows):
    """Prompts in, loss out: the same reward functions, values, advantages, loss and gradients."""
    theirs = their_loss(trainer, scored)
    theirs.backward()
    policy, objective = our_objective(model_folder, on_policy=True)
    policy.engine = Replay()
    shape = BatchShape(PROMPTS * GROUP, PROMPTS * GROUP, 1, 1, PROMPTS, GROUP, 1)
    kept = []
    settings = RolloutSettings(TextSampling(max_new_tokens=LONGEST, temperature=TEMPERATURE),
                               lambda rollout, total: ADVANTAGES.get("grpo")(total, rollout.group))
    experience = RolloutExperience(policy, rows, RewardSet(REWARDS, weights=WEIGHTS), shape, settings, TrainState(0, 1),
                                   observers=[lambda rollout, step: kept.append(rollout)])
    experience.sampler.shuffle = False
    update = next(iter(experience))
    for number, reward in enumerate(REWARDS):
        logged = torch.tensor(list(trainer._logs["rewards"][reward.__name__])[-PROMPTS * GROUP:])
        assert torch.equal(kept[0].rewards[:, number].nan_to_num(-1), logged.nan_to_num(-1))
    torch.testing.assert_close(torch.tensor(kept[0].columns["advantages"]), scored["advantages"], rtol=1e-5, atol=1e-5)
    ours = our_loss(objective, update.parts["train"])
    ours.backward()
    assert_close(ours, theirs, scale=0.3)
    assert_same_gradients(policy.module, trainer.model, relative=2e-5)


def test_leave_one_out_of_the_rloo_trainer(model_folder, rows, behaviour, tmp_path):
    """Baseline of the other samples, and the clipped ratio of whole sequences."""
    class Replayed(trl.RLOOTrainer):
        def _generate_single_turn(self, prompt_ids, *_, **__):
            return [completion(row) for row in range(len(prompt_ids))]

    config = trl.RLOOConfig(
        **arguments(tmp_path, PROMPTS * GROUP), num_generations=GROUP, max_completion_length=LONGEST, temperature=TEMPERATURE,
        beta=0.0, reward_weights=WEIGHTS, shuffle_dataset=False,
    )
    trainer = Replayed(load_model(model_folder, noise=NOISE), args=config, reward_funcs=REWARDS, train_dataset=dataset(rows),
                       processing_class=tokenizer(model_folder))
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    inputs = trainer._generate_and_score_completions([row for row in rows for _ in range(GROUP)])
    rewards = torch.stack([torch.tensor(list(trainer._logs["rewards"][r.__name__])[-PROMPTS * GROUP:]) for r in REWARDS], 1)
    advantages = ADVANTAGES.get("rloo")(combine_rewards(rewards, torch.tensor(WEIGHTS)), torch.arange(PROMPTS * GROUP) // GROUP)
    torch.testing.assert_close(advantages, inputs["advantages"], rtol=1e-5, atol=1e-5)
    old = behaviour[1]
    theirs = trainer.compute_loss(trainer.model, {**inputs, "old_logps": (old * inputs["completion_mask"]).sum(1)})
    theirs.backward()
    policy = load_policy(model_folder, noise=NOISE)
    loss = PolicyLoss("ppo_clip", {"level": "sequence_sum"}, "seq_mean_token_mean")
    ours = our_loss(PolicyGradient(policy, loss, temperature=TEMPERATURE, on_policy=False), rows_of(inputs, old))
    ours.backward()
    assert_close(ours, theirs, scale=float(advantages.abs().mean()))
    assert_same_gradients(policy.module, trainer.model, relative=2e-5)
