"""Writes docs/configuration.md and docs/methods.md from the code: ``python scripts/docs.py`` (``--check`` only compares)."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mmalign.config import FieldDoc, document, plain_markup
from mmalign.core.registry import Registry

DOCS = Path(__file__).resolve().parent.parent / "docs"
NOTE = "<!-- Written by scripts/docs.py from the code; edit the code and run it again. -->\n"
ARGUMENTS_OF_CALLERS = ("mask", "vocabulary")


def main(arguments: Sequence[str]) -> int:
    """Write the pages, or with ``--check`` say which are out of date; returns the exit status."""
    stale = [name for name, text in pages().items() if (DOCS / name).read_text(encoding="utf-8") != text] \
        if all((DOCS / name).is_file() for name in pages()) else list(pages())
    if "--check" in arguments:
        print(f"out of date: {', '.join(stale)}; run python scripts/docs.py" if stale else "the generated pages are up to date")
        return bool(stale)
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
        print(DOCS / name)
    return 0


def pages() -> dict[str, str]:
    """File name -> text of every generated page."""
    written = {"methods.md": methods_page(), "configuration.md": configuration_page()}
    return {name: re.sub(r"\n{3,}", "\n\n", text).strip() + "\n" for name, text in written.items()}


# -- Markdown ------------------------------------------------------------------------------------------------------------


def cell(text: str) -> str:
    """Text that may stand in a table cell."""
    return " ".join(text.split()).replace("|", "\\|") or " "


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(cell(value) for value in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def sentence(function: Any) -> str:
    """The first paragraph of a docstring on one line."""
    return plain_markup((inspect.getdoc(function) or "").split("\n\n")[0])


def options_of(function: Callable[..., Any]) -> str:
    """Options with their defaults: the keyword-only parameters of a function, all parameters of a class."""
    parameters = inspect.signature(function).parameters.values()
    shown = [p.name if p.default is p.empty else f"{p.name}={_default(p.default)}" for p in parameters
             if (p.kind is p.KEYWORD_ONLY or (inspect.isclass(function) and p.kind is p.POSITIONAL_OR_KEYWORD))
             and p.name not in ARGUMENTS_OF_CALLERS]
    return ", ".join(f"`{text}`" for text in shown)


def _default(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"[{', '.join(map(str, value))}]" if isinstance(value, (list, tuple)) else str(value)


def names(registry: Registry[Any], name: str) -> str:
    """A registered name with its aliases."""
    others = registry.aliases(name)
    return f"`{name}`" + (f" ({', '.join(f'`{alias}`' for alias in others)})" if others else "")


# -- methods.md ----------------------------------------------------------------------------------------------------------


def methods_page() -> str:
    """The tables of methods, losses, advantages, rewards, tuning modes and assets."""
    from mmalign.core.advantages import ADVANTAGES
    from mmalign.core.policy_gradient import POLICY_LOSSES
    from mmalign.core.preference import POINTWISE_LOSSES
    from mmalign.core.reduce import REDUCTIONS
    from mmalign.core.supervised import SUPERVISED_LOSSES
    from mmalign.methods.preference import COMPOSITE_LOSSES
    from mmalign.training.advantages import STATISTICS
    from mmalign.training.tuning import TUNINGS

    parts = [NOTE, "# Methods\n", table(("method", "modality", "what it does", "paper"), _method_rows())]
    parts += ["\nA method fixes a few choices from the tables below; each of them can be set in its configuration.\n"]
    parts += ["\n## Supervised losses\n", "Entries of `losses:`; `[B, A]`, one value per action.\n"]
    parts += [_functions(SUPERVISED_LOSSES)]
    parts += ["\n## Preference losses\n", PREFERENCE_NOTE, _preference_table()]
    parts += ["\n### Composites\n", "Published losses that are weighted lists of others; each is one entry of `losses:`.\n",
              _functions(COMPOSITE_LOSSES)]
    parts += ["\n### Unpaired losses\n", "Entries of `losses:` of methods that learn from single labelled samples.\n",
              _functions(POINTWISE_LOSSES)]
    parts += ["\n## Policy losses\n", "`loss:` of the policy-gradient methods.\n", _functions(POLICY_LOSSES)]
    parts += ["\n## Reductions\n", "How losses become one number. Every denominator counts the whole update on all processes.\n",
              table(("name", "within a row", "divided by"), [_reduction_row(REDUCTIONS, name) for name in REDUCTIONS])]
    parts += ["\n## Advantages\n", "`advantage:` of the policy-gradient methods. NaN rewards get 0 and stay out of baselines.\n"]
    rows = [(names(ADVANTAGES, n), options_of(ADVANTAGES.get(n)), sentence(ADVANTAGES.get(n))) for n in ADVANTAGES]
    rows += [(f"`{name}`", options_of(make), sentence(make)) for name, make in STATISTICS.items()]
    parts.append(table(("name", "options", "meaning"), rows))
    parts += ["\n## Rewards\n", REWARD_NOTE, _reward_table()]
    parts += ["\n## Tuning modes\n", TUNING_NOTE, ", ".join(f"`{name}`" for name in TUNINGS) + ".\n"]
    parts += ["\n## Assets\n", "Models and data sets for `asset:NAME`.\n", _asset_table()]
    return "\n".join(part for part in parts if part)


PREFERENCE_NOTE = """Entries of `losses:`; `[B]`, one value per pair. *log-ratio* says whether a sample's score is the sum or the
mean of its action log-probs; *reference* whether it is taken relative to the frozen model. Supervised losses with
`on: chosen` may stand beside them.
"""
REWARD_NOTE = """Entries of `rewards:`. Functions of your own are written `file.py:function` or `package.module:function`; see
[Custom rewards](custom-rewards.md).
"""
TUNING_NOTE = """`tuning: {name: ..., <options>}`. `full` takes `match` and `freeze` (shell patterns of parameter names);
the others are types of the peft package and take the fields of its configuration classes.
"""
COUNTS = {"actions": "actions of the update", "rows": "rows of the update", "nothing": "1"}


def _reduction_row(registry: Registry[Any], name: str) -> tuple[str, ...]:
    row = registry.get(name)
    length = "`norm_length`" if row.uses_norm_length else ""
    counted = COUNTS[row.counts] if row.counts != "nothing" or not length else ""
    return names(registry, name), "mean" if row.mean_within_row else "sum", " x ".join(filter(None, (counted, length)))


def _method_rows() -> list[tuple[str, ...]]:
    from mmalign.methods.registry import METHODS

    if "sft" not in METHODS:
        sys.exit("the methods of text_llm are not registered: install the package first (pip install -e .)")
    entries = [METHODS.get(name) for name in METHODS]
    entries.sort(key=lambda entry: (entry.modality != "text", entry.modality, entry.name))
    return [(_method_link(entry.name), entry.modality, entry.summary, entry.paper) for entry in entries]


def _method_link(name: str) -> str:
    return f"[{name}](methods/{name}.md)" if (DOCS / "methods" / f"{name}.md").is_file() else name


def _functions(registry: Registry[Any]) -> str:
    return table(("name", "options", "meaning"),
                 [(names(registry, n), options_of(registry.get(n)), sentence(registry.get(n))) for n in registry])


def _preference_table() -> str:
    from mmalign.core.preference import PREFERENCE_LOSSES

    rows = []
    for name in PREFERENCE_LOSSES:
        row = PREFERENCE_LOSSES.get(name)
        rows.append((names(PREFERENCE_LOSSES, name), options_of(row.function), row.logratio, "yes" if row.reference else "no",
                     sentence(row.function)))
    return table(("name", "options", "log-ratio", "reference", "meaning"), rows)


def _reward_table() -> str:
    from mmalign.rewards.registry import REWARDS, traits

    rows = []
    for name in REWARDS:
        function = REWARDS.get(name)
        declared = traits(function)
        limits = f"{declared.range[0]:g} to {declared.range[1]:g}" if declared.range else ""
        needed = ", ".join(f"`{column}`" for column in declared.needs)
        rows.append((names(REWARDS, name), options_of(function), limits, needed, sentence(function)))
    return table(("name", "options", "range", "columns", "meaning"), rows)


def _asset_table() -> str:
    from mmalign.data.assets import list_assets

    return table(("asset", "kind", "size", "what it is"),
                 [(f"`asset:{a.name}`", a.kind, a.size, a.description) for a in list_assets()])


# -- configuration.md ----------------------------------------------------------------------------------------------------


def configuration_page() -> str:
    """Every option of every method and stage."""
    from mmalign.methods.registry import METHODS
    from mmalign.policies.base import DiffusionSampling, TextSampling
    from mmalign.stages import STAGES
    from mmalign.training.options import TrainOptions

    shared = document(TrainOptions)
    parts = [NOTE, INTRODUCTION, "\n## Training methods\n", "Every training method has these options.\n", option_table(shared)]
    for name in METHODS:
        entry = METHODS.get(name)
        own = [row for row in document(entry.options) if row not in shared]
        parts += [f"\n### {name}\n", f"{entry.summary} {entry.paper}. Beside, or instead of, the options above:\n"]
        parts.append(option_table(own) if own else "Nothing further.\n")
    parts += ["\n## Stages\n", "`kind: NAME` in place of `method: NAME`.\n"]
    for name in STAGES:
        kind = STAGES.get(name)
        outputs = ", ".join(f"`{output}`" for output in kind.outputs)
        parts += [f"\n### {name}\n", f"{kind.summary} Outputs: {outputs}.\n", option_table(document(kind.options))]
    parts += ["\n## Sampling\n", "`sampling:` of the stages that sample, by the model's modality.\n"]
    for title, options in (("Text", TextSampling), ("Diffusion", DiffusionSampling)):
        parts += [f"\n### {title}\n", option_table(document(options))]
    return "\n".join(parts)


def option_table(rows: Sequence[FieldDoc]) -> str:
    """Options with type, default and meaning."""
    return table(("option", "type", "default", "meaning"),
                 [(f"`{row.path}`", f"`{row.type}`", f"`{row.default}`", row.description) for row in rows])


INTRODUCTION = """# Configuration

A configuration is a YAML file of one stage or of a pipeline. Beside the options below it has

| key | meaning |
|---|---|
| `method` or `kind` | what runs: a training method, or a kind of stage |
| `run_dir` | where the run is written; default `runs/<file name>` |
| `seed` | the seed of everything random; default 0. Stages of a pipeline get seeds of their own from it and their name |
| `stages` | a pipeline: a list of such stages, each with a `name`, run in order |

In a pipeline `${stages.NAME.OUTPUT}` is an output of an earlier stage, and `${run_dir}`, `${seed}` and `${config_dir}` are
known everywhere. Unknown keys are refused, with the nearest known one. Floats may be written `1e-5`. A component such as
`loss`, `advantage`, `tuning` or an entry of `losses` is `{name: ..., <its own arguments>}`; a bare name is enough when there
are none. Keys of lists are shown as if there were one entry: `optimizers.lr` is `lr` of every entry of `optimizers`.
"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
