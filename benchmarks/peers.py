"""The same work by steering-vectors, repeng and plain transformers, as their users would do it.

Every peer gets its best case: transformers' own fused attention, all 60 rows of a condition in one
left-padded batch, the best of several batch sizes, and sampling that costs as little as possible.
Their vectors act at every position, the cheapest and simplest thing they can do; steerlib's act at
the front of the prompt. The cost of adding a vector is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import steering_vectors
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

np.float_ = np.float64  # type: ignore[attr-defined]  # repeng names it, numpy 2 does not
import repeng  # noqa: E402
from repeng.extract import batched_get_hiddens  # noqa: E402


class Nucleus(LogitsProcessor):
    """Frequency penalty 1 and top-p 0.3, in place and without sorting the vocabulary.

    transformers has no frequency penalty, and its own top-p sorts everything.
    """

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores.scatter_add_(1, input_ids, torch.full_like(input_ids, -1, dtype=scores.dtype))
        total = scores.logsumexp(-1, keepdim=True)
        top, index = scores.topk(256)
        before = (top - total).exp().cumsum(-1).roll(1, -1)
        before[:, 0] = 0
        inside = top.masked_fill(before >= 0.3, -torch.inf)
        return scores.fill_(-torch.inf).scatter_(1, index, inside)


class Peer:
    """A plain transformers model with its tokenizer."""

    def __init__(self, folder: str, model: Any = None, dtype: torch.dtype = torch.float32):
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        if model is None:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.model = model

    def encode(self, prompts: Sequence[str]) -> Any:
        return self.tokenizer(list(prompts), return_tensors="pt", padding=True).to(
            self.model.device
        )

    def greedy(self, prompts: Sequence[str], n_tokens: int) -> None:
        """Complete the prompts, unsteered and greedily, each by exactly so many tokens."""
        length = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens}
        pad = self.tokenizer.pad_token_id
        self.model.generate(**self.encode(prompts), **length, do_sample=False, pad_token_id=pad)

    @torch.no_grad()
    def score(
        self,
        blocks: Any,
        vectors: Iterable[tuple[int, torch.Tensor]],
        pairs: Sequence[tuple[list[int], list[int]]],
        late: bool,
        batch_size: int,
    ) -> list[torch.Tensor]:
        """Log-probability of every pair's second part, one forward pass per condition and batch.

        ``blocks`` are the model's; a vector acts from the last prompt token on, or everywhere.
        """
        device, found = self.model.device, []
        pairs = sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
        for layer, vector in vectors:
            mine = vector.to(device, self.model.dtype)

            def add(module: Any, args: Any, from_: int = 0, v: torch.Tensor = mine) -> Any:
                x = args[0].clone()
                x[:, from_:] += v
                return (x, *args[1:])

            for begin in range(0, len(pairs), batch_size):
                batch = pairs[begin : begin + batch_size]
                left, right = (max(len(pair[i]) for pair in batch) for i in (0, 1))
                rows = [[*[0] * (left - len(a)), *a, *b, *[0] * (right - len(b))] for a, b in batch]
                seen = [
                    [*[0] * (left - len(a)), *[1] * (len(a) + len(b)), *[0] * (right - len(b))]
                    for a, b in batch
                ]
                tokens, mask = torch.tensor(rows, device=device), torch.tensor(seen, device=device)
                hook = partial(add, from_=left - 1 if late else 0)
                handle = blocks[layer].register_forward_pre_hook(hook)
                try:
                    positions = (mask.cumsum(1) - 1).clamp(min=0)
                    logits = self.model(
                        tokens, attention_mask=mask, position_ids=positions, use_cache=False,
                        logits_to_keep=right + 1,
                    ).logits  # fmt: skip
                finally:
                    handle.remove()
                target = tokens[:, left:, None]
                scores = logits[:, :-1].float().log_softmax(-1).gather(2, target)[..., 0]
                found.append((scores * mask[:, left:]).sum(1))
        return found

    def sample(self, prompts: Sequence[str], n_samples: int, n_tokens: int) -> int:
        """Complete every prompt ``n_samples`` times, all in one batch; how many tokens came."""
        batch = self.encode(prompts)
        out = self.model.generate(
            **batch,
            max_new_tokens=n_tokens,
            num_return_sequences=n_samples,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            logits_processor=LogitsProcessorList([Nucleus()]),
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return int(out[:, batch["input_ids"].shape[1] :].numel())


class SteeringVectors(Peer):
    """steering-vectors: one condition at a time, inside ``with vector.apply(model)``."""

    def sweep(
        self,
        vectors: Iterable[tuple[int, torch.Tensor]],
        prompts: Sequence[str],
        n_samples: int,
        n_tokens: int,
    ) -> int:
        total = 0
        for layer, vector in vectors:
            with steering_vectors.SteeringVector({layer: vector}).apply(self.model):
                total += self.sample(prompts, n_samples, n_tokens)
        return total

    def read(self, pairs: Sequence[tuple[str, str]], batch_size: int) -> None:
        steering_vectors.extract_activations(
            self.model, self.tokenizer, list(pairs), batch_size=batch_size
        )


class Repeng(Peer):
    """repeng: one condition at a time, set on the wrapped model."""

    def sweep(
        self,
        vectors: Iterable[tuple[int, torch.Tensor]],
        prompts: Sequence[str],
        n_samples: int,
        n_tokens: int,
    ) -> int:
        total = 0
        for layer, vector in vectors:
            wrapped = repeng.ControlModel(self.model, [layer])
            try:
                kind = self.model.config.model_type
                wrapped.set_control(repeng.ControlVector(kind, {layer: vector.numpy()}))
                total += self.sample(prompts, n_samples, n_tokens)
            finally:
                wrapped.unwrap()
        return total

    def read(self, pairs: Sequence[tuple[str, str]], batch_size: int) -> None:
        layers = list(range(self.model.config.num_hidden_layers))
        texts = [text for pair in pairs for text in pair]
        batched_get_hiddens(self.model, self.tokenizer, texts, layers, batch_size)
