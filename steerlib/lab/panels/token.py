"""What a vector does to the next token, and what it says by itself, under sliders."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import TYPE_CHECKING

import ipywidgets as ipw

from ...interventions import Add
from ...measure.lens import logit_lens, relative_norms
from ...measure.logprobs import next_token_shift
from .. import plots
from .base import VectorPanel, in_rows, table_row

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge

    from ...vectors import SteeringVector


class TokenPanel(VectorPanel):
    """What a vector does to the next token, and what it says by itself, under sliders.

    Args:
        model, prompt, plus, minus, layer, coefficient, coefficient_range: as for `SteeringPanel`.
        top: how many tokens to show on each side.

    Left: the tokens that gain and lose most probability, as paired bars. Right: the logit lens of
    the vector and its norm beside the stream's, position by position. Texts are escaped, a mistake
    in an input is shown as a sentence.
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
        said = inside(self.bridge, prompt, vector, coefficient, self._top)
        bars = next_tokens(shift, self._top, f"coefficient {coefficient:+g}")
        kl = f"<p>KL(steered || unsteered) = {shift.kl_contribution.sum():.3f} nats</p>"
        self.output.value = abreast(bars + kl, said)


def abreast(*parts: str) -> str:
    """Pieces of HTML side by side, below each other where a page is narrow."""
    cells = (f"<div style='flex:1 1 20em;min-width:0;overflow-x:auto'>{p}</div>" for p in parts)
    return f"<div style='display:flex;flex-wrap:wrap;gap:0 2em'>{''.join(cells)}</div>"


def next_tokens(shift: pd.DataFrame, top: int, steered: str) -> str:
    """Paired bars of HTML: the tokens that gain and lose most probability.

    Args:
        shift: as `logprobs.next_token_shift` returns it.
        top: how many tokens of either kind.
        steered: what the second bar of a pair is called.

    Each pair says its numbers when pointed at, and to a screen reader.
    """
    change = (shift.p_after - shift.p_before).sort_values()
    sides = {"more likely": change.index[::-1][:top], "less likely": change.index[:top]}
    picked = shift.loc[[i for side in sides.values() for i in side]]
    longest = float(picked[["p_before", "p_after"]].to_numpy().max())
    names = {"before": plots.COLOURS["unsteered"], steered: plots.COLOURS["steered"]}
    box = "display:inline-block;width:0.8em;height:0.8em;margin:0 0.3em 0 0.8em;background:"
    parts = [f"<i style='{box}{c}'></i>{html.escape(name)}" for name, c in names.items()]
    parts = [f"<p>Next token, probability up to {longest:.2g}: {''.join(parts)}</p>"]
    for side, index in sides.items():
        parts.append(f"<strong>{side}</strong>")
        for row in shift.loc[index].itertuples():
            said = html.escape(f"{row.token!r}: {row.p_before:.4f}, then {row.p_after:.4f}")
            bars = "".join(
                f"<i style='display:block;height:0.45em;background:{colour};"
                f"width:{100 * p / longest:.2f}%'></i>"
                for p, colour in zip((row.p_before, row.p_after), names.values(), strict=True)
            )
            name = html.escape(repr(row.token))
            parts.append(
                f'<div role="img" aria-label="{said}" title="{said}" style="display:grid;'
                'grid-template-columns:minmax(0,9em) minmax(0,1fr);gap:0.6em;align-items:center">'
                f'<span style="text-align:right;overflow:hidden;text-overflow:ellipsis">{name}'
                f"</span><span>{bars}</span></div>"
            )
    return "".join(parts)


def inside(
    model: TransformerBridge, prompt: str, vector: SteeringVector, coefficient: float, top: int
) -> str:
    """A table: a vector beside the stream that it meets, and its logit lens, by position."""
    table = relative_norms(model, prompt, vector).merge(
        logit_lens(model, vector, top=top), on=["layer", "position"]
    )
    lines = "".join(
        table_row(
            f"{row.position} {row.token_x!r}",
            f"{abs(coefficient) * row.ratio:.2f}",
            "" if row.vector_norm == 0 else " ".join(map(repr, row.top)),
        )
        for row in table.itertuples()
    )
    head = table_row("position", "norm / stream", "logit lens of the vector", tag="th")
    return f"<table>{head}{lines}</table>"
