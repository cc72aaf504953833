"""The decode loop: key-value cache, batches, seeds, first token, sampling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, adding, noise, positions, reference_logits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import steerlib as sl
from steerlib.engine import decode
from steerlib.engine.decode import Sampling, sample

PROMPTS = [
    "I love dogs",
    "I went up to my friend and said",
    "The ship left the harbour in the morning, and nobody knew when it would return",
]
PLACES: list[Any] = [
    "front", "middle", "back", "prompt", "generated", "all", [2], [-1], [9, 10], slice(-2, None),
]  # fmt: skip


def texts(frame: Any) -> dict[Any, str]:
    return frame.set_index(["prompt", "condition", "sample"]).completion.to_dict()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.usefixtures("way")
def test_cached_equals_uncached_under_every_intervention(tiny: Any, architecture: str) -> None:
    model, _ = tiny(architecture)
    conditions: dict[str, Any] = {
        f"add at {at}": sl.Add(noise(model, i % 4), at=at) for i, at in enumerate(PLACES)
    }
    conditions |= {f"ablate {at}": sl.Ablate(noise(model, 1), at=at) for at in PLACES[-6:]}
    conditions["control"] = None
    run = {"n_samples": 2, "max_new_tokens": 8, "top_p": 0.9, "progress": False}
    cached = sl.generate(model, PROMPTS, conditions, **run)
    plain = sl.generate(model, PROMPTS, conditions, use_cache=False, **run)
    # Flat random models turn on the last bit now and then, as rule 3 allows.
    assert (cached.completion == plain.completion).mean() >= 0.99
    assert cached.groupby("condition").completion.agg(tuple).nunique() > len(PLACES)


@pytest.mark.parametrize("at", ["generated", "all", "front", [-1], [8]])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.usefixtures("way")
def test_greedy_equals_a_hand_written_loop(tiny: Any, architecture: str, at: Any) -> None:
    """Independent truth: greedy decoding of the transformers model under a PyTorch hook."""
    model, plain = tiny(architecture)
    v = noise(model, 2)
    prompt = PROMPTS[1]
    ids = sl.encode(model, prompt)
    n = len(ids)
    where = positions(at, 1, n, n + 9)
    edits = [(2, "resid_pre", adding(v.layers[2], where))]
    new: list[int] = []
    while len(new) < 9:
        token = int(reference_logits(plain, ids + new, edits)[-1].argmax())
        if token == model.tokenizer.eos_token_id:
            break
        new.append(token)
    got = sl.generate(
        model, [prompt, PROMPTS[2]], {"x": sl.Add(v, at=at)}, n_samples=1, max_new_tokens=9,
        temperature=0, progress=False,
    )  # fmt: skip
    assert got.completion[0] == model.tokenizer.decode(new, skip_special_tokens=True)
    assert got.n_tokens[0] == len(new)


@pytest.mark.usefixtures("way")
def test_generated_covers_the_first_new_token(model: Any, plain_model: Any) -> None:
    """The last prompt position predicts the first new token; steering it must change that."""
    v = noise(model, 20, size=40)
    prompt = "The capital of France is"
    ids = sl.encode(model, prompt)
    edit = adding(v.layers[20], [len(ids) - 1])
    expected = int(reference_logits(plain_model, ids, [(20, "resid_pre", edit)])[-1].argmax())
    free = int(reference_logits(plain_model, ids, [])[-1].argmax())
    assert expected != free
    got = sl.generate(
        model, prompt, {"g": sl.Add(v, at="generated")}, 1, 1, temperature=0, progress=False
    )
    assert got.completion[0] == model.tokenizer.decode([expected])


@pytest.mark.slow
@pytest.mark.usefixtures("way")
def test_a_completion_depends_on_its_own_row_alone(model: Any) -> None:
    """Not on the batch, its size, the other prompts or the other conditions."""
    v = sl.SteeringVector.from_prompts(model, " wedding", " ", layer=3)
    conditions = {"control": None, "wedding": 4 * v, "late": sl.Add(-v, at=[1, 2])}
    run = {"n_samples": 3, "max_new_tokens": 12, "progress": False}
    together = texts(sl.generate(model, PROMPTS, conditions, **run))
    small = texts(sl.generate(model, PROMPTS, conditions, batch_size=5, **run))
    alone = {}
    for prompt in PROMPTS:
        for name, condition in conditions.items():
            alone |= texts(sl.generate(model, prompt, {name: condition}, **run))
    for other in (small, alone):
        assert np.mean([together[key] == other[key] for key in together]) >= 0.99
    reseeded = texts(sl.generate(model, PROMPTS, conditions, seed=1, **run))
    assert np.mean([together[key] == reseeded[key] for key in together]) < 0.5


HEADER = "You are a friend who answers in one word, please. "
SHARED: dict[str, tuple[list[str], Any, bool]] = {
    "untouched": ([HEADER + p for p in PROMPTS], None, True),
    "generated": ([HEADER + p for p in PROMPTS], "generated", True),
    "behind what is shared": ([HEADER + p for p in PROMPTS], [-2], True),
    "inside what is shared": ([HEADER + p for p in PROMPTS], [5], False),
    "everywhere": ([HEADER + p for p in PROMPTS], "all", False),
    "one prompt begins the other": ([HEADER[:-2], HEADER, HEADER + PROMPTS[2]], "generated", True),
    "nothing in common": (PROMPTS, None, False),
}


@pytest.mark.parametrize("case", SHARED)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.usefixtures("way")
def test_what_all_prompts_begin_with_runs_once(
    tiny: Any, architecture: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the transformers model under a hand-written hook, prompt by prompt."""
    model, plain = tiny(architecture)
    prompts, at, shared = SHARED[case]
    v = noise(model, 2)
    act = [] if at is None else [sl.Add(v, at=at)]
    filled: list[int] = []
    real = decode._begin
    monkeypatch.setattr(decode, "_begin", lambda *args: filled.append(real(*args)) or filled[-1])
    condition = None if at is None else act[0]
    rows = decode.make_rows(model, prompts, [None, condition], 1, Sampling(4), 0)
    ((_, logits),) = decode.first_logits(model, rows)
    if architecture not in ("gemma3_text", "mistral"):  # their sliding windows count columns
        assert (filled[0] > 0) == shared
    assert filled[0] < min(len(row.prompt_ids) for row in rows)
    for row, got in zip(rows, logits, strict=True):
        ids, edits = row.prompt_ids, []
        if row.condition:
            where = [] if at is None else positions(at, 1, len(ids), len(ids))
            edits = [(2, "resid_pre", adding(v.layers[2], where))]
        expected = reference_logits(plain, ids, edits)[-1]
        torch.testing.assert_close(got.float(), expected, atol=1e-4, rtol=1e-4)
    run = {"n_samples": 1, "max_new_tokens": 6, "temperature": 0, "progress": False}
    conditions = {"free": None, "x": condition}
    together = texts(sl.generate(model, prompts, conditions, **run))
    alone: dict[Any, str] = {}
    for prompt in prompts:
        alone |= texts(sl.generate(model, prompt, conditions, use_cache=False, **run))
    assert together == alone


def test_more_samples_and_tokens_keep_the_earlier_ones(tiny: Any) -> None:
    model, _ = tiny("llama")
    run = {"top_p": 0.9, "progress": False}
    few = sl.generate(model, PROMPTS[0], None, 2, 5, **run)
    many = sl.generate(model, PROMPTS[0], None, 6, 9, **run)
    for i in range(2):
        assert many.completion[i].startswith(few.completion[i])


@pytest.mark.usefixtures("way")
def test_rows_leave_when_they_end_and_stop(tiny: Any) -> None:
    model, _ = tiny("llama")
    free = sl.generate(model, PROMPTS, None, 8, 30, top_p=1.0, progress=False)
    assert free.stopped.any() and not free.stopped.all()  # both kinds occur in this test
    assert (free.n_tokens[~free.stopped] == 30).all()
    letter = "a"
    cut = sl.generate(model, PROMPTS, None, 8, 30, top_p=1.0, stop=letter, progress=False)
    for whole, part in zip(free.completion, cut.completion, strict=True):
        assert part == whole.split(letter)[0]
    called = sl.generate(
        model, PROMPTS, None, 8, 30, top_p=1.0, stop=lambda t: len(t) >= 3, progress=False
    )
    for whole, part in zip(free.completion, called.completion, strict=True):
        assert whole.startswith(part) and (len(part) >= 3 or part == whole)


def test_a_smaller_batch_after_running_out_of_memory(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = tiny("llama")
    expected = sl.generate(model, PROMPTS, None, 4, 6, progress=False)
    forward = decode.Passes.forward

    def tight(self: Any, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        if len(tokens) > 3:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return forward(self, tokens, *args, **kwargs)

    monkeypatch.setattr(decode.Passes, "forward", tight)
    assert sl.generate(model, PROMPTS, None, 4, 6, progress=False).equals(expected)


@given(st.lists(st.integers(0, 6), max_size=80))
def test_targets_of_similar_length_run_together(lengths: list[int]) -> None:
    groups = decode._by_length(lengths)
    rows = [i for _, which in groups for i in which]
    assert sorted(rows) == [i for i, n in enumerate(lengths) if n]
    for columns, which in groups:
        assert columns == max(lengths[i] for i in which)
    passes = sum(columns * len(which) for columns, which in groups)
    assert passes - sum(lengths) < 32 * 6  # what padding may cost: less than a pass each
    assert passes <= max(lengths, default=0) * len(rows)


# ---------------------------------------------------------------- sampling


def nucleus(scores: torch.Tensor, top_p: float) -> dict[int, float]:
    """Top-p by the book: sort all, keep tokens until the mass reaches top_p, renormalise."""
    p = scores.double().softmax(-1)
    order = p.argsort(descending=True)
    kept, mass = {}, 0.0
    for token in order.tolist():
        if mass >= top_p:
            break
        kept[token] = float(p[token])
        mass += kept[token]
    return {t: q / mass for t, q in kept.items()}


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("spread", [0.01, 3.0])  # 0.01: flat, so that the nucleus is wide
def test_sampling_follows_the_nucleus_distribution(top_p: float, spread: float) -> None:
    torch.manual_seed(0)
    scores = spread * torch.randn(1, 700)
    expected = nucleus(scores[0], top_p)
    n = 20_000
    draws = (torch.arange(n) + 0.5) / n  # a regular grid of draws: frequencies are exact to 1/n
    none = torch.zeros(n, 1, dtype=torch.long)
    tokens = sample(scores.expand(n, -1), draws, Sampling(1, 1.0, top_p, 0.0), none, none)
    found = torch.bincount(tokens, minlength=700) / n
    assert set(found.nonzero()[:, 0].tolist()) <= set(expected)
    for token, share in expected.items():
        assert abs(float(found[token]) - share) <= 1.5 / n


def test_frequency_penalty_and_temperature() -> None:
    logits = torch.tensor([[4.0, 3.0, 0.0], [4.0, 3.0, 0.0]])
    history = torch.tensor([[0, 0, 1], [0, 0, 2]])
    seen = torch.tensor([[1, 1, 1], [0, 0, 1]])  # the second row's zeros are padding
    draws = torch.tensor([0.99, 0.99])
    sharp = Sampling(1, 1.0, 0.01, 1.0)
    assert sample(logits, draws, sharp, history, seen).tolist() == [0, 0]  # 2 2 0 | 4 3 -1
    hard = Sampling(1, 1.0, 0.01, 1.5)
    assert sample(logits, draws, hard, history, seen).tolist() == [1, 0]  # 1 1.5 0 | ...
    cold = Sampling(1, 0.1, 0.01, 1.5)  # the penalty comes after the temperature
    assert sample(logits, draws, cold, history, seen).tolist() == [0, 0]
    assert sample(logits, draws, Sampling(1, 0.0), history, seen).tolist() == [0, 0]


# ---------------------------------------------------------------- any mixture

place = st.sampled_from(PLACES)
intervention = st.tuples(
    st.sampled_from(["add", "ablate"]),
    st.integers(0, 3),
    place,
    st.floats(-3, 3),
    st.integers(0, 5),
)
condition = st.lists(intervention, max_size=3)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.filterwarnings("ignore:Add at:UserWarning", "ignore:Ablate at:UserWarning")
@given(
    conditions=st.lists(condition, min_size=1, max_size=4),
    prompts=st.lists(st.sampled_from([*PROMPTS, "A", "Love and hate"]), min_size=1, unique=True),
    batch_size=st.integers(1, 9),
)
@pytest.mark.thorough
def test_any_mixture_equals_its_rows_alone(
    tiny: Any, conditions: list[Any], prompts: list[str], batch_size: int
) -> None:
    model, _ = tiny("llama")

    def build(parts: list[Any]) -> list[Any]:
        acts: list[Any] = []
        for kind, layer, at, coefficient, seed in parts:
            v = noise(model, layer, seed=seed)
            acts.append(sl.Add(v, at, coefficient) if kind == "add" else sl.Ablate(v, at))
        return acts

    named = {str(i): build(c) for i, c in enumerate(conditions)}
    run = {"n_samples": 2, "max_new_tokens": 6, "top_p": 0.8, "progress": False}
    mixed = texts(sl.generate(model, prompts, named, batch_size=batch_size, **run))
    for prompt in prompts:
        for name, acts in named.items():
            alone = texts(sl.generate(model, prompt, {name: acts}, use_cache=False, **run))
            # One row may turn on the last bit; a misplaced intervention moves all of them.
            assert any(mixed[key] == text for key, text in alone.items())


# ---------------------------------------------------------------- bfloat16


@pytest.mark.slow
def test_bfloat16_cached_equals_uncached(model: Any) -> None:
    """Kernels round differently by shape, so a few rows may turn; a misplaced vector turns all."""
    half = sl.load_model("smollm2-135m", dtype="bfloat16", device="cpu")
    v = sl.SteeringVector.from_prompts(half, " wedding", " ", layer=3)
    assert v.layers[3].dtype == torch.float32
    conditions = {"control": None, "wedding": 4 * v, "late": sl.Add(noise(half, 20), "generated")}
    run = {"n_samples": 4, "max_new_tokens": 8, "progress": False}
    cached = sl.generate(half, PROMPTS[:2], conditions, **run)
    plain = sl.generate(half, PROMPTS[:2], conditions, use_cache=False, **run)
    same = (cached.completion == plain.completion).mean()
    print(f"bfloat16: {same:.0%} of {len(cached)} rows are the same without the cache")
    assert same >= 0.9
    assert (cached.groupby("condition").n_tokens.mean() > 4).all()


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_prefix_is_generated_from_and_not_shown(tiny: Any, use_cache: bool) -> None:
    """Completions are those of the longer prompt; without it, those of the prompt alone."""
    model, _ = tiny("llama")
    prefix, last = "Love and hate. ", sl.Add(noise(model, 1, seed=4), "generated")
    run: dict[str, Any] = {
        "n_samples": 1,
        "max_new_tokens": 8,
        "temperature": 0,
        "progress": False,
        "use_cache": use_cache,
    }
    conditions = {"no": last, "yes": [sl.Prefix(prefix), last], "only": sl.Prefix(prefix)}
    table = sl.generate(model, PROMPTS, conditions, **run)
    assert sorted(set(table.prompt)) == sorted(PROMPTS)
    found = table.set_index(["prompt", "condition"]).tokens
    for prompt in PROMPTS:
        joined = sl.encode(model, prefix) + sl.encode(model, prompt)[1:]
        for name, condition in (("yes", last), ("only", None)):
            rows = decode.make_rows(model, [joined], [condition], 1, Sampling(8, 0.0), 0)
            decode.run(model, rows, Sampling(8, 0.0))
            assert found[prompt, name] == rows[0].new
        alone = sl.generate(model, prompt, {"no": last}, **run)
        assert found[prompt, "no"] == alone.tokens[0]
    assert (table.groupby("prompt").completion.nunique() > 1).all()
