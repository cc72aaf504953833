"""The page of the app: one setting, and everything that it does; presets, and links."""

from __future__ import annotations

import asyncio
import html
import re
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import pytest
from conftest import n_hooks

import steerlib as sl
from steerlib.lab.panels import AppPanel, app, presets
from steerlib.lab.panels.presets import TEXTS, Preset

EVIL = "<script>alert(1)</script>"
PROMPT = "I went up to my friend and said"


def preset(label: str, works: bool = True, **more: Any) -> Preset:
    given = {
        "vector": TEXTS, "plus": " wedding", "minus": " ", "prompt": PROMPT, "layer": 2,
        "coefficient": 4.0, "measure": "weddings", "effect": 2.0, "low": 1.0, "high": 3.0,
        "n": 9, "noise": 0.5, "works": works,
    }  # fmt: skip
    return Preset(label, **{**given, **more})


GALLERY = [
    preset("weddings"),
    preset("dragons", plus="Dragons", minus="People", coefficient=-1.5, layer=1, measure="dragons"),
    preset("past", vector="pairs: past", plus="", minus="", coefficient=0.3, measure="past"),
    preset("love", works=False),
]


@pytest.fixture
def model(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(presets, "gallery", lambda name: GALLERY)
    return tiny("llama")[0]


def panel(model: Any, query: str = "", **more: Any) -> AppPanel:
    return AppPanel(model, query, max_new_tokens=3, n_samples=1, **more)


def bare(shown: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", " ", shown))


def button(p: AppPanel, label: str) -> Any:
    rows = [row for row in p._gallery.children if hasattr(row, "children")]
    (found,) = [b for row in rows for b in row.children if b.description == label]
    return found


# ---------------------------------------------------------------- what is shown


def test_measures_are_those_of_the_package(model: Any) -> None:
    p = panel(model)
    vector = sl.SteeringVector.from_prompts(model, " wedding", " ", layer=2)
    demo = sl.demonstrations.load("15b")
    both = {"unsteered": None, "steered": 4 * vector}
    frame = sl.propensity(model, PROMPT, demo.targets[:5], demo.references[:5], both)
    before, after = frame.propensity
    shown = bare(p.measures.value)
    assert f"{before:+.1f} → {after:+.1f}:" in shown and f"{after - before:+.1f} nats" in shown
    shift = sl.next_token_shift(model, PROMPT, 4 * vector)
    assert f"here {shift.kl_contribution.sum():.2f} nats" in " ".join(shown.split())
    neutral = sl.behaviours.neutral("test")[:8]
    kl = sl.kl_by_prompt(model, neutral, {"s": 4 * vector}).kl.mean()
    assert f"8 neutral prompts {kl:.2f} nats" in " ".join(shown.split())
    p.measure.value = app.NOTHING
    assert "ropensity" not in p.measures.value and "KL" in p.measures.value


def test_a_behaviour_is_measured_on_its_own_prompts(model: Any) -> None:
    p = panel(model)
    p.measure.value = "past"
    rows = sl.behaviours.load("past").rows("test", 8)
    act = {"steered": 4 * sl.SteeringVector.from_prompts(model, " wedding", " ", layer=2)}
    effects = sl.behaviours.load("past").effects(model, act, "test", 8)
    mean, low, high = sl.stats.clustered_interval(effects.effect, effects.prompt)
    said = f"{mean:+.1f} nats [{low:.1f}, {high:.1f}]"
    assert said in re.sub(" +", " ", bare(p.measures.value)) and len(rows) == 8


def test_the_schematic_shows_where_the_vector_enters(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    plain = app.plots.schematic

    def noted(*args: Any, **more: Any) -> Any:
        drawn.append((args, more))
        return plain(*args, **more)

    monkeypatch.setattr(app.plots, "schematic", noted)
    p = panel(model)
    (change, tokens, layer, entered, shift), more = drawn[-1]
    vector = sl.SteeringVector.from_prompts(model, " wedding", " ", layer=2)
    norms = vector.norm()[2]
    assert layer == 2 and entered == [i for i, x in enumerate(norms) if x]
    assert tokens[0] == "(begin)" and len(tokens) == change.shape[1] <= app.COLUMNS + 2
    assert (change[:2] == 0).all() and (change[2:, entered] > 0).all()
    assert "+4" in more["vector"] and "likelier" in more["title"]
    assert re.search(
        r'<img src="data:image/png;base64,[^"]+" alt="Tokens by layers', p.figure.value
    )
    p.at.value = "back"
    n = len(sl.encode(model, PROMPT))
    (change, tokens, _, entered, _), _ = drawn[-1]
    assert entered and max(entered) == len(tokens) - 1 and n >= len(entered)
    p.source.value = "pairs: past"
    (_, tokens, _, entered, _), _ = drawn[-1]
    assert entered == list(range(entered[0], len(tokens)))


def test_next_tokens_are_paired_bars(model: Any) -> None:
    p = panel(model)
    vector = sl.SteeringVector.from_prompts(model, " wedding", " ", layer=2)
    shift = sl.next_token_shift(model, PROMPT, 4 * vector)
    best = shift.loc[(shift.p_after - shift.p_before).idxmax()]
    said = f"{best.token!r}: {best.p_before:.4f}, then {best.p_after:.4f}"
    assert f'aria-label="{html.escape(said)}"' in p.next.value
    assert p.next.value.count('role="img"') == 2 * app.TOP
    assert "logit lens" in p.next.value
    p.source.value = "pairs: past"  # acts on generated tokens: there is no front to compare with
    assert "logit lens" not in p.next.value and 'role="img"' in p.next.value


def test_what_is_late_is_pale_and_then_not(model: Any) -> None:
    p = panel(model)
    late = (p.measures, p.figure, p.next)
    assert all(app.LATE not in part._dom_classes for part in late)

    async def move() -> list[bool]:
        p.coefficient.value = 2.0
        task, seen = p._task, []
        assert task is not None
        while not task.done():
            seen.append(app.LATE in p.measures._dom_classes)
            assert n_hooks(model) == 0
            await asyncio.sleep(0)
        return seen

    seen = asyncio.run(move())
    assert True in seen and all(app.LATE not in part._dom_classes for part in late)
    p.prompt.value = ""
    assert "empty" in p.output.value and not any(part.value for part in late)


def test_a_moved_slider_cancels_the_measures_under_way(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = panel(model)

    async def move() -> None:
        p.coefficient.value = 1.0
        first = p._task
        while app.LATE in p.measures._dom_classes or p.coefficient.value == 4.0:
            await asyncio.sleep(0)  # until the first measure is there
        assert first is not None and not first.done()
        p.coefficient.value = -3.0
        second = p._task
        assert second is not None
        await asyncio.gather(first, second, return_exceptions=True)
        assert first.cancelled()

    asyncio.run(move())
    fresh = panel(model)
    fresh.coefficient.value = -3.0
    for part in ("output", "measures", "figure", "next", "link"):
        assert getattr(p, part).value == getattr(fresh, part).value, part


def test_in_a_kernel_the_page_need_not_wait_for_the_first_texts(model: Any) -> None:
    async def show() -> str:
        p = panel(model)
        assert p.output.value == "" and p._task is not None
        await p._task
        return p.output.value

    assert asyncio.run(show()) == panel(model).output.value != ""


def test_markup_is_text_everywhere(model: Any) -> None:
    p = panel(
        model,
        f"prompt={EVIL}+then+what+comes+behind+it+and+goes+on+and+on+for+long&plus={EVIL}&layer={EVIL}&{EVIL}=1",
    )
    for part in (p.output, p.measures, p.figure, p.next, p.link, p.notice, p.listing):
        assert "<script" not in part.value
    assert "&lt;script" in p.output.value and "&lt;script" in p.notice.value


# ---------------------------------------------------------------- the gallery


def test_a_preset_sets_every_control_and_says_how_it_did(model: Any) -> None:
    p = panel(model)
    p.fraction.value, p.op.value, p.at.value = 0.5, "ablate", "back"
    button(p, "dragons").click()
    assert (p.plus.value, p.minus.value, p.layer.value) == ("Dragons", "People", 1)
    assert (p.coefficient.value, p.measure.value, p.at.value) == (-1.5, "dragons", "front")
    assert (p.fraction.value, p.op.value, p.source.value) == (1.0, "add", TEXTS)
    assert "+2.0 nats" in p.notice.value and "coefficient -1.5" in p.output.value
    p.layer.value = 3
    assert p.notice.value == ""  # it spoke of the preset
    button(p, "past").click()
    assert p.source.value == "pairs: past" and p.at.value == "generated"
    assert p.plus.disabled and p.minus.disabled
    assert "pairs: past, layer 2, coefficient +0.3" in bare(p.output.value)
    button(p, "weddings").click()
    assert not p.plus.disabled
    assert p.output.value == panel(model).output.value


def test_what_does_not_work_stands_apart(model: Any) -> None:
    p = panel(model)
    works, first, rest, second = p._gallery.children
    assert "work in" in works.value and "do not stand clear of their controls" in rest.value
    assert [b.description for b in first.children] == ["weddings", "dragons", "past"]
    assert [b.description for b in second.children] == ["love"]
    assert all("9 test prompts" in b.tooltip for b in (*first.children, *second.children))


def test_a_model_without_presets_says_so(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    p = panel(tiny("llama")[0])
    (said,) = p._gallery.children
    assert "No preset has been measured" in said.value
    assert p.plus.value == " wedding" and "<table" in p.output.value


def test_ten_arrow_keys_lead_from_a_preset_to_none(model: Any) -> None:
    p = panel(model)
    slider = p.coefficient
    for _ in range(10):
        slider.value -= slider.step
    assert abs(slider.value) < 1e-9 and "coefficient +0," in p.output.value
    texts = re.findall(r"<td[^>]*>(.*?)</td>", p.output.value, re.S)
    assert texts[0] == texts[1] and "0.00 nats" in p.measures.value


# ---------------------------------------------------------------- the link


def linked(p: AppPanel) -> str:
    (query,) = re.findall(r'<a href="\?([^"]*)"', p.link.value)
    return html.unescape(query)


def test_a_link_restores_the_screen(model: Any) -> None:
    p = panel(model)
    assert linked(p) == ""
    button(p, "dragons").click()
    p.prompt.value, p.samples.value = "A & b = ½?", 2
    query = linked(p)
    assert parse_qs(query)["prompt"] == ["A & b = ½?"]
    again = panel(model, query)
    assert again.notice.value == ""
    for part in ("output", "measures", "figure", "next", "link"):
        assert getattr(again, part).value == getattr(p, part).value, part
    button(p, "past").click()
    assert panel(model, linked(p)).output.value == p.output.value


def test_a_bad_link_is_a_sentence_and_the_rest_holds(model: Any) -> None:
    p = panel(model, "layer=99&coefficient=1.5&model=elsewhere")
    said = bare(p.notice.value)
    assert "layer = '99'" in said and "0 to 3: '2' is used" in said and "'elsewhere'" in said
    assert p.layer.value == 2 and p.coefficient.value == 1.5
    assert "<table" in p.output.value


def test_the_link_is_an_address(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.link, "address", lambda: ("http://127.0.0.1:1/", "layer=1"))
    p = AppPanel(model, max_new_tokens=2, n_samples=1)
    assert p.layer.value == 1 and 'value="http://127.0.0.1:1/?layer=1"' in p.link.value
    assert "copy link" in p.link.value


# ---------------------------------------------------------------- pieces


def test_a_long_prompt_is_shown_in_part() -> None:
    assert app.columns(14, [1, 2]) == list(range(14))
    for n, enters in ((80, [1, 2, 3]), (80, [40, 41]), (80, [79]), (80, list(range(80))), (15, [])):
        found = app.columns(n, enters)
        real = [i for i in found if i >= 0]
        assert len(found) <= app.COLUMNS + 2 and found[0] == 0 and found[-1] == n - 1
        assert real == sorted(set(real)) and found.count(-1) >= 1
        assert not enters or enters[0] in real
        gaps = [found[k + 1] - found[k - 1] for k, i in enumerate(found) if i < 0]
        assert min(gaps) > 1


def test_batches() -> None:
    assert [list(b) for b in app.batched([1, 2, 3], 2)] == [[1, 2], [3]]
    assert np.sum([len(b) for b in app.batched(list(range(8)), 4)]) == 8
