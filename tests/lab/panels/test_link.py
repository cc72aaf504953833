"""Settings go into the address of a page and come back; what does not fit is a sentence."""

from __future__ import annotations

from typing import Any

import ipywidgets as ipw
import pytest

from steerlib.lab.panels import link
from steerlib.lab.panels.base import reach, slider


def controls() -> dict[str, Any]:
    return {
        "model": ipw.Dropdown(options=["small", "large"], value="small"),
        "prompt": ipw.Text("I went"),
        "layer": slider("layer", 3, 0, 29),
        "coefficient": slider("coefficient", 2.5, -10, 10, 0.5),
        "fraction": slider("fraction", 1.0, 0, 1, 0.05),
        "seed": ipw.BoundedIntText(0, min=0, max=10**6),
        "colour": ipw.Checkbox(False),
    }


def values(made: dict[str, Any]) -> dict[str, Any]:
    return {name: control.value for name, control in made.items()}


ODD = "½ & <b>=?#+ %20\n\"'"


def test_there_and_back() -> None:
    made = controls()
    defaults = values(made)
    assert link.write(made, defaults) == ""
    wanted = {"model": "large", "prompt": ODD, "layer": 7, "coefficient": -31.223}
    wanted |= {"fraction": 0.55, "seed": 12, "colour": True}
    for name, value in wanted.items():
        reach(made[name], value) if name == "coefficient" else setattr(made[name], "value", value)
    query = link.write(made, defaults)
    assert query.isascii() and not set(query) & set("<>\"' #")
    other = controls()
    assert link.read(query, other) == [] and values(other) == wanted
    assert link.write(other, defaults) == query


def test_only_what_is_not_the_default_is_written() -> None:
    made = controls()
    defaults = values(made)
    made["layer"].value, made["prompt"].value = 4, ""
    assert link.write(made, defaults) == "prompt=&layer=4"
    other = controls()
    assert link.read("prompt=&layer=4", other) == [] and other["prompt"].value == ""


BAD = {
    "layer=30": "a whole number from 0 to 29: '3' is used",
    "layer=2.5": "a whole number from 0 to 29",
    "layer=": "a whole number from 0 to 29",
    "layer=nan": "a whole number",
    "coefficient=inf": "a number from -1000 to 1000: '2.5' is used",
    "coefficient=1e9": "a number from -1000 to 1000",
    "coefficient=two": "a number from",
    "fraction=1.5": "a number from 0 to 1: '1' is used",
    "model=/etc/passwd": "one of small, large: 'small' is used",
    "colour=yes": "0 or 1: '0' is used",
    "seed=-1": "a whole number from 0 to 1000000",
    f"prompt={'x' * 3000}": "at most 2000 characters",
    "colours=1": "no setting here; there are model, prompt",
}


@pytest.mark.parametrize("query", BAD)
def test_what_does_not_fit_is_one_sentence_and_the_default_stays(query: str) -> None:
    made = controls()
    before = values(made)
    (said,) = link.read(query, made)
    assert BAD[query] in said and said.startswith("The address has") and len(said) < 200
    assert values(made) == before


def test_what_fits_is_used_beside_what_does_not() -> None:
    made = controls()
    said = link.read("layer=99&seed=5&theme=dark&model=large", made)
    assert len(said) == 1 and "layer" in said[0]
    assert (made["seed"].value, made["model"].value, made["layer"].value) == (5, "large", 3)


def test_a_slider_reaches_the_coefficient_of_an_address() -> None:
    made = controls()
    assert link.read("coefficient=31.223", made) == []
    coefficient = made["coefficient"]
    assert coefficient.value == 31.223 and coefficient.min == -62.446
    steps = (coefficient.value - coefficient.min) / coefficient.step
    assert steps == pytest.approx(30)  # from which the arrow keys reach 0 in ten
    assert link.read("coefficient=0", made) == [] and coefficient.value == 0


def test_the_address_of_the_page_comes_from_voila(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VOILA_PREHEAT", "VOILA_REQUEST_URL", "QUERY_STRING"):
        monkeypatch.delenv(name, raising=False)
    assert link.address() == ("", "")
    monkeypatch.setenv("VOILA_REQUEST_URL", "https://there.example:8866/x/?layer=3#top")
    monkeypatch.setenv("QUERY_STRING", "layer=3")
    assert link.address() == ("https://there.example:8866/x/", "layer=3")

    def wait() -> None:
        monkeypatch.setenv("QUERY_STRING", "layer=4")

    monkeypatch.setenv("VOILA_PREHEAT", "True")  # a kernel that is kept ready
    monkeypatch.setattr("voila.utils.wait_for_request", wait)
    assert link.address()[1] == "layer=4"
