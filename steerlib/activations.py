"""Prompts in, residual-stream tensors out.

Whatever several sequences have in common at their start is run once and its key-value cache is
shared: contrast pairs differ in a few tokens only, and all prompts of a set often begin with the
same instruction.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from operator import index
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from .files import Store, digest, model_key
from .tokens import (
    Prompt,
    columns_of,
    common_prefix,
    encode,
    input_device,
    pad_id,
    pad_left,
    prompt_ids,
)

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

SITES = ("resid_pre", "resid_post")
# Residual-stream elements that one pass may hold per layer; bounds memory, not accuracy.
_TOKENS_PER_BATCH = 8192
_WORTH_SHARING = 8  # tokens; a shorter header costs more as a pass of its own than it saves


def check_layers(model: TransformerBridge, layers: int | Iterable[int] | None) -> list[int]:
    """Layers as a list of 0-based block numbers; ``None`` means all, negative counts from the end.

    Raises:
        ValueError: a layer that the model does not have.
    """
    n = model.cfg.n_layers
    if layers is None:
        return list(range(n))
    wanted = [index(layer) for layer in (layers if isinstance(layers, Iterable) else [layers])]
    if not wanted:
        raise ValueError("The list of layers is empty: name one at least, or None for all.")
    for layer in wanted:
        if not -n <= layer < n:
            raise ValueError(
                f"Layer {layer} does not exist: {model.cfg.model_name} has layers 0 to {n - 1}."
            )
    return [layer % n for layer in wanted]


def check_site(site: str) -> str:
    """Return ``site`` if it is one of `SITES`, else raise ``ValueError``."""
    if site not in SITES:
        raise ValueError(f"Site {site!r} is unknown: use one of {', '.join(SITES)}.")
    return site


def new_cache(model: TransformerBridge) -> Any:
    """An empty key-value cache that fits the model (sliding-window layers included)."""
    from transformers import DynamicCache

    return DynamicCache(config=model.original_model.config)


def capture(
    model: TransformerBridge,
    prompts: Prompt | Sequence[Prompt],
    layers: int | Iterable[int] | None = None,
    positions: int | Sequence[int] = -1,
    site: str = "resid_post",
    cache: str | os.PathLike[str] | None = None,
) -> torch.Tensor:
    """Residual-stream activations at the wanted layers and positions.

    Args:
        prompts: one or more texts (BOS is added where the model has one), or lists of token ids.
        layers: block numbers, 0-based; all by default.
        positions: token positions in the unpadded prompt, BOS included; negative ones count from
            the end of each prompt. One number drops the axis, as in numpy.
        site: ``resid_pre`` (entering block l) or ``resid_post`` (leaving it).
        cache: a folder that keeps what was read, batch by batch, under everything that it depends
            on (weights, dtype, tokens, layers, positions, site): an interrupted run goes on where
            it was, and another notebook that asks for the same need not run the model.

    Returns:
        float32 tensor ``[prompt, layer, position, d_model]`` on the CPU, in the order asked for;
        ``[prompt, layer, d_model]`` for one position.

    Raises:
        ValueError: unknown layer or site, empty prompt, or a position that a prompt lacks.
    """
    texts: Sequence[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    groups = [[prompt_ids(model, text)] for text in texts]
    return capture_groups(model, groups, layers, positions, site, cache=cache)[:, 0]


def capture_pairs(
    model: TransformerBridge,
    prefixes: Sequence[Prompt],
    endings: Sequence[Prompt] | Sequence[Sequence[Prompt]],
    layers: int | Iterable[int] | None = None,
    positions: int | Sequence[int] = -1,
    site: str = "resid_post",
    cache: str | os.PathLike[str] | None = None,
) -> torch.Tensor:
    """Activations of every prefix with each of its endings; the prefix itself runs once.

    Args:
        prefixes: the shared beginnings, texts or token ids.
        endings: the same k endings for all prefixes (a list of texts), or one list of k endings
            per prefix; token ids, if the prefixes are token ids.
        layers, positions, site, cache: as for `capture`; positions count in prefix + ending.

    Returns:
        float32 tensor ``[prefix, ending, layer, position, d_model]``; without the axis of
        positions for one position.

    Raises:
        ValueError: as `capture`; or the number of endings differs between prefixes.
    """
    if isinstance(prefixes, str) or isinstance(endings, str):
        raise ValueError("Prefixes and endings are lists of texts, got one text alone.")
    same = [e for e in endings if isinstance(e, str)]
    per_prefix: list[list[Any]] = (
        [same] * len(prefixes) if len(same) == len(endings) else [list(e) for e in endings]
    )
    if len(per_prefix) != len(prefixes) or len({len(e) for e in per_prefix}) > 1:
        raise ValueError(
            f"Every prefix needs the same number of endings: got {len(prefixes)} prefixes and "
            f"lists of {sorted({len(e) for e in per_prefix})} endings for {len(per_prefix)}."
        )
    shared = None
    groups = []
    if prefixes and not isinstance(prefixes[0], str):  # what is shared is known
        shared = list(map(len, prefixes))
    for prefix, ends in zip(prefixes, per_prefix, strict=True):
        if isinstance(prefix, str):
            groups.append([encode(model, prefix + e) for e in ends])
        else:
            groups.append([[*prefix, *e] for e in ends])
    return capture_groups(model, groups, layers, positions, site, shared, cache)


def capture_groups(
    model: TransformerBridge,
    groups: Sequence[Sequence[list[int]]],
    layers: int | Iterable[int] | None,
    positions: int | Sequence[int],
    site: str,
    shared_tokens: Sequence[int] | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> torch.Tensor:
    """`capture` for groups of token sequences; each group's common beginning runs once.

    Args:
        groups: as many sequences in each.
        shared_tokens: how many tokens the sequences of each group share at their start; found out
            if it is not given.

    Returns:
        float32 tensor ``[group, member, layer, position, d_model]``; one position drops its axis.
    """
    wanted = check_layers(model, layers)
    check_site(site)
    where = [index(p) for p in (positions if isinstance(positions, Iterable) else [positions])]
    if not where or not groups or not groups[0]:
        what = "positions" if not where else "endings" if groups else "prompts"
        raise ValueError(f"There is nothing to capture: the list of {what} is empty.")
    first_wanted = []  # per group: the first position to be captured; nothing after it is shared
    for group in groups:
        for ids in group:
            for p in where:
                if not -len(ids) <= p < len(ids):
                    raise ValueError(
                        f"Position {p} is outside a prompt of {len(ids)} tokens: "
                        f"{model.tokenizer.decode(ids)[:60]!r}."
                    )
        first_wanted.append(min(p % len(ids) for ids in group for p in where))
    store = None if cache is None else Store(cache)
    key = () if cache is None else model_key(model)
    out = torch.empty(len(groups), len(groups[0]), len(wanted), len(where), model.cfg.d_model)
    header = min(common_prefix([ids for g in groups for ids in g]), *first_wanted)
    if header < _WORTH_SHARING or len(groups) == 1:
        header = 0
    # Behind a shared part the padding stands in the middle of a row. Attention masks it, but a
    # sliding window counts columns: rows that reach beyond one share nothing.
    window = (
        getattr(model.original_model.config.get_text_config(), "sliding_window", None) or math.inf
    )
    order = sorted(range(len(groups)), key=lambda g: max(map(len, groups[g])))
    batches = list(_batches(order, lambda g: sum(map(len, groups[g]))))
    # A bar for one batch would only be clutter, and a widget in the notebook's file.
    short = len(batches) == 1
    with (
        torch.no_grad(),
        tqdm(total=len(order), unit="prompt", delay=3, leave=False, disable=short) as bar,
    ):
        for batch in batches:
            if store is not None:
                facts = (*key, [groups[g] for g in batch], wanted, where, site)
                name = digest("steerlib.capture.2", *facts)[:32]
                if (known := store.read_tensor(name)) is not None:
                    out[batch] = known
                    bar.update(len(batch))
                    continue
            shared = [
                max(header, min(_shared(groups, g, shared_tokens), first_wanted[g]))
                if len(groups[g]) > 1
                else header
                for g in batch
            ]
            rows = [ids for g in batch for ids in groups[g]]
            first = header
            if _columns(rows, shared) > window:
                first, shared = 0, [0] * len(batch)
            acts = _capture_batch(model, rows, first, shared, len(groups[0]), wanted, where, site)
            out[batch] = acts = acts.reshape(len(batch), len(groups[0]), *acts.shape[1:])
            if store is not None:
                store.write_tensor(name, acts)
            bar.update(len(batch))
    return out if isinstance(positions, Iterable) else out[..., 0, :]


def _shared(groups: Sequence[Sequence[list[int]]], g: int, known: Sequence[int] | None) -> int:
    """How many tokens the sequences of group ``g`` share at their start."""
    return common_prefix(groups[g]) if known is None else known[g]


def _columns(rows: list[list[int]], shared: list[int]) -> int:
    """How wide a batch gets: its longest shared part and its longest end (see `_capture_batch`)."""
    endings = len(rows) // len(shared)
    return max(shared) + max(len(ids) - shared[r // endings] for r, ids in enumerate(rows))


def _batches(order: list[int], size: Any) -> Iterator[list[int]]:
    """Groups in this order, as many in a batch as `_TOKENS_PER_BATCH` allows."""
    batch: list[int] = []
    total = 0
    for g in order:
        if batch and total + size(g) > _TOKENS_PER_BATCH:
            yield batch
            batch, total = [], 0
        batch.append(g)
        total += size(g)
    if batch:
        yield batch


def _capture_batch(
    model: TransformerBridge,
    rows: list[list[int]],
    header: int,
    shared: list[int],
    endings: int,
    layers: list[int],
    positions: list[int],
    site: str,
) -> torch.Tensor:
    """One batch: header once, then every group's shared part once, then all rows' own ends.

    ``rows`` holds ``endings`` sequences for each entry of ``shared``. Returns float32
    ``[row, layer, position, d_model]``.
    """
    device, pad = input_device(model), pad_id(model)
    mask = torch.zeros(1, 0, dtype=torch.long, device=device)
    stop = max(layers) + 1
    run: dict[str, Any] = {"return_type": "logits", "logits_to_keep": columns_of(mask)}
    if stop < model.cfg.n_layers:
        run["stop_at_layer"] = stop
    cache = new_cache(model)
    stages = [  # (sequences to run, how often each row of the cache is repeated afterwards)
        ([rows[0][:header]], len(shared)),
        ([rows[i * endings][header:s] for i, s in enumerate(shared)], endings),
    ]
    for sequences, repeats in stages:
        if any(sequences):
            tokens, new = pad_left(sequences, pad, device)
            mask = torch.cat([mask, new], 1)
            model.forward(tokens, attention_mask=mask, past_key_values=cache, **run)
        if mask.shape[1]:
            cache.batch_repeat_interleave(repeats)
        mask = mask.repeat_interleave(repeats, 0)
    done = [s for s in shared for _ in range(endings)]
    tokens, new = pad_left([ids[s:] for ids, s in zip(rows, done, strict=True)], pad, device)
    mask = torch.cat([mask, new], 1)
    width = tokens.shape[1]
    columns = torch.tensor([[p % len(ids) - len(ids) + width for p in positions] for ids in rows])
    row = torch.arange(len(rows))[:, None]
    out = torch.empty(len(rows), len(layers), len(positions), model.cfg.d_model)

    def read(index: int) -> Any:
        def hook(x: torch.Tensor, hook: Any) -> None:
            out[:, index] = x[row.to(x.device), columns.to(x.device)].float().cpu()

        return hook

    hooks = [(f"blocks.{layer}.hook_{site}", read(i)) for i, layer in enumerate(layers)]
    past = {"past_key_values": cache} if mask.shape[1] > width else {}
    with model.hooks(fwd_hooks=hooks):
        model.forward(tokens, attention_mask=mask, **past, **run)
    return out
