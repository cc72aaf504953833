"""What the stream says, layer by layer: directions, held-out accuracy, principal components.

Everything here works on activations of contrast pairs, ``[pair, 2, ...]``, positive (honest)
prompt first, as `capture_pairs` returns them for a `ContrastPairs`, and on its table of labels.
Held out means: fitted on other claims; a claim and its twin are never in both parts, and every
training part is cut to as many answers A as B, without which a mean difference is the label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..directions import principal_components, unit_directions
from .stats import proportion_interval

if TYPE_CHECKING:
    import pandas as pd

METHODS = ("mean", "pc1", "pc2", "pc3", "logistic", "mass-mean")
CONTROLS = ("random", "shuffled")


def pair_accuracy(acts: torch.Tensor, direction: torch.Tensor) -> tuple[float, float, float]:
    """How often the first prompt of a pair projects higher: share, and its Wilson interval.

    Args:
        acts: ``[pair, 2, d_model]``; direction: ``[d_model]``, of any length but zero.

    Source: the honesty repository, "Binary classification". A tie counts half.
    """
    hits = _hits((_array(acts)[:, 0] - _array(acts)[:, 1]) @ _array(direction))
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


def best_component(acts: torch.Tensor, n_components: int = 3) -> tuple[str, torch.Tensor]:
    """Of the first principal components of the differences, the one that tells pairs apart best.

    Args:
        acts: ``[pair, 2, d_model]``, balanced; the choice is made on these pairs, so its accuracy
            on them is no held-out number.

    Returns:
        Its method (``pc1``, ``pc2``, ...) and its unit direction ``[d_model]``.

    Source: the honesty repository, which steers by the component that separates honest answers.
    """
    found = unit_directions(acts, [f"pc{k}" for k in range(1, n_components + 1)])
    best = max(found, key=lambda name: pair_accuracy(acts, found[name])[0])
    return best, found[best]


def layer_accuracy(
    acts: torch.Tensor,
    labels: pd.DataFrame,
    layers: Sequence[int] | None = None,
    methods: Sequence[str] = METHODS,
    folds: int = 5,
    n_controls: int = 100,
    seed: int = 0,
) -> pd.DataFrame:
    """Pair accuracy of every method at every layer, in training and on held-out pairs.

    Args:
        acts: ``[pair, 2, layer, d_model]``, as `capture_pairs` returns it for one position.
        labels: of the `ContrastPairs` (columns pair, label, honest are used).
        layers: what to call the layers; 0, 1, ... by default.
        n_controls: how many ``random`` directions (their sign is fixed in training, as for any
            method), and how many mean differences of pairs whose labels were swapped at random
            (``shuffled``).

    Returns:
        One row per layer x method x split: layer, method (the two controls among them), split
        (``train``: fitted on all pairs and tried on the same; ``held-out``: cross-validated),
        accuracy, low, high, n (pairs). The interval is Wilson's; for a control it is where 95 %
        of its draws lie.

    Raises:
        ValueError: labels that do not fit, or too few pairs for so many folds.
    """
    import pandas as pd

    x = acts
    parts = splits(x, labels, folds, seed, 4)
    names = list(range(x.shape[2])) if layers is None else list(layers)
    if len(names) != x.shape[2]:
        raise ValueError(f"{len(names)} layers are named, the activations have {x.shape[2]}.")
    rows = []
    for i, layer in enumerate(names):
        here = x[:, :, i].double()
        diffs = (here[:, 0] - here[:, 1]).numpy()
        for split in ("train", "held-out"):
            hits = {name: np.zeros((len(diffs), 1)) for name in methods}
            hits |= {name: np.zeros((len(diffs), n_controls)) for name in CONTROLS}
            for train, test in parts[:1] if split == "train" else parts[1:]:
                for name, v in unit_directions(here[train], methods).items():
                    hits[name][test] = _hits(diffs[test] @ _array(v)[:, None])
                for name, many in _controls(diffs[train], n_controls, seed).items():
                    hits[name][test] = _hits(diffs[test] @ many.T)
            for name, hit in hits.items():
                share = hit.mean(0)
                interval = (float(share.mean()), *np.quantile(share, [0.025, 0.975]).tolist())
                if name not in CONTROLS:
                    interval = proportion_interval(round(hit.sum()), len(hit))
                rows.append((layer, name, split, *interval, len(hit)))
    columns = ["layer", "method", "split", "accuracy", "low", "high", "n"]
    return pd.DataFrame(rows, columns=columns)


def component_table(
    acts: torch.Tensor,
    labels: pd.DataFrame,
    n_components: int = 3,
    of: str = "differences",
    folds: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """What each principal component separates, on held-out pairs.

    Args:
        acts: ``[pair, 2, d_model]``, one layer.
        labels: of the `ContrastPairs`.

    Returns:
        One row per component x factor x measure: component (1, 2, ...), explained (share of
        variance, all pairs), factor (``honesty``; ``label``, A or B; ``truth`` of the claim, where
        there are claims), measure, accuracy with low and high (Wilson), auc, n. The measure
        ``pairs`` asks which of a pair's two prompts projects higher (not for truth, which they
        share), ``prompts`` tells single prompts apart, by a threshold midway between the means in
        training. For which side is high, the training pairs decide, factor by factor.
    """
    import pandas as pd
    from sklearn.metrics import roc_auc_score

    parts = splits(acts, labels, folds, seed, 3)[1:]
    explained = principal_components(acts, n_components, of)[1].numpy()
    factors = {"honesty": labels.honest, "label": labels.label == "A"}
    if labels.truth.notna().all():
        factors["truth"] = labels.truth
    x = _array(acts)
    place = [(k, name) for k in range(n_components) for name in factors]
    right: dict[tuple[int, str], list[np.ndarray]] = {key: [] for key in place}
    in_pairs: dict[tuple[int, str], list[np.ndarray]] = {key: [] for key in place}
    auc: dict[tuple[int, str], list[float]] = {key: [] for key in place}
    for train, test in parts:
        directions = principal_components(acts[train], n_components, of)[0]
        projected = x @ _array(directions).T
        for k, name in place:
            truth = factors[name].to_numpy(dtype=bool).reshape(-1, 2)
            z, known = projected[:, :, k], truth[train]
            high, low = z[train][known].mean(), z[train][~known].mean()
            z = (z - (high + low) / 2) * (1 if high >= low else -1)
            right[k, name].append((z[test] > 0) == truth[test])
            auc[k, name].append(roc_auc_score(truth[test].ravel(), z[test].ravel()))
            if name != "truth":
                in_pairs[k, name].append(
                    _hits((z[:, 0] - z[:, 1]) * np.sign(truth[:, 0] - 0.5))[test]
                )
    rows = []
    for k, name in place:
        for measure, found in (("pairs", in_pairs), ("prompts", right)):
            if found[k, name]:
                hit = np.concatenate([h.ravel() for h in found[k, name]])
                interval = proportion_interval(round(hit.sum()), len(hit))
                area = float(np.mean(auc[k, name]))
                rows.append((k + 1, explained[k], name, measure, *interval, area, len(hit)))
    columns = ["component", "explained", "factor", "measure", "accuracy", "low", "high", "auc", "n"]
    return pd.DataFrame(rows, columns=columns)


# ---------------------------------------------------------------- parts


def _array(x: torch.Tensor) -> np.ndarray:
    return x.double().cpu().numpy()


def _hits(projections: np.ndarray) -> np.ndarray:
    return (np.sign(projections) + 1) / 2


def splits(
    acts: torch.Tensor, labels: pd.DataFrame, folds: int, seed: int, ndim: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(train, test) pair numbers: first all pairs in both, then each fold."""
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
    if len(set(group)) < folds or min((side == s).sum() for s in "AB") < folds:
        raise ValueError(
            f"{folds} folds need at least as many separate claims, and so many with each answer: "
            f"there are {len(set(group))} claims, {(side == 'A').sum()} with the honest answer A."
        )
    rng = np.random.default_rng(seed)

    def balanced(numbers: np.ndarray) -> np.ndarray:
        sides = [rng.permutation(numbers[side[numbers] == s]) for s in "AB"]
        return np.sort(np.concatenate([s[: min(map(len, sides))] for s in sides]))

    everything = np.arange(len(side))
    kfold = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    parts = [(balanced(train), test) for train, test in kfold.split(side, side, group)]
    return [(balanced(everything), everything), *parts]


def _controls(diffs: np.ndarray, n: int, seed: int) -> dict[str, np.ndarray]:
    """Directions ``[n, d_model]`` that know of honesty no more than a sign, or nothing."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((n, diffs.shape[1]))
    noise *= np.where(noise @ diffs.mean(0) >= 0, 1, -1)[:, None]
    swaps = rng.choice([-1.0, 1.0], (n, len(diffs)))
    return {"random": noise, "shuffled": swaps @ diffs}
