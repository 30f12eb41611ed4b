"""Writing the sample that made a reward fail, so that it can be looked at and replayed."""

from __future__ import annotations

import json
import os
import traceback
from pathlib import Path
from typing import Any

from torch import Tensor

from mmalign.rewards.inputs import RewardInputs, is_image, to_pil


def describe_sample(inputs: RewardInputs, index: int, *, width: int = 200) -> str:
    """One line about a sample, cut to ``width`` characters per part."""
    prompt, completion = repr(inputs.prompts[index]), repr(inputs.completions[index])
    return f"prompt={_cut(prompt, width)}, completion={_cut(completion, width)}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def write_failure(folder: Path, name: str, inputs: RewardInputs, index: int, cause: Exception) -> Path:
    """Write ``<folder>/reward_failure_<name>_<k>.json`` with prompt, completion, columns and traceback; its path.

    Images go beside it as PNG files. The file appears under its final name only when it is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
    number = 0
    while (file := folder / f"reward_failure_{safe}_{number}.json").exists():
        number += 1
    images: list[str] = []

    def plain(value: Any) -> Any:
        if is_image(value):
            target = file.with_suffix(f".{len(images)}.png")
            to_pil(value).save(target)
            images.append(target.name)
            return {"image": target.name}
        if isinstance(value, Tensor):
            return value.tolist()
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value if value is None or isinstance(value, (str, int, float, bool)) else repr(value)

    record = {
        "reward": name, "sample": index, "error": f"{type(cause).__name__}: {cause}",
        "prompt": plain(inputs.prompts[index]), "completion": plain(inputs.completions[index]),
        "columns": {column: plain(values[index]) for column, values in inputs.columns.items()},
        "completion_ids": None if inputs.completion_ids is None else inputs.completion_ids[index],
        "traceback": "".join(traceback.format_exception(cause)),
    }
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")
    os.replace(temporary, file)
    return file
