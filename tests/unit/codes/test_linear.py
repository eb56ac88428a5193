"""The solvers of probes against scikit-learn, direct solves and formulas written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, RidgeClassifier

from tlscale.codes.probes import logistic as solvers
from tlscale.codes.probes import scikit
from tlscale.codes.probes.linear import linear_path, principal_axes
from tlscale.codes.probes.logistic import logistic_path
from tlscale.codes.probes.ridge import best_scale, ridge_path
from tlscale.codes.probes.scikit import sklearn_path

SOLVERS = (logistic_path, ridge_path, sklearn_path)


def draw(num_images=120, width=6, num_classes=4, seed=0, spread=1.0):
    """Standardised codes around a centre for each class, correlated; every class has an image."""
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.arange(num_images) % num_classes
    centres_CD = torch.randn(num_classes, width, generator=generator, dtype=torch.float64)
    codes_ND = spread * centres_CD[labels_N] + torch.randn(num_images, width, generator=generator, dtype=torch.float64)
    codes_ND = codes_ND @ torch.randn(width, width, generator=generator, dtype=torch.float64)
    return (codes_ND - codes_ND.mean(0)) / codes_ND.std(0, unbiased=False), labels_N


def objective(weights_DC, bias_C, codes_ND, labels_N, strength):
    return float(F.cross_entropy(codes_ND @ weights_DC + bias_C, labels_N) + strength / 2 * weights_DC.square().sum())


def off(found, expected):
    return float((found - expected).norm() / expected.norm())


SHAPES = {"plain": (120, 6, 4), "two classes": (80, 5, 2), "more features than images": (30, 90, 3), "one": (50, 1, 3)}


@pytest.mark.parametrize("shape", SHAPES)
def test_logistic_is_scikit_learns_optimum(shape):
    num_images, width, num_classes = SHAPES[shape]
    codes_ND, labels_N = draw(num_images, width, num_classes)
    strengths = (3.0, 0.1, 1e-2, 1e-3)
    path = logistic_path(codes_ND, labels_N, num_classes, strengths)
    assert path.converged == (True,) * len(strengths)
    for index, strength in enumerate(strengths):
        # Two classes: scikit-learn has one weight vector, w, for our w/2 and -w/2.
        scale = 1 if num_classes > 2 else 2
        model = LogisticRegression(C=scale / (strength * num_images), tol=1e-10, max_iter=20_000)
        model.fit(codes_ND.numpy(), labels_N.numpy())
        weights_DC, bias_C = torch.tensor(model.coef_.T), torch.tensor(model.intercept_)
        if scale == 2:
            weights_DC, bias_C = torch.cat([-weights_DC, weights_DC], 1) / 2, torch.cat([-bias_C, bias_C]) / 2
        assert off(path.weights_LDC[index], weights_DC) < 1e-3
        assert path.biases_LC[index] - bias_C == pytest.approx(0, abs=2e-3 * float(1 + bias_C.abs().max()))
        found = objective(path.weights_LDC[index], path.biases_LC[index], codes_ND, labels_N, strength)
        assert found == pytest.approx(objective(weights_DC, bias_C, codes_ND, labels_N, strength), abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    num_images=st.integers(4, 40),
    width=st.integers(1, 12),
    num_classes=st.integers(2, 4),
    seed=st.integers(0, 999),
    spread=st.sampled_from([0.0, 1.0, 10.0]),  # nothing to learn; some; all separable
    strength=st.sampled_from([10.0, 0.3, 1e-2, 1e-4]),
)
def test_logistic_gradient_is_as_small_as_promised(num_images, width, num_classes, seed, spread, strength):
    codes_ND, labels_N = draw(num_images, width, num_classes, seed, spread)
    path = logistic_path(codes_ND, labels_N, num_classes, (strength,))
    weights_DC, bias_C = path.weights_LDC[0].requires_grad_(), path.biases_LC[0].clone().requires_grad_()
    loss = F.cross_entropy(codes_ND @ weights_DC + bias_C, labels_N) + strength / 2 * weights_DC.square().sum()
    norm = math.hypot(*(float(grad.norm()) for grad in torch.autograd.grad(loss, (weights_DC, bias_C))))
    assert path.converged == (True,)
    assert norm <= 1.01 * solvers.TOLERANCE * strength * float(weights_DC.detach().norm()) + 1e-13
    # A constant added to the logits of all classes changes nothing; the solution is the one that sums to zero.
    assert float(weights_DC.detach().sum(1).norm()) <= 1e-9 * float(weights_DC.detach().norm()) + 1e-12


def test_strengths_side_by_side_are_each_alone():
    codes_ND, labels_N = draw()
    strengths = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
    together = logistic_path(codes_ND, labels_N, 4, strengths)
    backwards = logistic_path(codes_ND, labels_N, 4, strengths[::-1])
    norms = together.weights_LDC.flatten(1).norm(dim=1)
    assert (norms.diff() > 0).all()  # weaker regularisation, larger weights
    for index, strength in enumerate(strengths):
        alone = logistic_path(codes_ND, labels_N, 4, (strength,))
        assert off(together.weights_LDC[index], alone.weights_LDC[0]) < 2e-3
        assert off(backwards.weights_LDC[-1 - index], alone.weights_LDC[0]) < 2e-3


def test_many_strengths_in_parts_are_the_same(monkeypatch):
    codes_ND, labels_N = draw()
    strengths = (1.0, 0.1, 1e-2)
    whole = logistic_path(codes_ND, labels_N, 4, strengths)
    monkeypatch.setattr(solvers, "_MOST_LOGITS", 2 * 120 * 4)
    parts = logistic_path(codes_ND, labels_N, 4, strengths)
    for index in range(3):
        assert off(parts.weights_LDC[index], whole.weights_LDC[index]) < 2e-3
    assert parts.converged == whole.converged == (True,) * 3


def test_what_does_not_converge_says_so(monkeypatch):
    codes_ND, labels_N = draw()
    monkeypatch.setattr(solvers, "_MOST_STEPS", 3)
    path = logistic_path(codes_ND, labels_N, 4, (10.0, 1e-5))
    assert path.converged == (True, False)
    assert path.weights_LDC.isfinite().all()
    monkeypatch.setattr(scikit, "_MOST_STEPS", 3)
    assert sklearn_path(codes_ND, labels_N, 4, (1e-5,)).converged == (False,)


def test_the_same_bits_again():
    codes_ND, labels_N = draw()
    for solver in SOLVERS:
        first, again = (linear_path(solver, codes_ND, labels_N, 4, (1.0, 1e-3)) for _ in range(2))
        assert torch.equal(first.weights_LDC, again.weights_LDC)
        assert torch.equal(first.biases_LC, again.biases_LC)


# -- ridge --------------------------------------------------------------------------------------------------------


def direct_ridge(codes_ND, targets_NC, strength):
    """The normal equations with a column of ones that is not regularised."""
    ones_NP = torch.cat([codes_ND, torch.ones(len(codes_ND), 1, dtype=codes_ND.dtype)], 1)
    penalty_P = torch.full((ones_NP.shape[1],), strength * len(codes_ND), dtype=codes_ND.dtype)
    penalty_P[-1] = 0
    return torch.linalg.solve(ones_NP.T @ ones_NP + penalty_P.diag(), ones_NP.T @ targets_NC)


@settings(max_examples=40, deadline=None)
@given(
    num_images=st.integers(4, 30),
    width=st.integers(1, 40),
    num_classes=st.integers(2, 4),
    seed=st.integers(0, 999),
    strengths=st.lists(st.floats(1e-3, 10), min_size=1, max_size=3),
)
def test_ridge_path_is_the_direct_solves(num_images, width, num_classes, seed, strengths):
    codes_ND, labels_N = draw(num_images, width, num_classes, seed)
    path = ridge_path(codes_ND, labels_N, num_classes, strengths)
    targets_NC = F.one_hot(labels_N, num_classes).double()
    for index, strength in enumerate(strengths):
        direct_PC = direct_ridge(codes_ND, targets_NC, strength)
        # The scores are those of the direct solve times one number.
        scale = float(path.biases_LC[index].sum() / direct_PC[-1].sum())
        assert scale * (1 + 1e-9) >= 1e-2
        assert scale <= 1e3 * (1 + 1e-9)
        torch.testing.assert_close(path.weights_LDC[index], scale * direct_PC[:-1], rtol=1e-6, atol=1e-8 * scale)
        torch.testing.assert_close(path.biases_LC[index], scale * direct_PC[-1], rtol=1e-6, atol=1e-8 * scale)


def test_ridge_answers_are_scikit_learns():
    codes_ND, labels_N = draw(300, 8, 5, spread=0.5)
    path = ridge_path(codes_ND, labels_N, 5, (1e-3, 0.1, 3.0))
    for index, strength in enumerate((1e-3, 0.1, 3.0)):
        model = RidgeClassifier(alpha=strength * 300).fit(codes_ND.numpy(), labels_N.numpy())
        answers = path.logits(index, codes_ND).argmax(1)
        assert np.array_equal(answers.numpy(), model.predict(codes_ND.numpy()))


def test_ridge_scale_is_that_of_scores_left_out():
    codes_ND, labels_N = draw(24, 5, 3)
    targets_NC = F.one_hot(labels_N, 3).double()
    rest = [torch.arange(24) != image for image in range(24)]
    left_out = []
    for image, kept in enumerate(rest):
        # The strength is a share of the images that are fitted: lam * N stays what it is with all of them.
        direct_PC = direct_ridge(codes_ND[kept], targets_NC[kept], 0.1 * 24 / 23)
        left_out.append(codes_ND[image] @ direct_PC[:-1] + direct_PC[-1])
    expected = best_scale(torch.stack(left_out), labels_N)
    path = ridge_path(codes_ND, labels_N, 3, (0.1,))
    assert float(path.biases_LC[0].sum()) == pytest.approx(expected, rel=1e-6)  # shares of classes sum to 1


def test_best_scale_is_the_lowest_point():
    codes_ND, labels_N = draw(60, 5, 3, spread=0.3)
    scores_NC = codes_ND[:, :3]
    # One image in 62 is doubted, and the doubt is of the other two classes.
    targets_NC = F.one_hot(labels_N, 3).double() * (1 - 1.5 / 62) + 0.5 / 62
    for sign in (1, 20):
        found = best_scale(sign * scores_NC, labels_N)
        losses = [float(F.cross_entropy(factor * found * sign * scores_NC, targets_NC)) for factor in (0.97, 1, 1.03)]
        if 1.1e-2 < found < 0.9e3:
            assert losses[1] == min(losses)
        else:
            assert found == pytest.approx(1e-2, rel=1e-6)
            assert losses[0] < losses[1]


@pytest.mark.parametrize("num_classes", [2, 3, 10])
@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
def test_scores_that_are_all_right_are_as_sure_as_their_number_allows(num_classes, size):
    labels_N = torch.arange(60) % num_classes
    scores_NC = size * F.one_hot(labels_N, num_classes).double()
    shares_NC = (best_scale(scores_NC, labels_N) * scores_NC).softmax(1)
    torch.testing.assert_close(shares_NC.amax(1), torch.full((60,), 61 / 62, dtype=torch.float64))


@pytest.mark.parametrize(("width", "spread"), [(512, 6.0), (64, 6.0), (8, 2.0)])
@pytest.mark.parametrize("strength", [1e-3, 1e-2, 0.1, 1.0, 10.0])
def test_ridge_is_not_surer_than_it_is_right(width, spread, strength):
    """On codes that separate the training images, one image in thirty of the others is another's: its loss is of the
    size of the logistic's, and no answer is sure."""
    generator = torch.Generator().manual_seed(width)
    means_CD = spread / math.sqrt(width) * torch.randn(3, width, generator=generator, dtype=torch.float64)
    labels_N, others_M = torch.arange(90) % 3, torch.arange(300) % 3
    codes_ND, codes_MD = (
        means_CD[labels] + torch.randn(len(labels), width, generator=generator, dtype=torch.float64)
        for labels in (labels_N, others_M)
    )
    others_M[::30] = (others_M[::30] + 1) % 3
    mean_D = codes_ND.mean(0)
    ridge, logistic = (
        solve(codes_ND - mean_D, labels_N, 3, (value,)).logits(0, codes_MD - mean_D)
        for solve, value in ((ridge_path, strength), (logistic_path, 0.01))
    )
    loss, other = float(F.cross_entropy(ridge, others_M)), float(F.cross_entropy(logistic, others_M))
    assert loss < 1.5 * other + 0.05
    assert float(ridge.softmax(1).amax()) < 0.99999


@pytest.mark.parametrize("shape", [(40, 6), (6, 40), (7, 7), (30, 1)])
def test_principal_axes(shape):
    codes_ND = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    codes_ND = codes_ND - codes_ND.mean(0)
    axes_DR, variances_R = principal_axes(codes_ND)
    rank = min(shape[0] - 1, shape[1])
    assert axes_DR.shape == (shape[1], rank)
    torch.testing.assert_close(axes_DR.T @ axes_DR, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close((codes_ND @ axes_DR).var(0, unbiased=False), variances_R)
    torch.testing.assert_close(codes_ND @ axes_DR @ axes_DR.T, codes_ND)


# -- classes and scikit-learn -------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_absent_class_is_improbable_and_changes_nothing_else(solver):
    codes_ND, labels_N = draw(60, 5, 3)
    present = linear_path(solver, codes_ND, labels_N, 3, (0.1, 1e-3))
    spread_C = torch.tensor([1, 2, 4])
    path = linear_path(solver, codes_ND, spread_C[labels_N], 6, (0.1, 1e-3))
    assert torch.equal(path.weights_LDC[:, :, spread_C], present.weights_LDC)
    for index in range(2):
        shares_NC = path.logits(index, codes_ND).softmax(1)
        absent_NC = shares_NC[:, [0, 3, 5]]
        assert (absent_NC > 0).all()
        assert (absent_NC <= 1 / 62 + 1e-12).all()
        assert float(absent_NC.max()) == pytest.approx(1 / (61 + 3), rel=1e-6)  # three of them share that image


@pytest.mark.parametrize("num_classes", [2, 3])
def test_scikit_learns_path_is_ours(num_classes):
    codes_ND, labels_N = draw(90, 4, num_classes)
    strengths = (1.0, 1e-2)
    theirs, ours = (solve(codes_ND, labels_N, num_classes, strengths) for solve in (sklearn_path, logistic_path))
    for index, strength in enumerate(strengths):
        losses = [
            objective(path.weights_LDC[index], path.biases_LC[index], codes_ND, labels_N, strength)
            for path in (theirs, ours)
        ]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
        assert off(theirs.weights_LDC[index], ours.weights_LDC[index]) < 0.02
