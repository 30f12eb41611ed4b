"""A GRPO step, sampling included: TRL's GRPOTrainer against ours.

Each side samples its own completions, all of the same length (fewest = most new tokens), so both do the same work. That
they compute the same loss and gradient is checked first, on completions both are given.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import library
import trl_side
import workload
from harness import OURS, Bench, Case, Measurement, Meter, main

PROMPTS = 2
GROUP = 8
NEW_TOKENS = 48
WORDS = (40, 80)
ROWS = 64
RATE = 1e-5

STEP = Case(
    "2 x 8", "2 prompts x 8 completions of 48 tokens, no reference",
    "generation: one forward per token, whose logits [16, 49152] are softmaxed and searched; then the head's products",
    {"TRL": (1.8, 3.0)}, scales={"loss": 0.5},  # advantages of a group, of size 1, sum to zero
)


def work(steps: int) -> dict[str, float]:
    """Mean tokens and operations of a timed step."""
    rows = workload.prompt_rows(ROWS, WORDS)
    order = workload.visiting_order(ROWS, PROMPTS * (steps + 1))[PROMPTS:]
    prompt = sum(len(rows[i]["prompt"].split()) for i in order) / steps
    new = PROMPTS * GROUP * NEW_TOKENS
    sampling = workload.flop(prompt + new, new, body_passes=1, head_passes=1)
    training = workload.flop(prompt + new, new, body_passes=3, head_passes=4)  # every prompt once per group
    return {"tokens": new, "flop": sampling + training}


def tree() -> dict[str, Any]:
    """Configuration of our side."""
    return {
        "model": {"path": str(workload.model_folder())},
        "data": {"path": str(workload.write_rows(workload.prompt_rows(ROWS, WORDS)))},
        "rewards": [f"{Path(workload.__file__)}:even_share"],
        "batch": {"prompts_per_rollout": PROMPTS, "completions_per_prompt": GROUP},
        "sampling": {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "temperature": 1.0},
        "loss": {"name": "ppo_clip", "reduction": "token_mean"}, "advantage": {"name": "grpo"},
        "optimizers": [{"lr": RATE}], "precision": "float32",
    }


def ours(case: Case, steps: int) -> Measurement:
    """Method ``grpo`` of the library."""
    measured = library.train("grpo", tree(), steps=steps, **work(steps))
    measured.values = {}
    return measured


def trainer(steps: int, meter: Meter, *, recorded: bool = False) -> Any:
    """TRL's trainer on the same prompts."""
    from trl import GRPOConfig, GRPOTrainer

    class Recorded(GRPOTrainer):  # type: ignore[misc]
        """Completions come from :func:`recorded_completion` instead of the model."""

        calls = 0

        def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
            self.calls += 1
            return [recorded_completion(self.calls, row) for row in range(len(prompt_ids))], None

    rows = workload.prompt_rows(ROWS, WORDS)
    order = workload.visiting_order(ROWS, PROMPTS * (steps + 1))
    model, tokenizer = trl_side.load(workload.model_folder(), meter)
    arguments = GRPOConfig(
        **trl_side.common_arguments(steps, PROMPTS * GROUP, RATE), num_generations=GROUP, max_completion_length=NEW_TOKENS,
        generation_kwargs={"min_new_tokens": NEW_TOKENS}, beta=0.0, loss_type="dapo", temperature=1.0, top_k=0, top_p=1.0,
        scale_rewards="group", shuffle_dataset=False,
    )
    return (Recorded if recorded else GRPOTrainer)(
        model, args=arguments, reward_funcs=workload.even_share, processing_class=tokenizer,
        train_dataset=trl_side.as_dataset([rows[i] for i in order]), callbacks=[trl_side.StepMarks(meter)],
    )


def trl(case: Case, steps: int) -> Measurement:
    """TRL's trainer, sampling with ``transformers``."""
    meter = Meter()
    measured = trl_side.run(trainer(steps, meter), meter)
    measured.values = {}
    return measured


def recorded_completion(call: int, row: int) -> list[int]:
    """Ids of a completion that stands in for a sampled one: 20 to 48 tokens, ended unless it is full."""
    draw = random.Random(1000 * call + row)
    length = draw.randint(20, NEW_TOKENS)
    ids = [draw.randrange(len(workload.SPECIAL), workload.VOCABULARY) for _ in range(length)]
    return ids if length == NEW_TOKENS else [*ids[:-1], 1]


def check_ours(case: Case, steps: int) -> Measurement:
    """Our method on recorded completions."""

    class Recorded:
        """An engine that replays."""

        name = "recorded"

        def __init__(self, host: Any) -> None:
            self.host, self.calls = host, 0

        def generate(self, prompts: Sequence[Sequence[int]], n: int, sampling: Any, generator: Any) -> list[Any]:
            from mmalign.policies.engines import RolloutResult

            self.calls += 1
            results = []
            for row in range(len(prompts) * n):
                ids = recorded_completion(self.calls, row)
                results.append(RolloutResult(list(prompts[row // n]), ids, [0.0] * len(ids),
                                             "stop" if ids[-1] == 1 else "length", 0, "processed"))
            return results

    def replace_engine(parts: Any) -> None:
        from mmalign.policies.engines import ENGINES

        ENGINES.register("recorded")(Recorded)
        parts.policy._engine_name = "recorded"
        parts.policy.replace_module(parts.policy.module)

    return library.train("grpo", tree(), steps=steps, prepare=replace_engine)


def check_trl(case: Case, steps: int) -> Measurement:
    """TRL's trainer on recorded completions."""
    meter = Meter()
    return trl_side.run(trainer(steps, meter, recorded=True), meter)


BENCH = Bench("grpo", "GRPO step, full fine-tuning, sampling included", (STEP,), {OURS: ours, "TRL": trl},
              checks={OURS: check_ours, "TRL": check_trl})

if __name__ == "__main__":
    main(BENCH, __file__)
