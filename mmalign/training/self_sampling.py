"""Learning from programs that the model samples and execution approves: the experience that finds them, and its objective.

Ni, Inala, Wang, Polozov, Meek, Radev, Gao 2022, "Learning Math Reasoning from Self-Sampled Correct and Partially-Correct
Solutions", arXiv 2205.14318.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.config import Options
from mmalign.core.logprobs import sequence_log_prob
from mmalign.core.supervised import length_normalised, mle_aug, mml
from mmalign.data.chat import IGNORED, Dropped, TextEncoder, TextEncoding, encode_rendered
from mmalign.data.mixture import EpochSampler
from mmalign.data.rows import Rows
from mmalign.data.solutions import Outcome, SolutionOptions, Solutions, Task
from mmalign.data.straight_line import Program, ProgramError, Trace, trace_programs, write_program
from mmalign.data.turns import common_prefix
from mmalign.errors import DataError
from mmalign.policies.base import TextSampling
from mmalign.policies.causal_lm import CausalLMPolicy
from mmalign.training.experience import BatchShape
from mmalign.training.objective import Coupling, Mean, Metrics, PolicyObjective, Term, TrainState, UpdateBatch
from mmalign.training.tracking import PhaseTimer

Tracer = Callable[[Sequence[str]], Sequence[Trace | ProgramError]]
"""Programs -> their traces, or what is wrong with them."""

OUTCOMES: tuple[Outcome | Literal["invalid", "too_long"], ...] = (
    "full", "partial", "known", "wrong", "crowded", "invalid", "too_long",
)
"""What can become of a sample; ``invalid`` is no program that may be traced, or one that fails."""


class SelfSamplingLossOptions(Options):
    """How the known programs of a task become one loss."""

    name: Literal["mle", "mle_aug", "mml", "beta_mml"] = "mle_aug"
    """mle: the reference alone (nothing is sampled). mle_aug: the sum over all known programs. mml: their marginal likelihood.
    beta_mml: the same with every probability to the power beta."""
    beta: float | None = None
    """beta_mml: in (0, 1]; null is 0.25. 1 is mml, towards 0 all programs count alike."""
    normalize: bool = False
    """mle_aug: divide by the number of programs."""
    norm_marg_by_len: bool = False
    """Divide a program's log-probability by its length, times the longest length of the task."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        if self.beta is not None and not 0 < self.beta <= 1:
            raise ValueError(f"loss.beta must lie in (0, 1], not {self.beta}")
        if self.beta is not None and self.name != "beta_mml":
            raise ValueError(f"loss.beta belongs to beta_mml, not to {self.name}")
        if self.normalize and self.name != "mle_aug":
            raise ValueError(f"loss.normalize belongs to mle_aug, not to {self.name}")

    def __call__(self, seq_logp: Tensor, group: Tensor) -> Tensor:
        """``[N]`` log-probabilities of programs and their tasks -> ``[Q]`` losses."""
        if self.name in ("mle", "mle_aug"):
            return mle_aug(seq_logp, group, normalize=self.normalize)
        return mml(seq_logp, group, beta=1.0 if self.name == "mml" else 0.25 if self.beta is None else self.beta)


class ProgramEncoder:
    """Programs behind prompts as rows of ids: whole ones end as completions do, parts of programs are left open."""

    def __init__(self, policy: CausalLMPolicy, encoding: TextEncoding) -> None:
        self.policy, self.encoding = policy, encoding
        self.encoder = TextEncoder(policy.tokenizer, encoding)
        limits = [limit for limit in (self.encoder.max_length, policy.window) if limit is not None]
        self.limit = min(limits) if limits else None

    def open(self, prompt: Any, program: Program) -> list[int]:
        """Ids of a prompt and the first statements of a program, ready for the next one."""
        if not program:
            return self.encoder.prompt(prompt)
        if isinstance(prompt, str):
            return self.encoder.prompt(f"{prompt}{write_program(program)}\n")
        begun = self.encoder.prompt([*prompt, {"role": "assistant", "content": write_program(program)}])
        return begun + encode_rendered("\n", self.policy.tokenizer)  # templates strip white space at the end

    def row(self, prompt: Any, program: Program, *, whole: bool) -> dict[str, list[int]] | None:
        """Ids and labels; None for a row that is too long. A part of a program is followed by no end token."""
        if whole:
            text = write_program(program)
            completion: Any = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            encoded = self.encoder.encode({"prompt": prompt, "completion": completion})
            if isinstance(encoded, Dropped) or encoded["truncated"]:
                return None
            ids, labels = encoded["input_ids"], encoded["labels"]
        else:
            ids = self.open(prompt, program)
            start = 0 if self.encoding.completion_only_loss is False else common_prefix(self.open(prompt, ()), ids)
            labels = [IGNORED] * max(1, start) + ids[max(1, start):]
        if self.limit is not None and len(ids) > self.limit:
            return None
        return {"input_ids": list(ids), "labels": list(labels)}


class SelfSamplingExperience:
    """Sample programs of some tasks, keep what execution approves, and yield all known programs of those tasks.

    One rollout: every task drawn gets one of its partial programs, uniformly (the empty one asks for a whole program), and
    ``completions_per_prompt`` continuations of it; each is traced (by default interpreted, never executed) and judged by
    :class:`~mmalign.data.solutions.Solutions`. Updates hold ``group[N]`` (the task), ``gold[N]`` and ``whole[N]``.

    A task belongs to one process for the whole run (task number modulo processes), which alone samples it and keeps its
    buffers: nothing has to be merged, and no two processes know different solutions of a task.
    """

    def __init__(
        self, policy: CausalLMPolicy, tasks: Sequence[Task], shape: BatchShape, state: TrainState, *,
        options: SolutionOptions | None = None, sampling: TextSampling | None = None, encoding: TextEncoding | None = None,
        explore: bool = True, passes: int = 1, timer: PhaseTimer | None = None, tracer: Tracer = trace_programs,
    ) -> None:
        self.tracer = tracer
        self.policy, self.shape, self.state = policy, shape, state
        self.options, self.sampling = options or SolutionOptions(), sampling or TextSampling(temperature=0.8, max_new_tokens=100)
        self.explore, self.passes, self.timer = explore, passes, timer or PhaseTimer()
        self.encoder = ProgramEncoder(policy, encoding or policy.encoding)
        self.tasks = list(tasks[state.rank :: state.world_size])
        if not self.tasks:
            raise DataError(f"data: {len(tasks)} tasks cannot be shared out to {state.world_size} processes")
        traces = tracer([task.gold for task in self.tasks])
        self.solutions = [self._known(i, trace) for i, trace in enumerate(traces)]
        self.sampler = EpochSampler(len(self.tasks), seed=state.seed, shuffle=True)
        self.pending: list[Rows] = []
        self.metrics: dict[str, float] = {}
        self.sampled_tokens = 0

    def _known(self, position: int, trace: Trace | ProgramError) -> Solutions:
        number, task = self.state.rank + position * self.state.world_size, self.tasks[position]
        try:
            if isinstance(trace, ProgramError):
                raise trace
            known = Solutions(trace, task.answer, self.options)
        except (ProgramError, DataError) as error:
            raise DataError(f"data: row {number}: {error}") from None
        if self.encoder.row(task.prompt, known.full[0], whole=True) is None:
            raise DataError(f"data: row {number}: prompt and reference program have more than {self.encoder.limit} tokens; raise "
                            "encoding.max_length or leave the row out")
        return known

    def __iter__(self) -> Iterator[UpdateBatch]:
        """Endless updates."""
        while True:
            if not self.pending:
                self.pending, self.metrics = self._rollout()
            yield UpdateBatch({"train": self.pending.pop(0)}, dict(self.metrics))

    # -- sampling ------------------------------------------------------------------------------------------------------

    def _rollout(self) -> tuple[list[Rows], dict[str, float]]:
        chosen = self.sampler.take(self.shape.prompts_per_rollout // self.shape.world_size)
        metrics: dict[str, float] = {"epoch": float(self.sampler.epochs_done)}
        if self.explore:
            metrics |= self._sample(chosen)
        full = sum(len(known.full) for known in self.solutions) / len(self.solutions)
        partial = sum(len(known.partial) - 1 for known in self.solutions) / len(self.solutions)
        metrics |= {"solutions/full": full, "solutions/partial": partial, "sampled_tokens": float(self.sampled_tokens)}
        sets = [self._training_set(task, group) for group, task in enumerate(chosen)]
        count = max(1, self.shape.updates_per_rollout // self.passes)
        updates = []
        for _ in range(self.passes):
            order = torch.randperm(len(sets), generator=self.state.generator("order"))
            for part in order.tensor_split(count):
                updates.append(Rows.concat([sets[i] for i in part.tolist()]))
        return updates, metrics

    def _sample(self, chosen: Sequence[int]) -> dict[str, float]:
        prefixes = [self._prefix(task) for task in chosen]
        prompts = [self.encoder.open(self.tasks[task].prompt, prefix) for task, prefix in zip(chosen, prefixes, strict=True)]
        with self.timer.phase("rollout"):
            rollout = self.policy.sample(prompts, self.shape.completions_per_prompt, self.sampling,
                                         self.state.generator("sampling"))
        outcomes: Counter[str] = Counter()
        with self.timer.phase("execution"):
            groups = rollout.group.tolist()
            texts = [write_program((*prefixes[group], str(text))) for group, text in zip(groups, rollout.samples, strict=True)]
            for group, trace in zip(groups, self.tracer(texts), strict=True):
                outcomes[self._judge(chosen[group], trace)] += 1
        tokens = int(rollout.mask.sum())
        self.sampled_tokens += tokens
        return {**{f"samples/{name}": outcomes[name] / len(rollout) for name in OUTCOMES},
                "samples/from_partial": sum(bool(prefix) for prefix in prefixes) / len(prefixes),
                "actions/mean": tokens / len(rollout)}

    def _prefix(self, task: int) -> Program:
        known = self.solutions[task].partial
        prefix = known[int(torch.randint(len(known), (1,), generator=self.state.generator("prefix")))]
        room = self.encoder.policy.window
        # A program that fills the window leaves nothing to sample: start over.
        return prefix if room is None or len(self.encoder.open(self.tasks[task].prompt, prefix)) < room else ()

    def _judge(self, task: int, trace: Trace | ProgramError) -> str:
        if isinstance(trace, ProgramError):
            return "invalid"
        known, prompt = self.solutions[task], self.tasks[task].prompt
        if self.encoder.row(prompt, trace.program, whole=True) is None:
            return "too_long"
        return known.add(trace).outcome

    def _training_set(self, task: int, group: int) -> Rows:
        """Rows of the known programs of a task: the whole ones, then the parts, at most ``marg_set_size``."""
        known, size = self.solutions[task], self.options.marg_set_size
        programs = [(program, True) for program in known.full] + [(program, False) for program in known.partial[1:]]
        if not self.explore:
            programs = programs[:1]
        if len(programs) > size:
            draw = self.state.generator("programs")
            if self.options.prioritize_fcp:
                whole = torch.randperm(len(known.full), generator=draw).tolist()
                parts = (torch.randperm(len(programs) - len(whole), generator=draw) + len(whole)).tolist()
                kept = sorted([*whole, *parts][:size])
            else:
                kept = sorted(torch.randperm(len(programs), generator=draw).tolist()[:size])
            programs = [programs[i] for i in kept]
        rows = []
        for program, whole_program in programs:
            row = self.encoder.row(self.tasks[task].prompt, program, whole=whole_program)
            if row is not None:
                rows.append({**row, "gold": program == known.full[0] and whole_program, "whole": whole_program})
        made = Rows.from_examples(rows)
        return made.with_columns(
            group=torch.full((len(rows),), group), gold=torch.tensor([row["gold"] for row in rows]),
            whole=torch.tensor([row["whole"] for row in rows]),
        )

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Position, buffers of every task of this process, rows not trained on yet, and counters."""
        return {"sampler": self.sampler.state_dict(), "solutions": [known.state_dict() for known in self.solutions],
                "pending": [dict(rows) for rows in self.pending], "metrics": self.metrics, "sampled_tokens": self.sampled_tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.sampler.load_state_dict(state["sampler"])
        for known, saved in zip(self.solutions, state["solutions"], strict=True):
            known.load_state_dict(saved)
        self.pending = [Rows(columns) for columns in state["pending"]]
        self.metrics, self.sampled_tokens = dict(state["metrics"]), int(state["sampled_tokens"])


class SelfSampled(PolicyObjective):
    """Mean over tasks of the loss of their known programs (Ni et al. 2022, arXiv 2205.14318); a forward holds whole tasks.

    With ``log p_j`` the sum over the learned tokens of program j: :func:`~mmalign.core.supervised.mle_aug` or
    :func:`~mmalign.core.supervised.mml`.
    """

    coupling: Coupling = "group"

    def __init__(self, policy: CausalLMPolicy, loss: SelfSamplingLossOptions) -> None:
        self.policy, self.options = policy, loss

    def counts(self, update: UpdateBatch) -> dict[str, float]:
        """Tasks of the update."""
        return {"solutions": float(len(set(torch.as_tensor(update.parts[self.part]["group"]).tolist())))}

    def loss(self, micro: UpdateBatch, shared: dict[str, Any], state: TrainState) -> tuple[list[Term], Metrics]:
        """The one term; metrics ``nll`` (per token), ``nll/gold`` and ``nll/sampled`` (per program)."""
        rows = micro.parts[self.part]
        if not len(rows):  # more forwards than tasks: this one still takes part in the exchange of gradients
            idle = self.policy.log_probs(Rows({"input_ids": [[0, 0]], "labels": [[IGNORED, IGNORED]]})).logp.sum()
            return [Term("solutions", idle[None], torch.zeros(1, dtype=torch.bool, device=idle.device),
                         "seq_mean_token_mean")], {}
        scores = self.policy.log_probs(rows)
        seq_logp, length = sequence_log_prob(scores.logp, scores.mask)
        group = torch.as_tensor(rows["group"]).unique(return_inverse=True)[1].to(seq_logp.device)
        gold = torch.as_tensor(rows["gold"]).to(seq_logp.device)
        metrics: Metrics = {"nll": Mean.of(-scores.logp, scores.mask), "nll/gold": Mean.of(-seq_logp, gold)}
        if not bool(gold.all()):
            metrics["nll/sampled"] = Mean.of(-seq_logp, ~gold)
        if self.options.norm_marg_by_len:
            seq_logp = length_normalised(seq_logp, length, group)
        values = self.options(seq_logp, group)
        return [Term("solutions", values, torch.ones_like(values, dtype=torch.bool), "seq_mean_token_mean")], metrics
