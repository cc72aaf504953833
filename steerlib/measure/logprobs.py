"""Log-probabilities, and what is made of them: propensity, perplexity, changes, divergences.

Two primitives: `continuation_logprobs` scores continuations of prompts, whose prompts run once for
every condition that leaves them alone, and `token_logprobs` scores whole texts. Divergences and
shifts need the next token alone, which `decode.first_logits` gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..engine import decode
from ..engine.decode import Row, Sampling, make_rows
from ..engine.native import Passes
from ..hooks import BatchHooks
from ..interventions import (
    Condition,
    Conditions,
    Intervention,
    as_interventions,
    name_columns,
    named,
    warn_untouched,
)
from ..tokens import (
    Prompt,
    continuation_ids,
    encode,
    first_ids,
    input_device,
    pad_id,
    pad_left,
    prompt_ids,
    token_texts,
    vocabulary,
)

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge

_TOKENS_PER_BATCH = 2048  # logits of that many tokens are held at once, in float32
_BYTES_PER_BATCH = 1 << 28  # of logits, where continuations are scored


# ---------------------------------------------------------------- the two primitives


def token_logprobs(
    model: TransformerBridge,
    rows: Sequence[tuple[Sequence[int], Sequence[Intervention]]],
    n_prompt: int | None = None,
) -> list[torch.Tensor]:
    """Log-probability of every token of whole texts, from the second on.

    Args:
        rows: (token ids, interventions) of each.
        n_prompt: how many tokens of every row are its prompt; all of them by default.

    Returns:
        float32 ``[token - 1]`` for each row, on the CPU, natural logarithms.
    """
    found: list[Any] = [None] * len(rows)
    passes = Passes(model)
    order = sorted(range(len(rows)), key=lambda r: len(rows[r][0]))
    size = max(1, _TOKENS_PER_BATCH // max((len(ids) for ids, _ in rows), default=1))
    for begin in range(0, len(order), size):
        batch = order[begin : begin + size]
        ids = [list(rows[r][0]) for r in batch]
        acts = [rows[r][1] for r in batch]
        levels = passes.levels(acts, range(len(batch)), list(map(tuple, ids)))
        base = [ids[i] for i in levels.rows[0]]
        tokens, mask = pad_left(base, pad_id(model), input_device(model))
        hooks = BatchHooks(model, acts, [len(i) if n_prompt is None else n_prompt for i in ids])
        hooks.window([len(i) - tokens.shape[1] for i in ids], tokens.shape[1])
        with torch.no_grad():
            logits = passes.forward(tokens, mask, hooks=hooks, levels=levels)
        for r, i, place in zip(batch, ids, levels.place[-1], strict=True):
            target = torch.tensor(i[1:], device=logits.device)[:, None]
            scores = logits[place, -len(i) : -1].float().log_softmax(-1)
            found[r] = scores.gather(1, target)[:, 0].cpu()
    return found


def continuation_logprobs(
    model: TransformerBridge, rows: Sequence[Row], targets: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Log-probability of every token of each row's continuation, given the row's prompt.

    Args:
        rows: as `decode.make_rows` makes them; targets: the token ids of each row's continuation.

    Returns:
        float32 ``[token]`` for each row, on the CPU, natural logarithms.
    """
    found: list[Any] = [None] * len(rows)
    # Rows of one prompt stay together, and in it those of one condition: they share its pass.
    order = sorted(
        range(len(rows)),
        key=lambda i: (len(rows[i].prompt_ids), rows[i].prompt, rows[i].condition),
    )
    longest = max(map(len, targets), default=1)
    fits = decode.rows_at_once(model, max(len(r.prompt_ids) for r in rows) + longest)
    size = max(1, min(fits, _BYTES_PER_BATCH // (4 * model.cfg.d_vocab * longest)))
    for begin in range(0, len(order), size):
        batch = order[begin : begin + size]
        scores = decode.score(model, [rows[i] for i in batch], [targets[i] for i in batch])
        for i, score in zip(batch, scores, strict=True):
            found[i] = score
    return found


# ---------------------------------------------------------------- how much the model leans


def continuation_table(
    model: TransformerBridge,
    prompts: Prompt | Sequence[Prompt],
    continuations: Sequence[str] | Sequence[Sequence[str]],
    conditions: Conditions | None = None,
) -> pd.DataFrame:
    """Log-probability of every continuation after every prompt under every condition.

    What prompts, continuations and conditions have in common runs once.

    Args:
        continuations: a list for all prompts, or one list per prompt. Give each the space it
            begins with.

    Returns:
        One row per prompt x condition x continuation, in order: prompt, condition (and the fields
        of its name), continuation, logprob (nats, of all its tokens together).

    Raises:
        ValueError: no prompt, no continuation; a condition that does not fit.
    """
    import pandas as pd

    texts: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise ValueError("There are no prompts.")
    by_name = named(conditions)
    lists = _per_prompt(continuations, len(texts))
    ids = [[continuation_ids(model, text) for text in each] for each in lists]
    behind = [max(map(len, each)) - 1 for each in ids]
    pairs = make_rows(model, texts, list(by_name.values()), 1, Sampling(1), 0, behind)
    rows = [(row, k) for row in pairs for k in range(len(lists[row.prompt]))]
    scores = continuation_logprobs(
        model, [row for row, _ in rows], [ids[row.prompt][k] for row, k in rows]
    )
    names = list(by_name)
    return pd.DataFrame(
        {
            "prompt": [texts[row.prompt] for row, _ in rows],
            **name_columns([names[row.condition] for row, _ in rows]),
            "continuation": [lists[row.prompt][k] for row, k in rows],
            "logprob": [float(score.double().sum()) for score in scores],
        }
    )


def propensity(
    model: TransformerBridge,
    prompts: Prompt | Sequence[Prompt],
    targets: Sequence[str] | Sequence[Sequence[str]],
    references: Sequence[str] | Sequence[Sequence[str]],
    conditions: Conditions | None = None,
) -> pd.DataFrame:
    """How much the model leans to a behaviour: log p(targets) - log p(references), in nats.

    No sampling, so it sees a target rise from 0.01 % to 3 %, which counted words do not.

    Args:
        targets, references: continuations that do and do not show the behaviour, of similar length:
            as for `continuation_table`.

    Returns:
        One row per prompt x condition, in order: prompt, condition (and the fields of its name),
        propensity (target - reference), target and reference (log of the mean probability of the
        continuations of each side). The effect of a condition is its propensity minus that of the
        unsteered model on the same prompt: `stats.effects`.

    Raises:
        ValueError: as `continuation_table`; a continuation on both sides.
    """
    texts: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    sides = [_per_prompt(side, len(texts)) for side in (targets, references)]
    for t, r in zip(*sides, strict=True):
        if both := set(t) & set(r):
            raise ValueError(f"{sorted(both)[0]!r} is a target and a reference.")
    together = [t + r for t, r in zip(*sides, strict=True)]
    table = continuation_table(model, texts, together, conditions)
    n_conditions = len(named(conditions))
    n_targets = [len(t) for t in sides[0] for _ in range(n_conditions)]
    sizes = [len(each) for each in together for _ in range(n_conditions)]
    starts = np.cumsum([0, *sizes])[:-1]
    logprob = table.logprob.to_numpy()
    target = [log_mean_exp(logprob[s : s + k]) for s, k in zip(starts, n_targets, strict=True)]
    reference = [
        log_mean_exp(logprob[s + k : s + n])
        for s, k, n in zip(starts, n_targets, sizes, strict=True)
    ]
    found = table.iloc[starts].drop(columns=["continuation", "logprob"]).reset_index(drop=True)
    difference = np.subtract(target, reference)
    return found.assign(propensity=difference, target=target, reference=reference)


def _per_prompt(texts: Sequence[Any], n: int) -> list[list[str]]:
    """A list of continuations for each of ``n`` prompts."""
    if isinstance(texts, str) or not len(texts):
        raise ValueError("Continuations are lists of at least one text.")
    lists = [list(texts)] * n if isinstance(texts[0], str) else [list(t) for t in texts]
    if len(lists) != n or not all(lists):
        raise ValueError(f"Give one list of continuations, or {n}, one for each prompt.")
    return lists


def log_mean_exp(values: Sequence[float] | np.ndarray) -> float:
    """The logarithm of the mean of exp(values)."""
    return float(np.logaddexp.reduce(values) - np.log(len(values)))


# ---------------------------------------------------------------- whole texts


def perplexity(
    model: TransformerBridge,
    texts: str | Sequence[str],
    conditions: Conditions | None = None,
    skip_positions: int = 2,
    prefix: str = "",
) -> pd.DataFrame:
    """Perplexity of each text under each condition.

    Args:
        skip_positions: predictions made at the first so many positions (BOS included) do not
            count: there the stream may be modified directly (Turner et al. 2023, footnote 33).
        prefix: its tokens go between BOS and each text. The tokens scored stay those that are
            scored without it (Turner et al. 2023, "Activation addition behaves differently than
            prompting").

    Returns:
        One row per text x condition, in order: text, condition (and the fields of its name),
        perplexity (exp of the mean surprisal), surprisal (nats per token), n_tokens (tokens
        scored).

    Raises:
        ValueError: a text too short to have a scored token.
    """
    import pandas as pd

    listed = [texts] if isinstance(texts, str) else list(texts)
    by_name = named(conditions)
    acts = [as_interventions(c, model) for c in by_name.values()]
    if not listed or skip_positions < 0:
        raise ValueError(f"Nothing to score: {len(listed)} texts, skip_positions={skip_positions}.")
    before = first_ids(model, prefix) if prefix else []
    first = skip_positions + len(before)
    rows: list[tuple[list[int], list[Intervention]]] = []
    for text in listed:
        ids = encode(model, text)
        if len(ids) < skip_positions + 2:
            raise ValueError(
                f"{text[:60]!r} has {len(ids)} tokens; with skip_positions={skip_positions} it "
                f"needs at least {skip_positions + 2}."
            )
        bos = int(ids[0] == model.tokenizer.bos_token_id)
        ids = [*ids[:bos], *before, *ids[bos:]]
        for a in acts:
            warn_untouched(a, len(ids), len(ids))
            rows.append((ids, a))
    scores = [score[first:] for score in token_logprobs(model, rows)]
    surprisal = np.array([-float(score.mean()) for score in scores])
    return pd.DataFrame(
        {
            "text": [text for text in listed for _ in acts],
            **name_columns(list(by_name) * len(listed)),
            "perplexity": np.exp(surprisal),
            "surprisal": surprisal,
            "n_tokens": [len(score) for score in scores],
        }
    )


def completion_surprisal(
    model: TransformerBridge, completions: pd.DataFrame, condition: Condition = None
) -> pd.DataFrame:
    """How unexpected each token of each completion is to the model, given prompt and text so far.

    The default condition is the unsteered model, as a judge of coherence: exp of the mean over a
    completion is its perplexity, and the first tokens show whether it goes on from the prompt.

    Args:
        completions: as `generate` returns it (columns prompt and tokens are used).

    Returns:
        One row per token, in order: row (index of ``completions``), token_index (from 0), token
        (its text), surprisal (nats). Empty completions have no rows.

    Raises:
        ValueError: there is no column tokens.
    """
    import pandas as pd

    if "tokens" not in completions:
        raise ValueError("Completions need their column tokens, as generate returns it.")
    acts = as_interventions(condition, model)
    pairs = list(zip(completions.prompt, map(tuple, completions.tokens), strict=True))
    different = [pair for pair in dict.fromkeys(pairs) if pair[1]]  # what recurs runs once
    prompts = list(dict.fromkeys(prompt for prompt, _ in different))
    encoded = {prompt: prompt_ids(model, prompt) for prompt in prompts}
    for prompt, new in different:
        warn_untouched(acts, len(encoded[prompt]), len(encoded[prompt]) + len(new) - 1)
    rows = [
        Row(prompts.index(prompt), 0, i, encoded[prompt], acts, np.empty(0))
        for i, (prompt, _) in enumerate(different)
    ]
    scores = continuation_logprobs(model, rows, [ids for _, ids in different]) if rows else []
    scored = dict(zip(different, scores, strict=True))
    frames = []
    for row, pair in zip(completions.index, pairs, strict=True):
        n = len(pair[1])
        surprisal = -scored[pair].numpy() if n else np.empty(0)
        token = token_texts(model, pair[1]) if n else []
        part = {"row": row, "token_index": range(n), "token": token, "surprisal": surprisal}
        frames.append(pd.DataFrame(part))
    columns = ["row", "token_index", "token", "surprisal"]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def token_changes(
    model: TransformerBridge,
    texts: str | Sequence[str | list[int]],
    condition: Condition,
    skip_positions: int = 2,
    n_prompt: int | None = None,
) -> pd.DataFrame:
    """Log-probability of every token of each text, without and with a condition.

    Args:
        texts: a text may be given as its token ids, since not all tokens are whole characters.
        n_prompt: how many tokens of every text, BOS included, are its prompt, for conditions
            whose place counts from the prompt's end (``generated``, ``back``); by default all.

    Returns:
        One row per token behind BOS: text, position, token, before, after (natural logarithms),
        change (after - before; NaN where the prediction is made at one of the first
        ``skip_positions`` positions, see `perplexity`).

    Source: Turner et al. 2023, "Visualizing token probability changes across a corpus".
    """
    import pandas as pd

    listed = [texts] if isinstance(texts, str) else list(texts)
    acts = as_interventions(condition, model)
    ids = [prompt_ids(model, text) for text in listed]
    for i in ids:
        warn_untouched(acts, len(i) if n_prompt is None else n_prompt, len(i))
    rows: list[tuple[list[int], list[Intervention]]] = [(i, a) for i in ids for a in ([], acts)]
    found = [score.numpy() for score in token_logprobs(model, rows, n_prompt)]
    frames = []
    for t, given in enumerate(listed):
        text = given if isinstance(given, str) else model.tokenizer.decode(given)
        before, after = found[2 * t], found[2 * t + 1]
        position = np.arange(1, len(ids[t]))
        change = np.where(position > skip_positions, after - before, np.nan)
        columns = {"position": position, "token": token_texts(model, ids[t][1:])}
        columns |= {"before": before, "after": after, "change": change}
        frames.append(pd.DataFrame({"text": text, **columns}))
    return pd.concat(frames, ignore_index=True)


# ---------------------------------------------------------------- the next token


def _next_token_logprobs(
    model: TransformerBridge, prompts: Sequence[Any], acts: Sequence[Condition]
) -> Iterator[tuple[Row, torch.Tensor]]:
    """(row, float32 log-probabilities ``[vocabulary]``), a prompt's conditions in order."""
    rows = make_rows(model, prompts, acts, 1, Sampling(1), 0)
    # A prefix must not part a prompt's rows: the first condition's length sorts them all.
    length = {r.prompt: len(r.prompt_ids) for r in rows if not r.condition}
    order = sorted(rows, key=lambda r: (length[r.prompt], r.prompt, r.condition))
    size = max(1, _BYTES_PER_BATCH // (4 * model.cfg.d_vocab))
    fits = decode.rows_at_once(model, max(len(r.prompt_ids) for r in rows) + 1)
    for batch, logits in decode.first_logits(model, order, min(size, fits)):
        yield from zip(batch, logits.float().log_softmax(-1), strict=True)


def next_token_logprobs(
    model: TransformerBridge, prompts: Prompt | Sequence[Prompt], conditions: Conditions
) -> torch.Tensor:
    """Distribution of the next token of every prompt under every condition.

    Returns:
        float32 ``[prompt, condition, vocabulary]``, natural logarithms, in the order given.
    """
    texts: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    by_name = named(conditions)
    if not texts:
        raise ValueError("There are no prompts.")
    out = torch.empty(len(texts), len(by_name), model.cfg.d_vocab)
    for row, scores in _next_token_logprobs(model, texts, list(by_name.values())):
        out[row.prompt, row.condition] = scores.cpu()
    return out


def next_token_shift(model: TransformerBridge, prompt: str, condition: Condition) -> pd.DataFrame:
    """Next-token probabilities without and with a condition, and who makes up the divergence.

    Returns:
        One row per token of the vocabulary, largest contribution first: token, token_id,
        p_before, p_after, kl_contribution (nats; they sum to KL(after || before)).

    Source: Turner et al. 2023, "Token probability shifts".
    """
    import pandas as pd

    both = next_token_logprobs(model, prompt, {"before": None, "after": condition})[0].double()
    before, after = both.log_softmax(-1)
    frame = pd.DataFrame(
        {
            "token_id": np.arange(len(before)),
            "p_before": before.exp().numpy(),
            "p_after": after.exp().numpy(),
            "kl_contribution": (after.exp() * (after - before)).numpy(),
        }
    ).sort_values("kl_contribution", ascending=False, ignore_index=True)
    names = vocabulary(model.tokenizer, len(before))
    frame.insert(0, "token", [names[i] for i in frame.token_id])
    return frame


def kl_by_prompt(
    model: TransformerBridge, prompts: str | Sequence[str], conditions: Conditions
) -> pd.DataFrame:
    """How far each condition moves the next token of each prompt: KL(steered || unsteered).

    Returns:
        One row per prompt x condition, in order: prompt, condition (and the fields of its name),
        kl (nats).

    Source: Turner et al. 2023, "Adding a random vector doesn't change much".
    """
    import pandas as pd

    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    by_name = named(conditions)
    if not texts:
        raise ValueError("There are no prompts.")
    kl = np.empty((len(texts), len(by_name)))
    plain = torch.empty(0)
    for row, scores in _next_token_logprobs(model, texts, [None, *by_name.values()]):
        if row.condition == 0:  # a prompt's first row: the others of that prompt follow
            plain = scores
        else:
            divergence = (scores.exp() * (scores - plain)).double().sum()
            kl[row.prompt, row.condition - 1] = float(divergence)
    return pd.DataFrame(
        {
            "prompt": [text for text in texts for _ in by_name],
            **name_columns(list(by_name) * len(texts)),
            "kl": kl.ravel(),
        }
    )
