"""Prefix and suffix are the network: outputs, gradients, batch statistics, modes; or there is a reason why not."""

import copy
import operator

import pytest
import timm
import torch
from torch import nn

from tests.small_models import WrittenNetwork, classifier, loss_of, noise, recipe_rules
from tlscale.models.classifier import Classifier, enable_gradient_checkpointing
from tlscale.models.freeze import freeze_parameters
from tlscale.models.heads import build_head
from tlscale.models.partition.partition import NoPartition, find_partition

# Name, pixels, what is frozen, what is kept of an image.
FAMILIES = [
    ("test_resnet", 32, r"(conv1|bn1|layer[12])\..*", ["backbone.layer2"]),
    ("resnet18", 32, r"(conv1|bn1|layer[123])\..*", ["backbone.layer3"]),
    ("vgg11_bn", 32, r"features\.([0-9]|1[0-9])\..*", ["backbone.features.21"]),
    ("inception_v3", 75, r"(Conv2d|Mixed_5|Mixed_6[ab]).*", ["backbone.Mixed_6b"]),
    (
        "densenet121",
        32,
        r"features\.(conv0|norm0|denseblock[12]|transition[12])\..*",
        ["backbone.features.transition2"],
    ),
    (
        "densenet121",
        32,
        r"features\.(conv0|norm0|denseblock1|transition1|denseblock2\.denselayer[1-2])\..*",
        ["backbone.features.transition1"] + [f"backbone.features.denseblock2.denselayer{n}" for n in (1, 2)],
    ),
    ("test_efficientnet", 32, r"(conv_stem|bn1|blocks\.[0-2])\..*", ["backbone.blocks.2"]),
    ("mobilenetv3_small_050", 32, r"(conv_stem|bn1|blocks\.[0-2])\..*", ["backbone.blocks.2"]),
    ("regnetx_002", 32, r"(stem|s[12])\..*", ["backbone.s2"]),
    ("test_convnext", 32, r"(stem|stages\.[01])\..*", ["backbone.stages.1"]),
    ("test_nfnet", 32, r"(stem|stages\.[01])\..*", ["backbone.stages.1"]),
    ("test_vit", 32, r"(cls_token|pos_embed|patch_embed\..*|blocks\.[0-2]\..*)", ["backbone.blocks.2"]),
    (
        "deit_tiny_distilled_patch16_224",
        32,
        r"(cls_token|dist_token|pos_embed|patch_embed\..*|blocks\.[0-5]\..*)",
        ["backbone.blocks.5"],
    ),
    ("swin_tiny_patch4_window7_224", 32, r"(patch_embed|layers\.[01])\..*", ["backbone.layers.1"]),
    ("mixer_s32_224", 32, r"(stem\..*|blocks\.[0-3]\..*)", ["backbone.blocks.3"]),
    ("test_maxvit", 32, r"(stem|stages\.[01])\..*", ["backbone.stages.1"]),
    ("eva02_tiny_patch14_224", 28, r"(cls_token|pos_embed|patch_embed\..*|blocks\.[0-5]\..*)", ["backbone.blocks.5"]),
    ("hrnet_w18_small", 32, r"(conv1|bn1|conv2|bn2|layer1|transition1)\..*", None),
]
HEAD = ({"linear": 8}, "relu", {"dropout": 0.3}, "linear")
RESNET = r"(conv1|bn1|layer[12])\..*"
VIT = r"(cls_token|pos_embed|patch_embed\..*|blocks\.[0-2]\..*)"


def codes_of(partition, images):
    with torch.no_grad():
        return [code.clone() for code in partition.prefix(images)]


def step(module, *inputs, seed=7):
    """Output and gradients of one step of training, with random numbers of its own."""
    torch.manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        logits = module(*inputs)
        nn.functional.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1]).backward()
    return logits.detach()


def assert_is_the_network(network, partition, images):
    """Outputs in both modes, gradients and buffers, bit by bit."""
    with torch.no_grad():
        assert torch.equal(partition.suffix.eval()(*codes_of(partition, images)), network.eval()(images))
    twin = copy.deepcopy(network).train()
    partition.suffix.train()
    logits, expected = step(partition.suffix, *codes_of(partition, images)), step(twin, images)
    assert torch.equal(logits, expected)
    params = dict(twin.named_parameters())
    for name, param in network.named_parameters():
        other = params[name].grad
        assert (param.grad is None) == (other is None), name
        assert param.grad is None or torch.equal(param.grad, other), name
    for (name, buffer), other in zip(network.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, other), name
    network.zero_grad()


def vgg(rule):
    """With a hundredth of the parameters behind the last map, which take half a minute."""
    backbone = timm.create_model("vgg11_bn", num_classes=0, mlp_ratio=0.01)
    freeze_parameters(backbone, recipe_rules([rule]))
    return Classifier(backbone, build_head(HEAD, in_features=4096, num_classes=5, seed=1)).train()


# -- timm's families ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "rule", "kept"), FAMILIES, ids=[f"{row[0]}-{len(row[2])}" for row in FAMILIES]
)
def test_a_family_frozen_in_the_middle(name, size, rule, kept):
    network = vgg(rule) if name == "vgg11_bn" else classifier(name, image_size=size, freeze=[rule], head=HEAD)
    partition = find_partition(network, noise(image_size=size))
    if kept is not None:
        assert [value.name for value in partition.values] == kept
    assert partition.prefix_flops > 0
    assert partition.suffix_flops > 0
    images = noise(seed=5, count=3, image_size=size)  # another number than it was found with
    codes = codes_of(partition, images)
    assert [tuple(code.shape[1:]) for code in codes] == [value.shape for value in partition.values]
    assert partition.num_bytes == sum(code[0].numel() * 4 for code in codes)
    assert_is_the_network(network, partition, images)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_mambaout", "densenet121"])
def test_all_frozen_keeps_the_features(name):
    network = classifier(name, freeze=[".*"], head=HEAD)
    partition = find_partition(network, noise())
    assert [value.name for value in partition.values] == ["backbone"]
    assert len(partition.values[0].shape) == 1
    assert_is_the_network(network, partition, noise(5))


@pytest.mark.parametrize(("name", "rule"), [("test_vit", VIT), ("test_convnext", r"(stem|stages\.[01])\..*")])
def test_stochastic_depth_draws_what_the_network_draws(name, rule):
    network = classifier(name, freeze=[rule], head=HEAD, drop_path_rate=0.5)
    partition = find_partition(network, noise())
    codes, images = codes_of(partition, noise(5, count=8)), noise(5, count=8)
    torch.manual_seed(3)
    first = partition.suffix.train()(*codes)
    assert not torch.equal(first, partition.suffix(*codes))
    torch.manual_seed(3)
    assert torch.equal(first, network(images))


def test_shapes_and_words():
    partition = find_partition(
        classifier("resnet18", image_size=64, freeze=[r"(conv1|bn1|layer[123])\..*"]), noise(0, 2, 3, 64)
    )
    assert [value.shape for value in partition.values] == [(256, 4, 4)]
    text = partition.describe()
    assert text.startswith("caches backbone.layer3 (256x4x4 float32): 16.0 KiB an image; 77% of the forward pass")
    partition = find_partition(classifier("test_vit", freeze=[VIT]), noise())
    assert [value.shape for value in partition.values] == [(5, 64)]


def test_class_tokens_are_made_for_as_many_images_as_there_are_codes():
    network = classifier("test_vit", freeze=[r"patch_embed\..*"])
    partition = find_partition(network, noise())
    assert [value.shape for value in partition.values] == [(4, 64)]
    for count in (1, 2, 7):
        images = noise(1, count)
        with torch.no_grad():
            assert torch.equal(partition.suffix.eval()(*codes_of(partition, images)), network.eval()(images))


@pytest.mark.parametrize(("name", "rule"), [("test_resnet", RESNET), ("test_vit", VIT)])
def test_training_on_codes_ends_in_the_same_weights(name, rule):
    plain = classifier(name, freeze=[rule], head=HEAD)
    network = copy.deepcopy(plain)
    partition = find_partition(network, noise())
    kept = [codes_of(partition, noise(number)) for number in range(2)]
    for module, inputs in ((plain.train(), [[noise(0)], [noise(1)]]), (partition.suffix.train(), kept)):
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        for epoch in range(2):
            for number, batch in enumerate(inputs):
                step(module, *(part.clone() for part in batch), seed=10 * epoch + number)
                optimizer.step()
                optimizer.zero_grad()
    for (key, one), other in zip(network.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(one, other), key


# -- prefix and suffix -----------------------------------------------------------------------------------------


def test_the_network_is_left_as_it_was():
    network = classifier(freeze=[RESNET], head=HEAD)
    network.backbone.layer4.eval()
    before = copy.deepcopy(network)
    names, state = set(vars(network)), torch.get_rng_state()
    find_partition(network, noise())
    assert set(vars(network)) == names
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in network.modules()] == [m.training for m in before.modules()]
    assert all(param.grad is None for param in network.parameters())
    for one, other in zip(network.state_dict().values(), before.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_the_suffix_has_every_trained_parameter_once():
    network = classifier("test_vit", freeze=[VIT])
    network.spare = nn.Linear(2, 2)  # trained, they say, and never used
    partition = find_partition(network, noise())
    trained = {id(param) for param in network.parameters() if param.requires_grad}
    of_suffix = [id(param) for param in partition.suffix.parameters() if param.requires_grad]
    assert len(of_suffix) == len(set(of_suffix))
    assert set(of_suffix) == trained
    assert not any(param.requires_grad for param in partition.prefix.parameters())
    assert len(list(partition.prefix.parameters())) < len(list(network.parameters())) - len(trained) + 1


def test_modes_are_the_networks():
    network = classifier(freeze=[RESNET], head=HEAD)
    partition = find_partition(network, noise())
    assert partition.suffix.training
    partition.suffix.eval()
    assert not find_partition(network, noise()).suffix.training
    partition.suffix.train()
    assert network.training
    assert network.head.training
    assert not network.backbone.layer1.training
    partition.suffix.eval()
    assert not any(module.training for module in network.modules())
    network.train()
    codes = codes_of(partition, noise())
    assert not torch.equal(partition.suffix(*codes), partition.suffix(*codes))  # dropout
    partition.prefix.train()
    assert not network.backbone.layer1.training
    partition.prefix.eval()
    assert network.backbone.layer4.training


def test_float64():
    network = classifier(freeze=[RESNET], head=HEAD).double()
    partition = find_partition(network, noise().double())
    assert partition.values[0].dtype == torch.float64
    assert_is_the_network(network, partition, noise(5).double())


def test_channels_last():
    network = classifier(freeze=[RESNET], head=HEAD).to(memory_format=torch.channels_last)
    images = noise().contiguous(memory_format=torch.channels_last)
    partition = find_partition(network, images)
    assert partition.values[0].channels_last
    assert_is_the_network(network, partition, images)
    assert not find_partition(classifier(freeze=[RESNET]), noise()).values[0].channels_last


def test_autocast_around_the_halves():
    network = classifier("test_vit", freeze=[VIT], head=HEAD)
    partition = find_partition(network, noise())
    partition.suffix.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(partition.suffix(*codes_of(partition, noise())), network(noise()))


def test_moving_the_suffix_moves_the_network():
    network = classifier(freeze=[RESNET])
    partition = find_partition(network, noise())
    partition.suffix.double()
    assert network.head[-1].weight.dtype == torch.float64
    assert partition.suffix.eval()(*(code.double() for code in codes_of(partition, noise()))).dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "rule", "layer"),
    [
        ("test_resnet", RESNET, "layer4.0.conv1"),
        ("test_vit", VIT, "blocks.4.mlp.fc1"),
        ("test_convnext", r"stem\..*", "stages.2.blocks.0.mlp.fc1"),  # the switch lies within what is one node
        ("test_convnext", r"(stem\..*|stages\.2\.blocks\.0\.norm\.weight)", "stages.2.blocks.0.mlp.fc1"),
    ],
)
def test_gradient_checkpointing_goes_on(name, rule, layer):
    network = classifier(name, freeze=[rule], head=HEAD)
    enable_gradient_checkpointing(network, in_chans=3, image_size=32)
    partition = find_partition(network, noise())
    assert_is_the_network(network, partition, noise(5))
    calls = []
    last = network.backbone.get_submodule(layer)
    last.register_forward_hook(lambda *_: calls.append(1))
    loss = loss_of(partition.suffix.train(), *codes_of(partition, noise()))
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2


# -- what is cheapest to keep -------------------------------------------------------------------------------------


class Parts(WrittenNetwork):
    """One whose frozen parts stay in eval mode."""

    def train(self, mode=True):
        super().train(mode)
        for part in self.children():
            if not any(param.requires_grad for param in part.parameters()) and any(True for _ in part.parameters()):
                part.eval()
        return self


def frozen(module):
    return module.requires_grad_(False)


def conv(channels=4, in_chans=3, stride=1):
    return nn.Conv2d(in_chans, channels, 3, stride=stride, padding=1)


def pooled(images):
    return images.mean((2, 3))


def kept_of(network, size=8):
    partition = find_partition(network, noise(image_size=size))
    assert_is_the_network(network, partition, noise(5, image_size=size))
    return [value.shape for value in partition.values], partition


def test_what_one_value_gives_is_not_kept_beside_it():
    def forward(self, x):
        x = self.stem(x)
        return pooled(self.top(torch.cat([x, x.relu() * 2], 1)))

    assert kept_of(Parts(forward, stem=frozen(conv()), top=conv(5, 8)))[0] == [(4, 8, 8)]


def test_the_same_value_computed_twice():
    def forward(self, x):
        x = self.stem(x)
        return pooled(self.top(x[:, :1].relu()) + self.other(x[:, :1].relu()))

    network = Parts(forward, stem=frozen(conv(8)), top=conv(5, 1), other=conv(5, 1))
    assert kept_of(network)[0] == [(1, 8, 8)] * 2


def test_pooling_comes_before_keeping():
    network = Parts(
        lambda self, x: pooled(self.top(self.stem(x))),
        stem=frozen(conv()),
        top=nn.Sequential(nn.MaxPool2d(2), conv(5, 4)),
    )
    shapes, partition = kept_of(network)
    assert shapes == [(4, 4, 4)]
    assert partition.values[0].name == "top.0"


def test_of_equal_sizes_the_latest_is_kept():
    network = Parts(
        lambda self, x: pooled(self.top(self.norm(self.stem(x)).relu())),
        stem=frozen(conv()),
        norm=frozen(nn.BatchNorm2d(4)),
        top=conv(5, 4),
    )
    assert kept_of(network)[1].values[0].name == "relu"


def test_an_image_beside_the_codes():
    def forward(self, x):
        return pooled(self.top(self.stem(x)) + self.skip(x))

    network = Parts(forward, stem=frozen(conv(stride=1)), top=conv(5, 4), skip=conv(5))
    assert kept_of(network)[0] == [(3, 8, 8), (4, 8, 8)]


@pytest.mark.parametrize(
    "in_place", [nn.ReLU(inplace=True), lambda x: x.relu_(), lambda x: operator.imul(x, 2), lambda x: x.mul_(2)]
)
def test_operations_in_place(in_place):
    def forward(self, x):
        x = self.stem(x)
        x += 1
        y = self.middle(x)
        in_place(x)
        return pooled(self.top(x) + self.top(x.abs()) + self.other(y))

    network = Parts(
        forward,
        stem=frozen(conv()),
        middle=frozen(conv(4, 4)),
        top=conv(5, 4),
        other=conv(5, 4),
        act=nn.ReLU(inplace=True),
    )
    if isinstance(in_place, nn.Module):
        in_place = network.act
    assert kept_of(network)[0] == [(4, 8, 8)] * 2


def test_a_code_that_the_trained_part_overwrites():
    def forward(self, x):
        x = self.stem(x)
        y = self.top(x.clone())
        x += y
        return pooled(x)

    network = Parts(forward, stem=frozen(conv()), top=conv(4, 4))
    assert kept_of(network)[0] == [(4, 8, 8)]


def test_rows_that_are_no_images_are_not_kept():
    def forward(self, x):
        batch, chans, height, width = x.shape
        x = self.stem(x)
        windows = x.reshape(batch * 4, chans, height // 2, width // 2)
        windows = self.norm(windows)
        return self.top(windows).reshape(batch, -1)

    network = Parts(forward, stem=frozen(conv(3)), norm=frozen(nn.BatchNorm2d(3)), top=conv(5))
    shapes, _ = kept_of(network)
    assert shapes == [(3, 8, 8)]


def test_state_of_the_trained_part_moves():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.top = frozen(conv()), conv(5, 4)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            if self.training:
                self.count.add_(1)
            return pooled(self.top(self.stem(x))) + self.count

    network = Counting()
    partition = find_partition(network, noise(image_size=8))
    assert network.count == 0
    assert_is_the_network(network, partition, noise(5, image_size=8))
    assert network.count == 1


# -- where there is none ------------------------------------------------------------------------------------------


def reason(network, size=8):
    state, modes = copy.deepcopy(network.state_dict()), [module.training for module in network.modules()]
    with pytest.raises(NoPartition) as caught:
        find_partition(network, noise(image_size=size))
    assert [module.training for module in network.modules()] == modes
    assert all(
        torch.equal(one, other) for one, other in zip(network.state_dict().values(), state.values(), strict=True)
    )
    assert caught.value.reason == str(caught.value)
    return caught.value.reason


def test_nothing_is_frozen():
    assert reason(classifier(), 32) == "nothing is frozen"


def test_the_image_itself_would_be_kept():
    assert "between the image and the trained part" in reason(classifier(freeze=[r"layer4\..*"]), 32)
    wide = Parts(lambda self, x: pooled(self.top(self.stem(x))), stem=frozen(nn.Conv2d(3, 4, 1)), top=conv(5, 4))
    find_partition(wide, noise(image_size=8))


def test_code_that_decides_by_values():
    network = Parts(
        lambda self, x: pooled(self.top(self.stem(x) if x.sum() > 0 else x)), stem=frozen(conv(3)), top=conv(5)
    )
    assert reason(network).startswith("the network cannot be traced: TraceError")


def test_images_that_depend_on_one_another():
    network = Parts(lambda self, x: pooled(self.top(self.stem(x) - x.mean())), stem=frozen(conv(3)), top=conv(5))
    assert "depends on the other images" in reason(network)


def test_frozen_batch_norm_in_training_is_not_frozen():
    network = Parts(
        lambda self, x: pooled(self.top(self.norm(self.stem(x)))),
        stem=frozen(conv()),
        norm=nn.BatchNorm2d(4),
        top=conv(5, 4),
    )
    frozen(network.norm)
    network.train = lambda mode=True: nn.Module.train(network, mode)
    partition = find_partition(network, noise(image_size=8))
    assert [value.name for value in partition.values] == ["stem"]


def test_random_numbers_in_evaluation():
    class Noisy(nn.Conv2d):
        def forward(self, x):
            x = super().forward(x)
            return x + torch.randn_like(x)

    network = Parts(lambda self, x: pooled(self.top(self.stem(x))), stem=frozen(Noisy(3, 4, 3)), top=conv(5, 4))
    assert reason(network) == "the frozen part gives other values for the same images"


def test_random_numbers_outside_of_the_graph():
    network = Parts(
        lambda self, x: pooled(self.top(self.stem(x) * torch.rand(()).item())), stem=frozen(conv()), top=conv(5, 4)
    )
    assert "draws random numbers" in reason(network)


def test_a_frozen_part_that_differs_between_the_modes():
    network = Parts(
        lambda self, x: pooled(self.top(self.stem(x) if self.training else self.stem(-x))),
        stem=frozen(conv()),
        top=conv(5, 4),
    )
    assert reason(network) == "the frozen part computes other values in training than in evaluation"


def test_hooks_of_what_is_looked_into():
    network = classifier(freeze=[RESNET])
    network.backbone.register_forward_hook(lambda *_: None)
    assert "'backbone', which is frozen in part, has hooks" in reason(network, 32)


class Counts(nn.Conv2d):
    """A convolution that is another one after a thousand calls."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 + self.calls // 1000)


class CountsInABuffer(nn.Conv2d):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 + self.calls // 1000)


class Remembers(nn.Conv2d):
    """A convolution that adds a little of what it gave before."""

    def forward(self, x):
        x = super().forward(x)
        x = x + 0.1 * getattr(self, "before", 0.0)
        self.before = x.mean(0).detach()
        return x


def count_in_the_open(self, x):
    self.calls = getattr(self, "calls", 0) + 1
    return pooled(self.top(self.stem(x) if self.calls < 1000 else self.stem(-x)))


@pytest.mark.parametrize(
    ("network", "why"),
    [
        (Parts(lambda self, x: pooled(self.top(self.stem(x))), stem=frozen(Counts(3, 4, 3)), top=conv(5, 4)), "calls"),
        (Parts(lambda self, x: pooled(self.top(self.stem(x))), stem=frozen(conv()), top=Counts(4, 5, 3)), "calls"),
        (Parts(count_in_the_open, stem=frozen(conv()), top=conv(5, 4)), "calls"),
        (
            Parts(
                lambda self, x: pooled(self.top(self.stem(x))), stem=frozen(CountsInABuffer(3, 4, 3)), top=conv(5, 4)
            ),
            "buffer",
        ),
        (
            Parts(lambda self, x: pooled(self.top(self.stem(x))), stem=frozen(conv()), top=Remembers(4, 5, 3)),
            "other values",
        ),
    ],
    ids=["frozen", "trained", "in the open", "buffer", "tensor"],
)
def test_a_network_that_counts_its_calls(network, why):
    """However late it makes a difference."""
    found = reason(network.train())
    assert found.startswith("the network is not the same from call to call: ")
    assert why in found


class BySize(nn.Conv2d):
    """A convolution whose result is by the size of the batch."""

    def forward(self, x):
        return super().forward(x) / len(x)


def by_size_in_the_open(self, x):
    return pooled(self.top(self.stem(x) / x.shape[0]))


@pytest.mark.parametrize(
    "network",
    [
        Parts(lambda self, x: pooled(self.top(self.stem(x))), stem=frozen(BySize(3, 4, 3)), top=conv(5, 4)),
        Parts(by_size_in_the_open, stem=frozen(conv()), top=conv(5, 4)),
    ],
    ids=["frozen", "in the open"],
)
def test_a_frozen_part_that_computes_with_the_batch_size(network):
    network.register_module("pool", nn.AdaptiveAvgPool2d(2))
    found = reason(network.train())
    assert found == "what the frozen part gives for an image depends on the size of the batch"


def test_a_trained_part_that_computes_with_the_batch_size_is_kept_as_it_is():
    network = Parts(lambda self, x: pooled(self.top(self.stem(x))), stem=frozen(conv()), top=BySize(4, 5, 3))
    assert kept_of(network)[0] == [(4, 8, 8)]


def test_what_the_halves_get_wrong_is_found_out():
    """The size of the batch, rounded up: 1 for two images as for three, and so taken for a constant."""

    def forward(self, x):
        return pooled(self.top(self.stem(x))) * ((x.shape[0] + 6) // 7)

    network = Parts(forward, stem=frozen(conv()), top=conv(5, 4))
    assert reason(network) == "prefix and suffix do not give what the whole network gives in evaluation"


def test_counters_are_left_as_they_were():
    network = Parts(lambda self, x: pooled(self.top(self.stem(x))), stem=frozen(Counts(3, 4, 3)), top=conv(5, 4))
    network.stem.calls = 7
    reason(network.train())
    assert network.stem.calls == 7
