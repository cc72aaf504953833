"""Completions of the demonstrations that work in a model, for notebook 01 to show.

    python data/make_texts.py gemma3-270m [--dtype float32]

Writes ``data/results/texts_<model>.csv``: of each demonstration that works by
``data/results/effects_<model>.csv`` its source prompt, three completions unsteered and three
steered, the first of seed 0, not picked.
"""

from __future__ import annotations

import argparse

import pandas as pd

import steerlib as sl
from steerlib.files import atomic_write
from steerlib.lab import datasets, demonstrations

BOUND = 0.25  # nats: as in the notebook
COLUMNS = ["demonstration", "prompt", "condition", "sample", "completion"]


def main() -> None:
    """Write the completions of one model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    table = demonstrations.summary(demonstrations.results(), BOUND)
    model, frames = sl.load_model(given.model, dtype=given.dtype), []
    for name in table.demonstration[(table.model == given.model) & table.works]:
        demo = demonstrations.load(name)
        vector = demo.chosen(model)
        prompt = demo.fitting(model, vector).test[0]
        conditions = {"unsteered": None, "steered": vector}
        texts = sl.generate(model, prompt, conditions, 3, 30, progress=False)
        frames.append(texts.assign(demonstration=name)[COLUMNS])
    with atomic_write(datasets.result_path("texts", given.model)) as file:
        pd.concat(frames).to_csv(file, index=False)


if __name__ == "__main__":
    main()
