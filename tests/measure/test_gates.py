"""A threshold between two kinds of prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import noise

import steerlib as sl

PROMPTS = ["I love dogs", "I went up to my friend and said", "The ship left the harbour"]


def test_projections_are_what_when_reads(tiny: Any) -> None:
    model, _ = tiny("gpt2")
    one = noise(model, 1, seed=1)
    two = sl.SteeringVector({2: one.layers[1], 1: one.layers[1]})
    for position in (-1, 2):
        got = sl.gate_projections(model, PROMPTS, two, position)
        assert got.shape == (3, 2)
        assert torch.equal(got[:, :1], sl.gate_projections(model, PROMPTS, one, position))
        unit = one.layers[1][0] / one.layers[1].norm()
        torch.testing.assert_close(
            got[:, 1], sl.capture(model, PROMPTS, 2, position, "resid_pre")[:, 0] @ unit
        )
    # A threshold a hair above or below what was read decides.
    add = sl.Add(noise(model, 2), "all")
    for prompt, read in zip(PROMPTS, sl.gate_projections(model, PROMPTS, one)[:, 0], strict=True):
        control = sl.steered_logits(model, prompt, None)
        for shift, passes in ((-1e-4, True), (1e-4, False)):
            steered = sl.steered_logits(model, prompt, sl.When(add, one, float(read) + shift))
            assert torch.equal(steered, control) != passes


def test_choose_threshold() -> None:
    assert sl.choose_threshold([5.0, 7.0], [1.0, 3.0]) == 4.0
    assert sl.choose_threshold(torch.tensor([5.0, 7.0, 2.0]), [1.0, 3.0, 0.0]) in (1.5, 4.0)
    rng = np.random.default_rng(0)
    yes, no = rng.normal(2, 1, 4000), rng.normal(0, 1, 4000)
    assert sl.choose_threshold(yes, no) == pytest.approx(1, abs=0.3)  # where the densities cross
    grid = np.linspace(-3, 5, 400)
    best = max((yes > t).mean() - (no > t).mean() for t in grid)
    found = sl.choose_threshold(yes, no)
    assert (yes > found).mean() - (no > found).mean() >= best


def test_gate_rates() -> None:
    table = sl.gate_rates([5.0, 7.0, 2.0], [1.0, 3.0, 4.0, 0.0], 3.5).set_index("rate")
    assert table.loc["true positive"].tolist() == [*sl.proportion_interval(2, 3), 3]
    assert table.loc["false positive"].tolist() == [*sl.proportion_interval(1, 4), 4]
    for beyond, passed in ((9.0, 0), (-1.0, 1)):  # chosen on other prompts, it may part none here
        assert sl.gate_rates([5.0, 7.0], [1.0], beyond).share.tolist() == [passed, passed]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sl.choose_threshold([], [1.0]), "both kinds, got 0 and 1"),
        (lambda: sl.choose_threshold([1.0, 2.0], [3.0, 4.0]), "Turn the direction round"),
        (lambda: sl.choose_threshold([1.0], [1.0]), "No threshold tells"),
        (lambda: sl.gate_rates([1.0, 2.0], [], 2.5), "both kinds, got 2 and 0"),
    ],
)
def test_bad_input_gets_a_sentence(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
