"""Frozen means: no gradient, norm layers and dropout in eval mode, and nothing of it moved by training."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.small_models import classifier, noise, recipe_rules, section, state_of, train
from tlscale.errors import ModelError, RecipeError
from tlscale.models.backbone import build_backbone
from tlscale.models.freeze import check_trainable, freeze_parameters, frozen_modules, is_norm

# For each family: a rule that freezes its first half, and what of it must stay in eval mode.
HALVES = {
    "test_resnet": r"(conv1|bn1|layer[12])\..*",
    "test_vit": r"(cls_token|pos_embed|patch_embed\..*|blocks\.[0-2]\..*)",
    "test_efficientnet": r"(conv_stem|bn1|blocks\.[0-2])\..*",
    "test_convnext": r"(stem|stages\.[01])\..*",
    "test_byobnet": r"(stem|stages\.[01])\..*",
    "test_nfnet": r"(stem|stages\.[01])\..*",
    "resnet10t": r"(conv1|bn1|layer[12])\..*",
}


def backbone(name="test_resnet"):
    return build_backbone(section(name), image_size=32, seed=0)[0]


def freeze(network, *rules):
    return freeze_parameters(network, recipe_rules(list(rules)))


def frozen_names(network):
    return {name for name, param in network.named_parameters() if not param.requires_grad}


# -- rules --------------------------------------------------------------------------------------------------------


def test_rules_match_whole_names():
    network = backbone()
    with pytest.raises(RecipeError, match=r"freeze: the rule 'bn1' matches no whole .* Write 'bn1\.\*'"):
        freeze(network, "bn1")
    freeze(network, r"bn1\..*")
    assert frozen_names(network) == {"bn1.weight", "bn1.bias"}  # and not those of layer1.0.bn1


NAMES = sorted(name for name, _ in backbone().named_parameters())
PIECES = st.lists(st.sampled_from(NAMES), min_size=1, max_size=8, unique=True)


@settings(max_examples=40, deadline=None)
@given(rules=st.lists(st.tuples(PIECES, st.booleans()), min_size=1, max_size=4))
def test_the_first_rule_that_matches_decides(rules):
    taken, expected = set(), {}
    for names, value in rules:
        for name in names:
            expected.setdefault(name, value)
    plain = []
    for names, value in rules:
        if set(names) <= taken:
            continue  # would be an error: it never acts
        plain.append({"|".join(map(re.escape, names)): value})
        taken |= set(names)
    network = backbone()
    rows = freeze(network, *plain)
    assert frozen_names(network) == {name for name, value in expected.items() if value}
    assert sum(row.num_tensors for row in rows) == len(NAMES)
    assert sum(row.num_params for row in rows) == sum(param.numel() for param in network.parameters())


def test_all_but_what_an_earlier_rule_keeps():
    network = backbone()
    rows = freeze(network, {r"layer4\..*": False}, ".*")
    assert frozen_names(network) == {name for name in NAMES if not name.startswith("layer4.")}
    assert [row.rule for row in rows] == [r"layer4\..*  (train)", ".*"]
    other = backbone()
    with pytest.raises(RecipeError, match="never acts: all"):
        freeze(other, ".*", {r"layer4\..*": False})
    assert frozen_names(other) == set()


def test_a_rule_that_matches_nothing_names_near_ones():
    network = backbone()
    with pytest.raises(RecipeError) as caught:
        freeze(network, r"layr3\..*")
    text = str(caught.value)
    assert "freeze: the rule 'layr3\\..*' matches no parameter" in text
    assert "Did you mean 'layer3'" in text
    assert "The top-level names are: bn1, conv1, layer1, layer2, layer3, layer4" in text
    assert frozen_names(network) == set()


def test_nothing_left_to_train():
    network, rules = backbone(), recipe_rules([".*"])
    freeze_parameters(network, rules)
    with pytest.raises(ModelError, match=r"freeze: the rules '\.\*' leave nothing to train"):
        check_trainable(network.parameters(), rules)
    check_trainable([*network.parameters(), nn.Parameter(torch.zeros(1))], rules)


def test_the_head_is_never_matched():
    network = classifier(freeze=[".*"])
    assert all(param.requires_grad for param in network.head.parameters())
    assert not any(param.requires_grad for param in network.backbone.parameters())


# -- the table ----------------------------------------------------------------------------------------------------


def test_rows_count_what_each_rule_took():
    network = backbone()
    rows = freeze(network, r"layer1\..*bn1\.weight", r"layer[12]\..*")
    assert [row.rule for row in rows] == [r"layer1\..*bn1\.weight", r"layer[12]\..*", "no rule  (train)"]
    params = dict(network.named_parameters())
    for row, names in zip(
        rows,
        (
            [name for name in NAMES if re.fullmatch(r"layer1\..*bn1\.weight", name)],
            [name for name in NAMES if re.match(r"layer[12]\.", name) and not re.match(r"layer1.*bn1\.weight", name)],
            [name for name in NAMES if not re.match(r"layer[12]\.", name)],
        ),
        strict=True,
    ):
        assert row.num_tensors == len(names)
        assert row.num_params == sum(params[name].numel() for name in names)


@pytest.mark.parametrize(
    ("rules", "modes"),
    [
        ((r"layer1\..*",), ["eval", "train"]),
        ((r"layer1\..*conv\d\.weight",), ["no norm", "train"]),
        ((r"layer1\.0\.bn1\.bias",), ["train", "train"]),
        ((r"layer1\.0\.bn1\.weight", r"layer1\.0\.bn[12]\.bias"), ["eval", "eval 1/2", "train"]),
        ((".*",), ["eval"]),
    ],
)
def test_norm_mode_says_what_the_norm_layers_do(rules, modes):
    network = backbone()
    assert [row.norm_mode for row in freeze(network, *rules)] == modes


@pytest.mark.parametrize("name", HALVES)
def test_every_norm_layer_of_torch_and_timm_is_known(name):
    network = backbone(name)
    for module in network.modules():
        batch_norm = isinstance(module, nn.modules.batchnorm._NormBase)
        if batch_norm or isinstance(module, nn.LayerNorm | nn.GroupNorm):
            assert is_norm(module)
    assert not any(is_norm(module) for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear))


# -- modes --------------------------------------------------------------------------------------------------------


def modes_of(network):
    """Training mode of each norm, dropout and stochastic depth, by name."""
    wanted = ("Norm", "Drop")
    return {
        name: module.training
        for name, module in network.backbone.named_modules()
        if any(part in type(module).__name__ for part in wanted)
    }


@pytest.mark.parametrize("name", HALVES)
def test_frozen_parts_stay_in_eval_the_rest_trains(name):
    network = classifier(name, freeze=[HALVES[name]], drop_path_rate=0.2)
    for _ in range(2):
        modes = modes_of(network)
        frozen = {part for part in modes if re.fullmatch(HALVES[name], f"{part}.weight")}
        assert any("Drop" in type(network.backbone.get_submodule(part)).__name__ for part in frozen)
        assert frozen
        assert len(frozen) < len(modes)
        for part, training in modes.items():
            assert training is (part not in frozen), part
        assert network.training
        assert network.head.training
        network.eval()
        assert not any(modes_of(network).values())
        assert not network.head.training
        network.train()


def test_train_false_is_eval_and_train_gives_the_network_back():
    network = classifier(freeze=[HALVES["test_resnet"]])
    assert network.train(False) is network
    assert not any(module.training for module in network.modules())
    assert network.train() is network
    assert network.backbone.layer4.training
    assert not network.backbone.layer1.training


def test_a_norm_layer_that_is_frozen_in_part_trains():
    network = classifier(freeze=[r"bn1\.bias"])
    assert network.backbone.bn1.training
    network = classifier(freeze=[r"bn1\..*"])
    assert not network.backbone.bn1.training


def test_all_frozen_is_one_module_in_eval():
    network = classifier(freeze=[".*"])
    assert frozen_modules(network.backbone) == [network.backbone]
    assert not any(module.training for module in network.backbone.modules())
    assert network.head.training


def test_nothing_frozen_is_no_module():
    network = classifier()
    assert frozen_modules(network.backbone) == []
    assert all(module.training for module in network.modules())


def test_dropout_of_a_frozen_backbone_does_nothing():
    network = classifier("test_resnet", freeze=[".*"], drop_path_rate=0.5, drop_rate=0.5)
    assert torch.equal(network(noise()), network(noise()))
    free = classifier("test_resnet", drop_path_rate=0.5, drop_rate=0.5)
    assert not torch.equal(free(noise()), free(noise()))


# -- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HALVES)
def test_training_moves_nothing_that_is_frozen_and_all_that_is_not(name):
    network = classifier(name, freeze=[HALVES[name]], drop_path_rate=0.1)
    before = state_of(network)
    train(network, lr=0.5)
    after = network.state_dict()
    still = re.compile(HALVES[name])

    def is_frozen(key):
        own = key.removeprefix("backbone.")
        # A buffer belongs to what its module's parameters belong to.
        return key.startswith("backbone.") and bool(
            still.fullmatch(own) or still.fullmatch(own.rpartition(".")[0] + ".weight")
        )

    frozen = [key for key in before if is_frozen(key)]
    moving = [key for key in before if not is_frozen(key)]
    assert frozen
    assert moving
    for key in frozen:
        assert torch.equal(after[key], before[key]), f"{key} is frozen and moved"
    unmoved = [key for key in moving if torch.equal(after[key], before[key])]
    # A bias before softmax attention, or a gain of an unused branch, may have no gradient; whole layers may not.
    assert len(unmoved) <= len(moving) // 10, unmoved
    if name != "test_nfnet" and any("running_mean" in key for key in before):
        assert any("running_mean" in key for key in frozen)
        assert all(not torch.equal(after[key], before[key]) for key in moving if "running_" in key)


def test_frozen_parameters_get_no_gradient():
    network = classifier(freeze=[HALVES["test_resnet"]])
    network(noise()).sum().backward()
    for name, param in network.rule_names().items():
        assert (param.grad is None) == bool(re.fullmatch(HALVES["test_resnet"], name)), name


def test_state_dict_names_stay_timms():
    network, plain = classifier(freeze=[".*"]), backbone()
    assert list(network.backbone.state_dict()) == list(plain.state_dict())
