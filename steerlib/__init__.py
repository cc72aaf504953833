"""Activation steering of language models on TransformerLens hook points.

The core says what steering is: `tokens`, `activations`, `directions`, `vectors`, `interventions`,
`operators`, `hooks`. Behind it stand four rooms: `models` (a name in, a bridge out), `engine` (many
rows at once), `measure` (numbers), `lab` (what notebooks need).

The names below are the whole public interface. They are imported on first use, so that
``import steerlib`` stays quick although torch and TransformerLens are not.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.2.0"

_HOME = {
    "load_model": "models.loading",
    "list_models": "models.loading",
    "vllm_specs": "models.vllm",
    "encode": "tokens",
    "Prefix": "tokens",
    "capture": "activations",
    "capture_pairs": "activations",
    "fit_direction": "directions",
    "SteeringVector": "vectors",
    "controls": "vectors",
    "Control": "vectors",
    "Intervention": "interventions",
    "Add": "interventions",
    "Ablate": "operators",
    "Affine": "operators",
    "Clamp": "operators",
    "Rotate": "operators",
    "When": "operators",
    "steer": "hooks",
    "hooks": "hooks",
    "steered_logits": "hooks",
    "generate": "engine.generate",
    "choice_probabilities": "engine.generate",
    "capture_generation": "engine.generate",
    "propensity": "measure.logprobs",
    "continuation_table": "measure.logprobs",
    "perplexity": "measure.logprobs",
    "completion_surprisal": "measure.logprobs",
    "next_token_shift": "measure.logprobs",
    "kl_by_prompt": "measure.logprobs",
    "token_changes": "measure.logprobs",
    "relative_norms": "measure.lens",
    "logit_lens": "measure.lens",
    "count_words": "measure.answers",
    "leanings": "measure.answers",
    "crossed_effects": "measure.answers",
    "parse_choice": "measure.answers",
    "layer_accuracy": "measure.probes",
    "gate_projections": "measure.gates",
    "choose_threshold": "measure.gates",
    "gate_rates": "measure.gates",
    "mean_interval": "measure.stats",
    "proportion_interval": "measure.stats",
    "contrast_pairs": "lab.datasets",
    "calibrate": "lab.calibration",
    "Budget": "lab.calibration",
    "align": "lab.tables",
    "save_figure": "lab.provenance",
}
# Modules that notebooks use by name, under the name of the module alone.
_MODULES = {
    "activations": "activations",
    "claims": "lab.claims",
    "directions": "directions",
    "stats": "measure.stats",
    "probes": "measure.probes",
    "behaviours": "lab.behaviours",
    "datasets": "lab.datasets",
    "demonstrations": "lab.demonstrations",
    "honesty": "lab.honesty",
    "judges": "lab.judges",
    "methods": "lab.methods",
    "panels": "lab.panels",
    "plots": "lab.plots",
    "settings": "lab.settings",
    "tables": "lab.tables",
}
__all__ = [*_HOME, *sorted(_MODULES)]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{_MODULES[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


class _Package(ModuleType):
    """``steerlib.hooks`` is the function, although a module of that name lies beside this file."""

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system would put the module there as soon as anything imports it.
        if name == "hooks" and isinstance(value, ModuleType):
            value = value.hooks
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
