"""The weights that ship: the file that was shipped, or an error; loaded as any other, and with their input."""

import hashlib
import json
import shutil

import pytest
import safetensors.torch
import torch

from tests.small_models import section
from tlscale.data.input_spec import resolve_input
from tlscale.errors import ModelError
from tlscale.models import bundled as module
from tlscale.models.backbone import build_backbone
from tlscale.models.bundled import FOLDER, bundled
from tlscale.recipe.schema import DataSection

NAMES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def build(name="resnet10t", **keys):
    return build_backbone(section(name, "bundled", **keys), image_size=None, seed=0)


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_the_file_s(name):
    model, report = build(name)
    state = safetensors.torch.load_file(FOLDER / f"{name}.safetensors")
    own = model.state_dict()
    assert set(own) == set(state)
    assert all(torch.equal(own[key], value.to(own[key].dtype)) for key, value in state.items())
    assert report.num_matched == len(state)
    assert str(report).startswith(f"bundled {name} (tlscale/weights/{name}.safetensors): {len(state)} of ")


@pytest.mark.parametrize("name", NAMES)
def test_what_ships_is_small_and_has_a_card(name):
    assert (FOLDER / f"{name}.safetensors").stat().st_size <= 12 * 10**6
    card = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    facts = json.loads((FOLDER / f"{name}.json").read_text())
    assert facts["sha256"] in card
    for heading in ("Teacher", "Images", "Licences", "Command", "Figures", "Limits"):
        assert f"## {heading}" in card, heading


def test_there_is_one():
    assert "resnet10t" in NAMES


def test_the_input_is_the_one_it_was_made_with():
    model, _ = build()
    cfg = bundled("resnet10t").pretrained_cfg
    spec = resolve_input(
        DataSection(source="fashion_mnist"), in_chans=3, pretrained_cfg=model.pretrained_cfg, sizes=[(28, 28)]
    )
    assert [3, spec.image_size, spec.image_size] == cfg["input_size"]
    assert (list(spec.mean), list(spec.std)) == (cfg["mean"], cfg["std"])


def test_grey_images():
    """First filters summed over their channels see a grey image as an RGB image with equal channels."""
    grey, rgb = build(in_chans=1)[0].eval(), build()[0].eval()
    images = torch.randn(2, 1, 48, 48)
    assert torch.allclose(grey(images), rgb(images.expand(-1, 3, -1, -1)), atol=1e-3)


def test_batch_statistics_are_those_of_images():
    """What they are worth is measured in benchmarks/bundled_transfer.py; random weights have none."""
    model, _ = build()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all(float((norm.running_mean.abs()).max()) > 0 for norm in norms)


def test_another_file_is_an_error(tmp_path, monkeypatch):
    copied = tmp_path / "weights"
    shutil.copytree(FOLDER, copied)
    monkeypatch.setattr(module, "FOLDER", copied)
    path = copied / "resnet10t.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    found = hashlib.sha256(content).hexdigest()
    with pytest.raises(
        ModelError, match=f"ships with tlscale: its SHA-256 is {found}, not {bundled('resnet10t').sha256}"
    ):
        build()


def test_one_that_does_not_ship():
    with pytest.raises(ModelError, match=r"no weights of 'resnet10' ship .* Did you mean 'resnet10t'\? There are: "):
        bundled("resnet10")
