"""Ways to bring about a behaviour, at one price: vectors of several kinds, operators, prompts.

The price is the mean KL(steered || unsteered) of the next token on neutral prompts. Every way gets
the same budget of it; how strong it is within the budget is chosen on dev prompts, and reported on
test prompts: `select`, then `measure`. ``data/make_methods.py`` does both for all behaviours and
keeps the results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch

from ..directions import fit_direction
from ..interventions import Condition
from ..measure import logprobs, stats
from ..operators import Affine, Clamp, Rotate
from ..tokens import Prefix
from ..vectors import SteeringVector, controls
from . import behaviours, datasets
from .behaviours import Behaviour
from .demonstrations import strength as strength_of

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

BUDGET = 0.5  # nats
DEPTHS = (0.45, 0.6, 0.75)  # of the model: layers that are tried for directions,
FRONT_DEPTHS = (0.1, 0.25)  # and for vectors at the front, which late layers hardly read
DOSES = tuple(np.geomspace(0.1, 4, 8).tolist())  # in norms of the stream; and smaller ones
LOW_DOSES = tuple((0.1 * 40 ** (np.arange(-6, 0) / 7)).tolist())  # where even the first is too dear
FRACTIONS = (1.0, 0.6)  # of the largest dose within the budget, to choose from on dev
COMPARED = ("certain", "formal", "french", "past", "weddings")  # by data/make_methods.py
N_EXAMPLES = 4  # so that both orders of a two-choice question are among them
FITTED = {"mean difference": "mean", "PCA": "pca", "logistic": "probe", "mass-mean": "mass-mean"}
ACTADD, MEAN = "ActAdd, one pair", "mean difference"
METHODS = (ACTADD, *FITTED, "Affine", "Clamp", "Rotate")
DRAWS = ("draw 1", "draw 2", "draw 3")  # random directions, put through all that methods go through
PROMPTED = ("instruction", "examples", "instruction + examples")
BOTH = "instruction + mean difference"
FAMILIES = ("random", "unrelated")

Way = Callable[[float], Condition]  # a dose in, a condition out


class Method(NamedTuple):
    """The name of a condition: a method, or a family of controls and which of its members."""

    method: str
    control: str = ""


class At(NamedTuple):
    """A method at a layer."""

    method: str
    layer: int


class Dose(NamedTuple):
    """The name of a condition: a method at a layer, with a dose."""

    method: str
    layer: int
    dose: float


# ---------------------------------------------------------------- the ways


def ways(
    model: TransformerBridge,
    behaviour: Behaviour,
    layers: Sequence[int],
    front_layers: Sequence[int],
) -> dict[At, Way]:
    """Eight methods that need no prompt, each a function from a dose to a condition.

    A dose is how far the stream is moved, in units of its mean norm in the contrast pairs: the
    length of what is added (of ActAdd: as `demonstrations.strength`), where the projection is set,
    or held above, counted from the references' mean (Affine, Clamp), or the angle in radians from
    the mean stream towards the mean difference (Rotate).

    Args:
        layers: where directions are read and act (leaving them, at the last token of the prompt
            and every generated one); front_layers: before which ActAdd adds to the first positions.
    """
    all_acts = behaviour.activations(model, layers)
    found: dict[At, Way] = {}
    words = prompting(behaviour.name)
    for layer in front_layers:
        pair = SteeringVector.from_prompts(model, words.plus, words.minus or None, layer=layer)
        size = strength_of(model, pair, behaviour.rows("dev").prompt.tolist())
        found[At(ACTADD, layer)] = partial(_times, pair / size)
    for i, layer in enumerate(layers):
        acts = all_acts[:, :, i]
        found |= {At(name, layer): way for name, way in _at_layer(model, acts, layer).items()}
    return found


def _at_layer(model: TransformerBridge, acts: torch.Tensor, layer: int) -> dict[str, Way]:
    """The ways that are fitted to activations ``[pair, 2, d_model]``."""
    size = float(acts.norm(dim=-1).mean())

    def vector(tensor: torch.Tensor, name: str) -> SteeringVector:
        meta = {"name": name, "model": model.cfg.model_name}
        return SteeringVector({layer: tensor[None].float()}, "resid_post", "generated", meta)

    fitted = {
        name: vector(fit_direction(acts, method), name).unit() for name, method in FITTED.items()
    }
    unit, low = fitted[MEAN], vector(acts[:, 1].mean(0), "mean of the references")
    middle = vector(acts.flatten(0, 1).mean(0), "mean stream")
    level = float((low.layers[layer] * unit.layers[layer]).sum())
    return {
        **{name: partial(_times, size * v) for name, v in fitted.items()},
        "Affine": lambda dose: Affine(size * unit, low, "generated", dose),
        "Clamp": lambda dose: Clamp(unit, "generated", level + dose * size),
        "Rotate": lambda dose: Rotate(middle, unit, "generated", float(np.degrees(dose))),
    }


def _times(vector: SteeringVector, dose: float) -> SteeringVector:
    return dose * vector


def prompting(behaviour: str) -> pd.Series:
    """The instruction of a behaviour, and the two words of its activation addition.

    Raises:
        ValueError: there is none in ``data/prompting.csv``.
    """
    table = datasets.load("prompting").set_index("behaviour")
    if behaviour not in table.index:
        raise ValueError(f"{behaviour!r} has no instruction; {', '.join(table.index)} have one.")
    return table.loc[behaviour]


def prefixes(behaviour: Behaviour) -> dict[str, Prefix]:
    """Prompting, as conditions: an instruction, examples that show the behaviour, and both."""
    asked = prompting(behaviour.name).instruction + "\n"
    rows = behaviour.rows("fit").iloc[:N_EXAMPLES]
    shown = "".join(rows.prompt + rows.target + "\n")
    return {
        name: Prefix(text)
        for name, text in zip(PROMPTED, (asked, shown, asked + shown), strict=True)
    }


# ---------------------------------------------------------------- how strong: on dev prompts


def doses_within(
    model: TransformerBridge,
    found: Mapping[At, Sequence[Way]],
    budget: float,
    n: int | None = None,
) -> pd.DataFrame:
    """The largest dose of each up to which nothing exceeds the budget: from a grid, then between.

    Args:
        found: a way, or several whose mean cost counts.
        n: neutral dev prompts; all by default.

    Returns:
        Index method and layer; dose, kl (nats). Where no dose at all is within the budget, the one
        of the least KL.
    """
    prompts = behaviours.neutral("dev", n)

    def price(doses: Mapping[At, Sequence[float]]) -> dict[At, pd.Series]:
        named = [
            ({"method": at.method, "layer": at.layer, "dose": dose, "member": i}, way(dose))
            for at, several in doses.items()
            for dose in several
            for i, way in enumerate(found[at])
        ]
        kl = logprobs.kl_by_prompt(model, prompts, named)
        mean = kl.groupby(["method", "layer", "dose"]).kl.mean()
        return {at: mean[at.method][at.layer] for at in doses}

    grid: dict[At, pd.Series] = {}

    def add(doses: Mapping[At, Sequence[float]]) -> None:
        for at, kl in price(doses).items() if doses else ():
            grid[at] = pd.concat([grid[at], kl]).sort_index() if at in grid else kl

    def cheap(kl: pd.Series) -> int:  # so many doses, from the smallest on, are within the budget
        return int((kl <= budget).cummin().sum())

    add(dict.fromkeys(found, DOSES))
    add({at: LOW_DOSES for at, kl in grid.items() if not cheap(kl)})
    last = {at: cheap(kl) for at, kl in grid.items() if 0 < cheap(kl) < len(kl)}
    ends = {at: grid[at].index[n - 1 : n + 1].tolist() for at, n in last.items()}
    add({at: np.linspace(low, high, 6)[1:-1].tolist() for at, (low, high) in ends.items()})
    rows = []
    for at, kl in grid.items():
        dose = kl.index[cheap(kl) - 1] if cheap(kl) else kl.idxmin()
        rows.append((*at, float(dose), float(kl[dose])))
    return pd.DataFrame(rows, columns=[*At._fields, "dose", "kl"]).set_index(list(At._fields))


def select(
    model: TransformerBridge,
    behaviour: Behaviour,
    budget: float = BUDGET,
    n: int | None = 12,
    n_neutral: int = 8,
) -> pd.DataFrame:
    """For every method, the layer and the dose with the largest effect on dev within the budget.

    The layer of the directions is chosen with the mean difference, and kept for all of them. The
    control families random and unrelated get the dose at which some of their members cost the
    budget on average.

    Args:
        n: dev items; n_neutral: neutral dev prompts; of each so many, from the first on.

    Returns:
        One row per method, draw and family: method, layer, dose, effect_dev, kl_dev (its price on
        these neutral prompts; both NaN for families). A method that costs more than the budget at
        any dose has the dose of the least price: `affordable` leaves it out.
    """
    layers, fronts = (
        sorted({max(1, round(d * model.cfg.n_layers)) for d in depths})
        for depths in (DEPTHS, FRONT_DEPTHS)
    )
    found = ways(model, behaviour, layers, fronts)

    def best(wanted: Mapping[At, Way]) -> pd.DataFrame:
        most = doses_within(model, {at: [way] for at, way in wanted.items()}, budget, n_neutral)
        cells = {
            Dose(*at, part * most.dose[at]): way(part * most.dose[at])
            for at, way in wanted.items()
            for part in FRACTIONS
        }
        effects = behaviour.effects(model, cells, "dev", n)
        mean = effects.groupby(list(Dose._fields)).effect.mean().reset_index(name="effect_dev")
        return mean.sort_values("effect_dev").groupby("method").tail(1)

    first_tried = {at: way for at, way in found.items() if at.method in (ACTADD, MEAN)}
    first = best(first_tried)
    layer = int(first.set_index("method").layer[MEAN])
    mean = found[At(MEAN, layer)](1.0)
    assert isinstance(mean, SteeringVector)
    rest = {at: way for at, way in found.items() if at.layer == layer and at not in first_tried}
    rest |= {At(name, layer): partial(_times, v) for name, v in _draws(mean).items()}
    second = best(rest)
    noise: dict[At, list[Way]] = {}
    for name, control in controls(mean, model, 6, 4).items():
        noise.setdefault(At(name.family, layer), []).append(partial(_times, control))
    families = doses_within(model, noise, budget, n_neutral // 2).reset_index()
    table = pd.concat([first, second, families.drop(columns="kl")], ignore_index=True)
    order = [*METHODS, *DRAWS, *FAMILIES]
    table = table.sort_values("method", key=lambda m: m.map(order.index), ignore_index=True)
    return priced(model, behaviour, table, n_neutral)


def priced(
    model: TransformerBridge, behaviour: Behaviour, table: pd.DataFrame, n_neutral: int = 8
) -> pd.DataFrame:
    """``table`` with the column kl_dev: what each method and draw costs on neutral dev prompts.

    Args:
        table: with the columns method, layer, dose, as `select` returns it.
    """
    named = conditions(model, behaviour, table, 0, 0)
    named = {name: c for name, c in named.items() if name.method in set(table.method)}
    kl = logprobs.kl_by_prompt(model, behaviours.neutral("dev", n_neutral), named)
    return table.assign(kl_dev=table.method.map(kl.groupby("method").kl.mean()))


def _draws(vector: SteeringVector) -> dict[str, SteeringVector]:
    """Random directions of a vector's length, other ones than its controls."""
    return {name: SteeringVector.random_like(vector, 1000 + i) for i, name in enumerate(DRAWS)}


def chosen(model: TransformerBridge, behaviour: Behaviour) -> pd.DataFrame:
    """What `select` chose, as it was committed for this model; of another model, chosen now."""
    if datasets.result_path("doses", model.cfg.model_name).is_file():
        table = results("doses")
        known = (table.model == model.cfg.model_name) & (table.behaviour == behaviour.name)
        if known.any():
            return table[known].drop(columns=["model", "behaviour"]).reset_index(drop=True)
    return select(model, behaviour)


# ---------------------------------------------------------------- what they do: on test prompts


def conditions(
    model: TransformerBridge,
    behaviour: Behaviour,
    table: pd.DataFrame,
    n_random: int = 20,
    unrelated: int = 8,
) -> dict[Method, Condition]:
    """Every method as it was chosen, prompts, both together, and every member of the controls.

    Args:
        table: as `select` returns it.
        n_random, unrelated: sizes of the control families.
    """
    row = table.set_index("method")
    layer, front = int(row.layer[MEAN]), int(row.layer[ACTADD])
    found = ways(model, behaviour, [layer], [front])
    named: dict[Method, Condition] = {
        Method(at.method): way(float(row.dose[at.method])) for at, way in found.items()
    }
    prompts = prefixes(behaviour)
    named |= {Method(name): prefix for name, prefix in prompts.items()}
    mean = named[Method(MEAN)]
    assert isinstance(mean, SteeringVector)
    named[Method(BOTH)] = [prompts["instruction"], mean]
    unit = mean / float(row.dose[MEAN])
    named |= {Method(name): float(row.dose[name]) * v for name, v in _draws(unit).items()}
    for control, vector in controls(unit, model, n_random, unrelated).items():
        named[Method(*control)] = float(row.dose[control.family]) * vector
    return named


def measure(
    model: TransformerBridge,
    behaviour: Behaviour,
    named: Mapping[Method, Condition],
    n: int | None = None,
    n_neutral: int | None = 12,
) -> pd.DataFrame:
    """Effects on the test prompts, and the KL on the neutral test prompts.

    Args:
        named: as `conditions` returns it.
        n, n_neutral: items (all by default) and neutral prompts.

    Returns:
        One row per method x item: method, control (empty), prompt (the item), effect (nats), kl
        (nats, the same in all rows of a method); of a control family, the mean over its members.
        Besides, one row per member of a family: control says which, prompt is empty, effect is the
        mean over items.
    """
    effects = behaviour.effects(model, named, "test", n)
    by = list(Method._fields)
    kl = (
        logprobs.kl_by_prompt(model, behaviours.neutral("test", n_neutral), named)
        .groupby(by)
        .kl.mean()
    )
    effects = effects.merge(kl.reset_index(), on=by)
    members = effects[effects.control != ""].groupby(by, sort=False)[["effect", "kl"]].mean()
    items = effects.groupby(["method", "prompt"], sort=False)[["effect", "kl"]].mean()
    both = [items.reset_index().assign(control=""), members.reset_index().assign(prompt="")]
    return pd.concat(both, ignore_index=True)[[*by, "prompt", "effect", "kl"]]


# ---------------------------------------------------------------- tables


def results(kind: str = "methods") -> pd.DataFrame:
    """What ``data/make_methods.py`` found in every model, the smallest first.

    Args:
        kind: ``methods`` (as `measure` returns it) or ``doses`` (as `select` does); both with the
            columns model and behaviour.
    """
    frames = []
    for name, path in datasets.result_paths(kind).items():
        types = {"prompt": str, "control": str}
        empty = {"effect_dev": "", "kl_dev": ""}
        frame = pd.read_csv(path, dtype=types, keep_default_na=False, na_values=empty)
        frames.append(frame.assign(model=name))
    if not frames:
        raise ValueError("There are no results: run data/make_methods.py.")
    return pd.concat(frames, ignore_index=True)


def without_dose(doses: pd.DataFrame, budget: float = BUDGET) -> pd.DataFrame:
    """The methods that no dose keeps within the budget: their cheapest one costs more on dev.

    Args:
        doses: as `select` returns them, with the columns model and behaviour.

    Returns:
        Those rows. A dose that was rounded for the file may cost 2 % more than it did.
    """
    return doses[doses.kl_dev > 1.02 * budget]


def affordable(frame: pd.DataFrame, doses: pd.DataFrame, budget: float = BUDGET) -> pd.DataFrame:
    """What was measured of methods that have a dose within the budget.

    What a method does at a dose that costs too much is not its effect at the price of the others,
    and no effect of 0 either: there is none to compare.

    Args:
        frame: as for `summary`.
        doses: as for `without_dose`.
    """
    keys = ["model", "behaviour", "method"]
    dear = pd.MultiIndex.from_frame(without_dose(doses, budget)[keys])
    return frame[~pd.MultiIndex.from_frame(frame[keys]).isin(dear)]


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Each method on each behaviour: its effect, and whether it clears 0 and all random vectors.

    Args:
        frame: as `measure` returns it, with the columns model and behaviour.

    Returns:
        One row per model x behaviour x method: effect, low, high, n (items), p_holm (of the methods
        of a model on a behaviour), kl, random, unrelated (the families' 95 % quantiles), tuned (the
        largest effect of a random vector, another one, that was tuned as the methods are), works.
    """
    rows = []
    for (model, name), part in frame.groupby(["model", "behaviour"], sort=False):
        members = part[part.prompt == ""].assign(family=part.method)
        edges = [stats.control_quantile(members, family) for family in FAMILIES]
        items = part[part.prompt != ""]
        table = stats.effect_table(items, "method").drop(columns="p")
        kl = items.groupby("method").kl.first()
        draws = table[table.method.isin(DRAWS)].set_index("method").effect
        tuned = [draws.drop(m, errors="ignore").max() for m in table.method]
        table = table.assign(kl=table.method.map(kl), random=edges[0], unrelated=edges[1])
        table = table.assign(tuned=tuned)
        edge = table[[*FAMILIES, "tuned"]].max(axis=1)
        works = (table.low > 0) & (table.effect > edge) & (table.p_holm < 0.05)
        table = table.assign(works=works & ~table.method.isin(FAMILIES))
        table.insert(0, "behaviour", name)
        table.insert(0, "model", model)
        rows.append(table)
    return pd.concat(rows, ignore_index=True)


def against(frame: pd.DataFrame, other: str | None = None) -> pd.DataFrame:
    """Every method minus another one, paired by item, over all behaviours together.

    A method that some behaviour lacks (`affordable`) is compared on the others.

    Args:
        frame: as for `summary`.
        other: the method to compare with; by default each model's best, by its mean effect, of
            those that were measured on every behaviour.

    Returns:
        One row per model x method: effect (mean over items of its behaviours), difference with low
        and high, p_holm (of the methods of a model), n, behaviours (how many), ahead (on how many
        of them its mean is the higher one), tie (p_holm is not below 0.05), other.
    """
    rows = []
    items = frame[frame.prompt != ""]
    items = items.assign(prompt=items.behaviour + " " + items.prompt)
    for model, part in items.groupby("model", sort=False):
        means = part.groupby("method", sort=False).effect.mean()
        there = part.groupby("method").behaviour.nunique()
        whole = means[there[means.index] == part.behaviour.nunique()]
        base = other or str(whole.drop([*DRAWS, *FAMILIES], errors="ignore").idxmax())
        rest = part[part.method != base]
        paired = stats.difference(rest, part[part.method == base])
        table = stats.effect_table(paired, "method").rename(columns={"effect": "difference"})
        mean = part.pivot_table(index="behaviour", columns="method", values="effect")
        ahead = mean.gt(mean[base], axis=0).sum()
        table = table.assign(
            model=model, other=base, effect=table.method.map(means),
            behaviours=table.method.map(there), ahead=table.method.map(ahead),
            tie=table.p_holm >= 0.05,
        )  # fmt: skip
        rows.append(table.drop(columns="p"))
    return pd.concat(rows, ignore_index=True)


def against_random(frame: pd.DataFrame, n: int = 20_000) -> pd.DataFrame:
    """Every method against random directions, over all behaviours of a model together.

    Any fixed direction does something to the items of a behaviour: leaving 0 over items does not
    set a method apart from a random vector. Here the direction is what varies. If a method were one
    more random direction, its effect on each behaviour could as well be that of any member of the
    random family; p is the share of such exchanges, one for each behaviour at random, in which the
    mean over behaviours is at least the method's.

    Args:
        frame: as for `summary`.
        n: exchanges drawn.

    Returns:
        One row per model x method: effect (mean over behaviours), p (one-sided; of b behaviours and
        k members never much below ``(k + 1) ** -b``), p_holm (of the methods of a model).
    """
    rows = []
    for model, part in frame.groupby("model", sort=False):
        rng = np.random.default_rng(0)
        items = part[part.prompt != ""]
        noise = part[(part.prompt == "") & (part.method == "random")]
        means = items.pivot_table(index="behaviour", columns="method", values="effect", sort=False)
        members = [noise[noise.behaviour == name].effect.to_numpy() for name in means.index]
        table = means.drop(columns=list(FAMILIES), errors="ignore").mean().rename("effect")
        p = []
        for method, effect in table.items():
            own = [(m, x) for m, x in zip(members, means[method], strict=True) if x == x]
            drawn = sum(rng.choice([*others, mine], n) for others, mine in own) / len(own)
            p.append((float((drawn >= effect - 1e-9).sum()) + 1) / (n + 1))
        rows.append(table.reset_index().assign(model=model, p=p, p_holm=stats.holm(p)))
    return pd.concat(rows, ignore_index=True)
