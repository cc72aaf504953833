"""Figures that say where they came from: `save_figure` writes it into them, and
``python -m steerlib.lab.provenance [file ...]`` prints what is in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from ..files import atomic_write
from ..models.loading import held_dtype

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]  # of the checkout
COLUMNS = ("notebook", "model", "dtype", "preset", "n", "seed", "commit")
# whose versions a figure names
PACKAGES = ("steerlib", "torch", "transformers", "transformer-lens", "numpy", "matplotlib")
DESCRIPTION = ".//{http://purl.org/dc/elements/1.1/}description"


def folder() -> Path:
    """Where figures go: ``STEERLIB_FIGS``, or else ``figs`` of the checkout; of the working folder,
    where the package is installed without one."""
    checkout = (ROOT / "pyproject.toml").is_file()
    return Path(os.environ.get("STEERLIB_FIGS") or (ROOT / "figs" if checkout else "figs"))


def save_figure(
    figure: Figure,
    name: str,
    data: pd.DataFrame | None = None,
    *,
    svg: bool = False,
    **origin: Any,
) -> Path:
    """Write ``<name>.png`` with its origin in the file's metadata, and its numbers as CSV beside.

    Args:
        name: begins with the notebook's number, such as ``01_sweep``.
        data: the numbers behind the figure.
        svg: write ``<name>.svg`` too. Also done where ``STEERLIB_SVG`` is set, and where there is
            one already, or it would show old numbers.
        origin: what made it: model, n, seed, ... Notebook, dtype of the model, preset, commit and
            versions are found out, unless they are given.

    Text too small for half a page's width is made larger (`plots.readable`). Figures go to the
    folder ``STEERLIB_FIGS``, by default ``figs`` of the repository.
    Files appear whole or not at all, and the same run writes the same bytes:
    ``python -m steerlib.lab.provenance`` prints the origin.
    """
    from matplotlib import pyplot as plt

    from . import plots

    place = folder()
    _clear_leftovers(place)
    plots.readable(figure)
    facts = {
        "notebook": _notebook(name),
        "dtype": held_dtype(str(origin.get("model"))) or "unknown",
        "preset": os.environ.get("PRESET", "quick"),
        **origin,
        "commit": _commit(),
        **{package: _version(package) for package in PACKAGES},
    }
    text = {"Title": name, "Software": "steerlib", **{k: str(v) for k, v in facts.items()}}
    png, more = place / f"{name}.png", place / f"{name}.svg"
    metadata: dict[Path, dict[str, str | None]] = {png: {**text}}
    if svg or os.environ.get("STEERLIB_SVG") or more.exists():
        description = json.dumps(text, ensure_ascii=False)
        metadata[more] = {"Title": name, "Description": description, "Date": None}
    with ExitStack() as files:  # all of them take their places at its end, or none does
        for path, about in metadata.items():
            part = files.enter_context(atomic_write(path))
            # without the salt an SVG names its parts at random
            with plt.rc_context({"svg.hashsalt": name}):
                dpi = plots.STYLE["savefig.dpi"]
                figure.savefig(part, format=path.suffix[1:], metadata=about, dpi=dpi)
        if data is not None:
            data.to_csv(files.enter_context(atomic_write(place / f"{name}.csv")), index=False)
    return png


def _clear_leftovers(place: Path) -> None:
    """Remove what a killed run left half-written; an hour is longer than any writing takes."""
    for part in place.glob(".*.part"):
        with suppress(OSError):  # another process may have done it
            if time.time() - part.lstat().st_mtime > 3600:
                part.unlink()


def _notebook(name: str) -> str:
    """The notebook that runs: Jupyter and make say which, elsewhere the figure's number does."""
    session = os.environ.get("JPY_SESSION_NAME", "")
    if session.endswith(".ipynb"):
        return Path(session).name
    pattern = f"{name.split('_')[0]}_*.ipynb"
    with suppress(OSError, StopIteration):  # not readable, or none of that number
        return next((ROOT / "notebooks").glob(pattern)).name
    return "unknown"


def _commit() -> str:
    """The commit that is checked out, and whether code or data differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with suppress(OSError, subprocess.CalledProcessError):
        if (ROOT / ".git").exists():  # or it is installed into a project with commits of its own
            head = git("rev-parse", "--short", "HEAD")
            changed = git("status", "--porcelain", "--", "steerlib", "data")
            return f"{head} with changes" if changed else head
    return "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


# ---------------------------------------------------------------- what is in them


def origin(path: Path) -> dict[str, str]:
    """What `save_figure` wrote into a figure; ValueError where there is nothing to read."""
    from PIL.PngImagePlugin import PngImageFile

    try:
        if path.suffix.lower() == ".svg":
            text = json.loads(ElementTree.parse(path).findtext(DESCRIPTION) or "{}")
        else:
            with PngImageFile(path) as image:
                text = dict(image.text)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (OSError, SyntaxError, ValueError):
        raise ValueError(f"{path} is neither a PNG nor an SVG, or it is damaged") from None
    if not isinstance(text, dict) or "commit" not in text:
        raise ValueError(f"{path} does not say where it came from: save_figure did not write it")
    return text


def main(names: list[str]) -> int:
    """Print the origin of these files, or a table of all figures; 1 if something has none."""
    paths = [Path(n) for n in names] or list(folder().glob("[0-9]*.[ps][nv]g"))
    table: list[tuple[str, ...]] = [("figure", *COLUMNS)]
    status = 0
    for path in sorted(paths):
        try:
            facts = origin(path)
        except ValueError as error:
            print(error, file=sys.stderr)
            status = 1
            continue
        table.append((path.name, *(facts.get(column, "–") for column in COLUMNS)))
        if names:
            print(*(f"{key}: {value}" for key, value in facts.items()), sep="\n")
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in [] if names else table:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
