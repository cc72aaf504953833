"""The panel of strength: effect, KL and text belong to the strength that is shown."""

from __future__ import annotations

import html
from typing import Any

import pytest
from conftest import n_hooks, noise

import steerlib as sl
from steerlib.lab.behaviours import neutral
from steerlib.lab.panels import StrengthPanel, strength

PROMPT = "I went up to my friend & said"


@pytest.fixture
def made(tiny: Any) -> Any:
    import pandas as pd

    model, _ = tiny("llama")
    prompts = ["I love dogs and", "The ship", "She asked why", "He said", "Words are", "A dog"]
    columns = {"split": ["fit", "fit", "dev", "dev", "test", "test"], "prompt": prompts}
    table = pd.DataFrame({**columns, "target": " love", "reference": " hate"})
    behaviour = sl.behaviours.Behaviour("love", table)
    vector = noise(model, 1, site="resid_post", at="generated")
    given = {"others": [], "strengths": (0.2, 0.4), "n_random": 2, "unrelated": 2}
    found = sl.calibrate(model, vector, behaviour, 100.0, **given)
    return model, vector, behaviour, found


@pytest.mark.thorough
def test_numbers_and_text_are_those_of_the_strength(made: Any) -> None:
    model, vector, behaviour, found = made
    panel = StrengthPanel(model, vector, behaviour, found, PROMPT, n=2, max_new_tokens=6)
    unit = found.table.coefficient.iloc[0] / found.table.strength.iloc[0]
    for value in (0.3, -0.4):
        panel.strength.value = value
        condition = value * unit * vector
        effects = behaviour.effects(model, {"v": condition}, "test").effect
        kl = sl.kl_by_prompt(model, neutral("test", 2), {"v": condition}).kl.mean()
        assert f"strength {value:+.2f}: effect {effects.mean():+.2f} nats" in panel.output.value
        assert f"KL {kl:.2f} nats" in panel.output.value
        run = {"max_new_tokens": 6, "temperature": 0, "progress": False}
        texts = sl.generate(model, PROMPT, {"unsteered": None, "steered": condition}, **run)
        for text in texts.completion:
            assert html.escape(text) in panel.output.value
        assert panel.picture.value[:4] == b"\x89PNG"
    assert html.escape(PROMPT) in panel.output.value and n_hooks(model) == 0


@pytest.mark.thorough
def test_what_was_measured_is_not_measured_again(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, vector, behaviour, found = made
    panel = StrengthPanel(model, vector, behaviour, found, PROMPT, n=2, max_new_tokens=2)
    calls: list[Any] = []
    measured = strength.kl_by_prompt

    def counted(*args: Any) -> Any:
        calls.append(args)
        return measured(*args)

    monkeypatch.setattr(strength, "kl_by_prompt", counted)
    panel.strength.value = 0.05
    panel.prompt.value = "I love dogs"
    panel.strength.value = 0.1
    panel.strength.value = 0.05
    assert len(calls) == 2


def test_a_mistake_becomes_a_sentence(made: Any) -> None:
    model, vector, behaviour, found = made
    panel = StrengthPanel(model, vector, behaviour, found, PROMPT, n=2, max_new_tokens=2)
    panel.prompt.value = ""
    assert "empty" in panel.output.value
    panel.prompt.value = "I"
    assert "KL" in panel.output.value
