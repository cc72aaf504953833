"""The panel of claims: one experiment, one model, one verdict at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from steerlib.lab import claims
from steerlib.lab.panels import ClaimsPanel

ROOT = Path(__file__).parents[3]


@pytest.fixture
def panel() -> ClaimsPanel:
    return ClaimsPanel(claims.summary(claims.read(ROOT / "figs")))


def rows(panel: ClaimsPanel) -> int:
    return panel.output.value.count("<tr>") - 1


def test_it_shows_what_is_chosen(panel: ClaimsPanel) -> None:
    table = claims.summary(claims.read(ROOT / "figs"))
    assert rows(panel) == table[table.experiment == "first look"].claim.nunique()
    panel.experiment.value = "all"
    assert rows(panel) == table.claim.nunique()
    panel.verdict.value = "opposite"
    assert rows(panel) == table[table.verdict == "opposite"].claim.nunique()
    assert "▼" in panel.output.value and "●" not in panel.output.value
    panel.model.value = table.model.iloc[0]
    one = table[(table.verdict == "opposite") & (table.model == table.model.iloc[0])]
    assert rows(panel) == len(one)


def test_nothing_to_show_is_a_sentence(panel: ClaimsPanel) -> None:
    panel.experiment.value, panel.verdict.value = "first look", "opposite"
    assert "No claim has this verdict there" in panel.output.value
