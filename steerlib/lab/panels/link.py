"""Settings of a panel in the address of its page, there and back."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import ipywidgets as ipw

from .base import reach

LONGEST = 2000  # characters of a text
LARGEST = 1000.0  # of a coefficient, either way
NOT_OURS = {"template", "theme", "token"}  # Voilà's and Jupyter's own


def address() -> tuple[str, str]:
    """The address of the page without its query, and the query, as Voilà hands them to its kernels;
    empty where no page asked. A kernel that Voilà keeps ready waits here for its page."""
    if os.environ.get("VOILA_PREHEAT") == "True":
        from voila.utils import wait_for_request

        wait_for_request()
    page = urlsplit(os.environ.get("VOILA_REQUEST_URL", ""))
    return page._replace(query="", fragment="").geturl(), os.environ.get("QUERY_STRING", "")


def write(controls: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """The query that holds the settings which are not the default."""
    now = {name: _written(control.value) for name, control in controls.items()}
    return urlencode({n: text for n, text in now.items() if text != _written(defaults[n])})


def read(query: str, controls: Mapping[str, Any]) -> list[str]:
    """Move the controls to what a query says; a sentence for each thing in it that does not fit.

    A control of which the query says nothing, or nothing that fits, stays. Controls are moved in
    their own order.
    """
    given = dict(parse_qsl(query, keep_blank_values=True))
    unknown = [name for name in given if name not in controls and name not in NOT_OURS]
    said = [
        f"The address has {_short(name)}, which is no setting here; there are "
        f"{', '.join(controls)}."
        for name in unknown
    ]
    for name, control in controls.items():
        if name in given:
            try:
                _move(control, given[name])
            except ValueError as error:
                kept = _short(_written(control.value))
                said.append(
                    f"The address has {name} = {_short(given[name])}, which has to be {error}: "
                    f"{kept} is used."
                )
    return said


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    # as the panel takes it: steps of a slider may miss 0 by their last bit
    return f"{round(value, 6) + 0.0:g}" if isinstance(value, float) else str(value)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}…")


def _move(control: Any, text: str) -> None:
    """Raises ``ValueError`` with what is allowed."""
    if isinstance(control, ipw.Checkbox):
        if text not in ("0", "1"):
            raise ValueError("0 or 1")
        control.value = text == "1"
    elif isinstance(control, ipw.Dropdown):
        if text not in control.options:
            raise ValueError(f"one of {', '.join(control.options)}")
        control.value = text
    elif isinstance(control, ipw.FloatSlider):
        number = _number(text)
        free = control.min < 0  # a coefficient, not a share
        low, high = (-LARGEST, LARGEST) if free else (control.min, control.max)
        if not low <= number <= high:
            raise ValueError(f"a number from {low:g} to {high:g}")
        if free:
            reach(control, number)
        else:
            control.value = number
    elif isinstance(control, (ipw.IntSlider, ipw.BoundedIntText)):
        number = _number(text)
        if not control.min <= number <= control.max or number != int(number):
            raise ValueError(f"a whole number from {control.min} to {control.max}")
        control.value = int(number)
    else:
        if len(text) > LONGEST:
            raise ValueError(f"at most {LONGEST} characters long")
        control.value = text


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        return math.nan  # in no range
    return number
