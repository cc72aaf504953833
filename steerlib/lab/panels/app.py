"""The page of the app: texts, measures, the schematic and the next token, of one setting."""

from __future__ import annotations

import html
from base64 import b64encode
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import ipywidgets as ipw
import numpy as np
from matplotlib import pyplot as plt

from ...activations import capture
from ...hooks import steer
from ...interventions import Add, Intervention, covered
from ...measure.logprobs import (
    continuation_table,
    kl_by_prompt,
    log_mean_exp,
    next_token_shift,
)
from ...measure.stats import clustered_interval
from ...models.loading import list_models
from ...tokens import encode, token_texts
from .. import behaviours, plots, settings
from . import link, presets, token
from .base import LATE, LINE, in_rows, png, reach
from .presets import TEXTS, Item, Preset
from .steering import SteeringPanel

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    from ...vectors import SteeringVector

NEUTRAL = 8  # prompts on which the side effect is measured
FEW = 4  # continuations a step
COLUMNS = 14  # tokens of a prompt that the schematic shows
TOP = 6  # tokens that gain, and that lose
NOTHING = "nothing"


class AppPanel(SteeringPanel):
    """`SteeringPanel` with a gallery of presets, and everything that its setting does.

    Args:
        model: the first one; the gallery is that of the model that is chosen.
        query: settings, as the address of a page holds them (`link.write`); by default those of
            this page's address. What does not fit is said, and the default stays.
        sampling: as for `SteeringPanel`.

    Texts come first. Then, a step at a time, so that a moved slider need not wait: how much the
    model leans to the behaviour and how far the next token moves, where in the model the vector
    enters and what it changes there, and which tokens it makes likelier. Below is the address that
    leads to these settings.
    """

    def __init__(self, model: TransformerBridge, query: str | None = None, **sampling: Any):
        self._page, found = link.address()
        self._query = found if query is None else query
        self._still, self._gallery = False, ipw.VBox()
        self._plain: dict[Any, list[float]] = {}  # propensities without a vector
        self._streams: dict[Any, torch.Tensor] = {}  # of the last prompt, without a vector
        name = model.cfg.model_name
        first = next(iter(presets.gallery(name)), None) or _unmeasured(model)
        self.source = ipw.Dropdown(
            options=[TEXTS, *presets.SOURCES], value=first.vector, description="vector"
        )
        self.measure = ipw.Dropdown(
            options=[NOTHING, *presets.MEASURES], value=first.measure, description="measure"
        )
        self.notice, self.measures, self.figure = ipw.HTML(), ipw.HTML(), ipw.HTML()
        self.next, self.link = ipw.HTML(), ipw.HTML()
        super().__init__(
            model, first.prompt, first.plus, first.minus, first.layer, first.coefficient,
            at=_place(first.vector), fraction=1.0, **sampling,
        )  # fmt: skip

    def _show(self, controls: Sequence[ipw.Widget], children: Sequence[ipw.Widget]) -> None:
        names = ["model", "source", "prompt", "plus", "minus", "layer", "coefficient", "at"]
        names += ["position", "fraction", "which", "op", "samples", "seed", "colour", "measure"]
        self._controls = {name: getattr(self, name) for name in names}
        reach(self.coefficient, self.coefficient.value)
        self._defaults = {name: control.value for name, control in self._controls.items()}
        query, self._query = self._query, ""
        said = link.read(query, {"model": self.model})
        self._offer()
        said = link.read(query, self._controls)
        self._tell("\n".join(said), wrong=True)
        self._fit()
        rows = in_rows([self.source, self.measure])
        super()._show(
            [*controls, self.source, self.measure],
            [self._gallery, self.notice, *rows, *children],
        )

    def _outputs(self) -> Sequence[ipw.Widget]:
        self.output.layout.flex, self.measures.layout.flex = "3 1 28em", "1 1 14em"
        beside = ipw.HBox(
            [self.output, self.measures],
            layout={"flex_flow": "row wrap", "width": "100%", "align_items": "flex-start"},
        )
        return beside, self.figure, self.next, self.link

    def _first(self) -> None:
        """In a kernel the page need not wait for the first texts."""
        if self._loop is None:
            super()._first()
        else:
            self._start()

    # ------------------------------------------------------------ controls

    def _changed(self, change: Any) -> None:
        if self._still:
            return
        if change and change["owner"] is self.model:
            self._offer()
        if change and change["owner"] is self.source:
            self._still = True  # one run for both
            self.at.value = _place(self.source.value)
            self._still = False
        self._fit()
        self._tell("")
        super()._changed(change)

    def _fit(self) -> None:
        """Controls that say nothing now cannot be moved."""
        texts = self.source.value == TEXTS
        self.plus.disabled = self.minus.disabled = not texts
        self.position.disabled = self.at.value != "position"

    def _offer(self) -> None:
        """The gallery of the model that is chosen."""
        name = self.model.value
        known = list_models().set_index("name").layers
        if name in known.index:
            self.layer.max = int(known[name]) - 1
        found = presets.gallery(name)
        works = {
            True: f"work in {name}",
            False: "were measured there, and do not stand clear of their controls",
        }
        parts: list[ipw.Widget] = []
        for does, said in works.items():
            buttons = []
            for preset in found:
                if preset.works == does:
                    button = ipw.Button(
                        description=preset.label, tooltip=preset.said(), layout={"width": "auto"}
                    )
                    button.on_click(partial(self._take, preset))
                    buttons.append(button)
            if buttons:
                parts += [ipw.HTML(html.escape(f"Presets that {said}:")), *in_rows(buttons)]
        if not found:
            said = f"No preset has been measured in {name}: make effects MODEL={name} does that."
            parts = [ipw.HTML(html.escape(said))]
        self._gallery.children = parts

    def _take(self, preset: Preset, _: Any = None) -> None:
        """Set every control as a preset has it."""
        self._still = True
        try:
            self.source.value, self.prompt.value = preset.vector, preset.prompt
            self.plus.value, self.minus.value = preset.plus, preset.minus
            self.layer.value, self.measure.value = preset.layer, preset.measure
            reach(self.coefficient, preset.coefficient)
            self.at.value = _place(preset.vector)
            self.fraction.value, self.op.value = 1.0, "add"
        finally:
            self._still = False
        self._changed(None)
        self._tell(preset.said())

    def _tell(self, sentences: str, wrong: bool = False) -> None:
        colour = plots.LOSS if wrong else "inherit"
        said = html.escape(sentences)
        shown = f"<p role='status' style='color:{colour};{LINE}'>{said}</p>"
        self.notice.value = shown if said else ""

    def _vector(self) -> tuple[SteeringVector, str, str]:
        name, layer = self.source.value, self.layer.value
        if name == TEXTS:
            return super()._vector()
        source = presets.SOURCES[name]
        key = (self.bridge.cfg.model_name, name, layer)
        if key not in self._vectors:
            self._vectors[key] = source.make(self.bridge, layer)
        return self._vectors[key], name, source.code.format(layer=layer)

    # ------------------------------------------------------------ what is shown

    def _run(self) -> Iterator[None]:
        """Texts first; the rest grows paler until it is of the present setting."""
        late = (self.measures, self.figure, self.next)
        for part in late:
            part.add_class(LATE)
        self.link.value = self._link()
        name = self.source.value
        key = (self.model.value, name, self.layer.value)
        if name != TEXTS and key not in self._vectors:
            self.output.value = "<p>Making the vector of many pairs, some seconds …</p>"
            yield
        yield from super()._run()
        yield
        act = self._condition()[0]
        shift = next_token_shift(self.bridge, self.prompt.value, act)
        parts = (self._measured(act, shift), self._drawn(act, shift), self._next(act, shift))
        for part, steps in zip(late, parts, strict=True):
            for shown in steps:
                if shown:
                    part.value = shown
                    part.remove_class(LATE)
                yield

    def _say(self, sentence: str) -> None:
        for part in (self.measures, self.figure, self.next):
            part.value = ""
        super()._say(sentence)

    def _link(self) -> str:
        """The address that leads to the present settings, and a button that copies it."""
        query = link.write(self._controls, self._defaults)
        relative = f"?{query}" if query else "?"
        copy = (
            "const field = this.previousElementSibling; field.select();"
            "navigator.clipboard ? navigator.clipboard.writeText(field.value)"
            " : document.execCommand('copy');"
            "history.replaceState(null, '', this.nextElementSibling.href)"
        )
        address = html.escape(self._page + relative)
        return (
            "<div style='display:flex;flex-wrap:wrap;gap:0.5em;align-items:center'>"
            "<label for='steerlib-link'>link to these settings</label>"
            f'<input id="steerlib-link" readonly value="{address}" '
            'style="flex:1 1 16em;min-width:0" onfocus="this.select()">'
            f'<button onclick="{copy}" title="copy the link, and put it into the address of this '
            'page">copy link</button>'
            f'<a href="{html.escape(relative)}" style="text-decoration:underline">open</a></div>'
        )

    def _measured(self, act: Intervention, shift: pd.DataFrame) -> Iterator[str]:
        """Propensity and KL, a few runs of the model a step."""
        model, name = self.bridge, self.measure.value
        lines = {"KL of the next token, here": f"{shift.kl_contribution.sum():.2f} nats"}
        yield _listed(lines)
        if name != NOTHING:
            found = presets.items(name, self.prompt.value)
            before = yield from self._leanings(found, None)
            after = yield from self._leanings(found, act)
            mean, low, high = clustered_interval(np.subtract(after, before), range(len(found)))
            where = "after this prompt" if len(found) == 1 else f"on {len(found)} test prompts"
            said = f"{np.mean(before):+.1f} → {np.mean(after):+.1f}: <b>{mean:+.1f} nats</b>"
            said += f" [{low:.1f}, {high:.1f}]" if len(found) > 1 else ""
            lines = {f"Propensity for {name}, {where}": said, **lines}
            yield _listed(lines)
        k = max(v.n_positions for v in act.vectors)
        neutral = [p for p in behaviours.neutral("test") if len(encode(model, p)) > k][:NEUTRAL]
        kl: list[float] = []
        for others in batched(neutral, FEW // 2):
            kl += kl_by_prompt(model, others, {"": act}).kl.tolist()
            yield ""
        if neutral:
            lines[f"KL on {len(neutral)} neutral prompts"] = f"{np.mean(kl):.2f} nats"
        yield _listed(lines)

    def _leanings(
        self, items: Sequence[Item], act: Intervention | None
    ) -> Generator[str, None, list[float]]:
        """The propensity (`logprobs.propensity`) after each prompt, a few continuations a step;
        without a vector it is measured once."""
        key = (self.bridge.cfg.model_name, *((item.prompt, *item.targets) for item in items))
        if act is None and key in self._plain:
            return self._plain[key]
        asked = [(i.prompt, text) for i in items for text in (*i.targets, *i.references)]
        scores: list[float] = []
        for few in batched(asked, FEW):
            prompts = list(dict.fromkeys(prompt for prompt, _ in few))
            texts = [[text for prompt, text in few if prompt == p] for p in prompts]
            scores += continuation_table(self.bridge, prompts, texts, {"": act}).logprob.tolist()
            yield ""
        found = []
        for item in items:
            n, k = len(item.targets), len(item.references)
            target, reference, scores = scores[:n], scores[n : n + k], scores[n + k :]
            found.append(log_mean_exp(target) - log_mean_exp(reference))
        if act is None:
            self._plain[key] = found
        return found

    def _drawn(self, act: Intervention, shift: pd.DataFrame) -> Iterator[str]:
        """The schematic; a step is a run of the model."""
        model, prompt = self.bridge, self.prompt.value
        ids = encode(model, prompt)
        where, key = range(len(ids)), (model.cfg.model_name, prompt)
        if key not in self._streams:
            self._streams = {key: capture(model, prompt, positions=where)[0]}
            yield ""
        plain = self._streams[key]
        with steer(model, act):
            moved = capture(model, prompt, positions=where)[0]
        yield ""
        change = ((moved - plain).norm(dim=-1) / plain.norm(dim=-1)).numpy()
        (vector,) = act.vectors
        (layer,) = vector.layers
        norms = vector.norm()[layer]
        enters = [p for p, row in covered(act.at, len(norms), len(ids), 0, len(ids)) if norms[row]]
        chosen = columns(len(ids), enters)
        texts = ["(begin)", *token_texts(model, ids[1:])]
        if ids[0] != model.tokenizer.bos_token_id:
            texts = token_texts(model, ids)
        shown = np.stack(
            [change[:, i] if i >= 0 else np.full(len(change), np.nan) for i in chosen], 1
        )
        title = _message(shift, len(enters))
        ablated = self.op.value == "ablate"
        figure = plots.schematic(
            shown, [texts[i] if i >= 0 else "…" for i in chosen], layer,
            [chosen.index(p) for p in enters if p in chosen] or [0], shift,
            vector="ablated" if ablated else f"coefficient {self._coefficient():+.3g}",
            title=title.replace("$", r"\$"),
        )  # fmt: skip
        try:
            yield ""
            plots.caption(figure, model=model.cfg.model_name.replace("$", r"\$"), n="1 prompt")
            file = b64encode(png(figure)).decode()
        finally:  # a moved slider ends this here
            plt.close(figure)
        told = html.escape(f"Tokens by layers: how far the stream moves. {title}.")
        yield f'<img src="data:image/png;base64,{file}" alt="{told}">'

    def _next(self, act: Intervention, shift: pd.DataFrame) -> Iterator[str]:
        """Who gains and who loses; and the vector by itself, where it is added at the front."""
        parts = [token.next_tokens(shift, TOP, "with the vector")]
        if self.at.value == "front" and isinstance(act, Add):
            yield ""
            said = token.inside(self.bridge, self.prompt.value, act.vector, act.coefficient, TOP)
            parts.append(said)
        yield token.abreast(*parts)


# ---------------------------------------------------------------- pieces


def columns(n: int, enters: Sequence[int], most: int = COLUMNS) -> list[int]:
    """Which of ``n`` tokens to show: the first, the last, those around the vector; -1 for a gap."""
    if n <= most:
        return list(range(n))
    first = min(enters, default=0)
    near = range(first, min(first + most // 2, n))
    keep = {0, *near}
    keep |= set(range(n - (most - len(keep)), n))
    found: list[int] = []
    for i in sorted(keep):
        if found and i > found[-1] + 1:
            found.append(-1)
        found.append(i)
    return found


def _place(source: str) -> str:
    """Where vectors of a source act."""
    return "front" if source in (TEXTS, presets.SENTENCES) else "generated"


def _message(shift: pd.DataFrame, n: int) -> str:
    """What the schematic says: the token that gains most."""
    rise = shift.p_after - shift.p_before
    gain = shift.loc[rise.idxmax()]
    if rise.max() < 1e-4:
        return "No token becomes likelier"
    where = "one token" if n == 1 else f"{n} tokens"
    times = gain.p_after / gain.p_before
    return f"A vector at {where} makes {gain.token.strip()!r} {times:.3g} times likelier"


def _listed(lines: dict[str, str]) -> str:
    """Measures below each other; values are HTML."""
    style = f"{LINE};margin:0 0 0.6em"
    return "".join(
        f"<div style='{style}'>{html.escape(name)}<br>{value}</div>"
        for name, value in lines.items()
    )


def batched(items: Sequence[Any], n: int) -> Iterator[Sequence[Any]]:
    """At most ``n`` at a time (`itertools.batched` of Python 3.12)."""
    return (items[i : i + n] for i in range(0, len(items), n))


def _unmeasured(model: TransformerBridge) -> Preset:
    """Weddings, for a model in which nothing was measured: at the source's relative depth."""
    at = settings.vector_settings("15b", model)
    nan = float("nan")
    return Preset(
        "weddings", TEXTS, " wedding", " ", presets.FRIEND, int(at.layer), float(at.coefficient),
        "weddings", nan, nan, nan, 0, nan, False,
    )  # fmt: skip
