"""How strongly the mean difference of each behaviour in the app may act, and what it does.

    python data/make_presets.py smollm2-135m [--only truthful,past] [--dtype float32]

Layer and dose are chosen on dev prompts within the budget of `lab.methods`, for either sign apart;
the effect on the test prompts, and those of the matched controls, go into
``data/results/presets_<model>.csv``. Rows of other behaviours stay.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

import steerlib as sl
from steerlib.files import atomic_write
from steerlib.lab import behaviours, datasets, methods
from steerlib.lab.panels import presets
from steerlib.measure import stats
from steerlib.vectors import Control

DEV = 24  # items to choose on; as many neutral prompts as `methods.select` takes
NEUTRAL = 8


def signed(way: Any, sign: int, dose: float) -> Any:
    """The condition of a dose, or its opposite."""
    return way(sign * dose)


def choose(model: Any, behaviour: Any, sign: int) -> pd.Series:
    """The layer and the dose within the budget with the largest effect on dev: layer, dose."""
    layers = sorted({max(1, round(depth * model.cfg.n_layers)) for depth in methods.DEPTHS})
    ways = {
        at: partial(signed, way, sign)
        for at, way in methods.ways(model, behaviour, layers, []).items()
        if at.method == methods.MEAN
    }
    within = {at: [way] for at, way in ways.items()}
    most = methods.doses_within(model, within, methods.BUDGET, NEUTRAL)
    cells = {
        methods.Dose(*at, part * most.dose[at]): way(part * most.dose[at])
        for at, way in ways.items()
        for part in methods.FRACTIONS
    }
    effects = behaviour.effects(model, cells, "dev", DEV)
    mean = sign * effects.groupby(["layer", "dose"]).effect.mean()
    return pd.Series(dict(zip(["layer", "dose"], mean.idxmax(), strict=True)))


def measure(model: Any, behaviour: Any, sign: int) -> dict[str, Any]:
    """A row of the table."""
    at = choose(model, behaviour, sign)
    vector = presets.SOURCES[f"pairs: {behaviour.name}"].make(model, int(at.layer))
    vector = sign * round(at.dose, 4) * vector
    named = {Control("vector", ""): vector, **sl.controls(vector, model)}
    found = behaviour.effects(model, named, "test")
    found["effect"] *= sign
    own = found[found.family == "vector"]
    effect, low, high = stats.clustered_interval(own.effect, own.prompt)
    neutral = behaviours.neutral("test", 12)
    kl = sl.kl_by_prompt(model, neutral, {"vector": vector}).kl.mean()
    row = {"behaviour": behaviour.name, "sign": sign, "layer": int(at.layer), "dose": at.dose}
    row |= {"effect": effect, "low": low, "high": high, "n": own.prompt.nunique(), "kl": kl}
    return row | {f: stats.control_quantile(found, f) for f in methods.FAMILIES}


def main() -> None:
    """Choose and measure in one model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--only", default="")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    model = sl.load_model(given.model, dtype=given.dtype)
    path = datasets.result_path("presets", given.model)
    for name, sign in presets.BEHAVIOURS:
        if given.only and name not in given.only.split(","):
            continue
        begin = time.time()
        row = measure(model, behaviours.load(name), sign)
        table = pd.DataFrame([row]).round(4)
        if path.is_file():
            old = pd.read_csv(path)
            same = (old.behaviour == name) & (old.sign == sign)
            table = pd.concat([old[~same], table])
        order = list(presets.BEHAVIOURS)
        place = [order.index(key) for key in zip(table.behaviour, table.sign, strict=True)]
        with atomic_write(path) as file:
            table.iloc[np.argsort(place)].to_csv(file, index=False)
        print(f"{name} {sign:+d} ({time.time() - begin:.0f} s): {row}", flush=True)


if __name__ == "__main__":
    main()
