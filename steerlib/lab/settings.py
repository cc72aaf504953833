"""What differs from run to run and from model to model: presets, models, layers, strengths."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..files import atomic_write
from ..models.loading import load_model
from ..models.packaged import MODELS
from . import datasets

if TYPE_CHECKING:
    import torch
    from transformer_lens.model_bridge import TransformerBridge

PRESETS = ("smoke", "quick", "paper")
MEASURED = ["layer", "coefficient", "strength", "effect_dev", "low_dev", "high_dev", "n_dev"]
COLUMNS = ["demonstration", "model", *MEASURED, "chosen_by"]  # of data/settings.csv
SOURCE_LAYERS = 48  # of gpt2-xl, in which the layers of `demonstrations` count


def preset() -> str:
    """How much to run: PRESET, by default ``quick``. Raises ``ValueError`` if it is none."""
    name = os.environ.get("PRESET") or "quick"
    if name not in PRESETS:
        raise ValueError(f"PRESET={name} is unknown: use {', '.join(PRESETS)}.")
    return name


def model_name(default: str) -> str:
    """The model to run: MODEL, or else ``default``."""
    return os.environ.get("MODEL") or default


def pick(*, smoke: Any, quick: Any, paper: Any) -> Any:
    """The value for the preset that runs."""
    return {"smoke": smoke, "quick": quick, "paper": paper}[preset()]


@dataclass(frozen=True)
class Run:
    """What a notebook asks first; made by `start`."""

    notebook: str
    preset: str
    model_name: str
    pick: Callable[..., Any] = pick

    def load(self, dtype: str | torch.dtype = "float32") -> TransformerBridge:
        """This run's model."""
        return load_model(self.model_name, dtype=dtype)


def start(notebook: str, model: str | Mapping[str, str] = "smollm2-135m") -> Run:
    """The preset and the model of a notebook: ``model``, or one for each preset, unless MODEL
    names another. From here on tables are shown whole: pandas would cut long texts and rows."""
    pd.set_option("display.max_colwidth", None, "display.max_columns", 40)
    chosen = model if isinstance(model, str) else model[preset()]
    return Run(notebook, preset(), model_name(chosen))


def vector_settings(demonstration: str, model: TransformerBridge | str) -> pd.Series:
    """Where and how strongly to add the vector of a demonstration in a model.

    Args:
        demonstration: its ``id`` in ``data/demonstrations.csv``, such as ``"5"`` or ``"15a"``.
        model: a loaded model, or a name.

    Returns:
        Its row of ``data/settings.csv``. Of a model that is not there: the source's coefficient at
        the layer of the same relative depth, and NaN for what was not measured.

    Raises:
        ValueError: no such demonstration; a name that does not tell how many layers there are.
    """
    name = model if isinstance(model, str) else model.cfg.model_name
    table, wanted = _settings(), str(demonstration)
    known = table[(table.demonstration == wanted) & (table.model == name)]
    if len(known):
        return known.iloc[0]
    source = datasets.load("demonstrations").astype({"id": str}).set_index("id")
    if wanted not in source.index:
        raise ValueError(f"No demonstration {wanted}; there are {', '.join(source.index)}.")
    if isinstance(model, str) and name not in MODELS:
        raise ValueError(f"How many layers {name} has is known once it is loaded: give the model.")
    n_layers = MODELS[name].layers if isinstance(model, str) else model.cfg.n_layers
    depth = float(source.layer_of_48[wanted]) / SOURCE_LAYERS
    layer = min(round(depth * n_layers), n_layers - 1)
    found = {"demonstration": wanted, "model": name, "layer": layer, "chosen_by": "relative depth"}
    found["coefficient"] = float(source.coefficient[wanted])
    return pd.Series(found).reindex(COLUMNS)


def save_settings(rows: pd.DataFrame) -> None:
    """Put these rows into ``data/settings.csv``; they replace the old ones of their
    demonstration and model. Raises ``ValueError`` if a column is missing."""
    if missing := [c for c in COLUMNS if c not in rows]:
        raise ValueError(f"Settings have the columns {', '.join(COLUMNS)}; {missing} are missing.")
    new = rows[COLUMNS].astype({"demonstration": str})
    both = pd.concat([_settings(), new]) if len(_settings()) else new
    both = both.drop_duplicates(["demonstration", "model"], keep="last")
    with atomic_write(datasets.folder() / "settings.csv") as file:
        both.sort_values(["demonstration", "model"]).to_csv(file, index=False)


def _settings() -> pd.DataFrame:
    path = datasets.folder() / "settings.csv"
    if not path.is_file():
        return pd.DataFrame(columns=COLUMNS)
    return pd.read_csv(path, dtype={"demonstration": str, "model": str, "chosen_by": str})
