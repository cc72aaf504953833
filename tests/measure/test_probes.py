"""Probes on synthetic activations whose structure is known, and on none at all."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import steerlib as sl
from steerlib.directions import principal_components, unit_directions
from steerlib.measure.probes import (
    accuracy_table,
    by_twin,
    chosen_layers,
    component_table,
    crossed,
    layer_accuracy,
    pair_accuracy,
    pair_differences,
    projections,
)

D = 24


def synthetic(
    n: int = 60, honesty: float = 1.0, label: float = 2.0, noise: float = 0.5, seed: int = 0
) -> tuple[torch.Tensor, pd.DataFrame]:
    """Twins of claims: dimension 0 carries honesty, 1 the label A or B, 2 the claim's truth."""
    generator = torch.Generator().manual_seed(seed)
    rows, acts = [], torch.zeros(n, 2, D)
    for i in range(n):
        truth = i % 2 == 0
        content = torch.randn(D, generator=generator) * noise
        for j, honest in enumerate((True, False)):
            says_true = truth == honest
            acts[i, j] = content + noise * torch.randn(D, generator=generator)
            acts[i, j, 0] += honesty * (1 if honest else -1)
            acts[i, j, 1] += label * (1 if says_true else -1)
            acts[i, j, 2] += 3 * label * (1 if truth else -1)
            rows.append((f"c{i}", f"p{i // 2}", truth, "A" if says_true else "B", honest))
    return acts, pd.DataFrame(rows, columns=["id", "pair", "truth", "label", "honest"])


def test_pair_accuracy_in_closed_form() -> None:
    acts = torch.tensor([[[2.0, 0], [1, 9]], [[0, 0], [3, 0]], [[5, 1], [4, 1]], [[7, 0], [7, 5]]])
    share, low, high = pair_accuracy(acts, torch.tensor([3.0, 0]))  # +, -, +, tie
    assert share == round(2.5) / 4 and low < share < high
    flipped = pair_accuracy(acts[:3], torch.tensor([-1.0, 0]))
    assert flipped == sl.proportion_interval(1, 3)
    assert pair_accuracy(acts[:3], torch.tensor([0.01, 0])) == sl.proportion_interval(2, 3)


def both_orders(
    twins: int, honesty: float, meaning: float, label: float, noise: float = 0.0
) -> tuple[torch.Tensor, pd.DataFrame]:
    """Claims and their twins in both orders: dimensions 0, 1, 2 carry honesty, meaning, label."""
    generator = torch.Generator().manual_seed(0)
    rows, acts = [], []
    for i in range(2 * twins):
        for order in ("given", "swapped"):
            content = torch.randn(D, generator=generator)
            answers = []
            for honest in (True, False):
                truth = i % 2 == 0
                says = truth == honest
                is_a = says == (order == "given")
                x = content + noise * torch.randn(D, generator=generator)
                parts = ((honesty, honest), (meaning, says), (label, is_a))
                for d, (size, yes) in enumerate(parts):
                    x[d] += size * (1 if yes else -1)
                answers.append(x)
                rows.append((f"c{i}", f"p{i // 2}", truth, order, "BA"[is_a], says, honest))
            acts.append(torch.stack(answers))
    columns = ["id", "pair", "truth", "order", "label", "meaning", "honest"]
    return torch.stack(acts).double(), pd.DataFrame(rows, columns=columns)


def weights(frame: pd.DataFrame) -> dict[str, float]:
    held_out = crossed(frame[frame.split == "held-out"])
    return accuracy_table(held_out, ["factor"], "weight").set_index("factor")["mean"].to_dict()


def test_both_orders_tell_meaning_from_label() -> None:
    """In one order the first component is their sum, and only the other order takes it apart."""
    acts, labels = both_orders(12, honesty=0.1, meaning=3, label=1)
    given = (labels.order == "given").to_numpy()[::2].copy()
    frame = pair_differences(acts[:, :, None], labels, methods=["pc1", "mean"], fit=given, folds=3)
    assert set(frame[frame.split == "train"].order) == {"given"}
    found = {k: abs(v) for k, v in weights(frame[frame.method == "pc1"]).items()}
    # along (3, 1) / sqrt(10) the meaning moves an answer by 9, the label by 1
    size = np.hypot(9, 1)
    assert found == pytest.approx({"honesty": 0, "meaning": 9 / size, "label": 1 / size}, abs=5e-3)
    mean = {"honesty": 1, "meaning": 0, "label": 0}
    assert weights(frame[frame.method == "mean"]) == pytest.approx(mean, abs=1e-4)
    alone = pair_differences(acts[given][:, :, None], labels[np.repeat(given, 2)].reset_index(
        drop=True), methods=["pc1"], folds=3)  # fmt: skip
    sees = weights(alone)
    assert sees["meaning"] == sees["label"]
    assert abs(sees["label"]) == pytest.approx(1, abs=1e-2)


def test_claims_can_be_held_out_by_name() -> None:
    """Nothing of them enters: other activations there leave the directions as they are."""
    acts, labels = both_orders(12, honesty=1, meaning=2, label=1, noise=0.3)
    out = labels.pair.isin(["p1", "p5", "p6"]).to_numpy()[::2].copy()
    spoilt = torch.where(torch.tensor(out)[:, None, None], 100 * acts.flip(1), acts)
    frames = [
        pair_differences(x[:, :, None], labels, methods=["mean", "pc2"], held_out=out)
        for x in (acts, spoilt)
    ]
    a, b = (f[f.split == "train"].reset_index(drop=True) for f in frames)
    pd.testing.assert_frame_equal(a, b)
    assert set(a["pair"]) == set(labels.pair[~np.repeat(out, 2)])
    a, b = (f[f.split == "held-out"].difference.to_numpy() for f in frames)
    np.testing.assert_allclose(a, -b, atol=1e-9)  # each in units of its own root mean square
    table = component_table(acts, labels, 1, held_out=out).set_index(["factor", "measure"])
    assert table.n["honesty", "pairs"] == 12 and table.accuracy["meaning", "pairs"] == 1
    half = out & (labels.id[::2] != "c2").to_numpy()
    with pytest.raises(ValueError, match="p1 is held out in part only"):
        pair_differences(acts[:, :, None], labels, held_out=half)


def test_weights_are_shares_of_the_squared_difference() -> None:
    acts, labels = both_orders(10, honesty=1, meaning=2, label=3, noise=0.01)
    frame = pair_differences(acts[:, :, None], labels, methods=["mass-mean"], n_random=30, folds=2)
    found = crossed(frame[(frame.family == "random") & (frame.split == "held-out")])
    squares = found.groupby(["method", "factor"]).weight.mean().pow(2).groupby("method").sum()
    assert len(squares) == 30 and squares.between(0.97, 1.0 + 1e-9).all()
    hits = accuracy_table(found, ["method", "factor"])
    assert hits["mean"].between(0, 1).all() and (hits.low >= 0).all() and (hits.high <= 1).all()
    assert set(hits.n) == {10}  # twins, not pairs


def test_unrelated_directions_are_fitted_on_their_own_question() -> None:
    acts, labels = both_orders(20, honesty=1, meaning=0, label=0, noise=0.1)
    long = np.arange(80) % 3 == 0
    acts[long] += 5 * torch.eye(D)[7]
    acts[long, 0] += 2 * torch.eye(D)[7]  # by which alone the honest answer is told
    frame = pair_differences(
        acts[:, :, None], labels, methods=[], unrelated={"long": long, "nothing": long | ~long},
        folds=4,
    )  # fmt: skip
    held_out = frame[frame.split == "held-out"]
    assert set(held_out.family) == {"unrelated"}
    by_kind = held_out[held_out.method == "long"].groupby(long[held_out.row[:80]]).difference.mean()
    assert by_kind[True] > 3 * abs(by_kind[False])
    assert (held_out[held_out.method == "nothing"].difference == 0).all()


def test_the_layer_is_chosen_on_other_claims() -> None:
    """One layer tells all claims apart but one, on which another layer alone is right."""
    acts, labels = both_orders(15, honesty=1, meaning=0, label=0, noise=0.05)
    odd = (labels.pair == "p3").to_numpy()[::2].copy()
    wrong = acts.flip(1)
    odd_here = torch.tensor(odd)[:, None, None]
    most, one = torch.where(odd_here, wrong, acts), torch.where(odd_here, acts, wrong)
    noise = torch.randn(acts.shape, generator=torch.Generator().manual_seed(1)).double()
    layers = torch.stack([noise, most, torch.where(odd_here, one, noise)], 2)
    found = chosen_layers(layers, labels, "mean", [4, 5, 6], folds=3)
    assert list(found.index) == list(range(60)) and (found == 5).all()
    frame = pair_differences(layers, labels, [4, 5, 6], ["mean"], folds=3)
    held_out = frame[(frame.split == "held-out") & (frame.layer == frame.row.map(found))]
    assert (held_out.difference > 0).tolist() == (~odd).tolist()


def test_intervals_resample_twins() -> None:
    """Two answers that agree within twins: half as many independent units, a wider interval."""
    generator = np.random.default_rng(0)
    acts = torch.from_numpy(generator.choice([-1.0, 1.0], 40).repeat(2))[:, None, None]
    acts = torch.cat([acts, -acts], 1)
    twins = np.arange(80) // 2
    _, low, high = pair_accuracy(acts, torch.ones(1), twins)
    _, narrow_low, narrow_high = pair_accuracy(acts, torch.ones(1))
    assert high - low > 1.3 * (narrow_high - narrow_low)
    sure = pair_accuracy(torch.tensor([[[1.0], [0]]] * 20), torch.ones(1), range(20))
    assert sure == (1.0, pytest.approx(0.05 ** (1 / 20)), 1.0)  # the exact bound


def test_by_twin_places_every_answer() -> None:
    _, labels = both_orders(3, 1, 1, 1)
    value = labels.truth * 4 + (labels.order == "swapped") * 2 + (labels.label == "B")
    table = by_twin(labels.sample(frac=1, random_state=0), value.sample(frac=1, random_state=0))
    assert table.shape == (3, 2, 2, 2)
    np.testing.assert_array_equal(table, np.arange(8).reshape(1, 2, 2, 2).repeat(3, 0))
    with pytest.raises(ValueError, match="its twin, both orders"):
        by_twin(labels[labels.order == "given"], value[labels.order == "given"])
    with pytest.raises(ValueError, match="its twin, both orders"):
        by_twin(labels[1:], value[1:])


def test_component_table_names_them() -> None:
    acts, labels = synthetic(120)
    table = component_table(acts, labels).set_index(["component", "factor", "measure"])
    assert table.accuracy[1, "label", "pairs"] > 0.95 and table.auc[1, "label", "prompts"] > 0.95
    assert table.accuracy[2, "honesty", "pairs"] > 0.9
    assert table.accuracy[2, "honesty", "prompts"] > 0.8
    for other in [(1, "honesty"), (2, "label"), (3, "honesty"), (3, "label"), (2, "truth")]:
        assert 0.3 < table.auc[*other, "prompts"] < 0.7
    assert (1, "truth", "pairs") not in table.index  # the prompts of a pair share it
    raw = component_table(acts, labels, of="raw").set_index(["component", "factor", "measure"])
    assert raw.accuracy[1, "truth", "prompts"] > 0.95
    assert (table.low <= table.accuracy).all() and (table.accuracy <= table.high).all()
    assert set(table.n) == {120, 240}


def test_component_table_without_claims() -> None:
    acts, labels = synthetic(40)
    table = component_table(acts, labels.assign(truth=None), n_components=1)
    assert list(table.factor) == ["honesty"] * 2 + ["label"] * 2


def test_component_table_tells_meaning_from_label() -> None:
    acts, labels = both_orders(20, honesty=0.1, meaning=3, label=1, noise=0.1)
    table = component_table(acts, labels, 1).set_index(["factor", "measure"])
    assert table.accuracy["meaning", "pairs"] == 1 and table.accuracy["label", "pairs"] == 0.5
    assert table.explained.iloc[0] == pytest.approx(9 / 10.01, abs=0.02)


def test_noise_gives_nothing() -> None:
    acts, labels = synthetic(200, honesty=0, label=0)
    found = layer_accuracy(acts[:, :, None], labels)
    held_out = found[found.split == "held-out"]
    assert held_out.accuracy.between(0.36, 0.64).all(), held_out.to_string()
    assert found[(found.split == "train") & (found.method == "logistic")].accuracy.item() > 0.6
    table = component_table(acts, labels)
    assert table.auc.between(0.38, 0.62).all(), table.to_string()
    explained = principal_components(acts, 3)[1]
    assert explained[0] < 2.5 * explained[2]


def test_planted_direction_is_found_and_controls_are_not() -> None:
    acts, labels = synthetic(120)
    none = synthetic(120, honesty=0, label=0)[0]
    both = torch.stack([none, acts], 2)  # [pair, 2, layer, d_model]
    table = layer_accuracy(both, labels, layers=[3, 9]).set_index(["layer", "method", "split"])
    for method in ("mean", "pc2", "logistic", "mass-mean"):
        assert table.accuracy[9, method, "held-out"] > 0.9, method
        assert table.accuracy[3, method, "held-out"] < 0.65, method
    assert table.accuracy[9, "pc1", "held-out"] < 0.65  # the label
    for split in ("train", "held-out"):
        assert table.accuracy[9, "random", split] < 0.7
        assert table.high[9, "random", split] < 0.95
    assert (table.low <= table.accuracy).all() and (table.accuracy <= table.high).all()
    assert set(table.n) == {120}
    again = layer_accuracy(both, labels, layers=[3, 9]).set_index(table.index.names)
    pd.testing.assert_frame_equal(table, again)


def test_mean_is_not_the_label_although_folds_are_uneven() -> None:
    """One pair too many would turn the mean difference into the label, here 50 times as large."""
    acts, labels = synthetic(66, honesty=0.5, label=25, noise=0.02)
    labels["pair"] = labels.id  # without twins, folds need not be balanced
    table = layer_accuracy(acts[:, :, None], labels, methods=["mean"], n_controls=2)
    assert table[table.method == "mean"].accuracy.min() > 0.95


def test_twins_are_never_torn_apart() -> None:
    """Pairs that share a random direction with their twin only: nothing is to be learned."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(60, 400, generator=generator).repeat_interleave(2, 0)
    acts = torch.stack([shared, -shared], 1)[:, :, None]
    _, labels = synthetic(120)
    table = layer_accuracy(acts, labels, methods=["mean", "logistic"], n_controls=2)
    table = table.set_index(["method", "split"])
    assert table.accuracy["mean", "train"] == 1.0
    assert table.accuracy["mean", "held-out"] < 0.65
    torn = labels.assign(pair=labels.id)
    leaked = layer_accuracy(acts, torn, methods=["mean"], n_controls=2)
    assert leaked[(leaked.method == "mean") & (leaked.split == "held-out")].accuracy.item() > 0.7


def test_equal_activations_are_chance() -> None:
    acts, labels = synthetic(40)
    acts[:, 1] = acts[:, 0]
    table = layer_accuracy(acts[:, :, None], labels)
    assert (table.accuracy == 0.5).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda a, x: layer_accuracy(a, x), r"\[20, 2, 24\] do not fit"),
        (lambda a, x: layer_accuracy(a[:9, :, None], x), "for 40 labels"),
        (lambda a, x: layer_accuracy(a[:, :, None], x, folds=11), "11 folds need at least"),
        (lambda a, x: layer_accuracy(a[:, :, None], x, layers=[1, 2]), "2 layers are named"),
        (lambda a, x: component_table(a, x[::-1]), "before its dishonest one"),
    ],
)
def test_bad_input_gets_one_sentence(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(*synthetic(20))  # type: ignore[operator]


def test_a_probe_that_finds_nothing_is_zero_and_a_coin_toss() -> None:
    """As many differences +d as -d: no direction, and no NaN in the accuracies."""
    d = torch.tensor([1.0, 2.0, 0.0, -1.0]).double()
    acts = torch.zeros(20, 2, 4).double()
    acts[:, 0] = d * torch.tensor([1.0, -1.0] * 10)[:, None]
    assert not unit_directions(acts, "logistic")["logistic"].any()
    rows = [(i, i // 2, i % 2 == 0, a, (a == "A") == (i % 2 == 0)) for i in range(20) for a in "AB"]
    labels = pd.DataFrame(rows, columns=["id", "pair", "truth", "label", "honest"])
    labels = labels.sort_values(["id", "honest"], ascending=[True, False], ignore_index=True)
    table = sl.layer_accuracy(acts[:, :, None], labels, methods=["logistic"], n_controls=2)
    assert (table[table.method == "logistic"].accuracy == 0.5).all()


def test_projections_are_on_unit_vectors() -> None:
    acts, labels = synthetic(20)
    v = torch.arange(1.0, D + 1)
    table = projections(acts, labels, {"v": v, "ten": 10 * v})
    assert list(table.columns) == [*labels.columns, "v", "ten"]
    expected = acts.double() @ (v.double() / np.linalg.norm(v))
    np.testing.assert_allclose(table.v, expected.flatten(), atol=1e-5)
    np.testing.assert_allclose(table.v, table.ten, atol=1e-5)
    with pytest.raises(ValueError, match="do not fit 38 labels"):
        projections(acts, labels[2:], {"v": v})
