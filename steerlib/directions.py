"""Fit a direction to contrast pairs: one function for steering vectors and for probes.

Activations of pairs are ``[pair, 2, d_model]``, positive prompt first, as `capture_pairs` returns
them at one layer and position.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

METHODS = ("mean", "pca", "probe", "mass-mean")


def parse_method(method: str, component: int = 0) -> tuple[str, int]:
    """A method and its component: ``pc2`` is ``pca`` with component 1, ``logistic`` is ``probe``.

    Raises:
        ValueError: unknown method.
    """
    if method[:2] == "pc" and method[2:].isdecimal() and int(method[2:]) > 0:
        return "pca", int(method[2:]) - 1
    method = {"logistic": "probe"}.get(method, method)
    if method not in METHODS:
        known = f"{', '.join(METHODS)}, logistic (the same as probe), pc1, pc2, ..."
        raise ValueError(f"Method {method!r} is unknown: use one of {known}.")
    return method, component


def fit_direction(acts: torch.Tensor, method: str = "mean", component: int = 0) -> torch.Tensor:
    """One direction from the activations of contrast pairs.

    Args:
        acts: ``[pair, 2, d_model]``, positive prompt first.
        method: ``mean`` is the mean difference (CAA); ``pca`` principal component ``component`` of
            the paired differences (RepE), also written ``pc1``, ``pc2``, ...; ``probe`` (or
            ``logistic``) the weight of a logistic regression that tells positive from negative
            differences; ``mass-mean`` the mean difference in units of the spread within each class
            (Marks and Tegmark; the covariance shrunk after Ledoit and Wolf). Differences enter
            ``pca`` and ``probe`` with both signs, hence uncentred: centring would remove what all
            pairs have in common.

    Returns:
        float64 ``[d_model]``, pointing to the positive prompts: their mean projection is higher.
        The mean difference has its own length, in units of the stream; the others have length 1.

    Raises:
        ValueError: unknown method; ``component`` is not below the number of pairs or dimensions.
    """
    method, component = parse_method(method, component)
    acts = acts.double()  # means in float64, as refusal_direction does
    differences = acts[:, 0] - acts[:, 1]
    mean = differences.mean(0)
    if method == "mean":
        return mean
    if method == "pca":
        return principal_components(acts, component + 1)[0][component]
    direction = _mass_mean(acts) if method == "mass-mean" else _logistic(differences)
    direction = direction / (direction.norm() or 1.0)  # nothing to find: zeros, not NaN
    return direction if direction @ mean >= 0 else -direction


def unit_directions(acts: torch.Tensor, methods: str | Sequence[str]) -> dict[str, torch.Tensor]:
    """`fit_direction` for several methods, all of length 1 (float32); components share one PCA."""
    names = [methods] if isinstance(methods, str) else list(methods)
    parsed = {name: parse_method(name) for name in names}
    most = max((k + 1 for method, k in parsed.values() if method == "pca"), default=0)
    components = principal_components(acts, most)[0] if most else None
    found = {}
    for name, (method, k) in parsed.items():
        pca = method == "pca" and components is not None
        v = components[k] if pca and components is not None else fit_direction(acts, method)
        found[name] = (v / (v.norm() or 1.0)).float()
    return found


def principal_components(
    acts: torch.Tensor, n_components: int = 3, of: str = "differences"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Principal components of the paired differences, or of the activations themselves.

    Args:
        acts: ``[pair, 2, d_model]``.
        of: ``differences``, which enter with both signs and hence uncentred; or ``raw``, centred.

    Returns:
        Unit vectors ``[component, d_model]`` (float64), each with the sign that makes the first
        prompts of these pairs project higher on average; and the share of variance that each
        explains, ``[component]``.

    Raises:
        ValueError: more components than pairs or dimensions; unknown ``of``.

    Source: the honesty repository, "run a PCA on the paired differences (or raw values)".
    """
    if of not in ("differences", "raw"):
        raise ValueError(f"Components of {of!r} are unknown: use differences or raw.")
    acts = acts.double()
    differences = acts[:, 0] - acts[:, 1]
    if not 1 <= n_components <= min(differences.shape):
        raise ValueError(
            f"{n_components} components cannot be had from {len(differences)} pairs in "
            f"{differences.shape[1]} dimensions."
        )
    # With both signs the mean is zero, and the second moment is that of the differences alone.
    data = differences if of == "differences" else acts.flatten(0, 1) - acts.flatten(0, 1).mean(0)
    _, sizes, directions = torch.linalg.svd(data, full_matrices=False)
    total = sizes.square().sum()
    if not total:  # in front of the key token both prompts are the same
        return torch.eye(*differences.shape[1:]).double()[:n_components], torch.zeros(n_components)
    directions = directions[:n_components]
    positive = directions @ differences.mean(0) >= 0
    return torch.where(positive[:, None], directions, -directions), (
        sizes.square()[:n_components] / total
    )


def _logistic(differences: torch.Tensor) -> torch.Tensor:
    """Weight of a logistic regression that tells the differences from their negatives."""
    from sklearn.linear_model import LogisticRegression

    if not differences.any():
        return differences[0]
    both = torch.cat([differences, -differences]).numpy()
    label = [1] * len(differences) + [0] * len(differences)
    scale = float(differences.norm(dim=-1).mean())
    probe = LogisticRegression(fit_intercept=False, max_iter=1000).fit(both / scale, label)
    return torch.from_numpy(probe.coef_[0])


def _mass_mean(acts: torch.Tensor) -> torch.Tensor:
    """Inverse of the shrunk covariance within classes, times the mean difference.

    Both the shrinkage after Ledoit and Wolf (as in scikit-learn) and the inverse (after Woodbury)
    need the products of the n rows only, which are fewer than the entries of the covariance.
    """
    mean = acts.mean(0)
    within = (acts - mean).reshape(-1, acts.shape[-1])
    n, d = within.shape
    difference, gram = mean[0] - mean[1], within @ within.T
    scale = gram.trace() / (n * d)
    spread = gram.square().sum() / n**2 - d * scale**2
    error = gram.diagonal().square().sum() / n**2 - gram.square().sum() / n**3
    shrinkage = min(float(error / spread), 1.0) if spread > 0 else 1.0
    if not 0 < shrinkage < 1:
        return difference
    ridge = shrinkage * scale * n / (1 - shrinkage)
    inner = gram + ridge * torch.eye(n, dtype=gram.dtype)
    return difference - within.T @ torch.linalg.solve(inner, within @ difference)
