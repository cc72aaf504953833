"""Pages that are made, not written: modules, notebooks, CONTRIBUTING.md. Git ignores them."""

import inspect
import json
import os
import pkgutil
import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import steerlib

ROOT = Path(__file__).parents[1]
EXECUTED = ROOT / os.environ.get("EXECUTED", "build/notebooks")


def entry(role: str, label: str, target: str, thing: object) -> str:
    """A list item: a link, and the first paragraph of a docstring."""
    text = " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())
    return f"* :py:{role}:`{label} <{target}>`: {text}\n"


def write_api(folder: Path) -> None:
    """A page a module; a package lists its modules, and `steerlib` the public names besides."""
    found = sorted(pkgutil.walk_packages(steerlib.__path__, "steerlib."), key=lambda m: m.ispkg)
    names = ["steerlib", *(m.name for m in found if "._" not in m.name)]  # packages behind modules
    for name in names:
        page = f"{name}\n{'=' * len(name)}\n\n.. automodule:: {name}\n\n"
        if name == "steerlib":
            page += "Public names\n------------\n\n"
            for n in steerlib.__all__:
                thing = getattr(steerlib, n)
                if hasattr(thing, "__qualname__"):
                    page += entry("obj", n, f"{thing.__module__}.{thing.__qualname__}", thing)
                else:
                    page += entry("mod", n, thing.__name__, thing)
        if below := [n for n in names if n.rpartition(".")[0] == name]:
            page += "\nModules\n-------\n\n"
            page += "".join(entry("mod", n, n, import_module(n)) for n in below)
            page += "\n.. toctree::\n   :hidden:\n\n"
            page += "".join(f"   {n.rpartition('.')[2]} <{n}>\n" for n in below)
        (folder / f"{name}.rst").write_text(page, "utf-8")


def write_notebooks(folder: Path) -> None:
    """Of each notebook the newer copy, committed or executed; an index of questions and figures."""
    index = "# Notebooks\n\nAs they were run. Panels show what they held then: `make lab` and "
    index += "`make app` have live ones.\n\n| First figure | Notebook |\n| --- | --- |\n"
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        copies = [p for p in (path, EXECUTED / path.name) if p.exists()]
        newest = max(copies, key=lambda p: p.stat().st_mtime).read_text("utf-8")
        notebook = json.loads(newest.replace("](../", "](../../"))
        notebook["metadata"].pop("widgets", None)
        (folder / path.name).write_text(json.dumps(notebook), "utf-8")
        question = ["", *"".join(notebook["cells"][0]["source"]).split("\n\n"), ""][2]
        named = re.findall(rf"\b{path.name[:2]}_\w+", newest)
        drawn = [n for n in named if (ROOT / f"figs/{n}.png").exists()]
        picture = f"![](../../figs/{drawn[0]}.png)" if drawn else ""
        question = " ".join(question.replace("|", "\\|").split())
        index += f"| {picture} | **[]({path.name})**<br>{question} |\n"
    index += "\n```{toctree}\n:hidden:\n:glob:\n\n[0-9]*\n```\n"
    (folder / "index.md").write_text(index, "utf-8")


def links(app: Any, page: str, source: list[str]) -> None:
    """What leads to a file of the repository in docs/*.md leads to its page here."""
    if "/" not in page:
        source[0] = source[0].replace("](../notebooks/", "](notebooks/")
        source[0] = source[0].replace("](../CONTRIBUTING.md", "](contributing.md")


def setup(app: Any) -> None:
    """Make all of them anew: Sphinx calls this before it reads a page."""
    docs = Path(app.srcdir)
    for name, fill in (("api", write_api), ("notebooks", write_notebooks)):
        shutil.rmtree(docs / name, ignore_errors=True)
        (docs / name).mkdir()
        fill(docs / name)
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    files = re.sub(r"(?<!!)(\[[^]]*\]\()(?!https?:|#)", r"\1path:../", text)
    files = files.replace("](path:../docs/", "](")
    (docs / "contributing.md").write_text(files, "utf-8")
    app.connect("source-read", links)
