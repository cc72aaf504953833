"""Controls: sliders in, completions out. No science in here.

A panel runs in the kernel's own thread, a step at a time: between two tokens the kernel looks at
its messages, so a slider that moves meanwhile cancels the run under way, and the model has no
hooks while anything else runs.
"""

from __future__ import annotations

import asyncio
import html
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import ipywidgets as ipw

from . import generation
from .interventions import Add, Condition
from .vectors import SteeringVector

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class SteeringPanel(ipw.VBox):
    """Unsteered and steered completions side by side, under sliders.

    Args:
        model: the model to steer.
        prompt, plus, minus, layer, coefficient: what the panel shows first; ``minus`` empty means
            none.
        vector: use this vector instead of making one from ``plus`` and ``minus``; its layer and
            text controls are then left out.
        n_samples, max_new_tokens, seed: sampling, as for `generation.generate`.

    The first completions are computed before the panel is shown, so that a saved notebook holds
    them. A mistake in an input is shown as a sentence in the panel.
    """

    def __init__(
        self,
        model: TransformerBridge,
        prompt: str,
        plus: str = "",
        minus: str = "",
        layer: int = 6,
        coefficient: float = 5.0,
        *,
        vector: SteeringVector | None = None,
        coefficient_range: tuple[float, float] = (-10.0, 10.0),
        n_samples: int = 2,
        max_new_tokens: int = 30,
        seed: int = 0,
        **sampling: Any,
    ):
        self._model, self._vector, self._n_samples = model, vector, n_samples
        self._sampling = generation.Sampling(max_new_tokens=max_new_tokens, **sampling)
        self._vectors: dict[Any, SteeringVector] = {}
        self._task: asyncio.Task[None] | None = None
        wide = ipw.Layout(width="95%")
        low, high = coefficient_range
        self.prompt = ipw.Text(prompt, description="prompt", layout=wide, continuous_update=False)
        self.plus = ipw.Text(plus, description="plus", continuous_update=False)
        self.minus = ipw.Text(minus, description="minus", continuous_update=False)
        self.layer = ipw.IntSlider(
            layer, 0, model.cfg.n_layers - 1, description="layer", continuous_update=False
        )
        self.coefficient = ipw.FloatSlider(
            coefficient, min=low, max=high, step=0.5, description="coefficient",
            continuous_update=False,
        )  # fmt: skip
        self.seed = ipw.BoundedIntText(seed, min=0, max=10**6, description="seed")
        self.output = ipw.HTML()
        controls = [self.coefficient, self.seed]
        if vector is None:
            controls = [self.coefficient, self.layer, self.seed]
        for control in (self.prompt, self.plus, self.minus, *controls):
            control.observe(self._changed, names="value")
        texts = [] if vector is not None else [ipw.HBox([self.plus, self.minus])]
        super().__init__([self.prompt, *texts, ipw.HBox(controls), self.output])
        for _ in self._steps():
            pass

    def _condition(self) -> Condition:
        if self._vector is not None:
            return Add(self._vector, self._vector.at, self.coefficient.value)
        key = (self.plus.value, self.minus.value, self.layer.value)
        if key not in self._vectors:
            self._vectors[key] = SteeringVector.from_prompts(
                self._model, self.plus.value, self.minus.value or None, layer=self.layer.value
            )
        return Add(self._vectors[key], "front", self.coefficient.value)

    def _steps(self) -> Iterator[None]:
        """Generate with the present settings; the output grows with every step."""
        try:
            rows = generation.make_rows(
                self._model,
                [self.prompt.value],
                [None, self._condition()],
                self._n_samples,
                self._sampling,
                self.seed.value,
            )
            for _ in generation.decode(self._model, rows, self._sampling):
                self.output.value = self._render(rows)
                yield
            self.output.value = self._render(rows)
        except ValueError as error:
            self.output.value = f"<p style='color:#D55E00'>{html.escape(str(error))}</p>"

    def _render(self, rows: list[generation.Row]) -> str:
        prompt = f"<b>{html.escape(self.prompt.value)}</b>"
        cells = {
            (row.sample, row.condition): html.escape(row.text or generation.text(self._model, row))
            for row in rows
        }
        style = "width:50%;vertical-align:top;white-space:pre-wrap;padding:4px 12px 4px 0"
        lines = "".join(
            "<tr>" + "".join(f"<td style='{style}'>{prompt}{cells[s, c]}</td>" for c in (0, 1))
            + "</tr>"
            for s in range(self._n_samples)
        )  # fmt: skip
        steered = f"steered, coefficient {self.coefficient.value:+g}"
        head = f"<tr><th align='left'>unsteered</th><th align='left'>{steered}</th></tr>"
        return f"<table style='width:95%;table-layout:fixed'>{head}{lines}</table>"

    def _changed(self, _: Any) -> None:
        if self._task is not None:
            self._task.cancel()
        self._task = _in_background(self._steps)


def _in_background(steps: Callable[[], Iterator[None]]) -> asyncio.Task[None] | None:
    """Go through ``steps`` while the kernel goes on reading messages between them."""

    async def go() -> None:
        for _ in steps():
            await asyncio.sleep(0.001)

    try:
        return asyncio.get_running_loop().create_task(go())
    except RuntimeError:  # no event loop, as in a plain script: run to the end
        for _ in steps():
            pass
        return None
