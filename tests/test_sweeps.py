"""Answer-only sweeps, projections while generating, other processes, finished rows on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, adding, n_hooks, reference_logits

import steerlib as sl
from steerlib import generation, sweeps

PROMPTS = [
    "I love dogs",
    "I went up to my friend and said",
    "The ship left the harbour in the morning, and nobody knew when it would return",
    "Love and hate are words",
]
ROOT = Path(__file__).parents[1]


def vector(model: Any, layer: int, k: int = 1, size: float = 3, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    tensor = size * torch.randn(k, model.cfg.d_model, generator=generator)
    return sl.SteeringVector({layer: tensor}, site="resid_post", at="front")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of rows of every batch that the decode loop of this process runs."""
    counts: list[int] = []
    run = generation.run

    def counting(model: Any, rows: Any, *args: Any, **kwargs: Any) -> None:
        counts.append(len(rows))
        run(model, rows, *args, **kwargs)

    monkeypatch.setattr(generation, "run", counting)
    return counts


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[tuple[int, ...]]]:
    """``passes(model)`` -> a list that grows by the shape [row, column] of every forward pass."""

    def watch(model: Any) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []
        forward = type(model).forward

        def counting(self: Any, tokens: Any, *args: Any, **kwargs: Any) -> Any:
            shapes.append(tuple(tokens.shape))
            return forward(self, tokens, *args, **kwargs)

        monkeypatch.setattr(type(model), "forward", counting)
        return shapes

    return watch


# ---------------------------------------------------------------- answers only


@pytest.mark.parametrize("architecture", ARCHITECTURES)
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
    assert list(got.columns) == ["prompt", "condition", *options, "mass"]
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
        assert row.mass == pytest.approx(float(p.sum()), abs=1e-5)
    assert got.groupby("prompt").a.nunique().min() > 1  # the conditions do something


def test_a_prompt_runs_once_for_conditions_that_leave_it_alone(
    tiny: Any, passes: Callable[[Any], list[tuple[int, ...]]]
) -> None:
    model, _ = tiny("llama")
    longest = max(len(sl.encode(model, p)) for p in PROMPTS)
    conditions: dict[str, Any] = {
        str(c): sl.Add(vector(model, 1), at="generated", coefficient=c) for c in range(1, 20)
    }
    conditions |= {"last": sl.Ablate(vector(model, 2), at=[-1]), "unsteered": None, "zero": []}
    shapes = passes(model)
    sl.choice_probabilities(model, PROMPTS, ["a", "b"], conditions)
    # All but the last token once per prompt, then one token per condition; two of them are none.
    assert shapes == [(len(PROMPTS), longest - 1), (len(PROMPTS) * (len(conditions) - 1), 1)]
    shapes.clear()
    conditions["front"] = sl.Add(vector(model, 1), at="front")
    sl.choice_probabilities(model, PROMPTS, ["a", "b"], conditions)
    assert shapes[0] == (2 * len(PROMPTS), longest - 1)  # once more for the one that does not


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["a", "zq zq"], "'zq zq' is .* tokens"),
        (["a", ""], "0 tokens"),
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
    monkeypatch.setattr(generation, "end_tokens", lambda model: set(ended))
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


# ---------------------------------------------------------------- other processes

RUN: dict[str, Any] = {"n_samples": 3, "max_new_tokens": 6, "top_p": 0.8, "progress": False}


def mixture(model: Any) -> dict[str, Any]:
    return {
        "control": None,
        "add": sl.Add(vector(model, 1), at="generated"),
        "both": [vector(model, 2, k=2), sl.Ablate(vector(model, 0, seed=1), at="all")],
    }


def loads(_: int = 0) -> tuple[int, int]:
    """In a worker: its process id, and how often it has loaded a model."""
    time.sleep(0.3)  # so that every worker gets one of these
    return os.getpid(), sweeps._worker_model.cache_info().misses


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
    monkeypatch.setattr(sweeps, "_SHARD", 4)
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
    monkeypatch.setattr(sweeps, "_SHARD", 5)
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


# ---------------------------------------------------------------- finished rows on disk


def test_nothing_is_computed_twice(tiny: Any, decoded: list[int], tmp_path: Path) -> None:
    """Each thing that a completion depends on makes other rows; nothing else does."""
    model, _ = tiny("llama")
    conditions = mixture(model)
    n = len(PROMPTS) * RUN["n_samples"]  # per condition

    def run(prompts: Any = PROMPTS, named: Any = conditions, **changed: Any) -> tuple[Any, int]:
        decoded.clear()
        table = sl.generate(model, prompts, named, cache=tmp_path, **{**RUN, **changed})
        return table, sum(decoded)

    first, count = run()
    assert count == 3 * n
    assert first.equals(sl.generate(model, PROMPTS, conditions, **RUN))
    second, count = run()
    assert count == 0 and second.equals(first)
    # Another condition beside them, other names, another order: the old rows serve.
    more = {"new": vector(model, 3), **dict(reversed(conditions.items()))}
    table, count = run(named=more)
    assert count == n
    assert table.equals(sl.generate(model, PROMPTS, more, **RUN))
    assert run(n_samples=4)[1] == n  # one sample more: 3 conditions x 4 prompts
    assert run(prompts=PROMPTS[1:])[1] == run(named={"another name": None})[1] == 0
    assert run(batch_size=3)[1] == 0
    # What a completion does depend on.
    add = sl.Add(vector(model, 1), at="generated")
    others: dict[str, Any] = {
        "coefficient": sl.Add(add.vector, at="generated", coefficient=1.5),
        "place": sl.Add(add.vector, at="all"),
        "layer": sl.Add(vector(model, 2), at="generated"),
        "numbers": sl.Add(vector(model, 1, seed=5), at="generated"),
        "kind": sl.Ablate(add.vector, at="generated"),
        "twice": [add, add],
    }
    for name, act in others.items():
        assert run(named={name: act})[1] == n, name
    for changed in ({"seed": 1}, {"top_p": 0.7}, {"temperature": 0.5}, {"stop": "a"},
                    {"max_new_tokens": 5}, {"frequency_penalty": 0.0}):  # fmt: skip
        assert run(**changed)[1] == 3 * n, changed
    assert run(prompts=["Another prompt"])[1] == 3 * RUN["n_samples"]
    half = sl.load_model(model.cfg.model_name, dtype="bfloat16", device="cpu")
    decoded.clear()
    sl.generate(half, PROMPTS, {"control": None}, cache=tmp_path, **RUN)
    assert sum(decoded) == n
    assert run()[1] == 0


def test_a_damaged_file_is_named(tiny: Any, tmp_path: Path) -> None:
    model, _ = tiny("llama")
    sl.generate(model, PROMPTS, None, cache=tmp_path, **RUN)
    (file,) = tmp_path.glob("*.json")
    file.write_text(file.read_text()[:-20])
    with pytest.raises(ValueError, match=f"{file.name} is damaged .*delete it"):
        sl.generate(model, PROMPTS, None, cache=tmp_path, **RUN)


def test_a_stop_function_is_not_kept(tiny: Any, tmp_path: Path) -> None:
    model, _ = tiny("llama")
    with pytest.raises(ValueError, match="stop"):
        sl.generate(model, PROMPTS, None, cache=tmp_path, stop=lambda text: False, **RUN)


SLOW_SWEEP = """
import sys, time
import steerlib as sl
from steerlib import sweeps
import test_sweeps as t
folder, cache = sys.argv[1:]
model = sl.load_model(folder, device="cpu")
sweeps._SHARD = 4
forward = type(model).forward
def slow(*args, **kwargs):
    time.sleep(0.05)
    return forward(*args, **kwargs)
type(model).forward = slow
print("begin", flush=True)
sl.generate(model, t.PROMPTS, t.mixture(model), cache=cache, **t.RUN)
print("end", flush=True)
"""


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(
    tiny: Any, decoded: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = tiny("llama")
    monkeypatch.setattr(sweeps, "_SHARD", 4)
    cache = tmp_path / "cache"
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_SWEEP, model.cfg.model_name, cache],
        env=environment(), stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None and process.stdout.readline() == "begin\n"
            while len(list(cache.glob("*.json"))) < 3 and process.poll() is None:
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
        assert process.stdout.read() == ""  # it never came to its end
    assert process.returncode == -signal.SIGKILL
    kept = sum(len(json.loads(f.read_text())) for f in cache.glob("*.json"))
    total = len(PROMPTS) * 3 * RUN["n_samples"]
    assert 0 < kept < total
    resumed = sl.generate(model, PROMPTS, mixture(model), cache=cache, **RUN)
    assert sum(decoded) == total - kept
    assert resumed.equals(sl.generate(model, PROMPTS, mixture(model), **RUN))


WRITE_AND_DIE = """
import json, os, random, signal, sys, time
from pathlib import Path
from types import SimpleNamespace as Space
from steerlib.generation import Row, Sampling
from steerlib.sweeps import Store
folder = Path(sys.argv[1])
model = Space(cfg=Space(steerlib_id="x", model_name="x", dtype="float32"))
rows = [Row(0, 0, s, [], [], None, list(range(40)), "text " * 40) for s in range(100)]
def halting(path, text, encoding):
    with open(path, "w", encoding=encoding) as file:
        for half in (text[: len(text) // 2], text[len(text) // 2 :]):
            print(half, end="", file=file, flush=True)
            time.sleep(0.003)
Path.write_text = halting
for _ in range(25):
    child = os.fork()
    if child == 0:
        random.seed()
        while True:
            store = Store(folder, model, Sampling(), random.randrange(3), None)
            store.keep(rows, ["prompt"])
    time.sleep(random.uniform(0.002, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for file in folder.glob("*.json"):
        assert len(json.loads(file.read_text())) == 100
print(len(list(folder.glob("*.json"))), len(list(folder.glob("*.part"))))
assert any(Store(folder, model, Sampling(), s, None).fill(rows, ["prompt"]) == [] for s in range(3))
"""


@pytest.mark.slow
def test_a_kill_at_any_time_leaves_whole_files(tmp_path: Path) -> None:
    out = subprocess.run(
        [sys.executable, "-c", WRITE_AND_DIE, tmp_path],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    files, parts = map(int, out.stdout.split())
    assert files > 0 and parts > 0  # some of the kills did fall into the middle of a write


# ---------------------------------------------------------------- bfloat16


@pytest.mark.slow
def test_bfloat16_cached_equals_uncached(model: Any) -> None:
    """Kernels round differently by shape, so a few rows may turn; a misplaced vector turns all."""
    half = sl.load_model("smollm2-135m", dtype="bfloat16", device="cpu")
    v = sl.SteeringVector.from_prompts(half, " wedding", " ", layer=3)
    assert v.layers[3].dtype == torch.float32
    conditions = {"control": None, "wedding": 4 * v, "late": sl.Add(vector(half, 20), "generated")}
    run = {"n_samples": 4, "max_new_tokens": 8, "progress": False}
    cached = sl.generate(half, PROMPTS[:2], conditions, **run)
    plain = sl.generate(half, PROMPTS[:2], conditions, use_cache=False, **run)
    same = (cached.completion == plain.completion).mean()
    print(f"bfloat16: {same:.0%} of {len(cached)} rows are the same without the cache")
    assert same >= 0.9
    assert (cached.groupby("condition").n_tokens.mean() > 4).all()
