"""The logit lens and norms, against the plain model's hidden states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import n_hooks, plain_logits

import steerlib as sl

TEXT = "I went up to my friend and said"


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3_text"])
def test_relative_norms_against_hidden_states(tiny: Any, architecture: str) -> None:
    model, plain = tiny(architecture)
    vector = sl.SteeringVector.from_prompts(model, " wedding", " ", layer=range(4))
    frame = sl.relative_norms(model, TEXT, vector)
    ids = torch.tensor([sl.encode(model, TEXT)])
    with torch.no_grad():
        hidden = plain(ids, output_hidden_states=True).hidden_states
    for row in frame.itertuples():
        truth = hidden[row.layer][0, row.position].norm()
        assert row.stream_norm == pytest.approx(float(truth), rel=1e-4)
        assert row.vector_norm == pytest.approx(
            float(vector.layers[row.layer][row.position].norm()), rel=1e-6
        )
        assert row.ratio == pytest.approx(row.vector_norm / row.stream_norm)
    assert len(frame) == 4 * vector.n_positions
    with pytest.raises(ValueError, match="shorter vector"):
        sl.relative_norms(model, "I", sl.SteeringVector.from_prompts(model, TEXT, layer=1))


@pytest.mark.parametrize("architecture", ["gpt2", "gptj", "gpt_neox", "llama", "gemma3_text"])
def test_logit_lens_of_the_stream(tiny: Any, architecture: str) -> None:
    model, plain = tiny(architecture)
    vector = 5 * sl.SteeringVector.from_prompts(model, " wedding", " ", layer=2)
    for condition in (None, vector):
        frame = sl.logit_lens(model, TEXT, condition, top=3, watch="a")
        logits = plain_logits(model, plain, TEXT, condition).log_softmax(-1)
        last = frame[frame.layer == 4]
        assert len(frame) == 5 * len(logits)
        best = [model.tokenizer.batch_decode([[t] for t in row.topk(3)[1]]) for row in logits]
        assert list(last.top) == best
        assert last.p_top.tolist() == pytest.approx(logits.exp().amax(-1).tolist(), rel=1e-3)
        assert last.kl_to_output.abs().max() < 1e-6
        assert frame[frame.layer < 4].kl_to_output.min() > 0
        watched = model.tokenizer("a")["input_ids"][-1]
        rank = [int((row > row[watched]).sum()) for row in logits]
        assert list(last["rank"]) == rank
    # A stream in the middle, read by hand off the plain model; steering acts before the reading.
    frame = sl.logit_lens(model, TEXT, vector).set_index(["layer", "position"])
    ids = torch.tensor([sl.encode(model, TEXT)])
    with torch.no_grad():
        stream = plain(ids, output_hidden_states=True).hidden_states[2][0].clone()
    stream[: vector.n_positions] += vector.layers[2]
    norms = [frame.norm[2, p] for p in range(len(stream))]
    assert norms == pytest.approx(stream.norm(dim=-1).tolist(), rel=1e-3)
    assert n_hooks(model) == 0


def test_logit_lens_of_a_vector(tiny: Any) -> None:
    for architecture, norm in (("gpt2", "transformer.ln_f"), ("llama", "model.norm")):
        model, plain = tiny(architecture)
        vector = sl.SteeringVector.from_prompts(model, " wedding", " ", layer=[1, 3])
        frame = sl.logit_lens(model, vector, top=2, watch="a")
        for row in frame.itertuples():
            with torch.no_grad():
                x = plain.get_submodule(norm)(vector.layers[row.layer][row.position])
                logits = plain.lm_head(x)
            best = [model.tokenizer.decode([t]) for t in logits.topk(2)[1]]
            if row.position > 0:
                assert row.top == best
                assert row.p_top == pytest.approx(float(logits.softmax(-1).max()), rel=1e-4)
        assert list(frame.layer.unique()) == [1, 3] and "kl_to_output" not in frame
        with pytest.raises(ValueError, match="not 1"):
            sl.logit_lens(model, vector, watch="I went up to my friend")
