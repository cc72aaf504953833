"""What became of all claims: read back, summed up, and written into the README."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from steerlib.lab import claims, datasets, provenance, tables

ROOT = Path(__file__).parents[2]
SMALL, LARGE = "smollm2-135m", "qwen2.5-coder-1.5b"
TWO = pd.DataFrame(
    [(SMALL, "1", True), (SMALL, "2", False), (LARGE, "1", True), (LARGE, "2", True)],
    columns=["model", "demonstration", "works"],
)


def write(number: str, *rows: tuple[Any, ...]) -> None:
    """A table of claims, as a notebook of that number saves it."""
    columns = ["claim", "model", "value", "low", "high", "verdict", "unit"]
    tables.source_vs_here(pd.DataFrame(rows, columns=columns), f"{number}_x")


@pytest.fixture
def figs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with claims of two notebooks, in two models and a folder."""
    monkeypatch.setenv("STEERLIB_FIGS", str(tmp_path))
    write(
        "01",
        ("love-hate", LARGE, 2.0, 1.0, 3.0, "reproduced", "nats"),
        ("love-hate", SMALL, 0.2, -0.1, 0.5, "cannot tell", "nats"),
        ("anger", SMALL, -1.0, -1.5, -0.5, "opposite", "nats"),
        ("composition", SMALL, 0.0, -0.1, 0.1, "reproduced", "nats"),
        ("anger", "/somewhere/tiny", 1.0, 0.5, 1.5, "reproduced", "nats"),
    )
    write(
        "02",
        ("wedding-front", SMALL, 0.3, 0.1, 0.5, "weaker", None),
        ("wedding-front", SMALL, 1.9, 0.9, 2.9, "reproduced", "nats"),
        ("wedding-back", SMALL, 0.4, 0.1, 0.5, "weaker", None),
        ("wedding-back", SMALL, 0.2, 0.1, 0.3, "weaker", None),
    )
    return tmp_path


def test_read_takes_whatever_models_are_there(figs: Path) -> None:
    found = claims.read()
    assert list(dict.fromkeys(found.model)) == [SMALL, LARGE, "tiny"]  # by size, folders last
    assert set(found.notebook) == {"01", "02"}
    assert set(found.experiment) == {"demonstrations", "positions"}
    nothing = found[found.asserts == "no change"]
    assert set(nothing.claim) == {"composition"}  # the source's direction is 0
    write("12", ("love-hate", SMALL, 2.0, 1.0, 3.0, "reproduced", "nats"))
    assert "beyond the sources" in set(claims.read().experiment)


def test_read_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERLIB_FIGS", str(tmp_path))
    with pytest.raises(ValueError, match="no tables of claims in .*: run the notebooks first"):
        claims.read()
    (tmp_path / "01_claims.csv").write_text("claim,model\na,b\n")
    with pytest.raises(ValueError, match="01_claims.csv is no table of claims: it has no "):
        claims.read()
    monkeypatch.setenv("PRESET", "smoke")  # shows the committed ones
    assert len(claims.read()) > 100


def test_a_claim_tested_in_several_ways_has_the_verdict_of_all_or_differs(figs: Path) -> None:
    table = claims.summary(claims.read()).set_index(["claim", "model"])
    front, back = table.loc[("wedding-front", SMALL)], table.loc[("wedding-back", SMALL)]
    assert (front.verdict, front.n_tests) == (claims.DIFFER, 2)
    assert (back.verdict, back.n_tests) == ("weaker", 2)
    # of two units nats are shown; of several tests the range, and the median in the figure
    assert (front.here, front.short) == ("1.9 [0.9, 2.9] nats", "+1.9")
    assert (back.here, back.short) == ("0.2 … 0.4 words per completion", "~0.3")
    # a number in another unit has a star in the figure
    assert (front.theirs, front.theirs_short) == ("0.7 words per completion", "0.7*")
    assert (back.theirs, back.theirs_short) == ("0.87 words per completion", "0.87")
    order = datasets.load("source_claims").claim.tolist()
    rows = [order.index(claim) for claim in table.index.get_level_values(0)]
    assert rows == sorted(rows)


def test_counts(figs: Path) -> None:
    found = claims.counts(claims.summary(claims.read()), ["model"])
    assert found.loc[SMALL].to_dict() == {
        "reproduced": 1, "weaker": 1, "not seen": 0, "opposite": 1, "cannot tell": 1,
        claims.DIFFER: 1, "of": 5,
    }  # fmt: skip
    assert found.loc[LARGE, "of"] == found.loc[LARGE, "reproduced"] == 1


def test_the_five_sentences_count_right(figs: Path) -> None:
    holds, fails, unclear, size, sure = claims.sentences(claims.read(), TWO)
    assert f"0 of 2 of Turner et al. 2023 in {SMALL};" in holds
    assert "0 of the 4 that something" in holds and "1 of the 1 that nothing" in holds
    assert "of all 5, 1 are weaker" in fails and "0 not seen, 1 opposite" in fails
    assert "1 of 5" in unclear and "1 tests in nats or ratios, 1 have" in unclear
    assert f"1 of 2 in {SMALL}, 2 of 2 in {LARGE}" in size
    assert f"of the 1 measured in {SMALL} and {LARGE}, 0 and 1 are reproduced" in size
    assert f"measured in {LARGE} and tiny" not in size  # no claim in both
    assert "95 %" in sure and "of the 4 would" in sure


def test_each_source_is_summed_up_in_its_own_model(figs: Path) -> None:
    write(
        "06",
        ("accuracy-l17", LARGE, 0.9, 0.8, 1.0, "reproduced", None),
        ("accuracy-held-out", LARGE, 0.5, 0.4, 0.6, "not seen", None),
    )
    holds, fails, *_ = claims.sentences(claims.read(), TWO)
    assert f"1 of 2 of the honesty repository in {LARGE}: *pairs told apart*;" in holds
    assert f"1 of 2 of the honesty repository in {LARGE}: *held-out pairs too*;" in fails
    assert "1 of the 6 that something" in holds and "of all 7" in fails


def test_with_one_model_nothing_is_said_about_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEERLIB_FIGS", str(tmp_path))
    write("01", ("love-hate", SMALL, 2.0, 1.0, 3.0, "reproduced", "nats"))
    said = claims.sentences(claims.read(), TWO[TWO.model == SMALL])
    assert "cannot be told" in said[3] and "*Love − Hate: affection*" in said[0]
    assert len(said) == 5 and "nan" not in " ".join(said).lower()


def test_page_is_escaped_and_shows_every_model(figs: Path) -> None:
    found = claims.read()
    found.loc[0, "source_statement"] = "<script>"
    shown = claims.page(claims.summary(found)).to_html()
    assert "<script>" not in shown and "&lt;script&gt;" in shown
    for name in (SMALL, LARGE, "tiny", "● 2 [1, 3] nats", "▼ -1.0 [-1.5, -0.5] nats"):
        assert name in shown


def test_markdown_shows_main_claims_and_counts_all(figs: Path) -> None:
    lines = claims.markdown(claims.summary(claims.read())).splitlines()
    assert lines[0] == f"| claim | source | {SMALL} | {LARGE} | tiny |"
    assert lines[2].startswith("| 01 · Love − Hate") and "? 0.2 [-0.1, 0.5] nats" in lines[2]
    assert lines[2].endswith("| ● 2 [1, 3] nats | – |")
    assert "**● 1 of 5** | **● 1 of 1** | **● 1 of 1** |" in "\n".join(lines)
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_claims_beyond_the_sources_are_counted_apart(figs: Path) -> None:
    before = claims.sentences(claims.read(), TWO)
    write("12", ("beyond-affine", SMALL, 1.0, 0.5, 1.5, "reproduced", "nats"))
    found = claims.read()
    assert claims.sentences(found, TWO) == before
    assert len(claims.of_sources(found)) == len(found) - 1
    lines = claims.markdown(claims.summary(found)).splitlines()
    assert "| claims beyond the sources (12, 13) |  | **● 1 of 1** | – | – |" in lines
    assert any("**● 1 of 5** | **● 1 of 1** | **● 1 of 1** |" in line for line in lines)


def test_fill_needs_its_markers() -> None:
    text = f"before\n{claims.START}\nold\n{claims.END}\nafter\n"
    new = claims.fill(text, r"| \1 |")
    assert new == f"before\n{claims.START}\n| \\1 |\n{claims.END}\nafter\n"
    assert claims.fill(new, r"| \1 |") == new
    for bad in ("nothing", text + text):
        with pytest.raises(ValueError, match="each has to be there once"):
            claims.fill(bad, "table")


def test_main_claims_are_claims_with_short_labels() -> None:
    chosen = datasets.load("main_claims")
    said = datasets.load("source_claims").set_index("claim")
    assert chosen.claim.is_unique and set(chosen.claim) <= set(said.index)
    assert chosen.statement.is_unique and chosen.statement.str.len().between(30, 130).all()
    assert chosen.label.str.len().max() <= 22  # what the figure has room for
    assert set(said.notebook[chosen.claim].astype(str).str.zfill(2)) == set(claims.EXPERIMENTS)


def test_the_readme_says_what_the_tables_of_claims_say() -> None:
    """`make figs` writes it there; the figures' folder and the README are committed together."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = claims.markdown(claims.summary(claims.read(ROOT / "figs")))
    assert claims.fill(readme, table) == readme, "run python -m steerlib.lab.claims README.md"
    assert len(readme.splitlines()) < 200
    assert re.search(r"\| \*\*● \d+ of \d+\*\* \|", readme)


def test_main_writes_only_what_changed(
    figs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(provenance, "ROOT", figs)
    (figs / "figs").mkdir()
    (figs / "01_claims.csv").rename(figs / "figs" / "01_claims.csv")
    page = figs / "page.md"
    page.write_text(f"{claims.START}{claims.END}")
    assert claims.main([str(page)]) == 0 and "is new" in capsys.readouterr().out
    assert "Love − Hate" in page.read_text()
    assert claims.main([str(page)]) == 0 and capsys.readouterr().out == ""


def test_the_readme_in_short_follows_from_the_verdicts() -> None:
    """Its sentences are written by hand; each part names the numbers it rests on."""
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    shown = pd.read_csv(ROOT / "figs" / "01_demonstrations.csv", dtype={"demonstration": str})
    works = shown.groupby("model").works.agg(["sum", "count"])
    sizes = {SMALL: "135 million", "gemma3-270m": "270 million", LARGE: "1.5 billion"}
    assert set(works.index) == set(sizes)
    of_all = shown.groupby("demonstration").filter(lambda rows: len(rows) == len(sizes))
    common = of_all.groupby("model").works.sum()[list(sizes)].tolist()
    assert f"Of the {len(of_all) // len(sizes)} demonstrations measured in all three" in text
    assert "{}, {} and {} ".format(*common) + "work, in models of " in text
    assert "{}, {} and {} parameters".format(*sizes.values()) in text
    found = ["{sum} of {count}".format(**works.loc[model]) for model in sizes]
    assert "counting all, {}, {} and {}".format(*found) in text
    models = shown[shown.works].groupby("demonstration").model.agg(set)
    everywhere = [name for name, those in models.items() if those == set(sizes)]
    assert everywhere == ["10", "13"]  # Christianity, Je m'appelle
    assert models["1"] == {LARGE}
    table = claims.summary(claims.read(ROOT / "figs"))
    told = claims.counts(claims.of_sources(table), ["source"]).sum()
    assert "Half of all verdicts are *cannot tell*" in text
    assert 0.45 < told["cannot tell"] / told["of"] < 0.55
    found = claims.main_claims(table)
    verdicts = found[found.model == LARGE].set_index("claim").verdict
    assert verdicts["plus-affirms"] == "reproduced"
    assert verdicts["dilemmas-minus-dishonest"] != "reproduced"
