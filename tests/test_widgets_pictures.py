"""The panels that draw: where answers lie layer by layer, and projections while generating."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import n_hooks

import steerlib as sl
from steerlib import plots, probes
from steerlib.widgets import ExplorerPanel, HeatmapPanel

PNG = b"\x89PNG"
N, D = 40, 64  # more dimensions than pairs in training: there, any direction separates


def pairs(seed: int = 0) -> tuple[torch.Tensor, pd.DataFrame]:
    """Noise at layer 0; at layer 1 the honest answers lie higher along dimension 5."""
    acts = torch.randn(N, 2, 2, D, generator=torch.Generator().manual_seed(seed))
    acts[:, 0, 1, 5] += 4
    acts[:, 1, 1, 5] -= 4
    rows = []
    for i in range(N):
        honest = "AB"[i // 2 % 2]  # a claim and its twin, twice with each answer
        for letter in (honest, "BA"["AB".index(honest)]):
            rows.append((i, f"claim {i // 2}", i % 2 == 0, letter, letter == honest))
    return acts, pd.DataFrame(rows, columns=["id", "pair", "truth", "label", "honest"])


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the functions that draw were given."""
    calls: list[Any] = []
    for name in ("groups_scatter", "group_histogram", "generation_heatmap"):
        real = getattr(plots, name)

        def noted(*args: Any, real: Any = real, name: str = name, **kwargs: Any) -> Any:
            calls.append((name, args, kwargs))
            return real(*args, **kwargs)

        monkeypatch.setattr(plots, name, noted)
    return calls


# ---------------------------------------------------------------- layers and components


def test_what_is_shown_is_held_out(drawn: list[Any]) -> None:
    acts, labels = pairs()
    p = ExplorerPanel(acts, labels, layers=[10, 20], layer=20, recipes=("mean", "pc1"))
    assert "Layer 20, 20 held-out pairs" in p.output.value and "mean 1.00" in p.output.value
    p.layer.value = 10
    share = float(p.output.value.split("mean ")[1].split()[0])
    assert 0.15 < share < 0.85  # in training it would be 1
    (_, (frame, x, y), _), (_, (same, x2), _) = drawn[-2:]
    assert (x, y, x2) == ("mean", "pc1", "mean") and frame is same
    shown = set(frame.pair)
    assert len(frame) == N and frame.groupby("pair").size().eq(4).all() and len(shown) == 10
    train = [i for i in range(N) if labels.pair[2 * i] not in shown]
    direction = (acts[train, 0, 0] - acts[train, 1, 0]).mean(0).double()
    held = [i for i in range(N) if labels.pair[2 * i] in shown]
    expected = acts[held][:, :, 0].double() @ (direction / direction.norm())
    np.testing.assert_allclose(frame["mean"], expected.flatten(), atol=1e-5)
    assert share == pytest.approx(
        float((expected[:, 0] > expected[:, 1]).double().mean()), abs=5e-3
    )


def test_a_layer_is_fitted_once_and_nothing_is_drawn_twice(
    drawn: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted, fit = [], probes.fit
    monkeypatch.setattr(probes, "fit", lambda *args: (fitted.append(args), fit(*args))[1])
    acts, labels = pairs()
    p = ExplorerPanel(acts[:, :, :, None], labels)
    assert p.layer.value == 1 and (p.x.value, p.y.value) == ("pc1", "pc2")
    first = p.picture.value
    assert first[:4] == PNG and p.picture.layout.display == ""
    p.x.value = "mean"
    p.layer.value = 0
    assert p.picture.value[:4] == PNG and p.picture.value != first
    assert len(fitted) == 2 and len(drawn) == 6
    p.layer.value, p.x.value = 1, "pc1"
    assert p.picture.value == first and len(fitted) == 2 and len(drawn) == 6
    page = p._repr_mimebundle_()
    assert b64decode(page["image/png"]) == first and "text/html" not in page


def test_questions_without_claims_have_two_groups() -> None:
    acts, labels = pairs()
    assert ExplorerPanel(acts, labels.assign(truth=None)).picture.value[:4] == PNG


def test_the_explorer_refuses_what_does_not_fit() -> None:
    acts, labels = pairs()
    for args in ((acts[:9], labels), (acts[..., None], labels)):
        with pytest.raises(ValueError, match="do not fit"):
            ExplorerPanel(*args)
    with pytest.raises(ValueError, match="3 layers are named, the activations have 2"):
        ExplorerPanel(acts, labels, layers=[1, 2, 3])
    odd = ExplorerPanel(acts, labels, recipes=("mean", "magic"))
    assert "Recipe &#x27;magic&#x27; is unknown" in odd.output.value
    assert odd.picture.layout.display == "none"
    assert "text/html" in odd._repr_mimebundle_()


# ---------------------------------------------------------------- while generating


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
        (_, (values, layers, before), how) = drawn[-1]
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
    np.testing.assert_array_equal(drawn[-1][1][0], plain)
    p.coefficient.value = 3.0
    act = sl.Add(directions, "generated", 3.0)
    steered = sl.capture_generation(model, p.prompt.value, directions, condition=act, **read)[0]
    np.testing.assert_array_equal(drawn[-1][1][0], steered)
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
    np.testing.assert_array_equal(drawn[-1][1][0], found)


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
