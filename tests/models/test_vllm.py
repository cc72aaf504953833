"""Specs for vLLM, as far as a machine without it goes: TransformerLens' own checks of specs, and
its own arithmetic on its buffers, put into the model where vLLM's hooks are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import noise
from transformer_lens.model_bridge.sources.vllm.driver import VLLMDriver
from transformer_lens.model_bridge.sources.vllm.overlays.decoder_only import DecoderOnlyOverlay
from transformer_lens.model_bridge.sources.vllm.worker_extension import TLWorkerExtension

import steerlib as sl

TEXT = "I went up to my friend and said"


def run_by_specs(model: Any, ids: list[int], specs: dict[str, Any]) -> torch.Tensor:
    """What the worker does with specs: ``x * scale + bias`` at its hook points."""
    config = SimpleNamespace(hidden_size=model.cfg.d_model, num_hidden_layers=model.cfg.n_layers)
    points = DecoderOnlyOverlay().capture_specs(config)
    driver = VLLMDriver.__new__(VLLMDriver)
    driver._hook_widths = {name: width for name, (_, width) in points.items()}
    driver.supported_hook_points = frozenset(points)
    driver._enable_batching, driver._enable_position_interventions = False, True
    checked = driver._validate_interventions(specs)
    VLLMDriver._reject_pos_beyond_seq(checked, len(ids))
    worker = TLWorkerExtension()
    worker._tl_scale_buffers = {n: torch.ones(64, model.cfg.d_model) for n in points}
    worker._tl_bias_buffers = {n: torch.zeros(64, model.cfg.d_model) for n in points}
    worker.tl_set_interventions(checked)

    def affine(x: torch.Tensor, hook: Any, name: str) -> torch.Tensor:
        scale, bias = worker._tl_scale_buffers[name], worker._tl_bias_buffers[name]
        return x * scale[: x.shape[1]] + bias[: x.shape[1]]

    hooks = [
        (name, lambda x, hook, name=name: affine(x, hook, name))
        for name in points
        if name.startswith("blocks.") and name.count(".") == 2
    ]
    with torch.no_grad():
        return model.run_with_hooks(torch.tensor([ids]), fwd_hooks=hooks)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_specs_do_what_hooks_do(tiny: Any, architecture: str) -> None:
    model, _ = tiny(architecture)
    ids = sl.encode(model, TEXT)
    pre, post = noise(model, 2), noise(model, 1, seed=1, site="resid_post")
    both = sl.SteeringVector({**pre.layers, 3: pre.layers[2]}, "resid_pre", "all")
    conditions = {
        "all": sl.Add(pre, "all", 2.0),
        "prompt": sl.Add(post, "prompt"),
        "generated": sl.Add(post, "generated", -3.0),
        "positions": sl.Add(pre, [1, -2]),
        "layers": both,
        "two at one point": [sl.Add(pre, "all"), sl.Add(post, "all")],
        "two at two": [sl.Add(pre, slice(2, 5)), sl.Add(noise(model, 2, site="resid_post"), "all")],
    }
    for name, condition in conditions.items():
        specs = sl.vllm_specs(model, condition, len(ids))
        got = run_by_specs(model, ids, specs)
        expected = sl.steered_logits(model, ids, condition)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        hooks = sl.hooks(model, condition, n_prompt=len(ids))
        torch.testing.assert_close(
            got, model.run_with_hooks(torch.tensor([ids]), fwd_hooks=hooks), atol=1e-4, rtol=1e-4
        )
        everywhere = name in ("all", "prompt", "layers", "two at one point")
        assert any("pos" in spec for spec in specs.values()) != everywhere
    assert set(sl.vllm_specs(model, conditions["two at one point"], 9)) == {"blocks.1.hook_out"}
    assert sl.vllm_specs(model, None, 9) == {} == sl.vllm_specs(model, 0 * pre, 9)


def test_functions_are_refused_there(tiny: Any) -> None:
    """Hence specs: what `sl.hooks` gives are functions."""
    model, _ = tiny("llama")
    ids = sl.encode(model, TEXT)
    hooks = dict(sl.hooks(model, sl.Add(noise(model, 2), "all"), n_prompt=len(ids)))
    with pytest.raises(NotImplementedError, match="not callables"):
        run_by_specs(model, ids, hooks)


def test_what_cannot_be_said_is_refused(tiny: Any) -> None:
    model, _ = tiny("llama")
    v, w = noise(model, 1), noise(model, 0, site="resid_post")
    for condition, words in [
        (sl.Ablate(v), "Ablate cannot be said"),
        (sl.When(sl.Add(v, "all"), v, 0.0), "When cannot be said"),
        (sl.Add(noise(model, 1, 3), "front"), "3 positions cannot be said"),
        (noise(model, 0), "no hook point before block 0"),
        (
            [sl.Add(v, "all"), sl.Add(w, "generated")],
            "blocks.0.hook_out act at different positions",
        ),
        (sl.Add(v, [20]), "touches none of 9 tokens"),
        (sl.Add(sl.SteeringVector({1: torch.ones(1, 33)})), "d_model 33"),
    ]:
        with pytest.raises(ValueError, match=words):
            sl.vllm_specs(model, condition, 9)
