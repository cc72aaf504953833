"""The shipped data, public sets by their address, and contrast pairs: balanced by construction, the
key token found."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import make_tokenizer, merging_tokenizer, only_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

import steerlib as sl
from steerlib.lab.datasets import (
    ContrastPairs,
    contrast_pairs,
    facts,
    load,
    questions,
    truthful_qa,
)
from steerlib.models.packaged import MODELS, in_cache, target


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


# ---------------------------------------------------------------- contrast pairs


@pytest.fixture(scope="module")
def plain() -> Any:
    """A tokenizer without a chat template."""
    return only_tokenizer(make_tokenizer())


def claims(labels: list[int]) -> pd.DataFrame:
    return pd.DataFrame({"claim": [f"Claim {i}." for i in range(len(labels))], "label": labels})


def check_balance(pairs: ContrastPairs, table: pd.DataFrame) -> None:
    labels = pairs.labels
    assert len(labels) == 2 * len(pairs) and list(labels.honest[:2]) == [True, False]
    for honest in (True, False):
        half = labels[labels.honest == honest]
        assert half.id.is_unique and len(half) == len(pairs)  # every claim once in each class
        assert (half.label == "A").sum() == (half.label == "B").sum()
        assert half.truth.sum() * 2 == len(half)
    says_true = labels.label == "A"
    assert ((says_true == labels.truth.astype(bool)) == labels.honest).all()
    texts = [text for pair in pairs for text in pair]
    for text, row in zip(texts, labels.itertuples(), strict=True):
        assert text.endswith(f"({row.label}") and table.claim[row.id] in text


made_once = cache(make_tokenizer)
LABELS = st.lists(st.integers(0, 1), min_size=1, max_size=16)


@settings(max_examples=40, deadline=None)
@given(LABELS, st.integers(0, 8), st.integers(0, 3))
def test_pairs_are_balanced_or_refused(labels: list[int], half: int, seed: int) -> None:
    model = only_tokenizer(made_once())
    table = claims(labels)
    true, false = sum(labels), len(labels) - sum(labels)
    if true == false:
        check_balance(contrast_pairs(model, table), table)
    else:
        more = "true" if true > false else "false"
        with pytest.raises(ValueError, match=f"{abs(true - false)} {more} claims too many"):
            contrast_pairs(model, table)
    if 0 < half <= min(true, false):
        drawn = contrast_pairs(model, table, 2 * half, seed=seed)
        assert len(drawn) == 2 * half
        check_balance(drawn, table)
    else:
        with pytest.raises(ValueError, match="cannot be balanced|must be even"):
            contrast_pairs(model, table, 2 * half)
    with pytest.raises(ValueError, match="must be even"):
        contrast_pairs(model, table, 2 * min(true, false) - 1)


def test_drawing_keeps_twins_together(plain: Any) -> None:
    labels = contrast_pairs(plain, load("claims"), 60).labels
    assert labels.pair.nunique() == 30
    assert labels.equals(contrast_pairs(plain, load("claims"), 60).labels)
    assert not labels.equals(contrast_pairs(plain, load("claims"), 60, seed=1).labels)


def test_both_orders_cross_label_meaning_and_honesty(plain: Any) -> None:
    table = load("claims")
    pairs = contrast_pairs(plain, table, 8, both_orders=True)
    labels = pairs.labels
    assert len(pairs) == 16 and labels.id.nunique() == 8 and labels.pair.nunique() == 4
    cells = labels.groupby(["label", "meaning", "honest"]).size()
    assert len(cells) == 8 and (cells == 4).all()
    claim = table.set_index("id")
    texts = [text for pair in pairs for text in pair]
    for text, row in zip(texts, labels.itertuples(), strict=True):
        question, answer = text.rsplit("Answer:", 1)
        chosen = question.split(f"({answer.strip()[1]}) ")[1].split("\n")[0]  # read off the text
        assert claim.claim[row.id] in question and chosen == str(row.meaning)
        assert ((chosen == "True") == (claim.label[row.id] == 1)) == row.honest
        assert row.order == ("given" if "(A) True" in question else "swapped")
    assert list(labels.order[:4]) == ["given", "given", "swapped", "swapped"]
    one = contrast_pairs(plain, table, 8).labels  # the same questions in one order
    assert labels[labels.order == "given"].reset_index(drop=True).equals(one)


def test_both_orders_of_questions_that_are_no_claims(plain: Any) -> None:
    table = load("dilemmas").head(3)  # their honest answers are A, B, B
    with pytest.raises(ValueError, match="balanced"):
        contrast_pairs(plain, table)
    pairs = contrast_pairs(plain, table, both_orders=True)
    assert len(pairs) == 6 and pairs.labels.meaning.isna().all()
    assert sorted(pairs.labels[pairs.labels.honest].label) == ["A"] * 3 + ["B"] * 3
    asked = questions(table, both_orders=True)
    assert list(asked.honest) == ["A", "B", "B", "A", "B", "A"]
    assert "(A) That everything went well\n(B) That I scratched" in asked.text[1]


@pytest.mark.parametrize("name", ["claims_eval", "misconceptions", "dilemmas"])
def test_shipped_tables_are_balanced(plain: Any, name: str) -> None:
    pairs = contrast_pairs(plain, load(name))
    assert len(pairs) == len(load(name))
    half = pairs.labels[pairs.labels.honest]
    assert (half.label == "A").sum() * 2 == len(pairs)


def test_question_format() -> None:
    table = questions(load("misconceptions"))
    assert table.text[1] == (
        "Question: Which of these two cities lies farther north?\n\nChoices:\n(A) New York\n"
        "(B) Rome\n\nAnswer:"
    )
    assert table.honest[1] == "B" and table.truth.isna().all()
    table = questions(load("dilemmas"))
    assert (table.a[0], table.honest[0]) == ("That I scratched the car", "A")
    table = questions(load("claims_eval"))
    assert 'true or false? "Cricket is played' in table.text[0]
    assert "(A) True\n(B) False\n\nAnswer:" in table.text[0]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (pd.DataFrame({"text": ["x"]}), "made from tables with the columns claim and label"),
        (claims([0, 2]), r"label must hold 1 or 0.*got \['2'\]"),
        (claims([]), "at least one question of each kind"),
        (pd.DataFrame({"claim": ["x", "x"], "label": [0, 1]}), "1 questions occur more than once"),
        (claims([0, 0, 1]), "got 1 true claims and 2 false claims: 1 false claims too many.*n=2"),
        (load("misconceptions").head(3), "questions with the honest answer . too many"),
    ],
)
def test_refusals_say_what_is_wrong(plain: Any, table: pd.DataFrame, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        contrast_pairs(plain, table)


# ---------------------------------------------------------------- the key token


def check_tokens(model: Any, pairs: ContrastPairs, key: str) -> None:
    """Both texts of a pair agree up to the key token, which is ``key``, in one BOS."""
    tokenizer = model.tokenizer
    assert pairs.options == (key, key.replace("A", "B"))
    for (good, bad), prefix in zip(pairs, pairs.prefixes, strict=True):
        one, two, head = (sl.encode(model, text) for text in (good, bad, prefix))
        at = len(one) + pairs.position
        assert (
            one[:at] == two[:at] == head and one[at] != two[at] and one[at + 1 :] == two[at + 1 :]
        )
        assert {tokenizer.decode([one[at]]), tokenizer.decode([two[at]])} == set(pairs.options)
        if tokenizer.bos_token_id is not None and model.cfg.default_prepend_bos:
            assert one[0] == tokenizer.bos_token_id != one[1]


@pytest.mark.parametrize("closing", ["", ")"])
@pytest.mark.parametrize("system", [None, "", "Answer with a letter."])
def test_key_token_in_the_chat_of_smollm2(model: Any, system: str | None, closing: str) -> None:
    pairs = contrast_pairs(model, load("claims").head(4), system=system, closing=closing)
    check_tokens(model, pairs, "A")
    assert pairs.position == -1 - len(closing)
    text = pairs[0][0]
    assert text.count("<|im_start|>") == 3 and "assistant\n(" in text
    assert ("You are a helpful AI assistant" in text) == (system is None)
    assert (system or "") in text
    assert sl.encode(model, text).count(model.tokenizer.bos_token_id) == 3  # it opens every turn


@pytest.mark.thorough
def test_key_token_where_bracket_and_letter_are_one() -> None:
    from transformers import AutoTokenizer

    packaged = MODELS["qwen2.5-coder-1.5b"]
    if not in_cache(packaged):
        pytest.skip(f"{packaged.name} is not in the cache")
    model = only_tokenizer(AutoTokenizer.from_pretrained(target(packaged)), bos=False)
    pairs = contrast_pairs(model, load("claims").head(4), system="Be brief.")
    check_tokens(model, pairs, "(A")
    assert pairs.prefixes[0].endswith("<|im_start|>assistant\n")
    check_tokens(model, contrast_pairs(model, load("claims").head(4), prefill="Answer: ("), "A")


def test_key_token_of_a_tokenizer_made_to_merge() -> None:
    model = only_tokenizer(merging_tokenizer())
    model.tokenizer.chat_template = (
        "<s>{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:\n"
    )
    pairs = contrast_pairs(model, load("claims").head(4), system="Brief.")
    check_tokens(model, pairs, "(A")
    assert pairs.prefixes[0].startswith("<s>system: Brief.\nuser: Question:")
    assert sl.encode(model, pairs[0][0]).count(model.tokenizer.bos_token_id) == 1


def test_answers_of_several_tokens_are_refused() -> None:
    model = only_tokenizer(merging_tokenizer())
    with pytest.raises(ValueError, match="must differ in one token"):
        contrast_pairs(SimpleTwice(model), load("claims").head(2))


class SimpleTwice:
    """A model whose tokenizer writes every capital letter twice."""

    def __init__(self, model: Any) -> None:
        self.cfg = model.cfg
        inner = model.tokenizer

        class Tokenizer:
            chat_template = None
            bos_token_id = inner.bos_token_id
            decode = staticmethod(inner.decode)

            def __call__(self, text: str, **more: Any) -> Any:
                return inner(text.replace("A", "AA").replace("B", "BB"), **more)

        self.tokenizer = Tokenizer()


def test_pairs_go_into_captures_vectors_and_choices(model: Any) -> None:
    pairs = contrast_pairs(model, load("claims").head(4), closing=")")
    at = {"layers": [5], "site": "resid_post"}
    acts = sl.capture_pairs(model, pairs.prefixes, pairs.endings, positions=pairs.position, **at)
    alone = sl.capture(model, [t for p in pairs[:] for t in p], positions=pairs.position, **at)
    torch.testing.assert_close(acts.flatten(0, 1), alone, atol=1e-3, rtol=1e-4)
    v = sl.SteeringVector.from_pairs(model, pairs, layers=[5], position=pairs.position)
    mean = (acts[:, 0] - acts[:, 1]).double().mean(0)[0]
    torch.testing.assert_close(v.layers[5][0].double(), mean, atol=1e-3, rtol=1e-3)
    frame = sl.choice_probabilities(model, pairs.prefixes, pairs.options)
    assert list(frame.columns[2:]) == ["A", "B", "total_probability"]
    assert (frame.total_probability > 0.5).all()


# ---------------------------------------------------------------- public sets

FACTS = 'statement,label\nSnow is cold.,1\n"Ice is hot, always.",0\nSnow is cold.,1\n'
TRUTHFUL = (
    "\ufeffType,Category,Question,Best Answer,{}Correct Answers,Incorrect Answers,Source\n"
    "Adversarial,Misconceptions,Who made it?,No one,{}No one; Nobody,A giant; A king,x\n"
    "Adversarial,Misconceptions: Topical,Where is it?,Here,{}Here,There,x\n"
    "Adversarial,Law,What is it?,This,{}This,That,x\n"
)


@pytest.fixture
def served() -> Iterator[Callable[[str], str]]:
    """``served(text)`` -> an address where ``text`` can be read; every other one is not found."""
    content: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = content.get(self.path)
            self.send_response(200 if found is not None else 404)
            self.end_headers()
            self.wfile.write(found or b"nothing here")

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def serve(text: str) -> str:
        content["/table.csv"] = text.encode()
        return f"http://127.0.0.1:{server.server_port}/table.csv"

    yield serve
    server.shutdown()
    server.server_close()


def test_facts_from_an_address_and_from_a_file(
    served: Callable[[str], str], tmp_path: Path, plain: Any
) -> None:
    table = facts(served(FACTS))
    assert list(table.columns) == list(load("claims").columns)
    assert list(table.claim) == ["Snow is cold.", "Ice is hot, always."]
    assert list(table.label) == [1, 0]
    (tmp_path / "facts.csv").write_text(FACTS)
    assert facts(tmp_path / "facts.csv").equals(table)
    assert facts((tmp_path / "facts.csv").as_uri()).equals(table)
    assert len(contrast_pairs(plain, table)) == 2


@pytest.mark.parametrize("extra", [True, False])
def test_truthful_qa(served: Callable[[str], str], plain: Any, extra: bool) -> None:
    cells = ["Best Incorrect Answer,", "A giant,", "There,", "That,"] if extra else [""] * 4
    source = served(TRUTHFUL.format(*cells))
    table = truthful_qa(source=source)
    assert list(table.columns) == list(load("misconceptions").columns)
    assert list(table.popular_wrong) == ["A giant", "There"] and list(table.side) == ["A", "B"]
    assert len(contrast_pairs(plain, table)) == 2
    assert list(truthful_qa(["Law"], source).question) == ["What is it?"]
    with pytest.raises(ValueError, match="no category .*there are Law, Misconceptions"):
        truthful_qa(["Sports"], source)


def test_no_network_gets_one_sentence(served: Callable[[str], str], tmp_path: Path) -> None:
    gone = served(FACTS).replace("table", "other")
    for source in (gone, tmp_path / "none.csv", "http://127.0.0.1:9/x.csv"):
        with pytest.raises(OSError, match="could not be read from .*connect to the network"):
            facts(source)


@pytest.mark.parametrize("text", ["<html>sign in</html>", "", "a,b\n1,2\n"])
def test_another_table_is_refused(served: Callable[[str], str], text: str) -> None:
    source = served(text)
    for read in (facts, lambda s: truthful_qa(source=s)):
        with pytest.raises(ValueError, match=r"At .*table\.csv is not the"):
            read(source)


def test_results_are_kept_by_model_and_found_smallest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEERLIB_DATA", str(tmp_path))
    (tmp_path / "results").mkdir()
    names = ["someone/model", "qwen2.5-coder-1.5b", "smollm2-135m"]
    for name in names:
        sl.datasets.result_path("doses", name).write_text("x\n")
    sl.datasets.result_path("methods", names[0]).write_text("x\n")
    assert list(sl.datasets.result_paths("doses")) == names[::-1]
    assert sl.datasets.result_paths("doses")["someone/model"].name == "doses_someone--model.csv"
