"""Conditional steering: where prompts lie along a direction, and a threshold between two kinds.

`operators.When` acts on prompts that pass a threshold: choose it on dev prompts, report its rates
on test prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..activations import capture
from ..tokens import Prompt
from ..vectors import SteeringVector
from .stats import proportion_interval

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge

Numbers = Sequence[float] | np.ndarray | torch.Tensor


def gate_projections(
    model: TransformerBridge,
    prompts: Sequence[Prompt],
    direction: SteeringVector,
    position: int = -1,
) -> torch.Tensor:
    """What `operators.When` reads of each prompt: its projection on the unit direction.

    Args:
        direction: one position; each of its layers is read.
        position: of the prompt; negative counts from its end.

    Returns:
        float32 ``[prompt, layer]``, layers in ascending order, in units of the stream (unsteered).
    """
    layers, unit = sorted(direction.layers), direction.unit().layers
    acts = capture(model, prompts, layers, position, direction.site)
    return (acts * torch.stack([unit[layer][0] for layer in layers])).sum(-1)


def choose_threshold(passing: Numbers, others: Numbers) -> float:
    """The threshold that tells two kinds of prompts apart best: Youden's J, the largest difference
    of true and false positive rate.

    Args:
        passing, others: projections of dev prompts that should and should not pass.

    Returns:
        A number between two projections, in the middle of the gap.

    Raises:
        ValueError: a kind without a prompt; prompts that should pass do not project higher.
    """
    yes, no = np.asarray(passing, float), np.asarray(others, float)
    if not yes.size or not no.size:
        raise ValueError(f"A threshold needs prompts of both kinds, got {yes.size} and {no.size}.")
    values = np.unique(np.concatenate([yes, no]))
    cuts = (values[1:] + values[:-1]) / 2
    gain = (yes[:, None] > cuts).mean(0) - (no[:, None] > cuts).mean(0)
    if not cuts.size or gain.max() <= 0:
        raise ValueError(
            "No threshold tells these prompts apart: those that should pass do not project higher. "
            "Turn the direction round (-direction), or fit another."
        )
    best = np.flatnonzero(gain == gain.max())
    return float(cuts[best[len(best) // 2]])


def gate_rates(passing: Numbers, others: Numbers, threshold: float) -> pd.DataFrame:
    """True and false positive rate of a threshold, on prompts that did not choose it.

    Returns:
        Two rows, of ``true positive`` and ``false positive``: rate, share, low, high (Wilson's
        interval), n (prompts).

    Raises:
        ValueError: a kind without a prompt.
    """
    import pandas as pd

    yes, no = np.asarray(passing, float), np.asarray(others, float)
    if not yes.size or not no.size:
        raise ValueError(f"Rates need prompts of both kinds, got {yes.size} and {no.size}.")
    rows = [
        (rate, *proportion_interval(int((x > threshold).sum()), len(x)), len(x))
        for rate, x in (("true positive", yes), ("false positive", no))
    ]
    return pd.DataFrame(rows, columns=["rate", "share", "low", "high", "n"])
