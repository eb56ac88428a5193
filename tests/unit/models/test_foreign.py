"""Models that others made, or that were damaged: nothing of them is believed before it was looked at."""

import json
import zipfile

import pytest
import safetensors.torch
import timm
import torch

from tests.small_models import classifier
from tlscale.data.input_spec import InputSpec
from tlscale.errors import ModelError, RunFolderError
from tlscale.models.backbone import build_backbone
from tlscale.models.export import export_model, load
from tlscale.recipe.schema import BackboneSection

SPEC = InputSpec.from_plain(
    {
        "in_chans": 3,
        "image_size": 32,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
)


def section(path):
    return BackboneSection(name="test_resnet", weights=str(path), allow_pickle=True, min_matched=0.0)


def deflate(path):
    """The same archive, compressed as torch never does it."""
    with zipfile.ZipFile(path) as stored:
        parts = {part.filename: stored.read(part) for part in stored.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in parts.items():
            packed.writestr(name, content)


def test_a_compressed_pickle_is_not_unpacked(tmp_path):
    """A thousandth of its tensors: 6 MB would take 6.9 GB."""
    path = tmp_path / "w.pth"
    torch.save({"conv1.weight": torch.zeros(2**24, dtype=torch.uint8)}, path)
    deflate(path)
    assert path.stat().st_size < 2**24 / 500
    with pytest.raises(ModelError, match=r"backbone\.weights: .*is compressed.*would unpack to 16,77"):
        build_backbone(section(path), image_size=None, seed=0)


def test_parts_that_overlap_are_refused(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({f"{name}.weight": torch.rand(1000) for name in "abc"}, path)
    with zipfile.ZipFile(path, "a") as archive:
        (part,) = [part for part in archive.infolist() if part.filename.endswith("data/0")]
        for number in range(40):  # names for the same bytes
            twin = zipfile.ZipInfo(part.filename.replace("data/0", f"data/{number + 10}"))
            for key in ("compress_size", "file_size", "header_offset", "CRC"):
                setattr(twin, key, getattr(part, key))
            archive.filelist.append(twin)
        archive._didModify = True
    with pytest.raises(ModelError, match="overlapping"):
        build_backbone(section(path), image_size=None, seed=0)


@pytest.mark.parametrize("name", ["w.pth", "w.bin"])
@pytest.mark.parametrize("is_zip", [True, False])
def test_what_torch_writes_is_read(tmp_path, name, is_zip):
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    torch.save(state, tmp_path / name, _use_new_zipfile_serialization=is_zip)
    _, report = build_backbone(section(tmp_path / name), image_size=None, seed=0)
    assert report.num_matched == report.num_tensors


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(10**9), torch.zeros(2, 2).to_sparse(), torch.zeros(3, device="meta")],
    ids=["a view that repeats one number", "sparse", "meta"],
)
def test_tensors_without_numbers_of_their_own_are_refused(tmp_path, tensor):
    torch.save({"conv1.weight": tensor, "bn1.weight": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"conv1\.weight"):
        build_backbone(section(tmp_path / "w.pth"), image_size=None, seed=0)


@pytest.fixture
def exported(tmp_path):
    export_model(classifier("test_resnet", num_classes=3), tmp_path / "model", classes=["a", "b", "c"], spec=SPEC)
    return tmp_path / "model"


def change(folder, **arguments):
    config = json.loads((folder / "config.json").read_text())
    config["model_args"] = {**config["model_args"], **arguments}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"checkpoint_path": "/etc/passwd"}, "checkpoint_path"),
        ({"pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/w.pth"}}, "pretrained_cfg_overlay"),
        ({"cache_dir": "/tmp/x"}, "cache_dir"),
        ({"features_only": True}, "features_only"),
        ({"exec": "import os"}, "exec"),
        ({"global_pool": {"a": 1}}, "global_pool"),
        ({"global_pool": "a/b"}, "global_pool"),
        ({"stem_width": 10**9}, "stem_width"),
        ({"drop_rate": 1e999}, "drop_rate"),
        ({"channels": [1] * 1000}, "channels"),
    ],
)
def test_arguments_that_do_not_only_describe_a_network_do_not_reach_timm(exported, monkeypatch, arguments, named):
    change(exported, **arguments)
    built = []
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: built.append(args))
    with pytest.raises(RunFolderError, match=f"'model_args' has '?{named}"):
        load(exported)
    with pytest.raises(ModelError, match=f"'model_args' has '?{named}"):
        build_backbone(BackboneSection(name=f"local-dir:{exported}"), image_size=None, seed=0)
    assert built == []


@pytest.mark.parametrize("name", ["x", "fc.x", "bn1", "conv1", "layer1.0.conv1", "maxpool", "", ["fc", "x"]])
def test_what_is_called_the_classifier_is_one(exported, name):
    config = json.loads((exported / "config.json").read_text())
    config["pretrained_cfg"]["classifier"] = name
    (exported / "config.json").write_text(json.dumps(config))
    without_checksums(exported)
    if name == "":  # timm's way to say that it has none by a name
        assert load(exported).classes == ("a", "b", "c")
        return
    with pytest.raises(RunFolderError, match="which is none of 3 classes"):
        load(exported)


@pytest.mark.parametrize("content", ["[]", '{"architecture": "test_resnet", "model_args": []}', "{"])
def test_settings_that_are_none_are_refused(exported, content):
    (exported / "config.json").write_text(content)
    with pytest.raises(ModelError, match="config"):
        build_backbone(BackboneSection(name=f"local-dir:{exported}"), image_size=None, seed=0)


def test_a_compressed_pickle_in_a_model_folder_is_not_unpacked(exported):
    state = safetensors.torch.load_file(exported / "model.safetensors")
    torch.save(state, exported / "pytorch_model.bin")
    deflate(exported / "pytorch_model.bin")
    (exported / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="compressed"):
        build_backbone(BackboneSection(name=f"local-dir:{exported}"), image_size=None, seed=0)
    with pytest.raises(RunFolderError, match=r"there is no '.*model\.safetensors'"):
        load(exported)


def test_one_flipped_bit_in_an_exported_model_is_found(exported):
    path = exported / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunFolderError, match=r"model\.safetensors.*is not the file that was exported"):
        load(exported)


def test_exports_of_before_have_no_checksums_and_load(exported):
    before = load(exported).model.state_dict()
    config = json.loads((exported / "config.json").read_text())
    assert list(config["tlscale"].pop("sha256")) == ["model.safetensors"]
    (exported / "config.json").write_text(json.dumps(config))
    again = load(exported).model.state_dict()
    assert all(torch.equal(before[name], again[name]) for name in before)


# -- nothing but safetensors, and all of it ----------------------------------------------------------------------------


def without_checksums(folder):
    """As whoever writes the folder can make it."""
    config = json.loads((folder / "config.json").read_text())
    del config["tlscale"]["sha256"]
    (folder / "config.json").write_text(json.dumps(config))


def rewrite(folder, change):
    state = safetensors.torch.load_file(folder / "model.safetensors")
    change(state)
    safetensors.torch.save_file(state, folder / "model.safetensors")
    without_checksums(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("fc.weight"), r"lacks fc\.weight \(1\)"),
        (lambda state: state.update(extra=torch.zeros(3)), r"has what the network has no place for: extra \(1\)"),
        (lambda state: state.update({"fc.bias": torch.zeros(4)}), r"has fc\.bias of shape \(4,\), not \(3,\)"),
        (lambda state: state.update({"fc.bias": torch.zeros(3).int()}), r"has fc\.bias of type torch\.int32"),
        (lambda state: state.update({"fc.bias": torch.full((3,), torch.nan)}), r"NaN or infinite numbers in fc\.bias"),
    ],
)
def test_the_tensors_of_a_model_are_exactly_those_of_the_network(exported, change, message):
    rewrite(exported, change)
    with pytest.raises(RunFolderError, match=f"the model in '.*' cannot be loaded: .*{message}"):
        load(exported)


def test_a_pickle_next_to_a_model_is_not_read(exported):
    state = safetensors.torch.load_file(exported / "model.safetensors")
    for name in ("pytorch_model.bin", "model.pth"):
        torch.save({key: tensor + 1 for key, tensor in state.items()}, exported / name)
    found = load(exported).model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    (exported / "model.safetensors").unlink()
    without_checksums(exported)
    with pytest.raises(RunFolderError, match=r"there is no '.*model\.safetensors'"):
        load(exported)


def test_settings_that_describe_a_network_larger_than_its_file_take_no_memory(exported):
    """66 GB, if it were built."""
    change(exported, channels=[65_536] * 4, layers=[3, 3, 3, 3])
    without_checksums(exported)
    with pytest.raises(RunFolderError, match=r"cannot be loaded: .*lacks layer1"):
        load(exported)


@pytest.mark.parametrize("place", ["local-dir", "hf-hub"])
def test_a_pickle_of_another_is_read_only_where_it_is_allowed(exported, place, monkeypatch, tmp_path):
    state = safetensors.torch.load_file(exported / "model.safetensors")
    (exported / "model.safetensors").unlink()
    torch.save(state, exported / "pytorch_model.bin")
    name = f"local-dir:{exported}" if place == "local-dir" else in_cache(exported, tmp_path / "hub", monkeypatch)
    with pytest.raises(ModelError, match=r"pytorch_model\.bin' is a pickle.*backbone\.allow_pickle=true"):
        build_backbone(BackboneSection(name=name), image_size=None, seed=0)
    backbone, report = build_backbone(BackboneSection(name=name, allow_pickle=True), image_size=None, seed=0)
    assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.state_dict().items())
    assert str(report).startswith("pretrained test_resnet")


def in_cache(folder, cache, monkeypatch):
    """The files as a repository in the cache of the hub."""
    import huggingface_hub.constants

    snapshot = cache / "models--someone--model" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (cache / "models--someone--model" / "refs").mkdir()
    (cache / "models--someone--model" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return "hf-hub:someone/model"


@pytest.mark.parametrize("place", ["local-dir", "hf-hub"])
def test_of_safetensors_and_pickles_of_another_the_safetensors_are_read(exported, place, monkeypatch, tmp_path):
    state = safetensors.torch.load_file(exported / "model.safetensors")
    torch.save({key: tensor + 1 for key, tensor in state.items()}, exported / "pytorch_model.bin")
    name = f"local-dir:{exported}" if place == "local-dir" else in_cache(exported, tmp_path / "hub", monkeypatch)
    backbone, _ = build_backbone(BackboneSection(name=name), image_size=None, seed=0)
    assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.state_dict().items())


def test_what_a_model_of_another_lacks_is_named(exported):
    rewrite(exported, lambda state: state.pop("layer4.0.conv1.weight"))
    _, report = build_backbone(BackboneSection(name=f"local-dir:{exported}"), image_size=None, seed=0)
    assert report.missing == ("layer4.0.conv1.weight",)
    assert "layer4.0.conv1.weight" in report.notes[0]
