"""Run directories written by hand, in the layout of ``mmalign run``."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from PIL import Image


def write_stage(folder: Path, **manifest: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    base = {"name": folder.name, "kind": "evaluate", "status": "done", "fingerprint": "f" * 16, "config": {}, "seed": 3,
            "versions": {"mmalign": "0.1.0", "torch": "2.14.1"}, "git": "0123abc", "started": "2026-01-01 10:00:00",
            "finished": "2026-01-01 10:05:00", "outputs": {}, "metrics": {}, "seconds": 12.5}
    (folder / "manifest.json").write_text(json.dumps(base | manifest))
    return folder


def write_metrics(folder: Path, records: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def write_samples(folder: Path, samples: list[dict[str, Any]], *, colour: int | None = None) -> None:
    target = folder / "samples"
    target.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, sample in enumerate(samples):
        if colour is not None:
            Image.new("RGB", (32, 32), ((colour + 20 * i) % 256, 60, 120)).save(target / f"{i:05d}.png")
            sample = {**sample, "image": f"{i:05d}.png"}
        lines.append(json.dumps(sample))
    (target / "samples.jsonl").write_text("\n".join(lines) + "\n")


def rollout_records(count: int = 60) -> list[dict[str, Any]]:
    draw = random.Random(0)
    return [
        {"step": i + 1, "loss": 0.001 * draw.gauss(0, 1), "loss/policy": 0.001 * draw.gauss(0, 1),
         "loss/kl": 0.01 * i / count, "reward": 0.2 + 0.6 * i / count + 0.05 * draw.gauss(0, 1), "reward_std": 0.3,
         "rewards/answer_match/mean": 0.5 * i / count,
         "rewards/answer_match/std": 0.2, "rewards/answer_match/none_fraction": 0.0, "rewards/answer_match/seconds": 0.01,
         "groups/zero_spread": 0.1, "completions/cut_off": 0.05, "actions/mean": 30 + i % 7, "kl": 0.001 * math.exp(0.05 * i),
         "grad_norm": 0.4 + 0.1 * abs(draw.gauss(0, 1)), "lr": 1e-5, "rollout_gap/max": 1e-6, "rollout_gap/mean": 2e-7,
         "epoch": i // 10, "seconds": 2.0, "seconds/rollout": 1.2, "seconds/update": 0.5, "seconds/reward": 0.1,
         "examples_per_second": 16 + draw.random()}
        for i in range(count)
    ]


def write_pipeline(root: Path, *, images: bool = False) -> Path:
    """before -> grpo -> after, with samples, as a pipeline leaves it."""
    prompts = ["a red circle", "two blue squares", "a green star"]
    rewards = [0.1, 0.4, None]
    before = write_stage(root / "before", metrics={"eval/answer_match": 0.25, "eval/answer_match/error": 0.05})
    texts = [{"prompt": p, "completion": f"first {p}", "answer": "5", "rewards": {"answer_match": r}}
             for p, r in zip(prompts, rewards, strict=True)]
    write_samples(before, texts, colour=30 if images else None)
    train = write_stage(root / "grpo", kind="grpo", config={"steps": 60, "optimizers": [{"lr": 1e-5}]}, seconds=240.0,
                        started="2026-01-01 10:06:00")
    write_metrics(train, rollout_records())
    after = write_stage(
        root / "after", config={"compare_with": str(before)}, started="2026-01-01 10:20:00",
        metrics={"eval/answer_match": 0.75, "eval/answer_match/error": 0.04, "before/answer_match": 0.25,
                 "after/answer_match": 0.75, "difference/answer_match": 0.5, "difference/answer_match/error": 0.06},
    )
    write_samples(after, [{**t, "completion": f"second {t['prompt']}"} for t in texts], colour=130 if images else None)
    (root / "config.yaml").write_text(
        "seed: 3\nstages:\n- {name: before, kind: evaluate}\n- {name: grpo, method: grpo}\n- {name: after, kind: evaluate}\n")
    return root
