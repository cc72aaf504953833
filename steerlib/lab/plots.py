"""One function per kind of figure, in one style.

Every figure is made to be read in half the width of a page (3.3 in) too, where its smallest text
still has 7 pt: that is 10 pt in a figure 4.7 in wide, and more in a wider one (`style`). Legends
stand below the data. Colours are Okabe and Ito's, told apart under every common colour blindness;
conditions keep theirs across figures: unsteered black, steered vermilion, controls grey.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib import pyplot as plt
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The notebook's backend has to start now: if it started inside one of the style contexts below,
# leaving that would switch its interactive mode off, and a notebook would show one figure only.
plt.switch_backend(plt.get_backend())

PALETTE = ["#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"]
MARKS = "os^DvPX"
COLOURS = {"unsteered": "#000000", "steered": "#D55E00", "random": "#8C8C8C"}
CONTROLS = {"random": "#8C8C8C", "shuffled": "#8C8C8C", "unrelated": "#B5B5B5"}  # how names begin
HONESTY = {"honest": "#0072B2", "dishonest": "#D55E00"}
GAIN, LOSS = "#009E73", "#D55E00"  # a token's probability went up, or down
WIDTH = 4.7  # inches; of a figure with one panel
COLUMN, LEAST = 3.3, 7.0  # inches of half a page, and the points that text must have there
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": "medium",
    "figure.titlesize": "medium",
    "legend.fontsize": "medium",
    "legend.title_fontsize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=PALETTE),
    "axes.grid": True,
    "grid.alpha": 0.3,
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "legend.frameon": False,
    "lines.markersize": 4.5,
}


def style(width: float = WIDTH) -> dict[str, Any]:
    """`STYLE` for a figure of this width, in inches: its text has 7 pt in half a page's width."""
    return {**STYLE, "font.size": max(10.0, LEAST * width / COLUMN)}


def panels(
    n: int, ncols: int | None = None, size: tuple[float, float] | None = None, **more: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of ``n`` panels in our style, row by row.

    Args:
        ncols: panels in a row; by default two, or one if there is one.
        size: of one panel, in inches; by default the figure is as wide as a page (6.6), or, with
            one column, `WIDTH`. A figure never becomes wider than a page.
        more: as for `matplotlib.pyplot.subplots`, such as ``sharey=True``.
    """
    if n < 1:
        raise ValueError(f"A figure has at least one panel, got n={n}.")
    across = min(n, 2) if ncols is None else ncols
    down = -(-n // across)
    panel = size or ((WIDTH, 3.3) if across == 1 else (2 * COLUMN / across, 3.0))
    width = min(across * panel[0], 2 * COLUMN)
    with plt.rc_context(style(width)):
        grid = {"figsize": (width, down * panel[1]), "squeeze": False, **more}
        figure, axes = plt.subplots(down, across, **grid)
    flat = list(axes.flat)
    for empty in flat[n:]:
        empty.remove()
    return figure, flat[:n]


def one_legend(figure: Figure, ncols: int | None = None) -> None:
    """One legend below all panels, in place of one in each."""
    named: dict[str, Any] = {}
    size = 10.0
    for ax in figure.axes:
        size = _size(ax)
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
        if (legend := ax.get_legend()) is not None:
            legend.remove()
    if named:
        fit = ncols or _columns(named, figure.get_figwidth(), size)
        _grow(figure, -(-len(named) // fit), size)
        more = {"ncols": fit, "frameon": False, "fontsize": size}
        figure.legend(named.values(), named.keys(), loc="outside lower center", **more)


def caption(figure: Figure, **facts: Any) -> None:
    """A line below the figure that says on what it stands: ``caption(figure, model=…, n=…)``;
    what its bars or ribbons are, with ``intervals="over prompts"``: 95 % intervals over prompts."""
    bare = {"model": "{}", "intervals": "intervals: 95 % {}"}
    said = ", ".join(bare.get(k, f"{k} = {{}}").format(v) for k, v in facts.items())
    size = style(figure.get_figwidth())["font.size"]
    text = textwrap.fill(said, int(figure.get_figwidth() * 72 / (0.57 * size)))
    line = 1.25 * size / 72 / figure.get_figheight()
    if figure.legends:  # both would stand at the bottom: empty lines make room for the legend
        figure.draw_without_rendering()
        room = (text.count("\n") + 1) * line
        tall = max(x.get_window_extent().height for x in figure.legends) / figure.bbox.height
        for legend in figure.legends:
            legend.set_bbox_to_anchor((0, room, 1, 1 - room), transform=figure.transFigure)
        text = "\n" * int(np.ceil(tall / line)) + text
    figure.supxlabel(text, x=0.01, ha="left", fontsize=size, color="#555555")


def readable(figure: Figure) -> None:
    """Raise text that would have less than 7 pt in half a page's width. A figure wider than a page
    is not meant for one, and left alone."""
    width = figure.get_figwidth()
    if width > 2 * COLUMN + 0.01:
        return
    least = LEAST * width / COLUMN
    for text in figure.findobj(Text):
        if text.get_text() and float(text.get_fontsize()) < least - 0.01:
            text.set_fontsize(least)


def colours_for(names: Iterable[str], given: Mapping[str, str] | None = None) -> dict[str, str]:
    """A colour for each condition: the one given, its own (`COLOURS`), grey if its name begins as
    a control's, or else the next of `PALETTE`."""
    fixed = {**COLOURS, **(given or {})}
    found: dict[str, str] = {}
    used = 0
    for name in dict.fromkeys(names):
        grey = next((c for k, c in CONTROLS.items() if name.startswith(k)), None)
        if (colour := fixed.get(name, grey)) is None:
            colour, used = PALETTE[used % len(PALETTE)], used + 1
        found[name] = colour
    return found


def from_zero(table: pd.DataFrame, x: str, by: str) -> pd.DataFrame:
    """A table of effects (`stats.effect_table`) for `curves`: the effect as ``mean``, and the
    unsteered model, which has none by definition, as the first point of every line."""
    import pandas as pd

    zero = {x: 0.0, "mean": 0.0, "low": 0.0, "high": 0.0}
    first = pd.DataFrame([{by: name, **zero} for name in dict.fromkeys(table[by])])
    return pd.concat([first, table.rename(columns={"effect": "mean"})], ignore_index=True)


def curves(
    frame: pd.DataFrame,
    x: str,
    by: str,
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    colours: Mapping[str, str] | None = None,
    band: bool = False,
    line: float | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Lines with 95 % intervals: one line per value of ``by``, from columns mean, low, high.

    Args:
        frame: as `stats.summarise` returns it.
        band: show intervals as ribbons, for many lines or many points.
        line: draw a thin line at this value, such as 0 for an effect.

    Where error bars of two lines would hide each other, the lines are moved apart a little.
    """
    with _context(ax):
        own, ax = ax is None, ax or _axes(2.8)
        if line is not None:
            ax.axhline(line, color="#000000", linewidth=0.8, zorder=1)
        groups = [(str(name), g.sort_values(x)) for name, g in frame.groupby(by, sort=False)]
        chosen = colours_for((name for name, _ in groups), colours)
        apart = 0.0 if band else _dodge(frame, x, [group for _, group in groups])
        for i, (name, group) in enumerate(groups):
            more: dict[str, Any] = {"color": chosen[name], "marker": MARKS[i % len(MARKS)]}
            if band:
                ax.fill_between(
                    group[x], group["low"], group["high"], color=chosen[name], alpha=0.2, lw=0
                )
                ax.plot(group[x], group["mean"], label=name, **more)
                continue
            where = group[x] + apart * (i - (len(groups) - 1) / 2) if apart else group[x]
            ax.errorbar(where, group["mean"], yerr=_error(group), capsize=2.5, label=name, **more)
        if _whole_numbers(frame[x]):
            ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        ax.set(xlabel=xlabel, ylabel=ylabel, title=_wrapped(title, ax))
        _legend(ax, own, title=by.replace("_", " "))
        return ax.get_figure()  # type: ignore[return-value]


def _error(group: pd.DataFrame) -> np.ndarray:
    """``[2, point]``: how far the interval reaches down and up."""
    return np.array([group["mean"] - group["low"], group["high"] - group["mean"]]).clip(0)


def _dodge(frame: pd.DataFrame, x: str, groups: Sequence[pd.DataFrame]) -> float:
    """How far to move neighbouring lines apart, in units of ``x``; 0 if no two intervals meet."""
    places = np.unique(frame[x]) if frame[x].dtype.kind in "iuf" else np.array([])
    if len(places) < 2 or len(groups) < 2:
        return 0.0
    for _, here in frame.groupby(x):
        lows, highs = here["low"].to_numpy()[None], here["high"].to_numpy()[None]
        if ((lows <= highs.T) & (lows.T <= highs)).sum() > len(here):  # with others than itself
            return float(min(0.08, 0.4 / len(groups)) * np.diff(places).min())
    return 0.0


def _whole_numbers(values: pd.Series) -> bool:
    return values.dtype.kind in "iu" or (values.dtype.kind == "f" and (values % 1 == 0).all())


def heatmap(
    table: pd.DataFrame,
    *,
    xlabel: str,
    ylabel: str,
    label: str,
    title: str = "",
    centre: float | None = None,
    annotate: str = "{:.2f}",
    ax: Axes | None = None,
) -> Figure:
    """A table as colours with its numbers written in, a dash where one is missing; diverging
    colours if ``centre`` is given."""
    width = float(np.clip(1.9 + 0.55 * table.shape[1], WIDTH, 2 * COLUMN))
    with _context(ax, width, **{"axes.grid": False}):
        ax = ax or _axes(1.4 + 0.33 * table.shape[0], width)
        ax.grid(False)
        values = table.to_numpy(dtype=float)
        limits: dict[str, Any] = {"cmap": "cividis"}
        if centre is not None:
            reach = float(np.nanmax(np.abs(values - centre))) or 1.0
            limits = {"cmap": "RdBu_r", "vmin": centre - reach, "vmax": centre + reach}
        image = ax.imshow(values, aspect="auto", **limits)
        for (i, j), value in np.ndenumerate(values):
            known = not np.isnan(value)
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = known and 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            text, colour = annotate.format(value) if known else "–", "white" if dark else "black"
            ax.text(j, i, text, ha="center", va="center", color=colour)
        names = [str(c) for c in table.columns]
        room = _inches(ax) * 72 / (0.6 * _size(ax) * len(names))
        ax.set_xticks(range(len(names)), names)
        if max(map(len, names)) > room:
            plt.setp(ax.get_xticklabels(), rotation=40, ha="right", rotation_mode="anchor")
        ax.set_yticks(range(table.shape[0]), [str(r) for r in table.index])
        ax.set(xlabel=xlabel, ylabel=ylabel, title=_wrapped(title, ax))
        ax.get_figure().colorbar(image, ax=ax, label=label)  # type: ignore[union-attr]
        return ax.get_figure()  # type: ignore[return-value]


def dots(
    frame: pd.DataFrame,
    y: str,
    by: str,
    *,
    xlabel: str,
    title: str = "",
    colours: Mapping[str, str] | None = None,
    line: float | None = None,
    ax: Axes | None = None,
) -> Figure:
    """One line of dots with 95 % intervals per value of ``y``, one colour per value of ``by``.

    Args:
        frame: as `stats.summarise` returns it.
        line: draw a thin line at this value, such as 0 for an effect.
    """
    labels, groups = list(dict.fromkeys(frame[y])), list(dict.fromkeys(frame[by]))
    chosen = colours_for(map(str, groups), colours)
    with _context(ax):
        height = 1.0 + (0.25 + 0.09 * len(groups)) * len(labels)
        own, ax = ax is None, ax or _axes(height)
        figure: Figure = ax.get_figure()  # type: ignore[assignment]
        if line is not None:
            ax.axvline(line, color="#000000", linewidth=0.8, zorder=1)
        for i, name in enumerate(groups):
            part = frame[frame[by] == name]
            place = np.array([labels.index(label) for label in part[y]])
            # side by side, or they hide each other
            shift = min(0.22, 0.7 / len(groups)) * (i - (len(groups) - 1) / 2)
            ax.errorbar(
                part["mean"], place + shift, xerr=_error(part), fmt=MARKS[i % len(MARKS)],
                color=chosen[str(name)], label=str(name),
            )  # fmt: skip
        ax.set_yticks(range(len(labels)), [textwrap.fill(str(label), 30) for label in labels])
        ax.invert_yaxis()
        ax.set(xlabel=xlabel)
        _legend(ax, own)
        if own:  # long labels push the axes aside: the title goes over both
            size = STYLE["font.size"]
            figure.suptitle(textwrap.fill(title, int(WIDTH * 72 / (0.52 * size))), fontsize=size)
        else:
            ax.set_title(_wrapped(title, ax))
        return figure


def forest(
    frame: pd.DataFrame,
    y: str,
    panel: str,
    group: str,
    *,
    xlabel: str,
    title: str = "",
    controls: Mapping[str, str] | None = None,
    colour: str | None = None,
) -> Figure:
    """Effects with 95 % intervals: a panel a model, rows in groups, logarithmic beyond ±1.

    Args:
        frame: one row per ``y`` and ``panel``: effect, low, high.
        group: the column by which rows stand together; its values are written above them.
        controls: columns that hold a bound of the controls -> its name; each a grey mark.
        colour: a column of truth values, whether it works: filled vermilion where true, hollow
            grey elsewhere.

    Values beyond the axis are clipped, with an arrow.
    """
    places: dict[Any, float] = {}
    heads: dict[str, float] = {}
    last = -1.5
    for name, rows in frame.groupby(group, sort=False):
        last += 1.5  # half a row of space before each group
        heads[str(name)] = last
        for label in rows[y].unique():
            last += 1
            places[label] = last
    names = list(dict.fromkeys(frame[panel]))
    height, width = 1.2 + 0.27 * (last + 1), 2 * COLUMN
    with plt.rc_context({**style(width), "axes.grid.axis": "x"}):
        figure, grid = plt.subplots(
            1, len(names), figsize=(width, height), sharey=True, sharex=True, squeeze=False
        )
        for ax, name in zip(grid.flat, names, strict=True):
            part = frame[frame[panel] == name]
            row = part[y].map(places).to_numpy(dtype=float)
            ax.axvline(0, color="#000000", linewidth=0.8, zorder=1)
            for mark, (column, label) in zip("|d", (controls or {}).items(), strict=False):
                ax.plot(
                    part[column], row, mark, color="#8C8C8C", label=label, markersize=7, zorder=2
                )
            for label in places.keys() - set(part[y]):
                ax.text(
                    0.98, places[label], "not measured", transform=ax.get_yaxis_transform(),
                    ha="right", va="center", color="#767676", fontsize="small",
                )  # fmt: skip
            true = np.ones(len(part), bool) if colour is None else part[colour].to_numpy(bool)
            for chosen, label, paint, face in (
                (true, "works", COLOURS["steered"], COLOURS["steered"]),
                (~true, "does not", "#444444", "white"),
            ):
                here = part[chosen].rename(columns={"effect": "mean"})
                ax.errorbar(
                    here["mean"], row[chosen], xerr=_error(here), fmt="o", color=paint,
                    markerfacecolor=face, label=label, zorder=3,
                )  # fmt: skip
            ax.set_xscale("symlog", linthresh=1, linscale=0.8)
            ticks = (-10, -1, 0, 1, 10) if len(names) > 1 else (-30, -10, -3, -1, 0, 1, 3, 10, 30)
            ax.set_xticks(ticks, [f"{tick:g}".replace("-", "−") for tick in ticks])
            ax.minorticks_off()
            ax.set_title(str(name).replace("-", "-\n", 1) if len(names) > 2 else str(name))
        shown = frame[["effect", *(controls or {})]]
        lowest, highest = shown.min(axis=None), shown.max(axis=None)
        grid[0, 0].set_xlim(min(-2.0, 1.4 * lowest), max(2.0, 1.4 * highest))
        grid[0, 0].set_yticks(list(places.values()), [str(label) for label in places])
        grid[0, 0].set_ylim(last + 0.6, -0.6)
        for head, place in heads.items():
            grid[0, 0].text(
                -0.03, place, head, transform=grid[0, 0].get_yaxis_transform(), ha="right",
                va="center", style="italic",
            )  # fmt: skip
        _arrows(grid.flat, frame, panel, y, places, names)
        grid[0, (len(names) - 1) // 2].set_xlabel(xlabel)
        size = style(width)["font.size"]
        figure.suptitle(textwrap.fill(title, int(width * 72 / (0.52 * size))), fontsize=size)
        one_legend(figure, 2)
        return figure


def _arrows(
    axes: Iterable[Axes],
    frame: pd.DataFrame,
    panel: str,
    y: str,
    places: Mapping[Any, float],
    names: Sequence[Any],
) -> None:
    """An arrow at the edge for every interval that goes on beyond it."""
    for ax, name in zip(axes, names, strict=True):
        left, right = ax.get_xlim()
        for row in frame[frame[panel] == name].to_dict("records"):
            for beyond, edge, mark in (
                (row["low"] < left, left, "<"),
                (row["high"] > right, right, ">"),
            ):
                if beyond:
                    ax.plot(edge, places[row[y]], mark, color="#444444", clip_on=False)


def verdicts(
    frame: pd.DataFrame,
    marks: Mapping[str, tuple[str, str]],
    heads: Mapping[tuple[str, str], str],
    *,
    title: str = "",
) -> Figure:
    """A table as a figure: claims in rows below the heads of their groups, a column per model.

    Every source has the columns of the models in which its claims were measured.

    Args:
        frame: one row per claim and model: source, group, label, model, theirs_short (the
            source's number or word), verdict, short (our number).
        marks: verdict -> its shape and colour.
        heads: group, model -> what stands beside the head of the group.

    Numbers are left away where there are more than three models: only marks are readable then.
    """
    width, step = 2 * COLUMN, 0.25
    legend = -(-len(marks) // 3)
    y = 0.0
    with plt.rc_context({**style(width), "axes.grid": False}):
        figure, ax = plt.subplots()
        ax.axis("off")
        for source, part in frame.groupby("source", sort=False):
            y = _source_block(ax, str(source), part, marks, heads, y) + 1
        for i, (name, (shape, colour)) in enumerate(marks.items()):
            place = (i % 3 * 0.34, y + i // 3 + 0.2)
            ax.text(*place, f"{shape} {name}", va="center", color=colour)
        bottom = y + legend + 0.2
        ax.set(xlim=(0, 1), ylim=(bottom, -0.6))
        figure.set_size_inches(width, step * (bottom + 1.8))
        size = style(width)["font.size"]
        figure.suptitle(textwrap.fill(title, int(width * 72 / (0.52 * size))), fontsize=size)
        return figure


LEFT, THEIRS, FIRST = 0.0, 0.4, 0.515  # where the columns of `verdicts` begin


def _source_block(
    ax: Axes,
    source: str,
    frame: pd.DataFrame,
    marks: Mapping[str, tuple[str, str]],
    heads: Mapping[tuple[str, str], str],
    y: float,
) -> float:
    """The claims of one source below line ``y``: its models, then its groups. The last line."""
    names = list(dict.fromkeys(frame["model"]))
    columns = np.linspace(FIRST, 1, max(len(names), 2) + 1)[: len(names)]
    wrapped = [textwrap.fill(name, 26 if len(names) == 1 else 10) for name in names]
    y += max(name.count("\n") for name in wrapped) + 0.5
    ax.text(LEFT, y + 0.35, source, va="bottom", weight="bold")
    ax.text(THEIRS, y + 0.35, "source", va="bottom", style="italic")
    for x, name in zip(columns, wrapped, strict=True):
        ax.text(x, y + 0.35, name, va="bottom", style="italic", linespacing=1)
    ax.axhline(y + 0.5, color="#000000", linewidth=0.8)
    places = dict(zip(names, columns, strict=True))
    for group, of_group in frame.groupby("group", sort=False):
        y += 1
        ax.axhspan(y - 0.5, y + 0.5, color="#EEEEEE", lw=0, zorder=0)
        ax.text(LEFT + 0.01, y, group, va="center", style="italic")
        for name, x in places.items():
            ax.text(x, y, heads.get((group, name), ""), va="center", style="italic")
        for _, rows in of_group.groupby("label", sort=False):
            y += 1
            _claim_row(ax, rows, places, marks, y)
    return y


def _claim_row(
    ax: Axes,
    rows: pd.DataFrame,
    places: Mapping[str, float],
    marks: Mapping[str, tuple[str, str]],
    y: float,
) -> None:
    """One claim: its label, what the source says, and a mark in the column of each model."""
    ax.text(LEFT + 0.03, y, rows.label.iloc[0], va="center")
    ax.text(THEIRS, y, rows.theirs_short.iloc[0], va="center", color="#555555")
    for row in rows[rows.verdict.isin(list(marks))].itertuples():
        x, (shape, colour) = places[row.model], marks[row.verdict]
        number = row.short.replace("-", "−") if len(places) < 4 else ""
        ax.text(x, y, shape, va="center", color=colour, weight="bold")
        ax.text(x + 0.034, y, number, va="center", color=colour)


RARE = 1e-4  # tokens that are rarer, both before and after, are not shown


def shift_scatter(
    frame: pd.DataFrame,
    *,
    title: str = "",
    label: int = 12,
    ax: Axes | None = None,
) -> Figure:
    """Next-token probabilities before and after, with the no-change line and tokens named.

    Args:
        frame: as `logprobs.next_token_shift` returns it.
        label: how many tokens to name: half of them the likeliest, half those that make up most
            of the divergence, in either direction.

    Source: Turner et al. 2023, "Token probability shifts".
    """
    floor = min(RARE, float(frame[["p_before", "p_after"]].to_numpy().max()) / 10)
    shown = frame[(frame.p_before > floor) | (frame.p_after > floor)]
    likely = shown[["p_before", "p_after"]].max(axis=1).nlargest(label - label // 2).index
    rest = shown.drop(likely)
    moving = rest.kl_contribution.abs().nlargest(label // 2).index
    gains = shown.p_after > shown.p_before
    with _context(ax):
        own, ax = ax is None, ax or _axes(4.4)
        size = _size(ax)
        for mask, colour, mark, name in (
            (gains, GAIN, "^", "more likely"),
            (~gains, LOSS, "v", "less likely"),
        ):
            ax.scatter(
                shown.p_before[mask], shown.p_after[mask], s=18, marker=mark, color=colour,
                alpha=0.6, label=name, linewidths=0,
            )  # fmt: skip
        ends = [floor / 10, 1]
        ax.plot(ends, ends, color="#000000", linewidth=1, label="no change")
        low = max(float(shown[["p_before", "p_after"]].to_numpy().min()), floor / 10)
        ax.set(
            xscale="log", yscale="log", xlim=(low / 2, 1), ylim=(low / 2, 1),
            xlabel="probability before", ylabel="probability after", title=_wrapped(title, ax),
        )  # fmt: skip
        named = shown.loc[[*likely, *moving]].sort_values("p_after", ascending=False)
        taken: list[tuple[float, float]] = []
        for row in named.itertuples():  # from the top down; a label that would hide one moves down
            up = row.p_after > row.p_before
            x, y = ax.transData.transform((row.p_before, row.p_after)) * 72 / ax.figure.dpi
            left, place = x - 7 * size if up else x + 14, y + (8 if up else -8)
            while any(abs(left - a) < 6 * size and abs(place - b) < 1.1 * size for a, b in taken):
                place -= 3
            taken.append((left, place))
            ax.annotate(
                _visible(row.token),
                (row.p_before, row.p_after),
                xytext=(-14 if up else 14, place - y),
                textcoords="offset points",
                ha="right" if up else "left",
                va="center",
                arrowprops={"arrowstyle": "-", "color": "#888888", "linewidth": 0.6},
            )
        _legend(ax, own)
        return ax.get_figure()  # type: ignore[return-value]


def _visible(token: str) -> str:
    """A token with its spaces and line breaks made visible, and no mathematics in it."""
    for old, new in ((" ", "␣"), ("\n", "⏎"), ("\t", "⇥"), ("$", r"\$")):
        token = token.replace(old, new)
    return token


def schematic(
    change: np.ndarray,
    tokens: Sequence[str],
    layer: int,
    positions: Sequence[int],
    shift: pd.DataFrame,
    *,
    vector: str,
    title: str = "",
) -> Figure:
    """How steering works, in one real run: where the vector enters, what it changes, what follows.

    Args:
        change: ``[layer, position]``, the norm of the change of the stream over its own norm,
            leaving each layer.
        tokens: of the prompt, one a position.
        layer, positions: before which layer, and at which positions, the vector is added.
        shift: the next token, as `logprobs.next_token_shift` returns it.
        vector: what is written at the arrow.
    """
    with plt.rc_context({**style(2 * COLUMN), "axes.grid": False}):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(2 * COLUMN, 4.0), width_ratios=[1.45, 1]
        )
        n = len(change)
        small_too = matplotlib.colors.PowerNorm(0.5, 0, 1)
        ends = (-0.5, len(tokens) - 0.5)
        image = left.imshow(
            change, cmap="Oranges", norm=small_too, aspect="auto", origin="lower",
            extent=(*ends, -0.5, n - 0.5),
        )  # fmt: skip
        left.vlines(np.arange(len(tokens) + 1) - 0.5, -0.5, n - 0.5, color="white", linewidth=2)
        left.set_xticks(range(len(tokens)), [_visible(token) for token in tokens])
        plt.setp(left.get_xticklabels(), rotation=40, ha="right", rotation_mode="anchor")
        left.set(xlabel="token", ylabel="layer", ylim=(-0.5, n - 0.5))
        left.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        low = layer - 0.5  # the vector is added before this layer
        first, last = min(positions) - 0.5, max(positions) + 0.5
        left.plot(
            [first, last], [low, low], color=COLOURS["steered"], linewidth=4, solid_capstyle="butt"
        )
        left.annotate(
            vector, ((first + last) / 2, low), (last + 0.3, min(low + 0.45 * n, 0.9 * n)),
            color="#000000", va="center",
            bbox={"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 2},
            arrowprops={"arrowstyle": "-|>", "color": COLOURS["steered"], "linewidth": 2},
        )  # fmt: skip
        bar = figure.colorbar(image, ax=left, location="top", shrink=0.9, aspect=30)
        bar.set_label("change of the stream / its length")
        bar.set_ticks([0, 0.1, 0.5, 1])
        likely = shift[["p_before", "p_after"]].max(axis=1).nlargest(5).index
        shown = shift.loc[likely].sort_values("p_after", ascending=False)
        rows = np.arange(len(shown))
        for i, (column, name, colour) in enumerate(
            (("p_before", "before", COLOURS["unsteered"]), ("p_after", "after", COLOURS["steered"]))
        ):
            right.barh(rows + 0.2 * (2 * i - 1), shown[column], 0.38, color=colour, label=name)
        right.set_yticks(rows, [_visible(token) for token in shown.token])
        right.invert_yaxis()
        right.set(xlabel="probability", title="next token")
        right.xaxis.set_major_locator(MaxNLocator(nbins=4))
        _legend(right, own=True)
        size = style(2 * COLUMN)["font.size"]
        figure.suptitle(textwrap.fill(title, int(2 * COLUMN * 72 / (0.52 * size))), fontsize=size)
        return figure


# ---------------------------------------------------------------- honesty


def groups_scatter(
    frame: pd.DataFrame,
    x: str,
    y: str,
    *,
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    ax: Axes | None = None,
) -> Figure:
    """Answers in the plane of two directions: colour says honest or not, the mark true or false.

    Args:
        frame: as `probes.projections` returns it; ``x`` and ``y`` name two of its directions.

    Source: the honesty repository, scatter of the first two principal components.
    """
    with _context(ax):
        own, ax = ax is None, ax or _axes(3.9)
        for (honest, truth), group in _four_groups(frame):
            name = "honest" if honest else "dishonest"
            claim = "" if truth is None else f", {'true' if truth else 'false'} claim"
            ax.scatter(
                group[x], group[y], s=22, alpha=0.6, color=HONESTY[name],
                marker="x" if truth is False else "o", linewidths=1.1 if truth is False else 0,
                label=f"{name}{claim} (n = {len(group)})",
            )  # fmt: skip
        ax.set(xlabel=xlabel or f"projection on {x}", ylabel=ylabel or f"projection on {y}")
        ax.set_title(_wrapped(title, ax))
        _legend(ax, own)
        return ax.get_figure()  # type: ignore[return-value]


def group_histogram(
    frame: pd.DataFrame,
    x: str,
    *,
    title: str = "",
    bins: int = 30,
    ax: Axes | None = None,
) -> Figure:
    """How honest and dishonest answers lie along one direction.

    Args:
        frame: as `probes.projections` returns it; ``x`` names one of its directions.

    Source: the honesty repository, histograms of projections for all layers.
    """
    with _context(ax):
        own, ax = ax is None, ax or _axes(3.2)
        edges = np.histogram_bin_edges(frame[x], bins).tolist()
        for name, honest in (("honest", True), ("dishonest", False)):
            values = frame[x][frame.honest.astype(bool) == honest]
            colour = HONESTY[name]
            ax.hist(values, edges, alpha=0.35, color=colour)
            label = f"{name} (n = {len(values)})"  # the outline, since the fillings overlap
            ax.hist(values, edges, histtype="step", color=colour, label=label)
        ax.set(xlabel=f"projection on {x}", ylabel="answers")
        ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        ax.set_title(_wrapped(title, ax))
        _legend(ax, own)
        return ax.get_figure()  # type: ignore[return-value]


def _four_groups(frame: pd.DataFrame) -> list[tuple[tuple[bool, bool | None], pd.DataFrame]]:
    """Honest and dishonest x true and false claim; without claims, the first two only."""
    truths = [True, False] if frame.truth.notna().all() else [None]
    found = []
    for honest in (True, False):
        for truth in truths:
            chosen = frame.honest.astype(bool) == honest
            if truth is not None:
                chosen &= frame.truth.astype(bool) == truth
            found.append(((honest, truth), frame[chosen]))
    return found


def generation_heatmap(
    values: np.ndarray,
    layers: Sequence[int],
    prompt_positions: int = 3,
    *,
    title: str = "",
    label: str = "",
    limit: float | None = None,
    faded: np.ndarray | None = None,
    counts: Sequence[int] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Mean projections by layer and position while generating, in diverging colours around 0.

    Args:
        values: ``[layer, position]``, positions as `generate.capture_generation` has them: the last
            ``prompt_positions`` of the prompt, then the generated tokens from 0.
        limit: the value of the full colour, to share one scale among figures.
        faded: ``[layer, position]``, true where a cell says nothing: its colour pales.
        counts: how many texts there are at each position, written below it.

    Source: the honesty repository, generation heatmaps.
    """
    array = np.asarray(values, dtype=float)
    reach = limit or float(np.nanmax(np.abs(array))) or 1.0
    with _context(ax, **{"axes.grid": False}):
        ax = ax or _axes(1.5 + 0.1 * len(layers))
        ax.grid(False)
        ends = (-prompt_positions - 0.5, array.shape[1] - prompt_positions - 0.5)
        colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad="#BBBBBB")
        image = ax.imshow(
            array, cmap=colours, vmin=-reach, vmax=reach, aspect="auto", origin="lower",
            extent=(*ends, -0.5, len(layers) - 0.5), interpolation="none",
            alpha=None if faded is None else np.where(faded, 0.25, 1.0),
        )  # fmt: skip
        ax.axvline(-0.5, color="#000000", linewidth=0.8)
        step = -(-len(layers) // 12)
        ax.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        step = 3 * -(-array.shape[1] // 27)  # 0 is always among them
        places = range(-prompt_positions, array.shape[1] - prompt_positions)
        shown = [place for place in places if place % step == 0]
        ax.set_xticks(shown)
        xlabel = "position (0: first generated token)"
        if counts is not None:
            below = [f"{place}\n{counts[place + prompt_positions]}" for place in shown]
            ax.set_xticks(shown, below)
            xlabel += "\nbelow it: texts"
        ax.set(xlabel=xlabel, ylabel="layer")
        ax.set_title(_wrapped(title, ax))
        ax.get_figure().colorbar(image, ax=ax, label=label)  # type: ignore[union-attr]
        return ax.get_figure()  # type: ignore[return-value]


# ---------------------------------------------------------------- text


def shade(change: float, limit: float) -> str:
    """White for no change, towards `GAIN` or `LOSS` up to ``limit``."""
    full = matplotlib.colors.to_rgb(GAIN if change > 0 else LOSS)
    part = min(abs(change) / limit, 1.0)
    return matplotlib.colors.to_hex([1 - part * (1 - c) for c in full])


def token_heatmap_figure(
    frame: pd.DataFrame, *, title: str = "", caption: str = "", limit: float = 3.0, width: int = 54
) -> Figure:
    """`tables.token_heatmap` as a figure, lines broken after ``width`` characters; ``caption`` is a
    line below it."""
    lines: list[list[Any]] = []
    for _, tokens in frame.groupby("text", sort=False):
        line: list[Any] = []
        for row in tokens.itertuples():
            if line and sum(len(t.token) for t in line) + len(row.token) > width:
                lines.append(line)
                line = []
            line.append(row)
        lines += [line, []]
    size = WIDTH * 72 * 0.98 / (0.61 * width)  # a monospaced character is 0.6 of its size wide
    with plt.rc_context({**STYLE, "axes.grid": False, "figure.constrained_layout.use": False}):
        said = textwrap.fill(caption, 62)
        below = 0.17 * (said.count("\n") + 1) + 0.05 if said else 0.0
        height = 1.5 + below + 0.0235 * size * len(lines)
        figure, ax = plt.subplots(figsize=(WIDTH, height))
        figure.subplots_adjust(0.01, (0.75 + below) / height, 0.99, 1 - 0.4 / height)
        ax.set(xlim=(0, width), ylim=(len(lines), 0))
        ax.axis("off")
        for y, line in enumerate(lines):
            x = 0
            for row in line:
                scored = not np.isnan(row.change)
                if scored:
                    colour = shade(row.change, limit)
                    box = plt.Rectangle((x, y + 0.05), len(row.token), 0.9, color=colour, lw=0)
                    ax.add_patch(box)
                    if row.change < -limit / 6:
                        ax.plot([x, x + len(row.token)], [y + 0.9, y + 0.9], color="#000", lw=0.7)
                ax.text(
                    x, y + 0.5, row.token.replace("$", r"\$").replace("\n", "⏎"), va="center",
                    family="monospace", fontsize=size, style="normal" if scored else "italic",
                    color="#000000" if scored else "#666666",
                )  # fmt: skip
                x += len(row.token)
        colours = [shade(c, limit) for c in np.linspace(-limit, limit, 101)]
        scale = matplotlib.cm.ScalarMappable(
            matplotlib.colors.Normalize(-limit, limit), matplotlib.colors.ListedColormap(colours)
        )
        ticks = np.linspace(-limit, limit, 7)
        place = figure.add_axes((0.1, (0.48 + below) / height, 0.8, 0.1 / height))
        bar = figure.colorbar(scale, cax=place, orientation="horizontal", ticks=ticks)
        bar.ax.set_xticklabels([f"×{np.exp(t):.2g}" for t in ticks])
        bar.set_label("probability, after / before (underlined: down)")
        figure.text(0.01, 0.04 / height, said, va="bottom", color="#555555")
        figure.suptitle(title)
        return figure


# ---------------------------------------------------------------- pieces


def _context(ax: Axes | None, width: float = WIDTH, **more: Any) -> AbstractContextManager[None]:
    """Our style; in an axis that is given, with text as large as it has already."""
    size = {} if ax is None else {"font.size": _size(ax)}
    return plt.rc_context({**style(width), **size, **more})


def _axes(height: float, width: float = WIDTH) -> Axes:
    return plt.subplots(figsize=(width, height))[1]


def _size(ax: Axes) -> float:
    """Points of the axis's text: `style` makes all of it one size."""
    return float(ax.xaxis.label.get_fontsize())


def _inches(ax: Axes) -> float:
    """About how wide the axis is; before the layout is worked out, nobody knows exactly."""
    return float(ax.get_position().width * ax.get_figure().get_figwidth())  # type: ignore[union-attr]


def _wrapped(title: str, ax: Axes) -> str:
    return textwrap.fill(title, max(12, int(_inches(ax) * 72 / (0.5 * _size(ax)))))


def _columns(names: Iterable[str], width: float, size: float) -> int:
    """How many legend entries fit side by side into ``width`` inches."""
    lengths = [len(name) for name in names]
    return int(np.clip(width * 72 // ((0.52 * max(lengths) + 4.5) * size), 1, len(lengths)))


def _legend(ax: Axes, own: bool, title: str = "") -> None:
    """A legend below the axis, clear of its labels; our ``own`` figure grows by as much."""
    names = ax.get_legend_handles_labels()[1]
    if not names:
        return
    size, figure = _size(ax), ax.get_figure()
    lines = ax.get_xlabel().count("\n") + bool(ax.get_xlabel())
    below = -(14 + 1.25 * size * (1 + lines)) / 72
    drop = ScaledTranslation(0, below, figure.dpi_scale_trans)  # type: ignore[union-attr]
    ncols = _columns(names, _inches(ax) * 1.2, size)
    if own:
        _grow(figure, -(-len(names) // ncols) + bool(title), size)
    ax.legend(
        title=title or None, loc="upper center", bbox_to_anchor=(0.5, 0),
        bbox_transform=ax.transAxes + drop, ncols=ncols, borderaxespad=0, columnspacing=1.2,
        handlelength=1.6, handletextpad=0.5,
    )  # fmt: skip


def _grow(figure: Any, lines: int, size: float) -> None:
    """Make room for so many lines of a legend, so that the data keep theirs."""
    figure.set_figheight(figure.get_figheight() + lines * 1.4 * size / 72)
