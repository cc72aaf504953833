"""Ten behaviours as contrast pairs and propensities: counts, matched lengths, order, clean text."""

import codecs
import re
from functools import cache
from itertools import combinations
from pathlib import Path

import pandas as pd
import pytest

DATA = Path(__file__).resolve().parents[1] / "data"
NAMES = ["affection", "weddings", "french", "formal", "hopeful"]
NAMES += ["certain", "past", "truthful", "agreeing", "short_answers"]
COLUMNS = ["split", "id", "prompt", "target", "reference", "side"]
SPLITS = {"fit": 48, "dev": 24, "test": 24}  # split -> fewest rows

each = pytest.mark.parametrize("name", NAMES)
each_held_out = pytest.mark.parametrize("split", ["dev", "test"])


@cache
def table(name):
    return pd.read_csv(DATA / "behaviours" / f"{name}.csv", keep_default_na=False)


def rows(name, split):
    found = table(name)
    return found[found["split"] == split]


def tokens(text):
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower())


def near_duplicates(texts, threshold=0.8):
    """Pairs of texts whose sets of words overlap by `threshold` or more (Jaccard index)."""
    bags = [(text, set(tokens(text))) for text in texts]
    return [
        (a, b) for (a, x), (b, y) in combinations(bags, 2) if len(x & y) >= threshold * len(x | y)
    ]


def swaps(texts, most=2):
    """Pairs of texts of equal length that differ in at most `most` of their words."""
    bags = [(text, tokens(text)) for text in texts]
    return [
        (a, b)
        for (a, x), (b, y) in combinations(bags, 2)
        if len(x) == len(y) and sum(u != v for u, v in zip(x, y, strict=True)) <= most
    ]


def items(name, split=None):
    """The rows, each question of agreeing once and without its options."""
    found = table(name) if split is None else rows(name, split)
    found = found.drop_duplicates("id")
    if name == "agreeing":
        question = found["prompt"].str.split("\n").str[0]
        found = found.assign(prompt=question, target="", reference="")
    return found


# --- every behaviour ---------------------------------------------------------------------------


def test_one_file_a_behaviour():
    found = {path.name for path in (DATA / "behaviours").iterdir() if path.name[0] != "."}
    assert found == {f"{name}.csv" for name in NAMES}


@each
def test_columns_splits_and_ids(name):
    found = table(name)
    assert list(found.columns) == COLUMNS
    assert list(found["split"].unique()) == list(SPLITS)  # in this order, each in one piece
    assert (found["split"] != found["split"].shift()).sum() == len(SPLITS)
    orders = 2 if name == "agreeing" else 1
    assert list(found["id"]) == [i // orders + 1 for i in range(len(found))]
    assert (found.groupby("id")["split"].nunique() == 1).all()


@each
@pytest.mark.parametrize("split", SPLITS)
def test_enough_rows(name, split):
    assert len(items(name, split)) >= SPLITS[split]  # for agreeing: questions, not rows


@each
def test_prompts_and_continuations_fit_together(name):
    found = table(name)
    assert (found["prompt"].str.len() > 0).all()
    assert (found["prompt"] == found["prompt"].str.strip()).all()
    for column in ("target", "reference"):
        assert found[column].str.fullmatch(r" \S.*", flags=re.DOTALL).all()
        assert (found[column].str[1:] == found[column].str[1:].str.strip()).all()
    assert (found["target"] != found["reference"]).all()
    texts = pd.concat([found[column] for column in ("prompt", "target", "reference")])
    assert not texts.str.contains(r"  | \n|\n |\n\n").any()


@each
def test_both_sides_end_alike(name):
    """The last position of a contrast pair holds the same mark on both sides."""
    found = rows(name, "fit") if name == "short_answers" else table(name)
    if name == "agreeing":
        assert found["prompt"].str.endswith("\nAnswer:").all()
    else:
        assert (found["target"].str[-1] == found["reference"].str[-1]).all()
        assert (rows(name, "fit")["target"].str[-1] == ".").all()


@each
def test_contrast_pairs_are_matched_in_words(name):
    found = rows(name, "fit")
    words = {column: found[column].str.split().str.len() for column in ("target", "reference")}
    difference = words["target"] - words["reference"]
    assert difference.abs().max() <= 2
    assert abs(difference.mean()) <= 0.15


@each
@each_held_out
def test_continuations_are_matched_in_tokens(name, split, model):
    def count(prompt, continuation):
        whole, first = (
            model.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (prompt + continuation, prompt)
        )
        assert whole[: len(first)] == first  # the prompt's tokens stay what they are
        return len(whole) - len(first)

    found = rows(name, split)
    difference = pd.Series(
        count(row.prompt, row.target) - count(row.prompt, row.reference)
        for row in found.itertuples()
    )
    assert abs(difference.mean()) <= 0.5
    assert difference.abs().max() <= 3


@each
def test_no_two_rows_are_alike(name):
    found = items(name)
    assert found["prompt"].is_unique
    assert near_duplicates(found["prompt"]) == []
    for column in ("target", "reference"):
        assert near_duplicates(found["prompt"] + found[column]) == []


@each
def test_sentence_frames_vary(name):
    found = items(name, "fit")
    for column in ("target", "reference"):
        texts = found["prompt"] + found[column]
        assert texts.map(lambda text: tuple(tokens(text)[:3])).nunique() >= 40
        assert swaps(texts) == []
    assert swaps(items(name)["prompt"] + items(name)["target"], most=1) == []


# --- one behaviour at a time -------------------------------------------------------------------


def test_only_agreeing_has_sides():
    for name in NAMES:
        assert set(table(name)["side"]) == ({"A", "B"} if name == "agreeing" else {""})


def test_agreeing_shows_each_question_in_both_orders():
    for _, two in table("agreeing").groupby("id"):
        assert list(two["side"]) == ["A", "B"]
        (first, a1, b1, end), (second, a2, b2, _) = (p.split("\n") for p in two["prompt"])
        assert first == second and end == "Answer:"
        assert all(line[:3] in ("A: ", "B: ") for line in (a1, b1, a2, b2))
        assert (a1[3:], b1[3:]) == (b2[3:], a2[3:]) and a1[3:] != b1[3:]
        assert list(two["target"]) == [" A", " B"]
        assert list(two["reference"]) == [" B", " A"]


def test_truthful_answers_are_true_as_often_as_false():
    """Every answer is the true one of one statement and the false one of another."""
    for split in SPLITS:
        found = rows("truthful", split)
        assert sorted(found["target"]) == sorted(found["reference"])


def test_truthful_statements_are_not_the_claims():
    claims = [
        claim
        for name in ("claims", "claims_eval")
        for claim in pd.read_csv(DATA / f"{name}.csv", keep_default_na=False)["claim"]
    ]
    bags = [set(tokens(claim)) for claim in claims]
    for column in ("target", "reference"):
        for text in table("truthful")["prompt"] + table("truthful")[column]:
            bag = set(tokens(text))
            assert all(len(bag & other) < 0.7 * len(bag | other) for other in bags), text


FRENCH = "a au avec c'est dans de des du elle elles en est et il ils je l'eau la le les ma mon "
FRENCH += "nous on où petit pas pour sur tout un une vous bonne bonjour entrez encore oui"


def test_french_is_french_on_one_side_only():
    found = table("french")
    sides = {column: found[column].map(tokens).map(set) for column in ("target", "reference")}
    only_french = set(FRENCH.split()) - {"a", "on", "pour", "encore", "petit"}
    assert sides["target"].map(lambda words: bool(words & set(FRENCH.split()))).mean() > 0.8
    assert not sides["reference"].map(lambda words: bool(words & only_french)).any()
    english = {"the", "is", "of", "and", "my", "we", "you", "it"}
    assert not sides["target"].map(lambda words: bool(words & english)).any()
    assert not rows("french", "fit")["target"].str.isascii().all()  # accents survived
    assert found["prompt"].str.isascii().all() and found["reference"].str.isascii().all()


def test_only_weddings_are_about_weddings():
    about = r"wedding|bride|bridal|groom|newlywed|marri|\bmarry\b|honeymoon|\bwed\b|engage|propose"
    about += r"|\bvows\b|\baltar\b|\bceremony\b|husband and wife"
    found = table("weddings")
    assert found["target"].str.contains(about).all()
    assert not (found["prompt"] + found["reference"]).str.contains(about).any()


def test_past_and_future():
    future = r"\b(?:will|shall|is going to|are going to|plan to|leaves in|is due|is next)\b|'ll\b"
    found = table("past")
    assert found["reference"].str.contains(future).all()
    assert not (found["prompt"] + found["target"]).str.contains(future).any()


def test_short_answers_end_where_long_ones_go_on():
    held_out = pd.concat([rows("short_answers", "dev"), rows("short_answers", "test")])
    speaker = held_out["prompt"].str.split(":").str[0]  # has the word again after the answer
    answer, after = (held_out["target"].str.split("\n").str[i] for i in (0, 1))
    assert (after == speaker + ":").all()
    assert answer.str.split().str.len().max() <= 2
    assert not held_out["reference"].str.contains(r"\n|[.?!]$").any()
    fit = rows("short_answers", "fit")
    assert (fit["target"].str.count("\n") == 4).all()  # two more questions, two more answers
    assert not fit["reference"].str.contains("\n").any()


# --- clean text --------------------------------------------------------------------------------

# rot13, so that the test has no such word in it either
WHOLE = "nff nffrf penc uryy shpxf snt xvxr fcvp pbba puvax tbbx gjng cevpx qvpx pbpx jnax"
START = "shpx fuvg phag ovgpu nffubyr qnza onfgneq cvff fyhg jubervf avtt snttbg ergneq genaal"
BRITISH = r"\b(?:colou|favou|neighbou|honou|labou|humou|behaviou|flavou|rumou|harbou)r\w*"
BRITISH += r"|\b(?:grey|theatre|centre|metres?|cheque|programme|tyres?|kerb|pyjamas|mum|storey)\b"
BRITISH += r"|\b(?:organ|real|recogn|apolog|memor|summar|critic|final|util)is(?:e|ed|es|ing)\b"
BRITISH += r"|\b(?:travell|cancell|jewell|modell)\w+"


@each
def test_files_are_clean_text(name):
    raw = (DATA / "behaviours" / f"{name}.csv").read_bytes().decode("utf-8")
    assert raw.endswith("\n") and "\r" not in raw and "\t" not in raw
    assert name == "french" or raw.isascii()
    whole = set(codecs.decode(WHOLE, "rot13").split())
    start = tuple(codecs.decode(START, "rot13").split())
    assert [w for w in tokens(raw) if w in whole or w.startswith(start)] == []


@each
def test_spelling_is_american(name):
    found = table(name)
    columns = ["prompt", "reference"] + ["target"] * (name != "french")
    text = " ".join(" ".join(found[column]) for column in columns).lower()
    assert re.findall(BRITISH, text) == []
