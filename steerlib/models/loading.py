"""A name in, a ready `TransformerBridge` out.

A name is one of the packaged models (`packaged.MODELS`), a model on the Hugging Face hub, or a
folder.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from .packaged import (
    CONVERTER,
    MODELS,
    check_complete,
    converted,
    in_cache,
    intact,
    quiet,
)

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from transformer_lens.model_bridge import TransformerBridge

DTYPES = ("float32", "bfloat16", "float16")

# A model already in memory is handed out again as long as somebody holds it.
_loaded: WeakValueDictionary[tuple[str, str], TransformerBridge] = WeakValueDictionary()


def load_model(
    name: str | os.PathLike[str],
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    device_map: Any = None,
) -> TransformerBridge:
    """Load a model, ready to be read and steered: in eval mode, its weights without gradients.

    Args:
        name: a packaged model (`list_models()`), a hub name such as "gpt2-xl" or
            "meta-llama/Llama-2-13b-chat-hf" (the token is taken from HF_TOKEN), or a folder with
            config.json, weights and tokenizer.
        dtype: "float32", "bfloat16", "float16", or "auto": float32 or bfloat16, whichever
            multiplies faster on this device (measured once, and printed).
        device: "cpu", "cuda", "cuda:1", "mps"; None takes the best there is.
        device_map: as in transformers ("auto", a dict …), for models larger than one device;
            ``device`` is then left out.

    Returns:
        The bridge. ``cfg.model_name`` is ``name``; ``cfg.steerlib_id`` identifies the weights (not
        the dtype they are loaded in), so that results can be stored under it. Asking again returns
        the same object while it is still held somewhere.

    Raises:
        ValueError: an unknown name, dtype or device; an incomplete or damaged folder or file.
        OSError: no network, no disk space, or a cache that cannot be written.
    """
    name = os.fspath(name)
    if not name.strip():
        raise ValueError(f"the model name is empty; known models: {', '.join(MODELS)}")
    if device is not None and device_map is not None:
        raise ValueError(f"give device={device!r} or device_map={device_map!r}, not both")
    place = pick_device(device)
    kind = pick_dtype(dtype, place)
    packaged, folder = MODELS.get(name), Path(name).expanduser()
    if packaged:
        identity = f"{packaged.sha256}-v{CONVERTER}"
    elif folder.is_dir():
        identity = _fingerprint(folder)
    elif name[0] in "./~" or name.count("/") > 1 or "\\" in name:
        raise ValueError(f"there is no folder {name}")
    else:
        identity = f"hub:{name}"

    how = (kind, place, device_map)
    key = (identity, repr(how))
    if (held := _loaded.get(key)) is not None:
        return held
    if packaged:
        source = converted(packaged)
        try:
            bridge = _boot(source, *how)
        except Exception:
            if intact(source, packaged, rehash=True):
                raise  # the cache is in order, so the error is about something else
            bridge = _boot(converted(packaged, rehash=True), *how)
    elif folder.is_dir():
        what = f"could not load a model from {folder}, so files there are missing or damaged"
        with _one_sentence(ValueError, what):
            bridge = _boot(folder, *how)
    else:
        bridge, commit = _boot_from_hub(name, *how)
        identity += f"@{commit}"
    bridge.cfg.model_name = name
    bridge.cfg.steerlib_id = identity
    _loaded[key] = bridge
    return bridge


def list_models() -> pd.DataFrame:
    """The packaged models, one row each: name, kind (base | chat), layers, d_model, params,
    licence, in cache (True if it loads without fetching anything)."""
    import pandas as pd

    columns = ["name", "kind", "layers", "d_model", "params", "licence"]
    table = pd.DataFrame([[getattr(m, c) for c in columns] for m in MODELS.values()], None, columns)
    table["in cache"] = [in_cache(m) for m in MODELS.values()]
    return table


def held_dtype(name: str) -> str | None:
    """The dtype in which the model of this name is in memory now; None if it is not there, or
    there in several."""
    held = [bridge for bridge in list(_loaded.values()) if bridge.cfg.model_name == name]
    found = {str(bridge.cfg.dtype).removeprefix("torch.") for bridge in held}
    return found.pop() if len(found) == 1 else None


# --- a folder or a hub name -> a bridge -----------------------------------------------------------


def _boot(
    source: str | Path, dtype: str, device: str, device_map: Any, **hub: Any
) -> TransformerBridge:
    """Load from a folder (or, with `hub` arguments, by hub name) with transformers, and wrap it."""
    import torch
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind = getattr(torch, dtype)
    with quiet(bars=hub.get("local_files_only") is False):  # bars only where it may download
        model, report = AutoModelForCausalLM.from_pretrained(
            source, dtype=kind, device_map=device_map, output_loading_info=True, **hub
        )
        check_complete(report, source)
        tokenizer = AutoTokenizer.from_pretrained(source, **hub)
        without_bos = tokenizer.bos_token is None  # TransformerLens is about to make one up
        if device_map is None:
            model = model.to(device)
        bridge = TransformerBridge.boot_transformers(
            str(source),
            hf_model=model,
            tokenizer=tokenizer,
            dtype=kind,
            device=device if device_map is None else None,
        )
    if without_bos:
        bridge.cfg.default_prepend_bos = False
    return bridge.eval().requires_grad_(False)


def _boot_from_hub(
    name: str, dtype: str, device: str, device_map: Any
) -> tuple[TransformerBridge, str]:
    """Load by hub name, from the hub or its cache; the bridge and its commit. One sentence where
    neither has it."""
    from huggingface_hub import constants, try_to_load_from_cache

    online = _hub_answers()
    token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or None
    near = difflib.get_close_matches(name.lower(), MODELS, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    hint += f"Known models that need no hub: {', '.join(MODELS)}"
    if online:
        why = f"{constants.ENDPOINT} (if it is gated, accept its licence there and set HF_TOKEN)"
    else:
        why = (
            f"the hub's cache {constants.HF_HUB_CACHE}, and {constants.ENDPOINT}, from where its "
            f"weights would be fetched, does not answer: connect and try again, or copy its files "
            f"into a folder and pass the folder"
        )
    # A bare name may be a misspelt packaged model; one with an owner can only mean the hub.
    kind = OSError if "/" in name else ValueError
    with _one_sentence(kind, f"could not load {name!r} from {why}. {hint}. The loader said"):
        hub = {"token": token, "local_files_only": not online}
        bridge = _boot(name, dtype, device, device_map, **hub)
    config = try_to_load_from_cache(name, "config.json")  # …/snapshots/<commit>/config.json
    return bridge, Path(config).parent.name if isinstance(config, str) else "unknown"


def _hub_answers() -> bool:
    """One short question, because the hub's own client repeats a failing one for 20 seconds."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # what it raises changes with the HTTP library beneath
        return False
    return True


def _fingerprint(folder: Path) -> str:
    """An identity of a folder's model that changes when its files do."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    seen = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"folder:{hashlib.sha256(repr(seen).encode()).hexdigest()}"


@contextlib.contextmanager
def _one_sentence(kind: type[Exception], what: str) -> Iterator[None]:
    """Turn whatever a loader raises into one error of `kind` that begins with `what`."""
    import torch

    try:
        yield
    except (MemoryError, ImportError, torch.OutOfMemoryError):
        raise  # these say themselves what is the matter
    except Exception as error:
        said = (str(error).strip() or repr(error)).splitlines()[0]
        raise kind(f"{what}: {said}") from error


def pick_device(device: str | torch.device | None = None) -> str:
    """The device to use: the one asked for, if this machine has it, or the best."""
    import torch

    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    here.append("cpu")
    if device is not None and str(device).split(":")[0] not in here:
        raise ValueError(f"device {str(device)!r} is not on this machine; it has {', '.join(here)}")
    return here[0] if device is None else str(device)


def pick_dtype(dtype: str | torch.dtype, device: str) -> str:
    """The dtype's plain name, "auto" decided."""
    chosen = str(dtype).removeprefix("torch.")
    if chosen not in (*DTYPES, "auto"):
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}, auto")
    return _faster_dtype(device) if chosen == "auto" else chosen


@functools.cache
def _faster_dtype(device: str) -> str:
    """Multiply a small matrix in float32 and in bfloat16 on ``device``; name the faster, aloud."""
    import torch

    def milliseconds(dtype: torch.dtype) -> float:
        x, w = (torch.ones(n, 1024, dtype=dtype, device=device) for n in (64, 1024))
        times = []
        for _ in range(20):  # short and often: on a busy machine only the best one means anything
            start = time.perf_counter()
            (x @ w.T)[0, 0].item()  # .item() waits for the device
            times.append(1000 * (time.perf_counter() - start))
        return min(times)

    try:
        single, half = milliseconds(torch.float32), milliseconds(torch.bfloat16)
    except (RuntimeError, TypeError):
        print(f"dtype auto on {device}: float32 (there is no bfloat16)")
        return "float32"
    chosen = "bfloat16" if half < 0.9 * single else "float32"  # fewer digits must buy something
    print(f"dtype auto on {device}: {chosen} (float32 {single:.2f} ms, bfloat16 {half:.2f} ms)")
    return chosen
