"""Finished rows on disk: what they depend on, and what an interruption leaves of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import mixture, noise

import steerlib as sl
from steerlib.engine import decode, generate
from steerlib.files import Store

PROMPTS = [
    "I love dogs",
    "I went up to my friend and said",
    "The ship left the harbour in the morning, and nobody knew when it would return",
    "Love and hate are words",
]
TESTS = Path(__file__).parents[1]
RUN: dict[str, Any] = {"n_samples": 3, "max_new_tokens": 6, "top_p": 0.8, "progress": False}


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
    Store(tmp_path).write("other", [["not", "a", "row"]])  # others keep their results here too
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
        "prefix": [sl.Prefix("Love. "), add],
        "prefix alone": sl.Prefix("Love. "),
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
from steerlib.engine import decode, generate
from steerlib.files import Store
import test_store as t
folder, cache = sys.argv[1:]
model = sl.load_model(folder, device="cpu")
generate._SHARD = 4
forward = decode.Passes.forward
def slow(*args, **kwargs):
    time.sleep(0.05)
    return forward(*args, **kwargs)
decode.Passes.forward = slow
print("begin", flush=True)
sl.generate(model, t.PROMPTS, t.mixture(model), cache=cache, **t.RUN)
print("end", flush=True)
"""


def environment() -> dict[str, str]:
    paths = [str(TESTS.parent), str(TESTS), str(TESTS / "engine"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(
    tiny: Any, decoded: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = tiny("llama")
    monkeypatch.setattr(generate, "_SHARD", 4)
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
from steerlib.engine.decode import Row, Sampling
from steerlib.engine.store import RowStore
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
            store = RowStore(folder, model, Sampling(), random.randrange(3), None)
            store.keep(rows, ["prompt"])
    time.sleep(random.uniform(0.002, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for file in folder.glob("*.json"):
        assert len(json.loads(file.read_text())) == 100
print(len(list(folder.glob("*.json"))), len(list(folder.glob("*.part"))))
stores = [RowStore(folder, model, Sampling(), seed, None) for seed in range(3)]
assert any(store.fill(rows, ["prompt"]) == [] for store in stores)
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
