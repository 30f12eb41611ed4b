"""The key-value cache of the in-process engine."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_ROOM = 64
"""Positions allocated ahead."""


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A cache layer that writes into spare room; the stock one copies everything it holds at every step."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append states ``[R, heads, T, D]`` and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        assert self.keys is not None
        assert self.values is not None
        start = self.keys.shape[-2]
        stop = start + key_states.shape[-2]
        buffers = self._buffers
        if buffers is None or buffers[0].shape[-2] < stop:
            buffers = self._buffers = (_with_room(self.keys, stop + _ROOM), _with_room(self.values, stop + _ROOM))
        for buffer, states in zip(buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = states
        keys, values = buffers[0][:, :, :stop], buffers[1][:, :, :stop]
        self.keys, self.values = keys, values
        return keys, values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep (or repeat) the rows at ``beam_idx``."""
        if self.keys is not None and self.values is not None:
            index = beam_idx.to(self.keys.device)
            self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)
            self._buffers = None


def _with_room(states: Tensor, capacity: int) -> Tensor:
    length = states.shape[-2]
    buffer = states.new_empty(*states.shape[:-2], capacity, states.shape[-1])
    buffer[:, :, :length] = states
    return buffer


def new_cache(config: Any) -> Any:
    """A cache for a model of ``config``: growing layers for plain attention, the library's own for every other kind."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def select_rows(cache: Any, index: Tensor) -> None:
    """Keep the rows at ``index`` of every layer, in that order and as often as they are named."""
    cache.reorder_cache(index)
