"""Models for the tests: the embedded default, and tiny random ones of every architecture."""

from __future__ import annotations

import os

# Before torch, transformers and matplotlib are imported: no test opens a window, asks a model hub,
# or takes its settings from the shell that started it.
os.environ.update(MPLBACKEND="Agg", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
for name in ("PRESET", "MODEL", "STEERLIB_FIGS"):
    os.environ.pop(name, None)

import gc  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

import steerlib as sl  # noqa: E402

TEXT = """I went up to my friend and said that the weather was fine. The ship left the harbour in
the morning, and nobody knew when it would return. Love and hate are words; a wedding is a party.
She asked why, he said because, and they both laughed about the little dog that hated the rain."""

ARCHITECTURES = ["gpt2", "gptj", "gpt_neox", "llama", "mistral", "qwen2", "gemma3_text"]


@pytest.fixture(scope="session")
def model() -> Any:
    """SmolLM2-135M-Instruct in float32."""
    return sl.load_model("smollm2-135m", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def plain_model(model: Any) -> Any:
    """The same weights as a plain transformers model, never touched by TransformerLens."""
    from transformers import AutoModelForCausalLM

    folder = model.tokenizer.name_or_path
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_tokenizer(bos: bool = True) -> Any:
    """A byte-level tokenizer with a few merges; with or without BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT], trainer)
    special = {"eos_token": "</s>", "pad_token": "</s>", **({"bos_token": "<s>"} if bos else {})}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


def tiny_config(architecture: str) -> Any:
    """A configuration with 4 layers and d_model 32."""
    from transformers import AutoConfig

    common = {"vocab_size": 384, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    if architecture in ("gpt2", "gptj"):
        size = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128}
        if architecture == "gptj":
            size["rotary_dim"] = 4
    else:
        size = {
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": 128,
        }
        if architecture != "gpt_neox":
            size["num_key_value_heads"] = 2
        if architecture == "gemma3_text":
            size |= {"head_dim": 8, "sliding_window": 64}
    return AutoConfig.for_model(architecture, **common, **size)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., tuple[Any, Any]]]:
    """``tiny(architecture, bos=True)`` -> (bridge, plain transformers model), same weights."""
    from transformers import AutoModelForCausalLM

    made: dict[Any, tuple[Any, Any]] = {}

    def make(architecture: str, bos: bool = True) -> tuple[Any, Any]:
        if (architecture, bos) not in made:
            folder: Path = tmp_path_factory.mktemp(f"{architecture}-{bos}")
            torch.manual_seed(0)
            plain = AutoModelForCausalLM.from_config(tiny_config(architecture)).eval()
            with torch.no_grad():  # the default initialisation hardly depends on its input
                for parameter in plain.parameters():
                    if parameter.ndim > 1:
                        parameter.mul_(4)
            plain.save_pretrained(folder)
            make_tokenizer(bos).save_pretrained(folder)
            made[architecture, bos] = (sl.load_model(str(folder), device="cpu"), plain)
        return made[architecture, bos]

    yield make
    made.clear()
    gc.collect()


def blocks(plain: Any) -> Any:
    """The list of transformer blocks of a transformers model."""
    for path in ("model.layers", "transformer.h", "gpt_neox.layers"):
        try:
            return plain.get_submodule(path)
        except AttributeError:
            continue
    raise AssertionError("unknown model layout")


@torch.no_grad()
def reference_logits(plain: Any, ids: list[int], edits: list[tuple[int, str, Any]]) -> torch.Tensor:
    """Logits ``[token, vocabulary]`` of one unpadded sequence under hand-written PyTorch hooks.

    ``edits`` holds (layer, site, function of the stream ``[token, d_model]``), applied in order.
    """
    handles = []
    for layer, site, function in edits:
        block = blocks(plain)[layer]
        if site == "resid_pre":

            def before(module: Any, args: Any, kwargs: Any, f: Any = function) -> Any:
                if args:
                    return (f(args[0][0])[None], *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": f(kwargs["hidden_states"][0])[None]}

            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        else:

            def after(module: Any, args: Any, output: Any, f: Any = function) -> Any:
                if isinstance(output, tuple):
                    return (f(output[0][0])[None], *output[1:])
                return f(output[0])[None]

            handles.append(block.register_forward_hook(after))
    try:
        return plain(torch.tensor([ids])).logits[0].float()
    finally:
        for handle in handles:
            handle.remove()


def adding(vector: torch.Tensor, positions: list[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A stream edit: row i of ``vector`` (or its only row) added at the i-th position."""

    def edit(stream: torch.Tensor) -> torch.Tensor:
        stream = stream.clone()
        for i, p in enumerate(positions):
            if p < len(stream):
                stream[p] += vector[i if len(vector) > 1 else 0]
        return stream

    return edit


def n_hooks(model: Any) -> int:
    """How many hooks hang on the model's hook points."""
    points = {id(h): h for h in model.hook_dict.values()}  # some go by several names
    return sum(len(h.fwd_hooks) + len(h.bwd_hooks) for h in points.values())
