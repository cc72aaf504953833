"""Numbers from texts and logits: words, perplexity, token shifts, and their intervals."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from .activations import capture, encode, input_device, logits_at, pad_id, pad_left
from .interventions import Add, Condition, Intervention, Steering, first_position, interventions
from .vectors import SteeringVector

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
    sample = np.asarray(list(values), dtype=float)
    if not len(sample):
        raise ValueError("There are no values to average.")
    mean = float(sample.mean())
    if len(sample) == 1 or np.ptp(sample) == 0:
        return mean, mean, mean
    return bootstrap_interval(
        np.mean, sample, confidence=confidence, n_resamples=n_resamples, seed=seed
    )


def bootstrap_interval(
    statistic: Callable[..., Any],
    *samples: np.ndarray,
    confidence: float = 0.95,
    n_resamples: int = 5000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """A statistic of one or several samples, with its percentile bootstrap interval.

    Args:
        statistic: of as many arrays as there are samples; each is resampled on its own.

    Returns:
        ``(value, low, high)``; the limits are NaN if a sample has one value only.

    Raises:
        ValueError: an empty sample.
    """
    from scipy.stats import bootstrap

    if not samples or not all(map(len, samples)):
        raise ValueError("There are no values to draw from.")
    value = float(statistic(*samples))
    if min(map(len, samples)) == 1:
        return value, float("nan"), float("nan")
    interval = bootstrap(
        samples,
        statistic,
        confidence_level=confidence,
        n_resamples=n_resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return value, float(interval.low), float(interval.high)


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
    """Mean and 95 % interval of ``value`` in each group: columns mean, low, high, n.

    The interval is bootstrapped; for truth values (a column of type bool) it is Wilson's.
    """
    import pandas as pd

    keys = [by] if isinstance(by, str) else list(by)
    rows = []
    for name, group in frame.groupby(keys, sort=False):
        if group[value].dtype == bool:
            mean, low, high = proportion_interval(int(group[value].sum()), len(group))
        else:
            mean, low, high = mean_interval(group[value])
        rows.append((*name, mean, low, high, len(group)))
    return pd.DataFrame(rows, columns=[*keys, "mean", "low", "high", "n"])


def _forward(
    model: TransformerBridge,
    rows: Sequence[tuple[list[int], list[Intervention]]],
    last_only: bool = False,
    n_prompt: int | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """(row, float32 logits ``[token, vocabulary]``) of every row, computed in batches.

    ``n_prompt`` tokens of every row are its prompt; all of them by default.
    """
    order = sorted(range(len(rows)), key=lambda r: len(rows[r][0]))
    width = max(len(ids) for ids, _ in rows)
    size = max(1, _TOKENS_PER_BATCH // width)
    for begin in range(0, len(order), size):
        batch = order[begin : begin + size]
        ids = [rows[r][0] for r in batch]
        tokens, mask = pad_left(ids, pad_id(model), input_device(model))
        prompts = [len(i) if n_prompt is None else n_prompt for i in ids]
        steering = Steering(model, [rows[r][1] for r in batch], prompts)
        steering.window([len(i) - tokens.shape[1] for i in ids], tokens.shape[1])
        with torch.no_grad(), steering.hooks():
            keep = {"logits_to_keep": logits_at(tokens, -1)} if last_only else {}
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
    names = _vocabulary(model.tokenizer, len(before))
    frame.insert(0, "token", [names[i] for i in frame.token_id])
    return frame


@lru_cache(maxsize=2)
def _vocabulary(tokenizer: Any, size: int) -> list[str]:
    """The text of every token; decoding takes longer than a pass of a small model."""
    return list(tokenizer.batch_decode([[i] for i in range(size)]))


def next_token_probabilities(
    model: TransformerBridge, prompts: str | Sequence[str], conditions: Mapping[str, Condition]
) -> torch.Tensor:
    """Distribution of the next token of every prompt under every condition.

    Returns:
        float32 tensor ``[prompt, condition, vocabulary]``, in the order given.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    acts = [interventions(c, model) for c in conditions.values()]
    if not texts or not acts:
        raise ValueError(f"Nothing to predict: {len(texts)} prompts, {len(acts)} conditions.")
    rows = [(ids, a) for ids in (encode(model, text) for text in texts) for a in acts]
    found = dict(_forward(model, rows, last_only=True))
    flat = torch.stack([found[r][-1].softmax(-1).cpu() for r in range(len(rows))])
    return flat.reshape(len(texts), len(acts), -1)


def perplexity(
    model: TransformerBridge,
    texts: str | Sequence[str],
    conditions: Mapping[str, Condition],
    skip_positions: int = 2,
    prefix: str = "",
) -> pd.DataFrame:
    """Perplexity of each text under each condition.

    Args:
        skip_positions: predictions made at the first so many positions (BOS included) do not
            count: there the stream may be modified directly (first document, footnote 33).
        prefix: its tokens go between BOS and each text. The tokens scored stay those that are
            scored without it (first document, "Activation addition behaves differently than
            prompting").

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
    before = model.tokenizer(prefix, add_special_tokens=False)["input_ids"] if prefix else []
    rows, labels = [], []
    for text in listed:
        ids = encode(model, text)
        if len(ids) < skip_positions + 2:
            raise ValueError(
                f"{text[:60]!r} has {len(ids)} tokens; with skip_positions={skip_positions} it "
                f"needs at least {skip_positions + 2}."
            )
        bos = int(ids[0] == model.tokenizer.bos_token_id)
        ids = [*ids[:bos], *before, *ids[bos:]]
        for name in acts:
            rows.append((ids, acts[name]))
            labels.append((text, name))
    surprisal: dict[int, tuple[float, int]] = {}
    first = skip_positions + len(before)
    for r, logits in _forward(model, rows):
        target = torch.tensor(rows[r][0][first + 1 :], device=logits.device)
        loss = torch.nn.functional.cross_entropy(logits[first:-1], target)
        surprisal[r] = (float(loss), len(target))
    return pd.DataFrame(
        [
            (text, name, float(np.exp(surprisal[r][0])), *surprisal[r])
            for r, (text, name) in enumerate(labels)
        ],
        columns=["text", "condition", "perplexity", "surprisal", "n_tokens"],
    )


def completion_surprisal(
    model: TransformerBridge, completions: pd.DataFrame, condition: Condition = None
) -> pd.DataFrame:
    """How unexpected each token of each completion is to the model, given prompt and text so far.

    The default condition is the unsteered model, as a judge of coherence: exp of the mean over a
    completion is its perplexity, and the first tokens show whether it goes on from the prompt.

    Args:
        completions: as `sweeps.generate` returns it (columns prompt and completion are used).

    Returns:
        One row per token, in order: row (index of ``completions``), token_index (from 0), token
        (its text), surprisal (nats). Where prompt and completion merge into one token at the
        seam, that token is the first. Empty completions have no rows.
    """
    import pandas as pd

    acts = interventions(condition, model)
    pairs = list(zip(completions.prompt, completions.completion, strict=True))
    texts: dict[tuple[str, str], tuple[list[int], int]] = {}  # a text that recurs runs once
    for prompt, completion in dict.fromkeys(pairs):
        before, ids = encode(model, prompt), encode(model, prompt + completion)
        same = (i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b)
        start = next(same, min(len(before), len(ids)))
        if start < len(ids):
            texts[prompt, completion] = (ids, max(start, 1))
    keys = list(texts)
    scored: dict[tuple[str, str], list[tuple[int, str, float]]] = {}
    for r, logits in _forward(model, [(ids, acts) for ids, _ in texts.values()]) if keys else []:
        ids, start = texts[keys[r]]
        target = torch.tensor(ids[start:], device=logits.device)
        loss = torch.nn.functional.cross_entropy(logits[start - 1 : -1], target, reduction="none")
        tokens = model.tokenizer.batch_decode([[i] for i in ids[start:]])
        scored[keys[r]] = list(zip(range(len(tokens)), tokens, loss.tolist(), strict=True))
    return pd.DataFrame(
        [
            (row, *token)
            for row, pair in zip(completions.index, pairs, strict=True)
            for token in scored.get(pair, [])
        ],
        columns=["row", "token_index", "token", "surprisal"],
    )


def kl_by_prompt(
    model: TransformerBridge, prompts: str | Sequence[str], conditions: Mapping[str, Condition]
) -> pd.DataFrame:
    """How far each condition moves the next token of each prompt: KL(steered || unsteered).

    Returns:
        One row per prompt x condition, in order: prompt, condition, kl (nats).

    Source: first document, "Adding a random vector doesn't change much".
    """
    import pandas as pd

    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    acts = {name: interventions(c, model) for name, c in conditions.items()}
    if not texts or not acts:
        raise ValueError(f"Nothing to compare: {len(texts)} prompts, {len(acts)} conditions.")
    ids = [encode(model, text) for text in texts]
    plain = {
        p: logits[-1].log_softmax(-1)
        for p, logits in _forward(model, [(i, []) for i in ids], last_only=True)
    }
    keys = [(p, name) for p in range(len(texts)) for name in acts]
    rows = [(ids[p], acts[name]) for p, name in keys]
    kl: dict[int, float] = {}
    for r, logits in _forward(model, rows, last_only=True):
        steered = logits[-1].log_softmax(-1)
        kl[r] = float((steered.exp() * (steered - plain[keys[r][0]])).double().sum())
    return pd.DataFrame(
        [(texts[p], name, kl[r]) for r, (p, name) in enumerate(keys)],
        columns=["prompt", "condition", "kl"],
    )


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

    Source: first document, "Visualizing token probability changes across a corpus".
    """
    import pandas as pd

    listed = [texts] if isinstance(texts, str) else list(texts)
    acts = interventions(condition, model)
    ids = [encode(model, text) if isinstance(text, str) else text for text in listed]
    rows = [(i, a) for i in ids for a in ([], acts)]
    found: dict[int, np.ndarray] = {}
    for r, logits in _forward(model, rows, n_prompt=n_prompt):
        target = torch.tensor(rows[r][0][1:], device=logits.device)
        scores = logits[:-1].log_softmax(-1).gather(1, target[:, None])[:, 0]
        found[r] = scores.cpu().numpy()
    frames = []
    for t, given in enumerate(listed):
        text = given if isinstance(given, str) else model.tokenizer.decode(given)
        before, after = found[2 * t], found[2 * t + 1]
        position = np.arange(1, len(ids[t]))
        change = np.where(position > skip_positions, after - before, np.nan)
        token = model.tokenizer.batch_decode([[i] for i in ids[t][1:]])
        columns = {"position": position, "token": token, "before": before, "after": after}
        frames.append(pd.DataFrame({"text": text, **columns, "change": change}))
    return pd.concat(frames, ignore_index=True)


# ---------------------------------------------------------------- inside the stream


def relative_norms(model: TransformerBridge, prompt: str, vector: SteeringVector) -> pd.DataFrame:
    """How large a vector is beside the stream it would be added to, at the front of ``prompt``.

    Args:
        vector: best made at many layers (``layer=range(n)``); each is compared at its own layer.

    Returns:
        One row per layer x position of the vector: layer, position, token (of the prompt),
        vector_norm, stream_norm (L2, in the stream's own units), ratio.

    Source: first document, "Steering vectors are about as "big" as normal activation vectors".
    """
    import pandas as pd

    ids = encode(model, prompt)
    n, layers = vector.n_positions, sorted(vector.layers)
    interventions(vector, model)  # says at once if it does not fit the model
    first_position([Add(vector, "front")], len(ids))  # or the prompt
    streams = capture(model, prompt, layers, range(n), vector.site)[0].norm(dim=-1)
    token = model.tokenizer.batch_decode([[i] for i in ids[:n]])
    rows = []
    for i, layer in enumerate(layers):
        for p, norm in enumerate(vector.norm()[layer].tolist()):
            stream = float(streams[i, p])
            rows.append((layer, p, token[p], norm, stream, norm / stream))
    columns = ["layer", "position", "token", "vector_norm", "stream_norm", "ratio"]
    return pd.DataFrame(rows, columns=columns)


def logit_lens(
    model: TransformerBridge,
    what: str | SteeringVector,
    condition: Condition = None,
    top: int = 5,
    watch: str | None = None,
) -> pd.DataFrame:
    """What the final norm and the unembedding make of the stream, or of a vector, layer by layer.

    Args:
        what: a prompt, whose stream is read before every block (after the condition has acted)
            and once more where it leaves the last; or a vector, read as it is.
        top: how many tokens to name.
        watch: a token (a text that is one token) to follow.

    Returns:
        One row per layer x position: layer (n_layers: the model's own output), position, token (of
        the prompt), norm (L2, of the stream or the vector), top (the likeliest tokens), p_top
        (probability of the first), kl_to_output (nats; KL(this layer || the output of this run)),
        rank (of ``watch``; 0 is the likeliest). What does not apply is missing.

    Raises:
        ValueError: ``watch`` is not one token.

    Source: first document, comments on huge coefficients (there with a tuned lens, which is
    trained; this one is not, and early layers may mean nothing to it).
    """
    import pandas as pd

    watched = None
    if watch is not None:
        found = model.tokenizer(watch, add_special_tokens=False)["input_ids"]
        if len(found) != 1:
            raise ValueError(f"{watch!r} is {len(found)} tokens for {model.cfg.model_name}, not 1.")
        watched = found[0]
    tokens: list[str | None]
    if isinstance(what, SteeringVector):
        interventions(what, model)
        layers, tokens = sorted(what.layers), [None] * what.n_positions
        streams = torch.stack([what.layers[layer] for layer in layers])
    else:
        ids = encode(model, what)
        layers = list(range(model.cfg.n_layers + 1))
        tokens = list(model.tokenizer.batch_decode([[i] for i in ids]))
        streams = _streams(model, ids, condition)
    output = None if isinstance(what, SteeringVector) else _unembed(model, streams[-1])
    rows = []
    for i, layer in enumerate(layers):
        scores = _unembed(model, streams[i])
        best = scores.topk(top, dim=-1)
        for p, token in enumerate(tokens):
            row: dict[str, Any] = {"layer": layer, "position": p, "token": token}
            row["norm"] = float(streams[i, p].norm())
            row["top"] = model.tokenizer.batch_decode([[t] for t in best.indices[p].tolist()])
            row["p_top"] = float(best.values[p, 0].exp())
            if output is not None:
                kl = scores[p].exp() * (scores[p] - output[p])
                row["kl_to_output"] = float(kl.double().sum())
            if watched is not None:
                row["rank"] = int((scores[p] > scores[p, watched]).sum())
            rows.append(row)
    return pd.DataFrame(rows)


def _streams(model: TransformerBridge, ids: list[int], condition: Condition) -> torch.Tensor:
    """The stream before every block and behind the last: float32 ``[layer, position, d_model]``."""
    n = model.cfg.n_layers
    names = [*(f"blocks.{layer}.hook_resid_pre" for layer in range(n))]
    names.append(f"blocks.{n - 1}.hook_resid_post")
    seen: dict[str, torch.Tensor] = {}

    def read(x: torch.Tensor, hook: Any, name: str) -> None:
        seen[name] = x[0].float().cpu()

    steering = Steering(model, [interventions(condition, model)], [len(ids)])
    steering.window([0], len(ids))
    more = [(name, partial(read, name=name)) for name in names]
    with torch.no_grad(), steering.hooks(more):
        tokens = torch.tensor([ids], device=input_device(model))
        model.forward(tokens, logits_to_keep=logits_at(tokens))
    return torch.stack([seen[name] for name in names])


def _unembed(model: TransformerBridge, stream: torch.Tensor) -> torch.Tensor:
    """float32 log-probabilities ``[..., vocabulary]`` read off streams ``[..., d_model]``."""
    device = model.unembed.weight.device
    with torch.no_grad():
        logits = model.unembed(model.ln_final(stream.to(device, model.cfg.dtype))).float().cpu()
    config = model.original_model.config.get_text_config()
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits.log_softmax(-1)


# ---------------------------------------------------------------- which option was chosen

_UNABLE = (
    r"\b(?:cannot|can't|could not|couldn't|unable to|not able to|do not|don't) (?:\w+ )?"
    r"(?:say|tell|know|answer|confirm|verify|determine|judge|decide|advise|recommend either|help)\b"
    r"|(?:\bnot|n't) (?:sure|certain)\b|\b(?:unsure|uncertain|whether|if)\b"
)
_NEGATED = (  # at the end of what stands before a mention
    r"(?:\bnot|n't|\bnever|\bneither|\bnor|\bcannot|\brather than|\binstead of|\bwrong to)"
    r"(?:\W+(?!(?:is|are|was|were|it)\b)[\w']+){0,4}\W*$"
    r"|(?:\bnot|n't) (?:think|believe|agree|say)\b.*$"
)
_REJECTED = r"[)\"', ]{0,3}(?:\w+ )?(?:is|was|would be)(?: \w+)? ?(?:wrong|incorrect|not|n't)\b"
_TURN = (  # what comes behind it counts for more than what came before
    r"\b(?:but|however|actually|instead|therefore|thus|hence|so)\b|\banswer(?: is| would be)?\b:?"
    r"|\bI(?:'d| would|'ll| will)? (?:choose|pick|select|go with)\b"
)
_CUE = (  # what may stand right before a letter that is an answer
    r"(?:^|[.:!?,/\n(\"]|\b(?:is|be|isn't|answer|option|choice|choose|pick|select|with|both|and|or"
    r"|nor|not|neither|either|say|for))\s*$"
)


def parse_choice(text: str, options: Mapping[str, str]) -> str:
    """Which option a free answer commits itself to.

    An option is named by its letter, "(B)", "B.", "answer: b", or by its words, in any case;
    letters count before words. Naming it after "not", "isn't" or "un-" rejects it, and with two
    options that chooses the other one. What is asked, or left open ("I cannot say whether ..."),
    does not count. Where several options are named, the first sentence decides if it begins with
    one of them, or else what follows the last "but", "however", "so" or "answer is".

    Args:
        options: letter -> meaning, such as ``{"A": "True", "B": "False"}``.

    Returns:
        The letter; "neither", if the answer commits itself to none; "both", if it commits itself
        to several, or to a letter with the words of another.

    Source: second document, "judged based on finding some variant of A, B, True, or False".
    """
    if not isinstance(text, str):
        raise ValueError(f"An answer is a text, got {type(text).__name__}: {text!r}.")
    if not options or not all(isinstance(o, str) and o.strip() for o in options.values()):
        raise ValueError(f"Options are a mapping letter -> meaning, got {options!r}.")
    text = re.sub(r"</?\w+>", " ", text.replace("’", "'"))
    text = re.sub(r"[*_`]", "", text).translate(str.maketrans("[]{}", "()()")).strip()
    letters, words = _letters(text, options), _words(text, options)
    for letter in letters:
        for word in words:
            gap = text[letter.end : word.start] if word.start >= letter.end else "no"
            clash = word.label != letter.label and not (word.rejected or letter.rejected)
            if clash and re.fullmatch(r"[\s).:,–—-]*", gap):
                return "both"
    named = letters or words
    decided = _decide(named, options)
    if decided == "both":
        turns = [turn.end() for turn in re.finditer(_TURN, text, re.IGNORECASE)]
        parts = [part for t in reversed(turns) for part in _behind(t, text, named)]
        if not re.search(r"\w", text[: named[0].start]):
            parts.insert(0, _behind(0, text, named)[0])
        decided = next((d for p in parts if (d := _decide(p, options)) in options), "both")
    return decided


def _behind(start: int, text: str, named: list[_Mention]) -> list[list[_Mention]]:
    """The mentions in the sentence that begins at ``start``, and all those from there on.

    A sentence says nothing by itself if it is the first of a list of options.
    """
    stop = re.compile(r"(?<=\w\w)[.!?]|(?<=\S)\n").search(text, start)
    rest = [m for m in named if m.start >= start]
    now = [m for m in rest if stop is None or m.start < stop.start()]
    listed = (re.search(r"\n\W*$", text[: m.start]) and not m.rejected for m in rest[len(now) :])
    return [[] if any(listed) else now, rest]


class _Mention(NamedTuple):
    start: int
    end: int
    label: str
    rejected: bool


def _decide(named: Iterable[_Mention], options: Mapping[str, str]) -> str:
    chosen = {m.label for m in named if not m.rejected}
    left = set(options) - {m.label for m in named}
    if not chosen and len(options) == 2 and len(left) == 1:
        chosen = left  # the only other option was rejected
    return "both" if len(chosen) > 1 else next(iter(chosen), "neither")


def _letters(text: str, options: Mapping[str, str]) -> list[_Mention]:
    """Where the letter of an option stands for the option; "A" may also be an article."""
    found = []
    meant = "|".join(re.escape(o) for o in options.values())
    ends = rf"\s*(?:$|[.,;:/!?)\"\n]|[–—-]\s)|\s+(?:is|as|and|or|nor|but|because|since|{meant})\b"
    labels = "|".join(re.escape(label) for label in options)
    for match in re.finditer(rf"(?<![\w'])(?:{labels})(?!\w)", text, re.IGNORECASE):
        before, after = text[: match.start()], text[match.end() :]
        label = next(o for o in options if o.lower() == match[0].lower())
        bracket = re.match(r"\)", after) or (before.endswith("(") and not after.strip())
        asked = re.search(r"(?:answer|option|choice)(?: is| would be)?:? *$|^$", before, re.I)
        bare = match[0] == label and re.search(_CUE, before, re.IGNORECASE)
        short = asked and re.match(r"\s*(?:$|[.,;:!?\n])", after)
        if bare and label in ("A", "I"):
            bare = re.match(ends, after, re.IGNORECASE)
        if bracket or short or bare:
            found += _mention(text, match, label)
    return found


def _words(text: str, options: Mapping[str, str]) -> list[_Mention]:
    """Where the words of an option stand; the longest one where several fit."""
    meaning = {o.strip().rstrip(".").lower(): label for label, o in options.items()}
    one_of = "|".join(re.escape(o) for o in sorted(meaning, key=len, reverse=True))
    found = []
    for match in re.finditer(rf"(?<!\w)(un)?({one_of})(?!\w)", text, re.IGNORECASE):
        alone = re.match(r"\s*$|[^\w ]| +(?:and|or|I)\b", text[match.end() :])
        if match[2].lower() != "no" or alone:  # not "no one", "no evidence"
            found += _mention(text, match, meaning[match[2].lower()], bool(match[1]))
    return found


def _mention(text: str, match: re.Match[str], label: str, un: bool = False) -> list[_Mention]:
    """The mention, chosen or rejected; nothing where the answer leaves it open."""
    before = re.split(r"[.,;:!?\n]|\bbut\b|\bso\b", text[: match.start()])[-1]
    after = text[match.end() :]
    rest = re.search(r"[.!?\n]", after)
    if (rest and rest[0] == "?") or re.search(_UNABLE, before, re.IGNORECASE):
        return []
    rejected = un
    for pattern, where in ((_NEGATED, before), (_REJECTED, after)):
        found = re.search if where is before else re.match
        rejected ^= bool(found(pattern, where, re.IGNORECASE))
    return [_Mention(match.start(), match.end(), label, rejected)]
