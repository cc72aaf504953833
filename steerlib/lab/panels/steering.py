"""Unsteered and steered completions under sliders."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import ipywidgets as ipw
import torch

from ...engine import decode
from ...engine.generate import choice_probabilities
from ...interventions import PLACES, Add, At, Condition, Intervention
from ...measure.logprobs import token_changes
from ...models.loading import list_models, load_model, pick_device
from ...operators import Ablate
from ...vectors import SteeringVector
from .. import tables
from .base import LINE, TEXTS, VectorPanel, folds, in_rows, slider, table_row

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

# How to make an intervention of a vector, a place (None: its own choice) and a coefficient.
Kind = Callable[[SteeringVector, At | None, float], Intervention]
KINDS: dict[str, Kind] = {
    "add": lambda vector, at, coefficient: Add(vector, at, coefficient),
    "ablate": lambda vector, at, coefficient: Ablate(vector, "all" if at is None else at),
}


class SteeringPanel(VectorPanel):
    """Unsteered and steered completions side by side, under sliders.

    Args:
        model: the model to steer; another one can be chosen among those in the cache.
        prompt, plus, minus, layer, coefficient: what the panel shows first; ``minus`` empty means
            none.
        vector: use this vector instead of making one from ``plus`` and ``minus``, or choose among
            several by name; layer, texts and model are then fixed.
        prompts: name -> prompt, to choose from; the first one is shown if ``prompt`` is empty.
        options: answers of one token each, such as ``("A", "B")``, whose probability is shown.
        op: ``add`` the vector, ``ablate`` its direction (which takes one of one position), or the
            name of one of ``kinds``.
        kinds: name -> how to make an intervention of a vector, a place (None: its own choice) and
            a coefficient; these come beside ``add`` and ``ablate``.
        at: ``front``, ``middle``, ``back``, ``prompt``, ``generated``, ``all``, or the first
            position of the vector; adds controls for it. None: where the vector was made for (a
            direction is ablated everywhere), without controls.
        fraction: of the residual dimensions that is kept (`SteeringVector.truncate`); adds
            controls for it and for which dimensions these are. None: all, without controls.
        colour: colour the tokens of finished completions by how much likelier they are under the
            steered model (`logprobs.token_changes`).
        n_samples, max_new_tokens, seed, sampling: as for `generate.generate`.

    The first completions are computed before the panel is shown, so that a saved notebook holds
    them; ``code()`` are the lines that give what is on screen.
    """

    def __init__(
        self,
        model: TransformerBridge,
        prompt: str = "",
        plus: str = "",
        minus: str = "",
        layer: int = 6,
        coefficient: float = 5.0,
        *,
        vector: SteeringVector | Mapping[str, SteeringVector] | None = None,
        prompts: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
        op: str = "add",
        kinds: Mapping[str, Kind] | None = None,
        at: str | int | None = None,
        fraction: float | None = None,
        colour: bool = False,
        coefficient_range: tuple[float, float] = (-10.0, 10.0),
        n_samples: int = 2,
        max_new_tokens: int = 30,
        seed: int = 0,
        **sampling: Any,
    ):
        self._prompts = dict(prompts or {})
        prompt = prompt or next(iter(self._prompts.values()), "")
        long = any("\n" in text for text in (prompt, *self._prompts.values()))
        super().__init__(model, prompt, plus, minus, layer, coefficient, coefficient_range, long)
        self._given = {"": vector} if isinstance(vector, SteeringVector) else dict(vector or {})
        self._place, self._options = at is not None, list(options)
        self._sampling = decode.Sampling(max_new_tokens=max_new_tokens, **sampling)
        self._code = ""
        name, table = model.cfg.model_name, list_models()
        names = list(dict.fromkeys([name, *table.name[table["in cache"]]]))
        self.model = ipw.Dropdown(
            options=names, description="model", disabled=bool(self._given) or len(names) == 1
        )
        self.vector = ipw.Dropdown(options=list(self._given), description="vector")
        known = [key for key, text in self._prompts.items() if text == prompt]
        self.example = ipw.Dropdown(
            options=list(self._prompts), value=next(iter(known), None), description="example"
        )
        self.example.observe(self._chosen, names="value")
        self._kinds = {**KINDS, **(kinds or {})}
        self.op = ipw.Dropdown(options=list(self._kinds), value=op, description="op")
        self.samples = ipw.BoundedIntText(n_samples, min=1, max=32, description="samples")
        self.seed = ipw.BoundedIntText(seed, min=0, max=10**6, description="seed")
        self.colour = ipw.Checkbox(colour, description="colour tokens", indent=False)
        first = at if isinstance(at, int) else None
        self.at = ipw.Dropdown(
            options=[*PLACES, "position"],
            value=(at or "front") if first is None else "position",
            description="at",
        )
        self.position = slider("position", first or 0, 0, 40)
        self.fraction = slider("fraction", 1.0 if fraction is None else fraction, 0, 1, 0.05)
        self.which = ipw.Dropdown(options=["first", "last", "random"], description="which")
        self.listing = ipw.HTML()
        choose = [self.example] if self._prompts else []  # it moves the prompt, nothing else
        groups = [
            [self.prompt],
            [] if self._given else [self.plus, self.minus],
            [self.vector] if len(self._given) > 1 else [],
            [self.coefficient] if self._given else [self.layer, self.coefficient],
            [self.at, self.position] if self._place else [],
            [] if fraction is None else [self.fraction, self.which],
        ]
        more = [self.model, self.op, self.samples, self.seed, self.colour]
        (rest,) = in_rows(more)
        folded = folds({"more": rest, "copy as code": self.listing})
        self.position.disabled = first is None
        self._show([*sum(groups, []), *more], [*choose, *in_rows(*groups), *folded])

    def code(self) -> str:
        """The lines that give what is on screen."""
        return self._code

    def _chosen(self, change: Any) -> None:
        if change["new"] is not None:
            self.prompt.value = self._prompts[change["new"]]

    def _changed(self, _: Any) -> None:
        self.position.disabled = self.at.value != "position"
        super()._changed(_)

    def _say(self, sentence: str) -> None:
        self._code = self.listing.value = ""
        super()._say(sentence)

    def _load(self) -> Iterator[None]:
        """Take the model that is chosen, if it is another one; the layers are then its own."""
        name, cfg = self.model.value, self.bridge.cfg
        if name != cfg.model_name:
            self.output.value = f"<p>Loading {html.escape(name)} ...</p>"
            yield
            kind = str(cfg.dtype).removeprefix("torch.")
            self.bridge = load_model(name, dtype=kind, device=cfg.device)
            self.layer.max = self.bridge.cfg.n_layers - 1

    def _vector(self) -> tuple[SteeringVector, str, str]:
        """The vector, its name, and the code that makes it."""
        name = self.vector.value
        if self._given:
            made = f"vectors[{name!r}]  # vectors: as given to the panel" if name else ""
            return self._given[name], name, made
        texts = f"{self.plus.value!r}, {self.minus.value or None!r}"
        made = f"sl.SteeringVector.from_prompts(model, {texts}, layer={self.layer.value})"
        return self.made(), "", made

    def _coefficient(self) -> float:
        """That of the slider, which counts in steps and so may miss 0 by its last bit."""
        return float(round(self.coefficient.value, 6)) + 0.0

    def _condition(self) -> tuple[Intervention, str, list[str]]:
        """What steers, its name, and the code that makes it."""
        vector, name, made = self._vector()
        lines = [f"vector = {made}" if made else "# vector: the one given to the panel"]
        if (part := self.fraction.value) < 1:
            vector = vector.truncate(part, self.which.value)
            lines.append(f"vector = vector.truncate({part!r}, {self.which.value!r})")
        kind, coefficient = self.op.value, self._coefficient()
        at: At | None = None
        if self._place:
            first = self.position.value
            numbered = self.at.value == "position"
            at = range(first, first + vector.n_positions) if numbered else self.at.value
        act = self._kinds[kind](vector, at, coefficient)
        layers = sorted(vector.layers)
        span = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
        title = f"{name or vector.meta.get('name', 'vector')}, {span}"
        how = "ablated" if kind == "ablate" else f"coefficient {coefficient:+g}"
        title += f", {how}" if kind in KINDS else f", {kind}, {how}"
        if part < 1:
            title += f", {self.which.value} {100 * part:g} % of its dimensions"
        if self._place:
            title += f", at position {self.position.value}" if numbered else f", at: {at}"
        made = act.code()
        lines += [
            f"# {name}: as the panel's kind has it" for name in re.findall(r"(\w+)=\1\b", made)
        ]
        return act, title, [*lines, f'conditions = {{"unsteered": None, "steered": {made}}}']

    def _run(self) -> Iterator[None]:
        """Generate; the output grows with every step."""
        yield from self._load()
        model, prompt, sampling = self.bridge, self.prompt.value, self._sampling
        n, seed, colour = self.samples.value, self.seed.value, self.colour.value
        condition, title, lines = self._condition()
        self._code = _code(model, lines, prompt, n, seed, sampling, self._options)
        self.listing.value = _listing(self._code)
        rows = decode.make_rows(model, [prompt], [None, condition], n, sampling, seed)
        above = ""

        def cells() -> dict[tuple[int, int], str]:
            texts = {(r.sample, r.condition): r.text or decode.text(model, r) for r in rows}
            return {key: html.escape(text) for key, text in texts.items()}

        for _ in decode.decode(model, rows, sampling):
            self.output.value = above + _side_by_side(prompt, title, cells())
            yield
            if self._options and not above:  # after the first token, which is waited for
                above = self._choices(model, prompt, condition)
        self.output.value = above + _side_by_side(prompt, title, cells())
        if colour:
            yield
            coloured = {**cells(), **_coloured(model, condition, rows)}
            self.output.value = above + _side_by_side(prompt, title, coloured) + _LEGEND

    def _choices(self, model: TransformerBridge, prompt: str, condition: Condition) -> str:
        both = {"unsteered": None, "steered": condition}
        table = choice_probabilities(model, prompt, self._options, both)
        names = [*self._options, "total_probability"]
        head = table_row("", *(f"P({name})" for name in self._options), "total", tag="th")
        body = (
            table_row(row["condition"], *(f"{row[name]:.3f}" for name in names))
            for _, row in table.iterrows()
        )
        return f"<table>{head}{''.join(body)}</table>"


# ---------------------------------------------------------------- what is shown


def _side_by_side(prompt: str, title: str, cells: Mapping[tuple[int, int], str]) -> str:
    """A table of cells (sample, condition) that are HTML; a long prompt stands above, once."""
    bold, above = f"<b>{html.escape(prompt)}</b>", ""
    style = f"width:50%;vertical-align:top;{LINE};padding:4px 12px 4px 0"
    if "\n" in prompt:
        above, bold = f"<tr><td colspan='2' style='{style}'>{bold}</td></tr>", ""
    names = ("unsteered", "steered")
    lines = "".join(
        "<tr>"
        + "".join(
            f"<td data-label='{name}' style='{style}'>{bold}{cells[s, c]}</td>"
            for c, name in enumerate(names)
        )
        + "</tr>"
        for s in range(len(cells) // 2)
    )
    heads = ("unsteered", f"steered: {title}")
    head = "".join(f"<th style='text-align:left;{LINE}'>{html.escape(h)}</th>" for h in heads)
    wide = f"class='{TEXTS}' style='width:95%;table-layout:fixed'"
    return f"<table {wide}>{above}<tr>{head}</tr>{lines}</table>"


def _coloured(
    model: TransformerBridge, condition: Condition, rows: Sequence[decode.Row]
) -> dict[tuple[int, int], str]:
    """The steered cells, tokens coloured by what steering did to their probability."""
    cells = {}
    for row in rows:
        if row.condition == 1 and row.new:
            n, ids = len(row.prompt_ids), row.prompt_ids + row.new
            changes = token_changes(model, [ids], condition, n_prompt=n)
            cells[row.sample, 1] = "".join(
                tables.chip(token.token, token.change, note=f"{token.change:+.2f} nats")
                for token in changes[changes.position >= n].itertuples()
            )
    return cells


_LEGEND = f"<p>{tables.legend('steered / unsteered', (-3, -1, 0, 1, 3))}</p>"


def _code(
    model: TransformerBridge,
    lines: Sequence[str],
    prompt: str,
    n_samples: int,
    seed: int,
    sampling: decode.Sampling,
    options: Sequence[str],
) -> str:
    """The lines that give the same completions, and the same probabilities of the options."""
    kind = str(model.cfg.dtype).removeprefix("torch.")
    how = [repr(model.cfg.model_name)]
    if kind != "float32":
        how.append(f"dtype={kind!r}")
    if torch.device(str(model.cfg.device)).type == "cpu" != pick_device():
        how.append("device='cpu'")
    plain = asdict(decode.Sampling())
    more = {k: v for k, v in asdict(sampling).items() if v != plain[k] or k == "max_new_tokens"}
    more = {"n_samples": n_samples, **more, "seed": seed}
    given = ", ".join(f"{k}={v!r}" for k, v in more.items())
    ask = f"sl.choice_probabilities(model, prompt, {list(options)!r}, conditions)"
    return "\n".join(
        [
            f"model = sl.load_model({', '.join(how)})",
            *lines,
            f"prompt = {prompt!r}",
            f"completions = sl.generate(model, prompt, conditions, {given})",
            *([f"choices = {ask}"] if options else []),
            "sl.tables.side_by_side(completions)",
        ]
    )


def _listing(code: str) -> str:
    """Code with a button that copies it, where the browser lets it."""
    copy = "navigator.clipboard.writeText(this.nextElementSibling.innerText)"
    return (
        f'<button onclick="{copy}" title="copy to the clipboard">copy</button>'
        f"<pre style='{LINE}'>{html.escape(code)}</pre>"
    )
