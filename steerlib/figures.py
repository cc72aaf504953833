"""Where figures came from: ``python -m steerlib.figures [file ...]`` prints what is in them."""

import json
import os
import sys
from pathlib import Path
from xml.etree import ElementTree

COLUMNS = ("notebook", "model", "dtype", "preset", "n", "seed", "commit")
DESCRIPTION = ".//{http://purl.org/dc/elements/1.1/}description"


def folder() -> Path:
    """Where figures go: ``STEERLIB_FIGS``, or else ``figs`` of the repository."""
    return Path(os.environ.get("STEERLIB_FIGS") or Path(__file__).parents[1] / "figs")


def origin(path: Path) -> dict[str, str]:
    """What `plots.save_figure` wrote into a figure; ValueError where there is nothing to read."""
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
