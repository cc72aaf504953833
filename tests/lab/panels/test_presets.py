"""The gallery offers what was measured and says how it did; code makes the same vectors."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch

import steerlib as sl
from steerlib.lab import demonstrations
from steerlib.lab.panels import presets

MODELS = ("smollm2-135m", "gemma3-270m")


@pytest.mark.parametrize("model", MODELS)
def test_presets_are_those_of_the_data(model: str) -> None:
    found = presets.gallery(model)
    assert [p.works for p in found] == sorted((p.works for p in found), reverse=True)
    assert len({p.label for p in found}) == len(found)
    settings = sl.datasets.load("settings").astype({"demonstration": str})
    settings = settings[settings.model == model].set_index("demonstration")
    results = demonstrations.results()
    own = results[(results.model == model) & (results.family == "demonstration")]
    by_label = {shown.label: name for name, shown in presets.DEMONSTRATIONS.items()}
    of_data = [p for p in found if p.label in by_label]
    assert of_data
    for preset in of_data:
        name = by_label[preset.label]
        at = settings.loc[name]
        assert (preset.layer, preset.coefficient) == (int(at.layer), float(at.coefficient))
        effect = own[own.demonstration == name].effect.mean()
        assert preset.effect == pytest.approx(effect)
        assert preset.works == (preset.low > 0 and preset.effect > preset.noise)


def test_a_dozen_work_in_the_default_model() -> None:
    found = presets.gallery("smollm2-135m")
    assert sum(p.works for p in found) >= 12
    labels = {p.label for p in found}
    assert {"weddings", "Eiffel in Rome", "dragons", "conspiracy", "French"} <= labels
    assert {"love +", "love −", "honesty +", "honesty −"} <= labels


def test_every_preset_says_how_it_did() -> None:
    for model in MODELS:
        for preset in presets.gallery(model):
            said = preset.said()
            assert f"{preset.effect:+.1f} nats" in said and f"{preset.n} test prompts" in said
            assert ("It works" in said) == preset.works
            assert ("does not stand clear" in said) != preset.works


def test_a_model_without_results_has_no_gallery() -> None:
    assert presets.gallery("nobody/nothing") == []


def test_directions_are_judged_by_their_controls(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = "behaviour sign layer dose effect low high n kl random unrelated".split()
    rows = [
        ("truthful", 1, 18, 0.5, 2.0, 1.0, 3.0, 13, 0.2, 1.5, 1.0),
        ("truthful", -1, 14, 0.8, 2.0, 1.0, 3.0, 13, 0.2, 1.5, 2.5),
        ("past", 1, 20, 0.3, 2.0, -0.1, 4.1, 13, 0.2, 0.5, 0.5),
    ]
    (tmp_path / "results").mkdir()
    frame = pd.DataFrame(rows, columns=columns)
    frame.to_csv(tmp_path / "results" / "presets_mine.csv", index=False)
    monkeypatch.setattr(presets.datasets, "folder", lambda: tmp_path)
    monkeypatch.setattr(presets, "_demonstrations", lambda model: [])
    found = {p.label: p for p in presets.gallery.__wrapped__("mine")}
    works = {label: preset.works for label, preset in found.items()}
    assert works == {"honesty +": True, "honesty −": False, "past tense": False}
    assert found["honesty −"].coefficient == -0.8 and found["honesty −"].noise == 2.5


def test_a_measure_goes_with_its_prompts() -> None:
    demo = demonstrations.load("7")
    (item,) = presets.items("dragons", "Any prompt")
    assert item == ("Any prompt", demo.targets[:5], demo.references[:5])
    assert not {s.label for s in presets.DEMONSTRATIONS.values()} & {
        n for n, _ in presets.BEHAVIOURS
    }
    past = presets.items("past", "Any prompt")
    rows = sl.behaviours.load("past").rows("test")
    assert [i.prompt for i in past] == rows.prompt.tolist()[:8]
    assert [i.targets for i in past] == [[t] for t in rows.target[:8]]
    assert set(presets.MEASURES) >= {p.measure for m in MODELS for p in presets.gallery(m)}
    assert set(presets.SOURCES) | {presets.TEXTS} >= {
        p.vector for m in MODELS for p in presets.gallery(m)
    }


@pytest.mark.parametrize("name", ["French sentences", "pairs: past"])
def test_the_code_of_a_source_makes_its_vector(tiny: Any, name: str) -> None:
    model, _ = tiny("llama")
    source = presets.SOURCES[name]
    made = source.make(model, 2)
    coded = eval(source.code.format(layer=2), {"sl": sl, "model": model})
    assert made.site == coded.site and made.at == coded.at and list(made.layers) == [2]
    torch.testing.assert_close(made.layers[2], coded.layers[2])
