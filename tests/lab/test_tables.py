"""Tables as HTML: texts are shown, never run; what each claim of the sources became here."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import fromstring as parse

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb

import steerlib as sl
from steerlib.lab import datasets, plots, tables

EVIL = "<script>alert('x')</script> & <b>"


# ---------------------------------------------------------------- texts side by side


def test_side_by_side() -> None:
    frame = pd.DataFrame(
        [("I", c, s, f"{c} says {s}") for c in ("unsteered", "love") for s in (0, 1, 2)]
        + [(EVIL, "love", 0, EVIL)],
        columns=["prompt", "condition", "sample", "completion"],
    )
    shown = tables.side_by_side(frame).data
    assert "<script" not in shown
    table = [[(c.findtext("b"), "".join(c.itertext())) for c in row] for row in parse(shown)]
    assert [text for _, text in table[0]] == ["unsteered", "love"]
    assert table[3] == [("I", "Iunsteered says 2"), ("I", "Ilove says 2")]
    assert table[4] == [(EVIL, EVIL), (EVIL, 2 * EVIL)]
    fewer = tables.side_by_side(frame, ["love"], n=1).data
    assert fewer.count("<tr>") == 3 and "unsteered" not in fewer and "says 1" not in fewer
    for odd in (frame.assign(condition=EVIL), frame.assign(completion=np.nan)):
        assert "<script" not in tables.side_by_side(odd).data  # nor when rows occur twice


# ---------------------------------------------------------------- which tokens meet


def test_align_says_which_tokens_meet(tiny: Any) -> None:
    """Prompt above, then the plus and the minus prompt of each vector, at their positions."""
    model, _ = tiny("gpt2")
    n = len(sl.encode(model, "I hate you because"))
    v = sl.SteeringVector.from_prompts(model, "ab", "a", layer=2)
    back = sl.Add(2 * v, at="back", coefficient=-1.5)
    bare = sl.SteeringVector.from_prompts(model, "b", layer=[1, 3])
    found = sl.align(model, "I hate you because", {"love": 5 * v, "back": back, "bare": bare})
    assert list(found.columns) == ["vector", "layer", "coefficient", *map(str, range(n))]
    assert found.vector.tolist() == ["", "love", "", "back", "", "bare"]
    assert found.layer.tolist() == ["0 (prompt)", "2", "2", "2", "2", "1, 3"]
    assert found.coefficient.tolist() == ["+1", "+5", "-5", "-3", "+3", "+1"]
    cells = found.drop(columns=["vector", "layer", "coefficient"]).to_numpy().tolist()
    assert "".join(cells[0][1:]) == "I hate you because" and cells[0][0] == "<s>"
    empty = [""] * (n - 3)
    assert cells[1] == ["<s>", "a", "b", *empty] and cells[2] == ["<s>", "a", " ", *empty]
    assert cells[3] == [*empty, "<s>", "a", "b"] and cells[4] == [*empty, "<s>", "a", " "]
    assert cells[5] == ["<s>", "b", *[""] * (n - 2)]
    with pytest.raises(ValueError, match="has no tokens to align: it is not from two prompts"):
        sl.align(model, "I", {"random": sl.SteeringVector.random_like(v)})


def test_alignment_escapes_and_shows_spaces(tiny: Any) -> None:
    table = pd.DataFrame(
        [["", "0 (prompt)", "+1", "a b", "<script>"], ["l v", "6", "+5", " Love", ""]],
        columns=["vector", "layer", "coefficient", "0", "1"],
    )
    shown = tables.alignment(table).data
    assert "<script" not in shown and "&lt;script&gt;" in shown
    assert "a␣b" in shown and "␣Love" in shown and "0 (prompt)" in shown
    assert "l v" in shown  # a name keeps its spaces
    model, _ = tiny("llama")
    v = sl.SteeringVector.from_prompts(model, " <b>", " ", layer=2)
    real = tables.alignment(sl.align(model, "A <b> & so on", {"v": v}), width=99).data
    assert ">␣" in real and "&amp;" in real and "&lt;s&gt;" in real


def test_long_alignments_go_on_below_and_end_behind_the_vectors() -> None:
    places = [str(i) for i in range(30)]

    def shown(reach: int, **more: int) -> list[list[str]]:
        """The positions of each block."""
        cells = [*["v"] * reach, *[""] * (30 - reach)]
        rows = [["", "0 (prompt)", "+1", *places], ["v", "6", "+5", *cells]]
        table = pd.DataFrame(rows, columns=["vector", "layer", "coefficient", *places])
        page = tables.alignment(table, **more).data
        rest = re.findall(r"left as they are: (\d+)", page)
        blocks = [re.findall(r"<th>(\d+)</th>", block) for block in page.split("</thead>")[:-1]]
        assert sum(map(len, blocks)) + int((rest or ["0"])[0]) == 30
        return blocks

    assert shown(14) == [places[:10], places[10:16]]
    assert shown(3) == [places[:5]]
    assert shown(29) == [places[:10], places[10:20], places[20:]]
    assert shown(3, width=30) == [places]


# ---------------------------------------------------------------- tokens in colours


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
    page = tables.token_heatmap(CHANGES, limit=2).data
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "<i>a</i>" in page  # not scored, hence no colour
    up, down, same = (page.split(f">{t}</span>")[0].rsplit("<span", 1)[1] for t in
                      ("&lt;script&gt;", " $5\n", "b c"))  # fmt: skip
    assert to_hex([(1 + c) / 2 for c in to_rgb(plots.GAIN)]) in up and "underline" not in up
    assert plots.LOSS.lower() in down and "underline" in down  # beyond the limit: full colour
    assert "#ffffff" in same and "underline" not in same
    assert "+1.00 nats" in up and "×7.4" in page and "×0.14" in page


def test_a_heatmap_of_real_changes(tiny: Any) -> None:
    model, _ = tiny("llama")
    vector = sl.SteeringVector.from_prompts(model, " wedding", " ", layer=1)
    changes = sl.token_changes(model, ["I love <b>dogs</b>", "The ship left"], 5 * vector)
    page = tables.token_heatmap(changes).data
    assert "<b>" not in page and page.count("<p ") == 2


# ---------------------------------------------------------------- claims of the sources

SOURCE = pd.DataFrame(
    [
        ["front", "02", "The <b>front</b> works", "gpt2-xl", "nats", 4.0, 3.0, 5.0, "+", "first"],
        ["back", "02", "The back does nothing", "gpt2-xl", "nats", None, None, None, "0", ""],
        ["other", "03", "Half the dimensions do", "gpt2-xl", "words", 2.5, None, None, "+", ""],
        ["missed", "2", "Not looked at", "gpt2-xl", "words", None, None, None, "-", ""],
    ],
    columns="claim notebook statement model unit number low high direction note".split(),
).assign(source="turner2023", section="14", measure="effect", holds=["yes", "yes", "partly", "yes"])


@pytest.fixture
def claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Claims to judge; the folder of figures is returned."""
    monkeypatch.setenv("STEERLIB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("STEERLIB_FIGS", str(tmp_path / "figs"))
    (tmp_path / "data").mkdir()
    SOURCE.to_csv(tmp_path / "data" / "source_claims.csv", index=False)
    return tmp_path / "figs"


def judged(*rows: tuple[Any, ...], **more: Any) -> pd.DataFrame:
    columns = ["claim", "model", "value", "low", "high", "verdict"]
    return pd.DataFrame(rows, columns=columns).assign(**more)


def cells(page: Any) -> list[list[str]]:
    """Head and rows of the table as it is shown, as text."""
    shown = page.to_html()
    rows = re.findall(r"<tr>(.*?)</tr>", shown, re.S)
    found = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in rows]
    return [[html.unescape(cell).strip() for cell in row] for row in found]


def test_source_vs_here(claims: Path) -> None:
    rows = judged(
        ("front", "smollm2-135m", 3.14159, 2.0, 4.0, "reproduced"),
        ("front", "qwen", 1, 0.5, 1.5, "weaker"),
        ("back", "smollm2-135m", 0.1, -0.2, 0.4, "not seen"),
    )
    page = sl.tables.source_vs_here(rows, "02_positions")
    assert cells(page) == [
        ["claim", "source", "model", "here", "verdict"],
        ["The <b>front</b> works", "yes: 4 [3, 5] nats (gpt2-xl)", "smollm2-135m",
         "3.1 [2.0, 4.0] nats", "● reproduced"],
        ["", "", "qwen", "1.0 [0.5, 1.5] nats", "◐ weaker"],
        ["The back does nothing", "yes (gpt2-xl)", "smollm2-135m",
         "0.1 [-0.2, 0.4] nats", "○ not seen"],
    ]  # fmt: skip
    assert "<b>front" not in page.to_html()
    below = page.to_html()[page.to_html().index("<caption") :]
    assert "Not measured here (1)</summary><ul><li>Not looked at</li></ul>" in below
    for verdict, (mark, _) in tables.VERDICTS.items():
        assert f"{mark} <b>{verdict}</b>: {tables.MEANS[verdict]}" in below
    assert sl.tables.source_vs_here(rows, "02_positions").to_html() == page.to_html()


def test_source_vs_here_keeps_the_numbers_of_both_sides(claims: Path) -> None:
    rows = judged(("front", "m", 1 / 3, -0.1, 0.7, "cannot tell"))
    sl.tables.source_vs_here(rows, "02_positions")
    (kept,) = pd.read_csv(claims / "02_claims.csv").to_dict("records")
    assert kept["value"] == 1 / 3 and (kept["low"], kept["high"]) == (-0.1, 0.7)
    assert (kept["source_number"], kept["source_low"], kept["source_high"]) == (4, 3, 5)
    assert (kept["model"], kept["source_model"], kept["source"]) == ("m", "gpt2-xl", "turner2023")
    assert kept["source_note"] == "first" and kept["verdict"] == "cannot tell"
    assert [p.name for p in claims.iterdir()] == ["02_claims.csv"]


def test_source_vs_here_takes_a_unit_and_a_note_of_its_own(claims: Path) -> None:
    rows = judged(
        ("front", "m", 80.0, np.nan, np.nan, "opposite"),
        ("back", "m", np.nan, np.nan, np.nan, "cannot tell"),
        unit=["%", None], note=[EVIL, None],
    )  # fmt: skip
    page = sl.tables.source_vs_here(rows, "02_positions")
    head, first, second = cells(page)
    assert head[-1] == "note" and first[-1] == EVIL and second[-1] == ""
    assert first[3:5] == ["80 %", "▼ opposite"] and second[3:5] == ["", "? cannot tell"]
    assert "<script" not in page.to_html()


def test_source_vs_here_puts_headings_above_sections(claims: Path) -> None:
    rows = judged(
        ("front", "m", 3, 2, 4, "reproduced"),
        ("back", "m", 0.1, 0, 0.2, "not seen"),
        ("missed", "m", 0.1, 0, 0.2, "not seen"),
        section=["Places", "Places", "Rest"],
    )
    shown = cells(sl.tables.source_vs_here(rows, "02_positions"))[1:]
    assert [row[0] for row in shown] == [
        "PLACES", SOURCE.statement[0], SOURCE.statement[1], "REST", SOURCE.statement[3]
    ]  # fmt: skip
    assert shown[0][1:] == [""] * 4
    assert len(pd.read_csv(claims / "02_claims.csv")) == 3


def test_source_vs_here_tells_rows_of_one_line_together(claims: Path) -> None:
    rows = judged(
        ("front", "m", 3.0, 2, 4, "reproduced"),
        ("missed", "m", 0.1, 0, 0.2, "not seen"),
        ("front", "n", -1.0, -2, 0, "cannot tell"),
        ("front", "m", 4.0, 3, 5, "reproduced"),
        ("back", "m", 0.1, 0, 0.2, "not seen"),
        note=["at 1", None, "at 2 <b>", "at 3", None],
    )
    lines = ["It <b>works", "", "It <b>works", "It <b>works", "alone"]
    page = sl.tables.source_vs_here(rows, "02_positions", lines)
    head, together, alone = cells(page)
    assert together == [
        "It <b>works", "yes × 3 (gpt2-xl)", "m, n", "-1 … 4 nats",
        "● reproduced × 2, ? cannot tell × 1", "? at 2 <b>",
    ]  # fmt: skip
    assert alone[0] == SOURCE.statement[1] and alone[4] == "○ not seen" and head[-1] == "note"
    assert "(5) is in <code>02_claims.csv</code>" in page.to_html()
    assert "It <b>" not in page.to_html()
    kept = pd.read_csv(claims / "02_claims.csv")
    sl.tables.source_vs_here(rows, "02_positions")
    pd.testing.assert_frame_equal(kept, pd.read_csv(claims / "02_claims.csv"))  # every row
    with pytest.raises(ValueError, match="5 claims need as many lines, got 1"):
        sl.tables.source_vs_here(rows, "02_positions", ["one"])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (judged().drop(columns=["low", "verdict"]), r"\['low', 'verdict'\] are missing"),
        (
            judged(("nonsense", "m", 1, 0, 2, "weaker")),
            r"\['nonsense'\] are not in source_claims.csv; of this notebook: front, back, missed",
        ),
        (judged(("front", "m", 1, 0, 2, "perhaps")), r"\['perhaps'\] are unknown: use reproduced"),
    ],
)
def test_source_vs_here_refuses(claims: Path, rows: pd.DataFrame, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sl.tables.source_vs_here(rows, "02_positions")
    assert not claims.exists()


def test_judge_takes_what_the_source_says_from_its_table(claims: Path) -> None:
    """Which way, whether it holds, and its number; the rows go into the table above."""
    to = {"model": "m", "bound": 0.25}
    rows = [
        tables.judge("front", (3.1, 2.0, 4.2), number=True, note="a note", **to),
        tables.judge("front", (1.9, 1.5, 2.3), number=True, **to),
        tables.judge("front", (1.9, 1.5, 2.3), **to),  # without a look at the number
        tables.judge("front", (1.9, 1.5, 2.3), beyond=(2.0,), **to),
        tables.judge("back", (0.1, -0.2, 0.2), **to),
        tables.judge("back", (3, 2, 4), **to),
        tables.judge("back", (3, 2, 4), holds="yes", direction="+", unit="%", **to),
        tables.judge("missed", (-3, -4, -2), **to),
    ]
    assert [row["verdict"] for row in rows] == [
        "reproduced", "weaker", "reproduced", "cannot tell", "reproduced", "opposite",
        "reproduced", "reproduced",
    ]  # fmt: skip
    head, *shown = cells(sl.tables.source_vs_here(pd.DataFrame(rows), "02_positions"))
    assert shown[0][3:] == ["3.1 [2.0, 4.2] nats", "● reproduced", "a note"]
    assert shown[6][3] == "3 [2, 4] %"
    with pytest.raises(ValueError, match="no claim 'nonsense' in source_claims.csv"):
        tables.judge("nonsense", (1, 0, 2), **to)
    with pytest.raises(ValueError, match="No number .*'back'"):
        tables.judge("back", (1, 0, 2), number=True, **to)


def test_judge_compares_ratios_by_their_logarithms(claims: Path) -> None:
    for ratio, verdict in (((3, 2.9, 3.5), "reproduced"), ((1.9, 1.8, 2.2), "weaker")):
        row = tables.judge("front", np.log(ratio), model="m", bound=0.1, number=True, ratio=True)
        assert row["verdict"] == verdict and row["unit"] == "ratio"
        assert (row["value"], row["low"], row["high"]) == pytest.approx(ratio)


def test_judge_counts_from_chance(claims: Path) -> None:
    """Half of all pairs is no effect; what is shown stays a share."""
    to = {"model": "m", "bound": 0.05, "chance": 0.5}
    row = tables.judge("front", (0.7, 0.6, 0.8), **to)
    assert (row["value"], row["low"], row["high"], row["verdict"]) == (0.7, 0.6, 0.8, "reproduced")
    for interval, more, verdict in (
        ((0.7, 0.6, 0.8), {"beyond": [0.6, 0.71]}, "cannot tell"),
        ((0.7, 0.6, 0.8), {"number": 0.95}, "weaker"),
        ((0.7, 0.6, 0.8), {"number": 0.85}, "reproduced"),
        ((0.5, 0.48, 0.52), {}, "not seen"),
        ((0.3, 0.2, 0.4), {}, "opposite"),
        ((0.3, 0.2, 0.4), {"against": [0.25]}, "cannot tell"),
    ):
        assert tables.judge("front", interval, **to, **more)["verdict"] == verdict


def test_judge_shows_the_natural_quantity(claims: Path) -> None:
    """The sign serves the verdict alone; what the table shows has its own unit, or the source's."""
    to = {"model": "m", "bound": 0.25}
    row = tables.judge("missed", (-6, -7, -5), shown=(6, 5, 7), unit="nats a token", **to)
    assert (row["value"], row["low"], row["high"], row["verdict"]) == (6, 5, 7, "reproduced")
    assert row["unit"] == "nats a token"
    for half, verdict in ((2.5, "reproduced"), (9.0, "weaker")):  # of a number worked out from it
        assert tables.judge("front", (3, 2, 4), number=half, **to)["verdict"] == verdict
    row = tables.judge("front", np.log((8, 7, 9)), ratio=True, shown=(16, 14, 18), **to)
    assert row["value"] == 16 and "unit" not in row


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((1.2927, 0.3479, 2.2375), "1.3 [0.3, 2.2]"),
        ((1.1184, 0.9787, 1.278), "1.12 [0.98, 1.28]"),
        ((4, 3, 5), "4 [3, 5]"),
        ((90, 82, 98), "90 [82, 98]"),
        ((0.01612, 0.00913, 0.02311), "0.016 [0.009, 0.023]"),
        ((-0.04, -0.43, 0.39), "-0.04 [-0.43, 0.39]"),
        ((-0.004, -0.4, 0.39), "0.00 [-0.40, 0.39]"),
        ((-5e-5, -2e-4, 1e-4), "within ±0.001"),
        ((313.4, 240, 402.1), "313 [240, 402]"),
        ((0, 0, 0), "0"),
        ((9.44e-05, 9.44e-05, 9.44e-05), "< 0.001"),
        ((-5.78e-09, np.nan, np.nan), "> -0.001"),
        ((2000, None, None), "2000"),
        ((12345.6, 12345.6, 12345.6), "12346"),
        ((0.909, "", ""), "0.909"),
        ((0.3, -np.inf, np.inf), "0.3 [-inf, inf]"),
        ((1.2, 0, np.inf), "1.2 [0, inf]"),
        ((None, 1, 2), ""),
    ],
)
def test_numbers_have_the_decimals_that_their_interval_bears(
    numbers: tuple[Any, Any, Any], said: str
) -> None:
    assert tables.quantity(*numbers) == said
    assert tables.quantity(*numbers, "nats") == (f"{said} nats" if said else "")
    if numbers[0] == 1.2927:
        assert tables.quantity(*numbers, sign=True) == f"+{said}"


def test_effects_as_a_page_shows_them() -> None:
    table = pd.DataFrame(
        {"vector": ["a"], "layer": [6], "effect": [1.2927], "low": [0.3479], "high": [2.2375],
         "n": [9], "p": [0.001], "p_holm": [0.0004], "random": [0.468]}
    )  # fmt: skip
    names = {"random": "largest of 20 random"}
    (row,) = tables.effects(table, ["vector", "layer"], names).to_dict("records")
    assert row == {
        "vector": "a", "layer": 6, "effect (nats)": "+1.3 [0.3, 2.2]",
        "largest of 20 random": "+0.47", "n": 9, "p (Holm)": "< 0.001",
    }  # fmt: skip
    indexed = table.drop(columns=["p_holm", "n"]).set_index("vector")
    (row,) = tables.effects(indexed, "vector", names, ratio=True).to_dict("records")
    assert row == {"vector": "a", "ratio": "3.6 [1.4, 9.4]", "largest of 20 random": "1.60"}


def test_verdicts_have_a_shape_each_and_are_those_of_stats() -> None:
    from steerlib.measure import stats

    assert tuple(tables.VERDICTS) == tuple(tables.MEANS) == stats.VERDICTS
    assert len({shape for shape, _ in tables.VERDICTS.values()}) == len(tables.VERDICTS)


def test_the_claims_of_every_notebook_can_be_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEERLIB_FIGS", str(tmp_path))
    said = datasets.load("source_claims")
    for number, own in said.groupby(said.notebook.astype(str).str.zfill(2).str[:2]):
        rows = judged(*((claim, "m", 1.0, 0.5, 1.5, "reproduced") for claim in own.claim))
        shown = cells(sl.tables.source_vs_here(rows, f"{number}_x"))
        assert [row[0] for row in shown[1:]] == own.statement.tolist()
