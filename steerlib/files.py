"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNWRITABLE = {getattr(errno, e) for e in "ENOSPC EDQUOT EACCES EPERM EROFS ENOTDIR EEXIST".split()}


@contextmanager
def whole(path: Path) -> Iterator[Path]:
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
