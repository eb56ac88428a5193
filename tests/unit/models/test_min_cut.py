"""The cut is the cheapest that there is: compared with all others, on networks made up at random."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.small_models import noise
from tlscale.models.partition.min_cut import analyse, goals, minimum_cut, with_inputs
from tlscale.models.partition.partition import NoPartition, find_partition
from tlscale.models.partition.tracing import is_heavy

SIZE = 4


def steps_of(*more):
    """What is done, to which earlier values, how many channels come of it."""
    kinds = st.sampled_from(["frozen", "frozen", "trained", "relu", "join", "half", "pool", "norm", *more])
    return st.lists(st.tuples(kinds, st.integers(0, 20), st.integers(0, 20), st.integers(1, 6)), min_size=2, max_size=7)


class Random(nn.Module):
    """A network of the given steps, whose result depends on all that is trained in it."""

    def __init__(self, steps):
        super().__init__()
        torch.manual_seed(0)
        self.steps, self.parts = [], nn.ModuleList()
        channels = [3]
        for kind, first, second, width in [*steps, ("trained", len(steps), 0, 2)]:
            first, second = first % len(channels), second % len(channels)
            self.parts.append(self.part(kind, channels[first], width))
            half = max(channels[first] // 2, 1)
            self.steps.append((kind, first, second, half))
            channels.append(
                {
                    "frozen": width,
                    "trained": width,
                    "join": channels[first] + channels[second],
                    "half": half,
                }.get(kind, channels[first])
            )
        self.train()

    @staticmethod
    def part(kind, channels, width):
        if kind in ("frozen", "trained"):
            return nn.Conv2d(channels, width, 3, padding=1).requires_grad_(kind == "trained")
        if kind == "norm":
            return nn.BatchNorm2d(channels).requires_grad_(False)
        return nn.ReLU(inplace=True) if kind == "relu_" else nn.Identity()

    def train(self, mode=True):
        super().train(mode)
        for part in self.parts:
            if isinstance(part, nn.BatchNorm2d):
                part.eval()
        return self

    def forward(self, images):
        values, results = [images], []
        for part, (kind, first, second, half) in zip(self.parts, self.steps, strict=True):
            values.append(self.step(part, kind, values[first], values[second], half))
            if kind == "trained":
                results.append(values[-1].mean((1, 2, 3)))
        return torch.stack(results, 1)

    @staticmethod
    def step(part, kind, x, y, half):
        if kind == "join":
            return torch.cat([x, y], 1)
        if kind == "half":
            return x[:, :half] * 2
        if kind == "pool":
            return nn.functional.max_pool2d(x, 3, 1, 1)
        return x.relu() if kind == "relu" else part(x)


def cheapest_by_trying(analysis, network):
    """Fewest bytes an image over all sets of values from which the rest can be had without a heavy operation."""
    steady = [node for node in analysis.graph.nodes if node in analysis.steady and not is_constant(analysis, node)]
    needed = set(with_inputs(goals(analysis, network)))
    wanted = [node for node in steady if any(user in needed and user not in analysis.steady for user in node.users)]
    can_keep = [node for node in steady if analysis.info[node].num_bytes]

    def reaches_all(kept):
        had = set(kept)
        for node in steady:
            inputs = [i for i in node.all_input_nodes if not is_constant(analysis, i)]
            if node.op != "placeholder" and not is_heavy(node, network) and had.issuperset(inputs):
                had.add(node)
        return had.issuperset(wanted)

    sizes = [
        sum(analysis.info[node].num_bytes for node in kept)
        for count in range(len(can_keep) + 1)
        for kept in combinations(can_keep, count)
        if reaches_all(kept)
    ]
    return min(sizes)


def is_constant(analysis, node):
    return node.op != "placeholder" and (
        analysis.info[node].is_known or all(is_constant(analysis, i) for i in node.all_input_nodes)
    )


def partition_of(network):
    """The partition, or None where it is rightly refused."""
    try:
        return find_partition(network, noise(image_size=SIZE))
    except NoPartition as none:
        if none.reason.startswith(("nothing is frozen", "nothing that is frozen and costs time")):
            return None
        raise


def assert_is_the_network(network, partition):
    images = noise(9, 3, image_size=SIZE)
    with torch.no_grad():
        codes = [code.clone() for code in partition.prefix(images.clone())]
        assert torch.equal(partition.suffix.eval()(*codes), network.eval()(images))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(steps=steps_of())
def test_no_other_cut_is_cheaper_and_prefix_and_suffix_are_the_network(steps):
    network = Random(steps)
    partition = partition_of(network)
    if partition is not None:
        with torch.no_grad():
            analysis = analyse(network.train(), noise(image_size=SIZE))
        assert partition.num_bytes == cheapest_by_trying(analysis, network)
        assert_is_the_network(network, partition)


@settings(max_examples=40, deadline=None)
@given(steps=steps_of("relu_", "relu_"))
def test_values_overwritten_at_random_are_right_or_refused(steps):
    network = Random(steps)
    try:
        partition = partition_of(network)
    except NoPartition as none:
        assert "not one row an image, or is overwritten" in none.reason or "do not give what the whole" in none.reason  # noqa: PT017
        return
    if partition is not None:
        assert_is_the_network(network, partition)


def test_sizes_are_measured():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.top = nn.Conv2d(3, 4, 1).requires_grad_(False), nn.Conv2d(4, 2, 1)

        def forward(self, images):
            batch, _, height, width = images.shape
            maps = self.stem(images)
            again = maps.reshape(batch * 2, 2, height, width).reshape(batch, 4, height, width)
            return self.top(again)

    network = Rows()
    with torch.no_grad():
        analysis = analyse(network, noise(image_size=SIZE))
    info = {node.name: of_node for node, of_node in analysis.info.items()}
    assert info["getitem"].counts_images
    assert info["getitem"].plain == 1
    assert info["mul"].plain == 2
    assert (info["getitem_2"].plain, info["getitem_2"].counts_images) == (SIZE, False)
    assert not info["getattr_1"].is_known
    assert info["reshape"].num_bytes is None
    assert info["reshape_1"].num_bytes == 4 * SIZE * SIZE * 4
    assert [node.name for node in minimum_cut(analysis, network)] == ["reshape_1"]


def test_what_crosses_and_has_no_rows():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.top = nn.Conv2d(3, 4, 1).requires_grad_(False), nn.Linear(16, 2)
            self.deep = nn.Linear(16, 16).requires_grad_(False)

        def forward(self, images):
            rows = self.deep(self.stem(images).reshape(-1, 16))  # four of each image
            return self.top(rows)

    network = Mixed()
    with torch.no_grad():
        analysis = analyse(network, noise(image_size=SIZE))
    with pytest.raises(NoPartition, match="not one row an image"):
        minimum_cut(analysis, network)
