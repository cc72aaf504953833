"""Safetensors files of vectors: ours, and those of other makers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import steering_vectors
import torch
from conftest import noise
from safetensors import safe_open
from safetensors.torch import save_file

import steerlib as sl
from steerlib.formats import tensors

E = torch.eye(3, 8)


def test_a_file_says_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    v = sl.SteeringVector({2: 3 * E[:1], 5: E[1:2]}, "resid_post", "generated", {"model": "m"})
    for vector, normalisation, operator in ((v, "none", "Add"), (v.unit(), "unit", "Ablate")):
        vector.save(path, operator)
        with safe_open(path, "pt") as file:
            says = file.metadata()
        assert json.loads(says["layers"]) == [2, 5] and says["site"] == "resid_post"
        assert (says["model"], says["at"]) == ("m", "generated")
        assert (says["normalisation"], says["operator"]) == (normalisation, operator)
        back = sl.SteeringVector.load(path, site="resid_post", operator=operator)
        assert all(torch.equal(back.layers[n], vector.layers[n]) for n in (2, 5))
        assert (back.site, back.at, back.meta) == (vector.site, vector.at, vector.meta)
        with pytest.raises(
            ValueError, match="v.safetensors is for site 'resid_post', not 'resid_pre'"
        ):
            sl.SteeringVector.load(path, site="resid_pre")
        with pytest.raises(ValueError, match=f"is for operator '{operator}', not 'Rotate'"):
            sl.SteeringVector.load(path, operator="Rotate")


def test_what_a_file_says_wrongly_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    v = sl.SteeringVector({2: 3 * E[:1], 5: E[1:2]}, "resid_post")
    v.save(path)
    layers, says = tensors.read(path)
    for changes, words in [
        ({"layers": "[2, 5, 6]"}, r"says layers \[2, 5, 6\], but holds \[2, 5\]"),
        ({"normalisation": "unit"}, "says normalisation unit, but holds none"),
        ({"site": "mlp_out"}, "mlp_out"),
    ]:
        tensors.write(path, layers, {**says, **changes})
        with pytest.raises(ValueError, match=f"is not a steering vector file: .*{words}"):
            sl.SteeringVector.load(path)


def test_a_file_of_another_model_is_refused(tiny: Any, tmp_path: Path) -> None:
    path, model = tmp_path / "v.safetensors", tiny("llama")[0]
    name = model.cfg.model_name
    for layer, d, made_with, words in [
        (1, 32, "another", "made with another"),
        (1, 33, None, "d_model 33"),
        (4, 32, None, r"4 layers.*layers \[4\]"),
        (1, 33, name, "d_model 32.: it is made with .* d_model 33"),
    ]:
        sl.SteeringVector({layer: torch.ones(1, d)}, meta={"model": made_with}).save(path)
        with pytest.raises(ValueError, match=f"does not fit .*{words}"):
            sl.SteeringVector.load(path, model=model)
        sl.SteeringVector.load(path)
    for made_with in (None, name):
        sl.SteeringVector({3: torch.ones(1, 32)}, meta={"model": made_with}).save(path)
        assert sl.SteeringVector.load(path, model=model).d_model == 32


@pytest.mark.parametrize("name", ["{}", "layer.{}", "layer_activations.{}", "direction_{}"])
def test_plain_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / "plain.safetensors"
    save_file({name.format(3): E[0].clone(), name.format(11): E[1].half()}, path, {"format": "pt"})
    v = sl.SteeringVector.load(path, site="resid_pre")
    assert (v.site, v.at, sorted(v.layers)) == ("resid_pre", "all", [3, 11])
    for layer, row in ((3, E[:1]), (11, E[1:2])):
        assert v.layers[layer].dtype == torch.float32 and torch.equal(v.layers[layer], row)
    save_file({name.format(3): E.clone()}, path)
    assert sl.SteeringVector.load(path, site="resid_post").at == "front"
    with pytest.raises(
        ValueError, match=r"does not say where.*site='resid_post'.*site='resid_pre'"
    ):
        sl.SteeringVector.load(path)


@pytest.mark.parametrize(
    ("held", "says", "words"),
    [
        ({"14": E[0], "layer.14": E[1]}, {}, "not named by a layer of its own"),
        ({"weight": E[0]}, {}, "'weight' is not named by a layer"),
        ({"3": E[0], "4": torch.ones(9)}, {}, "same shape"),
        ({"3": E[0]}, {"layer_type": "self_attn"}, "at 'self_attn', which is not the stream"),
    ],
)
def test_odd_plain_files_are_refused(tmp_path: Path, held: Any, says: Any, words: str) -> None:
    path = tmp_path / "plain.safetensors"
    save_file({name: t.clone() for name, t in held.items()}, path, says)
    with pytest.raises(ValueError, match=f"is not a steering vector file: .*{words}"):
        sl.SteeringVector.load(path, site="resid_post")


def test_a_vector_of_steering_vectors(tiny: Any, tmp_path: Path) -> None:
    """Converted as the docstring of `load` says, it steers as it did there."""
    model, plain = tiny("llama")
    path = tmp_path / "theirs.safetensors"
    rows = {layer: noise(model, layer, seed=layer).layers[layer][0] for layer in (1, 2)}
    v = steering_vectors.SteeringVector(rows)
    save_file(
        {str(l): t for l, t in v.layer_activations.items()}, path, {"layer_type": v.layer_type}
    )
    ids = sl.encode(model, "I went up to my friend")
    with v.apply(plain, multiplier=1.5), torch.no_grad():
        theirs = plain(torch.tensor([ids])).logits
    ours = sl.SteeringVector.load(path)
    assert ours.site == "resid_post" and ours.at == "all"
    got = sl.steered_logits(model, ids, 1.5 * ours)
    torch.testing.assert_close(got, theirs, atol=2e-4, rtol=2e-4)
    assert (got - sl.steered_logits(model, ids, None)).abs().max() > 0.1
    with pytest.raises(ValueError, match="is for site 'resid_post', not 'resid_pre'"):
        sl.SteeringVector.load(path, site="resid_pre")
