"""The figures of the second document show the numbers that they are given."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb

import steerlib as sl


@pytest.fixture
def frame() -> pd.DataFrame:
    """Ten claims, honest answer first; PC1 is 3 higher for honest answers."""
    rows = [(i, i, i % 2 == 0, a, a == "A") for i in range(10) for a in "AB"]
    labels = pd.DataFrame(rows, columns=["id", "pair", "truth", "label", "honest"])
    acts = torch.randn(10, 2, 5, generator=torch.Generator().manual_seed(0))
    acts[:, 0, 1] += 3
    directions = {"PC1": 4 * torch.eye(5)[1], "PC2": torch.ones(5)}
    found = sl.probes.projections(acts, labels, directions)
    flat = acts.reshape(20, 5)
    np.testing.assert_allclose(found.PC1, flat[:, 1], rtol=1e-6)
    np.testing.assert_allclose(found.PC2, flat.sum(1) / 5**0.5, rtol=1e-5)
    assert list(found.columns[:5]) == list(labels.columns)
    return found


def test_projections_want_one_layer(frame: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match=r"\[10, 2, 4, 5\] do not fit 20 labels"):
        sl.probes.projections(torch.zeros(10, 2, 4, 5), frame, {"x": torch.ones(5)})


def test_four_groups_have_colour_and_mark(frame: pd.DataFrame) -> None:
    figure = sl.plots.groups_scatter(frame, "PC1", "PC2", title="x")
    (ax,) = figure.axes
    assert ax.get_xlabel() == "projection on PC1"
    drawn = {c.get_label(): c for c in ax.collections}
    assert list(drawn) == [
        "honest, true claim (n = 5)",
        "honest, false claim (n = 5)",
        "dishonest, true claim (n = 5)",
        "dishonest, false claim (n = 5)",
    ]
    points = drawn["dishonest, false claim (n = 5)"]
    wanted = frame[~frame.honest & ~frame.truth]
    np.testing.assert_allclose(points.get_offsets(), wanted[["PC1", "PC2"]])
    colours = {tuple(c.get_facecolor()[0][:3]) for c in ax.collections}
    assert colours == {to_rgb(c) for c in sl.plots.HONESTY.values()}
    plt.close(figure)
    two = sl.plots.groups_scatter(frame.assign(truth=None), "PC1", "PC2")
    assert [c.get_label() for c in two.axes[0].collections] == [
        "honest (n = 10)",
        "dishonest (n = 10)",
    ]
    plt.close(two)


def test_histograms_count_every_answer(frame: pd.DataFrame) -> None:
    figure = sl.plots.group_histogram(frame, "PC1", bins=7)
    (ax,) = figure.axes
    bars = [p for p in ax.patches if hasattr(p, "get_height")]
    assert sum(p.get_height() for p in bars) == 20
    colours = {p.get_facecolor()[:3] for p in bars}
    assert colours == {to_rgb(c) for c in sl.plots.HONESTY.values()}
    middle = frame.PC1.mean()
    for name, colour in sl.plots.HONESTY.items():
        mine = [p for p in bars if p.get_facecolor()[:3] == to_rgb(colour)]
        mean = sum(p.get_height() * (p.get_x() + p.get_width() / 2) for p in mine) / 10
        assert (mean > middle) == (name == "honest")
    plt.close(figure)


def test_heatmap_puts_position_zero_behind_the_line() -> None:
    values = np.zeros((4, 8))
    values[2, 3] = -2.0  # layer 12, the first generated token
    values[0, 0] = np.nan
    figure = sl.plots.generation_heatmap(values, [4, 8, 12, 16], prompt_positions=3, label="cosine")
    ax, bar = figure.axes
    (image,) = ax.get_images()
    left, right, bottom, top = image.get_extent()
    assert (left + right) / 2 == pytest.approx(0.5) and right - left == 8
    assert image.origin == "lower" and bottom < top
    column = left + 3.5  # centre of the fourth column
    assert column == pytest.approx(0) and ax.lines[0].get_xdata()[0] == pytest.approx(-0.5)
    assert image.get_clim() == (-2, 2) and bar.get_ylabel() == "cosine"
    assert [t.get_text() for t in ax.get_yticklabels()] == ["4", "8", "12", "16"]
    plt.close(figure)
    same = sl.plots.generation_heatmap(values, [4, 8, 12, 16], limit=5)
    assert same.axes[0].get_images()[0].get_clim() == (-5, 5)
    plt.close(same)
