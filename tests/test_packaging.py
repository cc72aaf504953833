"""What the files around the code say about it: they agree, and they hold on another machine."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()


def requirements() -> list[Requirement]:
    """Everything that pyproject.toml asks for, extras included."""
    extras = PROJECT["project"]["optional-dependencies"].values()
    lines = PROJECT["project"]["dependencies"] + [line for extra in extras for line in extra]
    return [Requirement(line) for line in lines]


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def peers() -> list[str]:
    return re.search(r"^PEERS := (.+)$", MAKEFILE, re.M)[1].split()


def pip_section() -> list[str]:
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    return next(entry["pip"] for entry in dependencies if isinstance(entry, dict))


# --- versions -------------------------------------------------------------------------------


def test_constraints_are_exact_and_name_each_package_once():
    inexact = [str(pin) for pin in pins() if not re.fullmatch(r"==[\w.]+", str(pin.specifier))]
    assert inexact == []
    names = [canonicalize_name(pin.name) for pin in pins()]
    assert sorted(names) == sorted(set(names))
    assert [pin.name for pin in pins() if pin.url] == []


def test_every_requirement_has_a_pin_that_satisfies_it():
    pinned = {canonicalize_name(pin.name): str(pin.specifier).strip("=") for pin in pins()}
    wanted = requirements() + [Requirement(peer) for peer in peers()]
    assert [str(r) for r in wanted if canonicalize_name(r.name) not in pinned] == []
    outside = [
        str(r) for r in wanted if not r.specifier.contains(pinned[canonicalize_name(r.name)])
    ]
    assert outside == []


def test_what_the_requirements_need_in_turn_is_pinned_too():
    pinned = {canonicalize_name(pin.name) for pin in pins()}
    # torch brings these on machines with a GPU, each at an exact version of its own choice
    from_torch = re.compile(r"nvidia-|cuda-|triton")
    seen, missing, queue = set(), {}, [(r, "pyproject.toml") for r in requirements()]
    while queue:
        wanted, by = queue.pop()
        name = canonicalize_name(wanted.name)
        if (name, frozenset(wanted.extras)) in seen or from_torch.match(name):
            continue
        seen.add((name, frozenset(wanted.extras)))
        if name not in pinned:
            missing[name] = by
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # of an extra that is not installed here
            continue
        for need in map(Requirement, needs):
            extras = wanted.extras or {""}
            if not need.marker or any(need.marker.evaluate({"extra": e}) for e in extras):
                queue.append((need, name))
    assert missing == {}


def test_conda_environment_installs_this_package_at_these_pins():
    assert pip_section()[:2] == ["-c constraints.txt", "-e .[dev]"]
    assert yaml.safe_load((ROOT / "environment.yml").read_text())["name"] == "steerlib"


def test_python_versions_agree():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    python = next(d for d in environment if isinstance(d, str) and d.startswith("python="))
    version = python.removeprefix("python=")
    assert PROJECT["project"]["requires-python"] == f">={version}"
    assert PROJECT["tool"]["mypy"]["python_version"] == version
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + version.replace(".", "")
    assert re.search(r"^PYTHON_MIN := (.+)$", MAKEFILE, re.M)[1] == version


# --- nothing of the machine it was written on -----------------------------------------------

# Written in pieces, so that this file does not name what it looks for.
FOLDERS = "|".join(["root", "work", "home", "Users", "opt", "srv", "mnt", "tmp"])
ELSEWHERE = [
    re.compile(rf"(?:^|[\s\"'`(=:,<\[])(?:/private)?/(?:{FOLDERS})/", re.M),
    re.compile("file:" + "//"),
    re.compile("(?:extra-)?index" + "-url|find" + "-links"),
    re.compile(r"\b(?:pypi|pythonhosted|anaconda|jfrog)\." + r"(?:org|com|io)\b"),
    re.compile(r"\b(?:artifactory|nexus|registry|mirror)s?\." + r"[\w-]+\.\w{2,}"),
]


def repository_files() -> list[Path]:
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard"]
    done = subprocess.run(git, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in done.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_no_file_names_a_folder_of_one_machine_or_a_package_index():
    found = []
    for path in repository_files():
        content = path.read_bytes()
        if b"\0" in content:
            continue
        text = content.decode(errors="replace").replace("\\n", "\n").replace('\\"', '"')
        for pattern in ELSEWHERE:
            for match in pattern.finditer(text):
                around = text[max(0, match.start() - 30) : match.end() + 30]
                found.append(f"{path.relative_to(ROOT)}: {around!r}")
    assert found == []


@pytest.mark.parametrize(
    ("text", "caught"),
    [
        ("see /ro" + "ot/x", True),
        ('"\n/wo' + 'rk/main"', True),
        ("fi" + "le:///x", True),
        ("a/home/b and https://x.org/work/y", False),
    ],
)
def test_the_patterns_catch_what_they_should(text, caught):
    assert any(pattern.search(text) for pattern in ELSEWHERE) == caught


# --- make -----------------------------------------------------------------------------------


def make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    settings = {"MAKEFLAGS", "MFLAGS", *re.findall(r"^(\w+) +\?=", MAKEFILE, re.M)}
    environment = {k: v for k, v in os.environ.items() if k not in settings}
    return subprocess.run(
        ["make", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_make_alone_lists_every_target():
    phony = set(re.search(r"^\.PHONY: (.+)$", MAKEFILE, re.M)[1].split()) - {"help", "FORCE"}
    listed = set(re.findall(r"^make (\S+)  ", make().stdout, re.M))
    assert listed == phony | {"figs/<name>.png"}


def test_make_says_what_is_wrong_with_its_settings(tmp_path):
    assert "choose one of smoke quick paper" in make("PRESET=huge").stderr
    done = make("setup", "PYTHON=no-such-python", f"VENV={tmp_path}/venv")
    assert "This needs Python 3.11 or newer" in done.stderr
    assert done.returncode


@pytest.fixture
def copy(tmp_path):
    """A checkout with one notebook and, instead of an environment, the interpreter of this one."""
    folder = tmp_path / "a checkout"
    for name in ("steerlib", "data", "notebooks", ".venv/bin"):
        (folder / name).mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "steerlib/__init__.py").touch()
    python = folder / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (folder / ".venv/.steerlib-base").touch()
    cells = [
        "import os, pathlib, ipywidgets\nfigs = pathlib.Path(os.environ['STEERLIB_FIGS'])",
        "ipywidgets.IntSlider(3)",
        "(figs / '07_line.png').write_text('a figure')",
        "assert 'MODEL' not in os.environ, 'no such model'; print(os.environ['PRESET'])",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nbformat.write(notebook, folder / "notebooks/07_test.ipynb")
    return folder


def test_make_runs_a_notebook_when_something_changed_and_only_then(copy):
    def ran(*arguments: str) -> bool:
        done = make(*arguments, cwd=copy)
        assert done.returncode == 0, done.stderr
        return "07_test: done" in done.stdout

    source = (copy / "notebooks/07_test.ipynb").read_text()
    assert ran("figs")
    assert (copy / "figs/07_line.png").read_text() == "a figure"
    assert (copy / "notebooks/07_test.ipynb").read_text() == source
    executed = nbformat.read(copy / "build/notebooks/07_test.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text == "quick\n"
    assert "application/vnd.jupyter.widget-state+json" in executed.metadata.widgets

    assert not ran("figs")
    assert not ran("figs/07_line.png")
    (copy / "figs/07_line.png").unlink()
    assert ran("figs/07_line.png")
    os.utime(copy / "steerlib/__init__.py")
    assert ran("figs")

    # a smoke run leaves figures and memory of the real one alone
    (copy / "figs/07_line.png").write_text("kept")
    assert ran("figs", "PRESET=smoke")
    assert (copy / "build/smoke-figs/07_line.png").read_text() == "a figure"
    assert (copy / "figs/07_line.png").read_text() == "kept"
    assert not ran("figs")

    assert not ran("notebooks")
    executed = nbformat.read(copy / "build/notebooks/07_test.ipynb", as_version=4)
    assert nbformat.read(copy / "notebooks/07_test.ipynb", as_version=4) == executed
    assert not ran("figs")


def test_make_fails_when_a_notebook_does_or_has_no_such_figure(copy):
    done = make("figs", "MODEL=x", cwd=copy)
    assert done.returncode and "AssertionError" in done.stderr and "no such model" in done.stderr
    assert not (copy / "build/07_test.done").exists()

    done = make("figs/07_other.png", cwd=copy)
    assert done.returncode
    assert "07_test makes no figs/07_other.png; it makes: figs/07_line.png" in done.stderr
    done = make("figs/08_line.png", cwd=copy)
    assert done.returncode and "No notebook makes figs/08_line.png" in done.stderr
