"""The same vectors and the same steering by two other packages, as independent truth.

All texts begin with the BOS string, so that every package sees the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import steering_vectors
import torch
from conftest import n_hooks
from steering_vectors.aggregators import mean_aggregator, pca_aggregator
from transformers import AutoTokenizer

import steerlib as sl

np.float_ = np.float64  # repeng names it, numpy 2 does not
import repeng  # noqa: E402

BOS = "<|im_start|>"
PAIRS = [
    (f"{BOS}{a}", f"{BOS}{b}")
    for a, b in [
        ("I love dogs, they are wonderful", "I hate dogs, they are awful"),
        ("The weather is lovely", "The weather is horrible today"),
        ("What a marvellous little ship", "What a wretched little ship"),
        ("She smiled at her friend", "She frowned at her enemy, who left"),
        ("This is the best day", "This is the worst day"),
        ("He was happy in the morning", "He was sad"),
    ]
]
PROMPTS = [BOS + text for text in ("I went up to my friend and said", "The ship", "Love is a")]
LAYERS = range(30)


@pytest.fixture(scope="module")
def tokenizer(model: Any) -> Any:
    """A tokenizer of its own for the peers, which change settings."""
    return AutoTokenizer.from_pretrained(model.tokenizer.name_or_path)


@pytest.fixture(scope="module")
def peer(plain_model: Any, tokenizer: Any) -> Callable[[Any], Any]:
    """What steering-vectors makes of the pairs at every layer, by aggregator."""
    read = steering_vectors.extract_activations(plain_model, tokenizer, PAIRS)
    return lambda aggregator: steering_vectors.aggregate_activations(*read, aggregator())


@torch.no_grad()
def logits_of(plain: Any, ids: list[int]) -> torch.Tensor:
    return plain(torch.tensor([ids])).logits[0]


def check_logits(model: Any, condition: Any, theirs: Callable[[list[int]], torch.Tensor]) -> None:
    """Ours, in one padded batch, against one unpadded prompt at a time."""
    ids = [sl.encode(model, prompt) for prompt in PROMPTS]
    for i, ours in zip(ids, sl.steered_logits(model, PROMPTS, condition), strict=True):
        torch.testing.assert_close(ours[-len(i) :], theirs(i), atol=5e-3, rtol=1e-3)


def test_they_see_the_same_tokens(model: Any, tokenizer: Any) -> None:
    for text in [*PROMPTS, *PAIRS[0]]:
        assert tokenizer(text)["input_ids"] == sl.encode(model, text)


def test_mean_difference_equals_steering_vectors(model: Any, peer: Any) -> None:
    theirs = peer(mean_aggregator)
    ours = sl.SteeringVector.from_pairs(model, PAIRS, method="mean")
    assert sorted(theirs) == sorted(ours.layers) == list(LAYERS)
    for layer in LAYERS:
        scale = float(theirs[layer].norm())
        torch.testing.assert_close(ours.layers[layer][0], theirs[layer], atol=1e-4 * scale, rtol=0)


def test_pca_equals_steering_vectors(model: Any, peer: Any) -> None:
    theirs = peer(pca_aggregator)
    ours = sl.SteeringVector.from_pairs(model, PAIRS, method="pca")
    for layer in LAYERS:
        assert abs(float(ours.layers[layer][0] @ theirs[layer])) == pytest.approx(1, abs=1e-3)


def test_pca_equals_repeng(model: Any, plain_model: Any, tokenizer: Any) -> None:
    """Its reading of both members of a pair about their centre, in every layer it offers."""
    theirs = repeng.ControlVector.train(
        plain_model,
        tokenizer,
        [repeng.DatasetEntry(positive, negative) for positive, negative in PAIRS],
        method="pca_center",
        hidden_layers=range(1, 29),  # what it reads as layer 29 is past the final norm
        batch_size=1,
    ).directions
    ours = sl.SteeringVector.from_pairs(model, PAIRS, method="pca", layers=range(1, 29))
    for layer in range(1, 29):
        cosine = ours.layers[layer][0].numpy() @ theirs[layer]  # it finds the sign by majority
        assert abs(cosine) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("multiplier", [1.5, -3.0])
@pytest.mark.parametrize("layers", [[14], [3, 20]])
def test_steered_logits_equal_steering_vectors(
    model: Any, plain_model: Any, peer: Any, layers: list[int], multiplier: float
) -> None:
    every = peer(mean_aggregator)
    theirs = steering_vectors.SteeringVector({layer: every[layer] for layer in layers})
    ours = sl.SteeringVector({layer: every[layer][None] for layer in layers}, "resid_post")

    def steered(ids: list[int]) -> torch.Tensor:
        with theirs.apply(plain_model, multiplier=multiplier):
            return logits_of(plain_model, ids)

    ids = sl.encode(model, PROMPTS[0])
    assert (steered(ids) - logits_of(plain_model, ids)).abs().max() > 1
    check_logits(model, sl.Add(ours, "all", multiplier), steered)
    assert n_hooks(model) == 0


@pytest.mark.parametrize("layers", [[14], [3, 20]])
def test_steered_logits_equal_repeng(
    model: Any, plain_model: Any, tmp_path: Any, layers: list[int]
) -> None:
    """The vector travels as a llama.cpp file, from either site."""
    pairs = sl.SteeringVector.from_pairs(model, PAIRS, layers=layers)
    before = sl.SteeringVector({l + 1: t for l, t in pairs.layers.items()}, "resid_pre", "all")
    wrapped = repeng.ControlModel(plain_model, layers)
    try:
        for ours in (pairs, before):
            ours.to_gguf(tmp_path / "v.gguf")
            control = repeng.ControlVector.import_gguf(tmp_path / "v.gguf")

            def steered(ids: list[int], control: Any = control) -> torch.Tensor:
                wrapped.set_control(control, 2.0)
                return logits_of(wrapped, ids)

            check_logits(model, sl.Add(ours, "all", 2.0), steered)
    finally:
        wrapped.reset()
        wrapped.unwrap()
