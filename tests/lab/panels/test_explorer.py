"""Where answers lie, layer by layer: fitted on one half of the pairs, shown on the other."""

from __future__ import annotations

from base64 import b64decode
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from steerlib.lab import plots
from steerlib.lab.panels import ExplorerPanel, explorer

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
        for label in (honest, "BA"["AB".index(honest)]):
            rows.append((i, f"claim {i // 2}", i % 2 == 0, label, label == honest))
    return acts, pd.DataFrame(rows, columns=["id", "pair", "truth", "label", "honest"])


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the functions that draw were given."""
    calls: list[Any] = []
    for name in ("groups_scatter", "group_histogram"):
        real = getattr(plots, name)

        def noted(*args: Any, real: Any = real, name: str = name, **kwargs: Any) -> Any:
            calls.append((name, args, kwargs))
            return real(*args, **kwargs)

        monkeypatch.setattr(plots, name, noted)
    return calls


def test_what_is_shown_is_held_out(drawn: list[Any]) -> None:
    acts, labels = pairs()
    p = ExplorerPanel(acts, labels, layers=[10, 20], layer=20, methods=("mean", "pc1"))
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
    fitted, fit = [], explorer.unit_directions
    monkeypatch.setattr(
        explorer, "unit_directions", lambda *args: (fitted.append(args), fit(*args))[1]
    )
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
    odd = ExplorerPanel(acts, labels, methods=("mean", "magic"))
    assert "Method &#x27;magic&#x27; is unknown" in odd.output.value
    assert odd.picture.layout.display == "none"
    assert "text/html" in odd._repr_mimebundle_()
