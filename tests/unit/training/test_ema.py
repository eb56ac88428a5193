"""The average of what is trained, by name; in place for a while and out again without a trace."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.small_models import classifier, state_of, train
from tlscale.training.ema import Ema


def walk(decay, values):
    """The average of one parameter after it took `values`, one a step."""
    param = nn.Parameter(torch.tensor([values[0]], dtype=torch.float64))
    ema = Ema({"w": param}, decay)
    for step, value in enumerate(values[1:], start=1):
        param.data.fill_(value)
        ema.update(step)
    return ema.averages["w"].item()


@settings(max_examples=100, deadline=None)
@given(decay=st.floats(0.01, 0.9999), values=st.lists(st.floats(-100, 100), min_size=1, max_size=30))
def test_the_average_is_the_formula(decay, values):
    expected = values[0]
    for step, value in enumerate(values[1:], start=1):
        share = min(decay, (1 + step) / (10 + step))
        expected = share * expected + (1 - share) * value
    assert walk(decay, values) == pytest.approx(expected, rel=1e-12, abs=1e-10)


def test_a_constant_is_its_own_average():
    assert walk(0.999, [3.0] * 50) == pytest.approx(3.0, abs=1e-14)


def test_the_beginning_is_forgotten_sooner():
    """After ten steps at 1 the slow average of 0.9999 alone would still be at 0.001."""
    assert walk(0.9999, [0.0] + [1.0] * 10) > 0.99


def trained(network):
    return {name: param for name, param in network.rule_names().items() if param.requires_grad}


def test_what_is_not_named_and_buffers_have_no_average():
    network = classifier(freeze=[r"(conv1|bn1|layer[12])\..*"])
    ema = Ema(trained(network), 0.9)
    params = network.rule_names()
    assert ema.averages.keys() == {name for name, param in params.items() if param.requires_grad}
    for name, average in ema.averages.items():
        assert torch.equal(average, params[name])
        assert average.data_ptr() != params[name].data_ptr()
        assert not average.requires_grad


def test_in_place_and_out_again():
    network = classifier(freeze=[r"layer1\..*"])
    ema = Ema(network.rule_names(), 0.5)
    train(network)
    ema.update(1)
    own, averages = state_of(network), {name: average.clone() for name, average in ema.averages.items()}
    addresses = [param.data_ptr() for param in network.parameters()]
    with ema.in_place():
        for name, param in network.rule_names().items():
            if param.requires_grad:
                assert torch.equal(param, averages[name])
        inside = state_of(network)
    assert any(not torch.equal(inside[name], own[name]) for name in own)
    assert all(torch.equal(tensor, own[name]) for name, tensor in network.state_dict().items())
    assert all(torch.equal(average, averages[name]) for name, average in ema.averages.items())
    assert [param.data_ptr() for param in network.parameters()] == addresses
    frozen = [name for name in own if ".layer1." in name or "running_" in name]
    assert all(torch.equal(inside[name], own[name]) for name in frozen)


def test_what_is_settled_has_its_average_for_good():
    network = classifier()
    ema = Ema(network.rule_names(), 0.5)
    train(network)
    ema.update(1)
    before = state_of(network)
    names = [name for name in ema.averages if name.startswith("layer4.")]
    averages = {name: ema.averages[name].clone() for name in ema.averages}
    ema.settle(names)
    ema.update(2)
    for name, param in network.rule_names().items():
        key = name if name in before else f"backbone.{name}"
        assert torch.equal(param, averages[name] if name in names else before[key])
        assert torch.equal(ema.averages[name], averages[name]) == (name in names)


def test_out_again_after_an_error():
    network = classifier()
    ema = Ema(network.rule_names(), 0.5)
    train(network)
    own = state_of(network)
    with pytest.raises(KeyboardInterrupt), ema.in_place():
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, own[name]) for name, tensor in network.state_dict().items())


def test_load_goes_on_bit_for_bit():
    network = classifier()
    ema = Ema(network.rule_names(), 0.9)
    train(network, steps=1)
    ema.update(1)
    saved = {name: average.clone() for name, average in ema.averages.items()}
    other = Ema(network.rule_names(), 0.9)
    assert any(not torch.equal(average, saved[name]) for name, average in other.averages.items())
    other.load(saved)
    train(network, steps=1)
    for one in (ema, other):
        one.update(2)
    assert all(torch.equal(average, other.averages[name]) for name, average in ema.averages.items())
    assert all(saved[name].data_ptr() != average.data_ptr() for name, average in other.averages.items())


def test_averages_of_other_parameters_are_not_taken():
    ema = Ema(trained(classifier(freeze=[r"layer1\..*"])), 0.9)
    with pytest.raises(AssertionError, match="other trainable parameters"):
        ema.load(Ema(classifier().rule_names(), 0.9).averages)


def test_updating_builds_no_graph():
    param = nn.Parameter(torch.ones(2))
    ema = Ema({"w": param}, 0.9)
    ema.update(1)
    assert ema.averages["w"].grad_fn is None
    (param * 2).sum().backward()
    assert torch.equal(param.grad, torch.full((2,), 2.0))
