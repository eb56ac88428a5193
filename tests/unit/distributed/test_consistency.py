"""The checksum of a tensor: any one change shows, and it is the same number however the tensor lies in memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small_models import classifier
from tlscale.distributed import consistency as desync
from tlscale.distributed.consistency import checksum, difference
from tlscale.training.ema import Ema
from tlscale.training.state import replicated_tensors

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def by_hand(tensor: torch.Tensor) -> int:
    """In Python's integers, which do not overflow."""
    size = tensor.element_size()
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    bits = [int.from_bytes(content[at : at + size], "little", signed=True) for at in range(0, len(content), size)]
    total = sum((2 * position + 1) * value for position, value in enumerate(bits)) % 2**64
    return total - 2**64 if total >= 2**63 else total


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 40), dtype=st.sampled_from((*FLOATS, torch.int64, torch.int32)))
def test_it_is_the_formula(seed, count, dtype):
    tensor = (1e3 * torch.randn(count, generator=torch.Generator().manual_seed(seed))).to(dtype)
    assert int(checksum(tensor)) == by_hand(tensor)


def test_it_is_the_formula_over_more_positions_than_are_summed_at_once(monkeypatch):
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(desync, "_POSITIONS", 96)
    assert int(checksum(tensor)) == by_hand(tensor)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), count=st.integers(1, 40), dtype=st.sampled_from(FLOATS))
def test_one_flipped_bit_shows(data, count, dtype):
    tensor = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
    other = tensor.clone()
    place = data.draw(st.integers(0, count * tensor.element_size() - 1))
    other.view(torch.uint8)[place] ^= 1 << data.draw(st.integers(0, 7))
    assert int(checksum(other)) != int(checksum(tensor))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), count=st.integers(2, 40))
def test_two_exchanged_values_show(data, count):
    tensor = torch.randn(count, generator=torch.Generator().manual_seed(count))
    one, two = data.draw(st.lists(st.integers(0, count - 1), min_size=2, max_size=2, unique=True))
    other = tensor.clone()
    other[[one, two]] = tensor[[two, one]]
    assert int(checksum(other)) != int(checksum(tensor))


def test_the_order_in_memory_does_not_matter():
    tensor = torch.randn(2, 3, 4, 5)
    assert int(checksum(tensor.contiguous(memory_format=torch.channels_last))) == int(checksum(tensor))


@pytest.mark.parametrize("tensor", [torch.tensor(3), torch.tensor(True), torch.empty(0), torch.tensor([-0.0, 1.0])])
def test_scalars_flags_and_nothing(tensor):
    assert int(checksum(tensor)) == by_hand(tensor)


def test_minus_zero_is_not_zero():
    assert int(checksum(torch.tensor([-0.0]))) != int(checksum(torch.tensor([0.0])))


def test_replicated_tensors_are_all_that_training_changes():
    network = classifier(freeze=[r"(conv1|bn1|layer[12])\..*"])
    trained = {name: param for name, param in network.rule_names().items() if param.requires_grad}
    names = set(replicated_tensors(network, Ema(trained, 0.9)))
    assert {"layer3.0.conv1.weight", "head.0.bias", "average of head.0.bias", "layer4.0.bn1.running_mean"} <= names
    assert "conv1.weight" not in names
    assert names - set(replicated_tensors(network, None)) == {f"average of {name}" for name in trained}


def test_the_first_that_differs_from_most_is_named_even_if_it_is_the_main_one():
    usual, other = [1, 2, 3], [1, 5, 6]
    names = ("a", "b", "c")
    expected = "process 0 of 3 has other values in 'b' than process 1 (2 of 3 tensors differ)"
    assert difference(names, [other, usual, usual]) == expected
    assert difference(names, [usual, other]).startswith("process 1 of 2 has other values in 'b' than process 0 (")
    several = difference(names, [usual, usual, other, [1, 2, 4], usual])
    assert several.startswith("process 2 of 5 has other values in 'b' than process 0 (2 of 3 tensors differ; ")
    assert several.endswith("; processes 3 differ as well)")
