"""Projections while generating: differences, groups, single prompts, and prompts of one's own."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
from conftest import n_hooks

import steerlib as sl
from steerlib.lab import plots
from steerlib.lab.panels import HeatmapPanel

PNG = b"\x89PNG"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the function that draws was given."""
    calls: list[Any] = []
    real = plots.generation_heatmap

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return real(*args, **kwargs)

    monkeypatch.setattr(plots, "generation_heatmap", noted)
    return calls


@pytest.fixture
def directions(tiny: Any) -> Any:
    model, _ = tiny("llama")
    listed = [("I love dogs", "I hate dogs"), ("a good day", "a bad day")]
    return sl.SteeringVector.from_pairs(model, listed, layers=[1, 2, 3])


GROUPS = {"true": ["the ship left", "a wedding"], "false $x_": ["I hate the rain", "they laughed"]}


@pytest.fixture
def groups(tiny: Any, directions: Any) -> dict[str, torch.Tensor]:
    model, _ = tiny("llama")
    found = {
        name: sl.capture_generation(model, prompts, directions, max_new_tokens=4)
        for name, prompts in GROUPS.items()
    }
    found["true"][0, :, 5:] = torch.nan  # this text had ended
    return found


def test_differences_groups_and_single_prompts(
    tiny: Any, directions: Any, groups: dict[str, torch.Tensor], drawn: list[Any]
) -> None:
    p = HeatmapPanel(tiny("llama")[0], directions, groups, GROUPS)
    mean = {name: np.nanmean(values.numpy(), 0) for name, values in groups.items()}

    def last() -> tuple[np.ndarray, float]:
        ((values, layers, before), how) = drawn[-1]
        assert list(layers) == [1, 2, 3] and before == 3 and p.picture.value[:4] == PNG
        return values, how["limit"]

    values, limit = last()
    gap = mean["true"] - mean["false $x_"]
    np.testing.assert_allclose(values, gap, atol=1e-6)
    assert limit == pytest.approx(np.abs(gap).max())
    assert p.number.layout.display == p.prompt.layout.display == "none"
    p.show.value = ("true",)
    values, limit = last()
    np.testing.assert_allclose(values, mean["true"], atol=1e-6)
    assert p.number.layout.display == "" and p.number.max == 2
    p.number.value = 1
    np.testing.assert_array_equal(last()[0], groups["true"][0])
    assert last()[1] == limit and "the ship left" in p.output.value  # one scale
    p.show.value = ("false $x_",)
    assert last()[1] == limit


@pytest.mark.parametrize("cosine", [False, True])
def test_a_prompt_of_ones_own_runs_live(
    tiny: Any, directions: Any, drawn: list[Any], cosine: bool
) -> None:
    model, _ = tiny("llama")
    read = {"max_new_tokens": 4, "cosine": cosine}
    groups = {"one": sl.capture_generation(model, GROUPS["true"], directions, **read)}
    p = HeatmapPanel(model, directions, groups, cosine=cosine)
    p.show.value = ()
    assert p.prompt.layout.display == "" and p.number.layout.display == "none"
    plain = sl.capture_generation(model, p.prompt.value, directions, **read)[0]
    np.testing.assert_array_equal(drawn[-1][0][0], plain)
    p.coefficient.value = 3.0
    act = sl.Add(directions, "generated", 3.0)
    steered = sl.capture_generation(model, p.prompt.value, directions, condition=act, **read)[0]
    np.testing.assert_array_equal(drawn[-1][0][0], steered)
    assert not torch.equal(plain, steered)
    p.prompt.value = ""
    assert "empty" in p.output.value and p.picture.layout.display == "none"
    assert n_hooks(model) == 0


def test_a_new_prompt_cancels_the_run_under_way(
    tiny: Any, directions: Any, groups: dict[str, torch.Tensor], drawn: list[Any]
) -> None:
    model, _ = tiny("llama")
    p = HeatmapPanel(model, directions, groups)

    async def move() -> None:
        p.show.value = ()
        first = p._task
        for _ in range(3):
            await asyncio.sleep(0.002)
            assert n_hooks(model) == 0
        p.prompt.value = "a wedding"
        assert first is not None and p._task is not None
        await asyncio.gather(first, p._task, return_exceptions=True)
        assert first.cancelled()

    asyncio.run(move())
    found = sl.capture_generation(model, "a wedding", directions, max_new_tokens=4)[0]
    assert len(drawn) == 2  # the first picture and the last
    np.testing.assert_array_equal(drawn[-1][0][0], found)


def test_markup_in_names_and_prompts_is_text(
    directions: Any, groups: dict[str, torch.Tensor]
) -> None:
    evil = "<script>alert(1)</script>"
    p = HeatmapPanel(None, directions, {evil: groups["true"]}, {evil: [evil, evil]})
    assert [name for name, _ in p.show.options] == [evil]  # no model: no prompt of one's own
    p.number.value = 1
    assert "<script" not in p.output.value and "&lt;script&gt;" in p.output.value


def test_the_heatmap_refuses_what_does_not_fit(
    directions: Any, groups: dict[str, torch.Tensor]
) -> None:
    for odd in ({}, {"a": groups["true"][0]}, {"a": groups["true"][:, :2]}):
        with pytest.raises(ValueError, match="Groups must be .prompt, layer, position. with 3"):
            HeatmapPanel(None, directions, odd)
