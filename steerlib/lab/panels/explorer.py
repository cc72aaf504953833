"""Where honest and dishonest answers lie, layer by layer."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import ipywidgets as ipw
import torch
from matplotlib import pyplot as plt

from ...directions import unit_directions
from ...measure import probes
from .. import plots
from .base import Panel, in_rows, png

if TYPE_CHECKING:
    import pandas as pd


class ExplorerPanel(Panel):
    """Where honest and dishonest answers lie, layer by layer, from activations at hand.

    Args:
        acts: ``[pair, 2, layer, d_model]``, or with one position, as `capture_pairs` returns it.
        labels: of the `ContrastPairs`.
        layers: what to call the layers; 0, 1, ... by default.
        layer: the one shown first; by default the middle one.
        methods: directions to choose from (see `directions.fit_direction`).

    Directions are fitted on one half of the pairs and everything shown is the other half. No model
    is run.
    """

    def __init__(
        self,
        acts: torch.Tensor,
        labels: pd.DataFrame,
        layers: Sequence[int] | None = None,
        layer: int | None = None,
        methods: Sequence[str] = ("pc1", "pc2", "pc3", "mean"),
    ):
        super().__init__()
        self._acts = acts[:, :, :, 0] if acts.ndim == 5 and acts.shape[3] == 1 else acts
        self._train, self._test = probes.splits(self._acts, labels, 2, 0, 4)[1]
        self._labels = labels.iloc[[2 * i + side for i in self._test for side in (0, 1)]]
        self._methods = list(methods)
        self._layers = list(range(self._acts.shape[2])) if layers is None else list(layers)
        if len(self._layers) != self._acts.shape[2]:
            raise ValueError(
                f"{len(self._layers)} layers are named, the activations have {self._acts.shape[2]}."
            )
        self._fitted: dict[int, dict[str, torch.Tensor]] = {}
        self._drawn: dict[Any, tuple[str, bytes]] = {}
        first = self._layers[len(self._layers) // 2] if layer is None else layer
        self.layer = ipw.SelectionSlider(options=self._layers, value=first, description="layer")
        self.x = ipw.Dropdown(options=self._methods, description="across")
        self.y = ipw.Dropdown(
            options=self._methods, index=min(1, len(methods) - 1), description="up"
        )
        controls = [self.layer, self.x, self.y]
        self._show(controls, in_rows(controls))

    def _run(self) -> Iterator[None]:
        """Draw, or show what was drawn before."""
        key = (self.layer.value, self.x.value, self.y.value)
        yield
        if key not in self._drawn:
            self._drawn[key] = self._draw(*key)
        self.output.value, picture = self._drawn[key]
        self._picture(picture)

    def _draw(self, layer: int, x: str, y: str) -> tuple[str, bytes]:
        here = self._acts[:, :, self._layers.index(layer)]
        if layer not in self._fitted:
            self._fitted[layer] = unit_directions(here[self._train], self._methods)
        directions, held_out = self._fitted[layer], here[self._test]
        frame = probes.projections(held_out, self._labels, directions)
        said, twins = [], self._labels.pair[::2].to_numpy()
        for name in dict.fromkeys([x, y]):
            share, low, high = probes.pair_accuracy(held_out, directions[name], twins)
            said.append(f"{name} {share:.2f} ({low:.2f} to {high:.2f})")
        head = f"Layer {layer}, {len(held_out)} held-out pairs. The honest answer is higher:"
        wide = 2 * plots.COLUMN
        with plt.rc_context({**plots.style(wide), "figure.constrained_layout.use": False}):
            figure, (left, right) = plt.subplots(1, 2, figsize=(wide, 4.8))
            figure.suptitle(f"Layer {layer}, held-out answers along {x} and {y}")
        figure.subplots_adjust(0.12, 0.43, 0.99, 0.9, 0.3)  # to lay out anew is half the time
        plots.groups_scatter(frame, x, y, ax=left)
        plots.group_histogram(frame, x, ax=right)
        said_all = html.escape(f"{head} " + ", ".join(said))
        return f"<p>{said_all}</p>", png(figure)
