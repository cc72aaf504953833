"""Compare ways to bring about each behaviour, at one price: choose doses on dev, report on test.

    python data/make_methods.py smollm2-135m [--only french,past] [--budget 0.5] [--keep-doses]

Writes the chosen layers and doses into ``data/results/doses_<model>.csv`` and the effects on the
test prompts into ``data/results/methods_<model>.csv``, each behaviour as soon as it is done. Rows
of other behaviours stay. ``--keep-doses`` goes on behind an interrupted run: doses that are in the
file are not chosen again. The rule of choice is in ``data/README.md``.
"""

from __future__ import annotations

import argparse
import time

import pandas as pd

import steerlib as sl
from steerlib.files import atomic_write
from steerlib.lab import behaviours, datasets, methods


def save(kind: str, model: str, behaviour: str, new: pd.DataFrame) -> None:
    """Put one behaviour's rows into the file of its model."""
    path = datasets.result_path(kind, model)
    table = new.round(4).assign(behaviour=behaviour)[["behaviour", *new]]
    if path.is_file():
        old = pd.read_csv(path, dtype=str, keep_default_na=False)
        table = pd.concat([old[old.behaviour != behaviour], table])
    with atomic_write(path) as file:
        table.to_csv(file, index=False)


def main() -> None:
    """Choose and measure in one model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--only", default="")
    parser.add_argument("--budget", type=float, default=methods.BUDGET)
    parser.add_argument("--keep-doses", action="store_true")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    model = sl.load_model(given.model, dtype=given.dtype)
    for name in given.only.split(",") if given.only else methods.COMPARED:
        begin = time.time()
        behaviour = behaviours.load(name)
        if given.keep_doses:
            chosen = methods.chosen(model, behaviour)
        else:
            chosen = methods.select(model, behaviour, given.budget)
        save("doses", given.model, name, chosen)
        found = methods.measure(model, behaviour, methods.conditions(model, behaviour, chosen))
        save("methods", given.model, name, found)
        mean = found[found.prompt != ""].groupby("method", sort=False).effect.mean()
        said = ", ".join(f"{method} {effect:+.2f}" for method, effect in mean.items())
        print(f"{name} ({time.time() - begin:.0f} s): {said}", flush=True)


if __name__ == "__main__":
    main()
