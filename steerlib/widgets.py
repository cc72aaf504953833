"""Controls: sliders in, completions out. No science in here.

A panel runs in the kernel's own thread, a step at a time: between two tokens the kernel looks at
its messages, so a slider that moves meanwhile cancels the run under way, and the model has no
hooks while anything else runs.
"""

from __future__ import annotations

import asyncio
import html
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import ipywidgets as ipw

from . import generation, scoring
from .interventions import Add, At, Condition
from .vectors import SteeringVector

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge


class _Panel(ipw.VBox):
    """The controls that panels share, and what happens when one of them is moved."""

    def __init__(
        self,
        model: TransformerBridge,
        prompt: str,
        plus: str,
        minus: str,
        layer: int,
        coefficient: float,
        coefficient_range: tuple[float, float],
    ):
        super().__init__()
        self._model = model
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
        self.output = ipw.HTML()

    def _show(self, controls: Iterable[ipw.Widget], children: Iterable[ipw.Widget]) -> None:
        """Listen to the controls, lay out the children, and compute the first output."""
        for control in controls:
            control.observe(self._changed, names="value")
        self.children = tuple(children)
        for _ in self._steps():
            pass

    def _run(self) -> Iterator[None]:
        """Work with the present settings, a step at a time, and write the output."""
        raise NotImplementedError

    def _steps(self) -> Iterator[None]:
        try:
            yield from self._run()
        except ValueError as error:
            self.output.value = f"<p style='color:#D55E00'>{html.escape(str(error))}</p>"

    def _made(self) -> SteeringVector:
        key = (self.plus.value, self.minus.value, self.layer.value)
        if key not in self._vectors:
            self._vectors[key] = SteeringVector.from_prompts(
                self._model, self.plus.value, self.minus.value or None, layer=self.layer.value
            )
        return self._vectors[key]

    def _changed(self, _: Any) -> None:
        if self._task is not None:
            self._task.cancel()
        self._task = _in_background(self._steps)


class SteeringPanel(_Panel):
    """Unsteered and steered completions side by side, under sliders.

    Args:
        model: the model to steer.
        prompt, plus, minus, layer, coefficient: what the panel shows first; ``minus`` empty means
            none.
        vector: use this vector instead of making one from ``plus`` and ``minus``; its layer and
            text controls are then left out.
        at: ``front``, ``middle``, ``back`` or the first position of the vector; adds controls for
            it. None: where the vector was made for, without controls.
        fraction: of the residual dimensions that is kept (`SteeringVector.truncate`); adds
            controls for it and for which dimensions these are. None: all, without controls.
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
        at: str | int | None = None,
        fraction: float | None = None,
        coefficient_range: tuple[float, float] = (-10.0, 10.0),
        n_samples: int = 2,
        max_new_tokens: int = 30,
        seed: int = 0,
        **sampling: Any,
    ):
        super().__init__(model, prompt, plus, minus, layer, coefficient, coefficient_range)
        self._vector, self._n_samples = vector, n_samples
        self._sampling = generation.Sampling(max_new_tokens=max_new_tokens, **sampling)
        self.seed = ipw.BoundedIntText(seed, min=0, max=10**6, description="seed")
        numbered = isinstance(at, int)
        self.at = ipw.Dropdown(
            options=["front", "middle", "back", "position"],
            value="position" if numbered else at or "front",
            description="at",
        )
        self.position = ipw.IntSlider(
            at if numbered else 0, 0, 40, description="position", continuous_update=False,
            disabled=not numbered,
        )  # fmt: skip
        self.fraction = ipw.FloatSlider(
            1.0 if fraction is None else fraction, min=0, max=1, step=0.05,
            description="fraction", continuous_update=False,
        )  # fmt: skip
        self.which = ipw.Dropdown(options=["first", "last", "random"], description="which")
        self._place = at is not None
        controls = [self.coefficient, self.seed]
        if vector is None:
            controls = [self.coefficient, self.layer, self.seed]
        where = [self.at, self.position] if self._place else []
        part = [] if fraction is None else [self.fraction, self.which]
        texts = [] if vector is not None else [ipw.HBox([self.plus, self.minus])]
        more = [ipw.HBox(group) for group in (where, part) if group]
        self._show(
            (self.prompt, self.plus, self.minus, *controls, *where, *part),
            (self.prompt, *texts, ipw.HBox(controls), *more, self.output),
        )

    def _condition(self) -> Condition:
        vector = self._made() if self._vector is None else self._vector
        if self.fraction.value < 1:
            vector = vector.truncate(self.fraction.value, self.which.value)
        at: At = vector.at
        if self._place:
            first = self.position.value
            numbered = self.at.value == "position"
            at = range(first, first + vector.n_positions) if numbered else self.at.value
        return Add(vector, at, self.coefficient.value)

    def _run(self) -> Iterator[None]:
        """Generate; the output grows with every step."""
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
        self.position.disabled = self.at.value != "position"
        super()._changed(_)


class TokenPanel(_Panel):
    """What a vector does to the next token, and what it says by itself, under sliders.

    Args:
        model, prompt, plus, minus, layer, coefficient, coefficient_range: as for `SteeringPanel`.
        top: how many tokens to show on each side.

    Left: the tokens that gain and lose most probability. Right: the logit lens of the vector and
    its norm beside the stream's, position by position. Texts are escaped, a mistake in an input
    is shown as a sentence.
    """

    def __init__(
        self,
        model: TransformerBridge,
        prompt: str,
        plus: str,
        minus: str = "",
        layer: int = 6,
        coefficient: float = 5.0,
        *,
        coefficient_range: tuple[float, float] = (-10.0, 10.0),
        top: int = 8,
    ):
        super().__init__(model, prompt, plus, minus, layer, coefficient, coefficient_range)
        self._top = top
        rows = [ipw.HBox([self.plus, self.minus]), ipw.HBox([self.layer, self.coefficient])]
        self._show(
            (self.prompt, self.plus, self.minus, self.layer, self.coefficient),
            (self.prompt, *rows, self.output),
        )

    def _run(self) -> Iterator[None]:
        """Look; a step is one run of the model."""
        vector, prompt = self._made(), self.prompt.value
        yield
        act = Add(vector, "front", self.coefficient.value)
        shift = scoring.next_token_shift(self._model, prompt, act)
        yield
        norms = scoring.relative_norms(self._model, prompt, vector)
        lens = scoring.logit_lens(self._model, vector, top=self._top)
        self.output.value = self._render(shift, norms.merge(lens, on=["layer", "position"]))

    def _render(self, shift: pd.DataFrame, vector: pd.DataFrame) -> str:
        change = (shift.p_after - shift.p_before).sort_values()
        picked = [*change.index[::-1][: self._top], *change.index[: self._top][::-1]]
        moved = "".join(
            _table_row(repr(row.token), f"{row.p_before:.4f}", f"{row.p_after:.4f}")
            for row in shift.loc[picked].itertuples()
        )
        said = "".join(
            _table_row(
                f"{row.position} {row.token_x!r}",
                f"{abs(self.coefficient.value) * row.ratio:.2f}",
                "" if row.vector_norm == 0 else " ".join(map(repr, row.top)),
            )
            for row in vector.itertuples()
        )
        head = _table_row("next token", "before", f"{self.coefficient.value:+g}", tag="th")
        kl = f"KL(steered || unsteered) = {shift.kl_contribution.sum():.3f} nats"
        left = f"<table>{head}{moved}</table><p>{html.escape(kl)}</p>"
        head = _table_row("position", "norm / stream", "logit lens of the vector", tag="th")
        right = f"<table>{head}{said}</table>"
        cell = "<div style='flex:1 1 22em;padding-right:2em'>"
        return (
            f"<div style='display:flex;flex-wrap:wrap'>{cell}{left}</div>{cell}{right}</div></div>"
        )


def _table_row(*cells: str, tag: str = "td") -> str:
    style = "text-align:left;vertical-align:top;padding-right:1em"
    return f"<tr>{''.join(f'<{tag} style={style!r}>{html.escape(c)}</{tag}>' for c in cells)}</tr>"


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
