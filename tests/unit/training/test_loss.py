"""The loss of each image, against the formula written out and against PyTorch's own sums."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tlscale.errors import RecipeError
from tlscale.recipe.schema import LossSection
from tlscale.training import loss
from tlscale.training.loss import (
    LOSSES,
    CrossEntropyLoss,
    FocalLoss,
    LossKind,
    LossSpec,
    class_weights,
    cross_entropy,
    log_priors,
    refuse_mixed_targets,
)

CLASSES = ("ant", "bee", "cat", "dog")


def draw(seed=0, count=7, num_classes=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits_BC = 3 * torch.randn(count, num_classes, generator=generator, dtype=dtype)
    return logits_BC, torch.randint(num_classes, (count,), generator=generator)


def labelled(labels_B, partner_labels_B=None, lam_B=None):
    return SimpleNamespace(labels_B=labels_B, partner_labels_B=partner_labels_B, lam_B=lam_B)


def by_hand(logits_BC, labels_B, smoothing, weights=None):
    """w[y] times the cross-entropy with the smoothed target, image by image, in plain Python."""
    losses = []
    for logits, label in zip(logits_BC.tolist(), labels_B.tolist(), strict=True):
        total = math.fsum(math.exp(logit) for logit in logits)
        smoothed = [smoothing / len(logits) + (1 - smoothing) * (number == label) for number in range(len(logits))]
        crossed = -math.fsum(t * (z - math.log(total)) for t, z in zip(smoothed, logits, strict=True))
        losses.append(crossed * (1.0 if weights is None else weights[label]))
    return torch.tensor(losses, dtype=torch.float64)


SMOOTHING = st.sampled_from([0.0, 0.1, 0.6])
WEIGHTS = st.one_of(st.none(), st.lists(st.floats(0.0, 5.0), min_size=4, max_size=4))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), smoothing=SMOOTHING, weights=WEIGHTS)
def test_losses_are_the_formula(seed, smoothing, weights):
    logits_BC, labels_B = draw(seed)
    weights_C = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    loss_fn = CrossEntropyLoss(LossSection(label_smoothing=smoothing), weights_C)
    found_B = loss_fn.losses(logits_BC, labels_B)
    assert found_B.shape == (7,)
    torch.testing.assert_close(found_B, by_hand(logits_BC, labels_B, smoothing, weights))
    # What is reported has neither.
    torch.testing.assert_close(cross_entropy(logits_BC, labels_B), by_hand(logits_BC, labels_B, 0.0))


def test_smoothing_pulls_an_image_to_its_own_class_however_rare_another_is():
    """The gradient of a confused answer points to the label, at weights of 100 to 1; PyTorch's own weights do not."""
    logits_BC, labels_B = torch.zeros(1, 2, requires_grad=True), torch.tensor([0])
    weights_C = torch.tensor([0.02, 2.0])
    CrossEntropyLoss(LossSection(label_smoothing=0.1), weights_C).losses(logits_BC, labels_B).sum().backward()
    assert logits_BC.grad[0, 0] < 0 < logits_BC.grad[0, 1]
    theirs_BC = torch.zeros(1, 2, requires_grad=True)
    F.cross_entropy(theirs_BC, labels_B, weight=weights_C, label_smoothing=0.1, reduction="sum").backward()
    assert theirs_BC.grad[0, 1] < 0, "PyTorch has changed its mind"


@pytest.mark.parametrize("weighted", [False, True])
def test_sums_are_pytorchs(weighted):
    """Where both mean the same: without smoothing bit for bit, so that older runs go on as they began."""
    smoothing = 0.0
    logits_BC, labels_B = draw()
    weights_C = torch.tensor([0.5, 2.0, 1.0, 0.0], dtype=torch.float64) if weighted else None
    found = CrossEntropyLoss(LossSection(label_smoothing=smoothing), weights_C).losses(logits_BC, labels_B).sum()
    theirs = F.cross_entropy(logits_BC, labels_B, weight=weights_C, label_smoothing=smoothing, reduction="sum")
    assert torch.equal(found, theirs)
    mean = F.cross_entropy(logits_BC, labels_B, weight=weights_C, label_smoothing=smoothing)
    divisor = 7 if weights_C is None else weights_C[labels_B].sum()
    torch.testing.assert_close(found / divisor, mean)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), smoothing=SMOOTHING, weights=WEIGHTS)
def test_mixed_losses_are_each_label_s_share_of_its_own_weighted_loss(seed, smoothing, weights):
    logits_BC, labels_B = draw(seed)
    _, partners_B = draw(seed + 1000)
    lam_B = torch.rand(7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights_C = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    loss_fn = CrossEntropyLoss(LossSection(label_smoothing=smoothing), weights_C)
    found_B = loss_fn.mixed_losses(logits_BC, labels_B, partners_B, lam_B)
    own_B, other_B = (by_hand(logits_BC, labels, smoothing, weights) for labels in (labels_B, partners_B))
    torch.testing.assert_close(found_B, lam_B * own_B + (1 - lam_B) * other_B)
    if weights_C is None:
        one_hot = (F.one_hot(labels, 4).double() for labels in (labels_B, partners_B))
        target_BC = sum(share_B[:, None] * hot_BC for share_B, hot_BC in zip((lam_B, 1 - lam_B), one_hot, strict=True))
        theirs_B = F.cross_entropy(logits_BC, target_BC, label_smoothing=smoothing, reduction="none")
        torch.testing.assert_close(found_B, theirs_B)


def test_all_of_one_label_is_no_mixing():
    logits_BC, labels_B = draw()
    loss_fn = CrossEntropyLoss(LossSection(label_smoothing=0.1), None)
    _, partners_B = draw(1)
    for lam, labels in ((1.0, labels_B), (0.0, partners_B)):
        found_B = loss_fn.mixed_losses(logits_BC, labels_B, partners_B, torch.full((7,), lam))
        assert torch.equal(found_B, loss_fn.losses(logits_BC, labels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_logits_give_float32_losses(dtype):
    logits_BC, labels_B = draw(dtype=torch.float32)
    logits_BC = logits_BC.to(dtype)
    loss_fn = CrossEntropyLoss(LossSection(), torch.ones(4, dtype=torch.float64))
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    for found_B in (
        loss_fn.losses(logits_BC, labels_B),
        loss_fn.mixed_losses(logits_BC, labels_B, labels_B, torch.full((7,), 0.3)),
    ):
        assert found_B.dtype == expected
        torch.testing.assert_close(found_B, F.cross_entropy(logits_BC.to(expected), labels_B, reduction="none"))


def test_confident_half_precision_logits_lose_nothing():
    logits_BC = torch.tensor([[12.0, 0.0]], dtype=torch.bfloat16)
    loss = CrossEntropyLoss(LossSection(), None).losses(logits_BC, torch.tensor([0]))
    assert loss.item() == pytest.approx(np.log1p(np.exp(-12.0)), rel=0.02)
    assert F.cross_entropy(logits_BC, torch.tensor([0])).item() != pytest.approx(np.log1p(np.exp(-12.0)), rel=0.02)


# -- class weights ------------------------------------------------------------------------------------------------


def weigh(class_weights_key, labels=(0, 0, 0, 1, 2, 2, 3, 3)):
    return class_weights(LossSection(class_weights=class_weights_key), np.array(labels), CLASSES)


def test_no_weights():
    assert weigh("none") is None


def test_balanced_gives_each_class_the_same_say():
    weights_C = weigh("balanced")
    counts_C = torch.tensor([3.0, 1.0, 2.0, 2.0], dtype=torch.float64)
    assert weights_C.dtype == torch.float64
    torch.testing.assert_close(weights_C * counts_C, torch.full((4,), 2.0, dtype=torch.float64))
    sklearn = pytest.importorskip("sklearn.utils.class_weight")
    theirs = sklearn.compute_class_weight("balanced", classes=np.arange(4), y=[0, 0, 0, 1, 2, 2, 3, 3])
    assert weights_C.numpy() == pytest.approx(theirs)


def test_a_class_without_images_does_no_harm():
    weights_C = weigh("balanced", (0, 0, 1, 3))
    assert torch.isfinite(weights_C).all()
    assert weights_C[[0, 0, 1, 3]].mean() == pytest.approx(1.0)


def test_by_name_in_any_order():
    weights_C = weigh({"dog": 4, "ant": 1.0, "cat": 3.0, "bee": 2.0})
    assert (weights_C / weights_C[0]).tolist() == pytest.approx([1.0, 2.0, 3.0, 4.0])


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    weights=st.one_of(st.just("balanced"), st.lists(st.floats(0.01, 100), min_size=4, max_size=4)),
)
def test_the_mean_over_the_training_images_is_one(labels, weights):
    key = weights if isinstance(weights, str) else dict(zip(CLASSES, weights, strict=True))
    weights_C = weigh(key, labels)
    assert weights_C[labels].mean().item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"ant": 1, "bee": 1, "cat": 1, "dogg": 1}, "there is no class 'dogg'. Did you mean 'dog'.*ant, bee, cat, dog"),
        ({"ant": 1, "bee": 1}, "no weight for cat, dog. Give one for every class"),
        ({"ant": 1, "bee": -1, "cat": 1, "dog": 1}, "the weight of 'bee' is -1"),
        (dict.fromkeys(CLASSES, 0), "all weights of the training images are 0"),
    ],
)
def test_wrong_weights(weights, message):
    section = LossSection.model_construct(class_weights=weights, label_smoothing=0.0)
    with pytest.raises(RecipeError, match=f"loss.class_weights: {message}"):
        class_weights(section, np.array([0, 1, 2, 3]), CLASSES)


def test_only_classes_with_images_count_for_nothing_to_learn():
    weights = {"ant": 0, "bee": 0, "cat": 0, "dog": 1}
    with pytest.raises(RecipeError, match="nothing to learn"):
        weigh(weights, (0, 1, 2))
    assert weigh(weights, (0, 1, 2, 3)).tolist() == [0, 0, 0, 4]


# -- unequal classes ----------------------------------------------------------------------------------------------


def focal(gamma, weights_C):
    return FocalLoss(LossSection(kind="focal", focal_gamma=gamma), weights_C)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), gamma=st.sampled_from([0.0, 0.5, 2.0, 5.0]), weights=WEIGHTS)
def test_focal_loss_is_the_formula(seed, gamma, weights):
    logits_BC, labels_B = draw(seed)
    weights_C = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    plain_B = by_hand(logits_BC, labels_B, 0.0)
    expected_B = (1 - torch.exp(-plain_B)) ** gamma * by_hand(logits_BC, labels_B, 0.0, weights)
    torch.testing.assert_close(focal(gamma, weights_C)(logits_BC, labelled(labels_B)), expected_B)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_focal_loss_has_a_gradient_where_the_network_is_sure(gamma, dtype):
    logits_BC = torch.tensor([[200.0, 0.0], [0.0, 200.0], [9.0, 0.0]], dtype=dtype, requires_grad=True)
    losses_B = focal(gamma, None)(logits_BC, labelled(torch.zeros(3, dtype=torch.int64)))
    assert losses_B.dtype == torch.float32
    losses_B.sum().backward()
    assert logits_BC.grad.isfinite().all()
    assert losses_B[0] < 1e-6 < 100 < losses_B[1]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), tau=st.sampled_from([0.5, 1.0, 2.0]), smoothing=SMOOTHING)
def test_adjusted_logits_are_the_formula(seed, tau, smoothing):
    """tau times the logarithm of a class's share is added in training, to mixed labels as well, and not to logits."""
    logits_BC, labels_B = draw(seed)
    section = LossSection(logit_adjustment=tau, label_smoothing=smoothing)
    labels_N = np.array([0] * 60 + [1] * 30 + [2] * 10)  # none of the last class: as if it had one
    loss_fn = CrossEntropyLoss(section, None, log_priors(section, labels_N, 4))
    adjusted_BC = logits_BC + tau * torch.log(torch.tensor([60, 30, 10, 1], dtype=torch.float64) / 101)
    expected_B = by_hand(adjusted_BC, labels_B, smoothing)
    torch.testing.assert_close(loss_fn(logits_BC, labelled(labels_B)), expected_B)
    partners_B, lam_B = (labels_B + 1) % 4, torch.full((len(labels_B),), 0.25, dtype=torch.float64)
    expected_B = 0.25 * expected_B + 0.75 * by_hand(adjusted_BC, partners_B, smoothing)
    torch.testing.assert_close(loss_fn(logits_BC, labelled(labels_B, partners_B, lam_B)), expected_B)
    assert loss_fn.logits(logits_BC) is logits_BC
    assert log_priors(LossSection(), labels_N, 4) is None


# -- the table --------------------------------------------------------------------------------------------------------


class SquaredError:
    """The squared distance of softmax from the target: of its square, and so not linear in it."""

    aux_names = ()

    def logits(self, outputs_BO):
        return outputs_BO

    def of_target(self, logits_BC, target_BC):
        return (logits_BC.softmax(1) - target_BC).square().sum(1)


@pytest.fixture
def squared_error(monkeypatch):
    monkeypatch.setitem(loss.LOSSES, "squared_error", LossKind(lambda spec: SquaredError(), is_linear_in_target=False))


@pytest.mark.parametrize("mixed", ["mixup", "cutmix"])
def test_a_loss_that_is_not_linear_in_its_target_is_refused_with_mixed_images(squared_error, mixed):
    refuse_mixed_targets("squared_error", {"flip": None})
    with pytest.raises(RecipeError, match=f"data.augment: {mixed} cannot be used with the loss 'squared_error'"):
        refuse_mixed_targets("squared_error", {"flip": None, mixed: 0.4})
    with pytest.raises(RecipeError, match=f"{mixed} cannot be used with the loss 'focal'"):
        refuse_mixed_targets("focal", {mixed: 0.4})
    for name in ("cross_entropy", "distillation"):
        refuse_mixed_targets(name, {mixed: 0.4})


def test_what_the_refusal_is_for():
    """Of cross-entropy the loss of a mixed target is the mixture of two losses; of a squared error it is not."""
    logits_BC, labels_B = draw()
    partners_B = (labels_B + 1) % 4
    lam_B = torch.full((len(labels_B),), 0.3, dtype=torch.float64)
    one_BC, other_BC = (F.one_hot(labels_N, 4).double() for labels_N in (labels_B, partners_B))
    target_BC = lam_B[:, None] * one_BC + (1 - lam_B[:, None]) * other_BC
    built = LOSSES["cross_entropy"].build(LossSpec(LossSection(), None, None, 4))
    mixed_B = built.mixed_losses(logits_BC, labels_B, partners_B, lam_B)
    torch.testing.assert_close(mixed_B, -(target_BC * logits_BC.log_softmax(1)).sum(1))
    squared = SquaredError()
    mixture_B = lam_B * squared.of_target(logits_BC, one_BC) + (1 - lam_B) * squared.of_target(logits_BC, other_BC)
    assert (squared.of_target(logits_BC, target_BC) - mixture_B).abs().min() > 0.1
