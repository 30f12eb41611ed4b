"""Intuitive fine-tuning: what the model reads, what SFT it reduces to, and what Frozen Lake shows."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from mmalign.api import run
from mmalign.config import parse
from mmalign.core.seeding import generator
from mmalign.data.assets import asset_rows
from mmalign.data.chat import TextEncoding
from mmalign.data.frozen_lake import OPEN_MAP, FrozenLake, make_frozen_lake
from mmalign.errors import ConfigError, DataError
from mmalign.policies.loading import ModelOptions, load_policy
from mmalign.policies.temporal_residual import input_embeddings, predict_actions, residual_inputs
from mmalign.training.objective import LossTerm, Supervised, TrainState, UpdateBatch
from text_llm.evaluation.frozen_lake import compare_on_lake, draw_comparison, train_on_lake
from text_llm.supervised.ift import IFTLossOptions, IntuitiveFineTuning, Residual

PROPAGATION = {"gamma": 0.95, "norm": "l1", "side": "left", "form": "product", "source": "loss", "detach": True}


def policy_and_rows(layout: str = "auto", n: int = 4) -> tuple[Any, Any]:
    policy: Any = load_policy(ModelOptions(path="asset:tiny_llama", layout=layout), encoding=TextEncoding(max_length=128))
    examples, _ = policy.prepare_dataset(asset_rows("arithmetic", n=n, worked=True))
    return policy, policy.encode_rows(list(examples))


def caught_embeddings(policy: Any, rows: Any, context: Any) -> torch.Tensor:
    """What the first block reads while ``rows`` are scored."""
    seen: list[torch.Tensor] = []
    with context:
        handle = policy.scores.model.model.layers[0].register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].detach()))
        policy.log_probs(rows)
        handle.remove()
    return seen[-1]


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_only_learned_tokens_are_mixed(layout, lam):
    policy, rows = policy_and_rows(layout)
    if layout == "shared_prefix":
        rows = rows.take(torch.tensor([0, 0, 1, 2]))
    predicted = predict_actions(policy, rows)
    layed = policy.token_layout(rows)
    plain = caught_embeddings(policy, rows, nullcontext()).flatten(0, 1)
    share = torch.full(predicted.shape, lam)
    mixed = caught_embeddings(policy, rows, residual_inputs(policy, rows, predicted, share)).flatten(0, 1)
    others = torch.ones(len(plain), dtype=torch.bool)
    others[layed.token] = False
    assert torch.equal(plain[others], mixed[others])
    weight = policy.scores.model.get_input_embeddings().weight.detach()
    assert torch.equal(layed.input_ids.flatten()[layed.token], layed.target)
    own = weight[predicted[layed.row, layed.column]]
    torch.testing.assert_close(mixed[layed.token], (1 - lam) * plain[layed.token] + lam * own)


def test_predictions_are_the_argmax_of_the_plain_model():
    policy, rows = policy_and_rows("padded")
    predicted = predict_actions(policy, rows)
    for i, (ids, labels) in enumerate(zip(rows["input_ids"], rows["labels"], strict=True)):
        with torch.no_grad():
            logits = policy.scores.model.eval()(torch.tensor([list(ids)])).logits[0]
        at = [t for t, label in enumerate(labels) if label != -100]
        assert predicted[i, : len(at)].tolist() == [int(logits[t - 1].argmax()) for t in at]


def losses_and_gradient(objective: Any, update: UpdateBatch, state: TrainState) -> tuple[float, dict[str, torch.Tensor]]:
    from mmalign.core.reduce import reduce

    module = objective.policy.module
    module.zero_grad()
    counts, shared = objective.counts(update), objective.prepare(update, state)
    total = 0.0
    for part in torch.arange(len(update.parts["train"])).split(state.extra):  # type: ignore[attr-defined]
        terms, _ = objective.loss(update.take({"train": part}), shared, state)
        for term in terms:
            value = term.weight * reduce(term.values, term.mask, how=term.reduction, denominator=counts[term.name])
            value.backward()
            total += float(value.detach())
    return total, {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def split_state(size: int) -> TrainState:
    state = TrainState(seed=0, total_steps=10)
    state.extra = size  # type: ignore[attr-defined]
    return state


def test_no_residual_and_no_propagation_is_sft():
    policy, rows = policy_and_rows()
    update = UpdateBatch({"train": rows})
    plain = Supervised(policy, [LossTerm("nll", reduction="seq_mean_token_mean")])
    ours = IntuitiveFineTuning(policy, PROPAGATION | {"gamma": 0.0}, Residual(0.0, 0.0, 0.0, False))
    first, second = (losses_and_gradient(objective, update, split_state(4)) for objective in (plain, ours))
    assert second[0] == pytest.approx(first[0], abs=1e-6)
    for name, gradient in first[1].items():
        torch.testing.assert_close(second[1][name], gradient)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_gradient_does_not_depend_on_micro_batches(noise):
    policy, rows = policy_and_rows()
    objective = IntuitiveFineTuning(policy, PROPAGATION, Residual(0.4, 0.4, noise, False))
    whole = losses_and_gradient(objective, UpdateBatch({"train": rows}), split_state(4))
    parts = losses_and_gradient(objective, UpdateBatch({"train": rows}), split_state(1))
    assert parts[0] == pytest.approx(whole[0], abs=1e-5)
    for name, gradient in whole[1].items():
        torch.testing.assert_close(parts[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_frozen_copy_removes_the_input_side_gradient_only():
    """With tied embeddings the head still learns; untied ones get a zero gradient rather than none."""
    policy, rows = policy_and_rows()
    model = policy.scores.model
    predicted = predict_actions(policy, rows)
    share = torch.full(predicted.shape, 0.2)
    with residual_inputs(policy, rows, predicted, share):
        (-policy.log_probs(rows).logp).sum().backward()
    assert float(model.get_input_embeddings().weight.grad.abs().sum()) > 0
    untied = torch.nn.Linear(*reversed(model.lm_head.weight.shape), bias=False)
    untied.weight.data.copy_(model.lm_head.weight.data)
    model.lm_head = untied
    policy.replace_module(policy.module)
    for allowed in (False, True):
        model.zero_grad()
        with residual_inputs(policy, rows, predicted, share, embedding_gradient=allowed):
            (-policy.log_probs(rows).logp).sum().backward()
        gradient = model.get_input_embeddings().weight.grad
        assert gradient is not None
        assert (float(gradient.abs().sum()) > 0) is allowed


def test_a_scale_behind_the_embedding_layer_applies_once():
    """Gemma multiplies its embeddings; mixing what the layer gives cannot do so twice."""
    from transformers import GemmaConfig, GemmaForCausalLM

    policy, rows = policy_and_rows("padded")
    config = GemmaConfig(vocab_size=policy.scores.config.vocab_size, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=512)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy.replace_module(GemmaForCausalLM(config))
    policy.layout = "padded"
    own = policy.token_layout(rows)
    predicted = own.scatter(own.target)  # predictions equal to the row: mixing must change nothing
    with torch.no_grad():
        plain = policy.log_probs(rows).logp
        with residual_inputs(policy, rows, predicted, torch.full(predicted.shape, 0.5)):
            mixed = policy.log_probs(rows).logp
    torch.testing.assert_close(mixed, plain)


def test_evaluation_reads_plain_embeddings():
    """The hook is gone after the block, and other rows inside it are left alone."""
    policy, rows = policy_and_rows()
    other = rows.take(torch.tensor([0]))
    predicted = predict_actions(policy, rows)
    with torch.no_grad():
        before, alone = policy.log_probs(rows).logp, policy.log_probs(other).logp
        with residual_inputs(policy, rows, predicted, torch.ones(predicted.shape)):
            assert not torch.equal(policy.log_probs(rows).logp, before)
            assert torch.equal(policy.log_probs(other).logp, alone)
        assert torch.equal(policy.log_probs(rows).logp, before)


def test_schedule_and_noise_of_the_share():
    noise = torch.randn(50, 4, generator=generator(0, "test"))
    residual = Residual(0.1, 0.5, 0.0, False)
    assert float(residual.share(0.5, noise)[0, 0]) == pytest.approx(0.3)
    noisy = Residual(0.9, 0.9, 0.5, False).share(0.0, noise)
    assert 0 <= float(noisy.min()) < float(noisy.max()) == 1.0


@pytest.mark.parametrize(("node", "name"), [
    ({"lam": 1.2}, "lam"), ({"lam": -0.1}, "lam"), ({"gamma": 2}, "gamma"), ({"lam_end": 3}, "lam_end"),
    ({"lam_noise": -1}, "lam_noise"), ({"form": "double_sum", "side": "right"}, "double_sum"), ({"gama": 0.5}, "gamma"),
])
def test_refused_options(node, name):
    with pytest.raises(ConfigError, match=rf"loss[\s\S]*{name}"):
        parse(IFTLossOptions, node, root="loss")


def test_refuses_models_without_input_embeddings(monkeypatch):
    policy, _ = policy_and_rows()

    def none() -> None:
        raise NotImplementedError

    monkeypatch.setattr(policy.scores.model, "get_input_embeddings", none)
    with pytest.raises(ConfigError, match=r"model\.path.*inputs_embeds"):
        input_embeddings(policy)


def test_refuses_data_without_learned_tokens(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}) + "\n")
    with pytest.raises(DataError):
        run({"method": "ift", "model": {"path": "asset:tiny_llama"}, "data": {"path": str(rows)}, "steps": 1,
             "run_dir": str(tmp_path / "run")}, quiet=True)


def test_run_logs_share_and_negative_coefficients(tmp_path):
    run({"method": "ift", "model": {"path": "asset:tiny_llama"}, "data": {"path": "asset:frozen_lake", "limit": 16},
         "encoding": {"max_length": 128}, "loss": {"detach_weights": False, "lam_noise": 0.5},
         "batch": {"examples_per_update": 8, "examples_per_forward": 4}, "steps": 6,
         "optimizers": [{"kind": "rmsprop", "lr": 1e-3}], "run_dir": str(tmp_path)}, quiet=True)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert 0 < records[-1]["residual_share"] < 1
    assert 0 <= records[-1]["negative_coefficients"] < 1
    assert records[-1]["nll"] < records[0]["nll"]


# -- Frozen Lake -----------------------------------------------------------------------------------------------------


def test_game_and_optimal_policy():
    lake = FrozenLake(3, frozenset({4}))
    assert lake.step(0, 0) == 0
    assert lake.step(0, 1) == 3
    assert lake.step(4, 2) == 4
    assert lake.distance[0] == 4
    assert lake.optimal_actions(0) == [1, 2]
    assert lake.optimal_actions(4) == lake.optimal_actions(8) == []
    assert len(lake.path()[1]) == 4
    assert len(lake.path(detour=1)[1]) == 6
    with pytest.raises(DataError, match="no way"):
        FrozenLake(3, frozenset({1, 3}))


def test_rows_are_shortest_paths_over_their_maps():
    for row in make_frozen_lake(8, images=True, pairs=True):
        lines = row["prompt"].split("\n")[:-1]
        lake = FrozenLake(4, frozenset(i for i, c in enumerate("".join(lines)) if c == "H"))
        state = lake.start
        for letter in row["chosen"].strip():
            state = lake.step(state, "LDRU".index(letter))
        assert state == lake.goal
        assert len(row["chosen"].strip()) == lake.distance[0] == len(row["rejected"].strip()) - 2
        assert row["images"][0].size == (128, 128)
    assert make_frozen_lake(3) == make_frozen_lake(3)
    assert make_frozen_lake(3)[0]["prompt"] != make_frozen_lake(3, split="test")[0]["prompt"]


@pytest.mark.parametrize("hidden", [0, 32])
def test_ift_beats_sft_off_the_demonstrated_path(hidden):
    """Six seeds, paired: more probability on optimal actions where SFT has no data."""
    results = compare_on_lake(6, ("sft", "ift"), hidden=hidden)
    off = [[r.off_path for r in results if r.method == name] for name in ("sft", "ift")]
    error = [[r.error for r in results if r.method == name] for name in ("sft", "ift")]
    assert all(after > before for before, after in zip(*off, strict=True))
    assert sum(off[1]) / 6 - sum(off[0]) / 6 > 0.02
    assert sum(error[1]) < sum(error[0])


def test_sft_of_a_linear_policy_leaves_unvisited_rows_where_they_were():
    """Why: one-hot rows off the path get no gradient; states the policy itself would reach do."""
    weights = {}
    for steps in (0, 60):
        for method in ("sft", "ift"):
            weights[method, steps] = train_on_lake(method, 0, hidden=0, steps=steps).policy
    seen = OPEN_MAP.path()[0]
    unseen = [s for s in range(36) if s not in seen]

    def change(method: str) -> torch.Tensor:
        # The bias moves every row alike: compare log-odds relative to a row that no method touches, the goal's.
        odds = [weights[method, steps].log() - weights[method, steps].log()[-1] for steps in (0, 60)]
        odds = [o - o.mean(-1, keepdim=True) for o in odds]
        return (odds[1] - odds[0])[unseen].abs().amax(-1)

    assert float(change("sft").max()) < 1e-4
    assert float(change("ift").max()) > 0.1


def test_picture(tmp_path):
    from PIL import Image

    draw_comparison(compare_on_lake(1, ("sft", "ift"), steps=5), tmp_path / "lake.png")
    with Image.open(tmp_path / "lake.png") as image:
        assert image.size == (2 * 240 + 12, 266)
        assert len(image.convert("RGB").getcolors(10**6) or []) > 20
    with pytest.raises(ValueError, match="method"):
        train_on_lake("ppo", 0)
