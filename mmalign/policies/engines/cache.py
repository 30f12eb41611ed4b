"""The key-value cache of the in-process engine."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_ROOM = 64
"""Positions allocated ahead."""


class GrowingLayer(DynamicLayer):
    """A cache layer that writes into spare room; the stock one copies everything it holds at every step."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append states ``[R, heads, T, D]`` and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        start = self.keys.shape[-2]
        stop = start + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < stop:
            self._move(self.keys, self.values, stop + _ROOM)
        assert self._buffers is not None
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = states
        self.keys, self.values = (buffer[:, :, :stop] for buffer in self._buffers)
        return self.keys, self.values

    def _move(self, keys: Tensor, values: Tensor, capacity: int) -> None:
        length = keys.shape[-2]
        self._buffers = tuple(  # type: ignore[assignment]
            states.new_empty(*states.shape[:-2], capacity, states.shape[-1]) for states in (keys, values)
        )
        assert self._buffers is not None
        for buffer, states in zip(self._buffers, (keys, values), strict=True):
            buffer[:, :, :length] = states
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep (or repeat) the rows at ``beam_idx``."""
        if self.is_initialized:
            index = beam_idx.to(self.keys.device)
            length = self.keys.shape[-2]
            self._move(self.keys.index_select(0, index), self.values.index_select(0, index), length + _ROOM)


def new_cache(config: Any) -> Any:
    """A cache for a model of ``config``: growing layers for plain attention, the library's own for every other kind."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def select_rows(cache: Any, index: Tensor) -> None:
    """Keep the rows at ``index`` of every layer, in that order and as often as they are named."""
    cache.reorder_cache(index)
