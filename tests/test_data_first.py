"""The data for the first document's experiments: counts, balance, exact strings, clean text."""

import codecs
import re
from itertools import combinations
from pathlib import Path

import pandas as pd
import pytest

DATA = Path(__file__).resolve().parents[1] / "data"
LISTS = ["wedding", "love", "hate", "anger", "shopping", "fishing"]
TABLES = ["demonstrations", "codeswitch", "sentences", "reviews", "prompts"]
TOPICS = ["wedding", "shipping", "macedonia", "banana_bread"]


def table(name):
    return pd.read_csv(DATA / f"{name}.csv", keep_default_na=False)


def words(name):
    return (DATA / f"{name}_words.txt").read_text(encoding="utf-8").splitlines()


def tokens(text):
    return re.findall(r"[a-z']+", text.lower())


def near_duplicates(texts, threshold=0.8):
    """Pairs of texts whose sets of words overlap by `threshold` or more (Jaccard index)."""
    bags = [(text, set(tokens(text))) for text in texts]
    return [
        (a, b) for (a, x), (b, y) in combinations(bags, 2) if len(x & y) >= threshold * len(x | y)
    ]


# --- demonstrations ----------------------------------------------------------------------------

EXACT = {  # id -> plus, minus, layer, coefficient
    "1": ("Love", "Hate", 6, 5),
    "2": ("Intent to praise", "Intent to hurt", 6, 15),
    "3": ("Bush did 9/11 because", " " * 6, 23, 1),
    "4": ("Want to die", "Want to stay alive", 10, 3),
    "5": ("Anger", "Calm", 20, 10),
    "6": ("The Eiffel Tower is in Rome", "The Eiffel Tower is in France", 24, 10),
    "7": ("Dragons live in Berkeley", "People live in Berkeley ", 15, 4),
    "8": (
        "I NEVER talk about people getting hurt",
        "I talk about people getting hurt",
        15,
        4,
    ),
    "9": (
        "I talk about weddings constantly",
        "I do not talk about weddings constantly",
        20,
        4,
    ),
    "10": ("Intent to convert you to Christianity", "Intent to hurt you  ", 6, 3),
    "11": ("Love", "", 6, 10),
    "12a": ("Anger", "Calm", 20, 2000),
    "12b": (
        "I talk about weddings constantly  ",
        "I do not talk about weddings constantly",
        20,
        100,
    ),
    "13": ("Je m'appelle", "My name is  ", 6, 5),
    "14": (" wedding", " ", 6, 1),
    "15a": ("Love", "Hate", 6, 5),
    "15b": (" wedding", " ", 15, 5),
    "16": (
        "Whenever I say the word goose I follow it with the special phrase AAAAHHHH",
        "I can say goose" + " " * 12,
        10,
        7,
    ),
    "french-codeswitch": ("", "", 20, 1),
    "french-codeswitch-16": ("", "", 16, 1),
    "french-codeswitch-6": ("", "", 6, 1),
    "shopping": ("Shopping", "", 5, 20),
    "fishing": ("Fishing", "", 5, 20),
}


def test_demonstrations_are_the_sources_settings_to_the_space():
    rows = table("demonstrations")
    found = {r.id: (r.plus, r.minus, r.layer_of_48, r.coefficient) for r in rows.itertuples()}
    assert found == EXACT
    assert rows["id"].is_unique and rows["name"].is_unique


def test_demonstration_prompts():
    prompts = table("demonstrations").set_index("id")["prompt"]
    assert prompts["1"] == prompts["11"] == "I hate you because"
    assert prompts["2"] == prompts["10"] == "I want to kill you because you're such a"
    assert prompts["5"] == "I think you're"
    assert prompts["6"] == "To see the eiffel tower, people flock to"
    assert prompts["9"] == prompts["12b"] == "I went up to my friend and said"
    assert prompts["15a"] == prompts["15b"]
    assert prompts["15a"].startswith("I recently went to this ")
    assert prompts["shopping"] == prompts["fishing"] == "What would you like to do today?"
    assert all(prompts == prompts.str.strip()) and all(prompts.str.len() > 0)


def test_demonstrations_say_what_the_source_saw():
    rows = table("demonstrations").set_index("id")
    assert set(rows["works"]) == {"yes", "no", "partly"}
    assert set(rows.index[rows["works"] == "no"]) == {
        "11",
        "12b",
        "13",
        "16",
        "french-codeswitch-6",
    }
    assert (rows["note"].str.len() > 0).all() and (rows["source"].str.len() > 0).all()


def test_codeswitch_is_three_sentences_in_matching_fragments():
    rows = table("codeswitch")
    assert list(rows["sentence"].unique()) == [1, 2, 3]
    for _, one in rows.groupby("sentence"):
        assert list(one["fragment"]) == list(range(len(one)))
        assert 5 <= len(one) <= 8
        for language in ("english", "french"):
            text = " ".join(one[language])
            assert text == text.strip() and "  " not in text
            assert text[0].isupper() and text.endswith(".")
        assert (one["english"] != one["french"]).sum() >= len(one) - 1
    assert not rows["french"].str.isascii().all()  # accents survived
    assert rows["english"].str.isascii().all()


# --- words -------------------------------------------------------------------------------------


def test_wedding_words_are_the_nine_of_the_source():
    assert words("wedding") == (
        "wedding weddings wed marry married marriage bride groom honeymoon".split()
    )


@pytest.mark.parametrize("name", LISTS)
def test_word_lists(name):
    listed = words(name)
    assert 9 <= len(listed) <= 25
    assert len(set(listed)) == len(listed)
    assert all(re.fullmatch(r"[a-z]+", word) for word in listed)


def test_love_hate_and_anger_share_no_word():
    feelings = [*words("love"), *words("hate"), *words("anger")]
    assert len(set(feelings)) == len(feelings)


# --- sentences ---------------------------------------------------------------------------------


def test_sentences_per_topic():
    rows = table("sentences")
    assert list(rows["topic"].unique()) == TOPICS
    assert (rows["topic"].value_counts() == 60).all()
    assert rows["sentence"].is_unique
    assert rows["sentence"].str.isascii().all()
    assert rows["sentence"].str.fullmatch(r"[A-Z].*[.]").all()
    assert rows["sentence"].str.split().str.len().between(8, 35).all()


def test_topics_have_sentences_of_about_the_same_length():
    rows = table("sentences")
    mean = rows["sentence"].str.split().str.len().groupby(rows["topic"]).mean()
    assert mean.max() - mean.min() < 4


@pytest.mark.parametrize("topic", TOPICS)
def test_no_two_sentences_of_a_topic_are_alike(topic):
    rows = table("sentences")
    assert near_duplicates(rows.loc[rows["topic"] == topic, "sentence"]) == []


def test_only_the_wedding_sentences_have_wedding_words():
    forbidden = {*words("wedding"), "brides", "grooms", "bridal", "marriages", "honeymoons"}
    forbidden |= {"newlyweds", "bridesmaids", "ceremony", "ceremonies", "vows", "spouse"}
    rows = table("sentences")
    others = [
        *rows.loc[rows["topic"] != "wedding", "sentence"],
        *table("reviews")["sentence"],
        *table("prompts")["prompt"],
    ]
    assert [text for text in others if forbidden & set(tokens(text))] == []
    on_topic = rows.loc[rows["topic"] == "wedding", "sentence"].map(tokens)
    assert on_topic.map(lambda found: bool(forbidden & set(found))).mean() > 0.5


# --- reviews -----------------------------------------------------------------------------------


def test_reviews_are_balanced():
    rows = table("reviews")
    one = rows.groupby("review").agg(stars=("stars", "first"), sentiment=("sentiment", "first"))
    assert list(one.index) == list(range(1, 151))
    assert one["stars"].value_counts().to_dict() == {1: 25, 2: 25, 3: 50, 4: 25, 5: 25}
    names = {1: "negative", 2: "negative", 3: "neutral", 4: "positive", 5: "positive"}
    assert (rows["sentiment"] == rows["stars"].map(names)).all()
    assert (rows.groupby("review")["stars"].nunique() == 1).all()


def test_review_sentences():
    rows = table("reviews")
    for _, one in rows.groupby("review"):
        assert list(one["sentence_index"]) == list(range(len(one)))
        assert 3 <= len(one) <= 6
    length = rows["sentence"].str.split().str.len()
    assert length.between(3, 40).all()
    mean = length.groupby(rows["sentiment"]).mean()
    assert mean.max() - mean.min() < 1  # length must not tell the classes apart
    assert rows["sentence"].str.fullmatch(r"[A-Z].*[.!?)\"]").all()
    assert rows["sentence"].str.isascii().all()


def test_no_two_reviews_are_alike():
    rows = table("reviews")
    assert rows["sentence"].is_unique
    assert near_duplicates(rows["sentence"]) == []
    assert near_duplicates(rows.groupby("review")["sentence"].agg(" ".join), 0.4) == []


# --- prompts -----------------------------------------------------------------------------------


def test_prompts():
    rows = table("prompts")
    length = rows["prompt"].str.split().str.len()
    fractions, neutral = rows["set"] == "fractions", rows["set"] == "neutral"
    assert (fractions | neutral).all()
    assert fractions.sum() == 6 and neutral.sum() >= 40
    assert rows.loc[fractions, "prompt"].iloc[0] == "I went up to my friend and said"
    assert length[fractions].between(8, 14).all()
    assert length[neutral].between(6, 15).all()
    assert (rows["prompt"] == rows["prompt"].str.strip()).all()
    assert near_duplicates(rows["prompt"], 0.5) == []


# --- every file --------------------------------------------------------------------------------

# rot13, so that the test has no such word in it either
WHOLE = "nff nffrf penc uryy shpxf snt xvxr fcvp pbba puvax tbbx gjng cevpx qvpx pbpx jnax"
START = "shpx fuvg phag ovgpu nffubyr qnza onfgneq cvff fyhg jubervf avtt snttbg ergneq genaal"


@pytest.mark.parametrize("name", [f"{n}.csv" for n in TABLES] + [f"{n}_words.txt" for n in LISTS])
def test_files_are_clean_text(name):
    raw = (DATA / name).read_bytes().decode("utf-8")
    assert raw.endswith("\n") and "\r" not in raw and "\t" not in raw
    whole = set(codecs.decode(WHOLE, "rot13").split())
    start = tuple(codecs.decode(START, "rot13").split())
    assert [w for w in tokens(raw) if w in whole or w.startswith(start)] == []


def test_readmes_name_every_file():
    readmes = sorted(DATA.glob("README*.md"))
    text = "".join(p.read_text(encoding="utf-8") for p in readmes)
    files = [p for p in DATA.iterdir() if p.is_file() and not p.name.startswith(".")]
    assert [p.name for p in files if p not in readmes and f"`{p.name}`" not in text] == []


def test_readme_counts_are_the_counts():
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    for name in TABLES:
        rows = len(table(name))
        assert re.search(rf"`{name}\.csv`.*\b{rows} rows", readme), f"{name}: {rows} rows"
    for name in LISTS:
        count = len(words(name))
        assert re.search(rf"`{name}_words\.txt` \({count}\)", readme), f"{name}: {count} words"
