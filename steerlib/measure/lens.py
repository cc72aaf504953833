"""What the stream and vectors say: the logit lens, and their norms."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..activations import capture
from ..hooks import BatchHooks
from ..interventions import Add, Condition, as_interventions, first_position, warn_untouched
from ..tokens import columns_of, encode, input_device, single_token, token_texts
from ..vectors import SteeringVector

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge


def relative_norms(model: TransformerBridge, prompt: str, vector: SteeringVector) -> pd.DataFrame:
    """How large a vector is beside the stream it would be added to, at the front of ``prompt``.

    Args:
        vector: best made at many layers (``layer=range(n)``); each is compared at its own layer.

    Returns:
        One row per layer x position of the vector: layer, position, token (of the prompt),
        vector_norm, stream_norm (L2, in the stream's own units), ratio.

    Source: Turner et al. 2023, "Steering vectors are about as "big" as normal activation vectors".
    """
    import pandas as pd

    ids = encode(model, prompt)
    n, layers = vector.n_positions, sorted(vector.layers)
    as_interventions(vector, model)  # says at once if it does not fit the model
    first_position([Add(vector, "front")], len(ids))  # or the prompt
    streams = capture(model, prompt, layers, range(n), vector.site)[0].norm(dim=-1)
    token = token_texts(model, ids[:n])
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

    Source: Turner et al. 2023, comments on huge coefficients (there with a tuned lens, which is
    trained; this one is not, and early layers may mean nothing to it).
    """
    import pandas as pd

    watched = None if watch is None else single_token(model, watch)
    tokens: list[str | None]
    if isinstance(what, SteeringVector):
        as_interventions(what, model)
        layers, tokens = sorted(what.layers), [None] * what.n_positions
        streams = torch.stack([what.layers[layer] for layer in layers])
    else:
        ids = encode(model, what)
        layers = list(range(model.cfg.n_layers + 1))
        tokens = list(token_texts(model, ids))
        streams = _streams(model, ids, condition)
    output = None if isinstance(what, SteeringVector) else unembed(model, streams[-1])
    rows = []
    for i, layer in enumerate(layers):
        scores = unembed(model, streams[i])
        best = scores.topk(top, dim=-1)
        for p, token in enumerate(tokens):
            row: dict[str, Any] = {"layer": layer, "position": p, "token": token}
            row["norm"] = float(streams[i, p].norm())
            row["top"] = token_texts(model, best.indices[p].tolist())
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

    acts = as_interventions(condition, model)
    warn_untouched(acts, len(ids), len(ids))
    hooks = BatchHooks(model, [acts], [len(ids)])
    hooks.window([0], len(ids))
    more = [(name, partial(read, name=name)) for name in names]
    with torch.no_grad(), hooks.hooks(more):
        tokens = torch.tensor([ids], device=input_device(model))
        model.forward(tokens, logits_to_keep=columns_of(tokens))
    return torch.stack([seen[name] for name in names])


def unembed(model: TransformerBridge, stream: torch.Tensor) -> torch.Tensor:
    """float32 log-probabilities ``[..., vocabulary]`` read off streams ``[..., d_model]``."""
    from transformer_lens.tools.analysis import logit_readout

    stream = stream.to(model.unembed.weight.device, model.cfg.dtype)
    return logit_readout(model, stream, return_type="log_probs").values.float().cpu()
