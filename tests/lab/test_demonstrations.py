"""The demonstrations: their vectors, their effects in nats, and which work in which model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import adding, noise, reference_logits

import steerlib as sl
from steerlib.lab import datasets, demonstrations
from steerlib.tokens import continuation_ids


def effects(own: float, noise: float, name: str = "1", model: str = "m") -> pd.DataFrame:
    rng, rows = np.random.default_rng(0), []
    families = [("demonstration", 1, own), ("random", 20, 0.0), ("unrelated", 8, 0.0)]
    for family, k, mean in families:
        for c in range(k):
            for prompt, x in enumerate(mean + noise * rng.normal(size=9)):
                rows.append((model, name, prompt, family, str(c), x, 0.01 * x))
    columns = ["model", "demonstration", "prompt", "family", "control", "effect", "shuffled"]
    return pd.DataFrame(rows, columns=columns)


def test_summary_tells_effects_from_controls() -> None:
    frame = pd.concat([effects(3, 0.5), effects(0, 0.01, "2"), effects(3, 0.5, "13")])
    table = demonstrations.summary(frame, 0.25).set_index("demonstration")
    assert table.works.tolist() == [True, False, True]
    assert table.verdict.tolist() == ["reproduced", "not seen", "opposite"]  # 13 should not work
    assert (table.n_test == 9).all() and table.p["1"] == pytest.approx(2**-9)
    assert table.p_holm["1"] == pytest.approx(3 * 2**-9) and table.q95_random["1"] < 1
    assert not demonstrations.summary(frame, 0.25, "shuffled").works.iloc[1]
    two = pd.concat([frame, effects(3, 0.5, model="other")])
    assert demonstrations.summary(two, 0.25).p_holm.iloc[-1] == pytest.approx(2**-9)  # by model
    assert (table.q05_random < table.q95_random).all()


def test_by_chance_puts_each_control_in_the_vectors_place() -> None:
    """Of 20 random controls one is real: it passes, and one of 20 demonstrations would."""
    frame = pd.concat([effects(3, 0.5), effects(0, 0.5, "2")])
    found = demonstrations.by_chance(frame, 0.25).set_index("model").loc["m"]
    assert found.tried == 40 and found.passed < 4  # the largest of pure noise, now and then
    rng = np.random.default_rng(1)
    real = (frame["family"] == "random") & (frame.control == "7") & (frame.demonstration == "1")
    frame.loc[real, "effect"] = 2 + 0.1 * rng.normal(size=9)
    more = demonstrations.by_chance(frame, 0.25).set_index("model").loc["m"]
    alone = demonstrations.by_chance(frame[frame.demonstration == "1"], 0.25).iloc[0]
    assert alone.tried == 20 and alone.passed == 1 and alone.expected == pytest.approx(1 / 20)
    assert more.expected == pytest.approx(2 * more.passed / 40)


def test_results_put_small_models_first(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(datasets, "folder", lambda: tmp_path)
    with pytest.raises(ValueError, match="There are no results"):
        demonstrations.results()
    (tmp_path / "results").mkdir()
    stored = effects(1, 1).drop(columns="model").rename(columns={"prompt": "prompt_number"})
    for name in ("zz", "qwen2.5-coder-1.5b", "gemma3-270m"):
        stored.to_csv(tmp_path / "results" / f"effects_{name}.csv", index=False)
    found = demonstrations.results()
    assert found.model.unique().tolist() == ["gemma3-270m", "qwen2.5-coder-1.5b", "zz"]
    assert found.demonstration.iloc[0] == "1" and found.prompt.max() == 8


def test_no_such_variant() -> None:
    with pytest.raises(ValueError, match="no variant 'love-and-hate' of one layer"):
        demonstrations.variants(None, "1", ["love-and-hate"], 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no variant 'love-and-wedding' of one layer"):
        demonstrations.variants(None, "1", ["love-and-wedding"], 1.0)  # type: ignore[arg-type]


# ---------------------------------------------------------------- one demonstration


def test_every_demonstration_has_its_texts() -> None:
    shipped = datasets.load("demonstrations").astype({"id": str}).set_index("id")
    assert demonstrations.names() == [name for name in shipped.index if name != "14"]
    for name in demonstrations.names():
        demo = demonstrations.load(name)
        assert demo.id == name and not set(demo.dev) & set(demo.test)
        assert len(demo.dev) == 6 and len(demo.test) == 9
        assert len(demo.targets) == len(demo.references) == 9
        if not name.startswith(demonstrations.FRENCH):  # its own prompt comes first
            assert demo.test[0] == shipped.prompt[name]
        pairs = zip(demo.dev + demo.test, demo.dev_control + demo.test_control, strict=name == "16")
        for prompt, control in pairs:
            assert prompt.replace("goose", "duck").replace("geese", "ducks") == control
    with pytest.raises(ValueError, match="no demonstration '99'; there are 1, 2, .*fishing"):
        demonstrations.load("99")


@pytest.mark.parametrize("name", ["1", "11", "15b"])
def test_its_vector_is_that_of_its_two_prompts(tiny: Any, name: str) -> None:
    model, _ = tiny("llama")
    demo = demonstrations.load(name)
    minus = {"1": "Hate", "11": None, "15b": " "}[name]
    plain = sl.SteeringVector.from_prompts(model, demo.row.plus, minus, layer=2)
    assert torch.equal(demo.vector(model, 2).layers[2], plain.layers[2])
    row = sl.settings.vector_settings(name, model)  # of no such model: relative depth
    chosen = demo.chosen(model)
    expected = row.coefficient * demo.vector(model, row.layer).layers[row.layer]
    assert torch.equal(chosen.layers[row.layer], expected)


def test_the_french_vector_is_the_mean_of_all_switches(tiny: Any) -> None:
    model, _ = tiny("llama")
    got = demonstrations.load("french-codeswitch").vector(model, 1).layers[1]
    total = torch.zeros_like(got)
    for mixed, english in datasets.code_switches():
        one = sl.SteeringVector.from_prompts(model, mixed, english, layer=1).layers[1]
        total[: len(one)] += one
    torch.testing.assert_close(got, total / 23)


def by_hand(
    model: Any, plain: Any, prompt: str, texts: list[str], edits: dict[int, Any], front: bool
) -> list[float]:
    """Log-probability of each text behind a prompt, under hooks written by hand."""
    found = []
    for text in texts:
        ids, more = sl.encode(model, prompt), continuation_ids(model, text)
        where = [0, 1, 2] if front else list(range(len(ids) - 1, len(ids) + len(more)))
        given = [(layer, site, adding(t, where)) for layer, (site, t) in edits.items()]
        logits = reference_logits(plain, ids + more, given)[len(ids) - 1 : -1].log_softmax(-1)
        found.append(float(logits[range(len(more)), more].double().sum()))
    return found


@pytest.mark.parametrize("name", ["1", "16"])
@pytest.mark.parametrize("split", ["dev", "test"])
def test_effects_are_differences_of_log_odds(tiny: Any, name: str, split: str) -> None:
    """Two prompts, three continuations a side, against hooks written by hand on the plain model."""
    model, plain = tiny("llama")
    demo = demonstrations.load(name)
    conditions = {
        "front": noise(model, 1, k=3),
        "direction": noise(model, 2, seed=1, site="resid_post", at="generated"),
    }
    found = demo.effects(model, conditions, split, n_prompts=2, n_continuations=3)
    prompts = getattr(demo, split)[:2]
    assert list(zip(found.prompt, found.condition, strict=True)) == [
        (prompt, name) for prompt in prompts for name in conditions
    ]

    def odds(prompt: str, condition: Any) -> np.ndarray:
        """Effect, target effect and shuffled effect, before the unsteered model's is subtracted."""
        edits = {} if condition is None else {
            layer: (condition.site, t) for layer, t in condition.layers.items()
        }  # fmt: skip
        front = condition is not None and condition.at == "front"
        a, b = (
            np.array(by_hand(model, plain, prompt, texts[:3], edits, front))
            for texts in (demo.targets, demo.references)
        )
        swap, total = np.array([True, False, True]), np.logaddexp.reduce
        c, d = np.where(swap, b, a), np.where(swap, a, b)
        return np.array([total(a) - total(b), total(a), total(c) - total(d)])

    for row in found.itertuples():
        condition = conditions[row.condition]
        expected = odds(row.prompt, condition) - odds(row.prompt, None)
        if name == "16":  # less the effect on the same prompt with another bird
            controls = getattr(demo, f"{split}_control")
            other = controls[getattr(demo, split).index(row.prompt)]
            expected -= odds(other, condition) - odds(other, None)
        got = [row.effect, row.target_effect, row.shuffled]
        np.testing.assert_allclose(got, expected, atol=1e-3)


def test_number_14_borrows_the_prompts_of_9_and_15b(tiny: Any) -> None:
    model, _ = tiny("llama")
    demo = demonstrations.load("14")
    parts = [demonstrations.load(name) for name in ("9", "15b")]
    assert demo.test == parts[0].test + parts[1].test and demo.dev == parts[0].dev + parts[1].dev
    conditions = {"v": noise(model, 2, at="generated")}
    few = {"n_prompts": 1, "n_continuations": 1}
    each = [part.effects(model, conditions, **few) for part in parts]
    expected = pd.concat(each, ignore_index=True)
    pd.testing.assert_frame_equal(demo.effects(model, conditions, **few), expected)


def test_prompts_that_are_too_short_are_left_out(tiny: Any) -> None:
    model, _ = tiny("llama")
    demo = demonstrations.load("16")
    lengths = [len(sl.encode(model, text)) for text in demo.test]
    vector = noise(model, 1, k=sorted(lengths)[3])
    kept = demo.fitting(model, vector)
    assert kept.test == [
        t for t, n in zip(demo.test, lengths, strict=True) if n > sorted(lengths)[3]
    ]
    assert 0 < len(kept.test) < 6 and len(kept.test_control) == len(kept.test)
    assert kept.dev == demo.dev
    for text, control in zip(kept.test, kept.test_control, strict=True):
        assert demo.test.index(text) == demo.test_control.index(control)


# ---------------------------------------------------------------- strength


@pytest.mark.parametrize("kind", ["front", "direction", "sparse"])
def test_strength_is_norm_over_norm(tiny: Any, kind: str) -> None:
    model, _ = tiny("gpt2")
    prompts = ["I went up to my friend", "The ship left", "no"]
    if kind == "direction":
        vector = noise(model, 1, at="generated", site="resid_post")
        where = [-1]
    else:
        vector = noise(model, 2, k=4)
        where = [0, 1, 2, 3]
    if kind == "sparse":  # rows of zeros change nothing, and do not count
        vector.layers[2][[0, 3]] = 0
        where = [1, 2]
    (layer,) = vector.layers
    long = [p for p in prompts if len(sl.encode(model, p)) > max(where)]
    assert (len(long) < 3) == (kind != "direction")
    norms = torch.stack([
        sl.capture(model, [p], layers=layer, positions=where, site=vector.site).norm(dim=-1).mean()
        for p in long
    ])  # fmt: skip
    rows = vector.layers[layer].norm(dim=-1)
    expected = float(rows[rows > 0].mean() / norms.mean())
    assert demonstrations.strength(model, vector, prompts) == pytest.approx(expected, rel=1e-5)
    assert demonstrations.strength(model, -3 * vector, prompts) == pytest.approx(3 * expected)
    assert demonstrations.strength(model, 0 * vector, prompts) == 0


def test_variants_have_one_strength(tiny: Any) -> None:
    model, _ = tiny("llama")
    names = ["love-alone", "love-minus-space"]
    found = demonstrations.variants(model, "1", names, 1.25, layer=1)
    assert list(found) == names
    demo = demonstrations.load("1")
    for vector, minus in zip(found.values(), (None, " "), strict=True):
        assert demonstrations.strength(model, vector, demo.dev) == pytest.approx(1.25, rel=1e-4)
        plain = sl.SteeringVector.from_prompts(model, "Love", minus, layer=1).layers[1]
        cosine = torch.nn.functional.cosine_similarity(vector.layers[1].ravel(), plain.ravel(), 0)
        assert float(cosine) == pytest.approx(1)


def test_a_model_without_results_is_measured_now(tiny: Any) -> None:
    """In the form of stored results, at the settings of this model."""
    model, _ = tiny("llama")
    found = demonstrations.measured(model, ["1", "15b"], n=2)
    stored = demonstrations.results()
    assert set(found) == set(stored) and set(found.family) == set(stored["family"])
    assert set(found.model) == {model.cfg.model_name}
    demo = demonstrations.load("15b")
    vector = demo.chosen(model)
    alone = demo.fitting(model, vector).effects(model, {"it": vector}, n_continuations=2)
    own = found[(found.demonstration == "15b") & (found["family"] == "demonstration")]
    assert own.effect.tolist() == pytest.approx(alone.effect.tolist(), abs=1e-4)
    assert len(found[found.demonstration == "15b"]) == 29 * len(alone)
    assert demonstrations.summary(found, 0.25).demonstration.tolist() == ["1", "15b"]
