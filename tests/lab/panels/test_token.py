"""The panel of tokens: what a vector does to the next one, and what it says by itself."""

from __future__ import annotations

import asyncio
import html
import re
from typing import Any

import pandas as pd
import pytest
from conftest import n_hooks

import steerlib as sl
from steerlib.lab.panels import TokenPanel, token

PROMPT = "I went up to my friend & said <script>alert(1)</script> that"


def panel(model: Any, prompt: str = PROMPT) -> TokenPanel:
    return TokenPanel(model, prompt, " wedding", " ", layer=2, coefficient=4, top=4)


def test_it_shows_the_tokens_that_move_most_and_escapes_them(tiny: Any) -> None:
    model, _ = tiny("llama")
    shown = panel(model).output.value
    vector = sl.SteeringVector.from_prompts(model, " wedding", " ", layer=2)
    shift = sl.next_token_shift(model, PROMPT, 4 * vector)
    best = shift.loc[(shift.p_after - shift.p_before).idxmax()]
    said = f"{best.token!r}: {best.p_before:.4f}, then {best.p_after:.4f}"
    assert f'aria-label="{html.escape(said)}"' in shown
    assert f"{shift.kl_contribution.sum():.3f} nats" in shown and "coefficient +4" in shown
    norms = sl.relative_norms(model, PROMPT, vector)
    assert f">{4 * norms.ratio.iloc[-1]:.2f}</td>" in shown
    said = sl.logit_lens(model, vector, top=4).top.iloc[-1]
    assert html.escape(" ".join(map(repr, said))) in shown
    markup = TokenPanel(model, "<script> & <b>", " <script>", " ", layer=2).output.value
    assert "<script>" not in markup and "<b>" not in markup


def test_bars_are_as_long_as_the_probabilities() -> None:
    frame = pd.DataFrame(
        {
            "token": [" a", "<b>", " c", " d"],
            "p_before": [0.1, 0.2, 0.4, 0.0],
            "p_after": [0.5, 0.1, 0.05, 0.1],
        }
    )
    shown = token.next_tokens(frame, 2, "with <it>")
    order = re.findall(r'role="img" aria-label="([^"]*):', shown)
    assert list(map(html.unescape, order)) == ["' a'", "' d'", "' c'", "'<b>'"]
    lengths = list(map(float, re.findall(r"width:([\d.]+)%", shown)))
    assert lengths == pytest.approx([20, 100, 0, 20, 80, 10, 40, 20])
    assert "up to 0.5" in shown and "<b>'" not in shown and "with &lt;it&gt;" in shown


def test_a_mistake_becomes_a_sentence(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny("gpt2")
    p = panel(model)
    p.prompt.value = ""
    assert "empty" in p.output.value and "<table" not in p.output.value
    p.prompt.value = "I"
    p.plus.value = "a much longer text <b>than</b> the prompt itself is"
    assert "shorter vector" in p.output.value
    p.prompt.value, p.plus.value = "I went up", " wedding"
    assert "<table" in p.output.value

    def fail(*args: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(token, "relative_norms", fail)
    p.coefficient.value = 1.0
    assert "not enough memory" in p.output.value and "<table" not in p.output.value
    assert n_hooks(model) == 0


def test_a_moved_slider_cancels_the_run_under_way(tiny: Any) -> None:
    model, _ = tiny("llama")
    p = panel(model)

    async def move() -> str:
        p.coefficient.value = 1.0
        first = p._task
        await asyncio.sleep(0)
        p.layer.value = 3
        p.coefficient.value = -3.0
        second = p._task
        assert first is not None and second is not None and second is not first
        await asyncio.gather(first, second, return_exceptions=True)
        assert first.cancelled()
        return p.output.value

    shown = asyncio.run(move())
    assert "coefficient -3" in shown and n_hooks(model) == 0
    fresh = panel(model)
    fresh.layer.value, fresh.coefficient.value = 3, -3.0  # no event loop here: runs at once
    assert fresh.output.value == shown
