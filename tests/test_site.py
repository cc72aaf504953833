"""The site: pages that `docs/pages.py` makes, and that built ones ask no other machine."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
REMOTE = re.compile(
    r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=\"(?:https?:)?//[^\"]*"
)


@pytest.fixture
def pages(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "EXECUTED", tmp_path / "executed")
    return module


def test_of_a_notebook_the_newer_copy_is_shown(pages, tmp_path):
    def write(path: Path, title: str, age: int) -> None:
        path.parent.mkdir(exist_ok=True)
        text = f"# {title}\n\n**Question.** Is p(a|b)\n`<y>`?\n\nMore."
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_markdown_cell(text)], metadata={"widgets": {"state": {}}}
        )
        nbformat.write(notebook, path)
        os.utime(path, (path.stat().st_mtime - age,) * 2)

    committed, executed, made = (tmp_path / n for n in ("notebooks", "executed", "made"))
    write(committed / "01_one.ipynb", "committed", age=10)
    write(executed / "01_one.ipynb", "executed", age=0)
    write(committed / "02_two.ipynb", "edited since", age=0)
    write(executed / "02_two.ipynb", "executed", age=10)
    write(committed / "app.ipynb", "no experiment", age=0)
    made.mkdir()
    pages.write_notebooks(made)

    assert {p.name for p in made.iterdir()} == {"01_one.ipynb", "02_two.ipynb", "index.md"}
    first = json.loads((made / "01_one.ipynb").read_text())
    assert first["cells"][0]["source"][0] == "# executed\n" and first["metadata"] == {}
    assert "edited since" in (made / "02_two.ipynb").read_text()
    index = (made / "index.md").read_text()
    assert r"| **[](02_two.ipynb)**<br>**Question.** Is p(a\|b) `<y>`? |" in index


def test_a_page_for_every_module(pages, tmp_path):
    pages.write_api(tmp_path)
    files = {p.relative_to(ROOT).with_suffix("") for p in (ROOT / "steerlib").rglob("*.py")}
    modules = {".".join(f.parts).removesuffix(".__init__") for f in files}
    public = {m for m in modules if "._" not in m}
    assert {p.stem for p in tmp_path.iterdir()} == public
    assert (
        "SteeringVector <steerlib.vectors.SteeringVector>`: For"
        in (tmp_path / "steerlib.rst").read_text()
    )


LINK = re.compile(r"<(?:a|img|link|script|source)\b[^>]*?\b(?:href|src)=\"([^\"]+)\"")


def broken(html: dict[Path, str]) -> list[str]:
    """Links within a site that lead to no file, or to no place in it."""
    places = {path: {"top", *re.findall(r"\bid=\"([^\"]+)\"", text)} for path, text in html.items()}
    found = []
    for path, text in html.items():
        for link in map(unescape, LINK.findall(text)):
            if re.match(r"[a-z]+:", link):  # another machine, or data in the page
                continue
            target, _, place = link.partition("#")
            file = (path.parent / unquote(target.partition("?")[0])).resolve() if target else path
            if not file.is_file() or (place and file in places and place not in places[file]):
                found.append(f"{path.name}: {link}")
    return found


def test_broken_links_are_found(tmp_path):
    page, other = tmp_path / "a.html", tmp_path / "b.html"
    other.write_text('<p id="here">')
    html = {
        page: '<a class="x" href="b.html#here"><a href="#top"><img src="c.png"><a href="b.html#no">'
        '<a href="https://d.org/e"><script src="b.html?v=1">',
        other: other.read_text(),
    }
    page.write_text(html[page])
    assert broken(html) == ["a.html: c.png", "a.html: b.html#no"]


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_no_other_machine(tmp_path):
    for path in ROOT.iterdir():
        if path.name not in ("build", "docs") and not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", "site"]
    run = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

    pages = [p for p in (tmp_path / "site").rglob("*.html") if "_static" not in p.parts]
    html = {p: p.read_text("utf-8") for p in pages}  # a template of the theme lies among the styles
    assert len(html) > len(list((ROOT / "notebooks").glob("[0-9]*.ipynb"))) + 7
    assert broken(html) == []
    assert not [match for text in html.values() for match in REMOTE.findall(text)]
    for css in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", css.read_text("utf-8"))
    glossary = (tmp_path / "site" / "glossary.html").read_text("utf-8")
    for (
        word
    ) in "stream position coefficient strength propensity matched-control verdict sink".split():
        assert f'id="{word}"' in glossary
    assert "propens" in (tmp_path / "site" / "searchindex.js").read_text("utf-8")
