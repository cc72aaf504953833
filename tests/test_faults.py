"""Faults tried, and what happens: nothing that was finished is lost, no file is left broken, no
hook stays on a model, and whoever is at fault gets one sentence.

| fault | what happens | tested |
| --- | --- | --- |
| interrupt (SIGINT) in a sweep with ``cache=`` | KeyboardInterrupt; finished rows are kept, the next run does the rest; no hooks | here |
| interrupt in a sweep without ``cache=`` | KeyboardInterrupt; no hooks; the same call works again | here |
| interrupt while a panel runs | the panel says so; no hooks; the kernel goes on | lab/panels |
| interrupt of ``make figures`` between a figure and its numbers | both files whole | here |
| kill -9 during the conversion of a model | the next load clears what was left and converts | models/test_packaged |
| kill -9 during a sweep | finished shards are whole and used again | engine/test_store |
| kill -9 while a figure or its numbers are written | the old file stays whole; writing again works | here |
| disk full: figure, numbers, sweep cache, captured activations, vector, control vector | one sentence with the path; the old file stays, no half file | here |
| disk full: conversion of a model | one sentence with the space needed | models/test_packaged |
| read-only folder: the same six | one sentence with the path, for a sweep before any work is done | here |
| read-only folder: model cache | one sentence; a cache that is whole loads | models/test_packaged |
| a missing package: judges, sentencepiece, the sources of the claims | one sentence that says what to install | here |
| a backend that is not there (dask) | one sentence with those that are | here |
| a CSV that is cut off, or empty | one sentence with the path | lab/test_datasets, here |
| a damaged file in a sweep cache, or of activations | one sentence with the path: delete it | engine/test_store, test_files, here |
| a vector file that is a pickle, under any name | one sentence; nothing is unpickled | here |
| a vector file with wrong shapes, no metadata, NaN, foreign tensors | one sentence | test_vectors, here |
| a vector for another ``d_model``, or layers that are not there | one sentence | here |
| a script in prompts, completions, tokens, names, errors | shown as text in every panel and table | lab, here |
"""  # noqa: E501

from __future__ import annotations

import json
import os
import pickle
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import safetensors.torch
import torch
from conftest import n_hooks
from matplotlib import pyplot as plt
from PIL import Image

import steerlib as sl
from steerlib.engine import decode
from steerlib.lab import provenance, tables
from steerlib.models import packaged

ROOT = Path(__file__).parents[1]
EVIL = "<script>alert(1)</script>"
PROMPTS = ["I went up to my friend and said", "The ship left"]
RUN: dict[str, Any] = {"n_samples": 3, "max_new_tokens": 4, "progress": False}


def environment(**more: str) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, paths))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


def one_sentence(error: BaseException) -> str:
    """The message, which fits into a line and needs no traceback to be understood."""
    said = str(error)
    assert said and "\n" not in said and "Errno" not in said and "Traceback" not in said
    return said


# ---------------------------------------------------------------- interrupts

SWEEP = """
import json, signal, sys, time
import steerlib as sl
from steerlib.engine import decode
import test_faults as t
signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job ignores it
folder, cache, when = sys.argv[1], sys.argv[2] or None, int(sys.argv[3])
model = sl.load_model(folder, device="cpu")
sample, calls = decode.sample, []
def waiting(*args):
    calls.append(len(args[0]))
    if len(calls) == when:
        print("now", flush=True)
        time.sleep(60)
    return sample(*args)
decode.sample = waiting
try:
    t.sweep(model, cache)
except KeyboardInterrupt:
    print(json.dumps({"hooks": t.n_hooks(model), "calls": calls}), flush=True)
    when = calls.clear()  # no more waiting
    frame = t.sweep(model, cache)
    print(json.dumps({"rows": sum(calls), "frame": frame.to_json()}), flush=True)
"""


def sweep(model: Any, cache: Any = None) -> pd.DataFrame:
    """12 rows in batches of 2: a signal at the n-th token finds (n - 1) // 4 batches finished."""
    vector = sl.SteeringVector.from_prompts(model, " wedding", " ", layer=2)
    conditions = {"unsteered": None, "steered": 4 * vector}
    return sl.generate(model, PROMPTS, conditions, cache=cache, batch_size=2, **RUN)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.thorough
def test_an_interrupt_keeps_what_is_finished(tiny: Any, tmp_path: Path, kept: bool) -> None:
    model, _ = tiny("llama")
    cache, when = tmp_path / "cache", 4 * 3 + 2  # in the second token of the fourth batch
    with subprocess.Popen(
        [sys.executable, "-c", SWEEP, model.cfg.model_name, cache if kept else "", str(when)],
        env=environment(), stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGINT)
        interrupted, resumed = map(json.loads, process.stdout.read().splitlines())
    assert process.returncode == 0
    assert interrupted["hooks"] == 0 and len(interrupted["calls"]) == when
    stored = [json.loads(f.read_text()) for f in cache.glob("*.json")]
    done = 6 if kept else 0
    assert resumed["rows"] == 4 * (12 - done)  # tokens; no text ends by itself here
    assert sum(map(len, stored)) == (12 if kept else 0) and not list(tmp_path.rglob("*.part"))
    frame = pd.read_json(pd.io.common.StringIO(resumed["frame"]))
    whole = sweep(model)
    assert list(frame.completion) == list(whole.completion) and len(frame) == 12


def test_rows_that_ended_early_are_kept_too(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text that has ended in a batch that goes on is finished; the rows beside it are not."""
    model, _ = tiny("llama")
    (end,), sample, calls = decode.end_tokens(model), decode.sample, []

    def third(*args: Any) -> Any:
        calls.append(len(args[0]))
        chosen = sample(*args)
        if len(calls) == 2:
            chosen[0] = end
        if len(calls) == 3:
            raise KeyboardInterrupt
        return chosen

    monkeypatch.setattr(decode, "sample", third)
    with pytest.raises(KeyboardInterrupt):
        sl.generate(model, PROMPTS[0], cache=tmp_path, **RUN)
    assert calls == [3, 3, 2] and n_hooks(model) == 0
    (file,) = tmp_path.glob("*.json")
    ((tokens, _, stopped),) = json.loads(file.read_text()).values()
    assert len(tokens) == 1 and stopped


# ---------------------------------------------------------------- what is written


def vector(k: int = 1, d: int = 8) -> sl.SteeringVector:
    return sl.SteeringVector({2: torch.arange(1.0, 1 + k * d).reshape(k, d)}, "resid_post")


def figure(value: float) -> Any:
    made, ax = plt.subplots(figsize=(2, 2))
    ax.plot([0, value])
    plt.close(made)
    return made


def save_figure(folder: Path, model: Any, value: float = 1.0) -> None:
    os.environ["STEERLIB_FIGS"] = str(folder)
    try:
        data = pd.DataFrame({"value": [value] * 50})
        provenance.save_figure(figure(value), "01_picture", data)
    finally:
        del os.environ["STEERLIB_FIGS"]


# name -> (what writes into a folder, which of the files it is about)
WRITERS: dict[str, tuple[Callable[[Path, Any], Any], str]] = {
    "a figure": (save_figure, "*.png"),
    "the numbers of a figure": (save_figure, "*.csv"),
    "a sweep's rows": (lambda folder, model: sweep(model, folder), "*.json"),
    "activations": (
        lambda folder, model: sl.capture(model, PROMPTS, cache=folder),
        "*.safetensors",
    ),
    "a vector": (lambda folder, model: vector().save(folder / "v.safetensors"), "v.safetensors"),
    "a control vector": (lambda folder, model: vector().to_gguf(folder / "v.gguf"), "v.gguf"),
}


def no_space(tensors: Any, path: Path, *args: Any) -> None:
    path.write_bytes(b"half")
    raise safetensors.SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("what", WRITERS)
def test_a_full_disk(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The file that is written beside leads to a device on which no byte finds room.

    safetensors writes to a file of its own choice; what it raises then is made up here.
    """
    model, _ = tiny("llama")
    write, pattern = WRITERS[what]
    write(tmp_path, model)
    (path,) = tmp_path.glob(pattern)
    if what in ("a sweep's rows", "activations"):
        path.unlink()  # it would be read, not written
    old = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with monkeypatch.context() as patch, pytest.raises(OSError) as caught:
        if path.suffix == ".safetensors":
            patch.setattr(safetensors.torch, "save_file", no_space)
        else:
            (tmp_path / f".{path.name}.{os.getpid()}.part").symlink_to("/dev/full")
        write(tmp_path, model)
    assert one_sentence(caught.value) == f"{path} could not be written: the disk is full."
    assert set(tmp_path.iterdir()) == set(old)
    assert path.suffix == ".csv" or all(f.read_bytes() == old[f] for f in old)
    assert n_hooks(model) == 0
    write(tmp_path, model)
    assert path.exists()


@contextmanager
def read_only() -> Iterator[Path]:
    """A folder in which nobody may write; where the tests run as root, they are nobody here."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:  # below tmp_path, nobody may even look
        os.chmod(folder, 0o555)
        try:
            if root:
                os.seteuid(65534)
            yield Path(folder)
        finally:
            if root:
                os.seteuid(0)
            os.chmod(folder, 0o755)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="rights are another matter here")
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("what", WRITERS)
def test_a_read_only_folder(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, there: bool
) -> None:
    model, _ = tiny("llama")
    write, pattern = WRITERS[what]
    write(tmp_path, model)  # whatever is imported late is imported now
    run: list[Any] = []
    monkeypatch.setattr(decode, "run", lambda *args, **kwargs: run.append(args))
    with read_only() as folder:
        with pytest.raises(OSError) as caught:
            write(folder if there else folder / "below", model)
        assert not list(folder.iterdir()) and not run  # no work is done in vain
    said = one_sentence(caught.value)
    assert said.startswith(str(folder)) and "could not be written: permission denied" in said
    assert n_hooks(model) == 0


FIGURES = """
import os, signal, sys
from pathlib import Path
import test_faults as t
folder, when = Path(sys.argv[1]), sys.argv[2]
t.save_figure(folder, None, 1.0)
print("written", flush=True)
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
def half(kind, name):
    real = getattr(kind, name)
    def write(self, path, *args, **kwargs):
        real(self, path, *args, **kwargs)
        os.truncate(path, os.path.getsize(path) // 2)
        die()
    setattr(kind, name, write)
if when == "drawing":
    half(t.plt.Figure, "savefig")
elif when == "writing numbers":
    half(t.pd.DataFrame, "to_csv")
else:
    os.replace = die
t.save_figure(folder, None, 2.0)
"""


@pytest.mark.parametrize("when", ["drawing", "renaming", "writing numbers"])
@pytest.mark.thorough
def test_a_kill_while_a_figure_is_written(tmp_path: Path, when: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FIGURES, tmp_path, when],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL and done.stdout == "written\n", done.stderr
    assert list(tmp_path.glob(".*.part")), "it was not killed in the middle"
    with Image.open(tmp_path / "01_picture.png") as picture:
        picture.load()  # whole, down to the last line
    table = pd.read_csv(tmp_path / "01_picture.csv")
    assert table.value.tolist() == [1.0] * 50
    save_figure(tmp_path, None, 3.0)
    assert pd.read_csv(tmp_path / "01_picture.csv").value.tolist() == [3.0] * 50


def test_an_interrupt_between_a_figure_and_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_figure(tmp_path, None, 1.0)

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pd.DataFrame, "to_csv", interrupt)
        save_figure(tmp_path, None, 2.0)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["01_picture.csv", "01_picture.png"]


# ---------------------------------------------------------------- what is missing


def test_a_missing_backend(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import joblib

    monkeypatch.delitem(joblib.parallel.BACKENDS, "dask", raising=False)
    with pytest.raises(ValueError, match="Invalid backend: dask, expected one of") as caught:
        sl.generate(tiny("llama")[0], PROMPTS, backend="dask", **RUN)
    one_sentence(caught.value)


def test_a_missing_tokenizer_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("\nX requires the SentencePiece library.\nSee its page for more")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(ImportError, match=r"gemma3-270m .*SentencePiece.*steerlib\[gemma\]") as e:
        packaged._convert(packaged.MODELS["gemma3-270m"], tmp_path / "x.gguf", tmp_path)
    one_sentence(e.value)


def test_a_missing_source_of_the_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "countryinfo", None)
    monkeypatch.setattr(sys, "argv", ["make_claims.py", "--check"])
    with pytest.raises(SystemExit, match=r"package countryinfo.*steerlib\[honesty\]"):
        runpy.run_path(str(ROOT / "data/make_claims.py"), run_name="__main__")


@pytest.mark.parametrize("name", ["sentence_transformers", "openai"])
def test_a_missing_judge(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    judges = pytest.importorskip("steerlib.lab.judges")
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"steerlib\[judges\]") as caught:
        judges._package(name)
    assert name.replace("_", "-") in one_sentence(caught.value)


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("name", ["claims", "demonstrations", "misconceptions", "dilemmas"])
def test_a_table_cut_off_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    whole = (sl.datasets.folder() / f"{name}.csv").read_bytes()
    monkeypatch.setenv("STEERLIB_DATA", str(tmp_path))
    for size in range(0, len(whole) - 1, len(whole) // 50):
        if whole[:size].endswith(b"\n") and b"\n" in whole[: size - 1]:
            continue  # whole rows are a shorter table
        (tmp_path / f"{name}.csv").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"{name}\.csv is damaged"):
            sl.datasets.load(name)


def test_damaged_activations_are_named(tiny: Any, tmp_path: Path) -> None:
    model, _ = tiny("llama")
    sl.capture(model, PROMPTS, cache=tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{file.name} is damaged") as caught:
        sl.capture(model, PROMPTS, cache=tmp_path)
    one_sentence(caught.value)


class Trap:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


ABOUT = {"format": "steerlib.vector.1", "site": "resid_pre", "at": "front", "meta": "{}"}
ONE = {"layer.1": torch.ones(1, 8)}
NO_SITE = "does not say where in a block it acts: give site="  # may come from elsewhere
# what an untrusted file may hold -> what the sentence says
FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a pickle": (lambda p: p.write_bytes(pickle.dumps(Trap(p.parent / "mark"))), ""),
    "a torch file": (lambda p: torch.save({"layer.1": Trap(p.parent / "mark")}, p), ""),
    "no metadata": (lambda p: safetensors.torch.save_file(ONE, p), NO_SITE),
    "no site": (
        lambda p: safetensors.torch.save_file(ONE, p, {"format": ABOUT["format"], "meta": "{}"}),
        NO_SITE,
    ),
    "wrong shape": (
        lambda p: safetensors.torch.save_file({"layer.1": torch.ones(2, 2, 2)}, p, ABOUT),
        "same shape",
    ),
    "NaN": (
        lambda p: safetensors.torch.save_file({"layer.1": torch.full((1, 8), torch.nan)}, p, ABOUT),
        "NaN",
    ),
    "infinite": (
        lambda p: safetensors.torch.save_file({"layer.1": torch.full((1, 8), torch.inf)}, p, ABOUT),
        "infinite",
    ),
    "whole numbers for names": (
        lambda p: safetensors.torch.save_file({"layer.x": torch.ones(1, 8)}, p, ABOUT),
        "layer.x|'x'",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_an_untrusted_vector_file(tmp_path: Path, kind: str) -> None:
    write, words = FILES[kind]
    path = tmp_path / "v.safetensors"
    write(path)
    said = words if words == NO_SITE else f"is not a steering vector file: .*{words}"
    with pytest.raises(ValueError, match=f"v.safetensors {said}"):
        sl.SteeringVector.load(path)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("layers", "words"),
    [({1: torch.ones(1, 9)}, "d_model 9.*has 32"), ({9: torch.ones(1, 32)}, "layers 0 to 3")],
)
def test_a_vector_of_another_model(
    tiny: Any, tmp_path: Path, layers: dict[int, torch.Tensor], words: str
) -> None:
    model, _ = tiny("llama")
    sl.SteeringVector(layers).save(tmp_path / "v")
    foreign = sl.SteeringVector.load(tmp_path / "v")
    with pytest.raises(ValueError, match=words) as caught:
        sl.generate(model, PROMPTS, {"foreign": foreign}, **RUN)
    one_sentence(caught.value)
    shown = sl.panels.SteeringPanel(model, PROMPTS[0], vector=foreign, max_new_tokens=2)
    assert "d_model" in shown.output.value and "<table" not in shown.output.value


# ---------------------------------------------------------------- markup


def test_a_vector_file_with_markup_is_text_in_a_panel(tiny: Any, tmp_path: Path) -> None:
    """Its name is the one thing of a file from elsewhere that is shown."""
    model, _ = tiny("llama")
    made = sl.SteeringVector({1: torch.ones(1, 32)}, at="all", meta={"name": EVIL})
    made.save(tmp_path / "v")
    loaded = sl.SteeringVector.load(tmp_path / "v")
    shown = sl.panels.SteeringPanel(model, PROMPTS[0], vector=loaded, max_new_tokens=2)
    assert "<script" not in shown.output.value and "&lt;script&gt;" in shown.output.value


def test_markup_is_text_in_every_table() -> None:
    frame = pd.DataFrame(
        {"prompt": [EVIL], "condition": [EVIL], "sample": [0], "completion": [EVIL]}
    )
    tokens = pd.DataFrame(
        {"text": [EVIL], "token": [EVIL], "before": [-1.0], "after": [-2.0], "change": [-1.0]}
    )
    table = pd.DataFrame([[EVIL, "0", "+1", EVIL]], columns=["vector", "layer", "coefficient", "0"])
    for page in (tables.side_by_side(frame), tables.token_heatmap(tokens), tables.alignment(table)):
        assert "<script" not in page.data and "&lt;script&gt;" in page.data
