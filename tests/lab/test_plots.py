"""Figures show the numbers that they are given, and can be read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from steerlib.lab import plots

SWEEP = pd.DataFrame(
    {
        "layer": [4, 2, 6, 2, 4, 6],
        "condition": ["steered"] * 3 + ["unsteered"] * 3,
        "mean": [0.5, 0.2, 0.4, 0.1, 0.1, 0.1],
        "low": [0.4, 0.1, 0.4, 0.0, 0.1, 0.05],
        "high": [0.7, 0.3, 0.4, 0.3, 0.2, 0.15],
    }
)


@pytest.fixture(autouse=True)
def closed() -> Any:
    yield
    plt.close("all")


# ---------------------------------------------------------------- sweeps


def curves(frame: pd.DataFrame = SWEEP, **more: Any) -> Figure:
    return plots.curves(frame, "layer", "condition", xlabel="layer", ylabel="words", **more)


@pytest.mark.parametrize("meet", [False, True])
def test_curves_show_means_and_intervals(meet: bool) -> None:
    """Lines whose error bars would hide each other are moved apart, the others stay."""
    sweep = SWEEP if meet else SWEEP.assign(low=SWEEP["mean"] - 0.01, high=SWEEP["mean"] + 0.02)
    (ax,) = curves(sweep, title="wedding").axes
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("layer", "words", "wedding")
    legend = ax.get_legend()
    assert legend.get_title().get_text() == "condition"
    assert [t.get_text() for t in legend.get_texts()] == ["steered", "unsteered"]
    moved = []
    for container, name in zip(ax.containers, ["steered", "unsteered"], strict=True):
        line, caps, (bars,) = container.lines
        rows = sweep[sweep.condition == name].sort_values("layer")
        moved.append(line.get_xdata(orig=False).astype(float) - rows.layer.to_numpy())
        np.testing.assert_allclose(line.get_ydata(orig=False), rows["mean"])
        ends = np.array(bars.get_segments())
        np.testing.assert_allclose(ends[:, :, 1], rows[["low", "high"]].to_numpy(), atol=1e-12)
        np.testing.assert_allclose(ends[:, 0, 0], line.get_xdata(orig=False))
        assert line.get_color() == plots.COLOURS[name]
    apart = moved[1] - moved[0]
    np.testing.assert_allclose(moved[1], -moved[0], atol=1e-12)
    assert (apart > 0.05).all() and (apart < 0.5).all() if meet else (apart == 0).all()


def test_curves_show_intervals_as_ribbons() -> None:
    (ax,) = curves(band=True, line=0.0).axes
    zero, *lines = ax.lines
    assert zero.get_ydata() == [0, 0]
    for ribbon, line, name in zip(ax.collections, lines, ["steered", "unsteered"], strict=True):
        rows = SWEEP[SWEEP.condition == name].sort_values("layer")
        np.testing.assert_array_equal(line.get_xdata(), rows.layer)
        corners = ribbon.get_paths()[0].vertices
        for x, low, high in rows[["layer", "low", "high"]].to_numpy():
            here = corners[corners[:, 0] == x, 1]
            assert (here.min(), here.max()) == pytest.approx((low, high))


def test_effects_start_at_zero() -> None:
    table = SWEEP.rename(columns={"mean": "effect"}).assign(condition="love")
    found = plots.from_zero(table, "layer", "condition")
    assert found.iloc[0][["layer", "mean", "low", "high"]].tolist() == [0] * 4
    assert found["mean"].tolist() == [0, *table.effect] and set(found.condition) == {"love"}


def test_layers_are_counted_in_whole_numbers() -> None:
    frame = SWEEP.assign(layer=SWEEP.layer // 2)
    for odd in (frame, frame.assign(layer=frame.layer.astype(float))):
        figure = curves(odd)
        figure.canvas.draw()
        assert all(t == round(t) for t in figure.axes[0].get_xticks())
    figure = curves(frame.assign(layer=frame.layer / 2))
    figure.canvas.draw()
    assert any(t != round(t) for t in figure.axes[0].get_xticks())


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


def test_controls_are_grey_and_the_others_take_turns() -> None:
    names = ["love", "random (20)", "unrelated words", "hate", "shuffled", "unsteered"]
    found = plots.colours_for(names, {"love": "#123456"})
    assert found["love"] == "#123456" and found["unsteered"] == "#000000"
    assert found["hate"] == plots.PALETTE[0]
    for name in ("random (20)", "unrelated words", "shuffled"):
        red, green, blue = to_rgb(found[name])
        assert red == green == blue


def test_dots_show_means_and_intervals_side_by_side() -> None:
    frame = SWEEP.assign(what=["b", "a", "c"] * 2)
    (ax,) = plots.dots(frame, "what", "condition", xlabel="nats", title="t", line=0.0).axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["b", "a", "c"]
    assert ax.yaxis_inverted() and ax.get_xlabel() == "nats"
    assert ax.figure.get_suptitle() == "t" and list(ax.lines[0].get_xdata()) == [0, 0]
    heights = []
    for container, name in zip(ax.containers, ["steered", "unsteered"], strict=True):
        line, caps, (bars,) = container.lines
        rows = frame[frame.condition == name]
        np.testing.assert_allclose(line.get_xdata(orig=False), rows["mean"])
        ends = np.array(bars.get_segments())[:, :, 0]
        np.testing.assert_allclose(ends, rows[["low", "high"]].to_numpy(), atol=1e-12)
        heights.append(line.get_ydata(orig=False))
    assert (heights[0] < heights[1]).all() and (heights[1] - heights[0] < 0.5).all()
    figure, axes = plt.subplots(1, 2)
    plots.dots(frame, "what", "condition", xlabel="", title="t", ax=axes[1])
    assert axes[1].get_title() == "t" and not axes[0].lines and not figure.get_suptitle()


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
    assert [t.get_text() for t in ax.texts] == ["0.10", "0.90", "–", "0.50", "0.60", "0.20"]
    (image,) = ax.images
    np.testing.assert_array_equal(image.get_array().filled(np.nan), table)
    if centre is not None:
        assert image.norm(centre) == pytest.approx(0.5)
        assert (image.norm.vmin, image.norm.vmax) == pytest.approx((0.1, 0.9))
    for text, value in zip(ax.texts, table.to_numpy().flat, strict=True):
        inks = [luminance(to_rgb(text.get_color())), luminance(image.cmap(image.norm(value))[:3])]
        assert np.isnan(value) or (max(inks) + 0.05) / (min(inks) + 0.05) > 3.5


def test_forest_shows_every_row_and_clips() -> None:
    rows = [
        ("1", "m", "yes", 3.0, 2.5, 1e4, 0.4, 0.6, True),
        ("2", "m", "no", 0, -0.1, 0.2, 0.4, 0.3, False),
    ]
    names = "demonstration model group effect low high random unrelated works".split()
    marks = {"random": "random directions", "unrelated": "unrelated words"}
    figure = plots.forest(
        pd.DataFrame(rows, columns=names),
        "demonstration", "model", "group", xlabel="nats", controls=marks, colour="works",
    )  # fmt: skip
    plots.caption(figure, model="m", n=9)
    figure.canvas.draw()
    (ax,) = figure.axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["1", "2"]
    assert {"yes", "no"} <= {t.get_text() for t in ax.texts}
    assert ax.get_xlim()[1] < 100 and any(line.get_marker() == ">" for line in ax.lines)
    greys = {line.get_label(): list(line.get_xdata()) for line in ax.lines}
    assert greys["random directions"] == [0.4, 0.4] and greys["unrelated words"] == [0.6, 0.3]
    legend, line = figure.legends[0].get_window_extent(), figure._supxlabel
    assert legend.y0 > line.get_window_extent().y0  # the caption below it


def test_forest_says_what_was_not_measured() -> None:
    rows = [("1", "m", "yes", 1, 0, 2), ("2", "m", "yes", 1, 0, 2), ("2", "n", "yes", 1, 0, 2)]
    frame = pd.DataFrame(rows, columns="row model group effect low high".split())
    first, second = plots.forest(frame, "row", "model", "group", xlabel="nats").axes
    assert "not measured" not in {text.get_text() for text in first.texts}
    (said,) = [text for text in second.texts if text.get_text() == "not measured"]
    assert said.get_position()[1] == second.get_yticks()[0]  # in the row of "1"


# ---------------------------------------------------------------- honesty


def answers() -> pd.DataFrame:
    """Ten claims, honest answer first; PC1 is 3 higher for honest answers."""
    rows = [(i, i, i % 2 == 0, a, a == "A") for i in range(10) for a in "AB"]
    labels = pd.DataFrame(rows, columns=["id", "pair", "truth", "label", "honest"])
    draws = np.random.default_rng(0).normal(size=(20, 2))
    return labels.assign(PC1=draws[:, 0] + 3 * labels.honest, PC2=draws[:, 1])


def test_four_groups_have_colour_and_mark() -> None:
    frame = answers()
    figure = plots.groups_scatter(frame, "PC1", "PC2", title="x")
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
    assert colours == {to_rgb(c) for c in plots.HONESTY.values()}
    two = plots.groups_scatter(frame.assign(truth=None), "PC1", "PC2")
    assert [c.get_label() for c in two.axes[0].collections] == [
        "honest (n = 10)",
        "dishonest (n = 10)",
    ]


def test_histograms_count_every_answer() -> None:
    frame = answers()
    figure = plots.group_histogram(frame, "PC1", bins=7)
    (ax,) = figure.axes
    bars = [p for p in ax.patches if hasattr(p, "get_height")]
    assert sum(p.get_height() for p in bars) == 20
    colours = {p.get_facecolor()[:3] for p in bars}
    assert colours == {to_rgb(c) for c in plots.HONESTY.values()}
    middle = frame.PC1.mean()
    for name, colour in plots.HONESTY.items():
        mine = [p for p in bars if p.get_facecolor()[:3] == to_rgb(colour)]
        mean = sum(p.get_height() * (p.get_x() + p.get_width() / 2) for p in mine) / 10
        assert (mean > middle) == (name == "honest")


def test_heatmap_puts_position_zero_behind_the_line() -> None:
    values = np.zeros((4, 8))
    values[2, 3] = -2.0  # layer 12, the first generated token
    values[0, 0] = np.nan
    figure = plots.generation_heatmap(values, [4, 8, 12, 16], prompt_positions=3, label="cosine")
    ax, bar = figure.axes
    (image,) = ax.get_images()
    left, right, bottom, top = image.get_extent()
    assert (left + right) / 2 == pytest.approx(0.5) and right - left == 8
    assert image.origin == "lower" and bottom < top
    column = left + 3.5  # centre of the fourth column
    assert column == pytest.approx(0) and ax.lines[0].get_xdata()[0] == pytest.approx(-0.5)
    assert image.get_clim() == (-2, 2) and bar.get_ylabel() == "cosine"
    assert [t.get_text() for t in ax.get_yticklabels()] == ["4", "8", "12", "16"]
    faded = np.isclose(values, 0)
    pale = plots.generation_heatmap(
        values, [4, 8, 12, 16], faded=faded, counts=[9, 9, 9, 8, 7, 6, 5, 4]
    )
    alpha = np.asarray(pale.axes[0].get_images()[0].get_alpha())
    assert alpha[2, 3] == 1 and (alpha[faded] < 0.5).all()
    assert [t.get_text() for t in pale.axes[0].get_xticklabels()] == ["-3\n9", "0\n8", "3\n5"]
    same = plots.generation_heatmap(values, [4, 8, 12, 16], limit=5)
    assert same.axes[0].get_images()[0].get_clim() == (-5, 5)


# ---------------------------------------------------------------- tokens


CHANGES = pd.DataFrame(
    {
        "text": ["a<script> $5", "a<script> $5", "a<script> $5", "b c"],
        "token": ["a", "<script>", " $5\n", "b c"],
        "before": [-1.0, -2.0, -3.0, -1.0],
        "after": [-1.0, -1.0, -9.0, -1.0],
        "change": [np.nan, 1.0, -6.0, 0.0],
    }
)


def test_token_heatmap_figure_shows_every_token_in_its_colour() -> None:
    figure = plots.token_heatmap_figure(CHANGES, limit=2, width=12, title="t")
    figure.canvas.draw()
    ax = figure.axes[0]
    shown = "".join(t.get_text() for t in ax.texts)
    assert shown == "a<script> \\$5⏎b c"
    colours = {to_hex(p.get_facecolor()) for p in ax.patches}
    assert {plots.LOSS.lower(), "#ffffff"} <= colours and len(ax.patches) == 3
    figure = plots.token_heatmap_figure(CHANGES, caption="m, n = 9")
    figure.canvas.draw()
    (said,) = (text for text in figure.texts if text.get_text() == "m, n = 9")
    assert said.get_window_extent().y1 < figure.axes[1].xaxis.label.get_window_extent().y0


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


# ---------------------------------------------------------------- how steering works; what holds


def schematic(n_tokens: int = 9) -> Figure:
    change = np.random.default_rng(3).random((30, n_tokens)) / 2
    names = ["(begin)", *(f" token{i}" for i in range(1, n_tokens))]
    return plots.schematic(change, names, 3, [1, 2], shift(), vector="+ 2 × (a − b)", title=TITLE)


def test_the_schematic_shows_where_the_vector_enters_and_what_follows() -> None:
    figure = schematic()
    left, right = figure.axes[:2]
    (image,) = left.images
    np.testing.assert_allclose(image.get_array(), np.random.default_rng(3).random((30, 9)) / 2)
    entry = next(line for line in left.lines if line.get_color() == plots.COLOURS["steered"])
    assert entry.get_xdata().tolist() == [0.5, 2.5] and entry.get_ydata().tolist() == [2.5, 2.5]
    (arrow,) = (t for t in left.texts if t.get_text() == "+ 2 × (a − b)")
    assert arrow.xy == (1.5, 2.5)
    before, after = right.containers
    table = shift().assign(top=shift()[["p_before", "p_after"]].max(axis=1))
    table = table.nlargest(5, "top").sort_values("p_after", ascending=False)
    np.testing.assert_allclose([bar.get_width() for bar in before], table.p_before)
    np.testing.assert_allclose([bar.get_width() for bar in after], table.p_after)
    names = [t.get_text() for t in right.get_yticklabels()]
    assert names == table.token.str.replace(" ", "␣").tolist()


MARKS = {"holds": ("●", "#00664B"), "cannot tell": ("?", "#595959")}


def verdicts(n_models: int = 3) -> Figure:
    models = ["smollm2-135m", "gemma3-270m", "qwen2.5-coder-1.5b", "a-fourth-model"][:n_models]
    rows = [
        (source, group, f"a claim of some length{i}", model, "0.17*", "holds", "~-0.123")
        for source, group in (("One", "first"), ("One", "second"), ("Two", "third"))
        for i in (1, 2)
        for model in models
    ]
    columns = "source group label model theirs_short verdict short".split()
    frame = pd.DataFrame(rows, columns=columns)
    frame.loc[len(models) - 1, "verdict"] = "cannot tell"
    frame = frame.drop(index=0)  # not measured in the first model
    heads = {("first", models[1]): "1 of 2"}
    return plots.verdicts(frame, MARKS, heads, title=TITLE)


@pytest.mark.parametrize("n_models", [3, 4])
def test_verdicts_have_a_row_a_claim_and_a_mark_a_model(n_models: int) -> None:
    (ax,) = verdicts(n_models).axes
    said = [(t.get_text(), t.get_color(), t.get_position()) for t in ax.texts]
    text = [t for t, _, _ in said]
    assert text.count("One") == text.count("Two") == text.count("first") == 1
    assert text.count("1 of 2") == 1 and text.count("0.17*") == 6
    heads = [t for t in text if t.replace("\n", "").startswith("smollm2")]
    assert len(heads) == 2  # every source has the columns of its own models
    marks = [t for t in said if t[0] == "●" and t[1] == "#00664B"]
    assert len(marks) == 6 * n_models - 2 and text.count("? cannot tell") == 1
    assert [t[1] for t in said if t[0] == "?"] == ["#595959"]
    assert text.count("~−0.123") == (17 if n_models == 3 else 0)  # no room for numbers of four
    heights = [t[2][1] for t in said if t[0].startswith("a claim")]
    assert len(set(heights)) == 6


# ---------------------------------------------------------------- what all share


def changes(n: int = 40) -> pd.DataFrame:
    drawn = np.random.default_rng(1).normal(size=n)
    columns = {"before": -2.0, "after": drawn - 2, "change": drawn, "token": " wedding"}
    return pd.DataFrame({"text": ["a"] * (n // 2) + ["b"] * (n // 2), **columns})


def shift() -> pd.DataFrame:
    p = np.random.default_rng(2).dirichlet(np.full(50, 0.3), size=2) + 1e-12
    columns = {"p_before": p[0], "p_after": p[1], "kl_contribution": p[1] * np.log(p[1] / p[0])}
    return pd.DataFrame({"token": [f" word{i}" for i in range(50)], **columns})


def many() -> pd.DataFrame:
    names = [f"a condition of some length {i}" for i in range(7)]
    rows = [(n, layer, i * 0.1, i * 0.1 - 1, i * 0.1 + 1) for i, n in enumerate(names)
            for layer in range(12)]  # fmt: skip
    return pd.DataFrame(rows, columns=["condition", "layer", "mean", "low", "high"])


def effects() -> pd.DataFrame:
    rows = [
        (model, number, "the source says yes" if number < 9 else "no", 3.0, number - 20.0, 40.0, 1)
        for model in ("smollm2-135m", "gemma3-270m", "qwen2.5-coder-1.5b")
        for number in range(1, 21)
    ]
    columns = "model demonstration works effect low high q95".split()
    return pd.DataFrame(rows, columns=columns)


TITLE = "Affirms rather than tells the truth, in every model that was looked at so far"
KINDS = {
    "curves": lambda: curves(title=TITLE),
    "many curves": lambda: curves(many(), band=True, title=TITLE),
    "dots": lambda: plots.dots(many(), "layer", "condition", xlabel="nats", title=TITLE),
    "heatmap": lambda: plots.heatmap(
        many().pivot(index="condition", columns="layer", values="mean"),
        xlabel="layer", ylabel="", label="share", title=TITLE,
    ),
    "shift": lambda: plots.shift_scatter(shift(), title=TITLE),
    "histogram": lambda: plots.group_histogram(answers(), "PC1", title=TITLE),
    "scatter": lambda: plots.groups_scatter(answers(), "PC1", "PC2", title=TITLE),
    "generation": lambda: plots.generation_heatmap(
        np.ones((24, 40)), range(24), title=TITLE, label="cosine"
    ),
    "forest": lambda: plots.forest(
        effects(), "demonstration", "model", "works", xlabel="nats", title=TITLE,
        controls={"q95": "random directions"},
    ),
    "tokens": lambda: plots.token_heatmap_figure(changes(), title="Weddings become likelier"),
    "schematic": schematic,
    "verdicts": verdicts,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_can_be_read_in_half_a_page(kind: str) -> None:
    """Nothing smaller than 7 pt there, nothing cut off, the legend below the data."""
    figure = KINDS[kind]()
    figure.canvas.draw()
    width = figure.get_figwidth()
    assert width <= 2 * plots.COLUMN + 0.01
    shown = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    assert min(t.get_fontsize() for t in shown) * plots.COLUMN / width > plots.LEAST - 0.05
    paper = figure.bbox
    for text in shown:
        box = text.get_window_extent()
        inside = box.x0 > -2 and box.x1 < paper.x1 + 2 and box.y0 > -2 and box.y1 < paper.y1 + 2
        assert inside or not text.axes or text in hidden_ticks(text.axes), text
    for ax in figure.axes:
        if (legend := ax.get_legend()) is not None:
            assert not legend.get_window_extent().overlaps(ax.get_window_extent())
            assert legend.get_window_extent().y0 > -2


def hidden_ticks(ax: Any) -> list[Text]:
    """Labels of ticks outside the limits, which are not drawn."""
    found = []
    for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
            if not min(low, high) <= tick.get_loc() <= max(low, high):
                found += [tick.label1, tick.label2]
    return found


def test_panels_are_a_page_wide_at_most() -> None:
    for n, ncols, rows in ((1, None, 1), (3, None, 2), (5, 3, 2), (2, 1, 2)):
        figure, axes = plots.panels(n, ncols, sharey=True)
        assert len(axes) == n == len(figure.axes)
        assert figure.get_figwidth() <= 6.6 + 1e-9
        assert axes[0].get_gridspec().nrows == rows
    figure, _ = plots.panels(4, size=(9, 2))
    assert figure.get_size_inches() == pytest.approx((6.6, 4))
    with pytest.raises(ValueError, match="at least one panel, got n=0"):
        plots.panels(0)


def test_one_legend_takes_the_place_of_all() -> None:
    figure, axes = plots.panels(2)
    curves(ax=axes[0])
    curves(SWEEP.replace("steered", "love"), ax=axes[1])
    height = figure.get_figheight()
    plots.one_legend(figure)
    assert all(ax.get_legend() is None for ax in axes)
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["steered", "unsteered", "love"]
    assert figure.get_figheight() > height
    figure.canvas.draw()
    assert legend.get_window_extent().y1 < min(ax.get_window_extent().y0 for ax in axes)


def test_caption_says_on_what_a_figure_stands() -> None:
    figure = curves()
    plots.caption(figure, model="smollm2-135m", n=48, seed=0)
    assert figure.get_supxlabel() == "smollm2-135m, n = 48, seed = 0"
    plots.caption(figure, model="m", intervals="over prompts", n=9)
    assert figure.get_supxlabel() == "m, intervals: 95 % over prompts, n = 9"


def test_small_text_is_raised_where_a_figure_fits_a_page() -> None:
    for width, grown in ((6.6, True), (9.0, False)):
        figure, ax = plt.subplots(figsize=(width, 3))
        small, large = ax.set_title("t", fontsize=5), ax.set_xlabel("x", fontsize=30)
        plots.readable(figure)
        assert small.get_fontsize() == pytest.approx(14 if grown else 5)
        assert large.get_fontsize() == 30
