"""Behaviours: contrast pairs to fit a vector to, and prompts on which to choose and to report.

Tables: ``data/behaviours/*.csv``; neutral prompts: ``data/prompts.csv``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from ..activations import capture
from ..interventions import Conditions, name_columns, named
from ..measure import logprobs
from ..tokens import continuation_ids
from . import datasets

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

SPLITS = ("fit", "dev", "test")
COLUMNS = ("split", "prompt", "target", "reference")


@dataclass(frozen=True, eq=False)
class Behaviour:
    """What a vector should bring about; made by `load`, or from a table of one's own.

    Attributes:
        name: in a word.
        table: one row per prompt: split (``fit``, ``dev``, ``test``), prompt, target and reference
            (the continuation that shows the behaviour, and one that does not, with the space that
            each begins with). If there is a column item, rows of one item belong together, such
            as the two orders of a question, or two statements that share their answers: intervals
            resample items.

    Raises:
        ValueError: columns are missing; fewer than two prompts in a split; a prompt in more than
            one split; a target that is its reference.
    """

    name: str
    table: pd.DataFrame

    def __post_init__(self) -> None:
        if missing := [c for c in COLUMNS if c not in self.table]:
            raise ValueError(
                f"A behaviour is a table with the columns {', '.join(COLUMNS)}; "
                f"{', '.join(missing)} is missing from {self.name!r}."
            )
        for split in SPLITS:
            n = len(set(self.rows(split).prompt))
            if n < 2:
                raise ValueError(
                    f"{self.name!r} has {n} prompt(s) in its split {split!r}: at least two are "
                    "needed, to fit, to choose and to report on others."
                )
        shared = self.table.groupby("prompt")["split"].nunique()
        if (shared > 1).any():
            raise ValueError(
                f"{shared[shared > 1].index[0]!r} stands in more than one split of {self.name!r}: "
                "what is chosen on a prompt cannot be reported on it."
            )
        same = self.table[self.table.target == self.table.reference]
        if len(same):
            raise ValueError(
                f"The target {same.target.iloc[0]!r} is also its reference, {len(same)} time(s) in "
                f"{self.name!r}: nothing tells them apart."
            )

    def rows(self, split: str, n: int | None = None) -> pd.DataFrame:
        """The rows of a split, of its first ``n`` items only; with the column item.

        Raises:
            ValueError: there is no such split.
        """
        if split not in SPLITS:
            raise ValueError(f"There is no split {split!r}: use {', '.join(SPLITS)}.")
        found = self.table[self.table["split"] == split].reset_index(drop=True)
        if "item" not in found:
            found["item"] = found.prompt
        return found[found.item.isin(found.item.unique()[:n])]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The contrast pairs of the split ``fit``, as `SteeringVector.from_pairs` takes them."""
        rows = self.rows("fit")
        return list(zip(rows.prompt + rows.target, rows.prompt + rows.reference, strict=True))

    def activations(
        self, model: TransformerBridge, layers: Sequence[int], n: int | None = None
    ) -> torch.Tensor:
        """The stream leaving each layer, averaged over the continuation, of every contrast pair.

        Args:
            n: only so many items, from the first on.

        Returns:
            ``[pair, 2, layer, d_model]``, target first, as `directions.fit_direction` takes each
            layer of it.
        """
        rows = self.rows("fit", n)
        sides = [rows.target.tolist(), rows.reference.tolist()]
        ends = [end for pair in zip(*sides, strict=True) for end in pair]
        texts = [prompt + end for prompt, end in zip(rows.prompt.repeat(2), ends, strict=True)]
        sizes = [len(continuation_ids(model, end)) for end in ends]
        found: dict[int, torch.Tensor] = {}
        for size in sorted(set(sizes)):
            chosen = [i for i, k in enumerate(sizes) if k == size]
            acts = capture(model, [texts[i] for i in chosen], layers, range(-size, 0))
            found |= dict(zip(chosen, acts.mean(2), strict=True))
        together = torch.stack([found[i] for i in range(len(texts))])
        return together.reshape(len(rows), 2, *together.shape[1:])

    def effects(
        self,
        model: TransformerBridge,
        conditions: Conditions,
        split: str = "test",
        n: int | None = None,
    ) -> pd.DataFrame:
        """The effect of each condition on each prompt, in nats (`logprobs.propensity`).

        Args:
            conditions: without the unsteered control, which is added.
            n: only so many items, from the first on.

        Returns:
            One row per prompt x condition: prompt (the item that the prompt belongs to, by which
            `stats.effect_table` makes its intervals), condition (and the fields of its name),
            effect, target_effect (how much of it is a rise of the target), unsteered (the
            propensity without a condition).
        """
        rows = self.rows(split, n)
        by_name = named(conditions)
        both = {"unsteered": None, **by_name}
        target, reference = ([[text] for text in rows[side]] for side in ("target", "reference"))
        table = logprobs.propensity(model, rows.prompt.tolist(), target, reference, both)
        shape = (len(rows), len(both))
        leans, rise = (table[c].to_numpy().reshape(shape) for c in ("propensity", "target"))
        return pd.DataFrame(
            {
                "prompt": np.repeat(rows.item.astype(str).to_numpy(), len(by_name)),
                **name_columns(list(by_name) * len(rows)),
                "effect": (leans - leans[:, :1])[:, 1:].ravel(),
                "target_effect": (rise - rise[:, :1])[:, 1:].ravel(),
                "unsteered": np.repeat(leans[:, 0], len(by_name)),
            }
        )


def names() -> list[str]:
    """The behaviours of ``data/behaviours``, in alphabetical order."""
    return sorted(path.stem for path in (datasets.folder() / "behaviours").glob("*.csv"))


def load(name: str) -> Behaviour:
    """A behaviour of ``data/behaviours`` by name, such as ``french``.

    Both orders of a question are one item (``agreeing``), and so are the two statements that share
    their answers (``truthful``).

    Raises:
        ValueError: there is none of that name.
    """
    if name not in names():
        raise ValueError(f"There is no behaviour {name!r}; there are {', '.join(names())}.")
    table = datasets.load(f"behaviours/{name}")
    item = table["id"] if name != "truthful" else (table["id"] + 1) // 2
    return Behaviour(name, table.assign(item=item.map("{:03}".format)))


def neutral(split: str = "test", n: int | None = None) -> list[str]:
    """Prompts of no behaviour, on which side effects are measured: 24 dev and 24 test prompts.

    Raises:
        ValueError: a split that is neither.
    """
    if split not in ("dev", "test"):
        raise ValueError(f"Neutral prompts are dev or test prompts, not {split!r}.")
    table = datasets.load("prompts")
    prompts = table[table["set"] == "neutral"].prompt.tolist()
    half = len(prompts) // 2
    return (prompts[:half] if split == "dev" else prompts[half:])[:n]


def spill(
    model: TransformerBridge,
    behaviours: Sequence[Behaviour],
    conditions: Conditions,
    split: str = "test",
    n: int | None = None,
) -> pd.DataFrame:
    """What conditions do to several behaviours: one row per behaviour x prompt x condition.

    Returns:
        `Behaviour.effects` of each, with the column behaviour.
    """
    frames = [b.effects(model, conditions, split, n).assign(behaviour=b.name) for b in behaviours]
    return pd.concat(frames, ignore_index=True)
