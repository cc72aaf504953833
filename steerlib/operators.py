"""Kinds of intervention besides `Add`: ablate, clamp, rotate, move to a point, act on a condition.

``h`` is the stream at one position, ``v`` a unit vector, ``h · v`` the projection, in units of the
stream. Each is a subclass of `interventions.Intervention` and nothing else knows of it, so all work
alike in `generate`, in one batch with others, in every measure, in `steer`, panels and caches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn.functional import normalize

from .interventions import Add, Gate, Intervention, where
from .vectors import SteeringVector


@dataclass(frozen=True, eq=False)
class _Directed(Intervention):
    """Acts along a direction, its field ``vector``; with a direction of length 0 not at all."""

    def __post_init__(self) -> None:
        _check_direction(self, "vector")
        object.__setattr__(self, "at", where(self.at))

    @property
    def is_identity(self) -> bool:
        return not any(t.any() for t in self.vectors[0].layers.values())

    def _unit(self, layer: int) -> torch.Tensor:
        return normalize(self.vectors[0].layers[layer], dim=-1)

    @staticmethod
    def apply(stream: torch.Tensor, *operands: torch.Tensor) -> torch.Tensor:
        """``h + (clip(h · v, low, high) - h · v) v``."""
        v, low, high = operands
        h = _wide(stream)
        along = (h * v).sum(-1, keepdim=True)
        return h + (along.clamp(low, high) - along) * v


@dataclass(frozen=True, eq=False)
class Ablate(_Directed):
    """Take away what the stream has along a direction: "zero out", or the mean in its place.

    ``h - (h · v) v``; with ``to="mean"``, ``h - (h · v) v + (m · v) v``.

    Args:
        vector: one position.
        at: as for `Add`.
        to: ``zero`` or ``mean``.
        mean: for ``to="mean"``: the mean stream ``m`` of prompts to which the stream is made alike
            (`SteeringVector.from_mean`), or its projection ``m · v`` as a number.

    Raises:
        ValueError: not a direction; ``to`` is unknown; ``mean`` is missing, not needed, or of
            another site, layer or d_model.

    Source: the honesty repository, "zeroing out the honesty vector". The mean in place of zero,
    which may lie far from all that the model ever sees: Wang et al. 2023, arXiv 2211.00593.
    """

    vector: SteeringVector
    at: Any = "all"  # an `At`; kept as `Where`
    to: str = "zero"
    mean: SteeringVector | float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.to not in ("zero", "mean") or (self.to == "mean") == (self.mean is None):
            raise ValueError(
                f"Ablate takes to='zero', or to='mean' with mean=, the mean stream; got "
                f"to={self.to!r} and mean={self.mean!r}."
            )
        if self.mean is not None:
            _check_point(self, "mean")

    def operands(self, layer: int) -> tuple[torch.Tensor, ...]:
        v = self._unit(layer)
        level = _along(self.mean or 0.0, layer, v)
        return v, level, level


@dataclass(frozen=True, eq=False)
class Clamp(_Directed):
    """Keep the projection on a direction within bounds, or set it: ``h + (clip(h · v) - h · v) v``.

    Args:
        vector: one position.
        at: as for `Add`.
        low, high: bounds of the projection, in units of the stream; None: no such bound. Equal
            bounds set it. Where the projection lies within, the stream stays as it is.

    Raises:
        ValueError: not a direction; a bound that is not a number; ``low`` above ``high``.

    Source: set: Templeton et al. 2024, "Scaling Monosemanticity" (there a feature of a sparse
    autoencoder). Cap: Lu et al. 2026, "The Assistant Axis", arXiv 2601.10387, activation capping.
    """

    vector: SteeringVector
    at: Any = "all"  # an `At`; kept as `Where`
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self._bounds()
        if not low <= high:
            raise ValueError(f"Clamp needs bounds low <= high, got {self.low} and {self.high}.")

    def _bounds(self) -> tuple[float, float]:
        low = -math.inf if self.low is None else self.low
        return low, math.inf if self.high is None else self.high

    @property
    def is_identity(self) -> bool:
        return super().is_identity or self._bounds() == (-math.inf, math.inf)

    def operands(self, layer: int) -> tuple[torch.Tensor, ...]:
        v = self._unit(layer)
        low, high = (_along(bound, layer, v) for bound in self._bounds())
        return v, low, high


@dataclass(frozen=True, eq=False)
class Affine(_Directed):
    """Move the projection to that of a reference, then add the vector: affine concept editing.

    ``h - P h + P μ + α r``, with P the projection on r. Wherever a prompt stood, it now stands at
    α: 0 is the reference, 1 (with r the mean difference) the mean of the other class. No α leaves
    the stream as it was.

    Args:
        vector: r, one position, with its own length: the mean difference
            (``from_pairs(method="mean")``).
        mean: μ, the mean stream of the class that lacks the behaviour (`SteeringVector.from_mean`),
            or its projection on the unit vector as a number.
        at: as for `Add`.
        coefficient: α.

    Raises:
        ValueError: not a direction; ``mean`` of another site, layer or d_model; a coefficient that
            is not finite.

    Source: Marshall, Scherlis and Belrose 2024, arXiv 2411.09003.
    """

    vector: SteeringVector
    mean: SteeringVector | float
    at: Any = "all"  # an `At`; kept as `Where`
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_point(self, "mean")
        if not math.isfinite(self.coefficient):
            raise ValueError(f"A coefficient must be a finite number, got {self.coefficient}.")

    def operands(self, layer: int) -> tuple[torch.Tensor, ...]:
        v, r = self._unit(layer), self.vector.layers[layer]
        level = _along(self.mean, layer, v) + self.coefficient * r.norm(dim=-1, keepdim=True)
        return v, level, level  # α r lies along v too: the sum is one projection to be set


@dataclass(frozen=True, eq=False)
class Rotate(_Directed):
    """Turn the stream in the plane of two directions; its length stays what it is.

    With e₁ along ``vector``, e₂ the rest of ``toward`` at right angles to it, and (ρ, φ) the polar
    coordinates of the stream's part in the plane, that part becomes (ρ, φ + angle), or (ρ, angle)
    if ``absolute``. The rest of the stream is left alone.

    Args:
        vector, toward: one position each, same site and layers, not parallel.
        at: as for `Add`.
        angle: degrees, from ``vector`` to ``toward``. 0 is exactly no intervention (not so if
            ``absolute``).
        absolute: turn *to* the angle, whatever angle the stream had, as the source does; else *by*
            it.

    Raises:
        ValueError: not two directions of the same site and layers; they are parallel, so that there
            is no plane; an angle that is not finite.

    Source: Vu and Nguyen 2025, "Angular Steering", arXiv 2510.26243; there ``vector`` is the
    behaviour's direction and ``toward`` a principal component of it over the layers.
    """

    vector: SteeringVector
    toward: SteeringVector
    at: Any = "all"  # an `At`; kept as `Where`
    angle: float = 0.0
    absolute: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_direction(self, "toward")
        _check_point(self, "toward")
        if not math.isfinite(self.angle):
            raise ValueError(f"An angle must be a finite number of degrees, got {self.angle}.")
        for layer in self.layers:
            pair = torch.cat([self.vector.layers[layer], self.toward.layers[layer]]).double()
            a, b = normalize(pair, dim=-1)
            if not float((b - (a @ b) * a).norm() * a.norm()) > 1e-4:
                raise ValueError(
                    f"Rotate needs two directions that span a plane; at layer {layer} "
                    f"{self.vector!r} and {self.toward!r} are parallel, or one is zero."
                )

    @property
    def is_identity(self) -> bool:
        return not self.absolute and self.angle % 360 == 0

    def operands(self, layer: int) -> tuple[torch.Tensor, ...]:
        e1, b = self._unit(layer), normalize(self.toward.layers[layer], dim=-1)
        e2 = normalize(b - (b * e1).sum(-1, keepdim=True) * e1, dim=-1)
        turn = math.radians(self.angle)
        numbers = [[math.cos(turn), math.sin(turn), float(self.absolute)]]
        return e1, e2, torch.tensor(numbers, dtype=e1.dtype)

    @staticmethod
    def apply(stream: torch.Tensor, *operands: torch.Tensor) -> torch.Tensor:
        """The part of the stream in the plane of ``e1`` and ``e2``, turned."""
        e1, e2, numbers = operands
        h = _wide(stream)
        cos, sin, absolute = numbers.split(1, dim=-1)
        x, y = ((h * e).sum(-1, keepdim=True) for e in (e1, e2))
        a = torch.where(absolute > 0, torch.hypot(x, y), x)
        b = torch.where(absolute > 0, 0, y)
        return h + (cos * a - sin * b - x) * e1 + (sin * a + cos * b - y) * e2


@dataclass(frozen=True, eq=False)
class When(Intervention):
    """Act on those prompts only whose projection on a direction passes a threshold.

    ``h`` becomes what ``condition`` makes of it if ``p · d > threshold``, with p the stream of the
    prompt at ``position``, at the layer and site of ``direction``, and d its unit vector. It is
    read while the prompt runs, row by row, as earlier interventions of the list leave it, and
    remembered for the tokens that are generated. Rows that do not pass stay untouched, bit for
    bit.

    Args:
        condition: a `SteeringVector` or an intervention; several take a `When` each.
        direction: one position, at one layer, which lies before all layers that ``condition`` acts
            at (or is the same site).
        threshold: in units of the stream; choose it on dev prompts
            (`measure.gates.choose_threshold`).
        position: of the prompt, at which to read; negative counts from its end.

    Raises:
        ValueError: not a direction at one layer; it is read after ``condition`` has acted; a
            threshold that is not finite; when run, a prompt without that position.

    Source: Lee et al. 2024, "Programming Refusal with Conditional Activation Steering", arXiv
    2409.05907, which compares a cosine, of the mean over the prompt, with the threshold.
    """

    condition: Any  # a SteeringVector or an Intervention; kept as the latter
    direction: SteeringVector
    threshold: float
    position: int = -1

    def __post_init__(self) -> None:
        act = Add(self.condition) if isinstance(self.condition, SteeringVector) else self.condition
        if not isinstance(act, Intervention) or act.gate is not None:
            raise ValueError(
                "When needs a SteeringVector or an intervention that has no condition yet, got "
                f"{type(act).__name__}; several take a When each, in a list."
            )
        object.__setattr__(self, "condition", act)
        _check_direction(self, "direction")
        if len(self.direction.layers) != 1:
            raise ValueError(
                f"When reads a direction at one layer, got {self.direction!r}: choose one with "
                "direction.only(layer)."
            )
        if not math.isfinite(self.threshold):
            raise ValueError(f"A threshold must be a finite number, got {self.threshold}.")
        layer = next(iter(self.direction.layers))
        read, acts = (layer, self.direction.site), (min(act.layers), act.site)
        if (read[0], read[1] == "resid_post") > (acts[0], acts[1] == "resid_post"):
            raise ValueError(
                f"The direction is read at layer {read[0]} ({read[1]}), after layer {acts[0]} "
                f"({acts[1]}), where it has to be known: read an earlier layer."
            )

    @property
    def at(self) -> Any:
        return self.condition.at

    @property
    def vectors(self) -> list[SteeringVector]:
        return [*self.condition.vectors, self.direction]

    @property
    def layers(self) -> list[int]:
        return self.condition.layers

    @property
    def site(self) -> str:
        return self.condition.site

    @property
    def n_positions(self) -> int:
        return self.condition.n_positions

    @property
    def is_identity(self) -> bool:
        return self.condition.is_identity

    @property
    def kind(self) -> type[Intervention]:
        return self.condition.kind

    @cached_property
    def gate(self) -> Gate:
        ((layer, tensor),) = self.direction.layers.items()
        unit = normalize(tensor[0], dim=-1)
        return Gate(layer, self.direction.site, unit, self.threshold, self.position)

    def operands(self, layer: int) -> tuple[torch.Tensor, ...]:
        return self.condition.operands(layer)

    @staticmethod
    def apply(stream: torch.Tensor, *operands: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("The condition's own kind is applied.")


# ---------------------------------------------------------------- checks and sums


def _wide(stream: torch.Tensor) -> torch.Tensor:
    """The stream in float32 at least."""
    return stream.to(torch.promote_types(stream.dtype, torch.float32))


def _along(point: SteeringVector | float, layer: int, v: torch.Tensor) -> torch.Tensor:
    """A projection on ``v`` ``[1, 1]``: of a vector, or the number that it is."""
    if isinstance(point, SteeringVector):
        return (point.layers[layer] * v).sum(-1, keepdim=True)
    return torch.full((1, 1), point, dtype=v.dtype)


def _check_direction(act: Intervention, name: str) -> None:
    vector = getattr(act, name)
    if not isinstance(vector, SteeringVector) or vector.n_positions != 1:
        raise ValueError(
            f"{type(act).__name__} needs a direction (one position) as its {name}, got {vector!r}."
        )


def _check_point(act: Intervention, name: str) -> None:
    """What stands beside the vector: a number, or one position at the same places."""
    point, vector = getattr(act, name), act.vectors[0]
    if isinstance(point, SteeringVector):
        missing = sorted(set(vector.layers) - set(point.layers))
        if missing or (point.site, point.d_model) != (vector.site, vector.d_model):
            raise ValueError(
                f"{type(act).__name__} needs its {name} at the layers and the site of its vector; "
                f"{point!r} does not fit {vector!r}."
            )
        _check_direction(act, name)
    elif not isinstance(point, (int, float)) or not math.isfinite(point):
        raise ValueError(
            f"{type(act).__name__} needs its {name} as a SteeringVector or a finite number, got "
            f"{point!r}."
        )
