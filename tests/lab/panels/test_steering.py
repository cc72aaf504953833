"""The steering panel shows what `generate` gives, under every control: places, fractions, answers,
colours, other models, kinds of intervention of one's own; and so does the code that it shows."""

from __future__ import annotations

import asyncio
import html
import os
import re
import signal
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ipywidgets as ipw
import pandas as pd
import pytest
import torch
from conftest import adding, n_hooks, reference_logits, write_tiny

import steerlib as sl
from steerlib.engine import decode
from steerlib.interventions import where
from steerlib.lab.panels import SteeringPanel, steering

PROMPT = "I went up to my friend & said"
CHAT = "Question: is <b>rain</b> wet?\n\nAnswer: ("
EVIL = "<script>alert(1)</script>"
SCRIPT = f"I went up to my friend & said {EVIL} that"
PAIRS = [("I love dogs", "I hate dogs"), ("a good day", "a bad day"), ("she laughed", "she cried")]


@pytest.fixture
def model(tiny: Any) -> Any:
    return tiny("llama")[0]


@pytest.fixture
def direction(model: Any) -> Any:
    return sl.SteeringVector.from_pairs(model, PAIRS, layers=[1, 2])


def panel(model: Any, prompt: str = PROMPT, **more: Any) -> SteeringPanel:
    given = {"plus": " wedding", "minus": " ", "layer": 2, "coefficient": 4.0, "max_new_tokens": 5}
    return SteeringPanel(model, prompt, **{**given, **more})


def cells(shown: str) -> list[str]:
    """The text of every cell of the last table, marks removed."""
    table = shown[shown.rindex("<table") :]
    found = re.findall(r"<td[^>]*>(.*?)</td>", table, re.S)
    return [html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in found]


def letters(text: str) -> str:
    """Without what is no character: tokens may be parts of one."""
    return text.replace("\ufffd", "")


def expected(model: Any, prompt: str, condition: Any, n: int = 2, **more: Any) -> list[str]:
    """The cells as they should be: unsteered and steered, sample by sample."""
    both = {"unsteered": None, "steered": condition}
    run = {"n_samples": n, "max_new_tokens": 5, "progress": False, **more}
    frame = sl.generate(model, prompt, both, **run)
    by = frame.set_index(["sample", "condition"]).completion
    start = "" if "\n" in prompt else prompt
    return [start + by[s, c] for s in range(n) for c in both]


# ---------------------------------------------------------------- what is shown


def test_a_panel_shows_what_generate_gives_and_escapes_it(model: Any) -> None:
    shown = panel(model, SCRIPT).output.value
    assert "<script>" not in shown and "&lt;script&gt;" in shown and "coefficient +4" in shown
    vector = sl.SteeringVector.from_prompts(model, " wedding", " ", layer=2)
    conditions = {"unsteered": None, "steered": 4 * vector}
    frame = sl.generate(model, SCRIPT, conditions, 2, 5, progress=False)
    assert all(html.escape(text) in shown for text in frame.completion)


def test_a_mistake_becomes_a_sentence(model: Any) -> None:
    p = panel(model)
    p.prompt.value = ""
    assert "empty" in p.output.value and "<table" not in p.output.value
    p.prompt.value = "I"
    p.plus.value = "a much longer text than the prompt itself is"
    assert "shorter vector" in p.output.value
    p.plus.value = " wedding"
    p.prompt.value = "I went up"
    assert "<table" in p.output.value


def test_a_moved_slider_cancels_the_run_under_way(model: Any) -> None:
    p = panel(model)

    async def move() -> tuple[str, list[int]]:
        leftovers = []
        p.coefficient.value = 1.0
        first = p._task
        for _ in range(3):  # a few tokens in, the model is free of hooks
            await asyncio.sleep(0.002)
            leftovers.append(n_hooks(model))
        p.coefficient.value = -3.0
        second = p._task
        assert first is not None and second is not None and second is not first
        await asyncio.gather(first, second, return_exceptions=True)
        assert first.cancelled() or first.done()
        return p.output.value, leftovers

    shown, leftovers = asyncio.run(move())
    assert "coefficient -3" in shown
    assert leftovers == [0, 0, 0]
    fresh = panel(model)
    fresh.coefficient.value = -3.0  # no event loop here: runs at once
    assert fresh.output.value == shown


def test_a_panel_takes_a_ready_vector(model: Any) -> None:
    pairs = [("I love dogs", "I hate dogs"), ("a good day", "a bad day")]
    direction = sl.SteeringVector.from_pairs(model, pairs, layers=[2])
    shown = SteeringPanel(model, "I went", vector=direction, coefficient=9, max_new_tokens=4)
    frame = sl.generate(model, "I went", {"s": 9 * direction}, 2, 4, progress=False)
    assert all(html.escape(text) in shown.output.value for text in frame.completion)


@pytest.mark.parametrize("at", ["front", "back", 3])
def test_a_panel_with_a_place_acts_there(model: Any, at: str | int) -> None:
    p = panel(model, at=at)
    vector = sl.SteeringVector.from_prompts(model, " wedding", " ", layer=2)
    k = vector.n_positions
    place = list(range(at, at + k)) if isinstance(at, int) else at
    frame = sl.generate(model, PROMPT, {"s": sl.Add(vector, place, 4)}, 2, 5, progress=False)
    assert all(html.escape(text) in p.output.value for text in frame.completion)
    assert p.position.disabled == isinstance(at, str)
    assert f", at: {at}" in p.output.value or f", at position {at}" in p.output.value
    p.at.value = "middle"
    assert p.position.disabled and p.output.value == panel(model, at="middle").output.value
    p.at.value, p.position.value = "position", 2
    assert p.output.value == panel(model, at=2).output.value


def test_a_panel_with_a_fraction_keeps_that_part(model: Any) -> None:
    p = panel(model, fraction=0.5)
    part = sl.SteeringVector.from_prompts(model, " wedding", " ", layer=2).truncate(0.5)
    frame = sl.generate(model, PROMPT, {"s": 4 * part}, 2, 5, progress=False)
    assert all(html.escape(text) in p.output.value for text in frame.completion)
    assert "first 50 % of its dimensions" in p.output.value
    p.which.value = "last"
    assert "last 50 % of its dimensions" in p.output.value
    last = panel(model, fraction=0.5)
    last.which.value = "last"
    assert p.output.value == last.output.value
    p.fraction.value = 1.0
    assert p.output.value == panel(model).output.value


# ---------------------------------------------------------------- copy as code

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no minus": {"minus": ""},
    "quotes": {"plus": "\"'\\{"},
    "back": {"at": "back"},
    "position": {"at": 2},
    "fraction": {"fraction": 0.5},
    "sampling": {"n_samples": 3, "seed": 7, "top_p": 0.9, "temperature": 0.7},
    "options": {"options": ("A", "B")},
    "chat": {"prompt": CHAT, "options": ("A", "B")},
}


@pytest.mark.parametrize("case", CASES)
def test_the_code_gives_what_is_on_screen(model: Any, case: str) -> None:
    p = panel(model, **CASES[case])
    space: dict[str, Any] = {"sl": sl}
    exec(p.code(), space)
    frame = space["completions"].set_index(["sample", "condition"]).completion
    n = p.samples.value
    start = "" if "\n" in p.prompt.value else p.prompt.value
    shown = [start + frame[s, c] for s in range(n) for c in ("unsteered", "steered")]
    assert cells(p.output.value)[-2 * n :] == shown
    assert any(frame[s, "unsteered"] != frame[s, "steered"] for s in range(n))
    if "options" in CASES[case]:
        assert f"{space['choices'].total_probability[1]:.3f}" in p.output.value
    assert html.escape(p.code()) in p.listing.value and len(p.code().splitlines()) <= 7


def test_the_code_follows_the_controls_and_names_given_vectors(model: Any, direction: Any) -> None:
    vectors = {"honest's": direction, "back": -direction}
    p = panel(model, vector=vectors, coefficient=9.0)
    assert 'vectors["honest\'s"]' in p.code()
    p.vector.value, p.op.value, p.seed.value = "back", "ablate", 3
    space: dict[str, Any] = {"sl": sl, "vectors": vectors}
    exec(p.code(), space)
    assert set(space["completions"].completion) == {
        text.removeprefix(PROMPT) for text in cells(p.output.value)
    }
    assert cells(p.output.value) == expected(model, PROMPT, sl.Ablate(direction), seed=3)
    alone = panel(model, vector=direction, coefficient=9.0)
    assert alone.code().splitlines()[1].startswith("# vector: the one given")
    exec(alone.code(), space := {"sl": sl, "vector": direction})
    assert cells(alone.output.value)[1] == PROMPT + space["completions"].completion[2]


def test_no_code_for_a_mistake(model: Any) -> None:
    p = panel(model)
    p.prompt.value = ""
    assert p.code() == "" and "from_prompts" not in p.listing.value


# ---------------------------------------------------------------- what is chosen


def test_ablation_takes_one_position(model: Any, direction: Any) -> None:
    p = panel(model, vector=direction, op="ablate")
    assert "ablated" in p.output.value and "coefficient" not in p.output.value
    assert cells(p.output.value) == expected(model, PROMPT, sl.Ablate(direction, "all"))
    p.op.value = "add"
    assert cells(p.output.value) == expected(model, PROMPT, sl.Add(direction, "generated", 4))
    words = panel(model, op="ablate")
    assert "needs a direction (one position)" in words.output.value
    assert "<table" not in words.output.value
    placed = panel(model, vector=direction, op="ablate", at="prompt")
    assert cells(placed.output.value) == expected(model, PROMPT, sl.Ablate(direction, "prompt"))


@dataclass(frozen=True, eq=False)
class Hold(sl.Intervention):
    """A kind of one's own: the stream's projection on a direction becomes ``to``."""

    vector: sl.SteeringVector
    at: Any = "all"
    to: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", where(self.at))

    def operands(self, layer: int) -> tuple[torch.Tensor, ...]:
        unit = torch.nn.functional.normalize(self.vector.layers[layer], dim=-1)
        return unit, torch.full((1, 1), self.to)

    @staticmethod
    def apply(stream: torch.Tensor, *operands: torch.Tensor) -> torch.Tensor:
        unit, to = operands
        return stream + (to - (stream * unit).sum(-1, keepdim=True)) * unit


def test_a_kind_of_ones_own(tiny: Any, direction: Any) -> None:
    """A class and a line in ``kinds=``: the panel runs it, and writes the code of it."""
    model, plain = tiny("llama")

    def hold(vector: Any, at: Any, coefficient: float) -> Hold:
        return Hold(vector, "all" if at is None else at, coefficient)

    p = panel(model, vector=direction, op="hold", kinds={"hold": hold}, coefficient=3.0)
    assert p.op.options == ("add", "ablate", "hold")
    assert "hold, coefficient +3" in p.output.value
    act = Hold(direction, "all", 3.0)
    assert cells(p.output.value) == expected(model, PROMPT, act)

    def by_hand(unit: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        return stream - torch.outer(stream @ unit, unit) + 3 * unit

    edits = [
        (layer, "resid_post", partial(by_hand, v[0] / v[0].norm()))
        for layer, v in direction.layers.items()
    ]
    logits = reference_logits(plain, sl.encode(model, PROMPT), edits)
    torch.testing.assert_close(sl.steered_logits(model, PROMPT, act)[0], logits, atol=1e-4, rtol=0)

    assert p.code().splitlines()[2].endswith("\"steered\": Hold(vector, at='all', to=3.0)}")
    space: dict[str, Any] = {"sl": sl, "vector": direction, "Hold": Hold}
    exec(p.code(), space)
    texts = space["completions"].set_index(["sample", "condition"]).completion
    assert cells(p.output.value)[1] == PROMPT + texts[0, "steered"]

    p.coefficient.value = -3.0
    assert cells(p.output.value) == expected(model, PROMPT, Hold(direction, "all", -3.0))
    p.op.value = "add"
    assert cells(p.output.value) == expected(model, PROMPT, -3 * direction)
    placed = panel(model, vector=direction, op="hold", kinds={"hold": hold}, at="generated")
    assert cells(placed.output.value) == expected(model, PROMPT, Hold(direction, "generated", 4.0))


def test_samples_and_vectors_and_prompts_to_choose_from(model: Any, direction: Any) -> None:
    vectors = {"a": direction, "b": -2 * direction}
    prompts = {"first": PROMPT, EVIL: "The ship left"}
    p = panel(model, "", vector=vectors, prompts=prompts)
    assert p.prompt.value == PROMPT and isinstance(p.prompt, ipw.Text)
    assert "a, layers 1 to 2" in p.output.value
    p.vector.value, p.samples.value = "b", 3
    assert cells(p.output.value) == expected(model, PROMPT, 4 * vectors["b"], 3)
    p.example.value = EVIL
    assert p.prompt.value == "The ship left"
    assert cells(p.output.value) == expected(model, "The ship left", 4 * vectors["b"], 3)


def test_a_chat_prompt_keeps_its_lines(model: Any) -> None:
    p = panel(model, CHAT)
    assert isinstance(p.prompt, ipw.Textarea) and p.prompt.value == CHAT
    bold = f"<b>{html.escape(CHAT)}</b>"
    assert p.output.value.count(bold) == 1  # above the columns, once
    vector = sl.SteeringVector.from_prompts(model, " wedding", " ", layer=2)
    assert cells(p.output.value)[1:] == expected(model, CHAT, 4 * vector)


def test_the_slider_reaches_its_first_value(model: Any) -> None:
    assert panel(model, coefficient=15.0).coefficient.value == 15


def test_answers_have_their_probability(model: Any, direction: Any) -> None:
    p = panel(model, CHAT, vector=direction, options=("A", "B"))
    both = {"u": None, "s": 4 * direction}
    table = sl.choice_probabilities(model, CHAT, ["A", "B"], both)
    shown = cells(p.output.value[: p.output.value.rindex("<table")])
    numbers = table[["A", "B", "total_probability"]].map("{:.3f}".format).to_numpy()
    assert shown == ["unsteered", *numbers[0], "steered", *numbers[1]]
    odd = panel(model, CHAT, vector=direction, options=("many tokens", "B"))
    assert "is" in odd.output.value and "tokens for" in odd.output.value


# ---------------------------------------------------------------- colours


@pytest.mark.parametrize("at", ["generated", "back", "front"])
def test_tokens_are_coloured_by_their_change(tiny: Any, direction: Any, at: str) -> None:
    """Against hooks written by hand on the plain model."""
    model, plain = tiny("llama")
    p = panel(model, vector=direction, at=at, colour=True, n_samples=1, coefficient=6.0)
    sampling = decode.Sampling(5)
    steered = sl.Add(direction, at, 6)
    (row,) = decode.make_rows(model, [PROMPT], [steered], 1, sampling, 0)
    decode.run(model, [row], sampling)
    ids, n = row.prompt_ids + row.new, len(row.prompt_ids)
    where = {"generated": range(n - 1, 99), "back": [n - 1], "front": [0]}[at]
    edits = [
        (layer, "resid_post", adding(6 * tensor, list(where)))
        for layer, tensor in direction.layers.items()
    ]
    target = torch.tensor(ids[1:])[:, None]
    before, after = (
        reference_logits(plain, ids, e)[:-1].log_softmax(-1).gather(1, target)[:, 0]
        for e in ([], edits)
    )
    change = (after - before)[n - 1 :]
    shown = [float(x) for x in re.findall(r"title='([-+.\d]+) nats'", p.output.value)]
    assert shown == pytest.approx(change.tolist(), abs=0.006) and max(map(abs, shown)) > 0.1
    plain = expected(model, PROMPT, steered, 1)
    assert list(map(letters, cells(p.output.value))) == list(map(letters, plain))


def test_colours_come_and_go_with_their_control(model: Any) -> None:
    p = panel(model)
    plain = p.output.value
    assert "nats" not in plain
    p.colour.value = True
    assert "nats" in p.output.value and "×20" in p.output.value
    assert list(map(letters, cells(p.output.value))) == list(map(letters, cells(plain)))
    p.colour.value = False
    assert p.output.value == plain


# ---------------------------------------------------------------- another model


def test_another_model_brings_its_layers(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(tmp_path / "small", seed=1, layers=2)
    small = sl.load_model(str(tmp_path / "small"), device="cpu")
    names = [str(tmp_path / "small"), str(tmp_path / "absent"), "far away"]
    table = pd.DataFrame({"name": names, "in cache": [True, True, False]})
    monkeypatch.setattr(steering, "list_models", lambda: table)
    p = panel(model, layer=3)
    assert p.model.options == (model.cfg.model_name, *names[:2]) and not p.model.disabled
    before = p.output.value
    p.model.value = names[0]
    assert (p.layer.max, p.layer.value) == (1, 1)
    assert p.output.value == panel(small, layer=1).output.value != before
    assert "small" in p.code()
    p.model.value = names[1]
    assert "there is no folder" in p.output.value and "<table" not in p.output.value
    p.model.value = model.cfg.model_name
    p.layer.value = 3
    assert p.layer.max == 3 and p.output.value == before
    ready = sl.SteeringVector.from_prompts(model, "a", layer=1)
    assert panel(model, vector=ready).model.disabled


# ---------------------------------------------------------------- threads and interrupts


def test_a_slider_moved_in_another_thread_runs_in_the_panels_own(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    plain = decode.decode

    def noted(*args: Any, **kwargs: Any) -> Any:
        threads.append(threading.current_thread())
        yield from plain(*args, **kwargs)

    monkeypatch.setattr(decode, "decode", noted)

    async def move() -> str:
        p = panel(model)
        await asyncio.to_thread(setattr, p.coefficient, "value", 1.0)
        await asyncio.to_thread(setattr, p.coefficient, "value", -3.0)
        for _ in range(500):
            await asyncio.sleep(0.01)
            if p._task is not None and p._task.done():
                break
        return p.output.value

    shown = asyncio.run(move())
    assert shown == panel(model, coefficient=-3.0).output.value
    assert len(threads) >= 3 and set(threads) == {threading.main_thread()}


def test_an_interrupt_ends_the_run_and_not_the_kernel(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal in the middle of a token, while the kernel ignores them, as an idle kernel does."""
    sample, calls = decode.sample, []

    def kill(*args: Any) -> Any:
        calls.append(n_hooks(model))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return sample(*args)

    async def move(p: SteeringPanel) -> None:
        p.coefficient.value = 1.0
        assert p._task is not None
        await p._task  # the exception goes no further

    p = panel(model)
    monkeypatch.setattr(decode, "sample", kill)
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        asyncio.run(move(p))
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert len(calls) == 3 and n_hooks(model) == 0
    assert "Interrupted" in p.output.value and "<table" not in p.output.value
    monkeypatch.undo()
    p.coefficient.value = 4.0
    assert p.output.value == panel(model).output.value


def test_an_interrupt_in_the_cell_goes_on_to_the_cell(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(decode, "sample", kill)
    with pytest.raises(KeyboardInterrupt):
        panel(model)
    assert n_hooks(model) == 0


def test_an_error_in_the_middle_is_a_sentence(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    p = panel(model)

    def fail(*args: Any) -> Any:
        raise RuntimeError("shapes\nsecond line")

    monkeypatch.setattr(decode, "sample", fail)
    p.coefficient.value = 1.0
    assert "RuntimeError: shapes" in p.output.value and "second line" not in p.output.value
    assert "<table" not in p.output.value and p.code() == "" and n_hooks(model) == 0


# ---------------------------------------------------------------- markup, and pages without widgets


def test_markup_is_text_everywhere(
    model: Any, direction: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "text", lambda model, row: EVIL)
    p = panel(model, EVIL, plus=EVIL, minus="<b>", colour=True, options=("<", "B"))
    named = panel(model, EVIL, vector={EVIL: direction}, prompts={EVIL: EVIL}, colour=True)
    for shown in (p, named):
        assert "&lt;script&gt;alert(1)" in shown.output.value and "nats" in shown.output.value
        page = shown._repr_mimebundle_()["text/html"]
        for part in (shown.output.value, shown.listing.value, page):
            assert "<script" not in part and "<b>alert" not in part


def test_a_page_without_widgets_shows_the_output(model: Any) -> None:
    p = panel(model)
    page = p._repr_mimebundle_()
    assert page["text/html"] == p.output.value and "completion" not in page["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in page
    assert "image/png" not in page
