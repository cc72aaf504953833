"""Effect, side effect and text at one strength, under one slider."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import TYPE_CHECKING

import ipywidgets as ipw

from ...engine import decode
from ...measure.logprobs import kl_by_prompt
from ...measure.stats import clustered_interval
from ...vectors import SteeringVector
from .. import behaviours, plots
from ..behaviours import Behaviour
from ..calibration import Calibration
from .base import LINE, WIDE, Panel, in_rows, png, slider

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class StrengthPanel(Panel):
    """Effect, KL and text at one strength, beside what `calibrate` found.

    Args:
        vector: as it was given to `calibrate`; the slider is its strength, below 0 its opposite.
        behaviour: as it was given to `calibrate`.
        calibration: what came of it; it starts at the strength chosen there.
        prompt: from which to generate, greedily.
        n: items and neutral prompts (test) on which effect and KL are measured anew at every move.
    """

    def __init__(
        self,
        model: TransformerBridge,
        vector: SteeringVector,
        behaviour: Behaviour,
        calibration: Calibration,
        prompt: str = "I went up to my friend and said",
        *,
        n: int = 8,
        max_new_tokens: int = 25,
    ):
        super().__init__()
        self.bridge, self._behaviour, self._found, self._n = model, behaviour, calibration, n
        dev = calibration.table[calibration.table["split"] == "dev"].iloc[-1]
        self._vector = vector * (dev.coefficient / dev.strength)  # at strength 1
        self._sampling = decode.Sampling(max_new_tokens, temperature=0)
        self._measured: dict[float, tuple[tuple[float, float, float], float]] = {}
        most = float(dev.strength)
        first = calibration.chosen or most / 2
        self.strength = slider("strength", first, -most, most, 0.01)
        self.prompt = ipw.Text(prompt, description="prompt", layout=WIDE, continuous_update=False)
        controls = [self.strength, self.prompt]
        self._show(controls, in_rows([self.strength], [self.prompt]))

    def _run(self) -> Iterator[None]:
        """Measure, draw, and write on; a step is a run of the model."""
        strength, prompt = float(self.strength.value), self.prompt.value
        condition = strength * self._vector
        rows = decode.make_rows(self.bridge, [prompt], [None, condition], 1, self._sampling, 0)
        if strength not in self._measured:
            yield
            effects = self._behaviour.effects(self.bridge, {"steered": condition}, "test", self._n)
            yield
            neutral = behaviours.neutral("test", self._n)
            kl = kl_by_prompt(self.bridge, neutral, {"steered": condition}).kl.mean()
            here = clustered_interval(effects.effect, effects.prompt)
            self._measured[strength] = here, float(kl)
        (effect, low, high), kl = self._measured[strength]
        self._picture(self._draw(strength, effect, kl))
        said = (
            f"strength {strength:+.2f}: effect {effect:+.2f} nats [{low:.2f}, {high:.2f}], "
            f"KL {kl:.2f} nats"
        )
        for _ in decode.decode(self.bridge, rows, self._sampling):
            self.output.value = self._render(said, prompt, rows)
            yield
        self.output.value = self._render(said, prompt, rows)

    def _draw(self, strength: float, effect: float, kl: float) -> bytes:
        """The calibration with the present strength in it."""
        figure = self._found.figure()
        for ax, value in zip(figure.axes, (effect, kl), strict=True):
            ax.axvline(strength, color=plots.COLOURS["steered"], linewidth=0.8)
            ax.plot([strength], [value], "*", color=plots.COLOURS["steered"], markersize=13)
        return png(figure)

    def _render(self, said: str, prompt: str, rows: list[decode.Row]) -> str:
        parts = [f"<p><b>{html.escape(said)}</b></p>"]
        for name, row in zip(("unsteered", "steered"), rows, strict=True):
            text = row.text or decode.text(self.bridge, row)
            parts.append(f"<p style='{LINE}'>{name}: <b>{html.escape(prompt)}</b>")
            parts.append(f"{html.escape(text)}</p>")
        return "".join(parts)
