"""What the notebooks on steering by the honesty repository's direction share: the direction itself,
questions asked in both orders, and matched controls."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..activations import capture_pairs
from ..directions import unit_directions
from ..engine.generate import choice_probabilities
from ..files import Store, digest, model_key
from ..interventions import Conditions, as_interventions, name_columns, named
from ..measure import stats
from ..measure.answers import crossed_effects, leanings
from ..measure.probes import layer_accuracy
from ..vectors import Control, SteeringVector
from .datasets import ContrastPairs, contrast_pairs, load

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge


# The factors of an answer, in the colours that they have in every figure.
COLOURS = {"label": "#E69F00", "meaning": "#009E73", "honesty": "#0072B2"}

# The system prompt under which claims are asked: of those that notebook 08 tries on training
# claims, the one with the smallest label bias.
SYSTEM = "You answer with the letter of the right choice and its text."


@dataclass(frozen=True)
class Fit:
    """The source's direction, and the activations that it was fitted to; made by `fit`.

    Attributes:
        table: all claims; pairs: those that were fitted, in both orders of their options.
        acts: ``[pair, 2, layer, d_model]``, honest answer first, at the answer's label.
        component: ``[layer, d_model]``, unit vectors: the second principal component of the
            differences, of the questions in which A means "true", as in the source.
        accuracy: by layer, how often it tells honest from dishonest answers of claims on which it
            was not fitted.
        length: by layer, the mean norm of the stream, ``[layer]``.
    """

    table: pd.DataFrame
    pairs: ContrastPairs
    acts: torch.Tensor
    component: torch.Tensor
    accuracy: pd.Series
    length: torch.Tensor

    @property
    def best(self) -> int:
        """The layer of the highest accuracy."""
        return int(self.accuracy.idxmax())

    @property
    def held_out(self) -> pd.DataFrame:
        """The claims that were not fitted."""
        fitted = self.table.pair.isin(self.pairs.labels.pair)
        return self.table[~fitted].reset_index(drop=True)

    def trained(self, n: int) -> pd.DataFrame:
        """``n`` of the claims that were fitted, with their twins."""
        first = self.pairs.labels.pair.drop_duplicates()[: n // 2]
        return self.table[self.table.pair.isin(first)].reset_index(drop=True)

    def vector(
        self, layers: Sequence[int], direction: torch.Tensor | None = None
    ) -> SteeringVector:
        """The component (or another direction, ``[layer, d_model]``), to act on the current token,
        as long as the stream is at each layer: a coefficient is in lengths of the stream."""
        unit = self.component if direction is None else direction
        rows = {layer: (self.length[layer] * unit[layer])[None].float() for layer in layers}
        return SteeringVector(rows, "resid_post", "generated", {"name": "component"})


def fit(
    model: TransformerBridge,
    n: int,
    cache: str | os.PathLike[str] | None = None,
    claims: pd.DataFrame | None = None,
) -> Fit:
    """Fit the source's direction to ``n`` claims, at every layer.

    Args:
        n: how many claims, with their twins; both orders are read. The best layer is found by
            cross-validation over pairs of twins (five folds; fewer for few claims).
        cache: as for `capture_pairs`.
        claims: of your own, a table like ``data/claims.csv``, which is the default.

    Source: the honesty repository, "Choosing datasets".
    """
    table = load("claims") if claims is None else claims
    pairs = contrast_pairs(model, table, n, both_orders=True)
    # The token in front of the label is read too, so that notebooks that need it share the cache.
    where = [pairs.position - 1, pairs.position]
    both = capture_pairs(model, pairs.prefixes, pairs.endings, positions=where, cache=cache)
    acts = both[:, :, :, 1]
    given = (pairs.labels.order == "given").to_numpy(copy=True)
    one, labels = acts[given[::2]], pairs.labels[given].reset_index(drop=True)
    unit = [unit_directions(one[:, :, i], "pc2")["pc2"] for i in range(one.shape[2])]
    accuracy = layer_accuracy(one, labels, methods=["pc2"], folds=min(5, n // 4), n_controls=1)
    known = accuracy[(accuracy.method == "pc2") & (accuracy.split == "held-out")]
    by_layer = known.set_index("layer").accuracy
    length = acts.norm(dim=-1).mean((0, 1))
    return Fit(table, pairs, acts, torch.stack(unit), by_layer, length)


def ask(
    model: TransformerBridge,
    table: pd.DataFrame,
    conditions: Conditions,
    n: int | None = None,
    system: str | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> pd.DataFrame:
    """Every question in both orders of its options: what the answers lean to.

    Args:
        table, n, system: as for `datasets.contrast_pairs`; the questions of a smaller ``n`` are
            among those of a larger one.
        cache: a folder that keeps the answers under everything that they depend on.

    Returns:
        As `answers.leanings`: one row per question, order and condition.
    """
    import pandas as pd

    asked = contrast_pairs(model, table, n, both_orders=True, system=system)
    if cache is None:
        said = choice_probabilities(model, asked.prefixes, asked.options, conditions)
    else:
        by_name, store = named(conditions), Store(cache)
        facts = ("steerlib.ask.2", *model_key(model), asked.prefixes, asked.options)
        acts = {name: as_interventions(c, model) for name, c in by_name.items()}
        keys = {name: digest(*facts, [a.key() for a in act])[:32] for name, act in acts.items()}
        known = {name: store.read(key) for name, key in keys.items()}
        columns = [*asked.options, "total_probability"]
        if todo := {name: by_name[name] for name, found in known.items() if found is None}:
            fresh = choice_probabilities(model, asked.prefixes, asked.options, todo)
            values = fresh[columns].to_numpy().reshape(len(asked), len(todo), len(columns))
            for i, name in enumerate(todo):
                known[name] = values[:, i].tolist()
                store.write(keys[name], known[name])
        rows = np.array([known[name] for name in by_name]).transpose(1, 0, 2)
        said = pd.DataFrame(
            {
                "prompt": np.repeat(asked.prefixes, len(by_name)),
                **name_columns(list(by_name) * len(asked)),
                **dict(zip(columns, rows.reshape(-1, len(columns)).T, strict=True)),
            }
        )
    return leanings(said, asked.prefixes, asked.labels, asked.options)


PUSH = 0.4  # lengths of the stream: how far layers are compared


def steering_by_layer(
    model: TransformerBridge,
    fitted: Fit,
    n: int,
    cache: str | os.PathLike[str] | None = None,
) -> pd.DataFrame:
    """What adding the component (`PUSH`) at each layer alone does to claims on which it was fitted.

    Args:
        n: how many of these claims, with their twins.

    Returns:
        Mean effects in nats: one row a layer, columns label, meaning and honesty.
    """
    layers = range(len(fitted.component))
    pushed = {f"layer {layer}": PUSH * fitted.vector([layer]) for layer in layers}
    said = ask(model, fitted.trained(n), {"unsteered": None, **pushed}, system=SYSTEM, cache=cache)
    table = stats.effect_table(crossed_effects(said), ["condition", "factor"])
    wide = table.pivot(index="condition", columns="factor", values="effect").loc[list(pushed)]
    return wide.set_axis(list(layers)).rename_axis(index="layer", columns=None)


def steering_layer(by_layer: pd.DataFrame) -> int:
    """The layer that steers most, by `steering_by_layer`: by what the answer says, meaning or
    honesty, whichever moves more; a push of the label alone does not count."""
    return int(by_layer[["meaning", "honesty"]].abs().max(axis=1).idxmax())


def control_limits(frame: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Where 95 % of the controls lie, to either side, in each family.

    Args:
        frame: effects of controls, as `answers.crossed_effects` returns them, with the columns
            family and control.
        by: columns that tell families of controls apart, such as place, coefficient and factor.

    Returns:
        Indexed by ``by``: random_low, random_high, unrelated_low, unrelated_high, in the effect's
        unit: the quantiles that `stats.control_quantile` gives for a negative and a positive
        effect.
    """
    import pandas as pd

    found = {
        key: {
            f"{family}_{side}": stats.control_quantile(part, family, sign=sign)
            for family in ("random", "unrelated")
            for side, sign in (("low", -1.0), ("high", 1.0))
        }
        for key, part in frame.groupby(list(by), sort=False)
    }
    return pd.DataFrame.from_dict(found, orient="index").rename_axis(list(by))


def in_words(
    effects: pd.DataFrame,
    limits: pd.DataFrame,
    keys: Sequence[str],
    same: pd.DataFrame | None = None,
) -> list[str]:
    """Effects with their intervals as text; a star where one clears zero and both families of
    controls, and where its ``p_holm``, if there is such a column, is below 0.05.

    Args:
        effects: as `stats.effect_table` returns it; ``keys`` are its columns that name the row of
            ``limits`` (`control_limits`). Without such a row there is no star.
        same: the same effects on the questions on which the controls ran, if these were fewer: what
            has to lie beyond the controls.
    """
    edges = limits.reindex(effects.set_index(list(keys)).index)
    values = effects.effect
    if same is not None:
        values = same.set_index(list(keys)).effect.reindex(edges.index)
    low = edges[["random_low", "unrelated_low"]].min(axis=1).to_numpy()
    high = edges[["random_high", "unrelated_high"]].max(axis=1).to_numpy()
    told = []
    for row, value, least, most in zip(effects.itertuples(), values, low, high, strict=True):
        clear = (row.low > 0 and value > most) or (row.high < 0 and value < least)
        clear = clear and getattr(row, "p_holm", 0.0) < 0.05
        told.append(f"{row.effect:+.2f} [{row.low:+.2f}, {row.high:+.2f}]{'*' if clear else ''}")
    return told


def claim_kinds(fitted: Fit, n: int = 8) -> dict[str, np.ndarray]:
    """Kinds of claims that have nothing to do with honesty: longer than the median, beginning with
    a letter of the first half of the alphabet, and each of the most frequent domains.

    A claim and its twin are nearly always of one kind, so truth is balanced.

    Returns:
        name -> one truth value a pair, ``n`` of them.

    Raises:
        ValueError: there are too few domains.
    """
    claims = fitted.table.set_index("id").loc[fitted.pairs.labels.id[::2]]
    length = claims.claim.str.len()
    kinds = {
        "length of the claim": length > length.median(),
        "first letter": claims.claim.str[0].str.upper() < "M",
    }
    for domain in claims.domain.value_counts().index[: max(0, n - len(kinds))]:
        kinds[f"domain {domain}"] = claims.domain == domain
    if len(kinds) < n:
        raise ValueError(f"{n} unrelated directions need {n - 2} domains, got {len(kinds) - 2}.")
    return {name: kind.to_numpy(dtype=bool, copy=True) for name, kind in list(kinds.items())[:n]}


def unrelated_directions(fitted: Fit, n: int = 8) -> dict[str, torch.Tensor]:
    """Directions fitted on the same activations to what has nothing to do with honesty: mean
    differences between claims of one of the `claim_kinds` and the rest.

    Returns:
        name -> ``[layer, d_model]``, ``n`` of them.

    Raises:
        ValueError: there are too few domains.
    """
    answered = fitted.acts.double().mean(1)
    found = {}
    for name, kind in claim_kinds(fitted, n).items():
        mask = torch.from_numpy(kind)
        found[name] = (answered[mask].mean(0) - answered[~mask].mean(0)).float()
    return found


def controls(
    vector: SteeringVector, unrelated: Mapping[str, torch.Tensor], n_random: int = 20
) -> dict[Control, SteeringVector]:
    """Matched controls of a direction: they have its norm and should not steer.

    Args:
        vector: with one position.
        unrelated: name -> ``[layer, d_model]`` for every layer of the model, as
            `unrelated_directions` returns it for all of them.

    Returns:
        `Control` (its fields become columns of a table) -> vector.
    """
    found = {
        Control("random", str(s)): SteeringVector.random_like(vector, s) for s in range(n_random)
    }
    for name, direction in unrelated.items():
        layers = {
            layer: torch.nn.functional.normalize(direction[layer], dim=0)[None] * v.norm()
            for layer, v in vector.layers.items()
        }
        found[Control("unrelated", name)] = replace(vector, layers=layers, meta={"name": name})
    return found
