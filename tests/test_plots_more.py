"""Token heatmaps and the scatter of next-token probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex, to_rgb

import steerlib as sl
from steerlib import plots

CHANGES = pd.DataFrame(
    {
        "text": ["a<script> $5", "a<script> $5", "a<script> $5", "b c"],
        "token": ["a", "<script>", " $5\n", "b c"],
        "before": [-1.0, -2.0, -3.0, -1.0],
        "after": [-1.0, -1.0, -9.0, -1.0],
        "change": [np.nan, 1.0, -6.0, 0.0],
    }
)


def test_token_heatmap_escapes_and_marks_what_goes_down() -> None:
    page = plots.token_heatmap(CHANGES, limit=2).data
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "<i>a</i>" in page  # not scored, hence no colour
    up, down, same = (page.split(f">{t}</span>")[0].rsplit("<span", 1)[1] for t in
                      ("&lt;script&gt;", " $5\n", "b c"))  # fmt: skip
    assert to_hex([(1 + c) / 2 for c in to_rgb(plots.GAIN)]) in up and "underline" not in up
    assert plots.LOSS.lower() in down and "underline" in down  # beyond the limit: full colour
    assert "#ffffff" in same and "underline" not in same
    assert "+1.00 nats" in up and "×7.4" in page and "×0.14" in page


def test_token_heatmap_figure_shows_every_token_in_its_colour() -> None:
    figure = plots.token_heatmap_figure(CHANGES, limit=2, width=12, title="t")
    figure.canvas.draw()
    ax = figure.axes[0]
    shown = "".join(t.get_text() for t in ax.texts)
    assert shown == "a<script> \\$5⏎b c"
    colours = {to_hex(p.get_facecolor()) for p in ax.patches}
    assert {plots.LOSS.lower(), "#ffffff"} <= colours and len(ax.patches) == 3
    plt.close(figure)


@pytest.mark.parametrize("ceiling", [0.9, 1e-6])
def test_shift_scatter_names_tokens_on_the_right_side(ceiling: float) -> None:
    rng = np.random.default_rng(0)
    before = rng.dirichlet(np.full(300, 0.1)) * ceiling + 1e-15
    after = np.roll(before, 1)
    tokens = [f" t{i}$" for i in range(300)]
    columns = {"token": tokens, "token_id": range(300), "p_before": before, "p_after": after}
    frame = pd.DataFrame({**columns, "kl_contribution": after * np.log(after / before)})
    figure = plots.shift_scatter(frame, title="t", label=10)
    figure.canvas.draw()
    ax = figure.axes[0]
    assert len(ax.texts) == 10 and all(t.get_text().startswith("␣t") for t in ax.texts)
    places = np.array([t.xy for t in ax.texts])
    assert set(map(tuple, places)) <= set(zip(before, after, strict=True))
    sides = [t.get_ha() == "right" for t in ax.texts]
    assert sides == [bool(y > x) for x, y in places]
    plt.close(figure)


def test_a_heatmap_of_real_changes(tiny: Any) -> None:
    model, _ = tiny("llama")
    vector = sl.SteeringVector.from_prompts(model, " wedding", " ", layer=1)
    changes = sl.token_changes(model, ["I love <b>dogs</b>", "The ship left"], 5 * vector)
    page = plots.token_heatmap(changes).data
    assert "<b>" not in page and page.count("<p ") == 2
