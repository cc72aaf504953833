"""The preallocated cache holds what transformers' own does; native attention leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

import steerlib as sl
from steerlib.activations import new_cache
from steerlib.engine.kv_cache import PreallocatedLayer, native_attention, preallocated_cache
from steerlib.tokens import pad_left

PROMPTS = ["I love dogs", "The ship left the harbour in the morning", "Love and hate"]


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


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_native_pass_gives_the_same_logits(tiny: Any, architecture: str) -> None:
    model, _ = tiny(architecture)
    tokens, mask = pad_left([sl.encode(model, p) for p in PROMPTS], 1, "cpu")
    before = model.original_model.config._attn_implementation

    def last(cache: Any) -> torch.Tensor:
        model.forward(tokens[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
        return model.forward(tokens[:, -1:], attention_mask=mask, past_key_values=cache)[:, -1]

    expected = last(new_cache(model))
    assert torch.equal(last(preallocated_cache(model, len(tokens), tokens.shape[1])), expected)
    with native_attention(model):
        got = last(preallocated_cache(model, len(tokens), tokens.shape[1]))
        if architecture in ("llama", "mistral", "qwen2"):
            assert model.original_model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert model.original_model.config._attn_implementation == before
    assert torch.equal(last(new_cache(model)), expected)  # nothing is left of it


def test_who_looks_inside_attention_sees_it(tiny: Any) -> None:
    model, _ = tiny("llama")
    run = {"n_samples": 1, "max_new_tokens": 5, "temperature": 0, "progress": False}
    free = sl.generate(model, PROMPTS, None, **run)
    seen: list[int] = []

    def look(pattern: torch.Tensor, hook: Any) -> None:
        seen.append(pattern.shape[-2])

    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", look)]):
        watched = sl.generate(model, PROMPTS, None, **run)
    assert watched.completion.tolist() == free.completion.tolist()
    assert seen.count(1) == 4  # every pass behind the prompt's


def test_native_attention_goes_away_after_an_error(tiny: Any) -> None:
    model, _ = tiny("llama")
    config = model.original_model.config
    before = config._attn_implementation
    with pytest.raises(KeyboardInterrupt), native_attention(model):
        assert all("forward" in block.attn.__dict__ for block in model.blocks)
        raise KeyboardInterrupt
    assert not any("forward" in block.attn.__dict__ for block in model.blocks)
    assert config._attn_implementation == before
