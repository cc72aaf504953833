"""Directions from contrast pairs, against closed forms and scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

import steerlib as sl
from steerlib.directions import fit_direction, principal_components, unit_directions


def pairs(n: int = 60, d: int = 24, honesty: float = 1.0, label: float = 2.0) -> torch.Tensor:
    """``[pair, 2, d]``: dimension 0 tells the two apart, 1 carries a label, 2 differs by pair."""
    generator = torch.Generator().manual_seed(0)
    acts = 0.5 * torch.randn(n, 1, d, generator=generator)
    acts = acts + 0.5 * torch.randn(n, 2, d, generator=generator)
    sign = torch.tensor([1.0, -1.0])
    acts[:, :, 0] += honesty * sign
    acts[:, :, 1] += label * sign * sign.repeat(n // 2)[:, None]
    acts[:, :, 2] += 3 * label * sign.repeat_interleave(n // 2)[:, None]
    return acts


def opposite(differences: torch.Tensor) -> torch.Tensor:
    """Pairs with these differences: ``[pair, 2, d]``."""
    return torch.stack([differences, torch.zeros_like(differences)], 1)


@pytest.mark.parametrize("seed", range(3))
def test_pca_is_not_centred(seed: int) -> None:
    """What all pairs have in common is the first component, not lost with the mean."""
    torch.manual_seed(seed)
    common = torch.nn.functional.normalize(torch.randn(12), dim=0).double()
    diffs = -5 * common + torch.randn(40, 12).double()
    assert float(fit_direction(opposite(diffs), "pca") @ -common) > 0.98
    _, axes = np.linalg.eigh((diffs.T @ diffs).numpy())
    for k in range(12):
        direction = fit_direction(opposite(diffs), "pca", k).numpy()
        assert abs(direction @ axes[:, -1 - k]) == pytest.approx(1, abs=1e-8)
        assert np.linalg.norm(direction) == pytest.approx(1)
        assert (diffs.numpy() @ direction).mean() >= 0


@pytest.mark.parametrize("method", ["mean", "pca", "probe"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_every_method_separates_held_out_differences(method: str, scale: float) -> None:
    torch.manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(30), dim=0).double()
    diffs = scale * (3 * truth + torch.randn(400, 30).double())
    direction = fit_direction(opposite(diffs[:100]), method)
    assert float((diffs[100:] @ direction > 0).double().mean()) > 0.97
    assert float(torch.nn.functional.normalize(direction, dim=0) @ truth) > 0.8
    assert method == "mean" or float(direction.norm()) == pytest.approx(1)
    unscaled = fit_direction(opposite(diffs[:100] / scale), method)  # the units make no difference
    assert float(torch.cosine_similarity(direction, unscaled, 0)) == pytest.approx(1, abs=1e-5)


def test_probe_turns_away_from_noise() -> None:
    """Unlike the mean, it discounts a direction in which the pairs scatter."""
    torch.manual_seed(0)
    diffs = torch.randn(400, 2).double() * torch.tensor([10.0, 0.5]) + torch.tensor([3.0, 1.0])
    right = [
        float((diffs @ fit_direction(opposite(diffs), m) > 0).double().mean())
        for m in ("mean", "probe")
    ]
    assert right[0] < 0.7 and right[1] > 0.95


def test_components_recover_what_was_planted() -> None:
    acts = pairs(200)
    directions, explained = principal_components(acts, 3)
    assert abs(directions[0, 1]) > 0.99  # the label moves most within pairs
    assert directions[1, 0] > 0.98  # then honesty, and its sign is known
    assert explained[0] > explained[1] > 4 * explained[2]
    raw, _ = principal_components(acts, 3, of="raw")
    assert abs(raw[0, 2]) > 0.99  # between claims their truth
    assert torch.allclose(directions @ directions.T, torch.eye(3).double(), atol=1e-5)
    for k in range(3):  # the same as the vectors used for steering
        assert fit_direction(acts, "pca", k) @ directions[k] > 0.999


def test_mass_mean_is_the_shrunk_closed_form() -> None:
    acts = pairs(50)
    x = acts.double()
    within = (x - x.mean(0)).flatten(0, 1).numpy()
    covariance, _ = ledoit_wolf(within, assume_centered=True)
    wanted = np.linalg.solve(covariance, (x.mean(0)[0] - x.mean(0)[1]).numpy())
    found = unit_directions(acts, "mass-mean")["mass-mean"].double().numpy()
    assert np.allclose(found, wanted / np.linalg.norm(wanted), atol=1e-5)


def test_unit_directions_point_to_the_first_prompts() -> None:
    acts = pairs(60)
    for name, v in unit_directions(acts, ["mean", "pc1", "pc3", "logistic", "mass-mean"]).items():
        assert v.dtype == torch.float32 and abs(v.norm() - 1) < 1e-5
        assert (acts[:, 0] - acts[:, 1]).mean(0) @ v >= 0, name


def test_logistic_is_scikit_learns() -> None:
    """On the differences with both signs, in units of their mean length, without intercept."""
    differences = pairs(50)[:, 0] - pairs(50)[:, 1]
    scaled = (differences / differences.norm(dim=1).mean()).double().numpy()
    both, signs = np.concatenate([scaled, -scaled]), np.repeat([1, -1], 50)
    probe = LogisticRegression(fit_intercept=False, max_iter=1000, tol=1e-8).fit(both, signs)
    expected = probe.coef_[0] / np.linalg.norm(probe.coef_[0])
    for method in ("logistic", "probe"):
        found = fit_direction(opposite(differences), method).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_components_are_scikit_learns() -> None:
    acts = pairs(50)
    differences = (acts[:, 0] - acts[:, 1]).double().numpy()
    both = PCA(4).fit(np.concatenate([differences, -differences]))
    raw = PCA(4).fit(acts.flatten(0, 1).double().numpy())
    for of, expected in (("differences", both), ("raw", raw)):
        found, explained = principal_components(acts, 4, of)
        cosines = np.abs((found.numpy() * expected.components_).sum(1))
        np.testing.assert_allclose(cosines, 1, atol=1e-8)
        np.testing.assert_allclose(explained, expected.explained_variance_ratio_, atol=1e-8)


def test_pc2_is_pca_with_component_1() -> None:
    acts = pairs(50)
    names = ["pc1", "pc2", "pc3", "pca"]
    units = unit_directions(acts, names)
    for name, k in zip(names, (0, 1, 2, 0), strict=True):
        expected = fit_direction(acts, "pca", k)
        assert torch.equal(fit_direction(acts, name), expected)
        assert torch.equal(units[name], expected.float())
    both = {"logistic": units["pc1"], **unit_directions(acts, ["logistic", "probe"])}
    assert torch.equal(both["logistic"], both["probe"])


def test_from_pairs_takes_the_names_of_probes(tiny: Any) -> None:
    model, _ = tiny("llama")
    texts = [("I love dogs", "I hate dogs"), ("a party", "a wedding"), ("Love", "Hate"),
             ("fine", "The ship left")]  # fmt: skip
    read = {"layers": [1, 3]}

    def vector(method: str, component: int = 0) -> sl.SteeringVector:
        return sl.SteeringVector.from_pairs(
            model, texts, method=method, component=component, **read
        )

    for name, method, component in [("pc1", "pca", 0), ("pc3", "pca", 2), ("logistic", "probe", 0)]:
        a, b = vector(name), vector(method, component)
        assert all(torch.equal(a.layers[layer], b.layers[layer]) for layer in (1, 3))
        assert (a.meta["method"], a.meta["component"]) == (method, component)
    flat = [text for pair in texts for text in pair]
    acts = sl.capture(model, flat, [1, 3]).unflatten(0, (-1, 2))
    for method in ("mean", "pc2", "logistic", "mass-mean"):
        found = vector(method)
        for i, layer in enumerate((1, 3)):
            expected = fit_direction(acts[:, :, i], method).float()
            torch.testing.assert_close(found.layers[layer][0], expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda a: unit_directions(a, "median"), "'median' is unknown: use .*mean"),
        (lambda a: unit_directions(a, ["pc1", "pc0"]), "'pc0' is unknown"),
        (lambda a: unit_directions(a, "pc99"), "99 components cannot be had from 20 pairs"),
        (lambda a: fit_direction(a, "pca", 20), "21 components cannot be had from 20 pairs"),
        (lambda a: fit_direction(a, "pca", -1), "0 components cannot be had"),
        (lambda a: principal_components(a, 2, of="sums"), "use differences or raw"),
    ],
)
def test_bad_input_gets_one_sentence(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(pairs(20))
