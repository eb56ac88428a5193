"""The figures against scikit-learn and plain Python; ties, NaN, half precision; tallies add up."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)
from torch.nn.functional import cross_entropy

from tlscale.training.metrics import MAX_CONFUSION_CLASSES, Tally, standard_error, summary


def names(num_classes):
    return [f"class {i}" for i in range(num_classes)]


def tally_of(logits_BC, labels_B, batch=64, **kwargs):
    tally = Tally(logits_BC.shape[1], "cpu", **kwargs)
    losses_B = cross_entropy(logits_BC.float(), labels_B, reduction="none")
    for start in range(0, len(labels_B), batch):
        part = slice(start, start + batch)
        tally.update(logits_BC[part], labels_B[part], losses_B[part])
    return tally


def draw(seed, num_images, num_classes, used_classes=None):
    """Logits that are often right, and labels of the first `used_classes` classes."""
    generator = torch.Generator().manual_seed(seed)
    labels_B = torch.randint(used_classes or num_classes, (num_images,), generator=generator)
    logits_BC = torch.randn(num_images, num_classes, generator=generator)
    logits_BC[torch.arange(num_images), labels_B] += 1.0
    return logits_BC, labels_B


@pytest.mark.parametrize(("num_images", "num_classes"), [(500, 10), (97, 6), (300, 3)])
def test_agrees_with_scikit_learn(num_images, num_classes):
    logits_BC, labels_B = draw(0, num_images, num_classes)
    found = summary(tally_of(logits_BC, labels_B), names(num_classes))
    truth, answers, shares = labels_B.numpy(), logits_BC.argmax(1).numpy(), logits_BC.double().softmax(1).numpy()
    labels = list(range(num_classes))
    assert found["num_images"] == num_images
    assert found["num_without_answer"] == 0
    assert found["top1"] == accuracy_score(truth, answers)
    assert found["macro_f1"] == pytest.approx(f1_score(truth, answers, average="macro"), abs=1e-12)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, answers), abs=1e-12)
    row = found["per_class"]["class 1"]
    right, images = int(((answers == truth) & (truth == 1)).sum()), int((truth == 1).sum())
    by_scipy = binomtest(right, images).proportion_ci(0.95, "wilson")
    assert row["accuracy_interval95"] == pytest.approx(list(by_scipy), abs=1e-9)
    assert found["loss"] == pytest.approx(log_loss(truth, shares, labels=labels), abs=1e-5)
    assert found["confusion"] == confusion_matrix(truth, answers, labels=labels).tolist()
    if num_classes > 5:
        assert found["top5"] == top_k_accuracy_score(truth, shares, k=5, labels=labels)
    else:
        assert found["top5"] is None
    precision, recall, f1, support = precision_recall_fscore_support(truth, answers, labels=labels)
    for i, name in enumerate(names(num_classes)):
        figures = found["per_class"][name]
        assert figures["precision"] == pytest.approx(precision[i], abs=1e-12)
        assert figures["accuracy"] == pytest.approx(recall[i], abs=1e-12)
        assert figures["f1"] == pytest.approx(f1[i], abs=1e-12)
        assert figures["num_images"] == support[i]


def plain_ece(logits_BC, labels_B, num_bins):
    """The definition, image by image."""
    bins = [[] for _ in range(num_bins)]
    for row, label in zip(logits_BC.softmax(1).tolist(), labels_B.tolist(), strict=True):
        confidence = max(row)
        m = next(m for m in range(num_bins) if confidence <= (m + 1) / num_bins or m == num_bins - 1)
        bins[m].append((confidence, row.index(confidence) == label))
    total = 0.0
    for members in bins:
        if members:
            accuracy = sum(hit for _, hit in members) / len(members)
            total += len(members) * abs(accuracy - sum(c for c, _ in members) / len(members))
    return total / len(labels_B)


@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_calibration_error_is_that_of_the_definition(num_bins):
    logits_BC, labels_B = draw(1, 400, 4)
    found = summary(tally_of(logits_BC, labels_B, num_bins=num_bins), names(4))["ece"]
    assert found == pytest.approx(plain_ece(logits_BC, labels_B, num_bins), abs=1e-6)
    assert found > 0.005


def test_a_sure_and_right_model_is_calibrated_and_a_sure_and_wrong_one_is_not():
    labels_B = torch.arange(4)
    sure_BC = torch.eye(4) * 1000
    assert summary(tally_of(sure_BC, labels_B), names(4))["ece"] == 0.0
    assert summary(tally_of(sure_BC.roll(1, 1), labels_B), names(4))["ece"] == 1.0


def test_wilson_interval_is_the_published_one():
    # 8 of 10: [0.4902, 0.9433], the usual worked example of the score interval.
    logits_BC = torch.zeros(10, 2)
    logits_BC[:8, 0] = logits_BC[8:, 1] = 1.0
    low, high = summary(tally_of(logits_BC, torch.zeros(10, dtype=torch.long)), names(2))["top1_interval95"]
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


@pytest.mark.parametrize("right", [True, False])
def test_wilson_interval_stays_within_0_and_1(right):
    logits_BC = torch.tensor([[1.0, 0.0]] * 3 if right else [[0.0, 1.0]] * 3)
    low, high = summary(tally_of(logits_BC, torch.zeros(3, dtype=torch.long)), names(2))["top1_interval95"]
    assert (high == 1.0 and 0.4 < low < 0.5) if right else (low == 0.0 and 0.5 < high < 0.6)


# -- standard errors ----------------------------------------------------------------------------------------------


def test_standard_errors_are_those_of_scores_and_means():
    logits_BC, labels_B = draw(0, 120, 4)
    tally = tally_of(logits_BC, labels_B)
    hits = int((logits_BC.argmax(1) == labels_B).sum())
    assert standard_error(tally, "top1") == pytest.approx(math.sqrt(hits / 120 * (1 - hits / 120) / 120))
    losses_B = cross_entropy(logits_BC.double(), labels_B, reduction="none")
    assert standard_error(tally, "loss") == pytest.approx(float(losses_B.std()) / math.sqrt(120), rel=1e-5)
    empty = Tally(4, "cpu")
    assert [standard_error(empty, figure) for figure in ("top1", "loss", "macro_f1")] == [None] * 3
    logits_BC[0, 0] = math.nan
    assert standard_error(tally_of(logits_BC, labels_B), "loss") is None


@pytest.mark.parametrize("figure", ["macro_f1", "balanced_accuracy"])
@pytest.mark.parametrize("has_confusion", [True, False])
def test_the_error_of_a_mean_over_classes_is_how_far_it_moves_from_draw_to_draw(has_confusion, figure):
    found, errors = [], []
    for seed in range(60):
        logits_BC, labels_B = draw(seed, 200, 5, used_classes=4)
        tally = tally_of(logits_BC, labels_B)
        found.append(summary(tally, names(5))[figure])
        if seed < 8:
            if not has_confusion:
                tally.confusion_CC = tally.confusion_CC[:0, :0]
            errors.append(standard_error(tally, figure))
            assert standard_error(tally, figure) == errors[-1], "the same seed each time"
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.25)


def test_the_error_of_macro_f1_with_answers_that_are_none():
    logits_BC, labels_B = draw(0, 50, 3)
    logits_BC[:10] = math.nan
    tally = tally_of(logits_BC, labels_B)
    assert 0.02 < standard_error(tally, "macro_f1") < 0.2
    tally.confusion_CC = tally.confusion_CC[:0, :0]
    assert 0.02 < standard_error(tally, "macro_f1") < 0.2


def test_nan_is_never_right():
    logits_BC, labels_B = draw(2, 60, 7)
    logits_BC[torch.arange(60), labels_B] = 100.0  # all right ...
    logits_BC[:10, 3] = math.nan  # ... but for ten, whichever class the NaN is at
    found = summary(tally_of(logits_BC, labels_B), names(7))
    assert found["num_images"] == 60
    assert found["num_without_answer"] == 10
    assert found["top1"] == found["top5"] == 50 / 60
    assert np.sum(found["confusion"]) == 50
    assert sum(figures["num_images"] for figures in found["per_class"].values()) == 60
    assert found["loss"] is None  # their loss is NaN
    json.dumps(found, allow_nan=False)


def test_all_nan_has_no_calibration():
    found = summary(tally_of(torch.full((4, 3), math.nan), torch.tensor([0, 1, 2, 0])), names(3))
    assert found["top1"] == 0.0
    assert found["macro_f1"] == 0.0
    assert found["ece"] is None


def test_infinite_logits_are_answers():
    logits_BC = torch.tensor([[0.0, math.inf, 1.0], [-math.inf, -math.inf, 0.0], [5.0, -math.inf, 0.0]])
    found = summary(tally_of(logits_BC, torch.tensor([1, 2, 1])), names(3))
    assert found["top1"] == 2 / 3
    assert found["num_without_answer"] == 0
    assert math.isfinite(found["ece"])


def test_the_first_of_tied_classes_is_the_answer():
    found = summary(tally_of(torch.zeros(8, 8), torch.arange(8)), names(8))
    assert found["top1"] == 1 / 8
    assert found["top5"] == 5 / 8
    assert [row[0] for row in found["confusion"]] == [1] * 8


def test_top5_with_ties_at_the_edge():
    logits_BC = torch.tensor([[9.0, 8.0, 7.0, 6.0, 1.0, 1.0, 1.0]]).repeat(2, 1)
    assert summary(tally_of(logits_BC, torch.tensor([4, 5])), names(7))["top5"] == 0.5


def test_classes_without_images_are_none_and_left_out_of_the_mean():
    logits_BC, labels_B = draw(3, 200, 5, used_classes=3)
    found = summary(tally_of(logits_BC, labels_B), names(5))
    truth, answers = labels_B.numpy(), logits_BC.argmax(1).numpy()
    assert set(answers) > {0, 1, 2}
    nothing = {"accuracy": None, "accuracy_interval95": None, "precision": None, "f1": None, "num_images": 0}
    assert found["per_class"]["class 3"] == found["per_class"]["class 4"] == nothing
    assert found["macro_f1"] == pytest.approx(f1_score(truth, answers, average="macro", labels=[0, 1, 2]))


def test_a_class_that_is_never_the_answer_has_no_precision():
    found = summary(tally_of(torch.tensor([[1.0, 0.0]] * 4), torch.tensor([0, 0, 1, 1])), names(2))
    figures = found["per_class"]["class 1"]
    assert figures.pop("accuracy_interval95")[0] == 0.0
    assert figures == {"accuracy": 0.0, "precision": None, "f1": 0.0, "num_images": 2}
    assert found["macro_f1"] == pytest.approx((2 * 2 / (2 + 4)) / 2)


def test_nothing_counted_gives_none_everywhere():
    found = summary(Tally(10, "cpu"), names(10))
    assert found["num_images"] == 0
    assert [found[key] for key in ("top1", "top1_interval95", "top5", "loss", "macro_f1", "ece")] == [None] * 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_count_as_their_float32_values(dtype):
    logits_BC, labels_B = draw(4, 200, 9)
    lower_BC = logits_BC.to(dtype)
    found = summary(tally_of(lower_BC, labels_B), names(9))
    expected = summary(tally_of(lower_BC.float(), labels_B), names(9))
    assert found.pop("ece") == pytest.approx(expected.pop("ece"), abs=1e-6)
    assert found == expected


def test_the_sums_are_kept_in_64_bits_however_many_images():
    tally = Tally(2, "cpu")
    counts, sums = tally.state()
    tally.load_state(counts + 2**40, sums + 2.0**40 + 2.0**-10)
    tally.update(torch.tensor([[1.0, 0.0]], dtype=torch.float16), torch.tensor([0]), torch.tensor([0.5]))
    assert tally.num_images == 2**41 + 1
    assert float(tally.state()[1][0]) == 2.0**40 + 2.0**-10 + 0.5


def test_no_confusion_matrix_for_very_many_classes_but_all_else():
    num_classes = MAX_CONFUSION_CLASSES + 1
    logits_BC, labels_B = draw(6, 40, num_classes)
    found = summary(tally_of(logits_BC, labels_B), names(num_classes))
    assert found["confusion"] is None
    assert found["top1"] == accuracy_score(labels_B, logits_BC.argmax(1))
    assert len(found["per_class"]) == num_classes


def test_a_state_of_another_shape_is_refused():
    counts, sums = Tally(3, "cpu").state()
    with pytest.raises(AssertionError, match="another number of classes"):
        Tally(4, "cpu").load_state(counts, sums)
    with pytest.raises(AssertionError, match="another number"):
        Tally(3, "cpu", num_bins=10).load_state(counts, sums)
    with pytest.raises(AssertionError, match="int64"):
        Tally(3, "cpu").load_state(counts.int(), sums)


def test_a_label_out_of_range_is_not_counted_in_silence():
    for label in (-1, 3):
        with pytest.raises((IndexError, RuntimeError)):
            Tally(3, "cpu").update(torch.zeros(1, 3), torch.tensor([label]), torch.zeros(1))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    num_classes=st.integers(2, 9),
    num_images=st.integers(0, 60),
    cut=st.floats(0, 1),
    batch=st.integers(1, 60),
    coarse=st.booleans(),
    num_nan=st.integers(0, 5),
)
def test_two_tallies_added_are_one(seed, num_classes, num_images, cut, batch, coarse, num_nan):
    logits_BC, labels_B = draw(seed, num_images, num_classes)
    logits_BC = logits_BC.round() if coarse else logits_BC  # rounded: many ties
    logits_BC[:num_nan, 0] = math.nan
    middle = int(cut * num_images)
    whole = tally_of(logits_BC, labels_B, batch=batch)
    first, second = tally_of(logits_BC[:middle], labels_B[:middle]), tally_of(logits_BC[middle:], labels_B[middle:])
    total = Tally(num_classes, "cpu")
    total.load_state(*(a + b for a, b in zip(first.state(), second.state(), strict=True)))
    assert torch.equal(total.state()[0], whole.state()[0])
    torch.testing.assert_close(total.state()[1], whole.state()[1], rtol=1e-12, atol=1e-12, equal_nan=True)
    one, other = summary(total, names(num_classes)), summary(whole, names(num_classes))
    for key in ("loss", "ece"):
        assert one.pop(key) == (pytest.approx(expected) if (expected := other.pop(key)) is not None else None)
    assert one == other
    assert one["num_images"] == num_images
    json.dumps(one, allow_nan=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_update_does_not_wait_and_the_counts_are_those_of_the_cpu():
    logits_BC, labels_B = draw(7, 300, 10)
    losses_B = cross_entropy(logits_BC, labels_B, reduction="none")
    tally = Tally(10, "cuda")
    on_gpu = (logits_BC.cuda(), labels_B.cuda(), losses_B.cuda())
    torch.cuda.set_sync_debug_mode("error")
    try:
        tally.update(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(tally.state()[0].cpu(), tally_of(logits_BC, labels_B, batch=300).state()[0])
