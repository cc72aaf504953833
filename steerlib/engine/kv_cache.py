"""What makes a pass of one token cheap: a preallocated cache, attention without copies.

Nothing here changes what is computed, only how often it is copied on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

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


_points: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()


def _attention_points(model: TransformerBridge) -> list[Any]:
    """All hook points inside attention. Kept, since to find them takes as long as a layer."""
    from transformer_lens.hook_points import HookPoint

    if model not in _points:
        inside = [m for block in model.blocks for m in block.attn.modules()]
        _points[model] = [m for m in inside if isinstance(m, HookPoint)]
    return _points[model]


@contextmanager
def native_attention(model: TransformerBridge) -> Iterator[None]:
    """Inside the ``with`` block, attention runs in transformers' own fused kernel.

    The bridge's attention shows every step of itself to hooks. For that it repeats the keys and
    values of grouped heads at every pass, a fifth of the time of a large batch. Where nobody looks
    inside (no hook on any of the attention's points), the original does the same sums. In float32
    only: with fewer digits the two round so differently that most completions would turn.
    """
    from transformer_lens.model_bridge.generalized_components.position_embeddings_attention import (
        PositionEmbeddingsAttentionBridge,
    )

    config = model.original_model.config
    before = config._attn_implementation
    bridges: list[Any] = [getattr(block, "attn", None) for block in model.blocks]
    if (
        model.cfg.dtype != torch.float32
        or not all(type(attn) is PositionEmbeddingsAttentionBridge for attn in bridges)
        or not getattr(model.original_model, "_supports_sdpa", False)
        or getattr(config, "attn_logit_softcapping", None) is not None
        or any(point.fwd_hooks for point in _attention_points(model))
    ):
        yield
        return
    try:
        config._attn_implementation = "sdpa"
        for attn in bridges:
            attn.__dict__["forward"] = attn.original_component.forward
        yield
    finally:
        config._attn_implementation = before
        for attn in bridges:
            attn.__dict__.pop("forward", None)
