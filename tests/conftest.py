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
from contextlib import contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402
from types import SimpleNamespace  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

import steerlib as sl  # noqa: E402

TEXT = """I went up to my friend and said that the weather was fine. The ship left the harbour in
the morning, and nobody knew when it would return. Love and hate are words; a wedding is a party.
She asked why, he said because, and they both laughed about the little dog that hated the rain."""

ARCHITECTURES = ["gpt2", "gptj", "gpt_neox", "llama", "mistral", "qwen2", "gemma3_text"]


# `make check` runs the tests on these two (one without, one with rotary positions, grouped heads
# and windows) and leaves the others, and the real model, to `make test`.
QUICK_ARCHITECTURES = {"gpt2", "gemma3_text"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as ``thorough`` what the inner loop does without."""
    others = set(ARCHITECTURES) - QUICK_ARCHITECTURES
    for item in items:
        assert isinstance(item, pytest.Function)
        given = set(map(str, item.callspec.params.values())) if hasattr(item, "callspec") else set()
        if {"model", "plain_model"} & set(item.fixturenames) or others & given:
            item.add_marker("thorough")


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


def spacing_tokenizer() -> Any:
    """A small tokenizer of SentencePiece's kind, as Llama 2 has it: it puts a space in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=200,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=[*"▁AB(\n"],
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT.replace("\n", " "), "\n", "A", "B"], trainer)
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def merging_tokenizer() -> Any:
    """A small tokenizer in which "(A" and "(B" are one token each."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=262, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    bpe.train_from_iterator(["(A", "(B"] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>")


def only_tokenizer(tokenizer: Any, bos: bool = True) -> Any:
    """As much of a model as prompts and contrast pairs need."""
    return SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(default_prepend_bos=bos))


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


def write_tiny(
    folder: Path, architecture: str = "llama", bos: bool = True, seed: int = 0, layers: int = 4
) -> Any:
    """Write a tiny random model with its tokenizer into a folder; it, as transformers has it."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = tiny_config(architecture)
    config.num_hidden_layers = layers
    plain = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # the default initialisation hardly depends on its input
        for parameter in plain.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    plain.save_pretrained(folder)
    make_tokenizer(bos).save_pretrained(folder)
    return plain


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., tuple[Any, Any]]]:
    """``tiny(architecture, bos=True)`` -> (bridge, plain transformers model), same weights."""
    made: dict[Any, tuple[Any, Any]] = {}

    def make(architecture: str, bos: bool = True) -> tuple[Any, Any]:
        if (architecture, bos) not in made:
            folder = tmp_path_factory.mktemp(f"{architecture}-{bos}")
            plain = write_tiny(folder, architecture, bos)
            made[architecture, bos] = (sl.load_model(str(folder), device="cpu"), plain)
        return made[architecture, bos]

    yield make
    made.clear()
    gc.collect()


@pytest.fixture(scope="session")
def booted(tiny: Any, request: pytest.FixtureRequest) -> Iterator[Callable[[str], tuple[Any, Any]]]:
    """``booted(name)`` -> (bridge, plain transformers model), the bridge by TransformerLens' own
    means, without `load_model`: of an architecture, or of ``smollm2``."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made: dict[str, tuple[Any, Any]] = {}

    def boot(name: str) -> tuple[Any, Any]:
        if name not in made:
            if name == "smollm2":
                model, plain = (request.getfixturevalue(n) for n in ("model", "plain_model"))
                folder = model.tokenizer.name_or_path
            else:
                loaded, plain = tiny(name)
                folder = loaded.cfg.model_name
            bridge = TransformerBridge.boot_transformers(
                folder,
                hf_model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
                tokenizer=AutoTokenizer.from_pretrained(folder),
                device="cpu",
            )
            made[name] = bridge.eval(), plain
        return made[name]

    yield boot
    made.clear()
    gc.collect()


@pytest.fixture(params=["native", "bridge"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Everything runs on both ways through a model: transformers' own modules, and the bridge."""
    from steerlib.engine.native import Passes

    with pytest.MonkeyPatch.context() as patch:
        if request.param == "bridge":
            patch.setattr(Passes, "native", property(lambda self: False))
        yield request.param


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


def plain_logits(model: Any, plain: Any, text: str, vector: Any = None) -> torch.Tensor:
    """Logits ``[token, vocabulary]`` of a text, with a steering vector at its front."""
    edits = [
        (layer, vector.site, adding(t, list(range(vector.n_positions))))
        for layer, t in (vector.layers.items() if vector is not None else ())
    ]
    return reference_logits(plain, sl.encode(model, text), edits)


def adding(vector: torch.Tensor, positions: list[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A stream edit: row i of ``vector`` (or its only row) added at the i-th position."""

    def edit(stream: torch.Tensor) -> torch.Tensor:
        stream = stream.clone()
        for i, p in enumerate(positions):
            if p < len(stream):
                stream[p] += vector[i if len(vector) > 1 else 0]
        return stream

    return edit


def positions(at: Any, k: int, n: int, total: int) -> list[int]:
    """Where a vector of k rows acts, written down anew from the definition of the words.

    The prompt has n tokens, prompt and completion have ``total``.
    """
    if at == "front":
        return list(range(k))
    if at == "middle":
        return list(range((n - k) // 2, (n - k) // 2 + k))
    if at == "back":
        return list(range(n - k, n))
    if at == "prompt":
        return list(range(n))
    if at == "generated":
        return list(range(n - 1, total))
    if at == "all":
        return list(range(total))
    if isinstance(at, slice):  # bounds below zero count from the end of the prompt
        bounds = [b + n if b is not None and b < 0 else b for b in (at.start, at.stop)]
        return list(range(total))[slice(*bounds, at.step)]
    return [p + n if p < 0 else p for p in at]


def noise(
    model: Any,
    layer: int,
    k: int = 1,
    size: float = 3,
    seed: int = 0,
    site: str = "resid_pre",
    at: str = "front",
) -> Any:
    """A vector of k positions at one layer, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    tensor = size * torch.randn(k, model.cfg.d_model, generator=generator)
    return sl.SteeringVector({layer: tensor}, site=site, at=at)


def mixture(model: Any) -> dict[str, Any]:
    """Conditions of several kinds."""
    return {
        "control": None,
        "add": sl.Add(noise(model, 1, site="resid_post"), at="generated"),
        "both": [
            noise(model, 2, k=2, site="resid_post"),
            sl.Ablate(noise(model, 0, seed=1, site="resid_post"), at="all"),
        ],
    }


@torch.no_grad()
def batch_logits(model: Any, rows: list[tuple[list[int], Any]]) -> list[torch.Tensor]:
    """Logits ``[token, vocabulary]`` of rows (token ids, condition), from one left-padded batch
    in which each row has interventions of its own."""
    from steerlib.hooks import BatchHooks
    from steerlib.interventions import as_interventions
    from steerlib.tokens import pad_id, pad_left

    tokens, mask = pad_left([ids for ids, _ in rows], pad_id(model), "cpu")
    acts = [as_interventions(condition, model) for _, condition in rows]
    hooks = BatchHooks(model, acts, [len(ids) for ids, _ in rows])
    hooks.window([len(ids) - tokens.shape[1] for ids, _ in rows], tokens.shape[1])
    with hooks.hooks():
        logits = model.forward(tokens, attention_mask=mask)
    return [row[-len(ids) :].float() for row, (ids, _) in zip(logits, rows, strict=True)]


@contextmanager
def shapes_of(model: Any, layer: int = -1) -> Iterator[list[tuple[int, ...]]]:
    """A list that grows by the shape [row, column] of every pass through a layer."""
    from steerlib.engine.native import Passes

    assert Passes(model).native in (True, False)  # a model's first passes are a comparison
    shapes: list[tuple[int, ...]] = []
    handle = model.blocks[layer].original_component.register_forward_hook(
        lambda block, args, out: shapes.append(
            tuple((out[0] if isinstance(out, tuple) else out).shape[:2])
        )
    )
    try:
        yield shapes
    finally:
        handle.remove()


def n_hooks(model: Any) -> int:
    """How many hooks hang on the model's hook points."""
    points = {id(h): h for h in model.hook_dict.values()}  # some go by several names
    return sum(len(h.fwd_hooks) + len(h.bwd_hooks) for h in points.values())
