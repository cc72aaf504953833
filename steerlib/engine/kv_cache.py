"""A preallocated key-value cache: what is computed stays, it is only copied less often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class PreallocatedLayer(DynamicLayer):
    """A layer of the key-value cache with room for all rows and columns it will ever hold.

    New columns are written into place, and when rows leave or multiply only those are copied that
    change their place.
    """

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.size = rows, columns

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows, columns = self.size
        super().lazy_initialization(key_states, value_states)
        self.buffers = [
            states.new_empty(rows, states.shape[1], columns, states.shape[3])
            for states in (key_states, value_states)
        ]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add columns; returns all of them, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[: len(states), :, old : old + states.shape[2]] = states
        return self._show(len(key_states), old + key_states.shape[2])

    def begin_with(self, keys: torch.Tensor, values: torch.Tensor, padding: Sequence[int]) -> None:
        """Start every row with what they all begin with (``[1, head, column, d_head]``).

        Row r is padded on the left by ``padding[r]`` columns; what sticks out on the right is for
        the next pass to write.
        """
        self.lazy_initialization(keys, values)
        columns = keys.shape[2]
        for buffer, states in zip(self.buffers, (keys, values), strict=True):
            buffer[: len(padding), :, :columns] = 0
            for row, n in enumerate(padding):
                buffer[row, :, n:columns] = states[0, :, : max(columns - n, 0)]
        self._show(len(padding), columns)

    def growing(self) -> DynamicLayer:
        """The same contents in transformers' own layer, which copies whatever changes."""
        layer = DynamicLayer()
        if self.is_initialized:
            layer.lazy_initialization(self.keys, self.values)
            layer.keys, layer.values = self.keys, self.values
        return layer

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Row i becomes what row ``indices[i]`` was; there may be more rows than before."""
        if columns := self.get_seq_length():
            indices = indices.to(self.buffers[0].device)
            moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]
            for buffer in self.buffers:
                buffer[moved, :, :columns] = buffer[indices[moved], :, :columns]
            self._show(len(indices), columns)

    def _show(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = (buffer[:rows, :, :columns] for buffer in self.buffers)
        return self.keys, self.values


def preallocated_cache(model: TransformerBridge, rows: int, columns: int) -> DynamicCache:
    """An empty key-value cache for this many rows and columns (sliding windows as they are)."""
    cache = DynamicCache(config=model.original_model.config)
    cache.layers = [
        PreallocatedLayer(rows, columns) if type(layer) is DynamicLayer else layer
        for layer in cache.layers
    ]
    return cache
