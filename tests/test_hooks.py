"""Conditions on whatever TransformerLens runs, against hand-written PyTorch hooks.

The bridges here were booted by TransformerLens alone, not by `load_model`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, adding, n_hooks, noise, positions, reference_logits

import steerlib as sl
from steerlib.activations import SITES
from steerlib.hooks import BatchHooks
from steerlib.interventions import as_interventions
from steerlib.tokens import pad_left

PROMPTS = [
    "I went up to my friend and said",  # 9 tokens in the tiny models
    "I love dogs",  # 8
    "The ship left the harbour in the morning, and nobody knew when it would return",  # 23
]
# place, rows of the vector; position 10 is generated in the first two prompts, not in the third
PLACES: list[tuple[Any, int]] = [
    ("front", 2), ("middle", 3), ("back", 2), ("prompt", 1), ("generated", 1), ("all", 1),
    ([2], 1), ([-2], 1), ([1, -1], 2), ([10], 1), (slice(-2, None), 1), (slice(3, 12, 2), 1),
]  # fmt: skip
NEW = 6


def push(model: Any, i: int, k: int) -> Any:
    """A vector whose layer and site change with the case; small beside a real model's stream."""
    return noise(model, 1 + i % 3, k, seed=i, site=SITES[i % 2])


def edits(vector: Any, at: Any, n: int, total: int) -> list[Any]:
    """The same by hand, for a prompt of n tokens."""
    where = positions(at, vector.n_positions, n, total)
    return [(l, vector.site, adding(t, where)) for l, t in vector.layers.items()]


def padded(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """All prompts in one tensor, padded on the left, with its mask."""
    return pad_left([sl.encode(model, p) for p in PROMPTS], model.tokenizer.pad_token_id, "cpu")


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got.float(), expected, atol=1e-4, rtol=1e-4)


def nothing_left(model: Any) -> bool:
    """No hook is left, neither TransformerLens' nor PyTorch's, and no method is wrapped."""
    inner = model.original_model
    wrapped = {"generate", "hf_generate", "generate_stream"} & set(model.__dict__)
    return not (n_hooks(model) or inner._forward_hooks or inner._forward_pre_hooks or wrapped)


# ---------------------------------------------------------------- forward passes


@torch.no_grad()
def check_forward(model: Any, plain: Any, i: int, at: Any, k: int) -> None:
    v = push(model, i, k)
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    expected, streams = [], []
    for prompt in PROMPTS:
        ids = sl.encode(model, prompt)
        assert model.to_tokens(prompt)[0].tolist() == ids
        seen: list[torch.Tensor] = []
        read = (model.cfg.n_layers - 1, "resid_post", lambda s, seen=seen: seen.append(s) or s)
        expected.append(reference_logits(plain, ids, [*edits(v, at, len(ids), len(ids)), read]))
        streams.append(seen[0])
    tokens, mask = padded(model)
    with sl.steer(model, sl.Add(v, at=at)):
        for prompt, logits, stream in zip(PROMPTS, expected, streams, strict=True):
            if at == [10] and prompt != PROMPTS[2]:
                continue
            close(model(prompt)[0], logits)
            got, cache = model.run_with_cache(prompt, names_filter=last)
            close(got[0], logits)
            torch.testing.assert_close(cache[last][0], stream, atol=1e-3, rtol=1e-3)
        rows = [*model(PROMPTS, padding_side="left"), *model(tokens, attention_mask=mask)]
        for row, logits in zip(rows, expected * 2, strict=True):
            close(row[-len(logits) :], logits)
        if i % 2:  # on the right, with a mask
            tokens = model.to_tokens(PROMPTS, padding_side="right")
            lengths = torch.tensor([len(logits) for logits in expected])
            mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
            for row, logits in zip(model(tokens, attention_mask=mask), expected, strict=True):
                close(row[: len(logits)], logits)
    assert nothing_left(model)


@pytest.mark.parametrize("i", range(len(PLACES)), ids=[str(at) for at, _ in PLACES])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_passes_under_steer(booted: Any, architecture: str, i: int) -> None:
    """Single texts, lists padded on the left, tensors with a mask, run_with_cache."""
    check_forward(*booted(architecture), i, *PLACES[i])


# ---------------------------------------------------------------- generation


def first_end(model: Any, new: list[int]) -> int:
    """How many tokens stand before the text ends."""
    return new.index(model.tokenizer.eos_token_id) if model.tokenizer.eos_token_id in new else NEW


@torch.no_grad()
def check_generate(model: Any, plain: Any, i: int, at: Any, k: int) -> None:
    """Logits of every step, and the texts; the ways to pass prompts alternate with the case."""
    v = push(model, i, k)
    run = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "verbose": False}
    tokens, mask = padded(model)
    frame = sl.generate(model, PROMPTS, {"x": sl.Add(v, at=at)}, 1, NEW, temperature=0,
                        progress=False)  # fmt: skip
    calls: list[tuple[list[str], dict[str, Any]]] = [
        (PROMPTS[:1], {"input": PROMPTS[0], "use_past_kv_cache": True}),
        (PROMPTS[:1], {"input": PROMPTS[0], "use_past_kv_cache": False}),
        (PROMPTS, {"input": PROMPTS, "use_past_kv_cache": i % 2 == 0}),
        (PROMPTS, {"input": tokens, "attention_mask": mask, "use_past_kv_cache": i % 2 == 1}),
    ]
    known: dict[Any, torch.Tensor] = {}  # what the reference said, by sequence
    with sl.steer(model, sl.Add(v, at=at)):
        results = [model.generate(**run, **call) for _, call in calls]
    assert nothing_left(model)
    for (prompts, _), result in zip(calls, results, strict=True):
        width = result.sequences.shape[1] - len(result.logits)
        for r, prompt in enumerate(prompts):
            ids, new = sl.encode(model, prompt), result.sequences[r, width:].tolist()
            end = first_end(model, new)
            assert new[:end] == frame.tokens[PROMPTS.index(prompt)]
            steps = min(end + 1, len(result.logits))
            whole = ids + new[: steps - 1]
            if tuple(whole) not in known:
                acts = edits(v, at, len(ids), len(whole))
                known[tuple(whole)] = reference_logits(plain, whole, acts)[len(ids) - 1 :]
            close(torch.stack([step[r] for step in result.logits[:steps]]), known[tuple(whole)])


@pytest.mark.parametrize("i", range(len(PLACES)), ids=[str(at) for at, _ in PLACES])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generate_under_steer(booted: Any, architecture: str, i: int) -> None:
    check_generate(*booted(architecture), i, *PLACES[i])


@pytest.mark.parametrize("at", ["front", "generated", [6]])  # 6: generated in "I love dogs"
@pytest.mark.thorough
def test_steer_on_the_real_model(booted: Any, at: Any) -> None:
    model, plain = booted("smollm2")
    i, k = (0, 2) if at == "front" else (1, 1)
    if at != [6]:
        check_forward(model, plain, i, at, k)
    check_generate(model, plain, i, at, k)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3_text"])
@pytest.mark.thorough
def test_every_way_to_generate_says_the_same(booted: Any, architecture: str) -> None:
    model, _ = booted(architecture)
    tokens, mask = padded(model)
    run = {"max_new_tokens": NEW, "do_sample": False, "return_type": "tokens"}
    free = model.generate(tokens, attention_mask=mask, verbose=False, **run)
    moved = 0
    for at in ("generated", [-2], [10], slice(-2, None), "front"):
        condition = sl.Add(noise(model, 2), at=at)
        with sl.steer(model, condition):
            expected = model.generate(tokens, attention_mask=mask, verbose=False, **run)
            for more in ({}, {"use_past_kv_cache": False, "use_cache": False}):
                found = model.hf_generate(tokens, attention_mask=mask, **run, **more)
                assert found.tolist() == expected[:, : found.shape[1]].tolist()
            for cached in (True, False):
                stream = model.generate_stream(
                    tokens, attention_mask=mask, max_tokens_per_yield=2, verbose=False,
                    use_past_kv_cache=cached, **run,
                )  # fmt: skip
                assert torch.cat(list(stream), 1).tolist() == expected.tolist()
        moved += free.tolist() != expected.tolist()
    assert moved >= 3 and nothing_left(model)


@torch.no_grad()
def test_a_cache_of_ones_own(booted: Any) -> None:
    """Token by token by hand: the first pass is the prompt, whatever the later ones hold."""
    model, plain = booted("llama")
    v = noise(model, 2)
    ids = sl.encode(model, PROMPTS[2])
    for at in ("generated", [-2], [-1, 12], "all"):
        total, cuts = len(ids), [10, 11, 15, len(ids)]
        k = len(at) if isinstance(at, list) else 1
        where = positions(at, k, cuts[0], total)
        expected = reference_logits(plain, ids, [(2, "resid_pre", adding(v.layers[2], where))])
        with sl.steer(model, sl.Add(v, at=at)):
            cache, got = None, []
            for start, stop in zip([0, *cuts], cuts, strict=False):
                logits, cache = model(
                    torch.tensor([ids[start:stop]]), return_type="logits_and_cache",
                    past_key_values=cache, use_cache=True,
                )  # fmt: skip
                got.append(logits[0])
        close(torch.cat(got), expected)


@torch.no_grad()
@pytest.mark.parametrize("at", ["front", "generated", [-2]])
def test_prompts_one_after_the_other(booted: Any, at: Any) -> None:
    """Each has its own length; what was generated before does not count."""
    model, plain = booted("llama")
    v = noise(model, 2)
    run = {"max_new_tokens": NEW, "do_sample": False, "verbose": False}
    alone = []
    for prompt in PROMPTS:
        with sl.steer(model, sl.Add(v, at=at)):
            alone.append(model.generate(prompt, **run))
    for cached in (True, False):
        with sl.steer(model, sl.Add(v, at=at)):
            for prompt, text in zip(PROMPTS, alone, strict=True):
                ids = sl.encode(model, prompt)
                assert model.generate(prompt, use_past_kv_cache=cached, **run) == text
                expected = reference_logits(plain, ids, edits(v, at, len(ids), len(ids)))
                close(model(prompt)[0], expected)


def test_rows_that_end_early_do_not_look_like_padding(booted: Any) -> None:
    """Prompts of equal length in a tensor without a mask; a text that has ended is filled up with
    the end token, which is the token for padding."""
    model, _ = booted("llama")
    ids = sl.encode(model, PROMPTS[2])[:12]
    tokens = torch.tensor([ids, [0, *ids[:0:-1]]])
    n, condition = len(ids), sl.Add(noise(model, 2, size=0.3), at="generated")
    run = {"max_new_tokens": NEW, "do_sample": False, "verbose": False}
    with sl.steer(model, condition):
        whole = model.generate(tokens, stop_at_eos=False, **run)
    new = whole[:, n:].tolist()
    # From now on a token ends a text that only one of the two begins with.
    r, end = next((r, new[r][0]) for r in (0, 1) if new[r][0] not in new[1 - r])
    tokenizer = model.tokenizer
    kept = tokenizer.pad_token
    try:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end)
        for cached in (True, False):
            with sl.steer(model, condition):
                found = model.generate(tokens, eos_token_id=end, use_past_kv_cache=cached, **run)
            assert (found[r, n:] == end).all() and torch.equal(found[1 - r], whole[1 - r])
    finally:
        tokenizer.pad_token = kept


# ---------------------------------------------------------------- nested, undone, beside others


@torch.no_grad()
def test_nested_blocks_are_the_sum(booted: Any) -> None:
    model, plain = booted("gpt2")
    a, b = noise(model, 2, 2, seed=1), noise(model, 2, seed=2)
    ids = sl.encode(model, PROMPTS[0])
    run = {"max_new_tokens": NEW, "do_sample": False, "verbose": False}
    with sl.steer(model, a):
        with sl.steer(model, sl.Add(b, at="generated")):
            both, text = model(PROMPTS[0])[0], model.generate(PROMPTS[0], **run)
        outer = model(PROMPTS[0])[0]
        assert model.generate(PROMPTS[0], **run) != text
    first = edits(a, "front", len(ids), len(ids))
    close(both, reference_logits(plain, ids, first + edits(b, "generated", len(ids), len(ids))))
    close(outer, reference_logits(plain, ids, first))
    with sl.steer(model, [a, sl.Add(b, at="generated")]):
        close(model(PROMPTS[0])[0], both)
        assert model.generate(PROMPTS[0], **run) == text
    assert nothing_left(model)


@torch.no_grad()
def test_nested_blocks_act_from_the_outside_in(booted: Any) -> None:
    model, plain = booted("gpt2")
    v = noise(model, 2)
    unit = v.layers[2][0] / v.layers[2].norm()
    ids = sl.encode(model, PROMPTS[0])

    def zero_out(s: torch.Tensor) -> torch.Tensor:
        return s - (s @ unit)[:, None] * unit

    with sl.steer(model, sl.Add(v, at="all")), sl.steer(model, sl.Ablate(v)):
        close(model(PROMPTS[0])[0], reference_logits(plain, ids, [(2, "resid_pre", zero_out)]))
    with sl.steer(model, sl.Ablate(v)), sl.steer(model, sl.Add(v, at="all")):
        then = reference_logits(plain, ids, [(2, "resid_pre", lambda s: zero_out(s) + v.layers[2])])
        close(model(PROMPTS[0])[0], then)


@torch.no_grad()
def test_nothing_is_left_after_an_error(booted: Any) -> None:
    model, _ = booted("llama")
    v = noise(model, 2)
    before = model(PROMPTS[0])
    for error in (KeyboardInterrupt, RuntimeError, ValueError):
        with pytest.raises(error, match="mine"), sl.steer(model, v):
            model(PROMPTS[0])
            raise error("mine")
        assert nothing_left(model)

    def boom(x: Any, hook: Any) -> None:
        raise RuntimeError("in the middle of a pass")

    with pytest.raises(RuntimeError, match="in the middle"), sl.steer(model, v):
        model.run_with_hooks(PROMPTS[0], fwd_hooks=[("blocks.3.hook_resid_pre", boom)])
    assert nothing_left(model)
    with pytest.raises(RuntimeError, match="in the middle"), sl.steer(model, v):
        model.add_hook("blocks.3.hook_resid_pre", boom)
        try:
            model.generate(PROMPTS[0], verbose=False)
        finally:
            model.reset_hooks()
    assert nothing_left(model)
    with pytest.raises(ValueError, match="shorter vector"), sl.steer(model, noise(model, 1, 40)):
        model(PROMPTS[0])
    assert nothing_left(model)
    assert torch.equal(model(PROMPTS[0]), before)


@torch.no_grad()
def test_a_stream_that_is_not_read_to_its_end(booted: Any) -> None:
    model, plain = booted("llama")
    v = noise(model, 2)
    ids = sl.encode(model, PROMPTS[2])
    with sl.steer(model, sl.Add(v, at="generated")):
        for text in model.generate_stream(PROMPTS[0], max_tokens_per_yield=1, verbose=False):
            assert isinstance(text, str)
            break
        del text
        expected = reference_logits(plain, ids, edits(v, "generated", len(ids), len(ids)))
        close(model(PROMPTS[2])[0], expected)
    assert nothing_left(model)


@torch.no_grad()
def test_hooks_of_ones_own_are_honoured(booted: Any) -> None:
    """They see what they would see without steer, or behind it, and stay when it goes."""
    model, plain = booted("llama")
    v = noise(model, 2, 2)
    ids = sl.encode(model, PROMPTS[0])
    streams: list[torch.Tensor] = []

    def look(x: torch.Tensor, hook: Any) -> None:
        streams.append(x[0].clone())

    double = ("blocks.3.hook_resid_pre", lambda x, hook: 2 * x)
    model.add_hook("blocks.2.hook_resid_post", look)
    try:
        with sl.steer(model, v):
            logits = model.run_with_hooks(PROMPTS[0], fwd_hooks=[double])[0]
            with model.hooks(fwd_hooks=[double]):
                model(PROMPTS[0])
            once = model(PROMPTS[0])[0]  # TransformerLens took away its own hooks, not ours
        assert n_hooks(model) == 1 and not model.original_model._forward_pre_hooks
        model(PROMPTS[0])
        assert len(streams) == 4
        assert torch.equal(streams[0], streams[2]) and not torch.equal(streams[2], streams[3])
    finally:
        model.reset_hooks()
    act = edits(v, "front", len(ids), len(ids))
    close(logits, reference_logits(plain, ids, [*act, (3, "resid_pre", lambda s: 2 * s)]))
    close(once, reference_logits(plain, ids, act))


def test_methods_of_the_model_come_back(booted: Any) -> None:
    model, _ = booted("llama")
    names = ("generate", "hf_generate", "generate_stream")
    v = noise(model, 2)
    before = [getattr(model, name) for name in names]
    with sl.steer(model, v):
        assert model.generate.__doc__ == before[0].__doc__
        with sl.steer(model, v):
            pass
        assert "generate" in model.__dict__
    assert [getattr(model, name) for name in names] == before
    mine = lambda *args, **kwargs: "mine"  # noqa: E731
    model.__dict__["generate"] = mine
    try:
        with sl.steer(model, v):
            assert model.generate() == "mine"
        assert model.__dict__["generate"] is mine
    finally:
        del model.__dict__["generate"]
    assert nothing_left(model)


# ---------------------------------------------------------------- the control, and what is refused


@torch.no_grad()
@pytest.mark.thorough
def test_no_condition_is_bit_identical(booted: Any) -> None:
    for name in ("llama", "gpt2", "smollm2"):
        model, _ = booted(name)
        v = noise(model, 2, 2)
        tokens, mask = padded(model)
        before = model(tokens, attention_mask=mask)
        conditions = [None, sl.Add(v, coefficient=0), [], 0 * v, [sl.Add(v, "all", 0)]]
        for nothing in conditions[: 2 if name == "smollm2" else None]:
            with sl.steer(model, nothing):
                assert nothing_left(model)
                assert torch.equal(model(tokens, attention_mask=mask), before)
            assert sl.hooks(model, nothing, n_prompt=9) == []
            assert torch.equal(sl.steered_logits(model, PROMPTS, nothing), before)


@torch.no_grad()
def test_rows_without_a_condition_are_bit_identical(model: Any) -> None:
    tokens, mask = padded(model)
    ids = [sl.encode(model, p) for p in PROMPTS]
    steered = noise(model, 3, 2)
    acts = [[], as_interventions(0 * steered, model), as_interventions(sl.Add(steered), model)]
    hooks = BatchHooks(model, acts, [len(i) for i in ids])
    hooks.window([len(i) - tokens.shape[1] for i in ids], tokens.shape[1])
    free = model.forward(tokens, attention_mask=mask)
    with hooks.hooks():
        hooked = model.forward(tokens, attention_mask=mask)
    real = mask.bool()
    assert torch.equal(free[0][real[0]], hooked[0][real[0]])
    assert torch.equal(free[1][real[1]], hooked[1][real[1]])
    assert not torch.equal(free[2][real[2]], hooked[2][real[2]])


@pytest.mark.parametrize("at", ["generated", "back", "middle", "prompt", [-1], slice(-2, None)])
def test_unmarked_padding_on_the_right_is_refused(booted: Any, at: Any) -> None:
    model, _ = booted("llama")
    condition = sl.Add(noise(model, 2), at=at)
    with pytest.raises(ValueError, match="padded on the right.*pad on the left.*attention_mask"):
        with sl.steer(model, condition):
            model(PROMPTS, padding_side="right")
    assert nothing_left(model)


@torch.no_grad()
def test_padding_on_the_right_does_not_matter_at_the_front(booted: Any) -> None:
    model, plain = booted("llama")
    v = noise(model, 2, 2)
    for at in ("front", [1, 3]):
        with sl.steer(model, sl.Add(v, at=at)):
            rows = model(PROMPTS, padding_side="right")
        for prompt, row in zip(PROMPTS, rows, strict=True):
            ids = sl.encode(model, prompt)
            expected = reference_logits(plain, ids, edits(v, at, len(ids), len(ids)))
            close(row[: len(ids)], expected)


def test_a_condition_that_touches_nothing_is_an_error(booted: Any) -> None:
    model, _ = booted("llama")
    far = sl.Add(noise(model, 2), at=[30])
    with pytest.raises(ValueError, match=r"Add at \(30,\) touched no position .*longest.* 23"):
        with sl.steer(model, [noise(model, 1), far]):
            model(PROMPTS[0])
            model(PROMPTS[2])
    with pytest.raises(ValueError, match="touched no position"), sl.steer(model, far):
        model.generate(PROMPTS[0], max_new_tokens=3, verbose=False)
    assert nothing_left(model)
    with sl.steer(model, far):  # nothing ran
        pass
    with sl.steer(model, far):  # one of the passes is enough
        model(PROMPTS[0])
        model.generate(PROMPTS[2], max_new_tokens=12, stop_at_eos=False, verbose=False)
        model(PROMPTS[0])
    with pytest.raises(ValueError, match="touched no position"):
        sl.steered_logits(model, PROMPTS, far)


@pytest.mark.parametrize(
    ("mask", "words"),
    [(torch.tensor([[1, 0, 1, 1]]), "gaps"), (torch.ones(1, 1, 4, 4), r"\[1, 1, 4, 4\]")],
)
def test_a_mask_that_gives_no_positions_is_refused(booted: Any, mask: Any, words: str) -> None:
    model, _ = booted("llama")
    with pytest.raises(ValueError, match=words), sl.steer(model, noise(model, 2)):
        model(torch.tensor([[0, 40, 41, 42]]), attention_mask=mask)
    assert nothing_left(model)


def test_a_condition_has_to_fit(booted: Any) -> None:
    model, _ = booted("llama")
    for bad, words in [
        ("love", "condition is"),
        (noise(model, 9), "layers 0 to 3"),
        (sl.SteeringVector({1: torch.ones(1, 33)}), "d_model 33"),
    ]:
        with pytest.raises(ValueError, match=words), sl.steer(model, bad):
            raise AssertionError("the block must not begin")
        with pytest.raises(ValueError, match=words):
            sl.hooks(model, bad, n_prompt=4)
        assert nothing_left(model)


# ---------------------------------------------------------------- hooks for run_with_hooks


@torch.no_grad()
@pytest.mark.parametrize("i", range(len(PLACES)), ids=[str(at) for at, _ in PLACES])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3_text"])
def test_hooks_for_run_with_hooks(booted: Any, architecture: str, i: int) -> None:
    """One sequence, of which the first tokens are the prompt; a batch padded on the left."""
    model, plain = booted(architecture)
    at, k = PLACES[i]
    v = push(model, i, k)
    condition = sl.Add(v, at=at)
    ids, n = sl.encode(model, PROMPTS[2]), 9
    hooks = sl.hooks(model, condition, n_prompt=n)
    assert [name for name, _ in hooks] == [f"blocks.{l}.hook_{v.site}" for l in v.layers]
    expected = reference_logits(plain, ids, edits(v, at, n, len(ids)))
    for _ in range(2):  # they hold no state
        close(model.run_with_hooks(torch.tensor([ids]), fwd_hooks=hooks)[0], expected)
    for row in model.run_with_hooks(torch.tensor([ids, ids]), fwd_hooks=hooks):
        close(row, expected)
    tokens, mask = padded(model)
    lengths = mask.sum(1).tolist()
    hooks = sl.hooks(model, condition, n_prompt=lengths)
    rows = model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=hooks)
    for row, prompt in zip(rows, PROMPTS, strict=True):
        ids = sl.encode(model, prompt)
        close(row[-len(ids) :], reference_logits(plain, ids, edits(v, at, len(ids), len(ids))))
    assert nothing_left(model)


@torch.no_grad()
def test_hooks_refuse_what_they_cannot_know(booted: Any) -> None:
    model, _ = booted("llama")
    ids = sl.encode(model, PROMPTS[0])
    hooks = sl.hooks(model, noise(model, 2), n_prompt=len(ids))
    cache = model(torch.tensor([ids]), return_type="logits_and_cache", use_cache=True)[1]
    with pytest.raises(ValueError, match="1 column.*for cached generation use steer"):
        model.run_with_hooks(torch.tensor([[5]]), past_key_values=cache, fwd_hooks=hooks)
    hooks = sl.hooks(model, noise(model, 2), n_prompt=[9, 9])
    with pytest.raises(ValueError, match=r"2 whole sequence.* of 1 row"):
        model.run_with_hooks(torch.tensor([ids]), fwd_hooks=hooks)
    with pytest.raises(ValueError, match="shorter vector"):
        sl.hooks(model, noise(model, 2, 10), n_prompt=len(ids))
    hooks = sl.hooks(model, sl.Add(noise(model, 2), at=[12]), n_prompt=len(ids))
    with pytest.warns(UserWarning, match="touches nothing at blocks.2.hook_resid_pre"):
        model.run_with_hooks(torch.tensor([ids]), fwd_hooks=hooks)
    assert nothing_left(model)


@torch.no_grad()
def test_steered_logits_of_texts_ids_and_tensors(booted: Any) -> None:
    model, plain = booted("llama")
    v = noise(model, 2, 2)
    condition = sl.Add(v, at="back")
    ids = [sl.encode(model, p) for p in PROMPTS]
    expected = [reference_logits(plain, i, edits(v, "back", len(i), len(i))) for i in ids]
    for prompts in (PROMPTS, ids, [PROMPTS[0], ids[1], tuple(ids[2])]):
        rows = sl.steered_logits(model, prompts, condition)
        assert rows.shape == (3, len(ids[2]), model.cfg.d_vocab) and not rows.requires_grad
        for row, truth in zip(rows, expected, strict=True):
            close(row[-len(truth) :], truth)
    for one in (PROMPTS[0], ids[0], torch.tensor(ids[0]), torch.tensor([ids[0]])):
        close(sl.steered_logits(model, one, condition)[0], expected[0])
    two = torch.tensor([ids[0], ids[0][::-1]])
    close(sl.steered_logits(model, two, condition)[0], expected[0])
    for empty in ([], [""], ""):
        with pytest.raises(ValueError, match="empty|no prompts"):
            sl.steered_logits(model, empty, condition)
    assert nothing_left(model)
