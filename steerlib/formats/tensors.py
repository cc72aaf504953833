"""Safetensors: our own files, and plain ones of other makers. Nothing is unpickled."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from ..files import atomic_write

FORMAT = "steerlib.vector.1"


def write(
    path: str | os.PathLike[str], layers: Mapping[int, torch.Tensor], says: Mapping[str, str]
) -> None:
    """Write a tensor per layer; the file appears whole or not at all."""
    from safetensors.torch import save_file

    # Cloned, since safetensors refuses a tensor that stands at several layers.
    tensors = {f"layer.{layer}": t.clone().contiguous() for layer, t in layers.items()}
    with atomic_write(Path(path)) as temporary:
        save_file(tensors, temporary, {"format": FORMAT, **says})


def read(path: str | os.PathLike[str]) -> tuple[dict[int, torch.Tensor], dict[str, str]]:
    """Layer -> tensor, and what the file says of them.

    A plain file has a tensor ``[d_model]`` or ``[n_positions, d_model]`` per layer, named by its
    number, with or without a word in front: ``14``, ``layer.14``.

    Raises:
        ValueError: the file is missing, damaged, or not a steering vector.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            says = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        ours = says.get("format", "").startswith("steerlib.")
        if ours and says["format"] != FORMAT:
            raise ValueError(f"its format is {says['format']!r}, not {FORMAT!r}")
        if not ours and "layer_type" in says:  # steering-vectors: where in a block
            if says["layer_type"] != "decoder_block":
                raise ValueError(f"it acts at {says['layer_type']!r}, which is not the stream")
            says = {**says, "site": "resid_post"}
        layers: dict[int, torch.Tensor] = {}
        for name, tensor in tensors.items():
            found = re.fullmatch(r"(layer\.)(\d+)" if ours else r"([a-zA-Z_]+[._])?(\d+)", name)
            if not found or int(found[2]) in layers:
                raise ValueError(f"its tensor {name!r} is not named by a layer of its own")
            layers[int(found[2])] = tensor if ours else torch.atleast_2d(tensor)
        return layers, says
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a steering vector file: {error}.") from error
