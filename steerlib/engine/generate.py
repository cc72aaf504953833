"""Prompts x conditions x samples in, tables out; one token; reading along.

`generate` turns every combination into a row of the decode loop, keeps finished rows on disk if
asked to, and hands shards to other processes or machines through joblib. `choice_probabilities`
and `capture_generation` use the same loop for one token and for reading along.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch

from ..interventions import Condition, Conditions, name_columns, named
from ..tokens import encode, single_token
from ..vectors import SteeringVector
from . import decode
from .decode import Row, Sampling, Stop, make_rows
from .store import RowStore

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge

_SHARD = 256  # rows that are kept on disk, or travel, together
_one_at_a_time = threading.Lock()  # a cluster may run several threads in one process


def generate(
    model: TransformerBridge,
    prompts: str | Sequence[str],
    conditions: Conditions | None = None,
    n_samples: int = 8,
    max_new_tokens: int = 40,
    seed: int = 0,
    temperature: float = 1.0,
    top_p: float = 0.3,
    frequency_penalty: float = 1.0,
    *,
    stop: Stop = None,
    batch_size: int | None = None,
    use_cache: bool = True,
    progress: bool = True,
    backend: str | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> pd.DataFrame:
    """Sample completions of every prompt under every condition.

    The defaults are the sampling of Turner et al. 2023 ("Demonstrations": seed 0, temperature 1.0,
    top-p 0.3, frequency penalty 1.0). As in the library it used, the penalty counts a token's
    occurrences in prompt and completion, is subtracted after the temperature, before top-p, and
    does not apply to greedy decoding.

    Args:
        prompts: one text or several different ones.
        conditions: name -> condition (`interventions.Add`, `Ablate`, a `SteeringVector`, a list
            of these, or None for the unsteered control). Default: the control alone.
        n_samples: completions per prompt and condition.
        max_new_tokens: length limit in tokens.
        seed: sample i of a prompt draws the same random numbers under every condition, so that
            conditions are compared like with like.
        temperature: 0 means greedy (one sample is enough then).
        stop: a string or several (the text ends before it), or a function of the text so far that
            says whether to stop (the text is kept).
        batch_size: rows per batch; by default what fits into memory.
        use_cache: False recomputes everything at every step; slow, for checking.
        backend: a joblib backend ("loky" for processes of this machine, "dask", "ray") that runs
            shards of the rows. By default the one that ``joblib.parallel_config`` has set, or
            this process. Every worker loads the model once, by name.
        cache: a folder that keeps finished rows; a second call with the same model, condition,
            prompt, sampling and seed takes them from there, whatever else it asks for.

    Returns:
        One row per completion, prompts x conditions x samples in order: prompt, condition (and a
        column per field, where names of conditions have fields), sample, completion (new text
        only, special tokens dropped), n_tokens (of the completion), stopped (True: it ended by
        itself; False: cut at max_new_tokens), tokens (their ids).

    Raises:
        ValueError: empty or repeated prompts, no condition, a condition that does not fit the
            model or a prompt, or senseless sampling parameters.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    by_name = named(conditions)
    sampling = Sampling(max_new_tokens, temperature, top_p, frequency_penalty)
    if not texts or n_samples < 1:
        raise ValueError(f"Nothing to generate: {len(texts)} prompts, {n_samples} samples.")
    if len(set(texts)) < len(texts):
        raise ValueError("A prompt occurs twice; use n_samples for more completions of a prompt.")
    rows = make_rows(model, texts, list(by_name.values()), n_samples, sampling, seed)
    store = None if cache is None else RowStore(cache, model, sampling, seed, stop)
    todo = rows if store is None else store.fill(rows, texts)
    with tqdm(
        total=len(todo) * max_new_tokens, unit="tok", disable=not progress, leave=False
    ) as bar:
        if parallel := _parallel(backend):
            finished = _distributed(parallel, model, todo, sampling, stop, batch_size, bar)
        else:
            finished = _local(model, todo, sampling, stop, batch_size, use_cache, bar, store)
        for shard in finished:
            if store is not None and shard:
                store.keep(shard, texts)
    names = list(by_name)
    return pd.DataFrame(
        {
            "prompt": [texts[r.prompt] for r in rows],
            **name_columns([names[r.condition] for r in rows]),
            "sample": [r.sample for r in rows],
            "completion": [r.text for r in rows],
            "n_tokens": [len(r.new) for r in rows],
            "stopped": [r.stopped for r in rows],
            "tokens": [r.new for r in rows],
        }
    )


def _shards(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of similar length and the same prompt stay together: they share work."""
    order = sorted(rows, key=lambda r: (len(r.prompt_ids), r.prompt, r.condition, r.sample))
    return [order[i : i + _SHARD] for i in range(0, len(order), _SHARD)]


def _local(
    model: TransformerBridge,
    rows: list[Row],
    sampling: Sampling,
    stop: Stop,
    batch_size: int | None,
    use_cache: bool,
    bar: Any,
    store: RowStore | None,
) -> Iterator[list[Row]]:
    """Complete the rows in this process: at once, or shard by shard if they are to be kept."""
    for shard in _shards(rows) if store is not None else [rows] if rows else []:
        try:
            decode.run(model, shard, sampling, stop, batch_size, use_cache, bar.update)
        finally:  # of an interrupted shard, the rows that are finished
            yield [row for row in shard if row.done]


# ---------------------------------------------------------------- other processes


def _parallel(backend: str | None) -> Any:
    """A joblib.Parallel for ``backend`` or the configured one; None means this process."""
    import joblib

    active, n_jobs = joblib.parallel.get_active_backend()
    config: dict[str, Any] = {}
    if backend is not None:
        config = {"backend": backend} | ({"n_jobs": -1} if n_jobs in (None, 1) else {})
    elif (active.default_n_jobs if n_jobs is None else n_jobs) == 1:
        return None  # nothing is configured; a cluster's own default is all of its workers
    if backend == "threading" or (backend is None and getattr(active, "uses_threads", False)):
        raise ValueError(
            "Threads cannot share a model's hooks: use a backend of processes (loky, dask)."
        )
    return joblib.Parallel(return_as="generator_unordered", **config)


def _distributed(
    parallel: Any,
    model: TransformerBridge,
    rows: list[Row],
    sampling: Sampling,
    stop: Stop,
    batch_size: int | None,
    bar: Any,
) -> Iterator[list[Row]]:
    """Complete the rows in joblib's workers, shard by shard as they come back."""
    import joblib

    name = model.cfg.model_name
    if getattr(model.cfg, "steerlib_id", None) is None:
        raise ValueError(
            f"Workers load the model by name, but {name!r} was not loaded with steerlib.load_model."
        )
    dtype, device = str(model.cfg.dtype).removeprefix("torch."), str(model.cfg.device)
    shards = _shards(rows)
    jobs = (
        joblib.delayed(_work)(i, name, dtype, device, shard, sampling, stop, batch_size)
        for i, shard in enumerate(shards)
    )
    for i, results in parallel(jobs):
        for row, result in zip(shards[i], results, strict=True):
            row.new, row.text, row.stopped = result
        bar.update(len(shards[i]) * sampling.max_new_tokens)
        yield shards[i]


@lru_cache(maxsize=1)
def _worker_model(name: str, dtype: str, device: str) -> TransformerBridge:
    """The model of this worker process, kept between shards."""
    from ..models.loading import load_model

    return load_model(name, dtype=dtype, device=device)


def _work(
    number: int,
    name: str,
    dtype: str,
    device: str,
    rows: list[Row],
    sampling: Sampling,
    stop: Stop,
    batch_size: int | None,
) -> tuple[int, list[tuple[list[int], str, bool]]]:
    """One shard in a worker process; the rows arrive and go back pickled."""
    with _one_at_a_time:
        model = _worker_model(name, dtype, device)
        decode.run(model, rows, sampling, stop, batch_size)
    return number, [(row.new, row.text, row.stopped) for row in rows]


# ---------------------------------------------------------------- one token, and reading along


def choice_probabilities(
    model: TransformerBridge,
    prompts: str | Sequence[str],
    options: Sequence[str],
    conditions: Conditions | None = None,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """Probability of each answer as the next token, for every prompt under every condition.

    Where conditions act at the current token only (``at="generated"``), a prompt runs once for
    all of them, and each costs one token more.

    Args:
        options: the answers, such as ``["A", "B"]``; each must be one token and not the same.

    Returns:
        One row per prompt x condition, in order: prompt, condition (and the fields of its name),
        one column per option, and total_probability, of all options together (where it is low,
        the model says something else).

    Raises:
        ValueError: an option that is not one token; otherwise as `generate`.
    """
    import pandas as pd

    try:
        tokens = [single_token(model, option) for option in options]
    except ValueError as error:
        raise ValueError(f"{error} Give the token that tells the options apart.") from None
    if len(set(tokens)) != len(options) or not tokens:
        raise ValueError(f"The options {list(options)} must be different tokens, at least one.")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    by_name = named(conditions)
    rows = make_rows(model, texts, list(by_name.values()), 1, Sampling(1), 0)
    chosen = torch.empty(len(rows), len(tokens))
    place = {id(row): i for i, row in enumerate(rows)}
    order = sorted(rows, key=lambda r: (len(r.prompt_ids), r.prompt, r.condition))
    for batch, logits in decode.first_logits(model, order, batch_size):
        p = logits.float().softmax(-1)[:, tokens].cpu()
        chosen[[place[id(row)] for row in batch]] = p
    names = list(by_name)
    return pd.DataFrame(
        {
            "prompt": [texts[r.prompt] for r in rows],
            **name_columns([names[r.condition] for r in rows]),
            **dict(zip(options, chosen.double().numpy().T, strict=True)),
            "total_probability": chosen.double().sum(-1).numpy(),
        }
    )


def capture_generation(
    model: TransformerBridge,
    prompts: str | Sequence[str],
    directions: SteeringVector | Sequence[SteeringVector],
    max_new_tokens: int = 20,
    prompt_positions: int = 3,
    condition: Condition = None,
    cosine: bool = False,
) -> torch.Tensor:
    """Projections of the stream on a direction while the model generates (greedily).

    Args:
        directions: one position per layer; projections are on its unit vector, at its site. Of
            several, such as controls, all are read in one run: same layers, same site.
        prompt_positions: how many of the last prompt positions are read too.
        condition: an intervention under which to generate; the stream is read after it.
        cosine: divide by the norm of the stream, which grows many times over from layer to layer.

    Returns:
        float32 tensor ``[prompt, layer, position]``, layers in ascending order; the positions are
        -prompt_positions ... -1, then 0 ... max_new_tokens - 1 for the generated tokens. NaN
        where the prompt is too short or the text had ended. Several directions give it a last axis.

    Source: the honesty repository, generation heatmaps.
    """
    place = (max_new_tokens, prompt_positions)
    steps = read_generation(model, prompts, directions, *place, condition, cosine)
    return deque(steps, maxlen=1)[0]


def read_generation(
    model: TransformerBridge,
    prompts: str | Sequence[str],
    directions: SteeringVector | Sequence[SteeringVector],
    max_new_tokens: int,
    prompt_positions: int,
    condition: Condition,
    cosine: bool,
) -> Iterator[torch.Tensor]:
    """`capture_generation` a step at a time: the same tensor after every token, filled so far."""
    listed = [directions] if isinstance(directions, SteeringVector) else list(directions)
    if not listed:
        raise ValueError("Projections need at least one direction.")
    for one in listed:
        if one.n_positions != 1:
            raise ValueError(f"Projections need a direction (one position), got {one!r}.")
    if len({(one.site, *sorted(one.layers)) for one in listed}) > 1:
        raise ValueError("Directions that are read in one run need the same layers and site.")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    layers, units = sorted(listed[0].layers), [one.unit() for one in listed]
    unit = {layer: torch.cat([u.layers[layer] for u in units]).T for layer in layers}
    width = prompt_positions + max_new_tokens
    out = torch.full((len(texts), len(layers), width, len(listed)), float("nan"))
    shown = out[..., 0] if isinstance(directions, SteeringVector) else out
    # One token more is sampled than is read: the last one never enters the stream.
    sampling = Sampling(max_new_tokens + 1, temperature=0)
    rows = make_rows(model, texts, [condition], 1, sampling, 0)
    lengths = [len(encode(model, text)) for text in texts]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    size = decode.rows_at_once(model, max(lengths) + sampling.max_new_tokens)
    for begin in range(0, len(order), size):
        numbers = order[begin : begin + size]
        place = (numbers, lengths, prompt_positions)
        watch = partial(_read_along, out, *place, unit, listed[0].site, cosine)
        mine, own = [rows[i] for i in numbers], max(2, prompt_positions)
        for _ in decode.decode(model, mine, sampling, watch=watch, own=own):
            yield shown


def _read_along(
    out: torch.Tensor,
    numbers: list[int],
    lengths: list[int],
    prompt_positions: int,
    unit: Mapping[int, torch.Tensor],
    site: str,
    cosine: bool,
    which: list[int],
    start: list[int],
    columns: int,
) -> list[tuple[str, Any]]:
    """Hooks that write the projections of one pass into ``out`` (see `decode.Watch`)."""
    wanted = []  # (row of the pass, column, prompt, slot in `out`) of everything asked for
    for r, i in enumerate(which):
        for c in range(columns):
            slot = start[r] + c - lengths[numbers[i]] + prompt_positions
            if start[r] + c >= 0 and 0 <= slot < out.shape[2]:
                wanted.append((r, c, numbers[i], slot))
    if not wanted:
        return []
    row, column, prompt, slots = torch.tensor(wanted).T

    def read(index: int, directions: torch.Tensor) -> Any:
        def hook(x: torch.Tensor, hook: Any) -> None:
            stream = x[row.to(x.device), column.to(x.device)].float()
            scale = stream.norm(dim=-1, keepdim=True) if cosine else 1
            out[prompt, index, slots] = (stream @ directions.to(x.device) / scale).cpu()

        return hook

    return [(f"blocks.{n}.hook_{site}", read(i, unit[n])) for i, n in enumerate(sorted(unit))]
