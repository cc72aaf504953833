"""Text and token ids: BOS, single tokens, padding."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from conftest import make_tokenizer, only_tokenizer, spacing_tokenizer
from hypothesis import given
from hypothesis import strategies as st

import steerlib as sl
from steerlib import tokens


def test_bos_stands_in_front_exactly_once(tiny: Any, model: Any) -> None:
    with_bos, without = tiny("llama")[0], tiny("llama", bos=False)[0]
    plain_ids = without.tokenizer("I love dogs")["input_ids"]
    assert sl.encode(with_bos, "I love dogs") == [0, *plain_ids]
    assert sl.encode(with_bos, "<s>I love dogs") == [0, *plain_ids]
    assert sl.encode(without, "I love dogs") == plain_ids
    chat = [{"role": "user", "content": "Hello"}]
    text = model.tokenizer.apply_chat_template(chat, tokenize=False)
    ids = model.tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    assert sl.encode(model, text) == ids
    assert ids[0] == model.tokenizer.bos_token_id and len(ids) > 5


def test_prompts_are_texts_or_ids(tiny: Any) -> None:
    model, _ = tiny("llama")
    ids = sl.encode(model, "I love dogs")
    for prompt in ("I love dogs", ids, tuple(ids), torch.tensor(ids)):
        assert tokens.prompt_ids(model, prompt) == ids
    assert tokens.prompt_ids(model, ids[1:]) == ids[1:]  # as they are: no BOS
    assert tokens.continuation_ids(model, "I love dogs") == ids[1:]
    assert "".join(tokens.token_texts(model, ids[1:])) == "I love dogs"
    assert tokens.vocabulary(model.tokenizer, 380)[ids[3]] == model.tokenizer.decode([ids[3]])
    assert tokens.single_token(model, "a") == model.tokenizer.convert_tokens_to_ids("a")


def test_a_space_in_front_is_of_a_beginning_only() -> None:
    """Llama 2 reads "(A" and the label alone as other tokens: a label after "(" has no space."""
    model = only_tokenizer(spacing_tokenizer())
    ids = sl.encode(model, "I love dogs")
    assert ids == [model.tokenizer.bos_token_id, *tokens.first_ids(model, "I love dogs")]
    pairs = {"I said": " because", "(": "A", "I": " ", "dog": "s and", "a": "\nB"}
    for start, more in pairs.items():
        whole = sl.encode(model, start) + tokens.continuation_ids(model, more)
        assert model.tokenizer.decode(whole[1:]) == start + more
    assert tokens.token_texts(model, [tokens.single_token(model, "A")]) == ["A"]
    assert tokens.single_token(model, "A") == sl.encode(model, "(A")[-1]
    assert tokens.single_token(model, "A") != tokens.first_ids(model, "A")[-1]
    assert "".join(tokens.token_texts(model, ids[1:])) == " I love dogs"
    names = tokens.vocabulary(model.tokenizer, len(model.tokenizer))
    assert [names[i] for i in ids[1:]] == tokens.token_texts(model, ids[1:])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: sl.encode(m, None), "must be a string, got NoneType"),
        (lambda m: sl.encode(m, ""), "prompt '' is empty"),
        (lambda m: tokens.prompt_ids(m, 3), "a string, or a list of token ids, got int: 3"),
        (lambda m: tokens.prompt_ids(m, None), "a string, or a list of token ids, got NoneType"),
        (lambda m: tokens.prompt_ids(m, [1.5]), "a string, or a list of token ids, got list"),
        (lambda m: tokens.prompt_ids(m, []), r"prompt \[\] is empty"),
        (lambda m: tokens.continuation_ids(m, ""), "continuation '' is empty"),
        (lambda m: tokens.single_token(m, "zqx"), "'zqx' is 3 tokens"),
    ],
)
def test_bad_input_gets_a_sentence(tiny: Any, call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(tiny("llama")[0])


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=5))
def test_common_prefix(sequences: list[list[int]]) -> None:
    assert tokens.common_prefix(sequences) == len(os.path.commonprefix(sequences))


@given(st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=5))
def test_pad_left(rows: list[list[int]]) -> None:
    ids, mask = tokens.pad_left(rows, 0, "cpu")
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    for row, i, m in zip(rows, ids, mask, strict=True):
        n = len(row)
        assert i[m.bool()].tolist() == row and i.tolist()[len(i) - n :] == row
        assert m.tolist() == [0] * (len(m) - n) + [1] * n


def test_columns_of() -> None:
    ids = torch.zeros(2, 5)
    assert tokens.columns_of(ids).tolist() == []
    assert tokens.columns_of(ids, -1, 0, 2).tolist() == [4, 0, 2]


# ---------------------------------------------------------------- chat prompts


def test_a_template_without_system_prompt_says_so() -> None:
    model = only_tokenizer(make_tokenizer())
    model.tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{{ messages[0]['content'] }}"
    )
    assert tokens.chat_prompt(model, "Hello", prefill="(") == "Hello("
    with pytest.raises(ValueError, match="refuses the prompt: System role not supported"):
        tokens.chat_prompt(model, "Hello", system="Be brief.")


def test_prompts_without_a_chat_template() -> None:
    plain = only_tokenizer(make_tokenizer())
    assert tokens.chat_prompt(plain, "Answer:", "Be brief.", "(") == "Be brief.\n\nAnswer: ("
    assert tokens.chat_prompt(plain, "Answer:") == "Answer:"
