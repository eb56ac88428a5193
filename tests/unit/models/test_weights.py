"""The network in a file of weights is found under whatever was wrapped around it in training, or there is an error."""

import re

import pytest
import safetensors.torch
import torch

from tests.small_models import section
from tests.small_runs import put_small_idx, small_recipe
from tlscale.commands.tables import show_plan
from tlscale.errors import ModelError
from tlscale.models.backbone import build_backbone
from tlscale.tracking.console import Console
from tlscale.training.setup import set_up


def weights_of(name="test_resnet", seed=7):
    return dict(build_backbone(section(name), image_size=32, seed=seed)[0].state_dict())


def under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def layers(prefix, count=2):
    """Layers that stand behind a backbone in training."""
    return {f"{prefix}.{number}.weight": torch.rand(8, 8) for number in range(count)}


def load(path, content, name="test_resnet", **keys):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path)
        keys["allow_pickle"] = True
    return build_backbone(section(name, weights=str(path), **keys), image_size=32, seed=0)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Of each wrapper what it saves around a network's own names, and the prefix that is to be said.
FLAT = {
    "lightning": (lambda s: under("model.", s) | {"loss.weight": torch.rand(10)}, "model."),
    "mmpretrain": (lambda s: under("backbone.", s) | {"head.fc.weight": torch.rand(10, 8)}, "backbone."),
    "moco": (lambda s: under("module.encoder_q.", s), "module.encoder_q."),
    "simclr": (lambda s: under("backbone.", s) | layers("projector", 4), "backbone."),
    "dino": (lambda s: under("student.", s), "student."),
    "compiled": (lambda s: under("_orig_mod.", s), "_orig_mod."),
    "ddp": (lambda s: under("module.", s), "module."),
    "compiled in ddp in lightning": (lambda s: under("model.module._orig_mod.", s), "model.module._orig_mod."),
    "bare": (lambda s: s | {"fc.weight": torch.rand(10, 8), "fc.bias": torch.rand(10)}, ""),
}


@pytest.mark.parametrize("wrapper", FLAT)
def test_a_wrappers_prefix_is_taken_off_and_said(wrapper, tmp_path):
    wrap, prefix = FLAT[wrapper]
    state = weights_of()
    backbone, report = load(tmp_path / "w.safetensors", wrap(state))
    assert same(backbone.state_dict(), state)
    assert report.prefix == prefix
    assert report.notes == ()
    assert str(report).endswith(f", without the prefix '{prefix}' of its names" if prefix else "(100.0%)")


def test_a_prefix_before_the_names_of_an_architectures_authors(tmp_path):
    """ConvNeXt's own filter turns them into timm's, but knows no wrapper."""
    state = weights_of("test_convnext")
    theirs = {_of_authors(name): tensor for name, tensor in state.items()}
    assert theirs.keys() != state.keys()
    wrapped = under("model.", theirs) | layers("projector")
    backbone, report = load(tmp_path / "w.safetensors", wrapped, "test_convnext")
    assert same(backbone.state_dict(), state)
    assert report.prefix == "model."


def _of_authors(name):
    for ours, their in (("stem.", "downsample_layers.0."), (".blocks.", "."), (".conv_dw.", ".dwconv.")):
        name = name.replace(ours, their)
    for ours, their in ((".mlp.fc1.", ".pwconv1."), (".mlp.fc2.", ".pwconv2.")):
        name = name.replace(ours, their)
    parts = name.split(".")
    if parts[0] == "stages" and parts[2] == "downsample":
        name = ".".join(["downsample_layers", parts[1], *parts[3:]])
    return re.sub(r"^head\.norm\.", "norm.", name)


# Of checkpoints with several networks: what they hold besides, given one and another network, and where the first is.
NESTED = {
    "lightning": (lambda s, o: {"state_dict": under("model.", s), "epoch": 3}, None),
    "moco": (
        lambda s, o: {"state_dict": under("module.encoder_q.", s) | under("module.encoder_k.", o)},
        "state_dict.module.encoder_q.",
    ),
    "moco v3": (
        lambda s, o: {"state_dict": under("module.momentum_encoder.", o) | under("module.base_encoder.", s)},
        "state_dict.module.base_encoder.",
    ),
    "dino": (
        lambda s, o: {
            "student": under("module.backbone.", o) | layers("module.head"),
            "teacher": under("backbone.", s),
        },
        "teacher.backbone.",
    ),
    "averaged": (lambda s, o: {"state_dict": o, "model_ema": under("module.", s)}, "model_ema.module."),
    "twice": (lambda s, o: {"model": {"state_dict": under("module.", s)}, "optimizer": {"state": {0: o}}}, None),
    "twins": (lambda s, o: {"a": s, "b": dict(s)}, None),
}


@pytest.mark.parametrize("kind", NESTED)
def test_of_several_networks_in_a_checkpoint_the_one_to_transfer_from_is_taken_and_said(kind, tmp_path):
    wrap, taken = NESTED[kind]
    state = weights_of()
    backbone, report = load(tmp_path / "w.pth", wrap(state, weights_of(seed=8)))
    assert same(backbone.state_dict(), state)
    assert bool(report.notes) == (taken is not None)
    if taken is not None:
        assert re.search(rf"holds 2 networks that fit .*: '{re.escape(taken)}' is taken", report.notes[0])


def test_of_networks_that_nothing_tells_apart_none_is_taken(tmp_path):
    with pytest.raises(ModelError, match=r"backbone\.weights: .* 2 networks that fit .* 'left\.', 'right\.'"):
        load(tmp_path / "w.safetensors", under("left.", weights_of()) | under("right.", weights_of(seed=8)))


def test_what_is_missing_and_what_has_another_shape_is_named(tmp_path):
    state = weights_of()
    lost, cut = "layer4.0.conv1.weight", "layer4.0.conv2.weight"
    partial = {name: tensor for name, tensor in state.items() if name != lost}
    partial[cut] = partial[cut][:3]
    backbone, report = load(tmp_path / "w.safetensors", under("model.", partial))
    fresh = build_backbone(section(), image_size=32, seed=0)[0].state_dict()
    assert report.missing == (lost, cut)
    assert torch.equal(backbone.state_dict()[lost], fresh[lost])
    assert report.notes[0] == f"the file lacks, and these begin at random: {lost} (1)"
    shapes = rf"{re.escape(cut)} \(3, \d+, 3, 3\) instead of \(\d+, \d+, 3, 3\) \(1\)"
    assert re.fullmatch(f"of another shape in the file, and begin at random: {shapes}", report.notes[1])


def test_tensors_that_the_network_has_no_place_for_are_counted(tmp_path):
    deeper = {f"layer4.{block}.conv{i}.weight": torch.rand(2) for block in range(5, 9) for i in (1, 2, 3)}
    _, report = load(tmp_path / "w.safetensors", weights_of() | deeper)
    (note,) = report.notes
    assert note.startswith(
        "the file has what this network has no place for, and it is not used: layer4.5.conv1.weight, "
    )
    assert note.endswith(" ... (12)")


def test_batches_need_not_have_been_counted(tmp_path):
    """Files of torch before 0.4.1 lack the counts, a quarter of the names, and lack nothing."""
    state = {name: tensor for name, tensor in weights_of().items() if not name.endswith("num_batches_tracked")}
    _, report = load(tmp_path / "w.safetensors", state, min_matched=1.0)
    assert (report.num_matched, report.num_tensors, report.missing) == (len(state), len(state), ())


def test_integers_and_nan_are_no_weights(tmp_path):
    state = weights_of()
    quantized = state | {"conv1.0.weight": (state["conv1.0.weight"] * 100).to(torch.int8)}
    _, report = load(tmp_path / "w.safetensors", quantized)
    assert report.missing == ("conv1.0.weight",)
    assert re.search(r"conv1\.0\.weight \(.*\) int8 instead of \(.*\) float32", report.notes[0])
    state["layer1.0.conv1.weight"][0, 0, 0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"backbone\.weights: .* NaN or infinite numbers in layer1\.0\.conv1\.weight"):
        load(tmp_path / "w.safetensors", state)


# -- in a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def partial(tmp_path_factory):
    """A file of test_resnet without two of its layers."""
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    state = {name: tensor for name, tensor in weights_of().items() if not name.startswith("layer4.0.conv")}
    safetensors.torch.save_file(state, path)
    return path


def plan(tmp_path, weights, freeze=(), **keys):
    backbone = {"name": "test_resnet", "weights": str(weights), "in_chans": 3, **keys}
    place = put_small_idx(tmp_path / "data", train=24, test=8)
    changes = {"freeze": list(freeze)} if freeze is not None else {"probe": {"kind": "ridge"}}
    return set_up(small_recipe(tmp_path / "r.yaml", place, backbone=backbone, **changes), world_size=1)


@pytest.mark.parametrize("freeze", [[".*"], [r"layer4\..*"], None], ids=["all", "a layer", "probe"])
def test_layers_that_would_stay_random_and_frozen_are_refused(partial, freeze, tmp_path):
    names = r"layer4\.0\.conv1\.weight, layer4\.0\.conv2\.weight.*\(\d\)"
    with pytest.raises(ModelError, match=rf"backbone\.weights: .*frozen, and would stay random: {names}"):
        plan(tmp_path, partial, freeze)
    assert plan(tmp_path, partial, freeze, min_matched=0.85).weights.missing


def test_layers_that_are_trained_from_random_are_named_on_the_screen(partial, tmp_path, capsys):
    setup = plan(tmp_path, partial, [r"layer1\..*"])
    show_plan(setup, Console(), device="cpu")
    shown = " ".join(capsys.readouterr().out.split())
    assert "backbone.weights: the file lacks, and these begin at random: layer4.0.conv1.weight, layer4.0" in shown
