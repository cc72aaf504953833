"""Intervals, effects and verdicts: what a number is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


def mean_interval(
    values: Iterable[float], confidence: float = 0.95, n_resamples: int = 5000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean with its bootstrap interval: ``(mean, low, high)``, in the units of ``values``.

    The percentile bootstrap; where all values are equal it has no width. There one-sided
    knowledge remains: of n zeros, a mean of up to about 3/n events would go unseen.
    """
    sample = np.asarray(list(values), dtype=float)
    if not len(sample):
        raise ValueError("There are no values to average.")
    mean = float(sample.mean())
    if len(sample) == 1 or np.ptp(sample) == 0:
        return mean, mean, mean
    return bootstrap_interval(
        np.mean, sample, confidence=confidence, n_resamples=n_resamples, seed=seed
    )


def bootstrap_interval(
    statistic: Callable[..., Any],
    *samples: np.ndarray,
    confidence: float = 0.95,
    n_resamples: int = 5000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """A statistic of one or several samples, with its percentile bootstrap interval.

    Args:
        statistic: of as many arrays as there are samples; each is resampled on its own.

    Returns:
        ``(value, low, high)``; the limits are NaN if a sample has one value only.

    Raises:
        ValueError: an empty sample.
    """
    from scipy.stats import bootstrap

    if not samples or not all(map(len, samples)):
        raise ValueError("There are no values to draw from.")
    value = float(statistic(*samples))
    if min(map(len, samples)) == 1:
        return value, float("nan"), float("nan")
    interval = bootstrap(
        samples,
        statistic,
        confidence_level=confidence,
        n_resamples=n_resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return value, float(interval.low), float(interval.high)


def proportion_interval(
    successes: int, total: int, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Share with its Wilson interval: ``(share, low, high)``."""
    from scipy.stats import binomtest

    if not 0 <= successes <= total or total == 0:
        raise ValueError(f"{successes} of {total} is not a share.")
    interval = binomtest(int(successes), int(total)).proportion_ci(confidence, method="wilson")
    return successes / total, float(interval.low), float(interval.high)


def summarise(frame: pd.DataFrame, by: str | Sequence[str], value: str = "count") -> pd.DataFrame:
    """Mean and 95 % interval of ``value`` in each group: columns mean, low, high, n.

    The interval is bootstrapped; for truth values (a column of type bool) it is Wilson's.
    """
    import pandas as pd

    keys = [by] if isinstance(by, str) else list(by)
    rows = []
    for name, group in frame.groupby(keys, sort=False):
        if group[value].dtype == bool:
            mean, low, high = proportion_interval(int(group[value].sum()), len(group))
        else:
            mean, low, high = mean_interval(group[value])
        rows.append((*name, mean, low, high, len(group)))
    return pd.DataFrame(rows, columns=[*keys, "mean", "low", "high", "n"])


# ---------------------------------------------------------------- effects, paired and clustered


def effects(
    frame: pd.DataFrame, value: str = "propensity", control: Any = "unsteered"
) -> pd.DataFrame:
    """What each condition does: its value minus the control's, on the same prompt.

    Args:
        frame: one row per prompt x condition, as `logprobs.propensity` returns it.
        control: the name of the control condition.

    Returns:
        ``frame`` without the control's rows, with the column effect.

    Raises:
        ValueError: there is no such control, or a prompt lacks it.
    """
    unsteered = frame[frame.condition == control].groupby("prompt", sort=False)[value].mean()
    rest = frame[frame.condition != control]
    missing = sorted(set(rest.prompt) - set(unsteered.index))
    if unsteered.empty or missing:
        raise ValueError(
            f"There is no condition {control!r} to compare with"
            + (f" for {missing[0][:40]!r}." if len(unsteered) else ".")
        )
    return rest.assign(effect=rest[value].to_numpy() - unsteered[rest.prompt].to_numpy())


def difference(frame: pd.DataFrame, other: pd.DataFrame, value: str = "effect") -> pd.DataFrame:
    """``frame`` with ``value`` minus that of ``other`` on the same prompt (the mean, if several).

    Prompts that only one of them has are left out. Raises ``ValueError`` if none remains.
    """
    base = other.groupby("prompt", sort=False)[value].mean()
    both = frame[frame.prompt.isin(base.index)]
    if both.empty:
        raise ValueError("The two tables have no prompt in common: nothing can be paired.")
    return both.assign(**{value: both[value].to_numpy() - base[both.prompt].to_numpy()})


def clustered_interval(
    values: Iterable[float],
    clusters: Iterable[Any] | None = None,
    confidence: float = 0.95,
    n_resamples: int = 5000,
    seed: int = 0,
    top: float | None = None,
) -> tuple[float, float, float]:
    """Mean with an interval that resamples clusters (prompts, claim twins), not single values.

    The studentised bootstrap over cluster means: the percentile bootstrap is too narrow (8 prompts:
    88 % instead of 95 %). Fewer than 15 clusters get Student's t: of so few, resamples without the
    one that differs have hardly any spread, and the interval would explode.

    Args:
        clusters: one for each value; by default the index, if the values are a pandas series, or
            else each value is a cluster of its own.
        top: the largest value there can be, for counts: where all are 0 the upper limit then is
            the exact one-sided bound ``top * (1 - (1 - confidence) ** (1 / clusters))``.

    Returns:
        ``(mean, low, high)``; the limits are infinite for one or two clusters, of whose spread
        nothing is known, and equal the mean where all clusters agree exactly (but see ``top``).

    Raises:
        ValueError: no values, or not as many clusters.
    """
    sums: dict[Any, list[float]] = {}
    listed = list(values)
    if clusters is None:
        series = hasattr(values, "iloc")
        clusters = values.index if series else range(len(listed))  # type: ignore[attr-defined]
    names = list(clusters)
    if not listed or len(listed) != len(names):
        raise ValueError(f"{len(listed)} values and {len(names)} clusters cannot be averaged.")
    for value, name in zip(listed, names, strict=True):
        sums.setdefault(name, []).append(float(value))
    means = np.array([np.mean(group) for group in sums.values()])
    weights = np.array([len(group) for group in sums.values()], dtype=float)
    centre = float(np.average(means, weights=weights))
    n = len(means)
    if top is not None and not means.any():
        return 0.0, 0.0, top * (1 - (1 - confidence) ** (1 / n))
    if n > 1 and np.ptp(means) == 0:
        return centre, centre, centre
    if n < 3:  # of two, a resample is either both again or without spread
        return centre, -np.inf, np.inf
    own = np.sqrt((weights**2 * (means - centre) ** 2).sum()) / weights.sum()
    if n < 15:
        from scipy.stats import t as student

        reach = float(student.ppf((1 + confidence) / 2, n - 1) * own * np.sqrt(n / (n - 1)))
        return centre, centre - reach, centre + reach
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, n, (n_resamples, n))
    drawn = drawn[np.ptp(means[drawn], axis=1) > 0]  # one without spread says nothing of it
    x, w = means[drawn], weights[drawn]
    mean = (x * w).sum(1) / w.sum(1)
    error = np.sqrt((w**2 * (x - mean[:, None]) ** 2).sum(1)) / w.sum(1)
    # Symmetric in t.
    reach = float(np.quantile(np.abs(mean - centre) / error, confidence)) * own
    return centre, centre - reach, centre + reach


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p values corrected for their number (Holm 1979): ``[test]``, in the order given."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    steps = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(steps, 1.0)
    return corrected


def effect_table(
    frame: pd.DataFrame, by: str | Sequence[str] = "condition", value: str = "effect"
) -> pd.DataFrame:
    """Mean effect of each group with its prompt-clustered 95 % interval and a paired p value.

    Args:
        frame: as `effects` returns it.

    Returns:
        One row per group: its keys, effect, low, high, n (prompts), p (two-sided sign-flip test
        over prompts: exact up to 2^12 sign patterns, else 20000 random ones), p_holm (corrected
        for the number of groups).
    """
    import pandas as pd

    keys = [by] if isinstance(by, str) else list(by)
    rows = []
    for name, group in frame.groupby(keys, sort=False, dropna=False):
        mean, low, high = clustered_interval(group[value], group.prompt)
        per_prompt = group.groupby("prompt", sort=False)[value].mean().to_numpy()
        rows.append((*name, mean, low, high, len(per_prompt), sign_flip_p(per_prompt)))
    table = pd.DataFrame(rows, columns=[*keys, "effect", "low", "high", "n", "p"])
    return table.assign(p_holm=holm(table.p.to_numpy()) if len(table) else [])


def sign_flip_p(differences: Sequence[float] | np.ndarray, seed: int = 0) -> float:
    """Two-sided p value of paired differences being symmetric around 0."""
    d = np.asarray(differences, dtype=float)
    n = len(d)
    if n <= 12:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = np.random.default_rng(seed).choice([-1, 1], (20000, n))
    seen = np.abs(signs @ d) >= abs(d.sum()) - 1e-12 * np.abs(d).sum()
    return float(seen.mean() if n <= 12 else (seen.sum() + 1) / (len(seen) + 1))


def control_quantile(
    frame: pd.DataFrame, family: str, value: str = "effect", q: float = 0.95, sign: float = 1.0
) -> float:
    """The 95 % quantile of a family of matched controls: of their mean effects, in a direction.

    Args:
        frame: as `effects` returns it, with the columns family and control (`vectors.controls`).
        sign: -1 for an effect that should be negative.

    Raises:
        ValueError: there is no control of that family.
    """
    part = frame[frame["family"] == family]
    if part.empty:
        raise ValueError(f"There are no controls of the family {family!r}.")
    means = part.groupby("control", sort=False)[value].mean().to_numpy()
    # The upper of two neighbours: with 8 controls the 95 % quantile is the largest.
    return float(sign * np.quantile(sign * means, q, method="higher"))


VERDICTS = ("reproduced", "weaker", "not seen", "opposite", "cannot tell")


def verdict(
    value: float,
    low: float,
    high: float,
    *,
    holds: str = "yes",
    direction: str = "+",
    number: float | None = None,
    bound: float,
    beyond: Sequence[float] = (),
    against: Sequence[float] = (),
) -> str:
    """Whether a claim of the source is seen here: one of `VERDICTS`.

    Args:
        value, low, high: our effect and its interval, in the unit of ``bound``.
        holds: what the source reports: ``yes`` or ``partly`` (it works, perhaps weakly) or ``no``
            (it does not work: the claim then is that there is no effect).
        direction: which way the effect goes if the claim holds: ``+``, ``-``, or ``0`` (a claim of
            no effect; with ``holds="no"`` the source says that there is one).
        number: the source's number, if it has one in this unit; less than half of it is "weaker".
        bound: an effect whose interval lies within ±bound counts as none. State it.
        beyond: what the effect has to lie beyond besides 0: the 95 % quantiles of the families of
            matched controls.
        against: what an effect on the other side has to lie beyond, to count as the opposite: the
            5 % quantiles.

    Returns:
        ``reproduced``: the interval leaves 0 on the right side, and the effect lies beyond all
        controls (or, where the source sees no effect: the interval lies within the bound; no
        effect in a direction: below it). ``weaker``: so it does, but the effect is less than half
        the source's. ``not seen``: the interval lies within the bound. ``opposite``: it leaves 0 on
        the other side, by more than the bound and beyond the controls there (where the source sees
        no effect: a clear one). ``cannot tell``: everything else.

    Raises:
        ValueError: not a verdict's question: NaN, an unknown word, a bound that is not positive.
    """
    if holds not in ("yes", "partly", "no") or direction not in ("+", "-", "0"):
        raise ValueError(f"holds={holds!r}, direction={direction!r}: yes, partly, no; +, -, 0.")
    if not bound > 0 or np.isnan([value, low, high]).any() or not low <= value <= high:
        raise ValueError(f"No verdict on {value} [{low}, {high}] with the bound {bound}.")
    inside = -bound <= low and high <= bound
    if direction == "0":
        clear = low > bound or high < -bound
        names = ("not seen", "reproduced") if holds == "no" else ("reproduced", "opposite")
        return names[0] if inside else names[1] if clear else "cannot tell"
    sign = 1.0 if direction == "+" else -1.0
    a, b = (low, high) if sign > 0 else (-high, -low)
    works = a > 0 and all(sign * value > sign * c for c in beyond)
    if holds == "no":
        turned = works and sign * value > bound
        return "reproduced" if b <= bound else "opposite" if turned else "cannot tell"
    if works:
        if number is None:
            return "not seen" if inside else "reproduced"  # clear, but too small to count
        # An interval that contains the source's number does not say that it is weaker.
        weaker = sign * value < sign * number / 2 and not low <= number <= high
        return "weaker" if weaker else "reproduced"
    if inside:
        return "not seen"
    turned = b < 0 and sign * value < -bound and all(sign * value < sign * c for c in against)
    return "opposite" if turned else "cannot tell"
