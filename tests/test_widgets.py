"""Panels without a browser: what they show, and what a moved slider does."""

from __future__ import annotations

import asyncio
import html
from typing import Any

import pytest
from conftest import n_hooks

import steerlib as sl
from steerlib.widgets import SteeringPanel

PROMPT = "I went up to my friend & said <script>alert(1)</script> that"


def panel(model: Any, **more: Any) -> SteeringPanel:
    return SteeringPanel(
        model, PROMPT, " wedding", " ", layer=2, coefficient=4, max_new_tokens=5, **more
    )


def test_a_panel_shows_what_generate_gives_and_escapes_it(tiny: Any) -> None:
    model, _ = tiny("llama")
    shown = panel(model).output.value
    assert "<script>" not in shown and "&lt;script&gt;" in shown and "coefficient +4" in shown
    vector = sl.SteeringVector.from_prompts(model, " wedding", " ", layer=2)
    conditions = {"unsteered": None, "steered": 4 * vector}
    frame = sl.generate(model, PROMPT, conditions, 2, 5, progress=False)
    assert all(html.escape(text) in shown for text in frame.completion)


def test_a_mistake_becomes_a_sentence(tiny: Any) -> None:
    model, _ = tiny("llama")
    p = panel(model)
    p.prompt.value = ""
    assert "empty" in p.output.value and "<table" not in p.output.value
    p.prompt.value = "I"
    p.plus.value = "a much longer text than the prompt itself is"
    assert "shorter vector" in p.output.value
    p.plus.value = " wedding"
    p.prompt.value = "I went up"
    assert "<table" in p.output.value


def test_a_moved_slider_cancels_the_run_under_way(tiny: Any) -> None:
    model, _ = tiny("llama")
    p = panel(model)

    async def move() -> tuple[str, list[int]]:
        leftovers = []
        p.coefficient.value = 1.0
        first = p._task
        for _ in range(3):  # a few tokens in, the model is free of hooks
            await asyncio.sleep(0.002)
            leftovers.append(n_hooks(model))
        p.coefficient.value = -3.0
        second = p._task
        assert first is not None and second is not None and second is not first
        await asyncio.gather(first, second, return_exceptions=True)
        assert first.cancelled() or first.done()
        return p.output.value, leftovers

    shown, leftovers = asyncio.run(move())
    assert "coefficient -3" in shown
    assert leftovers == [0, 0, 0]
    fresh = panel(model)
    fresh.coefficient.value = -3.0  # no event loop here: runs at once
    assert fresh.output.value == shown


def test_a_panel_takes_a_ready_vector(tiny: Any) -> None:
    model, _ = tiny("llama")
    pairs = [("I love dogs", "I hate dogs"), ("a good day", "a bad day")]
    direction = sl.SteeringVector.from_pairs(model, pairs, layers=[2])
    shown = SteeringPanel(model, "I went", vector=direction, coefficient=9, max_new_tokens=4)
    frame = sl.generate(model, "I went", {"s": 9 * direction}, 2, 4, progress=False)
    assert all(html.escape(text) in shown.output.value for text in frame.completion)


@pytest.mark.parametrize("at", ["front", "back", 3])
def test_a_panel_with_a_place_acts_there(tiny: Any, at: str | int) -> None:
    model, _ = tiny("llama")
    p = panel(model, at=at)
    vector = sl.SteeringVector.from_prompts(model, " wedding", " ", layer=2)
    k = vector.n_positions
    place = list(range(at, at + k)) if isinstance(at, int) else at
    frame = sl.generate(model, PROMPT, {"s": sl.Add(vector, place, 4)}, 2, 5, progress=False)
    assert all(html.escape(text) in p.output.value for text in frame.completion)
    assert p.position.disabled == isinstance(at, str)
    p.at.value = "middle"
    assert p.position.disabled and p.output.value == panel(model, at="middle").output.value
    p.at.value, p.position.value = "position", 2
    assert p.output.value == panel(model, at=2).output.value


def test_a_panel_with_a_fraction_keeps_that_part(tiny: Any) -> None:
    model, _ = tiny("llama")
    p = panel(model, fraction=0.5)
    part = sl.SteeringVector.from_prompts(model, " wedding", " ", layer=2).truncate(0.5)
    frame = sl.generate(model, PROMPT, {"s": 4 * part}, 2, 5, progress=False)
    assert all(html.escape(text) in p.output.value for text in frame.completion)
    p.which.value = "last"
    last = panel(model, fraction=0.5)
    last.which.value = "last"
    assert p.output.value == last.output.value
    p.fraction.value = 1.0
    assert p.output.value == panel(model).output.value
