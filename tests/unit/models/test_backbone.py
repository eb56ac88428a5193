"""Weights are those that were asked for, or there is an error; reading a file never runs what it holds."""

import hashlib
import os
import pickle
import re
import time

import pytest
import safetensors.torch
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.optim import param_groups_layer_decay

from tests.small_models import TINY, noise, section
from tlscale.errors import ModelError
from tlscale.models.backbone import build_backbone, layer_depths, no_weight_decay
from tlscale.models.weights import state_digest


def build(backbone_section, image_size=None, seed=0):
    return build_backbone(backbone_section, image_size=image_size, seed=seed)


def other_weights(name="test_resnet", image_size=None, **keys):
    """The state of a network that a recipe with seed 0 would not begin with."""
    return build(section(name, **keys), image_size, seed=7)[0].state_dict()


def write(path, state):
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return str(path)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- random weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_random_weights_are_a_function_of_the_seed_alone(name):
    torch.manual_seed(1)
    one, report = build(section(name), 32, seed=3)
    torch.manual_seed(2)
    two, again = build(section(name), 32, seed=3)
    other, _ = build(section(name), 32, seed=4)
    assert same(one.state_dict(), two.state_dict())
    assert report.sha256 == again.sha256 == state_digest(one.state_dict())
    assert not same(one.state_dict(), other.state_dict())
    assert str(report) == "random weights, by seed"
    one.eval()
    assert one(noise()).ndim == 2


def test_the_global_generator_is_left_as_it_was(tmp_path):
    path = write(tmp_path / "w.safetensors", other_weights())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for weights in ("none", path):
        build(section(weights=weights), 32)
        assert torch.equal(torch.get_rng_state(), before)


def test_image_size_goes_to_networks_of_one_size_only():
    vit, _ = build(section("test_vit"), 32)
    assert vit.pos_embed.shape[1] == 1 + (32 // 16) ** 2
    assert build(section("test_vit"))[0].pos_embed.shape[1] == 1 + (160 // 16) ** 2
    build(section("test_resnet"), 32)  # does not know `img_size`


def test_drop_rates_reach_the_network():
    backbone, _ = build(section("test_resnet", drop_path_rate=0.3, drop_rate=0.2))
    assert backbone.drop_rate == 0.2
    rates = [m.drop_prob for m in backbone.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.3)


def test_a_drop_rate_that_the_architecture_does_not_take():
    with pytest.raises(ModelError, match="backbone: 'vgg11' does not take drop_path_rate"):
        build(section("vgg11", drop_path_rate=0.1))


# -- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnt18", r"timm [\d.]+ has no model 'resnt18'. Did you mean 'resnet18'"),
        ("test_resnet.r999", "'test_resnet' has no weights tagged 'r999'.*There are: r160_in1k"),
        ("test_resnet.r16_in1k", "Did you mean 'r160_in1k'"),
        ("eca_nfnet_l3.in1k", "There are: none"),
    ],
)
def test_unknown_names_are_answered_with_near_ones(name, message):
    with pytest.raises(ModelError, match=message):
        build(section(name))


def test_a_local_folder_that_is_not_there(tmp_path):
    with pytest.raises(ModelError, match="backbone.name: 'local-dir:.*' cannot be opened: FileNotFoundError"):
        build(section(f"local-dir:{tmp_path}/nothing", weights="pretrained"))


# -- pretrained ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet", "test_vit.r160_in1k", "hf-hub:timm/test_resnet.r160_in1k"])
def test_offline_the_error_comes_at_once_and_names_the_ways_out(name):
    from huggingface_hub.constants import HF_HUB_CACHE

    start = time.perf_counter()
    with pytest.raises(ModelError) as caught:
        build(section(name, weights="pretrained"), 160)
    assert time.perf_counter() - start < 5
    text = str(caught.value)
    for part in (name, HF_HUB_CACHE, "HF_HUB_OFFLINE is set", "HF_HOME", "PATH.safetensors", "backbone.weights=none"):
        assert part in text


def test_offline_with_the_weights_in_the_cache(monkeypatch, tmp_path):
    """A cache folder copied to a machine without network is all that is needed."""
    import huggingface_hub.constants

    name = timm.get_pretrained_cfg("test_resnet").hf_hub_id
    repo = tmp_path / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    whole = timm.create_model("test_resnet")
    write(snapshot / "model.safetensors", whole.state_dict())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    backbone, report = build(section(weights="pretrained", in_chans=1))
    assert str(report).startswith(f"pretrained test_resnet.r160_in1k from {name}")
    state, first = backbone.state_dict(), "conv1.0.weight"
    assert all(torch.equal(state[key], whole.state_dict()[key]) for key in state if key != first)
    assert torch.allclose(state[first], whole.state_dict()[first].sum(1, keepdim=True))


def test_a_network_without_pretrained_weights():
    with pytest.raises(ModelError, match="no pretrained weights for 'efficientnet_b0_gn'. Use weights: none"):
        build(section("efficientnet_b0_gn", weights="pretrained"))


# -- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_a_file_gives_its_weights(name, tmp_path):
    state = other_weights(name, 32)
    path = write(tmp_path / "w.safetensors", state)
    backbone, report = build(section(name, path), 32)
    assert same(backbone.state_dict(), state)
    assert (report.num_matched, report.num_tensors) == (len(state), len(state))
    assert report.sha256 == state_digest(state)
    assert str(report) == f"{path}: {len(state)} of {len(state)} tensors matched (100.0%)"


def test_a_file_with_a_classifier_and_in_half_precision(tmp_path):
    torch.manual_seed(0)
    whole = timm.create_model("test_resnet", num_classes=12).bfloat16()
    backbone, _ = build(section(weights=write(tmp_path / "w.safetensors", whole.state_dict())))
    assert all(param.dtype == torch.float32 for param in backbone.parameters())
    assert torch.equal(backbone.conv1[0].weight, whole.conv1[0].weight.float())


@pytest.mark.parametrize(("share", "min_matched"), [(0.95, 0.9), (0.5, 0.5), (0.5, 0.0)])
def test_part_of_the_tensors_is_enough_where_the_recipe_says_so(share, min_matched, tmp_path):
    state = other_weights()
    names = list(state)[: -int(len(state) * (1 - share))]
    path = write(tmp_path / "w.safetensors", {name: state[name] for name in names})
    backbone, report = build(section(weights=path, min_matched=min_matched))
    fresh = build(section())[0].state_dict()
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, state[name] if name in names else fresh[name])
    assert (report.num_matched, report.num_tensors) == (len(names), len(state))


def test_half_of_the_tensors_is_an_error_that_counts(tmp_path):
    state = other_weights()
    names = list(state)[: len(state) // 2]
    path = write(tmp_path / "w.safetensors", {name: state[name] for name in names})
    with pytest.raises(ModelError) as caught:
        build(section(weights=path))
    text = str(caught.value)
    missing = [name for name in state if name not in names]
    assert f"{len(names)} of {len(state)} tensors matched" in text
    assert "at least 90% must (backbone.min_matched)" in text
    assert f"missing: {', '.join(missing[:3])} ... ({len(missing)})" in text


def test_a_file_of_another_architecture_is_an_error_that_lists(tmp_path):
    path = write(tmp_path / "w.safetensors", other_weights("test_resnet"))
    for name in ("test_vit", "test_efficientnet", "resnet10t"):
        with pytest.raises(ModelError, match=f"tensors matched.*for '{name}'.*another architecture") as caught:
            build(section(name, path), 32)
        assert re.search("missing: |of another shape: ", str(caught.value))
        assert re.search(r"the file has: (.*, ){2}.* \.\.\. \(90 tensors\)", str(caught.value))


def test_shapes_that_differ_are_listed(tmp_path):
    state = other_weights()
    wrong = {name: tensor[:1] if tensor.ndim == 4 else tensor for name, tensor in state.items()}
    with pytest.raises(
        ModelError, match=r"of another shape: conv1.0.weight \(1, 3, 3, 3\) instead of \(\d+, 3, 3, 3\)"
    ):
        build(section(weights=write(tmp_path / "w.safetensors", wrong), min_matched=1.0))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_one_channel_sums_the_first_filters(name, tmp_path):
    state = other_weights(name, 32)
    first = f"{timm.get_pretrained_cfg(name).first_conv}.weight"
    backbone, report = build(section(name, write(tmp_path / "w.safetensors", state), in_chans=1, min_matched=1.0), 32)
    assert torch.allclose(backbone.state_dict()[first], state[first].sum(1, keepdim=True))
    # So a grey image gives the features of the same image with three equal channels.
    three, _ = build(section(name, str(tmp_path / "w.safetensors")), 32)
    images = noise(in_chans=1)
    assert torch.allclose(backbone.eval()(images), three.eval()(images.expand(-1, 3, -1, -1)), atol=1e-4)
    assert report.num_matched == report.num_tensors


def test_positions_of_another_image_size_are_resized(tmp_path):
    """Only the architecture's own checkpoint filter knows how."""
    state = other_weights("test_vit", 160)
    path = write(tmp_path / "w.safetensors", state)
    backbone, report = build(section("test_vit", path, min_matched=1.0), 32)
    assert backbone.pos_embed.shape == (1, 5, 64)
    assert report.num_matched == report.num_tensors
    assert torch.equal(backbone.pos_embed[:, 0], state["pos_embed"][:, 0])
    assert not torch.equal(backbone.pos_embed, build(section("test_vit"), 32)[0].pos_embed)
    assert torch.equal(backbone.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])
    note = "interpolated to the size of the images: pos_embed, such as (1, 101, 64) to (1, 5, 64)"
    assert report.notes == (note,)
    assert build(section("test_vit", path), 160)[1].notes == ()


def test_positions_of_long_images_are_timms(tmp_path):
    state = other_weights("test_vit", 160)
    backbone, report = build(section("test_vit", write(tmp_path / "w.safetensors", state)), (48, 80))
    expected = resample_abs_pos_embed(state["pos_embed"], (3, 5), (10, 10), num_prefix_tokens=1)
    torch.testing.assert_close(backbone.pos_embed, expected)
    assert "pos_embed" in report.notes[0]
    assert backbone.eval()(noise(image_size=(48, 80))).shape == (4, 64)


def test_pretrained_positions_that_are_interpolated_are_named(tmp_path, monkeypatch):
    """As timm loads them, from a file that stands for the hub's."""
    path = write(tmp_path / "w.safetensors", timm.create_model("test_vit").state_dict())
    cfg = timm.get_pretrained_cfg("test_vit.r160_in1k")
    monkeypatch.setattr(timm.models._registry._model_pretrained_cfgs["test_vit.r160_in1k"], "file", path)
    assert cfg.input_size == (3, 160, 160)
    for size, noted in ((160, False), (None, False), ((32, 64), True), (32, True)):
        _, report = build(section("test_vit.r160_in1k", "pretrained"), size)
        assert bool(report.notes) == noted
    assert report.notes == ("interpolated to the size of the images: pos_embed, such as (1, 101, 64) to (1, 5, 64)",)


@pytest.mark.parametrize("in_chans", [2, 5])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_first_filters_of_other_channels_are_timms_and_reported(name, in_chans, tmp_path):
    path = write(tmp_path / "w.safetensors", timm.create_model(name, num_classes=0).state_dict())
    backbone, report = build(section(name, path, in_chans=in_chans))
    first = f"{timm.get_pretrained_cfg(name).first_conv}.weight"
    made = safetensors.torch.load_file(path)[first]
    expected = made[:, [channel % 3 for channel in range(in_chans)]] * 3 / in_chans
    torch.testing.assert_close(backbone.state_dict()[first], expected)
    assert report.num_matched == report.num_tensors
    shown = "1 2" if in_chans == 2 else "1 2 3 1 2"
    assert report.notes == (
        f"the filters of the first layer are made for 3 channels, repeated for {in_chans} ({shown}) and scaled by "
        f"3/{in_chans}: {first}",
    )
    again = write(tmp_path / "five.safetensors", backbone.state_dict())
    assert build(section(name, again, in_chans=in_chans))[1].notes == ()
    with_timm = timm.create_model(
        name, pretrained=True, num_classes=0, in_chans=in_chans, pretrained_cfg_overlay={"file": path}
    )
    torch.testing.assert_close(backbone.state_dict()[first], with_timm.state_dict()[first])


def test_first_filters_that_timm_would_make_random_are_refused(tmp_path, monkeypatch):
    """Of a stem that takes pixels side by side for channels."""
    name = "tresnet_m.miil_in1k"
    monkeypatch.setattr(timm.models._registry._model_pretrained_cfgs[name], "file", "unused")
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *args, **keys: None)
    wrong = "backbone.in_chans: the pretrained first layer of TResNet cannot be turned into one of 5 channels"
    with pytest.raises(ModelError, match=wrong):
        build(section(name, "pretrained", in_chans=5))


def test_a_size_that_an_architecture_cannot_be_built_for_names_the_key():
    wrong = r"data\.image_size: 'nest_tiny' cannot be built for images of 32 x 64 pixels: .*square.*such as 224"
    with pytest.raises(ModelError, match=wrong):
        build(section("nest_tiny"), (32, 64))


def test_names_of_the_authors_of_an_architecture_are_understood(tmp_path):
    state = other_weights("test_convnext", 32)
    theirs = {
        name.replace("stem.", "downsample_layers.0.").replace(".conv_dw.", ".dwconv."): tensor
        for name, tensor in state.items()
    }
    assert theirs.keys() != state.keys()
    theirs = {re_stage(name): tensor for name, tensor in theirs.items()}
    backbone, _ = build(section("test_convnext", write(tmp_path / "w.safetensors", theirs), min_matched=1.0), 32)
    assert same(backbone.state_dict(), state)


def re_stage(name):
    """`stages.1.blocks.0.mlp.fc1.weight` as ConvNeXt's authors wrote it: `stages.1.0.pwconv1.weight`."""
    for ours, their in ((".blocks.", "."), (".mlp.fc1.", ".pwconv1."), (".mlp.fc2.", ".pwconv2.")):
        name = name.replace(ours, their)
    parts = name.split(".")
    if parts[0] == "stages" and parts[2] == "downsample":
        name = ".".join(["downsample_layers", parts[1], *parts[3:]])
    return "norm." + name.removeprefix("head.norm.") if name.startswith("head.norm.") else name


PREFIXES = ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_prefixes_of_wrappers_are_taken_off(prefix, suffix, tmp_path):
    state = other_weights()
    wrapped = {prefix + name: tensor for name, tensor in state.items()}
    path = tmp_path / f"w{suffix}"
    write(path, wrapped) if suffix == ".safetensors" else torch.save(wrapped, path)
    backbone, _ = build(section(weights=str(path), allow_pickle=suffix == ".pth"))
    assert same(backbone.state_dict(), state)


@pytest.mark.parametrize("key", ["state_dict", "model", "module", "state_dict_ema", "model_ema"])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".tar"])
def test_state_dicts_of_training_scripts(key, suffix, tmp_path):
    state = other_weights()
    path = tmp_path / f"w.pth{suffix}"
    torch.save({key: state, "epoch": 3, "optimizer": {"state": {}}}, path)
    backbone, _ = build(section(weights=str(path), allow_pickle=True))
    assert same(backbone.state_dict(), state)


def test_averaged_weights_win_over_the_others(tmp_path):
    torch.save({"state_dict": other_weights("test_vit"), "state_dict_ema": other_weights()}, tmp_path / "w.pth")
    backbone, _ = build(section(weights=str(tmp_path / "w.pth"), allow_pickle=True))
    assert same(backbone.state_dict(), other_weights())


def test_a_pickle_is_refused_unless_allowed(tmp_path):
    torch.save(other_weights(), tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"is a pickle.*backbone.allow_pickle=true"):
        build(section(weights=str(tmp_path / "w.pth")))


class Evil:
    """Unpickled by an ordinary unpickler, it makes the file `canary`."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".pt", ".safetensors"])
@pytest.mark.parametrize("dump", ["torch", "torch_legacy", "pickle"])
def test_what_a_pickle_wants_to_run_never_runs(suffix, dump, tmp_path):
    canary = tmp_path / "canary"
    path = tmp_path / f"evil{suffix}"
    loot = {"state_dict": {"conv1.0.weight": torch.zeros(2)}, "args": Evil(canary)}
    if dump == "pickle":
        path.write_bytes(pickle.dumps(loot))
    else:
        torch.save(loot, path, _use_new_zipfile_serialization=dump == "torch")
    for allowed in (False, True):
        with pytest.raises(ModelError, match="backbone.weights"):
            build(section(weights=str(path), allow_pickle=allowed))
        assert not canary.exists()
    if suffix == ".pth" and dump == "torch":  # the trap is a real one
        torch.load(path, weights_only=False)
        assert canary.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x05", bytes(range(256)) * 4, b"PK\x03\x04" + bytes(64)])
def test_junk_cannot_be_read(suffix, content, tmp_path):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=f"backbone.weights: '{path}' "):
        build(section(weights=str(path), allow_pickle=True))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_truncated_file_cannot_be_read(suffix, share, tmp_path):
    path = tmp_path / f"w{suffix}"
    write(path, other_weights()) if suffix == ".safetensors" else torch.save(other_weights(), path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ModelError, match="cannot be read|holds more than tensors"):
        build(section(weights=str(path), allow_pickle=True))


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"state_dict": {"a": 1}}, 5, torch.zeros(3)])
def test_a_pickle_without_a_state_dict(content, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ModelError, match="holds no state dict"):
        build(section(weights=str(tmp_path / "w.pth"), allow_pickle=True))


def test_no_such_file_and_no_such_kind_of_file(tmp_path):
    with pytest.raises(ModelError, match="there is no file '.*w.safetensors'. Give 'pretrained', 'none' or the path"):
        build(section(weights=str(tmp_path / "w.safetensors")))
    (tmp_path / "w.onnx").write_bytes(b"x")
    with pytest.raises(ModelError, match="not a .safetensors file"):
        build(section(weights=str(tmp_path / "w.onnx")))
    with pytest.raises(ModelError, match="there is no file"):
        build(section(weights=str(tmp_path)))


def test_the_sha256_of_the_file_is_checked(tmp_path):
    path = write(tmp_path / "w.safetensors", other_weights())
    right = hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest()
    build(section(weights=path, sha256=right))
    with pytest.raises(ModelError, match=f"has the SHA-256 {right}, not {'0' * 64}"):
        build(section(weights=path, sha256="0" * 64))


# -- what is read off a backbone ----------------------------------------------------------------------------------


def test_digest_is_of_names_types_shapes_and_bytes():
    state = {"a": torch.arange(6.0), "b": torch.tensor(3), "c": torch.zeros(0), "d": torch.tensor([True, False])}
    digest = state_digest(state)
    assert digest == state_digest(dict(reversed(state.items())))
    assert digest == state_digest({**state, "a": torch.arange(12.0)[:6]})
    assert digest == state_digest({**state, "a": torch.stack([torch.arange(6.0)] * 2, dim=1)[:, 0]})
    flipped = state["a"].clone()
    flipped[5] = torch.nextafter(flipped[5], torch.tensor(9.0))
    for other in (
        {**state, "a": flipped},
        {**state, "a": state["a"].reshape(2, 3)},
        {**state, "a": state["a"].view(torch.int32)},
        {**state, "b": torch.tensor([3])},
        {**state, "b": torch.tensor(3, dtype=torch.int32)},
        {("z" if name == "a" else name): tensor for name, tensor in state.items()},
        {name: tensor for name, tensor in state.items() if name != "c"},
    ):
        assert state_digest(other) != digest
    assert state_digest({"a": torch.ones(2, dtype=torch.bfloat16)}) != state_digest({"a": torch.ones(2).half()})


def test_no_weight_decay_is_what_the_architecture_wants():
    assert {"pos_embed", "cls_token"} <= no_weight_decay(build(section("test_vit"), 32)[0])
    assert no_weight_decay(build(section("test_resnet"))[0]) == frozenset()


def test_layers_are_counted_from_the_output():
    depths, of_classifier = layer_depths(build(section("test_vit"), 32)[0])
    assert depths["patch_embed.proj.weight"] == max(depths.values())
    blocks = [depths[f"blocks.{i}.attn.qkv.weight"] for i in range(6)]
    assert blocks == sorted(set(blocks), reverse=True)
    assert (depths["norm.weight"], of_classifier) == (1, 0)


def timms_scales(full):
    """By name what timm multiplies the learning rate with, at a decay of 0.5 a layer."""
    names = {id(param): name for name, param in full.named_parameters()}
    groups = param_groups_layer_decay(full, layer_decay=0.5)
    return {names[id(param)]: group["lr_scale"] for group in groups for param in group["params"]}


def assert_depths_are_timms(name, scales, backbone):
    depths, of_classifier = layer_depths(backbone)
    assert {key: 0.5**depth for key, depth in depths.items()} == {key: scales[key] for key in depths}, name
    # What a backbone lacks is the classifier, in place of which the recipe's head stands.
    assert {0.5**of_classifier} == {scales[key] for key in scales.keys() - depths.keys()}, name


# Last norms with the classifier in one layer and in their own, callables, several classifiers, heads of several layers.
SOME = (
    *("test_convnext", "test_vit", "test_resnet", "test_efficientnet", "test_nfnet", "test_byobnet", "test_mambaout"),
    *("convnext_atto", "beit_base_patch16_224", "eva02_tiny_patch14_224", "mobilenetv3_small_050", "lcnet_035"),
    *("swin_tiny_patch4_window7_224", "levit_128s", "efficientformer_l1", "inception_next_atto", "repvit_m0_9"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_layer_depths_are_timms(name):
    with torch.device("meta"):
        full, backbone = (timm.create_model(name, num_classes=num) for num in (7, 0))
    assert_depths_are_timms(name, timms_scales(full), backbone)


@pytest.mark.long
def test_layer_depths_are_timms_in_every_module_that_has_groups():
    """A model of each; on the meta device, so that nothing is computed. `make test` has SOME of them."""
    num_tried = 0
    for module in timm.list_modules():
        for name in timm.list_models(module=module)[:1]:
            with torch.device("meta"):
                full = timm.create_model(name, num_classes=7)
                if not hasattr(full, "group_matcher"):
                    continue
                scales = timms_scales(full)
                full.reset_classifier(0)
            assert_depths_are_timms(name, scales, full)
            num_tried += 1
    assert num_tried > 80


def test_an_architecture_without_grouping():
    backbone = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match="timm does not group the layers of Sequential. Use lr_rules"):
        layer_depths(backbone)
