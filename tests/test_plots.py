"""Figures say what they show and where they came from; text is shown, never run."""

from __future__ import annotations

from typing import Any
from xml.etree.ElementTree import fromstring as parse

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb

import steerlib as sl
from steerlib import plots

SWEEP = pd.DataFrame(
    {
        "layer": [4, 2, 6, 2, 4, 6],
        "condition": ["steered"] * 3 + ["unsteered"] * 3,
        "mean": [0.5, 0.2, 0.4, 0.1, 0.1, 0.1],
        "low": [0.4, 0.1, 0.4, 0.0, 0.1, 0.05],
        "high": [0.7, 0.3, 0.4, 0.3, 0.2, 0.15],
    }
)
EVIL = "<script>alert('x')</script> & <b>"


@pytest.fixture(autouse=True)
def closed() -> Any:
    yield
    plt.close("all")


# ---------------------------------------------------------------- figures


def test_curves_show_means_and_intervals() -> None:
    figure = plots.curves(
        SWEEP, "layer", "condition", xlabel="layer", ylabel="words", title="wedding"
    )
    (ax,) = figure.axes
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("layer", "words", "wedding")
    legend = ax.get_legend()
    assert legend.get_title().get_text() == "condition"
    assert [t.get_text() for t in legend.get_texts()] == ["steered", "unsteered"]
    for container, name in zip(ax.containers, ["steered", "unsteered"], strict=True):
        line, caps, (bars,) = container.lines
        rows = SWEEP[SWEEP.condition == name].sort_values("layer")
        np.testing.assert_array_equal(line.get_xdata(), [2, 4, 6])
        np.testing.assert_allclose(line.get_ydata(orig=False), rows["mean"])
        ends = np.array(bars.get_segments())[:, :, 1]
        np.testing.assert_allclose(ends, rows[["low", "high"]].to_numpy(), atol=1e-12)
        assert line.get_color() == plots.COLOURS[name]


def test_curves_into_a_given_axis_with_given_colours() -> None:
    figure, axes = plt.subplots(1, 2)
    more: dict[str, Any] = {"ax": axes[1], "colours": {"steered": "#123456"}}
    got = plots.curves(SWEEP, "layer", "condition", xlabel="", ylabel="", **more)
    assert got is figure and not axes[0].lines
    assert axes[1].containers[0].lines[0].get_color() == "#123456"


def test_a_conditions_colour_is_its_own() -> None:
    """Told apart from each other, and not dependent on who else is in the figure."""
    assert len({*plots.PALETTE}) == len(plots.PALETTE) and len(set(plots.COLOURS.values())) == 3
    for order in (SWEEP, SWEEP.iloc[::-1]):
        (ax,) = plots.curves(order, "layer", "condition", xlabel="", ylabel="").axes
        found = {c.get_label(): c.lines[0].get_color() for c in ax.containers}
        assert found == {name: plots.COLOURS[name] for name in ("steered", "unsteered")}


def luminance(colour: Any) -> float:
    """Relative luminance of an sRGB colour; a contrast ratio of 3 is the least for large text."""
    return float(np.array(colour) ** 2.2 @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("centre", [None, 0.5])
def test_heatmap_shows_its_numbers(centre: float | None) -> None:
    table = pd.DataFrame(
        [[0.1, 0.9], [np.nan, 0.5], [0.6, 0.2]], index=[3, 5, 8], columns=["a", "b"]
    )
    figure = plots.heatmap(
        table, xlabel="part", ylabel="layer", label="share", title="t", centre=centre
    )
    ax, bar = figure.axes
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("part", "layer", "t")
    assert bar.get_ylabel() == "share"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["3", "5", "8"]
    assert [t.get_text() for t in ax.texts] == ["0.10", "0.90", "nan", "0.50", "0.60", "0.20"]
    (image,) = ax.images
    np.testing.assert_array_equal(image.get_array().filled(np.nan), table)
    if centre is not None:
        assert image.norm(centre) == pytest.approx(0.5)
        assert (image.norm.vmin, image.norm.vmax) == pytest.approx((0.1, 0.9))
    for text, value in zip(ax.texts, table.to_numpy().flat, strict=True):
        inks = [luminance(to_rgb(text.get_color())), luminance(image.cmap(image.norm(value))[:3])]
        assert np.isnan(value) or (max(inks) + 0.05) / (min(inks) + 0.05) > 3.5


# ---------------------------------------------------------------- text


def test_side_by_side() -> None:
    frame = pd.DataFrame(
        [("I", c, s, f"{c} says {s}") for c in ("unsteered", "love") for s in (0, 1, 2)]
        + [(EVIL, "love", 0, EVIL)],
        columns=["prompt", "condition", "sample", "completion"],
    )
    shown = plots.side_by_side(frame).data
    assert "<script" not in shown
    table = [[(c.findtext("b"), "".join(c.itertext())) for c in row] for row in parse(shown)]
    assert [text for _, text in table[0]] == ["unsteered", "love"]
    assert table[3] == [("I", "Iunsteered says 2"), ("I", "Ilove says 2")]
    assert table[4] == [(EVIL, EVIL), (EVIL, 2 * EVIL)]
    fewer = plots.side_by_side(frame, ["love"], n=1).data
    assert fewer.count("<tr>") == 3 and "unsteered" not in fewer and "says 1" not in fewer
    for odd in (frame.assign(condition=EVIL), frame.assign(completion=np.nan)):
        assert "<script" not in plots.side_by_side(odd).data  # nor when rows occur twice


def test_alignment_escapes_and_shows_spaces(model: Any) -> None:
    table = pd.DataFrame(
        [["0 (prompt)", "+1", "a b", "<script>"], ["6", "+5", " Love", ""]],
        columns=["layer", "coefficient", "0", "1"],
    )
    shown = plots.alignment(table).data
    assert "<script" not in shown and "&lt;script&gt;" in shown
    assert "a␣b" in shown and "␣Love" in shown and "0 (prompt)" in shown
    v = sl.SteeringVector.from_prompts(model, " wedding<script>", " ", layer=6)
    real = plots.alignment(sl.align(model, "A <script> & so on", {"v": v})).data
    assert "<script" not in real and "␣wedding" in real and "&amp;" in real
    assert "&lt;|im_start|&gt;" in real
