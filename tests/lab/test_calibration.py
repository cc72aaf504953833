"""Which strengths are usable: found where they were put, refused where they are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import n_hooks, noise

import steerlib as sl
from steerlib.lab import behaviours, calibration
from steerlib.lab.behaviours import Behaviour
from steerlib.lab.calibration import Budget, Calibration

STRENGTHS = (0.1, 0.2, 0.4)
DOGS = ["I love", "The ship left", "She asked", "He said", "Words are", "A wedding is"]
ENDS = ["today", "in the rain", "because", "and then", "with a dog", "at the party"]


def own(model: Any) -> Behaviour:
    """Every text goes on with the same word: one direction brings it about everywhere."""
    prompts = [f"{a} {b}" for a in DOGS for b in ENDS]
    splits = (["fit"] * 6 + ["dev"] * 15 + ["test"] * 15)[: len(prompts)]
    rows = {"split": splits, "prompt": prompts, "target": " wedding", "reference": " party"}
    return Behaviour("weddings", pd.DataFrame(rows))


def pointing(model: Any) -> sl.SteeringVector:
    """The direction that the unembedding reads as target minus reference, at the last layer."""
    target, reference = (
        model.tokenizer(text, add_special_tokens=False)["input_ids"][0]
        for text in (" wedding", " party")
    )
    weight = model.original_model.get_output_embeddings().weight
    direction = (weight[target] - weight[reference]).detach().float()[None]
    layer = model.cfg.n_layers - 1
    return sl.SteeringVector({layer: direction}, "resid_post", "generated", {"name": "weddings"})


def calibrate(model: Any, vector: Any, budget: Any = 100.0, **more: Any) -> Calibration:
    given = {"strengths": STRENGTHS, "others": [], "n_random": 6, "unrelated": 3, **more}
    return sl.calibrate(model, vector, own(model), budget, **given)


def test_a_vector_that_steers_has_a_usable_range(tiny: Any) -> None:
    model, _ = tiny("llama")
    found = calibrate(model, pointing(model))
    assert found.usable is not None and found.chosen in STRENGTHS
    assert found.usable[0] <= found.chosen <= found.usable[1]
    assert found.reason.startswith("Usable from")
    dev = found.table[found.table["split"] == "dev"]
    test = found.table[found.table["split"] == "test"]
    assert dev.strength.tolist() == list(STRENGTHS)
    assert set(test.strength) == set(dev.strength[dev.usable])
    best = dev[dev.usable].sort_values("low").iloc[-1]
    assert best.strength == found.chosen
    # the numbers are those of the measures, called anew
    row = test[test.strength == found.chosen].iloc[0]
    again = own(model).effects(model, {"v": found.vector}, "test").effect
    assert row.effect == pytest.approx(again.mean(), abs=1e-3)
    kl = sl.kl_by_prompt(model, behaviours.neutral("test"), {"v": found.vector}).kl
    assert row.kl == pytest.approx(kl.mean(), abs=1e-3)
    ratio = sl.demonstrations.strength(model, found.vector, own(model).rows("dev").prompt.tolist())
    assert ratio == pytest.approx(found.chosen, rel=1e-4)
    assert n_hooks(model) == 0


@pytest.mark.thorough
def test_random_vectors_have_none(tiny: Any) -> None:
    """The same pipeline on what should not steer: at most one of eight gets through both halves."""
    model, _ = tiny("llama")
    vectors = [noise(model, 1, seed=s, site="resid_post", at="generated") for s in range(8)]
    found = [calibrate(model, v, n_random=20, unrelated=8) for v in vectors]
    assert sum(f.usable is not None for f in found) <= 1
    assert all(f.vector is None for f in found if f.usable is None)


def test_the_budget_bounds_the_range(tiny: Any) -> None:
    model, _ = tiny("llama")
    free = calibrate(model, pointing(model))
    dev = free.table[free.table["split"] == "dev"]
    assert dev.kl.is_monotonic_increasing
    between = float(dev.kl.iloc[:2].mean())
    tight = calibrate(model, pointing(model), between)
    inside = tight.table[tight.table["split"] == "dev"].within
    assert inside.tolist() == [True, False, False]
    assert (dev.kl_high > dev.kl).all()
    narrow = float(dev.kl.iloc[0] + dev.kl_high.iloc[0]) / 2  # the mean is within it, its end not
    assert not calibrate(model, pointing(model), narrow).table.within.any()
    # controls are only run where the strength is still in
    assert tight.table[tight.table["split"] == "dev"].random.isna().tolist()[1:] == [True, True]


def test_a_budget_that_cannot_be_met(tiny: Any) -> None:
    model, _ = tiny("llama")
    none = calibrate(model, pointing(model), 1e-9)
    assert none.usable is None and none.vector is None and none.chosen is None
    assert "side effects exceed" in none.reason and "KL" in none.reason
    for budget in (0, -1.0, float("nan"), Budget(1.0, 0)):
        with pytest.raises(ValueError, match="cannot be met: every limit has to be above 0"):
            calibrate(model, pointing(model), budget)


def test_entanglement_is_the_rms_effect_on_the_others(tiny: Any) -> None:
    model, _ = tiny("llama")
    others = [Behaviour(f"other {i}", own(model).table) for i in range(2)]
    flipped = others[1].table.rename(columns={"target": "reference", "reference": "target"})
    others[1] = Behaviour("flipped", flipped)
    found = calibrate(model, pointing(model), Budget(100, 100), others=others, n_others=4)
    dev = found.table[found.table["split"] == "dev"]
    # the same effect on one, its negative on the other: the RMS is its size
    v = sl.demonstrations.strength(model, pointing(model), own(model).rows("dev").prompt.tolist())
    doses = {s: s / v * pointing(model) for s in STRENGTHS}
    four = own(model).effects(model, doses, "dev", 4).groupby("condition").effect.mean()
    assert dev.entanglement.tolist() == pytest.approx(
        four[list(STRENGTHS)].abs().tolist(), rel=0.01
    )
    strict = Budget(100, float(dev.entanglement.min()) / 2)
    assert calibrate(model, pointing(model), strict, others=others, n_others=4).usable is None


@pytest.mark.parametrize(
    ("passed", "usable"),
    [({0.1, 0.2, 0.4}, (0.1, 0.4)), ({0.2, 0.4}, (0.2, 0.4)), ({0.1, 0.4}, (0.4, 0.4))],
)
def test_the_range_is_unbroken(passed: set[float], usable: tuple[float, float]) -> None:
    assert calibration.run_around(STRENGTHS, 0.4, passed) == usable


def test_the_figure_shades_what_is_usable(tiny: Any) -> None:
    model, _ = tiny("llama")
    found = calibrate(model, pointing(model), Budget(5.0))
    figure = found.figure()
    above, below = figure.axes
    named = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    assert {"dev prompts", "test prompts", "usable", "KL of neutral prompts"} <= named
    assert np.allclose(below.lines[0].get_ydata()[0], 0)
    assert "usable at" in figure.get_suptitle()
    none = calibrate(model, pointing(model), 1e-9).figure()
    assert "no usable strength" in none.get_suptitle()


def test_bad_input(tiny: Any) -> None:
    model, _ = tiny("llama")
    v = pointing(model)
    for strengths in ([], [0.0, 1.0], [float("inf")]):
        with pytest.raises(ValueError, match="Strengths have to be numbers above 0"):
            calibrate(model, v, strengths=strengths)
    with pytest.raises(ValueError, match="it has no strength"):
        calibrate(model, 0 * v)
    with pytest.raises(ValueError, match="no behaviour 'nonsense'"):
        sl.calibrate(model, v, "nonsense", 1.0)
