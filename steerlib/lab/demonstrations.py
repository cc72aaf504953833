"""The demonstrations of Turner et al. 2023: their vectors, and what they do, in nats.

Tables: ``data/demonstrations.csv`` (prompts, vectors, the source's settings),
``data/demonstration_effects.csv`` (prompts and continuations, dev and test apart),
``data/settings.csv`` (layer and coefficient per model, chosen on dev prompts).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

import numpy as np

from ..activations import capture
from ..interventions import Conditions, named
from ..measure import logprobs, stats
from ..tokens import encode
from ..vectors import Control, SteeringVector, controls
from . import datasets, settings

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge

FRENCH = "french-codeswitch"
BORROWED = {"14": ("9", "15b")}  # a sweep of positions, on the prompts of two demonstrations


@dataclass(frozen=True)
class Demonstration:
    """One row of ``demonstrations`` with its prompts and continuations; made by `load`.

    Attributes:
        row: of ``data/demonstrations.csv``.
        dev, test: prompts; dev_control, test_control: their counterparts with another word, whose
            effect is subtracted (number 16: duck for goose), or empty.
        targets, references: continuations that do and do not show the behaviour.

    Number 14 has the prompts of numbers 9 and 15b, each with its own continuations.
    """

    row: pd.Series
    dev: list[str]
    test: list[str]
    dev_control: list[str]
    test_control: list[str]
    targets: list[str]
    references: list[str]

    @property
    def id(self) -> str:
        return str(self.row["id"])

    def vector(self, model: TransformerBridge, layer: int) -> SteeringVector:
        """Its steering vector, made before ``layer``."""
        if self.id.startswith(FRENCH):
            pairs = datasets.code_switches()
            parts = [SteeringVector.from_prompts(model, a, b, layer=layer) for a, b in pairs]
            return reduce(add, parts) / len(parts)
        minus = self.row["minus"]
        return SteeringVector.from_prompts(
            model, self.row["plus"], minus if minus != "" else None, layer=layer
        )

    def chosen(self, model: TransformerBridge) -> SteeringVector:
        """Its steering vector at the layer and with the coefficient of ``data/settings.csv``."""
        found = settings.vector_settings(self.id, model)
        return float(found.coefficient) * self.vector(model, int(found.layer))

    def fitting(self, model: TransformerBridge, vector: SteeringVector) -> Demonstration:
        """The same without test prompts that are too short for the vector."""
        keep = [len(encode(model, text)) > vector.n_positions for text in self.test]
        kept = [t for t, k in zip(self.test, keep, strict=True) if k]
        control = [t for t, k in zip(self.test_control, keep, strict=False) if k]
        return replace(self, test=kept, test_control=control)

    def effects(
        self,
        model: TransformerBridge,
        conditions: Conditions,
        split: str = "test",
        n_prompts: int | None = None,
        n_continuations: int | None = None,
    ) -> pd.DataFrame:
        """The effect of each condition on each prompt, in nats (`logprobs.propensity`).

        Args:
            conditions: without the unsteered control, which is added.
            split: ``dev`` or ``test``.
            n_prompts, n_continuations: only so many, from the first on; all by default.
                Number 14: so many of each of its two lists.

        Returns:
            One row per prompt x condition: prompt, condition (and the fields of its name), effect,
            target_effect (how much of it is a rise of the targets), and shuffled: the effect with
            half of the targets exchanged for their references, which should be none.
        """
        if self.id in BORROWED:
            import pandas as pd

            given = (conditions, split, n_prompts, n_continuations)
            frames = [load(name).effects(model, *given) for name in BORROWED[self.id]]
            return pd.concat(frames, ignore_index=True)
        prompts = self.dev if split == "dev" else self.test
        control = self.dev_control if split == "dev" else self.test_control
        found = self._effects(model, conditions, prompts[:n_prompts], n_continuations)
        if control:
            other = self._effects(model, conditions, control[:n_prompts], n_continuations)
            for column in ("effect", "target_effect", "shuffled"):
                found[column] = found[column].to_numpy() - other[column].to_numpy()
        return found

    def _effects(
        self,
        model: TransformerBridge,
        conditions: Conditions,
        prompts: Sequence[str],
        n: int | None,
    ) -> pd.DataFrame:
        both = {"unsteered": None, **named(conditions)}
        texts = [*self.targets[:n], *self.references[:n]]
        table = logprobs.continuation_table(model, prompts, texts, both)
        k = len(texts) // 2
        # [prompt, condition, side, continuation]; the i-th target and reference belong together
        scores = table.logprob.to_numpy().reshape(len(prompts), len(both), 2, k)
        swapped = scores.copy()
        swapped[:, :, :, ::2] = scores[:, :, ::-1, ::2]
        found = table.iloc[:: len(texts)].drop(columns=["continuation", "logprob"])
        target, side, shuffled = (
            np.logaddexp.reduce(x, axis=-1) for x in (scores[:, :, 0], scores, swapped)
        )
        columns = {
            "effect": side[..., 0] - side[..., 1],
            "target_effect": target,
            "shuffled": shuffled[..., 0] - shuffled[..., 1],
        }
        changes = {name: (x - x[:, :1])[:, 1:].ravel() for name, x in columns.items()}
        return found[found.condition != "unsteered"].reset_index(drop=True).assign(**changes)


def load(demonstration: str) -> Demonstration:
    """A demonstration by its id, such as ``"9"`` or ``"15b"``.

    Raises:
        ValueError: there is none of that id.
    """
    table = datasets.load("demonstrations").astype({"id": str}).set_index("id", drop=False)
    if str(demonstration) not in table.index:
        raise ValueError(
            f"There is no demonstration {demonstration!r}; there are {', '.join(table.index)}."
        )
    row = table.loc[str(demonstration)]
    if row["id"] in BORROWED:
        parts = [load(name) for name in BORROWED[row["id"]]]
        dev, test = ([t for part in parts for t in getattr(part, s)] for s in ("dev", "test"))
        return Demonstration(row, dev, test, [], [], [], [])
    name = FRENCH if row["id"].startswith(FRENCH) else row["id"]
    texts = datasets.load("demonstration_effects").astype({"demonstration": str})
    texts = texts[texts.demonstration == name]

    def of(role: str, split: str) -> list[str]:
        return texts.text[(texts.role == role) & (texts.split == split)].tolist()

    # The source's own prompt first.
    test = texts[(texts.role == "prompt") & (texts.split == "test")]
    order = np.argsort(test.origin.to_numpy() != "source", kind="stable")
    control = of("prompt-control", "test")
    return Demonstration(
        row,
        of("prompt", "dev"),
        [test.text.iloc[i] for i in order],
        of("prompt-control", "dev"),
        [control[i] for i in order] if control else [],
        of("target", "both"),
        of("reference", "both"),
    )


def names() -> list[str]:
    """The ids of all demonstrations with prompts of their own, in the source's order."""
    ids = datasets.load("demonstrations")["id"].astype(str)
    return [name for name in ids if name not in BORROWED]


def strength(
    model: TransformerBridge, vector: SteeringVector, prompts: str | Sequence[str]
) -> float:
    """Norm of a vector (with its coefficient) over that of the stream it meets: no unit.

    The mean norm over the positions that it changes and over its layers, over the mean norm of the
    stream there: at the front of the prompts for vectors of several positions, at the last token
    of the prompts for directions.

    Source: Turner et al. 2023, 'Steering vectors are about as "big" as normal
    activation vectors'.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    layers = sorted(vector.layers)
    ratios: list[Any] = []
    for layer in layers:
        norm = vector.norm()[layer]
        changed = (norm > 0).nonzero()[:, 0].tolist()
        if not changed:
            continue
        if vector.at == "front" or vector.n_positions > 1:
            long = [t for t in texts if len(encode(model, t)) > max(changed)]
            where: Any = changed
        else:
            long, where = texts, [-1]
        stream = capture(model, long, layer, where, vector.site).norm(dim=-1).mean()
        ratios.append(float(norm[changed].mean() / stream))
    return float(np.mean(ratios)) if ratios else 0.0


def variants(
    model: TransformerBridge,
    demonstration: str,
    names: Sequence[str],
    size: float,
    layer: int | None = None,
) -> dict[str, SteeringVector]:
    """Other vectors for the prompts of a demonstration (``data/demonstration_variants.csv``).

    All have one strength, so that they differ in direction alone. The vectors of a variant in
    several rows are added together.

    Args:
        names: which variants; they have to be made where they are added.
        size: the strength of each on the dev prompts.
        layer: before which to add them; by default at the source's relative depth.

    Raises:
        ValueError: no such variant, or one of several layers.
    """
    table = datasets.load("demonstration_variants").astype({"demonstration": str})
    demo, found = load(demonstration), {}
    for name in names:
        rows = table[(table.demonstration == demo.id) & (table.variant == name)]
        depths = {*rows.layer_of_48.astype(int), *rows.made_at_layer_of_48.astype(int)}
        if len(depths) != 1:
            raise ValueError(f"Number {demo.id} has no variant {name!r} of one layer.")
        before = round(depths.pop() * model.cfg.n_layers / settings.SOURCE_LAYERS)
        before = before if layer is None else layer
        parts = [
            SteeringVector.from_prompts(model, row.plus, row.minus or None, layer=before)
            if row.plus
            else demo.vector(model, before)
            for row in rows.itertuples()
        ]
        vector = reduce(add, parts)
        found[name] = size / strength(model, vector, demo.dev) * vector
    return found


# ---------------------------------------------------------------- results, by model


def results() -> pd.DataFrame:
    """Effects on the test prompts in every model that was measured, with those of its controls.

    Returns:
        All of ``data/results/effects_<model>.csv``, the smallest model first; prompt is the number
        of the prompt in `Demonstration.test`.
    """
    import pandas as pd

    frames = []
    for name, path in datasets.result_paths("effects").items():
        frame = pd.read_csv(path, dtype={"demonstration": str}, keep_default_na=False)
        frame.insert(0, "model", name)
        frames.append(frame.rename(columns={"prompt_number": "prompt"}))
    if not frames:
        raise ValueError("There are no results: run data/make_settings.py.")
    return pd.concat(frames, ignore_index=True)


def measure(
    model: TransformerBridge, demo: Demonstration, vector: SteeringVector, n: int | None = None
) -> pd.DataFrame:
    """Effects on the test prompts: of a demonstration's vector, and of its matched controls.

    Args:
        n: of targets and references each, from the first on; all by default.

    Returns:
        What `results` has of one demonstration in one model.
    """
    conditions = {Control("demonstration", ""): vector}
    conditions |= controls(vector, model, n_random=20, unrelated=8)
    place = {text: i for i, text in enumerate(demo.test)}
    found = demo.fitting(model, vector).effects(model, conditions, "test", n_continuations=n)
    found["prompt"] = found.prompt.map(place)
    return found.drop(columns="condition").assign(demonstration=demo.id)


def measured(model: TransformerBridge, names: Sequence[str], n: int | None = 5) -> pd.DataFrame:
    """What `results` would have of some demonstrations in a model, measured now, at the settings of
    `settings.vector_settings`: for a model that has no stored results.

    Args:
        n: of targets and references each.
    """
    import pandas as pd

    demos = [load(name) for name in names]
    frames = [measure(model, demo, demo.chosen(model), n) for demo in demos]
    return pd.concat(frames, ignore_index=True).assign(model=model.cfg.model_name)


def summary(frame: pd.DataFrame, bound: float, value: str = "effect") -> pd.DataFrame:
    """Each demonstration in each model: its effect, its controls, and whether it works.

    Args:
        frame: as `results` returns it.
        bound: what counts as no effect, in nats (`stats.verdict`).
        value: ``effect``, or ``shuffled``, of which less should be found; an effect that sits in
            few of the targets survives the exchange of others.

    Returns:
        One row per model x demonstration: model, demonstration, effect, low, high, n_test,
        q95_random, q95_unrelated (quantiles of the controls), q05_random, q05_unrelated, p
        (sign-flip test over prompts against no effect, one-sided, since the direction is given),
        p_holm (corrected for the demonstrations of this model), works (`stats.verdict` would call
        a claim that it works reproduced), verdict (on what the source says).
    """
    import pandas as pd

    said = datasets.load("demonstrations").astype({"id": str}).set_index("id").works
    rows = []
    for (model, name), part in frame.groupby(["model", "demonstration"], sort=False):
        own = part[part["family"] == "demonstration"]
        here = stats.clustered_interval(own[value], own.prompt)
        q = [stats.control_quantile(part, f, value) for f in ("random", "unrelated")]
        two_sided = stats.sign_flip_p(own[value].to_numpy())
        p = two_sided / 2 if here[0] > 0 else 1 - two_sided / 2
        works = stats.verdict(*here, bound=bound, beyond=q) == "reproduced"
        low = [stats.control_quantile(part, f, value, sign=-1) for f in ("random", "unrelated")]
        on = stats.verdict(*here, holds=said[name], bound=bound, beyond=q, against=low)
        rows.append((model, name, *here, len(own), *q, *low, p, works, on))
    columns = ["model", "demonstration", "effect", "low", "high", "n_test"]
    columns += ["q95_random", "q95_unrelated", "q05_random", "q05_unrelated"]
    columns += ["p", "works", "verdict"]
    table = pd.DataFrame(rows, columns=columns)
    corrected = table.groupby("model").p.transform(lambda p: stats.holm(p.to_numpy()))
    table.insert(table.columns.get_loc("p") + 1, "p_holm", corrected)
    return table


def by_chance(frame: pd.DataFrame, bound: float) -> pd.DataFrame:
    """How many demonstrations would work if there were nothing to find, in each model.

    Every random control takes the vector's place once and is judged as it is, against the others.

    Args:
        frame, bound: as for `summary`.

    Returns:
        One row per model: model, passed and tried (random controls), expected (the share of those
        that pass, times the number of demonstrations).
    """
    import pandas as pd

    rows = []
    for model, of_model in frame.groupby("model", sort=False):
        passed = tried = 0
        for _, part in of_model[of_model["family"] != "demonstration"].groupby("demonstration"):
            means = part.groupby(["family", "control"], as_index=False).effect.mean()
            for control, own in part[part["family"] == "random"].groupby("control"):
                others = means[(means["family"] != "random") | (means.control != control)]
                q = [stats.control_quantile(others, f) for f in ("random", "unrelated")]
                here = stats.clustered_interval(own.effect, own.prompt)
                tried += 1
                passed += stats.verdict(*here, bound=bound, beyond=q) == "reproduced"
        n = of_model.demonstration.nunique()
        rows.append((model, passed, tried, passed / tried * n))
    return pd.DataFrame(rows, columns=["model", "passed", "tried", "expected"])
