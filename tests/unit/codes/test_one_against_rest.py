"""Logistic regression of each class against the rest is scikit-learn's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from tlscale.codes.probes.one_against_rest import fit_one_against_rest
from tlscale.codes.probes.select import choose
from tlscale.errors import DataError

STRENGTHS = (1.0, 0.1, 0.01)


def made(num_images: int = 120, width: int = 9, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draws = np.random.default_rng(seed)
    codes_ND = draws.normal(size=(num_images, width)) * np.linspace(0.5, 3, width) + 2
    labels_NC = codes_ND @ draws.normal(size=(width, 3)) + draws.normal(size=(num_images, 3)) * 3 > (0, 5, 9)
    return torch.from_numpy(codes_ND).float(), torch.from_numpy(labels_NC)


def test_each_class_is_scikit_learns():
    codes_ND, labels_NC = made()
    fit = fit_one_against_rest(codes_ND, labels_NC, STRENGTHS)
    assert fit.converged == (True,) * 3
    standard = StandardScaler().fit_transform(codes_ND.double().numpy())
    for index, strength in enumerate(STRENGTHS):
        for label in range(3):
            model = LogisticRegression(C=1 / (strength * len(codes_ND)), tol=1e-10, max_iter=5000)
            model.fit(standard, labels_NC[:, label].numpy())
            own = fit.path.weights_LDC[index, :, label].numpy()
            assert np.abs(own - model.coef_[0]).max() <= 2e-3 * np.abs(model.coef_).max()
            assert float(fit.path.biases_LC[index, label]) == pytest.approx(float(model.intercept_[0]), abs=2e-3)
    logits_LMC = list(fit.logits(codes_ND[:5]))
    for index in range(3):
        torch.testing.assert_close(fit.head(index)(codes_ND[:5]).double(), logits_LMC[index], rtol=1e-4, atol=1e-4)


def test_a_class_that_none_or_all_have_is_answered_by_its_bias():
    codes_ND, labels_NC = made()
    labels_NC[:, 0], labels_NC[:, 2] = False, True
    fit = fit_one_against_rest(codes_ND, labels_NC, STRENGTHS)
    assert not fit.path.weights_LDC[:, :, [0, 2]].any()
    assert fit.path.biases_LC[0].tolist()[::2] == pytest.approx([-math.log(121), math.log(121)])
    alone = fit_one_against_rest(codes_ND, labels_NC[:, [1]], STRENGTHS)
    torch.testing.assert_close(fit.path.weights_LDC[:, :, [1]], alone.path.weights_LDC)


def test_map_chooses_the_strength():
    codes_ND, labels_NC = made(200)
    held = made(80, seed=0)
    found = choose("logistic", [("a", (codes_ND, held[0]))], labels_NC, held[1], num_classes=3, grid=STRENGTHS)
    assert found.probe.chosen.held_top1 == max(row.held_top1 for row in found.probe.path)
    assert found.probe.num_images == 280
    assert found.probe.head(codes_ND).shape == (200, 3)


def test_labels_that_tell_nothing_apart():
    codes_ND, labels_NC = made(30)
    with pytest.raises(DataError, match="all have the same labels"):
        choose("logistic", [("a", (codes_ND, codes_ND))], torch.zeros_like(labels_NC), labels_NC, num_classes=3)
