"""Files that appear whole or not at all, and the names of stored results."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from steerlib.files import Store, atomic_write, digest, model_key, tensor_digest


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "file"
    with atomic_write(path) as file:
        file.write_text("old")
        assert not path.exists() and file.parent == path.parent
    assert path.read_text() == "old"
    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error), atomic_write(path) as file:
            file.write_text("half")
            raise error
        assert path.read_text() == "old" and os.listdir(path.parent) == ["file"]
    with atomic_write(path) as file:
        file.write_text("new")
    assert path.read_text() == "new" and os.listdir(path.parent) == ["file"]


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = Store(tmp_path / "file" / "below")
    for call in (store.check_writable, lambda: store.write("key", 1)):
        with pytest.raises(OSError, match="could not be written: .*choose another folder") as e:
            call()
        assert str(tmp_path) in str(e.value) and "Errno" not in str(e.value)


def test_store(tmp_path: Path) -> None:
    store, tensor = Store(tmp_path / "results"), torch.arange(6.0).reshape(2, 3).T
    assert store.read("a") is None and store.read_tensor("a") is None
    assert list(store.read_all()) == []
    store.check_writable()
    store.write("b", {"text": "☃", "numbers": [1, 2.5, None]})
    store.write("a", [1])
    store.write_tensor("a", tensor)
    assert store.read("b") == {"text": "☃", "numbers": [1, 2.5, None]}
    assert list(store.read_all()) == [[1], store.read("b")]
    found = store.read_tensor("a")
    assert found is not None and torch.equal(found, tensor)
    assert len(list((tmp_path / "results").glob("[!.]*"))) == 3
    for name, read in (("a.json", store.read), ("a.safetensors", store.read_tensor)):
        file = tmp_path / "results" / name
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(ValueError, match=f"{name} is damaged.*: delete it and run again"):
            read("a")


def test_digests_tell_facts_apart() -> None:
    facts: list[Any] = [[], [1], [1.5], ["1"], [None], [1, 2], [[1, 2]], [{"a": 1}], [{"b": 1}]]
    assert len({digest(*f) for f in facts}) == len(facts)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 2, "b": 1})
    assert digest(0.1 + 0.2) != digest(0.3)
    with pytest.raises(TypeError):
        digest(json)
    x = torch.arange(6.0)
    kinds = [x, x + 1e-6, x.reshape(2, 3), x.reshape(3, 2), x.double(), x.flip(0)]
    assert len({tensor_digest(t) for t in kinds}) == len(kinds)
    assert tensor_digest(x.reshape(3, 2).T) == tensor_digest(x.reshape(3, 2).T.contiguous())


def test_a_model_is_known_by_its_weights_and_dtype(tiny: Any, booted: Any) -> None:
    llama, gpt2 = tiny("llama")[0], tiny("gpt2")[0]
    assert model_key(llama) == model_key(llama) != model_key(gpt2)
    assert model_key(llama)[1] == "torch.float32"
    with pytest.raises(ValueError, match="load the model with steerlib.load_model"):
        model_key(booted("llama")[0])
