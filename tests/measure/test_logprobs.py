"""Log-probabilities of texts, completions and next tokens, each against its definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    ARCHITECTURES,
    adding,
    n_hooks,
    noise,
    plain_logits,
    positions,
    reference_logits,
    shapes_of,
)

import steerlib as sl
from steerlib.interventions import Slice, as_interventions
from steerlib.measure import logprobs

LONG = [
    "The ship left the harbour in the morning, and nobody knew when it would return.",
    "I love dogs",
    "I went up to my friend and said that the weather was fine.",
]
TEXTS = [
    "I went up to my friend and said",
    "The ship left the harbour in the morning",
    "a wedding is a party",
]


def wedding(model: Any, layer: int = 1, coefficient: float = 5) -> sl.SteeringVector:
    return coefficient * sl.SteeringVector.from_prompts(model, " wedding", " ", layer=layer)


# ---------------------------------------------------------------- how much the model leans

PROMPTS = ["I went up to my friend and said", "I love dogs", LONG[0]]
TARGETS = [" wedding", " a party and a wedding", "!"]
REFERENCES = [" rain", " the weather was fine today,"]


def leaning_conditions(model: Any, layer: int = 1) -> dict[str, Any]:
    post = {"site": "resid_post"}
    return {
        "unsteered": None,
        "front": noise(model, layer, 2),
        "back": sl.Add(noise(model, layer + 1, 2, **post), "back", -1.0),
        "generated": sl.Add(noise(model, layer, seed=1, **post), "generated"),
        "last": sl.Add(noise(model, layer, seed=2), [-1]),
        "later": sl.Add(noise(model, layer, seed=3), slice(-1, None)),
        "zeroed": sl.Ablate(noise(model, layer + 1)),
        "both": [noise(model, layer, 2), sl.Ablate(noise(model, layer), "generated")],
    }


def by_hand(act: Any, n: int, total: int) -> list[Any]:
    """Add and Ablate as edits of the plain model."""
    ((layer, tensor),) = act.vector.layers.items()
    at = slice(*act.at) if isinstance(act.at, Slice) else act.at
    where = positions(at, len(tensor), n, total)
    if isinstance(act, sl.Add):
        return [(layer, act.vector.site, adding(act.coefficient * tensor, where))]
    unit = tensor[0] / tensor[0].norm()

    def zero_out(stream: torch.Tensor) -> torch.Tensor:
        stream = stream.clone()
        stream[where] -= (stream[where] @ unit)[:, None] * unit
        return stream

    return [(layer, act.vector.site, zero_out)]


def logprob(model: Any, plain: Any, prompt: Any, text: str, condition: Any) -> float:
    """log p(text | prompt) by one pass of the plain model over both."""
    ids = sl.encode(model, prompt) if isinstance(prompt, str) else list(prompt)
    new = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    n, whole = len(ids), [*ids, *new]
    edits = [
        edit for act in as_interventions(condition, model) for edit in by_hand(act, n, len(whole))
    ]
    scores = reference_logits(plain, whole, edits)[n - 1 : -1].double().log_softmax(-1)
    return float(scores[range(len(new)), new].sum())


def check_propensity(
    model: Any, plain: Any, conditions: Any, prompts: Any, targets: Any, references: Any
) -> pd.DataFrame:
    table = sl.propensity(model, prompts, targets, references, conditions)
    assert [(p, c) for p, c in zip(table.prompt, table.condition, strict=True)] == [
        (p, c) for p in prompts for c in conditions
    ]
    for i, row in enumerate(table.itertuples()):
        found = []
        for side in (targets, references):
            texts = side if isinstance(side[0], str) else side[i // len(conditions)]
            scores = [
                logprob(model, plain, row.prompt, t, conditions[row.condition]) for t in texts
            ]
            found.append(math.log(sum(map(math.exp, scores)) / len(scores)))
        expected = (found[0] - found[1], *found)
        assert (row.propensity, row.target, row.reference) == pytest.approx(expected, abs=1e-3)
    return table


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.usefixtures("way")
@pytest.mark.thorough
def test_propensity_equals_plain_passes(tiny: Any, architecture: str) -> None:
    """One pass per prompt, continuation and condition; all of unequal length."""
    model, plain = tiny(architecture)
    conditions = leaning_conditions(model)
    table = check_propensity(model, plain, conditions, PROMPTS, TARGETS, REFERENCES)
    assert table.groupby("prompt").propensity.nunique().min() == len(conditions)
    assert n_hooks(model) == 0


@pytest.mark.usefixtures("way")
def test_propensity_on_the_real_model(model: Any, plain_model: Any) -> None:
    """With lists per prompt, and prompts that begin with the same words."""
    kept = ("unsteered", "front", "generated", "zeroed")
    conditions = {k: c for k, c in leaning_conditions(model, 6).items() if k in kept}
    prompts = [f"You are a friend, and {p}" for p in PROMPTS[:2]]
    targets = [[" wedding", " a party and a wedding"], ["!"]]
    references = [[" rain"], [" the weather was fine", " rain", " dog"]]
    table = check_propensity(model, plain_model, conditions, prompts, targets, references)
    assert table.propensity.nunique() == len(table)


def test_propensity_of_one_prompt_and_of_token_ids(tiny: Any) -> None:
    model, _ = tiny("llama")
    conditions = leaning_conditions(model)
    table = sl.propensity(model, PROMPTS, TARGETS, REFERENCES, conditions)
    one = sl.propensity(model, PROMPTS[0], TARGETS, REFERENCES, conditions)
    few = table[table.prompt == PROMPTS[0]].reset_index(drop=True)
    pd.testing.assert_frame_equal(one, few, atol=1e-4)
    ids = sl.propensity(
        model, [sl.encode(model, p) for p in PROMPTS], TARGETS, REFERENCES, conditions
    )
    assert ids.propensity.tolist() == pytest.approx(table.propensity.tolist(), abs=1e-4)


@pytest.mark.thorough
def test_propensity_does_not_depend_on_the_batch(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = tiny("gemma3_text")
    conditions = leaning_conditions(model)
    together = sl.propensity(model, PROMPTS, TARGETS, REFERENCES, conditions)
    monkeypatch.setattr(logprobs, "_BYTES_PER_BATCH", 1)
    alone = sl.propensity(model, PROMPTS, TARGETS, REFERENCES, conditions)
    assert alone.propensity.tolist() == pytest.approx(together.propensity.tolist(), abs=1e-4)


def test_prompts_run_once_for_all_continuations(tiny: Any, way: str) -> None:
    model, _ = tiny("llama")
    v = noise(model, 1)
    conditions = {str(c): sl.Add(v, "generated", c) for c in range(10)}
    texts = [" a", " b", " c", " d"]
    n = len(sl.encode(model, LONG[0]))
    behind = [len(model.tokenizer(t, add_special_tokens=False)["input_ids"]) - 1 for t in texts]
    for layer, times in ((0, 1), (3, len(conditions))):
        with shapes_of(model, layer) as shapes:
            sl.propensity(model, LONG[0], texts[:2], texts[2:], conditions)
        if way == "bridge":  # below the interventions, only native passes share
            times = len(conditions)
        ran = sum(rows * columns for rows, columns in shapes)
        assert ran == (n - 1) + times * (1 + sum(behind))


def test_continuation_table(tiny: Any) -> None:
    model, plain = tiny("llama")
    conditions = leaning_conditions(model)
    lists = [TARGETS, REFERENCES, [" dog"]]
    table = logprobs.continuation_table(model, PROMPTS, lists, conditions)
    assert list(table.columns) == ["prompt", "condition", "continuation", "logprob"]
    assert len(table) == len(conditions) * 6
    for row in table.itertuples():
        expected = logprob(model, plain, row.prompt, row.continuation, conditions[row.condition])
        assert row.logprob == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("I", ["a", "b"], ["c", "b"]), "'b' is a target and a reference"),
        ((["I", "a"], [["x"], ["b"]], [["y"], ["b", "z"]]), "'b' is a target and a reference"),
        (("I", [], ["c"]), "at least one text"),
        (("I", ["a"], []), "at least one text"),
        (("I", "a", ["b"]), "lists of at least one text"),
        ((["I", "a"], [["x"]], ["y"]), "one list of continuations, or 2"),
        ((["I", "a"], [["x"], []], ["y"]), "one list of continuations, or 2"),
        (("I", ["a"], [""]), "continuation '' is empty"),
        (([], ["a"], ["b"]), "no prompts"),
        (([""], ["a"], ["b"]), "prompt '' is empty"),
        (("I", ["a"], ["b"], {}), "no condition"),
        (("I", ["a"], ["b"], {"x": "love"}), "condition is"),
    ],
)
def test_bad_continuations_get_a_sentence(tiny: Any, arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sl.propensity(tiny("llama")[0], *arguments)


# ---------------------------------------------------------------- whole texts


def surprisal(logits: torch.Tensor, ids: list[int], skip: int) -> float:
    """Mean of -log p of each token given those before it, the first ``skip`` left out."""
    p = logits.double().softmax(-1)
    each = [-math.log(p[i, ids[i + 1]]) for i in range(len(ids) - 1)]
    return sum(each[skip:]) / len(each[skip:])


def test_perplexity_equals_the_loss_of_transformers(model: Any, plain_model: Any) -> None:
    frame = sl.perplexity(model, LONG, {"unsteered": None}, skip_positions=0)
    assert frame.text.tolist() == LONG
    for row in frame.itertuples():
        ids = torch.tensor([sl.encode(model, row.text)])
        with torch.no_grad():
            loss = float(plain_model(ids, labels=ids).loss)
        assert row.surprisal == pytest.approx(loss, abs=1e-4)
        assert row.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
        assert row.n_tokens == ids.shape[1] - 1


@pytest.mark.usefixtures("way")
def test_perplexity_under_steering_equals_a_hand_calculation(model: Any, plain_model: Any) -> None:
    v = 4 * sl.SteeringVector.from_prompts(model, " wedding", " ", layer=6)
    d = sl.SteeringVector({10: 3 * torch.ones(1, 576)}, "resid_post", "all")
    edits: dict[str, Any] = {
        "unsteered": [],
        "front": [(6, "resid_pre", adding(v.layers[6], [0, 1]))],
        "all": [(10, "resid_post", adding(d.layers[10], list(range(99))))],
    }
    frame = sl.perplexity(model, LONG, {"unsteered": None, "front": v, "all": d})
    assert frame.text.tolist() == [t for t in LONG for _ in edits]
    assert frame.condition.tolist() == list(edits) * len(LONG)
    for row in frame.itertuples():
        ids = sl.encode(model, row.text)
        logits = reference_logits(plain_model, ids, edits[row.condition])
        assert row.surprisal == pytest.approx(surprisal(logits, ids, skip=2), abs=1e-3)
        assert row.n_tokens == len(ids) - 3
    assert frame.groupby("text").surprisal.nunique().tolist() == [3, 3, 3]
    assert n_hooks(model) == 0


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3_text"])
@pytest.mark.usefixtures("way")
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


# ---------------------------------------------------------------- completions


def test_completion_surprisal_is_the_loss_of_the_completion_alone(tiny: Any) -> None:
    model, plain = tiny("llama")
    prompt, others = "I went up to my friend and said", ["The ship", "I love dogs"]
    frame = sl.generate(model, [prompt, *others], None, 3, 6, progress=False)
    frame.index += 7
    result = sl.completion_surprisal(model, frame)
    perplexities = result.groupby("row").surprisal.mean()
    for i, row in frame.iterrows():
        before = sl.encode(model, row.prompt)
        ids, start = [*before, *row.tokens], len(before)
        labels = torch.tensor([[-100] * start + ids[start:]])
        with torch.no_grad():
            loss = plain(torch.tensor([ids]), labels=labels).loss
        assert perplexities[i] == pytest.approx(float(loss), abs=1e-4)
        tokens = result[result.row == i]
        assert list(tokens.token_index) == list(range(len(ids) - start))
        assert list(tokens.token) == [model.tokenizer.decode([t]) for t in ids[start:]]


def test_completion_surprisal_under_a_condition_and_of_nothing(tiny: Any) -> None:
    model, _ = tiny("gpt2")
    texts = [("I love", " dogs"), ("I love", ""), ("I love", " dogs"), ("I", " love dogs")]
    frame = pd.DataFrame(texts, columns=["prompt", "completion"])
    with pytest.raises(ValueError, match="column tokens"):
        sl.completion_surprisal(model, frame)
    frame["tokens"] = [model.tokenizer(text)["input_ids"] if text else [] for _, text in texts]
    plain = sl.completion_surprisal(model, frame)
    assert set(plain.row) == {0, 2, 3}
    first, again = (plain[plain.row == r].surprisal.tolist() for r in (0, 2))
    assert first == again
    vector = sl.SteeringVector({1: torch.ones(1, model.cfg.d_model)})
    steered = sl.completion_surprisal(model, frame, sl.Add(vector, "all", 5))
    assert steered.surprisal.tolist() != plain.surprisal.tolist()
    assert sl.completion_surprisal(model, frame[1:2]).empty
    assert n_hooks(model) == 0


# ---------------------------------------------------------------- the next token


@pytest.mark.usefixtures("way")
def test_next_token_shift(model: Any, plain_model: Any) -> None:
    v = 4 * sl.SteeringVector.from_prompts(model, " wedding", " ", layer=6)
    prompt = "I went up to my friend and said"
    frame = sl.next_token_shift(model, prompt, v)
    ids = sl.encode(model, prompt)
    edit = (6, "resid_pre", adding(v.layers[6], [0, 1]))
    before, after = (
        reference_logits(plain_model, ids, edits)[-1].double().log_softmax(-1)
        for edits in ([], [edit])
    )
    assert frame.p_before.sum() == pytest.approx(1) and frame.p_after.sum() == pytest.approx(1)
    kl = torch.nn.functional.kl_div(before, after, log_target=True, reduction="sum")
    assert frame.kl_contribution.sum() == pytest.approx(float(kl), abs=1e-4) and kl > 0.1
    assert sorted(frame.token_id) == list(range(model.cfg.d_vocab))
    assert frame.kl_contribution.is_monotonic_decreasing
    ours = frame.set_index("token_id").sort_index()
    np.testing.assert_allclose(ours.p_before, before.exp(), atol=1e-5)
    np.testing.assert_allclose(ours.p_after, after.exp(), atol=1e-5)
    first = frame.iloc[0]
    assert first.token == model.tokenizer.decode([first.token_id])
    assert ours.token[model.tokenizer(" wedding").input_ids[-1]] == " wedding"


def test_no_condition_shifts_nothing(model: Any) -> None:
    frame = sl.next_token_shift(model, LONG[0], None)
    assert (frame.p_before == frame.p_after).all() and (frame.kl_contribution == 0).all()


def test_next_token_logprobs_are_those_of_next_token_shift(tiny: Any) -> None:
    model, _ = tiny("llama")
    steered = sl.Add(sl.SteeringVector({1: torch.ones(1, model.cfg.d_model)}), "back", 5)
    prompts = ["I went up to my friend and said", "The ship"]
    conditions = {"plain": None, "steered": steered}
    p = logprobs.next_token_logprobs(model, prompts, conditions).exp()
    assert p.shape == (2, 2, model.cfg.d_vocab)
    for prompt, (before, after) in zip(prompts, p, strict=True):
        shift = sl.next_token_shift(model, prompt, steered).sort_values("token_id")
        assert before.numpy() == pytest.approx(shift.p_before.to_numpy(), abs=1e-6)
        assert after.numpy() == pytest.approx(shift.p_after.to_numpy(), abs=1e-6)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.usefixtures("way")
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


def test_kl_by_prompt_does_not_depend_on_the_batch(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = tiny("llama")
    conditions = {"steered": wedding(model), "back": sl.Add(wedding(model), "back")}
    together = sl.kl_by_prompt(model, TEXTS, conditions)
    monkeypatch.setattr(logprobs, "_BYTES_PER_BATCH", 1)
    alone = sl.kl_by_prompt(model, TEXTS, conditions)
    assert together.kl.tolist() == pytest.approx(alone.kl.tolist(), abs=1e-4)
    assert n_hooks(model) == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: sl.perplexity(m, ["I"], {"x": None}), "'I' has 2 tokens.*at least 4"),
        (lambda m: sl.perplexity(m, ["fine", ""], {"x": None}, 0), "prompt '' is empty"),
        (lambda m: sl.perplexity(m, [], {"x": None}), "0 texts"),
        (lambda m: sl.perplexity(m, "I love dogs", {}), "no condition"),
        (lambda m: sl.perplexity(m, "I love dogs", {"x": None}, -1), "skip_positions=-1"),
        (lambda m: sl.next_token_shift(m, "", None), "prompt '' is empty"),
        (lambda m: sl.next_token_shift(m, "I", "love"), "condition is"),
        (lambda m: sl.kl_by_prompt(m, [], {"x": None}), "no prompts"),
        (lambda m: logprobs.next_token_logprobs(m, [], {"x": None}), "no prompts"),
    ],
)
def test_bad_input_gets_a_sentence(tiny: Any, call: Callable[[Any], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(tiny("llama")[0])


# ---------------------------------------------------------------- prompting, as a condition

BEFORE = "She asked why: "


def prefixed(model: Any, layer: int = 1) -> dict[str, tuple[str, Any]]:
    """name -> (text in front, condition): places count in the prefixed prompt."""
    last = sl.Add(noise(model, layer, seed=1), "generated")
    return {
        "unsteered": ("", None),
        "prefix": (BEFORE, None),
        "vector": ("", last),
        "both": (BEFORE, last),
        "front": (BEFORE, noise(model, layer, 2)),
        "other": ("Love, ", last),
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.thorough
def test_a_prefix_stands_between_bos_and_prompt(tiny: Any, architecture: str, bos: bool) -> None:
    """Vector, prefix and both in one sweep equal plain passes over the whole token ids."""
    model, plain = tiny(architecture, bos)
    cases = prefixed(model)
    conditions = {
        name: [sl.Prefix(text), condition] if text and condition is not None
        else sl.Prefix(text) if text else condition
        for name, (text, condition) in cases.items()
    }  # fmt: skip
    table = sl.propensity(model, PROMPTS, TARGETS, REFERENCES, conditions)
    kl = sl.kl_by_prompt(model, PROMPTS, conditions).set_index(["prompt", "condition"]).kl
    for row in table.itertuples():
        text, condition = cases[row.condition]
        cut = model.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        ids = sl.encode(model, row.prompt)
        first = int(ids[0] == model.tokenizer.bos_token_id)  # not every architecture gets one
        whole = [*ids[:first], *cut, *ids[first:]]
        sides = [
            [logprob(model, plain, whole, t, condition) for t in side]
            for side in (TARGETS, REFERENCES)
        ]
        found = [math.log(sum(map(math.exp, s)) / len(s)) for s in sides]
        assert row.propensity == pytest.approx(found[0] - found[1], abs=1e-3)
        edits = [e for a in as_interventions(condition, model) for e in by_hand(a, len(whole), 99)]
        after, before = (
            reference_logits(plain, i, e)[-1].double().log_softmax(-1)
            for i, e in ((whole, edits), (ids, []))
        )
        expected = float((after.exp() * (after - before)).sum())
        assert kl[row.prompt, row.condition] == pytest.approx(expected, abs=1e-3)
    assert table.groupby("prompt").propensity.nunique().min() == len(conditions)


def test_a_prefix_is_refused_where_prompts_stay_as_they_are(tiny: Any) -> None:
    model, _ = tiny("llama")
    with pytest.raises(ValueError, match="A Prefix changes the prompt"):
        sl.steered_logits(model, PROMPTS[0], sl.Prefix(BEFORE))
    with pytest.raises(ValueError, match="A Prefix changes the prompt"):
        sl.perplexity(model, LONG, {"prefix": [sl.Prefix(BEFORE)]})
