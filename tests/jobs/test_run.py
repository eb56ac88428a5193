"""Runs from recipe to exported model, in this process: real images in small data sets, timm's tiny networks."""

import json
import shutil

import pytest
import timm
import torch
from click.testing import CliRunner

import tlscale
from tests.small_runs import (
    assert_same_bits,
    assert_same_runs,
    exported,
    largest_difference,
    last_checkpoint,
    lines,
    put_small_folder,
    result,
    sample_images,
    small_recipe,
    tensors,
)
from tlscale.cli import main
from tlscale.data.sources import fashion_mnist
from tlscale.data.transforms import ImageBatch, eval_transform, to_input
from tlscale.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    DataError,
    LaunchError,
    NonFiniteLossError,
    RecipeError,
    RunFolderError,
)
from tlscale.recipe.load import load_recipe

KEYS_OF_RESULT = (
    "top1", "num_images", "split", "num_classes", "strategy", "epochs", "steps", "wall_s", "images_per_s",
    "trainable_params", "total_params",
)  # fmt: skip
AUGMENT = ["flip", {"crop": 0.5}, {"mixup": 0.2}, "cutmix"]
RESNET = {"name": "test_resnet"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory, idx):
    """A run that most others are compared to."""
    folder = tmp_path_factory.mktemp("plain")
    tlscale.run(small_recipe(folder / "recipe.yaml", idx), folder / "run")
    return folder / "run"


@pytest.fixture
def run(tmp_path, idx):
    """Runs the small recipe with changes; gives its folder."""

    def go(name="run", resume=False, **changes):
        out = tmp_path / name
        tlscale.run(small_recipe(tmp_path / f"{name}.yaml", idx, **changes), out, resume=resume)
        return out

    return go


def own_top1(out, role, count):
    """Share of the test images that the exported model recognises, by an evaluation of its own."""
    trained = tlscale.load(out)
    images_NHW, labels_N = sample_images(role, count)
    spec = trained.input_spec
    setup = [torch.tensor(eval_transform(image[..., None], spec)).permute(2, 0, 1) for image in images_NHW]
    labels = torch.from_numpy(labels_N).long()
    batch = ImageBatch(torch.stack(setup), labels, torch.arange(count), count)
    with torch.inference_mode():
        logits_NC = trained.model(to_input(batch, spec, next(trained.model.parameters()).dtype))
    return float((logits_NC.argmax(1) == labels).double().mean()), float(
        torch.nn.functional.cross_entropy(logits_NC, labels)
    )


# --- What a run leaves ------------------------------------------------------------------------------------------------


def test_the_run_folder(plain):
    found = {str(path.relative_to(plain)) for path in plain.rglob("*") if path.is_file()}
    checkpoints = {
        f"checkpoints/step_000000{step}/{file}"
        for step in ("05", "10")
        for file in ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
    }
    assert found == checkpoints | {
        ".lock", "recipe.yaml", "run.json", "metrics.jsonl", "result.json", "checkpoints/LATEST", "checkpoints/BEST",
        "predictions.parquet", "model/config.json", "model/model.safetensors",
    }  # fmt: skip
    record = json.loads((plain / "run.json").read_text())
    assert record["world_size"] == 1
    assert record["packages"]["torch"] == torch.__version__.split("+")[0]
    assert len(record["data"]["fingerprint"]) == 64


def test_result_has_the_keys_that_others_script_against(plain):
    figures = result(plain)
    assert [key for key in KEYS_OF_RESULT if key not in figures] == []
    assert 0 <= figures["top1"] <= 1
    assert (figures["num_images"], figures["split"], figures["num_classes"]) == (37, "test", 10)
    assert (figures["strategy"], figures["epochs"], figures["steps"]) == ("scratch", 2, 10)
    assert figures["images_seen"] == 2 * 77
    assert figures["wall_s"] > 0
    assert figures["images_per_s"] > 0
    assert figures["trainable_params"] == figures["total_params"] > 0
    assert figures["is_sample"] is False
    assert sum(map(sum, figures["confusion"])) == 37


def test_the_log_goes_up_and_has_every_step(plain):
    records = lines(plain, "train")
    assert [record["step"] for record in records] == list(range(1, 11))
    assert [record["images_seen"] for record in records] == [16, 32, 48, 64, 77, 93, 109, 125, 141, 154]
    assert [record["step"] for record in lines(plain, "evaluate")] == [5, 10]
    assert all(record["split"] == "validation" and record["num_images"] == 19 for record in lines(plain, "evaluate"))
    steps = [record["step"] for record in lines(plain)]
    assert steps == sorted(steps)


def test_the_figures_are_those_of_the_exported_model(plain):
    top1, loss = own_top1(plain, "test", 37)
    assert result(plain)["top1"] == pytest.approx(top1, abs=1e-9)
    assert result(plain)["loss"] == pytest.approx(loss, abs=1e-5)


def test_timm_loads_the_model_with_the_same_logits(plain):
    model, ours = timm.create_model(f"local-dir:{plain / 'model'}", pretrained=True).eval(), tlscale.load(plain).model
    images = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert float((model(images) - ours(images)).abs().max()) <= 1e-5


def test_the_resolved_recipe_runs_again_to_the_same_bits_from_elsewhere(plain, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    tlscale.run(load_recipe(plain / "recipe.yaml"))
    again = tmp_path / "elsewhere" / "runs" / "small"
    assert_same_runs(plain, again)
    assert (again / "model" / "model.safetensors").read_bytes() == (plain / "model" / "model.safetensors").read_bytes()
    assert (again / "recipe.yaml").read_bytes() == (plain / "recipe.yaml").read_bytes()


# --- Which weights ----------------------------------------------------------------------------------------------------


def test_the_best_weights_are_exported_and_the_last_are_told(run):
    # The learning rate grows until the end, so that the last step is not the best by its loss.
    out = run(
        optim={"lr": 0.5},
        schedule={"warmup": "100%", "decay": "constant"},
        evaluate={"every": "2 steps", "select": "loss", "choose": "best"},
        checkpoint={"every": "3 steps", "keep": 1, "keep_best": 2},
    )
    losses = {record["step"]: record["loss"] for record in lines(out, "evaluate")}
    best = sorted(losses, key=lambda step: losses[step])[:2]
    assert best[0] != 10, "this recipe was chosen so that the last is not the best"
    figures = result(out)
    assert (figures["weights"], figures["best"]["step"], figures["last"]["step"]) == ("best", best[0], 10)
    assert figures["top1"] == figures["best"]["top1"]
    assert figures["best"]["loss"] != figures["last"]["loss"]
    assert own_top1(out, "test", 37)[1] == pytest.approx(figures["best"]["loss"], abs=1e-5)
    assert (out / "checkpoints" / "BEST").read_text().strip() == f"step_{best[0]:08}"
    kept = sorted(path.name for path in (out / "checkpoints").glob("step_*"))
    newest = next(step for step in (10, 9) if step not in best)
    assert kept == sorted({f"step_{step:08}" for step in (*best, newest)})


def test_without_validation_the_last_weights(run):
    out = run(data={"validation_fraction": 0.0})
    figures = result(out)
    assert (figures["weights"], figures["split"], figures["best"]) == ("last", "test", figures["last"])
    assert lines(out, "evaluate") == []
    assert not (out / "checkpoints" / "BEST").exists()
    assert own_top1(out, "test", 37)[1] == pytest.approx(figures["loss"], abs=1e-5)


def test_without_a_test_split_the_figures_are_those_of_validation(tmp_path, idx):
    data = shutil.copytree(idx, tmp_path / "data")
    for path in data.glob("test-*"):
        path.unlink()
    tlscale.run(small_recipe(tmp_path / "recipe.yaml", data, duration="3 steps"), tmp_path / "run")
    assert (result(tmp_path / "run")["split"], result(tmp_path / "run")["num_images"]) == ("validation", 19)


def test_with_nothing_to_evaluate_on_there_is_no_run(tmp_path, idx):
    data = shutil.copytree(idx, tmp_path / "data")
    for path in data.glob("test-*"):
        path.unlink()
    recipe = small_recipe(tmp_path / "recipe.yaml", data, **{"data": {"validation_fraction": 0.0}})
    with pytest.raises(DataError, match="nothing to evaluate on"):
        tlscale.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


# --- What must not change what is learned -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"evaluate": {"every": "1 steps"}},
        {"checkpoint": {"every": "1 steps"}},
        {"data": {"workers": 2}},
        {"data": {"cache_mib": 0}},
        {"log_every": "7 steps"},
        {"evaluate": {"batch_size": 5}},
        {"compute": {"gradient_checkpointing": True}},
    ],
    ids=str,
)
def test_these_leave_the_weights_as_they_are(run, plain, changes):
    out = run(**changes)
    assert_same_bits(
        tensors(last_checkpoint(out) / "model.safetensors"), tensors(last_checkpoint(plain) / "model.safetensors")
    )
    assert_same_bits(
        tensors(last_checkpoint(out) / "optimizer.safetensors"),
        tensors(last_checkpoint(plain) / "optimizer.safetensors"),
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        # 77 images: 19 batches of 4, and one of 1.
        ({"batch_size": 4}, r"the last batch of an epoch \(1 of 4 images\).*drop_last: true"),
        ({"compute": {"micro_batch_size": 1}}, "micro-batches are of one image"),
    ],
)
def test_batch_norm_on_one_image_is_refused_before_the_first_step(run, tmp_path, changes, said):
    with pytest.raises(RecipeError, match=said):
        run(head=[{"linear": 8}, "batchnorm", "relu", "linear"], **changes)
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("changes", [{"drop_last": True}, {"duration": "19 steps"}], ids=str)
def test_batch_norm_trains_where_no_step_has_one_image(run, changes):
    changes = {"batch_size": 4, "duration": "1 epochs", **changes}
    assert result(run(head=[{"linear": 8}, "batchnorm", "relu", "linear"], **changes))["steps"] == 19


def test_workers_change_nothing_with_augmentation(run):
    outs = [
        run(f"workers{workers}", data={"augment": AUGMENT, "workers": workers, "cache_mib": cache})
        for workers, cache in ((0, 2048), (2, 0))
    ]
    assert_same_runs(*outs)


def test_the_seed_does_change_it(run, plain):
    assert largest_difference(exported(run(seed=1)), exported(plain)) > 1e-3


@pytest.mark.parametrize("clip", [None, 0.5])
def test_accumulation_is_exact_with_a_short_last_batch(run, clip):
    # Micro-batches of 4; the last batch of an epoch is 13 images: 4 + 4 + 4 + 1.
    changes = {"optim": {"clip_grad_norm": clip}, "loss": {"label_smoothing": 0.1}}
    changes["data"] = {"augment": ["flip", {"mixup": 0.2}]}
    whole = run("whole", **changes, compute={"precision": "fp64"})
    parts = run("parts", **changes, compute={"precision": "fp64", "micro_batch_size": 4})
    assert largest_difference(exported(whole), exported(parts)) < 1e-12
    assert next(iter(exported(whole).values())).dtype == torch.float64
    losses = [[record["loss"] for record in lines(out, "train")] for out in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)


# --- Every part once, end to end --------------------------------------------------------------------------------------

PARTS = {
    "channels_last": {"backbone": RESNET, "compute": {"channels_last": True}},
    "bf16": {"compute": {"precision": "bf16"}},
    "bf16, a longer head, batch norm": {
        "backbone": RESNET,
        "compute": {"precision": "bf16"},
        "head": [{"linear": 16}, "batchnorm", "relu", {"dropout": 0.2}, "linear"],
    },
    "gradient_checkpointing": {"backbone": RESNET, "compute": {"gradient_checkpointing": True}},
    "ema": {"optim": {"ema_decay": 0.9}},
    "mixup, cutmix": {"data": {"augment": ["mixup", "cutmix"], "workers": 0}},
    "policies": {"data": {"augment": ["flip", "crop", "trivialaugment", "erasing"], "workers": 0}},
    "class weights, smoothing": {"loss": {"class_weights": "balanced", "label_smoothing": 0.1}},
    "layer_decay": {"optim": {"layer_decay": 0.5}},
    "dropout, stochastic depth": {"backbone": {"drop_rate": 0.1, "drop_path_rate": 0.2}},
    "drop_last": {"drop_last": True},
    "rules": {
        "optim": {
            "lr_rules": [{r"blocks\.0\..*": 0.1}],
            "weight_decay_rules": [{".*weight": 0.1}],
            "clip_grad_norm": 1.0,
        }
    },
    "sgd": {"optim": {"name": "sgd", "options": {"momentum": 0.9}}, "schedule": {"decay": "linear"}},
    "tensorboard": {"track": ["tensorboard"]},
}


@pytest.mark.parametrize("part", PARTS)
def test_each_part_runs_and_its_figures_are_those_of_the_model(run, plain, part):
    out = run(**PARTS[part])
    figures = result(out)
    tolerance = 2e-2 if "bf16" in part else 1e-5  # evaluated in the run's precision, loaded in float32
    # Plain cross-entropy of the model, whatever it was trained on.
    assert abs(figures["loss"] - own_top1(out, "test", 37)[1]) < tolerance
    if part not in ("tensorboard", "drop_last"):
        same_names = exported(out).keys() == exported(plain).keys()
        assert not same_names or largest_difference(exported(out), exported(plain)) > 1e-6, "it had no effect"


def test_drop_last_leaves_the_short_batch_out(run):
    out = run(drop_last=True)
    assert [record["images_seen"] for record in lines(out, "train")] == [16 * step for step in range(1, 9)]


def test_the_averages_are_what_is_exported(run):
    out = run(optim={"ema_decay": 0.9}, data={"validation_fraction": 0.0})
    checkpoint, model = last_checkpoint(out), exported(out)
    averages, weights = tensors(checkpoint / "ema.safetensors"), tensors(checkpoint / "model.safetensors")
    assert torch.equal(model["blocks.0.attn.qkv.weight"], averages["blocks.0.attn.qkv.weight"])
    assert not torch.equal(model["blocks.0.attn.qkv.weight"], weights["backbone.blocks.0.attn.qkv.weight"])


def test_tensorboard_has_the_log(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = run(track=["tensorboard"], duration="3 steps")
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    found = [(scalar.step, scalar.value) for scalar in events.Scalars("train/loss")]
    assert found == [(record["step"], pytest.approx(record["loss"], rel=1e-6)) for record in lines(out, "train")]


@pytest.mark.parametrize(
    "head", [["linear"], [{"linear": 16}, "relu", {"dropout": 0.2}, "linear"]], ids=["one", "long"]
)
def test_what_is_frozen_is_bit_equal_in_the_exported_model(run, head):
    out = run(backbone=RESNET, freeze=".*", head=head, optim={"weight_decay": 0.5, "ema_decay": 0.9})
    recipe = load_recipe(out / "recipe.yaml")
    from tlscale.models.backbone import build_backbone

    fresh, _ = build_backbone(recipe.backbone, image_size=32, seed=recipe.seed)
    before, after = fresh.state_dict(), exported(out)
    assert len(before) > 50
    assert_same_bits(before, {name: after[name] for name in before})
    assert result(out)["strategy"] == ("head" if len(head) == 1 else "mlp")
    assert result(out)["trainable_params"] < result(out)["total_params"]


def test_half_frozen_moves_only_the_other_half(run):
    out = run(backbone=RESNET, freeze=r"(conv1|bn1|layer[12])\..*")
    recipe = load_recipe(out / "recipe.yaml")
    from tlscale.models.backbone import build_backbone

    before = build_backbone(recipe.backbone, image_size=32, seed=recipe.seed)[0].state_dict()
    after = exported(out)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith(("layer3", "layer4"))}
    assert result(out)["strategy"] == "finetune"


def test_two_precisions_in_one_process(run, plain):
    from accelerate.state import AcceleratorState, PartialState

    run("bf16", compute={"precision": "bf16"})
    assert_same_runs(run("fp32"), plain)
    assert AcceleratorState._shared_state == PartialState._shared_state == {}


def test_a_program_with_an_accelerator_of_its_own_keeps_it(run, plain):
    from accelerate import Accelerator

    own = Accelerator(mixed_precision="bf16")
    with pytest.raises(LaunchError, match="an Accelerator of its own"):
        run("fp32")
    run("bf16", compute={"precision": "bf16"})
    assert own.state.mixed_precision == "bf16"


# --- Starting again, and wrong starts ---------------------------------------------------------------------------------


def everything(out):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file()}


def command(*words):
    return CliRunner().invoke(main, ["run", *map(str, words)], catch_exceptions=False)


def test_a_complete_run_is_left_alone(plain, tmp_path):
    out = shutil.copytree(plain, tmp_path / "run")
    before = everything(out)
    for words in ((), ("log_every=3 steps",)):
        done = command(plain / "recipe.yaml", *words, "--out", out, "--resume")
        assert done.exit_code == 0
        assert "is complete already" in done.output
        assert everything(out) == before
    done = command(plain / "recipe.yaml", "--out", out)
    assert done.exit_code == EXIT_BAD_INPUT
    assert "already holds a run" in done.output
    assert "Traceback" not in done.output
    assert everything(out) == before
    done = command(plain / "recipe.yaml", "--out", out, "--resume", "--overwrite")
    assert done.exit_code == EXIT_BAD_INPUT
    assert everything(out) == before


def test_overwrite_replaces_it_only_by_a_run_that_begins(plain, tmp_path):
    out = shutil.copytree(plain, tmp_path / "run")
    before = everything(out)
    done = command(plain / "recipe.yaml", "backbone.name=test_nothing", "--out", out, "--overwrite")
    assert done.exit_code == EXIT_BAD_INPUT
    assert everything(out) == before
    (out / "notes.txt").write_text("of the old run")
    done = command(plain / "recipe.yaml", "duration=3 steps", "--out", out, "--overwrite")
    assert done.exit_code == 0, done.output
    assert result(out)["steps"] == 3
    assert [record["step"] for record in lines(out, "train")] == [1, 2, 3]
    assert not (out / "notes.txt").exists()


def test_resume_with_nothing_there_starts(run, plain):
    assert_same_runs(run(resume=True), plain)


@pytest.mark.parametrize("flag", [[], ["--resume"], ["--overwrite"]], ids=str)
def test_a_folder_of_someone_else_is_refused(plain, tmp_path, flag):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("x")
    before = everything(tmp_path)
    done = command(plain / "recipe.yaml", "--out", tmp_path / "thesis", *flag)
    assert done.exit_code == EXIT_BAD_INPUT
    assert "not a run of tlscale" in done.output
    assert everything(tmp_path) == before


def test_a_wrong_run_leaves_no_half_begun_one(idx, tmp_path):
    recipe = small_recipe(tmp_path / "recipe.yaml", idx, freeze="nothing_like_it")
    with pytest.raises(Exception, match="freeze"):
        tlscale.run(recipe, tmp_path / "run")
    tlscale.run(small_recipe(tmp_path / "recipe.yaml", idx, duration="1 steps"), tmp_path / "run")


# --- Runs that fail, and data that are not as they should be ----------------------------------------------------------


def test_a_loss_that_is_no_number_ends_the_run(run, tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"at step (\d+)") as caught:
        run(optim={"lr": 1e20}, checkpoint={"every": "1 steps"}, log_every="100 steps")
    assert caught.value.exit_code == EXIT_FAILED
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))
    assert str(last_checkpoint(tmp_path / "run")) in str(caught.value)
    for folder in checkpoints:
        assert all(
            tensor.isfinite().all() for file in folder.glob("*.safetensors") for tensor in tensors(file).values()
        )
    assert not (tmp_path / "run" / "result.json").exists()
    assert not (tmp_path / "run" / "model").exists()


def test_weights_that_are_no_numbers_are_never_saved(run, tmp_path):
    # The loss of the only step is finite; its update is what goes wrong.
    with pytest.raises(NonFiniteLossError, match="step 1"):
        run(optim={"name": "sgd", "lr": 1e38, "weight_decay": 1e3}, duration="1 steps", schedule={"warmup": "0 steps"})
    assert list((tmp_path / "run").rglob("*.safetensors")) == []


def test_weights_that_are_no_numbers_are_never_the_best_so_far(run, tmp_path):
    # As above, at a step that is evaluated but not due to be saved: any first figure is the best, which is saved.
    optim = {"name": "sgd", "lr": 1e38, "weight_decay": 1e3}
    rarely = {"checkpoint": {"every": "5 steps"}, "log_every": "5 steps", "evaluate": {"every": "1 steps"}}
    with pytest.raises(NonFiniteLossError, match="step 1"):
        run(optim=optim, duration="5 steps", schedule={"warmup": "0 steps"}, **rarely)
    assert list((tmp_path / "run").rglob("*.safetensors")) == []


@pytest.fixture
def bad_images(tmp_path):
    folder = put_small_folder(tmp_path / "images")
    paths = sorted((folder / "train").glob("*/*.png"))
    paths[3].write_bytes(paths[3].read_bytes()[:50])
    paths[20].write_bytes(b"not an image")
    return folder, [paths[3], paths[20]]


def test_bad_images_are_skipped_counted_and_listed(bad_images, tmp_path, capsys):
    folder, bad = bad_images
    data = {"source": "folder", "on_bad_image": "skip"}
    recipe = small_recipe(tmp_path / "recipe.yaml", folder, **{"data": data})
    tlscale.run(recipe, tmp_path / "run")
    record, output = json.loads((tmp_path / "run" / "run.json").read_text()), capsys.readouterr().out
    listed = [why for _, why in record["bad_images"]["train"]]
    assert [str(path.relative_to(folder)) in why for path, why in zip(bad, listed, strict=True)] == [True, True]
    assert str(folder) not in json.dumps(record)  # places of this machine stay out
    assert result(tmp_path / "run")["num_bad_images"] == 2
    assert "SKIPPED: 2 of 60 images of train" in " ".join(output.split())
    assert result(tmp_path / "run")["images_seen"] == 2 * (58 - 12)  # the hold-out is drawn from sound images


def test_resume_keeps_the_list_of_bad_images(bad_images, tmp_path):
    folder, _ = bad_images
    data = {"source": "folder", "on_bad_image": "skip"}
    recipe = small_recipe(tmp_path / "recipe.yaml", folder, **{"data": data})
    tlscale.run(recipe, tmp_path / "whole")
    out = shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(out / "checkpoints" / "step_00000006")
    (out / "result.json").unlink()
    (out / "checkpoints" / "LATEST").write_text("step_00000003\n")
    tlscale.run(recipe, out, resume=True)
    assert_same_runs(tmp_path / "whole", out)
    before = json.loads((tmp_path / "whole" / "run.json").read_text())["bad_images"]
    assert json.loads((out / "run.json").read_text())["bad_images"] == before


def test_a_bad_image_is_an_error_that_names_it(bad_images, tmp_path):
    folder, bad = bad_images
    recipe = small_recipe(tmp_path / "recipe.yaml", folder, **{"data": {"source": "folder"}})
    with pytest.raises(DataError) as caught:
        tlscale.run(recipe, tmp_path / "run")
    assert any(str(path) in str(caught.value) for path in bad)
    assert caught.value.exit_code == EXIT_BAD_INPUT


def test_the_fallback_sample_says_so_loudly(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "none")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: sample\ndata: {source: fashion_mnist, fallback: sample, image_size: 32, train_limit: 60}\n"
        "backbone: {name: test_vit, weights: none, in_chans: 1}\nduration: 1 steps\nbatch_size: 16\n"
    )
    tlscale.run(load_recipe(path), tmp_path / "run")
    output = " ".join(capsys.readouterr().out.split())
    assert output.count("FALLBACK SAMPLE") == 2  # before the first step, and beside the figures
    assert result(tmp_path / "run")["is_sample"] is True
    assert any("FALLBACK SAMPLE" in note for note in result(tmp_path / "run")["notes"])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"]["is_sample"] is True


def test_what_best_points_to_chooses_nothing(run, tmp_path, idx):
    changes = {"evaluate": {"every": "2 steps", "select": "loss"}, "optim": {"lr": 0.5}}
    changes |= {"schedule": {"warmup": "100%", "decay": "constant"}}
    out = run(**changes)
    best = out / "checkpoints" / (out / "checkpoints" / "BEST").read_text().strip()
    assert best != last_checkpoint(out)
    (out / "result.json").unlink()
    (out / "checkpoints" / "BEST").write_text("../../etc\n")  # only a pointer for people
    model = exported(out)
    run(**changes, resume=True)
    assert_same_bits(exported(out), model)


def test_a_second_run_in_the_same_folder_is_refused(plain, tmp_path):
    from tlscale.storage.run_folder import claim

    with claim(tmp_path / "run", "fresh"), pytest.raises(RunFolderError, match="another job"):
        tlscale.run(load_recipe(plain / "recipe.yaml"), tmp_path / "run")


def test_compile_runs_end_to_end(run, plain, monkeypatch):
    """All of torch.compile but the C++ compiler, which alone would take more than a minute."""
    calls = []

    def compile_without_code(*args, **options):
        calls.append(args)
        return torch_compile(*args, **{**options, "backend": "aot_eager"})

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile_without_code)
    out = run(compute={"compile": True})
    torch._dynamo.reset()
    assert len(calls) == 1
    assert largest_difference(exported(out), exported(plain)) < 1e-3
    assert result(out)["loss"] == pytest.approx(own_top1(out, "test", 37)[1], abs=1e-5)
