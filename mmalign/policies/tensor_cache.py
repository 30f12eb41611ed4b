"""A bounded memory of encodings (prompts, pictures) by key, least recently used out first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping

from torch import Tensor


class TensorCache:
    """Named tensors by key, at most ``megabytes`` in all; 0 keeps nothing. What is stored must not be modified."""

    def __init__(self, megabytes: float) -> None:
        if megabytes < 0:
            raise ValueError(f"megabytes is {megabytes}; it must not be negative")
        self.limit = int(megabytes * 2**20)
        self.size = 0
        self._entries: OrderedDict[Hashable, dict[str, Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> dict[str, Tensor] | None:
        """The tensors stored under ``key``, or None."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def put(self, key: Hashable, tensors: Mapping[str, Tensor]) -> None:
        """Store ``tensors`` and drop the least recently used entries over the limit."""
        entry = dict(tensors)
        if key in self._entries:
            self.size -= _bytes(self._entries.pop(key))
        self._entries[key] = entry
        self.size += _bytes(entry)
        while self.size > self.limit:
            _, dropped = self._entries.popitem(last=False)
            self.size -= _bytes(dropped)


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
