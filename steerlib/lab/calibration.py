"""How strong is right: the strengths at which a vector works and does not cost too much."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from ..measure import logprobs, stats
from ..vectors import SteeringVector, controls
from . import behaviours, plots
from .behaviours import Behaviour
from .demonstrations import strength as strength_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformer_lens.model_bridge import TransformerBridge

STRENGTHS = (0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 2.0)


class Budget(NamedTuple):
    """What steering may cost, in nats.

    Attributes:
        kl: mean KL(steered || unsteered) of the next token on neutral prompts.
        entanglement: root mean square, over the other behaviours, of the mean effect on each.
    """

    kl: float = 0.5
    entanglement: float = float("inf")


class Dose(NamedTuple):
    """The name of a condition: a vector at some strength."""

    strength: float


class ControlDose(NamedTuple):
    """The name of a condition: a matched control at some strength."""

    strength: float
    family: str
    control: str


@dataclass(frozen=True, eq=False)
class Calibration:
    """The usable strengths of a vector, as `calibrate` found them.

    Attributes:
        behaviour, model: their names.
        budget: that was asked for.
        table: one row per split (``dev``, then those of its usable strengths on ``test``) and
            strength: coefficient, effect with low and high (nats), n (items), random and unrelated
            (the 95 % quantiles of both control families; missing where the strength is out
            already), kl with kl_high (its interval's upper end), entanglement (nats), within (the
            budget), clears (0 and both families), usable (both).
        usable: the lowest and the highest usable strength around the chosen one, on test too; None
            if there is no usable strength.
        chosen: the strength chosen on dev, or None.
        vector: the vector at the chosen strength, or None.
        reason: what was found, in a sentence.
    """

    behaviour: str
    model: str
    budget: Budget
    table: pd.DataFrame
    usable: tuple[float, float] | None
    chosen: float | None
    vector: SteeringVector | None
    reason: str

    def figure(self) -> Figure:
        """Effect and side effects by strength, the usable range shaded."""
        figure, (above, below) = plots.panels(2, ncols=1, size=(plots.WIDTH, 2.3), sharex=True)
        dev = self.table[self.table["split"] == "dev"]
        lines = [dev.assign(line="dev prompts", mean=dev.effect)]
        for family in ("random", "unrelated"):
            known = dev.dropna(subset=family)
            edge = dict.fromkeys(_INTERVAL, known[family])
            lines.append(known.assign(line=f"{family} vectors, 95 %", **edge))
        colours = {"dev prompts": plots.COLOURS["steered"]}
        said: dict[str, Any] = {"line": 0, "band": True, "colours": colours, "xlabel": ""}
        shown = plots.from_zero(
            pd.concat(lines)[["line", "strength", *_INTERVAL]], "strength", "line"
        )
        plots.curves(shown, "strength", "line", ylabel="effect (nats)", ax=above, **said)
        test = self.table[self.table["split"] == "test"]
        reach = np.array([test.effect - test.low, test.high - test.effect]).clip(0)
        if len(test):
            more: dict[str, Any] = {
                "fmt": "D",
                "color": "#000000",
                "capsize": 2.5,
                "label": "test prompts",
            }
            above.errorbar(test.strength, test.effect, yerr=reach, **more)
        costs = {"KL of neutral prompts": "kl", "entanglement": "entanglement"}
        for i, (name, column) in enumerate(costs.items()):
            if dev[column].isna().all():
                continue
            colour, limit = plots.PALETTE[1 + i], getattr(self.budget, column)
            mark: dict[str, Any] = {"color": colour, "marker": plots.MARKS[1 + i], "label": name}
            below.plot([0, *dev.strength], [0, *dev[column]], **mark)
            if np.isfinite(limit):
                below.axhline(limit, color=colour, linestyle="--", linewidth=0.9)
        below.set(xlabel="strength (norm of vector / norm of stream)", ylabel="cost (nats)")
        if self.usable:
            pad = 0.01 * dev.strength.max()
            for ax in (above, below):
                place = (self.usable[0] - pad, self.usable[1] + pad)
                ax.axvspan(*place, color="#009E73", alpha=0.15, lw=0, label="usable")
        plots.one_legend(figure)
        figure.suptitle(self._title())
        n = f"{dev.n.iloc[0]} dev prompts" + (
            f", {test.n.iloc[0]} test prompts" if len(test) else ""
        )
        plots.caption(figure, model=self.model, n=n, dashed="budget", intervals="over items")
        return figure

    def _title(self) -> str:
        name = self.behaviour.replace("_", " ").capitalize()
        if self.usable is None:
            return f"{name}: no usable strength"
        at = self.table[(self.table["split"] == "test") & (self.table.strength == self.chosen)]
        low, high = self.usable
        reach = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        return f"{name}: usable at {reach}, {at.effect.iloc[0]:+.1f} nats at {self.chosen:g}"


_INTERVAL = ["mean", "low", "high"]


def calibrate(
    model: TransformerBridge,
    vector: SteeringVector,
    behaviour: Behaviour | str,
    budget: Budget | float = 0.5,
    *,
    strengths: Iterable[float] = STRENGTHS,
    others: Sequence[Behaviour | str] | None = None,
    n_random: int = 20,
    unrelated: int = 8,
    n_prompts: int | None = None,
    n_others: int = 6,
) -> Calibration:
    """The usable strengths of a vector, chosen on dev prompts and confirmed on test prompts.

    A strength is usable if the effect clears both families of matched controls (its interval leaves
    0, and it lies beyond the 95 % quantile of either family) while its side effects stay within the
    budget (on dev, the upper end of the interval of its KL). Of the strengths usable on dev, the
    one with the highest lower end of its interval is chosen; all of them are measured again on the
    test prompts, and those stay that pass again. If the chosen one does not pass, there is no
    usable strength.

    Args:
        vector: of any length: strengths are norms over that of the stream, at the last token of
            the dev prompts for directions, at their front for vectors that act there.
        behaviour: what it should bring about, or the name of one in ``data/behaviours``.
        budget: a number is a budget of KL alone.
        strengths: to try.
        others: the behaviours that should stay as they are; by default all others of
            ``data/behaviours``.
        n_random, unrelated: sizes of the control families (`vectors.controls`).
        n_prompts, n_others: items of this behaviour and of each other one to use, from the first
            on; all of its own by default.

    Raises:
        ValueError: a budget that nothing can meet (not above 0); strengths that are not above 0; a
            vector of zeros; no such behaviour.

    Source: Turner et al. 2023, on coefficients by trial; Tan et al. 2024 (arXiv 2407.12404), on
    what to measure.
    """
    asked = budget if isinstance(budget, Budget) else Budget(float(budget))
    if not (asked.kl > 0 and asked.entanglement > 0):
        raise ValueError(f"{asked} cannot be met: every limit has to be above 0.")
    tried = sorted(set(map(float, strengths)))
    if not tried or not tried[0] > 0 or not np.isfinite(tried[-1]):
        raise ValueError(f"Strengths have to be numbers above 0, got {tried}.")
    own = behaviours.load(behaviour) if isinstance(behaviour, str) else behaviour
    names = [n for n in behaviours.names() if n != own.name] if others is None else others
    rest = [behaviours.load(b) if isinstance(b, str) else b for b in names]
    unit = strength_of(model, vector, own.rows("dev").prompt.tolist())
    if not unit:
        raise ValueError(f"{vector!r} is zero: it has no strength.")
    normed = vector / unit  # at strength 1
    matched = controls(normed, model, n_random, unrelated)

    def measure(split: str, doses: Sequence[float]) -> pd.DataFrame:
        steered = {Dose(s): s * normed for s in doses}
        frame = own.effects(model, steered, split, n_prompts)
        table = stats.effect_table(frame, "strength").drop(columns=["p", "p_holm"])
        neutral = behaviours.neutral(split)
        kl = logprobs.kl_by_prompt(model, neutral, steered).groupby("strength").kl
        table["kl"] = table.strength.map(kl.mean())
        table["kl_high"] = table.strength.map(kl.apply(lambda x: stats.clustered_interval(x)[2]))
        table["entanglement"] = np.nan
        if rest:
            spilt = behaviours.spill(model, rest, steered, split, n_others)
            each = spilt.groupby(["strength", "behaviour"]).effect.mean()
            rms = (each**2).groupby("strength").mean() ** 0.5
            table["entanglement"] = table.strength.map(rms)
        # Of what costs just the budget on dev prompts, half costs more on others: leave a margin.
        price = table.kl_high if split == "dev" else table.kl
        within = (price <= asked.kl) & ~(table.entanglement > asked.entanglement)
        # Where the strength is out already, controls would change nothing.
        doses = table.strength[within & (table.low > 0)].tolist()
        noise = {ControlDose(s, *c): s * v for s in doses for c, v in matched.items()}
        measured = own.effects(model, noise, split, n_prompts) if noise else None
        for family in ("random", "unrelated"):
            table[family] = [_edge(measured, s, family) for s in table.strength]
        edges = table[["random", "unrelated"]].fillna(-np.inf).max(axis=1)
        clears = table.strength.isin(doses) & (table.effect > edges)
        table = table.assign(within=within, clears=clears, usable=within & clears)
        table.insert(0, "split", split)
        table.insert(2, "coefficient", table.strength / unit)
        return table

    dev = measure("dev", tried)
    good = dev[dev.usable]
    common = (own.name, model.cfg.model_name, asked)
    if good.empty:
        return Calibration(*common, dev, None, None, None, _why_not(dev, asked))
    chosen = float(good.strength[good.low.idxmax()])
    test = measure("test", good.strength.tolist())
    table = pd.concat([dev, test], ignore_index=True)
    passed = set(test.strength[test.usable])
    at = test[test.strength == chosen].iloc[0]
    found = f"effect {at.effect:+.2f} nats [{at.low:.2f}, {at.high:.2f}], KL {at.kl:.2f}"
    if chosen not in passed:
        reason = f"No usable strength: {chosen:g}, chosen on dev, fails on test ({found})."
        return Calibration(*common, table, None, chosen, None, reason)
    usable = run_around(tried, chosen, passed)
    reason = f"Usable from {usable[0]:g} to {usable[1]:g}; at {chosen:g}, on test: {found}."
    return Calibration(*common, table, usable, chosen, chosen * normed, reason)


def _edge(frame: pd.DataFrame | None, strength: float, family: str) -> float:
    """The 95 % quantile of a control family at a strength; NaN where it was not measured."""
    if frame is None:
        return float("nan")
    here = frame[(frame.strength == strength) & (frame["family"] == family)]
    return stats.control_quantile(here, family) if len(here) else float("nan")


def run_around(tried: Sequence[float], chosen: float, passed: set[float]) -> tuple[float, float]:
    """The ends of the unbroken run of passed strengths that the chosen one belongs to."""
    ends = []
    for step in (-1, 1):
        i = list(tried).index(chosen)
        while 0 <= i + step < len(tried) and tried[i + step] in passed:
            i += step
        ends.append(tried[i])
    return ends[0], ends[1]


def _why_not(dev: pd.DataFrame, budget: Budget) -> str:
    if not dev.within.any():
        least = dev.loc[dev.strength.idxmin()]
        costs = [f"KL {least.kl:.2f}"]
        costs += [f"entanglement {least.entanglement:.2f}"] * bool(least.entanglement >= 0)
        return (
            f"No usable strength: the side effects exceed {budget} at all of them (at "
            f"{least.strength:g}: {', '.join(costs)} nats)."
        )
    best = dev[dev.within].sort_values("low").iloc[-1]
    return (
        "No usable strength: within the budget the effect clears 0 and both control families "
        f"nowhere (at {best.strength:g}: {best.effect:+.2f} [{best.low:.2f}, {best.high:.2f}])."
    )
