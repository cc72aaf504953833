"""Prompts in, residual-stream tensors out.

Tokens are counted in the *unpadded* sequence, BOS included; batches are padded on the left, so
that the last prompt token of every row stands in the last column and decoding can go on from it.
Whatever several sequences have in common at their start is run once and its key-value cache is
shared: contrast pairs differ in a few tokens only, and all prompts of a set often begin with the
same instruction.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from .files import whole

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

SITES = ("resid_pre", "resid_post")
# Residual-stream elements that one pass may hold per layer; bounds memory, not accuracy.
_TOKENS_PER_BATCH = 8192
_WORTH_SHARING = 8  # tokens; a shorter header costs more as a pass of its own than it saves


def encode(model: TransformerBridge, text: str) -> list[int]:
    """Token ids of ``text`` as the model should see it: BOS in front exactly once.

    BOS is added if the model has one (``model.cfg.default_prepend_bos``) and the text does not
    already begin with it, as text from a chat template often does.

    Raises:
        ValueError: ``text`` is not a string, or gives no token at all.
    """
    if not isinstance(text, str):
        raise ValueError(f"A prompt must be a string, got {type(text).__name__}: {text!r}.")
    ids = list(model.tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise ValueError(f"The prompt {text!r} is empty: it has to give at least one token.")
    bos = model.tokenizer.bos_token_id
    if model.cfg.default_prepend_bos and bos is not None and ids[:1] != [bos]:
        ids = [bos, *ids]
    return ids


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


def pad_left(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and attention mask, both ``[row, column]``, padded on the left to equal length."""
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for r, ids in enumerate(rows):
        if ids:
            tokens[r, width - len(ids) :] = torch.tensor(ids)
            mask[r, width - len(ids) :] = 1
    return tokens.to(device), mask.to(device)


def pad_id(model: TransformerBridge) -> int:
    """The token that fills padding columns; masked everywhere, so any valid id will do."""
    pad = model.tokenizer.pad_token_id
    return 0 if pad is None else int(pad)


def input_device(model: TransformerBridge) -> torch.device:
    """Where tokens must be: the device of the embedding (models may span several devices)."""
    return model.original_model.get_input_embeddings().weight.device


def weights(model: TransformerBridge) -> tuple[str, str]:
    """Which weights these are and their dtype: what any result kept on disk depends on.

    Raises:
        ValueError: the model did not come from `models.load_model`.
    """
    identity = getattr(model.cfg, "steerlib_id", None)
    if identity is None:
        raise ValueError(
            f"cache= needs to know the weights of {model.cfg.model_name!r}: load the model "
            "with steerlib.load_model."
        )
    return identity, str(model.cfg.dtype)


def logits_at(tokens: torch.Tensor, *columns: int) -> torch.Tensor:
    """As ``logits_to_keep``: the unembedding of these columns alone, of none if none are named.

    Column numbers rather than a count: a count makes transformers unembed a strided view, which
    falls into a slow kernel.
    """
    width = tokens.shape[1]
    return torch.tensor([c % width for c in columns], dtype=torch.long, device=tokens.device)


def capture(
    model: TransformerBridge,
    prompts: str | Sequence[str],
    layers: int | Iterable[int] | None = None,
    positions: int | Sequence[int] = -1,
    site: str = "resid_post",
    cache: str | os.PathLike[str] | None = None,
) -> torch.Tensor:
    """Residual-stream activations at the wanted layers and positions.

    Args:
        prompts: one or more texts; BOS is added where the model has one.
        layers: block numbers, 0-based; all by default.
        positions: token positions in the unpadded prompt, BOS included; negative ones count from
            the end of each prompt.
        site: ``resid_pre`` (entering block l) or ``resid_post`` (leaving it).
        cache: a folder that keeps what was read, batch by batch, under everything that it depends
            on (weights, dtype, tokens, layers, positions, site): an interrupted run goes on where
            it was, and another notebook that asks for the same need not run the model.

    Returns:
        float32 tensor ``[prompt, layer, position, d_model]`` on the CPU, in the order asked for.

    Raises:
        ValueError: unknown layer or site, empty prompt, or a position that a prompt lacks.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    groups = [[encode(model, text)] for text in texts]
    return _capture_groups(model, groups, layers, positions, site, cache)[:, 0]


def capture_pairs(
    model: TransformerBridge,
    prefixes: Sequence[str],
    endings: Sequence[str] | Sequence[Sequence[str]],
    layers: int | Iterable[int] | None = None,
    positions: int | Sequence[int] = -1,
    site: str = "resid_post",
    cache: str | os.PathLike[str] | None = None,
) -> torch.Tensor:
    """Activations of every prefix with each of its endings; the prefix itself runs once.

    Args:
        prefixes: the shared beginnings.
        endings: the same k endings for all prefixes (a list of strings), or one list of k
            endings per prefix.
        layers, positions, site, cache: as for `capture`; positions count in prefix + ending.

    Returns:
        float32 tensor ``[prefix, ending, layer, position, d_model]``.

    Raises:
        ValueError: as `capture`; or the number of endings differs between prefixes.
    """
    if isinstance(prefixes, str) or isinstance(endings, str):
        raise ValueError("Prefixes and endings are lists of texts, got one text alone.")
    same = [e for e in endings if isinstance(e, str)]
    all_same = len(same) == len(endings)
    per_prefix = [same] * len(prefixes) if all_same else [list(e) for e in endings]
    if len(per_prefix) != len(prefixes) or len({len(e) for e in per_prefix}) > 1:
        raise ValueError(
            f"Every prefix needs the same number of endings: got {len(prefixes)} prefixes and "
            f"lists of {sorted({len(e) for e in per_prefix})} endings for {len(per_prefix)}."
        )
    groups = [
        [encode(model, p + e) for e in ends] for p, ends in zip(prefixes, per_prefix, strict=True)
    ]
    return _capture_groups(model, groups, layers, positions, site, cache)


def _common_prefix(sequences: Sequence[list[int]]) -> int:
    """Number of leading tokens that all sequences share."""
    low, high = min(sequences), max(sequences)  # lexicographic: the two that differ earliest
    for i, (a, b) in enumerate(zip(low, high, strict=False)):
        if a != b:
            return i
    return min(len(low), len(high))


def _capture_groups(
    model: TransformerBridge,
    groups: list[list[list[int]]],
    layers: int | Iterable[int] | None,
    positions: int | Sequence[int],
    site: str,
    cache: str | os.PathLike[str] | None = None,
) -> torch.Tensor:
    """`capture` for groups of token sequences; each group's common beginning runs once."""
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
    out = torch.empty(len(groups), len(groups[0]), len(wanted), len(where), model.cfg.d_model)
    header = min(_common_prefix([ids for g in groups for ids in g]), *first_wanted)
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
            known = (
                None
                if cache is None
                else _Known(Path(cache), model, [groups[g] for g in batch], wanted, where, site)
            )
            if known and (acts := known.read()) is not None:
                out[batch] = acts
                bar.update(len(batch))
                continue
            shared = [
                min(_common_prefix(groups[g]), first_wanted[g]) if len(groups[g]) > 1 else header
                for g in batch
            ]
            rows = [ids for g in batch for ids in groups[g]]
            first = header
            if _columns(rows, shared) > window:
                first, shared = 0, [0] * len(batch)
            acts = _capture_batch(model, rows, first, shared, len(groups[0]), wanted, where, site)
            out[batch] = acts = acts.reshape(len(batch), len(groups[0]), *acts.shape[1:])
            if known:
                known.write(acts)
            bar.update(len(batch))
    return out


class _Known:
    """The file that holds a batch, named by what its activations depend on."""

    def __init__(self, folder: Path, model: TransformerBridge, *facts: Any):
        key = hashlib.sha256(repr((*weights(model), *facts)).encode()).hexdigest()
        self.path = folder / f"{key[:32]}.safetensors"

    def read(self) -> torch.Tensor | None:
        if not self.path.exists():
            return None
        try:
            return load_file(self.path)["acts"]
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{self.path} is damaged: delete it and run again.") from error

    def write(self, acts: torch.Tensor) -> None:
        with whole(self.path) as temporary:
            save_file({"acts": acts.contiguous()}, temporary)


def _columns(rows: list[list[int]], shared: list[int]) -> int:
    """How wide a batch gets: its longest shared part and its longest end (see `_capture_batch`)."""
    endings = len(rows) // len(shared)
    return max(shared) + max(len(ids) - shared[r // endings] for r, ids in enumerate(rows))


def _batches(order: list[int], size: Any) -> Iterable[list[int]]:
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
    run: dict[str, Any] = {"return_type": "logits", "logits_to_keep": logits_at(mask)}
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
