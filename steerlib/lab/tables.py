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

    One row for the prompt and one per prompt of every vector (columns: layer, coefficient, then
    one column per position), as in the tables of Turner et al. 2023.

    Raises:
        ValueError: a vector that was not made from prompts.
    """
    ids = encode(model, prompt)
    rows: list[list[Any]] = [["0 (prompt)", "+1", *token_texts(model, ids)]]
    for item in vectors.values():
        act = Add(item) if isinstance(item, SteeringVector) else item
        if "tokens" not in act.vector.meta:
            raise ValueError(f"{act.vector!r} has no tokens to align: it is not from two prompts.")
        first = span(act.at, act.n_positions, len(ids))[0]
        factor = act.coefficient * act.vector.meta.get("coefficient", 1.0)
        layers = ", ".join(map(str, act.layers))
        for sign, names in zip((1, -1), act.vector.meta["tokens"], strict=False):
            cells = token_texts(model, model.tokenizer.convert_tokens_to_ids(names))
            rows.append([layers, f"{sign * factor:+g}", *[""] * first, *cells])
    width = max(map(len, rows))
    columns = ["layer", "coefficient", *map(str, range(width - 2))]
    return pd.DataFrame([r + [""] * (width - len(r)) for r in rows], columns=columns)


def alignment(table: pd.DataFrame, width: int = 10) -> HTML:
    """The residual-stream alignment table of `align`, spaces made visible.

    Args:
        width: how many positions stand side by side; longer tables go on below. The prompt is shown
            as far as vectors reach, and a little further.
    """
    shown = table.map(lambda cell: html.escape(str(cell)).replace(" ", "␣") if cell else "")
    shown[["layer", "coefficient"]] = table[["layer", "coefficient"]]
    places = list(shown.columns[2:])
    touched = [i for i, place in enumerate(places) if (shown[place][1:] != "").any()]
    end = max(touched, default=0) + 3
    end = len(places) if len(places) <= max(end, width) else end
    blocks = [
        shown[["layer", "coefficient", *places[i : min(i + width, end)]]]
        for i in range(0, end, width)
    ]
    rest = len(places) - end
    note = f"<p>… (tokens of the prompt not shown, left as they are: {rest})</p>" if rest else ""
    return HTML("".join(b.to_html(index=False, escape=False) for b in blocks) + note)


def token_heatmap(frame: pd.DataFrame, limit: float = 3.0) -> HTML:
    """Texts whose tokens are coloured by the change of their log-probability, with a legend.

    Args:
        frame: as `logprobs.token_changes` returns it; one line per text.
        limit: the change, in nats, that gets the full colour; 3 is about twentyfold.

    Green is up and red down, as in the source; red tokens are underlined besides, for readers to
    whom the colours look alike. Hover a token for its numbers.

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
    number: bool = False,
    ratio: bool = False,
    note: str = "",
    unit: str | None = None,
    **other: str,
) -> dict[str, Any]:
    """One row for `source_vs_here`: what a claim of the sources became here.

    Args:
        claim: as in ``data/source_claims.csv``, which says which way the effect should go.
        interval: value, low and high, in the unit of ``bound``.
        bound, beyond, against: as for `stats.verdict`.
        number: compare with the source's number, which is then in the same unit.
        ratio: the interval is of log ratios; the table shows their exponentials, and the source's
            number is a ratio.
        unit: of what is shown; by default the source's.
        other: holds or direction, where the source's table means another quantity; say so in
            ``note``.

    Raises:
        ValueError: an unknown claim, or no verdict's question.
    """
    said = datasets.load("source_claims").set_index("claim")
    if claim not in said.index:
        raise ValueError(f"There is no claim {claim!r} in source_claims.csv.")
    row = said.loc[claim]
    if number and row.number == "":
        raise ValueError(f"No number stands in source_claims.csv for {claim!r}.")
    theirs = float(row.number) if number else None
    known = {"holds": str(row.holds), "direction": str(row.direction), **other}
    if ratio and theirs is not None:
        theirs = float(np.log(theirs))
    value, low, high = map(float, interval)
    limits: dict[str, Any] = {"bound": bound, "beyond": beyond, "against": against}
    found = stats.verdict(value, low, high, number=theirs, **limits | known)
    if ratio:
        value, low, high = (float(np.exp(x)) for x in (value, low, high))
    shown = {"claim": claim, "model": model, "value": value, "low": low, "high": high}
    shown |= {"verdict": found, "note": note}
    return {**shown, "unit": "ratio" if ratio else unit} if ratio or unit else shown


def source_vs_here(rows: pd.DataFrame, notebook: str) -> Styler:
    """What became of each claim of the sources: its number, ours, and the verdict.

    Args:
        rows: one row per claim and model: claim (as in ``data/source_claims.csv``), model, value,
            low, high (the interval), verdict (as `stats.verdict` gives it), and if need be unit
            (by default the source's) and note.
        notebook: whose claims these are, such as ``01_love_hate``.

    Returns:
        A table for the page, of six columns at most. Its ``data`` is the table in words; the
        numbers, joined to what the sources say, are written to ``<number>_claims.csv`` in the
        folder of the figures.

    Raises:
        ValueError: missing columns, or a claim or verdict that is not known.
    """
    needed = ["claim", "model", "value", "low", "high", "verdict"]
    if missing := [c for c in needed if c not in rows]:
        raise ValueError(f"Claims are judged in the columns {needed}; {missing} are missing.")
    said = datasets.load("source_claims")
    number = notebook[:2]
    its_own = said.claim[said.notebook.astype(str).str.zfill(2).str[:2] == number]
    if unknown := sorted(set(rows.claim) - set(said.claim)):
        raise ValueError(
            f"The claims {unknown} are not in source_claims.csv; of this notebook: "
            f"{', '.join(its_own)}."
        )
    if unknown := sorted(set(rows.verdict) - set(VERDICTS)):
        raise ValueError(f"The verdicts {unknown} are unknown: use {', '.join(VERDICTS)}.")
    # What the source says comes under names of its own: both sides have a model, a unit, a note.
    kept = {"claim", "source"}
    said = said.rename(columns={c: f"source_{c}" for c in said if c not in kept})
    joined = rows.merge(said, on="claim", validate="many_to_one")
    with atomic_write(provenance.folder() / f"{number}_claims.csv") as file:
        joined.to_csv(file, index=False)
    page = _page(joined).set_uuid(f"claims_{number}")  # or else a random one in every run
    if missed := [claim for claim in its_own if claim not in set(rows.claim)]:
        page = page.set_caption(html.escape(f"Not measured here: {', '.join(missed)}."))
    return page


def _page(joined: pd.DataFrame) -> Styler:
    """The joined table as it is shown: what the source says once, beside the first model."""
    shown: list[list[str]] = []
    previous = None
    for row in joined.to_dict("records"):
        again = row["claim"] == previous
        number = quantity(*(row[f"source_{c}"] for c in ("number", "low", "high", "unit")))
        holds = row["source_holds"] + (f": {number}" if number else "")
        source = f"{holds} ({row['source_model']})"
        unit = row["source_unit"] if pd.isna(row.get("unit")) else row["unit"]
        here = quantity(row["value"], row["low"], row["high"], unit)
        verdict = f"{VERDICTS[row['verdict']][0]} {row['verdict']}"
        claim = ["", ""] if again else [row["source_statement"], source]
        note = row.get("note", "")
        shown.append([*claim, row["model"], here, verdict, "" if pd.isna(note) else str(note)])
        previous = row["claim"]
    columns = ["claim", "source", "model", "here", "verdict", "note"]
    table = pd.DataFrame(shown, columns=columns)
    if not table.note.any():
        table = table.drop(columns="note")
    colours = {f"{shape} {name}": colour for name, (shape, colour) in VERDICTS.items()}
    cells = {"text-align": "left", "vertical-align": "top", "white-space": "normal"}
    return (
        table.style.format(escape="html")
        .hide(axis="index")
        .set_properties(**{**cells, "max-width": "22em"})
        .map(lambda cell: f"color:{colours[cell]};font-weight:bold", subset=["verdict"])
        .set_table_styles([{"selector": "th", "props": [("text-align", "left")]}])
    )


def quantity(value: Any, low: Any, high: Any, unit: Any) -> str:
    """A number with its interval and unit; nothing if there is no number."""
    numbers = [pd.to_numeric(x, errors="coerce") for x in (value, low, high)]
    if pd.isna(numbers[0]):
        return ""
    said = [f"{x:.3g}" for x in numbers if not pd.isna(x)]
    interval = f" [{said[1]}, {said[2]}]" if len(said) == 3 else ""
    return f"{said[0]}{interval} {'' if pd.isna(unit) else unit}".strip()
