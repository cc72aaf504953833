"""The source's direction, questions in both orders, and matched controls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import steerlib as sl
from steerlib.lab import honesty


@pytest.fixture(scope="module")
def fitted(model: Any) -> honesty.Fit:
    return honesty.fit(model, 20)


def test_the_direction_is_the_second_component_where_a_means_true(
    model: Any, fitted: honesty.Fit
) -> None:
    plain = sl.contrast_pairs(model, sl.datasets.load("claims"), 20)  # the same claims, one order
    prompts = [text for pair in plain for text in pair]
    read = sl.capture(model, prompts, layers=[12], positions=-1)
    expected = sl.fit_direction(read[:, 0].reshape(20, 2, -1), "pc2").float()
    cosine = torch.nn.functional.cosine_similarity(fitted.component[12], expected, dim=0)
    assert float(cosine) > 0.999
    v = 0.5 * fitted.vector([12, 20])
    assert v.at == "generated" and v.site == "resid_post" and sorted(v.layers) == [12, 20]
    assert float(v.norm()[12]) == pytest.approx(0.5 * float(fitted.length[12]), rel=1e-5)
    assert fitted.accuracy[fitted.best] == fitted.accuracy.max()


def test_the_direction_can_be_fitted_to_claims_of_ones_own(model: Any) -> None:
    own = sl.datasets.load("claims").iloc[20:28]
    found = honesty.fit(model, 8, claims=own)
    assert set(found.pairs.labels.id) == set(own.id) and found.held_out.empty


def test_fitted_and_held_out_claims_are_apart_and_keep_twins(fitted: honesty.Fit) -> None:
    trained = fitted.trained(6)
    assert len(trained) == 6 and trained.pair.nunique() == 3
    assert set(trained.id) <= set(fitted.pairs.labels.id)
    assert not set(fitted.held_out.pair) & set(fitted.pairs.labels.pair)
    assert len(fitted.held_out) + 20 == len(fitted.table)


def test_controls_are_as_long_as_the_direction(fitted: honesty.Fit) -> None:
    unrelated = honesty.unrelated_directions(fitted, 4)
    v = 0.4 * fitted.vector([5, 9])
    found = honesty.controls(v, unrelated, n_random=3)
    assert [name.family for name in found] == ["random"] * 3 + ["unrelated"] * 4
    for control in found.values():
        for layer, norm in control.norm().items():
            torch.testing.assert_close(norm, v.norm()[layer])
        assert control.at == "generated"
    # by hand: longer claims against the rest
    ids = fitted.pairs.labels.id[::2].to_numpy()
    length = fitted.table.set_index("id").claim[ids].str.len().to_numpy()
    mask = torch.from_numpy(length > np.median(length))
    mean = fitted.acts.mean(1)
    by_hand = mean[mask].mean(0) - mean[~mask].mean(0)
    torch.testing.assert_close(unrelated["length of the claim"], by_hand, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="domains"):
        honesty.unrelated_directions(fitted, 60)


def test_asking_in_both_orders(model: Any, fitted: honesty.Fit, tmp_path: Path) -> None:
    steered = {"unsteered": None, "pushed": 0.5 * fitted.vector([20])}
    said = honesty.ask(model, fitted.held_out, steered, n=4)
    assert len(said) == 4 * 2 * 2 and said.pair.nunique() == 2
    assert said.groupby("condition").order.value_counts().eq(4).all()
    again = [honesty.ask(model, fitted.held_out, steered, 4, cache=tmp_path) for _ in range(2)]
    for frame in again:  # written, and read back
        pd.testing.assert_frame_equal(frame, said)
    other = {"unsteered": None, "pushed": -0.5 * fitted.vector([20])}
    moved = honesty.ask(model, fitted.held_out, other, 4, cache=tmp_path)
    assert not np.allclose(moved.label, said.label)
    smaller = honesty.ask(model, fitted.held_out, {"unsteered": None}, n=2)
    assert set(smaller.prompt) <= set(said.prompt)


def test_limits_are_the_quantiles_and_stars_need_both_families() -> None:
    frame = pd.DataFrame(
        [
            (family, str(i), "x", 1.0, "p", scale * i)
            for family, scale in (("random", 0.1), ("unrelated", 0.2))
            for i in range(-10, 11)
        ],
        columns=["family", "control", "place", "coefficient", "prompt", "effect"],
    )
    limits = honesty.control_limits(frame, ["place", "coefficient"])
    row = limits.loc["x", 1.0]
    assert row.random_high == pytest.approx(0.9) and row.unrelated_low == pytest.approx(-1.8)
    effects = pd.DataFrame(
        {
            "place": ["x", "x", "x", "x", "y"],
            "coefficient": 1.0,
            "effect": [2.0, 1.0, 2.0, -2.0, 9.0],
            "low": [1.5, 0.5, -0.1, -3.0, 8.0],
            "high": [2.5, 1.5, 4.0, -1.0, 10.0],
        }
    )
    told = honesty.in_words(effects, limits, ["place", "coefficient"])
    assert [text.endswith("*") for text in told] == [True, False, False, True, False]
    assert told[0] == "+2.00 [+1.50, +2.50]*"
    one = effects.iloc[[0, 4]]  # where the controls ran it is less
    told = honesty.in_words(one, limits, ["place", "coefficient"], one[::-1].assign(effect=1.0))
    assert told[0] == "+2.00 [+1.50, +2.50]"
    many = honesty.in_words(effects.assign(p_holm=0.2), limits, ["place", "coefficient"])
    assert not any(text.endswith("*") for text in many)
