"""How a panel runs: step by step, in its own thread, and whatever goes wrong is a sentence."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from base64 import b64decode
from collections.abc import Iterator
from typing import Any

import ipywidgets as ipw
import pytest
from matplotlib import pyplot as plt

import steerlib as sl
from steerlib.lab.panels.base import (
    Panel,
    VectorPanel,
    folds,
    in_rows,
    png,
    reach,
    slider,
    table_row,
)

EVIL = "<script>alert(1)</script>"


class Count(Panel):
    """Counts to ``n``, a step at a time; ``at`` some number, something happens."""

    def __init__(self, n: int = 3, at: int = 0, what: Any = None):
        super().__init__()
        self.n, self.at, self.what = slider("n", n, 0, 9), at, what
        self.threads: list[Any] = []
        self.finished = 0
        self._show([self.n], [self.n])

    def _run(self) -> Iterator[None]:
        n = self.n.value
        for i in range(1, n + 1):
            self.threads.append(threading.current_thread())
            if i == self.at:
                self.what()
            self.output.value = f"<p>{i} of {n}</p>"
            yield
        self.finished += 1


def test_the_first_output_is_there_before_the_panel_is_shown() -> None:
    p = Count(4)
    assert p.output.value == "<p>4 of 4</p>" and p.finished == 1
    style, *rest = p.children
    assert rest == [p.n, p.output, p.picture] and ":focus-visible" in style.value


# ---------------------------------------------------------------- when a control is moved


def test_a_plain_script_runs_to_the_end() -> None:
    p = Count(4)
    p.n.value = 2
    assert p.output.value == "<p>2 of 2</p>" and p.finished == 2


def test_a_moved_control_cancels_the_run_under_way() -> None:
    p = Count(1)

    async def move() -> None:
        p.n.value = 9
        first = p._task
        await asyncio.sleep(0.003)
        assert p.output.value.endswith("of 9</p>") and p.finished == 1
        p.n.value = 2
        second = p._task
        assert first is not None and second is not None and second is not first
        await asyncio.gather(first, second, return_exceptions=True)
        assert first.cancelled()

    asyncio.run(move())
    assert p.output.value == "<p>2 of 2</p>" and p.finished == 2


def test_a_control_moved_in_another_thread_runs_in_the_panels_own() -> None:
    async def move() -> Count:
        p = Count(1)
        for n in (9, 3):
            await asyncio.to_thread(setattr, p.n, "value", n)
        for _ in range(500):
            await asyncio.sleep(0.01)
            if p._task is not None and p._task.done():
                break
        return p

    p = asyncio.run(move())
    assert p.output.value == "<p>3 of 3</p>"
    assert len(p.threads) >= 4 and set(p.threads) == {threading.main_thread()}


# ---------------------------------------------------------------- interrupts and errors


def test_an_interrupt_ends_the_run_and_not_the_kernel() -> None:
    """While the process ignores signals, as an idle kernel does; it does so again afterwards."""
    p = Count(1, at=2, what=lambda: os.kill(os.getpid(), signal.SIGINT))

    async def move() -> None:
        p.n.value = 9
        assert p._task is not None
        await p._task  # the exception goes no further

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        asyncio.run(move())
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert "Interrupted. Move a control to run again." in p.output.value and p.finished == 1
    p.at = 0
    p.n.value = 2
    assert p.output.value == "<p>2 of 2</p>"


def test_an_interrupt_in_the_cell_goes_on_to_the_cell() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Count(3, at=2, what=interrupt)


ERRORS = {
    "KeyError": (KeyError("no such name"), "no such name"),
    "OSError": (OSError("the disk is gone"), "the disk is gone"),
    "memory": (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "fewer samples"),
    "MemoryError": (MemoryError(), "fewer samples"),
    "RuntimeError": (RuntimeError("shapes\nsecond line"), "RuntimeError: shapes"),
    "TypeError": (TypeError(), "TypeError: no more is known"),
    "markup": (ValueError(EVIL), "&lt;script&gt;"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_is_a_sentence(name: str) -> None:
    error, words = ERRORS[name]

    def fail() -> None:
        raise error

    p = Count(3, at=2, what=fail)
    assert words in p.output.value and p.finished == 0
    assert not any(part in p.output.value for part in ("Traceback", "second line", "<script"))
    p.n.value = 1
    assert p.output.value == "<p>1 of 1</p>"


# ---------------------------------------------------------------- pages without widgets


def test_a_page_without_widgets_shows_the_output_or_the_picture() -> None:
    p = Count(1)
    page = p._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in page
    assert page["text/html"] == p.output.value and "image/png" not in page
    figure, ax = plt.subplots()
    p._picture(png(figure))
    assert not plt.fignum_exists(figure.number)  # or a notebook would show it once more
    page = p._repr_mimebundle_()
    assert b64decode(page["image/png"]) == p.picture.value[:] and p.picture.value[:4] == b"\x89PNG"
    assert "text/html" not in page
    p._say("no more")
    assert "image/png" not in p._repr_mimebundle_()


# ---------------------------------------------------------------- pieces


def test_a_slider_reaches_its_first_value_and_reports_where_it_is_let_go() -> None:
    for value in (-20.0, 3.0, 15.0):
        made = slider("coefficient", value, -10, 10, 0.5)
        assert made.value == value and made.min <= value <= made.max
        assert (made.min, made.max) == (min(value, -10), max(value, 10))
        assert not made.continuous_update
    assert isinstance(slider("layer", 3, 0, 5), ipw.IntSlider)


def test_a_slider_stretches_around_a_value_and_the_arrow_keys_meet_zero() -> None:
    made = slider("coefficient", 3.0, -10, 10, 0.5)
    for value in (31.223, -0.088, 2.858):
        reach(made, value)
        assert made.value == value
        assert (made.min, made.max) == (-2 * abs(value), 2 * abs(value))
        assert made.step == abs(value) / 10
    reach(made, 0.0)
    assert made.value == 0 and made.max == 2 * 2.858


def test_folds_open_and_close() -> None:
    a, b = ipw.Text(), ipw.HTML()
    row, *parts = folds({"more": a, "code": b})
    assert parts == [a, b] and [x.description for x in row.children] == ["more", "code"]
    assert a.layout.display == b.layout.display == "none"
    row.children[0].value = True
    assert a.layout.display == "" and b.layout.display == "none"
    row.children[0].value = False
    assert a.layout.display == "none"


def test_rows_and_cells() -> None:
    a, b = ipw.Text(), ipw.Text()
    assert [row.children for row in in_rows([a, b], [], [b])] == [(a, b), (b,)]
    row = table_row(EVIL, "<b>")
    assert "<script" not in row and "&lt;b&gt;" in row and row.count("<td") == 2
    assert table_row("x", tag="th").count("<th ") == 1


class Vector(VectorPanel):
    def _run(self) -> Iterator[None]:
        yield


def test_a_vector_is_made_once_for_each_setting(tiny: Any) -> None:
    model, _ = tiny("llama")
    p = Vector(model, "I", "wedding", "", 2, 4.0, (-10, 10))
    made = p.made()
    plain = sl.SteeringVector.from_prompts(model, "wedding", None, layer=2)  # empty means none
    assert made.layers.keys() == plain.layers.keys() == {2}
    assert made.layers[2].equal(plain.layers[2])
    p.layer.value = 3
    assert p.made() is not made and list(p.made().layers) == [3]
    p.layer.value = 2
    assert p.made() is made
    assert p.layer.max == model.cfg.n_layers - 1
    p.bridge, _ = tiny("gpt2")  # another model was chosen
    assert not p.made().layers[2].equal(made.layers[2])
