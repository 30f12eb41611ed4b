"""What sets preference losses apart, seen end to end: label noise, likelihoods of either side, and styles of triples."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.api import run
from mmalign.core.preference import PREFERENCE_LOSSES
from mmalign.data.chat import TextEncoding
from mmalign.policies.base import TextSampling
from mmalign.policies.loading import ModelOptions, load_policy


def converged_margin(name: str, *, preference: float, flips: float, **options: float) -> float:
    """``beta D`` at which the expected loss over noisy labels is least."""
    margin = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    seen = (1 - flips) * preference + flips * (1 - preference)
    optimizer = torch.optim.LBFGS([margin], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = PREFERENCE_LOSSES.get(name).function
        value = (seen * loss(margin, zero, beta=1.0, **options) + (1 - seen) * loss(zero, margin, beta=1.0, **options)).sum()
        value.backward()
        return value

    optimizer.step(closure)
    return float(margin.detach())


def test_robust_recovers_the_clean_margin_that_sigmoid_shrinks():
    clean, flips = 0.9, 0.2
    noisy = (1 - flips) * clean + flips * (1 - clean)
    assert converged_margin("robust", preference=clean, flips=flips, label_smoothing=flips) == \
        pytest.approx(math.log(clean / (1 - clean)), abs=1e-4)
    assert converged_margin("sigmoid", preference=clean, flips=flips) == pytest.approx(math.log(noisy / (1 - noisy)), abs=1e-4)


# -- small language models -------------------------------------------------------------------------------------------


def trained(folder: Path, method: str, seed: int, model: str, **options: Any) -> tuple[str, list[dict[str, Any]]]:
    tree = {"method": method, "seed": seed, "model": {"path": model}, "run_dir": str(folder), "encoding": {"max_length": 128},
            "data": {"path": "asset:arithmetic", "limit": 128, "arguments": {"triples": True, "levels": [1, 2]}},
            "batch": {"examples_per_update": 16, "examples_per_forward": 16}, "steps": 25,
            "optimizers": [{"kind": "adamw", "lr": 2e-3}], **options}
    manifest = next(iter(run(tree, quiet=True).values()))
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return manifest["outputs"]["model"], metrics


def start(folder: Path, seed: int) -> str:
    """A model that has read answers of the plain style, so that the pairs' style is known and gold's is not."""
    return trained(folder, "sft", seed, "asset:tiny_llama", steps=40,
                   data={"path": "asset:arithmetic", "limit": 256, "arguments": {"levels": [1, 2]}})[0]


def gold_log_prob(model: str) -> float:
    """Mean log-prob of held-out gold answers."""
    from mmalign.data.assets import asset_rows

    policy = load_policy(ModelOptions(path=model), encoding=TextEncoding(max_length=128))
    rows = asset_rows("asset:arithmetic", split="test", n=32, seed=0, triples=True, levels=[1, 2])
    prepared, _ = policy.prepare_dataset(rows, fields=("gold",))
    with torch.no_grad():
        return float(policy.log_probs(policy.encode_rows(prepared).field("gold")).sequence()[0].mean())


@pytest.mark.slow
def test_triples_teach_the_style_of_gold_that_pairs_cannot(tmp_path):
    """At equal steps TPO raises log p(gold) on held-out rows; DPO, CPO and SimPO do not by half as much, in every seed."""
    for seed in range(3):
        base = start(tmp_path / f"base{seed}", seed)
        before = gold_log_prob(base)
        gains, accuracy = {}, {}
        for name, losses in (("tpo", {"name": "tpo", "beta": 0.1}), ("dpo", {"name": "sigmoid", "beta": 0.1}),
                             ("cpo", {"name": "cpo_nll", "beta": 0.1}), ("simpo", {"name": "simpo"})):
            model, metrics = trained(tmp_path / f"{name}{seed}", name, seed, base, losses=[losses])
            gains[name] = gold_log_prob(model) - before
            accuracy[name] = sum(record["accuracy"] for record in metrics[-5:]) / 5
        assert gains["tpo"] > 0
        for other in ("dpo", "cpo", "simpo"):
            assert gains["tpo"] > 2 * max(gains[other], 0.0), gains
        assert accuracy["tpo"] >= accuracy["cpo"] - 0.1, accuracy


def wordy_rows(file: Path, seed: int) -> float:
    """Sums whose chosen answer says the result four times, the rejected a wrong one once; tokens of both, on average."""
    from mmalign.data.assets import asset_rows

    tokenizer = load_policy(ModelOptions(path="asset:tiny_llama")).tokenizer
    lengths: list[int] = []
    with file.open("w") as lines:
        for i, row in enumerate(asset_rows("asset:arithmetic", split="train", n=120, seed=seed, pairs=True, levels=[1])):
            right, wrong = row["chosen"][0]["content"], row["rejected"][0]["content"]
            texts = {"gold": right, "chosen": " ".join([right] * 4), "rejected": wrong}
            lengths += [len(tokenizer(texts[name])["input_ids"]) + 1 for name in ("chosen", "rejected")]
            samples = {name: [{"role": "assistant", "content": text}] for name, text in texts.items()}
            lines.write(json.dumps({"id": str(i), "prompt": row["prompt"], **samples}) + "\n")
    return sum(lengths) / len(lengths)


def sampled_length(model: str) -> float:
    """Mean tokens of samples to held-out prompts."""
    from mmalign.data.assets import asset_rows

    prompts = [row["prompt"] for row in asset_rows("asset:arithmetic", split="test", n=16, seed=0, levels=[1])]
    rollout = load_policy(ModelOptions(path=model)).sample(prompts, 8, TextSampling(max_new_tokens=24),
                                                           torch.Generator().manual_seed(0))
    return float(rollout.mask.sum(1).float().mean())


@pytest.mark.slow
def test_scores_per_token_do_not_grow_answers_as_sums_do(tmp_path):
    """Chosen answers are long, rejected ones short: tpo makes its samples longer than tpo_l on average over four seeds.

    A token is pushed equally hard at the start: beta of the means is that of the sums times the length.
    """
    differences = []
    for seed in range(30, 34):
        folder = tmp_path / str(seed)
        folder.mkdir()
        length = wordy_rows(folder / "rows.jsonl", seed)
        base = start(folder / "base", seed)
        ends = {}
        for name, loss in (("tpo", {"name": "tpo", "beta": 0.1, "alpha": 0.5}),
                           ("tpo_l", {"name": "tpo_l", "beta": 0.1 * length, "gamma": 0.0, "alpha": 0.5})):
            rows = {"path": str(folder / "rows.jsonl")}
            model, _ = trained(folder / name, name, seed, base, losses=[loss], data=rows, steps=120)
            ends[name] = sampled_length(model)
        differences.append(ends["tpo"] - ends["tpo_l"])
    assert sum(differences) > 0, differences
    assert sum(difference > 0 for difference in differences) >= 3, differences


@pytest.mark.slow
def test_a_likelihood_term_holds_the_chosen_answer_that_the_pair_loss_lets_fall(tmp_path):
    """nll(chosen) ends lower with rpo than with sigmoid, at equal steps, in every seed; kto raises what is desirable."""
    for seed in range(3):
        base = start(tmp_path / f"base{seed}", seed)
        ends = {}
        for name in ("sigmoid", "rpo"):
            _, metrics = trained(tmp_path / f"{name}{seed}", "dpo", seed, base, losses=[{"name": name, "beta": 0.5}])
            ends[name] = sum(record["logp/chosen"] for record in metrics[-5:]) / 5
        assert ends["rpo"] > ends["sigmoid"], ends
        _, metrics = trained(tmp_path / f"kto{seed}", "kto", seed, base, losses=[{"name": "kto", "beta": 0.5}])
        assert metrics[0]["rewards/desirable"] == pytest.approx(0.0, abs=1e-5)
        last = {key: sum(record[key] for record in metrics[-5:]) / 5 for key in ("rewards/desirable", "rewards/undesirable")}
        assert last["rewards/desirable"] > last["rewards/undesirable"] + 0.02, last


def test_the_margin_of_ipo_settles_at_its_target_while_that_of_sigmoid_keeps_growing():
    """Separable pairs of a table, gradient descent: 1 / (2 beta) = 5, and no end."""
    margins = {}
    for name in ("ipo_sum", "sigmoid"):
        logits = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
        seen = []
        for _ in range(4):
            for _ in range(500):
                ratios = logits.log_softmax(-1) - math.log(0.5)
                (gradient,) = torch.autograd.grad(
                    PREFERENCE_LOSSES.get(name).function(ratios[:, 0], ratios[:, 1], beta=0.1).mean(), logits)
                with torch.no_grad():
                    logits -= 0.5 * gradient / gradient.norm().clamp(min=1.0)
            seen.append(float((logits[:, 0] - logits[:, 1]).mean().detach()))
        margins[name] = seen
    assert margins["ipo_sum"][0] == pytest.approx(5.0, abs=1e-3)
    assert margins["ipo_sum"][-1] == pytest.approx(5.0, abs=1e-6)
    assert margins["sigmoid"] == sorted(margins["sigmoid"])
    assert margins["sigmoid"][-1] > margins["sigmoid"][0] + 5


# -- PoFT among noisy rows ---------------------------------------------------------------------------------------------


def noisy_rows(folder: Path, seed: int) -> tuple[str, list[bool]]:
    """Sums, half of which carry the answer of another one."""
    from mmalign.data.assets import asset_rows

    rows = [dict(row) for row in asset_rows("asset:arithmetic", split="train", n=120, seed=seed, levels=[1])]
    noisy = [i % 2 == 1 for i in range(len(rows))]
    moved = [row["completion"] for row, bad in zip(rows, noisy, strict=True) if bad]
    others = iter(moved[7:] + moved[:7])
    for row, bad in zip(rows, noisy, strict=True):
        if bad:
            row["completion"] = next(others)
    path = folder / "rows.jsonl"
    folder.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path), noisy


def mean_log_probs_of(model: str, rows: list[dict[str, Any]]) -> torch.Tensor:
    policy = load_policy(ModelOptions(path=model), encoding=TextEncoding(max_length=128))
    prepared, _ = policy.prepare_dataset([{k: row[k] for k in ("prompt", "completion")} for row in rows])
    with torch.no_grad():
        return policy.log_probs(policy.encode_rows(prepared)).sequence("mean")[0]


@pytest.mark.slow
def test_poft_counts_noisy_rows_less_and_less(tmp_path):
    """Weights tau = sigmoid(r - A): lower on shuffled rows, falling as the student fits. Clean rows end further above shuffled
    ones than after plain likelihood at half the learning rate (tau starts near one half), in every seed."""
    from datasets import load_from_disk

    for seed in range(3):
        teacher, _ = trained(tmp_path / f"teacher{seed}", "sft", seed, "asset:tiny_llama", steps=150,
                             data={"path": "asset:arithmetic", "limit": 120, "arguments": {"levels": [1]}})
        data, noisy = noisy_rows(tmp_path / f"rows{seed}", seed)
        tree = {"method": "poft", "seed": seed, "model": {"path": "asset:tiny_llama"}, "data": {"path": data},
                "teachers": [{"path": teacher}], "encoding": {"max_length": 128}, "run_dir": str(tmp_path / f"poft{seed}"),
                "train": {"batch": {"examples_per_update": 16}, "steps": 150, "optimizers": [{"kind": "adamw", "lr": 2e-3}]}}
        manifests = run(tree, quiet=True)
        student = manifests["train"]["outputs"]["model"]
        plain, _ = trained(tmp_path / f"sft{seed}", "sft", seed, "asset:tiny_llama", steps=150, data={"path": data},
                           losses=[{"name": "nll", "reduction": "seq_mean_token_mean"}],
                           optimizers=[{"kind": "adamw", "lr": 1e-3}])
        rows = [dict(row) for row in load_from_disk(manifests["scores"]["outputs"]["data"])]
        weights = {}
        for name, model in (("start", "asset:tiny_llama"), ("end", student)):
            tau = torch.sigmoid(torch.tensor([row["teacher_logp"] for row in rows]) - mean_log_probs_of(model, rows))
            bad = torch.tensor(noisy)
            weights[name] = (float(tau[~bad].mean()), float(tau[bad].mean()))
        assert weights["end"][1] < weights["end"][0] - 0.05, weights
        assert weights["end"][1] < weights["start"][1], weights
        gaps = {}
        for name, model in (("poft", student), ("sft", plain)):
            scores = mean_log_probs_of(model, rows)
            gaps[name] = float(scores[~bad].mean() - scores[bad].mean())
        assert gaps["poft"] > gaps["sft"], gaps
