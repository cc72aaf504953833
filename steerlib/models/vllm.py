"""Conditions for models in vLLM (``RemoteBridge.boot_vllm`` of TransformerLens).

There the model runs in another process, compiled: hooks that are functions, as `hooks.hooks` gives
them, are shown the stream but cannot change it (TransformerLens warns). What can is a spec per hook
point, ``{"op": "add", "value": [d_model], "pos": [...]}``, with which `Add` can be said, and no
other kind, since the specs know no projections.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..interventions import Add, Condition, as_interventions, covered

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def vllm_specs(
    model: TransformerBridge, condition: Condition, n_prompt: int
) -> dict[str, dict[str, Any]]:
    """A condition as the ``intervene=`` of a bridge that was booted by ``boot_vllm``.

    vLLM has one hook point a block, where it ends: ``resid_pre`` of layer l is there
    ``blocks.{l-1}.hook_out``.

    Args:
        model: the bridge, or another of the same model.
        n_prompt: how many tokens the text has, BOS included: a pass runs it whole.

    Returns:
        Name of the hook point -> spec; ``pos`` is left out where all positions are meant, since it
        needs ``boot_vllm(enable_position_interventions=True)``.

    Raises:
        ValueError: the condition does not fit the model or the text, or cannot be said: another
            kind than `Add`; a vector of several positions, or two at one hook point that act at
            different ones; the stream that enters block 0.

    Example:
        >>> bridge = RemoteBridge.boot_vllm("gpt2-xl", enable_position_interventions=True)
        >>> specs = sl.vllm_specs(bridge, sl.Add(direction, "all", 4), n_prompt=8)
        >>> bridge.run_with_cache(text, intervene=specs)
    """
    specs: dict[str, dict[str, Any]] = {}
    for act in as_interventions(condition, model):
        if type(act) is not Add or act.n_positions != 1:
            what = type(act).__name__ if type(act) is not Add else f"{act.n_positions} positions"
            raise ValueError(
                f"vLLM adds one vector a hook point: {what} cannot be said in its specs. Steer "
                "with a direction, or run the model in TransformerBridge."
            )
        found = [position for position, _ in covered(act.at, 1, n_prompt, 0, n_prompt)]
        if not found:
            raise ValueError(f"Add at {act.at!r} touches none of {n_prompt} tokens.")
        pos = {} if len(found) == n_prompt else {"pos": found}
        for layer in act.layers:
            block = layer if act.site == "resid_post" else layer - 1
            if block < 0:
                raise ValueError("vLLM has no hook point before block 0: steer at another layer.")
            spec = {"op": "add", "value": act.operands(layer)[0][0], **pos}
            name = f"blocks.{block}.hook_out"
            if name in specs:
                if specs[name].get("pos") != spec.get("pos"):
                    raise ValueError(f"Two vectors at {name} act at different positions.")
                spec["value"] = specs[name]["value"] + spec["value"]
            specs[name] = spec
    return specs
