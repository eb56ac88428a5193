"""Checkpoints: written whole, found damaged by whatever damage, never unpickled, never lost to the one after."""

import contextlib
import json
import os
import pickle
import random
import shutil
import subprocess
from dataclasses import replace

import pytest
import safetensors.torch
import timm.optim
import torch

from tests.checkpoints import newest_valid
from tlscale.errors import CheckpointError
from tlscale.training.checkpoint.files import (
    Checkpoint,
    corruption_of,
    list_checkpoints,
    load_checkpoint,
    point,
    pointed_to,
    prune,
    save_checkpoint,
)
from tlscale.training.checkpoint.optimizer_state import pack_optimizer, unpack_optimizer


def make(step: int, size: int = 5) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    model = {
        "weight": torch.randn(size, 3, generator=generator),
        "half": torch.randn(4, generator=generator).bfloat16(),
        "count": torch.tensor(step),
        "transposed": torch.randn(3, 2, generator=generator).T,
        "empty": torch.zeros(0),
    }
    return Checkpoint(step, {"model": model, "optimizer": {}}, {"clock": {"step": step, "loss": 0.1}, "scaler": None})


DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.bool, torch.complex64),
)


@pytest.fixture
def three(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, make(step))
    return tmp_path


def names(root):
    return [folder.name for folder in list_checkpoints(root)]


def test_round_trip(tmp_path):
    folder = save_checkpoint(tmp_path / "deep" / "checkpoints", make(7))
    assert folder.name == "step_00000007"
    assert pointed_to(folder.parent, "LATEST") == folder
    back, before = load_checkpoint(folder), make(7)
    assert back.step == 7
    assert back.state == before.state
    assert back.tensors.keys() == before.tensors.keys()
    for name, tensor in before.tensors["model"].items():
        assert back.tensors["model"][name].dtype == tensor.dtype
        assert torch.equal(back.tensors["model"][name], tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0, 5), (4, 3)])
def test_every_type_and_shape_comes_back_as_safetensors_itself_reads_it(tmp_path, dtype, shape):
    content = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    content = content % 2 if dtype == torch.bool else content
    tensor = content.view(dtype).reshape(shape)
    folder = save_checkpoint(
        tmp_path, Checkpoint(1, {"model": {"odd": torch.zeros(3, dtype=torch.int8), "a": tensor}}, {})
    )
    back, expected = (
        load_checkpoint(folder).tensors["model"],
        safetensors.torch.load_file(folder / "model.safetensors"),
    )
    assert back.keys() == expected.keys()
    for name, value in expected.items():
        assert back[name].dtype == value.dtype
        assert back[name].shape == value.shape
        assert torch.equal(back[name].contiguous().reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))


def test_what_becomes_of_a_loaded_tensor_does_not_reach_the_file(three):
    newest = three / "step_00000003"
    load_checkpoint(newest).tensors["model"]["weight"].zero_()
    assert corruption_of(newest) is None


def test_tied_tensors_are_saved_each(tmp_path):
    shared = torch.randn(4)
    folder = save_checkpoint(tmp_path, Checkpoint(1, {"model": {"a": shared, "b": shared}}, {}))
    assert torch.equal(load_checkpoint(folder).tensors["model"]["b"], shared)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-1])


def edit_manifest(**changes):
    def edit(folder):
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


DAMAGES = {
    "model cut short": (lambda f: shorten(f / "model.safetensors"), "model.safetensors has"),
    "optimizer emptied": (
        lambda f: (f / "optimizer.safetensors").write_bytes(b""),
        "optimizer.safetensors has 0 bytes",
    ),
    "one bit of the model": (lambda f: flip_a_bit(f / "model.safetensors"), "model.safetensors has changed"),
    "one bit of the state": (lambda f: flip_a_bit(f / "state.json"), "state.json has changed"),
    "model gone": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "model is a folder": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
        "model.safetensors is missing",
    ),
    "model of the checkpoint before": (
        lambda f: shutil.copy(f.parent / "step_00000002" / "model.safetensors", f),
        "model.safetensors has changed",
    ),
    "a file more": (
        lambda f: safetensors.torch.save_file({"a": torch.zeros(1)}, f / "ema.safetensors"),
        "ema.safetensors is not in its manifest",
    ),
    "manifest gone": (lambda f: (f / "manifest.json").unlink(), "manifest.json cannot be read"),
    "manifest torn": (lambda f: shorten(f / "manifest.json") or shorten(f / "manifest.json"), "cannot be read"),
    "manifest of nothing": (edit_manifest(files={}), "is not in its manifest"),
    "manifest a list": (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    "manifest binary": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\x00"), "manifest.json cannot be read"),
    "newer format": (edit_manifest(format=2), "it has format 2, this tlscale reads up to 1"),
    "other step": (edit_manifest(step=9), "it was written as step 9"),
    "all gone": (lambda f: [path.unlink() for path in f.iterdir()], "manifest.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_one_before_is_used(three, damage):
    act, expected = DAMAGES[damage]
    newest = three / "step_00000003"
    assert corruption_of(newest) is None
    act(newest)
    assert expected in corruption_of(newest)
    path, faults = newest_valid(three)
    assert path == three / "step_00000002"
    assert len(faults) == 1
    assert str(newest) in faults[0]
    assert expected in faults[0]
    with pytest.raises(CheckpointError, match="step_00000003' cannot be used"):
        load_checkpoint(newest)


def test_one_of_another_run_is_neither_used_nor_counted(tmp_path):
    for step, run_id in ((1, "ours"), (2, "ours"), (3, "theirs")):
        save_checkpoint(tmp_path, replace(make(step), run_id=run_id))
    foreign = tmp_path / "step_00000003"
    assert corruption_of(foreign) is None
    assert corruption_of(foreign, "ours") == "it is of another run (theirs, and this one is ours)"
    assert newest_valid(tmp_path)[0] == foreign
    path, faults = newest_valid(tmp_path, "ours")
    assert path == tmp_path / "step_00000002"
    assert faults == [f"the checkpoint '{foreign}' cannot be used: {corruption_of(foreign, 'ours')}"]
    with pytest.raises(CheckpointError, match="cannot be used: it is of another run"):
        load_checkpoint(foreign, "ours")
    assert load_checkpoint(path, "ours").step == 2
    prune(tmp_path, keep=1, keep_steps=(), run_id="ours")
    assert names(tmp_path) == ["step_00000002"]


def spoil(content, other, how, draw):
    """A file's bytes after an accident; None: the file is gone."""
    place = draw.randrange(len(content))
    match how:
        case "truncated":
            return content[:place]
        case "emptied":
            return b""
        case "longer":
            return content + b"\0"
        case "a bit":
            return content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]
        case "page of zeros":
            return content[:place] + bytes(len(content[place : place + 4096])) + content[place + 4096 :]
        case "of another run":
            return other
        case "gone":
            return None


@pytest.mark.parametrize("how", ["truncated", "emptied", "longer", "a bit", "page of zeros", "of another run", "gone"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_any_accident_of_any_file_is_found_or_changes_nothing(three, tmp_path_factory, name, how):
    """Whatever is loaded in the end is what was saved: a bit of a manifest's blanks may be another."""
    others = {"model": make(4, size=7).tensors["model"], "optimizer": {"count": torch.ones(2)}}
    other = save_checkpoint(tmp_path_factory.mktemp("other"), Checkpoint(3, others, {"clock": {"step": 3}}))
    path = three / "step_00000003" / name
    good, spoilt, draw = path.read_bytes(), 0, random.Random(f"{name} {how}")
    for _ in range(40 if how in ("truncated", "a bit", "page of zeros") else 1):
        bad = spoil(good, (other / name).read_bytes(), how, draw)
        if bad == good:
            continue  # zeros that were zeros
        path.unlink(missing_ok=True) if bad is None else path.write_bytes(bad)
        spoilt += corruption_of(path.parent) is not None
        newest, faults = newest_valid(three)
        assert (newest.name, len(faults)) in (("step_00000002", 1), ("step_00000003", 0))
        back, before = load_checkpoint(newest), make(int(newest.name[-1]))
        assert back.state == before.state
        assert all(torch.equal(back.tensors["model"][key], value) for key, value in before.tensors["model"].items())
        path.write_bytes(good)
    assert spoilt
    assert corruption_of(path.parent) is None


def test_a_renamed_folder_is_damaged(three):
    (three / "step_00000003").rename(three / "step_00000004")
    path, faults = newest_valid(three)
    assert path == three / "step_00000002"
    assert "it was written as step 3" in faults[0]


def test_none_valid_is_an_error_that_names_all(three):
    for folder in list_checkpoints(three):
        flip_a_bit(folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        newest_valid(three)
    assert all(f"step_0000000{step}" in str(caught.value) for step in (1, 2, 3))
    assert "--overwrite" in str(caught.value)


def test_no_checkpoint_is_no_error(tmp_path):
    assert newest_valid(tmp_path / "none") == (None, [])


def test_left_overs_of_killed_writers_are_never_read_and_go(three):
    left = three / ".step_00000004.123"
    shutil.copytree(three / "step_00000003", left)
    (three / "step_best").mkdir()  # somebody's notes: not ours, neither read nor removed
    (three / "step_00000009").write_text("a file")
    assert names(three) == ["step_00000001", "step_00000002", "step_00000003"]
    assert newest_valid(three)[0] == three / "step_00000003"
    save_checkpoint(three, make(5))
    assert not left.exists()
    prune(three, keep=1, keep_steps=())
    assert names(three) == ["step_00000005"]
    assert (three / "step_best").is_dir()


def test_a_damaged_one_of_the_same_step_is_replaced(three):
    shorten(three / "step_00000003" / "model.safetensors")
    save_checkpoint(three, make(3))
    assert corruption_of(three / "step_00000003") is None


def test_order_is_by_number(tmp_path):
    for step in (99_999_999, 100_000_000):
        save_checkpoint(tmp_path, make(step))
    assert newest_valid(tmp_path)[0].name == "step_100000000"
    assert load_checkpoint(newest_valid(tmp_path)[0]).step == 100_000_000


# --- What is kept -----------------------------------------------------------------------------------------------------


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 8):
        save_checkpoint(tmp_path, make(step))
    prune(tmp_path, keep=2, keep_steps=[3])
    assert names(tmp_path) == ["step_00000003", "step_00000006", "step_00000007"]


@pytest.mark.parametrize("act", [shorten, flip_a_bit])
def test_a_damaged_one_does_not_count_as_kept(three, act):
    act(three / "step_00000003" / "model.safetensors")
    prune(three, keep=1, keep_steps=())
    assert names(three) == ["step_00000002"]
    assert newest_valid(three)[0].name == "step_00000002"


def test_where_none_is_valid_none_is_removed(three):
    for folder in list_checkpoints(three):
        shorten(folder / "state.json")
    prune(three, keep=1, keep_steps=())
    assert len(names(three)) == 3


def test_pointers_never_lead_out(three, tmp_path):
    point(three, "BEST", 2)
    assert pointed_to(three, "BEST") == three / "step_00000002"
    outside = three.parent / "step_00000001"
    for content in (
        "../../etc",
        "/etc",
        "..",
        ".",
        "",
        "step_00000009",
        "../" + outside.name,
        "step_00000001/..",
        "\0",
    ):
        (three / "BEST").write_text(content)
        assert pointed_to(three, "BEST") is None, content
    (three / "BEST").write_bytes(b"\xff\xfe")
    assert pointed_to(three, "BEST") is None
    (three / "BEST").unlink()
    assert pointed_to(three, "BEST") is None


# --- A disk that does not take it -------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_checkpoint_before(small_disk):
    root = small_disk / "checkpoints"
    save_checkpoint(root, make(1))
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(root, make(2, size=300_000))
    assert f"step 2 (3.4 MiB) in '{root}': the disk is full" in str(caught.value)
    assert sorted(path.name for path in root.iterdir()) == ["LATEST", "step_00000001"]
    assert newest_valid(root) == (root / "step_00000001", [])
    save_checkpoint(root, make(2))  # with room it goes on


def test_a_full_disk_at_the_small_files(small_disk):
    root = small_disk / "checkpoints"
    save_checkpoint(root, make(1))
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"\0" * 4096):
            pass
    with pytest.raises(CheckpointError, match="the disk is full"):
        point(root, "BEST", 1)
    with pytest.raises(CheckpointError, match="the disk is full"):
        save_checkpoint(root, make(2))
    assert newest_valid(root) == (root / "step_00000001", [])


def test_a_folder_that_cannot_be_written(three):
    if os.getuid() == 0:
        if subprocess.run(["chattr", "+i", str(three)], capture_output=True, check=False).returncode:
            pytest.skip("root writes everywhere, and this file system has no immutable folders")
    else:
        three.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match=f"cannot save the checkpoint of step 4 .* in '{three}'"):
            save_checkpoint(three, make(4))
    finally:
        if os.getuid() == 0:
            subprocess.run(["chattr", "-i", str(three)], check=True)
        else:
            three.chmod(0o700)
    assert newest_valid(three) == (three / "step_00000003", [])


def test_a_place_that_is_a_file(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="cannot save the checkpoint of step 1"):
        save_checkpoint(tmp_path / "checkpoints", make(1))


# --- No pickle --------------------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["TLSCALE_TEST_BOMB"],)


def test_reading_never_unpickles(three, tmp_path, monkeypatch):
    went_off = tmp_path / "went_off"
    monkeypatch.setenv("TLSCALE_TEST_BOMB", str(went_off))
    for name in ("model.safetensors", "optimizer.safetensors", "state.json", "optimizer.bin", "model.pkl"):
        (three / "step_00000003" / name).write_bytes(pickle.dumps(Bomb()))
    for name in ("manifest.json", "state.json"):
        (three / "step_00000002" / name).write_bytes(pickle.dumps(Bomb()))
    (three / "LATEST").write_bytes(pickle.dumps(Bomb()))
    path, faults = newest_valid(three)
    load_checkpoint(path)
    assert path.name == "step_00000001"
    assert len(faults) == 2
    assert pointed_to(three, "LATEST") is None
    assert not went_off.exists()


def train(optimizer, params, steps):
    for step in range(steps):
        for number, param in enumerate(params):
            param.grad = torch.full_like(param, 0.1 * (number + 1) * (step + 1))
        optimizer.step()


def build(name):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
    groups = [
        {"params": [params[0]], "names": ["a"], "lr": 0.1, "base_lr": 0.1, "weight_decay": 0.01},
        {"params": [params[1]], "names": ["b"], "lr": 0.2, "base_lr": 0.2, "weight_decay": 0.0},
    ]
    options = {"momentum": 0.9} if name in ("sgd", "rmsprop") else {}
    return timm.optim.create_optimizer_v2(groups, opt=name, lr=0.1, weight_decay=0.0, **options), params


@pytest.mark.parametrize(
    "name", ["adamw", "sgd", "momentum", "lamb", "lion", "adafactor", "rmsprop", "radam", "nadamw"]
)
def test_optimizers_go_on_exactly(name, tmp_path):
    optimizer, params = build(name)
    train(optimizer, params, 3)
    packed, plain = pack_optimizer(optimizer)
    folder = save_checkpoint(tmp_path, Checkpoint(3, {"optimizer": packed}, {"optimizer": plain}))
    other, other_params = build(name)
    with torch.no_grad():
        for param, value in zip(other_params, params, strict=True):
            param.copy_(value)
    back = load_checkpoint(folder)
    unpack_optimizer(other, back.tensors["optimizer"], back.state["optimizer"])
    train(optimizer, params, 2)
    train(other, other_params, 2)
    assert all(torch.equal(one, two) for one, two in zip(params, other_params, strict=True))


def test_odd_values_in_an_optimizer_are_refused():
    optimizer, params = build("adamw")
    train(optimizer, params, 1)
    optimizer.state[params[1]]["generator"] = torch.Generator()
    with pytest.raises(CheckpointError, match=r"keeps a Generator for 'b.generator'"):
        pack_optimizer(optimizer)


def test_nested_values_come_back_as_they_were():
    optimizer, params = build("adamw")
    train(optimizer, params, 1)
    odd = {"history": [torch.ones(2), (1, None, 2.5)], 5: {"deep": torch.zeros(1)}, "flag": True}
    optimizer.state[params[0]]["odd"] = odd
    packed, plain = pack_optimizer(optimizer)
    other, other_params = build("adamw")
    unpack_optimizer(other, packed, json.loads(json.dumps(plain)))
    back = other.state[other_params[0]]["odd"]
    assert torch.equal(back["history"][0], torch.ones(2))
    assert back["history"][1] == (1, None, 2.5)
    assert torch.equal(back[5]["deep"], torch.zeros(1))
    assert back["flag"] is True


def test_state_of_other_parameters_is_refused():
    optimizer, params = build("adamw")
    train(optimizer, params, 1)
    packed, plain = pack_optimizer(optimizer)
    other, _ = build("adamw")
    other.param_groups[1]["names"] = ["c"]
    with pytest.raises(CheckpointError, match="of other parameters: b"):
        unpack_optimizer(other, packed, plain)
