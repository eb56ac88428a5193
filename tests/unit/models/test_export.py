"""A model that was written gives the same logits wherever it is loaded; a folder that holds none says so."""

import json
import os
import shutil

import pytest
import timm
import timm.data
import torch
from accelerate import Accelerator
from torch import nn

import tlscale
from tests.small_models import classifier, noise, section, state_of, train
from tlscale.data.input_spec import InputSpec
from tlscale.errors import ModelError, RunFolderError
from tlscale.models import export as export_module
from tlscale.models.backbone import build_backbone
from tlscale.models.classifier import Classifier, enable_gradient_checkpointing, feature_width
from tlscale.models.export import DecisionRules, export_model, load
from tlscale.models.model_folder import FORMAT

CLASSES = ("<b>bold</b>", "T-shirt/top 👕", 'a "quoted" one', "ünïcode", "\\n")
THRESHOLDS = [0.5, 0.25, 0.7, 1.0, 0.0]


def spec(image_size=32, in_chans=3) -> InputSpec:
    channels = slice(0, in_chans)
    return InputSpec(image_size, in_chans, (0.1, 0.2, 0.3)[channels], (0.4, 0.5, 0.6)[channels], "bilinear", 0.9)


def export(network, folder, head=("linear",), image_size=32, in_chans=3, classes=CLASSES):
    return export_model(network, folder, head=list(head), classes=classes, spec=spec(image_size, in_chans))


def logits_of(network, images):
    with torch.inference_mode():
        return network.eval()(images)


def from_timm(folder, **keys):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **keys)


SIZED = {"img_size": 32}
FAMILIES = [
    ("test_resnet", 32, {}),
    ("test_vit", 32, SIZED),
    ("test_vit", 160, {}),
    ("test_efficientnet", 32, {}),
    ("test_convnext", 32, {}),
    ("test_nfnet", 32, {}),
    ("test_byobnet", 32, {}),
    ("test_mambaout", 32, {}),
    ("resnet10t", 32, {}),
    ("mobilenetv3_small_050", 32, {}),
    ("xcit_nano_12_p16_224", 32, SIZED),
    ("dla46_c", 32, {}),  # a 1 x 1 convolution for a classifier
    ("deit_tiny_distilled_patch16_224", 32, {**SIZED, "depth": 2}),  # two classifiers, their logits averaged
    ("densenet121", 32, {"block_config": (2, 2), "growth_rate": 8}),
    ("vgg11", 32, {"mlp_ratio": 1 / 64}),  # layers of its own between pool and classifier
    ("swin_tiny_patch4_window7_224", 64, {"img_size": 64, "embed_dim": 24, "depths": (1, 1, 1, 1)}),
    ("coat_lite_tiny", 64, {"img_size": 64, "embed_dims": (16, 16, 16, 16), "serial_depths": (1, 1, 1, 1)}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "image_size", "keys"), FAMILIES)
def test_timm_gives_the_logits_of_the_run(name, image_size, keys, tmp_path):
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=0, **keys)
    width = feature_width(backbone, in_chans=3, image_size=image_size)
    network = Classifier(backbone, nn.Sequential(nn.Linear(width, len(CLASSES))))
    with torch.no_grad():  # statistics and weights that no fresh network has
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.rand(tensor.shape))
    how = export(network, tmp_path / "model", image_size=image_size)
    assert how == f"timm.create_model('local-dir:{tmp_path}/model', pretrained=True)"
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "model.safetensors"]
    images = noise(image_size=image_size)
    expected = logits_of(network, images)
    torch.testing.assert_close(logits_of(from_timm(tmp_path / "model"), images), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits_of(load(tmp_path).model, images), expected, rtol=1e-5, atol=1e-5)
    features = logits_of(from_timm(tmp_path / "model", num_classes=0), images)
    torch.testing.assert_close(features, logits_of(network.backbone, images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_long_images_are_exported_for_timm_and_for_us(name, tmp_path):
    network = classifier(name, image_size=(32, 64))
    export(network, tmp_path / "model", image_size=(32, 64))
    images = noise(image_size=(32, 64))
    expected = logits_of(network, images)
    found = from_timm(tmp_path / "model")
    assert timm.data.resolve_model_data_config(found)["input_size"] == (3, 32, 64)
    torch.testing.assert_close(logits_of(found, images), expected, rtol=1e-5, atol=1e-5)
    trained = load(tmp_path)
    assert trained.input_spec == spec((32, 64))
    torch.testing.assert_close(logits_of(trained.model, images), expected, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["tlscale"]["format"] == 3  # an older tlscale asks to be updated
    assert config["tlscale"]["input"]["image_size"] == [32, 64]


def test_without_pretrained_timm_makes_random_weights(tmp_path):
    """Which is why every message of ours and the README say `pretrained=True`."""
    network = classifier()
    export(network, tmp_path)
    random = timm.create_model(f"local-dir:{tmp_path}")
    assert not torch.equal(logits_of(random, noise()), logits_of(network, noise()))
    assert torch.equal(logits_of(from_timm(tmp_path), noise()), logits_of(network, noise()))


@pytest.mark.parametrize("head", [[{"dropout": 0.5}, "linear"], [{"dropout": 0.5}, {"dropout": 0.1}, "linear"]])
def test_dropout_before_one_linear_layer_is_a_timm_model_too(head, tmp_path):
    network = classifier(head=head)
    assert "timm.create_model" in export(network, tmp_path, head)
    assert torch.equal(logits_of(from_timm(tmp_path), noise()), logits_of(network, noise()))


LONGER = [{"linear": 7}, "relu", "layernorm", {"dropout": 0.3}, "batchnorm", "linear"]


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "mobilenetv3_small_050"])
def test_a_longer_head_loads_with_one_call_of_ours_and_its_backbone_with_timm(name, tmp_path):
    network = classifier(name, head=LONGER)
    train(network, steps=2)
    assert export(network, tmp_path / "model", LONGER) == f"tlscale.load('{tmp_path}/model')"
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "head.safetensors", "model.safetensors"]
    trained = tlscale.load(tmp_path)
    assert not trained.model.training
    images = noise(7)
    torch.testing.assert_close(trained.model(images), logits_of(network, images), rtol=1e-5, atol=1e-5)
    for keys in ({"num_classes": 0}, {}):
        features = logits_of(from_timm(tmp_path / "model", **keys), images)
        torch.testing.assert_close(features, logits_of(network.backbone, images), rtol=1e-5, atol=1e-5)


def test_a_head_that_timm_has_no_place_for_stays_ours(tmp_path):
    """LeViT puts a batch norm before each of its two classifiers: one linear layer is another network."""
    backbone, _ = build_backbone(section("levit_128s"), image_size=None, seed=0)
    width = feature_width(backbone, in_chans=3, image_size=224)
    network = Classifier(backbone, nn.Sequential(nn.Linear(width, len(CLASSES))))
    assert export(network, tmp_path, image_size=224).startswith("tlscale.load(")
    images = noise(count=2, image_size=224)
    torch.testing.assert_close(load(tmp_path).model(images), logits_of(network, images), rtol=1e-5, atol=1e-5)


def test_a_second_export_replaces_the_first(tmp_path):
    export(classifier(head=LONGER), tmp_path, LONGER)
    network = classifier(seed=5)
    export(network, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    assert torch.equal(logits_of(load(tmp_path).model, noise()), logits_of(network, noise()))


def test_config_says_what_the_images_are(tmp_path):
    network = classifier("resnet10t", in_chans=1)
    assert network.backbone.pretrained_cfg["test_input_size"][-1] == 224  # of the pretrained weights, not of ours
    export(network, tmp_path, in_chans=1)
    model = from_timm(tmp_path)
    ours = {
        "input_size": (1, 32, 32),
        "mean": (0.1,),
        "std": (0.4,),
        "interpolation": "bilinear",
        "crop_pct": 0.9,
        "crop_mode": "center",
    }
    for use_test_size in (False, True):
        found = timm.data.resolve_model_data_config(model, use_test_size=use_test_size)
        assert {key: tuple(v) if isinstance(v, list) else v for key, v in found.items()} == ours
    assert torch.equal(logits_of(model, noise(in_chans=1)), logits_of(network, noise(in_chans=1)))
    trained = load(tmp_path)
    assert trained.input_spec == spec(in_chans=1)


def test_class_names_survive(tmp_path):
    export(classifier(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="ascii"))
    assert tuple(config["label_names"]) == CLASSES
    assert config["num_classes"] == len(CLASSES)
    assert load(tmp_path).classes == CLASSES
    assert tuple(from_timm(tmp_path).pretrained_cfg["label_names"]) == CLASSES


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_are_readable_as_the_umask_says(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        export(classifier(head=LONGER), tmp_path / "model", LONGER)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert modes == dict.fromkeys(("config.json", "model.safetensors", "head.safetensors"), mode)


def test_export_leaves_the_network_as_it_is(tmp_path):
    network = classifier(freeze=[r"layer1\..*"])
    network(noise()).sum().backward()
    before, modes = state_of(network), [module.training for module in network.modules()]
    gradient = network.head[0].weight.grad.clone()
    torch.manual_seed(3)
    generator = torch.get_rng_state()
    export(network, tmp_path)
    load(tmp_path)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert torch.equal(network.head[0].weight.grad, gradient)


@pytest.mark.slow
@pytest.mark.parametrize("head", [["linear"], LONGER])
@pytest.mark.parametrize("wrapped", ["bf16", "fp64", "channels_last", "compiled", "checkpointed"])
def test_whatever_a_run_wraps_its_network_in(wrapped, head, tmp_path):
    network = classifier(head=head)
    train(network, steps=2)
    plain = classifier(head=head)
    plain.load_state_dict(network.state_dict())
    match wrapped:
        case "bf16":
            assert Accelerator(cpu=True, mixed_precision="bf16").prepare(network) is network
            assert not torch.equal(logits_of(network, noise()).float(), logits_of(plain, noise()))
        case "fp64":
            network.double()
        case "channels_last":
            network.to(memory_format=torch.channels_last)
        case "compiled":
            network.compile(backend="eager")
        case "checkpointed":
            enable_gradient_checkpointing(network, in_chans=3, image_size=32)
    assert ("timm" in export(network, tmp_path, head)) == (head == ["linear"])
    loaded = load(tmp_path).model
    torch.testing.assert_close(loaded(noise()), logits_of(plain, noise()), rtol=1e-5, atol=1e-5)


def test_an_exported_model_is_a_backbone_to_go_on_from(tmp_path):
    first = classifier()
    export(first, tmp_path)
    backbone, report = build_backbone(section(f"local-dir:{tmp_path}", "pretrained"), image_size=32, seed=1)
    expected = first.backbone.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in backbone.state_dict().items())
    assert str(tmp_path) in str(report)
    other, _ = build_backbone(section(weights=str(tmp_path / "model.safetensors")), image_size=32, seed=1)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in other.state_dict().items())
    second = Classifier(backbone, nn.Sequential(nn.Linear(96, 3)))
    export(second, tmp_path / "second", classes=("a", "b", "c"))
    assert torch.equal(logits_of(from_timm(tmp_path / "second"), noise()), logits_of(second, noise()))


def test_any_folder_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = classifier()
    for name in ("with space", "a#b", "a?b=c", "a@main", "50%20", "x:y", "ü"):
        export(network, tmp_path / name / "model")
        for folder in (f"{name}/model", tmp_path / name / "model"):
            assert torch.equal(logits_of(from_timm(folder), noise()), logits_of(network, noise()))
        assert load(name).classes == CLASSES


def test_the_exported_logits_are_checked(tmp_path, monkeypatch):
    """A disk or a library that does not give back what was written is found before the run ends well."""
    write = export_module._write_tensors

    def write_changed(state, path):
        write({name: tensor + 0.1 if tensor.is_floating_point() else tensor for name, tensor in state.items()}, path)

    monkeypatch.setattr(export_module, "_write_tensors", write_changed)
    with pytest.raises(ModelError, match="gives other logits than the run"):
        export(classifier(), tmp_path)


# -- folders that hold no model of ours ---------------------------------------------------------------------------


def test_no_model_there(tmp_path):
    with pytest.raises(RunFolderError, match=r"holds no model: there is no '.*config.json'. Has the run ended"):
        load(tmp_path)
    with pytest.raises(RunFolderError, match="there is no folder '.*nowhere'. Name the folder of a run"):
        load(tmp_path / "nowhere")


def test_a_model_of_a_newer_format(tmp_path):
    export(classifier(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["tlscale"]["format"] = FORMAT + 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunFolderError, match=f"has format {FORMAT + 1}, this tlscale reads up to {FORMAT}. Update"):
        load(tmp_path)


def test_the_format_is_the_lowest_that_has_a_place_for_what_is_written(tmp_path):
    """So that older versions load what they can, and refuse what they would pass over."""
    export(classifier(), tmp_path / "plain")
    export_model(
        classifier(), tmp_path / "several", classes=CLASSES, spec=spec(), rules=DecisionRules(thresholds=THRESHOLDS)
    )
    formats = [json.loads((tmp_path / name / "config.json").read_text())["tlscale"] for name in ("plain", "several")]
    assert [ours["format"] for ours in formats] == [1, 3]
    assert load(tmp_path / "plain").thresholds is None
    assert load(tmp_path / "several").thresholds == tuple(THRESHOLDS)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"thresholds": [0.5]}, "1 thresholds are not those of 5 classes"),
        ({"thresholds": [0.5, 0.5, 0.5, 0.5, 2.0]}, "less than or equal to 1"),
        ({"task": "single_label"}, "'task' and 'thresholds' do not go together"),
        ({"task": "regression"}, "task"),
    ],
)
def test_thresholds_that_do_not_fit(changes, why, tmp_path):
    export_model(classifier(), tmp_path, classes=CLASSES, spec=spec(), rules=DecisionRules(thresholds=THRESHOLDS))
    config = json.loads((tmp_path / "config.json").read_text())
    config["tlscale"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunFolderError, match=f"is damaged: .*{why}"):
        load(tmp_path)


def test_a_model_of_timm_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_resnet", "num_classes": 3}))
    with pytest.raises(RunFolderError, match=r"not written by tlscale. Load it with timm.*pretrained=True"):
        load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"tlscale": 3}', "\0"])
def test_a_damaged_configuration(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"config.json' (is damaged|was not written by tlscale)"):
        load(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "head.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "of another"])
def test_damaged_tensors(file, damage, tmp_path):
    export(classifier(head=LONGER), tmp_path / "model", LONGER)
    path = tmp_path / "model" / file
    match damage:
        case "missing":
            path.unlink()
        case "truncated":
            path.write_bytes(path.read_bytes()[:-100])
        case _:
            other = [{"linear": 9}, "linear"]
            export(classifier("test_vit", head=other), tmp_path / "other", other)
            shutil.copy(tmp_path / "other" / file, path)
    with pytest.raises(RunFolderError, match="the model in '.*' cannot be loaded"):
        load(tmp_path)
