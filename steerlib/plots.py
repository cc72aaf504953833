"""One function per kind of figure, in one style, and `save_figure`, which says where it came from.

Colours are Okabe and Ito's, told apart under every common colour blindness; conditions keep their
colour across figures: unsteered black, steered orange, random control blue.
"""

from __future__ import annotations

import html
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib import pyplot as plt

from . import figures
from .files import whole

if TYPE_CHECKING:
    import pandas as pd
    from IPython.display import HTML
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ["#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"]
COLOURS = {"unsteered": "#000000", "steered": "#D55E00", "random": "#0072B2"}
HONESTY = {"honest": "#0072B2", "dishonest": "#D55E00"}
GAIN, LOSS = "#009E73", "#D55E00"  # a token's probability went up, or down
STYLE: dict[str, Any] = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=PALETTE),
    "axes.grid": True,
    "grid.alpha": 0.3,
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "legend.frameon": False,
    "lines.markersize": 5,
}


# whose versions a figure names
PACKAGES = ("steerlib", "torch", "transformers", "transformer-lens", "numpy", "matplotlib")


def curves(
    frame: pd.DataFrame,
    x: str,
    by: str,
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    colours: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Lines with 95 % intervals: one line per value of ``by``, from columns mean, low, high.

    Args:
        frame: as `scoring.summarise` returns it.
    """
    with plt.rc_context(STYLE):
        if ax is None:
            _, ax = plt.subplots(figsize=(6, 3.6))
        for i, (name, group) in enumerate(frame.groupby(by, sort=False)):
            group = group.sort_values(x)
            colour = {**COLOURS, **(colours or {})}.get(str(name), PALETTE[i % len(PALETTE)])
            error = np.array([group["mean"] - group["low"], group["high"] - group["mean"]])
            ax.errorbar(
                group[x],
                group["mean"],
                yerr=error.clip(0),
                marker="o",
                capsize=3,
                label=str(name),
                color=colour,
            )
        ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
        ax.legend(title=by.replace("_", " "))
        return ax.get_figure()  # type: ignore[return-value]


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
    """A table as colours with its numbers written in; diverging colours if ``centre`` is given."""
    with plt.rc_context({**STYLE, "axes.grid": False}):
        if ax is None:
            size = (1.6 + 0.75 * table.shape[1], 1.4 + 0.42 * table.shape[0])
            _, ax = plt.subplots(figsize=size)
        values = table.to_numpy(dtype=float)
        limits: dict[str, Any] = {"cmap": "cividis"}
        if centre is not None:
            reach = float(np.nanmax(np.abs(values - centre))) or 1.0
            limits = {"cmap": "RdBu_r", "vmin": centre - reach, "vmax": centre + reach}
        image = ax.imshow(values, aspect="auto", **limits)
        for (i, j), value in np.ndenumerate(values):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            ax.text(
                j, i, annotate.format(value), ha="center", va="center", fontsize=9,
                color="white" if dark else "black",
            )  # fmt: skip
        ax.set_xticks(range(table.shape[1]), [str(c) for c in table.columns])
        ax.set_yticks(range(table.shape[0]), [str(r) for r in table.index])
        ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
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
) -> Figure:
    """One line of dots with 95 % intervals per value of ``y``, one colour per value of ``by``.

    Args:
        frame: as `scoring.summarise` returns it.
    """
    labels, groups = list(dict.fromkeys(frame[y])), list(dict.fromkeys(frame[by]))
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(7, 1.2 + 0.36 * len(labels)))
        for i, name in enumerate(groups):
            part = frame[frame[by] == name]
            place = np.array([labels.index(label) for label in part[y]])
            shift = 0.22 * (i - (len(groups) - 1) / 2)  # side by side, or they hide each other
            error = np.array([part["mean"] - part["low"], part["high"] - part["mean"]])
            colour = {**COLOURS, **(colours or {})}.get(str(name), PALETTE[i % len(PALETTE)])
            ax.errorbar(
                part["mean"], place + shift, xerr=error.clip(0), fmt="o", color=colour,
                label=str(name),
            )  # fmt: skip
        ax.set_yticks(range(len(labels)), labels)
        ax.invert_yaxis()
        ax.set(xlabel=xlabel)
        ax.legend(loc="best")
        figure.suptitle(title, fontsize=STYLE["axes.titlesize"])  # long labels push the axes aside
        return figure


def shift_scatter(
    frame: pd.DataFrame,
    *,
    title: str = "",
    floor: float = 1e-4,
    label: int = 16,
    ax: Axes | None = None,
) -> Figure:
    """Next-token probabilities before and after, with the no-change line and tokens named.

    Args:
        frame: as `scoring.next_token_shift` returns it.
        floor: tokens that are rarer both before and after are not shown.
        label: how many tokens to name: half of them the likeliest, half those that make up most
            of the divergence, in either direction.

    Source: first document, "Token probability shifts".
    """
    floor = min(floor, float(frame[["p_before", "p_after"]].to_numpy().max()) / 10)
    shown = frame[(frame.p_before > floor) | (frame.p_after > floor)]
    likely = shown[["p_before", "p_after"]].max(axis=1).nlargest(label - label // 2).index
    rest = shown.drop(likely)
    moving = rest.kl_contribution.abs().nlargest(label // 2).index
    gains = shown.p_after > shown.p_before
    with plt.rc_context(STYLE):
        if ax is None:
            _, ax = plt.subplots(figsize=(7, 6))
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
            xlabel="probability before", ylabel="probability after", title=title,
        )  # fmt: skip
        named = shown.loc[[*likely, *moving]].sort_values("p_after", ascending=False)
        taken: list[tuple[float, float]] = []
        for row in named.itertuples():  # from the top down; a label that would hide one moves down
            up = row.p_after > row.p_before
            x, y = ax.transData.transform((row.p_before, row.p_after)) * 72 / ax.figure.dpi
            left, place = x - 70 if up else x + 14, y + (8 if up else -8)
            while any(abs(left - a) < 62 and abs(place - b) < 11 for a, b in taken):
                place -= 3
            taken.append((left, place))
            ax.annotate(
                _visible(row.token),
                (row.p_before, row.p_after),
                xytext=(-14 if up else 14, place - y),
                textcoords="offset points",
                ha="right" if up else "left",
                va="center",
                fontsize=9,
                arrowprops={"arrowstyle": "-", "color": "#888888", "linewidth": 0.6},
            )
        ax.legend(loc="lower right")
        return ax.get_figure()  # type: ignore[return-value]


def _visible(token: str) -> str:
    """A token with its spaces and line breaks made visible, and no mathematics in it."""
    for old, new in ((" ", "␣"), ("\n", "⏎"), ("\t", "⇥"), ("$", r"\$")):
        token = token.replace(old, new)
    return token


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

    Source: second document, scatter of the first two principal components.
    """
    with plt.rc_context(STYLE):
        if ax is None:
            _, ax = plt.subplots(figsize=(5.6, 4.6))
        for (honest, truth), group in _four_groups(frame):
            name = "honest" if honest else "dishonest"
            claim = "" if truth is None else f", {'true' if truth else 'false'} claim"
            ax.scatter(
                group[x], group[y], s=22, alpha=0.6, color=HONESTY[name],
                marker="x" if truth is False else "o", linewidths=1.1 if truth is False else 0,
                label=f"{name}{claim} (n = {len(group)})",
            )  # fmt: skip
        ax.set(xlabel=xlabel or f"projection on {x}", ylabel=ylabel or f"projection on {y}")
        ax.set_title(title)
        ax.legend(fontsize=8)
        return ax.get_figure()  # type: ignore[return-value]


def group_histogram(
    frame: pd.DataFrame,
    x: str,
    *,
    xlabel: str = "",
    title: str = "",
    bins: int = 30,
    ax: Axes | None = None,
) -> Figure:
    """How honest and dishonest answers lie along one direction.

    Args:
        frame: as `probes.projections` returns it; ``x`` names one of its directions.

    Source: second document, histograms of projections for all layers.
    """
    with plt.rc_context(STYLE):
        if ax is None:
            _, ax = plt.subplots(figsize=(5.6, 4.6))
        edges = np.histogram_bin_edges(frame[x], bins).tolist()
        for name, honest in (("honest", True), ("dishonest", False)):
            values = frame[x][frame.honest.astype(bool) == honest]
            colour = HONESTY[name]
            ax.hist(values, edges, alpha=0.35, color=colour)
            label = f"{name} (n = {len(values)})"  # the outline, since the fillings overlap
            ax.hist(values, edges, histtype="step", color=colour, label=label)
        ax.set(xlabel=xlabel or f"projection on {x}", ylabel="answers")
        ax.set_title(title)
        ax.legend(fontsize=8)
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
    ax: Axes | None = None,
) -> Figure:
    """Mean projections by layer and position while generating, in diverging colours around 0.

    Args:
        values: ``[layer, position]``, positions as `sweeps.capture_generation` has them: the last
            ``prompt_positions`` of the prompt, then the generated tokens from 0.
        limit: the value of the full colour, to share one scale among figures.

    Source: second document, generation heatmaps.
    """
    array = np.asarray(values, dtype=float)
    reach = limit or float(np.nanmax(np.abs(array))) or 1.0
    with plt.rc_context({**STYLE, "axes.grid": False}):
        if ax is None:
            _, ax = plt.subplots(figsize=(7.2, 1.4 + 0.15 * len(layers)))
        ends = (-prompt_positions - 0.5, array.shape[1] - prompt_positions - 0.5)
        colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad="#BBBBBB")
        image = ax.imshow(
            array, cmap=colours, vmin=-reach, vmax=reach, aspect="auto", origin="lower",
            extent=(*ends, -0.5, len(layers) - 0.5), interpolation="none",
        )  # fmt: skip
        ax.axvline(-0.5, color="#000000", linewidth=0.8)
        step = max(1, len(layers) // 14)
        ax.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        ax.set_xticks(range(-prompt_positions, array.shape[1] - prompt_positions, 3))
        ax.set(xlabel="position (0: first generated token)", ylabel="layer", title=title)
        ax.get_figure().colorbar(image, ax=ax, label=label)  # type: ignore[union-attr]
        return ax.get_figure()  # type: ignore[return-value]


# ---------------------------------------------------------------- text


def side_by_side(
    frame: pd.DataFrame, conditions: Sequence[str] | None = None, n: int | None = None
) -> HTML:
    """Completions next to each other, one column per condition, the prompt in bold.

    Args:
        frame: as `generation.generate` returns it.
        conditions: which columns, in which order; all by default.
        n: how many samples of each prompt; all by default.

    All text is escaped: a completion that contains markup is shown, not run.
    """
    from IPython.display import HTML

    names = list(conditions or dict.fromkeys(frame.condition))
    parts = ["".join(f"<th style='text-align:left'>{html.escape(c)}</th>" for c in names)]
    for (prompt, index), group in frame.groupby(["prompt", "sample"], sort=False):
        if n is not None and index >= n:
            continue
        texts = group.set_index("condition").completion
        parts.append("".join(_cell(prompt, texts.get(c, "")) for c in names))
    width = f"table-layout:fixed;width:100%;max-width:{26 * len(names)}em"
    rows = "".join(f"<tr>{part}</tr>" for part in parts)
    return HTML(f"<table style='{width}'>{rows}</table>")


def _cell(prompt: Any, completion: Any) -> str:
    style = "text-align:left;vertical-align:top;white-space:pre-wrap;overflow-wrap:anywhere"
    text = f"<b>{html.escape(str(prompt))}</b>{html.escape(str(completion))}"
    return f"<td style='{style}'>{text}</td>"


def alignment(table: pd.DataFrame) -> HTML:
    """The residual-stream alignment table of `interventions.align`, spaces made visible."""
    from IPython.display import HTML

    shown = table.map(lambda cell: html.escape(str(cell)).replace(" ", "␣") if cell else "")
    shown[["layer", "coefficient"]] = table[["layer", "coefficient"]]
    return HTML(shown.to_html(index=False, escape=False))


def token_heatmap(frame: pd.DataFrame, limit: float = 3.0) -> HTML:
    """Texts whose tokens are coloured by the change of their log-probability, with a legend.

    Args:
        frame: as `scoring.token_changes` returns it; one line per text.
        limit: the change, in nats, that gets the full colour; 3 is about twentyfold.

    Green is up and red down, as in the source; red tokens are underlined besides, for readers to
    whom the colours look alike. Hover a token for its numbers. All text is escaped.

    Source: first document, "Visualizing token probability changes across a corpus".
    """
    from IPython.display import HTML

    steps = np.linspace(-limit, limit, 7)
    legend = "".join(_chip(f" ×{np.exp(step):.2g} ", step, limit, "") for step in steps)
    parts = [f"<p>probability after / before: {legend} <i>not scored</i></p>"]
    for _, tokens in frame.groupby("text", sort=False):
        chips = []
        for row in tokens.itertuples():
            note = f"{row.change:+.2f} nats: {np.exp(row.before):.2g} to {np.exp(row.after):.2g}"
            chips.append(_chip(row.token, row.change, limit, note))
        parts.append(f"<p style='white-space:pre-wrap;line-height:1.7'>{''.join(chips)}</p>")
    return HTML(f"<div style='max-width:60em'>{''.join(parts)}</div>")


def _chip(token: str, change: float, limit: float, note: str) -> str:
    if np.isnan(change):
        return f"<i>{html.escape(token)}</i>"
    style = f"background:{_shade(change, limit)};color:#000"
    if change < -limit / 6:
        style += ";text-decoration:underline"
    return f"<span style='{style}' title='{note}'>{html.escape(token)}</span>"


def _shade(change: float, limit: float) -> str:
    """White for no change, towards `GAIN` or `LOSS` up to ``limit``."""
    full = matplotlib.colors.to_rgb(GAIN if change > 0 else LOSS)
    part = min(abs(change) / limit, 1.0)
    return matplotlib.colors.to_hex([1 - part * (1 - c) for c in full])


def token_heatmap_figure(
    frame: pd.DataFrame, *, title: str = "", limit: float = 3.0, width: int = 120
) -> Figure:
    """`token_heatmap` as a figure, lines broken after ``width`` characters."""
    lines: list[list[Any]] = []
    for _, tokens in frame.groupby("text", sort=False):
        line: list[Any] = []
        for row in tokens.itertuples():
            if line and sum(len(t.token) for t in line) + len(row.token) > width:
                lines.append(line)
                line = []
            line.append(row)
        lines += [line, []]
    with plt.rc_context({**STYLE, "axes.grid": False, "figure.constrained_layout.use": False}):
        height = 1.5 + 0.24 * len(lines)
        figure, ax = plt.subplots(figsize=(10, height))
        figure.subplots_adjust(0.01, 0.6 / height, 0.99, 1 - 0.5 / height)
        ax.set(xlim=(0, width), ylim=(len(lines), 0))
        ax.axis("off")
        for y, line in enumerate(lines):
            x = 0
            for row in line:
                scored = not np.isnan(row.change)
                if scored:
                    colour = _shade(row.change, limit)
                    box = plt.Rectangle((x, y + 0.05), len(row.token), 0.9, color=colour, lw=0)
                    ax.add_patch(box)
                    if row.change < -limit / 6:
                        ax.plot([x, x + len(row.token)], [y + 0.9, y + 0.9], color="#000", lw=0.7)
                ax.text(
                    x, y + 0.5, row.token.replace("$", r"\$").replace("\n", "⏎"), va="center",
                    family="monospace", fontsize=9.2, style="normal" if scored else "italic",
                    color="#000000" if scored else "#666666",
                )  # fmt: skip
                x += len(row.token)
        colours = [_shade(c, limit) for c in np.linspace(-limit, limit, 101)]
        scale = matplotlib.cm.ScalarMappable(
            matplotlib.colors.Normalize(-limit, limit), matplotlib.colors.ListedColormap(colours)
        )
        ticks = np.linspace(-limit, limit, 7)
        bar = figure.colorbar(
            scale, ax=ax, orientation="horizontal", ticks=ticks, fraction=0.3 / (1.5 + len(lines)),
            pad=0.02, aspect=60,
        )  # fmt: skip
        bar.ax.set_xticklabels([f"×{np.exp(t):.2g}" for t in ticks])
        bar.set_label("probability of the token, after / before (underlined: down)")
        figure.suptitle(title, fontsize=STYLE["axes.titlesize"])
        return figure


# ---------------------------------------------------------------- files


def save_figure(
    figure: Figure,
    name: str,
    data: pd.DataFrame | None = None,
    *,
    svg: bool = False,
    **origin: Any,
) -> Path:
    """Write ``<name>.png`` with its origin in the file's metadata, and its numbers as CSV beside.

    Args:
        name: begins with the notebook's number, such as ``01_sweep``.
        data: the numbers behind the figure.
        svg: write ``<name>.svg`` too. Also done where ``STEERLIB_SVG`` is set, and where there is
            one already, or it would show old numbers.
        origin: what made it: model, n, seed, ... Notebook, dtype of the model, preset, commit and
            versions are found out, unless they are given.

    Figures go to the folder ``STEERLIB_FIGS``, by default ``figs`` of the repository.
    Files appear whole or not at all, and the same run writes the same bytes:
    ``python -m steerlib.figures`` prints the origin.
    """
    folder = figures.folder()
    _clear_leftovers(folder)
    facts = {
        "notebook": _notebook(name),
        "dtype": _dtype(origin.get("model")),
        "preset": os.environ.get("PRESET", "quick"),
        **origin,
        "commit": _commit(),
        **{package: _version(package) for package in PACKAGES},
    }
    text = {"Title": name, "Software": "steerlib", **{k: str(v) for k, v in facts.items()}}
    png, more = folder / f"{name}.png", folder / f"{name}.svg"
    metadata: dict[Path, dict[str, str | None]] = {png: {**text}}
    if svg or os.environ.get("STEERLIB_SVG") or more.exists():
        description = json.dumps(text, ensure_ascii=False)
        metadata[more] = {"Title": name, "Description": description, "Date": None}
    with ExitStack() as files:  # all of them take their places at its end, or none does
        for path, about in metadata.items():
            part = files.enter_context(whole(path))
            # without the salt an SVG names its parts at random
            with plt.rc_context({"svg.hashsalt": name}):
                dpi = STYLE["savefig.dpi"]
                figure.savefig(part, format=path.suffix[1:], metadata=about, dpi=dpi)
        if data is not None:
            data.to_csv(files.enter_context(whole(folder / f"{name}.csv")), index=False)
    return png


def _clear_leftovers(folder: Path) -> None:
    """Remove what a killed run left half-written; an hour is longer than any writing takes."""
    for part in folder.glob(".*.part"):
        with suppress(OSError):  # another process may have done it
            if time.time() - part.lstat().st_mtime > 3600:
                part.unlink()


def _notebook(name: str) -> str:
    """The notebook that runs: Jupyter and make say which, elsewhere the figure's number does."""
    session = os.environ.get("JPY_SESSION_NAME", "")
    if session.endswith(".ipynb"):
        return Path(session).name
    pattern = f"{name.split('_')[0]}_*.ipynb"
    with suppress(OSError, StopIteration):  # not readable, or none of that number
        return next((Path(__file__).parents[1] / "notebooks").glob(pattern)).name
    return "unknown"


def _dtype(model: object) -> str:
    """The number format in which the model of that name is loaded."""
    models = sys.modules.get(f"{__package__}.models")  # never imported for this: it needs torch
    held = list(models._loaded.values()) if models else []
    found = {str(bridge.cfg.dtype) for bridge in held if bridge.cfg.model_name == model}
    return found.pop().removeprefix("torch.") if len(found) == 1 else "unknown"


def _commit() -> str:
    """The commit that is checked out, and whether code or data differ from it."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with suppress(OSError, subprocess.CalledProcessError):
        if (root / ".git").exists():  # or it is installed into a project with commits of its own
            head = git("rev-parse", "--short", "HEAD")
            changed = git("status", "--porcelain", "--", "steerlib", "data")
            return f"{head} with changes" if changed else head
    return "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
