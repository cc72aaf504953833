"""Intervals, each against its definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats

import steerlib as sl
from steerlib.measure import stats


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
    table = stats.summarise(frame, ["condition", "layer"])
    assert table.columns.tolist() == ["condition", "layer", "mean", "low", "high", "n"]
    assert table[["condition", "layer", "n"]].to_numpy().tolist() == [
        ["b", 1, 2],
        ["a", 1, 2],
        ["b", 2, 1],
    ]
    for i, values in enumerate([[4, 2], [0, 1], [9]]):
        assert tuple(table.loc[i, ["mean", "low", "high"]]) == sl.mean_interval(values)
    by_one = stats.summarise(frame.rename(columns={"count": "score"}), "condition", "score")
    assert by_one.condition.tolist() == ["b", "a"] and by_one["mean"].tolist() == [5, 0.5]


def test_summarise_gives_shares_their_wilson_interval() -> None:
    frame = pd.DataFrame({"condition": ["x"] * 8 + ["y"] * 2, "right": [True] * 6 + [False] * 4})
    x, y = stats.summarise(frame, "condition", "right").itertuples(index=False)
    # closed form: centre (p + z²/2n) / (1 + z²/n), half width z √(p(1-p)/n + z²/4n²) / (1 + z²/n)
    z, p, n = 1.959964, 0.75, 8
    half = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5 / (1 + z**2 / n)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    assert tuple(x[1:]) == pytest.approx((0.75, centre - half, centre + half, 8))
    assert y[1] == 0 and y[2] == pytest.approx(0, abs=1e-12) and y[3] > 0.5


def test_bootstrap_interval_of_two_samples_is_that_of_a_difference() -> None:
    """Against the normal approximation of a difference of means, and its corner cases."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(3, 1, 400), rng.normal(1, 2, 300)

    def difference(x: Any, y: Any) -> Any:
        return x.mean() - y.mean()

    value, low, high = stats.bootstrap_interval(difference, a, b)
    half = 1.96 * (a.var() / len(a) + b.var() / len(b)) ** 0.5
    assert value == pytest.approx(a.mean() - b.mean())
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.03)
    assert stats.bootstrap_interval(np.mean, a) == stats.mean_interval(a)
    value, low, high = stats.bootstrap_interval(difference, a, b[:1])
    assert value == pytest.approx(a.mean() - b[0]) and math.isnan(low) and math.isnan(high)
    with pytest.raises(ValueError, match="no values"):
        stats.bootstrap_interval(difference, a, b[:0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sl.mean_interval([]), "no values"),
        (lambda: sl.proportion_interval(0, 0), "0 of 0 is not a share"),
        (lambda: sl.proportion_interval(4, 3), "4 of 3 is not a share"),
        (lambda: sl.proportion_interval(-1, 3), "-1 of 3 is not a share"),
    ],
)
def test_bad_input_gets_a_sentence(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


# ---------------------------------------------------------------- effects, paired and clustered


def by_prompt(values: dict[str, list[float]]) -> pd.DataFrame:
    """Rows prompt x condition: ``values`` has the propensities of a condition, by prompt."""
    rows = [
        (f"prompt {i}", condition, x)
        for condition, column in values.items()
        for i, x in enumerate(column)
    ]
    return pd.DataFrame(rows, columns=["prompt", "condition", "propensity"])


def test_effects_are_differences_on_the_same_prompt() -> None:
    frame = by_prompt({"unsteered": [1, 2, 3], "love": [2, 2, 7], "hate": [0, 0, 0]})
    shuffled = frame.sample(frac=1, random_state=0).assign(layer=6)
    found = stats.effects(shuffled)
    assert found.layer.eq(6).all() and "unsteered" not in set(found.condition)
    by = found.set_index(["condition", "prompt"]).effect
    assert [by["love", f"prompt {i}"] for i in range(3)] == [1, 0, 4]
    assert [by["hate", f"prompt {i}"] for i in range(3)] == [-1, -2, -3]
    assert found.index.tolist() == shuffled.index[shuffled.condition != "unsteered"].tolist()
    twice = pd.concat([frame, by_prompt({"unsteered": [3, 4, 5]})])  # several: their mean
    assert stats.effects(twice).effect.tolist() == [0, -1, 3, -2, -3, -4]
    other = stats.effects(frame.rename(columns={"propensity": "nats"}), "nats", "hate")
    assert other.effect.tolist() == [1, 2, 3, 2, 2, 7]
    with pytest.raises(ValueError, match="no condition 'plain' to compare with.$"):
        stats.effects(frame, control="plain")
    with pytest.raises(ValueError, match="no condition 'unsteered' .* for 'prompt 2'"):
        stats.effects(frame.drop(index=2))


def test_difference_of_two_conditions_is_paired() -> None:
    a = pd.DataFrame({"prompt": ["x", "y", "z"], "effect": [1.0, 2.0, 9.0]})
    b = pd.DataFrame({"prompt": ["y", "x", "x"], "effect": [5.0, 0.0, 1.0]})
    assert stats.difference(a, b).effect.tolist() == [0.5, -3.0]
    with pytest.raises(ValueError, match="no prompt in common"):
        stats.difference(a, b.assign(prompt="w"))


@pytest.mark.parametrize("n", [3, 6, 9])
@pytest.mark.parametrize("skewed", [False, True])
def test_clustered_intervals_cover_the_mean(n: int, skewed: bool) -> None:
    """As often as they say, or nearly: with 5 values from each of a few clusters that differ."""
    rng = np.random.default_rng(n)
    hits = naive = 0
    for seed in range(400):
        clusters = rng.exponential(size=n) - 1 if skewed else rng.normal(size=n)
        values = np.repeat(clusters, 5) + 0.3 * rng.normal(size=5 * n)
        mean, low, high = stats.clustered_interval(
            values, np.repeat(np.arange(n), 5), n_resamples=400, seed=seed
        )
        assert low < mean < high
        hits += low <= 0 <= high
        _, low, high = stats.mean_interval(values, n_resamples=400, seed=seed)
        naive += low <= 0 <= high
    least = 0.85 if skewed else 0.92  # few values of a skewed distribution hide its tail
    assert least <= hits / 400 <= 0.985
    assert naive / 400 < 0.7  # as if the values of a cluster said five times as much


def test_clustered_interval() -> None:
    values, clusters = [1.0, 3, 2, 4, 9, 0, 1], list("aabbbcd")
    mean, low, high = stats.clustered_interval(values, clusters)
    assert mean == pytest.approx(np.mean(values)) and low < mean < high
    assert stats.clustered_interval(iter(values), iter(clusters)) == (mean, low, high)
    # neither the order of the rows nor the names of the clusters matter
    order = [6, 5, 0, 4, 2, 1, 3]
    named = {"a": 1, "b": None, "c": ("x", 2), "d": "d"}
    again = stats.clustered_interval(
        [values[i] for i in order], [named[clusters[i]] for i in order]
    )
    assert again == pytest.approx((mean, low, high), rel=0.1)
    scaled = stats.clustered_interval([10 * x - 3 for x in values], clusters)
    assert scaled == pytest.approx([10 * x - 3 for x in (mean, low, high)])
    _, inner, outer = stats.clustered_interval(values, clusters, confidence=0.5)
    assert low < inner < outer < high
    # more values from the same clusters say nothing new of others
    repeated = stats.clustered_interval(np.repeat(values, 50), np.repeat(clusters, 50))
    assert repeated == pytest.approx((mean, low, high))
    assert stats.clustered_interval([1, 2, 3], "aaa") == (2, -np.inf, np.inf)
    assert stats.clustered_interval([1, 2, 3], "aab") == (2, -np.inf, np.inf)
    assert stats.clustered_interval([2, 2, 2, 2], "aabb") == (2, 2, 2)
    # none of ten: a mean above this would have shown one with 95 % (0.74^10 = 0.05)
    none = stats.clustered_interval([0.0] * 10, top=5)
    assert none[:2] == (0, 0) and (1 - none[2] / 5) ** 10 == pytest.approx(0.05)
    # few clusters: the textbook's t interval, also where one differs from all others
    outlier = [-0.07, 0, -0.64, -0.01, -0.07, -0.14, -0.12, -0.24, -0.04]
    found = stats.clustered_interval(outlier)[1:]
    of_scipy = scipy.stats.ttest_1samp(outlier, 0).confidence_interval()
    assert found == pytest.approx((of_scipy.low, of_scipy.high))
    # without clusters: the index of a series, or else every value on its own
    series = pd.Series(values, index=clusters)
    assert stats.clustered_interval(series) == (mean, low, high)
    assert stats.clustered_interval([1, 2, 4, 8, 3]) == stats.clustered_interval(
        [1, 2, 4, 8, 3], "abcde"
    )
    for bad in (([], []), ([1, 2], "a")):
        with pytest.raises(ValueError, match=r"\d values and \d clusters cannot be averaged"):
            stats.clustered_interval(*bad)


def test_clustered_interval_of_many_clusters_is_the_normal_one() -> None:
    rng = np.random.default_rng(0)
    means = rng.normal(2, 3, 400)
    mean, low, high = stats.clustered_interval(np.repeat(means, 2), np.repeat(range(400), 2))
    half = 1.96 * means.std(ddof=1) / 20
    assert (mean - low, high - mean) == pytest.approx((half, half), rel=0.06)


@pytest.mark.parametrize(
    ("p", "corrected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # 4 p1, 3 p2, 2 p3, 1 p4, rising
        ([0.02, 0.02], [0.04, 0.04]),
        ([0.9, 0.001, 0.6], [1.0, 0.003, 1.0]),
        ([0.3], [0.3]),
        ([], []),
    ],
)
def test_holm(p: list[float], corrected: list[float]) -> None:
    assert stats.holm(p).tolist() == pytest.approx(corrected)


def test_sign_flip_p_in_closed_form() -> None:
    for n in (1, 5, 9, 12):
        assert stats.sign_flip_p([1.0] * n) == 2 / 2**n  # all alike: only ±itself is as large
        assert stats.sign_flip_p([-0.1] * n) == 2 / 2**n
        assert stats.sign_flip_p([0.0] * n) == 1
    # 1, 2, 4, 8: all sums differ; those of size 13 and more are 15 and 13, with either sign
    assert stats.sign_flip_p([-1, 2, 4, 8]) == 4 / 16
    assert stats.sign_flip_p([1, 2, 4, -8]) == 16 / 16
    # whatever the scale: the pattern that was seen counts itself
    for scale in (1e-9, 1e9):
        values = scale * np.random.default_rng(0).normal(3, 1, 10)
        assert stats.sign_flip_p(values) == 2 / 2**10
    # beyond twelve it is drawn: close to the exact one, and never 0
    n, k = 16, 12  # k positive ones of n: a binomial tail
    exact = 2 * sum(math.comb(n, i) for i in range(k, n + 1)) / 2**n
    assert stats.sign_flip_p([1.0] * k + [-1.0] * (n - k)) == pytest.approx(exact, abs=0.01)
    assert 0 < stats.sign_flip_p([1.0] * 40) < 1e-4
    rng = np.random.default_rng(1)
    small = [stats.sign_flip_p(rng.normal(size=8)) <= 0.05 for _ in range(2000)]
    assert np.mean(small) == pytest.approx(0.05, abs=0.015)  # the level that it says


def test_effect_table() -> None:
    frame = by_prompt(
        {"unsteered": [0] * 6, "love": [1, 2, 3, 4, 5, 6], "nothing": [1, -1, 2, -2, 3, -3]}
    )
    found = stats.effects(pd.concat([frame, frame.assign(propensity=frame.propensity * 1.5)]))
    table = stats.effect_table(found)
    assert table.columns.tolist() == ["condition", "effect", "low", "high", "n", "p", "p_holm"]
    assert table.condition.tolist() == ["love", "nothing"] and (table.n == 6).all()
    for row in table.itertuples():
        own = found[found.condition == row.condition]
        interval = stats.clustered_interval(own.effect, own.prompt)
        assert (row.effect, row.low, row.high) == interval
        assert row.p == stats.sign_flip_p(own.groupby("prompt").effect.mean())
    assert table.p.tolist() == [2 / 64, 1] and table.p_holm.tolist() == [4 / 64, 1]
    by_two = stats.effect_table(found.assign(layer=None), ["condition", "layer"])
    assert by_two.columns[:2].tolist() == ["condition", "layer"] and len(by_two) == 2
    assert len(stats.effect_table(found.head(0))) == 0


def test_control_quantile() -> None:
    rows = [("random", c, p, c + 0.1 * p) for c in range(20) for p in (-1, 1)]
    rows += [("unrelated", c, p, -c) for c in range(8) for p in (0, 1)]
    frame = pd.DataFrame(rows, columns=["family", "control", "prompt", "effect"])
    # of 20 means the 19.05th lies between the two largest: the upper one is taken
    assert stats.control_quantile(frame, "random") == pytest.approx(19)
    assert stats.control_quantile(frame, "random", q=0.5) == pytest.approx(10)
    assert stats.control_quantile(frame, "random", sign=-1) == pytest.approx(0)
    assert stats.control_quantile(frame, "unrelated") == 0
    assert stats.control_quantile(frame, "unrelated", sign=-1) == -7
    nats = frame.assign(nats=2 * frame.effect)
    assert stats.control_quantile(nats, "random", "nats") == pytest.approx(38)
    with pytest.raises(ValueError, match="no controls of the family 'words'"):
        stats.control_quantile(frame, "words")


# ---------------------------------------------------------------- verdicts

YES, PARTLY, NO = {"holds": "yes"}, {"holds": "partly"}, {"holds": "no"}
FOUR = {"number": 4.0}
VERDICTS = [
    # value, low, high | what the source says | verdict
    ((3, 2, 4), YES, "reproduced"),
    ((3, 2, 4), PARTLY, "reproduced"),
    ((3, 2, 4), {"beyond": (1, 2.9)}, "reproduced"),
    ((3, 2, 4), {"beyond": (1, 3.1)}, "cannot tell"),  # clear of 0, not of the controls
    ((3, 2, 4), {"beyond": (3,)}, "cannot tell"),
    ((3, -1, 7), YES, "cannot tell"),
    ((3, 0, 6), YES, "cannot tell"),
    ((0.1, -0.2, 0.3), YES, "not seen"),
    ((0.1, -0.2, 0.3), PARTLY, "not seen"),
    ((0.1, -0.2, 0.6), YES, "cannot tell"),
    ((0, 0, 0), YES, "not seen"),  # every sample zero
    ((0, 0, 0), {"direction": "-"}, "not seen"),
    ((0.2, 0.1, 0.3), YES, "not seen"),  # clear, but within what counts as none
    ((-3, -4, -2), YES, "opposite"),
    ((-3, -4, -2), PARTLY, "opposite"),
    ((-0.4, -0.7, -0.1), YES, "cannot tell"),  # the other side, but not beyond the bound
    ((-0.2, -0.3, -0.1), YES, "not seen"),
    ((0, -np.inf, np.inf), YES, "cannot tell"),  # one cluster
    # beside a number of the source
    ((3, 2, 4), FOUR, "reproduced"),
    ((2, 1.5, 2.5), FOUR, "reproduced"),  # half of it
    ((1.9, 1.5, 2.3), FOUR, "weaker"),
    ((1.9, 0.5, 4.2), FOUR, "reproduced"),  # may well be the source's number
    ((1, -1, 5), FOUR, "cannot tell"),  # both 0 and the source's number
    ((0.2, 0.1, 0.3), FOUR, "weaker"),
    ((9, 8, 10), FOUR, "reproduced"),
    ((1.9, 1.5, 2.3), {**FOUR, "beyond": (2,)}, "cannot tell"),
    # a claim of a fall
    ((-3, -4, -2), {"direction": "-"}, "reproduced"),
    ((3, 2, 4), {"direction": "-"}, "opposite"),
    ((-3, -4, -2), {"direction": "-", "beyond": (-2.5, -1)}, "reproduced"),
    ((-3, -4, -2), {"direction": "-", "beyond": (-3.5,)}, "cannot tell"),
    ((-1.9, -2.3, -1.5), {"direction": "-", "number": -4.0}, "weaker"),
    ((-3, -4, -2), {"direction": "-", "number": -4.0}, "reproduced"),
    # the source says that it does not work
    ((0.1, -0.2, 0.3), NO, "reproduced"),
    ((0, 0, 0), NO, "reproduced"),
    ((3, 2, 4), NO, "opposite"),
    ((3, 2, 4), {**NO, "beyond": (3.5,)}, "cannot tell"),  # no more than controls do
    ((3, -1, 7), NO, "cannot tell"),
    ((-3, -4, -2), NO, "reproduced"),  # it does not rise
    ((0.3, 0.1, 0.6), NO, "cannot tell"),
    ((-3, -4, -2), {**NO, "direction": "-"}, "opposite"),
    ((0.2, 0.1, 0.3), NO, "reproduced"),
    # the other side counts beyond the controls there only
    ((-3, -4, -2), {"against": (-2, -2.9)}, "opposite"),
    ((-3, -4, -2), {"against": (-2, -3.1)}, "cannot tell"),
    ((-3, -4, -2), {"against": (-np.inf,), "beyond": (np.inf,)}, "cannot tell"),
    # a claim of no effect
    ((0.1, -0.2, 0.3), {"direction": "0"}, "reproduced"),
    ((0.4, 0.1, 0.7), {"direction": "0"}, "cannot tell"),
    ((3, 2, 4), {"direction": "0"}, "opposite"),
    ((-3, -4, -2), {"direction": "0"}, "opposite"),
    ((0, -2, 2), {"direction": "0"}, "cannot tell"),
    # the source says that there is some effect
    ((0.1, -0.2, 0.3), {**NO, "direction": "0"}, "not seen"),
    ((-3, -4, -2), {**NO, "direction": "0"}, "reproduced"),
    ((0.4, 0.1, 0.7), {**NO, "direction": "0"}, "cannot tell"),
]


@pytest.mark.parametrize(("found", "said", "expected"), VERDICTS)
def test_verdict(found: tuple[float, float, float], said: dict[str, Any], expected: str) -> None:
    assert stats.verdict(*found, **said, bound=0.5) == expected
    assert expected in stats.VERDICTS
    turn = {"+": "-", "-": "+", "0": "0"}  # a claim and its mirror image are judged alike
    mirrored = {
        **said,
        "direction": turn[said.get("direction", "+")],
        "beyond": [-x for x in said.get("beyond", ())],
        "against": [-x for x in said.get("against", ())],
        "number": -said["number"] if "number" in said else None,
    }
    value, low, high = found
    assert stats.verdict(-value, -high, -low, **mirrored, bound=0.5) == expected


@pytest.mark.parametrize(
    "given",
    [
        {"value": float("nan")},
        {"low": float("nan")},
        {"low": 2.0},
        {"high": 0.5},
        {"bound": 0.0},
        {"holds": "perhaps"},
        {"direction": "up"},
    ],
)
def test_no_verdict_on_what_is_no_question(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="No verdict on|yes, partly, no"):
        stats.verdict(**{"value": 1.0, "low": 0.0, "high": 2.0, "bound": 0.5, **given})
