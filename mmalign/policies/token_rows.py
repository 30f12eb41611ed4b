"""What policies of tokenised text share: rows of text into rows of ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mmalign.data.chat import PreparationReport, TextEncoding, encode_dataset
from mmalign.data.rows import Rows
from mmalign.errors import DataError
from mmalign.policies.base import Draw


class TokenRows:
    """Base of policies that score token ids."""

    tokenizer: Any
    encoding: TextEncoding

    def prepare_dataset(
        self, examples: Sequence[Mapping[str, Any]], *, fields: tuple[str, ...] = (),
    ) -> tuple[Sequence[Mapping[str, Any]], PreparationReport]:
        """Tokenise a data set and set its labels (:func:`mmalign.data.chat.encode_dataset`)."""
        return encode_dataset(examples, self.tokenizer, self.encoding, fields=fields)

    def encode_rows(self, examples: Sequence[Mapping[str, Any]]) -> Rows:
        """Columns of prepared examples; raises DataError for rows that were not prepared."""
        rows = Rows.from_examples(examples)
        if len(rows) and not any(name.endswith("input_ids") for name in rows):
            raise DataError(f"rows hold no token ids (columns: {', '.join(rows)}); encode them with prepare_dataset first")
        return rows

    def draw(self, rows: Rows, generator: torch.Generator) -> Draw | None:
        """None: scores of text are deterministic."""
        return None
