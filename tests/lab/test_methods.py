"""Ways at one price: doses that cost what they may, effects as measured, winners and ties."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import steerlib as sl
from steerlib.lab import methods
from steerlib.lab.behaviours import Behaviour, neutral
from steerlib.lab.methods import At, Method

BUDGET = 0.02


@pytest.fixture(scope="module")
def own() -> Behaviour:
    starts = ["I love", "The ship left", "She asked", "He said", "Words are", "A dog is"]
    ends = ["today", "in the rain", "because"]
    prompts = [f"{a} {b}" for a in starts for b in ends]
    rows = {"split": ["fit"] * 8 + ["dev"] * 5 + ["test"] * 5, "prompt": prompts}
    return Behaviour("weddings", pd.DataFrame({**rows, "target": " wedding", "reference": " rain"}))


@pytest.fixture(scope="module")
def chosen(tiny: Any, own: Behaviour) -> pd.DataFrame:
    return methods.select(tiny("llama")[0], own, BUDGET, n=4, n_neutral=4)


def price(model: Any, condition: Any, n: int = 4) -> float:
    return float(sl.kl_by_prompt(model, neutral("dev", n), {"x": condition}).kl.mean())


def test_every_way_moves_as_far_as_its_dose(tiny: Any, own: Behaviour) -> None:
    model, _ = tiny("llama")
    found = methods.ways(model, own, [2], [1])
    assert {at.method for at in found} == set(methods.METHODS)
    acts = own.activations(model, [2])[:, :, 0]
    size = float(acts.norm(dim=-1).mean())
    mean = acts[:, 0].mean(0) - acts[:, 1].mean(0)
    unit = mean / mean.norm()
    for name in methods.FITTED:
        vector = found[At(name, 2)](0.3)
        assert float(vector.norm()[2]) == pytest.approx(0.3 * size, rel=1e-4)
        assert (vector.at, vector.site) == ("generated", "resid_post")
        assert float(vector.layers[2][0] @ mean) >= 0
    front = found[At(methods.ACTADD, 1)](0.3)
    prompts = own.rows("dev").prompt.tolist()
    assert sl.demonstrations.strength(model, front, prompts) == pytest.approx(0.3, rel=1e-4)
    assert front.at == "front"
    stream = acts[:3, 0]
    level = float(acts[:, 1].mean(0) @ unit)
    affine, clamp, rotate = (found[At(m, 2)](0.3) for m in ("Affine", "Clamp", "Rotate"))
    moved = affine.apply(stream, *(o.expand(3, -1) for o in affine.operands(2)))
    assert (moved @ unit).tolist() == pytest.approx([level + 0.3 * size] * 3, rel=1e-3)
    raised = clamp.apply(stream, *(o.expand(3, -1) for o in clamp.operands(2)))
    wanted = np.maximum((stream @ unit).numpy(), level + 0.3 * size)
    assert (raised @ unit).numpy() == pytest.approx(wanted, rel=1e-3)
    turned = rotate.apply(stream, *(o.expand(3, -1) for o in rotate.operands(2)))
    assert turned.norm(dim=-1).tolist() == pytest.approx(stream.norm(dim=-1).tolist(), rel=1e-4)
    assert rotate.angle == pytest.approx(np.degrees(0.3)) and bool((turned @ unit).mean() > 0)


def test_the_dose_is_the_largest_within_the_budget(tiny: Any, own: Behaviour) -> None:
    model, _ = tiny("llama")
    found = methods.ways(model, own, [2], [1])
    at = At(methods.MEAN, 2)
    table = methods.doses_within(model, {at: [found[at]]}, BUDGET, 4)
    dose, kl = table.loc[tuple(at), "dose"], table.loc[tuple(at), "kl"]
    assert kl == pytest.approx(price(model, found[at](dose)), abs=1e-4)
    assert kl <= BUDGET < price(model, found[at](1.5 * dose)), dose
    small = methods.doses_within(model, {at: [found[at]]}, kl / 400, 4)  # below the first grid
    assert methods.LOW_DOSES[0] < small.loc[tuple(at), "dose"] < methods.DOSES[0]
    assert small.loc[tuple(at), "kl"] <= kl / 400
    dear = methods.doses_within(model, {at: [found[at]]}, 1e-9, 4)  # none is that cheap
    assert dear.loc[tuple(at), "dose"] == methods.LOW_DOSES[0]


def test_a_dose_beyond_a_dear_one_is_not_taken(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although it costs little itself: 0.6 of it, which is tried too, might not."""
    model, costs = tiny("llama")[0], {}

    def kl_by_prompt(_: Any, __: Any, named: Any) -> pd.DataFrame:
        rows = [{**fields, "kl": costs.get(round(fields["dose"], 6), 0.1)} for fields, _ in named]
        return pd.DataFrame(rows)

    monkeypatch.setattr(methods.logprobs, "kl_by_prompt", kl_by_prompt)
    costs[round(methods.DOSES[2], 6)] = 0.9
    table = methods.doses_within(model, {At("x", 1): [lambda dose: None]}, 0.5, 2)
    assert methods.DOSES[1] < table.dose.item() < methods.DOSES[2]


def test_what_is_chosen_is_best_on_dev(tiny: Any, own: Behaviour, chosen: pd.DataFrame) -> None:
    model, _ = tiny("llama")
    assert chosen.method.tolist() == [*methods.METHODS, *methods.DRAWS, *methods.FAMILIES]
    assert chosen[~chosen.method.isin([methods.ACTADD])].layer.nunique() == 1
    row = chosen.set_index("method").loc[methods.MEAN]
    way = methods.ways(model, own, [int(row.layer)], [1])[At(methods.MEAN, int(row.layer))]
    assert price(model, way(row.dose)) <= BUDGET + 1e-4
    effect = own.effects(model, {"x": way(row.dose)}, "dev", 4).effect.mean()
    assert row.effect_dev == pytest.approx(effect, abs=1e-3)
    assert chosen.effect_dev.isna().sum() == len(methods.FAMILIES)
    assert row.kl_dev == pytest.approx(price(model, way(row.dose)), abs=1e-4)
    assert chosen.kl_dev.isna().tolist() == [m in methods.FAMILIES for m in chosen.method]
    assert methods.without_dose(chosen, BUDGET).empty  # on tiny models something is always cheap


def test_a_way_that_is_too_dear_at_any_dose_is_said_to_be(tiny: Any, own: Behaviour) -> None:
    model, _ = tiny("llama")
    chosen = methods.select(model, own, 1e-9, n=4, n_neutral=4)
    dear = methods.without_dose(chosen, 1e-9)
    assert {"Affine", "Rotate", methods.MEAN, *methods.DRAWS} <= set(dear.method)
    assert not set(dear.method) & set(methods.FAMILIES)
    rounded = chosen.assign(kl_dev=0.505)
    assert methods.without_dose(rounded, 0.5).empty and len(methods.without_dose(rounded, 0.4))


def test_measured_are_all_ways_and_all_controls(
    tiny: Any, own: Behaviour, chosen: pd.DataFrame
) -> None:
    model, _ = tiny("llama")
    named = methods.conditions(model, own, chosen, 3, 2)
    frame = methods.measure(model, own, named, None, 3)
    items, members = frame[frame.prompt != ""], frame[frame.prompt == ""]
    real = {*methods.METHODS, *methods.PROMPTED, methods.BOTH, *methods.DRAWS, *methods.FAMILIES}
    assert set(items.method) == real and (items.groupby("method").size() == 5).all()
    assert members.groupby("method").size().to_dict() == {"random": 3, "unrelated": 2}
    # against the measures, called one by one
    for name in (Method("Rotate"), Method("instruction"), Method(methods.BOTH)):
        effects = own.effects(model, {"x": named[name]}, "test")
        here = items[items.method == name.method].set_index("prompt").effect
        assert here[effects.prompt].tolist() == pytest.approx(effects.effect.tolist(), abs=1e-3)
        kl = sl.kl_by_prompt(model, neutral("test", 3), {"x": named[name]}).kl.mean()
        assert items[items.method == name.method].kl.iloc[0] == pytest.approx(kl, abs=1e-3)
    family = items[items.method == "random"].effect.mean()
    assert family == pytest.approx(members[members.method == "random"].effect.mean(), abs=1e-6)
    texts = methods.prefixes(own)
    assert texts["instruction"].text == "Write about weddings.\n"
    assert texts["examples"].text.count("\n") == methods.N_EXAMPLES
    assert (
        texts["instruction + examples"].text == texts["instruction"].text + texts["examples"].text
    )


def made_up(**means: float) -> pd.DataFrame:
    """Twenty items under each method, and members of both families around 0."""
    rng = np.random.default_rng(0)
    shared = rng.standard_normal(20)
    rows = [
        {"method": m, "control": "", "prompt": f"p{i}", "effect": x + e + 0.3 * own, "kl": 0.4}
        for m, x in means.items()
        for i, (e, own) in enumerate(zip(shared, rng.standard_normal(20), strict=True))
    ]
    rows += [
        {"method": family, "control": str(i), "prompt": "", "effect": 0.1 * i, "kl": 0.4}
        for family in methods.FAMILIES
        for i in range(8)
    ]
    return pd.DataFrame(rows).assign(model="m", behaviour="b")


def test_summary_asks_for_more_than_both_families() -> None:
    table = methods.summary(made_up(strong=3.0, weak=0.6, random=0.0)).set_index("method")
    assert bool(table.works["strong"]) and not table.works[["weak", "random"]].any()
    assert table.random["strong"] == pytest.approx(0.7)
    assert table.effect["strong"] == pytest.approx(3.0, abs=0.5)


def test_what_a_random_vector_does_too_does_not_work() -> None:
    """Although its interval leaves 0 and it lies beyond both families."""
    frame = made_up(strong=3.0, **{"draw 1": 2.0, "draw 2": 2.2})
    table = methods.summary(frame).set_index("method")
    assert table.tuned.to_dict() == pytest.approx(
        {"strong": table.effect["draw 2"], "draw 1": table.effect["draw 2"],
         "draw 2": table.effect["draw 1"]}
    )  # fmt: skip
    assert table.works.to_dict() == {"strong": True, "draw 1": False, "draw 2": True}


def test_directions_are_exchanged_against_random_ones() -> None:
    frame = pd.concat(
        made_up(strong=3.0, same=0.35, **{"draw 1": 3.0 * (b == "b")}).assign(behaviour=b)
        for b in "abc"
    )
    table = methods.against_random(frame).set_index("method")
    # of three behaviours and eight members: all nine orders at the top, 9^-3
    assert table.p["strong"] == pytest.approx(9**-3, abs=1e-3)
    assert table.effect["strong"] == pytest.approx(3.0, abs=0.5)
    assert 0.2 < table.p["same"] < 0.8  # a member like the others
    assert 9**-3 < 0.02 < table.p_holm["draw 1"]  # stands out on one behaviour of three only
    one = methods.against_random(made_up(strong=3.0)).set_index("method")
    assert one.p["strong"] == pytest.approx(1 / 9, abs=0.02)


def test_ties_are_called_ties() -> None:
    frame = made_up(first=3.0, second=2.98, third=1.0, random=0.0)
    best = methods.against(frame).set_index("method")
    assert set(best.other) == {"first"} or set(best.other) == {"second"}
    other = ({"first", "second"} - set(best.other)).pop()
    assert bool(best.tie[other]) and not best.tie["third"]
    assert best.difference["third"] == pytest.approx(-2.0, abs=0.3)
    asked = methods.against(frame, "third").set_index("method")
    assert asked.difference["first"] == pytest.approx(2.0, abs=0.3) and asked.ahead["first"] == 1


def test_what_no_dose_was_found_for_is_not_compared() -> None:
    """Neither as an effect of 0 nor as what it did at a dose that costs too much."""
    parts = [made_up(first=3.0, dear=9.0, random=0.0).assign(behaviour=b) for b in "abc"]
    frame = pd.concat(parts, ignore_index=True)
    doses = pd.DataFrame(
        {"model": "m", "behaviour": list("abca"), "method": ["dear"] * 3 + ["first"]}
    ).assign(kl_dev=[0.4, 2.9, np.nan, 0.5])
    assert methods.without_dose(doses).behaviour.tolist() == ["b"]
    kept = methods.affordable(frame, doses)
    assert len(frame) - len(kept) == 20 and set(kept[kept.method == "dear"].behaviour) == {"a", "c"}
    cells = methods.summary(kept).set_index(["behaviour", "method"])
    assert ("b", "dear") not in cells.index and ("b", "first") in cells.index
    table = methods.against(kept, "first").set_index("method")
    assert table.behaviours.to_dict() == {"dear": 2, "random": 3}
    assert table.n.to_dict() == {"dear": 40, "random": 60} and table.ahead["dear"] == 2
    assert table.difference["dear"] == pytest.approx(6.0, abs=0.3)
    # the best is looked for among those that were measured everywhere
    assert set(methods.against(kept).other) == {"first"}
    noise = methods.against_random(kept).set_index("method")
    assert noise.p["dear"] == pytest.approx(9**-2, abs=4e-3)
    assert noise.effect["dear"] == pytest.approx(9.0, abs=0.5)


def test_results_are_read_by_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERLIB_DATA", str(tmp_path))
    (tmp_path / "results").mkdir()
    with pytest.raises(ValueError, match="There are no results: run data/make_methods.py"):
        methods.results()
    for model in ("zzz", "smollm2-135m"):
        made_up(a=1.0).drop(columns="model").to_csv(
            tmp_path / "results" / f"methods_{model}.csv", index=False
        )
    found = methods.results()
    assert list(dict.fromkeys(found.model)) == ["smollm2-135m", "zzz"]
    assert set(found[found.method == "random"].prompt) == {""}


def test_committed_doses_say_what_they_cost() -> None:
    """Or else a method without a dose within the budget would look like one with it."""
    doses = methods.results("doses")
    known = doses[~doses.method.isin(methods.FAMILIES)]
    assert known.kl_dev.notna().all()
    dear = methods.without_dose(doses)
    assert (dear.kl_dev > 2 * methods.BUDGET).all()  # clearly so
    assert (known.drop(dear.index).kl_dev <= methods.BUDGET).all()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="'nonsense' has no instruction; affection, "):
        methods.prompting("nonsense")
