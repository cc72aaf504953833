"""Kinds of intervention: closed forms in float64, and hand-written PyTorch hooks."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, batch_logits, n_hooks, noise, positions, reference_logits

import steerlib as sl
from steerlib.engine import decode
from steerlib.interventions import Slice, act_before_read, first_position
from steerlib.lab.panels import SteeringPanel

PROMPTS = [
    "I love dogs",
    "I went up to my friend and said",
    "I went up to the ship and said that the weather was fine",
    "The ship left the harbour in the morning, and nobody knew when it would return",
]


def unit(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[0] / tensor[0].norm()


# ---------------------------------------------------------------- closed forms


def draw(seed: int, n: int = 1, d: int = 16) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def vector(seed: int, d: int = 16) -> Any:
    return sl.SteeringVector({3: 2 * draw(seed, d=d)}, "resid_post", "all")


def applied(act: Any, h: torch.Tensor) -> torch.Tensor:
    """As hooks call it: each operand with a row for every stream vector."""
    operands = [o.expand(len(h), *o.shape[1:]) for o in act.operands(3)]
    return act.kind.apply(h, *operands)


def exactly(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_ablate_in_closed_form(seed: int) -> None:
    h, r, m = draw(seed, 7), vector(seed + 10), vector(seed + 20)
    v, mean = unit(r.layers[3]), m.layers[3][0]
    outer = torch.outer(v, v)
    exactly(applied(sl.Ablate(r), h), h - h @ outer)
    exactly(applied(sl.Ablate(r, to="mean", mean=m), h), h - h @ outer + mean @ outer)
    exactly(applied(sl.Ablate(r, to="mean", mean=1.5), h), h - h @ outer + 1.5 * v)
    exactly(applied(sl.Ablate(r), h) @ v, torch.zeros(7, dtype=torch.float64))


@pytest.mark.parametrize("alpha", [-2.0, 0.0, 0.5, 1.0])
def test_affine_in_closed_form(alpha: float) -> None:
    """``h - P h + P μ + α r``; where the class means are known, α = 1 leads to the other one."""
    h, r, m = draw(1, 7), vector(2), vector(3)
    p = torch.outer(unit(r.layers[3]), unit(r.layers[3]))
    mean, whole = m.layers[3][0], r.layers[3][0]
    exactly(applied(sl.Affine(r, m, coefficient=alpha), h), h - h @ p + mean @ p + alpha * whole)
    other = sl.SteeringVector({3: m.layers[3] + r.layers[3]}, "resid_post")
    moved = applied(sl.Affine(r, m), h) @ unit(r.layers[3])
    exactly(moved, (other.layers[3][0] @ unit(r.layers[3])).expand(7))
    assert not sl.Affine(r, m, coefficient=0).is_identity


@pytest.mark.parametrize(
    ("low", "high"), [(None, 0.3), (-0.2, None), (-0.2, 0.3), (0.7, 0.7), (-9, 9)]
)
def test_clamp_in_closed_form(low: float | None, high: float | None) -> None:
    h, r = draw(4, 50), vector(5)
    v = unit(r.layers[3])
    along = (h @ v).tolist()
    wanted = [
        max(-1e9 if low is None else low, min(1e9 if high is None else high, a)) for a in along
    ]
    got = applied(sl.Clamp(r, low=low, high=high), h)
    change = torch.tensor(wanted, dtype=torch.float64) - h @ v
    exactly(got, h + change[:, None] * v)
    inside = change.abs() < 1e-15
    assert torch.equal(got[inside], h[inside])  # within the bounds, bit for bit
    assert inside.all() == (high == 9) and not (inside.any() and low == high)


@pytest.mark.parametrize("angle", [-100.0, 30.0, 90.0, 180.0, 360.0, 400.0])
@pytest.mark.parametrize("absolute", [False, True])
def test_rotate_in_closed_form(angle: float, absolute: bool) -> None:
    h, a, b = draw(6, 9), vector(7), vector(8)
    q, r = torch.linalg.qr(torch.cat([a.layers[3], b.layers[3]]).T)
    e = (q * r.diagonal().sign()).T  # Gram-Schmidt by another hand
    turn = torch.deg2rad(torch.tensor(angle, dtype=torch.float64))
    if absolute:
        plane = e.T @ torch.stack([turn.cos(), turn.sin()])
        expected = h - h @ e.T @ e + (h @ e.T).norm(dim=-1, keepdim=True) * plane
    else:
        spin = torch.linalg.matrix_exp(turn * (torch.outer(e[1], e[0]) - torch.outer(e[0], e[1])))
        expected = h @ spin.T
    got = applied(sl.Rotate(a, b, angle=angle, absolute=absolute), h)
    exactly(got, expected)
    exactly(got.norm(dim=-1), h.norm(dim=-1))
    if angle == 30 and not absolute:  # half way there, twice
        half = applied(sl.Rotate(a, b, angle=15), applied(sl.Rotate(a, b, angle=15), h))
        exactly(half, got)
        exactly(applied(sl.Rotate(a, b, angle=-30), got), h)


def test_what_changes_nothing_is_none() -> None:
    r, b, zero = vector(1), vector(2), 0 * vector(1)
    for act in (
        *(sl.Rotate(r, b, angle=a) for a in (0, 360, -720.0)),
        sl.Clamp(r),
        sl.Ablate(zero),
        sl.Clamp(zero, low=1),
        sl.When(0 * r, r, 0.0),
    ):
        assert act.is_identity
        h = draw(3, 4)
        if act.kind is not sl.Add:
            torch.testing.assert_close(applied(act, h), h)
    for act in (
        *(sl.Rotate(r, b, absolute=True), sl.Rotate(r, b, angle=1), sl.Clamp(r, low=-1e9)),
        *(sl.Ablate(r), sl.When(r, r, 1e9)),
    ):
        assert not act.is_identity


# ---------------------------------------------------------------- beside each other, by hand


def kinds(model: Any) -> dict[str, Any]:
    """Every kind, with several settings, at several layers, sites and places."""
    a, b = noise(model, 1), noise(model, 1, seed=1)
    c, d = (noise(model, 2, seed=s, site="resid_post") for s in (2, 3))
    two = sl.SteeringVector({**a.layers, 3: b.layers[1]}, "resid_pre")
    return {
        "zero": sl.Ablate(a),
        "zero two": sl.Ablate(two, "generated"),
        "mean": sl.Ablate(a, to="mean", mean=b),
        "level": sl.Ablate(c, [1, -1], to="mean", mean=3.0),
        "affine": sl.Affine(a, b, "all", 0.5),
        "affine there": sl.Affine(c, 2.0, "generated", -1.0),
        "set": sl.Clamp(a, low=4.0, high=4.0),
        "cap": sl.Clamp(c, "prompt", high=0.5),
        "floor": sl.Clamp(a, slice(1, None), low=-0.5),
        "turn": sl.Rotate(a, b, angle=70.0),
        "turn to": sl.Rotate(c, d, "generated", 120.0, absolute=True),
    }


def by_hand(act: Any, n: int, total: int) -> list[Any]:
    """Any kind as edits of the plain model, written down anew."""
    at = slice(*act.at) if isinstance(act.at, Slice) else act.at
    edits = []
    for layer, tensor in act.vectors[0].layers.items():

        def edit(stream: torch.Tensor, layer: int = layer, rows: Any = tensor) -> torch.Tensor:
            stream = stream.clone()
            for i, p in enumerate(positions(at, len(rows), n, total)):
                if p >= len(stream):
                    continue
                h, r = stream[p], rows[i if len(rows) > 1 else 0]
                v = r / r.norm()
                if isinstance(act, sl.Add):
                    h = h + act.coefficient * r
                elif isinstance(act, sl.Clamp):
                    low = -1e9 if act.low is None else act.low
                    high = 1e9 if act.high is None else act.high
                    h = h + (min(max(float(h @ v), low), high) - h @ v) * v
                elif isinstance(act, sl.Rotate):
                    w = act.toward.layers[layer][0]
                    w = w - (w @ v) * v
                    w = w / w.norm()
                    turn = torch.deg2rad(torch.tensor(act.angle))
                    x, y = h @ v, h @ w
                    phi = turn if act.absolute else torch.atan2(y, x) + turn
                    rho = torch.sqrt(x * x + y * y)
                    h = h - x * v - y * w + rho * (phi.cos() * v + phi.sin() * w)
                else:
                    mean = getattr(act, "mean", None)
                    level = mean.layers[layer][0] @ v if hasattr(mean, "layers") else mean or 0
                    h = h - (h @ v) * v + level * v
                    if isinstance(act, sl.Affine):
                        h = h + act.coefficient * r
                stream[p] = h
            return stream

        edits.append((layer, act.site, edit))
    return edits


def passes(plain: Any, act: Any, ids: list[int], n: int, before: Any = ()) -> bool:
    """Whether a prompt of n tokens passes, read from the plain model."""
    seen = []
    ((layer, direction),) = act.direction.layers.items()
    read = (layer, act.direction.site, lambda s: seen.append(s) or s)
    reference_logits(plain, ids[:n], [*before, read])
    return bool(seen[0][act.position] @ unit(direction) > act.threshold)


def expected_logits(plain: Any, ids: list[int], acts: list[Any], n: int) -> torch.Tensor:
    edits: list[Any] = []
    for act in acts:
        if isinstance(act, sl.When):
            if not passes(plain, act, ids, n, edits):
                continue
            act = act.condition
        edits += by_hand(act, n, len(ids))
    return reference_logits(plain, ids, edits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_kinds_in_one_batch_equal_plain_hooks(tiny: Any, architecture: str) -> None:
    model, plain = tiny(architecture)
    acts = list(kinds(model).values())
    acts += [sl.Add(noise(model, 1, seed=5), "all", 2.0)]
    conditions = [[act] for act in acts] + [acts[::-1], acts[1::3], []]
    rows = [(sl.encode(model, p), c) for p in PROMPTS for c in conditions]
    for logits, (ids, condition) in zip(batch_logits(model, rows), rows, strict=True):
        expected = expected_logits(plain, ids, condition, len(ids))
        torch.testing.assert_close(logits, expected, atol=5e-4, rtol=5e-4)


def generated_by_hand(model: Any, plain: Any, prompt: str, acts: list[Any], new: int) -> list[int]:
    ids = sl.encode(model, prompt)
    n = len(ids)
    for _ in range(new):
        token = int(expected_logits(plain, ids, acts, n)[-1].argmax())
        if token == model.tokenizer.eos_token_id:
            break
        ids.append(token)
    return ids[n:]


RUN: dict[str, Any] = {
    "n_samples": 1, "max_new_tokens": 5, "temperature": 0, "progress": False,
}  # fmt: skip


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3_text"])
@pytest.mark.thorough
def test_all_kinds_while_generating(tiny: Any, architecture: str) -> None:
    """Cached, uncached, by hand, and in TransformerLens' own loop."""
    model, plain = tiny(architecture)
    conditions = kinds(model)
    frame = sl.generate(model, PROMPTS[:3], conditions, **RUN)
    assert frame.equals(sl.generate(model, PROMPTS[:3], conditions, use_cache=False, **RUN))
    for row in frame.itertuples():
        act = conditions[row.condition]
        assert row.tokens == generated_by_hand(model, plain, row.prompt, [act], 5)
        if row.prompt == PROMPTS[0]:
            with sl.steer(model, act):
                text = model.generate(row.prompt, max_new_tokens=5, do_sample=False, verbose=False)
            assert text == row.prompt + row.completion
            hooks = sl.hooks(model, act, n_prompt=len(sl.encode(model, row.prompt)))
            ids = sl.encode(model, row.prompt) + row.tokens
            logits = model.run_with_hooks(torch.tensor([ids]), fwd_hooks=hooks)[0]
            known = expected_logits(plain, ids, [act], len(ids) - len(row.tokens))
            torch.testing.assert_close(logits, known, atol=5e-4, rtol=5e-4)
    assert n_hooks(model) == 0
    assert frame.groupby("condition").tokens.agg(str).nunique() >= 6


def test_mean_of_prompts(tiny: Any) -> None:
    model, _ = tiny("llama")
    mean = sl.SteeringVector.from_mean(model, PROMPTS, layers=[1, 2], position=-2, site="resid_pre")
    acts = sl.capture(model, PROMPTS, [1, 2], -2, "resid_pre")
    for i, layer in enumerate((1, 2)):
        torch.testing.assert_close(mean.layers[layer][0], acts[:, i].mean(0))
    assert mean.n_positions == 1 and mean.site == "resid_pre" and "4 prompts" in repr(mean)
    assert sorted(mean.only(2).layers) == [2] and mean.only([1, 2]).layers == mean.layers
    with pytest.raises(KeyError, match="no layer 3"):
        mean.only([2, 3])
    # Where every prompt is put at the mean, the mean stays where it is.
    r = noise(model, 1)
    v, act = unit(r.layers[1]), sl.Ablate(r, [-2], to="mean", mean=mean)
    with sl.steer(model, act):
        seen = sl.capture(model, PROMPTS, 1, -2, "resid_pre")[:, 0]
    torch.testing.assert_close(seen @ v, (acts[:, 0].mean(0) @ v).expand(4), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- conditional steering


def gated(model: Any, act: Any, position: int = -1, **reading: Any) -> Any:
    """A `When` that lets some of the prompts pass: its threshold lies in the widest gap."""
    direction = noise(model, reading.pop("layer", 1), seed=11, **reading)
    read = sl.gate_projections(model, PROMPTS, direction, position)[:, 0].sort().values
    k = int(read.diff().argmax())
    return sl.When(act, direction, float(read[k] + read[k + 1]) / 2, position)


def conditional(model: Any) -> dict[str, Any]:
    a, b = noise(model, 2, seed=21), noise(model, 2, seed=22)
    return {
        "generated": gated(model, sl.Add(a, "generated", 2.0)),
        "all": gated(model, sl.Add(a, "all", 2.0), site="resid_post"),
        "front": gated(model, sl.Add(noise(model, 2, 2, seed=3), "front", 2.0)),
        "read early": gated(model, sl.Add(a, "generated", 2.0), 3),
        "read early, act on all": gated(model, sl.Add(b, "all", -2.0), -3),
        "same site": gated(model, sl.Ablate(a), layer=2),
        "turn": gated(model, sl.Rotate(a, b, "prompt", 90.0)),
        "vector": gated(model, 3 * noise(model, 3, at="generated")),
        "list": [sl.Add(noise(model, 1), "all"), gated(model, sl.Add(b, "all")), a],
        "two": [gated(model, sl.Clamp(a, low=5)), gated(model, sl.Add(b, "all"), 2)],
        "control": None,
    }


def listed(condition: Any) -> list[Any]:
    return condition if isinstance(condition, list) else [condition] if condition else []


def as_acts(condition: Any) -> list[Any]:
    return [sl.Add(c) if isinstance(c, sl.SteeringVector) else c for c in listed(condition)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.thorough
def test_when_in_one_batch_equals_plain_hooks(tiny: Any, architecture: str) -> None:
    """Row by row: some prompts pass, some do not."""
    model, plain = tiny(architecture)
    rows = [(sl.encode(model, p), c) for p in PROMPTS for c in conditional(model).values()]
    got = batch_logits(model, rows)
    for logits, (ids, condition) in zip(got, rows, strict=True):
        expected = expected_logits(plain, ids, as_acts(condition), len(ids))
        torch.testing.assert_close(logits, expected, atol=5e-4, rtol=5e-4)
    for name, condition in conditional(model).items():
        if isinstance(condition, sl.When):
            ids = [sl.encode(model, p) for p in PROMPTS]
            passed = [passes(plain, condition, i, len(i)) for i in ids]
            assert 0 < sum(passed) < len(PROMPTS), name


def test_rows_that_do_not_pass_are_the_control_bit_for_bit(tiny: Any, model: Any) -> None:
    tiny_model = tiny("llama")[0]
    for m in (tiny_model, model):
        ids = [sl.encode(m, p) for p in PROMPTS]
        for name, when in conditional(m).items():
            if not isinstance(when, sl.When):
                continue
            never = replace(when, threshold=1e6)
            mixed = [(i, never if k % 2 else None) for i in ids for k in range(4)]
            plain = batch_logits(m, [(i, None) for i, _ in mixed])
            for got, expected in zip(batch_logits(m, mixed), plain, strict=True):
                assert torch.equal(got, expected), name
            some = batch_logits(m, [(i, when) for i in ids])
            control = batch_logits(m, [(i, None) for i in ids])
            same = [torch.equal(x, y) for x, y in zip(some, control, strict=True)]
            read = [m_passes(m, when, prompt) for prompt in PROMPTS]
            assert same == [not passed for passed in read] and 0 < sum(same) < 4, name
            if m is model:
                break


def m_passes(model: Any, when: Any, prompt: str) -> bool:
    ((layer, tensor),) = when.direction.layers.items()
    read = sl.capture(model, prompt, layer, when.position, when.direction.site)[0, 0]
    return bool(read @ unit(tensor) > when.threshold)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.thorough
def test_when_is_remembered_while_generating(tiny: Any, architecture: str) -> None:
    """Prompts that share a beginning, samples that share a prompt, rows that leave early; cached,
    uncached, one condition at a time, by hand, and in TransformerLens' own loop."""
    model, plain = tiny(architecture)
    conditions = conditional(model)
    begun = ["The weather was fine and the little dog laughed, " + p for p in PROMPTS]
    run = {**RUN, "n_samples": 2}
    frame = sl.generate(model, [*PROMPTS, *begun], conditions, **run)
    assert frame.equals(sl.generate(model, [*PROMPTS, *begun], conditions, use_cache=False, **run))
    small = sl.generate(model, [*PROMPTS, *begun], conditions, batch_size=3, **run)
    assert frame.equals(small)
    for row in frame[frame["sample"] == 0].itertuples():
        acts = as_acts(conditions[row.condition])
        assert row.tokens == generated_by_hand(model, plain, row.prompt, acts, 5), row.condition
    alone = sl.generate(model, PROMPTS, {"all": conditions["all"]}, **run)
    together = frame[(frame.condition == "all") & frame.prompt.isin(PROMPTS)]
    assert alone.tokens.tolist() == together.tokens.tolist()
    known = {(r.prompt, r.condition): r for r in frame.itertuples()}
    for name, condition in conditions.items():
        for cached in (True, False):
            for prompt in PROMPTS[:2]:
                with sl.steer(model, condition):
                    text = model.generate(
                        prompt, max_new_tokens=5, do_sample=False, verbose=False,
                        use_past_kv_cache=cached,
                    )  # fmt: skip
                assert text == prompt + known[prompt, name].completion
            with sl.steer(model, condition):
                texts = model.generate(
                    PROMPTS, max_new_tokens=5, do_sample=False, verbose=False,
                    use_past_kv_cache=cached,
                )  # fmt: skip
            for prompt, text in zip(PROMPTS, texts, strict=True):
                assert text.startswith(prompt + known[prompt, name].completion)
    assert n_hooks(model) == 0


@pytest.mark.thorough
def test_when_in_every_number(tiny: Any) -> None:
    """Propensity, choices, perplexity, changes, surprisal, lens: the same rows pass everywhere."""
    model, plain = tiny("llama")
    conditions = conditional(model)
    texts = [" love", " the rain and"]
    leaning = sl.propensity(model, PROMPTS, texts[:1], texts[1:], conditions)
    chosen = sl.choice_probabilities(model, PROMPTS, ["a", "b"], conditions)
    shared = sl.propensity(
        model, ["The weather was fine and the little dog laughed. " * 2 + p for p in PROMPTS],
        texts[:1], texts[1:], conditions,
    )  # fmt: skip
    tokens = [model.tokenizer(o, add_special_tokens=False)["input_ids"][0] for o in ("a", "b")]
    for table in (leaning, shared):
        for lean in table.itertuples():
            ids, acts = sl.encode(model, lean.prompt), as_acts(conditions[lean.condition])
            n, scores = len(ids), []
            for text in texts:
                new = model.tokenizer(text, add_special_tokens=False)["input_ids"]
                logits = expected_logits(plain, ids + new, acts, n)
                logp = logits[n - 1 : -1].log_softmax(-1)
                scores.append(float(logp[range(len(new)), new].sum()))
            assert lean.propensity == pytest.approx(scores[0] - scores[1], abs=1e-3)
    for choice in chosen.itertuples():
        ids, acts = sl.encode(model, choice.prompt), as_acts(conditions[choice.condition])
        p = expected_logits(plain, ids, acts, len(ids))[-1].softmax(-1)
        assert (choice.a, choice.b) == pytest.approx(p[tokens].tolist(), abs=1e-5)
    perplexity = sl.perplexity(model, PROMPTS, conditions)
    for row in perplexity.itertuples():
        ids, acts = sl.encode(model, row.text), as_acts(conditions[row.condition])
        logp = expected_logits(plain, ids, acts, len(ids)).log_softmax(-1)
        own = logp[range(len(ids) - 1), ids[1:]][2:]
        assert row.surprisal == pytest.approx(-float(own.mean()), abs=1e-3)
    run = {**RUN, "n_samples": 2}
    for name in ("all", "read early"):
        frame = sl.generate(model, PROMPTS, {name: conditions[name]}, **run)
        judged = sl.completion_surprisal(model, frame, conditions[name])
        for number, row in enumerate(frame.itertuples()):
            ids = sl.encode(model, row.prompt)
            whole, acts = ids + row.tokens, as_acts(conditions[name])
            logp = expected_logits(plain, whole, acts, len(ids)).log_softmax(-1)
            own = logp[range(len(ids) - 1, len(whole) - 1), row.tokens]
            got = judged[judged.row == number].surprisal
            assert list(got) == pytest.approx((-own).tolist(), abs=1e-3)
    act = conditions["all"]
    for prompt in PROMPTS:
        lens = sl.logit_lens(model, prompt, act)
        control = sl.logit_lens(model, prompt)
        assert lens.equals(control) != m_passes(model, act, prompt)


@pytest.mark.thorough
def test_when_under_plain_hooks_reads_every_pass_anew(tiny: Any) -> None:
    model, plain = tiny("gpt2")
    for act in conditional(model).values():
        if not isinstance(act, sl.When):
            continue
        ids = [sl.encode(model, p)[:8] for p in PROMPTS]
        hooks = sl.hooks(model, act, n_prompt=8)
        with torch.no_grad():
            for i in ids:
                got = model.run_with_hooks(torch.tensor([i]), fwd_hooks=hooks)[0]
                torch.testing.assert_close(
                    got, expected_logits(plain, i, [act], 8), atol=5e-4, rtol=5e-4
                )
            both = model.run_with_hooks(torch.tensor(ids), fwd_hooks=hooks)
        for i, got in zip(ids, both, strict=True):
            torch.testing.assert_close(
                got, expected_logits(plain, i, [act], 8), atol=5e-4, rtol=5e-4
            )
        with sl.steer(model, act), torch.no_grad():  # one block, several passes
            for i in ids:
                got = model(torch.tensor([i]))[0]
                torch.testing.assert_close(
                    got, expected_logits(plain, i, [act], 8), atol=5e-4, rtol=5e-4
                )


def test_when_is_told_where_it_reads(tiny: Any) -> None:
    model, _ = tiny("llama")
    conditions = conditional(model)
    assert first_position([conditions["generated"]], 9) == 8
    assert first_position([conditions["read early"]], 9) == 3
    ahead = {name: act_before_read(as_acts(c), 9) for name, c in conditions.items()}
    assert {name for name, found in ahead.items() if found} == {
        "all", "front", "read early, act on all", "same site", "turn", "list", "two",
    }  # fmt: skip
    hooks = sl.hooks(model, conditions["all"], n_prompt=9)
    assert [name for name, _ in hooks] == ["blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"]
    late = [h for h in hooks if "resid_pre" in h[0]]  # somebody lost the first
    with pytest.raises(ValueError, match="before its prompt has run"):
        model.run_with_hooks(torch.tensor([list(range(5, 14))]), fwd_hooks=late)
    assert n_hooks(model) == 0


def test_when_that_acts_nowhere_is_pointed_out(tiny: Any) -> None:
    model, _ = tiny("llama")
    far = gated(model, sl.Add(noise(model, 2), [40]))
    with pytest.warns(UserWarning, match="When at .40,. touches no position"):
        sl.propensity(model, PROMPTS[0], [" love"], [" hate"], {"x": far})
    with pytest.raises(ValueError, match="touched no position"), sl.steer(model, far):
        model(PROMPTS[0])


# ---------------------------------------------------------------- as values


def every_kind(model: Any) -> dict[str, Any]:
    return {
        **kinds(model),
        **{k: c for k, c in conditional(model).items() if isinstance(c, sl.When)},
    }


def variations(model: Any) -> list[Any]:
    """Of every kind a few that differ in one parameter each."""
    a, b, c = (noise(model, 1, seed=s) for s in range(3))
    add = sl.Add(a, "all")
    return [
        *(sl.Ablate(v, at) for v, at in itertools.product((a, b), ("all", "generated"))),
        *(sl.Ablate(a, to="mean", mean=m) for m in (b, c, 0.0, 1.0)),
        *(sl.Affine(a, m, coefficient=x) for m in (b, c, 1.0) for x in (0.0, 1.0)),
        *(sl.Clamp(a, low=x, high=y) for x in (None, 0.0) for y in (None, 1.0)),
        *(sl.Rotate(a, v, angle=x, absolute=y) for v in (b, c) for x in (1, 2) for y in (0, 1)),
        *(sl.When(add, v, t, p) for v in (a, b) for t in (0.0, 1.0) for p in (-1, 0)),
        *(sl.When(sl.Ablate(a), a, 0.0), sl.When(2 * a, a, 0.0), add),
    ]


@pytest.mark.thorough
def test_two_parameters_two_keys(tiny: Any, tmp_path: Path) -> None:
    model, _ = tiny("llama")
    acts = variations(model)
    assert len({json.dumps(act.key()) for act in acts}) == len(acts)
    again = variations(model)  # other objects, the same numbers
    assert [json.dumps(x.key()) for x in acts] == [json.dumps(x.key()) for x in again]
    conditions = every_kind(model)
    fresh = sl.generate(model, PROMPTS, conditions, **RUN)
    for name, act in conditions.items():  # one after the other, into one folder
        sl.generate(model, PROMPTS, {name: act}, **RUN, cache=tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        ran: list[int] = []
        patch.setattr(decode, "run", lambda model, rows, *args, **kwargs: ran.append(len(rows)))
        kept = sl.generate(model, PROMPTS, every_kind(model), **RUN, cache=tmp_path)
    assert sum(ran) == 0 and kept.equals(fresh)


def test_code_makes_them_again(tiny: Any) -> None:
    model, _ = tiny("llama")
    for act in every_kind(model).values():
        names = {"sl": sl, "v": act.vectors[0]}
        inner = act.condition if isinstance(act, sl.When) else act
        for holder in (act, inner):
            for field in ("mean", "toward", "direction"):
                if isinstance(getattr(holder, field, None), sl.SteeringVector):
                    names[field] = getattr(holder, field)
        again = eval(act.code("v"), names)
        assert json.dumps(again.key()) == json.dumps(act.key()), act.code("v")
    a = noise(model, 1)
    assert sl.Ablate(a).code() == "sl.Ablate(vector, at='all', to='zero')"
    when = sl.When(sl.Add(a, "generated"), noise(model, 1, seed=1), 1.5)
    assert when.code() == (
        "sl.When(sl.Add(vector, at='generated', coefficient=1.0), direction=direction, "
        "threshold=1.5, position=-1)"
    )


def test_they_work_in_a_panel(tiny: Any) -> None:
    model, _ = tiny("llama")
    v, other = noise(model, 1, at="generated"), noise(model, 1, seed=1)
    made = {
        "clamp": lambda vector, at, c: sl.Clamp(vector, at or "all", low=c, high=c),
        "rotate": lambda vector, at, c: sl.Rotate(vector, other, at or "all", c),
        "when": lambda vector, at, c: sl.When(sl.Add(vector, at, c), other, 0.0),
    }
    for op, make in made.items():
        panel = SteeringPanel(
            model, PROMPTS[0], vector=v, op=op, kinds=made, coefficient=6.0, n_samples=1,
            max_new_tokens=4, temperature=0,
        )  # fmt: skip
        expected = sl.generate(model, PROMPTS[0], {"x": make(v, None, 6.0)}, 1, 4, temperature=0,
                               progress=False)  # fmt: skip
        assert expected.completion[0].strip() in panel.output.value
        assert f"sl.{op.title()}(" in panel.code()
        model_line, *lines = panel.code().splitlines()
        names = {"sl": sl, "model": model, "vector": v, "toward": other, "direction": other}
        exec("\n".join(lines), names)
        assert names["completions"].completion.tolist()[1:] == expected.completion.tolist()
        named = {line.split(":")[0] for line in lines if line.startswith("# ")}
        assert named == {"clamp": {"# vector"}, "rotate": {"# vector", "# toward"},
                         "when": {"# vector", "# direction"}}[op]  # fmt: skip


# ---------------------------------------------------------------- bad input


def bad(model: Any) -> list[tuple[Any, str]]:
    a, b, long = noise(model, 1), noise(model, 1, seed=1), noise(model, 1, 2)
    post, two = (
        noise(model, 1, site="resid_post"),
        sl.SteeringVector({1: a.layers[1], 2: a.layers[1]}),
    )
    wide = sl.SteeringVector({1: torch.ones(1, 33)})
    below = sl.SteeringVector({-1: b.layers[1]})
    nan, inf = float("nan"), float("inf")
    return [
        (lambda: sl.Ablate(long), "needs a direction .one position. as its vector"),
        (lambda: sl.Ablate("x"), "needs a direction"),
        (lambda: sl.Ablate(a, to="middle"), "to='zero', or to='mean' with mean="),
        (lambda: sl.Ablate(a, to="mean"), "to='mean' with mean="),
        (lambda: sl.Ablate(a, mean=1.0), "to='mean' with mean="),
        (lambda: sl.Ablate(a, to="mean", mean=post), "the layers and the site of its vector"),
        (lambda: sl.Ablate(two, to="mean", mean=a), "the layers and the site of its vector"),
        (lambda: sl.Ablate(a, to="mean", mean=wide), "d_model 33"),
        (lambda: sl.Ablate(a, to="mean", mean=nan), "finite number"),
        (lambda: sl.Ablate(a, to="mean", mean=long), "one position"),
        (lambda: sl.Affine(a, "x"), "finite number, got 'x'"),
        (lambda: sl.Affine(a, b, coefficient=inf), "coefficient must be a finite number"),
        (lambda: sl.Clamp(a, low=2, high=1), "low <= high, got 2 and 1"),
        (lambda: sl.Clamp(a, low=nan), "low <= high"),
        (lambda: sl.Rotate(a, 3 * a, angle=9), "parallel"),
        (lambda: sl.Rotate(a, -a, angle=9), "parallel"),
        (lambda: sl.Rotate(a, 0 * a, angle=9), "or one is zero"),
        (lambda: sl.Rotate(0 * a, a, angle=9), "or one is zero"),
        (lambda: sl.Rotate(a, post), "the layers and the site of its vector"),
        (lambda: sl.Rotate(a, 1.0), "needs a direction .one position. as its toward"),
        (lambda: sl.Rotate(a, b, angle=nan), "finite number of degrees"),
        (lambda: sl.When([a, b], a, 0.0), "got list; several take a When each"),
        (lambda: sl.When(None, a, 0.0), "got NoneType"),
        (lambda: sl.When(sl.When(a, a, 0.0), a, 0.0), "no condition yet"),
        (lambda: sl.When(a, long, 0.0), "one position. as its direction"),
        (lambda: sl.When(a, two, 0.0), r"at one layer.*direction.only\(layer\)"),
        (lambda: sl.When(a, b, nan), "threshold must be a finite number"),
        (lambda: sl.When(a, post, 0.0), r"read at layer 1 \(resid_post\), after layer 1"),
        (lambda: sl.When(a, noise(model, 2), 0.0), "read an earlier layer"),
        (lambda: run(model, sl.When(a, b, 0.0, 99)), "no position 99 .* prompt of"),
        (lambda: run(model, sl.When(a, b, 0.0, -99)), "no position -99"),
        (
            lambda: run(model, sl.When(a, below, 0.0)),
            "layers 0 to 3",
        ),
        (lambda: run(model, sl.When(a, wide, 0.0)), "d_model"),
    ]


def run(model: Any, act: Any) -> Any:
    return sl.propensity(model, "I love dogs", [" love"], [" hate"], {"x": act})


def test_bad_input_gets_a_sentence(tiny: Any) -> None:
    model, _ = tiny("llama")
    for make, words in bad(model):
        with pytest.raises(ValueError, match=words):
            make()
    assert n_hooks(model) == 0
