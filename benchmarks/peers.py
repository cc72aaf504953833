"""The same work by steering-vectors, repeng and plain transformers, as their users would do it.

Every peer gets its best case: transformers' own fused attention, all 60 rows of a condition in one
left-padded batch, the best of several batch sizes, and sampling that costs as little as possible.
Their vectors act at every position, the cheapest and simplest thing they can do; steerlib's act at
the front of the prompt. The cost of adding a vector is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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

    def __init__(self, folder: str):
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def sample(self, prompts: Sequence[str], n_samples: int, n_tokens: int) -> int:
        """Complete every prompt ``n_samples`` times, all in one batch; how many tokens came."""
        batch = self.tokenizer(list(prompts), return_tensors="pt", padding=True)
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
