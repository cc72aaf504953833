"""Tables as HTML: completions side by side, tokens in colours, and what each claim of the sources
became here.

All text is escaped: a completion that contains markup is shown, not run.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from IPython.display import HTML

from ..files import atomic_write
from ..interventions import Add, span
from ..measure import stats
from ..tokens import encode, token_texts
from ..vectors import SteeringVector
from . import datasets, provenance
from .plots import shade

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler
    from transformer_lens.model_bridge import TransformerBridge

# A verdict has a shape beside its colour, for readers to whom the colours look alike.
VERDICTS = {
    "reproduced": ("●", "#00664B"),
    "weaker": ("◐", "#005A8C"),
    "not seen": ("○", "#595959"),
    "opposite": ("▼", "#A63D00"),
    "cannot tell": ("?", "#595959"),
}
MEANS = {  # what each verdict means, for the line below the claims
    "reproduced": "clear, and beyond the controls (or, of a claim of no effect: none)",
    "weaker": "clear, but less than half of the source's number",
    "not seen": "the interval lies within the bound of no effect",
    "opposite": "clear, the other way",
    "cannot tell": "none of these",
}

PAGE = ("claim", "source", "model", "here", "verdict", "note")  # columns of `source_vs_here`


def side_by_side(
    frame: pd.DataFrame, conditions: Sequence[str] | None = None, n: int | None = None
) -> HTML:
    """Completions next to each other, one column per condition, the prompt in bold.

    Args:
        frame: as `generate.generate` returns it.
        conditions: which columns, in which order; all by default.
        n: how many samples of each prompt; all by default.
    """
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


def align(
    model: TransformerBridge, prompt: str, vectors: Mapping[str, SteeringVector | Add]
) -> pd.DataFrame:
    """Residual-stream alignment table: which tokens meet at which position.

    One row for the prompt and one per prompt of every vector (columns: vector, its name; layer;
    coefficient; then one column per position), as in the tables of Turner et al. 2023.

    Raises:
        ValueError: a vector that was not made from prompts.
    """
    ids = encode(model, prompt)
    rows: list[list[Any]] = [["", "0 (prompt)", "+1", *token_texts(model, ids)]]
    for name, item in vectors.items():
        act = Add(item) if isinstance(item, SteeringVector) else item
        if "tokens" not in act.vector.meta:
            raise ValueError(f"{act.vector!r} has no tokens to align: it is not from two prompts.")
        first = span(act.at, act.n_positions, len(ids))[0]
        factor = act.coefficient * act.vector.meta.get("coefficient", 1.0)
        layers = ", ".join(map(str, act.layers))
        for sign, tokens in zip((1, -1), act.vector.meta["tokens"], strict=False):
            cells = token_texts(model, model.tokenizer.convert_tokens_to_ids(tokens))
            said = name if sign > 0 else ""
            rows.append([said, layers, f"{sign * factor:+.3g}", *[""] * first, *cells])
    width = max(map(len, rows))
    columns = ["vector", "layer", "coefficient", *map(str, range(width - 3))]
    return pd.DataFrame([r + [""] * (width - len(r)) for r in rows], columns=columns)


def alignment(table: pd.DataFrame, width: int = 10) -> HTML:
    """The residual-stream alignment table of `align`, spaces made visible.

    Args:
        width: how many positions stand side by side; longer tables go on below. The prompt is shown
            as far as vectors reach, and a little further; without a vector, whole.
    """
    shown = table.map(lambda cell: html.escape(str(cell)).replace(" ", "␣") if cell else "")
    about = ["vector", "layer", "coefficient"]
    shown[about] = table[about].map(lambda cell: html.escape(str(cell)))
    places = list(shown.columns[3:])
    touched = [i for i, place in enumerate(places) if (shown[place][1:] != "").any()]
    end = max(touched, default=len(places)) + 3
    end = len(places) if len(places) <= max(end, width) else end
    blocks = [shown[[*about, *places[i : min(i + width, end)]]] for i in range(0, end, width)]
    rest = len(places) - end
    note = f"<p>… (tokens of the prompt not shown, left as they are: {rest})</p>" if rest else ""
    return HTML("".join(b.to_html(index=False, escape=False) for b in blocks) + note)


def token_heatmap(frame: pd.DataFrame, limit: float = 3.0) -> HTML:
    """Texts whose tokens are coloured by the change of their log-probability, with a legend.

    Args:
        frame: as `logprobs.token_changes` returns it; one line per text.
        limit: the change, in nats, that gets the full colour; 3 is about twentyfold.

    Green is up and orange (in the source: red) down; orange tokens are underlined besides, for
    readers to whom the colours look alike. Hover a token for its numbers.

    Source: Turner et al. 2023, "Visualizing token probability changes across a corpus".
    """
    said = legend("after / before", np.linspace(-limit, limit, 7).tolist(), limit)
    parts = [f"<p>{said} <i>not scored</i></p>"]
    for _, tokens in frame.groupby("text", sort=False):
        chips = []
        for row in tokens.itertuples():
            note = f"{row.change:+.2f} nats: {np.exp(row.before):.2g} to {np.exp(row.after):.2g}"
            chips.append(chip(row.token, row.change, limit, note))
        parts.append(f"<p style='white-space:pre-wrap;line-height:1.7'>{''.join(chips)}</p>")
    return HTML(f"<div style='max-width:60em'>{''.join(parts)}</div>")


def legend(what: str, steps: Sequence[float], limit: float = 3.0) -> str:
    """What the colours of chips mean, as chips."""
    chips = "".join(chip(f" ×{np.exp(step):.2g} ", step, limit) for step in steps)
    return f"probability of the token, {what}: {chips}"


def chip(token: str, change: float, limit: float = 3.0, note: str = "") -> str:
    """A token on the colour of its change of log-probability, in nats; italic if that is NaN."""
    if np.isnan(change):
        return f"<i>{html.escape(token)}</i>"
    style = f"background:{shade(change, limit)};color:#000"
    if change < -limit / 6:
        style += ";text-decoration:underline"
    return (
        f"<span style='{style}' title='{html.escape(note, quote=True)}'>{html.escape(token)}</span>"
    )


# ---------------------------------------------------------------- claims of the sources


def judge(
    claim: str,
    interval: Sequence[float],
    *,
    model: str,
    bound: float,
    beyond: Sequence[float] = (),
    against: Sequence[float] = (),
    number: bool | float = False,
    ratio: bool = False,
    chance: float = 0.0,
    note: str = "",
    unit: str | None = None,
    shown: Sequence[float] | None = None,
    **other: str,
) -> dict[str, Any]:
    """One row for `source_vs_here`: what a claim of the sources became here.

    Args:
        claim: as in ``data/source_claims.csv``, which says which way the effect should go.
        interval: value, low and high, in the unit of ``bound``.
        bound, beyond, against: as for `stats.verdict`.
        number: compare with the source's number, which is then in the same unit; or a number that
            follows from the source's, in the unit of ``interval``.
        ratio: the interval is of log ratios; the table shows their exponentials, and the source's
            number is a ratio.
        chance: what no effect is, such as 0.5 for a share of pairs: interval, controls and the
            source's number are then judged by their distance from it, and shown as they are.
        unit: of what is shown; by default the source's.
        shown: value, low and high as the table shows them, where ``interval`` is of another
            quantity: the perplexity for its negative, 40 degrees for their distance from 60.
        other: holds or direction, where the source's table means another quantity; say so in
            ``note``.

    Raises:
        ValueError: an unknown claim, or no verdict's question.
    """
    said = datasets.load("source_claims").set_index("claim")
    if claim not in said.index:
        raise ValueError(f"There is no claim {claim!r} in source_claims.csv.")
    row = said.loc[claim]
    if number is True and row.number == "":
        raise ValueError(f"No number stands in source_claims.csv for {claim!r}.")
    theirs = None if number is False else float(row.number if number is True else number)
    known = {"holds": str(row.holds), "direction": str(row.direction), **other}
    if ratio and theirs is not None:
        theirs = float(np.log(theirs))
    value, low, high = map(float, interval)
    theirs = None if theirs is None else theirs - chance
    limits: dict[str, Any] = {"beyond": [c - chance for c in beyond]}
    limits |= {"against": [c - chance for c in against], "bound": bound, "number": theirs}
    found = stats.verdict(value - chance, low - chance, high - chance, **limits | known)
    if shown is not None:
        value, low, high = map(float, shown)
    elif ratio:
        value, low, high = (float(np.exp(x)) for x in (value, low, high))
    out = {"claim": claim, "model": model, "value": value, "low": low, "high": high}
    out |= {"verdict": found, "note": note}
    if unit is None and ratio and shown is None:
        unit = "ratio"
    return out if unit is None else {**out, "unit": unit}


def source_vs_here(rows: pd.DataFrame, notebook: str, lines: Sequence[str] | None = None) -> Styler:
    """What became of each claim of the sources: its number, ours, and the verdict.

    Args:
        rows: one row per claim and model: claim (as in ``data/source_claims.csv``), model, value,
            low, high (the interval), verdict (as `stats.verdict` gives it), and if need be unit
            (by default the source's), note, and section (a heading above the rows that share it).
        notebook: whose claims these are, such as ``01_love_hate``.
        lines: for each row, the line of the page that it is part of; rows of one line (and section)
            are told together: their range, and how often there is which verdict. Empty: it stands
            in the file alone.

    Returns:
        A table for the page, of six columns at most, above what the verdicts mean and the claims
        that were not measured. Its ``data`` is the table in words; the numbers, joined to what the
        sources say, are written to ``<number>_claims.csv`` in the folder of the figures.

    Raises:
        ValueError: missing columns, a claim or verdict that is not known, or not as many lines.
    """
    needed = ["claim", "model", "value", "low", "high", "verdict"]
    if missing := [c for c in needed if c not in rows]:
        raise ValueError(f"Claims are judged in the columns {needed}; {missing} are missing.")
    said = datasets.load("source_claims")
    number = notebook[:2]
    its_own = said[said.notebook.astype(str).str.zfill(2).str[:2] == number]
    if unknown := sorted(set(rows.claim) - set(said.claim)):
        raise ValueError(
            f"The claims {unknown} are not in source_claims.csv; of this notebook: "
            f"{', '.join(its_own.claim)}."
        )
    if unknown := sorted(set(rows.verdict) - set(VERDICTS)):
        raise ValueError(f"The verdicts {unknown} are unknown: use {', '.join(VERDICTS)}.")
    if lines is not None and len(lines) != len(rows):
        raise ValueError(f"{len(rows)} claims need as many lines, got {len(lines)}.")
    # What the source says comes under names of its own: both sides have a model, a unit, a note.
    kept = {"claim", "source"}
    said = said.rename(columns={c: f"source_{c}" for c in said if c not in kept})
    joined = rows.merge(said, on="claim", validate="many_to_one")
    with atomic_write(provenance.folder() / f"{number}_claims.csv") as file:
        joined.to_csv(file, index=False)
    page = _page(joined, lines).set_uuid(f"claims_{number}")  # or else a random one in every run
    missed = its_own[~its_own.claim.isin(rows.claim)].statement
    below = verdict_legend() + _folded("Not measured here", missed)
    if lines is not None:
        below += f" Every judged row ({len(rows)}) is in <code>{number}_claims.csv</code>."
    return page.set_caption(below)


def verdict_legend() -> str:
    """One line that says what the verdicts mean, as HTML."""
    marks = (f"{VERDICTS[name][0]} <b>{name}</b>: {MEANS[name]}" for name in VERDICTS)
    return f"{' · '.join(marks)}."


def _folded(title: str, lines: Sequence[str] | pd.Series) -> str:
    """A list that opens when it is clicked; nothing if it is empty."""
    if not len(lines):
        return ""
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<details><summary>{title} ({len(lines)})</summary><ul>{items}</ul></details>"


def _cells(row: Mapping[str, Any]) -> list[str]:
    """What one judged row says: claim, source, model, here, verdict, note."""
    number = quantity(*(row[f"source_{c}"] for c in ("number", "low", "high", "unit")))
    holds = row["source_holds"] + (f": {number}" if number else "")
    source = f"{holds} ({row['source_model']})"
    unit = row["source_unit"] if pd.isna(row.get("unit")) else row["unit"]
    here = quantity(row["value"], row["low"], row["high"], unit)
    verdict = f"{VERDICTS[row['verdict']][0]} {row['verdict']}"
    note = "" if pd.isna(row.get("note", "")) else str(row.get("note", ""))
    return [row["source_statement"], source, row["model"], here, verdict, note]


def _together(line: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The same of several rows: their range, their verdicts, and those that differ from most."""
    told = pd.DataFrame([_cells(row) for row in rows]).set_axis(list(PAGE), axis=1)
    holds = pd.Series([row["source_holds"] for row in rows]).value_counts()
    units = {row["source_unit"] if pd.isna(row.get("unit")) else row["unit"] for row in rows}
    ends = [f([row["value"] for row in rows]) for f in (np.min, np.max)]
    here = " … ".join(quantity(end, np.nan, np.nan) for end in ends)
    many = told.verdict.value_counts()
    most = many.index[0] if (many == many.iloc[0]).sum() == 1 else None
    notes = told[(told.verdict != most) & (told.note != "")]
    return [
        line,
        f"{_counted(holds)} ({', '.join(dict.fromkeys(row['source_model'] for row in rows))})",
        ", ".join(told.model.unique()),
        f"{here} {units.pop()}".strip() if len(units) == 1 else "",
        _counted(many),
        " · ".join(f"{row.verdict[0]} {row.note}" for row in notes.itertuples()),
    ]


def _counted(numbers: pd.Series) -> str:
    """Words and how often each occurs."""
    return ", ".join(f"{name} × {n}" for name, n in numbers.items())


def _parts(
    rows: list[dict[str, Any]], lines: Sequence[str] | None
) -> dict[Any, list[dict[str, Any]]]:
    """Rows by section and line, in the order in which these first occur."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for i, row in enumerate(rows):
        line = i if lines is None else lines[i]
        if line != "":
            found.setdefault((row.get("section"), line), []).append(row)
    return found


def _page(joined: pd.DataFrame, lines: Sequence[str] | None = None) -> Styler:
    """The joined table as it is shown: what the source says once, beside the first model."""
    shown: list[list[str]] = []
    previous = section = None
    for (heading, line), rows in _parts(joined.to_dict("records"), lines).items():
        if heading != section:
            section = heading
            shown.append([section.upper(), *[""] * 5])
        cells = _cells(rows[0]) if len(rows) == 1 else _together(line, rows)
        if len(rows) == 1 and rows[0]["claim"] == previous:
            cells[:2] = ["", ""]
        shown.append(cells)
        previous = rows[0]["claim"]
    table = pd.DataFrame(shown, columns=list(PAGE))
    if not table.note.any():
        table = table.drop(columns="note")
    colours = dict(VERDICTS.values())  # of the verdict that comes first
    style = {"text-align": "left", "vertical-align": "top", "white-space": "normal"}
    return (
        table.style.format(escape="html")
        .hide(axis="index")
        .set_properties(**{**style, "max-width": "22em"})
        .map(lambda cell: f"color:{colours.get(cell[:1], '')};font-weight:bold", subset=["verdict"])
        .set_table_styles(
            [
                {"selector": "th", "props": [("text-align", "left")]},
                {"selector": "caption", "props": [("caption-side", "bottom"), *style.items()]},
            ]
        )
    )


def quantity(value: Any, low: Any, high: Any, unit: Any = "", sign: bool = False) -> str:
    """A number with its interval and unit, such as ``1.3 [0.3, 2.2] nats``.

    As many decimals as the width of the interval calls for, at most three; no interval where its
    ends are one or missing; nothing if there is no number.

    Args:
        sign: write the plus of a positive value.
    """
    numbers = [float(pd.to_numeric(x, errors="coerce")) for x in (value, low, high)]
    x, a, b = numbers
    if np.isnan(x):
        return ""
    plus = "+" if sign else ""
    behind = "" if pd.isna(unit) or not unit else f" {unit}"
    width = b - a
    if not 0 < width < np.inf:
        small = 0 < abs(x) < 0.001
        one = ("< 0.001" if x > 0 else "> -0.001") if small else f"{x:{plus}.3g}"
        one = f"{x:{plus}.0f}" if abs(x) >= 1000 else one
        return f"{one}{f' [{a:g}, {b:g}]' if width == np.inf else ''}{behind}"
    if max(map(abs, numbers)) < 0.0005:
        return f"within ±0.001{behind}"
    decimals = int(np.clip(1 - np.floor(np.log10(width)), 0, 3))
    while decimals and all(np.isclose(y, round(y, decimals - 1), atol=1e-9) for y in numbers):
        decimals -= 1  # 4 [3, 5], not 4.0 [3.0, 5.0]
    first, *ends = (round(y, decimals) + 0.0 for y in numbers)  # + 0.0: no negative zero
    return f"{first:{plus}.{decimals}f} [{', '.join(f'{y:.{decimals}f}' for y in ends)}]{behind}"


def effects(
    table: pd.DataFrame,
    keys: str | Sequence[str],
    controls: Mapping[str, str] | None = None,
    *,
    value: str = "effect",
    unit: str = "nats",
    ratio: bool = False,
) -> pd.DataFrame:
    """A table of `stats.effect_table` as a page shows it: an effect and its interval in one column.

    Args:
        keys: the columns that say what a row is.
        controls: columns that hold a bound of the controls -> what to call it, such as
            ``{"random": "largest of 20 random"}``.
        value: the column of the effect; low and high stand beside it.
        ratio: effects and bounds are log ratios; shown are ratios.

    Returns:
        Texts: keys, effect (and its unit), controls, n, p (Holm), as far as they are there.
    """
    rows = table.reset_index() if table.index.nlevels > 1 or table.index.name else table
    shown = rows[[keys] if isinstance(keys, str) else list(keys)].copy()
    numbers = rows[[value, "low", "high", *(controls or {})]].astype(float)
    if ratio:
        numbers = np.exp(numbers)
    name = "ratio" if ratio else f"{value} ({unit})"
    ends = zip(numbers[value], numbers.low, numbers.high, strict=True)
    shown[name] = [quantity(*triple, sign=not ratio) for triple in ends]
    for column, label in (controls or {}).items():
        shown[label] = numbers[column].map("{:.2f}".format if ratio else "{:+.2f}".format)
    if "n" in rows:
        shown["n"] = rows["n"].to_numpy()
    if "p_holm" in rows:
        shown["p (Holm)"] = ["< 0.001" if p < 0.001 else f"{p:.3f}" for p in rows.p_holm]
    return shown
