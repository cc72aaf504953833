"""The claims of both sources, a few at a time, under a slider and two lists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import ipywidgets as ipw

from .. import claims
from .base import Panel, in_rows

if TYPE_CHECKING:
    import pandas as pd

ALL = "all"


class ClaimsPanel(Panel):
    """The table of claims (`claims.page`), of one experiment, one model, one verdict.

    Args:
        summarised: as `claims.summary` returns it.
        experiment: which to show first; by default the first.
    """

    def __init__(self, summarised: pd.DataFrame, experiment: str | None = None):
        super().__init__()
        self._table = summarised
        experiments = [*dict.fromkeys(summarised.experiment), ALL]
        models = sorted(summarised.model.unique(), key=claims.size)
        self.experiment = ipw.SelectionSlider(
            options=experiments,
            value=experiment or experiments[0],
            description="experiment",
            continuous_update=False,
            layout={"width": "30em"},
        )
        self.model = ipw.Dropdown(options=[ALL, *models], description="model")
        self.verdict = ipw.Dropdown(options=[ALL, *claims.MARKS], description="verdict")
        rows = [[self.experiment], [self.model, self.verdict]]
        self._show(sum(rows, []), in_rows(*rows))

    def _run(self) -> Iterator[None]:
        """Choose rows; one step."""
        chosen = self._table
        for column in ("experiment", "model", "verdict"):
            value = getattr(self, column).value
            if value != ALL:
                chosen = chosen[chosen[column] == value]
        if chosen.empty:
            raise ValueError("No claim has this verdict there: choose another.")
        yield
        self.output.value = claims.page(chosen, "chosen").to_html()
