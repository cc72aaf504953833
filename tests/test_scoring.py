"""Counts, intervals, perplexity and token shifts, each against its definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import adding, n_hooks, reference_logits

import steerlib as sl
from steerlib import scoring

TEXTS = [
    "The ship left the harbour in the morning, and nobody knew when it would return.",
    "I love dogs",
    "I went up to my friend and said that the weather was fine.",
]


# ---------------------------------------------------------------- words


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


# ---------------------------------------------------------------- intervals


def test_mean_interval_covers_the_mean() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(400):
        mean, low, high = sl.mean_interval(rng.exponential(size=40), n_resamples=300, seed=seed)
        assert low < mean < high
        hits += low <= 1 <= high
    assert 0.88 <= hits / 400 <= 0.98


def test_mean_interval() -> None:
    values = [0, 0, 1, 5, 2, 0, 3]
    mean, low, high = sl.mean_interval(values)
    assert mean == np.mean(values) and sl.mean_interval(iter(values)) == (mean, low, high)
    _, inner, outer = sl.mean_interval(values, confidence=0.5)
    assert low < inner < outer < high
    many = sl.mean_interval(values * 100)
    assert many[2] - many[1] == pytest.approx((high - low) / 10, rel=0.2)
    assert sl.mean_interval([3]) == sl.mean_interval([3, 3, 3]) == (3, 3, 3)


@pytest.mark.parametrize("confidence", [0.9, 0.95])
@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (3, 10), (81, 263), (1, 1)])
def test_proportion_interval_is_wilsons(k: int, n: int, confidence: float) -> None:
    z = {0.9: 1.6448536269514722, 0.95: 1.959963984540054}[confidence]
    p = k / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    got = sl.proportion_interval(k, n, confidence)
    assert got == pytest.approx((p, centre - reach, centre + reach), abs=1e-12)


def test_summarise() -> None:
    frame = pd.DataFrame(
        {
            "condition": ["b", "a", "b", "a", "b"],
            "layer": [1, 1, 1, 1, 2],
            "count": [4, 0, 2, 1, 9],
        }
    )
    table = scoring.summarise(frame, ["condition", "layer"])
    assert table.columns.tolist() == ["condition", "layer", "mean", "low", "high", "n"]
    assert table[["condition", "layer", "n"]].to_numpy().tolist() == [
        ["b", 1, 2],
        ["a", 1, 2],
        ["b", 2, 1],
    ]
    for i, values in enumerate([[4, 2], [0, 1], [9]]):
        assert tuple(table.loc[i, ["mean", "low", "high"]]) == sl.mean_interval(values)
    by_one = scoring.summarise(frame.rename(columns={"count": "score"}), "condition", "score")
    assert by_one.condition.tolist() == ["b", "a"] and by_one["mean"].tolist() == [5, 0.5]


def test_summarise_gives_shares_their_wilson_interval() -> None:
    frame = pd.DataFrame({"condition": ["x"] * 8 + ["y"] * 2, "right": [True] * 6 + [False] * 4})
    x, y = scoring.summarise(frame, "condition", "right").itertuples(index=False)
    # closed form: centre (p + z²/2n) / (1 + z²/n), half width z √(p(1-p)/n + z²/4n²) / (1 + z²/n)
    z, p, n = 1.959964, 0.75, 8
    half = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5 / (1 + z**2 / n)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    assert tuple(x[1:]) == pytest.approx((0.75, centre - half, centre + half, 8))
    assert y[1] == 0 and y[2] == pytest.approx(0, abs=1e-12) and y[3] > 0.5


# ---------------------------------------------------------------- perplexity


def surprisal(logits: torch.Tensor, ids: list[int], skip: int) -> float:
    """Mean of -log p of each token given those before it, the first ``skip`` left out."""
    p = logits.double().softmax(-1)
    each = [-math.log(p[i, ids[i + 1]]) for i in range(len(ids) - 1)]
    return sum(each[skip:]) / len(each[skip:])


def test_perplexity_equals_the_loss_of_transformers(model: Any, plain_model: Any) -> None:
    frame = scoring.perplexity(model, TEXTS, {"unsteered": None}, skip_positions=0)
    assert frame.text.tolist() == TEXTS
    for row in frame.itertuples():
        ids = torch.tensor([sl.encode(model, row.text)])
        with torch.no_grad():
            loss = float(plain_model(ids, labels=ids).loss)
        assert row.surprisal == pytest.approx(loss, abs=1e-4)
        assert row.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
        assert row.n_tokens == ids.shape[1] - 1


def test_perplexity_under_steering_equals_a_hand_calculation(model: Any, plain_model: Any) -> None:
    v = 4 * sl.SteeringVector.from_prompts(model, " wedding", " ", layer=6)
    d = sl.SteeringVector({10: 3 * torch.ones(1, 576)}, "resid_post", "all")
    edits: dict[str, Any] = {
        "unsteered": [],
        "front": [(6, "resid_pre", adding(v.layers[6], [0, 1]))],
        "all": [(10, "resid_post", adding(d.layers[10], list(range(99))))],
    }
    frame = scoring.perplexity(model, TEXTS, {"unsteered": None, "front": v, "all": d})
    assert frame.text.tolist() == [t for t in TEXTS for _ in edits]
    assert frame.condition.tolist() == list(edits) * len(TEXTS)
    for row in frame.itertuples():
        ids = sl.encode(model, row.text)
        logits = reference_logits(plain_model, ids, edits[row.condition])
        assert row.surprisal == pytest.approx(surprisal(logits, ids, skip=2), abs=1e-3)
        assert row.n_tokens == len(ids) - 3
    assert frame.groupby("text").surprisal.nunique().tolist() == [3, 3, 3]
    assert n_hooks(model) == 0


# ---------------------------------------------------------------- token shifts


def test_next_token_shift(model: Any, plain_model: Any) -> None:
    v = 4 * sl.SteeringVector.from_prompts(model, " wedding", " ", layer=6)
    prompt = "I went up to my friend and said"
    frame = sl.scoring.next_token_shift(model, prompt, v)
    ids = sl.encode(model, prompt)
    edit = (6, "resid_pre", adding(v.layers[6], [0, 1]))
    before, after = (
        reference_logits(plain_model, ids, edits)[-1].double().log_softmax(-1)
        for edits in ([], [edit])
    )
    assert frame.p_before.sum() == pytest.approx(1) and frame.p_after.sum() == pytest.approx(1)
    kl = torch.nn.functional.kl_div(before, after, log_target=True, reduction="sum")
    assert frame.kl_contribution.sum() == pytest.approx(float(kl), abs=1e-4) and kl > 0.1
    assert sorted(frame.token_id) == list(range(model.cfg.d_vocab))
    assert frame.kl_contribution.is_monotonic_decreasing
    ours = frame.set_index("token_id").sort_index()
    np.testing.assert_allclose(ours.p_before, before.exp(), atol=1e-5)
    np.testing.assert_allclose(ours.p_after, after.exp(), atol=1e-5)
    first = frame.iloc[0]
    assert first.token == model.tokenizer.decode([first.token_id])
    assert ours.token[model.tokenizer(" wedding").input_ids[-1]] == " wedding"


def test_no_condition_shifts_nothing(model: Any) -> None:
    frame = sl.scoring.next_token_shift(model, TEXTS[0], None)
    assert (frame.p_before == frame.p_after).all() and (frame.kl_contribution == 0).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: sl.count_words(["a"], []), "list of words to count is empty"),
        (lambda m: sl.count_words(["a wedding"], "wedding"), "lists of texts"),
        (lambda m: sl.count_words("a wedding", ["wedding"]), "lists of texts"),
        (lambda m: sl.mean_interval([]), "no values"),
        (lambda m: sl.proportion_interval(0, 0), "0 of 0 is not a share"),
        (lambda m: sl.proportion_interval(4, 3), "4 of 3 is not a share"),
        (lambda m: sl.proportion_interval(-1, 3), "-1 of 3 is not a share"),
        (lambda m: scoring.perplexity(m, ["I"], {"x": None}), "'I' has 2 tokens.*at least 4"),
        (lambda m: scoring.perplexity(m, ["fine", ""], {"x": None}, 0), "prompt '' is empty"),
        (lambda m: scoring.perplexity(m, [], {"x": None}), "0 texts, 1 conditions"),
        (lambda m: scoring.perplexity(m, "I love dogs", {}), "1 texts, 0 conditions"),
        (lambda m: scoring.perplexity(m, "I love dogs", {"x": None}, -1), "skip_positions=-1"),
        (lambda m: scoring.next_token_shift(m, "", None), "prompt '' is empty"),
        (lambda m: scoring.next_token_shift(m, "I", "love"), "condition is"),
    ],
)
def test_bad_input_gets_a_sentence(tiny: Any, call: Callable[[Any], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(tiny("llama")[0])


def test_bootstrap_interval_of_two_samples_is_that_of_a_difference() -> None:
    """Against the normal approximation of a difference of means, and its corner cases."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(3, 1, 400), rng.normal(1, 2, 300)

    def difference(x: Any, y: Any) -> Any:
        return x.mean() - y.mean()

    value, low, high = scoring.bootstrap_interval(difference, a, b)
    half = 1.96 * (a.var() / len(a) + b.var() / len(b)) ** 0.5
    assert value == pytest.approx(a.mean() - b.mean())
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.03)
    assert scoring.bootstrap_interval(np.mean, a) == scoring.mean_interval(a)
    value, low, high = scoring.bootstrap_interval(difference, a, b[:1])
    assert value == pytest.approx(a.mean() - b[0]) and math.isnan(low) and math.isnan(high)
    with pytest.raises(ValueError, match="no values"):
        scoring.bootstrap_interval(difference, a, b[:0])
