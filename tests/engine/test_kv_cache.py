"""The preallocated cache holds what transformers' own does."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

from steerlib.engine.kv_cache import PreallocatedLayer


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_preallocated_layer_holds_what_a_growing_one_does(data: st.DataObject) -> None:
    mine, plain = PreallocatedLayer(8, 20), DynamicLayer()
    rows, columns = data.draw(st.integers(1, 8)), 0
    for _ in range(data.draw(st.integers(1, 6))):
        width = data.draw(st.integers(1, 3))
        keys, values = torch.randn(2, rows, 2, width, 4)
        columns += width
        for ours, theirs in zip(mine.update(keys, values), plain.update(keys, values), strict=True):
            assert torch.equal(ours, theirs)
        assert mine.get_seq_length() == plain.get_seq_length() == columns
        # Rows leave, multiply, and change places.
        index = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=8))
        for layer in (mine, plain):
            layer.batch_select_indices(torch.tensor(index))
        rows = len(index)
        assert torch.equal(mine.keys, plain.keys) and torch.equal(mine.values, plain.values)
        other = mine.growing()
        other.update(keys[:1].expand(rows, -1, -1, -1), values[:1].expand(rows, -1, -1, -1))
        other.batch_select_indices(torch.tensor([0]))
        assert torch.equal(mine.keys, plain.keys)  # what happens to the other is not its own
