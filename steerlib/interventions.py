"""Interventions: what happens to the residual stream, and where. Each kind is one class.

A new kind is a subclass of `Intervention` and nothing else: `generate`, `steer`, stored results,
panels and "copy as code" know it by the methods of the base class.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .activations import SITES
from .files import tensor_digest
from .tokens import Prefix
from .vectors import PLACES, SteeringVector

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

END = 1 << 30  # beyond any position: "and all that follow"


# ---------------------------------------------------------------- where


class Slice(NamedTuple):
    """A slice of positions; unlike Python's own it can be a key."""

    start: int | None
    stop: int | None
    step: int | None

    def __repr__(self) -> str:
        return f"slice({self.start}, {self.stop}, {self.step})"


At = str | int | Sequence[int] | slice  # as it is given
Where = str | tuple[int, ...] | Slice  # as it is kept


def where(at: At | Where) -> Where:
    """``at`` in the one form in which interventions keep it, which can be a key.

    Raises:
        ValueError: it is none of the allowed ones.
    """
    if isinstance(at, str):
        if at not in PLACES:
            raise ValueError(
                f"at={at!r} is unknown: use {', '.join(PLACES)}, a list of positions, or a slice."
            )
        return at
    if isinstance(at, Slice):
        return at
    if isinstance(at, slice):
        return Slice(at.start, at.stop, at.step)
    try:
        positions = tuple(map(index, [at] if isinstance(at, int) else at))
    except TypeError:
        positions = ()
    if not positions:
        raise ValueError(f"at={at!r} is not a list of positions (whole numbers).")
    return positions


@lru_cache(maxsize=65536)
def span(at: Where, k: int, n: int) -> Sequence[int]:
    """Positions at which ``k`` vector rows act in a sequence whose prompt has ``n`` tokens.

    A range may be endless (up to `END`). With ``k > 1`` the i-th position takes row i.

    Raises:
        ValueError: the place does not fit such a vector or such a prompt.
    """
    found: Sequence[int]
    if isinstance(at, str):
        if at in ("front", "middle", "back"):
            if k > n:
                raise ValueError(
                    f"The prompt has {n} tokens (BOS included), fewer than the {k} positions of "
                    "the vector: use a longer prompt or a shorter vector."
                )
            first = {"front": 0, "middle": (n - k) // 2, "back": n - k}[at]
            return range(first, first + k)
        # The token at n-1 predicts the first generated one, so "generated" begins there.
        found = {"prompt": range(n), "generated": range(n - 1, END), "all": range(END)}[at]
    elif isinstance(at, Slice):
        bounds = slice(_from_end(at.start, n), _from_end(at.stop, n), at.step)
        found = range(*bounds.indices(END))
    else:
        found = [p + n if p < 0 else p for p in at]
        if min(found) < 0:
            raise ValueError(f"Position {min(at)} lies before the start of a {n}-token prompt.")
    if k > 1 and len(found) != k:
        raise ValueError(
            f"A vector of {k} positions cannot act at {at!r}: that takes a direction (one "
            f"position), or exactly {k} positions."
        )
    return found


def _from_end(bound: int | None, n: int) -> int | None:
    return bound if bound is None or bound >= 0 else max(bound + n, 0)


@lru_cache(maxsize=65536)
def covered(at: Where, k: int, n: int, start: int, stop: int) -> list[tuple[int, int]]:
    """(position, vector row) pairs of `span` that fall into ``start <= position < stop``."""
    found = span(at, k, n)
    if isinstance(found, range) and found.step == 1:
        low, high = max(start, found.start, 0), min(stop, found.stop)
        return [(p, p - found.start if k > 1 else 0) for p in range(low, high)]
    return [(p, i if k > 1 else 0) for i, p in enumerate(found) if start <= p < stop]


def counts_from_end(at: Where) -> bool:
    """Whether a place depends on how long the prompt is."""
    if isinstance(at, str):
        return at in ("middle", "back", "prompt", "generated")
    return any(p is not None and p < 0 for p in (at[:2] if isinstance(at, Slice) else at))


# ---------------------------------------------------------------- what


class Gate(NamedTuple):
    """What an intervention waits for: the prompt's projection passes a threshold.

    Attributes:
        layer, site: where in the stream it is read.
        unit: the direction, ``[d_model]``, of length 1.
        threshold: in units of the stream.
        position: of the prompt; negative: from its end.
    """

    layer: int
    site: str
    unit: torch.Tensor
    threshold: float
    position: int

    @property
    def point(self) -> str:
        """The hook point at which the stream is read."""
        return hook_point(self.layer, self.site)

    def position_in(self, n: int) -> int:
        """The position in a prompt of ``n`` tokens. Raises ``ValueError`` if it has none such."""
        found = self.position + n if self.position < 0 else self.position
        if not 0 <= found < n:
            raise ValueError(
                f"There is no position {self.position} to be read in a prompt of {n} tokens."
            )
        return found

    def opens(self, stream: torch.Tensor) -> bool:
        """Whether a stream vector ``[d_model]`` passes."""
        unit = self.unit.to(stream.device)
        return float((stream.to(unit.dtype) * unit).sum()) > self.threshold


def hook_point(layer: int, site: str) -> str:
    """TransformerLens' name of a site."""
    return f"blocks.{layer}.hook_{site}"


@dataclass(frozen=True, eq=False)
class Intervention(ABC):
    """What happens to the stream at some layers and positions.

    A kind is a subclass: a frozen dataclass (``eq=False``: compared by identity) with a field
    ``at``, made canonical by `where`, and usually a field ``vector``, whose layers and site it acts
    at. It says what it does by `operands` and `apply`.
    """

    if TYPE_CHECKING:

        @property
        def at(self) -> Any: ...

    @property
    def vectors(self) -> list[SteeringVector]:
        """The steering vectors among its fields."""
        values = [getattr(self, field.name) for field in fields(self)]
        return [value for value in values if isinstance(value, SteeringVector)]

    @property
    def layers(self) -> list[int]:
        """Where it acts: those of the first vector, unless a kind says otherwise."""
        return sorted(self.vectors[0].layers)

    @property
    def site(self) -> str:
        """``resid_pre`` or ``resid_post``: that of the first vector, unless a kind says so."""
        return self.vectors[0].site

    @property
    def n_positions(self) -> int:
        """How many rows `operands` have; several go to as many positions, in order."""
        return max((vector.n_positions for vector in self.vectors), default=1)

    @property
    def points(self) -> list[str]:
        """The hook points at which it acts."""
        return [hook_point(layer, self.site) for layer in self.layers]

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing at all, so that it need not run."""
        return False

    @property
    def gate(self) -> Gate | None:
        """What it waits for, prompt by prompt; None: it always acts."""
        return None

    @property
    def kind(self) -> type[Intervention]:
        """The class whose `apply` it needs: interventions of one run together."""
        return type(self)

    @abstractmethod
    def operands(self, layer: int) -> tuple[torch.Tensor, ...]:
        """What `apply` needs at a layer: tensors ``[n_positions, ...]``, numbers included."""

    @staticmethod
    @abstractmethod
    def apply(stream: torch.Tensor, *operands: torch.Tensor) -> torch.Tensor:
        """The changed stream.

        A batch may hold many interventions of one kind, each with parameters of its own, so this
        sees all stream vectors that the kind touches in one pass.

        Args:
            stream: ``[n, d_model]``, in the model's dtype.
            operands: each ``[n, ...]``: for every stream vector the row that belongs to it.

        Returns:
            ``[n, d_model]``, of any float dtype.
        """

    def key(self) -> list[Any]:
        """Everything that its effect depends on, as plain data: what stored results are named by.

        All fields, with the numbers of vectors digested. A kind with fields that are neither
        plain data, tensors nor vectors has to say its own.
        """
        kind = f"{type(self).__module__}.{type(self).__qualname__}"
        return [kind, *([f.name, _fact(getattr(self, f.name))] for f in fields(self))]

    def code(self, vector: str = "vector") -> str:
        """The call that makes it: its first vector is called ``vector``, others as its fields."""
        import steerlib

        kind = type(self)
        said = []
        for i, field in enumerate(fields(self)):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if isinstance(value, SteeringVector):
                text = vector if value is self.vectors[0] else field.name
            elif isinstance(value, Intervention):
                text = value.code(vector)
            else:
                listed = isinstance(value, tuple) and not isinstance(value, Slice)
                text = repr(list(value) if listed else value)
            said.append(text if i == 0 else f"{field.name}={text}")
        public = getattr(steerlib, kind.__name__, None) is kind
        return f"{'sl.' if public else ''}{kind.__name__}({', '.join(said)})"


def _fact(value: Any) -> Any:
    if isinstance(value, SteeringVector):
        tensors = {str(layer): tensor_digest(t) for layer, t in sorted(value.layers.items())}
        return [value.site, tensors]
    if isinstance(value, Intervention):
        return value.key()
    if isinstance(value, torch.Tensor):
        return tensor_digest(value)
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *map(_fact, value)]
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise ValueError(
        f"A {type(value).__name__} has no lasting identity: an intervention that holds one needs a "
        "key() of its own."
    )


@dataclass(frozen=True, eq=False)
class Add(Intervention):
    """Add ``coefficient * vector`` to the stream: ``h + c v``.

    Args:
        vector: with one position (a direction) it is added at every position ``at`` names; with
            several, row i goes to the i-th of them.
        at: ``front`` / ``middle`` / ``back`` (a block of the prompt as long as the vector),
            ``prompt`` (all its positions), ``generated`` (the last prompt position, which
            predicts the first new token, and every generated one), ``all``, a list of positions
            (negative: from the end of the prompt; n and above: generated tokens), or a slice.
            None: where the vector was made for, its own ``at``.
        coefficient: multiplies the vector; 0 is exactly no intervention. ``Add(v,
            coefficient=6)`` and ``6 * v`` are the same.

    Raises:
        ValueError: unknown ``at``; a coefficient that is not finite.

    Source: Turner et al. 2023, "What happens if we... insert at a different position"; the honesty
    repository, steering "the current token during generation".
    """

    vector: SteeringVector
    at: Any = None  # an `At`; kept as `Where`
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.vector, SteeringVector):
            raise ValueError(f"Add needs a SteeringVector, got {type(self.vector).__name__}.")
        if not math.isfinite(self.coefficient):
            raise ValueError(f"A coefficient must be a finite number, got {self.coefficient}.")
        object.__setattr__(self, "at", where(self.vector.at if self.at is None else self.at))

    @property
    def is_identity(self) -> bool:
        return self.coefficient == 0 or not any(t.any() for t in self.vector.layers.values())

    def operands(self, layer: int) -> tuple[torch.Tensor, ...]:
        return (self.coefficient * self.vector.layers[layer],)

    @staticmethod
    def apply(stream: torch.Tensor, *operands: torch.Tensor) -> torch.Tensor:
        return stream + operands[0].to(stream.dtype)

    def key(self) -> list[Any]:
        # The product, so that the coefficient may stand in the vector or beside it.
        moved = self.vector if self.coefficient == 1 else self.coefficient * self.vector
        return ["add", _fact(self.at), _fact(moved)]


# ---------------------------------------------------------------- conditions

# Columns of the tables in which names of conditions stand: their fields have other names.
COLUMNS = (
    *("prompt", "text", "condition", "sample", "completion", "n_tokens", "stopped", "tokens"),
    *("propensity", "target", "reference", "continuation", "logprob", "total_probability"),
    *("perplexity", "surprisal", "kl"),
)

_Item = SteeringVector | Intervention | Prefix
Condition = _Item | Sequence[_Item] | None
# name -> condition; as (name, condition) pairs where a name is a mapping, which cannot be a key
Conditions = Mapping[Any, Condition] | Sequence[tuple[Any, Condition]]


def as_interventions(condition: Condition, model: TransformerBridge) -> list[Intervention]:
    """A condition as a list of interventions that fit ``model``; what changes nothing drops out.

    A bare vector acts where it was made for (`SteeringVector.at`).

    Raises:
        ValueError: not a condition; a vector of another ``d_model``; a layer that is not there; a
            `Prefix`, where prompts run as they are.
    """
    if condition is None:
        return []
    items = list(condition) if isinstance(condition, (list, tuple)) else [condition]
    result: list[Intervention] = []
    for item in items:
        act = Add(item) if isinstance(item, SteeringVector) else item
        if isinstance(act, Prefix):
            raise ValueError("A Prefix changes the prompt, which stays as it is here: put it in.")
        if not isinstance(act, Intervention):
            raise ValueError(
                "A condition is None, a SteeringVector, an intervention such as Add or Ablate, or "
                f"a list of these; got {type(item).__name__}."
            )
        _check_fits(act, model)
        if not act.is_identity:
            result.append(act)
    return result


def _check_fits(act: Intervention, model: TransformerBridge) -> None:
    for vector in act.vectors:
        if vector.d_model != model.cfg.d_model:
            raise ValueError(
                f"{vector!r} has d_model {vector.d_model}, but {model.cfg.model_name} has "
                f"{model.cfg.d_model}: a vector works in the model it was made with."
            )
        if vector.meta.get("model") not in (None, model.cfg.model_name):
            warnings.warn(
                f"{vector!r} was made with {vector.meta['model']}, not {model.cfg.model_name}.",
                stacklevel=4,
            )
    if act.site not in SITES:
        raise ValueError(f"{act!r} acts at {act.site!r}: use one of {', '.join(SITES)}.")
    layers = [*act.layers, *([act.gate.layer] if act.gate else [])]
    if max(layers) >= model.cfg.n_layers or min(layers) < 0:
        what = act.vectors[0] if act.vectors else act
        raise ValueError(
            f"{what!r} needs layer {max(layers)}, but {model.cfg.model_name} has "
            f"layers 0 to {model.cfg.n_layers - 1}."
        )


def named(conditions: Conditions | None) -> dict[Any, Condition]:
    """Conditions by name; None is the unsteered control alone. Mappings become named tuples.

    Raises:
        ValueError: no condition, or one name twice.
    """
    if conditions is None:
        return {"unsteered": None}
    pairs = list(conditions.items() if isinstance(conditions, Mapping) else conditions)
    found = {_hashable(name): condition for name, condition in pairs}
    if not found:
        raise ValueError("There is no condition: name one at least.")
    if len(found) < len(pairs):
        raise ValueError("Two conditions have the same name.")
    return found


def _hashable(name: Any) -> Any:
    if not isinstance(name, Mapping):
        return name
    kind = NamedTuple("Name", [(str(field), Any) for field in name])  # type: ignore[misc]
    return kind(*name.values())


def name_columns(names: Sequence[Any]) -> dict[str, list[Any]]:
    """Columns of a table whose rows have these conditions: ``condition``, and the names' fields.

    A name with fields (a NamedTuple or a mapping) gives each field as a column, and in
    ``condition`` a label made of them; other names stand there as they are.
    """
    all_fields = list(dict.fromkeys(f for name in names for f in getattr(name, "_fields", ())))
    columns = {"condition": [condition_label(name) for name in names]}
    for field in all_fields:
        if field in COLUMNS:
            raise ValueError(f"A condition's name cannot have the field {field!r}: it is a column.")
        columns[field] = [getattr(name, field, None) for name in names]
    return columns


def condition_label(name: Any) -> Any:
    """What stands in the column ``condition``."""
    if not hasattr(name, "_fields"):
        return name
    values = zip(name._fields, name, strict=True)
    said = (str(v) if isinstance(v, str) else f"{f} {v:g}" if isinstance(v, float) else f"{f} {v}"
            for f, v in values if v is not None)  # fmt: skip
    return ", ".join(said)


def first_touched(act: Intervention, n_prompt: int) -> int:
    """The first position that an intervention touches (`END` if there is none).

    Raises:
        ValueError: it does not fit a prompt of ``n_prompt`` tokens.
    """
    found = span(act.at, act.n_positions, n_prompt)
    # A range may be endless, so its start is asked for, not searched for.
    return END if not len(found) else found.start if isinstance(found, range) else min(found)


def first_position(acts: Sequence[Intervention], n_prompt: int) -> int:
    """The first position that these interventions touch or read (`END` if there is none)."""
    touched = [first_touched(act, n_prompt) for act in acts]
    read = [act.gate.position_in(n_prompt) for act in acts if act.gate]
    return min([*touched, *read], default=END)


def act_before_read(acts: Sequence[Intervention], n_prompt: int) -> bool:
    """Whether one acts at positions before the one it waits for: they must run in one pass."""
    return any(
        act.gate and first_touched(act, n_prompt) < act.gate.position_in(n_prompt) for act in acts
    )


def warn_untouched(acts: Sequence[Intervention], n_prompt: int, n_tokens: int) -> None:
    """Warn of interventions that touch none of ``n_tokens`` positions: they would do nothing."""
    for act in acts:
        if first_touched(act, n_prompt) >= n_tokens:
            warnings.warn(
                f"{type(act).__name__} at {act.at!r} touches no position of what runs: a prompt of "
                f"{n_prompt} tokens, {n_tokens} in all.",
                stacklevel=3,
            )
