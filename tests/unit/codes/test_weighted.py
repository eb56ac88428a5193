"""Probes with class weights: scikit-learn's own answers, and those of images that are there several times."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.preprocessing import StandardScaler

from tlscale.codes.probes import blockwise
from tlscale.codes.probes.logistic import TOLERANCE
from tlscale.codes.probes.select import choose
from tlscale.recipe.schema import LossSection
from tlscale.training.loss import weigher

CLASSES = ["common", "rare", "third"]
BALANCED = LossSection(class_weights="balanced")


def unequal(num=240, width=6, seed=0, shares=(0.8, 0.15, 0.05)):
    """Overlapping classes of unequal sizes: codes, labels."""
    draws = np.random.default_rng(seed)
    labels_N = draws.choice(len(shares), num, p=shares)
    codes_ND = draws.normal(0, 1, (num, width)) + 0.7 * np.eye(len(shares), width)[labels_N]
    return torch.from_numpy(codes_ND), torch.from_numpy(labels_N)


def fitted(kind, codes_ND, labels_N, section, strength=0.03, num_classes=3, **more):
    candidates = [("x", (codes_ND, codes_ND[:0]))]
    weigh = weigher(section, CLASSES[:num_classes])
    chosen = choose(
        kind, candidates, labels_N, labels_N[:0], num_classes=num_classes, grid=[strength], weigh=weigh, **more
    )
    assert chosen.probe.converged
    return chosen.probe.head.requires_grad_(False)


def sklearns(codes_ND, labels_N, strength, **weights):
    standard_ND = StandardScaler().fit(codes_ND).transform(codes_ND)
    images = len(labels_N) / (2 if len(torch.unique(labels_N)) == 2 else 1)
    model = LogisticRegression(C=1 / (strength * images), tol=1e-10, max_iter=5000, **weights)
    return torch.from_numpy(model.fit(standard_ND, labels_N).predict_proba(standard_ND))


@pytest.mark.parametrize("kind", ["logistic", "sklearn"])
@pytest.mark.parametrize(("section", "weights"), [
    (BALANCED, {"class_weight": "balanced"}),
    (LossSection(class_weights={"common": 0.5, "rare": 2.0, "third": 7.0}), None),
])  # fmt: skip
def test_it_is_scikit_learns_class_weight(kind, section, weights):
    codes_ND, labels_N = unequal()
    if weights is None:  # which scales C, where ours are scaled to a mean of 1
        given = np.array(list(section.class_weights.values()))
        mean = given[labels_N.numpy()].mean()
        weights = {"class_weight": dict(enumerate(given / mean))}
    theirs_NC = sklearns(codes_ND, labels_N, 0.03, **weights)
    ours_NC = fitted(kind, codes_ND, labels_N, section)(codes_ND.float()).softmax(1).double()
    assert float((ours_NC - theirs_NC).abs().max()) < 2e-3
    plain_NC = sklearns(codes_ND, labels_N, 0.03)
    assert float((plain_NC - theirs_NC).abs().max()) > 0.1, "weights matter here"


def test_it_is_solved_to_the_stated_error():
    codes_ND, labels_N = unequal()
    scale = StandardScaler().fit(codes_ND)
    model = LogisticRegression(C=1 / (0.03 * 240), tol=1e-10, max_iter=5000, class_weight="balanced")
    theirs_CD = torch.from_numpy(model.fit(scale.transform(codes_ND), labels_N).coef_)
    ours_CD = fitted("logistic", codes_ND, labels_N, BALANCED).weight.double() * torch.from_numpy(scale.scale_)
    assert float((ours_CD - theirs_CD).norm() / theirs_CD.norm()) < TOLERANCE


def test_of_two_classes_too():
    codes_ND, labels_N = unequal(shares=(0.9, 0.1))
    theirs_NC = sklearns(codes_ND, labels_N, 0.03, class_weight="balanced")
    for kind in ("logistic", "sklearn"):
        ours_NC = fitted(kind, codes_ND, labels_N, BALANCED, num_classes=2)(codes_ND.float()).softmax(1).double()
        assert float((ours_NC - theirs_NC).abs().max()) < 2e-3


@pytest.mark.parametrize("kind", ["logistic", "ridge"])
def test_a_weight_of_two_is_an_image_that_is_there_twice(kind):
    """But for standardisation, which has no weights: so of codes whose mean and deviation each class has."""
    codes_ND, _ = unequal(num=90)
    labels_N = torch.arange(90) % 3
    for label in range(3):
        own = codes_ND[labels_N == label]
        codes_ND[labels_N == label] = (own - own.mean(0)) / own.std(0, unbiased=False)
    turned = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()).Q
    codes_ND[labels_N == 2] = codes_ND[labels_N == 2] @ turned
    own = codes_ND[labels_N == 2]
    codes_ND[labels_N == 2] = (own - own.mean(0)) / own.std(0, unbiased=False)
    section = LossSection(class_weights={"common": 1.0, "rare": 1.0, "third": 2.0})
    ours = fitted(kind, codes_ND, labels_N, section)(codes_ND.float())
    twice = torch.cat([torch.arange(90), torch.arange(90)[labels_N == 2]])
    theirs = fitted(kind, codes_ND[twice], labels_N[twice], LossSection())(codes_ND.float())
    if kind == "ridge":  # the one number by which scores are scaled leaves out an image, not half of it
        ours, theirs = (logits / logits.std() for logits in (ours, theirs))
    assert float((ours.softmax(1) - theirs.softmax(1)).abs().max()) < 2e-3


@pytest.mark.parametrize("kind", ["logistic", "ridge"])
def test_equal_weights_are_none(kind):
    codes_ND, labels_N = unequal()
    equal = LossSection.model_construct(class_weights={"common": 3.0, "rare": 3.0, "third": 3.0})
    ours, plain = (fitted(kind, codes_ND, labels_N, one)(codes_ND.float()) for one in (equal, LossSection()))
    assert float((ours - plain).abs().max()) < 1e-3


def test_block_by_block_it_is_the_same(monkeypatch):
    codes_ND, labels_N = unequal(num=600)
    exact = fitted("logistic", codes_ND, labels_N, BALANCED)(codes_ND.float())
    monkeypatch.setattr(blockwise, "MOST_EXACT", 0)
    by_blocks = fitted("logistic", codes_ND, labels_N, BALANCED)(codes_ND.float())
    assert float((exact.softmax(1) - by_blocks.softmax(1)).abs().max()) < 0.02
    assert not torch.equal(exact, by_blocks)


def test_a_class_without_images_is_never_the_answer():
    codes_ND, labels_N = unequal(shares=(0.9, 0.1))
    for kind in ("logistic", "ridge", "sklearn"):
        logits_NC = fitted(kind, codes_ND, labels_N, BALANCED)(codes_ND.float())
        assert float(logits_NC.softmax(1)[:, 2].max()) < 1 / 200


@pytest.mark.parametrize("select", ["top1", "loss", "macro_f1", "balanced_accuracy", "auroc", "mean_average_precision"])
def test_the_figure_that_chooses(select):
    (codes_ND, labels_N), (held_MD, held_M) = unequal(seed=1), unequal(seed=2)
    grid = [30.0, 3.0, 0.3, 0.03, 0.003]
    found = choose("logistic", [("x", (codes_ND, held_MD))], labels_N, held_M, num_classes=3, grid=grid, select=select)
    figures = {}
    for strength in grid:
        logits_MC = fitted("logistic", codes_ND, labels_N, LossSection(), strength)(held_MD.float())
        answers_M = logits_MC.argmax(1)
        hits_C, images_C, answers_C = (
            torch.bincount(some, minlength=3).double() for some in (held_M[answers_M == held_M], held_M, answers_M)
        )
        loss = float(torch.nn.functional.cross_entropy(logits_MC.double(), held_M))
        by = {
            "top1": hits_C.sum() / len(held_M),
            "loss": -loss,
            "macro_f1": (2 * hits_C / (images_C + answers_C)).mean(),
        }
        shares_MC, is_class_MC = logits_MC.double().softmax(1).numpy(), np.eye(3)[held_M]
        by["balanced_accuracy"] = (hits_C / images_C).mean()
        by["auroc"] = roc_auc_score(held_M, shares_MC, multi_class="ovr", average="macro")
        by["mean_average_precision"] = average_precision_score(is_class_MC, shares_MC, average="macro")
        figures[strength] = float(by[select]), -loss
    assert found.probe.chosen.setting == max(grid, key=lambda strength: figures[strength])
