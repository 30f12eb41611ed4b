"""Samples of two evaluations side by side: the same prompts at the same seeds, matched by position, never selected."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mmalign.report.charts import number
from mmalign.report.runs import Run, StageRecord, read_json_lines

MAX_SAMPLES = 24
"""Samples shown per comparison."""
MAX_CHARACTERS = 1500
"""Characters shown of a text."""
_LONG_SIDE = 256
"""Larger images are shrunk to this many pixels."""
_EMBED_AS_IT_IS = 40_000
"""Image files up to this many bytes are embedded unchanged."""

Sample = Mapping[str, Any]


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Lines of ``samples.jsonl`` in ``folder`` or in its ``samples/``, with their folder; [] when there is none."""
    for file in (folder / "samples" / "samples.jsonl", folder / "samples.jsonl"):
        if file.is_file():
            return [{**record, "_folder": str(file.parent)} for record in read_json_lines(file)]
    return []


def samples_section(run: Run, stage: StageRecord) -> str:
    """The samples of ``stage`` beside those of the evaluation it compares with; "" when it kept none.

    A training stage that evaluated while training shows the first and the last of these evaluations.
    """
    other = stage.config.get("compare_with")
    after = read_samples(stage.folder)
    if after:
        before = _other_samples(run, str(other)) if other else []
        return comparison(before, after, ("before", "after") if before else ("", "sample"))
    steps = _evaluated_steps(stage.folder / "samples")
    if not steps:
        return ""
    first, last = steps[0], steps[-1]
    if first == last:
        return comparison([], read_samples(last), ("", last.name))
    return comparison(read_samples(first), read_samples(last), (first.name, last.name))


def _other_samples(run: Run, path: str) -> list[dict[str, Any]]:
    if Path(path).is_dir() and (found := read_samples(Path(path))):
        return found
    stage = run.stage_at(path)
    return read_samples(stage.folder) if stage is not None else []


def _evaluated_steps(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    steps = [p for p in folder.iterdir() if p.name.startswith("step-") and p.name[5:].isdigit()]
    return sorted(steps, key=lambda p: int(p.name[5:]))


def comparison(before: Sequence[Sample], after: Sequence[Sample], labels: tuple[str, str]) -> str:
    """Both lists as HTML: a grid of image pairs, or a table of texts, in the order in which they were drawn."""
    shown = choose(after)
    if not shown:
        return ""
    matched = len(before) == len(after)
    pairs = [(before[i] if matched else None, after[i]) for i in shown]
    body = _image_grid(pairs, labels) if "image" in after[shown[0]] else _text_table(pairs, labels)
    note = f"{len(shown)} of {len(after)} samples in the order drawn: the first of every prompt, then second ones; none picked."
    if before and not matched:
        note += f" The other evaluation has {len(before)} samples, so the two cannot be matched."
    return f'<p class="note">{note}</p>{body}'


def choose(samples: Sequence[Sample], limit: int = MAX_SAMPLES) -> list[int]:
    """Positions to show: the first sample of every prompt, then second ones, up to ``limit``, in their order."""
    seen: dict[str, int] = {}
    ranked = []
    for position, sample in enumerate(samples):
        prompt = json.dumps(sample.get("prompt"), sort_keys=True, default=str)
        ranked.append((seen.get(prompt, 0), position))
        seen[prompt] = seen.get(prompt, 0) + 1
    return sorted(position for _, position in sorted(ranked)[:limit])


def _image_grid(pairs: Sequence[tuple[Sample | None, Sample]], labels: tuple[str, str]) -> str:
    cells = []
    for before, after in pairs:
        sides = [(labels[0], before)] if before is not None else []
        images = "".join(_image(label, sample) for label, sample in [*sides, (labels[1], after)])
        cells.append(f'<div class="pair"><p class="prompt">{_text(after.get("prompt"), 300)}</p><div>{images}</div></div>')
    return f'<div class="grid-of-pairs">{"".join(cells)}</div>'


def _image(label: str, sample: Sample) -> str:
    # Only the file's own name counts: a sample list may not point outside of its folder.
    file = Path(str(sample["_folder"])) / Path(str(sample.get("image", ""))).name
    source, small = embed_image(file)
    picture = f'<img src="{source}" alt="{escape(label)}" class="{"pixels" if small else ""}">' if source \
        else '<span class="missing">image missing</span>'
    return f"<figure>{picture}<figcaption>{escape(label)} {_rewards(sample)}</figcaption></figure>"


def embed_image(file: Path) -> tuple[str, bool]:
    """A ``data:`` address of an image file, shrunk when large, and whether it is small enough to be shown enlarged.

    ("", False) for a file that is missing or no image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            small = max(image.size) <= 128
            if file.stat().st_size <= _EMBED_AS_IT_IS and image.format == "PNG":
                return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}", small
            copy = image.convert("RGB")
        copy.thumbnail((_LONG_SIDE, _LONG_SIDE))
    except (OSError, UnidentifiedImageError):
        return "", False
    buffer = io.BytesIO()
    copy.save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", small


def _text_table(pairs: Sequence[tuple[Sample | None, Sample]], labels: tuple[str, str]) -> str:
    both = any(before is not None for before, _ in pairs)
    head = f"<th>prompt</th>{f'<th>{escape(labels[0])}</th>' if both else ''}<th>{escape(labels[1])}</th>"
    rows = []
    for before, after in pairs:
        answer = f'<p class="answer">answer: {_text(after["answer"], 200)}</p>' if after.get("answer") is not None else ""
        cells = [f"<td>{_text(after.get('prompt'), 600)}{answer}</td>"]
        cells += [_completion(before)] if both else []
        rows.append(f"<tr>{''.join(cells)}{_completion(after)}</tr>")
    return f'<div class="wide"><table class="texts"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _completion(sample: Sample | None) -> str:
    if sample is None:
        return "<td></td>"
    return f"<td>{_text(sample.get('completion'), MAX_CHARACTERS)}<p>{_rewards(sample)}</p></td>"


def _text(value: Any, limit: int) -> str:
    """Text or messages, escaped, cut at ``limit`` characters with a note of how much is missing."""
    if isinstance(value, list) and value and all(isinstance(turn, Mapping) and "role" in turn for turn in value):
        parts = []
        for turn in value:
            content = turn.get("content")
            shown = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            parts.append(f'<span class="role">{escape(str(turn["role"]))}</span> {_cut(shown, limit)}')
        return f'<div class="model-text">{"<br>".join(parts)}</div>'
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return f'<div class="model-text">{_cut(shown, limit)}</div>'


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return escape(text) or '<span class="missing">(empty)</span>'
    return f'{escape(text[:limit])}<span class="missing"> … {len(text) - limit} more characters</span>'


def _rewards(sample: Sample) -> str:
    rewards = sample.get("rewards")
    if not isinstance(rewards, Mapping):
        return ""
    chips = []
    for name, value in rewards.items():
        shown = number(float(value)) if isinstance(value, (int, float)) else "none"
        chips.append(f'<span class="chip">{escape(str(name))} {shown}</span>')
    return "".join(chips)
