"""Native passes are the bridge's, whoever looks inside is seen to, and nothing is left behind."""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, adding, noise, reference_logits, write_tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import steerlib as sl
from steerlib.activations import new_cache
from steerlib.engine import decode, native
from steerlib.engine.kv_cache import preallocated_cache
from steerlib.engine.native import Levels, Passes
from steerlib.tokens import pad_left

PROMPTS = ["I love dogs", "The ship left the harbour in the morning", "Love and hate"]
GREEDY: dict[str, Any] = {
    "n_samples": 1, "max_new_tokens": 5, "temperature": 0, "progress": False,
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_native_pass_gives_the_bridges_logits(tiny: Any, architecture: str) -> None:
    model, _ = tiny(architecture)
    tokens, mask = pad_left([sl.encode(model, p) for p in PROMPTS], 1, "cpu")
    before = model.original_model.config._attn_implementation

    def bridge(cache: Any) -> torch.Tensor:
        model.forward(tokens[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
        return model.forward(tokens[:, -1:], attention_mask=mask, past_key_values=cache)[:, -1]

    expected = bridge(new_cache(model))
    assert torch.equal(bridge(preallocated_cache(model, *tokens.shape)), expected)
    passes = Passes(model)
    assert passes.native
    cache = preallocated_cache(model, *tokens.shape)
    passes.forward(tokens[:, :-1], mask[:, :-1], cache)
    got = passes.forward(tokens[:, -1:], mask, cache)[:, -1]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    whole = passes.forward(tokens, mask)[:, -1]
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4)
    assert model.original_model.config._attn_implementation == before
    assert torch.equal(bridge(new_cache(model)), expected)  # nothing is left of it


def test_who_looks_inside_a_block_sees_it(tiny: Any) -> None:
    model, _ = tiny("llama")
    free = sl.generate(model, PROMPTS, None, **GREEDY)
    seen: list[int] = []

    def look(pattern: torch.Tensor, hook: Any) -> None:
        seen.append(pattern.shape[-2])

    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", look)]):
        assert not Passes(model).native
        watched = sl.generate(model, PROMPTS, None, **GREEDY)
    assert watched.completion.tolist() == free.completion.tolist()
    assert seen.count(1) == 4  # every pass behind the prompt's


@pytest.mark.parametrize(
    "name", ["mlp.hook_out", "attn.hook_z", "hook_resid_mid", "ln1.hook_normalized"]
)
def test_who_changes_something_inside_a_block_changes_it(tiny: Any, name: str) -> None:
    """Also between the steps of a generation, and also beside interventions."""
    model, _ = tiny("llama")
    conditions = {"free": None, "x": sl.Add(noise(model, 2), at="all")}
    run: dict[str, Any] = {**GREEDY, "max_new_tokens": 8}

    def change(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x.flip(-1)

    before = sl.generate(model, PROMPTS, conditions, **run)
    with model.hooks(fwd_hooks=[(f"blocks.1.{name}", change)]):
        cached = sl.generate(model, PROMPTS, conditions, **run)
        plain = sl.generate(model, PROMPTS, conditions, use_cache=False, **run)
    after = sl.generate(model, PROMPTS, conditions, **run)
    assert before.equals(after)
    assert cached.equals(plain) and not cached.equals(before)


def test_pytorchs_own_hooks_are_honoured(tiny: Any) -> None:
    """On the bridge's modules and on transformers'."""
    model, _ = tiny("llama")
    free = sl.generate(model, PROMPTS, None, **GREEDY)
    block = model.blocks[1]
    for module in (block, block.mlp, block.mlp.original_component, block.original_component):
        seen: list[Any] = []
        handle = module.register_forward_hook(lambda *args, seen=seen: seen.append(args))
        assert sl.generate(model, PROMPTS, None, **GREEDY).equals(free)
        handle.remove()
        assert len(seen) == GREEDY["max_new_tokens"] == 5


def test_hooks_at_the_edges_see_what_they_see_in_the_bridge(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = tiny("llama")
    tokens, mask = pad_left([sl.encode(model, p) for p in PROMPTS], 1, "cpu")
    lengths = mask.sum(1).tolist()
    acts = [sl.Add(noise(model, 1), at="all"), sl.Ablate(noise(model, 2), at="all")]

    def run() -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []

        def note(x: torch.Tensor, hook: Any) -> torch.Tensor:
            seen.append(x.clone())
            return x + 1

        passes = Passes(model)
        hooks = decode.BatchHooks(model, [acts] * 3, lengths)
        hooks.window([n - tokens.shape[1] for n in lengths], tokens.shape[1])
        more = [("blocks.1.hook_resid_pre", note), ("blocks.3.hook_resid_post", note)]
        with torch.no_grad(), model.hooks(fwd_hooks=[*more, ("blocks.2.hook_in", note)]):
            return [passes.forward(tokens, mask, hooks=hooks, more=more), *seen]

    assert Passes(model).native  # compared before there are hooks
    ours = run()
    monkeypatch.setattr(Passes, "native", property(lambda self: False))
    theirs = run()
    assert len(ours) == len(theirs) == 6
    real = mask.bool()
    for a, b in zip(ours, theirs, strict=True):  # padding holds anything
        torch.testing.assert_close(a[real], b[real], atol=1e-4, rtol=1e-4)


def test_generate_inside_steer_is_both(tiny: Any) -> None:
    model, _ = tiny("llama")
    a, b = noise(model, 1), noise(model, 2)
    both = sl.generate(model, PROMPTS, {"x": [sl.Add(a, "all"), sl.Add(b, "all")]}, **GREEDY)
    with sl.steer(model, sl.Add(a, "all")):
        nested = sl.generate(model, PROMPTS, {"x": sl.Add(b, "all")}, **GREEDY)
    assert nested.completion.tolist() == both.completion.tolist()


# ---------------------------------------------------------------- what it relies on


def test_it_falls_back_aloud_and_once(tiny: Any) -> None:
    model, _ = tiny("qwen2")
    expected = sl.generate(model, PROMPTS, {"x": noise(model, 1)}, **GREEDY)
    mlp = model.blocks[1].mlp.original_component
    mlp.forward = mlp.forward  # as accelerate does, and others who patch a module
    try:
        with pytest.warns(UserWarning, match="bridge.* slowly.*forward of its own"):
            got = sl.generate(model, PROMPTS, {"x": noise(model, 1)}, **GREEDY)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sl.generate(model, PROMPTS, {"x": noise(model, 1)}, **GREEDY)
    finally:
        del mlp.forward
    assert got.completion.tolist() == expected.completion.tolist()
    assert Passes(model).native  # and back again


def test_other_logits_are_not_used(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny("mistral")
    monkeypatch.setattr(native, "_agrees", weakref.WeakKeyDictionary())
    monkeypatch.setattr(native, "_warned", weakref.WeakSet())
    run = Passes._run
    monkeypatch.setattr(Passes, "_run", lambda *args, **more: 1.1 * run(*args, **more))
    with pytest.warns(UserWarning, match="other logits"):
        assert not Passes(model).native
    monkeypatch.setattr(native, "_agrees", weakref.WeakKeyDictionary())
    monkeypatch.setattr(native, "_warned", weakref.WeakSet())

    def broken(*args: Any, **more: Any) -> Any:
        raise TypeError("no such argument")

    monkeypatch.setattr(Passes, "_run", broken)
    with pytest.warns(UserWarning, match="TypeError: no such argument"):
        assert not Passes(model).native


def test_a_model_is_let_go(tmp_path: Any) -> None:
    write_tiny(tmp_path)
    model = sl.load_model(str(tmp_path), device="cpu")
    sl.generate(model, PROMPTS, None, **GREEDY)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# ---------------------------------------------------------------- rows that run as one


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0, 1, 2, 3, 4, math.inf]), st.integers(0, 2)),
        min_size=1,
        max_size=8,
    )
)
def test_levels_part_rows_where_they_are_steered(rows: list[tuple[float, int]]) -> None:
    first, same = [n for n, _ in rows], [p for _, p in rows]
    levels = Levels(first, range(len(rows)), same)
    for layer in range(5):
        place = levels.place[levels.at(layer)]
        for i, (n, p) in enumerate(rows):
            for j, (m, q) in enumerate(rows):
                together = i == j or (p == q and n > layer and m > layer)
                assert (place[i] == place[j]) == together


def test_layers_below_an_intervention_run_once(tiny: Any) -> None:
    """Conditions at several layers and sites, in prompts and behind them, against hooks by hand."""
    model, plain = tiny("llama")
    cases = [(2, "resid_pre", "generated"), (3, "resid_post", "all"), (1, "resid_post", "all")]
    conditions: dict[str, Any] = {"free": None, "also free": []}
    for layer, site, at in cases:
        v = sl.SteeringVector({layer: noise(model, layer).layers[layer]}, site=site)
        conditions[f"{layer} {site} {at}"] = sl.Add(v, at=at)
    ran: dict[int, int] = {}
    handles = [
        block.original_component.register_forward_hook(
            lambda m, args, out, n=n: ran.update({n: ran.get(n, 0) + out[..., 0].numel()})
        )
        for n, block in enumerate(model.blocks)
    ]
    ids = {p: sl.encode(model, p) for p in PROMPTS}
    new = {p: [[7, 8, 9], [7, 10]] for p in PROMPTS}
    assert Passes(model).native
    ran.clear()
    rows = decode.make_rows(model, PROMPTS, list(conditions.values()), 1, decode.Sampling(3), 0)
    rows = [row for row in rows for _ in range(2)]
    targets = [new[PROMPTS[row.prompt]][i % 2] for i, row in enumerate(rows)]
    try:
        scores = decode.score(model, rows, targets)
    finally:
        for handle in handles:
            handle.remove()
    assert ran[0] < ran[1] < ran[2] < ran[3]
    for row, target, got in zip(rows, targets, scores, strict=True):
        prompt, n = ids[PROMPTS[row.prompt]], len(ids[PROMPTS[row.prompt]])
        edits = []
        if row.condition > 1:
            layer, site, at = cases[row.condition - 2]
            where = range(n - 1 if at == "generated" else 0, n + len(target) - 1)
            edits = [(layer, site, adding(noise(model, layer).layers[layer], list(where)))]
        logits = reference_logits(plain, [*prompt, *target[:-1]], edits)[n - 1 :]
        expected = logits.log_softmax(-1)[range(len(target)), target]
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
