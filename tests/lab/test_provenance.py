"""Files of figures: they say where they came from, and they appear whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from steerlib.lab import provenance

ROOT = Path(__file__).parents[2]
NUMBERS = pd.DataFrame({"layer": [2, 4, 6], "mean": [0.1, 1 / 3, 0.2]})


@pytest.fixture
def figs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STEERLIB_FIGS", str(tmp_path / "a folder" / "figs"))
    for name in ("JPY_SESSION_NAME", "STEERLIB_SVG", "PRESET"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "a folder" / "figs"


@pytest.fixture(autouse=True)
def closed() -> Any:
    yield
    plt.close("all")


def draw() -> Figure:
    figure, ax = plt.subplots(figsize=(6, 3.6))
    ax.plot(NUMBERS.layer, NUMBERS["mean"], marker="o", label="steered")
    ax.legend()
    return figure


def names(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir())


# ---------------------------------------------------------------- what a file says


def test_save_figure(figs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRESET", "smoke")
    path = provenance.save_figure(
        draw(), "01_sweep", NUMBERS, model="smollm2-135m", n=np.int64(24), seed=0
    )
    assert path == figs / "01_sweep.png"
    image = Image.open(path)
    expected = {
        "Title": "01_sweep",
        "Software": "steerlib",
        "notebook": "01_love_hate.ipynb",
        "model": "smollm2-135m",
        "n": "24",
        "seed": "0",
        "preset": "smoke",
        "numpy": np.__version__,
    }
    assert expected.items() <= image.text.items()
    assert {"steerlib", "torch", "transformers", "transformer-lens", "matplotlib"} < {*image.text}
    assert image.size == (1200, 720)  # 6 x 3.6 inches, at 200 dots per inch
    pd.testing.assert_frame_equal(pd.read_csv(figs / "01_sweep.csv"), NUMBERS)
    assert names(figs) == ["01_sweep.csv", "01_sweep.png"]
    provenance.save_figure(draw(), "02_bare")
    assert not (figs / "02_bare.csv").exists()


def test_a_figure_names_its_notebook(figs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def notebook(name: str, **origin: Any) -> str:
        return provenance.origin(provenance.save_figure(draw(), name, **origin))["notebook"]

    assert notebook("02_sweep") == "02_positions.ipynb"
    assert notebook("77_sweep") == "unknown"
    assert notebook("02_sweep", notebook="mine") == "mine"
    monkeypatch.setenv("JPY_SESSION_NAME", "/somewhere/scratch.ipynb")  # as Jupyter's server says
    assert notebook("02_sweep") == "scratch.ipynb"


def test_a_figure_names_the_dtype_its_model_is_loaded_in(figs: Path, tiny: Any) -> None:
    import torch

    import steerlib as sl

    loaded, _ = tiny("gpt2")
    name = loaded.cfg.model_name

    def dtype(model: str) -> str:
        return provenance.origin(provenance.save_figure(draw(), "01_a", model=model))["dtype"]

    (kind,) = {p.dtype for p in loaded.parameters()}
    assert dtype(name) == str(kind).removeprefix("torch.") == "float32"
    assert dtype("not loaded") == "unknown"
    second = sl.load_model(name, dtype="bfloat16", device="cpu")
    assert next(second.parameters()).dtype == torch.bfloat16
    assert dtype(name) == "unknown"  # it could have been either


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_figure_names_the_commit(
    figs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "checkout"
    for folder in ("steerlib", "data", "figs"):
        (root / folder).mkdir(parents=True)
        (root / folder / "a").write_text("1")
    monkeypatch.setattr(provenance, "ROOT", root)

    def commit() -> str:
        return provenance.origin(provenance.save_figure(draw(), "01_a"))["commit"]

    git(tmp_path, "init", "-q")  # of someone else, who installed this package somewhere inside
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "another project")
    assert commit() == "unknown"
    git(root, "init", "-q")
    assert commit() == "unknown"  # nothing is committed yet
    git(root, "add", ".")
    git(root, "commit", "-qm", "ours")
    head = git(root, "rev-parse", "--short", "HEAD")
    assert commit() == head
    (root / "figs" / "a").write_text("2")  # figures and notes do not change what is computed
    assert commit() == head
    (root / "data" / "a").write_text("2")
    assert commit() == f"{head} with changes"


def test_the_same_run_writes_the_same_bytes(figs: Path) -> None:
    def written() -> dict[str, bytes]:
        provenance.save_figure(draw(), "01_sweep", NUMBERS, svg=True, n=3)
        return {name: (figs / name).read_bytes() for name in names(figs)}

    first = written()
    assert first.keys() == {"01_sweep.csv", "01_sweep.png", "01_sweep.svg"}
    assert written() == first


def test_svg_on_request(figs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = provenance.save_figure(draw(), "01_sweep", note="− <b> & ␣wedding 'x'", n=3, svg=True)
    said = provenance.origin(path)
    assert said["note"] == "− <b> & ␣wedding 'x'" and said["n"] == "3"
    assert provenance.origin(path.with_suffix(".svg")) == said
    provenance.save_figure(draw(), "01_sweep", n=4)  # or it would stay behind, with old numbers
    assert provenance.origin(path.with_suffix(".svg"))["n"] == "4"
    provenance.save_figure(draw(), "01_other")
    assert not (figs / "01_other.svg").exists()
    monkeypatch.setenv("STEERLIB_SVG", "1")
    provenance.save_figure(draw(), "01_other")
    assert (figs / "01_other.svg").exists()


def test_figures_go_to_the_repository_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the program that draws them was started."""
    monkeypatch.delenv("STEERLIB_FIGS", raising=False)
    monkeypatch.chdir("/")
    assert provenance.folder() == ROOT / "figs"
    monkeypatch.setattr(provenance, "ROOT", Path("/"))  # installed: not among the packages
    assert provenance.folder() == Path("figs")


# ---------------------------------------------------------------- python -m steerlib.lab.provenance


def tell(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "steerlib.lab.provenance", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_origin_is_printed(figs: Path) -> None:
    path = provenance.save_figure(draw(), "01_sweep", model="smollm2-135m", n=24, svg=True)
    done = tell(str(path))
    assert done.returncode == 0
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert lines == Image.open(path).text and lines["n"] == "24"
    done = tell()
    header, *rows = (line.split() for line in done.stdout.splitlines())
    assert done.returncode == 0 and header[:3] == ["figure", "notebook", "model"]
    assert [row[:3] for row in rows] == [
        [f"01_sweep.{kind}", "01_love_hate.ipynb", "smollm2-135m"] for kind in ("png", "svg")
    ]


@pytest.mark.thorough
def test_what_has_no_origin_gets_one_sentence(figs: Path, tmp_path: Path) -> None:
    whole = provenance.save_figure(draw(), "01_sweep").read_bytes()
    Image.new("RGB", (2, 2)).save(tmp_path / "bare.png")
    (tmp_path / "cut.png").write_bytes(whole[:-1000])
    (tmp_path / "bare.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    (tmp_path / "list.svg").write_text(
        '<a xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:description>[1]</dc:description></a>'
    )
    (tmp_path / "text.svg").write_text("no")
    (tmp_path / "table.csv").write_text("a,b")
    for name, part in {
        "bare.png": "does not say where it came from",
        "cut.png": "neither a PNG nor an SVG, or it is damaged",
        "bare.svg": "does not say where it came from",
        "list.svg": "does not say where it came from",
        "text.svg": "neither a PNG nor an SVG, or it is damaged",
        "table.csv": "neither a PNG nor an SVG, or it is damaged",
        "missing.png": "there is no file",
        ".": "neither a PNG nor an SVG, or it is damaged",
    }.items():
        done = tell(str(tmp_path / name))
        assert (done.returncode, done.stdout) == (1, "")
        assert part in done.stderr and done.stderr.count("\n") == 1
    with pytest.raises(ValueError, match="there is no file"):
        provenance.origin(tmp_path / "missing.svg")


@pytest.mark.thorough
def test_printing_needs_no_torch() -> None:
    code = "import sys, steerlib.lab.provenance as p; p.main([]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_committed_figure_has_an_origin_and_its_numbers() -> None:
    for path in sorted((ROOT / "figs").glob("[0-9]*.png")):
        said = provenance.origin(path)
        assert said["preset"] == "quick" and said["Title"] == path.stem
        assert len(pd.read_csv(path.with_suffix(".csv")))


# ---------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize("broken", ["picture", "numbers", "renaming"])
def test_a_figure_appears_whole_or_not_at_all(
    figs: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    provenance.save_figure(draw(), "01_sweep", NUMBERS, svg=True)
    old = {name: (figs / name).read_bytes() for name in names(figs)}

    def half(self: Any, to: Path, *args: Any, **kwargs: Any) -> None:
        Path(to).write_bytes(b"half")
        raise KeyboardInterrupt

    target = {
        "picture": (Figure, "savefig"),
        "numbers": (pd.DataFrame, "to_csv"),
        "renaming": (os, "replace"),
    }[broken]
    monkeypatch.setattr(*target, half if broken != "renaming" else lambda *a: 1 / 0)
    with pytest.raises((KeyboardInterrupt, ZeroDivisionError)):
        provenance.save_figure(draw(), "01_sweep", NUMBERS.head(2), n=1)
    monkeypatch.undo()
    assert {name: (figs / name).read_bytes() for name in names(figs)} == old


def test_a_killed_run_leaves_the_old_figure_and_no_litter(figs: Path, tmp_path: Path) -> None:
    provenance.save_figure(draw(), "01_sweep", NUMBERS)
    old = {name: (figs / name).read_bytes() for name in names(figs)}
    script = """
import os, signal
from matplotlib.figure import Figure
from steerlib.lab import provenance
def half(self, to, **rest):
    open(to, "wb").write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
Figure.savefig = half
provenance.save_figure(Figure(), "01_sweep")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert {name: (figs / name).read_bytes() for name in old} == old
    (left,) = set(names(figs)) - set(old)
    ignored = subprocess.run(["git", "check-ignore", f"figs/{left}"], cwd=ROOT, capture_output=True)
    assert ignored.returncode in (0, 128)  # 128: this is no checkout

    provenance.save_figure(draw(), "01_sweep", NUMBERS)
    assert left in names(figs), "it may belong to a run that is still writing"
    hours_ago = (figs / left).stat().st_mtime - 2 * 3600
    os.utime(figs / left, (hours_ago, hours_ago))
    provenance.save_figure(draw(), "01_sweep", NUMBERS)
    assert names(figs) == sorted(old)
