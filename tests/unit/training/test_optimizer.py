"""Parameter groups from rules; optimizers by timm's names; what is wrong with either, said before the first step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small_models import classifier, loss_of, noise
from tlscale.errors import RecipeError
from tlscale.recipe.schema import OptimSection
from tlscale.training.optimizer import build_optimizer, parameter_groups, set_lr


def groups_of(network, section):
    depth = network.layer_depth() if section.layer_decay is not None else {}
    return parameter_groups(network.rule_names(), section, layer_depth=depth, never_decayed=network.never_decayed())


def by_name(groups):
    """(learning rate, weight decay) of each parameter; fails where one is in two groups."""
    names = [name for group in groups for name in group["names"]]
    assert len(set(names)) == len(names)
    return {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}


def test_trainable_parameters_once_and_frozen_never():
    network = classifier(freeze=[r"(conv1|bn1|layer[12])\..*"])
    groups = groups_of(network, OptimSection())
    params = network.rule_names()
    assert by_name(groups).keys() == {name for name, param in params.items() if param.requires_grad}
    for group in groups:
        assert len(group["params"]) == len(group["names"])
        assert all(param is params[name] for name, param in zip(group["names"], group["params"], strict=True))
        assert group["base_lr"] == group["lr"]


NETWORKS = {"vit": classifier("test_vit"), "resnet": classifier("test_resnet")}
NAMES = {key: sorted(network.rule_names()) for key, network in NETWORKS.items()}


@settings(max_examples=60, deadline=None)
@given(
    key=st.sampled_from(sorted(NETWORKS)),
    data=st.data(),
    layer_decay=st.one_of(st.none(), st.floats(0.1, 1.0)),
    decay_norm_and_bias=st.booleans(),
)
def test_each_parameter_gets_what_the_rules_say(key, data, layer_decay, decay_norm_and_bias):
    network, names = NETWORKS[key], NAMES[key]
    lr_names = data.draw(st.lists(st.sampled_from(names), max_size=4, unique=True))
    decay_names = data.draw(st.lists(st.sampled_from(names), max_size=4, unique=True))
    factors = {name: data.draw(st.floats(0, 3)) for name in lr_names}
    decays = {name: data.draw(st.floats(0, 3)) for name in decay_names}

    def rules(values):
        return [{name.replace(".", r"\."): value} for name, value in values.items()]

    section = OptimSection(
        lr=0.01,
        weight_decay=0.3,
        lr_rules=rules(factors),
        weight_decay_rules=rules(decays),
        layer_decay=layer_decay,
        decay_norm_and_bias=decay_norm_and_bias,
    )
    found = by_name(groups_of(network, section))
    depth, params = network.layer_depth(), network.rule_names()
    assert found.keys() == params.keys()
    for name, (lr, decay) in found.items():
        assert lr == pytest.approx(0.01 * factors.get(name, 1.0) * (layer_decay or 1.0) ** depth[name])
        plain = params[name].ndim <= 1 or name in ("pos_embed", "cls_token")
        usual = 0.0 if plain and not decay_norm_and_bias else 0.3
        assert decay == decays.get(name, usual)


def test_norms_biases_and_positions_are_not_decayed():
    found = by_name(groups_of(classifier("test_vit"), OptimSection(weight_decay=0.1)))
    decays = {name: decay for name, (_, decay) in found.items()}
    for name in ("pos_embed", "cls_token", "norm.weight", "blocks.0.norm1.bias", "head.0.bias"):
        assert decays[name] == 0.0
    for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "head.0.weight"):
        assert decays[name] == 0.1


def test_layer_decay_falls_towards_the_image():
    found = by_name(groups_of(classifier("test_vit"), OptimSection(lr=1.0, layer_decay=0.5)))
    assert found["head.0.weight"][0] == 1.0
    rates = [found[f"blocks.{i}.attn.qkv.weight"][0] for i in range(5, -1, -1)]
    assert rates == [rates[0] * 0.5**i for i in range(6)]
    assert found["patch_embed.proj.weight"][0] < rates[-1]


def test_frozen_layers_do_not_shift_layer_decay():
    section = OptimSection(lr=1.0, layer_decay=0.5)
    free = by_name(groups_of(classifier("test_vit"), section))
    half = by_name(groups_of(classifier("test_vit", freeze=[r"blocks\.[0-2]\..*"]), section))
    assert all(free[name] == value for name, value in half.items())


@pytest.mark.parametrize("key", ["lr_rules", "weight_decay_rules"])
def test_rules_without_effect(key):
    network = classifier(freeze=[r"layer1\..*"])
    for pattern, message in (("layr4.*", "Did you mean 'layer4'"), (r"layer1\..*", "matches no parameter")):
        with pytest.raises(RecipeError, match=f"optim.{key}: the rule .*{message}"):
            groups_of(network, OptimSection(**{key: [{pattern: 0.1}]}))


def test_lr_is_the_groups_own_peak_times_the_factor():
    network, section = classifier("test_vit"), OptimSection(lr=0.1, layer_decay=0.5, lr_rules=[{r"head\..*": 3.0}])
    optimizer = build_optimizer(groups_of(network, section), section)
    peaks = [group["base_lr"] for group in optimizer.param_groups]
    assert max(peaks) == pytest.approx(0.3)
    for factor in (0.25, 1.0, 0.0, 0.5):
        assert set_lr(optimizer, factor) == pytest.approx(0.3 * factor)
        assert [group["lr"] for group in optimizer.param_groups] == [peak * factor for peak in peaks]
        assert [group["base_lr"] for group in optimizer.param_groups] == peaks


def test_groups_act_in_the_step():
    """Plain SGD by hand: w - lr (g + decay w), each parameter with its own lr and decay."""
    network = classifier("test_vit")
    section = OptimSection(name="momentum", lr=0.1, weight_decay=0.2, layer_decay=0.7, options={"momentum": 0.0})
    groups = groups_of(network, section)
    before, found = {name: param.detach().clone() for name, param in network.rule_names().items()}, by_name(groups)
    optimizer = build_optimizer(groups, section)
    set_lr(optimizer, 0.5)
    loss_of(network, noise()).backward()
    optimizer.step()
    for name, param in network.rule_names().items():
        lr, decay = found[name]
        wanted = before[name] - 0.5 * lr * (param.grad + decay * before[name])
        torch.testing.assert_close(param.detach(), wanted, rtol=1e-5, atol=1e-7)


def test_options_reach_the_optimizer():
    network = classifier()
    section = OptimSection(name="adamw", options={"betas": [0.8, 0.95], "eps": 1e-6, "amsgrad": True})
    for group in build_optimizer(groups_of(network, section), section).param_groups:
        assert (group["betas"], group["eps"], group["amsgrad"]) == ((0.8, 0.95), 1e-6, True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "adamv"}, r"optim.name: timm has no optimizer 'adamv'. Did you mean 'adam.*There are: "),
        ({"name": "lookahead_adamv"}, "Did you mean 'adam"),
        ({"name": "lookahead_"}, "timm has no optimizer 'lookahead_'"),
        ({"name": ""}, "timm has no optimizer ''"),
        ({"options": {"beta": 0.9}}, r"'adamw' takes no 'beta'. Did you mean 'betas'.*It takes: amsgrad, betas"),
        ({"name": "sgd", "options": {"betas": [0.9, 0.9]}}, "'sgd' takes no 'betas'.*momentum"),
        ({"options": {"lr": 0.1}}, "takes no 'lr'"),
        ({"options": {"betas": [2.0, 0.9]}}, r"'adamw' cannot be made with {'betas': \[2.0, 0.9\]}: Invalid beta"),
        ({"options": {"betas": 0.9}}, "'adamw' cannot be made with"),
        ({"name": "adahessian"}, "'adahessian' needs second derivatives, which the training loop does not compute"),
        ({"name": "lookahead_adahessian"}, "needs second derivatives"),
    ],
)
def test_wrong_optimizers(keys, message):
    section = OptimSection(**keys)
    with pytest.raises(RecipeError, match=message):
        build_optimizer(groups_of(classifier(), section), section)
