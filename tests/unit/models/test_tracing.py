"""What is told of a call without running it, and which modules are one call."""

import operator

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, BlurPool2d, DropPath, PatchDropout, SelectAdaptivePool2d
from torch import nn

from tests.small_models import WrittenNetwork, classifier
from tlscale.models.partition.tracing import (
    RECOMPUTED,
    NoPartition,
    is_heavy,
    is_steady,
    overwritten,
    reads_training,
    trace,
)


class Parts(WrittenNetwork):
    """One that is looked into, and has a trained and a frozen parameter of its own."""

    def __init__(self, forward, **parts):
        super().__init__(forward, **parts)
        self.own = nn.Parameter(torch.zeros(4))  # so that the network is looked into
        self.still = nn.Parameter(torch.zeros(4), requires_grad=False)


class Masked(nn.Module):
    def forward(self, images, mask=None):
        return images


def last_call(forward, **parts):
    """The node of the last operation, and its network."""
    network = Parts(forward, **parts)
    graph = trace(network)
    return list(graph.nodes)[-2], network


def targets(network):
    return [str(node.target) for node in trace(network).nodes if node.op == "call_module"]


# -- what is steady -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "steady_in_training"),
    [
        (nn.ReLU(), True),
        (nn.AvgPool2d(2), True),
        (nn.AdaptiveAvgPool2d(1), True),
        (nn.Identity(), True),
        (nn.Flatten(), True),
        (BlurPool2d(4), True),
        (nn.RReLU(), False),
        (nn.Dropout(0.1), False),
        (nn.Dropout(0.0), True),
        (DropPath(0.1), False),
        (DropPath(0.0), True),
        (PatchDropout(0.5), False),
        (nn.Conv2d(3, 4, 1).requires_grad_(False), True),
        (nn.LayerNorm(4).requires_grad_(False), True),
        (nn.BatchNorm2d(4).requires_grad_(False), False),
        (nn.BatchNorm2d(4, affine=False), False),
        (BatchNormAct2d(4).requires_grad_(False), False),
        (nn.InstanceNorm2d(4, track_running_stats=True), False),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.1)).requires_grad_(False), False),
    ],
    ids=str,
)
def test_modules_are_steady_in_eval_and_some_in_training(module, steady_in_training):
    node, network = last_call(lambda self, x: self.part(x), part=module)
    assert is_steady(node, network.eval())
    assert is_steady(node, network.train()) is steady_in_training


def test_what_is_trained_or_always_random_is_never_steady():
    for module in (nn.Conv2d(3, 4, 1), nn.LayerNorm(4), nn.FractionalMaxPool2d(2, output_size=2)):
        node, network = last_call(lambda self, x: self.part(x), part=module)
        assert not is_steady(node, network.eval())


@pytest.mark.parametrize(
    ("forward", "steady"),
    [
        (lambda self, x: F.dropout(x, 0.5), False),
        (lambda self, x: F.dropout(x, 0.5, False), True),
        (lambda self, x: F.dropout(x, training=self.training), False),
        (lambda self, x: torch.dropout(x, 0.5, train=False), True),
        (lambda self, x: torch.dropout(x, 0.5, train=True), False),
        (lambda self, x: F.rrelu(x), True),  # not in training unless told so
        (lambda self, x: F.batch_norm(x, None, None, training=True), False),
        (lambda self, x: F.batch_norm(x, self.still, self.still), True),
        (lambda self, x: F.scaled_dot_product_attention(x, x, x), True),
        (lambda self, x: F.scaled_dot_product_attention(x, x, x, None, 0.1), False),
        (lambda self, x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1), False),
        (lambda self, x: torch.rand_like(x), False),
        (lambda self, x: torch.bernoulli(x), False),
        (lambda self, x: x.bernoulli_(0.5), False),
        (lambda self, x: x.normal_(), False),
        (lambda self, x: x.random_(), False),
        (lambda self, x: x.expand(2, -1), True),
        (lambda self, x: F.normalize(x), True),
        (lambda self, x: x.uniform_(), False),
        (lambda self, x: self.own.relu(), True),
        (lambda self, x: x + 1, True),
    ],
)
def test_functions_are_steady_unless_they_draw(forward, steady):
    node, network = last_call(forward)
    assert is_steady(node, network) is steady


def test_attributes_are_steady_unless_trained():
    network = Parts(lambda self, x: x * self.own + self.still)
    found = {node.target: is_steady(node, network) for node in trace(network).nodes if node.op == "get_attr"}
    assert found == {"own": False, "still": True}


def test_reading_training():
    class Child(nn.Dropout):
        pass

    class Inner(nn.Module):
        def forward(self, x):
            return [F.dropout(part, 0.5, self.training) for part in x]

    class Sets(nn.Module):
        def train(self, mode=True):
            self.training = mode
            return self

    assert reads_training(Child)
    assert reads_training(Inner)
    assert reads_training(nn.BatchNorm2d)
    assert reads_training(torch.jit.ScriptModule)
    assert not reads_training(Sets)
    assert not reads_training(nn.Conv2d)


# -- what is heavy, what works in place ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forward", "heavy"),
    [
        (lambda self, x: F.linear(x, self.own), True),
        (lambda self, x: F.conv2d(x, self.own), True),
        (lambda self, x: x @ x, True),
        (lambda self, x: torch.einsum("ij,jk->ik", x, x), True),
        (lambda self, x: torch.bmm(x, x), True),
        (lambda self, x: x.matmul(x), True),
        (lambda self, x: F.scaled_dot_product_attention(x, x, x), True),
        (lambda self, x: self.linear(x), True),
        (lambda self, x: self.norm(x), False),
        (lambda self, x: self.pool(x), False),
        (lambda self, x: F.layer_norm(x, (4,)), False),
        (lambda self, x: F.adaptive_avg_pool2d(x, 1), False),
        (lambda self, x: torch.cat([x, x]), False),
        (lambda self, x: x.mean((2, 3)), False),
        (lambda self, x: x.contiguous(), False),
        (lambda self, x: x.permute(0, 1), False),
    ],
)
def test_heavy_is_what_has_a_matrix_in_it(forward, heavy):
    node, network = last_call(forward, linear=nn.Linear(4, 4), norm=nn.BatchNorm2d(4), pool=nn.MaxPool2d(2))
    assert is_heavy(node, network) is heavy


@pytest.mark.parametrize(
    ("forward", "in_place"),
    [
        (lambda self, x: operator.iadd(x, 1), True),
        (lambda self, x: operator.imul(x, 2), True),
        (lambda self, x: x.add_(1), True),
        (lambda self, x: torch.relu_(x), True),
        (lambda self, x: F.relu(x, inplace=True), True),
        (lambda self, x: F.relu(x, True), True),
        (lambda self, x: self.act(x), True),
        (lambda self, x: self.pure(x), False),
        (lambda self, x: F.relu(x), False),
        (lambda self, x: x + 1, False),
        (lambda self, x: x.abs(), False),
        (lambda self, x: x.__abs__(), False),
        (lambda self, x: operator.invert(x), False),
    ],
)
def test_writing_onto_an_input(forward, in_place):
    node, network = last_call(forward, act=nn.SiLU(inplace=True), pure=nn.SiLU())
    expected = next(iter(trace(network).nodes)).name if in_place else None
    assert (overwritten(node, network).name if overwritten(node, network) else None) == expected


def test_plus_equals_stays_in_place():
    def forward(self, x):
        x = x.abs()
        y = x
        x += 1
        return y * self.own

    network = Parts(forward)
    graph = torch.fx.GraphModule(network, trace(network))
    images = torch.randn(2, 4)
    network.own.data.fill_(1)
    assert torch.equal(graph(images), images.abs() + 1)


# -- what is one node ---------------------------------------------------------------------------------------------


def test_only_what_is_frozen_in_part_is_looked_into():
    network = classifier(freeze=[r"(conv1|bn1|layer1|layer2\.0\.conv1)\..*"])
    nodes = targets(network)
    assert {"backbone.conv1", "backbone.bn1", "backbone.layer1", "backbone.layer2.0.conv1", "head.0"} <= set(nodes)
    assert "backbone.layer2.0.conv2" in nodes
    assert not any(name.startswith("backbone.layer1.") for name in nodes)
    assert [name for name in nodes if name.startswith("backbone.layer3")] == ["backbone.layer3.0"]


def test_a_trained_sequence_is_looked_into_unless_it_has_hooks():
    part = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(3, 4, 1))
    assert targets(Parts(lambda self, x: self.part(x) + self.still, part=part)) == ["part.0", "part.1"]
    part.register_forward_hook(lambda *_: None)
    assert targets(Parts(lambda self, x: self.part(x) + self.still, part=part)) == ["part"]


def test_modules_without_parameters_are_looked_into():
    assert targets(Parts(lambda self, x: self.part(x), part=SelectAdaptivePool2d())) == ["part.pool", "part.flatten"]


def test_timms_own_leaves_are_kept_whole():
    part = BatchNormAct2d(4)
    part.weight.requires_grad_(False)
    assert targets(Parts(lambda self, x: self.part(x), part=part)) == ["part"]


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_gradient_checkpointing_is_marked_not_lost(name):
    network = classifier(name, freeze=[r"(conv1|patch_embed)\..*"])
    assert not any(node.meta[RECOMPUTED] for node in trace(network).nodes)
    network.backbone.set_grad_checkpointing(True)
    marked = [str(node.target) for node in trace(network).nodes if node.meta[RECOMPUTED]]
    blocks = (
        network.backbone.blocks
        if name == "test_vit"
        else [b for n in "1234" for b in getattr(network.backbone, f"layer{n}")]
    )
    assert len(marked) == len(blocks)
    assert torch.utils.checkpoint.checkpoint.__name__ == "checkpoint"


def test_buffers_are_read_anew_in_each_call():
    network = Parts(lambda self, x: x + self.count * 2)
    network.register_buffer("count", torch.ones(4))
    graph = torch.fx.GraphModule(network, trace(network))
    network.count.fill_(5)
    assert torch.equal(graph(torch.zeros(4)), torch.full((4,), 10.0))


# -- what cannot be traced ----------------------------------------------------------------------------------------


def test_reasons():
    with pytest.raises(NoPartition, match="cannot be traced: TraceError: symbolically traced variables cannot be used"):
        trace(Parts(lambda self, x: x if x.sum() > 0 else -x))
    with pytest.raises(NoPartition, match="draws random numbers"):
        trace(Parts(lambda self, x: x * torch.rand(4)))
    with pytest.raises(NoPartition, match="Masked takes more than images"):
        trace(Masked())
    network = Parts(lambda self, x: x * self.own)
    network.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(NoPartition, match="'Parts', which is frozen in part, has hooks"):
        trace(network)


def test_the_checkpoint_function_is_given_back_after_a_failure():
    before = torch.utils.checkpoint.checkpoint
    with pytest.raises(NoPartition):
        trace(Parts(lambda self, x: self.nothing(x)))
    assert torch.utils.checkpoint.checkpoint is before


def test_assertions_on_shapes_are_left_out():
    network = classifier("test_vit", freeze=[r"patch_embed\.proj\.weight"])
    assert isinstance(network.backbone, timm.models.VisionTransformer)
    assert not any("assert" in str(node.target) for node in trace(network).nodes)
