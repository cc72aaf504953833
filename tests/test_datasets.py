"""Loading the shipped data, and saying what is wrong with a damaged file."""

from __future__ import annotations

from pathlib import Path

import pytest

import steerlib as sl


def test_tables_keep_spaces_and_empty_cells() -> None:
    table = sl.datasets.load("demonstrations").astype({"id": str}).set_index("id")
    assert table.loc["13", "minus"] == "My name is  "
    assert table.loc["11", "minus"] == ""


def test_word_lists() -> None:
    words = sl.datasets.words("wedding")
    assert len(words) == 9 and "honeymoon" in words and "" not in words


def test_code_switches_go_from_french_to_english() -> None:
    pairs = sl.datasets.code_switches()
    assert len(pairs) == 23
    for mixed, english in pairs:
        assert mixed != english
    first, last = pairs[0], pairs[7]
    assert not set(first[0].split()[:2]) & set(first[1].split()[:2])
    assert last[0].startswith("The old observatory was built")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sl.datasets.load("nonsense"), "there are .*demonstrations"),
        (lambda: sl.datasets.words("nonsense"), "there are .*wedding"),
    ],
)
def test_unknown_names_list_the_known_ones(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()  # type: ignore[operator]


@pytest.mark.parametrize(
    "text", ["", "a,b\n", "a,b\n1,2\n3", 'a,b\n1,"2\n', "a,b\n1,2,3\n1,2\n1,2,3,4\n"]
)
def test_a_damaged_table_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "broken.csv").write_text(text)
    monkeypatch.setenv("STEERLIB_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"broken\.csv is damaged"):
        sl.datasets.load("broken")
