"""What the source's vector, " weddings" − " ", does to the perplexity of other people's text.

    python data/make_perplexity.py qwen2.5-coder-1.5b [--dtype float32]

Writes ``data/results/perplexity_<model>.csv``: the log of perplexity steered / unsteered of each
sentence, before three layers at three coefficients, and of fewer sentences under controls of the
vector's norm before the middle one at one coefficient.
"""

from __future__ import annotations

import argparse

import pandas as pd

import steerlib as sl
from steerlib.files import atomic_write
from steerlib.lab import datasets
from steerlib.measure import stats

DEPTHS = (1 / 7, 2 / 7, 3 / 7)  # before, in and behind the source's best band, 10 to 17 of 48
COEFFICIENTS = (1, 4, 16)
CONTROLLED = 4  # the coefficient of the controls
SKIP = 2  # predictions at the positions that the vector overlies do not count
COLUMNS = ["family", "control", "layer", "coefficient", "topic", "sentence_number", "effect"]


def main() -> None:
    """Measure one model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    model = sl.load_model(given.model, dtype=given.dtype)
    sentences = datasets.load("sentences").groupby("topic").sentence
    topics = {topic: sentences.get_group(topic).tolist()[::4] for topic in ("wedding", "shipping")}
    layers = [round(depth * model.cfg.n_layers) for depth in DEPTHS]
    vectors = {
        layer: sl.SteeringVector.from_prompts(model, " weddings", " ", layer=layer)
        for layer in layers
    }
    own = sl.Control("steered", "")._asdict()
    steered = [
        ({**own, "layer": layer, "coefficient": c}, c * vector)
        for layer, vector in vectors.items()
        for c in COEFFICIENTS
    ]
    middle = layers[1]
    beside = [
        ({**control._asdict(), "layer": middle, "coefficient": CONTROLLED}, vector)
        for control, vector in sl.controls(CONTROLLED * vectors[middle], model).items()
    ]
    parts = []
    for conditions, step in ((steered, 1), (beside, 2)):  # controls cost most: every other sentence
        for topic, texts in topics.items():
            found = sl.perplexity(model, texts[::step], [("unsteered", None), *conditions], SKIP)
            found = stats.effects(found.rename(columns={"text": "prompt"}), "surprisal")
            found["sentence_number"] = found.prompt.map(texts.index)
            parts.append(found.assign(topic=topic))
    with atomic_write(datasets.result_path("perplexity", given.model)) as file:
        whole = {"layer": int, "coefficient": int}
        pd.concat(parts)[COLUMNS].astype(whole).to_csv(file, index=False, float_format="%.4f")


if __name__ == "__main__":
    main()
