"""ONNX and torch.export of many families of networks under every kind of head, compared on real images."""

import json

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from torch import nn

import tlscale.models.backbone  # noqa: F401 (knows the classic networks)
from tests.small_runs import sample_images
from tlscale.data.input_spec import InputSpec
from tlscale.data.transforms import normalise
from tlscale.models.classifier import Classifier, CodesClassifier, feature_width
from tlscale.models.exports import onnx_file
from tlscale.models.exports.check import Evidence, about
from tlscale.models.exports.onnx_file import write_onnx
from tlscale.models.exports.torch_program import write_program
from tlscale.models.features import LayerCodes, early_layers
from tlscale.models.heads import build_head
from tlscale.models.knn import KnnHead
from tlscale.models.model_folder import TrainedModel

CLASSES = ("a", "b", "c", "d", "e")
SIZED = {"img_size": 64}
SLIM = {**SIZED, "embed_dim": 48, "depth": 2, "num_heads": 4}
FAMILIES = {
    "resnet10t": {},
    "regnetx_002": {},
    "efficientnet_b0": {},
    "mobilenetv3_small_050": {},
    "convnext_atto": {},
    "densenet121": {"block_config": (2, 2, 2), "growth_rate": 8},
    "vgg11": {"mlp_ratio": 1 / 64},
    "repvgg_a0": {},
    "mambaout_femto": {},
    "edgenext_xx_small": {},
    "vit_tiny_patch16_224": {**SIZED, "depth": 4},
    "deit_tiny_distilled_patch16_224": {**SIZED, "depth": 2},
    "beit_base_patch16_224": SLIM,
    "eva02_tiny_patch14_224": {"img_size": 56, "depth": 2},
    "swin_tiny_patch4_window7_224": {**SIZED, "embed_dim": 24, "depths": (1, 1, 2, 1)},
    "hiera_tiny_224": {"img_size": 64, "stages": (1, 1, 2, 1)},
    "mixer_s32_224": SIZED,
    "xcit_nano_12_p16_224": {**SIZED, "depth": 2},
    "poolformer_s12": {},
    "lenet5": {"in_chans": 3},
}
SIDES = {"lenet5": 32, "eva02_tiny_patch14_224": 56}


def spec_of(name):
    return InputSpec(SIDES.get(name, 64), 3, (0.3, 0.3, 0.3), (0.35, 0.35, 0.35), "bilinear", 1.0)


def real_images(spec):
    images_NHW, labels_N = sample_images("test", 64)
    pixels = torch.from_numpy(images_NHW)[:, None].float().expand(-1, 3, -1, -1)
    resized = nn.functional.interpolate(pixels, size=spec.image_size, mode="bilinear").round().byte()
    return resized, torch.from_numpy(labels_N.astype(np.int64)) % len(CLASSES)


def built(name, keys, images_NCHW, spec):
    """A network of this family, with statistics and weights that no fresh network has."""
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=0, **keys).eval()
    with torch.no_grad():
        for tensor in backbone.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.randn(tensor.shape))
        # The images' own statistics, and no scale near 0: else a deep fresh network says the same of all of them.
        for module in backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 0.9
                module.weight.normal_(1.0, 0.1)
        backbone.train()(normalise(images_NCHW[:32], spec, torch.float32))
    return backbone.eval().requires_grad_(False)


def codes_head(codes, images, head):
    with torch.no_grad():
        (codes_ND,) = codes(images)
        if head == "early":
            return nn.Linear(codes_ND.shape[1], len(CLASSES))
        mean_D, std_D = codes_ND.mean(0), codes_ND.std(0) + 1e-3
        unit_ND = nn.functional.normalize((codes_ND - mean_D) / std_D, dim=1)
        labels_N = torch.arange(len(unit_ND)) % len(CLASSES)
        return KnnHead({"codes_ND": unit_ND, "labels_N": labels_N, "mean_D": mean_D, "std_D": std_D}, 5, len(CLASSES))


def evidence(name, keys, head):
    spec = spec_of(name)
    images_NCHW, labels_N = real_images(spec)
    backbone = built(name, keys, images_NCHW, spec)
    images = normalise(images_NCHW, spec, torch.float32)
    if head in ("linear", "layers"):
        layers = ["linear"] if head == "linear" else [{"linear": 7}, "relu", "layernorm", {"dropout": 0.3}, "linear"]
        width = feature_width(backbone, in_chans=3, image_size=spec.image_size)
        network = Classifier(backbone, build_head(layers, in_features=width, num_classes=len(CLASSES), seed=0)).eval()
    else:
        layer = (early_layers(backbone) or ["penultimate"])[0] if head == "early" else "penultimate"
        codes = LayerCodes(backbone, [(layer, "avgmax" if layer != "penultimate" else "avg")])
        network = CodesClassifier(codes, codes_head(codes, images, head)).eval()
    return Evidence(TrainedModel(network, CLASSES, spec), images_NCHW, labels_N, "real images")


def assert_agrees(network, one):
    """At sizes that the check of the export does not try, too."""
    assert float(one.expected_NC.std(0).max()) > 0.003 * float(one.expected_NC.abs().max())  # else all would agree
    images = normalise(one.images_NCHW, one.spec, torch.float32)
    for size in (1, 7, 64):
        with torch.no_grad():
            expected, found = one.trained.model(images[:size]), network(images[:size])
        undisputed = one._undisputed_N[:size]
        off = (found - expected)[undisputed].abs()
        assert not len(off) or float(off.max()) <= 1e-4 * float(one.expected_NC.abs().max())


def assert_exports(one, folder):
    values = about(one.trained, "0", None)
    report = write_onnx(folder, one, values)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert_agrees(lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), one)
    assert report["top1"] == report["top1_of_run"]
    write_program(folder, one, values)
    assert_agrees(torch.export.load(folder / "model.pt2").module(), one)
    return report


@pytest.mark.long
@pytest.mark.parametrize("head", ["linear", "layers", "early", "knn"])
@pytest.mark.parametrize("name", FAMILIES)
def test_families_under_every_head(name, head, tmp_path, record_property):
    report = assert_exports(evidence(name, FAMILIES[name], head), tmp_path)
    record_property("exporter", report["exporter"])
    print(json.dumps({"name": name, "head": head, **report}))


@pytest.mark.long
def test_the_newer_exporter_follows_early_codes_too(tmp_path, monkeypatch):
    """By itself, as it is what is left where torch has no other any more."""
    monkeypatch.setattr(onnx_file, "EXPORTERS", {"dynamo": onnx_file.EXPORTERS["dynamo"]})
    one = evidence("test_vit", {"img_size": 64}, "early")
    assert write_onnx(tmp_path, one, about(one.trained, "0", None))["exporter"] == "dynamo"
