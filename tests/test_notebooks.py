"""Every notebook runs from top to bottom in the smoke preset, alone, and draws its figures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
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
    figures = {p.stem for p in (tmp_path / "figs").glob("*.png")}
    source = "\n".join(cell.source for cell in executed.cells)
    saved = set(re.findall(r'save_figure\([^"]*"(\w+)"', source))
    assert figures == saved and saved
    for stem in saved:
        assert stem.startswith(path.stem[:2]), "the number ties a figure to its notebook"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
def test_committed_with_outputs_and_in_the_form_all_share(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code), "run `make notebooks` and commit"
    text = "\n".join(cell.source for cell in notebook.cells)
    for part in ("**Question.**", "**What the source found", "ource vs here", "What follows"):
        assert part in text
    panels = [o for cell in code for o in cell.outputs if "widget-view+json" in str(o.get("data"))]
    assert panels, "a slider panel"
    assert "application/vnd.jupyter.widget-state+json" in notebook.metadata.get("widgets", {})


def test_readme_lists_every_notebook_and_only_figures_that_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in NOTEBOOKS:
        assert f"notebooks/{path.name}" in readme
    for figure in re.findall(r"\((figs/[^)]+)\)", readme):
        assert (ROOT / figure).is_file(), figure
