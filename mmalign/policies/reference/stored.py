"""Reference scores that were computed before training and are looked up by the content of a row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmalign.core.logprobs import ActionScores
from mmalign.data.rows import Rows
from mmalign.errors import ConfigError, DataError
from mmalign.policies.base import Draw, Policy
from mmalign.policies.modules import module_identity
from mmalign.policies.reference.base import REFERENCES, Reference, ReferenceOptions


@REFERENCES.register("precomputed")
class PrecomputedReference(Reference):
    """Scores of the policy's first weights, stored by row content; nothing is computed once training has begun.

    :meth:`precompute` fills the store; until the first update, rows that are not in it are scored and stored on the
    way. Afterwards an unknown row is refused: its reference could only be computed from weights that have moved.
    """

    kind = "precomputed"

    def __init__(self, policy: Policy, options: ReferenceOptions) -> None:
        super().__init__(policy)
        self.stored: dict[str, Tensor] = {}
        self.started = False
        # Before the first update the policy itself is the reference.
        self._identity = module_identity(policy.module)

    def precompute(self, rows: Rows, *, rows_per_forward: int = 8, temperature: float = 1.0, draw: Draw | None = None) -> None:
        """Score ``rows`` and store the result of each."""
        for start in range(0, len(rows), rows_per_forward):
            index = list(range(start, min(len(rows), start + rows_per_forward)))
            self.log_probs(rows.take(index), temperature=temperature, draw=None if draw is None else draw.take(index))

    @torch.no_grad()
    def log_probs(
        self, rows: Rows, *, draw: Draw | None = None, temperature: float = 1.0, want: Iterable[str] = (),
    ) -> ActionScores:
        """Stored scores; raises DataError for rows that were not stored in time."""
        if tuple(want):
            raise ConfigError(f"reference.kind: precomputed keeps log-probs only, not {', '.join(want)}")
        keys = [self._key(rows, row, draw, temperature) for row in range(len(rows))]
        missing = [row for row, key in enumerate(keys) if key not in self.stored]
        if missing and self.started:
            raise DataError(f"{len(missing)} of {len(rows)} rows have no precomputed reference score, and the weights have "
                            "moved since: precompute the whole data set before training, or use another reference.kind")
        if missing:
            drawn = None if draw is None else draw.take(missing)
            part = super().log_probs(rows.take(missing), draw=drawn, temperature=temperature)
            for at, row in enumerate(missing):
                self.stored[keys[row]] = part.logp[at][part.mask[at]].cpu()
        mask = self.policy.action_mask(rows)
        logp = torch.zeros(mask.shape)
        for row, key in enumerate(keys):
            logp[row, mask[row].cpu()] = self.stored[key].float()
        device = next(self.policy.module.parameters()).device
        return ActionScores(logp=logp.to(device), mask=mask.to(device))

    def _key(self, rows: Rows, row: int, draw: Draw | None, temperature: float) -> str:
        digest = hashlib.sha256(f"{temperature}".encode())
        for name in sorted(getattr(self.policy, "score_columns", None) or rows.columns):
            digest.update(name.encode())
            _feed(digest, rows[name][row])
        if draw is not None:
            _feed(digest, [draw.timesteps[row], draw.noise[row]])
        return digest.hexdigest()

    def after_update(self, step: int) -> None:
        """From now on the store is closed."""
        self.started = True

    def state_dict(self) -> dict[str, Any]:
        """The store as one tensor with the length of each row."""
        values = list(self.stored.values())
        return {
            "kind": self.kind, "identity": self.identity, "started": self.started, "keys": list(self.stored),
            "sizes": [len(value) for value in values], "values": torch.cat([torch.zeros(0), *values]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the store; the identity is the one it was computed with."""
        if state["kind"] != self.kind:
            super().load_state_dict(state)
        self._identity, self.started = state["identity"], bool(state["started"])
        parts = state["values"].split([int(size) for size in state["sizes"]])
        self.stored = {key: part.clone() for key, part in zip(state["keys"], parts, strict=True)}


def _feed(digest: Any, value: Any) -> None:
    """Hash the content of a value of a row, its structure included."""
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"T{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, np.ndarray):
        _feed(digest, torch.from_numpy(np.ascontiguousarray(value)))
    elif isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
        _feed(digest, torch.tensor(value, dtype=torch.int64))
    elif isinstance(value, (list, tuple)):
        digest.update(f"L{len(value)}".encode())
        for item in value:
            _feed(digest, item)
    elif isinstance(value, dict):
        _feed(digest, [[str(key), value[key]] for key in sorted(value, key=str)])
    elif hasattr(value, "tobytes") and hasattr(value, "size"):  # a PIL image
        digest.update(f"I{value.mode}{value.size}".encode())
        digest.update(value.tobytes())
    else:
        digest.update(f"V{type(value).__name__}:{value!r}".encode())
