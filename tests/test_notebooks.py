"""Every notebook runs from top to bottom in the smoke preset, alone, and draws its figures.

All have one form: question, answer, what the source found, verdicts; and no long cell."""

from __future__ import annotations

import ast
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest

from steerlib.lab import datasets, tables

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
JUDGED = ("00", "01", "02", "03", "04", "05", "06", "07", "08", "09", "10", "12", "13")
FORMED = (*JUDGED, "11")  # the one that sums up has that form, and no verdicts of its own

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])


def read(path: Path) -> tuple[Any, list[Any], str]:
    """The notebook, its code cells, and all that is written in it."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return notebook, code, "\n".join(cell.source for cell in notebook.cells)


@pytest.mark.slow
@each
def test_smoke_run(path: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PRESET": "smoke",
        "STEERLIB_FIGS": str(tmp_path / "figs"),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "JUPYTER_PLATFORM_DIRS": "1",
    }
    command = [
        sys.executable, "-m", "nbconvert", "--log-level=WARN", "--to", "notebook", "--execute",
        "--KernelManager.transport_encryption=auto", "--ExecutePreprocessor.kernel_name=python3",
        "--ExecutePreprocessor.startup_timeout=300", "--ExecutePreprocessor.timeout=600",
        "--output-dir", str(tmp_path), path.name,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=path.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    executed = nbformat.read(tmp_path / path.name, as_version=4)
    outputs = [o for cell in executed.cells for o in cell.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "error"]
    number = path.stem[:2]  # it ties a figure to its notebook
    figures = {p.stem for p in (tmp_path / "figs").glob("*.png")}
    assert figures and all(stem.startswith(f"{number}_") for stem in figures)
    for stem in figures:
        assert len(pd.read_csv(tmp_path / "figs" / f"{stem}.csv")), stem
    if number in JUDGED:
        judged = pd.read_csv(tmp_path / "figs" / f"{number}_claims.csv")
        assert set(judged.verdict) <= set(tables.VERDICTS)
    committed = {p.stem for p in (ROOT / "figs").glob(f"{number}_*.png")}
    assert figures == committed, "run `make figs`, and remove figures that nothing draws any more"


@each
def test_committed_with_outputs(path: Path) -> None:
    notebook, code, _ = read(path)
    assert all(cell.execution_count for cell in code), "run `make notebooks` and commit"
    panels = [o for cell in code for o in cell.outputs if "widget-view+json" in str(o.get("data"))]
    assert len(panels) == 1, "one slider panel"
    assert "application/vnd.jupyter.widget-state+json" in notebook.metadata.get("widgets", {})


@each
def test_all_have_one_form(path: Path) -> None:
    notebook, code, text = read(path)
    first = "\n".join(cell.source for cell in notebook.cells[:5])
    assert "**Question.**" in first
    if path.stem[:2] in FORMED:
        # under the title: written there at once, or filled in when the numbers are there
        assert "**Answer" in (text if "display_id=" in first else first)
        for part in ("**What the source", "hat was changed", "ource vs here"):
            assert part in text
        assert text.count("tables.source_vs_here(") == (path.stem[:2] in JUDGED)
    for old in ("first document", "second document", "recipe for", "mean_corr"):
        assert old not in text.lower()
    assert not re.search(r"\b(?:TODO|FIXME|WHATFOLLOWS|ANSWER)\b", text)


@each
def test_cells_are_short(path: Path) -> None:
    lengths = [len(cell.source.splitlines()) for cell in read(path)[1]]
    if path.stem[:2] in FORMED:
        assert statistics.median(lengths) <= 8 and max(lengths) <= 30, lengths


@each
def test_figures_are_shown_when_they_are_finished(path: Path) -> None:
    """A notebook shows what a cell has drawn: title and caption have to be in that cell too."""
    if path.stem[:2] in FORMED:
        drawn = [
            c
            for c in read(path)[1]
            if any("image/png" in o.get("data", {}) for o in c.outputs)
            and "Panel(" not in c.source  # a panel comes with a picture of itself
        ]
        assert [c.source[:60] for c in drawn if "save_figure(" not in c.source] == []
        assert all(
            len([o for o in c.outputs if "image/png" in o.get("data", {})]) == 1 for c in drawn
        )


def test_no_helper_is_defined_in_two_notebooks() -> None:
    """It belongs into the package, then."""
    where: dict[str, list[str]] = {}
    for path in NOTEBOOKS:
        for cell in read(path)[1]:
            lines = [line for line in cell.source.splitlines() if line[:1] not in "%!"]
            for node in ast.parse("\n".join(lines)).body:
                if isinstance(node, ast.FunctionDef):
                    body = "\n".join(map(ast.unparse, node.body[bool(ast.get_docstring(node)) :]))
                    where.setdefault(body, []).append(f"{path.stem}: {node.name}")
    assert [names for names in where.values() if len(names) > 1] == []


def test_every_claim_of_the_sources_has_its_notebook() -> None:
    numbers = datasets.load("source_claims").notebook.astype(str).str.zfill(2).str[:2]
    assert set(numbers) <= {path.stem[:2] for path in NOTEBOOKS}


def test_readme_lists_every_notebook_and_only_figures_that_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in NOTEBOOKS:
        assert f"notebooks/{path.name}" in readme
    for figure in re.findall(r"[(\"](figs/[^)\"]+)[)\"]", readme):
        assert (ROOT / figure).is_file(), figure
