"""Scores of whole texts and completions, each against its definition."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from conftest import adding, n_hooks, reference_logits

import steerlib as sl

# ---------------------------------------------------------------- completions


def test_completion_surprisal_is_the_loss_of_the_completion_alone(tiny: Any) -> None:
    model, plain = tiny("llama")
    prompt, others = "I went up to my friend and said", ["The ship", "I love dogs"]
    frame = sl.generate(model, [prompt, *others], None, 3, 6, progress=False)
    frame.index += 7
    result = sl.completion_surprisal(model, frame)
    perplexities = result.groupby("row").surprisal.mean()
    for i, row in frame.iterrows():
        before, ids = sl.encode(model, row.prompt), sl.encode(model, row.prompt + row.completion)
        start = next((k for k, b in enumerate(before) if ids[k : k + 1] != [b]), len(before))
        labels = torch.tensor([[-100] * start + ids[start:]])
        with torch.no_grad():
            loss = plain(torch.tensor([ids]), labels=labels).loss
        assert perplexities[i] == pytest.approx(float(loss), abs=1e-4)
        tokens = result[result.row == i]
        assert list(tokens.token_index) == list(range(len(ids) - start))
        assert list(tokens.token) == [model.tokenizer.decode([t]) for t in ids[start:]]


def test_next_token_probabilities_are_those_of_next_token_shift(tiny: Any) -> None:
    model, _ = tiny("llama")
    steered = sl.Add(sl.SteeringVector({1: torch.ones(1, model.cfg.d_model)}), "back", 5)
    prompts = ["I went up to my friend and said", "The ship"]
    p = sl.scoring.next_token_probabilities(model, prompts, {"plain": None, "steered": steered})
    assert p.shape == (2, 2, model.cfg.d_vocab)
    for prompt, (before, after) in zip(prompts, p, strict=True):
        shift = sl.next_token_shift(model, prompt, steered).sort_values("token_id")
        assert before.numpy() == pytest.approx(shift.p_before.to_numpy(), abs=1e-6)
        assert after.numpy() == pytest.approx(shift.p_after.to_numpy(), abs=1e-6)
    with pytest.raises(ValueError, match="Nothing to predict"):
        sl.scoring.next_token_probabilities(model, [], {"plain": None})


def test_completion_surprisal_under_a_condition_and_of_nothing(tiny: Any) -> None:
    model, _ = tiny("gpt2")
    texts = [("I love", " dogs"), ("I love", ""), ("I love", " dogs"), ("I", " love dogs")]
    frame = pd.DataFrame(texts, columns=["prompt", "completion"])
    plain = sl.completion_surprisal(model, frame)
    assert set(plain.row) == {0, 2, 3}
    first, again = (plain[plain.row == r].surprisal.tolist() for r in (0, 2))
    assert first == again
    vector = sl.SteeringVector({1: torch.ones(1, model.cfg.d_model)})
    steered = sl.completion_surprisal(model, frame, sl.Add(vector, "all", 5))
    assert steered.surprisal.tolist() != plain.surprisal.tolist()
    assert sl.completion_surprisal(model, frame[1:2]).empty
    assert n_hooks(model) == 0


# ---------------------------------------------------------------- next tokens and sentences

TEXTS = [
    "I went up to my friend and said",
    "The ship left the harbour in the morning",
    "a wedding is a party",
]


def wedding(model: Any, layer: int = 1, coefficient: float = 5) -> sl.SteeringVector:
    return coefficient * sl.SteeringVector.from_prompts(model, " wedding", " ", layer=layer)


def plain_logits(model: Any, plain: Any, text: str, vector: Any = None) -> torch.Tensor:
    edits = []
    if vector is not None:
        edits = [
            (layer, vector.site, adding(t, list(range(vector.n_positions))))
            for layer, t in vector.layers.items()
        ]
    return reference_logits(plain, sl.encode(model, text), edits)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_kl_by_prompt_is_torchs_kl_divergence(tiny: Any, architecture: str) -> None:
    model, plain = tiny(architecture)
    vector = wedding(model)
    conditions = {"unsteered": None, "steered": vector, "zero": sl.Add(vector, coefficient=0)}
    frame = sl.kl_by_prompt(model, TEXTS, conditions)
    assert list(frame.prompt) == [t for t in TEXTS for _ in conditions]
    assert list(frame.condition) == [*conditions] * len(TEXTS)
    found = frame.set_index(["prompt", "condition"]).kl
    for text in TEXTS:
        before = plain_logits(model, plain, text)[-1].double().log_softmax(-1)
        after = plain_logits(model, plain, text, vector)[-1].double().log_softmax(-1)
        truth = torch.nn.functional.kl_div(before, after, log_target=True, reduction="sum")
        assert found[text, "steered"] == pytest.approx(float(truth), abs=1e-4)
        assert truth > 0.001 and abs(found[text, "unsteered"]) < 1e-5
        assert abs(found[text, "zero"]) < 1e-5  # another row of the batch: not to the last bit
        shift = sl.next_token_shift(model, text, vector)
        assert shift.kl_contribution.sum() == pytest.approx(found[text, "steered"], abs=1e-4)
    with pytest.raises(ValueError, match="0 prompts"):
        sl.kl_by_prompt(model, [], conditions)


def test_kl_by_prompt_does_not_depend_on_the_batch(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = tiny("llama")
    conditions = {"steered": wedding(model), "back": sl.Add(wedding(model), "back")}
    together = sl.kl_by_prompt(model, TEXTS, conditions)
    monkeypatch.setattr(sl.scoring, "_TOKENS_PER_BATCH", 1)
    alone = sl.kl_by_prompt(model, TEXTS, conditions)
    assert together.kl.tolist() == pytest.approx(alone.kl.tolist(), abs=1e-4)
    assert n_hooks(model) == 0


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3_text"])
def test_token_changes_are_log_probabilities_of_the_plain_model(
    tiny: Any, architecture: str
) -> None:
    model, plain = tiny(architecture)
    vector = wedding(model)
    frame = sl.token_changes(model, TEXTS, vector, skip_positions=3)
    for text in TEXTS:
        ids, rows = sl.encode(model, text), frame[frame.text == text]
        target = torch.tensor(ids[1:])[:, None]
        for column, steering in (("before", None), ("after", vector)):
            logits = plain_logits(model, plain, text, steering)[:-1].log_softmax(-1)
            expected = logits.gather(1, target)[:, 0]
            assert torch.allclose(torch.tensor(rows[column].values), expected, atol=1e-4)
        assert list(rows.position) == list(range(1, len(ids)))
        assert "".join(rows.token) == text
        assert list(rows.change.isna()) == [p <= 3 for p in rows.position]
    # The mean over the scored tokens is what perplexity is made of.
    surprisal = sl.perplexity(model, TEXTS, {"s": vector}, skip_positions=3).surprisal
    means = frame.dropna().groupby("text", sort=False).after.mean()
    assert (-means).tolist() == pytest.approx(surprisal.tolist(), abs=1e-4)


@pytest.mark.parametrize("bos", [True, False])
def test_a_prefix_stands_between_bos_and_text_and_is_not_scored(tiny: Any, bos: bool) -> None:
    model, plain = tiny("llama", bos)
    prefix = " wedding ."
    before = model.tokenizer(prefix, add_special_tokens=False)["input_ids"]
    result = sl.perplexity(model, TEXTS, {"plain": None}, skip_positions=2, prefix=prefix)
    without = sl.perplexity(model, TEXTS, {"plain": None}, skip_positions=2)
    assert result.n_tokens.tolist() == without.n_tokens.tolist()
    assert result.surprisal.tolist() != without.surprisal.tolist()
    for text, row in zip(TEXTS, result.itertuples(), strict=True):
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        start = [model.tokenizer.bos_token_id] if bos else []
        whole = [*start, *before, *ids]
        unscored = len(before) + 3
        labels = torch.tensor([[-100] * unscored + whole[unscored:]])
        with torch.no_grad():
            loss = plain(torch.tensor([whole]), labels=labels).loss
        assert row.surprisal == pytest.approx(float(loss), abs=1e-4)


# ---------------------------------------------------------------- inside the stream


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3_text"])
def test_relative_norms_against_hidden_states(tiny: Any, architecture: str) -> None:
    model, plain = tiny(architecture)
    vector = sl.SteeringVector.from_prompts(model, " wedding", " ", layer=range(4))
    frame = sl.relative_norms(model, TEXTS[0], vector)
    ids = torch.tensor([sl.encode(model, TEXTS[0])])
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
        sl.relative_norms(model, "I", sl.SteeringVector.from_prompts(model, TEXTS[0], layer=1))


@pytest.mark.parametrize("architecture", ["gpt2", "gptj", "gpt_neox", "llama", "gemma3_text"])
def test_logit_lens_of_the_stream(tiny: Any, architecture: str) -> None:
    model, plain = tiny(architecture)
    vector = wedding(model, 2)
    for condition in (None, vector):
        frame = sl.logit_lens(model, TEXTS[0], condition, top=3, watch="a")
        logits = plain_logits(model, plain, TEXTS[0], condition).log_softmax(-1)
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
    frame = sl.logit_lens(model, TEXTS[0], vector).set_index(["layer", "position"])
    ids = torch.tensor([sl.encode(model, TEXTS[0])])
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
