"""The house stands: arrows point down, private names stay in their module."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "steerlib").rglob("*.py"))


def test_import_contracts() -> None:
    """As `make lint` holds them."""
    command = [str(Path(sys.executable).with_name("lint-imports"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def private_uses(source: str, own: set[str]) -> list[str]:
    """Private names of other modules that a file imports or reaches for."""
    found = []
    tree = ast.parse(source)
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or "steerlib" in (node.module or "")):
            found += [a.name for a in node.names if a.name.startswith("_")]
            modules |= {a.asname or a.name for a in node.names if a.name.islower()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            if private and node.value.id in modules - own:
                found.append(f"{node.value.id}.{node.attr}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_private_names_stay_in_their_module(path: Path) -> None:
    assert private_uses(path.read_text(encoding="utf-8"), {"self", "cls"}) == []


def test_the_check_sees_private_names() -> None:
    assert private_uses("from .a import _b", set()) == ["_b"]
    assert private_uses("from . import plots\nplots._chip()", set()) == ["plots._chip"]
    assert private_uses("from . import plots\nplots.chip()", set()) == []


def test_every_module_has_its_tests() -> None:
    """`tests/` mirrors the rooms, a file per module; no test of a module stands elsewhere."""
    modules = [p.relative_to(ROOT / "steerlib") for p in FILES if p.name != "__init__.py"]
    wanted = {ROOT / "tests" / m.parent / f"test_{m.name}" for m in modules}
    assert sorted(wanted - set((ROOT / "tests").rglob("test_*.py"))) == []
    rooms = {p for p in (ROOT / "tests").rglob("test_*.py") if p.parent.name != "tests"}
    assert sorted(rooms - wanted) == []


def test_core_is_short() -> None:
    """What steering is can be read in an afternoon: without docstrings, comments, blank lines.

    A seventh of it are kinds of intervention (`operators`), which nothing else needs to know.
    """
    core = [p for p in FILES if p.parent.name == "steerlib"]
    assert len(core) <= 9
    assert sum(map(code_lines, core)) < 1800
    kinds = ROOT / "steerlib/operators.py"
    assert sum(map(code_lines, set(core) - {kinds})) < 1600


def code_lines(path: Path) -> int:
    """Lines of a file that hold code."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    strings: set[int] = set()
    for node in ast.walk(tree):
        first = node.body[0] if isinstance(node, documented) and node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            strings |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines = path.read_text(encoding="utf-8").splitlines()
    return sum(
        bool(text.strip()) and not text.strip().startswith("#") and n not in strings
        for n, text in enumerate(lines, 1)
    )
