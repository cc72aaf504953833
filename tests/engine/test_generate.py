"""Tables of completions: choices, projections while generating, other processes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, adding, mixture, n_hooks, noise, reference_logits, shapes_of

import steerlib as sl
from steerlib.engine import decode, generate

PROMPTS = [
    "I love dogs",
    "I went up to my friend and said",
    "The ship left the harbour in the morning, and nobody knew when it would return",
    "Love and hate are words",
]


def vector(model: Any, layer: int, k: int = 1, **about: Any) -> Any:
    return noise(model, layer, k, site="resid_post", **about)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of rows of every batch that the decode loop of this process runs."""
    counts: list[int] = []
    run = decode.run

    def counting(model: Any, rows: Any, *args: Any, **kwargs: Any) -> None:
        counts.append(len(rows))
        run(model, rows, *args, **kwargs)

    monkeypatch.setattr(decode, "run", counting)
    return counts


# ---------------------------------------------------------------- completions


@pytest.mark.usefixtures("way")
def test_zero_coefficient_gives_the_control(model: Any) -> None:
    v = vector(model, 3, 2)
    conditions = {"control": None, "zero": 0 * v, "Zero": sl.Add(v, coefficient=0)}
    frame = sl.generate(model, PROMPTS[1], conditions, 3, 12, progress=False)
    groups = frame.groupby("condition").completion.agg(list)
    assert groups["control"] == groups["zero"] == groups["Zero"]


@pytest.mark.usefixtures("way")
def test_hooks_never_leak(tiny: Any) -> None:
    model, _ = tiny("llama")
    v = vector(model, 1)

    def fail(text: str) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sl.generate(model, PROMPTS, {"x": v}, 2, 4, stop=fail, progress=False)
    assert n_hooks(model) == 0
    with pytest.raises(ValueError):
        sl.generate(model, PROMPTS, {"x": v, "y": sl.Add(vector(model, 1, 90))}, 2, 4)
    assert n_hooks(model) == 0
    broken = model.blocks[2].hook_in.add_hook  # an error in the middle of a forward pass

    class Boom(RuntimeError):
        pass

    def boom(x: Any, hook: Any) -> None:
        raise Boom

    broken(boom)
    try:
        with pytest.raises(Boom):
            sl.generate(model, PROMPTS, {"x": v}, 2, 4, progress=False)
        assert n_hooks(model) == 1  # the user's own stays, ours are gone
    finally:
        model.reset_hooks()
    sl.capture(model, PROMPTS, layers=[1])
    sl.perplexity(model, PROMPTS, {"x": v})
    assert n_hooks(model) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompts": ""}, "empty"),
        ({"prompts": []}, "0 prompts"),
        ({"prompts": ["a", "a"]}, "twice"),
        ({"prompts": "a", "conditions": {}}, "no condition"),
        ({"prompts": "a", "n_samples": 0}, "0 samples"),
        ({"prompts": "a", "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompts": "a", "top_p": 0.0}, "top_p"),
        ({"prompts": "a", "temperature": -1.0}, "temperature"),
        ({"prompts": "a", "temperature": math.nan}, "temperature"),
        ({"prompts": "a", "frequency_penalty": -1.0}, "frequency_penalty"),
        ({"prompts": 3}, "string"),
    ],
)
def test_bad_input_gets_a_sentence(tiny: Any, arguments: dict[str, Any], words: str) -> None:
    model, _ = tiny("llama")
    if not isinstance(arguments["prompts"], (str, list)):
        arguments = {**arguments, "prompts": [arguments["prompts"]]}
    with pytest.raises(ValueError, match=words):
        sl.generate(model, progress=False, **arguments)


# ---------------------------------------------------------------- answers only


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.usefixtures("way")
def test_choice_probabilities_equal_plain_transformers(tiny: Any, architecture: str) -> None:
    model, plain = tiny(architecture)
    options = ["a", "b", "c"]
    v, front = vector(model, 1), vector(model, 2, k=2)
    places: dict[str, Callable[[int], list[int]]] = {
        "generated": lambda n: [n - 1],
        "all": lambda n: list(range(n)),
        "front": lambda n: [0, 1],
    }
    conditions: dict[str, Any] = {
        at: sl.Add(front if at == "front" else v, at=at, coefficient=2) for at in places
    }
    conditions["unsteered"] = None
    got = sl.choice_probabilities(model, PROMPTS, options, conditions)
    assert list(got.columns) == ["prompt", "condition", *options, "total_probability"]
    assert list(zip(got.prompt, got.condition, strict=True)) == [
        (p, c) for p in PROMPTS for c in conditions
    ]
    tokens = [model.tokenizer(o, add_special_tokens=False)["input_ids"][0] for o in options]
    for _, row in got.iterrows():
        ids = sl.encode(model, row.prompt)
        edits = []
        if act := conditions[row.condition]:
            ((layer, tensor),) = act.vector.layers.items()
            where = places[row.condition](len(ids))
            edits = [(layer, "resid_post", adding(2 * tensor, where))]
        p = reference_logits(plain, ids, edits)[-1].softmax(-1)[tokens]
        np.testing.assert_allclose(row[options].to_numpy(float), p.numpy(), atol=1e-5)
        assert row.total_probability == pytest.approx(float(p.sum()), abs=1e-5)
    assert got.groupby("prompt").a.nunique().min() > 1  # the conditions do something


def test_a_prompt_runs_once_for_conditions_that_leave_it_alone(tiny: Any, way: str) -> None:
    model, _ = tiny("llama")
    longest = max(len(sl.encode(model, p)) for p in PROMPTS)
    conditions: dict[str, Any] = {
        str(c): sl.Add(vector(model, 1), at="generated", coefficient=c) for c in range(1, 20)
    }
    conditions |= {"last": sl.Ablate(vector(model, 2), at=[-1]), "unsteered": None, "zero": []}
    with shapes_of(model) as shapes:
        sl.choice_probabilities(model, PROMPTS, ["a", "b"], conditions)
    # All but the last token once per prompt, then one token per condition; two of them are none.
    assert shapes == [(len(PROMPTS), longest - 1), (len(PROMPTS) * (len(conditions) - 1), 1)]
    conditions["front"] = sl.Add(vector(model, 1), at="front")
    with shapes_of(model) as shapes:
        sl.choice_probabilities(model, PROMPTS, ["a", "b"], conditions)
    assert shapes[0] == (2 * len(PROMPTS), longest - 1)  # once more for the one that does not


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["a", "zq zq"], "'zq zq' is .* tokens"),
        (["a", ""], "continuation .. is empty"),
        (["a", "b", "a"], "different"),
        ([], "at least one"),
    ],
)
def test_options_are_different_single_tokens(tiny: Any, options: Any, words: str) -> None:
    model, _ = tiny("llama")
    with pytest.raises(ValueError, match=words):
        sl.choice_probabilities(model, PROMPTS, options)


# ---------------------------------------------------------------- reading along


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.usefixtures("way")
def test_capture_generation_reads_what_hooks_read(
    tiny: Any, architecture: str, steered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against hand-written hooks on the whole sequence; NaN before its start and after its end."""
    model, plain = tiny(architecture)
    tensors = {layer: vector(model, layer, seed=layer).layers[layer] for layer in (3, 0, 2)}
    directions = sl.SteeringVector(tensors, site="resid_post", at="generated")
    push = vector(model, 1, seed=9)
    condition = sl.Add(push, at="generated") if steered else None
    n_new, before = 6, 12
    run = {"max_new_tokens": n_new, "temperature": 0, "progress": False}

    def continuation(ids: list[int]) -> list[int]:
        ids = list(ids)
        for _ in range(n_new):
            where = list(range(n - 1, len(ids))) if steered else []
            edits = [(1, "resid_post", adding(push.layers[1], where))]
            ids.append(int(reference_logits(plain, ids, edits)[-1].argmax()))
        return ids

    expected = torch.full((len(PROMPTS), 3, before + n_new), float("nan"))
    ended = []
    for i, prompt in enumerate(PROMPTS):
        n = len(sl.encode(model, prompt))
        ids = continuation(sl.encode(model, prompt))
        if not ended:  # let the text of the first prompt end early, by calling a token its end
            ended = [ids[n + 3]]
        end = next((j for j in range(n, len(ids)) if ids[j] in ended), len(ids))
        where = list(range(n - 1, len(ids))) if steered else []
        for l, layer in enumerate(sorted(tensors)):
            unit = torch.nn.functional.normalize(tensors[layer][0], dim=0)
            read: list[torch.Tensor] = []

            def reading(stream: torch.Tensor, read: list[torch.Tensor] = read) -> torch.Tensor:
                read.append(stream)
                return stream

            steering = (1, "resid_post", adding(push.layers[1], where))
            edits = [steering, (layer, "resid_post", reading)]
            reference_logits(plain, ids, edits)
            along = read[0] @ unit
            for slot in range(before + n_new):
                if 0 <= slot - before + n < end:
                    expected[i, l, slot] = along[slot - before + n]
    monkeypatch.setattr(decode, "end_tokens", lambda model: set(ended))
    got = sl.capture_generation(model, PROMPTS, directions, n_new, before, condition)
    assert torch.equal(got.isnan(), expected.isnan())
    assert got[0, :, before:].isnan().any() and got[:, :, :before].isnan().any()
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4, equal_nan=True)
    texts = sl.generate(model, PROMPTS, {"x": condition}, 1, **run)
    lengths = (~got[:, 0, before:].isnan()).sum(-1)
    assert lengths.tolist() == texts.n_tokens.tolist()
    assert n_hooks(model) == 0


def test_capture_generation_equals_a_teacher_forced_capture(model: Any) -> None:
    prompts = ["I went up to my friend and said", "The capital of France is", "Once upon a time"]
    pairs = [("I am happy", "I am sad"), ("What a good day", "What a bad day")]
    directions = sl.SteeringVector.from_pairs(model, pairs, layers=[4, 20])
    run = {"max_new_tokens": 6, "prompt_positions": 2}
    got = sl.capture_generation(model, prompts, directions, **run)
    cosine = sl.capture_generation(model, prompts, directions, **run, cosine=True)
    frame = sl.generate(model, prompts, None, 1, 6, temperature=0, progress=False)
    checked = 0
    for i, (prompt, new) in enumerate(zip(prompts, frame.completion, strict=True)):
        n = len(sl.encode(model, prompt))
        if len(sl.encode(model, prompt + new)) != n + 6:
            continue  # the text does not give the same tokens when it is read again
        where = list(range(n - 2, n + 6))
        for l, layer in enumerate([4, 20]):
            site, unit = directions.site, directions.unit().layers[layer][0]
            stream = sl.capture(model, prompt + new, layers=layer, positions=where, site=site)
            torch.testing.assert_close(got[i, l], stream[0, 0] @ unit, atol=1e-3, rtol=1e-3)
            angle = torch.nn.functional.cosine_similarity(stream[0, 0], unit[None])
            torch.testing.assert_close(cosine[i, l], angle, atol=1e-3, rtol=1e-3)
            checked += 1
    assert checked >= 4


def test_capture_generation_wants_directions(tiny: Any) -> None:
    model, _ = tiny("llama")
    with pytest.raises(ValueError, match="one position"):
        sl.capture_generation(model, PROMPTS, vector(model, 1, k=2))
    with pytest.raises(ValueError, match="at least one"):
        sl.capture_generation(model, PROMPTS, [])
    with pytest.raises(ValueError, match="same layers"):
        sl.capture_generation(model, PROMPTS, [vector(model, 1), vector(model, 2)])


def test_capture_generation_reads_several_directions_in_one_run(tiny: Any) -> None:
    model, _ = tiny("llama")
    several = [vector(model, 1, seed=s) for s in range(3)]
    together = sl.capture_generation(model, PROMPTS, several, 4)
    alone = torch.stack([sl.capture_generation(model, PROMPTS, v, 4) for v in several], -1)
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5, equal_nan=True)


# ---------------------------------------------------------------- other processes

RUN: dict[str, Any] = {"n_samples": 3, "max_new_tokens": 6, "top_p": 0.8, "progress": False}


def loads(_: int = 0) -> tuple[int, int]:
    """In a worker: its process id, and how often it has loaded a model."""
    time.sleep(0.3)  # so that every worker gets one of these
    return os.getpid(), generate._worker_model.cache_info().misses


@pytest.fixture
def cluster() -> Iterator[Any]:
    from dask.distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as machines,
        Client(machines) as client,
    ):
        yield client


@pytest.mark.slow
def test_a_dask_cluster_gives_the_same_rows(
    tiny: Any, cluster: Any, monkeypatch: pytest.MonkeyPatch, decoded: list[int], tmp_path: Path
) -> None:
    model, _ = tiny("llama")
    monkeypatch.setattr(generate, "_SHARD", 4)
    expected = sl.generate(model, PROMPTS, mixture(model), **RUN)
    assert decoded
    decoded.clear()
    with joblib.parallel_config(backend="dask"):
        assert sl.generate(model, PROMPTS, mixture(model), **RUN).equals(expected)
        again = sl.generate(model, PROMPTS, mixture(model), cache=tmp_path, **RUN)
    assert again.equals(expected)
    assert decoded == []  # nothing ran here
    assert [n for _, n in cluster.run(loads).values()] == [1, 1]  # both worked, each loaded once
    # What they finished is kept like any other row.
    assert sl.generate(model, PROMPTS, mixture(model), cache=tmp_path, **RUN).equals(expected)
    assert sum(decoded) == 0


@pytest.mark.slow
def test_loky_processes_give_the_same_rows(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny("gpt2")
    monkeypatch.setattr(generate, "_SHARD", 5)
    expected = sl.generate(model, PROMPTS, mixture(model), **RUN)
    with joblib.parallel_config(backend="loky", n_jobs=2):
        assert sl.generate(model, PROMPTS, mixture(model), **RUN).equals(expected)
        assert sl.generate(model, PROMPTS, mixture(model), backend="loky", **RUN).equals(expected)
        workers = set(joblib.Parallel()(joblib.delayed(loads)(i) for i in range(6)))
    assert len({pid for pid, _ in workers}) == len(workers) <= 2
    assert all(n == 1 for _, n in workers)


def test_threads_are_refused(tiny: Any) -> None:
    model, _ = tiny("llama")
    with pytest.raises(ValueError, match="processes"):
        sl.generate(model, PROMPTS, backend="threading", **RUN)
    with (
        joblib.parallel_config(backend="threading", n_jobs=2),
        pytest.raises(ValueError, match="processes"),
    ):
        sl.generate(model, PROMPTS, **RUN)


def test_workers_need_a_name_to_load(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny("llama")
    monkeypatch.setattr(model.cfg, "steerlib_id", None)
    with pytest.raises(ValueError, match="load_model"):
        sl.generate(model, PROMPTS, backend="loky", **RUN)
    with pytest.raises(ValueError, match="load_model"):
        sl.generate(model, PROMPTS, cache="nowhere", **RUN)
    assert not Path("nowhere").exists()
