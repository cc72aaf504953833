"""How a panel runs, and the pieces that panels are made of. The panels stand in the modules beside
this one.

A panel runs in the thread in which it was made, a step at a time: between two tokens the kernel
looks at its messages, so a slider that moves meanwhile cancels the run under way, and the model
has no hooks while anything else runs. JupyterLab may hand over a moved slider in a thread of its
own, in the middle of a cell: hooks are no good in two threads at once, so the panel then waits for
the cell to end. Whatever goes wrong is shown as a sentence in the panel.
"""

from __future__ import annotations

import asyncio
import html
import io
import signal
import threading
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import ipywidgets as ipw
from matplotlib import pyplot as plt

from ...engine import decode
from ...vectors import SteeringVector
from .. import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformer_lens.model_bridge import TransformerBridge

WIDE = {"width": "95%"}
LINE = "white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.4"
CLASS, LATE, TEXTS = "steerlib-panel", "steerlib-late", "steerlib-texts"
# Where the keyboard is has to be seen; what is not of the present settings yet is pale; columns of
# text stand below each other on a narrow page.
CSS = f"""<style>
.{CLASS}.{CLASS}.{CLASS} :focus-visible {{
  outline: 3px solid #0072B2 !important; outline-offset: 2px; }}
.{CLASS} .widget-inline-hbox, .{CLASS} .widget-button, .{CLASS} img {{ max-width: 100%; }}
.{CLASS} .{LATE} {{ opacity: 0.35; }}
@media (max-width: 600px) {{
  .{CLASS} .{TEXTS}, .{CLASS} .{TEXTS} :is(tbody, tr, td) {{
    display: block; width: auto !important; }}
  .{CLASS} .{TEXTS} th {{ display: none; }}
  .{CLASS} .{TEXTS} td[data-label]::before {{ content: attr(data-label) ": "; color: #555555; }}
}}
</style>"""


class Panel(ipw.VBox):
    """What happens when a control is moved."""

    def __init__(self) -> None:
        super().__init__()
        self.output = ipw.HTML()
        own_size = {"align_self": "flex-start", "max_width": "100%"}
        self.picture = ipw.Image(format="png", layout={"display": "none", **own_size})
        self._task: asyncio.Task[None] | None = None
        self._loop = _running_loop()
        self.add_class(CLASS)

    def _show(self, controls: Sequence[ipw.Widget], children: Sequence[ipw.Widget]) -> None:
        """Listen to the controls, lay out the children, and compute the first output."""
        for control in controls:
            control.observe(self._changed, names="value")
        self.children = (ipw.HTML(CSS), *children, *self._outputs())
        self._first()

    def _outputs(self) -> Sequence[ipw.Widget]:
        """What stands below the controls."""
        return self.output, self.picture

    def _first(self) -> None:
        """Compute what is shown first, so that a saved notebook holds it."""
        for _ in self._steps():
            pass

    def _run(self) -> Iterator[None]:
        """Work with the present settings, a step at a time, and write the output."""
        raise NotImplementedError

    def _steps(self) -> Iterator[None]:
        try:
            yield from self._run()
        except Exception as error:  # a panel must not end in a traceback that nobody sees
            self._say(_sentence(error))

    def _say(self, sentence: str) -> None:
        """Show a sentence instead of the output."""
        self.picture.layout.display = "none"
        self.output.value = f"<p style='color:{plots.LOSS};{LINE}'>{html.escape(sentence)}</p>"

    def _picture(self, file: bytes) -> None:
        self.picture.value, self.picture.layout.display = file, ""

    def _changed(self, _: Any) -> None:
        here = _running_loop()
        loop = self._loop if self._loop is not None and self._loop.is_running() else here
        if loop is None:  # as in a plain script: run to the end
            for _ in self._steps():
                pass
        elif loop is here:
            self._start()
        else:
            loop.call_soon_threadsafe(self._start)

    def _start(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._task = asyncio.get_running_loop().create_task(self._in_background())

    async def _in_background(self) -> None:
        """Go through the steps while the kernel goes on reading messages between them."""
        steps = self._steps()
        try:
            while _step(steps):
                await asyncio.sleep(0.001)
        except KeyboardInterrupt:  # must not reach the kernel's loop: it would end the kernel
            self._say("Interrupted. Move a control to run again.")

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """The widget; and for a page that shows no widgets, its output as it is now."""
        data = super()._repr_mimebundle_(**kwargs)
        if data is not None and self.picture.layout.display == "none":
            data["text/html"] = self.output.value
        elif data is not None:
            data["image/png"] = b64encode(self.picture.value).decode()
        return data


class VectorPanel(Panel):
    """The controls of a vector made from two prompts."""

    def __init__(
        self,
        model: TransformerBridge,
        prompt: str,
        plus: str,
        minus: str,
        layer: int,
        coefficient: float,
        coefficient_range: tuple[float, float],
        long: bool = False,
    ):
        super().__init__()
        self.bridge = model
        self._vectors: dict[Any, SteeringVector] = {}
        text: Any = ipw.Textarea if long else ipw.Text  # a Text would drop the line breaks
        self.prompt = text(prompt, description="prompt", layout=WIDE, continuous_update=False)
        if long:
            self.prompt.rows = min(prompt.count("\n") + 2, 12)
        self.plus = ipw.Text(plus, description="plus", continuous_update=False)
        self.minus = ipw.Text(minus, description="minus", continuous_update=False)
        self.layer = slider("layer", layer, 0, model.cfg.n_layers - 1)
        self.coefficient = slider("coefficient", coefficient, *coefficient_range, 0.5)

    def made(self) -> SteeringVector:
        """The vector of the present settings, made once."""
        key = (self.bridge.cfg.model_name, self.plus.value, self.minus.value, self.layer.value)
        if key not in self._vectors:
            self._vectors[key] = SteeringVector.from_prompts(
                self.bridge, self.plus.value, self.minus.value or None, layer=self.layer.value
            )
        return self._vectors[key]


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _step(steps: Iterator[None]) -> bool:
    """One step, which the kernel's interrupt button can end; whether there are more."""
    if threading.current_thread() is not threading.main_thread():
        return next(steps, steps) is None
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # idle kernels ignore it
    try:
        return next(steps, steps) is None
    finally:
        signal.signal(signal.SIGINT, before)


def _sentence(error: Exception) -> str:
    """What is the matter, in a sentence."""
    said = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and decode.out_of_memory(error)
    ):
        return "There is not enough memory for this: try fewer samples or a shorter prompt."
    if isinstance(error, (ValueError, KeyError, OSError)) and said:
        return said
    return f"{type(error).__name__}: {said.splitlines()[0] if said else 'no more is known'}"


# ---------------------------------------------------------------- pieces


def slider(
    description: str, value: float, low: float, high: float, step: float | None = None
) -> Any:
    """A slider that reports where it is let go; it reaches as far as its first value."""
    more: dict[str, Any] = {"description": description, "continuous_update": False}
    if step is None:
        return ipw.IntSlider(value, low, high, **more)
    return ipw.FloatSlider(value, min=min(low, value), max=max(high, value), step=step, **more)


def reach(slider: Any, value: float) -> None:
    """Move a slider of floats, stretched so that the arrow keys go there and back in ten steps."""
    if size := abs(value):
        slider.min, slider.max = min(slider.min, -2 * size), max(slider.max, 2 * size)
    slider.value = value
    if size:
        slider.min, slider.max, slider.step = -2 * size, 2 * size, size / 10


def folds(parts: Mapping[str, ipw.Widget]) -> list[ipw.Widget]:
    """Buttons that show and hide a widget each, and the widgets: the keyboard reaches them, as it
    does not the titles of an Accordion."""
    buttons = []
    for name, part in parts.items():
        part.layout.display = "none"
        button = ipw.ToggleButton(description=name, tooltip=f"show or hide {name}")
        button.observe(partial(_unfold, part), names="value")
        buttons.append(button)
    return [*in_rows(buttons), *parts.values()]


def _unfold(part: ipw.Widget, change: Any) -> None:
    part.layout.display = "" if change["new"] else "none"


def in_rows(*groups: Sequence[ipw.Widget]) -> list[ipw.Widget]:
    """Controls side by side, on the next line where a page is narrow."""
    return [ipw.HBox(group, layout={"flex_flow": "row wrap"}) for group in groups if group]


def table_row(*cells: str, tag: str = "td") -> str:
    """A row of an HTML table, escaped."""
    style = "text-align:left;vertical-align:top;padding-right:1em;line-height:1.5"
    return f"<tr>{''.join(f'<{tag} style={style!r}>{html.escape(c)}</{tag}>' for c in cells)}</tr>"


def png(figure: Figure) -> bytes:
    """The figure as a file, and closed: otherwise a notebook shows it once more."""
    buffer = io.BytesIO()
    try:
        figure.savefig(buffer, format="png", dpi=100)
    finally:
        plt.close(figure)
    return buffer.getvalue()
