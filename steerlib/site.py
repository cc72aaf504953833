"""The notebooks as web pages: ``python -m steerlib.site <executed> <committed> <site>``, folders.

A page each, and an index with title, question and first picture. A notebook is taken from
``executed`` unless the one in ``committed`` is newer.
"""

from __future__ import annotations

import base64
import html
import re
import sys
from pathlib import Path
from typing import Any

INDEX = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>steerlib: the notebooks</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }}
ul {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(19em, 1fr)); gap: 1.2em;
  padding: 0; list-style: none }}
a {{ display: block; height: 100%; box-sizing: border-box; padding: 1em; border: 1px solid #ccc;
  border-radius: 6px; color: inherit; text-decoration: none }}
a:hover, a:focus {{ border-color: #0072b2 }}
img {{ width: 100%; height: 11em; object-fit: contain; background: #fff }}
h2 {{ font-size: 1.1em; margin: .6em 0 .3em }} p {{ margin: 0 }}
</style></head><body><h1>Activation steering: the notebooks</h1>
<p>Executed, to be read without running anything. Their sliders show the last state and do not
move: <code>make lab</code> and <code>make app</code> have live ones. Sliders and formulas are drawn
by scripts from public networks (CDN), so they need a connection; text and figures do not.</p>
<ul>{}</ul></body></html>
"""
CARD = '<li><a href="{}.html">{}<h2>{}</h2><p>{}</p></a></li>'


def _plain(markdown: str) -> str:
    """One line without Markdown's links, stars and backticks, for HTML."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(markdown.split()))
    return html.escape(re.sub(r"[*`]", "", text))


def _picture(notebook: Any) -> bytes | None:
    """The first picture among its outputs."""
    outputs = (o for cell in notebook.cells for o in cell.get("outputs", []))
    found = (o.data["image/png"] for o in outputs if "image/png" in o.get("data", {}))
    first = next(found, None)
    return None if first is None else base64.b64decode(first)


def main(executed: Path, committed: Path, site: Path) -> None:
    """Write the site, one line to the terminal per page."""
    import nbformat
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="lab")
    site.mkdir(parents=True, exist_ok=True)
    cards = []
    for path in sorted(committed.glob("[0-9][0-9]_*.ipynb")):
        copies = [p for p in (path, executed / path.name) if p.exists()]
        source = max(copies, key=lambda p: p.stat().st_mtime)
        notebook = nbformat.read(source, as_version=4)
        text = "\n\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
        title = re.search(r"^# (.+)$", text, re.M)
        question = re.search(r"^\*\*Question\.\*\*(.+?)(?:\n\n|\Z)", text, re.M | re.S)
        name = _plain(title[1]) if title else path.stem
        body, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": name}})
        body = re.sub(r'href="(\d\d_\w+)\.ipynb"', r'href="\1.html"', body)
        (site / f"{path.stem}.html").write_text(body, encoding="utf-8")
        picture = _picture(notebook)
        if picture is not None:
            (site / f"{path.stem}.png").write_bytes(picture)
        image = f'<img src="{path.stem}.png" alt="">' if picture is not None else ""
        cards.append(CARD.format(path.stem, image, name, _plain(question[1]) if question else ""))
        print(f"{site / path.stem}.html, from {source}")
    (site / "index.html").write_text(INDEX.format("\n".join(cards)), encoding="utf-8")
    print(f"open {site / 'index.html'}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
