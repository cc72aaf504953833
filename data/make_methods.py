"""Compare ways to bring about each behaviour, at one price: choose doses on dev, report on test.

    python data/make_methods.py smollm2-135m [--only french,past] [--budget 0.5] [--dtype float32]

Writes the chosen layers and doses into ``data/results/doses_<model>.csv`` and the effects on the
test prompts into ``data/results/methods_<model>.csv``. Rows of other behaviours stay. The rule of
choice is in ``data/README.md``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pandas as pd

import steerlib as sl
from steerlib.files import atomic_write
from steerlib.lab import behaviours, methods

RESULTS = Path(__file__).parent / "results"


def replace_rows(path: Path, new: pd.DataFrame) -> None:
    """Put one behaviour's rows into the file of its model."""
    if path.is_file():
        old = pd.read_csv(path, dtype=str, keep_default_na=False)
        new = pd.concat([old[~old.behaviour.isin(set(new.behaviour))], new])
    with atomic_write(path) as file:
        new.to_csv(file, index=False, float_format="%.4f")


def main() -> None:
    """Choose and measure in one model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--only", default="")
    parser.add_argument("--budget", type=float, default=methods.BUDGET)
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    model = sl.load_model(given.model, dtype=given.dtype)
    for name in given.only.split(",") if given.only else methods.COMPARED:
        begin = time.time()
        behaviour = behaviours.load(name)
        chosen = methods.select(model, behaviour, given.budget)
        found = methods.measure(model, behaviour, methods.conditions(model, behaviour, chosen))
        for kind, table in (("doses", chosen), ("methods", found)):
            table.insert(0, "behaviour", name)
            replace_rows(RESULTS / f"{kind}_{given.model}.csv", table)
        mean = found[found.prompt != ""].groupby("method", sort=False).effect.mean()
        said = ", ".join(f"{method} {effect:+.2f}" for method, effect in mean.items())
        print(f"{name} ({time.time() - begin:.0f} s): {said}", flush=True)


if __name__ == "__main__":
    main()
