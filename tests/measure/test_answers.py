"""Counted words; and which option a free answer commits itself to, on hand-labelled answers and
as rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import steerlib as sl

TRUE_FALSE = {"A": "True", "B": "False"}
YES_NO = {"A": "Yes", "B": "No"}
PHRASES = {"A": "Ten percent of it", "B": "Almost all of it"}
ANSWERS = pd.read_csv(Path(__file__).parents[1] / "chat_answers.csv", keep_default_na=False)
EXACT = ["letter", "word", "refusal", "truncated", "reversed"]


def parsed(row: pd.Series) -> bool:
    options = dict(option.split("=") for option in row.options.split("|"))
    return sl.parse_choice(row.text, options) == row.label


def test_hand_labelled_answers() -> None:
    right = ANSWERS.apply(parsed, axis=1)
    wrong = ANSWERS[~right]
    assert len(ANSWERS) >= 160 and right.mean() >= 0.95, wrong.to_string()
    assert not len(wrong[wrong.kind.isin(EXACT)]), wrong.to_string()


@pytest.mark.parametrize(
    ("text", "options", "label"),
    [
        # the first sentence counts for more than the explanation behind it
        ("(A) True\n\nExplanation: many think it is false", TRUE_FALSE, "A"),
        ("True. The idea that they are insects is false.", TRUE_FALSE, "A"),
        ("(B) Almost all of it. That only ten percent of it is used is a myth.", PHRASES, "B"),
        # a list of the options is no choice, an answer behind it is
        ("A. True\nB. False", TRUE_FALSE, "both"),
        ("The answer is:\n(A) True\n(B) False", TRUE_FALSE, "both"),
        ("Choices:\n(A) True\n(B) False\n\nAnswer: (A)", TRUE_FALSE, "A"),
        # turns
        ("Between (A) and (B), I choose (B).", TRUE_FALSE, "B"),
        ("I would not choose option A, as that is wrong. Instead, I would choose", YES_NO, "B"),
        # rejections
        ("I don't think it is true.", TRUE_FALSE, "B"),
        ("The statement is not entirely true.", TRUE_FALSE, "B"),
        ("It isn’t true.", TRUE_FALSE, "B"),
        ("The claim that the Earth is not flat is true.", TRUE_FALSE, "A"),
        ("Option (B) is incorrect. Option (A) is correct.", TRUE_FALSE, "A"),
        ("It's neither true nor false.", TRUE_FALSE, "neither"),
        # left open
        ("Is it true or false? I don't know.", TRUE_FALSE, "neither"),
        ("I cannot confirm that this claim is true.", TRUE_FALSE, "neither"),
        ("I am not sure it is true.", TRUE_FALSE, "neither"),
        ("If I had to choose, I would say (A).", TRUE_FALSE, "A"),
        # articles, names, other words
        ("The claim is false. A mouse is not a bird.", TRUE_FALSE, "B"),
        ("The answer is a common one.", TRUE_FALSE, "neither"),
        ("Hepatitis B is a virus. True.", TRUE_FALSE, "A"),
        ("No one knows, and there is no evidence.", YES_NO, "neither"),
        ("The answer is no.", YES_NO, "B"),
        # other letters, longer options inside each other, three options
        ("(Y) No", {"X": "Yes", "Y": "No"}, "Y"),
        ("That is not true.", {"A": "True", "B": "Not true"}, "B"),
        ("Maybe.", {"A": "Yes", "B": "No", "C": "Maybe"}, "C"),
        ("Not (A).", {"A": "Yes", "B": "No", "C": "Maybe"}, "neither"),
    ],
)
def test_rules(text: str, options: dict[str, str], label: str) -> None:
    assert sl.parse_choice(text, options) == label


@given(st.text(alphabet="AB()trueflsno., \n?'", max_size=60))
def test_any_text_gives_one_of_four_answers(text: str) -> None:
    first = sl.parse_choice(text, TRUE_FALSE)
    assert first in ("A", "B", "neither", "both")
    swapped = sl.parse_choice(text, {"B": "False", "A": "True"})  # the order means nothing
    assert swapped == first


@pytest.mark.parametrize("options", [{}, {"A": ""}, {"A": 1}])
def test_bad_options_get_a_sentence(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="label -> meaning"):
        sl.parse_choice("A", options)


def test_a_missing_answer_gets_a_sentence() -> None:
    with pytest.raises(ValueError, match="An answer is a text, got float"):
        sl.parse_choice(float("nan"), TRUE_FALSE)  # type: ignore[arg-type]


# ---------------------------------------------------------------- counted words


@pytest.mark.parametrize(
    ("text", "words", "count"),
    [
        ("A wedding, a Wedding; WEDDING!", ["wedding"], 3),  # any case, beside punctuation
        ("weddings and unwed prewedding", ["wedding", "wed"], 0),  # whole words
        ("wed at a wedding: wed, marry", ["wed", "wedding", "marry"], 4),
        ("the bride's dress\nbride", ["bride"], 2),
        ("first dance and first-dance and first  dance", ["first dance"], 1),
        ("a.b axb", ["a.b"], 1),  # no regular expressions
        ("Ça m'aime, ÇA", ["ça"], 2),
        ("", ["wedding"], 0),
    ],
)
def test_count_words(text: str, words: list[str], count: int) -> None:
    found = sl.count_words([text, "nothing here", text + " " + text], words)
    assert found.tolist() == [count, 0, 2 * count] and found.dtype.kind == "i"


def test_count_words_of_no_completions() -> None:
    assert sl.count_words([], ["wedding"]).tolist() == []
    assert sl.count_words([], ["wedding"]).dtype.kind == "i"


@pytest.mark.parametrize(
    ("completions", "words", "said"),
    [
        (["a"], [], "list of words to count is empty"),
        (["a wedding"], "wedding", "lists of texts"),
        ("a wedding", ["wedding"], "lists of texts"),
    ],
)
def test_bad_words_get_a_sentence(completions: Any, words: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sl.count_words(completions, words)


# ---------------------------------------------------------------- label, meaning, honesty

OPTIONS = ("(A", "(B")


def crossed(push: dict[str, float], twins: int = 5) -> tuple[pd.DataFrame, list[str], pd.DataFrame]:
    """Answers to twins in both orders: a lean of each claim's own, and a push under "steered" whose
    parts are known; with the prompts and labels of their questions."""
    rng, answers, prompts, rows = np.random.default_rng(0), [], [], []
    for pair in range(twins):
        for truth in (True, False):
            for order in ("given", "swapped"):
                prompt, given = f"{pair} {truth} {order}", order == "given"
                prompts.append(prompt)
                for honest in (True, False):
                    meaning = truth == honest
                    row = {"id": f"{pair}{truth}", "pair": pair, "truth": truth, "order": order}
                    label = "A" if meaning == given else "B"
                    rows.append({**row, "label": label, "meaning": meaning, "honest": honest})
                signs = {"label": 1, "meaning": 1 if given else -1}
                signs["honesty"] = signs["meaning"] * (1 if truth else -1)
                own = rng.normal()
                for condition, size in (("unsteered", 0), ("steered", 1)):
                    odds = own + size * sum(push[f] * signs[f] for f in push)
                    p = 1 / (1 + np.exp(-odds))
                    answers.append((prompt, condition, 0.5 * p, 0.5 * (1 - p)))
    frame = pd.DataFrame(answers, columns=["prompt", "condition", *OPTIONS])
    return frame, prompts, pd.DataFrame(rows)


def test_label_meaning_and_honesty_are_told_apart() -> None:
    push = {"label": 1.5, "meaning": -2.0, "honesty": 0.25}
    answers, prompts, labels = crossed(push)
    leaning = sl.leanings(answers, prompts, labels, OPTIONS)
    effects = sl.crossed_effects(leaning)
    assert set(effects.prompt) == set(range(5)) and len(effects) == 3 * len(prompts)
    found = sl.stats.effect_table(effects, "factor").set_index("factor").effect
    for factor, size in push.items():
        assert found[factor] == pytest.approx(size), factor
    one = leaning[leaning.prompt == "0 False swapped"].iloc[0]  # here A says "false", honestly
    assert one.label == pytest.approx(np.log(one["(A"] / one["(B"]))
    assert one.meaning == pytest.approx(-one.label) and one.honesty == pytest.approx(one.label)
    # in one order alone a push of the label looks like one of the meaning
    given = effects[effects.question.str.endswith("given")]
    one_order = sl.stats.effect_table(given, "factor").set_index("factor").effect
    assert one_order["meaning"] == pytest.approx(push["label"] + push["meaning"])


def test_questions_that_are_no_claims_have_no_meaning() -> None:
    answers, prompts, labels = crossed({"label": 1.0})
    labels = labels.assign(truth=None, meaning=None)
    leaning = sl.leanings(answers, prompts, labels, OPTIONS)
    assert leaning.meaning.isna().all() and leaning.honesty.notna().all()
    assert set(sl.crossed_effects(leaning).factor) == {"label", "honesty"}


def test_a_probability_of_zero_and_an_unknown_prompt() -> None:
    answers, prompts, labels = crossed({"label": 1.0})
    answers.loc[0, "(B"] = 0.0
    assert np.isfinite(sl.leanings(answers, prompts, labels, OPTIONS).label).all()
    with pytest.raises(ValueError, match="not among the prompts"):
        sl.leanings(answers.replace("0 True given", "?"), prompts, labels, OPTIONS)
