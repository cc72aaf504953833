"""What an intervention does, against hand-written PyTorch hooks on the transformers model."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
import torch
from conftest import (
    ARCHITECTURES,
    adding,
    batch_logits,
    n_hooks,
    noise,
    positions,
    reference_logits,
)

import steerlib as sl
from steerlib.engine import decode
from steerlib.interventions import Slice, as_interventions, covered, where

PROMPTS = [
    "I love dogs",
    "I went up to my friend and said",
    "The ship left the harbour in the morning, and nobody knew when it would return",
]


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
            v = noise(model, i, k, site=site, seed=k)
            rows.append((ids, sl.Add(v, at=at, coefficient=1.5)))
            where = positions(at, k, len(ids), len(ids))
            edits = [(i, site, adding(1.5 * v.layers[i], where))]
            expected.append(reference_logits(plain, ids, edits))
        rows.append((ids, None))
        expected.append(reference_logits(plain, ids, []))
    order = random.Random(0).sample(range(len(rows)), len(rows))
    for i, logits in zip(order, batch_logits(model, [rows[i] for i in order]), strict=True):
        torch.testing.assert_close(logits, expected[i], atol=1e-4, rtol=1e-4)


def test_logits_equal_plain_hooks_on_the_real_model(model: Any, plain_model: Any) -> None:
    v = sl.SteeringVector.from_prompts(model, "Love", "Hate", layer=6)
    rows, expected = [], []
    for prompt in PROMPTS:
        ids = sl.encode(model, prompt)
        rows.append((ids, 5 * v))
        edit = adding(5 * v.layers[6], list(range(v.n_positions)))
        expected.append(reference_logits(plain_model, ids, [(6, "resid_pre", edit)]))
        assert (expected[-1] - reference_logits(plain_model, ids, [])).abs().max() > 0.1
    for logits, truth in zip(batch_logits(model, rows), expected, strict=True):
        torch.testing.assert_close(logits, truth, atol=2e-3, rtol=1e-3)


def test_ablate_leaves_no_projection_and_equals_plain_hook(tiny: Any) -> None:
    model, plain = tiny("llama")
    direction = noise(model, 1, 1, site="resid_post")
    unit = direction.layers[1][0] / direction.layers[1][0].norm()

    def zero_out(stream: torch.Tensor) -> torch.Tensor:
        return stream - (stream @ unit)[:, None] * unit

    ids = sl.encode(model, PROMPTS[1])
    (logits,) = batch_logits(model, [(ids, sl.Ablate(direction))])
    expected = reference_logits(plain, ids, [(1, "resid_post", zero_out)])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_interventions_at_one_site_act_in_the_order_given(tiny: Any) -> None:
    model, plain = tiny("llama")
    a = noise(model, 2, 1, seed=1)
    d = a + noise(model, 2, 1, seed=2)
    unit = d.layers[2][0] / d.layers[2][0].norm()

    def zero_out(stream: torch.Tensor) -> torch.Tensor:
        return stream - (stream @ unit)[:, None] * unit

    ids = sl.encode(model, PROMPTS[0])
    add_then_zero = [sl.Add(a, at="all"), sl.Ablate(d)]
    zero_then_add = [sl.Ablate(d), sl.Add(a, at="all")]
    twice = [sl.Add(a, at="all"), sl.Add(a, at="all", coefficient=2)]
    got = batch_logits(model, [(ids, c) for c in (add_then_zero, zero_then_add, twice)])
    sites = [
        lambda s: zero_out(s + a.layers[2]),
        lambda s: zero_out(s) + a.layers[2],
        lambda s: s + 3 * a.layers[2],
    ]
    for r, edit in enumerate(sites):
        expected = reference_logits(plain, ids, [(2, "resid_pre", edit)])
        torch.testing.assert_close(got[r], expected, atol=1e-4, rtol=1e-4)
    assert (got[0] - got[1]).abs().max() > 1e-2


@pytest.mark.parametrize("at", ["front", "middle", "back", "prompt", "generated", "all"])
@pytest.mark.parametrize("n", [2, 5, 8])
def test_positions_by_name(at: str, n: int) -> None:
    k = 1 if at in ("prompt", "generated", "all") else 2
    found = [p for p, _ in covered(at, k, n, 0, n + 4)]
    assert found == positions(at, k, n, n + 4)
    window = [p for p, _ in covered(at, k, n, 1, n + 1)]
    assert window == [p for p in found if 1 <= p < n + 1]


def test_positions_by_slice_and_list() -> None:
    assert [p for p, _ in covered(Slice(-2, None, None), 1, 6, 0, 9)] == [4, 5, 6, 7, 8]
    assert [p for p, _ in covered(Slice(1, 6, 2), 1, 6, 0, 9)] == [1, 3, 5]
    assert covered((3, -1), 2, 6, 0, 9) == [(3, 0), (5, 1)]
    assert covered((7,), 1, 6, 0, 9) == [(7, 0)]  # a generated token


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: sl.Add(noise(m, 1, 1), at="start"), "front, middle, back"),
        (lambda m: sl.Add(noise(m, 1, 1), at=[]), "list of positions"),
        (lambda m: sl.Add(noise(m, 1, 1), coefficient=float("nan")), "finite"),
        (lambda m: sl.Add(noise(m, 1, 1), coefficient=float("inf")), "finite"),
        (lambda m: noise(m, 1, 1) * float("nan"), "finite"),
        (lambda m: sl.Ablate(noise(m, 1, 2)), "direction"),
        (lambda m: as_interventions("love", m), "condition is"),
        (lambda m: as_interventions(noise(m, 4, 1), m), "layers 0 to 3"),
        (lambda m: sl.generate(m, "I love dogs", {"x": noise(m, 1, 40)}), "shorter vector"),
        (lambda m: sl.generate(m, "I love dogs", {"x": sl.Add(noise(m, 1, 1), at=[-99])}), "-99"),
        (lambda m: sl.generate(m, "I", {"x": sl.Add(noise(m, 1, 2), at="all")}), "one position"),
        (
            lambda m: as_interventions(sl.SteeringVector({1: torch.ones(1, 33)}), m),
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
        as_interventions(stranger, model)


def test_a_vector_acts_where_it_was_made_for(tiny: Any) -> None:
    model, _ = tiny("llama")
    direction = sl.SteeringVector({1: torch.ones(1, 32)}, site="resid_post", at="generated")
    assert sl.Add(direction).at == "generated" and sl.Add(noise(model, 1, 2)).at == "front"
    assert sl.Add(direction, "all").at == "all"


# ---------------------------------------------------------------- a vector and its coefficient


def test_a_coefficient_may_stand_in_the_vector_or_beside_it(tiny: Any, tmp_path: Path) -> None:
    model, _ = tiny("llama")
    v = noise(model, 2, 2)
    beside, inside = sl.Add(v, coefficient=6), 6 * v
    assert beside.key() == sl.Add(inside).key() == sl.Add(2 * v, coefficient=3).key()
    others = [sl.Add(v), sl.Add(v, "back", 6), sl.Add(v, coefficient=-6), sl.Add(7 * v), 6 * -v]
    for other in others:
        assert as_interventions(other, model)[0].key() != beside.key()
    run = {"n_samples": 2, "max_new_tokens": 5, "progress": False, "cache": tmp_path}
    tables = []
    for condition in (beside, inside):
        tables.append(sl.generate(model, PROMPTS, {"x": condition}, **run))
        assert len(list(tmp_path.glob("*.json"))) == 1  # the second found the rows of the first
    assert tables[0].equals(tables[1])
    for call in (sl.choice_probabilities, sl.propensity):
        sides = [["a", "b"]] if call is sl.choice_probabilities else [["a"], ["b", "love"]]
        one, two = (call(model, PROMPTS, *sides, {"x": c}) for c in (beside, inside))
        assert one.equals(two)
    one, two = (sl.perplexity(model, PROMPTS, {"x": c}) for c in (beside, inside))
    assert one.equals(two)


def test_vectors_and_interventions_compare_by_identity() -> None:
    a, b = (sl.SteeringVector({1: torch.ones(1, 8)}) for _ in range(2))
    assert a == a and a != b and len({a, b, a}) == 2 and a in [b, a]
    for kind in (sl.Add, sl.Ablate):
        one, two = kind(a), kind(a)
        assert one == one and one != two and len({one, two}) == 2 and one in {one: 1}


# ---------------------------------------------------------------- kinds of one's own


@dataclass(frozen=True, eq=False)
class Scale(sl.Intervention):
    """Multiply what lies along a direction by a factor."""

    vector: sl.SteeringVector
    at: Any = "all"
    factor: float = 2.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", where(self.at))

    @property
    def is_identity(self) -> bool:
        return self.factor == 1

    def operands(self, layer: int) -> tuple[torch.Tensor, ...]:
        unit = torch.nn.functional.normalize(self.vector.layers[layer], dim=-1)
        return unit, torch.full((len(unit),), self.factor)

    @staticmethod
    def apply(stream: torch.Tensor, *operands: torch.Tensor) -> torch.Tensor:
        unit, factor = operands
        along = (stream.float() * unit).sum(-1)
        return stream + ((factor - 1) * along)[:, None] * unit


@dataclass(frozen=True, eq=False)
class Shift(sl.Intervention):
    """Add a constant to every dimension at some layers: a kind without a vector."""

    blocks: tuple[int, ...]
    amount: float
    at: Any = "generated"

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", where(self.at))

    @property
    def layers(self) -> list[int]:
        return list(self.blocks)

    @property
    def site(self) -> str:
        return "resid_post"

    def operands(self, layer: int) -> tuple[torch.Tensor, ...]:
        return (torch.tensor([self.amount]),)

    @staticmethod
    def apply(stream: torch.Tensor, *operands: torch.Tensor) -> torch.Tensor:
        return stream + operands[0][:, None]


def by_hand(act: Any, n: int, total: int) -> list[Any]:
    """Any of the kinds as edits of the plain model, written down anew."""
    at = slice(*act.at) if isinstance(act.at, Slice) else act.at
    edits = []
    for layer in act.layers:

        def edit(stream: torch.Tensor, layer: int = layer) -> torch.Tensor:
            stream = stream.clone()
            for i, p in enumerate(positions(at, act.n_positions, n, total)):
                if p >= len(stream):
                    continue
                if isinstance(act, Shift):
                    stream[p] += act.amount
                    continue
                tensor = act.vector.layers[layer]
                v = tensor[i if len(tensor) > 1 else 0]
                if isinstance(act, sl.Add):
                    stream[p] += act.coefficient * v
                else:
                    factor = act.factor if isinstance(act, Scale) else 0
                    stream[p] += (factor - 1) * (stream[p] @ v) * v / (v @ v)
            return stream

        edits.append((layer, act.site, edit))
    return edits


def own_kinds(model: Any) -> dict[str, Any]:
    return {
        "double": Scale(noise(model, 1), "all"),
        "turn": Scale(noise(model, 1), "generated", -3.0),
        "at the back": Scale(noise(model, 2, 2, site="resid_post"), "back", 5.0),
        "shift": Shift((0, 2), 2.0),
        "shift there": Shift((3,), -2.0, at=slice(1, -2)),
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_kind_of_ones_own_beside_the_others(tiny: Any, architecture: str) -> None:
    """One batch, all kinds, several of a kind with other numbers, lists of kinds."""
    model, plain = tiny(architecture)
    acts = [
        *own_kinds(model).values(),
        sl.Add(noise(model, 1, seed=5), "all", 2.0),
        sl.Ablate(noise(model, 1, seed=6)),
    ]
    conditions = [[act] for act in acts] + [acts[::-1], [acts[0], acts[6], acts[1]], []]
    rows = [(sl.encode(model, p), c) for p in PROMPTS for c in conditions]
    for logits, (ids, condition) in zip(batch_logits(model, rows), rows, strict=True):
        edits = [e for act in condition for e in by_hand(act, len(ids), len(ids))]
        expected = reference_logits(plain, ids, edits)
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.thorough
def test_a_kind_of_ones_own_while_generating(tiny: Any) -> None:
    model, plain = tiny("gpt2")
    conditions = own_kinds(model)
    run = {"n_samples": 1, "max_new_tokens": 6, "temperature": 0, "progress": False}
    frame = sl.generate(model, PROMPTS, conditions, **run)
    again = sl.generate(model, PROMPTS, conditions, use_cache=False, **run)
    assert frame.equals(again)
    for row in frame.itertuples():
        ids = sl.encode(model, row.prompt)
        n, act = len(ids), conditions[row.condition]
        end = [model.tokenizer.eos_token_id] * row.stopped
        for token in [*row.tokens, *end]:
            logits = reference_logits(plain, ids, by_hand(act, n, len(ids)))
            assert int(logits[-1].argmax()) == token
            ids.append(token)
        with sl.steer(model, act):
            text = model.generate(row.prompt, max_new_tokens=6, do_sample=False, verbose=False)
        assert text == row.prompt + row.completion
    assert frame.groupby("condition").completion.agg(tuple).nunique() >= 4


def test_a_kind_of_ones_own_in_every_number(tiny: Any) -> None:
    model, plain = tiny("llama")
    conditions = own_kinds(model)
    texts = [" love", " the rain and"]
    leaning = sl.propensity(model, PROMPTS, texts[:1], texts[1:], conditions)
    chosen = sl.choice_probabilities(model, PROMPTS, ["a", "b"], conditions)
    tokens = [model.tokenizer(o, add_special_tokens=False)["input_ids"][0] for o in ("a", "b")]
    for lean, choice in zip(leaning.itertuples(), chosen.itertuples(), strict=True):
        ids, act = sl.encode(model, lean.prompt), conditions[lean.condition]
        n, scores = len(ids), []
        p = reference_logits(plain, ids, by_hand(act, n, n))[-1].softmax(-1)
        assert (choice.a, choice.b) == pytest.approx(p[tokens].tolist(), abs=1e-5)
        for text in texts:
            new = model.tokenizer(text, add_special_tokens=False)["input_ids"]
            logits = reference_logits(plain, ids + new, by_hand(act, n, n + len(new)))
            logp = logits[n - 1 : -1].log_softmax(-1)
            scores.append(float(logp[range(len(new)), new].sum()))
        assert lean.propensity == pytest.approx(scores[0] - scores[1], abs=1e-3)
        with sl.steer(model, act):
            steered = model(lean.prompt)[0].float()
        expected = reference_logits(plain, ids, by_hand(act, n, n))
        torch.testing.assert_close(steered, expected, atol=1e-4, rtol=1e-4)


def test_a_kind_of_ones_own_is_kept_under_its_own_key(tiny: Any, tmp_path: Path) -> None:
    model, _ = tiny("llama")
    v = noise(model, 1)
    kinds = {
        "two": Scale(v),
        "three": Scale(v, factor=3.0),
        "there": Scale(v, "generated"),
        "other": Scale(noise(model, 1, seed=1)),
        "add": sl.Add(v, "all", 2.0),
        "zero": sl.Ablate(v),
        "shift": Shift((1,), 2.0),
        "shift two": Shift((1, 2), 2.0),
    }
    assert len({json.dumps(act.key()) for act in kinds.values()}) == len(kinds)
    assert json.dumps(Scale(noise(model, 1)).key()) == json.dumps(kinds["two"].key())
    run = {"n_samples": 2, "max_new_tokens": 5, "top_p": 0.9, "progress": False}
    fresh = sl.generate(model, PROMPTS, kinds, **run)
    for name, act in kinds.items():  # one after the other, into one folder
        sl.generate(model, PROMPTS, {name: act}, **run, cache=tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        ran: list[int] = []
        patch.setattr(decode, "run", lambda model, rows, *args, **kwargs: ran.append(len(rows)))
        kept = sl.generate(model, PROMPTS, kinds, **run, cache=tmp_path)
    assert sum(ran) == 0 and kept.equals(fresh)
    assert fresh.groupby("condition").completion.agg(tuple).nunique() >= len(kinds) - 1


def test_what_has_no_lasting_identity_needs_a_key_of_its_own(tiny: Any, tmp_path: Path) -> None:
    @dataclass(frozen=True, eq=False)
    class Odd(Shift):
        function: Any = len

    model, _ = tiny("llama")
    odd = {"x": Odd((1,), 2.0)}
    run = {"n_samples": 1, "max_new_tokens": 2, "progress": False}
    assert len(sl.generate(model, "I love dogs", odd, **run)) == 1
    with pytest.raises(ValueError, match="no lasting identity.*key"):
        sl.generate(model, "I love dogs", odd, **run, cache=tmp_path)


def test_code_of_every_kind(tiny: Any) -> None:
    model, _ = tiny("llama")
    v = noise(model, 1)
    said = {
        "sl.Add(v, at='front', coefficient=6)": sl.Add(v, coefficient=6),
        "sl.Add(v, at=[1, -2], coefficient=1.0)": sl.Add(v, [1, -2]),
        "sl.Add(v, at=slice(1, None, None), coefficient=1.0)": sl.Add(v, slice(1, None)),
        "sl.Ablate(v, at='all', to='zero')": sl.Ablate(v),
        "Scale(v, at=[3], factor=0.5)": Scale(v, 3, 0.5),
        "Shift([0, 2], amount=1.5, at='generated')": Shift((0, 2), 1.5),
    }
    for code, act in said.items():
        assert act.code("v") == code
        again = eval(code, {"sl": sl, "v": v, "Scale": Scale, "Shift": Shift})
        assert again.key()[0] == act.key()[0] and again.at == act.at


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (Shift((9,), 1.0), "needs layer 9.*layers 0 to 3"),
        (Shift((1,), 1.0, at=[-99]), "-99"),
        (type("Elsewhere", (Shift,), {"site": "mlp_out"})((1,), 1.0), "mlp_out.*resid_pre"),
    ],
)
def test_kinds_of_ones_own_are_checked(tiny: Any, act: Any, words: str) -> None:
    model, _ = tiny("llama")
    with pytest.raises(ValueError, match=words):
        sl.generate(model, "I love dogs", {"x": act}, progress=False)
    assert n_hooks(model) == 0


# ---------------------------------------------------------------- names with fields


class Cell(NamedTuple):
    layer: int
    coefficient: float
    family: str | None = None


def tables(model: Any, conditions: Any) -> dict[str, pd.DataFrame]:
    run = {"n_samples": 2, "max_new_tokens": 2, "progress": False}
    return {
        "generate": sl.generate(model, PROMPTS[:2], conditions, **run),
        "propensity": sl.propensity(model, PROMPTS[:2], [" love"], [" hate"], conditions),
        "perplexity": sl.perplexity(model, PROMPTS[:2], conditions),
        "choices": sl.choice_probabilities(model, PROMPTS[:2], ["a", "b"], conditions),
        "kl": sl.kl_by_prompt(model, PROMPTS[:2], conditions),
    }


def test_fields_of_names_become_columns(tiny: Any) -> None:
    model, _ = tiny("llama")
    v = noise(model, 1)
    conditions = {"unsteered": None, Cell(1, 6.0): 6 * v, Cell(2, -0.5, "random"): -0.5 * v}
    plain = tables(model, {str(i): c for i, c in enumerate(conditions.values())})
    for name, table in tables(model, conditions).items():
        times = len(table) // 3 // 2
        labels = ["unsteered", "layer 1, coefficient 6", "layer 2, coefficient -0.5, random"]
        assert list(table.condition) == [c for c in labels for _ in range(times)] * 2, name
        start = list(table.columns).index("condition")
        assert list(table.columns[start : start + 4]) == ["condition", *Cell._fields]
        one = table[table.condition == labels[2]]
        assert set(one.layer) == {2} and set(one.coefficient) == {-0.5}
        assert set(one.family) == {"random"}
        control = table[table.condition == "unsteered"]
        assert control[list(Cell._fields)].isna().all(axis=None)
        rest = plain[name].drop(columns="condition")
        pd.testing.assert_frame_equal(table[rest.columns], rest)


def test_names_may_be_mappings(tiny: Any) -> None:
    model, _ = tiny("llama")
    v = noise(model, 1)
    cells = [Cell(1, 6.0), Cell(2, -0.5, "random")]
    mappings = [("unsteered", None), *((c._asdict(), c.coefficient * v) for c in cells)]
    tuples = {"unsteered": None, **{c: c.coefficient * v for c in cells}}
    expected = tables(model, tuples)
    for name, table in tables(model, mappings).items():
        pd.testing.assert_frame_equal(table, expected[name])


def test_two_kinds_of_names_share_a_table(tiny: Any) -> None:
    model, _ = tiny("llama")
    v = noise(model, 1)
    conditions = {**sl.controls(v, model, n_random=2, unrelated=1), Cell(1, 2.0): 2 * v, 3: 3 * v}
    table = sl.propensity(model, "I love dogs", [" love"], [" hate"], conditions)
    assert list(table.columns)[1:6] == ["condition", "family", "control", "layer", "coefficient"]
    assert list(table.family[:3]) == ["random", "random", "unrelated"]
    assert table.family[3:].isna().all()
    assert table.layer.tolist()[3] == 1 and list(table.condition)[-1] == 3


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        ({}, "no condition"),
        ([("a", None), ("a", None)], "same name"),
        ([({"x": 1}, None), ({"x": 1}, None)], "same name"),
        ({"a": 3}, "A condition is"),
        ([({"target": 1}, None)], "field 'target'"),
        ([({"prompt": 1}, None)], "field 'prompt'"),
    ],
)
def test_bad_names_get_a_sentence(tiny: Any, conditions: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sl.propensity(tiny("llama")[0], "I love dogs", [" love"], [" hate"], conditions)


# ---------------------------------------------------------------- never nothing in silence


def silent(call: Callable[[], Any]) -> bool:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return not any("touches no position" in str(w.message) for w in caught)


def test_what_touches_nothing_is_pointed_out(tiny: Any) -> None:
    """At the last position that runs there is no warning, behind it there is one."""
    model, _ = tiny("llama")
    text, n = "I love dogs", len(sl.encode(model, "I love dogs"))
    texts = [" love", " hate and the rain"]
    more = max(len(model.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts)
    direction = noise(model, 1, at="generated")
    frame = pd.DataFrame({"prompt": [text], "tokens": [[50, 51, 52]]})
    calls: dict[str, tuple[Callable[[Any], Any], int]] = {  # and how many positions run
        "generate": (
            lambda c: sl.generate(model, text, {"x": c}, 1, 4, progress=False),
            n + 3,  # what is sampled last does not run
        ),
        "perplexity": (lambda c: sl.perplexity(model, text, {"x": c}), n),
        "propensity": (
            lambda c: sl.propensity(model, text, texts[:1], texts[1:], {"x": c}),
            n + more - 1,
        ),
        "choices": (lambda c: sl.choice_probabilities(model, text, ["a"], {"x": c}), n),
        "kl": (lambda c: sl.kl_by_prompt(model, text, {"x": c}), n),
        "shift": (lambda c: sl.next_token_shift(model, text, c), n),
        "changes": (lambda c: sl.token_changes(model, text, c), n),
        "surprisal": (lambda c: sl.completion_surprisal(model, frame, c), n + 2),
        "lens": (lambda c: sl.logit_lens(model, text, c), n),
        "reading": (
            lambda c: sl.capture_generation(model, text, direction, 3, condition=c),
            n + 3,
        ),
    }
    for name, (call, total) in calls.items():
        v = noise(model, 2)
        assert silent(partial(call, sl.Add(v, [total - 1]))), name
        assert silent(partial(call, [v, sl.Ablate(v, at=slice(total - 1, None))])), name
        assert not silent(partial(call, sl.Add(v, [total]))), name
        assert not silent(partial(call, [v, sl.Ablate(v, at=slice(total, None))])), name
        assert silent(partial(call, sl.Add(v, [total], 0.0))), name  # it would do nothing anyway
