"""Settings of the site; `pages.py` beside this file makes what is not written by hand."""

import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util.inspect import signature as signature_of
from sphinx.util.inspect import stringify_signature
from sphinx.util.nodes import make_refnode

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import steerlib  # noqa: E402

project = "steerlib"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "pages"]

# Notebooks are shown as they were run. A widget shows what it held then: scripts that would move
# it come from a public network, and it has no kernel here.
nb_execution_mode = "off"
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_dmath_allow_space = False  # "$5 and $6" is no formula
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a notebook may begin with a small heading

# Docstrings: Google style, in the order of the source; one parameter a line where they are many.
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "ignore-module-all": True}
autodoc_preserve_defaults = True
napoleon_use_ivar = True
default_role = "py:obj"
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"

html_theme = "pydata_sphinx_theme"
html_title = "steerlib"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False
html_sidebars: dict[str, list[str]] = {
    page: []
    for page in (
        *("index", "using", "running", "operators", "glossary", "contributing"),
        *("search", "genindex", "py-modindex"),
    )
}
html_theme_options = {
    "navbar_align": "left",
    "header_links_before_dropdown": 7,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": [],
    "footer_end": ["sphinx-version"],
}


def inline(writer: Any, node: nodes.Element, display: str = "inline") -> None:
    """A formula as MathML, which browsers draw without a script."""
    writer.body.append(convert(node.astext(), display=display))
    raise nodes.SkipNode


def block(writer: Any, node: nodes.Element) -> None:
    """The same on a line of its own."""
    inline(writer, node, "block")


def signature(*event: Any) -> tuple[str | None, str | None]:
    """A default that a factory makes, in a form that can be parsed; what a widget really takes."""
    *_, kind, _, thing, _, arguments, returns = event
    if kind == "class" and (arguments or "").startswith("(*args: t.Any"):  # that of all widgets
        own = signature_of(thing.__init__, bound_method=True)
        arguments = stringify_signature(own, show_return_annotation=False)
    return arguments and arguments.replace("<factory>", "..."), returns


def skip(*event: Any) -> bool | None:
    """A field of a named tuple has nothing to say that its class does not."""
    thing = event[3]
    return True if str(thing.__doc__).startswith("Alias for field number") else None


def elsewhere(app: Sphinx, env: Any, node: Any, text: nodes.Node) -> nodes.Node | None:
    """A name of another module, without its module: public, or the only one of that name."""
    if node.get("refdomain") != "py":
        return None
    known, name = env.domains["py"].objects, node["reftarget"]
    public = f"steerlib.{steerlib._HOME.get(name)}.{name}"
    found = [public] if public in known else [k for k in known if k.endswith(f".{name}")]
    if len(found) != 1 or ("." not in name and known[found[0]].objtype in ("property", "method")):
        return None
    place = known[found[0]]
    return make_refnode(app.builder, node["refdoc"], place.docname, place.node_id, text, found[0])


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-skip-member", skip)
    app.connect("missing-reference", elsewhere)
