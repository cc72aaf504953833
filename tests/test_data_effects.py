"""Prompts and continuations for the effect of every demonstration, and the variants of vectors."""

import re
from itertools import combinations, product
from pathlib import Path

import pandas as pd
import pytest

DATA = Path(__file__).resolve().parents[1] / "data"
IDS = "1 2 3 4 5 6 7 8 9 10 11 12a 12b 13 15a 15b 16 french-codeswitch shopping fishing".split()
ROLES = ["prompt", "prompt-control", "target", "reference"]
SPARE = 2  # tokens that a prompt must have behind the vector
# The source's own prompts that do not have them with smollm2-135m, as the README says.
SHORT = {"3": -3, "9": 1, "12b": 1, "13": 1}
# Words of the vectors (beginnings of words): plus side, minus side.
KEYS = {
    "1": ("love", "hate"),
    "2": ("intent|prais", "intent|hurt"),
    "3": ("bush|9/11|because", ""),
    "4": ("want|die|dying", "want|stay|alive"),
    "5": ("anger|angry", "calm"),
    "6": ("eiffel|tower|rome|roman", "eiffel|tower|france"),
    "7": ("dragon|live|berkeley", "people|live|berkeley"),
    "8": ("never|talk|people|hurt", "talk|people|hurt"),
    "9": ("talk|wedding|constant", "talk|wedding|constant"),
    "10": ("intent|convert|christ", "intent|hurt"),
    "11": ("love", ""),
    "12a": ("anger|angry", "calm"),
    "12b": ("talk|wedding|constant", "talk|wedding|constant"),
    "13": (r"je\b|m'appelle", r"my\b|name|is\b"),
    "15a": ("love", "hate"),
    "15b": ("wedding", ""),
    "16": ("goose|geese|aaaahhhh|phrase", "goose|geese"),
    "french-codeswitch": ("", ""),
    "shopping": ("shop", ""),
    "fishing": ("fish", ""),
}


def table(name):
    return pd.read_csv(DATA / f"{name}.csv", keep_default_na=False, dtype={"demonstration": str})


def effects(demonstration=None, role=None):
    rows = table("demonstration_effects")
    if demonstration is not None:
        rows = rows[rows["demonstration"] == demonstration]
    return rows if role is None else rows[rows["role"] == role]


def texts(demonstration, role):
    return list(effects(demonstration, role)["text"])


def words(text):
    return set(re.findall(r"[a-z']+", text.lower()))


@pytest.fixture(scope="module")
def count(model):
    """Tokens of a text with smollm2-135m, BOS not counted."""
    return lambda text: len(model.tokenizer(text, add_special_tokens=False)["input_ids"])


def vector_sides(demonstration):
    """Every prompt whose stream goes into the vector of a demonstration."""
    one = pd.read_csv(DATA / "demonstrations.csv", keep_default_na=False).set_index("id")
    sides = [one.at[demonstration, "plus"], one.at[demonstration, "minus"]]
    return [side for side in sides if side] or codeswitch()


def codeswitch():
    mixtures = []
    for _, rows in table("codeswitch").groupby("sentence"):
        english, french = list(rows["english"]), list(rows["french"])
        mixtures += [" ".join(english[:i] + french[i:]) for i in range(len(rows) + 1)]
    return mixtures


# --- demonstration_effects.csv -----------------------------------------------------------------


def test_columns_and_values():
    rows = effects()
    assert list(rows.columns) == ["demonstration", "role", "split", "origin", "text"]
    assert list(rows["demonstration"].unique()) == IDS
    known = pd.read_csv(DATA / "demonstrations.csv", dtype=str)["id"]
    assert set(known) - set(IDS) == {"14", "french-codeswitch-16", "french-codeswitch-6"}
    assert set(rows["role"]) == set(ROLES)
    assert set(rows["origin"]) == {"source", "ours"}
    prompt = rows["role"].str.startswith("prompt")
    assert set(rows.loc[prompt, "split"]) == {"dev", "test"}
    assert set(rows.loc[~prompt, "split"]) == {"both"}
    assert not rows.duplicated(["demonstration", "text"]).any()


@pytest.mark.parametrize("demonstration", IDS)
def test_counts(demonstration):
    prompts = effects(demonstration, "prompt")
    assert prompts["split"].value_counts().to_dict() == {"test": 9, "dev": 6}
    for role in ("target", "reference"):
        assert len(texts(demonstration, role)) == 9


@pytest.mark.parametrize("demonstration", IDS)
def test_the_prompt_of_the_source_is_a_test_prompt(demonstration):
    known = pd.read_csv(DATA / "demonstrations.csv", dtype=str).set_index("id")["prompt"]
    prompts = effects(demonstration, "prompt").set_index("text")
    assert prompts.at[known[demonstration], "split"] == "test"
    of_source = list(prompts.index[prompts["origin"] == "source"])
    # the prompt of french-codeswitch is not the comment's
    assert of_source == ([] if demonstration == "french-codeswitch" else [known[demonstration]])


@pytest.mark.parametrize("demonstration", IDS)
def test_no_two_prompts_are_alike(demonstration):
    for a, b in combinations(texts(demonstration, "prompt"), 2):
        assert len(words(a) & words(b)) < 0.5 * len(words(a) | words(b)), (a, b)


def test_a_prompt_is_on_the_same_side_wherever_it_is_used():
    splits = effects(role="prompt").groupby("text")["split"].nunique()
    assert (splits == 1).all()


def test_number_16_has_every_prompt_with_another_bird():
    prompts, controls = effects("16", "prompt"), effects("16", "prompt-control")
    assert len(effects(role="prompt-control")) == len(controls)
    assert prompts["text"].str.contains("goose|geese").all()
    swapped = prompts["text"].str.replace("goose", "duck").str.replace("geese", "ducks")
    assert list(controls["text"]) == list(swapped)
    assert list(controls["split"]) == list(prompts["split"])


@pytest.mark.parametrize("demonstration", IDS)
def test_prompts_are_longer_than_the_vector(demonstration, count):
    vector = max(map(count, vector_sides(demonstration)))  # BOS stands in front of both
    for row in effects(demonstration).itertuples():
        if row.role.startswith("prompt"):
            spare = count(row.text) - vector
            if row.origin == "source" and demonstration in SHORT:
                assert spare == SHORT[demonstration]
            else:
                assert spare >= SPARE, row.text


@pytest.mark.parametrize("demonstration", IDS)
def test_targets_and_references_are_equally_long(demonstration, count):
    lengths = {r: list(map(count, texts(demonstration, r))) for r in ("target", "reference")}
    for length in lengths.values():
        assert min(length) >= 2 and max(length) <= 6
    mean = {role: sum(length) / len(length) for role, length in lengths.items()}
    assert abs(mean["target"] - mean["reference"]) < 1


@pytest.mark.parametrize("demonstration", IDS)
def test_few_continuations_repeat_the_vector(demonstration):
    for role, key in zip(("target", "reference"), KEYS[demonstration], strict=True):
        given = texts(demonstration, role)
        echo = [text for text in given if key and re.search(rf"\b({key})", text.lower())]
        assert len(echo) <= len(given) / 3, echo


@pytest.mark.parametrize("demonstration", IDS)
def test_prompt_and_continuation_meet_at_a_token(demonstration, model):
    def ids(text):
        return model.tokenizer(text, add_special_tokens=False)["input_ids"]

    prompts = texts(demonstration, "prompt") + texts(demonstration, "prompt-control")
    continuations = texts(demonstration, "target") + texts(demonstration, "reference")
    for prompt, continuation in product(prompts, continuations):
        assert ids(prompt) + ids(continuation) == ids(prompt + continuation)


def test_texts_are_clean():
    rows = effects()
    prompt = rows["role"].str.startswith("prompt")
    assert (rows.loc[prompt, "text"] == rows.loc[prompt, "text"].str.strip()).all()
    rest = rows.loc[~prompt, "text"]
    assert rest.str.fullmatch(r" \S.*\S").all() and not rest.str.contains("  ").any()
    french = rows["demonstration"].isin(["13", "french-codeswitch"]) & (rows["role"] == "target")
    assert rows.loc[~french, "text"].str.isascii().all()


# --- demonstration_variants.csv ----------------------------------------------------------------

VARIANTS = (
    "demonstration variant plus minus layer_of_48 coefficient at made_at_layer_of_48 "
    "prompt_override source note"
).split()


def test_variants():
    rows = table("demonstration_variants")
    assert list(rows.columns) == VARIANTS
    assert set(rows["demonstration"]) <= set(IDS)
    assert rows["variant"].str.fullmatch(r"[a-z0-9.-]+").all()
    assert rows["layer_of_48"].between(0, 47).all() and (rows["coefficient"] > 0).all()
    assert (rows["made_at_layer_of_48"] <= rows["layer_of_48"]).all()
    assert set(rows["at"]) == {"front", "middle", "back"}
    assert set(rows["prompt_override"]) == {"", "{} a"}
    assert (rows["source"].str.len() > 0).all() and (rows["note"].str.len() > 0).all()
    assert not rows.duplicated(["demonstration", "variant", "plus", "minus"]).any()
    # nothing on either side means the vector of codeswitch.csv
    empty = (rows["plus"] == "") & (rows["minus"] == "")
    assert (empty == rows["variant"].str.startswith("codeswitch-")).all()
    assert (rows.loc[empty, "demonstration"] == "french-codeswitch").all()


def test_rows_of_one_variant_belong_together():
    rows = table("demonstration_variants")
    names = list(zip(rows["demonstration"], rows["variant"], strict=True))
    runs = [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]
    assert len(runs) == len(set(runs))
    several = {v for (d, v), one in rows.groupby(["demonstration", "variant"]) if len(one) > 1}
    assert several == {"love-and-wedding", "phrases-6", "phrases-20"}


def test_strings_of_the_source_to_the_space():
    rows = table("demonstration_variants")
    pairs = set(zip(rows["plus"], rows["minus"], strict=True))
    assert pairs >= {
        ("Love", ""),
        ("Love", " "),
        ("Love", "<|endoftext|>"),
        ("Hate", "Love"),
        (" wedding", " "),
        (" anger", "calm"),
        ("Anger", "Calm"),
        ("The following text is in French: ' ", "The following text is in English: ' "),
        (
            "I'm from Quebec et je glisse souvent accidentellement vers le français",
            "I only speak English because I'm a monolingual American",
        ),
    }


def test_variants_fit_into_the_prompts_of_this_repository(count):
    for row in table("demonstration_variants").itertuples():
        sides = [side for side in (row.plus, row.minus) if side] or codeswitch()
        vector = max(map(count, sides))
        prompts = effects(row.demonstration, "prompt")
        for prompt in prompts.loc[prompts["origin"] == "ours", "text"]:
            prompt = (row.prompt_override or "{}").format(prompt)
            assert count(prompt) - vector >= SPARE, (row.variant, prompt)


@pytest.mark.parametrize("name", ["demonstration_effects", "demonstration_variants"])
def test_files_are_plain_utf8(name):
    raw = (DATA / f"{name}.csv").read_bytes().decode("utf-8")
    assert raw.endswith("\n") and "\r" not in raw and "\t" not in raw
