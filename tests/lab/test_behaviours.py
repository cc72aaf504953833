"""Behaviours: what a table has to be, and effects against passes of the plain model."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from conftest import adding, noise, reference_logits

import steerlib as sl
from steerlib.lab import behaviours
from steerlib.lab.behaviours import Behaviour


def table(**changed: Any) -> pd.DataFrame:
    """Two prompts a split; ``changed`` columns replace those here."""
    prompts = ["I love dogs and", "The ship left", "She asked why", "He said that", "Words are"]
    columns = {
        "split": ["fit", "fit", "dev", "dev", "test", "test"],
        "prompt": [*prompts, "The little dog"],
        "target": [" a wedding", " a party", " love", " rain", " yes", " laughed"],
        "reference": [" the rain", " the dog", " hate", " party", " no", " hated"],
    }
    return pd.DataFrame({**columns, **changed})


def test_all_behaviours_can_be_loaded_and_have_enough_prompts() -> None:
    found = {name: behaviours.load(name) for name in behaviours.names()}
    assert len(found) >= 8
    for name, behaviour in found.items():
        assert behaviour.name == name
        assert len(behaviour.pairs) >= 40
        for split in ("dev", "test"):
            assert behaviour.rows(split).prompt.nunique() >= 20
    orders = found["agreeing"].rows("test")
    assert (orders.groupby("item").side.agg(set) == {"A", "B"}).all()
    twins = found["truthful"].rows("test")
    assert (twins.groupby("item").size() == 2).all()
    for _, two in twins.groupby("item"):
        assert set(two.target) == set(two.reference)


def test_pairs_join_prompt_and_continuation() -> None:
    pairs = Behaviour("x", table()).pairs
    assert pairs[0] == ("I love dogs and a wedding", "I love dogs and the rain")


def test_neutral_prompts_are_apart() -> None:
    dev, test = behaviours.neutral("dev"), behaviours.neutral("test")
    assert len(dev) == len(test) == 24 and not set(dev) & set(test)
    assert behaviours.neutral("dev", 3) == dev[:3]
    with pytest.raises(ValueError, match="dev or test prompts, not 'fit'"):
        behaviours.neutral("fit")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"split": ["fit", "fit", "dev", "dev", "test", "fit"]}, "has 1 prompt.* split 'test'"),
        ({"split": ["fit", "fit", "dev", "dev", "dev", "dev"]}, "has 0 prompt.* split 'test'"),
        (
            {"prompt": ["a", "b", "c", "d", "c", "f"]},
            "'c' stands in more than one split of 'mine': what is chosen on a prompt",
        ),
        (
            {"reference": [" the rain", " the dog", " love", " party", " no", " hated"]},
            r"target ' love' is also its reference, 1 time",
        ),
    ],
)
def test_bad_behaviours_get_a_sentence(changed: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Behaviour("mine", table(**changed))


def test_other_bad_input() -> None:
    with pytest.raises(ValueError, match="prompt, target, reference; reference is missing"):
        Behaviour("mine", table().drop(columns="reference"))
    with pytest.raises(ValueError, match="no behaviour 'nonsense'; there are affection"):
        behaviours.load("nonsense")
    with pytest.raises(ValueError, match="no split 'train'"):
        Behaviour("mine", table()).rows("train")


def test_effects_equal_plain_passes(tiny: Any) -> None:
    model, plain = tiny("llama")
    own = Behaviour("mine", table(item=["1", "1", "2", "2", "3", "3"]))
    v = noise(model, 1, site="resid_post", at="generated")
    names = [({"size": 1.0}, v), ({"size": 2.0}, 2 * v)]
    found = own.effects(model, names, "test")
    assert found.prompt.tolist() == ["3"] * 4 and found["size"].tolist() == [1.0, 2.0] * 2
    rows = own.rows("test")
    for i, row in enumerate(rows.itertuples()):
        for size in (0.0, 1.0, 2.0):
            leans = []
            for text in (row.target, row.reference):
                ids = sl.encode(model, row.prompt)
                new = model.tokenizer(text, add_special_tokens=False)["input_ids"]
                where = list(range(len(ids) - 1, len(ids) + len(new)))
                edits = [(1, "resid_post", adding(size * v.layers[1], where))]
                scores = reference_logits(plain, [*ids, *new], edits)[len(ids) - 1 : -1]
                leans.append(float(scores.log_softmax(-1)[range(len(new)), new].sum()))
            if not size:
                plain_leans = leans
                continue
            here = found[(found["size"] == size)].iloc[i]
            rise = leans[0] - plain_leans[0]
            assert here.target_effect == pytest.approx(rise, abs=1e-3)
            assert here.effect == pytest.approx(rise - leans[1] + plain_leans[1], abs=1e-3)
            assert here.unsteered == pytest.approx(plain_leans[0] - plain_leans[1], abs=1e-3)
    few = own.effects(model, names, "dev", 1)
    assert len(few) == 4  # both prompts of the first item
    both = behaviours.spill(model, [own, Behaviour("other", table())], names, "test")
    assert both.groupby("behaviour").size().to_dict() == {"mine": 4, "other": 4}
