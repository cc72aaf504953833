"""What `capture` reads, against the hidden states of the plain transformers model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, blocks, n_hooks, reference_logits

import steerlib as sl
from steerlib import activations

PROMPTS = [
    "I",
    "The ship left the harbour in the morning, and nobody knew when it would return",
    "I love dogs",
    "I went up to my friend and said that the weather was fine",
    "Love and hate",
]
HEADER = "You are a friend who answers in one word, please. "  # more tokens than it takes to share


@torch.no_grad()
def streams(plain: Any, ids: list[int]) -> dict[str, torch.Tensor]:
    """The residual stream of one unpadded sequence: site -> ``[layer, token, d_model]``."""
    hidden = plain(torch.tensor([ids]), output_hidden_states=True).hidden_states
    pre = torch.cat(hidden[:-1])
    last: list[torch.Tensor] = []  # transformers shows the last block's only after the final norm

    def record(stream: torch.Tensor) -> torch.Tensor:
        last.append(stream.clone())
        return stream

    reference_logits(plain, ids, [(len(pre) - 1, "resid_post", record)])
    return {"resid_pre": pre, "resid_post": torch.cat([pre[1:], torch.stack(last)])}


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@contextmanager
def passes(model: Any) -> Iterator[list[tuple[int, int]]]:
    """Inside the block, the shape [row, column] of the tokens of every forward pass."""
    shapes: list[tuple[int, int]] = []
    forward = type(model).forward

    def counted(self: Any, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(tokens.shape))
        return forward(self, tokens, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "forward", counted)
        yield shapes


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_capture_equals_hidden_states(tiny: Any, architecture: str, bos: bool) -> None:
    model, plain = tiny(architecture, bos)
    prompts = [p for p in PROMPTS if len(sl.encode(model, p)) > 1]
    layers, positions = [3, 0, -2], [0, -1, 1, -2]
    for site in activations.SITES:
        got = sl.capture(model, prompts, layers, positions, site)
        assert got.shape == (len(prompts), 3, 4, 32)
        assert got.dtype == torch.float32 and got.device.type == "cpu"
        for acts, prompt in zip(got, prompts, strict=True):
            expected = streams(plain, sl.encode(model, prompt))[site]
            close(acts, expected[layers][:, positions])
    several = sl.capture(model, prompts, range(4), [-1])
    assert several.shape == (len(prompts), 4, 1, 32)
    close(sl.capture(model, prompts), several[:, :, 0])  # one number drops the axis


def test_capture_equals_hidden_states_on_the_real_model(model: Any, plain_model: Any) -> None:
    prompts = [HEADER + p for p in PROMPTS]
    layers = [0, 14, 29]
    for prompt, acts in zip(prompts, sl.capture(model, prompts, layers), strict=True):
        expected = streams(plain_model, sl.encode(model, prompt))["resid_post"][layers, -1]
        torch.testing.assert_close(acts, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("header", ["", HEADER])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_company_changes_nothing(
    tiny: Any, architecture: str, header: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the order of a batch, its size, or how long the other prompts are."""
    model, _ = tiny(architecture)
    prompts, where = [header + p for p in PROMPTS], [-1, -2] if header else [-1]
    alone = torch.cat([sl.capture(model, p, positions=where) for p in prompts])
    for seed, tokens in enumerate([8192, 8192, 40]):
        monkeypatch.setattr(activations, "_TOKENS_PER_BATCH", tokens)
        order = random.Random(seed).sample(range(len(prompts)), len(prompts))
        close(sl.capture(model, [prompts[i] for i in order], positions=where), alone[order])


# ---------------------------------------------------------------- what is shared

CASES: dict[str, tuple[list[str], list[Any], list[int]]] = {
    "endings of one token": (PROMPTS, [" A", " B"], [-1]),
    "endings of different length": (PROMPTS, [".", " and hate are words; a wedding"], [-1]),
    "endings per prefix": (PROMPTS[:2], [[" love", " rain and"], [" the dog", " hate"]], [-1]),
    "a common header": ([HEADER + p for p in PROMPTS], [" love", " hate and rain"], [-1]),
    "a position in the shared part": ([HEADER + p for p in PROMPTS], [" love", " hate"], [3, -1]),
    "a position far from the end": ([HEADER + p for p in PROMPTS], [" love", " hate"], [-9, -2]),
    "prefixes that begin unlike": (["The ship", "I", "Love and hate"], [" said", " a dog"], [-1]),
    "one prefix": ([HEADER], ["Love", "Hate", "a party"], [-1, -3]),
    "one text begins the other": (["I went up"], [" to my", " to my friend and said"], [-1, -2]),
    "endings that merge with the prefix": (["The we", "A fri"], ["dding", "end said"], [-1, -2]),
}  # fmt: skip


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.thorough
def test_sharing_a_prefix_changes_nothing(tiny: Any, architecture: str, bos: bool) -> None:
    model, plain = tiny(architecture, bos)
    for name, (prefixes, endings, positions) in CASES.items():
        got = sl.capture_pairs(model, prefixes, endings, [1, 3], positions)
        for i, prefix in enumerate(prefixes):
            own = endings if isinstance(endings[0], str) else endings[i]
            for j, ending in enumerate(own):
                ids = sl.encode(model, prefix + ending)
                expected = streams(plain, ids)["resid_post"][[1, 3]][:, positions]
                torch.testing.assert_close(
                    got[i, j], expected, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
                )
    prefix = sl.encode(model, "The we")
    assert sl.encode(model, "The wedding")[: len(prefix)] != prefix  # it does merge


@pytest.mark.parametrize("short", ["dog", PROMPTS[3]])
def test_a_sliding_window_sees_the_right_tokens(tiny: Any, short: str) -> None:
    """Prompts longer than the attention window of 64, beside short ones, with a shared start."""
    model, plain = tiny("gemma3_text")
    prefixes = [HEADER + short, HEADER + 40 * " rain"]
    endings = [" love", " and hate are words; a wedding"]
    got = sl.capture_pairs(model, prefixes, endings)
    flat = sl.capture(model, [p + e for p in prefixes for e in endings])
    close(flat, got.flatten(0, 1))
    for i, prefix in enumerate(prefixes):
        for j, ending in enumerate(endings):
            ids = sl.encode(model, prefix + ending)
            assert (len(ids) > 64) == (i == 1)
            close(got[i, j], streams(plain, ids)["resid_post"][:, -1])


def test_a_shared_header_runs_once(tiny: Any) -> None:
    model, _ = tiny("llama")
    prompts = [HEADER + f"{2 * i} or {2 * i + 1} dogs" for i in range(20, 40)]
    ids = [sl.encode(model, p) for p in prompts]
    header = len(sl.encode(model, HEADER))
    assert header > activations._WORTH_SHARING and len({tuple(i[:header]) for i in ids}) == 1
    rest = max(map(len, ids)) - header
    with passes(model) as shapes:
        sl.capture(model, prompts)
    shared = shapes[0][1]
    assert shared >= header and shapes == [(1, shared), (20, header + rest - shared)]


def test_a_prefix_runs_once_for_all_its_endings(tiny: Any) -> None:
    model, _ = tiny("llama")
    prefixes = [HEADER + p for p in PROMPTS]
    endings = [" A", " B", " C", " D"]
    longest = max(len(sl.encode(model, p + e)) for p in prefixes for e in endings)
    with passes(model) as shapes:
        sl.capture_pairs(model, prefixes, endings)
    (one, header), (five, own), (twenty, last) = shapes
    assert (one, five, twenty) == (1, 5, 20)
    assert header >= len(sl.encode(model, HEADER)) - 1 and header + own + last == longest
    assert last <= 2  # the ending alone
    with passes(model) as shapes:
        sl.capture_pairs(model, prefixes, endings, positions=[0, -1])
    assert shapes == [(20, longest)]  # nothing stands before the first wanted position


@pytest.mark.thorough
def test_blocks_above_the_last_wanted_one_do_not_run(tiny: Any) -> None:
    for architecture in ARCHITECTURES:
        model, _ = tiny(architecture)
        ran: list[int] = []

        def note(layer: int, ran: list[int] = ran) -> Callable[..., None]:
            return lambda *_: ran.append(layer)

        handles = [
            block.register_forward_hook(note(layer))
            for layer, block in enumerate(blocks(model.original_model))
        ]
        try:
            for wanted, expected in [([1, 0], {0, 1}), ([2], {0, 1, 2}), (None, {0, 1, 2, 3})]:
                ran.clear()
                sl.capture(model, [HEADER + p for p in PROMPTS], wanted)
                assert set(ran) == expected and len(ran) == 2 * len(expected)
        finally:
            for handle in handles:
                handle.remove()


def test_nothing_is_left_behind(tiny: Any) -> None:
    model, _ = tiny("llama")

    def stops() -> set[Any]:
        return {getattr(block, "_stop_at_layer_idx", None) for block in model.blocks}

    sl.capture(model, PROMPTS, [1])
    assert n_hooks(model) == 0 and stops() == {None}

    def boom(x: Any, hook: Any) -> None:
        raise KeyboardInterrupt

    model.blocks[1].hook_in.add_hook(boom)
    try:
        with pytest.raises(KeyboardInterrupt):
            sl.capture(model, PROMPTS, [2])
        assert n_hooks(model) == 1 and stops() == {None}  # the user's own stays
    finally:
        model.reset_hooks()
    assert not sl.capture(model, PROMPTS).requires_grad


# ---------------------------------------------------------------- bad input


def test_numbers_may_come_from_numpy(tiny: Any) -> None:
    model, _ = tiny("llama")
    expected = sl.capture(model, PROMPTS, [1, 2], -1)
    assert torch.equal(sl.capture(model, PROMPTS, np.arange(1, 3), np.int64(-1)), expected)
    assert torch.equal(
        sl.capture(model, PROMPTS, np.int64(2), np.array([-1])), expected[:, 1:, None]
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: sl.capture(m, "I", layers=4), "Layer 4 .* layers 0 to 3"),
        (lambda m: sl.capture(m, "I", layers=[0, -5]), "Layer -5 .* layers 0 to 3"),
        (lambda m: sl.capture(m, "I", layers=[]), "list of layers is empty"),
        (lambda m: sl.capture(m, "I", positions=[]), "list of positions is empty"),
        (lambda m: sl.capture(m, "I", positions=2), "Position 2 .* 2 tokens.*I"),
        (lambda m: sl.capture(m, PROMPTS, positions=-3), "Position -3 .* 2 tokens.*I"),
        (lambda m: sl.capture(m, "I", site="mlp_out"), "mlp_out.*resid_pre, resid_post"),
        (lambda m: sl.capture(m, []), "list of prompts is empty"),
        (lambda m: sl.capture(m, ["I", ""]), "prompt '' is empty"),
        (lambda m: sl.capture(m, ["I", None]), "must be a string.*got NoneType"),
        (lambda m: sl.capture_pairs(m, PROMPTS, []), "list of endings is empty"),
        (lambda m: sl.capture_pairs(m, PROMPTS, " A"), "lists of texts"),
        (lambda m: sl.capture_pairs(m, "I", [" A"]), "lists of texts"),
        (lambda m: sl.capture_pairs(m, ["I", "a"], [["b"], ["c", "d"]]), "same number of endings"),
        (lambda m: sl.capture_pairs(m, ["I", "a"], [["b"]]), "same number of endings"),
    ],
)
def test_bad_input_gets_a_sentence(tiny: Any, call: Callable[[Any], Any], words: str) -> None:
    model, _ = tiny("llama")
    with pytest.raises(ValueError, match=words):
        call(model)
    assert n_hooks(model) == 0


# ---------------------------------------------------------------- what is kept


def test_a_cache_is_read_again_and_only_for_the_same_question(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "_TOKENS_PER_BATCH", 40)
    ends = [" love", " hate"]
    fresh = sl.capture_pairs(model, PROMPTS, ends, [3, 7])
    runs: list[int] = []
    real = activations._capture_batch

    def counted(*args: Any) -> torch.Tensor:
        if len(runs) == 2 and runs[0] == 0:
            raise KeyboardInterrupt
        runs.append(0)
        return real(*args)

    monkeypatch.setattr(activations, "_capture_batch", counted)
    with pytest.raises(KeyboardInterrupt):
        sl.capture_pairs(model, PROMPTS, ends, [3, 7], cache=tmp_path)
    kept = len(list(tmp_path.iterdir()))
    assert kept == 2  # what was finished before the interruption
    runs[:] = [1]
    torch.testing.assert_close(
        sl.capture_pairs(model, PROMPTS, ends, [3, 7], cache=tmp_path), fresh, atol=0, rtol=0
    )
    total = len(list(tmp_path.iterdir()))
    assert len(runs) - 1 == total - kept
    runs[:] = [1]
    again = sl.capture_pairs(model, PROMPTS, ends, [3, 7], cache=tmp_path)
    assert torch.equal(again, fresh) and runs == [1]
    for question in ({"layers": [3, 8]}, {"positions": -2}, {"site": "resid_pre"}):
        runs[:] = [1]
        sl.capture_pairs(model, PROMPTS, ends, **{"layers": [3, 7], **question}, cache=tmp_path)
        assert len(runs) > 1
    next(tmp_path.iterdir()).write_bytes(b"torn")
    with pytest.raises(ValueError, match="damaged"):
        for question in ({}, {"layers": [3, 8]}, {"positions": -2}, {"site": "resid_pre"}):
            sl.capture_pairs(model, PROMPTS, ends, **{"layers": [3, 7], **question}, cache=tmp_path)
