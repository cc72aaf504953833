"""Controls: sliders in, completions and pictures out. No science in here.

How a panel runs, and what becomes of its mistakes, is in `panel`.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import TYPE_CHECKING, Any

import ipywidgets as ipw
import torch
from matplotlib import pyplot as plt

from . import generation, models, plots, probes, scoring, sweeps
from .interventions import Ablate, Add, At, Condition
from .panel import LINE, WIDE, Panel, in_rows, png, slider, table_row
from .vectors import PLACES, SteeringVector

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge


class _VectorPanel(Panel):
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
        self._bridge = model
        self._vectors: dict[Any, SteeringVector] = {}
        text: Any = ipw.Textarea if long else ipw.Text  # a Text would drop the line breaks
        self.prompt = text(prompt, description="prompt", layout=WIDE, continuous_update=False)
        if long:
            self.prompt.rows = min(prompt.count("\n") + 2, 12)
        self.plus = ipw.Text(plus, description="plus", continuous_update=False)
        self.minus = ipw.Text(minus, description="minus", continuous_update=False)
        self.layer = slider("layer", layer, 0, model.cfg.n_layers - 1)
        self.coefficient = slider("coefficient", coefficient, *coefficient_range, 0.5)

    def _made(self) -> SteeringVector:
        key = (id(self._bridge), self.plus.value, self.minus.value, self.layer.value)
        if key not in self._vectors:
            self._vectors[key] = SteeringVector.from_prompts(
                self._bridge, self.plus.value, self.minus.value or None, layer=self.layer.value
            )
        return self._vectors[key]


class SteeringPanel(_VectorPanel):
    """Unsteered and steered completions side by side, under sliders.

    Args:
        model: the model to steer; another one can be chosen among those in the cache.
        prompt, plus, minus, layer, coefficient: what the panel shows first; ``minus`` empty means
            none.
        vector: use this vector instead of making one from ``plus`` and ``minus``, or choose among
            several by name; layer, texts and model are then fixed.
        prompts: name -> prompt, to choose from; the first one is shown if ``prompt`` is empty.
        options: answers of one token each, such as ``("A", "B")``, whose probability is shown.
        op: ``add`` the vector, or ``ablate`` its direction (which takes one of one position).
        at: ``front``, ``middle``, ``back``, ``prompt``, ``generated``, ``all``, or the first
            position of the vector; adds controls for it. None: where the vector was made for (a
            direction is ablated everywhere), without controls.
        fraction: of the residual dimensions that is kept (`SteeringVector.truncate`); adds
            controls for it and for which dimensions these are. None: all, without controls.
        colour: colour the tokens of finished completions by how much likelier they are under the
            steered model (`scoring.token_changes`).
        n_samples, max_new_tokens, seed, sampling: as for `sweeps.generate`.

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
        self._sampling = generation.Sampling(max_new_tokens=max_new_tokens, **sampling)
        self._code = ""
        name, table = model.cfg.model_name, models.list_models()
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
        self.op = ipw.Dropdown(options=["add", "ablate"], value=op, description="op")
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
        titles = ("more", "copy as code")
        folded = ipw.Accordion([*in_rows(more), self.listing], titles=titles, layout=WIDE)
        self.position.disabled = first is None
        self._show([*sum(groups, []), *more], [*choose, *in_rows(*groups), folded])

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
        name, cfg = self.model.value, self._bridge.cfg
        if name != cfg.model_name:
            self.output.value = f"<p>Loading {html.escape(name)} ...</p>"
            yield
            kind = str(cfg.dtype).removeprefix("torch.")
            self._bridge = models.load_model(name, dtype=kind, device=cfg.device)
            self.layer.max = self._bridge.cfg.n_layers - 1

    def _condition(self) -> tuple[Condition, str, list[str]]:
        """What steers, its name, and the code that makes it."""
        name = self.vector.value
        if self._given:
            vector = self._given[name]
            made = f"vectors[{name!r}]  # vectors: as given to the panel" if name else ""
        else:
            vector = self._made()
            texts = f"{self.plus.value!r}, {self.minus.value or None!r}"
            made = f"sl.SteeringVector.from_prompts(model, {texts}, layer={self.layer.value})"
        lines = [f"vector = {made}" if made else "# vector: the one given to the panel"]
        if (part := self.fraction.value) < 1:
            vector = vector.truncate(part, self.which.value)
            lines.append(f"vector = vector.truncate({part!r}, {self.which.value!r})")
        ablate, coefficient = self.op.value == "ablate", self.coefficient.value
        at: At = "all" if ablate else vector.at
        if self._place:
            first = self.position.value
            numbered = self.at.value == "position"
            at = range(first, first + vector.n_positions) if numbered else self.at.value
        act = Ablate(vector, at) if ablate else Add(vector, at, coefficient)
        how = f"sl.Ablate(vector, {at!r})" if ablate else f"sl.Add(vector, {at!r}, {coefficient!r})"
        layers = sorted(vector.layers)
        span = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
        title = f"{name or vector.meta.get('name', 'vector')}, {span}"
        title += ", ablated" if ablate else f", coefficient {coefficient:+g}"
        return act, title, [*lines, f'conditions = {{"unsteered": None, "steered": {how}}}']

    def _run(self) -> Iterator[None]:
        """Generate; the output grows with every step."""
        yield from self._load()
        model, prompt, sampling = self._bridge, self.prompt.value, self._sampling
        n, seed, colour = self.samples.value, self.seed.value, self.colour.value
        condition, title, lines = self._condition()
        self._code = _code(model, lines, prompt, n, seed, sampling, self._options)
        self.listing.value = _listing(self._code)
        rows = generation.make_rows(model, [prompt], [None, condition], n, sampling, seed)
        above = ""

        def cells() -> dict[tuple[int, int], str]:
            texts = {(r.sample, r.condition): r.text or generation.text(model, r) for r in rows}
            return {key: html.escape(text) for key, text in texts.items()}

        for _ in generation.decode(model, rows, sampling):
            self.output.value = above + _side_by_side(prompt, title, cells())
            yield
            if self._options and not above:  # after the first token, which is waited for
                above = self._choices(model, prompt, condition)
        self.output.value = above + _side_by_side(prompt, title, cells())
        if colour:
            yield
            coloured = {**cells(), **_coloured(model, condition, rows)}
            self.output.value = above + _side_by_side(prompt, title, coloured) + _legend()

    def _choices(self, model: TransformerBridge, prompt: str, condition: Condition) -> str:
        both = {"unsteered": None, "steered": condition}
        table = sweeps.choice_probabilities(model, prompt, self._options, both)
        names = [*self._options, "mass"]
        head = table_row("", *(f"P({name})" for name in self._options), "mass", tag="th")
        body = (
            table_row(row["condition"], *(f"{row[name]:.3f}" for name in names))
            for _, row in table.iterrows()
        )
        return f"<table>{head}{''.join(body)}</table>"


class TokenPanel(_VectorPanel):
    """What a vector does to the next token, and what it says by itself, under sliders.

    Args:
        model, prompt, plus, minus, layer, coefficient, coefficient_range: as for `SteeringPanel`.
        top: how many tokens to show on each side.

    Left: the tokens that gain and lose most probability. Right: the logit lens of the vector and
    its norm beside the stream's, position by position. Texts are escaped, a mistake in an input
    is shown as a sentence.
    """

    def __init__(
        self,
        model: TransformerBridge,
        prompt: str,
        plus: str,
        minus: str = "",
        layer: int = 6,
        coefficient: float = 5.0,
        *,
        coefficient_range: tuple[float, float] = (-10.0, 10.0),
        top: int = 8,
    ):
        super().__init__(model, prompt, plus, minus, layer, coefficient, coefficient_range)
        self._top = top
        rows: list[list[ipw.Widget]] = [[self.prompt], [self.plus, self.minus]]
        rows.append([self.layer, self.coefficient])
        self._show(sum(rows, []), in_rows(*rows))

    def _run(self) -> Iterator[None]:
        """Look; a step is one run of the model."""
        prompt, coefficient = self.prompt.value, self.coefficient.value
        vector = self._made()
        yield
        act = Add(vector, "front", coefficient)
        shift = scoring.next_token_shift(self._bridge, prompt, act)
        yield
        norms = scoring.relative_norms(self._bridge, prompt, vector)
        lens = scoring.logit_lens(self._bridge, vector, top=self._top)
        table = norms.merge(lens, on=["layer", "position"])
        self.output.value = self._render(shift, table, coefficient)

    def _render(self, shift: pd.DataFrame, vector: pd.DataFrame, coefficient: float) -> str:
        change = (shift.p_after - shift.p_before).sort_values()
        picked = [*change.index[::-1][: self._top], *change.index[: self._top][::-1]]
        moved = "".join(
            table_row(repr(row.token), f"{row.p_before:.4f}", f"{row.p_after:.4f}")
            for row in shift.loc[picked].itertuples()
        )
        said = "".join(
            table_row(
                f"{row.position} {row.token_x!r}",
                f"{abs(coefficient) * row.ratio:.2f}",
                "" if row.vector_norm == 0 else " ".join(map(repr, row.top)),
            )
            for row in vector.itertuples()
        )
        head = table_row("next token", "before", f"{coefficient:+g}", tag="th")
        kl = f"KL(steered || unsteered) = {shift.kl_contribution.sum():.3f} nats"
        left = f"<table>{head}{moved}</table><p>{html.escape(kl)}</p>"
        head = table_row("position", "norm / stream", "logit lens of the vector", tag="th")
        right = f"<table>{head}{said}</table>"
        cell = "<div style='flex:1 1 22em;padding-right:2em'>"
        return (
            f"<div style='display:flex;flex-wrap:wrap'>{cell}{left}</div>{cell}{right}</div></div>"
        )


class ExplorerPanel(Panel):
    """Where honest and dishonest answers lie, layer by layer, from activations at hand.

    Args:
        acts: ``[pair, 2, layer, d_model]``, or with one position, as `capture_pairs` returns it.
        labels: of the `ContrastPairs`.
        layers: what to call the layers; 0, 1, ... by default.
        layer: the one shown first; by default the middle one.
        recipes: directions to choose from (see `probes.fit`).

    Directions are fitted on one half of the pairs and everything shown is the other half. No model
    is run.
    """

    def __init__(
        self,
        acts: torch.Tensor,
        labels: pd.DataFrame,
        layers: Sequence[int] | None = None,
        layer: int | None = None,
        recipes: Sequence[str] = ("pc1", "pc2", "pc3", "mean"),
    ):
        super().__init__()
        self._acts = acts[:, :, :, 0] if acts.ndim == 5 and acts.shape[3] == 1 else acts
        self._train, self._test = probes._splits(self._acts, labels, 2, 0, 4)[1]
        self._labels = labels.iloc[[2 * i + side for i in self._test for side in (0, 1)]]
        self._recipes = list(recipes)
        self._layers = list(range(self._acts.shape[2])) if layers is None else list(layers)
        if len(self._layers) != self._acts.shape[2]:
            raise ValueError(
                f"{len(self._layers)} layers are named, the activations have {self._acts.shape[2]}."
            )
        self._fitted: dict[int, dict[str, torch.Tensor]] = {}
        self._drawn: dict[Any, tuple[str, bytes]] = {}
        first = self._layers[len(self._layers) // 2] if layer is None else layer
        self.layer = ipw.SelectionSlider(options=self._layers, value=first, description="layer")
        self.x = ipw.Dropdown(options=self._recipes, description="across")
        self.y = ipw.Dropdown(
            options=self._recipes, index=min(1, len(recipes) - 1), description="up"
        )
        controls = [self.layer, self.x, self.y]
        self._show(controls, in_rows(controls))

    def _run(self) -> Iterator[None]:
        """Draw, or show what was drawn before."""
        key = (self.layer.value, self.x.value, self.y.value)
        yield
        if key not in self._drawn:
            self._drawn[key] = self._draw(*key)
        self.output.value, picture = self._drawn[key]
        self._picture(picture)

    def _draw(self, layer: int, x: str, y: str) -> tuple[str, bytes]:
        here = self._acts[:, :, self._layers.index(layer)]
        if layer not in self._fitted:
            self._fitted[layer] = probes.fit(here[self._train], self._recipes)
        directions, held_out = self._fitted[layer], here[self._test]
        frame = probes.projections(held_out, self._labels, directions)
        said = []
        for name in dict.fromkeys([x, y]):
            share, low, high = probes.pair_accuracy(held_out, directions[name])
            said.append(f"{name} {share:.2f} ({low:.2f} to {high:.2f})")
        head = f"Layer {layer}, {len(held_out)} held-out pairs. The honest answer is higher:"
        with plt.rc_context({**plots.STYLE, "figure.constrained_layout.use": False}):
            figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
        figure.subplots_adjust(0.06, 0.13, 0.99, 0.97, 0.15)  # to lay out anew is half the time
        plots.groups_scatter(frame, x, y, ax=left)
        plots.group_histogram(frame, x, ax=right)
        said_all = html.escape(f"{head} " + ", ".join(said))
        return f"<p>{said_all}</p>", png(figure)


class HeatmapPanel(Panel):
    """Projections on a direction by layer and position while generating.

    Args:
        model: runs prompts of one's own; None leaves that out.
        directions: as for `capture_generation`.
        groups: name -> ``[prompt, layer, position]``, as `capture_generation` returns it.
        prompts: name -> the prompts of that group, to show beside a single one.
        prompt_positions, cosine: as the groups were captured.
        prompt: the first of one's own prompts.
        coefficient_range: of the directions, added while a prompt of one's own runs.

    Groups, their prompts, and own prompts share one scale; differences of groups another.
    """

    def __init__(
        self,
        model: TransformerBridge | None,
        directions: SteeringVector,
        groups: Mapping[str, torch.Tensor],
        prompts: Mapping[str, Sequence[str]] | None = None,
        *,
        prompt_positions: int = 3,
        prompt: str = "I went up to my friend and said",
        coefficient_range: tuple[float, float] = (-10.0, 10.0),
        cosine: bool = False,
    ):
        super().__init__()
        self._cosine = cosine
        self._bridge, self._directions, self._groups = model, directions, dict(groups)
        self._prompts, self._before = prompts or {}, prompt_positions
        self._layers = sorted(directions.layers)
        shapes = [tuple(values.shape[1:]) for values in self._groups.values()]
        if len(set(shapes)) != 1 or len(shapes[0]) != 2 or shapes[0][0] != len(self._layers):
            raise ValueError(
                f"Groups must be [prompt, layer, position] with {len(self._layers)} layers and as "
                f"many positions each, got {[list(v.shape) for v in self._groups.values()]}."
            )
        self._width = shapes[0][1] - prompt_positions
        pairs = list(combinations(self._groups, 2))
        values = torch.cat([v.flatten() for v in self._groups.values()]).abs()
        gaps = [self._mean(a, b).flatten() for a, b in pairs]
        self._limit = _reach(values, 0.95)
        self._gap_limit = _reach(torch.cat(gaps).abs(), 1.0) if gaps else self._limit
        choices: list[Any] = [(f"{a} − {b}", (a, b)) for a, b in pairs]
        choices += [(name, (name,)) for name in self._groups]
        choices += [("own prompt", ())] if model is not None else []
        self.show = ipw.Dropdown(options=choices, description="show", layout=WIDE)
        self.number = slider("prompt", 0, 0, 1)
        self.prompt = ipw.Text(prompt, description="prompt", layout=WIDE, continuous_update=False)
        self.coefficient = slider("coefficient", 0.0, *coefficient_range, 0.5)
        controls = [self.show, self.number, self.prompt, self.coefficient]
        self._fit_controls()
        self._show(controls, controls)

    def _fit_controls(self) -> None:
        """Show only the controls that mean something now."""
        chosen = self.show.value
        self.number.layout.display = "" if len(chosen) == 1 else "none"
        for own in (self.prompt, self.coefficient):
            own.layout.display = "none" if chosen else ""
        if len(chosen) == 1:
            self.number.max = len(self._groups[chosen[0]])

    def _changed(self, change: Any) -> None:
        if change["owner"] is self.show:
            self._fit_controls()
        super()._changed(change)

    def _mean(self, *names: str) -> torch.Tensor:
        """``[layer, position]``: the mean of a group, less that of another."""
        means = [self._groups[name].nanmean(0) for name in names]
        return means[0] - means[1] if len(means) > 1 else means[0]

    def _run(self) -> Iterator[None]:
        """Draw; a prompt of one's own runs first."""
        chosen, number = self.show.value, self.number.value
        said = "0 is the mean over all prompts." if len(chosen) == 1 else ""
        limit = self._gap_limit if len(chosen) == 2 else self._limit
        yield
        if not chosen:
            text, coefficient = self.prompt.value, self.coefficient.value
            title = f"own prompt, coefficient {coefficient:+g}"
            act = Add(self._directions, "generated", coefficient)
            for found in sweeps.read_generation(
                self._bridge, text, self._directions, self._width, self._before, act, self._cosine
            ):
                values = found[0]
                yield
        elif len(chosen) == 1 and number:
            values, title = self._groups[chosen[0]][number - 1], f"{chosen[0]}, prompt {number}"
            said = "".join(self._prompts.get(chosen[0], [])[number - 1 : number])
        else:
            values, title = self._mean(*chosen), " − ".join(chosen)
        figure = plots.generation_heatmap(
            values.numpy(), self._layers, self._before, title=title.replace("$", r"\$"),
            label="cosine" if self._cosine else "projection", limit=limit,
        )  # fmt: skip
        self.output.value = f"<p style='{LINE}'>{html.escape(said)}</p>"
        self._picture(png(figure))


# ---------------------------------------------------------------- what is shown


def _side_by_side(prompt: str, title: str, cells: Mapping[tuple[int, int], str]) -> str:
    """A table of cells (sample, condition) that are HTML; a long prompt stands above, once."""
    bold, above = f"<b>{html.escape(prompt)}</b>", ""
    style = f"width:50%;vertical-align:top;{LINE};padding:4px 12px 4px 0"
    if "\n" in prompt:
        above, bold = f"<tr><td colspan='2' style='{style}'>{bold}</td></tr>", ""
    lines = "".join(
        "<tr>" + "".join(f"<td style='{style}'>{bold}{cells[s, c]}</td>" for c in (0, 1)) + "</tr>"
        for s in range(len(cells) // 2)
    )
    heads = ("unsteered", f"steered: {title}")
    head = "".join(f"<th style='text-align:left;{LINE}'>{html.escape(h)}</th>" for h in heads)
    return f"<table style='width:95%;table-layout:fixed'>{above}<tr>{head}</tr>{lines}</table>"


def _coloured(
    model: TransformerBridge, condition: Condition, rows: Sequence[generation.Row]
) -> dict[tuple[int, int], str]:
    """The steered cells, tokens coloured by what steering did to their probability."""
    cells = {}
    for row in rows:
        if row.condition == 1 and row.new:
            n, ids = len(row.prompt_ids), row.prompt_ids + row.new
            changes = scoring.token_changes(model, [ids], condition, n_prompt=n)
            cells[row.sample, 1] = "".join(
                plots._chip(token.token, token.change, 3.0, f"{token.change:+.2f} nats")
                for token in changes[changes.position >= n].itertuples()
            )
    return cells


def _legend() -> str:
    steps = [(step, f" ×{math.exp(step):.2g} ") for step in (-3, -1, 0, 1, 3)]
    chips = "".join(plots._chip(text, step, 3.0, "") for step, text in steps)
    return f"<p>probability of the token, steered / unsteered: {chips}</p>"


def _code(
    model: TransformerBridge,
    lines: Sequence[str],
    prompt: str,
    n_samples: int,
    seed: int,
    sampling: generation.Sampling,
    options: Sequence[str],
) -> str:
    """The lines that give the same completions, and the same probabilities of the options."""
    kind = str(model.cfg.dtype).removeprefix("torch.")
    how = [repr(model.cfg.model_name)]
    if kind != "float32":
        how.append(f"dtype={kind!r}")
    if torch.device(str(model.cfg.device)).type == "cpu" != models._device(None):
        how.append("device='cpu'")
    plain = asdict(generation.Sampling())
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
            "sl.plots.side_by_side(completions)",
        ]
    )


def _listing(code: str) -> str:
    """Code with a button that copies it, where the browser lets it."""
    copy = "navigator.clipboard.writeText(this.nextElementSibling.innerText)"
    return (
        f'<button onclick="{copy}" title="copy to the clipboard">copy</button>'
        f"<pre style='{LINE}'>{html.escape(code)}</pre>"
    )


def _reach(values: torch.Tensor, share: float) -> float:
    """A value below which this share of ``values`` lies, NaN left out."""
    known = values[~values.isnan()].sort().values
    return (float(known[int(share * (len(known) - 1))]) if len(known) else 0.0) or 1.0
