"""The ``digits`` asset: 1797 hand-written digits of 8 x 8 pixels, shipped inside scikit-learn."""

from __future__ import annotations

import random
from typing import Any

from mmalign.core.seeding import derive_seed
from mmalign.errors import AssetError, DataError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEST_EVERY = 5
"""Every fifth image (in scikit-learn's order) belongs to the test split."""


def load_digits(n: int | None = None, *, split: str = "train", seed: int = 0, size: int = 32) -> list[dict[str, Any]]:
    """Rows ``id, images, prompt, answer, class_id``: a grey-scale picture (as RGB, ``size`` pixels) and its digit.

    The UCI "Optical Recognition of Handwritten Digits" test set (Alpaydin and Kaynak 1998), CC BY 4.0. Raises
    AssetError when scikit-learn is not installed, DataError for an unknown split or more rows than there are.
    """
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError:
        raise AssetError("the digits asset comes with scikit-learn, which is not installed: pip install scikit-learn") \
            from None
    from PIL import Image

    if split not in ("train", "test"):
        raise DataError(f"data.split: the digits asset has train and test, not {split!r}")
    bunch = sklearn_digits()
    indices = [index for index in range(len(bunch.target)) if (index % TEST_EVERY == 0) == (split == "test")]
    if n is not None and n > len(indices):
        raise DataError(f"data.limit: the digits asset has {len(indices)} {split} rows, not {n}")
    chosen = random.Random(derive_seed(seed, "data", "digits", split)).sample(indices, n or len(indices))
    rows = []
    for index in chosen:
        pixels = (bunch.images[index] * (255 / 16)).round().astype("uint8")
        image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).convert("RGB")
        digit = int(bunch.target[index])
        rows.append({"id": f"digits-{index}", "images": [image], "prompt": f"the digit {WORDS[digit]}",
                     "answer": str(digit), "class_id": digit})
    return rows
