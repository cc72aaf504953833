"""Text and token ids: BOS, padding, chat prompts.

Positions count tokens in the *unpadded* sequence, BOS included. Batches are padded on the left, so
that the last prompt token of every row stands in the last column and decoding can go on from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import index
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Prompt = str | Sequence[int]  # a text, or its token ids as `encode` gives them


@dataclass(frozen=True)
class Prefix:
    """Text in front of every prompt, between BOS and the prompt: prompting, as a condition.

    Alone or in a list with interventions, so that an instruction, a vector and both together run
    in one sweep: ``{"both": [sl.Prefix("In French: "), vector]}``. The tokens of the prompt stay
    what they are; the prefix is part of it, so ``generated``, ``back`` and negative positions keep
    their tokens, while ``front`` and positions from 0 count from the prefix on.
    """

    text: str


def encode(model: TransformerBridge, text: str) -> list[int]:
    """Token ids of ``text`` as the model should see it: BOS in front exactly once.

    BOS is added if the model has one (``model.cfg.default_prepend_bos``) and the text does not
    already begin with it, as text from a chat template often does.

    Raises:
        ValueError: ``text`` is not a string, or gives no token at all.
    """
    if not isinstance(text, str):
        raise ValueError(f"A prompt must be a string, got {type(text).__name__}: {text!r}.")
    ids = first_ids(model, text, "prompt")
    bos = model.tokenizer.bos_token_id
    missing = model.cfg.default_prepend_bos and bos is not None and ids[:1] != [bos]
    return [bos, *ids] if missing else ids


def prompt_ids(model: TransformerBridge, prompt: Prompt) -> list[int]:
    """The token ids of a prompt: of a text as `encode` gives them, of token ids as they are.

    Raises:
        ValueError: it is neither, or empty.
    """
    if isinstance(prompt, str):
        return encode(model, prompt)
    try:
        ids = [index(i) for i in prompt]
    except TypeError:
        got = f"got {type(prompt).__name__}: {prompt!r}"
        raise ValueError(f"A prompt must be a string, or a list of token ids, {got}.") from None
    if not ids:
        raise ValueError("The prompt [] is empty: it has to give at least one token.")
    return ids


def first_ids(model: TransformerBridge, text: str, what: str = "text") -> list[int]:
    """Token ids of a text that begins a prompt, without BOS; ``what`` it is, for the error.

    Raises:
        ValueError: it gives no token.
    """
    ids = list(model.tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise ValueError(f"The {what} {text!r} is empty: it has to give at least one token.")
    return ids


def continuation_ids(model: TransformerBridge, text: str) -> list[int]:
    """Token ids of a text that goes on from another: no BOS, and no space that is not in the text,
    as tokenizers of SentencePiece's kind (Llama 2, Mistral) put it in front of what they are given.

    Raises:
        ValueError: it gives no token.
    """
    ids = first_ids(model, text, "continuation")
    if _adds_space(model.tokenizer):  # but not behind a line break, which merges with nothing
        start, both = first_ids(model, "\n"), first_ids(model, "\n" + text)
        return both[len(start) :] if both[: len(start)] == start else ids
    return ids


def token_texts(model: TransformerBridge, ids: Iterable[int]) -> list[str]:
    """Every token as text, with the space that it begins with."""
    return _texts(model.tokenizer, ids)


@lru_cache(maxsize=2)
def vocabulary(tokenizer: Any, size: int) -> list[str]:
    """Every token of the vocabulary as text; kept, for decoding takes longer than a pass."""
    return _texts(tokenizer, range(size))


def _texts(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    # Decoding takes an added space away again: behind another token there is none to take.
    start = tokenizer("a", add_special_tokens=False)["input_ids"] if _adds_space(tokenizer) else []
    texts = tokenizer.batch_decode([[*start, i] for i in ids])
    return [text[1 if start else 0 :] for text in texts]


@lru_cache(maxsize=8)
def _adds_space(tokenizer: Any) -> bool:
    """Whether it puts a space in front of a text."""
    first = tokenizer("a", add_special_tokens=False)["input_ids"][:1]
    return "".join(tokenizer.convert_ids_to_tokens(first)).startswith(("▁", "Ġ"))


def single_token(model: TransformerBridge, text: str) -> int:
    """The one token that ``text`` is, where it goes on from another.

    Raises:
        ValueError: it is several.
    """
    ids = continuation_ids(model, text)
    if len(ids) != 1:
        found = f"{len(ids)} tokens for {model.cfg.model_name} ({token_texts(model, ids)})"
        raise ValueError(f"{text!r} is {found}, not 1.")
    return int(ids[0])


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens that all sequences share."""
    lists = list(map(list, sequences))
    low, high = min(lists), max(lists)  # lexicographic: the two that differ earliest
    for i, (a, b) in enumerate(zip(low, high, strict=False)):
        if a != b:
            return i
    return min(len(low), len(high))


# ---------------------------------------------------------------- batches


def pad_left(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and attention mask, both ``[row, column]``, padded on the left to equal length."""
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for r, ids in enumerate(rows):
        if ids:
            tokens[r, width - len(ids) :] = torch.tensor(ids)
            mask[r, width - len(ids) :] = 1
    return tokens.to(device), mask.to(device)


def pad_id(model: TransformerBridge) -> int:
    """The token that fills padding columns; masked everywhere, so any valid id will do."""
    pad = model.tokenizer.pad_token_id
    return 0 if pad is None else int(pad)


def input_device(model: TransformerBridge) -> torch.device:
    """Where tokens must be: the device of the embedding (models may span several devices)."""
    return model.original_model.get_input_embeddings().weight.device


def columns_of(tokens: torch.Tensor, *columns: int) -> torch.Tensor:
    """As ``logits_to_keep``: the unembedding of these columns alone, of none if none are named.

    Column numbers rather than a count: a count makes transformers unembed a strided view, which
    falls into a slow kernel.
    """
    width = tokens.shape[1]
    return torch.tensor([c % width for c in columns], dtype=torch.long, device=tokens.device)


# ---------------------------------------------------------------- chat


def chat_prompt(
    model: TransformerBridge, text: str, system: str | None = None, prefill: str = ""
) -> str:
    """``text`` as the user's turn of a chat, up to where the model goes on.

    Args:
        system: the system prompt; None leaves the one that the chat template has by default.
        prefill: what the answer begins with, such as "(".

    Returns:
        A prompt as `encode` takes it. Without a chat template, system prompt, text and prefill in
        plain text.

    Raises:
        ValueError: the chat template knows no system prompt.
    """
    tokenizer = model.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        return (f"{system}\n\n" if system else "") + text + (f" {prefill}" if prefill else "")
    turns = [{"role": "user", "content": text}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    try:
        start = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever the template raises, mostly "System role not supported"
        raise ValueError(f"The chat template of this model refuses the prompt: {error}.") from error
    return start + prefill


def key_token(model: TransformerBridge, texts: dict[str, str], label_start: int) -> tuple[int, int]:
    """Where two texts, which end in answer label A and B, differ: the one key token.

    Args:
        texts: ``{"A": text, "B": text}``.
        label_start: the character at which the label stands.

    Returns:
        The key token's position, from the end, and its first character: "A", or "(A" where that
        is one token.

    Raises:
        ValueError: they differ in more than one token, or cannot be cut in front of it.
    """
    ids = {side: encode(model, text) for side, text in texts.items()}
    differ = [i for i, (a, b) in enumerate(zip(ids["A"], ids["B"], strict=False)) if a != b]
    token = {side: model.tokenizer.decode([ids[side][i] for i in differ]) for side in "AB"}
    if (
        len(ids["A"]) != len(ids["B"])
        or len(differ) != 1
        or "A" not in token["A"]
        or token["A"].replace("A", "B") != token["B"]
    ):
        raise ValueError(
            f"The answers must differ in one token, the A or B; at the end of {texts['A'][-20:]!r} "
            f"they differ in {token['A']!r} and {token['B']!r}: try another prefill or closing."
        )
    head = ids["A"][: differ[0]]
    for start in range(label_start, max(label_start - 8, 0), -1):
        if encode(model, texts["A"][:start]) == head:
            return differ[0] - len(ids["A"]), start
    raise ValueError(
        f"{texts['A'][-20:]!r} cannot be cut before its key token {token['A']!r}: the tokens in "
        "front of it change. Try another prefill."
    )
