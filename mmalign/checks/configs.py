"""Checks of configurations: everything of a plan that can be known without loading weights or training."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from mmalign.checks.findings import Findings
from mmalign.checks.rewards import check_reward_spec, missing_columns
from mmalign.checks.rows import (
    LOOKED_AT,
    check_encoding,
    check_pictures,
    check_prompts,
    check_values,
    first_rows,
    local_tokenizer,
    possible_uses,
)
from mmalign.config import Options, bind, parse
from mmalign.data.assets import is_asset
from mmalign.data.chat import TextEncoding
from mmalign.data.columns import is_messages, prompt_text
from mmalign.data.loading import DataOptions, load_rows
from mmalign.errors import ConfigError, MmalignError
from mmalign.methods.registry import METHODS, Method
from mmalign.policies.loading import ModelOptions, model_kind, resolve_model_path
from mmalign.rewards.registry import RewardOptions
from mmalign.stages import Plan, PlannedStage, load_plan
from mmalign.training.experience import resolve_batch
from mmalign.training.optimizers import OPTIMIZERS
from mmalign.training.options import TrainOptions
from mmalign.training.tuning import make_tuning
from mmalign.training.tuning.peft import PeftTuning


def check_config(path: Path, overrides: Sequence[str], findings: Findings) -> None:
    """Check a configuration file as ``mmalign check CONFIG`` does."""
    plan = load_plan(path, overrides)
    count = len(plan.stages)
    findings.ok(f"{path}: {count} stage{'s' if count != 1 else ''} ({', '.join(stage.name for stage in plan.stages)}), "
                "every key is known")
    rewards_done: set[tuple[str, str]] = set()
    for planned in plan.stages:
        where = "" if plan.single else f"stages.{planned.name}"
        with findings.guard(where or planned.name):
            StageCheck(plan, planned, where, findings, rewards_done).run()


NEEDED = {
    ("prompts", False): "a column prompt", ("pairs", False): "the columns chosen and rejected",
    ("pairs", True): "prompt, and images in chosen and rejected", ("samples", True): "the columns prompt and images",
    ("samples", False): "one of text, messages, or prompt and completion",
}


class StageCheck:
    """The checks of one stage; what an earlier stage will make is not looked at."""

    def __init__(
        self, plan: Plan, planned: PlannedStage, where: str, findings: Findings, rewards_done: set[tuple[str, str]],
    ) -> None:
        self.plan, self.planned, self.findings = plan, planned, findings
        self.rewards_done = rewards_done
        """Rewards tried on the same rows by an earlier stage."""
        self.prefix = f"{where}." if where else ""
        self.options: Options = parse(planned.stage.options, planned.tree, root=where)
        self.method: Method | None = METHODS.get(planned.kind) if planned.kind in METHODS else None

    def run(self) -> None:
        """Model, batch, tuning and losses of a training stage; data and rewards of every stage."""
        if isinstance(self.options, TrainOptions) and self.method is not None:
            self._training(self.options, self.method)
        model_known = self._model()
        rows = self._data("data", getattr(self.options, "data", None))
        evaluation = self.options.evaluation if isinstance(self.options, TrainOptions) else None
        if evaluation is not None:
            held_out = self._data("evaluation.data", evaluation.data)
            self._leak(rows, held_out)
        if rows:
            self._columns(rows)
            self._rewards("rewards", getattr(self.options, "rewards", None), rows)
            if evaluation is not None and evaluation.rewards and held_out:
                self._rewards("evaluation.rewards", evaluation.rewards, held_out)
            if model_known == "text":
                self._encoding(rows)
            elif model_known == "diffusion" and self.method is not None and not self.method.rollout:
                self._pictures(rows)

    # -- parts -------------------------------------------------------------------------------------------------------

    def _training(self, options: TrainOptions, method: Method) -> None:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        with self.findings.guard(f"{self.prefix}batch"):
            shape = resolve_batch(options.batch, world_size=world, rollout=method.rollout)
            sizes = ", ".join(f"{label} {value}" for label, value in shape.table())
            self.findings.ok(f"{self.prefix}batch: {sizes}")
        with self.findings.guard(f"{self.prefix}tuning"):
            tuning = make_tuning(options.tuning)
            if isinstance(tuning, PeftTuning):
                tuning.config(SimpleNamespace(modality=method.modality, module=nn.Module()))  # type: ignore[arg-type]
            self.findings.ok(f"{self.prefix}tuning: {options.tuning.name}")
        for index, optimizer in enumerate(options.optimizers):
            with self.findings.guard(f"{self.prefix}optimizers[{index}].kind"):
                _known(OPTIMIZERS.get, optimizer.kind, f"{self.prefix}optimizers[{index}].kind")
        with self.findings.guard(f"{self.prefix}loss"):
            self._losses(options)

    def _losses(self, options: TrainOptions) -> None:
        from mmalign.core.policy_gradient import POLICY_LOSSES
        from mmalign.core.supervised import SUPERVISED_LOSSES
        from mmalign.methods.policy_gradient import PolicyGradientOptions
        from mmalign.methods.preference import PreferenceOptions, UnpairedOptions, preference_terms
        from mmalign.methods.training import loss_terms
        from mmalign.training.advantages import advantage_function

        losses, key = getattr(options, "losses", None), f"{self.prefix}losses"
        if isinstance(losses, list):
            terms = preference_terms(options, key=key) if isinstance(options, (PreferenceOptions, UnpairedOptions)) else \
                loss_terms(losses, [SUPERVISED_LOSSES], key=key)
            self.findings.ok(f"{self.prefix}losses: {' + '.join(f'{term.weight:g} {term.name}' for term in terms)}")
        if isinstance(options, PolicyGradientOptions):
            name = _known(POLICY_LOSSES.canonical, options.loss.name, f"{self.prefix}loss.name")
            bind(options.loss, POLICY_LOSSES.get(name), key=f"{self.prefix}loss", ignore=("mask",))
            advantage_function(options.advantage, key=f"{self.prefix}advantage")
            kl = f", KL {options.kl.coef:g} ({options.kl.kind}, {options.kl.placement})" if options.kl.coef else ", no KL"
            self.findings.ok(f"{self.prefix}loss: {name}, advantage {options.advantage.name}{kl}")

    def _model(self) -> str | None:
        """"text" or "diffusion" when the model is on this machine and fits the method; None otherwise."""
        model = getattr(self.options, "model", None)
        if not isinstance(model, ModelOptions):
            return None
        key = f"{self.prefix}model.path"
        if "${" in model.path:
            self.findings.ok(f"{key}: made by an earlier stage ({model.path})")
            return None
        with self.findings.guard(key):
            path = resolve_model_path(model.path, key=key)
            if not Path(path).is_dir() and not is_asset(model.path):
                self.findings.warn(f"{key}: {model.path!r} is not on this machine; the run will fetch it from the hub")
                return None
            modality = "diffusion" if model_kind(path).startswith("diffusion") else "text"
            wanted = self.method.modality if self.method is not None else modality
            if wanted in ("text", "diffusion") and wanted != modality:
                raise ConfigError(f"{key}: {model.path} is a {modality} model; {self.planned.kind} needs a {wanted} model")
            self.findings.ok(f"{key}: {model.path} is a {modality} model")
            return modality
        return None

    def _data(self, name: str, options: Any) -> list[dict[str, Any]]:
        """The first rows; [] when there are none to look at."""
        if not isinstance(options, DataOptions):
            return []
        key = f"{self.prefix}{name}"
        if "${" in options.path:
            self.findings.ok(f"{key}.path: made by an earlier stage ({options.path})")
            return []
        with self.findings.guard(key):
            # Evaluations read the same rows whatever the seed, so that two of them can be compared.
            rows = load_rows(options, seed=0 if self.planned.kind == "evaluate" else self.planned.seed, key=key)
            examples = first_rows(rows, LOOKED_AT)
            self.findings.ok(f"{key}: {len(rows)} rows; columns {', '.join(examples[0])}")
            check_values(examples, self.findings)
            return examples
        return []

    def _columns(self, rows: list[dict[str, Any]]) -> None:
        """Whether the columns serve the method."""
        if self.method is None:
            return
        uses = possible_uses(rows)
        images = self.method.modality == "diffusion" and not self.method.rollout
        wanted = "prompts" if self.method.rollout else "pairs" if self._fields(rows) else "samples"
        if any(use.kind == wanted and use.images == images for use in uses):
            self.findings.ok(f"{self.prefix}data: the columns serve {self.method.name}")
        elif self.method.modality in ("text", "diffusion"):
            offer = "; ".join(use.methods for use in uses) or "nothing known"
            self.findings.fail(f"{self.prefix}data: {self.method.name} needs {NEEDED[wanted, images]}; these columns "
                               f"({', '.join(rows[0])}) serve {offer}. Map names with data.columns: {{theirs: ours}}")

    def _fields(self, rows: list[dict[str, Any]]) -> tuple[str, ...]:
        """The samples of a row that the method reads; () for the only one."""
        from mmalign.methods.preference import PreferenceOptions, UnpairedOptions, preference_terms
        from mmalign.training.preference import SAMPLE, sample_fields

        declared: tuple[str, ...] = getattr(type(self.options), "pair_fields", ())
        if declared:
            return declared
        if isinstance(self.options, PreferenceOptions):
            with contextlib.suppress(ConfigError):  # reported with the losses
                fields = sample_fields(preference_terms(self.options), unpaired=False)
                return tuple(field for field in fields if field != SAMPLE)
            return ("chosen", "rejected")
        if isinstance(self.options, UnpairedOptions) and "label" not in rows[0]:
            return ("chosen", "rejected")  # pairs are taken apart
        return ()

    def _encoding(self, rows: list[dict[str, Any]]) -> None:
        """Masks and truncation of the first rows with the model's own tokenizer."""
        model = getattr(self.options, "model", None)
        assert isinstance(model, ModelOptions)
        with self.findings.guard(f"{self.prefix}encoding"):
            tokenizer = local_tokenizer(model.adapter or model.path, key=f"{self.prefix}model.path")
            encoding = getattr(self.options, "encoding", None) or TextEncoding()
            if self.method is None or self.method.rollout:
                if "prompt" in rows[0]:
                    check_prompts(rows, tokenizer, self.findings, encoding)
            else:
                check_encoding(rows, tokenizer, encoding, self._fields(rows), self.findings, what=f"{self.prefix}encoding")

    def _pictures(self, rows: list[dict[str, Any]]) -> None:
        """The first pictures, and captions that the model's text encoder would cut."""
        model = getattr(self.options, "model", None)
        assert isinstance(model, ModelOptions)
        with self.findings.guard(f"{self.prefix}data"):
            folder = Path(resolve_model_path(model.path))
            check_pictures(rows, self._fields(rows), folder, self.findings, what=f"{self.prefix}data")

    def _rewards(self, name: str, rewards: Any, rows: list[dict[str, Any]]) -> None:
        for index, option in enumerate(rewards or []):
            if not isinstance(option, RewardOptions):
                continue
            key = f"{self.prefix}{name}[{index}]"
            with self.findings.guard(key):
                missing = missing_columns(option, list(rows[0]), config_folder=self.plan.config_folder, key=key)
                if missing:
                    raise ConfigError(f"{key}: reward {option.name!r} needs the data column {missing[0]!r}; columns are "
                                      f"{', '.join(rows[0])}")
                once = (option.model_dump_json(), repr(_samples(rows)))
                if once not in self.rewards_done:
                    self.rewards_done.add(once)
                    check_reward_spec(option, self.findings, samples=_samples(rows), key=key,
                                      config_folder=self.plan.config_folder)

    def _leak(self, rows: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> None:
        if self.method is None or self.method.modality != "text":
            return  # captions of a closed vocabulary are shared on purpose
        known = {prompt_text(row.get("prompt")) for row in rows}
        shared = sum(prompt_text(row.get("prompt")) in known for row in held_out if row.get("prompt") is not None)
        if shared:
            self.findings.warn(f"{self.prefix}evaluation.data: {shared} of {len(held_out)} held-out prompts are in the "
                               "training data")


def _samples(rows: list[dict[str, Any]]) -> list[Mapping[str, Any]] | None:
    """A row with its own sample, one with another row's, and (text) one with an empty sample; None when rows hold none.

    Three right answers would all get the same value, and an empty completion is what untrained models write.
    """
    if len(rows) < 3 or "prompt" not in rows[0]:
        return None
    if rows[0].get("images"):
        pictures = [row["images"][0] for row in rows[:3]]
        return [{**row, "image": pictures[i]} for row, i in zip(rows[:3], (0, 2, 1), strict=True)]
    source = next((name for name in ("completion", "gold", "answer", "chosen") if rows[0].get(name) is not None), None)
    if source is None or not isinstance(rows[0][source], (str, list)):
        return None
    other = next((row[source] for row in rows if row[source] != rows[1][source]), rows[1][source])
    completions = [rows[0][source], other, ""]
    if is_messages(rows[0]["prompt"]):
        completions = [[{"role": "assistant", "content": c}] if isinstance(c, str) else c for c in completions]
    return [{**row, "completion": c} for row, c in zip(rows[:3], completions, strict=True)]


def _known(find: Callable[[str], Any], name: str, key: str) -> Any:
    try:
        return find(name)
    except MmalignError:
        raise
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None
