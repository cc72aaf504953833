"""Steering vectors: what is in them, their arithmetic, their files."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ARCHITECTURES
from gguf import GGUFReader, GGUFWriter
from sklearn.decomposition import PCA
from test_activations import streams

import steerlib as sl
from steerlib import vectors

np.float_ = np.float64  # repeng names it, numpy 2 does not
from repeng import ControlVector  # noqa: E402

PAIRS = [
    ("I love dogs", "I hate dogs"),
    ("She said that the weather was fine", "She said that the rain"),
    ("a party", "a wedding and a harbour"),
    ("Love", "Hate and the little dog"),
    ("The ship left", "The ship left in the morning"),
]


def by_hand(model: Any, text: str, length: int = 0) -> list[int]:
    """Tokens of ``text``: BOS, the text itself, the space token up to ``length``."""
    tokenizer = model.tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    start = [tokenizer.bos_token_id] if model.cfg.default_prepend_bos else []
    space = tokenizer(" ", add_special_tokens=False)["input_ids"]
    return start + ids + space * (length - len(start) - len(ids))


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(*layers: int, k: int = 1, d: int = 8, seed: int = 0, **about: Any) -> sl.SteeringVector:
    """A vector of noise."""
    tensors = {layer: gaussian(k, d, seed=100 * seed + layer) for layer in layers}
    return sl.SteeringVector(tensors, **about)


def same(a: sl.SteeringVector, b: sl.SteeringVector) -> bool:
    return (a.site, a.at, sorted(a.layers)) == (b.site, b.at, sorted(b.layers)) and all(
        torch.equal(a.layers[layer], b.layers[layer]) for layer in a.layers
    )


# ---------------------------------------------------------------- from prompts

PROMPT_CASES = [
    ("Love", "Hate"),
    ("I love dogs and rain", "Hate"),  # the second one is padded
    ("Hate", "I love dogs and rain"),  # the first one is padded
    ("I went up to my friend", "I went up to the harbour and said"),  # they begin alike
    ("Love and hate", ""),  # spaces only
    ("Love and hate", None),  # nothing is subtracted
]


def check_from_prompts(model: Any, plain: Any, layers: list[int], site: str) -> None:
    for plus, minus in PROMPT_CASES:
        v = sl.SteeringVector.from_prompts(model, plus, minus, layer=layers, site=site)
        texts = [plus] if minus is None else [plus, minus]
        length = max(len(by_hand(model, t)) for t in texts)
        ids = [by_hand(model, t, length) for t in texts]
        reads = [streams(plain, i)[site][layers] for i in ids]
        expected = reads[0] if minus is None else reads[0] - reads[1]
        assert (v.site, v.at, v.n_positions, sorted(v.layers)) == (site, "front", length, layers)
        got = torch.stack([v.layers[layer] for layer in layers])
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, atol=1e-5 * float(expected.max()), rtol=1e-4)
        # What both begin with is zero to the last bit, and nothing else; alone, BOS is there too.
        alike = [minus is not None and a == b for a, b in zip(ids[0], ids[-1], strict=True)]
        shared = alike.index(False)
        assert shared >= bool(model.cfg.default_prepend_bos) or minus is None
        assert (got == 0).all(-1).tolist() == [[p < shared for p in range(length)]] * len(layers)
        assert v.meta["tokens"] == [model.tokenizer.convert_ids_to_tokens(i) for i in ids]
        assert (v.meta["plus"], v.meta["minus"]) == (plus, minus)
        assert v.meta["model"] == model.cfg.model_name


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_from_prompts_equals_the_streams_by_hand(tiny: Any, architecture: str, bos: bool) -> None:
    for site in ("resid_pre", "resid_post"):
        check_from_prompts(*tiny(architecture, bos), [1, 3], site)


def test_from_prompts_on_the_real_model(model: Any, plain_model: Any) -> None:
    check_from_prompts(model, plain_model, [6, 20], "resid_pre")


def test_a_common_beginning_is_zero_whatever_the_kernels_do(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a batch may differ in the last bit, here by a little more."""
    model, _ = tiny("llama")
    read = vectors.capture_groups

    def noisy(*args: Any) -> torch.Tensor:
        acts = read(*args)
        return acts + 1e-5 * gaussian(*acts.shape)

    monkeypatch.setattr(vectors, "capture_groups", noisy)
    v = sl.SteeringVector.from_prompts(model, *PROMPT_CASES[3], layer=2).layers[2]
    ids = [by_hand(model, text) for text in PROMPT_CASES[3]]
    shared = [a == b for a, b in zip(*ids, strict=False)].index(False)
    assert shared > 4 and (v[:shared] == 0).all() and (v[shared:] != 0).any(1).all()


def test_from_prompts_has_bos_once(tiny: Any, model: Any) -> None:
    bare, _ = tiny("llama")
    expected = sl.SteeringVector.from_prompts(bare, "Love", "Hate", layer=2)
    assert same(sl.SteeringVector.from_prompts(bare, "<s>Love", "<s>Hate", layer=2), expected)
    assert same(sl.SteeringVector.from_prompts(bare, "<s>Love", "Hate", layer=2), expected)
    chats = [
        model.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        for text in ("Love", "Hate")
    ]
    v = sl.SteeringVector.from_prompts(model, *chats, layer=6)
    assert v.meta["tokens"][0].count(model.tokenizer.bos_token) == chats[0].count("<|im_start|>")
    assert v.meta["tokens"][0][1] != model.tokenizer.bos_token


def test_from_prompts_with_another_pad(tiny: Any) -> None:
    model, _ = tiny("llama")
    padded = sl.SteeringVector.from_prompts(model, "I love dogs", "HateA", layer=2).layers[2]
    other = sl.SteeringVector.from_prompts(model, "I love dogs", "Hate", layer=2, pad="A").layers[2]
    n = len(sl.encode(model, "HateA"))
    torch.testing.assert_close(padded[:n], other[:n])
    assert not torch.allclose(padded[n:], other[n:])


# ---------------------------------------------------------------- from pairs


def differences(model: Any, plain: Any, layer: int, site: str, position: int) -> np.ndarray:
    """Positive minus negative stream at one position of every pair, ``[pair, d_model]``."""
    read = [
        [streams(plain, sl.encode(model, t))[site][layer, position].double() for t in pair]
        for pair in PAIRS
    ]
    return np.array([(a - b).numpy() for a, b in read])


@pytest.mark.parametrize(("site", "position"), [("resid_post", -1), ("resid_pre", -2)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_from_pairs_equals_the_closed_forms(
    tiny: Any, architecture: str, site: str, position: int
) -> None:
    """The mean; and components of the differences with both signs, by scikit-learn's PCA."""
    model, plain = tiny(architecture)
    read = {"layers": [3, 1], "site": site, "position": position}
    for layer in (1, 3):
        diffs = differences(model, plain, layer, site, position)
        mean = sl.SteeringVector.from_pairs(model, PAIRS, **read)
        assert (mean.site, mean.at, mean.n_positions) == (site, "generated", 1)
        np.testing.assert_allclose(mean.layers[layer][0], diffs.mean(0), atol=1e-4, rtol=1e-3)
        pca = PCA(3).fit(np.concatenate([diffs, -diffs]))
        for k in range(3):
            got = sl.SteeringVector.from_pairs(model, PAIRS, method="pca", component=k, **read)
            direction = got.layers[layer][0].numpy()
            assert abs(direction @ pca.components_[k]) == pytest.approx(1, abs=1e-4), (layer, k)
            assert (diffs @ direction).mean() >= -1e-6  # positive ones project higher


# ---------------------------------------------------------------- noise, parts, arithmetic


def test_random_like_has_the_norms_and_nothing_else() -> None:
    v = made(2, 5, k=3, d=1000, at="front", meta={"name": "v"})
    v.layers[2][0] = 0  # as BOS
    noise = [sl.SteeringVector.random_like(v, seed=s) for s in (0, 0, 1)]
    for layer in (2, 5):
        torch.testing.assert_close(noise[0].norm()[layer], v.norm()[layer])
        for a in (v, noise[2]):
            cosine = torch.cosine_similarity(noise[0].layers[layer][1:], a.layers[layer][1:])
            assert cosine.abs().max() < 0.15
    assert same(noise[0], noise[1]) and not same(noise[0], noise[2])
    assert (noise[0].site, noise[0].at, noise[0].n_positions) == (v.site, v.at, 3)


def check_norms(control: sl.SteeringVector, v: sl.SteeringVector) -> None:
    """Another vector with the norm of ``v`` at every layer and position, and its place."""
    assert (control.site, control.at, sorted(control.layers)) == (v.site, v.at, sorted(v.layers))
    for layer, norm in v.norm().items():
        torch.testing.assert_close(control.norm()[layer], norm, rtol=1e-5, atol=1e-6)
        cosine = torch.cosine_similarity(control.layers[layer], v.layers[layer])
        assert cosine[norm > 0].abs().min() < 0.95


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3_text"])
def test_unrelated_like_is_the_text_minus_spaces(tiny: Any, architecture: str, bos: bool) -> None:
    model, plain = tiny(architecture, bos)
    start = [model.tokenizer.bos_token_id] * bos
    (space,) = model.tokenizer(" ", add_special_tokens=False)["input_ids"]
    for plus, minus in [(" wedding", " "), ("I went up to the harbour and", "Hate"), ("Love", "")]:
        v = 4 * sl.SteeringVector.from_prompts(model, plus, minus, layer=[1, 3])
        n = v.n_positions
        for text in ("dogs", "the morning, and nobody knew when it would return"):
            control = sl.SteeringVector.unrelated_like(model, v, text)
            check_norms(control, v)
            body = model.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = [*start, *body * n][:n]  # repeated, or cut
            pads = [*start, *[space] * n][:n]
            read = [streams(plain, i)[v.site][[1, 3]] for i in (ids, pads)]
            for layer, difference in zip((1, 3), read[0] - read[1], strict=True):
                norm = v.norm()[layer][:, None]
                expected = torch.nn.functional.normalize(difference, dim=-1) * norm
                torch.testing.assert_close(
                    control.layers[layer][bos:], expected[bos:], atol=1e-3, rtol=1e-3
                )
                if bos:  # where both are the same there is nothing to subtract
                    own = torch.nn.functional.normalize(read[0][(1, 3).index(layer)][0], dim=0)
                    torch.testing.assert_close(control.layers[layer][0], own * norm[0])
            assert control.meta["method"] == "unrelated_like" and text[:9] in repr(control)


def test_unrelated_like_of_a_vector_with_bos(tiny: Any) -> None:
    """Nothing is subtracted: the vector holds the stream at BOS, which no difference does."""
    model, _ = tiny("llama")
    v = sl.SteeringVector.from_prompts(model, "Love and hate", layer=[1, 3])
    assert all(norm[0] > 1 for norm in v.norm().values())
    control = sl.SteeringVector.unrelated_like(model, v, "the rain")
    for layer, norm in v.norm().items():
        torch.testing.assert_close(control.norm()[layer], norm)
        torch.testing.assert_close(control.layers[layer][0], v.layers[layer][0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3_text"])
def test_unrelated_like_of_a_direction(tiny: Any, architecture: str) -> None:
    model, plain = tiny(architecture)
    v = sl.SteeringVector.from_pairs(model, PAIRS, layers=[0, 2])
    control = sl.SteeringVector.unrelated_like(model, v, "the little dog")
    check_norms(control, v)
    for layer in (0, 2):
        ends = [
            streams(plain, sl.encode(model, text))[v.site][layer, -1]
            for text in ("the little dog", " ")
        ]
        expected = torch.nn.functional.normalize(ends[0] - ends[1], dim=0) * v.norm()[layer]
        torch.testing.assert_close(control.layers[layer][0], expected, atol=1e-3, rtol=1e-3)


def test_controls(tiny: Any) -> None:
    model, _ = tiny("llama")
    front = 6 * sl.SteeringVector.from_prompts(model, "I love dogs", "Hate", layer=[1, 2])
    direction = -2 * sl.SteeringVector.from_pairs(model, PAIRS)
    for v in (front, direction):
        found = sl.controls(v, model)
        families = [name.family for name in found]
        assert families == ["random"] * 20 + ["unrelated"] * 8
        assert [name.control for name in found][:20] == [str(seed) for seed in range(20)]
        assert tuple(name.control for name in found)[20:] == vectors.UNRELATED[:8]
        for control in found.values():
            check_norms(control, v)
        for a, b in itertools.combinations(found.values(), 2):
            layer = max(a.layers)
            assert not torch.allclose(a.layers[layer][-1], b.layers[layer][-1], atol=1e-3)
        again = sl.controls(v, model)
        assert list(again) == list(found) and all(same(again[n], found[n]) for n in found)
        later = sl.controls(v, seed=15, n_random=10)  # no model: random ones only
        assert [name.control for name in later] == [str(seed) for seed in range(15, 25)]
        shared = [name for name in later if name in found]
        assert len(shared) == 5 and all(same(later[n], found[n]) for n in shared)
    own = sl.controls(front, model, n_random=0, unrelated=["the rain", "a party"])
    assert [tuple(name) for name in own] == [("unrelated", "the rain"), ("unrelated", "a party")]
    assert sl.controls(front, model, 0, 0) == {}
    with pytest.raises(ValueError, match=r"There are 12 unrelated texts, 13 are wanted"):
        sl.controls(front, model, unrelated=13)
    table = sl.propensity(
        model, "I love dogs", [" love"], [" hate"], {"it": front, **sl.controls(front, model, 3, 2)}
    )
    assert list(table.family[1:]) == ["random"] * 3 + ["unrelated"] * 2


@pytest.mark.parametrize("which", ["first", "last", "random"])
def test_truncate(which: str) -> None:
    v = made(3, k=2, d=4000)
    for fraction in (0.0, 0.1, 0.5, 0.7, 1.0):
        cut = v.truncate(fraction, which).layers[3]
        kept = cut[0] != 0
        assert int(kept.sum()) == round(4000 * fraction)
        assert torch.equal(cut, v.layers[3] * kept)  # the same dimensions at every position
        if fraction:  # of a vector without structure, the length grows with the root
            cosine = torch.cosine_similarity(cut, v.layers[3])
            torch.testing.assert_close(cosine, torch.full((2,), fraction**0.5), atol=0.05, rtol=0)
        if which != "random":
            steps = kept.flip(0) if which == "last" else kept
            assert steps.sort(descending=True, stable=True).values.equal(steps)
    assert same(v.truncate(0.3, which, seed=1), v.truncate(0.3, which, seed=1))
    assert same(v.truncate(0.3, which), v.truncate(0.3, which, seed=1)) == (which != "random")


def test_arithmetic() -> None:
    a, b = made(1, 4, k=2, seed=1), made(4, 6, k=3, seed=2)
    before = {layer: t.clone() for layer, t in a.layers.items()}
    total = 5 * (a - b)
    assert sorted(total.layers) == [1, 4, 6] and total.n_positions == 3
    zero = torch.zeros(1, 8)
    torch.testing.assert_close(total.layers[1], 5 * torch.cat([a.layers[1], zero]))
    torch.testing.assert_close(total.layers[4], 5 * (torch.cat([a.layers[4], zero]) - b.layers[4]))
    torch.testing.assert_close(total.layers[6], -5 * b.layers[6])
    torch.testing.assert_close((-a).layers[4], -a.layers[4])
    torch.testing.assert_close((a / 4).layers[4], a.layers[4] / 4)
    assert same(a * 2, np.float64(2) * a) and same(a + b, b + a)
    torch.testing.assert_close((3 * a).unit().norm()[1], torch.ones(2))
    assert all(torch.equal(a.layers[layer], t) for layer, t in before.items())  # a is as it was
    assert (total.site, total.at) == (a.site, a.at)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: sl.SteeringVector.from_prompts(m, "", "Hate", layer=1), "prompt '' is empty"),
        (lambda m: sl.SteeringVector.from_prompts(m, "Love", layer=9), "Layer 9 .* 0 to 3"),
        (lambda m: sl.SteeringVector.from_prompts(m, "Love", layer=[]), "layers is empty"),
        (lambda m: sl.SteeringVector.from_prompts(m, "a", layer=1, site="x"), "'x'.*resid_pre"),
        (
            lambda m: sl.SteeringVector.from_prompts(m, "a", "b", layer=1, pad="zqx"),
            "'zqx' is 3 to",
        ),
        (
            lambda m: sl.SteeringVector.from_prompts(m, "a", "b", layer=1, pad=""),
            "continuation '' is empty",
        ),
        (lambda m: sl.SteeringVector.from_pairs(m, []), "balanced.*no pair"),
        (lambda m: sl.SteeringVector.from_pairs(m, [("a", "b"), ("c",)]), "1 prompt.* in pair 1"),
        (lambda m: sl.SteeringVector.from_pairs(m, [("a", "b", "c")]), "3 prompt.* in pair 0"),
        (lambda m: sl.SteeringVector.from_pairs(m, ["ab", "cd"]), "1 prompt.* in pair 0"),
        (lambda m: sl.SteeringVector.from_pairs(m, PAIRS, method="lda"), "'lda'.*mean, pca, probe"),
        (lambda m: sl.SteeringVector.from_pairs(m, PAIRS, layers=[4]), "Layer 4 .* 0 to 3"),
        (lambda m: sl.SteeringVector.from_pairs(m, PAIRS, position=-90), "Position -90"),
        (
            lambda m: sl.SteeringVector.from_pairs(m, PAIRS, method="pca", component=5),
            "6 components cannot be had from 5 pairs",
        ),
        (
            lambda m: sl.SteeringVector.from_pairs(m, PAIRS, method="pca", component=-1),
            "0 components cannot be had",
        ),
        (lambda m: sl.SteeringVector({}), "at least one layer"),
        (lambda m: sl.SteeringVector({1: torch.ones(4)}), "same shape"),
        (lambda m: sl.SteeringVector({1: torch.ones(1, 4), 2: torch.ones(2, 4)}), "same shape"),
        (lambda m: sl.SteeringVector({1: torch.ones(0, 4)}), "same shape"),
        (lambda m: sl.SteeringVector({1: torch.full((1, 4), torch.nan)}), "layer 1 has NaN"),
        (lambda m: sl.SteeringVector({1: torch.full((1, 4), torch.inf)}), "layer 1 has NaN or inf"),
        (lambda m: made(1) * float("nan"), "finite number, got nan"),
        (lambda m: made(1) + made(1, site="resid_post"), "site, place of action and d_model"),
        (lambda m: made(1) + made(1, d=9), "site, place of action and d_model"),
        (lambda m: made(1) + made(1, at="back"), "site, place of action and d_model"),
        (lambda m: made(1, at="back") - made(1, k=2, at="back"), "1 and 2 positions"),
        (lambda m: made(1).truncate(1.1), "between 0 and 1, got 1.1"),
        (lambda m: made(1).truncate(float("nan")), "between 0 and 1, got nan"),
        (lambda m: made(1).truncate(0.5, "middle"), "'middle'.*first, last or random"),
    ],
)
def test_bad_input_gets_a_sentence(tiny: Any, make: Callable[[Any], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(tiny("llama")[0])


def test_a_number_cannot_be_added() -> None:
    with pytest.raises(TypeError):
        made(1) + 1  # type: ignore[operator]


# ---------------------------------------------------------------- files


def test_save_and_load(tiny: Any, tmp_path: Path) -> None:
    model, _ = tiny("llama")
    love = sl.SteeringVector.from_prompts(model, "Love ☃", "Hate", layer=[1, 3])
    mean = sl.SteeringVector.from_pairs(model, PAIRS, method="pca", component=1)
    shared = torch.ones(1, 8)
    everywhere = sl.SteeringVector({1: shared, 2: shared}, "resid_post", "all")
    for i, v in enumerate([love, 5 * (love - love.truncate(0.5)), mean, everywhere]):
        path = tmp_path / f"{i}.safetensors"
        v.save(path)
        back = sl.SteeringVector.load(str(path))
        assert same(v, back) and back.meta == v.meta
    assert len(list(tmp_path.iterdir())) == 4


def tensors_file(path: Path, tensors: dict[str, torch.Tensor], **changes: str) -> None:
    about = {"format": "steerlib.vector.1", "site": "resid_pre", "at": "front", "meta": "{}"}
    safetensors.torch.save_file(tensors, path, {**about, **changes})


ONE = {"layer.1": torch.ones(1, 8)}
BAD_FILES: dict[str, Callable[[Path], Any]] = {
    "missing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("love - hate"),
    "cut short": lambda path: (made(1, d=64).save(path), path.write_bytes(path.read_bytes()[:-9])),
    "a broken header": lambda path: (
        made(1).save(path),
        path.write_bytes(path.read_bytes().replace(b"shape", b"shame")),
    ),
    "foreign": lambda path: safetensors.torch.save_file({"weight": torch.ones(2)}, path),
    "another format": lambda path: tensors_file(path, ONE, format="steerlib.vector.9"),
    "no tensors": lambda path: tensors_file(path, {}),
    "a foreign tensor": lambda path: tensors_file(path, {**ONE, "bias": torch.ones(1, 8)}),
    "a negative layer": lambda path: tensors_file(path, {"layer.-1": torch.ones(1, 8)}),
    "no positions": lambda path: tensors_file(path, {"layer.1": torch.ones(8)}),
    "unequal shapes": lambda path: tensors_file(path, {**ONE, "layer.2": torch.ones(1, 9)}),
    "NaN": lambda path: tensors_file(path, {"layer.1": torch.full((1, 8), torch.nan)}),
    "another site": lambda path: tensors_file(path, ONE, site="mlp_out"),
    "meta that is no JSON": lambda path: tensors_file(path, ONE, meta="{'a'"),
    "meta that is a list": lambda path: tensors_file(path, ONE, meta="[]"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_load_refuses(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "v.safetensors"
    BAD_FILES[kind](path)
    with pytest.raises(ValueError, match="v.safetensors is not a steering vector file: "):
        sl.SteeringVector.load(path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "sprung",)

    for name, write in [("a", pickle.dump), ("b", torch.save)]:
        with open(tmp_path / name, "wb") as file:
            write(Trap(), file)
        with pytest.raises(ValueError, match="is not a steering vector file"):
            sl.SteeringVector.load(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("kind", ["save", "to_gguf"])
@pytest.mark.parametrize("when", ["while writing", "while renaming"])
def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, when: str
) -> None:
    path = tmp_path / "v"
    getattr(made(3, site="resid_post"), kind)(path)
    old = path.read_bytes()

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    def half(tensors: Any, to: Path, header: Any) -> None:
        to.write_bytes(b"half")
        raise KeyboardInterrupt

    if when == "while renaming":
        monkeypatch.setattr("os.replace", interrupt)
    elif kind == "save":
        monkeypatch.setattr(safetensors.torch, "save_file", half)
    else:
        monkeypatch.setattr(GGUFWriter, "write_tensors_to_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        getattr(made(3, 4, site="resid_post", seed=1), kind)(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("site", "shift"), [("resid_pre", 1), ("resid_post", 0)])
def test_gguf_is_read_by_others(tmp_path: Path, site: str, shift: int) -> None:
    """``direction.l`` acts on what leaves block l, which is what enters block l + 1."""
    v = made(2, 5, 7, site=site, meta={"model": "smollm2-135m"})
    path = tmp_path / "v.gguf"
    v.to_gguf(path)
    reader = GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "smollm2-135m"
    assert reader.get_field("controlvector.layer_count").contents() == 3
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    expected = {f"direction.{layer - shift}": t[0] for layer, t in v.layers.items()}
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor.numpy())
    peer = ControlVector.import_gguf(path)
    assert peer.model_type == "smollm2-135m"
    assert sorted(peer.directions) == [layer - shift for layer in (2, 5, 7)]
    for layer, tensor in v.layers.items():
        np.testing.assert_array_equal(peer.directions[layer - shift], tensor[0].numpy())
    for of_noone in (made(2), made(2, meta={"model": None})):
        of_noone.to_gguf(path)
        assert ControlVector.import_gguf(path).model_type == "unknown"
    v.to_gguf(path, model_hint="llama")
    assert ControlVector.import_gguf(path).model_type == "llama"


@pytest.mark.parametrize(
    ("v", "words"),
    [
        (made(3, k=2), "has 2"),
        (made(0, 3, site="resid_post"), r"drop the layers \[0\]"),
        (made(0, 1, 2), r"drop the layers \[0, 1\]"),
    ],
)
def test_gguf_refuses_what_cannot_be_said(tmp_path: Path, v: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        v.to_gguf(tmp_path / "v.gguf")
    assert not list(tmp_path.iterdir())
