"""Probes of many images and classes: the same optimum as of few, in passes that are counted, and stopped in time."""

import math
import os
import signal

import pytest
import torch
import torch.nn.functional as F

from tests.unit.codes.test_linear import off
from tlscale.codes.probes import blockwise, large_logistic
from tlscale.codes.probes.blockwise import by_class_order, is_large
from tlscale.codes.probes.estimate import estimate_fit
from tlscale.codes.probes.kinds import PROBE_KINDS
from tlscale.codes.probes.select import choose
from tlscale.distributed.signals import StopRequest
from tlscale.errors import Stopped

STRENGTHS = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)


def draw(num_images, num_classes=12, width=16, noise=1.0, seed=0):
    """Raw codes, correlated and with means of their own, around a centre for each class."""
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.arange(num_images) % num_classes
    centres_CD, noise_ND = (torch.randn(rows, width, generator=generator) for rows in (num_classes, num_images))
    mixed_DD = torch.randn(width, width, generator=generator)
    return (centres_CD[labels_N] + noise * noise_ND) @ mixed_DD + 5, labels_N


@pytest.fixture
def large(monkeypatch):
    """Everything is large, and blocks are small."""
    monkeypatch.setattr(blockwise, "MOST_EXACT", 0)
    monkeypatch.setattr(blockwise, "_MOST_NUMBERS", 1000)


def relative_gradient(head, codes_ND, labels_N, strength):
    """Of the loss by the weights of standardised codes, as a share of lam |W|: by autograd, in float64."""
    mean_D, std_D = codes_ND.double().mean(0), codes_ND.double().std(0, unbiased=False)
    weights_DC = (head.weight.detach().double().T * std_D[:, None]).requires_grad_()
    bias_C = (head.bias.detach().double() + head.weight.detach().double() @ mean_D).requires_grad_()
    loss = F.cross_entropy(((codes_ND - mean_D) / std_D) @ weights_DC + bias_C, labels_N)
    loss = loss + strength / 2 * weights_DC.square().sum()
    grads = torch.autograd.grad(loss, (weights_DC, bias_C))
    return math.hypot(*(float(grad.norm()) for grad in grads)) / (strength * float(weights_DC.detach().norm()))


@pytest.mark.parametrize("noise", [0.3, 1.0, 4.0])
def test_what_is_carried_on_is_solved_to_the_stated_error(noise, large):
    codes_ND, labels_N = draw(960, noise=noise)
    fit = PROBE_KINDS["logistic"].fit_by_size(codes_ND, labels_N, 12, STRENGTHS)
    carried = [index for index, head in enumerate(fit.heads) if head is not None]
    assert 1 <= len(carried) <= large_logistic.MOST_CARRIED
    assert [fit.converged[index] for index in carried] == [True] * len(carried)
    assert [logits is not None for logits in fit.logits(codes_ND[:5])] == [head is not None for head in fit.heads]
    for index in carried:
        assert (
            relative_gradient(fit.head(index), codes_ND, labels_N, STRENGTHS[index]) <= 1.02 * large_logistic.TOLERANCE
        )


def test_it_ends_where_the_exact_path_does(monkeypatch):
    codes_ND, labels_N = draw(960)
    exact = PROBE_KINDS["logistic"].fit_by_size(codes_ND, labels_N, 12, (0.01,))
    monkeypatch.setattr(blockwise, "MOST_EXACT", 0)
    large = PROBE_KINDS["logistic"].fit_by_size(codes_ND, labels_N, 12, (0.01,))
    assert off(large.head(0).weight.detach(), exact.head(0).weight.detach()) < large_logistic.TOLERANCE
    assert large.converged == (True,)


def test_few_images_of_a_class_are_no_sample_and_nothing_is_rejected(large):
    codes_ND, labels_N = draw(12 * 20)
    fit = PROBE_KINDS["logistic"].fit_by_size(codes_ND, labels_N, 12, STRENGTHS)
    assert fit.converged == (True,) * len(STRENGTHS)


def test_the_passes_are_few(large, monkeypatch):
    """All strengths together, the sample counted by its size; and a fit again begins near the end."""
    codes_ND, labels_N = draw(4000)
    rows, loss = [], large_logistic.Images.loss

    def counted(images, *args):
        rows.append(len(images.labels_N))
        return loss(images, *args)

    monkeypatch.setattr(large_logistic.Images, "loss", counted)
    fit = PROBE_KINDS["logistic"].fit_by_size(codes_ND[:3600], labels_N[:3600], 12, STRENGTHS)
    assert sum(rows) / 3600 < 60
    last = max(index for index, head in enumerate(fit.heads) if head is not None)
    rows.clear()
    PROBE_KINDS["logistic"].fit_by_size(codes_ND, labels_N, 12, (STRENGTHS[last],), fit.head(last))
    assert sum(rows) / 4000 < 20


def test_few_images_of_each_of_many_classes_are_solved_from_strength_to_strength(monkeypatch):
    """Side by side it is thousands of steps, each of many short operations for which threads wait for each other."""
    codes_ND, labels_N = draw(300, num_classes=150, width=120, noise=3.0)
    threads, loss = [], large_logistic.Images.loss

    def counted(images, *args):
        threads.append(torch.get_num_threads())
        return loss(images, *args)

    monkeypatch.setattr(large_logistic.Images, "loss", counted)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fit = PROBE_KINDS["logistic"].fit_by_size(codes_ND, labels_N, 150, STRENGTHS)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert 0 < len(threads) < 400
    assert set(threads) == {1}
    assert fit.converged == (True,) * len(STRENGTHS)
    for index, strength in enumerate(STRENGTHS):
        found = relative_gradient(fit.head(index), codes_ND, labels_N, strength)
        assert found <= 1.02 * large_logistic.TOLERANCE


def test_what_needs_more_passes_than_there_are_says_so(large, monkeypatch):
    codes_ND, labels_N = draw(960)
    monkeypatch.setattr(large_logistic, "MOST_PASSES", 4)
    fit = PROBE_KINDS["logistic"].fit_by_size(codes_ND, labels_N, 12, (1e-5,))
    assert fit.converged == (False,)
    assert fit.head(0).weight.isfinite().all()


@pytest.mark.parametrize("kind", ["logistic", "ridge"])
def test_a_class_without_images_is_never_the_answer(kind, large):
    codes_ND, labels_N = draw(960)
    labels_N[labels_N == 5] = 4
    fit = PROBE_KINDS[kind].fit_by_size(codes_ND, labels_N, 12, (0.1,))
    shares_NC = fit.head(0)(codes_ND).softmax(1)
    assert float(shares_NC[:, 5].detach().max()) < 1.01 / (960 + 2)


def test_large_ridge_is_the_ridge_of_few(monkeypatch):
    codes_ND, labels_N = draw(960)
    exact = PROBE_KINDS["ridge"].fit_by_size(codes_ND, labels_N, 12, (1.0, 0.01))
    monkeypatch.setattr(blockwise, "MOST_EXACT", 0)
    large = PROBE_KINDS["ridge"].fit_by_size(codes_ND, labels_N, 12, (1.0, 0.01))
    for index in range(2):
        assert off(large.head(index).weight.detach(), exact.head(index).weight.detach()) < 1e-4
        assert off(large.head(index).bias.detach(), exact.head(index).bias.detach()) < 1e-4


def test_rejected_strengths_choose_nothing(large):
    codes_ND, labels_N = draw(1200)
    choice = choose(
        "logistic", [("codes", (codes_ND[:960], codes_ND[960:]))], labels_N[:960], labels_N[960:], num_classes=12
    )
    rejected = [row for row in choice.table["codes"] if row.held_top1 is None]
    assert rejected
    assert not any(row.converged for row in rejected)
    assert choice.probe.chosen.held_top1 > 0.5
    assert choice.probe.converged


def test_any_beginning_of_the_order_holds_each_class_in_its_proportion():
    labels_N = torch.tensor([0] * 600 + [1] * 300 + [2] * 100)
    order_N = by_class_order(labels_N)
    assert order_N.sort().values.tolist() == list(range(1000))
    counts_C = labels_N[order_N[:100]].bincount()
    assert (counts_C - torch.tensor([60, 30, 10])).abs().max() <= 1
    assert by_class_order(labels_N).equal(order_N)


def test_where_the_limit_lies():
    assert not is_large(10_000, 1280, 10), "the shipped recipes are solved exactly"
    assert is_large(10_000, 512, 100)
    logistic, ridge = PROBE_KINDS["logistic"], PROBE_KINDS["ridge"]
    assert logistic.is_by_blocks(320, 128, 200), "1.6 images a class"
    assert not logistic.is_by_blocks(1600, 128, 200), "8 images a class"
    assert not logistic.is_by_blocks(79, 2048, 10), "small"
    assert not ridge.is_by_blocks(320, 128, 200), "in closed form"


@pytest.mark.parametrize("kind", ["logistic", "ridge", "sklearn"])
@pytest.mark.parametrize("size", ["small", "large"])
def test_a_fit_is_stopped(kind, size, monkeypatch):
    if size == "large":
        monkeypatch.setattr(blockwise, "MOST_EXACT", 0)
    codes_ND, labels_N = draw(12 * 400, noise=2.0)
    with StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="while fitting the probe"):
            PROBE_KINDS[kind].fit_by_size(codes_ND, labels_N, 12, STRENGTHS)


@pytest.mark.parametrize("kind", PROBE_KINDS)
def test_an_estimate_grows_with_the_images_and_says_what_it_rests_on(kind):
    few, many = (estimate_fit(kind, count, 64, 100, 9, count // 10) for count in (1000, 1_000_000))
    assert 0 < few.seconds < many.seconds
    assert 0 < few.num_bytes < many.num_bytes
    assert many.basis
