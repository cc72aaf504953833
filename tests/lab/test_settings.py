"""Presets, models, layers and strengths: what the environment, a table and a rule of thumb say."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from conftest import write_tiny

import steerlib as sl
from steerlib.lab import datasets, settings


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of data with the shipped demonstrations and no settings yet."""
    shipped = datasets.folder() / "demonstrations.csv"
    (tmp_path / "demonstrations.csv").write_bytes(shipped.read_bytes())
    monkeypatch.setenv("STEERLIB_DATA", str(tmp_path))
    return tmp_path


def rows(*chosen: tuple[str, str, int, float]) -> pd.DataFrame:
    found = pd.DataFrame(chosen, columns=["demonstration", "model", "layer", "coefficient"])
    measured = {"strength": 1.5, "effect_dev": 2.0, "low_dev": 1.0, "high_dev": 3.0, "n_dev": 6}
    return found.assign(**measured, chosen_by="dev prompts")


# ---------------------------------------------------------------- the environment


def test_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = {"smoke": 1, "quick": [2], "paper": None}
    for value, name in (("smoke", "smoke"), ("paper", "paper"), ("", "quick"), (None, "quick")):
        monkeypatch.delenv("PRESET", raising=False)
        if value is not None:
            monkeypatch.setenv("PRESET", value)
        assert settings.preset() == name
        assert settings.pick(**choice) == choice[name]
    monkeypatch.setenv("PRESET", "huge")
    for call in (settings.preset, lambda: settings.pick(**choice), lambda: settings.start("01")):
        with pytest.raises(ValueError, match="PRESET=huge is unknown: use smoke, quick, paper"):
            call()


def test_a_notebook_starts_with_its_own_model_unless_another_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(tmp_path)
    by_preset = {"smoke": str(tmp_path), "quick": "smollm2-135m", "paper": "gpt2-xl"}
    monkeypatch.setenv("PRESET", "smoke")
    run = settings.start("03_residual_fractions", by_preset)
    assert (run.notebook, run.preset) == ("03_residual_fractions", "smoke")
    assert run.model_name == str(tmp_path) and run.pick(smoke=1, quick=2, paper=3) == 1
    assert str(run.load("bfloat16").cfg.dtype) == "torch.bfloat16"
    assert "x" * 200 in repr(pd.DataFrame({"a": ["x" * 200]}))  # tables are shown whole
    monkeypatch.setenv("PRESET", "paper")
    assert settings.start("03", by_preset).model_name == "gpt2-xl"
    monkeypatch.setenv("MODEL", str(tmp_path))
    assert settings.start("03", by_preset).model_name == str(tmp_path)
    assert settings.model_name("smollm2-135m") == str(tmp_path)
    monkeypatch.setenv("MODEL", "")  # as `make` hands it on
    assert settings.start("03").model_name == "smollm2-135m"


# ---------------------------------------------------------------- layers and strengths


def test_settings_are_kept_by_demonstration_and_model(data: Path) -> None:
    settings.save_settings(rows(("5", "smollm2-135m", 7, 2.0), ("15a", "gemma3-270m", 3, -1.5)))
    found = sl.settings.vector_settings("15a", "gemma3-270m")
    assert (found.layer, found.coefficient, found.chosen_by) == (3, -1.5, "dev prompts")
    assert (found.strength, found.effect_dev, found.n_dev) == (1.5, 2, 6)
    bridge: Any = SimpleNamespace(cfg=SimpleNamespace(model_name="smollm2-135m", n_layers=30))
    assert sl.settings.vector_settings(5, bridge).layer == 7  # type: ignore[arg-type]

    # new rows replace those of their demonstration and model, and leave the others
    settings.save_settings(rows(("5", "smollm2-135m", 9, 4.0), ("5", "gemma3-270m", 1, 1.0)))
    table = pd.read_csv(data / "settings.csv", dtype={"demonstration": str})
    assert list(table.columns) == settings.COLUMNS
    assert list(zip(table.demonstration, table.model, table.layer, strict=True)) == [
        ("15a", "gemma3-270m", 3), ("5", "gemma3-270m", 1), ("5", "smollm2-135m", 9),
    ]  # fmt: skip
    assert settings.vector_settings("5", "smollm2-135m").coefficient == 4
    with pytest.raises(ValueError, match=r"\['coefficient', 'n_dev'\] are missing"):
        settings.save_settings(rows(("1", "m", 1, 1.0)).drop(columns=["coefficient", "n_dev"]))
    assert len(pd.read_csv(data / "settings.csv")) == 3


@pytest.mark.parametrize("others", [False, True])
def test_without_settings_the_source_says_how_strong_and_its_depth_where(
    data: Path, others: bool
) -> None:
    if others:
        settings.save_settings(rows(("5", "someone else", 1, 1.0)))
    found = settings.vector_settings("5", "gemma3-270m")  # layer 20 of 48, of 18 layers
    assert (found.layer, found.coefficient) == (8, 10) and found.chosen_by == "relative depth"
    assert list(found.index) == settings.COLUMNS
    assert found[["strength", "effect_dev", "low_dev", "high_dev", "n_dev"]].isna().all()
    for n, layer in ((48, 20), (2, 1), (1, 0)):
        bridge: Any = SimpleNamespace(cfg=SimpleNamespace(model_name="mine", n_layers=n))
        assert settings.vector_settings("5", bridge).layer == layer


def test_what_cannot_be_known_is_said(data: Path) -> None:
    with pytest.raises(ValueError, match="No demonstration 99; there are 1, 2, .*15a"):
        settings.vector_settings("99", "smollm2-135m")
    with pytest.raises(ValueError, match="How many layers gpt2-xl has .*: give the model"):
        settings.vector_settings("5", "gpt2-xl")


def test_shipped_settings_fit_their_models() -> None:
    table = datasets.load("settings").astype({"demonstration": str})
    assert list(table.columns) == settings.COLUMNS
    assert not table.duplicated(["demonstration", "model"]).any()
    layers = sl.list_models().set_index("name").layers
    known = table[table.model.isin(layers.index)]
    assert (known.layer >= 0).all() and (known.layer < layers[known.model].to_numpy()).all()
    assert set(table.demonstration) <= {*sl.demonstrations.names(), "14"}
