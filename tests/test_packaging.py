"""What the files around the code say about it: they agree, and they hold on another machine."""

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import nbformat
import pandas as pd
import psutil
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


@pytest.mark.thorough
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


def make(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", *re.findall(r"^(\w+) +\?=", MAKEFILE, re.M)}
    environment = {k: v for k, v in os.environ.items() if k not in settings} | environment
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
    for part in ("base", "judges"):
        (folder / f".venv/.steerlib-{part}").touch()
    write_notebook(
        folder / "notebooks/07_test.ipynb",
        "import os, pathlib, ipywidgets\nfigs = pathlib.Path(os.environ['STEERLIB_FIGS'])",
        "ipywidgets.IntSlider(3)",
        "(figs / '07_line.png').write_text('a figure')",
        "assert 'MODEL' not in os.environ, 'no such model'; print(os.environ['PRESET'])",
    )
    return folder


def write_notebook(path: Path, *cells: str) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nbformat.write(notebook, path)


@pytest.mark.slow
def test_make_runs_a_notebook_when_something_changed_and_only_then(copy):
    def ran(*arguments: str) -> bool:
        done = make(*arguments, cwd=copy)
        assert done.returncode == 0, done.stderr
        return "07_test: running" in done.stdout and "done in" in done.stdout

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


@pytest.mark.slow
def test_make_fails_when_a_notebook_does_or_has_no_such_figure(copy):
    done = make("figs", "MODEL=x", cwd=copy)
    assert done.returncode and "AssertionError" in done.stderr and "no such model" in done.stderr
    assert not (copy / "build/07_test.done").exists()

    done = make("figs/07_other.png", cwd=copy)
    assert done.returncode
    assert "07_test makes no figs/07_other.png; it makes: figs/07_line.png" in done.stderr
    done = make("figs/08_line.png", cwd=copy)
    assert done.returncode and "No notebook makes figs/08_line.png" in done.stderr


def progress(output: str) -> list[str]:
    """What stood there while each notebook ran."""
    return [line.partition(" ... ")[0] for line in output.splitlines() if ": running" in line]


@pytest.mark.slow
def test_make_figs_says_how_far_it_is_goes_on_after_a_failure_and_names_it(copy):
    for name in ("05_bad", "08_bad"):
        write_notebook(copy / f"notebooks/{name}.ipynb", f"raise ValueError('{name} is broken')")
    done = make("figs", "AT_ONCE=1", "QUICK_SECONDS=05:265 07:120 08:120", cwd=copy)
    assert progress(done.stdout) == [  # by that table, as nothing has run here before
        "[1/3] 05_bad: running (PRESET=quick), about 8 min left",
        "[2/3] 07_test: running (PRESET=quick), about 4 min left",
        "[3/3] 08_bad: running (PRESET=quick), about 1 min left",  # at the pace of the second
    ]
    assert done.returncode and re.search(r"07_test: running .* \.\.\. done in \d+ s", done.stdout)
    assert "05_bad is broken" in done.stderr and "08_bad is broken" in done.stderr
    assert "failed: 05_bad 08_bad (the other figures are in figs/)" in done.stderr
    assert (copy / "figs/07_line.png").exists()

    # two at a time, and only those that are still to do; one of them is mended
    write_notebook(copy / "notebooks/08_bad.ipynb", "import time; time.sleep(1)")
    done = make("figs", "AT_ONCE=2", cwd=copy)
    assert done.returncode
    started = sorted(line[:14] for line in progress(done.stdout))  # at once, in either order
    assert started == ["[1/2] 08_bad: ", "[2/2] 05_bad: "]
    assert "08_bad: done" in done.stdout and "jobserver" not in done.stderr
    assert "failed: 05_bad (the other" in done.stderr

    # the last run's duration counts from then on; a single figure has no place in a plan
    (copy / "build/07_test.quick.seconds").write_text("600\n")
    (copy / "notebooks/05_bad.ipynb").unlink()
    os.utime(copy / "notebooks/07_test.ipynb")
    done = make("figs", "AT_ONCE=1", cwd=copy)
    assert progress(done.stdout) == ["[1/1] 07_test: running (PRESET=quick), about 10 min left"]
    assert done.returncode == 0 and int((copy / "build/07_test.quick.seconds").read_text()) < 600
    (copy / "figs/07_line.png").unlink()
    done = make("figs/07_line.png", cwd=copy)
    assert progress(done.stdout) == ["07_test: running (PRESET=quick)"]


@pytest.mark.slow
def test_make_figs_can_be_interrupted(copy):
    """Both notebooks stop, with what they started, and what was done stays."""
    for name in ("07_test", "05_other"):
        cell = f"import pathlib, time\npathlib.Path('../{name}').touch()\ntime.sleep(600)"
        write_notebook(copy / f"notebooks/{name}.ipynb", cell)
    running = subprocess.Popen(
        ["make", "figs", "AT_ONCE=2"], cwd=copy, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.time() + 240
    while not all((copy / name).exists() for name in ("07_test", "05_other")):
        assert time.time() < deadline and running.poll() is None
        time.sleep(0.2)
    os.killpg(running.pid, signal.SIGINT)
    assert running.wait(30)
    deadline = time.time() + 60
    while [p for p in psutil.process_iter() if str(copy) in " ".join(command_line(p))]:
        assert time.time() < deadline
        time.sleep(0.5)


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # gone meanwhile
        return []


@pytest.mark.slow
def test_the_notebook_that_sums_up_runs_behind_the_others_and_alone(copy):
    """Even if one of them fails; again when a table of claims is newer; and it fills the README."""
    figs = "import os, pathlib\nfigs = pathlib.Path(os.environ['STEERLIB_FIGS'])\n"
    write_notebook(copy / "notebooks/05_bad.ipynb", "raise ValueError('05_bad is broken')")
    write_notebook(copy / "notebooks/07_test.ipynb", f"{figs}(figs / '07_claims.csv').touch()")
    sums_up = f"{figs}(figs / '11_all.csv').write_text(str(sorted(figs.glob('*_claims.csv'))))"
    write_notebook(copy / "notebooks/11_all.ipynb", sums_up)
    (copy / "steerlib/lab").mkdir()
    writes = "from pathlib import Path\nimport sys\nPath(sys.argv[1]).write_text('filled')\n"
    (copy / "steerlib/lab/claims.py").write_text(writes)
    (copy / "figs").mkdir()

    def ran(*arguments: str) -> list[str]:
        done = make(*arguments, cwd=copy, PYTHONPATH=str(copy))
        return re.findall(r"(\d\d_\w+): running", done.stdout)

    assert ran("figs/11_all.csv") == ["11_all"] and ran("figs/11_all.csv") == []
    longest_first = ("AT_ONCE=1", "QUICK_SECONDS=07:9 05:8")
    assert ran("figs", *longest_first) == ["07_test", "05_bad", "11_all"]
    assert "07_claims" in (copy / "figs/11_all.csv").read_text()
    assert not (copy / "README.md").exists()  # something failed
    (copy / "notebooks/05_bad.ipynb").unlink()
    assert ran("figs") == [] and (copy / "README.md").read_text() == "filled"
    time.sleep(0.01)
    (copy / "figs/07_claims.csv").touch()
    assert ran("figs") == ["11_all"] and ran("figs") == []
    (copy / "README.md").unlink()
    assert ran("figs", "PRESET=smoke") == ["07_test", "11_all"]
    assert not (copy / "README.md").exists()  # a smoke run's numbers mean nothing


def test_make_hands_its_settings_on(copy):
    """Whether they are given as arguments or come from the environment."""
    for done in (
        make("-n", "figs", "PRESET=smoke", "MODEL=a", "SVG=1", cwd=copy),
        make("-n", "figs", cwd=copy, PRESET="smoke", MODEL="a", SVG="1"),
    ):
        assert done.returncode == 0 and "nbconvert" in done.stdout
        for part in ("PRESET=smoke", "MODEL='a'", "STEERLIB_SVG=1", "build/smoke-figs"):
            assert part in done.stdout
        assert "PRESET=quick" not in done.stdout
    assert not (copy / "figs").exists()


def test_figures_with_svgs_count_where_none_are_asked_for(copy):
    def todo(*arguments: str) -> bool:
        return "nbconvert" in make("-n", "figs", *arguments, cwd=copy).stdout

    (copy / "build").mkdir()
    for settings, plain, svg in (
        ("PRESET=quick MODEL= FIGS=figs", False, True),
        ("PRESET=quick MODEL= FIGS=figs SVG=1", False, False),
        ("PRESET=paper MODEL= FIGS=figs SVG=1", True, True),
    ):
        (copy / "build/07_test.done").write_text(settings + "\n")
        assert (todo(), todo("SVG=1")) == (plain, svg)


def test_every_notebook_has_an_estimate():
    timed = dict(
        entry.split(":")
        for entry in re.search(r"^QUICK_SECONDS := (.+)$", MAKEFILE, re.M)[1].split()
    )
    numbers = {path.name[:2] for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")}
    assert numbers <= set(timed) and all(int(seconds) for seconds in timed.values())


def test_browser_tests_run_in_a_target_of_their_own():
    import test_browser

    assert test_browser.pytestmark.name == "browser"
    for target, marker in (("test", "'not browser'"), ("test-browser", "browser")):
        assert make("-n", target).stdout.strip().endswith(f" -m {marker}")


def test_markers_are_known_and_check_runs_the_fast_tests():
    known = {line.split(":")[0] for line in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    assert known == {"browser", "slow", "thorough"}
    recipe = make("-n", "check").stdout.strip()
    assert recipe.endswith("-m 'not browser and not slow and not thorough'") and "ruff" in recipe


# --- the wheel ------------------------------------------------------------------------------

INSTALLED = """
import json, sys
import steerlib as sl
from steerlib.lab import provenance

exec(sys.stdin.read())
data = sl.datasets.folder()
names = [p.stem for p in data.glob("*.csv")]
json.dump(
    {
        "modules": sorted({m.__file__ for n, m in sys.modules.items()
                           if n.split(".")[0] == "steerlib" and getattr(m, "__file__", None)}),
        "data": str(data),
        "rows": {name: len(sl.datasets.load(name)) for name in names},
        "words": sl.datasets.words("wedding"),
        "layer": int(sl.settings.vector_settings("5", model).layer),
        "demonstrations": sl.demonstrations.names(),
        "figures": str(provenance.folder()),
        "prompts": leaning.prompt.nunique(),
        "families": sorted(map(str, leaning.family.unique())),
    },
    open("said.json", "w"),
)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of what git has, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    copied = shutil.ignore_patterns("__pycache__", ".*")
    for name in ("steerlib", "data"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=copied)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder / "source"]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_the_package_and_its_data(wheel):
    with zipfile.ZipFile(wheel) as archive:
        inside = {name: archive.read(name) for name in archive.namelist()}
    for folder, place in (("steerlib", "steerlib"), ("data", "steerlib/_data")):
        for path in (ROOT / folder).rglob("*"):
            parts = path.relative_to(ROOT / folder).parts
            if path.is_file() and not any(p[0] == "." or p == "__pycache__" for p in parts):
                assert inside["/".join([place, *parts])] == path.read_bytes(), path
    tops = {name.split("/")[0] for name in inside}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"steerlib"}


@pytest.mark.thorough
def test_an_installed_package_runs_the_readme_on_its_own_data(wheel, tmp_path):
    """Without this checkout: an empty folder, the wheel, and what it depends on."""
    from conftest import write_tiny

    here = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    install = [*pip, "install", "--no-deps", "--no-index", "--target", here, wheel]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    write_tiny(tmp_path / "model", layers=6)  # stands in for the model of the README
    readme = re.search(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.S)[1]
    assert readme.count('"smollm2-135m"') == 1 and "sl.SteeringVector.from_prompts" in readme
    # -S: no .pth file is read, and so no editable install is found
    others = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    hidden = {"STEERLIB_DATA", "STEERLIB_FIGS"}
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    environment["PYTHONPATH"] = os.pathsep.join([str(here), *others])
    work = tmp_path / "elsewhere"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-S", "-c", INSTALLED],
        cwd=work, env=environment, capture_output=True, text=True,
        input=readme.replace('"smollm2-135m"', repr(str(tmp_path / "model"))),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads((work / "said.json").read_text())
    assert all(path.startswith(f"{here}/steerlib/") for path in said["modules"])
    assert said["data"] == str(here / "steerlib/_data")
    tables = {p.stem: len(pd.read_csv(p)) for p in (ROOT / "data").glob("*.csv")}
    assert said["rows"] == tables and len(said["words"]) == 9 and "15a" in said["demonstrations"]
    assert said["figures"] == "figs"  # of the folder that one works in
    assert said["prompts"] == 1 and {"random", "unrelated"} < set(said["families"])
