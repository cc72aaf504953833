"""Files that appear whole or not at all, and results kept under all that they depend on."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformer_lens.model_bridge import TransformerBridge

UNWRITABLE = {getattr(errno, e) for e in "ENOSPC EDQUOT EACCES EPERM EROFS ENOTDIR EEXIST".split()}


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to; when the block ends well, it takes the place of ``path``.

    A block that raises or is interrupted leaves nothing, a killed process what it had written so
    far, under a name that nobody reads.

    Raises:
        OSError: one sentence, if the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        if found := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors: a type of its own
            code = int(found[1])
        if code is None or code not in UNWRITABLE:
            raise
        full = code in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full" if full else f"{os.strerror(code).lower()}; choose another folder"
        raise OSError(f"{path} could not be written: {why}.") from error
    finally:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:  # where nothing could be written, nothing is left
            pass


def model_key(model: TransformerBridge) -> tuple[str, str]:
    """Which weights these are and their dtype: what any result kept on disk depends on.

    Raises:
        ValueError: the model did not come from `models.loading.load_model`.
    """
    identity = getattr(model.cfg, "steerlib_id", None)
    if identity is None:
        raise ValueError(
            f"cache= needs to know the weights of {model.cfg.model_name!r}: load the model "
            "with steerlib.load_model."
        )
    return identity, str(model.cfg.dtype)


def digest(*facts: Any) -> str:
    """SHA-256 of plain facts: text, numbers, None, and lists, tuples or dicts of them."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's shape, dtype and numbers."""
    sha = hashlib.sha256(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
    sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


class Store:
    """A folder of results, each in a file named by the digest of what it depends on.

    Files hold JSON, or a tensor (safetensors). They appear whole, so an interrupted run leaves
    what it has finished, and the next one goes on from there.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)

    def check_writable(self) -> None:
        """Raise ``OSError`` now if nothing can be written here, before work is done for nothing."""
        with atomic_write(self.folder / ".writable") as file:
            file.touch()

    def write(self, key: str, value: Any) -> None:
        """Keep JSON data under ``key``."""
        with atomic_write(self.folder / f"{key}.json") as file:
            file.write_text(json.dumps(value), encoding="utf-8")

    def read(self, key: str) -> Any | None:
        """The JSON data under ``key``; None if there is none.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.folder / f"{key}.json"
        return _json(path) if path.exists() else None

    def read_all(self) -> Iterator[Any]:
        """All JSON data of the folder."""
        for path in sorted(self.folder.glob("*.json")):
            yield _json(path)

    def write_tensor(self, key: str, tensor: torch.Tensor) -> None:
        """Keep a tensor under ``key``."""
        from safetensors.torch import save_file

        with atomic_write(self.folder / f"{key}.safetensors") as file:
            save_file({"tensor": tensor.contiguous()}, file)

    def read_tensor(self, key: str) -> torch.Tensor | None:
        """The tensor under ``key``; None if there is none. Raises ``ValueError`` as `read`."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.folder / f"{key}.safetensors"
        if not path.exists():
            return None
        try:
            return load_file(path)["tensor"]
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is damaged: delete it and run again.") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and run again.") from error
