"""The data that ships with this repository (`data/`, described in `data/README.md`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def folder() -> Path:
    """Where the data is: ``STEERLIB_DATA``, or ``data/`` of the checkout."""
    return Path(os.environ.get("STEERLIB_DATA") or Path(__file__).parents[1] / "data")


def load(name: str) -> pd.DataFrame:
    """A table of `data/` by name, such as ``demonstrations``; spaces and empty cells as written.

    Raises:
        ValueError: no such table, or the file is damaged (rows of different length).
    """
    import pandas as pd

    path = folder() / f"{name}.csv"
    if not path.is_file():
        known = sorted(p.stem for p in folder().glob("*.csv"))
        raise ValueError(f"There is no table {name!r} in {folder()}; there are {', '.join(known)}.")
    try:
        table = pd.read_csv(path, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    # A file cut off in the middle of a row leaves empty cells where numbers or text belong.
    if table.empty or path.read_bytes()[-1:] != b"\n":
        raise ValueError(f"{path} is damaged: it has no rows, or its last line is cut off.")
    return table


def words(name: str) -> list[str]:
    """A word list of `data/` by name, such as ``wedding`` for ``wedding_words.txt``.

    Raises:
        ValueError: no such list.
    """
    path = folder() / f"{name}_words.txt"
    if not path.is_file():
        known = sorted(p.stem.removesuffix("_words") for p in folder().glob("*_words.txt"))
        raise ValueError(f"There is no word list {name!r}; there are {', '.join(known)}.")
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def code_switches() -> list[tuple[str, str]]:
    """Pairs (sentence that starts in English and goes on in French, its English original).

    For every sentence of ``codeswitch`` and every i, the first i fragments are English and the
    rest French; the French vector is the sum of the activation additions of all pairs. Source:
    first document, comments on its demonstration 13.
    """
    pairs = []
    for _, fragments in load("codeswitch").groupby("sentence"):
        english, french = list(fragments.english), list(fragments.french)
        for i in range(len(english)):
            pairs.append((" ".join(english[:i] + french[i:]), " ".join(english)))
    return pairs
