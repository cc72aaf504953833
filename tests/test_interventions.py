"""What an intervention does, against hand-written PyTorch hooks on the transformers model."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, adding, n_hooks, reference_logits

import steerlib as sl
from steerlib.interventions import _covered, interventions
from steerlib.scoring import _forward

PROMPTS = [
    "I love dogs",
    "I went up to my friend and said",
    "The ship left the harbour in the morning, and nobody knew when it would return",
]


def vector(model: Any, layer: int, k: int, site: str = "resid_pre", seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    tensor = 3 * torch.randn(k, model.cfg.d_model, generator=generator)
    return sl.SteeringVector({layer: tensor}, site=site, at="front")


def positions(at: Any, k: int, n: int, total: int) -> list[int]:
    """Where a vector of k rows acts, written down anew from the definition of the words."""
    if at == "front":
        return list(range(k))
    if at == "middle":
        return list(range((n - k) // 2, (n - k) // 2 + k))
    if at == "back":
        return list(range(n - k, n))
    if at == "prompt":
        return list(range(n))
    if at == "generated":
        return list(range(n - 1, total))
    if at == "all":
        return list(range(total))
    return [p + n if p < 0 else p for p in at]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
def test_logits_of_a_mixed_padded_batch_equal_plain_hooks(
    tiny: Any, architecture: str, site: str
) -> None:
    """Padding never moves a position: each row of a batch gets what a lone, hooked row gets."""
    model, plain = tiny(architecture)
    rows, expected = [], []
    for i, prompt in enumerate(PROMPTS):
        ids = sl.encode(model, prompt)
        for at, k in [("front", 2), ("middle", 3), ("back", 2), ("all", 1), ((-2, 1), 2)]:
            v = vector(model, i, k, site, seed=k)
            rows.append((ids, interventions(sl.Add(v, at=at, coefficient=1.5), model)))
            where = positions(at, k, len(ids), len(ids))
            edits = [(i, site, adding(1.5 * v.layers[i], where))]
            expected.append(reference_logits(plain, ids, edits))
        rows.append((ids, []))
        expected.append(reference_logits(plain, ids, []))
    order = random.Random(0).sample(range(len(rows)), len(rows))
    for r, logits in _forward(model, [rows[i] for i in order]):
        torch.testing.assert_close(logits, expected[order[r]], atol=1e-4, rtol=1e-4)


def test_logits_equal_plain_hooks_on_the_real_model(model: Any, plain_model: Any) -> None:
    v = sl.SteeringVector.from_prompts(model, "Love", "Hate", layer=6)
    rows, expected = [], []
    for prompt in PROMPTS:
        ids = sl.encode(model, prompt)
        rows.append((ids, interventions(5 * v, model)))
        edit = adding(5 * v.layers[6], list(range(v.n_positions)))
        expected.append(reference_logits(plain_model, ids, [(6, "resid_pre", edit)]))
        assert (expected[-1] - reference_logits(plain_model, ids, [])).abs().max() > 0.1
    for r, logits in _forward(model, rows):
        torch.testing.assert_close(logits, expected[r], atol=2e-3, rtol=1e-3)


def test_ablate_leaves_no_projection_and_equals_plain_hook(tiny: Any) -> None:
    model, plain = tiny("llama")
    direction = vector(model, 1, 1, "resid_post")
    unit = direction.layers[1][0] / direction.layers[1][0].norm()

    def zero_out(stream: torch.Tensor) -> torch.Tensor:
        return stream - (stream @ unit)[:, None] * unit

    ids = sl.encode(model, PROMPTS[1])
    logits = dict(_forward(model, [(ids, interventions(sl.Ablate(direction), model))]))[0]
    expected = reference_logits(plain, ids, [(1, "resid_post", zero_out)])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_interventions_at_one_site_act_in_the_order_given(tiny: Any) -> None:
    model, plain = tiny("llama")
    a = vector(model, 2, 1, seed=1)
    d = a + vector(model, 2, 1, seed=2)
    unit = d.layers[2][0] / d.layers[2][0].norm()

    def zero_out(stream: torch.Tensor) -> torch.Tensor:
        return stream - (stream @ unit)[:, None] * unit

    ids = sl.encode(model, PROMPTS[0])
    add_then_zero = [sl.Add(a, at="all"), sl.Ablate(d)]
    zero_then_add = [sl.Ablate(d), sl.Add(a, at="all")]
    twice = [sl.Add(a, at="all"), sl.Add(a, at="all", coefficient=2)]
    rows = [(ids, interventions(c, model)) for c in (add_then_zero, zero_then_add, twice)]
    got = dict(_forward(model, rows))
    sites = [
        lambda s: zero_out(s + a.layers[2]),
        lambda s: zero_out(s) + a.layers[2],
        lambda s: s + 3 * a.layers[2],
    ]
    for r, edit in enumerate(sites):
        expected = reference_logits(plain, ids, [(2, "resid_pre", edit)])
        torch.testing.assert_close(got[r], expected, atol=1e-4, rtol=1e-4)
    assert (got[0] - got[1]).abs().max() > 1e-2


def test_the_control_is_bit_identical_to_the_unhooked_model(model: Any) -> None:
    ids = [sl.encode(model, p) for p in PROMPTS]
    from steerlib.activations import pad_left
    from steerlib.interventions import Steering

    tokens, mask = pad_left(ids, 2, "cpu")
    steered = vector(model, 3, 2)
    acts = [[], interventions(0 * steered, model), interventions(sl.Add(steered), model)]
    steering = Steering(model, acts, [len(i) for i in ids])
    steering.window([len(i) - tokens.shape[1] for i in ids], tokens.shape[1])
    with torch.no_grad():
        free = model.forward(tokens, attention_mask=mask)
        with steering.hooks():
            hooked = model.forward(tokens, attention_mask=mask)
    real = mask.bool()
    assert torch.equal(free[0][real[0]], hooked[0][real[0]])
    assert torch.equal(free[1][real[1]], hooked[1][real[1]])
    assert not torch.equal(free[2][real[2]], hooked[2][real[2]])


@pytest.mark.parametrize("at", ["front", "middle", "back", "prompt", "generated", "all"])
@pytest.mark.parametrize("n", [2, 5, 8])
def test_positions_by_name(at: str, n: int) -> None:
    k = 1 if at in ("prompt", "generated", "all") else 2
    covered = [p for p, _ in _covered(at, k, n, 0, n + 4)]
    assert covered == positions(at, k, n, n + 4)
    window = [p for p, _ in _covered(at, k, n, 1, n + 1)]
    assert window == [p for p in covered if 1 <= p < n + 1]


def test_positions_by_slice_and_list() -> None:
    assert [p for p, _ in _covered(("slice", -2, None, None), 1, 6, 0, 9)] == [4, 5, 6, 7, 8]
    assert [p for p, _ in _covered(("slice", 1, 6, 2), 1, 6, 0, 9)] == [1, 3, 5]
    assert _covered((3, -1), 2, 6, 0, 9) == [(3, 0), (5, 1)]
    assert _covered((7,), 1, 6, 0, 9) == [(7, 0)]  # a generated token


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: sl.Add(vector(m, 1, 1), at="start"), "front, middle, back"),
        (lambda m: sl.Add(vector(m, 1, 1), at=[]), "list of positions"),
        (lambda m: sl.Add(vector(m, 1, 1), coefficient=float("nan")), "finite"),
        (lambda m: sl.Add(vector(m, 1, 1), coefficient=float("inf")), "finite"),
        (lambda m: vector(m, 1, 1) * float("nan"), "finite"),
        (lambda m: sl.Ablate(vector(m, 1, 2)), "direction"),
        (lambda m: interventions("love", m), "condition is"),
        (lambda m: interventions(vector(m, 4, 1), m), "layers 0 to 3"),
        (lambda m: sl.generate(m, "I love dogs", {"x": vector(m, 1, 40)}), "shorter vector"),
        (lambda m: sl.generate(m, "I love dogs", {"x": sl.Add(vector(m, 1, 1), at=[-99])}), "-99"),
        (lambda m: sl.generate(m, "I", {"x": sl.Add(vector(m, 1, 2), at="all")}), "one position"),
        (
            lambda m: interventions(sl.SteeringVector({1: torch.ones(1, 33)}), m),
            "d_model 33",
        ),
    ],
)
def test_bad_input_gets_a_sentence(tiny: Any, make: Any, words: str) -> None:
    model, _ = tiny("llama")
    with pytest.raises(ValueError, match=words):
        make(model)
    assert n_hooks(model) == 0


def test_a_vector_of_another_model_is_pointed_out(tiny: Any) -> None:
    model, _ = tiny("llama")
    stranger = sl.SteeringVector({1: torch.ones(1, 32)}, meta={"model": "someone-else"})
    with pytest.warns(UserWarning, match="someone-else"):
        interventions(stranger, model)


def test_alignment_table(model: Any) -> None:
    v = sl.SteeringVector.from_prompts(model, "Love", "Hate", layer=6)
    table = sl.align(model, "I hate you because", {"love": 5 * v})
    assert table.layer.tolist() == ["0 (prompt)", "6", "6"]
    assert table.coefficient.tolist() == ["+1", "+5", "-5"]
    assert table.loc[0, "1":"4"].tolist() == ["I", " hate", " you", " because"]
    assert table.loc[1, "1"] == "Love"


def test_a_vector_acts_where_it_was_made_for(tiny: Any) -> None:
    model, _ = tiny("llama")
    direction = sl.SteeringVector({1: torch.ones(1, 32)}, site="resid_post", at="generated")
    assert sl.Add(direction).at == "generated" and sl.Add(vector(model, 1, 2)).at == "front"
    assert sl.Add(direction, "all").at == "all"
