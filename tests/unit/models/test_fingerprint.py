"""Equal digests are equal functions of the images: what must change one, and what must not."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.small_models import classifier, noise, train
from tlscale.models.classic import networks, staged
from tlscale.models.partition.fingerprint import digest_name
from tlscale.models.partition.partition import find_partition

RESNET = r"(conv1|bn1|layer[12])\..*"
VIT = r"(cls_token|pos_embed|patch_embed\..*|blocks\.[0-2]\..*)"
# Frozen in part within blocks, so that functions and constants are in the prefix, too.
DEEP = r"(conv1|bn1|layer1|layer2\.0\.(conv|bn)1)\..*"


def digest(network, **noise_keys):
    return find_partition(network, noise(**noise_keys)).digest


def network(name="test_resnet", rule=RESNET, **keys):
    return classifier(name, freeze=[rule], **keys)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rule"), [("test_resnet", RESNET), ("test_resnet", DEEP), ("test_vit", VIT)])
def test_the_same_function_has_the_same_digest(name, rule):
    one = network(name, rule)
    expected = digest(one)
    assert digest(one.eval()) == expected
    assert digest(one, seed=3, count=2) == expected
    assert digest(copy.deepcopy(one)) == expected
    assert digest(network(name, rule)) == expected
    assert (
        digest(network(name, rule, num_classes=9, head=({"linear": 7}, "gelu", {"dropout": 0.1}, "linear"))) == expected
    )
    train(one, steps=1)
    assert digest(one) == expected


def test_our_classes_keep_the_names_under_which_codes_were_first_cached():
    names = [digest_name(kind) for kind in (networks.MaxPool, networks.AlexNet, staged.StagedNet, nn.ReLU)]
    assert names[:2] == ["tlscale.model.classic.MaxPool", "tlscale.model.classic.AlexNet"]
    assert names[2:] == ["tlscale.model.staged.StagedNet", "torch.nn.modules.activation.ReLU"]


def test_memory_order_and_checkpointing_are_no_other_function():
    one = network("test_vit", VIT)
    expected = digest(one)
    one.backbone.set_grad_checkpointing(True)
    assert digest(one) == expected


def test_another_function_has_another_digest():
    found = [digest(network()), digest(network(seed=1)), digest(network(rule=DEEP)), digest(network(rule=".*"))]
    found += [digest(network("test_vit", VIT)), digest(network("test_vit", VIT.replace("[0-2]", "[0-3]")))]
    found.append(digest(network(in_chans=1), in_chans=1))
    assert len(set(found)) == len(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda part: next(part.conv1.parameters()).data[0, 0].mul_(1.0001),
        lambda part: part.bn1.running_mean.add_(1e-3),
        lambda part: part.bn1.num_batches_tracked.add_(1),
        lambda part: setattr(part.bn1, "eps", 1e-4),
        lambda part: setattr(part, "act1", nn.GELU()),
        lambda part: part.layer1[0].bn1.weight.data.mul_(1.0001),
        lambda part: setattr(part.layer1[0], "act2", nn.Identity()),
    ],
)
@pytest.mark.parametrize("rule", [RESNET, DEEP])
def test_each_tensor_and_setting_of_the_prefix_counts(change, rule):
    one = network(rule=rule)
    before = digest(one)
    change(one.backbone)
    assert digest(one) != before


def test_tensors_behind_the_partition_do_not_count():
    one = network()
    before = digest(one)
    one.backbone.layer4[0].conv1.weight.data.mul_(2)
    one.backbone.layer3[0].bn1.eps = 1.0
    assert digest(one) == before


class Scaled(nn.Module):
    def __init__(self, scale, function=torch.relu):
        super().__init__()
        self.stem, self.top = nn.Conv2d(3, 4, 3).requires_grad_(False), nn.Conv2d(4, 5, 3)
        nn.init.constant_(self.stem.weight, 0.1)
        nn.init.constant_(self.stem.bias, 0.1)
        self.scale, self.function = scale, function

    def forward(self, images):
        return self.top(
            self.function(self.stem(images) * self.scale)
            .amax(3, keepdim=True)
            .amax(2, keepdim=True)
            .expand(-1, -1, 3, 3)
        )


def test_constants_and_functions_of_the_graph_count():
    found = [
        digest(Scaled(*keys))
        for keys in ((1.0,), (2.0,), (2.0, torch.tanh), (torch.tensor(3.0),), (torch.tensor(4.0),))
    ]
    assert len(set(found)) == len(found)


@pytest.mark.slow
def test_another_process_finds_the_same_digest():
    root = Path(__file__).parents[3]
    code = (
        "from tests.unit.models.test_fingerprint import *\n"
        "print(digest(network()), digest(network(rule=DEEP)), digest(network('test_vit', VIT)))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == [digest(network()), digest(network(rule=DEEP)), digest(network("test_vit", VIT))]
