"""Composite losses and TRL's spellings, the closed forms of SELM, TPO and PoFT, and their behaviour on small policies."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.api import run
from mmalign.config import parse
from mmalign.core.preference import POINTWISE_LOSSES, PREFERENCE_LOSSES
from mmalign.core.supervised import SUPERVISED_LOSSES
from mmalign.errors import ConfigError, MmalignError
from mmalign.methods.preference import COMPOSITE_LOSSES, PreferenceOptions, expand_composites, from_trl
from mmalign.methods.training import LossOptions, loss_terms
from text_llm.preference.selm import SELMOptions, iterations
from text_llm.preference.tpo import TPOOptions

LN2 = math.log(2)


def terms(*entries: dict[str, Any]) -> list[Any]:
    options = [LossOptions.model_validate(entry) for entry in entries]
    return loss_terms(expand_composites(options), [PREFERENCE_LOSSES, SUPERVISED_LOSSES])


def loss(name: str, *values: float, **options: float) -> float:
    return float(PREFERENCE_LOSSES.get(name).function(*(torch.tensor([v], dtype=torch.float64) for v in values), **options))


class TestComposites:
    @pytest.mark.parametrize("name", COMPOSITE_LOSSES.names())
    def test_every_composite_is_a_list_of_known_losses(self, name):
        assert terms({"name": name})

    def test_weights_multiply_and_arguments_reach_their_loss(self):
        made = terms({"name": "mpo", "beta": 0.3, "weight": 2.0})
        assert [(t.name, t.weight, t.on) for t in made] == [("sigmoid", 1.6, None), ("bco", 0.4, None), ("nll", 2.0, "chosen")]
        assert made[0].arguments == {"beta": 0.3}

    def test_tpo_is_cpo_with_the_likelihood_moved_to_gold(self):
        tpo, cpo = terms({"name": "tpo", "beta": 0.3, "alpha": 0.7}), terms({"name": "cpo_nll", "beta": 0.3, "alpha": 0.7})
        assert [(t.name, t.weight, dict(t.arguments)) for t in tpo] == [(t.name, t.weight, dict(t.arguments)) for t in cpo]
        assert [t.on for t in tpo] == [None, "gold"]
        assert [t.on for t in cpo] == [None, "chosen"]

    def test_arguments_that_no_composite_has_are_refused_with_the_entry(self):
        with pytest.raises(ConfigError, match=r"losses\[0\].*alhpa.*alpha"):
            terms({"name": "tpo", "alhpa": 1.0})
        with pytest.raises(ConfigError, match=r"losses\[0\].*gamma"):
            terms({"name": "tpo_l", "gamma": -1.0})


class TestTRLKeys:
    def test_lists_of_losses(self):
        tree = from_trl({"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "beta": 0.2, "steps": 3})
        assert tree == {"steps": 3, "losses": [
            {"name": "sigmoid", "weight": 0.8, "beta": 0.2}, {"name": "bco_pair", "weight": 0.2, "beta": 0.2},
            {"name": "nll", "weight": 1.0, "on": "chosen"}]}

    def test_names_that_clash_mean_what_trl_means(self):
        assert from_trl({"loss_type": "sigmoid_norm"})["losses"][0]["name"] == "sigmoid_len"
        assert from_trl({"loss_type": "robust", "label_smoothing": 0.2})["losses"][0]["label_smoothing"] == 0.2
        assert "label_smoothing" not in from_trl({"loss_type": "sigmoid", "label_smoothing": 0.2})["losses"][0]

    def test_keys_of_nodes(self):
        tree = from_trl({"f_divergence_type": "js", "ld_alpha": 0.5, "use_weighting": True, "sync_ref_model": True,
                         "ref_model_mixup_alpha": 0.4, "ref_model_sync_steps": 7})
        assert tree == {"pairs": {"divergence": "js", "tail_weight": 0.5, "weights": "wpo"},
                        "reference": {"kind": "sync", "alpha": 0.4, "every": 7}}

    @pytest.mark.parametrize(("tree", "key"), [
        ({"loss_type": "sigmoid", "losses": [{"name": "ipo"}]}, "losses"), ({"loss_type": "simpo"}, "loss_type"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights"),
    ])
    def test_what_does_not_fit_is_refused(self, tree, key):
        with pytest.raises(ConfigError, match=key):
            from_trl(tree)

    def test_a_configuration_in_their_spelling_parses(self):
        tree = {"model": {"path": "asset:tiny_llama"}, "data": {"path": "asset:arithmetic"}, "loss_type": "ipo", "beta": 0.5}
        assert parse(PreferenceOptions, tree).losses[0].name == "ipo"


def test_closed_forms_of_triples():
    assert loss("cpo", -12, -14, beta=0.01) == pytest.approx(0.683197, abs=1e-6)
    assert loss("simpo", -2, -2, beta=2.0, gamma=1.6) == pytest.approx(1.783901, abs=1e-6)
    for length, beta in ((4, 0.3), (7, 2.0)):  # equal lengths and no margin: TPO-L(beta) = TPO(beta / L)
        assert loss("simpo", -12 / length, -14 / length, beta=beta, gamma=0.0) == \
            pytest.approx(loss("cpo", -12, -14, beta=beta / length), rel=1e-12)


def test_closed_forms_of_selm():
    made = terms({"name": "selm", "beta": 0.1, "alpha": 0.5})
    assert [(t.name, t.weight) for t in made] == [("sigmoid", 1.0), ("linear", 0.05)]
    value = sum(t.weight * loss(t.name, *((0.0, 0.0) if t.name == "sigmoid" else (-2.0,)), **t.arguments) for t in made)
    assert value == pytest.approx(0.593147, abs=1e-6)
    # The own sample being the chosen one, the loss along u_w is least at beta D = log((1 - alpha) / alpha).
    for alpha, least in ((0.5, 0.0), (0.1, 21.972246)):
        u = torch.tensor([least], dtype=torch.float64, requires_grad=True)
        both = PREFERENCE_LOSSES.get("sigmoid").function(u, torch.zeros(1, dtype=torch.float64), beta=0.1) + alpha * 0.1 * u
        both.sum().backward()
        assert float(u.grad) == pytest.approx(0.0, abs=1e-9)
    floored = torch.tensor([-3.0, -1.0], requires_grad=True)
    PREFERENCE_LOSSES.get("linear").function(floored, floor=2.0).sum().backward()
    assert floored.grad.tolist() == [0.0, 1.0]


def test_closed_forms_of_poft():
    own, teachers = (-1.5, -0.8, -3.0), ((-1.2, -1.4), (-0.9, -1.1), (-2.5, -6.0))
    for a, r, value, tau in zip(own, teachers, (0.798139, 0.598139, 0.251929), (0.549834, 0.450166, 0.222700), strict=True):
        score = torch.tensor([a], dtype=torch.float64, requires_grad=True)
        result = PREFERENCE_LOSSES.get("poft").function(score, torch.tensor([sum(r) / 2], dtype=torch.float64))
        result.sum().backward()
        assert float(result.detach()) == pytest.approx(value, abs=1e-6)
        assert -float(score.grad) == pytest.approx(tau, abs=1e-6)
    assert loss("poft", -1.0, -1.0) == pytest.approx(LN2)
    for wrong in (0.1, math.nan, -math.inf):
        with pytest.raises(ValueError, match="teacher_logp"):
            loss("poft", -1.0, wrong)


# -- SELM on a tabular policy ------------------------------------------------------------------------------------------


class Table:
    """100 prompts with 30 answers each: quality is uniform, but what the policy likes most is mediocre."""

    def __init__(self, seed: int, *, prompts: int = 100, responses: int = 30) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(prompts, responses, generator=self.generator, dtype=torch.float64) * 1.5
        self.quality = torch.rand(prompts, responses, generator=self.generator, dtype=torch.float64)
        likely = self.logits.topk(5).indices
        self.quality.scatter_(1, likely, 0.4 + 0.1 * self.quality.gather(1, likely))
        self.base = self.logits.softmax(-1)

    def round(self, alpha: float) -> dict[str, float]:
        """Greedy own answers, ranked against an offline pair, then 40 steps of gradient descent on the summed loss."""
        reference = self.logits.log_softmax(-1)
        own = reference.argmax(-1)
        candidates = torch.cat([torch.multinomial(self.base, 2, generator=self.generator), own[:, None]], 1)
        score = self.quality.gather(1, candidates)
        chosen, rejected = (candidates.gather(1, pick[:, None]).squeeze(1) for pick in (score.argmax(1), score.argmin(1)))
        leaf = self.logits.clone().requires_grad_()
        optimizer = torch.optim.SGD([leaf], lr=2.0)
        made = [term for term in terms({"name": "selm", "beta": 0.1, "alpha": alpha}) if term.weight]

        def ratio(index: Tensor) -> Tensor:
            return (leaf.log_softmax(-1) - reference).gather(1, index[:, None]).squeeze(1)

        for _ in range(40):
            optimizer.zero_grad()
            total = leaf.new_zeros(())
            for term in made:
                inputs = (ratio(chosen), ratio(rejected)) if term.name == "sigmoid" else (ratio(own),)
                total = total + term.weight * PREFERENCE_LOSSES.get(term.name).function(*inputs, **term.arguments).sum()
            total.backward()
            optimizer.step()
        with torch.no_grad():
            divergence = (reference.exp() * (reference - leaf.log_softmax(-1))).sum(1)
            margin = ratio(chosen) - ratio(rejected)
        self.logits = leaf.detach()
        return {"kl": float(divergence.mean()), "margin own chosen": float(margin[own == chosen].mean()),
                "margin own rejected": float(margin[own == rejected].mean()),
                "quality": float((self.logits.softmax(-1) * self.quality).sum(1).mean())}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_selm_moves_further_from_its_reference_the_larger_alpha(seed):
    """Strictly, against iterative DPO (alpha 0) at equal steps; pairs whose chosen side is the own sample learn less."""
    found = [Table(seed).round(alpha) for alpha in (0.0, 0.1, 0.3, 0.5)]
    for name, sign in (("kl", 1), ("margin own chosen", -1), ("margin own rejected", 1)):
        values = [sign * result[name] for result in found]
        assert values == sorted(values), name
        assert len(set(values)) == 4, name


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_selm_finds_better_answers_at_a_middle_alpha_and_worse_ones_at_a_large_one(seed):
    """Expected quality after six rounds, against iterative DPO: an inverted U in alpha."""
    ends = {}
    for alpha in (0.0, 0.3, 1.0):
        table = Table(seed, prompts=300)
        ends[alpha] = [table.round(alpha)["quality"] for _ in range(6)][-1]
    assert ends[0.3] > ends[0.0] + 0.005, ends
    assert ends[1.0] < ends[0.0] - 0.005, ends


def pipeline(folder: str, method: str, **options: Any) -> Any:
    tree = {"method": method, "model": {"path": "asset:tiny_llama"}, "rewards": [{"name": "answer_match"}], "iterations": 2,
            "data": {"path": "asset:arithmetic", "limit": 16, "arguments": {"pairs": True}}, "beta": 0.1,
            "sampling": {"temperature": 0.0, "max_new_tokens": 4}, "run_dir": folder,
            "train": {"encoding": {"max_length": 128}, "batch": {"examples_per_update": 4}, "steps": 3}, **options}
    return run(tree, quiet=True)


def test_selm_with_alpha_zero_is_iterative_dpo_bit_for_bit(tmp_path):
    from safetensors.torch import load_file

    weights = {}
    runs = (("zero", "selm", {"alpha": 0.0}), ("plain", "iterative_dpo", {}), ("some", "selm", {"alpha": 0.5}))
    for name, method, options in runs:
        pipeline(str(tmp_path / name), method, **options)
        weights[name] = load_file(tmp_path / name / "train_2" / "model" / "model.safetensors")
    assert all(torch.equal(weights["zero"][key], weights["plain"][key]) for key in weights["plain"])
    assert not all(torch.equal(weights["some"][key], weights["plain"][key]) for key in weights["plain"])


def test_stages_of_selm():
    options = parse(SELMOptions, {
        "model": {"path": "m", "adapter": "a"}, "data": {"path": "d", "limit": 9}, "rewards": [{"name": "answer_match"}],
        "iterations": 2, "first_offline": True, "train": {"steps": 5}, "last_train": {"steps": 2},
        "evaluation": {"data": {"path": "e"}}})
    made = iterations(options)
    assert [s["name"] for s in made.stages] == [
        "before", "train_1", "sample_2", "rank_2", "train_2", "sample_3", "rank_3", "train_3", "after"]
    by_name = {s["name"]: s for s in made.stages}
    assert by_name["train_1"]["data"] == {"path": "d", "limit": 9, "part": "1/3"}
    assert by_name["sample_3"]["model"] == {"path": "${stages.train_2.model}"} == by_name["train_3"]["model"]
    assert [by_name[f"train_{i}"]["steps"] for i in (1, 2, 3)] == [5, 5, 2]
    assert [entry["name"] for entry in by_name["train_1"]["losses"]] == ["sigmoid"]
    assert made.outputs["model"] == "train_3.model"


@pytest.mark.parametrize(("change", "key"), [
    ({"alpha": -0.1}, "alpha"), ({"iterations": 0}, "iterations"), ({"strict": True, "base_loss": "ipo"}, "base_loss"),
    ({"train": {"losses": []}}, "train.losses"), ({"scaling": "beta"}, "scaling"),
])
def test_selm_refuses(change, key):
    tree = {"model": {"path": "m"}, "data": {"path": "d"}, "rewards": [{"name": "answer_match"}], **change}
    with pytest.raises(ConfigError, match=key):
        parse(SELMOptions, tree)


@pytest.mark.parametrize(("method", "data", "key"), [
    ("tpo", {"path": "asset:arithmetic", "arguments": {"pairs": True}}, "gold"),
    ("kto", {"path": "asset:arithmetic"}, "label"), ("dpo", {"path": "asset:arithmetic"}, "chosen"),
])
def test_missing_columns_are_named(method, data, key, tmp_path):
    tree = {"method": method, "model": {"path": "asset:tiny_llama"}, "data": {**data, "limit": 4}, "run_dir": str(tmp_path)}
    with pytest.raises(MmalignError, match=key):
        run(tree, quiet=True)


def test_kto_refuses_one_row_per_update_and_stored_references(tmp_path):
    tree = {"method": "kto", "model": {"path": "asset:tiny_llama"}, "run_dir": str(tmp_path),
            "data": {"path": "asset:arithmetic", "limit": 4, "arguments": {"pairs": True}}}
    with pytest.raises(ConfigError, match="examples_per_update"):
        run({**tree, "batch": {"examples_per_update": 1}}, quiet=True)
    with pytest.raises(ConfigError, match=r"reference\.kind"):
        run({**tree, "reference": {"kind": "precomputed"}}, quiet=True)


def test_triples_without_alpha_do_not_ask_for_gold():
    options = parse(TPOOptions, {"model": {"path": "m"}, "data": {"path": "d"}, "losses": [{"name": "tpo", "alpha": 0.0}]})
    made = loss_terms(expand_composites(options.losses), [PREFERENCE_LOSSES, SUPERVISED_LOSSES])
    assert [t.weight for t in made] == [1.0, 0.0]


def test_point_losses_are_listed():
    assert {"kto", "bco", "apo_zero_unpaired"} <= set(POINTWISE_LOSSES.names())


# -- PoFT on one-token answers -----------------------------------------------------------------------------------------


def poft_optimum(teacher_right: float | None, *, noise: float, classes: int = 10) -> float:
    """Probability of the right answer where the loss over noisy answers is least; ``None``: plain likelihood."""
    answers = torch.full((classes,), noise / classes, dtype=torch.float64)
    answers[0] += 1 - noise
    logits = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], lr=0.5, max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14,
                                  line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        own = logits.log_softmax(-1)
        if teacher_right is None:
            value = -(answers * own).sum()
        else:
            teacher = torch.full((classes,), (1 - teacher_right) / (classes - 1), dtype=torch.float64)
            teacher[0] = teacher_right
            value = (answers * PREFERENCE_LOSSES.get("poft").function(own, teacher.log())).sum()
        value.backward()
        return value

    optimizer.step(closure)
    return float(logits.detach().softmax(-1)[0])


@pytest.mark.parametrize(("teacher", "noise", "right"), [
    (None, 0.4, 0.640), (0.9, 0.4, 0.764), (None, 0.6, 0.460), (0.9, 0.6, 0.674), (0.5, 0.4, 0.595), (0.1, 0.4, 0.383),
])
def test_poft_beats_noise_exactly_as_far_as_its_teacher_does(teacher, noise, right):
    assert poft_optimum(teacher, noise=noise) == pytest.approx(right, abs=1e-3)


# -- every name, from a configuration ------------------------------------------------------------------------------------

EVERY_COLUMN = {"answer": "7", "chosen": " seven or so", "rejected": " eight", "gold": " It is seven.", "generated": " nine",
                "margin": 0.5, "win_prob": 0.8, "weight": 1.0}


@pytest.fixture(scope="module")
def every_column(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} + {7 - i} =", **EVERY_COLUMN}) + "\n" for i in range(8)))
    return str(path)


def first_record(folder, method: str, data: str, losses: list[dict[str, Any]], **options: Any) -> dict[str, float]:
    tree = {"method": method, "model": {"path": "asset:tiny_llama"}, "data": {"path": data}, "losses": losses, "steps": 1,
            "batch": {"examples_per_update": 8, "examples_per_forward": 8}, "run_dir": str(folder), **options}
    run(tree, quiet=True)
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize("name", [*sorted(set(PREFERENCE_LOSSES.names()) - {"poft"}), *COMPOSITE_LOSSES.names()])
def test_dpo_takes_every_loss_by_name_and_its_first_step_has_a_gradient(name, every_column, tmp_path):
    record = first_record(tmp_path, "dpo", every_column, [{"name": name}])
    assert math.isfinite(record["loss"])
    assert record["grad_norm"] > 0


@pytest.mark.parametrize("name", POINTWISE_LOSSES.names())
def test_kto_takes_every_point_loss_by_name(name, every_column, tmp_path):
    assert first_record(tmp_path, "kto", every_column, [{"name": name}])["grad_norm"] > 0


@pytest.mark.parametrize("pairs", [
    {"divergence": "js"}, {"divergence": "forward_kl"}, {"divergence": "alpha"}, {"tail_weight": 0.5}, {"weights": "wpo"},
    {"weights": "column"}, {"margin": True},
], ids=str)
def test_variants_from_a_configuration(pairs, every_column, tmp_path):
    record = first_record(tmp_path, "dpo", every_column, [{"name": "sigmoid"}], pairs=pairs)
    assert record["grad_norm"] > 0
    if pairs == {"margin": True}:  # beta (u_w - u_l) - m at u = 0
        assert record["loss"] == pytest.approx(math.log1p(math.exp(0.5)), abs=1e-5)
