"""Projections by layer and position while generating."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import ipywidgets as ipw
import torch

from ...engine.generate import read_generation
from ...interventions import Add
from ...vectors import SteeringVector
from .. import plots
from .base import LINE, WIDE, Panel, png, slider

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class HeatmapPanel(Panel):
    """Projections on a direction by layer and position while generating.

    Args:
        model: runs prompts of one's own; None leaves that out.
        directions: as for `capture_generation`.
        groups: name -> ``[prompt, layer, position]``, as `capture_generation` returns it.
        prompts: name -> the prompts of that group, to show beside a single one.
        prompt_positions, cosine: as the groups were captured.
        prompt: the first of one's own prompts.
        coefficient_range: of the directions, added while a prompt of one's own runs.

    Groups, their prompts, and own prompts share one scale; differences of groups another.
    """

    def __init__(
        self,
        model: TransformerBridge | None,
        directions: SteeringVector,
        groups: Mapping[str, torch.Tensor],
        prompts: Mapping[str, Sequence[str]] | None = None,
        *,
        prompt_positions: int = 3,
        prompt: str = "I went up to my friend and said",
        coefficient_range: tuple[float, float] = (-10.0, 10.0),
        cosine: bool = False,
    ):
        super().__init__()
        self._cosine = cosine
        self._bridge, self._directions, self._groups = model, directions, dict(groups)
        self._prompts, self._before = prompts or {}, prompt_positions
        self._layers = sorted(directions.layers)
        shapes = [tuple(values.shape[1:]) for values in self._groups.values()]
        if len(set(shapes)) != 1 or len(shapes[0]) != 2 or shapes[0][0] != len(self._layers):
            raise ValueError(
                f"Groups must be [prompt, layer, position] with {len(self._layers)} layers and as "
                f"many positions each, got {[list(v.shape) for v in self._groups.values()]}."
            )
        self._width = shapes[0][1] - prompt_positions
        pairs = list(combinations(self._groups, 2))
        values = torch.cat([v.flatten() for v in self._groups.values()]).abs()
        gaps = [self._mean(a, b).flatten() for a, b in pairs]
        self._limit = _reach(values, 0.95)
        self._gap_limit = _reach(torch.cat(gaps).abs(), 1.0) if gaps else self._limit
        choices: list[Any] = [(f"{a} − {b}", (a, b)) for a, b in pairs]
        choices += [(name, (name,)) for name in self._groups]
        choices += [("own prompt", ())] if model is not None else []
        self.show = ipw.Dropdown(options=choices, description="show", layout=WIDE)
        self.number = slider("prompt", 0, 0, 1)
        self.prompt = ipw.Text(prompt, description="prompt", layout=WIDE, continuous_update=False)
        self.coefficient = slider("coefficient", 0.0, *coefficient_range, 0.5)
        controls = [self.show, self.number, self.prompt, self.coefficient]
        self._fit_controls()
        self._show(controls, controls)

    def _fit_controls(self) -> None:
        """Show only the controls that mean something now."""
        chosen = self.show.value
        self.number.layout.display = "" if len(chosen) == 1 else "none"
        for own in (self.prompt, self.coefficient):
            own.layout.display = "none" if chosen else ""
        if len(chosen) == 1:
            self.number.max = len(self._groups[chosen[0]])

    def _changed(self, change: Any) -> None:
        if change["owner"] is self.show:
            self._fit_controls()
        super()._changed(change)

    def _mean(self, *names: str) -> torch.Tensor:
        """``[layer, position]``: the mean of a group, less that of another."""
        means = [self._groups[name].nanmean(0) for name in names]
        return means[0] - means[1] if len(means) > 1 else means[0]

    def _run(self) -> Iterator[None]:
        """Draw; a prompt of one's own runs first."""
        chosen, number = self.show.value, self.number.value
        said = "0 is the mean over all prompts." if len(chosen) == 1 else ""
        limit = self._gap_limit if len(chosen) == 2 else self._limit
        yield
        if not chosen:
            text, coefficient = self.prompt.value, self.coefficient.value
            title = f"own prompt, coefficient {coefficient:+g}"
            act = Add(self._directions, "generated", coefficient)
            for found in read_generation(
                self._bridge, text, self._directions, self._width, self._before, act, self._cosine
            ):
                values = found[0]
                yield
        elif len(chosen) == 1 and number:
            values, title = self._groups[chosen[0]][number - 1], f"{chosen[0]}, prompt {number}"
            said = "".join(self._prompts.get(chosen[0], [])[number - 1 : number])
        else:
            values, title = self._mean(*chosen), " − ".join(chosen)
        figure = plots.generation_heatmap(
            values.numpy(), self._layers, self._before, title=title.replace("$", r"\$"),
            label="cosine" if self._cosine else "projection", limit=limit,
        )  # fmt: skip
        self.output.value = f"<p style='{LINE}'>{html.escape(said)}</p>"
        self._picture(png(figure))


def _reach(values: torch.Tensor, share: float) -> float:
    """A value below which this share of ``values`` lies, NaN left out."""
    known = values[~values.isnan()].sort().values
    return (float(known[int(share * (len(known) - 1))]) if len(known) else 0.0) or 1.0
