"""Probes: what is chosen and by what, the module that comes out, and the errors."""

from __future__ import annotations

import math
import os
import signal
import sys
import warnings
import weakref
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tlscale.codes.probes.kinds import PROBE_KINDS
from tlscale.codes.probes.linear import linear_path
from tlscale.codes.probes.logistic import logistic_path
from tlscale.codes.probes.ridge import ridge_path
from tlscale.codes.probes.scikit import sklearn_path
from tlscale.codes.probes.select import PathRow, choose
from tlscale.distributed.signals import StopRequest
from tlscale.errors import DataError, ModelError, RecipeError, Stopped
from tlscale.models import knn
from tlscale.models.knn import KnnHead
from tlscale.recipe.schema import ProbeSection

ONE = {"logistic": (0.1,), "ridge": (0.1,), "knn": (3,), "sklearn": (0.1,)}
GRIDS = {"logistic": (1.0, 0.1, 1e-2), "ridge": (1.0, 0.1, 1e-2), "knn": (1, 3, 9), "sklearn": (1.0, 0.1, 1e-2)}
KINDS = pytest.mark.parametrize("kind", PROBE_KINDS)
SOLVERS = {"logistic": logistic_path, "ridge": ridge_path, "sklearn": sklearn_path}
LINEAR = pytest.mark.parametrize("kind", SOLVERS)


def fit_probe(kind, codes, labels, held, held_labels, **options):
    """The probe of one set of codes."""
    return choose(kind, [("codes", (codes, held))], labels, held_labels, **options).probe


def draw(num_train=60, num_held=40, width=5, num_classes=3, seed=0, spread=1.0):
    """Raw float32 codes with means and scales of their own: codes, labels, held codes, held labels."""
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.arange(num_train + num_held) % num_classes
    centres_CD = torch.randn(num_classes, width, generator=generator)
    codes_ND = spread * centres_CD[labels_N] + torch.randn(len(labels_N), width, generator=generator)
    codes_ND = codes_ND * torch.linspace(0.1, 7, width) + torch.linspace(-3, 20, width)
    return codes_ND[:num_train], labels_N[:num_train], codes_ND[num_train:], labels_N[num_train:]


def none_of(codes_ND):
    return codes_ND[:0], torch.zeros(0, dtype=torch.int64)


def standardised(codes_ND, by_ND):
    by_ND = by_ND.double()
    return (codes_ND.double() - by_ND.mean(0)) / by_ND.std(0, unbiased=False)


# -- the module that comes out ------------------------------------------------------------------------------------


@LINEAR
def test_standardisation_is_folded_in(kind):
    codes, labels, held, held_labels = draw()
    probe = fit_probe(kind, codes, labels, held, held_labels, num_classes=3, grid=ONE[kind], refit=False)
    layer = probe.head
    assert type(layer) is nn.Linear
    assert layer.weight.dtype == torch.float32
    path = linear_path(SOLVERS[kind], standardised(codes, codes), labels, 3, ONE[kind])
    expected = path.logits(0, standardised(held, codes))
    torch.testing.assert_close(layer(held).double(), expected, rtol=1e-4, atol=1e-4)
    assert probe.num_images == 60
    assert probe.converged


@LINEAR
def test_refit_is_a_fit_to_training_and_held_out_images(kind):
    codes, labels, held, held_labels = draw()
    probe = fit_probe(kind, codes, labels, held, held_labels, num_classes=3, grid=GRIDS[kind])
    both, both_labels = torch.cat([codes, held]), torch.cat([labels, held_labels])
    path = linear_path(SOLVERS[kind], standardised(both, both), both_labels, 3, (probe.chosen.setting,))
    expected = path.logits(0, standardised(both, both))
    torch.testing.assert_close(probe.head(both).double(), expected, rtol=1e-4, atol=1e-4)
    assert probe.num_images == 100
    kept = fit_probe(kind, codes, labels, held, held_labels, num_classes=3, grid=GRIDS[kind], refit=False)
    assert kept.path == probe.path
    assert not torch.equal(kept.head.weight, probe.head.weight)


@KINDS
def test_the_path_says_what_the_module_does_on_held_out_images(kind):
    codes, labels, held, held_labels = draw(spread=0.5)
    probe = fit_probe(kind, codes, labels, held, held_labels, num_classes=3, grid=GRIDS[kind], refit=False)
    assert [row.setting for row in probe.path] == list(GRIDS[kind])
    assert probe.chosen in probe.path
    assert probe.chosen.rank() == min(row.rank() for row in probe.path)
    for row in probe.path:
        one = fit_probe(kind, codes, labels, held, held_labels, num_classes=3, grid=(row.setting,), refit=False)
        logits = one.head(held).detach()
        assert logits.shape == (40, 3)
        assert float((logits.argmax(1) == held_labels).double().mean()) == pytest.approx(row.held_top1)
        assert float(F.cross_entropy(logits, held_labels)) == pytest.approx(row.held_loss, abs=2e-3)
        assert row.converged


@KINDS
def test_softmax_of_the_logits_is_a_sensible_probability(kind):
    """Better than the loss of someone who knows nothing, and than that of the same answers with no doubt."""
    codes, labels, held, held_labels = draw(300, 300, spread=0.8)
    probe = fit_probe(kind, codes, labels, held, held_labels, num_classes=3)
    assert probe.chosen.held_top1 > 0.5
    assert probe.chosen.held_loss < math.log(3) - 0.1
    logits = fit_probe(kind, codes, labels, held, held_labels, num_classes=3, refit=False).head(held).detach()
    assert float(F.cross_entropy(20 * logits, held_labels)) > probe.chosen.held_loss


@KINDS
def test_arrays_tensors_and_precisions(kind):
    codes, labels, held, held_labels = draw()
    fit = {"num_classes": 3, "grid": ONE[kind]}
    expected = fit_probe(kind, codes, labels, held, held_labels, **fit).head(held)
    arrays = [part.numpy().copy() for part in (codes, labels, held, held_labels)]
    for array in arrays:
        array.flags.writeable = False  # as those of the store are
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fit_probe(kind, *arrays, **fit).head(held)
    assert torch.equal(found, expected)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        found = fit_probe(kind, codes.to(dtype), labels, held.to(dtype), held_labels, **fit).head(held)
        assert found.dtype == torch.float32
        assert float((found.argmax(1) == expected.argmax(1)).double().mean()) > 0.85


@KINDS
def test_the_same_bits_again_and_nothing_changed_in_place(kind):
    parts = draw()
    before = [part.clone() for part in parts]
    first, again = (fit_probe(kind, *parts, num_classes=3, grid=GRIDS[kind]) for _ in range(2))
    assert all(torch.equal(part, old) for part, old in zip(parts, before, strict=True))
    assert first.path == again.path
    for name, value in first.head.state_dict().items():
        assert torch.equal(value, again.head.state_dict()[name])


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from(["logistic", "ridge", "knn"]),
    seed=st.integers(0, 99),
    exponents=st.lists(st.integers(-12, 12), min_size=4, max_size=4),
    shifts=st.lists(st.integers(-8, 8), min_size=4, max_size=4),
)
def test_shifted_and_scaled_codes_give_the_same_probe(kind, seed, exponents, shifts):
    codes, labels, held, held_labels = draw(40, 20, width=4, seed=seed)
    codes, held = codes.double(), held.double()
    scale, shift = 2.0 ** torch.tensor(exponents), torch.tensor(shifts).double()

    def moved(raw):
        return (raw + shift) * scale

    fit = {"num_classes": 3, "grid": GRIDS[kind], "refit": False}
    plain = fit_probe(kind, codes, labels, held, held_labels, **fit)
    other = fit_probe(kind, moved(codes), labels, moved(held), held_labels, **fit)
    for row, twin in zip(plain.path, other.path, strict=True):
        assert row.held_top1 == pytest.approx(twin.held_top1, abs=0.051)  # one image at a boundary
        assert row.held_loss == pytest.approx(twin.held_loss, rel=5e-3)


# -- choosing -----------------------------------------------------------------------------------------------------


def test_rank_takes_top1_then_loss_then_the_strongest():
    best = PathRow(1.0, 0.9, 0.5, True)
    assert best.rank() < PathRow(9.0, 0.8, 0.1, True).rank()
    assert best.rank() < PathRow(9.0, 0.9, 0.6, True).rank()
    assert best.rank() < PathRow(0.1, 0.9, 0.5, True).rank()
    assert min([PathRow(0.1, 0.9, 0.5, True), best, PathRow(0.01, 0.9, 0.5, True)], key=PathRow.rank) is best


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.5, 0.75]), st.sampled_from([0.1, 0.2]), st.integers(1, 50)), min_size=1))
def test_rank_is_an_order_by_three_keys(triples):
    rows = [PathRow(setting, top1, loss, True) for top1, loss, setting in triples]
    best = min(rows, key=PathRow.rank)
    same_top1 = [row for row in rows if row.held_top1 == max(row.held_top1 for row in rows)]
    same_loss = [row for row in same_top1 if row.held_loss == min(row.held_loss for row in same_top1)]
    assert best.setting == max(row.setting for row in same_loss)


def test_a_tie_of_neighbours_takes_the_most_of_them():
    """Every image is next to its twins alone: with 1 to 3 neighbours the same share votes right."""
    codes = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 4)
    labels = torch.tensor([0] * 4 + [1] * 4)
    probe = fit_probe("knn", codes, labels, codes, labels, num_classes=2, grid=(1, 3, 2), refit=False)
    assert [row.held_top1 for row in probe.path] == [1.0, 1.0, 1.0]
    assert probe.chosen.setting == 3  # also the lowest loss: three votes say more than one


def test_nothing_but_held_out_images_chooses():
    codes, labels, held, held_labels = draw(30, 200, width=20, spread=0.3)
    chosen = fit_probe("logistic", codes, labels, held, held_labels, num_classes=3).chosen
    # Chosen by the training images themselves, the weakest strength would win.
    by_itself = fit_probe("logistic", codes, labels, codes, labels, num_classes=3).chosen
    assert by_itself.held_top1 == 1.0
    assert chosen.setting > by_itself.setting


def test_the_fit_of_neighbours_hears_a_stop_and_their_layer_does_not():
    """The layer is in exported models: a process that stopped in it would leave others waiting for its answers."""
    codes, labels, held, _ = draw()
    fit = PROBE_KINDS["knn"].fit(codes, labels, 3, [1.0, 3.0])
    with StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
        assert fit.head(1)(held).shape == (len(held), 3)
        with pytest.raises(Stopped, match="fitting the probe"):
            fit.logits(held)


@pytest.mark.parametrize("as_iterator", [False, True])
@KINDS
def test_choose_takes_the_best_set_of_codes(kind, as_iterator):
    good, labels, good_held, held_labels = draw(spread=2.0)
    bad, _, bad_held, _ = draw(spread=0.0, seed=5)
    sets = {"early": (bad, bad_held), "late": (good, good_held), "late again": (good, good_held)}
    candidates = iter(sets.items()) if as_iterator else list(sets.items())
    choice = choose(kind, candidates, labels, held_labels, num_classes=3, grid=GRIDS[kind])
    alone = {
        name: fit_probe(kind, codes, labels, held, held_labels, num_classes=3, grid=GRIDS[kind])
        for name, (codes, held) in sets.items()
    }
    assert choice.name == "late"  # the first of two equals
    assert list(choice.table) == list(sets)
    assert choice.table == {name: probe.path for name, probe in alone.items()}
    assert torch.equal(choice.probe.head(good_held), alone["late"].head(good_held))
    assert choice.probe.num_images == 100


@pytest.mark.parametrize("kind", ["logistic", "knn"])
def test_choose_holds_one_set_of_codes_at_a_time(kind):
    _, labels, _, held_labels = draw()
    earlier = []

    def candidates():
        for seed in range(3):
            assert not [ref for ref in earlier if ref() is not None], "codes of an earlier candidate are still held"
            codes, _, held, _ = draw(seed=seed, spread=3.0 - seed)
            earlier.extend((weakref.ref(codes), weakref.ref(held)))
            pair = (codes, held)
            del codes, held
            yield f"layer{seed}", pair
            del pair

    choice = choose(kind, candidates(), labels, held_labels, num_classes=3, grid=ONE[kind])
    assert len(choice.table) == 3


# -- nearest neighbours -------------------------------------------------------------------------------------------


def votes_by_hand(codes, labels, asked, k, num_classes):
    train, asked = standardised(codes, codes), standardised(asked, codes)
    cosines = F.normalize(asked, dim=1) @ F.normalize(train, dim=1).T
    rows = []
    for cosine in cosines:
        nearest = sorted(range(len(labels)), key=lambda image: -cosine[image])[:k]
        weights = [math.exp(float(cosine[image] - cosine[nearest[0]]) / 0.07) for image in nearest]
        votes = [1 / num_classes] * num_classes
        for image, weight in zip(nearest, weights, strict=True):
            votes[int(labels[image])] += k * weight / sum(weights)
        rows.append([vote / (k + 1) for vote in votes])
    return torch.tensor(rows)


@pytest.mark.parametrize("k", [1, 4, 60])
def test_knn_votes(k, monkeypatch):
    codes, labels, held, held_labels = draw()
    probe = fit_probe("knn", codes, labels, held, held_labels, num_classes=4, grid=(k,), refit=False)
    logits = probe.head(held)
    torch.testing.assert_close(logits.exp(), votes_by_hand(codes, labels, held, k, 4), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(40))
    monkeypatch.setattr(knn, "_MOST_SIMILARITIES", 7 * 60)  # in blocks of seven images
    torch.testing.assert_close(probe.head(held), logits)


def test_knn_head_comes_back_from_its_state():
    codes, labels, held, held_labels = draw()
    head = fit_probe("knn", codes, labels, held, held_labels, num_classes=3, grid=(5,)).head
    assert isinstance(head, KnnHead)
    assert len(head.labels_N) == 100  # with those that were held out
    again = KnnHead(head.state_dict(), head.k, head.num_classes)
    assert torch.equal(again(held), head(held))
    assert sorted(again.state_dict()) == ["codes_ND", "labels_N", "mean_D", "std_D"]


# -- odd codes and labels -----------------------------------------------------------------------------------------


@KINDS
def test_odd_shapes(kind):
    for num_train, width in ((60, 1), (12, 50)):
        codes, labels, held, held_labels = draw(num_train, 20, width=width)
        probe = fit_probe(kind, codes, labels, held, held_labels, num_classes=3, grid=ONE[kind])
        logits = probe.head(held)
        assert logits.shape == (20, 3)
        assert logits.isfinite().all()


@KINDS
def test_constant_features_change_nothing(kind):
    codes, labels, held, held_labels = draw()
    fit = {"num_classes": 3, "grid": GRIDS[kind]}
    plain = fit_probe(kind, codes, labels, held, held_labels, **fit)
    constant = torch.full((100, 1), 0.1)
    more, more_held = torch.cat([codes, constant[:60]], 1), torch.cat([held, constant[60:]], 1)
    other = fit_probe(kind, more, labels, more_held, held_labels, **fit)
    assert [row.held_top1 for row in other.path] == [row.held_top1 for row in plain.path]
    torch.testing.assert_close(other.head(more_held), plain.head(held), rtol=1e-3, atol=1e-3)


@KINDS
def test_classes_may_be_absent(kind):
    codes, labels, held, held_labels = draw()
    few = labels != 1
    probe = fit_probe(kind, codes[few], labels[few], held, held_labels, num_classes=5, grid=GRIDS[kind], refit=False)
    logits = probe.head(held)
    assert logits.shape == (40, 5)
    assert logits.isfinite().all()
    assert set(logits.argmax(1).tolist()) <= {0, 2}
    assert math.isfinite(probe.chosen.held_loss)
    # The refit has seen class 1 in the held-out images; classes 3 and 4 are still unknown.
    refitted = fit_probe(kind, codes[few], labels[few], held, held_labels, num_classes=5, grid=GRIDS[kind])
    logits = refitted.head(held).detach()
    assert float(logits[held_labels == 1, 1].mean()) > float(logits[:, 3:].max()) + 0.5


@KINDS
def test_no_held_out_images_and_one_setting_just_fits(kind):
    codes, labels, _, _ = draw()
    probe = fit_probe(kind, codes, labels, *none_of(codes), num_classes=3, grid=ONE[kind])
    assert probe.path == (PathRow(float(ONE[kind][0]), None, None, True),)
    assert probe.num_images == 60
    assert float((probe.head(codes).argmax(1) == labels).double().mean()) > 0.5
    choice = choose(kind, [("late", (codes, codes[:0]))], labels, labels[:0], num_classes=3, grid=ONE[kind])
    assert choice.name == "late"


def test_default_grids():
    for kind in PROBE_KINDS.values():
        grid = kind.setting.values(None, 10_000, 10)
        assert len(set(grid)) == len(grid) > 5
        assert min(grid) > 0
    assert PROBE_KINDS["knn"].setting.values(None, 7, 1) == (1, 3, 5)


def test_the_schema_and_the_table_have_the_same_kinds():
    assert set(get_args(ProbeSection.model_fields["kind"].annotation)) == set(PROBE_KINDS)
    assert {kind.setting.key for kind in PROBE_KINDS.values()} < set(ProbeSection.model_fields)


# -- errors -------------------------------------------------------------------------------------------------------


@KINDS
def test_nothing_to_choose_by(kind):
    codes, labels, _, _ = draw()
    with pytest.raises(RecipeError, match=r"3 values, and no held-out .*validation_fraction.*=\["):
        fit_probe(kind, codes, labels, *none_of(codes), num_classes=3, grid=GRIDS[kind])
    sets = {"layer3": (codes, codes[:0]), "layer4": (codes, codes[:0])}
    with pytest.raises(RecipeError, match=r"'layer3' and 'layer4' cannot be compared.*validation_fraction"):
        choose(kind, sets.items(), labels, labels[:0], num_classes=3, grid=ONE[kind])


def test_unknown_kind():
    with pytest.raises(RecipeError, match=r"'logistics' is not a kind.*Did you mean 'logistic'.*ridge, sklearn, knn"):
        fit_probe("logistics", *draw(), num_classes=3)


@pytest.mark.parametrize(
    ("kind", "grid", "message"),
    [
        ("logistic", (0.1, 0), "0 is not possible with .* images. Give numbers above 0"),
        ("ridge", (-1,), "-1 is not possible"),
        ("sklearn", (math.inf,), "inf is not possible"),
        ("logistic", (math.nan,), "nan is not possible"),
        ("knn", (1.5,), "1.5 is not possible with .* Give whole numbers from 1"),
        ("knn", (0,), "0 is not possible"),
        ("knn", (61,), "61 is not possible with 60 training images"),
        ("ridge", (1, 1.0), "all different"),
        ("ridge", (), "one value or more"),
    ],
)
def test_wrong_grids(kind, grid, message):
    with pytest.raises(RecipeError, match=rf"probe\.(strengths|neighbours): .*{message}"):
        fit_probe(kind, *draw(), num_classes=3, grid=grid)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_codes_that_are_not_finite_are_counted(value):
    codes, labels, held, held_labels = draw()
    codes[3, 1] = codes[3, 2] = codes[7, 0] = value
    with pytest.raises(ModelError, match=r"2 of 60 training images hold NaN or infinity.*fp32"):
        fit_probe("ridge", codes, labels, held, held_labels, num_classes=3)
    with pytest.raises(ModelError, match=r"2 of 60 held-out images hold NaN"):
        fit_probe("ridge", held, held_labels, codes, labels, num_classes=3)


@KINDS
def test_codes_without_any_variance(kind):
    _, labels, held, held_labels = draw()
    with pytest.raises(ModelError, match=r"all 60 training images are the same"):
        fit_probe(kind, torch.full((60, 5), 0.3), labels, held, held_labels, num_classes=3)


@KINDS
def test_one_class_is_no_problem_to_solve(kind):
    codes, labels, held, held_labels = draw()
    with pytest.raises(DataError, match=r"the 60 training images are of class 2 alone"):
        fit_probe(kind, codes, torch.full_like(labels, 2), held, held_labels, num_classes=3)


def test_scikit_learn_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(RecipeError, match=r"not installed.*kind: logistic"):
        fit_probe("sklearn", *draw(), num_classes=3)
    assert np.isfinite(fit_probe("logistic", *draw(), num_classes=3).chosen.held_loss)
