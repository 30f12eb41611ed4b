"""Self-sampled correct and partially correct solutions: fine-tuning on programs when each problem has one reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from mmalign.data.calculator import CalculatorError, calculator_program
from mmalign.data.chat import TextEncoding
from mmalign.data.solutions import SolutionOptions, Task
from mmalign.data.straight_line import trace_programs
from mmalign.errors import ConfigError, DataError
from mmalign.methods.registry import method
from mmalign.methods.training import BuildContext, TrainingParts
from mmalign.policies.base import TextSampling
from mmalign.rewards.base import RewardOptions
from mmalign.rewards.maths import extract_answer, parse_number
from mmalign.rewards.program_traces import trace_in_sandbox
from mmalign.rewards.sandbox import Sandbox, SandboxOptions
from mmalign.rewards.text import completion_text
from mmalign.training.options import TrainOptions
from mmalign.training.self_sampling import SelfSampled, SelfSamplingExperience, SelfSamplingLossOptions, Tracer

ProgramsFrom = Literal["completion", "calculator"]


class SelfSamplingOptions(TrainOptions):
    """Options of training on self-sampled programs."""

    programs_from: ProgramsFrom = "completion"
    """completion: the column holds the reference program. calculator: it holds a worked answer with <<...=...>> annotations
    (GSM8K), which becomes one; rows whose annotations lead nowhere are dropped and counted."""
    execution: Literal["interpreter", "process"] = "interpreter"
    """interpreter: straight-line programs of arithmetic are interpreted, never executed. process: programs of any statements run
    in a confined process each; slower, and loops, functions and imports of a few modules are allowed."""
    sandbox: SandboxOptions = SandboxOptions()
    """Bounds of the process, and what must be enforced around it."""
    loss: SelfSamplingLossOptions = SelfSamplingLossOptions()
    """How the known programs of a task become one loss."""
    solutions: SolutionOptions = SolutionOptions()
    """Which samples count as solutions, and how many are kept."""
    sampling: TextSampling = TextSampling(temperature=0.8, max_new_tokens=100)
    """How programs are sampled."""
    encoding: TextEncoding = TextEncoding()
    """Tokenisation; completion_only_loss: false learns the prompt as well, with every program."""


@method("self_sampling", options=SelfSamplingOptions, modality="text", rollout=True, aliases=("trace_codegen",),
        paper="Ni et al., 2022, arXiv 2205.14318")
def self_sampling(options: SelfSamplingOptions, context: BuildContext) -> TrainingParts:
    """Sample programs while training, keep those that are right or right so far, and learn all known ones of a problem."""
    explore = options.loss.name != "mle"
    if explore and options.sampling.temperature <= 0:
        raise ConfigError(f"sampling.temperature: other solutions come from random samples, not from temperature "
                          f"{options.sampling.temperature}; use a positive one")
    if options.batch.action_fraction != 1:
        raise ConfigError("batch.action_fraction: has no meaning for text; leave it at 1")
    tracer: Tracer = trace_programs
    if options.execution == "process":
        sandbox = Sandbox(options.sandbox)
        sandbox.isolation  # noqa: B018 - raises where a required guarantee cannot be kept
        tracer = partial(trace_in_sandbox, sandbox=sandbox)
    policy: Any = context.policy(options.model, encoding=options.encoding)
    tasks = read_tasks(context.rows(options.data), options.programs_from, context)
    policy.check_prompts([task.prompt for task in tasks])
    experience = SelfSamplingExperience(
        policy, tasks, context.shape, context.state, options=options.solutions, sampling=options.sampling,
        encoding=options.encoding, explore=explore, passes=options.batch.passes_per_rollout, timer=context.timer,
        tracer=tracer,
    )
    evaluation = None
    if options.evaluation is not None:
        rewards = options.evaluation.rewards or [RewardOptions(name="straight_line_match")]
        evaluation = (options.evaluation, context.rewards(rewards), options.sampling)
    return TrainingParts(policy, SelfSampled(policy, options.loss), experience, rows=len(tasks), evaluation=evaluation,
                         provenance={"loss": options.loss.name, "solutions": options.solutions.model_dump()})


def read_tasks(
    rows: Sequence[Mapping[str, Any]], programs_from: ProgramsFrom, context: BuildContext | None = None,
) -> list[Task]:
    """Prompts, reference programs and answers of a data set; raises DataError naming the column and the row."""
    needed = ("prompt", "completion") if programs_from == "calculator" else ("prompt", "completion", "answer")
    missing = [name for name in needed if name not in rows[0]]
    if missing:
        raise DataError(f"data: column {missing[0]!r} is missing; columns are {', '.join(rows[0])}. Map yours with data.columns")
    tasks, dropped = [], 0
    for number in range(len(rows)):
        row = rows[number]
        gold = completion_text(row["completion"])
        answer = row.get("answer")
        if programs_from == "calculator":
            answer = extract_answer(gold if answer is None else str(answer))
            try:
                gold = calculator_program(gold)
            except CalculatorError:
                dropped += 1
                continue
        value = parse_number(str(answer))
        if value is None:
            raise DataError(f"data: row {number}: answer {answer!r} is not a number, which the answer of a program is")
        tasks.append(Task(row["prompt"], gold, float(value.value)))
    if not tasks:
        raise DataError(f"data: none of the {len(rows)} worked answers has calculator annotations that lead to its answer; "
                        "set programs_from: completion if the column holds programs")
    if dropped and context is not None:
        context.say(f"data: {dropped} of {len(rows)} rows dropped (their calculator annotations do not lead to the answer)")
    return tasks
