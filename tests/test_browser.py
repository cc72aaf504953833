"""What a reader does, in a real browser: open a notebook in JupyterLab, run it, move its slider.

The servers are those of `make lab` and `make app`; the notebooks are copies without outputs, so
that everything that is seen was computed here. `make test-browser` leaves a picture of each page in
build/screenshots.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
SCREENSHOTS = ROOT / "build" / "screenshots"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

# Errors in the console that are not ours: a part of the message, and whose it is.
NOT_OURS = {
    "https://cdn.jsdelivr.net/npm/@fortawesome/": "Voilà's template links these icons, from a "
    "public network that a test machine may not reach; the panels use none",
}


def wait(what: str, done: Callable[[], Any], seconds: float) -> Any:
    """The first true answer of ``done``, asked twice a second."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := done():
            return answer
        time.sleep(0.5)
    pytest.fail(f"after {seconds:g} s still waiting for {what}")


# ---------------------------------------------------------------- servers


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def checkout(folder: Path) -> Path:
    """A copy in which make finds this interpreter as its environment, and nothing to install."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (folder / ".venv" / ".steerlib-base").touch()
    return folder


@contextmanager
def made(target: str, folder: Path, *arguments: str) -> Iterator[str]:
    """``make <target>`` in a checkout, on a machine without a screen; gives the address."""
    port = free_port()
    others = {"DISPLAY", "WAYLAND_DISPLAY", "BROWSER", "MAKEFLAGS", "MFLAGS", "ARGS", "SVG", "VENV"}
    environment = {k: v for k, v in os.environ.items() if k not in others}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [
        "make", target, "PRESET=smoke", "MODEL=", f"FIGS={folder / 'figs'}",
        f"ARGS={' '.join([f'--port={port}', *arguments])}",
    ]  # fmt: skip
    log = folder / f"{target}.log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait(
            f"make {target}",
            lambda: server.poll() is not None or listening(server.pid),
            120,
        )
        assert server.poll() is None, log.read_text()[-3000:]
        assert listening(server.pid) == {"127.0.0.1"}
        yield address
        assert listening(server.pid) == {"127.0.0.1"}, "kernels, too, are for this machine only"
    finally:
        stop(server)


def stop(server: subprocess.Popen[bytes]) -> None:
    """Ask a server and its kernels to end, and see to it that they do."""
    if server.poll() is not None:
        return
    started = psutil.Process(server.pid).children(recursive=True)
    os.killpg(server.pid, signal.SIGTERM)
    for process in psutil.wait_procs(started, timeout=20)[1]:
        process.kill()
    server.wait()


def listening(pid: int) -> set[str]:
    """The addresses on which a process and its children accept connections."""
    found = set()
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # some live for a moment only
            found |= {c.laddr.ip for c in process.net_connections("tcp") if c.status == "LISTEN"}
    return found


@pytest.fixture(scope="module")
def lab(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address of a JupyterLab, and the folder of notebooks that it shows."""
    folder = checkout(tmp_path_factory.mktemp("lab"))
    for path in sorted((folder / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        notebook.metadata.pop("widgets", None)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.update(outputs=[], execution_count=None)
        nbformat.write(notebook, path)
    for name, value in {
        "notebook-extension/tracker": {"windowingMode": "none"},  # cells out of sight are there too
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    }.items():
        settings = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        settings.parent.mkdir(parents=True)
        settings.write_text(json.dumps(value))
    arguments = [
        "--allow-root", "--IdentityProvider.token=",
        f"--LabApp.user_settings_dir={folder / 'settings'}",
        f"--LabApp.workspaces_dir={folder / 'workspaces'}",
    ]  # fmt: skip
    with made("lab", folder, *arguments) as address:
        wait("JupyterLab", lambda: answers(f"{address}/lab"), 120)
        yield address, folder / "notebooks"


# ---------------------------------------------------------------- the browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not program or subprocess.run([program, "--version"], capture_output=True).returncode:
        pytest.skip(f"no browser here: install one of {', '.join(BROWSERS)}")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=program,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield chromium
        chromium.close()


class Console(list[str]):
    """Errors that a page wrote or threw."""

    def __init__(self, page: Any):
        super().__init__()
        page.on("console", lambda m: m.type == "error" and self.append(f"{m.text} {m.location}"))
        page.on("pageerror", lambda error: self.append(str(error)))

    def ours(self) -> list[str]:
        return [line for line in self if not any(part in line for part in NOT_OURS)]


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(60_000)
    yield page
    page.close()


PANEL = ".widget-vbox:has(.noUi-handle)"  # the outermost comes first


def shown(panel: Any) -> str:
    """Texts and pictures of a panel, but not the numbers that repeat its sliders."""
    texts = panel.locator(".widget-html-content:visible").all_inner_texts()
    pictures = panel.locator("img").evaluate_all("all => all.map(i => i.src)")
    return re.sub(r"(coefficient|layer) [-+−]?[\d.]+", "", "\n".join(texts + pictures))


def move_first_slider(panel: Any, page: Any) -> None:
    """To its lower end, or its upper one if it is there; what the panel shows has to follow.

    A panel that shows no slider at first gets the next choice of its first list.
    """
    panel.scroll_into_view_if_needed()
    before, handle = settled(panel), panel.locator(".noUi-handle:visible").first
    if handle.count():
        place = handle.get_attribute("aria-valuenow")
        handle.click()
        page.keyboard.press("Home")
        if handle.get_attribute("aria-valuenow") == place:
            page.keyboard.press("End")
        assert handle.get_attribute("aria-valuenow") != place
    else:
        panel.locator("select:visible").first.select_option(index=1)
    wait("the panel to follow its slider", lambda: shown(panel) != before, 120)
    settled(panel)


def settled(panel: Any) -> str:
    """What a panel shows, once it has not changed for two seconds."""
    seen = [shown(panel)]

    def same() -> bool:
        seen.append(shown(panel))
        return len(seen) > 4 and len(set(seen[-5:])) == 1

    wait("the panel to come to rest", same, 120)
    return seen[-1]


# ---------------------------------------------------------------- the tests


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
def test_notebook(path: Path, lab: tuple[str, Path], page: Any) -> None:
    address, folder = lab
    console = Console(page)
    page.goto(f"{address}/lab/tree/{path.name}?reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    prompts = page.locator(".jp-CodeCell .jp-InputPrompt")
    wait("the kernel", lambda: kernels(address).get(path.name) == "idle", 120)
    for _ in range(5):  # the page may not know its kernel yet, and then runs nothing
        choose(page, "Run", "Run All Cells")
        page.wait_for_timeout(2000)
        if set(prompts.all_inner_texts()) != {"[ ]:"}:
            break
    # an error ends the run too: cells below it go back to [ ]
    wait(f"{path.stem} to run", lambda: "[*]:" not in prompts.all_inner_texts(), 600)
    done = [text != "[ ]:" for text in prompts.all_inner_texts()]
    page.keyboard.press("Control+s")

    def saved() -> list[Any]:
        try:
            cells = nbformat.read(folder / path.name, as_version=4).cells
        except nbformat.reader.NotJSONError:  # it is being written
            return []
        code = [cell for cell in cells if cell.cell_type == "code"]
        return code if [cell.execution_count is not None for cell in code] == done else []

    outputs = [o for cell in wait("the saved notebook", saved, 60) for o in cell.outputs]
    assert [o.evalue for o in outputs if o.output_type == "error"] == []
    assert all(done) and len(done) > 2

    move_first_slider(page.locator(PANEL).first, page)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{path.stem}.png")
    assert "\n".join(console.ours()) == ""
    choose(page, "Kernel", "Shut Down Kernel")  # the next one needs the memory
    wait("the kernel to end", lambda: path.name not in kernels(address), 60)


def kernels(address: str) -> dict[str, str]:
    """The states of the kernels that run, by the notebook they belong to."""
    with urllib.request.urlopen(f"{address}/api/sessions", timeout=60) as answer:
        return {s["path"]: s["kernel"]["execution_state"] for s in json.load(answer)}


def choose(page: Any, menu: str, entry: str) -> None:
    page.get_by_role("menuitem", name=menu, exact=True).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{entry}$")).click()


def test_web_page(tmp_path: Path, page: Any) -> None:
    """Every panel of the app follows its slider, and no code is shown."""
    panels = sum(
        "Panel(" in cell.source
        for cell in nbformat.read(ROOT / "notebooks" / "app.ipynb", as_version=4).cells
    )
    with made("app", checkout(tmp_path)) as address:
        console = Console(page)
        page.set_default_timeout(300_000)
        page.goto(address)
        found = page.locator(f".jp-OutputArea-output > {PANEL}")
        wait("the panels", lambda: found.count() == panels, 300)
        assert "os.environ" not in page.content()
        for i in range(panels):
            move_first_slider(found.nth(i), page)
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / "app.png", full_page=True)
        assert "\n".join(console.ours()) == ""
