"""Finished rows on disk, so that a sweep can be interrupted and goes on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..files import Store, digest, model_key
from .decode import Row, Sampling, Stop

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_FORMAT = "steerlib.row.3"


class RowStore:
    """Finished rows in a folder, found again by everything that a completion depends on.

    One file per shard: rows of a shard are finished together.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: TransformerBridge,
        sampling: Sampling,
        seed: int,
        stop: Stop,
    ):
        if callable(stop):
            raise ValueError("cache= needs stop to be text: a function has no lasting identity.")
        self.store = Store(folder)
        self._common = [_FORMAT, *model_key(model), asdict(sampling), seed, stop]
        # A condition is digested once for all its rows: by the identity of its interventions.
        self._conditions: dict[tuple[int, ...], Any] = {}

    def _key(self, row: Row, prompt: str) -> str:
        same = tuple(map(id, row.acts))
        if same not in self._conditions:
            self._conditions[same] = digest([act.key() for act in row.acts])
        # The text seeds the draws; its tokens may have a prefix.
        said = [prompt, row.prompt_ids]
        return digest(self._common, said, row.sample, self._conditions[same])

    def fill(self, rows: Sequence[Row], prompts: Sequence[str]) -> list[Row]:
        """Complete the rows that are known; return the others."""
        known: dict[str, Any] = {}
        for found in self.store.read_all():
            if isinstance(found, dict):  # others keep their results in the same folder
                known |= found
        todo = []
        for row in rows:
            result = known.get(self._key(row, prompts[row.prompt]))
            if result is None:
                todo.append(row)
            else:
                row.new, row.text, row.stopped = result
        if todo:
            self.store.check_writable()
        return todo

    def keep(self, rows: Sequence[Row], prompts: Sequence[str]) -> None:
        """Write finished rows."""
        done = {self._key(r, prompts[r.prompt]): (r.new, r.text, r.stopped) for r in rows}
        self.store.write(digest(sorted(done))[:16], done)
