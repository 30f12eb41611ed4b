"""The double_captions stage: a caption for each picture of a preference pair, and perturbed ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import field_validator

import mmalign.data.captions_models  # noqa: F401  (registers the captioners and perturbers that are models)
from mmalign.config import Component, Options, bind
from mmalign.core.registry import Registry
from mmalign.data.captions import (
    CAPTIONERS,
    PERTURBERS,
    CaptionerOptions,
    Level,
    Perturber,
    PerturberOptions,
    checked_captions,
    column_of,
    content_words,
    level_of,
)
from mmalign.data.captions_report import caption_report, save_figure, score_columns
from mmalign.data.image_pairs import SIDES, image_pairs
from mmalign.data.loading import DataOptions, load_rows
from mmalign.data.preference import Examples, column_names
from mmalign.errors import ConfigError, DataError
from mmalign.policies.image_examples import read_image
from mmalign.policies.loading import resolve_model_path
from mmalign.rewards.base import RewardOptions, RewardSet, build_rewards
from mmalign.rewards.registry import load_object
from mmalign.stage_kinds.records import JUDGED_PER_CHUNK, Chunk, write_in_chunks
from mmalign.stages import StageContext, StageResult, stage
from mmalign.training.checkpoint import write_json

OWN = ("chosen_caption", "rejected_caption")


class DoubleCaptionsOptions(Options):
    """Options of the double_captions stage."""

    data: DataOptions
    """Pairs: ``prompt``, ``chosen``, ``rejected``; or as in Pick-a-Pic ``caption``, ``jpg_0``, ``jpg_1``, ``label_0``."""
    captioner: CaptionerOptions | None = None
    """Writes the caption of each picture: image_text_model (with ``model:``), shapes (reads ``asset:shapes``), or
    ``file.py:function`` taking (images, prompts). null keeps the columns chosen_caption and rejected_caption of the data;
    without them only the prompt is perturbed."""
    perturber: PerturberOptions | None = PerturberOptions(name="words")
    """Perturbs captions: words (rules), text_model (with ``model:``), or ``file.py:function`` taking (texts, level, seed); null
    perturbs nothing."""
    levels: list[Level] = ["weak", "medium", "strong"]
    """Strengths of the perturbation; each becomes a column."""
    perturb: list[Literal["rejected_caption", "prompt"]] = ["rejected_caption", "prompt"]
    """What is perturbed: the caption of the rejected picture (variant h of dcpo) and the prompt (variant p)."""
    score: RewardOptions | None = None
    """A reward of (prompt, picture) such as clip_score, pick_score or shapes_match, for the diagnostics; null scores nothing."""
    encoder: str | None = None
    """A diffusion model (or tokenizer) whose limit says which captions are too long; null does not count them."""
    rows_per_chunk: int = JUDGED_PER_CHUNK
    """Pairs captioned and written together; a killed stage resumes at the first chunk not written."""

    @field_validator("levels")
    @classmethod
    def _distinct(cls, levels: list[str]) -> list[str]:
        if len(set(levels)) < len(levels):
            raise ValueError(f"levels holds an entry twice: {levels}")
        return levels

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        if self.rows_per_chunk < 1:
            raise ValueError(f"rows_per_chunk must be at least 1, not {self.rows_per_chunk}")
        if self.captioner is None and (self.perturber is None or not self.perturb or not self.levels):
            raise ValueError("nothing to do: set captioner, or perturber with perturb and levels")


@dataclass
class CaptionWork:
    """The loaded parts that turn pairs into pairs with captions."""

    captioner: Callable[..., Sequence[str]] | None
    perturber: Perturber | None
    perturb: Sequence[str]
    """Columns that are perturbed."""
    levels: Sequence[str]
    scorer: RewardSet | None
    seed: int

    @property
    def columns(self) -> list[str]:
        """Caption columns of a finished row."""
        own = list(OWN) if self.captioner is not None or "rejected_caption" in self.perturb else []
        return ["prompt", *own, *(column_of(name, level) for name in self.perturb for level in self.levels)]

    def __call__(self, examples: Sequence[Mapping[str, Any]], first: int = 0) -> list[dict[str, Any]]:
        """Rows of pairs with their captions and scores; ``first`` is the position of row 0, for messages."""
        records = [dict(example) for example in examples]
        pictures = {side: [_picture(row, side, first + i) for i, row in enumerate(records)] for side in SIDES}
        for i, row in enumerate(records):
            if not isinstance(row.get("prompt"), str):
                raise DataError(f"row {first + i}: column 'prompt' is {row.get('prompt')!r}; a pair needs the text that its "
                                "pictures were drawn from")
            row |= {side: _stored(row[side], pictures[side][i]) for side in SIDES}
        prompts = [row["prompt"] for row in records]
        if self.captioner is not None:
            for side in SIDES:
                found = checked_captions(self.captioner(pictures[side], prompts), count=len(records), source="captioner")
                _fill(records, f"{side}_caption", found)
        for name in self.perturb:
            texts = [_caption(row, name, first + i) for i, row in enumerate(records)]
            for level in self.levels:
                assert self.perturber is not None
                found = self.perturber(texts, level=level_of(level), seed=self.seed)
                _fill(records, column_of(name, level), checked_captions(found, count=len(records), source="perturber"))
        if self.scorer is not None:
            for column, (side, caption) in score_columns(self.columns, self.levels).items():
                values = self.scorer.score_samples([row[caption] for row in records], pictures[side])[:, 0]
                _fill(records, column, [float(value) for value in values])
        return records


def _fill(records: Sequence[dict[str, Any]], name: str, values: Sequence[Any]) -> None:
    for row, value in zip(records, values, strict=True):
        row[name] = value


def _picture(row: Mapping[str, Any], side: str, position: int) -> Image.Image:
    value = row.get(side)
    if value is None:
        raise DataError(f"row {position}: column {side!r} is missing or null; a pair needs both pictures. Columns are "
                        f"{', '.join(row)}; map yours with data.columns")
    return read_image(value, where=f"row {position}, column {side!r}")


def _stored(value: Any, picture: Image.Image) -> Any:
    """What is written of a picture: the bytes it came from, where there are any, so that nothing is encoded twice."""
    if isinstance(value, Mapping):
        return value.get("bytes") or Path(value["path"]).read_bytes()
    return Path(value).read_bytes() if isinstance(value, (str, Path)) else value if isinstance(value, bytes) else picture


def _caption(row: Mapping[str, Any], name: str, position: int) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        found = "is missing or null" if value is None else "is empty or not a text"
        raise DataError(f"row {position}: column {name!r} {found}; a caption is needed to perturb it. Set captioner, or take the "
                        "column out of perturb")
    return value


@stage("double_captions", options=DoubleCaptionsOptions, outputs=("data", "folder", "figure"))
def double_captions(options: DoubleCaptionsOptions, context: StageContext) -> StageResult:
    """Write a caption for each picture of every preference pair, perturb captions, and show what that did to the pairs."""
    loaded = _undecoded(load_rows(options.data, seed=context.seed))
    rows, ties = image_pairs(loaded)
    names = column_names(rows)
    for name in ("prompt", *SIDES):
        if name not in names:
            raise DataError(f"data.path: pairs need the column {name!r}; columns are {', '.join(names)}. Map yours with "
                            "data.columns")
    work = _work(options, context, rows, names)

    def caption(examples: list[dict[str, Any]], chunk: range) -> Chunk:
        return work(examples, chunk.start), {}

    data, _ = write_in_chunks(context, rows, caption, size=options.rows_per_chunk)
    figure = context.folder / "captions.png"
    metrics = {"rows": float(len(rows)), "ties": float(ties), **_report(data, work, options, figure)}
    details = {"captioner": options.captioner.model_dump() if options.captioner else None,
               "perturber": options.perturber.model_dump() if options.perturber else None, "levels": list(options.levels),
               "seed": context.seed}
    write_json(context.folder / "captions.json", {**details, "metrics": metrics})
    return StageResult({"data": str(data), "folder": str(context.folder), "figure": str(figure)}, metrics, details)


def _undecoded(rows: Examples) -> Examples:
    """Image columns as the bytes they are stored in."""
    if not hasattr(rows, "cast_column"):
        return rows
    from datasets import Image as ImageColumn

    for name, feature in rows.features.items():  # type: ignore[attr-defined]
        if isinstance(feature, ImageColumn):
            rows = rows.cast_column(name, ImageColumn(decode=False))  # type: ignore[attr-defined]
    return rows


def _work(options: DoubleCaptionsOptions, context: StageContext, rows: Examples, names: Sequence[str]) -> CaptionWork:
    perturb: list[str] = list(options.perturb) if options.perturber is not None and options.levels else []
    if options.captioner is None and "rejected_caption" in perturb and not set(OWN) <= set(names):
        if "rejected_caption" in options.model_fields_set and "prompt" not in perturb:
            raise DataError(f"data.path: perturbing rejected_caption needs captions; set captioner, or give the columns "
                            f"chosen_caption and rejected_caption. Columns are {', '.join(names)}")
        perturb.remove("rejected_caption")
        context.say("no captioner and no captions in the data: only the prompt is perturbed")
    if options.captioner is None and not perturb:
        raise DataError(f"captioner: perturbing rejected_caption needs captions; set captioner, or give the columns "
                        f"chosen_caption and rejected_caption. Columns are {', '.join(names)}")
    captioner = _named(options.captioner, CAPTIONERS, "captioner", context.config_folder) if options.captioner else None
    perturber = None
    if perturb and options.perturber is not None:
        known = [name for name in ("prompt", *OWN) if name in names]
        light = rows.select_columns(known) if hasattr(rows, "select_columns") else rows
        texts = (row[name] for row in light for name in known if isinstance(row.get(name), str))
        perturber = _named(options.perturber, PERTURBERS, "perturber", context.config_folder, lambda: content_words(texts))
    scorer = None
    if options.score is not None:
        scorer = build_rewards([options.score], config_folder=context.config_folder, dump_dir=context.folder / "rewards")
    return CaptionWork(captioner, perturber, perturb, list(options.levels), scorer, context.seed)


def _named(
    component: Component, table: Registry[Any], key: str, config_folder: Path, vocabulary: Callable[[], list[str]] | None = None,
) -> Any:
    """A registered captioner or perturber with its options, or a function of the user's own."""
    if ":" in component.name and component.name not in table:
        return load_object(component.name, config_folder=config_folder, key=f"{key}.name")
    try:
        make = table.get(component.name)
    except ValueError as error:
        raise ConfigError(f"{key}.name: {error}; a function of your own is written file.py:function") from None
    return make(*([vocabulary()] if vocabulary is not None else []), **bind(component, make, key=key))


def _report(data: Path, work: CaptionWork, options: DoubleCaptionsOptions, figure: Path) -> dict[str, float]:
    from datasets import load_from_disk

    written: Any = load_from_disk(str(data))
    light = written.remove_columns([name for name in SIDES if name in written.column_names])
    truncated = _truncated(light, work.columns, options.encoder) if options.encoder is not None else None
    report = caption_report(light, work.columns, work.levels, truncated=truncated)
    save_figure(report, figure)
    return report.metrics()


def _truncated(rows: Any, columns: Sequence[str], encoder: str) -> dict[str, float]:
    """Share of the captions of each column that are longer than the tokenizer's limit."""
    from transformers import AutoTokenizer

    path = resolve_model_path(encoder, key="encoder")
    inner = {"subfolder": "tokenizer"} if not Path(path).is_dir() or (Path(path) / "tokenizer").is_dir() else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **inner)
    except (OSError, ValueError) as error:
        raise ConfigError(f"encoder: no tokenizer can be loaded from {encoder!r} ({str(error).splitlines()[0]})") from None
    shares = {}
    for name in columns:
        texts = (str(row[name]) for row in rows.select_columns([name]))
        lengths = [len(tokenizer(text, truncation=False, verbose=False).input_ids) for text in texts]
        shares[name] = sum(length > tokenizer.model_max_length for length in lengths) / max(1, len(lengths))
    return shares


@CAPTIONERS.register("shapes")
class ShapesCaptioner:
    """Reads the attributes of a picture of ``asset:shapes`` off its pixels; a picture without an object keeps its prompt."""

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        """One caption of the shapes grammar per picture."""
        return [self._describe(image) or prompt for image, prompt in zip(images, prompts, strict=True)]

    @staticmethod
    def _describe(image: Image.Image) -> str | None:
        from mmalign.data.shapes import COUNTS, ShapeAttributes, region_of
        from mmalign.rewards.shapes_check import detect_objects

        found = detect_objects(image)
        if not found:
            return None
        largest = found[0]
        same = [item for item in found if (item.color, item.shape) == (largest.color, largest.shape)]
        count = min(len(same), max(COUNTS))
        position = region_of(*largest.center) if count == 1 else None
        return ShapeAttributes(largest.shape, largest.color, count, position).caption
