"""One function per kind of figure, in one style, and `save_figure`, which says where it came from.

Colours are Okabe and Ito's, told apart under every common colour blindness; conditions keep their
colour across figures: unsteered black, steered orange, random control blue.
"""

from __future__ import annotations

import html
import os
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    import pandas as pd
    from IPython.display import HTML
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ["#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"]
COLOURS = {"unsteered": "#000000", "steered": "#D55E00", "random": "#0072B2"}
STYLE: dict[str, Any] = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
    "axes.grid": True,
    "grid.alpha": 0.3,
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "legend.frameon": False,
    "lines.markersize": 5,
}


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
        ax.set(xlabel=xlabel, title=title)
        ax.legend(loc="best")
        return figure


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


def _cell(prompt: str, completion: str) -> str:
    style = "text-align:left;vertical-align:top;white-space:pre-wrap;overflow-wrap:anywhere"
    return f"<td style='{style}'><b>{html.escape(prompt)}</b>{html.escape(completion)}</td>"


def alignment(table: pd.DataFrame) -> HTML:
    """The residual-stream alignment table of `interventions.align`, spaces made visible."""
    from IPython.display import HTML

    shown = table.map(lambda cell: html.escape(str(cell)).replace(" ", "␣") if cell else "")
    shown[["layer", "coefficient"]] = table[["layer", "coefficient"]]
    return HTML(shown.to_html(index=False, escape=False))


# ---------------------------------------------------------------- files


def save_figure(figure: Figure, name: str, data: pd.DataFrame | None = None, **origin: Any) -> Path:
    """Write ``<name>.png`` with its origin in the file's metadata, and its numbers as CSV beside.

    Args:
        name: begins with the notebook's number, such as ``01_sweep``.
        data: the numbers behind the figure.
        origin: what made it: model, preset, n, seed, notebook, ...

    Figures go to the folder ``STEERLIB_FIGS``, by default ``figs`` of the repository.
    Files appear whole or not at all.
    """
    folder = Path(os.environ.get("STEERLIB_FIGS") or Path(__file__).parents[1] / "figs")
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        **origin,
        "preset": os.environ.get("PRESET", "quick"),
        "commit": _commit(),
        **{p: _version(p) for p in ("steerlib", "torch", "transformers", "transformer-lens")},
    }
    text = {"Title": name, "Software": "steerlib", **{k: str(v) for k, v in facts.items()}}
    path = folder / f"{name}.png"
    temporary = folder / f".{name}.{os.getpid()}"
    try:
        figure.savefig(temporary, format="png", metadata=text, dpi=STYLE["savefig.dpi"])
        os.replace(temporary, path)
        if data is not None:
            data.to_csv(temporary, index=False)
            os.replace(temporary, path.with_suffix(".csv"))
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _commit() -> str:
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
