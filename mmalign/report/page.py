"""The HTML page of a run, put together from its stages."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mmalign.config import dump_yaml
from mmalign.report.charts import Series, duration, line_panel, number, plus_minus, signed, stacked_bar
from mmalign.report.diagnosis import diagnose
from mmalign.report.runs import Result, Run, StageRecord, read_run, results
from mmalign.report.samples import samples_section
from mmalign.report.style import STYLE

PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss", ("loss",)), ("reward", ("reward",)), ("reward: *", ()), ("accuracy", ("accuracy",)),
    ("implicit reward of chosen and rejected", ("rewards/chosen", "rewards/rejected")), ("reward margin", ("rewards/margin",)),
    ("log-prob of chosen and rejected", ("logp/chosen", "logp/rejected")), ("nll", ("nll",)),
    ("token accuracy", ("token_accuracy",)),
    ("KL to the reference", ("kl",)), ("KL to the sampling policy", ("kl_old",)), ("entropy", ("entropy",)),
    ("share of clipped actions", ("clipped/low", "clipped/high")),
    ("groups without spread, cut-off completions", ("groups/zero_spread", "completions/cut_off")),
    ("actions per sample", ("actions/mean",)), ("gradient norm", ("grad_norm",)), ("learning rate", ("lr",)),
    ("replay gap of log-probs", ("rollout_gap/mean", "rollout_gap/max")), ("examples per second", ("examples_per_second",)),
)
"""Panels in their order ("reward: *" stands for one panel per reward); other numbers follow, one panel each."""

_NOT_CURVES = ("step", "epoch", "seconds", "reward_std")


def page(run: Run) -> str:
    """The whole page."""
    sections = [_header(run), _results_section(run), _compared_samples(run), _timeline(run)]
    sections += [_stage_section(run, stage, position) for position, stage in enumerate(run.stages)]
    sections.append(_provenance(run))
    body = "".join(section for section in sections if section)
    title = escape(run.folder.resolve().name)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


def _header(run: Run) -> str:
    unfinished = [stage.name for stage in run.stages if not stage.finished]
    total = sum(stage.seconds for stage in run.stages)
    facts = [f"{len(run.stages)} stage{'s' if len(run.stages) != 1 else ''}", duration(total)]
    finished = [str(stage.manifest["finished"]) for stage in run.stages if stage.manifest.get("finished")]
    facts += [f"finished {max(finished)}"] if finished and not unfinished else []
    status = f'<p class="warning">Not finished: {escape(", ".join(unfinished))}.</p>' if unfinished else ""
    return (f'<header><h1>{escape(run.folder.resolve().name)}</h1><p class="note">{escape(" · ".join(facts))}</p>'
            f"{status}</header>")


def _results_section(run: Run) -> str:
    bases = {stage.name for stage in run.stages if run.is_base(stage)}
    found = [result for result in results(run) if result.compared or result.stage not in bases]
    if not found:
        return ""
    compared = [r for r in found if r.compared]
    parts = ["<section><h2>Results</h2>"]
    if compared:
        rows = [_comparison_row(r) for r in compared]
        parts.append(_table(("evaluation", "reward", "before", "after", "difference", "in standard errors"), rows, headline=True))
        parts.append('<p class="note">Differences are paired: the same prompts at the same seeds before and after. ± is one '
                     "standard error; a difference of less than two is not distinguishable from none.</p>")
    alone = [r for r in found if not r.compared]
    if alone:
        rows = [(escape(r.stage), escape(r.reward), f"{number(r.after)} ± {number(r.after_error)}") for r in alone]
        parts.append(_table(("evaluation", "reward", "mean"), rows))
    return "".join(parts) + "</section>"


def _comparison_row(result: Result) -> tuple[str, ...]:
    kind = "better" if result.ratio >= 2 else "worse" if result.ratio <= -2 else "same"
    return (escape(result.stage), escape(result.reward), number(result.before), f"<b>{number(result.after)}</b>",
            f'<span class="{kind}">{plus_minus(result.difference, result.error)}</span>',
            f'<span class="{kind}">{signed(round(result.ratio, 1))}</span>')


def _table(head: Iterable[str], rows: Iterable[Sequence[str]], *, headline: bool = False) -> str:
    """A table of cells that are HTML already."""
    columns = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (f'<div class="wide"><table class="{"headline" if headline else "plain"}"><thead><tr>{columns}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")


def _compared_samples(run: Run) -> str:
    parts = []
    for stage in run.stages:
        if stage.config.get("compare_with") and (samples := samples_section(run, stage)):
            parts.append(f"<h3>{escape(stage.name)}</h3>{samples}")
    return f"<section><h2>Samples before and after</h2>{''.join(parts)}</section>" if parts else ""


def _timeline(run: Run) -> str:
    if len(run.stages) < 2:
        return ""
    bar = stacked_bar({stage.name: stage.seconds for stage in run.stages})
    return f"<section><h2>Time</h2>{bar}</section>" if bar else ""


def _stage_section(run: Run, stage: StageRecord, position: int) -> str:
    facts = [stage.kind, duration(stage.seconds)] if stage.kind != stage.name else [duration(stage.seconds)]
    facts += [] if stage.finished else ["not finished"]
    small = escape(", ".join(fact for fact in facts if fact))
    parts = [f'<section id="stage-{position}"><h2>{escape(stage.name)} <small>{small}</small></h2>']
    parts += [f'<p class="{"warning" if remark.serious else "remark"}">{escape(remark.text)}</p>'
              for remark in diagnose(stage.records)]
    parts.append(curves(stage.records))
    parts.append(figures(stage))
    split = phase_seconds(stage.records)
    if split:
        parts.append(f"<h3>Where the time went</h3>{stacked_bar(split)}")
    shown_above = bool(stage.config.get("compare_with")) or run.is_base(stage)
    if not shown_above and (samples := samples_section(run, stage)):
        parts.append(f"<h3>Samples</h3>{samples}")
    parts.append(_final_numbers(stage))
    if stage.config:
        parts.append(f"<details><summary>Configuration of {escape(stage.name)}</summary><pre>{escape(dump_yaml(stage.config))}"
                     "</pre></details>")
    return "".join(parts) + "</section>"


def figures(stage: StageRecord) -> str:
    """Pictures that a stage left beside its manifest (heat maps, histograms), embedded; "" when there are none."""
    shown = [f'<figure><img src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" '
             f'alt="{escape(path.stem)}"><figcaption>{escape(path.stem.replace("_", " "))}</figcaption></figure>'
             for path in sorted(stage.folder.glob("*.png"))]
    return "".join(shown)


def _final_numbers(stage: StageRecord) -> str:
    if stage.records or not stage.numbers:
        return ""
    rows = [(escape(name), number(value)) for name, value in stage.numbers.items()]
    return f"<details><summary>Numbers</summary>{_table(('metric', 'value'), rows)}</details>"


def curves(records: Sequence[dict[str, Any]]) -> str:
    """Small multiples of every number in the log."""
    if not records:
        return ""
    steps = [float(record.get("step", position + 1)) for position, record in enumerate(records)]
    columns = {name: [_float(record.get(name)) for record in records] for name in _curve_names(records)}
    terms = [name for name in columns if name.startswith("loss/")]
    panels, used = [], {*_NOT_CURVES, *(terms if len(terms) == 1 and "loss" in columns else ())}  # one term is the loss
    specified = [panel for item in PANELS for panel in (_reward_panels(columns) if item[0] == "reward: *" else [item])]
    for title, names in [*specified, *_loss_panels(columns)]:
        present = [name for name in names if name in columns and name not in used]
        used |= set(present)
        spread = {"reward": "reward_std"}
        panels.append(line_panel(title, [
            _series(name, steps, columns, _spread_of(name, spread), records) for name in present
        ]))
    used |= {_spread_of(name, {}) or "" for name in columns}
    panels += [line_panel(name, [_series(name, steps, columns, None, records)]) for name in columns if name not in used]
    shown = "".join(panels)
    return f'<div class="panels">{shown}</div>' if shown else ""


def _curve_names(records: Sequence[dict[str, Any]]) -> list[str]:
    """Numeric keys in order of first appearance, without bookkeeping."""
    names: dict[str, None] = {}
    for record in records:
        for name, value in record.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name not in _NOT_CURVES \
                    and not name.startswith("seconds/") and not name.endswith(("/seconds", "/none_fraction", "/failed")):
                names[name] = None
    # A share of inapplicable or failed samples is worth a panel only when there were some.
    for name in {key for record in records for key in record if key.endswith(("/none_fraction", "/failed"))}:
        if any(_float(record.get(name)) > 0 for record in records):
            names[name] = None
    return list(names)


def _reward_panels(columns: dict[str, list[float]]) -> list[tuple[str, tuple[str, ...]]]:
    return [(f"reward: {name.split('/')[1]}", (name,)) for name in columns
            if name.startswith("rewards/") and name.endswith("/mean")]


def _loss_panels(columns: dict[str, list[float]]) -> list[tuple[str, tuple[str, ...]]]:
    terms = tuple(name for name in columns if name.startswith("loss/"))
    return [("loss terms", terms)]


def _spread_of(name: str, known: dict[str, str]) -> str | None:
    if name in known:
        return known[name]
    return name.removesuffix("/mean") + "/std" if name.startswith("rewards/") and name.endswith("/mean") else None


def _series(
    name: str, steps: list[float], columns: dict[str, list[float]], spread: str | None, records: Sequence[dict[str, Any]],
) -> Series:
    half = [_float(record.get(spread)) for record in records] if spread else None
    if half is not None and not any(math.isfinite(value) for value in half):
        half = None
    return Series(name.rpartition("/")[2], steps, columns[name], half)


def _float(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan


def phase_seconds(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Seconds per phase over the logged updates, largest first; what no phase accounts for is "other"."""
    split: dict[str, float] = {}
    total = 0.0
    for record in records:
        total += float(record.get("seconds") or 0.0)
        for name, value in record.items():
            if name.startswith("seconds/") and isinstance(value, (int, float)):
                split[name[8:]] = split.get(name[8:], 0.0) + value
    other = total - sum(split.values())
    if split and other > 0.01 * total:
        split["other"] = other
    return dict(sorted(split.items(), key=lambda item: -item[1]))


def _provenance(run: Run) -> str:
    parts = ["<section><h2>Provenance</h2>"]
    rows = [(escape(s.name), escape(s.kind), escape(str(s.manifest.get("seed", "–"))),
             f"<code>{escape(str(s.manifest.get('fingerprint', '–')))}</code>", escape(str(s.manifest.get("started", "–"))),
             duration(s.seconds), "done" if s.finished else "not finished") for s in run.stages]
    parts.append(_table(("stage", "kind", "seed", "fingerprint", "started", "duration", "status"), rows))
    versions = {k: v for s in run.stages for k, v in (s.manifest.get("versions") or {}).items()}
    commits = sorted({str(s.manifest["git"]) for s in run.stages if s.manifest.get("git")})
    pairs = [(escape(name), escape(str(value))) for name, value in versions.items()]
    pairs += [("git commit", f"<code>{escape(commit)}</code>") for commit in commits]
    if pairs:
        parts.append(_table(("package", "version"), pairs))
    if run.config_text:
        parts.append(f"<details><summary>config.yaml</summary><pre>{escape(run.config_text)}</pre></details>")
    return "".join(parts) + "</section>"


def write_report(run_dir: Path, output: Path | None = None) -> Path:
    """Write the page of a single-stage or pipeline directory; returns its path (default ``run_dir/report.html``).

    Raises ConfigError when ``run_dir`` does not exist or holds no run.
    """
    run = read_run(run_dir)
    output = output or run_dir / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    partial.write_text(page(run), encoding="utf-8")
    partial.replace(output)
    return output
