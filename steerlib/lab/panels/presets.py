"""The gallery of the app: settings that were measured, and how they did, model by model.

Where the numbers come from: of demonstrations, ``data/settings.csv`` and
``data/results/effects_<model>.csv``; of directions, ``data/results/presets_<model>.csv``, which
``data/make_presets.py`` writes. Layers and strengths were chosen on dev prompts, effects are those
on test prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from ...measure import stats
from ...vectors import SteeringVector
from .. import behaviours, datasets, demonstrations, methods, settings

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

BOUND = 0.25  # nats: an effect whose interval lies within ±0.25 counts as none
PAIRS = 5  # targets and references of a demonstration: the cost grows with them
ITEMS = 8  # test prompts of a behaviour

TEXTS = "two texts"  # the vector that is made of plus and minus
SENTENCES = "French sentences"


class Shown(NamedTuple):
    """What stands on a button, and the prompt behind it (empty: the demonstration's own)."""

    label: str
    prompt: str = ""


FRIEND = "I went up to my friend and said"
DEMONSTRATIONS = {
    "15b": Shown("weddings", "I'm excited because I'm going to a"),
    "7": Shown("dragons"),
    "6": Shown("Eiffel in Rome"),
    "10": Shown("to convert you"),
    "3": Shown("conspiracy"),
    demonstrations.FRENCH: Shown("French", "The room that visitors like best is"),
    "1": Shown("love"),
    "13": Shown("Je m'appelle"),
    "5": Shown("anger"),
    "9": Shown("weddings, a sentence"),
    "fishing": Shown("fishing"),
}
# A behaviour and which way: + brings it about, - its opposite.
BEHAVIOURS = {
    ("affection", 1): Shown("love +", "We shared an apartment for a year, and by the end I"),
    ("affection", -1): Shown("love −", "We shared an apartment for a year, and by the end I"),
    ("truthful", 1): Shown("honesty +", "The capital of France is"),
    ("truthful", -1): Shown("honesty −", "The capital of France is"),
    ("past", 1): Shown("past tense", "My aunt and uncle"),
    ("past", -1): Shown("future tense", "My aunt and uncle"),
    ("formal", 1): Shown("formal", "About the meeting tomorrow:"),
    ("certain", 1): Shown("sure of it", "Who broke the vase?"),
    ("certain", -1): Shown("not so sure", "Who broke the vase?"),
    ("hopeful", 1): Shown("hopeful", "This time next year we will be"),
}


# ---------------------------------------------------------------- vectors


class Source(NamedTuple):
    """A vector that is not made of two short texts.

    Attributes:
        make: a model and a layer in, the vector out.
        code: the same as Python text, with ``{layer}`` in it.
    """

    make: Callable[[TransformerBridge, int], SteeringVector]
    code: str


def _of_pairs(name: str) -> Source:
    def make(model: TransformerBridge, layer: int) -> SteeringVector:
        ways = methods.ways(model, behaviours.load(name), [layer], [])
        found = ways[methods.At(methods.MEAN, layer)](1.0)
        assert isinstance(found, SteeringVector)
        return found

    made = f"sl.methods.ways(model, sl.behaviours.load({name!r}), [{{layer}}], [])"
    return Source(make, f"{made}[{methods.MEAN!r}, {{layer}}](1.0)")


_FRENCH = f"sl.demonstrations.load({demonstrations.FRENCH!r}).vector(model, {{layer}})"
SOURCES = {
    SENTENCES: Source(
        lambda model, layer: demonstrations.load(demonstrations.FRENCH).vector(model, layer),
        _FRENCH,
    ),
    **{f"pairs: {name}": _of_pairs(name) for name in dict.fromkeys(n for n, _ in BEHAVIOURS)},
}


# ---------------------------------------------------------------- what is measured live


class Item(NamedTuple):
    """A prompt after which the propensity is measured."""

    prompt: str
    targets: list[str]
    references: list[str]


# Names of what there is to measure -> a demonstration or a behaviour.
MEASURES = {shown.label: name for name, shown in DEMONSTRATIONS.items()} | {
    name: name for name in dict.fromkeys(name for name, _ in BEHAVIOURS)
}


@cache
def _continuations(name: str) -> tuple[list[str], list[str]]:
    demo = demonstrations.load(name)
    return demo.targets[:PAIRS], demo.references[:PAIRS]


def items(measure: str, prompt: str) -> list[Item]:
    """After which prompts a propensity is measured, and of what.

    Continuations of a demonstration fit any prompt: there it is the one given. Those of a behaviour
    fit its own: there they are its first test prompts.
    """
    name = MEASURES[measure]
    if name in DEMONSTRATIONS:
        return [Item(prompt, *_continuations(name))]
    rows = behaviours.load(name).rows("test", ITEMS)
    return [Item(row.prompt, [row.target], [row.reference]) for row in rows.itertuples()]


# ---------------------------------------------------------------- the gallery


class Preset(NamedTuple):
    """A setting, and how it did in a model.

    Attributes:
        vector: `TEXTS` or one of `SOURCES`; plus and minus are those of `TEXTS`.
        effect, low, high: nats, on ``n`` test prompts; noise: the larger 95 % quantile of random
            and unrelated vectors of its size; works: whether it lies beyond, and its interval
            beyond 0 (`stats.verdict`).
    """

    label: str
    vector: str
    plus: str
    minus: str
    prompt: str
    layer: int
    coefficient: float
    measure: str
    effect: float
    low: float
    high: float
    n: int
    noise: float
    works: bool

    def said(self) -> str:
        """How it did, in a sentence."""
        verdict = "It works" if self.works else "It does not stand clear of its controls"
        return (
            f"{self.label}: {self.effect:+.1f} nats [{self.low:.1f}, {self.high:.1f}] on {self.n} "
            f"test prompts, controls of its size up to {self.noise:+.1f}. "
            f"{verdict}."
        )


@cache
def gallery(model: str) -> list[Preset]:
    """The presets that were measured in a model, those that work first."""
    found = [*_demonstrations(model), *_behaviours(model)]
    return [p for p in found if p.works] + [p for p in found if not p.works]


def _demonstrations(model: str) -> list[Preset]:
    results = demonstrations.results()
    chosen = results[(results.model == model) & results.demonstration.isin(list(DEMONSTRATIONS))]
    if chosen.empty:
        return []
    table = demonstrations.summary(chosen, BOUND).set_index("demonstration")
    found = []
    for name, (label, prompt) in DEMONSTRATIONS.items():
        if name not in table.index:
            continue
        row, here = demonstrations.load(name).row, table.loc[name]
        at = settings.vector_settings(name, model)
        found.append(
            Preset(
                label,
                SENTENCES if name == demonstrations.FRENCH else TEXTS,
                row["plus"],
                row["minus"],
                prompt or row["prompt"],
                int(at.layer),
                float(at.coefficient),
                label,
                float(here.effect),
                float(here.low),
                float(here.high),
                int(here.n_test),
                float(max(here.q95_random, here.q95_unrelated)),
                bool(here.works),
            )
        )
    return found


def _behaviours(model: str) -> list[Preset]:
    path = datasets.result_path("presets", model)
    if not path.is_file():
        return []
    table = pd.read_csv(path).set_index(["behaviour", "sign"])
    found = []
    for (name, sign), (label, prompt) in BEHAVIOURS.items():
        if (name, sign) not in table.index:
            continue
        row = table.loc[(name, sign)]
        effect, low, high = (float(row[column]) for column in ("effect", "low", "high"))
        noise = [float(row[family]) for family in methods.FAMILIES]
        works = stats.verdict(effect, low, high, bound=BOUND, beyond=noise) == "reproduced"
        found.append(
            Preset(
                label, f"pairs: {name}", "", "", prompt, int(row.layer), sign * float(row.dose),
                name, effect, low, high, int(row.n), max(noise), works,
            )
        )  # fmt: skip
    return found
