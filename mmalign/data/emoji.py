"""The ``emoji`` asset: some 1900 small pictures with names and categories, from the npm package emoji-datasource."""

from __future__ import annotations

import hashlib
import json
import random
import re
import tarfile
from pathlib import Path
from typing import Any

from mmalign.core.seeding import derive_seed
from mmalign.data.fetch import cached_folder, check_integrity, npm_pack
from mmalign.errors import AssetError, DataError

VERSION = "16.0.0"
INTEGRITY = {
    "google": "sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    "twitter": "sha512-7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
    "apple": "sha512-dVYjsK0FnCry9F+PBtnivhG2K0xdwlmqYaSgiUtztUdAGPYiHYhZcVKvNBqC791g2qyEcFNTBO6utg4eQ3uLTw==",
}
"""Vendor -> integrity of its package, as the npm registry states it."""
DOWNLOAD_SIZE = 75_000_000
TEST_SHARE = 0.1

CATEGORIES = (
    "Activities", "Animals & Nature", "Flags", "Food & Drink", "Objects", "People & Body", "Smileys & Emotion",
    "Symbols", "Travel & Places",
)

ADVICE = ("the emoji asset is fetched with npm: install Node.js (which brings npm), or use the asset shapes, which "
          "needs no download")


def emoji_folder(vendor: str = "google") -> Path:
    """The cached folder of one vendor's pictures (``64/*.png``) and ``emoji.json``, fetched on first use.

    The pictures belong to their vendors (Noto Emoji: Apache-2.0; Twemoji: CC BY 4.0; Apple's may not be published).
    """
    if vendor not in INTEGRITY:
        raise DataError(f"vendor: the emoji asset has {', '.join(INTEGRITY)}, not {vendor!r}")

    def fill(folder: Path) -> None:
        archive = npm_pack(f"emoji-datasource-{vendor}@{VERSION}", folder.parent, size=DOWNLOAD_SIZE, advice=ADVICE)
        check_integrity(archive, INTEGRITY[vendor])
        unpack(archive, folder, vendor)

    return cached_folder(f"emoji-{vendor}-{VERSION}", fill)


def unpack(archive: Path, folder: Path, vendor: str) -> None:
    """Write the single pictures, ``emoji.json`` and ``LICENSE`` of a package to ``folder``; sprite sheets are left.

    Members are written by name into ``folder`` alone: a path that leads elsewhere does not match and is not read.
    """
    picture = re.compile(rf"package/img/{vendor}/64/([0-9a-f-]+\.png)")
    (folder / "64").mkdir(exist_ok=True)
    try:
        with tarfile.open(archive, "r:gz") as source:
            for member in source:
                match = picture.fullmatch(member.name)
                plain = member.name in ("package/emoji.json", "package/LICENSE")
                if not member.isreg() or not (match or plain):
                    continue
                stream = source.extractfile(member)
                assert stream is not None  # a regular file has content
                target = folder / "64" / match.group(1) if match else folder / Path(member.name).name
                target.write_bytes(stream.read())
    except (tarfile.TarError, EOFError, OSError) as error:
        raise AssetError(f"{archive.name} cannot be unpacked: {error}") from None
    if not (folder / "emoji.json").is_file():
        raise AssetError(f"{archive.name} holds no emoji.json")


def load_emoji(
    n: int | None = None, *, split: str = "train", seed: int = 0, vendor: str = "google", size: int = 64,
    categories: list[str] | None = None,
) -> list[dict[str, Any]]:
    """Rows ``id, images, prompt, answer, class_id``: a picture on white, its name, and its category.

    ``class_id`` indexes :data:`CATEGORIES`. Which split a picture belongs to is decided by a hash of its code point.
    Raises DataError for an unknown split, vendor or category or for more rows than there are, AssetError when the
    package cannot be fetched.
    """
    from PIL import Image

    if split not in ("train", "test"):
        raise DataError(f"data.split: the emoji asset has train and test, not {split!r}")
    unknown = sorted(set(categories or ()) - set(CATEGORIES))
    if unknown:
        raise DataError(f"categories: the emoji asset has {', '.join(CATEGORIES)}, not {unknown[0]!r}")
    folder = emoji_folder(vendor)
    wanted = set(categories or CATEGORIES)
    entries = [
        entry for entry in json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
        if entry["category"] in wanted and _split(entry["unified"]) == split
        and (folder / "64" / entry["image"]).is_file()
    ]
    entries.sort(key=lambda entry: entry["unified"])
    if n is not None and n > len(entries):
        raise DataError(f"data.limit: the emoji asset has {len(entries)} {split} rows, not {n}")
    chosen = random.Random(derive_seed(seed, "data", "emoji", split)).sample(entries, n or len(entries))
    rows = []
    for entry in chosen:
        with Image.open(folder / "64" / entry["image"]) as file:
            picture = file.convert("RGBA")
        canvas = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        canvas.alpha_composite(picture)
        image = canvas.convert("RGB")
        if size != image.width:
            image = image.resize((size, size), Image.Resampling.LANCZOS)
        rows.append({"id": f"emoji-{vendor}-{entry['unified'].lower()}", "images": [image], "prompt": _caption(entry),
                     "answer": entry["category"], "class_id": CATEGORIES.index(entry["category"])})
    return rows


def _split(code: str) -> str:
    digest = hashlib.blake2b(code.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") < TEST_SHARE * 2**64 else "train"


def _caption(entry: dict[str, Any]) -> str:
    name = str(entry.get("name") or entry["short_name"].replace("_", " "))
    return re.sub(r"\s+", " ", name).strip().lower()
