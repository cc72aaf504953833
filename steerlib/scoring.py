"""Numbers from texts and logits: words, perplexity, token shifts, and their intervals."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from .activations import encode, input_device, pad_id, pad_left
from .interventions import Condition, Intervention, Steering, interventions

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge

_TOKENS_PER_BATCH = 2048  # logits of that many tokens are held at once, in float32


def count_words(completions: Iterable[str], words: Iterable[str]) -> np.ndarray:
    """How often any of ``words`` occurs in each completion (whole words, any case).

    Returns:
        int array ``[completion]``.

    Source: first document, footnotes 22 and 28.
    """
    if isinstance(completions, str) or isinstance(words, str):
        raise ValueError("Completions and words are lists of texts, got one text alone.")
    listed = [re.escape(word) for word in words]
    if not listed:
        raise ValueError("The list of words to count is empty.")
    pattern = re.compile(rf"\b(?:{'|'.join(listed)})\b", re.IGNORECASE)
    return np.array([len(pattern.findall(text)) for text in completions], dtype=int)


def mean_interval(
    values: Iterable[float], confidence: float = 0.95, n_resamples: int = 5000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean with its bootstrap interval: ``(mean, low, high)``, in the units of ``values``.

    The percentile bootstrap; where all values are equal it has no width. There one-sided
    knowledge remains: of n zeros, a mean of up to about 3/n events would go unseen.
    """
    from scipy.stats import bootstrap

    sample = np.asarray(list(values), dtype=float)
    if not len(sample):
        raise ValueError("There are no values to average.")
    mean = float(sample.mean())
    if len(sample) == 1 or np.ptp(sample) == 0:
        return mean, mean, mean
    result = bootstrap(
        (sample,),
        np.mean,
        confidence_level=confidence,
        n_resamples=n_resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return mean, float(result.confidence_interval.low), float(result.confidence_interval.high)


def proportion_interval(
    successes: int, total: int, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Share with its Wilson interval: ``(share, low, high)``."""
    from scipy.stats import binomtest

    if not 0 <= successes <= total or total == 0:
        raise ValueError(f"{successes} of {total} is not a share.")
    interval = binomtest(int(successes), int(total)).proportion_ci(confidence, method="wilson")
    return successes / total, float(interval.low), float(interval.high)


def summarise(frame: pd.DataFrame, by: str | Sequence[str], value: str = "count") -> pd.DataFrame:
    """Mean and 95 % bootstrap interval of ``value`` in each group: columns mean, low, high, n."""
    import pandas as pd

    keys = [by] if isinstance(by, str) else list(by)
    rows = []
    for name, group in frame.groupby(keys, sort=False):
        mean, low, high = mean_interval(group[value])
        rows.append((*name, mean, low, high, len(group)))
    return pd.DataFrame(rows, columns=[*keys, "mean", "low", "high", "n"])


def _forward(
    model: TransformerBridge,
    rows: Sequence[tuple[list[int], list[Intervention]]],
    last_only: bool = False,
) -> Iterator[tuple[int, torch.Tensor]]:
    """(row, float32 logits ``[token, vocabulary]``) of every row, computed in batches."""
    order = sorted(range(len(rows)), key=lambda r: len(rows[r][0]))
    width = max(len(ids) for ids, _ in rows)
    size = max(1, _TOKENS_PER_BATCH // width)
    for begin in range(0, len(order), size):
        batch = order[begin : begin + size]
        ids = [rows[r][0] for r in batch]
        tokens, mask = pad_left(ids, pad_id(model), input_device(model))
        steering = Steering(model, [rows[r][1] for r in batch], [len(i) for i in ids])
        steering.window([len(i) - tokens.shape[1] for i in ids], tokens.shape[1])
        with torch.no_grad(), steering.hooks():
            keep = {"logits_to_keep": 1} if last_only else {}
            logits = model.forward(tokens, attention_mask=mask, **keep)
        for r, i, row in zip(batch, ids, logits, strict=True):
            yield r, (row if last_only else row[-len(i) :]).float()


def next_token_shift(model: TransformerBridge, prompt: str, condition: Condition) -> pd.DataFrame:
    """Next-token probabilities without and with a condition, and who makes up the divergence.

    Returns:
        One row per token of the vocabulary, largest contribution first: token, token_id,
        p_before, p_after, kl_contribution (nats; they sum to KL(after || before)).

    Source: first document, "Token probability shifts".
    """
    import pandas as pd

    ids = encode(model, prompt)
    rows = [(ids, []), (ids, interventions(condition, model))]
    logits = dict(_forward(model, rows, last_only=True))
    before, after = (logits[i][-1].double().log_softmax(-1) for i in (0, 1))
    contribution = after.exp() * (after - before)
    frame = pd.DataFrame(
        {
            "token_id": np.arange(len(before)),
            "p_before": before.exp().cpu().numpy(),
            "p_after": after.exp().cpu().numpy(),
            "kl_contribution": contribution.cpu().numpy(),
        }
    ).sort_values("kl_contribution", ascending=False, ignore_index=True)
    text = model.tokenizer.batch_decode([[i] for i in frame.token_id])
    frame.insert(0, "token", text)
    return frame


def perplexity(
    model: TransformerBridge,
    texts: str | Sequence[str],
    conditions: Mapping[str, Condition],
    skip_positions: int = 2,
) -> pd.DataFrame:
    """Perplexity of each text under each condition.

    Args:
        skip_positions: predictions made at the first so many positions (BOS included) do not
            count: there the stream may be modified directly (first document, footnote 33).

    Returns:
        One row per text x condition, in order: text, condition, perplexity
        (exp of the mean surprisal), surprisal (nats per token), n_tokens (tokens scored).

    Raises:
        ValueError: a text too short to have a scored token.
    """
    import pandas as pd

    listed = [texts] if isinstance(texts, str) else list(texts)
    acts = {name: interventions(c, model) for name, c in conditions.items()}
    if not listed or not acts or skip_positions < 0:
        raise ValueError(
            f"Nothing to score: {len(listed)} texts, {len(acts)} conditions, "
            f"skip_positions={skip_positions}."
        )
    rows, labels = [], []
    for text in listed:
        ids = encode(model, text)
        if len(ids) < skip_positions + 2:
            raise ValueError(
                f"{text[:60]!r} has {len(ids)} tokens; with skip_positions={skip_positions} it "
                f"needs at least {skip_positions + 2}."
            )
        for name in acts:
            rows.append((ids, acts[name]))
            labels.append((text, name))
    surprisal: dict[int, tuple[float, int]] = {}
    for r, logits in _forward(model, rows):
        target = torch.tensor(rows[r][0][skip_positions + 1 :], device=logits.device)
        loss = torch.nn.functional.cross_entropy(logits[skip_positions:-1], target)
        surprisal[r] = (float(loss), len(target))
    return pd.DataFrame(
        [
            (text, name, float(np.exp(surprisal[r][0])), *surprisal[r])
            for r, (text, name) in enumerate(labels)
        ],
        columns=["text", "condition", "perplexity", "surprisal", "n_tokens"],
    )
