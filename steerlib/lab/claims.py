"""What became of the claims of both sources, over all notebooks: read back from the tables that
`tables.source_vs_here` wrote.

``python -m steerlib.lab.claims README.md`` writes the short table between the markers of a file.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..files import atomic_write
from ..models.packaged import MODELS
from . import datasets, provenance, settings, tables

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler

BEYOND = "beyond"  # claims of neither source: papers and folklore that came after both
SOURCES = {
    "turner2023": "Turner et al. 2023",
    "honesty": "the honesty repository",
    BEYOND: "beyond the sources",
}
EXPERIMENTS = {
    "00": "first look",
    "01": "demonstrations",
    "02": "positions",
    "03": "fractions of a vector",
    "04": "what is in a vector",
    "05": "capabilities",
    "06": "honesty by layer",
    "07": "components",
    "08": "steering honesty",
    "09": "dilemmas",
    "10": "while generating",
}
DIFFER = "differs"  # several tests of one claim in one model, which do not agree
MARKS = {**tables.VERDICTS, DIFFER: ("◇", "#6B3FA0")}
START, END = "<!-- claims: begin -->", "<!-- claims: end -->"


def read(folder: Path | None = None) -> pd.DataFrame:
    """All ``<number>_claims.csv`` of a folder in one table, the smallest model first.

    Args:
        folder: by default that of the figures; in the smoke preset, whose figures show nothing,
            the committed ones.

    Returns:
        One row per test of a claim: the columns that `tables.source_vs_here` writes, with notebook
        (two digits) and experiment in front, and asserts (whether the source says that something
        changes, or that nothing does).

    Raises:
        ValueError: there are none, or one is not such a table.
    """
    if folder is None:
        smoke = settings.preset() == "smoke"
        folder = provenance.ROOT / "figs" if smoke else provenance.folder()
    frames = []
    for path in sorted(folder.glob("[0-9][0-9]_claims.csv")):
        frame = pd.read_csv(path, dtype={"source_direction": str})
        if missing := {"claim", "model", "value", "verdict", "source_holds"} - set(frame):
            raise ValueError(f"{path} is no table of claims: it has no {', '.join(missing)}.")
        frame.insert(0, "notebook", path.name[:2])
        frames.append(frame)
    if not frames:
        raise ValueError(f"There are no tables of claims in {folder}: run the notebooks first.")
    found = pd.concat(frames, ignore_index=True)
    found = found.reindex(columns=list(dict.fromkeys([*found, "unit", "note"])))
    found["model"] = found.model.map(lambda name: Path(name).name)  # of a folder or a hub's name
    found.insert(1, "experiment", found.notebook.map(EXPERIMENTS).fillna("beyond the sources"))
    nothing = (found.source_direction == "0") | (found.source_holds == "no")
    found["asserts"] = np.where(nothing, "no change", "a change")
    return found.sort_values("model", key=lambda m: m.map(size), kind="stable", ignore_index=True)


def size(model: str) -> float:
    """Number of parameters, to order models by; one that is not packaged comes last."""
    return MODELS[model].params if model in MODELS else np.inf


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per claim and model, in the order of the sources' table.

    Where a claim was tested in several ways, its verdict is the one on which all of them agree, or
    `DIFFER`; shown are the value and interval of a single test, the range of values of several, in
    nats where some are (effects in nats are the primary measure).

    Args:
        frame: as `read` returns it.

    Returns:
        notebook, experiment, source, claim, source_statement, model, asserts, n_tests, verdict,
        here (in words), short (the same in two digits, without interval; a median behind ~), unit,
        theirs (the source's number, or whether it found the effect), theirs_short.
    """
    rows = []
    for (_, model), tests in frame.groupby(["claim", "model"], sort=False):
        unit = tests["unit"].where(tests["unit"].notna(), tests.source_unit)
        main = tests[unit == "nats"] if (unit == "nats").any() else tests
        own = str(unit[main.index[0]]) if unit[main.index].notna().any() else ""
        verdicts = set(tests.verdict)
        first = main.iloc[0]
        short = _short(first.value, own)
        here = tables.quantity(first.value, first.low, first.high, own)
        if len(main) > 1:
            short = f"~{_short(main.value.median(), own)}"
            here = f"{_plain(main.value.min())} … {_plain(main.value.max())} {own}".strip()
        rows.append(
            {
                **first[["notebook", "experiment", "source", "claim", "source_statement"]],
                "model": model,
                "asserts": first.asserts,
                "n_tests": len(tests),
                "verdict": verdicts.pop() if len(verdicts) == 1 else DIFFER,
                "here": here,
                "short": short,
                "unit": own,
                **_theirs(first, own),
            }
        )
    order = {claim: i for i, claim in enumerate(datasets.load("source_claims").claim)}
    place = pd.Series([order.get(row["claim"], len(order)) for row in rows])
    return pd.DataFrame(rows).loc[place.sort_values(kind="stable").index].reset_index(drop=True)


def _short(value: float, unit: str) -> str:
    """A number in two digits: signed in nats, behind a cross if it is a ratio."""
    if unit == "ratio":
        return f"×{_plain(value)}"
    return f"{'+' if unit == 'nats' and value >= 0 else ''}{_plain(value)}"


def _plain(value: float) -> str:
    """A number in two digits, never in powers of ten; what is too small to matter is 0."""
    if abs(value) < 1e-3:
        return "0"
    return np.format_float_positional(float(f"{value:.2g}"), trim="-")


def _theirs(row: Any, own: str) -> dict[str, str]:
    """The source's number, or what it found in a word; a star if its unit is not ours."""
    if pd.isna(row.source_number):
        return {"theirs": row.source_holds, "theirs_short": row.source_holds}
    unit = "" if pd.isna(row.source_unit) else row.source_unit
    said = {"theirs": f"{row.source_number:.3g} {unit}".strip()}
    return {**said, "theirs_short": f"{row.source_number:.2g}{'' if unit == own else '*'}"}


def counts(summarised: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """How often each verdict was given: a row per group, a column per verdict, and ``of``."""
    table = summarised.groupby([*by, "verdict"], sort=False).size().unstack(fill_value=0)
    table = table.reindex(columns=list(MARKS), fill_value=0)
    return table.assign(of=table.sum(axis=1))


def of_sources(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of a table of claims that are claims of the two sources."""
    return frame[frame.source != BEYOND]


def main_claims(summarised: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``data/main_claims.csv``, with their labels and statements."""
    return summarised.merge(datasets.load("main_claims"), on="claim", validate="many_to_one")


def sentences(tests: pd.DataFrame, demonstrations: pd.DataFrame) -> list[str]:
    """What holds, what does not, what cannot be told, what changes with size, and how sure that is.

    Args:
        tests: as `read` returns it.
        demonstrations: as `demonstrations.summary` returns it.

    Returns:
        Five sentences in Markdown. But for the main claims that hold, and the sentence on size,
        they are about each source in the model in which most of its claims were measured. Claims
        beyond the sources are not counted.
    """
    tests = of_sources(tests)
    table = summary(tests)
    measured = counts(table, ["source", "model"])["of"]
    main_model = {source: of.idxmax()[1] for source, of in measured.groupby("source", sort=False)}
    own = table[table.model == table.source.map(main_model)]
    chosen = tests[tests.model == tests.source.map(main_model)]
    all_kinds = counts(own, ["asserts"]).reindex(["a change", "no change"], fill_value=0)
    n, still = all_kinds.loc["a change"], all_kinds.loc["no change"]
    counted = all_kinds.sum()
    return [
        f"**What holds.** Reproduced are, among the main claims, {_named(table, 'reproduced')}; "
        f"of all claims, in the model with most of them, {n.reproduced} of the {n['of']} that "
        f"something changes, and {still.reproduced} of the {still['of']} that nothing changes, "
        "which a vector without any effect would pass too.",
        f"**What does not.** Not seen, weaker than half the source's number or opposite are, among "
        f"the main claims, {_named(own, 'weaker', 'not seen', 'opposite')}; of all "
        f"{counted['of']}, {counted.weaker} are weaker, {counted['not seen']} not seen, "
        f"{counted.opposite} opposite, and {counted[DIFFER]} come out differently from test to "
        "test.",
        f"**What cannot be told.** {counted['cannot tell']} of {counted['of']}: "
        f"{_no_effect(chosen[chosen.verdict == 'cannot tell'])}.",
        f"**What changes with size.** {_by_size(table, demonstrations)}.",
        f"**How sure this is.** Intervals are 95 % for each test and not corrected for the number "
        f"of claims: if nothing had an effect, up to {n['of'] / 40:.0f} of the {n['of']} would "
        f"still look reproduced, against {n.reproduced} that do.",
    ]


def _named(own: pd.DataFrame, *verdicts: str) -> str:
    """The main claims with one of these verdicts, by source and its model."""
    main = main_claims(own)
    parts = []
    for (source, model), rows in main.groupby(["source", "model"], sort=False):
        found = rows[rows.verdict.isin(verdicts)]
        labels = f": *{'*, *'.join(found.label)}*" if len(found) else ""
        parts.append(f"{len(found)} of {len(rows)} of {SOURCES[source]} in {model}{labels}")
    return "; ".join(parts) if parts else "none that was measured"


def _no_effect(unclear: pd.DataFrame) -> str:
    """Why tests say nothing, where the value of no effect is known."""
    unit = unclear["unit"].where(unclear["unit"].notna(), unclear.source_unit)
    known = unclear[unit.isin(["nats", "ratio"])]
    none = (unit[known.index] == "ratio").astype(float)
    inside = (known.low <= none) & (none <= known.high)
    return (
        f"of their {len(known)} tests in nats or ratios, {inside.sum()} have an interval that "
        f"includes no effect, and the other {(~inside).sum()} do not stand out from matched "
        f"controls or from what counts as none"
    )


def _by_size(table: pd.DataFrame, demonstrations: pd.DataFrame) -> str:
    """Demonstrations that work, by model; claims measured in two models, compared."""
    works = demonstrations.groupby("model", sort=False).works.agg(["sum", "count"])
    parts = [f"{k} of {of} in {model}" for model, (k, of) in works.iterrows()]
    said = [f"The vectors of the demonstrations stand clear of all controls for {', '.join(parts)}"]
    holds = table.assign(yes=table.verdict == "reproduced").pivot(
        index="claim", columns="model", values="yes"
    )
    for one, other in combinations(sorted(holds, key=size), 2):
        both = holds[[one, other]].dropna().astype(bool).sum()
        if n := len(holds[[one, other]].dropna()):
            said.append(
                f"of the {n} measured in {one} and {other}, {both[one]} and {both[other]} are "
                "reproduced"
            )
    if len(works) < 2 and len(said) < 2:
        said.append("no other model has been measured, so this cannot be told")
    return "; ".join(said)


def markdown(summarised: pd.DataFrame) -> str:
    """The short table: main claims in rows, a column per model, and the count of all claims."""
    models = sorted(summarised.model.unique(), key=size)
    lines = [["claim", "source", *models], ["---"] * (2 + len(models))]
    for _, rows in main_claims(summarised).groupby("claim", sort=False):
        first, cells = rows.iloc[0], rows.set_index("model")
        seen = [_cell(cells.loc[m]) if m in cells.index else "–" for m in models]
        lines.append([f"{first.notebook} · {first.statement}", first.theirs, *seen])
    shape = MARKS["reproduced"][0]
    for part, label in (
        (of_sources(summarised), "**all claims**: reproduced, of those measured"),
        (summarised[summarised.source == BEYOND], "claims beyond the sources (12, 13)"),
    ):
        total = counts(part, ["model"]).reindex(models)
        seen = [f"**{shape} {t.reproduced:.0f} of {t.of:.0f}**" for t in total.itertuples()]
        if len(part):
            lines.append([label, "", *("–" if "nan" in cell else cell for cell in seen)])
    text = "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in x) + " |" for x in lines)
    legend = ", ".join(f"{shape} {name}" for name, (shape, _) in MARKS.items())
    return (
        f"{text}\n\n{legend} (several tests that do not agree); a … b: the range of several tests; "
        "– not measured. Source: its number, or whether it says that it found this."
    )


def _cell(row: Any) -> str:
    return f"{MARKS[row.verdict][0]} {row.here}"


def page(summarised: pd.DataFrame, name: str = "claims") -> Styler:
    """The claims as a table for a page: a row each, what the source found, a column per model.

    Args:
        name: of the table in its page; two in one page need two.
    """
    models = sorted(summarised.model.unique(), key=size)
    shown = []
    for _, rows in summarised.groupby("claim", sort=False):
        first, cells = rows.iloc[0], rows.set_index("model")
        seen = [_cell(cells.loc[m]) if m in cells.index else "" for m in models]
        shown.append([first.notebook, first.source_statement, first.theirs, *seen])
    table = pd.DataFrame(shown, columns=["", "claim", "source", *models])
    colours = dict(MARKS.values())
    style = {"text-align": "left", "vertical-align": "top", "white-space": "normal"}
    return (
        table.style.format(escape="html")
        .hide(axis="index")
        .set_properties(**{**style, "max-width": "28em"})
        .map(lambda cell: f"color:{colours.get(cell[:1], 'inherit')}", subset=models)
        .set_table_styles([{"selector": "th", "props": [("text-align", "left")]}])
        .set_uuid(name)
    )


def fill(text: str, table: str) -> str:
    """A text with the table between its markers.

    Raises:
        ValueError: the markers are not there, or not once.
    """
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"The table goes between {START} and {END}: each has to be there once.")
    between = f"{START}\n{table}\n{END}"
    return re.sub(f"{START}.*{END}", lambda _: between, text, flags=re.S)


def main(names: Sequence[str]) -> int:
    """Write the short table of the committed claims into these files."""
    table = markdown(summary(read(provenance.ROOT / "figs")))
    for path in map(Path, names):
        old = path.read_text(encoding="utf-8")
        if (new := fill(old, table)) != old:
            with atomic_write(path) as file:
                file.write_text(new, encoding="utf-8")
            print(f"{path}: the table of claims is new")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
