"""The mean over views of an image: of probabilities, one answer an image, in the place of logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tlscale.models.views import ViewsMean, mean_of_views, over_views


def drawn(num_views, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [5 * torch.randn(7, 4, generator=generator, dtype=dtype) for _ in range(num_views)]


@pytest.mark.parametrize("num_views", [2, 5])
def test_its_softmax_is_the_mean_softmax_and_its_sigmoid_the_mean_sigmoid(num_views):
    views = drawn(num_views)
    for several, shares in ((False, lambda logits: logits.softmax(1)), (True, torch.sigmoid)):
        expected = torch.stack([shares(logits) for logits in views]).mean(0)
        torch.testing.assert_close(shares(mean_of_views(views, several=several)), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("several", [False, True])
def test_one_view_is_as_it_is_and_half_precision_is_not_averaged_in(several):
    (logits,) = drawn(1)
    assert mean_of_views([logits], several=several) is logits
    half = [logits.bfloat16() for logits in drawn(2)]
    assert mean_of_views(half, several=several).dtype == torch.float32


@pytest.mark.parametrize("several", [False, True])
def test_extreme_logits_have_an_answer_and_nan_has_none(several):
    one = torch.tensor([[300.0, -300.0], [math.inf, 0.0], [math.nan, 1.0], [0.0, 1.0]])
    found = mean_of_views([one, one.flip(1)], several=several)
    assert bool(found[[0, 1, 3]].isfinite().all())
    assert bool(found[2].isnan().any())
    torch.testing.assert_close(found[0], found[0].flip(0))


def test_a_wrapped_network_takes_the_views_one_after_the_other():
    torch.manual_seed(0)
    network = nn.Bilinear(3, 2, 6).eval()
    values = [torch.randn(5, width) for _ in range(3) for width in (3, 2)]
    wrapped = over_views(network, 3, 4, several=False)
    assert not wrapped.training
    outputs = [network(*values[at : at + 2]) for at in (0, 2, 4)]
    found = wrapped(*values)
    assert torch.equal(found[:, :4], mean_of_views([one[:, :4] for one in outputs], several=False))
    assert torch.equal(found[:, 4:], outputs[0][:, 4:])  # what is no logit is of the plain view
    assert over_views(network, 1, 4, several=False) is network


def test_the_mode_of_the_network_stays_its_own():
    network = nn.Linear(2, 2).train()
    wrapped = ViewsMean(network, 2, 2, several=False)
    assert wrapped.training
    wrapped.eval()
    assert not network.training
