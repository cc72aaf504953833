"""Choose layer and strength of every demonstration on dev prompts; measure it on test prompts.

    python data/make_settings.py smollm2-135m [--only 1,6,9] [--dtype float32]

Writes the chosen settings into ``data/settings.csv`` and, for every test prompt and every condition
(the demonstration and its matched controls), the effect into ``data/results/effects_<model>.csv``.
Rows of other models and demonstrations stay. The rule of choice is in ``data/README.md``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

import steerlib as sl
from steerlib.files import atomic_write
from steerlib.lab import datasets, demonstrations, settings
from steerlib.measure import stats

DEPTHS = (0.1, 0.2, 0.3, 0.45, 0.6)  # of the model: layers that are tried
STRENGTHS = (0.5, 1.0, 2.0, 4.0)  # norm of vector over norm of stream
PAIRS = 5  # of targets and references, from the first on: the cost grows with them
COLUMNS = ["demonstration", "prompt_number", "family", "control"]
COLUMNS += ["effect", "target_effect", "shuffled"]


class Cell(NamedTuple):
    """A setting that is tried."""

    layer: int
    strength: float
    coefficient: float


def choose(model: Any, demo: demonstrations.Demonstration) -> pd.DataFrame:
    """Every cell of the grid with its effect on the dev prompts, best first.

    Best is the highest lower end of the 95 % interval among the cells in which the targets
    themselves become likelier (an effect may also come of references that fall).
    """
    n = model.cfg.n_layers
    cells: dict[Cell, Any] = {}
    depths: tuple[float, ...] = DEPTHS
    if demo.id.startswith(f"{demonstrations.FRENCH}-"):  # the same vector at a given depth
        depths = (demo.row.layer_of_48 / settings.SOURCE_LAYERS,)
    for layer in sorted({max(1, round(depth * n)) for depth in depths}):
        vector = demo.vector(model, layer)
        unit = demonstrations.strength(model, vector, demo.dev)
        for s in STRENGTHS:
            cells[Cell(layer, s, round(s / unit, 3))] = round(s / unit, 3) * vector
    found = demo.effects(model, cells, "dev", n_continuations=PAIRS)
    table = stats.effect_table(found, list(Cell._fields))
    rise = found.groupby(list(Cell._fields), sort=False).target_effect.mean().to_numpy()
    table["target_effect"] = rise
    ranked = table.assign(good=rise > 0).sort_values(["good", "low"], ascending=False)
    return ranked.reset_index(drop=True)


def replace_rows(path: Path, new: pd.DataFrame) -> None:
    """Put one demonstration's rows into the file of its model."""
    if path.is_file():
        old = pd.read_csv(path, dtype={"demonstration": str}, keep_default_na=False)
        new = pd.concat([old[~old.demonstration.isin(set(new.demonstration))], new])
    with atomic_write(path) as file:
        new.to_csv(file, index=False, float_format="%.4f")


def main() -> None:
    """Tune and measure one model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--only", default="")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    model = sl.load_model(given.model, dtype=given.dtype)
    everything = [*demonstrations.names(), *demonstrations.BORROWED]
    wanted = given.only.split(",") if given.only else everything
    for name in wanted:
        begin = time.time()
        demo = demonstrations.load(name)
        best = choose(model, demo).iloc[0]
        row = {"demonstration": name, "model": given.model, "chosen_by": "dev prompts"}
        row |= {k: best[k] for k in ("layer", "coefficient", "strength")}
        row |= {f"{k}_dev": best[k] for k in ("effect", "low", "high", "n")}
        settings.save_settings(pd.DataFrame([row]).round(4).astype({"layer": int, "n_dev": int}))
        if name in demonstrations.BORROWED:  # measured by place, in a notebook of its own
            continue
        vector = best.coefficient * demo.vector(model, int(best.layer))
        found = demonstrations.measure(model, demo, vector, PAIRS)
        found = found.rename(columns={"prompt": "prompt_number"})[COLUMNS]
        replace_rows(datasets.result_path("effects", given.model), found)
        own = found[found.family == "demonstration"].effect
        others = found[found.family != "demonstration"].groupby("control").effect.mean()
        print(
            f"{name}: layer {best.layer:.0f}, strength {best.strength:g} "
            f"(coefficient {best.coefficient:g}), dev {best.effect:+.2f}, test {own.mean():+.2f}, "
            f"controls up to {np.max(others):+.2f}, {time.time() - begin:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
