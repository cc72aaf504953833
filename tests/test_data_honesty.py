"""The claims, misconceptions and dilemmas in data/, and the labelled answers beside this file."""

import difflib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

DATA = Path(__file__).resolve().parents[1] / "data"
CLAIM_COLUMNS = ["id", "pair", "domain", "claim", "label"]
GENERATED = ["areas", "capitals", "continents", "currencies", "elements"]


def read(path: Path) -> pd.DataFrame:
    """As written: an empty field is an empty string."""
    return pd.read_csv(path, keep_default_na=False)


def words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text.lower())


def jaccard(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)


def changed_words(one: str, other: str) -> int:
    """Words replaced, added or removed on the way from one sentence to the other."""
    match = difflib.SequenceMatcher(None, one.split(), other.split(), autojunk=False)
    return sum(max(i2 - i1, j2 - j1) for op, i1, i2, j1, j2 in match.get_opcodes() if op != "equal")


@pytest.fixture(scope="module")
def claims() -> pd.DataFrame:
    return read(DATA / "claims.csv")


@pytest.fixture(scope="module")
def claims_eval() -> pd.DataFrame:
    return read(DATA / "claims_eval.csv")


@pytest.fixture(scope="module")
def misconceptions() -> pd.DataFrame:
    return read(DATA / "misconceptions.csv")


@pytest.fixture(scope="module")
def dilemmas() -> pd.DataFrame:
    return read(DATA / "dilemmas.csv")


@pytest.mark.parametrize(
    "name", ["claims", "claims_eval", "claims_written", "misconceptions", "dilemmas", "exemplars"]
)
def test_files_read_alike_with_and_without_options(name):
    """No empty field, and none that pandas takes for a missing value ("None", "NA")."""
    assert not pd.read_csv(DATA / f"{name}.csv").isna().any().any()


# ---------------------------------------------------------------- claims


@pytest.mark.parametrize(("name", "least"), [("claims.csv", 640), ("claims_eval.csv", 200)])
def test_claims_form(name, least):
    table = read(DATA / name)
    assert list(table.columns) == CLAIM_COLUMNS
    assert len(table) >= least
    assert table["id"].is_unique
    assert set(table["label"]) == {0, 1}
    for claim in table["claim"]:
        assert claim == claim.strip()
        assert claim.endswith(".") and not claim.endswith("..")
        assert claim[0].isupper() or claim[0].isdigit()
        assert 3 <= len(claim.split()) <= 14, claim
        assert '"' not in claim and "  " not in claim


@pytest.mark.parametrize("name", ["claims.csv", "claims_eval.csv"])
def test_claims_are_balanced(name):
    table = read(DATA / name)
    assert table["label"].mean() == 0.5
    assert (table.groupby("domain")["label"].mean() == 0.5).all()
    # no label to be read off the row number, and any even prefix is balanced
    assert table["label"][::2].mean() == 0.5
    assert (table["label"][::2].to_numpy() + table["label"][1::2].to_numpy() == 1).all()


@pytest.mark.parametrize("name", ["claims.csv", "claims_eval.csv"])
def test_claims_are_not_repeated(name):
    texts = [" ".join(words(claim)) for claim in read(DATA / name)["claim"]]
    assert len(texts) == len(set(texts))


def test_a_pair_is_one_fact_told_right_and_wrong(claims):
    for pair, rows in claims.groupby("pair"):
        assert sorted(rows["label"]) == [0, 1], pair
        assert rows["domain"].nunique() == 1, pair
        one, other = rows["claim"]
        assert 1 <= changed_words(one, other) <= 3, (one, other)


def test_most_claims_are_written_by_hand(claims):
    assert claims["domain"].isin(GENERATED).mean() < 0.5
    assert claims["domain"].nunique() >= 15


def test_written_pairs_are_all_in_claims(claims):
    written = read(DATA / "claims_written.csv")
    table = claims.set_index("claim")["label"]
    assert (table[written["true"]] == 1).all()
    assert (table[written["false"]] == 0).all()
    assert not set(written["domain"]) & set(GENERATED)


def test_true_and_false_claims_are_alike_in_length(claims, claims_eval):
    for table in (claims, claims_eval):
        length = table["claim"].str.split().str.len().groupby(table["label"]).mean()
        assert abs(length[0] - length[1]) < 0.3


def test_no_sentence_of_the_evaluation_is_near_a_claim(claims, claims_eval):
    known = [set(words(claim)) for claim in claims["claim"]]
    for claim in claims_eval["claim"]:
        near = max(jaccard(set(words(claim)), other) for other in known)
        assert near < 0.7, claim


def test_countries_and_elements_of_the_evaluation_are_others(claims, claims_eval):
    """In the domains made from lists, the two files share nothing but the wording."""
    wording = {
        *"the of is a in as has its it for was with money people uses used country".split(),
        *"lies capital sits government currency national element number symbol stands".split(),
        *"abbreviated counted banknotes denominated are african asian european south".split(),
        *"africa asia europe america dinar dinars".split(),
    }
    for domain in GENERATED:
        ours = claims_eval.loc[claims_eval["domain"] == domain, "claim"]
        theirs = claims.loc[claims["domain"] == domain, "claim"]
        shared = {w for c in ours for w in words(c)} & {w for c in theirs for w in words(c)}
        assert not shared - wording, domain


def test_script_writes_the_committed_claims():
    for package in ("countryinfo", "periodictable"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed (pip install '.[honesty]')")
    done = subprocess.run(
        [sys.executable, str(DATA / "make_claims.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------- misconceptions


def test_misconceptions(misconceptions, claims, claims_eval):
    table = misconceptions
    assert list(table.columns) == ["id", "question", "correct", "popular_wrong", "side", "category"]
    assert len(table) >= 110
    assert table["id"].is_unique and table["question"].is_unique
    assert table["question"].str.endswith("?").all()
    assert (table["correct"] != table["popular_wrong"]).all()
    for column in ("correct", "popular_wrong"):
        assert table[column].str.split().str.len().between(1, 12).all()
    assert not set(table["question"]) & {*claims["claim"], *claims_eval["claim"]}


def test_misconceptions_are_counterbalanced(misconceptions):
    is_a = misconceptions["side"].eq("A")
    assert set(misconceptions["side"]) == {"A", "B"}
    assert is_a.mean() == 0.5
    assert (is_a.groupby(misconceptions["category"]).mean() == 0.5).all()


def test_length_does_not_give_the_correct_answer_away(misconceptions):
    right, wrong = (misconceptions[c].str.len() for c in ("correct", "popular_wrong"))
    assert abs(right.mean() - wrong.mean()) < 2
    assert 0.4 < (right > wrong).mean() < 0.6


# ---------------------------------------------------------------- dilemmas


def test_dilemmas(dilemmas):
    columns = ["id", "situation", "option_a", "option_b", "honest", "source"]
    assert list(dilemmas.columns) == columns
    ours = dilemmas["source"] == "ours"
    assert list(dilemmas["source"][~ours]) == [
        f"honesty repository, input {i}" for i in range(1, 11)
    ]
    assert dilemmas["honest"][ours].value_counts().to_dict() == {"A": 15, "B": 15}
    assert "".join(dilemmas["honest"][~ours]) == "ABABABABAB"  # as there
    assert dilemmas["situation"].str.endswith("?").all()
    assert dilemmas["id"].is_unique and dilemmas["situation"].is_unique
    assert (dilemmas["option_a"] != dilemmas["option_b"]).all()
    assert dilemmas["situation"].str.split().str.len().le(40).all()


def test_exemplars(dilemmas):
    table = read(DATA / "exemplars.csv")
    assert list(table.columns) == ["dilemma", "direction", "text"]
    assert set(table["dilemma"]) == set(dilemmas["id"])
    assert (table.groupby(["dilemma", "direction"]).size() == 3).all()
    assert set(table["direction"]) == {"honest", "dishonest"}
    assert table["text"].is_unique
    assert table["text"].str.endswith(".").all()
    length = table["text"].str.split().str.len()
    assert length.between(5, 35).all()
    means = length.groupby(table["direction"]).mean()
    assert abs(means["honest"] - means["dishonest"]) < 1


# ---------------------------------------------------------------- answers for the parser


def test_chat_answers():
    table = read(Path(__file__).with_name("chat_answers.csv"))
    assert list(table.columns) == ["text", "options", "label", "kind"]
    assert len(table) >= 70
    assert set(table["label"]) == {"A", "B", "neither", "both"}
    assert not table.duplicated(["text", "options"]).any()
    for options in table["options"]:
        letters = [part.split("=")[0] for part in options.split("|")]
        assert letters == ["A", "B"]
