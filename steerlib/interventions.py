"""Interventions on the residual stream: what, where, and for which row of a batch.

`Add` and `Ablate` say what happens at which positions of one sequence. `Steering` turns one list
of them per row into TransformerLens hooks: a batch may hold any mixture of conditions, since every
row carries its own vectors, coefficients, layers and positions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from operator import index
from typing import TYPE_CHECKING, Any, cast

import torch

from .activations import encode
from .vectors import PLACES, SteeringVector

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge

At = str | int | Sequence[int] | slice
_END = 1 << 30  # beyond any position: "and all that follow"


@lru_cache(maxsize=65536)
def _span(at: Any, k: int, n: int) -> Sequence[int]:
    """Positions at which ``k`` vector rows act in a sequence whose prompt has ``n`` tokens.

    A range may be endless (up to ``_END``). With ``k > 1`` the i-th position takes row i.
    """
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
        span: Sequence[int] = {
            "prompt": range(n),
            "generated": range(n - 1, _END),
            "all": range(_END),
        }[at]
    elif isinstance(at, tuple) and at and at[0] == "slice":
        start, stop, step = at[1:]
        span = range(*slice(_from_end(start, n), _from_end(stop, n), step).indices(_END))
    else:
        span = [p + n if p < 0 else p for p in at]
        if min(span) < 0:
            raise ValueError(f"Position {min(at)} lies before the start of a {n}-token prompt.")
    if k > 1 and len(span) != k:
        raise ValueError(
            f"A vector of {k} positions cannot act at {at!r}: that takes a direction (one "
            f"position), or exactly {k} positions."
        )
    return span


def _from_end(bound: int | None, n: int) -> int | None:
    return bound if bound is None or bound >= 0 else max(bound + n, 0)


@lru_cache(maxsize=65536)
def _covered(at: Any, k: int, n: int, start: int, stop: int) -> list[tuple[int, int]]:
    """(position, vector row) pairs of `_span` that fall into ``start <= position < stop``."""
    span = _span(at, k, n)
    if isinstance(span, range) and span.step == 1:
        low, high = max(start, span.start, 0), min(stop, span.stop)
        return [(p, p - span.start if k > 1 else 0) for p in range(low, high)]
    return [(p, i if k > 1 else 0) for i, p in enumerate(span) if start <= p < stop]


def _check_at(at: At) -> Any:
    """A hashable form of ``at``; raises ``ValueError`` when it is none of the allowed ones."""
    if isinstance(at, str):
        if at not in PLACES:
            raise ValueError(
                f"at={at!r} is unknown: use {', '.join(PLACES)}, a list of positions, or a slice."
            )
        return at
    if isinstance(at, slice):
        return ("slice", at.start, at.stop, at.step)
    try:
        places = tuple(map(index, [at] if isinstance(at, int) else at))
    except TypeError:
        places = ()
    if not places:
        raise ValueError(f"at={at!r} is not a list of positions (whole numbers).")
    return places


@dataclass(frozen=True)
class Add:
    """Add ``coefficient * vector`` to the stream.

    Args:
        vector: with one position (a direction) it is added at every position ``at`` names; with
            several, row i goes to the i-th of them.
        at: ``front`` / ``middle`` / ``back`` (a block of the prompt as long as the vector),
            ``prompt`` (all its positions), ``generated`` (the last prompt position, which
            predicts the first new token, and every generated one), ``all``, a list of positions
            (negative: from the end of the prompt; n and above: generated tokens), or a slice.
            None: where the vector was made for, its own ``at``.
        coefficient: multiplies the vector; 0 is exactly no intervention.

    Raises:
        ValueError: unknown ``at``; a coefficient that is not finite.

    Source: first document, "What happens if we... insert at a different position"; second
    document, steering "the current token during generation".
    """

    vector: SteeringVector
    at: At = None  # type: ignore[assignment]  # filled in at once: never None to a reader
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.vector, SteeringVector):
            raise ValueError(f"Add needs a SteeringVector, got {type(self.vector).__name__}.")
        if cast(Any, self.at) is None:
            object.__setattr__(self, "at", self.vector.at)
        if not math.isfinite(self.coefficient):
            raise ValueError(f"A coefficient must be a finite number, got {self.coefficient}.")
        _check_at(self.at)


@dataclass(frozen=True)
class Ablate:
    """Subtract the stream's projection on ``vector`` (one position), layer by layer: "zero out".

    Source: second document, "zeroing out the honesty vector".
    """

    vector: SteeringVector
    at: At = "all"

    def __post_init__(self) -> None:
        if not isinstance(self.vector, SteeringVector) or self.vector.n_positions != 1:
            raise ValueError(f"Ablate needs a direction (one position), got {self.vector!r}.")
        _check_at(self.at)


Intervention = Add | Ablate
Condition = SteeringVector | Intervention | Sequence[SteeringVector | Intervention] | None


def interventions(condition: Condition, model: TransformerBridge) -> list[Intervention]:
    """A condition as a list of interventions that fit ``model``; coefficient 0 drops out.

    A bare vector acts where it was made for (`SteeringVector.at`).

    Raises:
        ValueError: not a condition; a vector of another ``d_model``; a layer that is not there.
    """
    if condition is None:
        return []
    items = list(condition) if isinstance(condition, (list, tuple)) else [condition]
    result: list[Intervention] = []
    for item in items:
        act = Add(item, at=item.at) if isinstance(item, SteeringVector) else item
        if not isinstance(act, (Add, Ablate)):
            raise ValueError(
                "A condition is None, a SteeringVector, an Add, an Ablate, or a list of these; "
                f"got {type(item).__name__}."
            )
        vector = act.vector
        if vector.d_model != model.cfg.d_model:
            raise ValueError(
                f"{vector!r} has d_model {vector.d_model}, but {model.cfg.model_name} has "
                f"{model.cfg.d_model}: a vector works in the model it was made with."
            )
        if max(vector.layers) >= model.cfg.n_layers or min(vector.layers) < 0:
            raise ValueError(
                f"{vector!r} needs layer {max(vector.layers)}, but {model.cfg.model_name} has "
                f"layers 0 to {model.cfg.n_layers - 1}."
            )
        if vector.meta.get("model") not in (None, model.cfg.model_name):
            warnings.warn(
                f"{vector!r} was made with {vector.meta['model']}, not {model.cfg.model_name}.",
                stacklevel=3,
            )
        if isinstance(act, Ablate) or act.coefficient != 0:
            result.append(act)
    return result


def first_position(acts: Sequence[Intervention], n_prompt: int) -> int:
    """The first position that these interventions touch (a huge number if none does).

    Raises:
        ValueError: an intervention does not fit a prompt of ``n_prompt`` tokens.
    """
    spans = [_span(_check_at(a.at), a.vector.n_positions, n_prompt) for a in acts]
    # A range may be endless, so its start is asked for, not searched for.
    starts = [s.start if isinstance(s, range) else min(s) for s in spans if len(s)]
    return min(starts, default=_END)


class Steering:
    """The hooks that give every row of a batch its own interventions.

    Args:
        model: the bridge that will run.
        rows: one list of interventions per row.
        n_prompt: number of prompt tokens of each row, BOS included.

    A forward pass sees a window of each sequence: call `window` before it, so that the hooks know
    which positions its columns hold. Interventions at the same site act in the order given.
    """

    def __init__(
        self,
        model: TransformerBridge,
        rows: Sequence[Sequence[Intervention]],
        n_prompt: Sequence[int],
    ):
        self.model = model
        self._start = list(n_prompt)
        self._width = 0
        self._n_prompt = list(n_prompt)
        self._entries: dict[Any, tuple[torch.Tensor, ...]] = {}
        # hook -> (slot, kind) -> [(row, at, k, first row in the table)]
        self._ops: dict[str, dict[tuple[int, str], list[tuple[int, Any, int, int]]]] = {}
        self._table: dict[str, dict[tuple[int, str], torch.Tensor]] = {}
        stacks: dict[tuple[str, tuple[int, str]], tuple[list[torch.Tensor], dict[Any, int]]] = {}
        for r, acts in enumerate(rows):
            slots: dict[str, int] = {}
            for act in acts:
                at, k = _check_at(act.at), act.vector.n_positions
                _span(at, k, self._n_prompt[r])  # says at once if it does not fit
                for layer, tensor in act.vector.layers.items():
                    name = f"blocks.{layer}.hook_{act.vector.site}"
                    slot = slots[name] = slots.get(name, -1) + 1
                    part = (slot, "add" if isinstance(act, Add) else "ablate")
                    parts, seen = stacks.setdefault((name, part), ([], {}))
                    scale = act.coefficient if isinstance(act, Add) else None
                    if (id(tensor), scale) not in seen:
                        seen[id(tensor), scale] = sum(map(len, parts))
                        parts.append(
                            torch.nn.functional.normalize(tensor, dim=-1)
                            if scale is None
                            else scale * tensor
                        )
                    ops = self._ops.setdefault(name, {}).setdefault(part, [])
                    ops.append((r, at, k, seen[id(tensor), scale]))
        for (name, part), (parts, _) in stacks.items():
            self._table.setdefault(name, {})[part] = torch.cat(parts)

    def window(self, start: Sequence[int], width: int) -> None:
        """Say what the next pass holds: column c of row r is position ``start[r] + c``.

        Padding has a negative position and is never touched.
        """
        self._start, self._width = list(start), width
        self._entries = {}

    def select(self, keep: Sequence[int]) -> None:
        """Go on with these rows of the batch only."""
        place = {r: i for i, r in enumerate(keep)}
        self._n_prompt = [self._n_prompt[r] for r in keep]
        self._ops = {
            name: {
                part: [(place[r], *rest) for r, *rest in ops if r in place]
                for part, ops in parts.items()
            }
            for name, parts in self._ops.items()
        }

    @contextmanager
    def hooks(self, more: Sequence[tuple[str, Any]] = ()) -> Iterator[None]:
        """The hooks are in place inside the ``with`` block and gone after it, whatever happens.

        ``more`` are further TransformerLens hooks; they see the stream after the interventions.
        """
        wanted = [*((name, self._hook(name)) for name in self._ops), *more]
        if not wanted:  # asking TransformerLens to add nothing takes it a tenth of a small pass
            yield
            return
        with self.model.hooks(fwd_hooks=wanted):
            yield

    def _hook(self, name: str) -> Any:
        def hook(x: torch.Tensor, hook: Any) -> torch.Tensor | None:
            changed = None
            for part in sorted(self._ops[name]):
                row, col, index = self._where(self._ops[name][part])
                if not len(row):
                    continue
                if changed is None:
                    changed = x.clone()
                table = self._table[name][part] = self._table[name][part].to(x.device)
                if part[1] == "add":
                    changed[row, col] += table[index].to(x.dtype)
                else:
                    stream, direction = changed[row, col].float(), table[index]
                    shift = (stream * direction).sum(-1, keepdim=True) * direction
                    changed[row, col] = (stream - shift).to(x.dtype)
            return changed

        return hook

    def _where(self, ops: list[tuple[int, Any, int, int]]) -> tuple[torch.Tensor, ...]:
        """(row, column, table row) of everything that ``ops`` touch in the present window."""
        key = tuple(ops)  # layers of one vector share it, so it is worked out once per window
        if key not in self._entries:
            found = [
                (r, p - self._start[r], first + i)
                for r, at, k, first in ops
                for p, i in _covered(
                    at, k, self._n_prompt[r], self._start[r], self._start[r] + self._width
                )
            ]
            table = torch.tensor(found, dtype=torch.long).reshape(-1, 3)
            self._entries[key] = (table[:, 0], table[:, 1], table[:, 2])
        return self._entries[key]


def align(
    model: TransformerBridge, prompt: str, vectors: Mapping[str, SteeringVector | Add]
) -> pd.DataFrame:
    """Residual-stream alignment table: which tokens meet at which position.

    One row for the prompt and one per prompt of every vector (columns: layer, coefficient, then
    one column per position), as in the first document's tables. Vectors must come from prompts.
    """
    import pandas as pd

    ids = encode(model, prompt)
    tokens = [model.tokenizer.decode([i]) for i in ids]
    rows: list[list[Any]] = [["0 (prompt)", "+1", *tokens]]
    for item in vectors.values():
        act = Add(item, at=item.at) if isinstance(item, SteeringVector) else item
        if "tokens" not in act.vector.meta:
            raise ValueError(f"{act.vector!r} has no tokens to align: it is not from two prompts.")
        first = _span(_check_at(act.at), act.vector.n_positions, len(ids))[0]
        factor = act.coefficient * act.vector.meta.get("coefficient", 1.0)
        layers = ", ".join(map(str, sorted(act.vector.layers)))
        for sign, names in zip((1, -1), act.vector.meta["tokens"], strict=False):
            cells = model.tokenizer.convert_tokens_to_ids(names)
            text = [""] * first + [model.tokenizer.decode([c]) for c in cells]
            rows.append([layers, f"{sign * factor:+g}", *text])
    width = max(map(len, rows))
    columns = ["layer", "coefficient", *map(str, range(width - 2))]
    return pd.DataFrame([r + [""] * (width - len(r)) for r in rows], columns=columns)
