"""What the stream says, layer by layer: directions, held-out accuracy, principal components.

Everything here works on activations of contrast pairs, ``[pair, 2, ...]``, positive (honest)
prompt first, as `capture_pairs` returns them for a `ContrastPairs`, and on its table of labels.
Held out means: fitted on other claims; a claim and its twin are never in both parts, and every
training part is cut to as many answers A as B, without which a mean difference is the label.
Intervals resample twins: a claim and its negation, in both orders of the options, are one unit.

The two answers of a pair differ in three ways at once: in honesty, in what they say (true or
false) and in the label (A or B). In both orders of the options the three are crossed, and each
asks which of the two answers projects higher: the honest one, *true*, *A*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..directions import principal_components, unit_directions
from .stats import clustered_interval, proportion_interval

if TYPE_CHECKING:
    import pandas as pd

METHODS = ("mean", "pc1", "pc2", "pc3", "logistic", "mass-mean")
_RESAMPLES = 2000


def pair_accuracy(
    acts: torch.Tensor, direction: torch.Tensor, twins: Sequence[object] | None = None
) -> tuple[float, float, float]:
    """How often the first prompt of a pair projects higher: share, and its 95 % interval.

    Args:
        acts: ``[pair, 2, d_model]``; direction: ``[d_model]``, of any length but zero.
        twins: what resamples together, one for each pair; by default pairs are independent, and
            the interval is Wilson's.

    Source: the honesty repository, "Binary classification". A tie counts half.
    """
    hits = _hits((_array(acts)[:, 0] - _array(acts)[:, 1]) @ _array(direction))
    if twins is not None:
        return _share(hits, np.asarray(twins))
    return proportion_interval(round(hits.sum()), len(hits))


def projections(
    acts: torch.Tensor, labels: pd.DataFrame, directions: Mapping[str, torch.Tensor]
) -> pd.DataFrame:
    """Where every answer lies along some directions.

    Args:
        acts: ``[pair, 2, d_model]``, one layer.
        labels: of the `ContrastPairs`.
        directions: name -> ``[d_model]``; projections are on the unit vector.

    Returns:
        ``labels`` with one column more per direction.

    Raises:
        ValueError: as many activations as labels are needed.
    """
    if acts.ndim != 3 or acts.shape[0] * acts.shape[1] != len(labels):
        raise ValueError(f"Activations {list(acts.shape)} do not fit {len(labels)} labels.")
    flat = acts.reshape(-1, acts.shape[-1]).double()
    found = {name: (flat @ (v / v.norm()).double()).numpy() for name, v in directions.items()}
    return labels.assign(**found)


# ---------------------------------------------------------------- differences of pairs


def pair_differences(
    acts: torch.Tensor,
    labels: pd.DataFrame,
    layers: Sequence[int] | None = None,
    methods: Sequence[str] = METHODS,
    *,
    fit: Sequence[bool] | None = None,
    held_out: Sequence[bool] | None = None,
    n_random: int = 0,
    unrelated: Mapping[str, np.ndarray] | None = None,
    folds: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """How much higher the honest answer of every pair projects, in training and held out.

    Args:
        acts: ``[pair, 2, layer, d_model]``, as `capture_pairs` returns it for one position.
        labels: of the `ContrastPairs`.
        layers: what to call the layers; 0, 1, ... by default.
        fit: one truth value a pair: fit to these alone, such as the source's order of the options.
            Held out, all pairs are tried; in training, those that were fitted.
        held_out: one truth value a pair: these are tried, and the others fitted, in place of folds.
        n_random: how many random directions.
        unrelated: name -> one truth value a pair: as many directions, each the mean difference of
            the pairs of a kind (such as long claims) and the rest. Random and unrelated directions
            get their sign in training, as every method does.

    Returns:
        One row per layer x method x split x pair: layer, method, family (``fitted``, ``random``,
        ``unrelated``), split (``train``: fitted on all pairs and tried on the same; ``held-out``:
        cross-validated), row (number of the pair), the labels of its honest answer, and
        difference: projection of the honest minus that of the dishonest answer, divided by its
        root mean square over pairs; and turn: -1 where the direction of its fold, whose sign is
        honesty's in training, is opposed to that of all pairs, else 1.

    Raises:
        ValueError: labels that do not fit, or too few pairs for so many folds.
    """
    import pandas as pd

    parts = splits(acts, labels, folds, seed, 4, fit, held_out)
    names = list(range(acts.shape[2])) if layers is None else list(layers)
    if len(names) != acts.shape[2]:
        raise ValueError(f"{len(names)} layers are named, the activations have {acts.shape[2]}.")
    kinds = {name: np.asarray(kind, dtype=bool) for name, kind in (unrelated or {}).items()}
    family = dict.fromkeys(methods, "fitted")
    family |= {f"random {i}": "random" for i in range(n_random)}
    family |= dict.fromkeys(kinds, "unrelated")
    noise = np.random.default_rng(seed).standard_normal((n_random, acts.shape[-1]))
    honest = labels[labels.honest.astype(bool)].reset_index(drop=True).drop(columns="honest")
    found = []
    for i, layer in enumerate(names):
        here = acts[:, :, i].double()
        diffs, middle = (here[:, 0] - here[:, 1]).numpy(), here.mean(1).numpy()
        whole = np.zeros(0)  # the directions of all pairs
        for split in ("train", "held-out"):
            now = parts[:1] if split == "train" else parts[1:]
            tried = np.sort(np.concatenate([test for _, test in now]))
            out, turn = np.zeros((2, len(family), len(diffs)))
            for train, test in now:
                fitted = unit_directions(here[train], methods) if methods else {}
                others = [*noise, *(_kind(middle[train], kind[train]) for kind in kinds.values())]
                signed = [v if v @ diffs[train].mean(0) >= 0 else -v for v in others]
                directions = np.stack([*map(_array, fitted.values()), *signed])
                out[:, test] = directions @ diffs[test].T
                whole = directions if split == "train" else whole
                turn[:, test] = np.where((directions * whole).sum(1) >= 0, 1, -1)[:, None]
            out = out[:, tried] / np.maximum(_rms(out[:, tried]), 1e-300)
            facts = honest.iloc[np.tile(tried, len(family))].reset_index(drop=True)
            facts = facts.assign(difference=out.ravel(), row=np.tile(tried, len(family)))
            facts["turn"] = turn[:, tried].ravel()
            facts.insert(0, "split", split)
            facts.insert(0, "family", np.repeat(list(family.values()), len(tried)))
            facts.insert(0, "method", np.repeat(list(family), len(tried)))
            facts.insert(0, "layer", layer)
            found.append(facts)
    return pd.concat(found, ignore_index=True)


def chosen_layers(
    acts: torch.Tensor,
    labels: pd.DataFrame,
    method: str,
    layers: Sequence[int] | None = None,
    *,
    fit: Sequence[bool] | None = None,
    folds: int = 5,
    seed: int = 0,
) -> pd.Series:
    """For every pair, the layer that is best on the claims of the other folds.

    Args:
        acts, labels, layers, fit, folds, seed: as for `pair_differences`, whose folds these are.

    Returns:
        Number of the pair -> layer: of the highest accuracy in a cross-validation (one fold less)
        of the claims on which the pair's direction was fitted. What `pair_differences` has at
        that layer is held out from the choice of the layer, too.
    """
    import pandas as pd

    chosen: dict[int, int] = {}
    for train, test in splits(acts, labels, folds, seed, 4, fit)[1:]:
        own = labels.iloc[(2 * train[:, None] + [0, 1]).ravel()].reset_index(drop=True)
        inner = pair_differences(acts[train], own, layers, [method], folds=folds - 1, seed=seed)
        inner = inner[inner.split == "held-out"].assign(hit=lambda t: _hits(t.difference))
        chosen |= dict.fromkeys(test.tolist(), inner.groupby("layer").hit.mean().idxmax())
    return pd.Series(chosen, name="layer").sort_index()


def crossed(differences: pd.DataFrame) -> pd.DataFrame:
    """The three ways in which the answers of a pair differ, one below the other.

    Args:
        differences: as `pair_differences` returns it.

    Returns:
        Its rows for each factor (``honesty``; ``meaning``, where there are claims; ``label``),
        with the columns factor, weight (the difference, counted towards the honest answer, *true*
        or *A*) and hit (1 if that one projects higher, 0 if not, 0.5 for a tie). In both orders
        of the options the three mean weights are independent, and the square of one is the share
        of the mean squared difference that the factor explains. Meaning and label are counted
        along the direction of all pairs, or those of a component that knows nothing of honesty,
        whose sign is another in every fold, would cancel.
    """
    import pandas as pd

    parts = []
    for factor in ("honesty", "meaning", "label"):
        if factor == "honesty":
            sign = np.ones(len(differences))
        elif factor == "label":
            sign = differences.turn * np.where(differences.label == "A", 1.0, -1.0)
        elif "meaning" in differences and differences.meaning.notna().all():
            sign = differences.turn * np.where(differences.meaning.astype(bool), 1.0, -1.0)
        else:
            continue
        weight = differences.difference.to_numpy() * np.asarray(sign)
        parts.append(differences.assign(factor=factor, weight=weight, hit=_hits(weight)))
    return pd.concat(parts, ignore_index=True)


def accuracy_table(frame: pd.DataFrame, by: Sequence[str], value: str = "hit") -> pd.DataFrame:
    """Means of each group with intervals over twins.

    Args:
        frame: as `crossed` returns it.
        value: ``hit`` gives shares of pairs, whose intervals stay within 0 and 1; or ``weight``.

    Returns:
        One row per group: its keys, mean, low, high, n (twins).
    """
    import pandas as pd

    rows = []
    for name, group in frame.groupby(list(by), sort=False):
        values, twins = group[value].to_numpy(), group["pair"].to_numpy()
        interval = _share(values, twins) if value == "hit" else _interval(values, twins)
        rows.append((*name, *interval, len(set(twins))))
    return pd.DataFrame(rows, columns=[*by, "mean", "low", "high", "n"])


def layer_accuracy(
    acts: torch.Tensor,
    labels: pd.DataFrame,
    layers: Sequence[int] | None = None,
    methods: Sequence[str] = METHODS,
    folds: int = 5,
    n_controls: int = 20,
    seed: int = 0,
) -> pd.DataFrame:
    """Pair accuracy of every method at every layer, in training and on held-out pairs.

    Args:
        acts, labels, layers, folds: as for `pair_differences`.
        n_controls: how many random directions.

    Returns:
        One row per layer x method x split (``random`` among the methods): layer, method, split,
        accuracy, low, high, n (pairs). The interval resamples twins; for ``random`` it is where
        95 % of the draws lie.

    Raises:
        ValueError: as `pair_differences`.
    """
    import pandas as pd

    found = pair_differences(
        acts, labels, layers, methods, n_random=n_controls, folds=folds, seed=seed
    )
    found["hit"] = _hits(found.difference.to_numpy())
    rows = []
    for (layer, split), part in found.groupby(["layer", "split"], sort=False):
        for method, group in part[part.family == "fitted"].groupby("method", sort=False):
            share = _share(group.hit.to_numpy(), group["pair"].to_numpy())
            rows.append((layer, method, split, *share, len(group)))
        if n_controls:
            drawn = part[part.family == "random"].groupby("method").hit.mean()
            share = (drawn.mean(), *drawn.quantile([0.025, 0.975]))
            rows.append((layer, "random", split, *share, len(acts)))
    columns = ["layer", "method", "split", "accuracy", "low", "high", "n"]
    return pd.DataFrame(rows, columns=columns)


def component_table(
    acts: torch.Tensor,
    labels: pd.DataFrame,
    n_components: int = 3,
    of: str = "differences",
    folds: int = 5,
    seed: int = 0,
    fit: Sequence[bool] | None = None,
    held_out: Sequence[bool] | None = None,
) -> pd.DataFrame:
    """What each principal component separates, on held-out pairs.

    Args:
        acts: ``[pair, 2, d_model]``, one layer.
        labels: of the `ContrastPairs`.
        fit, held_out: as for `pair_differences`.

    Returns:
        One row per component x factor x measure: component (1, 2, ...), explained (share of
        variance, all fitted pairs), factor (``honesty``; ``label``, A or B; where there are claims
        ``meaning``, what the answer says, and ``truth`` of the claim), measure, accuracy with low
        and high (over twins), auc, n. The measure ``pairs`` asks which of a pair's two prompts
        projects higher (not for truth, which they share), ``prompts`` tells single prompts apart,
        by a threshold midway between the means in training. For which side is high, the training
        pairs decide, factor by factor.
    """
    import pandas as pd
    from sklearn.metrics import roc_auc_score

    everything, *parts = splits(acts, labels, folds, seed, 3, fit, held_out)
    explained = principal_components(acts[everything[0]], n_components, of)[1].numpy()
    factors = {"honesty": labels.honest, "label": labels.label == "A"}
    if labels.truth.notna().all():
        truth = labels.truth.astype(bool)
        factors |= {"meaning": truth == labels.honest.astype(bool), "truth": truth}
    x, twins = _array(acts), labels.pair.to_numpy().reshape(-1, 2)
    place = [(k, name) for k in range(n_components) for name in factors]
    right: dict[tuple[int, str], list[np.ndarray]] = {key: [] for key in place}
    in_pairs: dict[tuple[int, str], list[np.ndarray]] = {key: [] for key in place}
    auc: dict[tuple[int, str], list[float]] = {key: [] for key in place}
    for train, test in parts:
        directions = principal_components(acts[train], n_components, of)[0]
        projected = x @ _array(directions).T
        for k, name in place:
            is_it = factors[name].to_numpy(dtype=bool).reshape(-1, 2)
            z, known = projected[:, :, k], is_it[train]
            high, low = z[train][known].mean(), z[train][~known].mean()
            z = (z - (high + low) / 2) * (1 if high >= low else -1)
            right[k, name].append((z[test] > 0) == is_it[test])
            auc[k, name].append(roc_auc_score(is_it[test].ravel(), z[test].ravel()))
            if name != "truth":
                in_pairs[k, name].append(
                    _hits((z[:, 0] - z[:, 1]) * np.sign(is_it[:, 0] - 0.5))[test]
                )
    tested = np.concatenate([test for _, test in parts])
    rows = []
    for k, name in place:
        for measure, found in (("pairs", in_pairs), ("prompts", right)):
            if found[k, name]:
                hit = np.concatenate(found[k, name]).astype(float)
                of_hit = twins[tested] if hit.ndim == 2 else twins[tested][:, 0]
                interval = _share(hit.ravel(), of_hit.ravel())
                area = float(np.mean(auc[k, name]))
                rows.append((k + 1, explained[k], name, measure, *interval, area, hit.size))
    columns = ["component", "explained", "factor", "measure", "accuracy", "low", "high", "auc", "n"]
    return pd.DataFrame(rows, columns=columns)


def by_twin(labels: pd.DataFrame, values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Values of single answers as a table of twins.

    Args:
        labels: of a `ContrastPairs` of claims, each with one twin, in both orders.
        values: one for each row of ``labels``.

    Returns:
        ``[twin, truth, order, label]``: false and true claim, given and swapped options, A and B.

    Raises:
        ValueError: a twin lacks one of its eight answers.
    """
    table = labels.assign(value=np.asarray(values, dtype=float)).pivot_table(
        index="pair", columns=["truth", "order", "label"], values="value", aggfunc="mean"
    )
    if table.shape[1] != 8 or table.isna().to_numpy().any():
        raise ValueError("Every claim needs its twin, both orders and both answers.")
    return table.sort_index(axis=1).to_numpy().reshape(-1, 2, 2, 2)


# ---------------------------------------------------------------- parts


def _array(x: torch.Tensor) -> np.ndarray:
    return x.double().cpu().numpy()


def _hits(projections: np.ndarray) -> np.ndarray:
    return (np.sign(projections) + 1) / 2


def _rms(values: np.ndarray) -> np.ndarray:
    """Root mean square of each row: ``[row, 1]``."""
    return np.sqrt((values**2).mean(-1, keepdims=True))


def _kind(middle: np.ndarray, kind: np.ndarray) -> np.ndarray:
    """Unit mean difference of pairs of a kind and the rest; zeros if there are none of one."""
    if kind.all() or not kind.any():
        return np.zeros(middle.shape[1])
    difference = middle[kind].mean(0) - middle[~kind].mean(0)
    return difference / (np.linalg.norm(difference) or 1.0)


def _interval(values: np.ndarray, twins: np.ndarray) -> tuple[float, float, float]:
    return clustered_interval(values, twins, n_resamples=_RESAMPLES)


def _share(hits: np.ndarray, twins: np.ndarray) -> tuple[float, float, float]:
    """A share with its interval over twins, exact at both ends and within 0 and 1."""
    if (hits == 1).all():
        _, _, missed = clustered_interval(1 - hits, twins, top=1.0)
        return 1.0, 1 - missed, 1.0
    share, low, high = clustered_interval(hits, twins, n_resamples=_RESAMPLES, top=1.0)
    return share, max(low, 0.0), min(high, 1.0)


def splits(
    acts: torch.Tensor,
    labels: pd.DataFrame,
    folds: int,
    seed: int,
    ndim: int,
    fit: Sequence[bool] | None = None,
    held_out: Sequence[bool] | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(train, test) pair numbers: first all pairs in both, then each fold; or, in place of the
    folds, the pairs ``held_out``, which then are not in the first part either. Trained are those
    of ``fit`` alone; all are tested, but in the first part the same."""
    from sklearn.model_selection import StratifiedGroupKFold

    honest = labels[labels.honest.astype(bool)]
    if acts.ndim != ndim or acts.shape[1] != 2 or 2 * len(acts) != len(labels):
        raise ValueError(
            f"Activations {list(acts.shape)} do not fit: wanted are {ndim} dimensions, of which "
            f"the first is pairs and the second 2, for {len(labels)} labels."
        )
    if list(honest.index) != list(labels.index[::2]):
        raise ValueError("In the labels every honest answer must stand before its dishonest one.")
    side, group = honest.label.to_numpy(), honest.pair.to_numpy()
    if held_out is None and len(set(group)) < folds or min((side == s).sum() for s in "AB") < folds:
        raise ValueError(
            f"{folds} folds need at least as many separate claims, and so many with each answer: "
            f"there are {len(set(group))} claims, {(side == 'A').sum()} with the honest answer A."
        )
    rng = np.random.default_rng(seed)
    chosen = np.ones(len(side), dtype=bool) if fit is None else np.asarray(fit, dtype=bool)

    def balanced(numbers: np.ndarray) -> np.ndarray:
        fitted = numbers[chosen[numbers]]
        sides = [rng.permutation(fitted[side[fitted] == s]) for s in "AB"]
        return np.sort(np.concatenate([s[: min(map(len, sides))] for s in sides]))

    if held_out is not None:
        apart = np.asarray(held_out, dtype=bool)
        train, test = np.flatnonzero(~apart), np.flatnonzero(apart)
        if torn := set(group[train]) & set(group[test]):
            raise ValueError(f"Twins belong together: {sorted(torn)[0]} is held out in part only.")
        return [(balanced(train), train[chosen[train]]), (balanced(train), test)]
    everything = np.arange(len(side))
    kfold = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    parts = [(balanced(train), test) for train, test in kfold.split(side, side, group)]
    return [(balanced(everything), everything[chosen]), *parts]
