"""Training on kept codes: the weights of training on images, and nothing that is frozen computed twice."""

import json
import shutil

import pytest
import torch

import tlscale
from tests.small_runs import (
    assert_same_bits,
    assert_same_runs,
    exported,
    largest_difference,
    last_checkpoint,
    lines,
    put_small_folder,
    put_small_idx,
    result,
    sample_images,
    small_recipe,
    tensors,
)
from tlscale.codes.batches import CodeViews
from tlscale.codes.store import CodesStore
from tlscale.recipe.load import load_recipe

RESNET, VIT = {"name": "test_resnet"}, {"name": "test_vit"}
ALWAYS, NEVER = {"keep": "always"}, {"keep": "never"}
PARTS = {
    "head": {"freeze": ".*", "backbone": RESNET},
    "head, vit": {"freeze": ".*", "backbone": VIT},
    "mlp with dropout": {
        "freeze": ".*",
        "backbone": RESNET,
        "head": [{"linear": 16}, "layernorm", "relu", {"dropout": 0.3}, "linear"],
    },
    "half a resnet": {"freeze": r"(conv1|bn1|layer[12])\..*", "backbone": RESNET},
    "half a vit": {
        "freeze": r"(cls_token|pos_embed|patch_embed\..*|blocks\.[01]\..*)",
        "backbone": {**VIT, "drop_path_rate": 0.2},
        "optim": {"ema_decay": 0.9},
    },
    "accumulation": {
        "freeze": r"(conv1|bn1|layer[12])\..*",
        "backbone": RESNET,
        "compute": {"micro_batch_size": 8},
    },
    "averages, clipped": {"freeze": ".*", "backbone": RESNET, "optim": {"ema_decay": 0.9, "clip_grad_norm": 0.5}},
    "channels last": {
        "freeze": r"(conv1|bn1|layer[12])\..*",
        "backbone": RESNET,
        "compute": {"channels_last": True},
    },
    "checkpointing": {
        "freeze": r"(cls_token|pos_embed|patch_embed\..*|blocks\.0\..*)",
        "backbone": VIT,
        "compute": {"gradient_checkpointing": True},
    },
    # As many views as epochs: each epoch sees what it would see without codes.
    "views": {
        "freeze": ".*",
        "backbone": RESNET,
        "data": {"augment": ["flip", "crop", {"mixup": 0.4}, "cutmix"], "workers": 0},
        "codes": {"views": 2},
    },
}


# The last layers see one pixel of these small images: a matrix product whose sums depend on the number of images at
# once, 64 when codes are computed and 16 in training. All others are equal to the bit.
CLOSE = dict.fromkeys(("head", "mlp with dropout", "averages, clipped", "views"), 1e-5)


def run_both(tmp_path, idx, **changes):
    outs = []
    for keep in ("always", "never"):
        codes = {**(changes.get("codes", {}) if keep == "always" else {}), "keep": keep}
        recipe = small_recipe(tmp_path / f"{keep}.yaml", idx, **{**changes, "codes": codes, "name": "same"})
        tlscale.run(recipe, tmp_path / keep)
        outs.append(tmp_path / keep)
    return outs


@pytest.mark.parametrize("name", PARTS)
def test_weights_are_those_of_training_on_images(name, idx, tmp_path, monkeypatch):
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "cache"))
    ours, theirs = run_both(tmp_path, idx, **PARTS[name])
    assert result(ours)["codes"]["num_computed"] > 0
    assert result(theirs)["codes"] is None
    assert largest_difference(exported(ours), exported(theirs)) <= CLOSE.get(name, 0.0)
    rates = [[record["lr"] for record in lines(out, "train")] for out in (ours, theirs)]
    assert rates[0] == rates[1]
    for key in ("num_images", "steps", "images_seen", "epochs", "trainable_params", "total_params", "strategy"):
        assert result(ours)[key] == result(theirs)[key], key


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_at_the_same_batch_the_weights_are_the_same_to_the_bit(precision, tmp_path):
    """Whatever the precision; a batch of 64 is what codes are computed in."""
    data = put_small_idx(tmp_path / "data", train=160, test=64)
    compute = {"precision": precision}
    changes = {**PARTS["half a resnet"], "batch_size": 64, "data": {"validation_fraction": 0.2}, "compute": compute}
    ours, theirs = run_both(tmp_path, data, **changes)
    assert_same_bits(exported(ours), exported(theirs))
    assert lines(ours) == lines(theirs)


# --- Nothing is computed twice ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(idx, tmp_path_factory):
    """A run whose codes others find; in the cache of this file's process, which it empties first."""
    shutil.rmtree(CodesStore().root, ignore_errors=True)
    folder = tmp_path_factory.mktemp("first")
    recipe = small_recipe(folder / "recipe.yaml", idx, **PARTS["half a resnet"], codes=ALWAYS)
    tlscale.run(recipe, folder / "run")
    return folder / "run"


HITS = {
    "again": {},
    "another batch size": {"batch_size": 32},
    "another micro-batch": {"compute": {"micro_batch_size": 8}},
    "workers": {"data": {"workers": 2}},
    "another head": {"head": [{"linear": 8}, "relu", "linear"]},
    "another optimizer": {"optim": {"name": "sgd", "lr": 0.1}},
    "longer": {"duration": "3 epochs"},
    "another order": {"schedule": {"decay": "constant"}},
    "fewer images": {"data": {"train_limit": 48}},
    "other images held out": {"data": {"validation_fraction": 0.4}},
}
MISSES = {
    "layer": {"freeze": r"(conv1|bn1|layer1)\..*"},
    "weights": {"seed": 1},
    "transform": {"data": {"mean": [0.4]}},
    "image size": {"data": {"image_size": 40}},
    "kept dtype": {"codes": {**ALWAYS, "dtype": "float16"}},
    "precision": {"compute": {"precision": "fp64"}},
}


@pytest.mark.parametrize("name", HITS)
def test_what_does_not_change_the_codes_finds_them(name, first, idx, tmp_path):
    changes = {**PARTS["half a resnet"], "codes": ALWAYS, **HITS[name]}
    tlscale.run(small_recipe(tmp_path / "recipe.yaml", idx, **changes), tmp_path / "run")
    assert result(tmp_path / "run")["codes"]["num_computed"] == 0
    if name in ("again", "workers"):
        assert_same_runs(first, tmp_path / "run")


@pytest.mark.parametrize("name", MISSES)
def test_what_changes_the_codes_computes_them(name, first, idx, tmp_path):
    changes = {**PARTS["half a resnet"], "codes": ALWAYS, **MISSES[name]}
    tlscale.run(small_recipe(tmp_path / "recipe.yaml", idx, **changes), tmp_path / "run")
    assert result(tmp_path / "run")["codes"]["num_computed"] == 96 + 37


def test_other_data_are_computed(first, tmp_path):
    data = put_small_idx(tmp_path / "data", train=64, test=24)
    recipe = small_recipe(tmp_path / "recipe.yaml", data, **PARTS["half a resnet"], codes=ALWAYS)
    tlscale.run(recipe, tmp_path / "run")
    there = {
        image.tobytes() for role, count in (("train", 96), ("test", 37)) for image in sample_images(role, count)[0]
    }
    new = {image.tobytes() for role, count in (("train", 64), ("test", 24)) for image in sample_images(role, count)[0]}
    assert there & new
    assert result(tmp_path / "run")["codes"]["num_computed"] == len(new - there)


def test_no_image_goes_through_the_frozen_part_again(first, idx, tmp_path):
    """By counting at the network itself: what passes its first layer are the few images of noise of the checks."""
    passed, of_images = 0, 0

    def count(module, inputs):
        nonlocal passed, of_images
        if isinstance(module, torch.nn.Conv2d) and module.in_channels == 1:
            passed += len(inputs[0])
            # An image has at most 256 shades; noise has a value of its own for nearly each pixel, and zeros have one.
            of_images += sum(1 < image.unique().numel() <= 256 for image in inputs[0] if image.numel() > 512)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        recipe = small_recipe(tmp_path / "recipe.yaml", idx, **PARTS["half a resnet"], codes=ALWAYS)
        tlscale.run(recipe, tmp_path / "run")
    finally:
        handle.remove()
    assert passed, "the hook was to see the checks"
    assert passed < 200, "only a few images of noise"
    assert of_images == 0


def test_splits_of_one_file_have_codes_of_their_own(tmp_path, monkeypatch):
    """All splits of a manifest lie in one file: the first image of one is not that of the other."""
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "cache"))
    put_small_folder(tmp_path / "images", train=60, test=40)
    rows = ["image,label,split"]
    for file in sorted((tmp_path / "images").rglob("*.png")):
        split, label = file.parts[-3:-1]
        rows.append(f"images/{split}/{label}/{file.name},{label},{split}")
    (tmp_path / "all.csv").write_text("\n".join(rows) + "\n")
    outs = []
    for keep in ("always", "never"):
        changes = {"data": {"source": "manifest", "path": str(tmp_path / "all.csv")}, "codes": {"keep": keep}}
        recipe = small_recipe(tmp_path / f"{keep}.yaml", tmp_path, name="same", freeze=".*", backbone=RESNET, **changes)
        tlscale.run(recipe, tmp_path / keep)
        outs.append(result(tmp_path / keep))
    assert outs[0]["codes"]["num_computed"] == 60 + 40
    assert outs[0]["confusion"] == outs[1]["confusion"]


def test_views_that_no_epoch_sees_are_not_computed(idx, tmp_path, monkeypatch):
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "cache"))
    changes = {**PARTS["views"], "codes": {"views": 5}, "duration": "3 epochs"}
    tlscale.run(small_recipe(tmp_path / "recipe.yaml", idx, **changes), tmp_path / "run")
    assert result(tmp_path / "run")["codes"]["num_computed"] == 3 * 77 + 19 + 37


def test_epochs_after_the_last_view_see_the_first_again(idx, tmp_path, monkeypatch):
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "cache"))
    seen = []
    losses = CodeViews.batch

    def spy(self, micro_batch):
        batch = losses(self, micro_batch)
        seen.append((micro_batch.epoch, micro_batch.rows_B.tolist(), batch.codes[0].clone()))
        return batch

    monkeypatch.setattr(CodeViews, "batch", spy)
    changes = {**PARTS["views"], "codes": {"views": 2}, "duration": "3 epochs", "evaluate": {"every": "100 epochs"}}
    tlscale.run(small_recipe(tmp_path / "recipe.yaml", idx, **changes), tmp_path / "run")
    by_epoch = {}
    for epoch, rows, codes in seen[: 3 * 5]:
        by_epoch.setdefault(epoch, {}).update(zip(rows, codes, strict=True))
    assert len(by_epoch[0]) == 77
    assert all(torch.equal(by_epoch[0][row], by_epoch[2][row]) for row in range(77))
    assert not all(torch.equal(by_epoch[0][row], by_epoch[1][row]) for row in range(77))


def test_damaged_codes_are_computed_again(idx, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "cache"))
    recipe = small_recipe(tmp_path / "recipe.yaml", idx, **PARTS["half a resnet"], codes=ALWAYS)
    tlscale.run(recipe, tmp_path / "one")
    for file in (tmp_path / "cache" / "codes").rglob("*.safetensors"):
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
    tlscale.run(recipe, tmp_path / "two")
    assert result(tmp_path / "two")["codes"]["num_computed"] == 96 + 37
    assert_same_runs(tmp_path / "one", tmp_path / "two")


# --- Whether to keep them ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"codes": NEVER}, "codes.keep is never"),
        ({"freeze": []}, "nothing is frozen"),
        ({"codes": {"disk_gib": 1e-6}}, "more than codes.disk_gib = 1e-06 allows"),
        ({"duration": "2 steps"}, "the stage sees 32 images, and codes of 77 would be computed"),
        ({"codes": {"cache_gib": 1e-6}}, "more than codes.cache_gib = 1e-06 allows"),
        ({"data": {"augment": ["flip"]}}, "new images in each epoch (codes: {views: k} keeps k views of each)"),
    ],
)
def test_images_are_used_where_codes_do_not_pay_and_the_screen_says_why(changes, why, idx, tmp_path, capsys):
    changes = {"freeze": r"(conv1|bn1|layer[12])\..*", "backbone": RESNET, "duration": "1 epochs", **changes}
    tlscale.run(small_recipe(tmp_path / "recipe.yaml", idx, **changes), tmp_path / "run")
    assert result(tmp_path / "run")["codes"] is None
    assert why in " ".join(capsys.readouterr().out.split())


def test_what_cannot_be_traced_is_trained_on_images(idx, tmp_path, monkeypatch, capsys):
    from timm.models.resnet import ResNet

    plain = ResNet.forward_features

    def branching(self, x):
        return plain(self, x * 1.0 if float(x.sum()) > 0 else x)

    monkeypatch.setattr(ResNet, "forward_features", branching)
    recipe = small_recipe(tmp_path / "recipe.yaml", idx, **PARTS["half a resnet"], codes=ALWAYS)
    tlscale.run(recipe, tmp_path / "run")
    assert result(tmp_path / "run")["codes"] is None
    assert "images through the whole network" in capsys.readouterr().out


def test_a_resumed_run_goes_on_as_it_began(idx, tmp_path, monkeypatch):
    """Also where a new measurement would decide otherwise, and where the codes are gone."""
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "cache"))
    changes = {**PARTS["half a vit"], "checkpoint": {"every": "1 steps", "keep": 100}}
    recipe = small_recipe(tmp_path / "recipe.yaml", idx, **changes)
    tlscale.run(recipe, tmp_path / "whole")
    for step in (3, 5, 7):
        out = tmp_path / f"from{step}"
        shutil.copytree(tmp_path / "whole", out)
        shutil.rmtree(out / "model")
        (out / "result.json").unlink()
        for folder in (out / "checkpoints").glob("step_*"):
            if int(folder.name[5:]) > step:
                shutil.rmtree(folder)
        if step == 5:
            shutil.rmtree(tmp_path / "cache" / "codes")
        again = load_recipe(tmp_path / "recipe.yaml", ["codes.disk_gib=1e-6"] if step == 7 else [])
        tlscale.run(again, out, resume=True)
        assert_same_runs(tmp_path / "whole", out)


def test_the_run_says_what_it_kept(first):
    said = json.loads((first / "result.json").read_text())["codes"]
    assert said["num_computed"] == 96 + 37
    assert set(said["kept_mib"]) == {"train", "validation", "test"}
    entries = CodesStore().entries()
    assert any(entry.complete and entry.num_rows == 96 + 37 for entry in entries)
    assert torch.is_tensor(next(iter(tensors(first / "model" / "model.safetensors").values())))


def test_checkpoints_hold_what_the_run_can_change(first):
    kept = tensors(last_checkpoint(first) / "model.safetensors")
    whole = {f"backbone.{name}": tensor for name, tensor in exported(first).items() if not name.startswith("fc.")}
    changed = {name for name in whole if name.split(".")[1] in ("layer3", "layer4")}
    assert set(kept) == changed | {"head.0.weight", "head.0.bias"}
    assert any(name.endswith("running_mean") for name in kept)
