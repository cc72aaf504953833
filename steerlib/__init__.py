"""Activation steering of language models on TransformerLens hook points.

The names below are the whole public interface. They are imported on first use, so that
``import steerlib`` stays quick although torch and TransformerLens are not.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "load_model": "models",
    "list_models": "models",
    "capture": "activations",
    "capture_pairs": "activations",
    "encode": "activations",
    "SteeringVector": "vectors",
    "Add": "interventions",
    "Ablate": "interventions",
    "Steering": "interventions",
    "align": "interventions",
    "generate": "sweeps",
    "choice_probabilities": "sweeps",
    "capture_generation": "sweeps",
    "perplexity": "scoring",
    "completion_surprisal": "scoring",
    "next_token_shift": "scoring",
    "kl_by_prompt": "scoring",
    "token_changes": "scoring",
    "relative_norms": "scoring",
    "logit_lens": "scoring",
    "count_words": "scoring",
    "parse_choice": "scoring",
    "mean_interval": "scoring",
    "proportion_interval": "scoring",
    "contrast_pairs": "datasets",
    "layer_accuracy": "probes",
    "save_figure": "plots",
}
_MODULES = {"activations", "datasets", "judges", "plots", "probes", "scoring", "widgets"}
__all__ = [*_HOME, *sorted(_MODULES)]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
