"""What a vector does to the next token, and what it says by itself, under sliders."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import TYPE_CHECKING

import ipywidgets as ipw

from ...interventions import Add
from ...measure.lens import logit_lens, relative_norms
from ...measure.logprobs import next_token_shift
from .base import VectorPanel, in_rows, table_row

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge


class TokenPanel(VectorPanel):
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
        rows: list[list[ipw.Widget]] = [[self.prompt], [self.plus, self.minus]]
        rows.append([self.layer, self.coefficient])
        self._show(sum(rows, []), in_rows(*rows))

    def _run(self) -> Iterator[None]:
        """Look; a step is one run of the model."""
        prompt, coefficient = self.prompt.value, self.coefficient.value
        vector = self.made()
        yield
        act = Add(vector, "front", coefficient)
        shift = next_token_shift(self.bridge, prompt, act)
        yield
        norms = relative_norms(self.bridge, prompt, vector)
        said = logit_lens(self.bridge, vector, top=self._top)
        table = norms.merge(said, on=["layer", "position"])
        self.output.value = self._render(shift, table, coefficient)

    def _render(self, shift: pd.DataFrame, vector: pd.DataFrame, coefficient: float) -> str:
        change = (shift.p_after - shift.p_before).sort_values()
        picked = [*change.index[::-1][: self._top], *change.index[: self._top][::-1]]
        moved = "".join(
            table_row(repr(row.token), f"{row.p_before:.4f}", f"{row.p_after:.4f}")
            for row in shift.loc[picked].itertuples()
        )
        said = "".join(
            table_row(
                f"{row.position} {row.token_x!r}",
                f"{abs(coefficient) * row.ratio:.2f}",
                "" if row.vector_norm == 0 else " ".join(map(repr, row.top)),
            )
            for row in vector.itertuples()
        )
        head = table_row("next token", "before", f"{coefficient:+g}", tag="th")
        kl = f"KL(steered || unsteered) = {shift.kl_contribution.sum():.3f} nats"
        left = f"<table>{head}{moved}</table><p>{html.escape(kl)}</p>"
        head = table_row("position", "norm / stream", "logit lens of the vector", tag="th")
        right = f"<table>{head}{said}</table>"
        cell = "<div style='flex:1 1 22em;padding-right:2em'>"
        return (
            f"<div style='display:flex;flex-wrap:wrap'>{cell}{left}</div>{cell}{right}</div></div>"
        )
