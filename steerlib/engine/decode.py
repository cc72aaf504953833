"""The decode loop: rows in, completions out, as many rows at once as memory allows.

Every row has its own interventions and its own random numbers. Work that rows have in common is
done once: all but the last token of a prompt run once for every condition that leaves them alone,
and once per condition otherwise; the samples of one prompt under one condition part only after
that. Rows that finish leave the batch.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..activations import new_cache
from ..hooks import BatchHooks
from ..interventions import (
    Condition,
    Intervention,
    act_before_read,
    as_interventions,
    first_position,
    warn_untouched,
)
from ..tokens import (
    Prefix,
    Prompt,
    columns_of,
    common_prefix,
    first_ids,
    input_device,
    pad_id,
    pad_left,
    prompt_ids,
)
from .kv_cache import PreallocatedLayer, preallocated_cache
from .native import Levels, Passes, distinct

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Stop = str | Sequence[str] | Callable[[str], bool] | None
Watch = Callable[[list[int], list[int], int], list[tuple[str, Any]]]
_ROWS_SAMPLED = 64  # at once
_FAST_ENOUGH = {"cpu": 384}  # rows at once that are scored
_SAMPLED = {"cpu": 192}  # and sampled: more take memory and no less time
_WORTH_SHARING = 32  # tokens that need not run; fewer would not pay for a pass of their own


@dataclass
class Row:
    """One completion in the making."""

    prompt: int
    condition: int
    sample: int
    prompt_ids: list[int]
    acts: list[Intervention]
    draws: np.ndarray  # one uniform number per new token
    gates: dict[int, bool] = field(default_factory=dict)  # see `hooks.BatchHooks`
    new: list[int] = field(default_factory=list)
    text: str = ""
    stopped: bool = False
    done: bool = False  # set last: the other fields are final


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. See `generate.generate`."""

    max_new_tokens: int = 40
    temperature: float = 1.0
    top_p: float = 0.3
    frequency_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}.")
        if not self.frequency_penalty >= 0:
            raise ValueError(f"frequency_penalty must be 0 or more, got {self.frequency_penalty}.")


def make_rows(
    model: TransformerBridge,
    prompts: Sequence[Prompt],
    conditions: Sequence[Condition],
    n_samples: int,
    sampling: Sampling,
    seed: int,
    behind: Sequence[int] | None = None,
) -> list[Row]:
    """All rows in order, checked: every condition fits the model and every prompt.

    ``behind`` says how many tokens run behind each prompt, if not as many as are sampled but one:
    a condition that touches none of them all gets a warning.
    """
    parts = [_prefix_apart(c) for c in conditions]
    before = [first_ids(model, text) if text else [] for text, _ in parts]
    acts = [as_interventions(rest, model) for _, rest in parts]
    rows = []
    for p, prompt in enumerate(prompts):
        ids = prompt_ids(model, prompt)
        bos = int(ids[0] == model.tokenizer.bos_token_id)
        whole = [[*ids[:bos], *b, *ids[bos:]] for b in before]
        for a, w in zip(acts, whole, strict=True):
            more = sampling.max_new_tokens - 1 if behind is None else behind[p]
            warn_untouched(a, len(w), len(w) + more)
        # Seeded by content, not by place: the same prompt gets the same draws in any company.
        said = prompt if isinstance(prompt, str) else repr(ids)
        key = int.from_bytes(hashlib.sha256(said.encode()).digest()[:8], "little")
        draws = [
            np.random.default_rng([seed, key, s]).random(sampling.max_new_tokens)
            for s in range(n_samples)
        ]
        rows += [
            Row(p, c, s, whole[c], acts[c], draws[s])
            for c in range(len(conditions))
            for s in range(n_samples)
        ]
    return rows


def _prefix_apart(condition: Condition) -> tuple[str, Condition]:
    """The text that a condition puts in front of a prompt, and the rest of it."""
    items: list[Any] = list(condition) if isinstance(condition, (list, tuple)) else [condition]
    texts = [item.text for item in items if isinstance(item, Prefix)]
    if not texts:
        return "", condition
    return "".join(texts), [item for item in items if not isinstance(item, Prefix)]


def run(
    model: TransformerBridge,
    rows: Sequence[Row],
    sampling: Sampling,
    stop: Stop = None,
    batch_size: int | None = None,
    use_cache: bool = True,
    on_progress: Callable[[int], Any] = lambda n: None,
) -> None:
    """Complete all rows in place, in batches of similar prompt length."""
    order = sorted(rows, key=lambda r: (len(r.prompt_ids), r.prompt, r.condition, r.sample))
    longest = len(order[-1].prompt_ids) + sampling.max_new_tokens
    size = batch_size or rows_at_once(model, longest, _SAMPLED)
    if not batch_size:  # batches of equal size, not a last one of a few rows
        size = math.ceil(len(order) / math.ceil(len(order) / size))
    begin = 0
    while begin < len(order):
        batch = order[begin : begin + size]
        try:
            for done in decode(model, batch, sampling, stop, use_cache):
                on_progress(done)
        except RuntimeError as error:
            if not out_of_memory(error) or size == 1:
                raise
            size = max(1, len(batch) // 2)
            for row in batch:
                row.new, row.text, row.stopped, row.done = [], "", False, False
            continue
        begin += len(batch)


def first_logits(
    model: TransformerBridge, rows: Sequence[Row], batch_size: int | None = None
) -> Iterator[tuple[Sequence[Row], torch.Tensor]]:
    """Batches of rows, as they come, with their first next-token logits ``[row, vocabulary]``."""
    size = batch_size or rows_at_once(model, max(len(r.prompt_ids) for r in rows) + 1)
    passes = Passes(model)
    for begin in range(0, len(rows), size):
        batch = rows[begin : begin + size]
        with torch.no_grad():
            begun = _run_prompts(passes, batch, 0)
            yield batch, begun.logits[begun.of_row]


def score(
    model: TransformerBridge, rows: Sequence[Row], targets: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Log-probability of every token of each row's target, read after the row's prompt.

    Prompts run as in `prefill`, so rows that differ in their target alone share all of it.

    Args:
        rows: one batch; targets: token ids of each, at least one.

    Returns:
        float32 ``[token]`` for each row, natural logarithms.
    """
    passes = Passes(model)
    with torch.no_grad():
        begun = _run_prompts(passes, rows, 0)
        first = begun.logits.float().log_softmax(-1)
        found = [first[i, ids[0], None].cpu() for i, ids in zip(begun.of_row, targets, strict=True)]
        for columns, which in _by_length([len(ids) - 1 for ids in targets]):
            behind = [targets[i] for i in which]
            scores = _score_rest(passes, begun, [rows[i] for i in which], which, behind, columns)
            for i, score in zip(which, scores, strict=True):
                found[i] = torch.cat([found[i], score.cpu()])
    return found


def _by_length(lengths: Sequence[int]) -> list[tuple[int, list[int]]]:
    """(columns, rows) of passes over rows of similar length; rows of none are in none."""
    groups: list[tuple[int, list[int]]] = []
    for n in sorted(set(lengths) - {0}):
        mine = [i for i, length in enumerate(lengths) if length == n]
        if groups and (n - groups[-1][0]) * len(groups[-1][1]) < _WORTH_SHARING:
            mine = groups.pop()[1] + mine  # padding them costs less than a pass
        groups.append((n, mine))
    return groups


def _score_rest(
    passes: Passes,
    begun: _Begun,
    rows: Sequence[Row],
    which: Sequence[int],
    targets: Sequence[Sequence[int]],
    columns: int,
) -> Iterator[torch.Tensor]:
    """Log-probabilities of the targets' tokens behind their first; ``which`` names the rows."""
    device, pad = input_device(passes.model), pad_id(passes.model)
    keys = [(tuple(r.prompt_ids), tuple(ids)) for r, ids in zip(rows, targets, strict=True)]
    levels = passes.levels([r.acts for r in rows], range(len(rows)), keys)
    cache = begun.copied(levels, [begun.last[i] for i in which])
    # Prompts are padded on the left and targets on the right, so that they meet.
    base = levels.rows[0]
    _, mask = pad_left([rows[i].prompt_ids for i in base], pad, device)
    # The longest prompt of the batch may not be among them, and the cache is as wide as that.
    mask = torch.nn.functional.pad(mask, (cache.get_seq_length() - mask.shape[1], 0))
    padded = [[*targets[i][:-1], *[pad] * (columns + 1)][:columns] for i in base]
    sizes = torch.tensor([len(targets[i]) - 1 for i in base], device=device)
    new = (torch.arange(columns, device=device) < sizes[:, None]).long()
    lengths = [len(r.prompt_ids) for r in rows]
    gates = [r.gates for r in rows]
    hooks = BatchHooks(passes.model, [r.acts for r in rows], lengths, gates)
    stop = [n + len(ids) - 1 for n, ids in zip(lengths, targets, strict=True)]
    hooks.window(lengths, stop=stop)
    tokens, mask = torch.tensor(padded, device=device), torch.cat([mask, new], 1)
    logits = passes.forward(tokens, mask, cache, hooks, levels=levels)
    for place, ids in zip(levels.place[-1], targets, strict=True):
        rest = torch.tensor(ids[1:], device=device)[:, None]
        yield logits[place, : len(rest)].float().log_softmax(-1).gather(1, rest)[:, 0]


def decode(
    model: TransformerBridge,
    rows: Sequence[Row],
    sampling: Sampling,
    stop: Stop = None,
    use_cache: bool = True,
    watch: Watch | None = None,
    own: int = 2,
) -> Iterator[int]:
    """One batch, token by token, completing ``rows`` in place.

    Args:
        watch: called before every pass with (index of each row, its first position, width of the
            pass); returns TransformerLens hooks that read what they like. Only for rows that
            share no prompt, and for the last ``own`` tokens of a prompt and what follows.

    Yields after every step how many tokens are settled; between steps the model has no hooks, so
    whoever iterates may do something else with it, or stop.
    """
    device, ends, passes = input_device(model), end_tokens(model), Passes(model)
    live, numbers = list(rows), list(range(len(rows)))
    tokens, mask = pad_left([r.prompt_ids for r in live], pad_id(model), device)
    history, seen = tokens, mask  # what the frequency penalty counts
    hooks = BatchHooks(model, [r.acts for r in live], [len(r.prompt_ids) for r in live])
    cache = None
    for step in range(sampling.max_new_tokens):
        lengths = [len(r.prompt_ids) + step for r in live]
        with torch.no_grad():
            if not use_cache:
                logits = _forward(passes, hooks, lengths, history, mask, None)
            elif cache is None:
                logits, cache = prefill(passes, live, sampling.max_new_tokens, watch, own)
                hooks.gates = [r.gates for r in live]
            else:
                seen_by = watch and partial(watch, numbers)
                logits = _forward(passes, hooks, lengths, tokens, mask, cache, seen_by)
            draws = torch.tensor([r.draws[step] for r in live], device=device)
            chosen = sample(logits, draws, sampling, history, seen)
        keep = _advance(model, live, chosen.tolist(), ends, stop)
        finished = len(live) - len(keep)
        yield len(live) + finished * (sampling.max_new_tokens - step - 1)
        if not keep:
            return
        if finished:
            # The last rows take the places that fell vacant, so that few rows have to move.
            left = {i: i for i in keep if i < len(keep)}
            late = iter(i for i in keep if i >= len(keep))
            keep = [left[i] if i in left else next(late) for i in range(len(keep))]
            index = torch.tensor(keep, device=device)
            live, numbers = [live[i] for i in keep], [numbers[i] for i in keep]
            hooks.select(keep)
            chosen, history, mask = chosen[index], history[index], mask[index]
            if cache is not None:
                cache.batch_select_indices(index)
        tokens = chosen[:, None]
        history = torch.cat([history, tokens], 1)
        mask = seen = torch.cat([mask, torch.ones_like(tokens)], 1)
    for row in live:
        row.text, row.done = text(model, row), True


def _forward(
    passes: Passes,
    hooks: BatchHooks,
    lengths: Sequence[int],
    tokens: torch.Tensor,
    mask: torch.Tensor,
    cache: Any,
    watch: Callable[[list[int], int], list[tuple[str, Any]]] | None = None,
    wanted: bool = True,
    levels: Levels | None = None,
) -> torch.Tensor:
    """Next-token logits ``[row, vocabulary]`` of sequences that are ``lengths`` long by now.

    ``tokens`` are their last columns, the ones that the cache does not hold yet. If the logits are
    not ``wanted``, the pass only fills the cache.
    """
    keep = columns_of(tokens, -1) if wanted else columns_of(tokens)
    start = [n - tokens.shape[1] for n in lengths]
    hooks.window(start, tokens.shape[1])
    more = watch(start, tokens.shape[1]) if watch else []
    logits = passes.forward(tokens, mask, cache, hooks, more, keep, levels)
    return logits[:, -1] if wanted else logits


def prefill(
    passes: Passes, rows: Sequence[Row], room: int, watch: Watch | None = None, own: int = 2
) -> tuple[torch.Tensor, Any]:
    """Run the prompts, doing once what rows have in common; then there is room for more tokens.

    The last ``own`` tokens of a prompt are never shared with other prompts.

    Returns the next-token logits ``[row, vocabulary]`` and the cache, a row for each of ``rows``.
    """
    begun = _run_prompts(passes, rows, room, watch, own)
    begun.select(Levels.apart(len(rows)), begun.last)
    return begun.logits[begun.of_row], begun.cache


@dataclass
class _Begun:
    """Prompts that have run: what they have in common stands in one row."""

    cache: Any
    levels: Levels
    last: list[int] = field(default_factory=list)  # of each row, which row of the levels it is
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def of_row(self) -> list[int]:
        """Of each row, which row of the logits is its own."""
        return [self.levels.place[-1][i] for i in self.last]

    def select(self, levels: Levels, origin: Sequence[int]) -> None:
        """Give the cache the rows of other levels; ``origin`` says which row each one was."""
        for n, layer in enumerate(self.cache.layers):
            layer.batch_select_indices(self._index(n, levels, origin))

    def copied(self, levels: Levels, origin: Sequence[int]) -> Any:
        """As `select`, into a cache of its own."""
        new = copy.copy(self.cache)
        new.layers = [copy.copy(layer) for layer in self.cache.layers]
        for n, layer in enumerate(new.layers):
            if isinstance(layer, PreallocatedLayer):
                new.layers[n] = layer = layer.growing()
            layer.batch_select_indices(self._index(n, levels, origin))
        return new

    def _index(self, layer: int, levels: Levels, origin: Sequence[int]) -> torch.Tensor:
        place = self.levels.place[self.levels.at(layer)]
        return torch.tensor([place[origin[i]] for i in levels.rows[levels.at(layer)]])


def _run_prompts(
    passes: Passes, rows: Sequence[Row], room: int, watch: Watch | None = None, own: int = 2
) -> _Begun:
    model = passes.model
    device = input_device(model)
    # All but the last token depends on the prompt alone if the condition leaves it untouched.
    untouched = [first_position(r.acts, len(r.prompt_ids)) >= len(r.prompt_ids) - 1 for r in rows]
    ids = [tuple(r.prompt_ids) for r in rows]  # not r.prompt: a condition may put text before it
    prefixes, last_to_prefix = distinct(
        [(i, -1 if free else r.condition) for i, r, free in zip(ids, rows, untouched, strict=True)]
    )
    last_tokens, row_to_last = distinct(
        [(i, r.condition if r.acts else -1) for i, r in zip(ids, rows, strict=True)]
    )
    for row, i in zip(rows, row_to_last, strict=True):
        row.gates = rows[last_tokens[i]].gates  # what the prompt decides, it decides once
    longest = max(len(r.prompt_ids) for r in rows)
    cache = preallocated_cache(model, len(rows), longest + room)
    # Where nothing is shared, running the last token apart would only cost a pass; and it cannot
    # decide about tokens that ran before it.
    whole = any(act_before_read(r.acts, len(r.prompt_ids)) for r in rows)
    split = len(prefixes) < len(last_tokens) and longest > 1 and not whole
    begun, done = None, 0  # columns that are in the cache
    for which, end in [(prefixes, -1), (last_tokens, None)] if split else [(last_tokens, None)]:
        chosen = [rows[i] for i in which]
        acts = [[] if end and untouched[i] else rows[i].acts for i in which]
        if watch is None:
            same = [tuple(r.prompt_ids) for r in chosen]
            levels = passes.levels(acts, range(len(chosen)), same)
        else:
            levels = Levels.apart(len(chosen))
        if begun is not None:
            begun.select(levels, [last_to_prefix[i] for i in which])
        else:
            done = _begin(passes, chosen, acts, own, cache, levels)
        base = [chosen[i].prompt_ids for i in levels.rows[0]]
        tokens, mask = pad_left(base, pad_id(model), device)
        lengths = [len(r.prompt_ids) for r in chosen]
        hooks = BatchHooks(model, acts, lengths, [r.gates for r in chosen])
        logits = _forward(
            passes, hooks, [n + (end or 0) for n in lengths],
            tokens[:, done:end], mask[:, :end], cache, watch and partial(watch, which),
            wanted=end is None, levels=levels,
        )  # fmt: skip
        begun = _Begun(cache, levels, row_to_last, logits)
        done = tokens.shape[1] - 1
    assert begun is not None
    return begun


def _begin(
    passes: Passes,
    rows: Sequence[Row],
    acts: Sequence[Sequence[Intervention]],
    own: int,
    cache: Any,
    levels: Levels,
) -> int:
    """Run what all prompts begin with once, such as a system prompt, into every row of the cache.

    Returns how many columns the cache holds then; 0 where it would not be worth a pass.
    """
    prompts = [r.prompt_ids for r in rows]
    touched = (first_position(a, len(ids)) for a, ids in zip(acts, prompts, strict=True))
    n = min(common_prefix(prompts), min(map(len, prompts)) - own, *touched)
    fits = all(isinstance(layer, PreallocatedLayer) for layer in cache.layers)  # no sliding window
    if not fits or n * (len(prompts) - 1) < _WORTH_SHARING:
        return 0
    tokens = torch.tensor([prompts[0][:n]], device=input_device(passes.model))
    alone = new_cache(passes.model)
    passes.forward(tokens, cache=alone, keep=columns_of(tokens))
    width = max(map(len, prompts))
    for i, (layer, begun) in enumerate(zip(cache.layers, alone.layers, strict=True)):
        padding = [width - len(prompts[r]) for r in levels.rows[levels.at(i)]]
        layer.begin_with(begun.keys, begun.values, padding)
    return n


def sample(
    logits: torch.Tensor,
    draws: torch.Tensor,
    sampling: Sampling,
    history: torch.Tensor,
    seen: torch.Tensor,
) -> torch.Tensor:
    """The next token of every row ``[row]``, by inverse transform of one uniform draw per row.

    Args:
        logits: ``[row, vocabulary]``.
        draws: uniform numbers in [0, 1), ``[row]``.
        history, seen: tokens so far and which of them count (not padding), ``[row, column]``.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # A few rows at a time, so that their scores stay in the processor's cache throughout.
    size = _ROWS_SAMPLED if logits.device.type == "cpu" else len(logits)
    parts = zip(
        logits.split(size), draws.split(size), history.split(size), seen.split(size), strict=True
    )
    return torch.cat([_sample(*part, sampling) for part in parts])


def _sample(
    logits: torch.Tensor,
    draws: torch.Tensor,
    history: torch.Tensor,
    seen: torch.Tensor,
    sampling: Sampling,
) -> torch.Tensor:
    scores = logits.float()
    if sampling.temperature != 1:
        scores = scores / sampling.temperature
    if sampling.frequency_penalty:
        scores = scores.scatter_add(1, history, -sampling.frequency_penalty * seen.to(scores.dtype))
    # The nucleus nearly always lies within the best few; sorting all of the vocabulary would take
    # as long as the model's own step. Exact all the same: k grows until it holds the nucleus.
    total = scores.logsumexp(-1, keepdim=True)
    k = min(256, scores.shape[1])
    while True:
        top, index = scores.topk(k, dim=-1)
        cumulated = (top - total).exp().cumsum(-1)
        if k == scores.shape[1] or bool((cumulated[:, -1] >= sampling.top_p).all()):
            break
        k = min(16 * k, scores.shape[1])
    # A token belongs to the nucleus if those before it do not reach top_p.
    before = torch.cat([torch.zeros_like(cumulated[:, :1]), cumulated[:, :-1]], 1)
    inside = before < sampling.top_p
    size = inside.sum(-1, keepdim=True)
    target = draws[:, None].to(cumulated.dtype) * cumulated.gather(1, size - 1)
    choice = torch.minimum(torch.searchsorted(cumulated, target, right=True), size - 1)
    return index.gather(1, choice)[:, 0]


def _advance(
    model: TransformerBridge, rows: list[Row], tokens: list[int], ends: set[int], stop: Stop
) -> list[int]:
    """Give every row its token; indices of the rows that go on."""
    keep = []
    for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        if token in ends:
            row.stopped = True
        else:
            row.new.append(token)
            if stop is not None:
                row.text = text(model, row)
                row.stopped = _stops(row, stop)
        if not row.stopped:
            keep.append(i)
        else:
            if stop is None or token in ends:
                row.text = text(model, row)
            row.done = True
    return keep


def _stops(row: Row, stop: Stop) -> bool:
    """Whether the text says stop; a stop string and what follows it is cut off."""
    if callable(stop):
        return bool(stop(row.text))
    words = [stop] if isinstance(stop, str) else list(stop or ())
    found = [at for word in words if (at := row.text.find(word)) >= 0]
    if found:
        row.text = row.text[: min(found)]
    return bool(found)


def text(model: TransformerBridge, row: Row) -> str:
    """The new text. Decoded behind the last prompt token, since some tokenizers drop a leading
    space at the start of a text."""
    decode = model.tokenizer.decode
    before = row.prompt_ids[-1:]
    whole = decode(before + row.new, skip_special_tokens=True)
    return whole[len(decode(before, skip_special_tokens=True)) :]


def end_tokens(model: TransformerBridge) -> set[int]:
    """Tokens that end a text: the tokenizer's and those of the generation config."""
    ends = {model.tokenizer.eos_token_id}
    config = getattr(model.original_model, "generation_config", None)
    more = getattr(config, "eos_token_id", None)
    ends |= set(more) if isinstance(more, list) else {more}
    return {e for e in ends if e is not None}


def rows_at_once(
    model: TransformerBridge, length: int, most: Mapping[str, int] = _FAST_ENOUGH
) -> int:
    """How many rows of ``length`` tokens to run at once: no more than ``most`` on a kind of device,
    and they fit into half of the memory that is free now."""
    cfg = model.cfg
    device = input_device(model)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        import psutil

        free = psutil.virtual_memory().available
    heads = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    item = torch.finfo(cfg.dtype).bits // 8
    cache = 2 * cfg.n_layers * heads * cfg.d_head * length * item
    # Cache (twice, while it grows), the logits and their copies in float32, one block's workings.
    row = 2 * cache + 4 * cfg.d_vocab * 4 + length * (cfg.n_heads * length + 8 * cfg.d_model) * 4
    return int(max(1, min(most.get(device.type, 1024), free // 2 // row)))


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory has run out, on any device."""
    text = str(error).lower()
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(
        phrase in text for phrase in ("out of memory", "can't allocate memory", "cannot allocate")
    )
