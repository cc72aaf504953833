"""Forward passes as transformers' own modules, with the interventions at the edges of the blocks.

The bridge shows hooks every step inside a block; that costs Python in every layer, and copies in
attention. Where nobody looks inside, transformers' own modules do the same sums without it. What
this relies on, some of it private to TransformerLens, is checked; where it does not hold, passes
run through the bridge, and a warning says so.
"""

from __future__ import annotations

import bisect
import copy
import functools
import math
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..hooks import BatchHooks, Hook
from ..tokens import columns_of, input_device

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

# Models whose native logits have been compared with the bridge's, and whether they agree.
_agrees: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
_takes_positions: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
_warned: weakref.WeakSet[Any] = weakref.WeakSet()


class Levels:
    """Which rows run at which layer: until it is steered, a row is the same as others.

    A level is a stretch of layers in which the same rows run. Where the next one starts, rows
    multiply, so that the layers below an intervention run once for all conditions.

    Args:
        first: of each row of a batch the lowest layer at which something changes it, or infinity.
        own: what tells the row from others from there on; same: below.
    """

    def __init__(self, first: Sequence[float], own: Sequence[Hashable], same: Sequence[Hashable]):
        # First layer of every level.
        self.starts = [0, *sorted({int(n) for n in first if 0 < n < math.inf})]
        self.rows: list[list[int]] = []  # of every level: one row of the batch for each that runs
        self.place: list[list[int]] = []  # of every level: which of these each row of the batch is
        for start in self.starts:
            keys = [
                (True, mine) if n <= start else (False, theirs)
                for n, mine, theirs in zip(first, own, same, strict=True)
            ]
            rows, place = distinct(keys)
            self.rows.append(rows)
            self.place.append(place)

    @classmethod
    def apart(cls, n: int) -> Levels:
        """``n`` rows of which none runs as one with another."""
        return cls([0] * n, range(n), range(n))

    def at(self, layer: int) -> int:
        """The level that a layer belongs to."""
        return bisect.bisect_right(self.starts, layer) - 1


def distinct(keys: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    """Index of the first of each distinct key, and for every key the place among these."""
    places: dict[Any, int] = {}
    first: list[int] = []
    for i, key in enumerate(keys):
        if key not in places:
            places[key] = len(first)
            first.append(i)
    return first, [places[key] for key in keys]


class Passes:
    """Runs forward passes of a model, natively where that changes nothing but the time.

    Cheap to make (milliseconds): whoever runs a batch makes one, of the model as it is then. The
    model itself stays as it is: native passes run in a copy of its module tree which shares all
    weights, and PyTorch's hooks on transformers' modules, and leaves out the bridge's modules.
    """

    def __init__(self, model: TransformerBridge):
        self.model = model
        self._hooks: BatchHooks | None = None  # these three of the pass that is running
        self._more: dict[str, list[Callable[..., Any]]] = {}
        self._levels: Levels | None = None
        self._twin: Any = None
        blocks = list(getattr(model, "blocks", ()))
        self._points = {
            f"blocks.{n}.hook_resid_{side}": point
            for n, block in enumerate(blocks)
            for side, point in (("pre", block.hook_in), ("post", block.hook_out))
        }
        modules = _modules(model)
        if why := _obstacle(model, blocks, modules):
            self._fall_back(why)
            return
        edges = set(map(id, self._points.values()))
        self._edges = [point._forward_hooks for point in self._points.values()]
        inside = [m for m in modules if _of_the_bridge(m) and id(m) not in edges]
        self._inside = [h for m in inside for h in (m._forward_hooks, m._forward_pre_hooks)]
        # TransformerLens' own, which stand among them and look at nothing.
        self._own = [block._capture_hook_handles for block in blocks]
        self._twin = self._build(blocks)

    def forward(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache: Any = None,
        hooks: BatchHooks | None = None,
        more: Sequence[Hook] = (),
        keep: torch.Tensor | None = None,
        levels: Levels | None = None,
    ) -> torch.Tensor:
        """Logits ``[row, column, vocabulary]``; with ``levels``, of the rows of the last one.

        Args:
            tokens: ``[row, column]``, the columns that the cache does not hold yet; with
                ``levels``, of the rows of the first one.
            mask: ``[row, column]`` of all columns, 1 at tokens; None if all are.
            hooks: told which positions the columns hold (`BatchHooks.window`).
            more: TransformerLens hooks; they see the stream after the interventions.
            keep: the columns whose logits are wanted, all by default (`tokens.columns_of`).
        """
        run: dict[str, Any] = {} if keep is None else {"logits_to_keep": keep}
        run |= {} if mask is None else {"attention_mask": mask}
        run |= {} if cache is None else {"past_key_values": cache}
        alone = levels is None or len(levels.starts) == 1
        if alone and not self.native or any(name not in self._points for name, _ in more):
            assert alone, "rows run as one in native passes only"
            hooks = hooks or BatchHooks(self.model, [], [])
            with hooks.hooks(more):
                return self.model.forward(tokens, **run)
        self._hooks, self._levels = hooks, levels
        for name, hook in more:
            self._more.setdefault(name, []).append(hook)
        try:
            return self._run(tokens, **run)
        finally:
            self._hooks, self._more, self._levels = None, {}, None

    @property
    def native(self) -> bool:
        """Whether a pass would run natively now."""
        if self._twin is None or sum(map(len, self._inside)) > sum(map(len, self._own)):
            return False
        if self.model not in _agrees:
            # Compared once; not while hooks are about, which would see passes that are none.
            if any(self._edges) or self._twin._forward_pre_hooks or self._twin._forward_hooks:
                return False
            if why := self._differs():
                self._fall_back(why)
            _agrees[self.model] = not why
        return _agrees[self.model]

    @property
    def shares(self) -> bool:
        """Whether rows may run as one (`Levels`) now: nobody else looks at what runs."""
        return self.native and not any(self._edges)

    def levels(
        self, acts: Sequence[Any], own: Sequence[Hashable], same: Sequence[Hashable]
    ) -> Levels:
        """`Levels` of rows under these interventions; one level where rows may not run as one."""
        if not self.shares:
            return Levels([0] * len(acts), own, same)
        return Levels(
            [min((n for act in a for n in act.layers), default=math.inf) for a in acts], own, same
        )

    def _fall_back(self, why: str) -> None:
        self._twin = None
        if self.model not in _warned:
            _warned.add(self.model)
            name = getattr(self.model.cfg, "model_name", "this model")
            warnings.warn(
                f"{name} runs through TransformerLens' bridge, with the same results but more "
                f"slowly: {why}.",
                stacklevel=4,
            )

    def _differs(self) -> str:
        """Why native passes are not the bridge's: of two short rows, one of them padded, which
        run once more from the middle layer on."""
        tokens = torch.tensor([[5, 6, 7, 8], [0, 5, 6, 9]], device=input_device(self.model))
        mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]], device=tokens.device)
        run = {"attention_mask": mask, "logits_to_keep": columns_of(tokens, -1)}
        middle = len(self._own) // 2
        levels = Levels([middle, middle, math.inf, math.inf], range(4), [0, 1, 0, 1])
        try:
            with torch.no_grad():
                self._levels = levels
                ours = self._run(tokens, **run)[levels.place[-1]].float()
                theirs = self.model.forward(tokens, **run).float().repeat(2, 1, 1)
        except Exception as error:  # whatever another version of a library may raise
            return f"transformers' own modules raise {type(error).__name__}: {error}"
        finally:
            self._levels = None
        digits = 1e-3 if self.model.cfg.dtype == torch.float32 else 0.3
        if not (ours - theirs).abs().max() <= digits * theirs.std():
            return "transformers' own modules give other logits than the bridge"
        return ""

    def _run(self, tokens: torch.Tensor, **run: Any) -> torch.Tensor:
        from transformer_lens.utilities import get_offset_position_ids

        mask = run.get("attention_mask")
        if mask is not None and self._positions and not bool(mask.all()):
            # As the bridge does: padding on the left does not count.
            run["position_ids"] = get_offset_position_ids(mask.shape[1] - tokens.shape[1], mask)
        return self._twin(input_ids=tokens, use_cache="past_key_values" in run, **run).logits

    # ------------------------------------------------------------ the copy of the module tree

    def _build(self, blocks: list[Any]) -> Any:
        """The model without the bridge's modules; blocks call back at their edges."""
        from transformer_lens.utilities.position_ids import accepts_mask_derived_position_ids

        model = self.model.original_model
        if model not in _takes_positions:  # to find out takes longer than the rest
            _takes_positions[model] = accepts_mask_derived_position_ids(model)
        self._positions = _takes_positions[model]
        # Not with fewer digits: there the kernel rounds by shape, so that a row would turn with the
        # cache and with who else is in the batch (in bfloat16 half of all short completions did).
        fused = (
            self.model.cfg.dtype == torch.float32
            and getattr(model, "_supports_sdpa", False)
            and not getattr(model.config, "attn_logit_softcapping", None)
        )
        known: dict[int, Any] = {}

        def config_of(config: Any) -> Any:
            if id(config) not in known:
                known[id(config)] = mine = copy.deepcopy(config)
                if fused:  # the kernel that holds no matrix of attention
                    mine.output_attentions, mine._attn_implementation = False, "sdpa"
            return known[id(config)]

        def twin_of(module: Any) -> Any:
            if id(module) not in known:
                original = module.original_component if _of_the_bridge(module) else module
                known[id(module)] = mine = object.__new__(type(original))
                mine.__dict__.update(original.__dict__)
                children = {n: m and twin_of(m) for n, m in original._modules.items()}
                mine.__dict__["_modules"] = children
                if hasattr(original.__dict__.get("config"), "_attn_implementation"):
                    mine.__dict__["config"] = config_of(original.config)
            return known[id(module)]

        twin = twin_of(model)
        this = weakref.ref(self)  # no cycle: the model is let go with its last holder
        for n, block in enumerate(blocks):
            own = known[id(block)]
            own.__dict__["forward"] = functools.partial(_call_block, this, n, own.forward)
        return twin

    def _block(self, n: int, forward: Any, x: torch.Tensor, args: Any, more: Any) -> Any:
        """Block ``n`` of transformers', with its two edges."""
        place = None
        if self._levels is not None:
            level = self._levels.at(n)
            rows, place = self._levels.rows[level], self._levels.place[level]
            if level and n == self._levels.starts[level]:
                before = self._levels.place[level - 1]
                x = x[[before[i] for i in rows]]
            if level:  # masks and positions were made for the rows of the first level
                index = [self._levels.place[0][i] for i in rows]
                args, more = _take((args, more), index, len(self._levels.rows[0]))
        out = forward(self._edge(n, "pre", x, place), *args, **more)
        if isinstance(out, tuple):
            return (self._edge(n, "post", out[0], place), *out[1:])
        return self._edge(n, "post", out, place)

    def _edge(self, n: int, side: str, x: torch.Tensor, place: Any) -> torch.Tensor:
        """The stream at a hook point: first whoever has a hook there sees it, then the
        interventions act, then those see it that read along; the order of the bridge."""
        name = f"blocks.{n}.hook_resid_{side}"
        point = self._points[name]
        if point._forward_hooks:
            x = point(x)
        if self._hooks is not None and (changed := self._hooks.act(name, x, place)) is not None:
            x = changed
        for hook in self._more.get(name, ()):
            if (changed := hook(x, hook=point)) is not None:
                x = changed
        return x


def _call_block(this: Any, n: int, forward: Any, x: torch.Tensor, *args: Any, **more: Any) -> Any:
    return this()._block(n, forward, x, args, more)


def _take(value: Any, index: list[int], n: int) -> Any:
    """These rows of all tensors that have ``n`` of them; what is the same for all rows has one."""
    if isinstance(value, torch.Tensor) and value.ndim > 1 and n > 1 and len(value) == n:
        return value[index]
    if isinstance(value, tuple):
        return tuple(_take(v, index, n) for v in value)
    if isinstance(value, dict):
        return {k: _take(v, index, n) for k, v in value.items()}
    return value


def _of_the_bridge(module: Any) -> bool:
    return isinstance(module, _bridge_classes())


@functools.cache
def _bridge_classes() -> tuple[type, ...]:
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    return HookPoint, GeneralizedComponent


def _modules(model: TransformerBridge) -> list[Any]:
    """All modules of the bridge and of transformers' model, each once (PyTorch's own way to list
    them takes as long as a pass)."""
    todo: list[Any] = [model, model.original_model]
    found: dict[int, Any] = {}
    while todo:
        module = todo.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            todo.extend(module._modules.values())
    return list(found.values())


def _obstacle(model: TransformerBridge, blocks: list[Any], modules: list[Any]) -> str:
    """Why this model cannot run natively; empty if it can."""
    from transformer_lens.model_bridge.generalized_components import (
        BlockBridge,
        ParallelBlockBridge,
    )

    kinds = {type(block) for block in blocks} - {BlockBridge, ParallelBlockBridge}
    if kinds or not blocks:
        return f"its blocks are {', '.join(sorted(k.__name__ for k in kinds)) or 'not listed'}"
    if not all(hasattr(block, "_capture_hook_handles") for block in blocks):
        return "this version of TransformerLens keeps its own hooks elsewhere"
    if model.compatibility_mode:
        return "its weights are processed (compatibility mode)"
    for module in modules:
        if "forward" in module.__dict__:
            return f"a {type(module).__name__} of it has a forward of its own"
        if getattr(module, "original_component", module) is None:
            return f"a {type(module).__name__} of it stands for no module of transformers'"
    return ""
