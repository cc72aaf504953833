"""GGUF: the control vectors of llama.cpp and repeng, one direction per block.

Both add ``direction.l`` to the stream that leaves block l; llama.cpp wants l >= 1.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ..files import atomic_write


def write(
    path: str | os.PathLike[str],
    directions: Mapping[int, torch.Tensor],
    hint: str,
    says: Mapping[str, str],
) -> None:
    """Write a direction ``[d_model]`` per block; the file appears whole or not at all.

    Args:
        hint: the model, or its kind; repeng refuses an empty one.
        says: more about the vector, which other readers skip.
    """
    from gguf import GGUFWriter

    with atomic_write(Path(path)) as temporary:
        writer = GGUFWriter(temporary, "controlvector")
        writer.add_string("controlvector.model_hint", hint)
        writer.add_uint32("controlvector.layer_count", len(directions))
        for name, value in says.items():
            writer.add_string(f"steerlib.{name}", value)
        for block in sorted(directions):
            writer.add_tensor(f"direction.{block}", directions[block].numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read(path: str | os.PathLike[str]) -> tuple[dict[int, torch.Tensor], dict[str, str]]:
    """Block -> direction ``[1, d_model]``, and what the file says of them (``hint`` included).

    Raises:
        ValueError: the file is missing, damaged or no control vector; it lacks layers that it says
            it has.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        if (kind := fields.get("general.architecture")) != "controlvector":
            raise ValueError(f"its architecture is {kind!r}")
        found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
        if odd := [name for name in found if not re.fullmatch(r"direction\.\d+", name)]:
            raise ValueError(f"its tensor {odd[0]!r} is no direction of a layer")
        if odd := [name for name, t in found.items() if t.dtype.kind != "f"]:
            raise ValueError(f"its tensor {odd[0]!r} is quantised")
        if (said := fields.get("controlvector.layer_count", len(found))) != len(found):
            raise ValueError(f"layers are missing: it says {said} and holds {len(found)}")
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path} is not a control vector file: {error}.") from error
    says = {n.partition(".")[2]: str(v) for n, v in fields.items() if n.startswith("steerlib.")}
    says["hint"] = str(fields.get("controlvector.model_hint", "unknown"))
    return {
        int(n.partition(".")[2]): torch.from_numpy(np.atleast_2d(t)) for n, t in found.items()
    }, says
