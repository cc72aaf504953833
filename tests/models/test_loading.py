"""Names, folders and the hub's cache, each to a bridge or to one sentence."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tiny

from steerlib.models import loading
from steerlib.models.loading import held_dtype, list_models, load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in a folder."""
    place = tmp_path_factory.mktemp("model")
    write_tiny(place)
    return place


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_folder_gives_what_transformers_gives(tmp_path: Path, architecture: str) -> None:
    from transformers import AutoModelForCausalLM

    write_tiny(tmp_path, architecture)
    bridge = load_model(tmp_path)
    tokens = bridge.to_tokens("steer me")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.allclose(bridge(tokens), plain(tokens).logits, atol=1e-6)
    assert not bridge.training and not any(m.training for m in bridge.modules())
    assert not any(p.requires_grad for p in bridge.parameters())
    assert bridge.cfg.model_name == str(tmp_path)
    assert bridge.cfg.dtype == torch.float32 and bridge.cfg.n_layers == 4


def test_the_same_model_is_the_same_object_while_held(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    first = load_model(tmp_path)
    assert load_model(str(tmp_path)) is first
    assert held_dtype(str(tmp_path)) == "float32"
    half = load_model(tmp_path, dtype="bfloat16")
    assert half is not first and half.cfg.dtype == torch.bfloat16
    assert half.cfg.steerlib_id == first.cfg.steerlib_id
    assert held_dtype(str(tmp_path)) is None  # either of two
    assert held_dtype("never loaded") is None
    write_tiny(tmp_path, seed=1)
    other = load_model(tmp_path)
    assert other is not first and other.cfg.steerlib_id != first.cfg.steerlib_id


def test_bos_is_prepended_only_where_the_tokenizer_has_one(tmp_path: Path) -> None:
    bridges = {}
    for bos in (True, False):
        write_tiny(tmp_path / str(bos), bos=bos)
        bridges[bos] = load_model(tmp_path / str(bos))
        assert bridges[bos].cfg.default_prepend_bos == bos
    n = len(bridges[False].tokenizer("abc").input_ids)
    assert bridges[True].to_tokens("abc").shape == (1, n + 1)
    assert bridges[False].to_tokens("abc").shape == (1, n)


def test_device_map_is_passed_on(folder: Path) -> None:
    bridge = load_model(folder, device_map={"": "cpu"})
    assert bridge.cfg.device == "cpu"
    assert bridge(bridge.to_tokens("x")).isfinite().all()
    with pytest.raises(ValueError, match="not both"):
        load_model(folder, device="cpu", device_map="auto")


@pytest.mark.parametrize("what", ["no config", "no weights", "cut short", "a tensor lost"])
def test_broken_folder_gets_one_sentence(tmp_path: Path, what: str) -> None:
    from safetensors.torch import load_file, save_file

    write_tiny(tmp_path)
    weights = tmp_path / "model.safetensors"
    if what == "no config":
        (tmp_path / "config.json").unlink()
    elif what == "no weights":
        weights.unlink()
    elif what == "cut short":
        os.truncate(weights, weights.stat().st_size - 100)
    else:
        tensors = load_file(weights)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing or damaged") as caught:
        load_model(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    if what == "a tensor lost":
        assert "model.layers.1.mlp.up_proj.weight" in str(caught.value)


# ---------------------------------------------------------------- names


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub that does not answer and an empty hub cache, which is returned."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub"


@pytest.mark.usefixtures("no_hub")
def test_unknown_names_list_the_known_ones_quickly() -> None:
    # so that imports are not in the time measured
    loading.pick_device(None), loading._hub_answers()
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

    monkeypatch.setattr(loading, "_hub_answers", lambda: True)
    monkeypatch.setattr(loading, "_boot", gated)
    monkeypatch.setenv("HF_TOKEN", "secret")
    with pytest.raises(OSError, match="accept its licence there and set HF_TOKEN.*gated") as caught:
        load_model("meta-llama/Llama-2-13b-chat-hf")
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_hub_name_loads_from_the_hub_cache_without_network(no_hub: Path, folder: Path) -> None:
    commit = "0123456789" * 4
    repository = no_hub / "models--someone--tiny"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    bridge = load_model("someone/tiny")
    assert bridge.cfg.model_name == "someone/tiny"
    assert bridge.cfg.steerlib_id == f"hub:someone/tiny@{commit}"
    assert torch.equal(bridge(bridge.to_tokens("abc")), load_model(folder)(bridge.to_tokens("abc")))


def test_list_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERLIB_CACHE", str(tmp_path))
    table = list_models()
    assert list(table.columns) == [
        "name", "kind", "layers", "d_model", "params", "licence", "in cache",
    ]  # fmt: skip
    assert list(table["name"]) == ["smollm2-135m", "gemma3-270m", "qwen2.5-coder-1.5b"]
    assert set(table["kind"]) == {"base", "chat"} and not table["in cache"].any()


# ---------------------------------------------------------------- dtypes and devices


def test_dtype_and_device_are_checked(folder: Path) -> None:
    with pytest.raises(ValueError, match="'int8' is not one of float32, bfloat16, float16, auto"):
        load_model(folder, dtype="int8")
    with pytest.raises(ValueError, match="'tpu' is not on this machine; it has .*cpu"):
        load_model(folder, device="tpu")
    assert load_model(folder, dtype=torch.bfloat16).cfg.dtype == torch.bfloat16


def test_auto_dtype_is_measured_once_and_said(folder: Path, capsys: pytest.CaptureFixture) -> None:
    loading._faster_dtype.cache_clear()
    bridge = load_model(folder, dtype="auto", device="cpu")
    load_model(folder, dtype="auto", device="cpu")
    said = capsys.readouterr().out
    assert said.count("dtype auto on cpu: ") == 1
    assert str(bridge.cfg.dtype).removeprefix("torch.") in said.split(" (")[0]


def test_importing_is_light() -> None:
    code = (
        "import sys, steerlib.models.loading, steerlib.models.packaged; "
        "print([m for m in ('torch', 'transformers', 'pandas') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "[]\n"
