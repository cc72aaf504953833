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


@pytest.fixture(scope="module")
def app(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the app."""
    with made("app", checkout(tmp_path_factory.mktemp("app"))) as address:
        yield address


def open_app(page: Any, address: str) -> Any:
    """The panel of the app, when it has come to rest."""
    page.set_default_timeout(300_000)
    page.goto(address)
    page.wait_for_selector(f".jp-OutputArea-output > {PANEL}")
    panel = page.locator(f".jp-OutputArea-output > {PANEL}").first
    wait("the measures", lambda: complete(panel), 300)
    return panel


def complete(panel: Any) -> bool:
    """Whether everything that the app's panel shows is of its present settings."""
    return panel.locator(".steerlib-late").count() == 0 and "neutral" in shown(panel)


def test_web_page(app: str, page: Any) -> None:
    """Every panel of the app follows its slider, and no code is shown."""
    panels = sum(
        "Panel(" in cell.source
        for cell in nbformat.read(ROOT / "notebooks" / "app.ipynb", as_version=4).cells
    )
    console = Console(page)
    open_app(page, app)
    found = page.locator(f".jp-OutputArea-output > {PANEL}")
    assert found.count() == panels
    assert "os.environ" not in page.content()
    for i in range(panels):
        move_first_slider(found.nth(i), page)
    wait("the measures", lambda: complete(found.first), 120)
    assert found.first.locator("img[alt^='Tokens by layers']").count() == 1
    assert found.first.get_by_role("img", name=re.compile("then 0")).count() >= 10  # paired bars
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.set_viewport_size({"width": 1200, "height": 2000})
    page.screenshot(path=SCREENSHOTS / "app.png")
    assert "\n".join(console.ours()) == ""


FOCUSED = """() => {
    const e = document.activeElement, style = getComputedStyle(e);
    return [e.innerText || e.getAttribute('aria-valuenow') || e.tagName,
            style.outlineStyle === 'solid' ? parseFloat(style.outlineWidth) : 0];
}"""


def test_web_page_by_keyboard_and_link(app: str, page: Any, browser: Any) -> None:
    """The keyboard reaches every control, and one can see where it is. A preset, taken with Enter,
    sets the controls; a slider moves by arrow; the link leads back, also on a narrow page."""
    panel = open_app(page, app)
    enabled = ":is(button, input, select, a, .noUi-handle, .widget-readout)"
    visible = f"{enabled}:visible:not([disabled]):not([disabled] *)"
    page.locator(":focus").evaluate_all("all => all.forEach(e => e.blur())")
    walked = []
    for _ in range(panel.locator(visible).count() + 5):
        page.keyboard.press("Tab")
        walked.append(page.evaluate(FOCUSED))
        if walked[-1][0] == "open":  # the last of the panel
            break
    assert walked[-1][0] == "open" and len(walked) >= panel.locator(visible).count()
    assert [name for name, outline in walked if outline < 3] == []
    assert {"weddings", "dragons", "more", "copy as code", "copy link"} <= {n for n, _ in walked}

    field = panel.get_by_label("link to these settings")
    panel.get_by_role("button", name="dragons", exact=True).focus()
    page.keyboard.press("Enter")
    wait("the preset", lambda: "Dragons" in field.input_value() and complete(panel), 120)
    assert "dragons: +" in shown(panel) and "It works" in shown(panel)
    handle = panel.locator(".widget-slider", has_text="coefficient").locator(".noUi-handle")
    before, was = field.input_value(), handle.get_attribute("aria-valuetext")
    handle.focus()
    page.keyboard.press("ArrowLeft")
    # the link changes when a run begins, after what is shown has become pale
    wait("the link", lambda: field.input_value() != before and complete(panel), 120)
    assert float(handle.get_attribute("aria-valuetext")) < float(was)
    panel.get_by_role("button", name="more", exact=True).focus()
    page.keyboard.press("Space")
    panel.get_by_label("samples").wait_for(state="visible")

    address = field.input_value()
    assert address.startswith(f"{app}/?") and "Dragons" in address
    panel.get_by_role("button", name="copy link").click()
    assert page.url == address
    narrow = browser.new_page(viewport={"width": 400, "height": 900})
    console = Console(narrow)
    again = open_app(narrow, f"{address}&seed=-1")
    assert texts_of(again) == texts_of(panel), address
    kept = again.locator(".widget-html-content [role=status]").inner_text()
    assert "seed = '-1'" in kept and "whole number from 0 to 1000000: '0' is used" in kept
    assert narrow.evaluate("document.documentElement.scrollWidth") <= 400
    sideways = "all => all.filter(e => e.scrollWidth > e.clientWidth + 1).length"
    assert again.locator(".widget-html-content").evaluate_all(sideways) == 0
    assert again.locator("img").first.bounding_box()["width"] > 300
    narrow.set_viewport_size({"width": 400, "height": 3000})
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    narrow.screenshot(path=SCREENSHOTS / "app_400.png")
    assert "\n".join(console.ours()) == ""
    narrow.close()


def texts_of(panel: Any) -> list[str]:
    """The completions that a panel shows."""
    return list(panel.locator(".steerlib-texts td").all_text_contents())
