"""Interventions x rows -> TransformerLens hooks.

`BatchHooks` gives every row of a batch its own interventions. `steer` puts a condition on any
`TransformerBridge` for the length of a ``with`` block, whatever TransformerLens does in it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from .interventions import (
    Condition,
    Gate,
    Intervention,
    as_interventions,
    counts_from_end,
    covered,
    first_position,
)
from .tokens import Prompt, input_device, pad_id, pad_left, prompt_ids

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Hook = tuple[str, Callable[..., Any]]
Prompts = tuple[list[int], list[dict[int, bool]]]  # length of each; what it lets act (BatchHooks)


class BatchHooks:
    """The hooks that give every row of a batch its own interventions.

    Args:
        model: the bridge that will run.
        rows: one list of interventions per row.
        n_prompt: number of prompt tokens of each row, BOS included.
        gates: for each row what is known of its conditional interventions: id -> whether the
            prompt passed. Give those of an earlier pass to go on from its key-value cache.

    A forward pass sees a window of each sequence: call `window` before it, so that the hooks know
    which positions its columns hold. Interventions at the same site act in the order given.

    How a mixture of conditions becomes a few tensor operations. At one hook point the first
    intervention of every row stands in slot 0, its second in slot 1, and so on. Rows with the same
    kind of intervention in the same slot form a *part*, which is one call of the kind's ``apply``.
    A part has a table of operands: every different intervention's rows, one below the other.
    What it touches in a pass is a list of (row, column, table row). An intervention that waits for
    its prompt to pass has a slot more, in which that is read; it stays known in later passes.
    """

    def __init__(
        self,
        model: TransformerBridge,
        rows: Sequence[Sequence[Intervention]],
        n_prompt: Sequence[int],
        gates: Sequence[dict[int, bool]] | None = None,
    ):
        self.model = model
        self.gates = list(gates or ({} for _ in rows))
        self.touched: set[int] = set()  # id of every intervention that has touched something
        self.n_prompt = list(n_prompt)
        self._start, self._stop = list(n_prompt), list(n_prompt)
        self._found: dict[Any, tuple[torch.Tensor, ...]] = {}
        # hook name -> part -> [(row, intervention, its first row in the table)]
        self._parts: dict[str, dict[Any, list[tuple[int, Intervention, int]]]] = {}
        # hook name -> part -> operands, each [table row, ...]
        self._tables: dict[str, dict[Any, list[torch.Tensor]]] = {}
        blocks: dict[tuple[str, Any], list[tuple[torch.Tensor, ...]]] = {}
        placed: dict[tuple[str, int, int], tuple[Any, int]] = {}
        for r, acts in enumerate(rows):
            slots: dict[str, int] = {}
            for act in acts:
                first_position([act], self.n_prompt[r])  # says at once if it does not fit
                if act.gate:
                    slot = slots[act.gate.point] = slots.get(act.gate.point, -1) + 1
                    reads = self._parts.setdefault(act.gate.point, {})
                    reads.setdefault((slot, Gate), []).append((r, act, 0))
                for layer, name in zip(act.layers, act.points, strict=True):
                    slot = slots[name] = slots.get(name, -1) + 1
                    known = (name, slot, id(act))
                    if known not in placed:  # rows of one condition share its operands
                        operands = act.operands(layer)
                        part = (slot, act.kind, tuple(o.shape[1:] for o in operands))
                        table = blocks.setdefault((name, part), [])
                        placed[known] = part, sum(len(block[0]) for block in table)
                        table.append(operands)
                    part, first = placed[known]
                    self._parts.setdefault(name, {}).setdefault(part, []).append((r, act, first))
        for (name, part), table in blocks.items():
            tables = [torch.cat(column) for column in zip(*table, strict=True)]
            self._tables.setdefault(name, {})[part] = tables

    @property
    def names(self) -> list[str]:
        """The hook points at which anything may happen."""
        return list(self._parts)

    def window(
        self, start: Sequence[int], width: int | None = None, stop: Sequence[int] | None = None
    ) -> None:
        """Say what the next pass holds: column c of row r is position ``start[r] + c``.

        Padding on the left has a negative position and is never touched; nor is what lies at
        ``stop[r]`` or beyond (by default ``start[r] + width``).
        """
        self._start = list(start)
        self._stop = list(stop) if stop is not None else [s + (width or 0) for s in start]
        self._found = {}

    def select(self, keep: Sequence[int]) -> None:
        """Go on with these rows of the batch only."""
        place = {r: i for i, r in enumerate(keep)}
        self.n_prompt = [self.n_prompt[r] for r in keep]
        self.gates = [self.gates[r] for r in keep]
        self._parts = {
            name: {
                part: [(place[r], *rest) for r, *rest in acts if r in place]  # type: ignore[misc]
                for part, acts in parts.items()
            }
            for name, parts in self._parts.items()
        }

    @contextmanager
    def hooks(self, more: Sequence[Hook] = ()) -> Iterator[None]:
        """The hooks are in place inside the ``with`` block and gone after it, whatever happens.

        ``more`` are further TransformerLens hooks; they see the stream after the interventions.
        """
        wanted = [*((name, functools.partial(self._hook, name)) for name in self.names), *more]
        if not wanted:  # asking TransformerLens to add nothing takes it a tenth of a small pass
            yield
            return
        with self.model.hooks(fwd_hooks=wanted):
            yield

    def _hook(self, name: str, x: torch.Tensor, hook: Any = None) -> torch.Tensor | None:
        return self.act(name, x)

    def act(
        self, name: str, x: torch.Tensor, place: Sequence[int] | None = None
    ) -> torch.Tensor | None:
        """The stream ``[row, column, d_model]`` at a hook point, changed; None if it is not.

        ``place`` says which row of the stream each row of the batch is, if not its own.
        """
        changed = None
        for part in sorted(self._parts.get(name, ()), key=lambda part: part[0]):  # slot by slot
            acts = self._parts[name][part]
            if part[1] is Gate:
                self._read(acts, x if changed is None else changed, place)
                continue
            row, col, index = self._where(acts)
            if not len(row):
                continue
            if place is not None:
                row = torch.tensor(place)[row]
            if changed is None:
                changed = x.clone()  # the unhooked model's own tensor stays as it is
            tables = self._tables[name][part] = [t.to(x.device) for t in self._tables[name][part]]
            new = part[1].apply(changed[row, col], *(table[index] for table in tables))
            changed[row, col] = new.to(x.dtype)
        return changed

    def _read(
        self,
        acts: list[tuple[int, Intervention, int]],
        x: torch.Tensor,
        place: Sequence[int] | None,
    ) -> None:
        """See which prompts pass, of those whose position this pass holds."""
        for r, act, _ in acts:
            if act.gate:
                position = act.gate.position_in(self.n_prompt[r])
                if self._start[r] <= position < self._stop[r]:
                    row = r if place is None else place[r]
                    stream = x[row, position - self._start[r]]
                    self.gates[r][id(act)] = act.gate.opens(stream)

    def _where(self, acts: list[tuple[int, Intervention, int]]) -> tuple[torch.Tensor, ...]:
        """(row, column, table row) of everything that a part touches in the present window."""
        # Layers of one vector touch the same places, so this is worked out once per window.
        key = tuple((r, id(act), first) for r, act, first in acts)
        if key not in self._found:
            found = []
            for r, act, first in acts:
                here = covered(
                    act.at, act.n_positions, self.n_prompt[r], self._start[r], self._stop[r]
                )
                if not here:
                    continue
                self.touched.add(id(act))
                if act.gate and id(act) not in self.gates[r]:
                    raise ValueError(
                        f"{type(act).__name__} has to act before its prompt has run: position "
                        f"{act.gate.position} at {act.gate.point}."
                    )
                if not act.gate or self.gates[r][id(act)]:
                    found += [(r, p - self._start[r], first + i) for p, i in here]
            table = torch.tensor(found, dtype=torch.long).reshape(-1, 3)
            self._found[key] = (table[:, 0], table[:, 1], table[:, 2])
        return self._found[key]


# ---------------------------------------------------------------- on any model


@contextmanager
def steer(model: TransformerBridge, condition: Condition) -> Iterator[TransformerBridge]:
    """Inside the ``with`` block, whatever runs ``model`` runs it under ``condition``.

    TransformerLens' own ``model(...)``, ``generate`` (with and without key-value cache),
    ``run_with_cache``, left-padded batches with an attention mask: which positions a pass holds is
    read off its cache and its mask, so ``at="front"``, negative positions, ``"generated"`` and all
    others mean what they mean in `generate`. What is a prompt: everything in a pass without a past;
    inside ``generate``, its first pass. Blocks may be nested; the outer condition acts first.

    Args:
        model: any `TransformerBridge`, also one that you booted yourself.
        condition: None, a `SteeringVector`, an intervention, or a list of these.

    Raises:
        ValueError: the condition does not fit the model or a prompt; at the end of the block, if
            something ran and an intervention touched no position of it; padding that cannot be
            told from text.

    Example:
        >>> with sl.steer(model, 6 * wedding):
        ...     print(model.generate("I went up to", max_new_tokens=20))
    """
    acts = as_interventions(condition, model)
    if not acts:
        yield model
        return
    passes = _Passes(model, acts)
    with passes.watch():
        yield model
    idle = [act for act in acts if id(act) not in passes.touched]
    if passes.ran and idle:
        raise ValueError(
            f"{type(idle[0]).__name__} at {idle[0].at!r} touched no position of what ran inside "
            f"steer ({passes.ran} forward passes, the longest sequence had {passes.longest} "
            "tokens): say another place, or run more tokens."
        )


class _Passes:
    """Follows the forward passes of a model and keeps `BatchHooks` told of what each holds."""

    def __init__(self, model: TransformerBridge, acts: list[Intervention]):
        self.model, self.acts = model, acts
        self.ran = self.longest = 0
        self._before: set[int] = set()  # touched by earlier batches
        self._batch: BatchHooks | None = None
        self._known: Prompts | None = None  # of the last pass
        self._generating = False  # inside `generate`
        self._prompts: WeakKeyDictionary[Any, Prompts] = WeakKeyDictionary()  # by cache

    @property
    def touched(self) -> set[int]:
        return self._before | (self._batch.touched if self._batch else set())

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Hooks on the model's streams, and on the model itself to see each pass begin and end."""
        inner = self.model.original_model
        wanted: list[Hook] = [
            (name, functools.partial(self._hook, name)) for name in _points(self.acts)
        ]
        with ExitStack() as stack:
            for name in ("generate", "hf_generate", "generate_stream"):
                stack.enter_context(self._told_of(name))
            handles = [
                inner.register_forward_pre_hook(self._begin, with_kwargs=True),
                inner.register_forward_hook(self._end, with_kwargs=True),
            ]
            for handle in handles:
                stack.callback(handle.remove)
            stack.enter_context(self.model.hooks(fwd_hooks=wanted))
            yield

    @contextmanager
    def _told_of(self, name: str) -> Iterator[None]:
        """Know when ``model.generate`` runs: without a cache its passes look like new prompts."""
        method, own = getattr(self.model, name), self.model.__dict__.get(name)

        @functools.wraps(method)
        def told(*args: Any, **kwargs: Any) -> Any:
            self._known, self._generating = None, True
            try:
                result = method(*args, **kwargs)
                if name == "generate_stream":  # runs while it is read
                    return self._until_read(result)
                return result
            finally:
                if name != "generate_stream":
                    self._known, self._generating = None, False

        self.model.__dict__[name] = told
        try:
            yield
        finally:
            if own is None:
                del self.model.__dict__[name]
            else:
                self.model.__dict__[name] = own

    def _until_read(self, stream: Iterator[Any]) -> Iterator[Any]:
        self._known, self._generating = None, True
        try:
            yield from stream
        finally:
            self._known, self._generating = None, False

    def _begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pass begins: work out which position each of its columns has."""
        tokens = kwargs.get("input_ids", args[0] if args else None)
        shown = tokens if tokens is not None else kwargs.get("inputs_embeds")
        if shown is None:
            raise ValueError("steer sees neither tokens nor embeddings in this forward pass.")
        cache = kwargs.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        rows, width = shown.shape[:2]
        mask = kwargs.get("attention_mask")
        if mask is None:
            # Inside `generate`, what ended early is filled up with the token for padding.
            if tokens is not None and not (self._generating and self._known):
                self._refuse_unmarked_padding(tokens)
            start, stop = [past] * rows, [past + width] * rows
        else:
            start, stop = _spans(mask, past, width)
        known = self._prompts.get(cache) if cache is not None and past else None
        if known is None and self._generating:
            known = self._known
        self._known = n_prompt, gates = known or (stop, [{} for _ in stop])
        if self._batch is None or n_prompt != self._batch.n_prompt:
            self._before = self.touched
            self._batch = BatchHooks(self.model, [self.acts] * rows, n_prompt)
        self._batch.gates = gates
        self._batch.window(start, stop=stop)
        self.ran, self.longest = self.ran + 1, max(self.longest, *stop)

    def _end(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        """A pass ends: remember how long the prompts in its cache were."""
        cache = getattr(output, "past_key_values", None)
        cache = kwargs.get("past_key_values") if cache is None else cache
        if cache is not None and self._known:
            self._prompts[cache] = self._known

    def _hook(self, name: str, x: torch.Tensor, hook: Any = None) -> torch.Tensor | None:
        return None if self._batch is None else self._batch.act(name, x)

    def _refuse_unmarked_padding(self, tokens: torch.Tensor) -> None:
        """Rows of unequal length, padded on the right and not marked: their ends are not known."""
        pad = getattr(self.model.tokenizer, "pad_token_id", None)
        if pad is None or len(tokens) < 2 or not any(counts_from_end(a.at) for a in self.acts):
            return
        padded = tokens[:, -1] == pad
        if padded.any() and not padded.all():
            raise ValueError(
                "Some prompts of this batch are padded on the right and come without an attention "
                "mask, so where they end is not known: pad on the left "
                "(model.tokenizer.padding_side = 'left') or give attention_mask=."
            )


def _spans(mask: torch.Tensor, past: int, width: int) -> tuple[list[int], list[int]]:
    """Per row: the position of the pass's first column, and the one behind its last token.

    ``mask`` ``[row, past + width]`` (or ``[row, width]``) is 1 at tokens, 0 at padding.
    """
    if mask.ndim != 2:
        raise ValueError(f"steer reads masks [row, column], got {list(mask.shape)}.")
    mask = mask.bool()
    if mask.shape[1] < past + width:  # of the new columns only: all of the past was text
        mask = torch.nn.functional.pad(mask, (past + width - mask.shape[1], 0), value=True)
    here = mask[:, past : past + width]
    count = here.sum(1)
    first = here.int().argmax(1)  # of the first token in the pass
    last = width - here.flip(1).int().argmax(1)  # behind its last one
    if ((last - first != count) & (count > 0)).any():
        raise ValueError("An attention mask with gaps inside a text has no positions to act at.")
    before = mask[:, :past].sum(1)
    start = before - torch.where(count > 0, first, 0)
    return start.tolist(), (before + count).tolist()


def hooks(
    model: TransformerBridge, condition: Condition, n_prompt: int | Sequence[int]
) -> list[Hook]:
    """A condition as TransformerLens hooks, for ``run_with_hooks`` over whole sequences.

    Args:
        n_prompt: how many tokens the prompt has, BOS included: then column c of a pass is position
            c, and what stands behind the prompt counts as generated. Or one number a row, of a
            batch that is padded on the left: its last column is every prompt's last token.

    Returns:
        ``[(name of the hook point, function)]``. The functions hold no state, so they do for any
        number of passes, but not for those that go on from a key-value cache: see `steer`.

    Raises:
        ValueError: the condition does not fit the model or the prompt; when run, a pass of fewer
            columns than the prompt has.

    Example:
        >>> model.run_with_hooks(text, fwd_hooks=sl.hooks(model, 6 * wedding, n_prompt=8))
    """
    acts = as_interventions(condition, model)
    lengths = [n_prompt] if isinstance(n_prompt, int) else list(n_prompt)
    for n in lengths:
        first_position(acts, n)  # says at once what does not fit
    batches: dict[int, BatchHooks] = {}

    def run(name: str, x: torch.Tensor, hook: Any = None) -> torch.Tensor | None:
        rows, width = x.shape[:2]
        if width < max(lengths) or (len(lengths) > 1 and len(lengths) != rows):
            raise ValueError(
                f"These hooks are for {len(lengths)} whole sequence(s) with a prompt of "
                f"{max(lengths)} tokens, and this pass holds {width} column(s) of {rows} row(s): "
                "for cached generation use steer."
            )
        if rows not in batches:
            n = lengths * rows if len(lengths) == 1 else lengths
            batches[rows] = BatchHooks(model, [acts] * rows, n)
        start = [0] * rows if isinstance(n_prompt, int) else [n - width for n in lengths]
        batches[rows].touched.clear()
        batches[rows].window(start, width)
        changed = batches[rows].act(name, x)
        if not batches[rows].touched and any(name in act.points for act in acts):
            warnings.warn(f"The condition touches nothing at {name} in this pass.", stacklevel=2)
        return changed

    return [(name, functools.partial(run, name)) for name in _points(acts)]


def _points(acts: Sequence[Intervention]) -> list[str]:
    """Every hook point at which interventions read or act, once."""
    read = [act.gate.point for act in acts if act.gate]
    return list(dict.fromkeys([*read, *(point for act in acts for point in act.points)]))


def steered_logits(
    model: TransformerBridge,
    prompts: Prompt | Sequence[Prompt] | torch.Tensor,
    condition: Condition,
) -> torch.Tensor:
    """Logits of whole prompts under a condition: one forward pass.

    Args:
        prompts: one text or several (BOS is added where the model has one), lists of token ids, or
            a tensor of token ids ``[row, column]``.

    Returns:
        ``[row, column, vocabulary]``, on the model's device; rows of unequal length are padded on
        the left, so that column -1 predicts the next token of every row.

    Raises:
        ValueError: the condition does not fit the model or a prompt, or touches none of them.
    """
    if isinstance(prompts, torch.Tensor):
        ids = prompts.reshape(-1, prompts.shape[-1]).tolist()
    else:
        one = isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int))
        ids = [prompt_ids(model, p) for p in ([prompts] if one else prompts)]  # type: ignore[arg-type]
    if not ids:
        raise ValueError("There are no prompts.")
    tokens, mask = pad_left(ids, pad_id(model), input_device(model))
    with torch.no_grad(), steer(model, condition):
        return model.forward(tokens, attention_mask=mask)
