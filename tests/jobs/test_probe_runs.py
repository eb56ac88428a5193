"""Probe runs: codes, a fitted classifier, a model that classifies images; and the codes that are kept."""

import json
import re
import shutil

import pytest
import safetensors.torch
import timm
import torch
from click.testing import CliRunner

import tlscale
from tests.small_runs import (
    exported,
    largest_difference,
    put_small_folder,
    put_small_idx,
    result,
    sample_images,
    small_recipe,
)
from tlscale.cli import main
from tlscale.codes.store import CodesStore
from tlscale.commands.evaluate import evaluate_run
from tlscale.data.transforms import ImageBatch, to_input
from tlscale.errors import EXIT_BAD_INPUT, EXIT_FAILED, ModelError, RecipeError

RESNET = {"name": "test_resnet"}
KEYS_OF_RESULT = (
    "top1", "num_images", "split", "num_classes", "strategy", "epochs", "steps", "wall_s", "images_per_s",
    "trainable_params", "total_params", "codes", "probe",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return put_small_idx(tmp_path_factory.mktemp("data"), train=200, test=60)


@pytest.fixture
def run(tmp_path, data):
    def go(name="run", **changes):
        changes = {"backbone": RESNET, "probe": {"kind": "ridge"}, **changes}
        tlscale.run(small_recipe(tmp_path / f"{name}.yaml", data, **changes), tmp_path / name)
        return tmp_path / name

    return go


def logits_of(folder, size=32):
    trained = tlscale.load(folder)
    images_NHW, labels_N = sample_images("test", 60)
    images = torch.from_numpy(images_NHW)[:, None]
    images = torch.nn.functional.interpolate(images.float(), size=size).to(torch.uint8)
    batch = ImageBatch(images, torch.from_numpy(labels_N), torch.arange(60), 60)
    with torch.inference_mode():
        return trained.model(to_input(batch, trained.input_spec, torch.float32)), labels_N


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("logistic", "fp32"), ("ridge", "fp32"), ("knn", "fp32"), ("sklearn", "fp32"), ("ridge", "fp64"), ("knn", "fp64")],
)
def test_each_kind_ends_in_a_run_like_any_other(kind, precision, run):
    out = run(
        probe={"kind": kind},
        compute={"precision": precision},
        codes={"layer": ["layer2", "penultimate"], "pool": ["avg", "max"]},
    )
    figures = result(out)
    assert set(KEYS_OF_RESULT) <= set(figures)
    assert figures["strategy"] == "early_codes"
    assert figures["steps"] == 0
    assert figures["num_images"] == 60
    assert figures["top1"] > 0.3, "real images, though random weights"
    assert set(figures["probe"]["tried"]) == {"layer2 avg", "layer2 max", "penultimate"}
    assert figures["probe"]["num_images"] == 200, "fitted again on training and held-out images"
    assert {"recipe.yaml", "run.json", "metrics.jsonl", "result.json", "model"} <= {path.name for path in out.iterdir()}
    # The model in the folder says of the images what the run says of it.
    again = evaluate_run(out)
    for key in ("num_images", "confusion"):
        assert again[key] == figures[key]
    assert again["loss"] == pytest.approx(figures["loss"], rel=1e-4)
    logits, labels = logits_of(out)
    assert logits.shape == (60, 10)
    assert len(labels) == 60


def test_the_chosen_is_the_best_of_the_held_out_images(run):
    out = run(codes={"layer": ["layer1", "layer3", "penultimate"]})
    figures = result(out)["probe"]
    best = max(row["held_out_top1"] for rows in figures["tried"].values() for row in rows)
    assert figures["held_out_top1"] == best
    name = figures["layer"] if figures["layer"] == "penultimate" else f"{figures['layer']} {figures['pool']}"
    assert best == max(row["held_out_top1"] for row in figures["tried"][name])
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["kind"] == "probe" for line in logged) == sum(map(len, figures["tried"].values()))


def test_a_linear_probe_on_penultimate_codes_is_timms_own_model(run):
    out = run(probe={"kind": "logistic", "strengths": [0.1]})
    assert result(out)["strategy"] == "codes"
    model = timm.create_model(f"local-dir:{out}/model", pretrained=True).eval()
    ours, _ = logits_of(out)
    trained = tlscale.load(out)
    images = torch.randn(3, 1, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), trained.model(images))
    assert ours.isfinite().all()


def test_what_is_kept_is_found_among_other_layers(run):
    run("wide", codes={"layer": ["layer2", "layer3", "penultimate"]}, seed=3)
    narrow = run("narrow", codes={"layer": "layer3"}, seed=3)
    assert result(narrow)["codes"]["num_computed"] == 0
    other = run("other", codes={"layer": "layer1"}, seed=3)
    assert result(other)["codes"]["num_computed"] == 260
    pool = run("pool", codes={"layer": "layer3", "pool": "max"}, seed=3)
    assert result(pool)["codes"]["num_computed"] == 260


def test_a_head_that_is_trained_finds_what_a_probe_computed(data, tmp_path, run):
    wide = run("wide", codes={"layer": ["layer3", "penultimate"]}, seed=5)
    assert result(wide)["codes"]["num_computed"] == 260
    changes = {"backbone": RESNET, "freeze": ".*", "seed": 5, "head": [{"linear": 8}, "relu", "linear"]}
    for keep in ("auto", "never"):
        recipe = small_recipe(tmp_path / "r.yaml", data, **changes, codes={"keep": keep})
        tlscale.run(recipe, tmp_path / keep)
    assert result(tmp_path / "auto")["codes"]["num_computed"] == 0
    assert largest_difference(exported(tmp_path / "auto"), exported(tmp_path / "never")) < 1e-5


def test_a_run_again_is_a_hit_and_the_same(run):
    first, second = run("one", seed=4), run("two", seed=4)
    assert result(first)["codes"]["num_computed"] == 260
    assert result(second)["codes"]["num_computed"] == 0
    assert result(first)["confusion"] == result(second)["confusion"]


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"codes": {"layer": "layer9"}}, ModelError, "layer9"),
        ({"codes": {"layer": "layer3", "pool": "token"}}, ModelError, "token"),
        ({"data": {"validation_fraction": 0.0}}, RecipeError, "data.validation_fraction"),
        (
            {
                "data": {"validation_fraction": 0.0},
                "codes": {"layer": ["layer3", "penultimate"]},
                "probe": {"kind": "ridge", "strengths": [1.0]},
            },
            RecipeError,
            "'layer3 avg' and 'penultimate' cannot be compared",
        ),
        ({"probe": {"kind": "knn", "neighbours": [500]}}, RecipeError, "probe.neighbours: 500"),
    ],
)
def test_wrong_probes(changes, error, said, run, tmp_path):
    with pytest.raises(error, match=re.escape(said)):
        run(**changes)
    assert not (tmp_path / "run" / "run.json").exists(), "the same line must work once the recipe is mended"


@pytest.mark.parametrize("changes", [{"probe": {"kind": "ridge"}}, {"freeze": ".*", "duration": "1 steps"}], ids=str)
def test_notes_on_the_data_name_no_place_of_the_machine(changes, tmp_path):
    images = put_small_folder(tmp_path / "images")
    (images / "train" / "about.txt").write_text("no image")
    recipe = small_recipe(tmp_path / "r.yaml", images, data={"source": "folder"}, backbone=RESNET, **changes)
    notes = tlscale.run(recipe, tmp_path / "run")["notes"]
    assert any("about.txt" in note for note in notes)
    assert str(tmp_path) not in json.dumps(notes)


def test_a_layer_without_effect_in_training_is_refused(data, tmp_path):
    recipe = small_recipe(tmp_path / "recipe.yaml", data, backbone=RESNET, codes={"layer": "layer3"})
    with pytest.raises(RecipeError, match=r"codes\.layer: has no effect in training"):
        tlscale.run(recipe, tmp_path / "run")


# --- The command line -------------------------------------------------------------------------------------------------


def cli(*words):
    return CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "codes"


def test_codes_are_computed_ahead_and_looked_after(data, tmp_path, cache):
    path = tmp_path / "recipe.yaml"
    small_recipe(path, data, backbone=RESNET, probe={"kind": "ridge"})
    said = cli("codes", path)
    assert said.exit_code == 0
    assert "260 images were computed" in said.output
    assert "0 images were computed" in cli("codes", path).output
    assert result_of_run(path, tmp_path / "run")["codes"]["num_computed"] == 0
    listed = cli("codes", "list").output
    assert "penultimate" in listed
    assert "32 px" in listed
    digest = CodesStore().entries()[0].digest
    assert digest[:12] in listed
    assert "every byte is as it was written" in cli("codes", "verify").output
    file = next(cache.rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    damaged = cli("codes", "verify")
    assert damaged.exit_code == EXIT_FAILED
    assert "computes them again" in damaged.output + (damaged.stderr or "")
    assert cli("codes", "prune", digest[:8]).exit_code == 0
    assert digest not in {entry.digest for entry in CodesStore().entries()}
    assert "freed" in cli("codes", "prune", "--all").output
    assert CodesStore().entries() == []
    assert "no codes in" in cli("codes", "list").output
    assert cli("codes", "prune").exit_code == EXIT_BAD_INPUT


def result_of_run(path, out):
    assert cli("run", path, "--out", out).exit_code == 0
    return result(out)


def test_codes_of_a_recipe_that_trains_are_those_of_its_frozen_part(data, tmp_path, cache):
    path = tmp_path / "recipe.yaml"
    small_recipe(path, data, backbone=RESNET, freeze=r"(conv1|bn1|layer[12])\..*", duration="1 epochs")
    assert "260 images were computed" in cli("codes", path).output
    assert result_of_run(path, tmp_path / "run")["codes"]["num_computed"] == 0
    small_recipe(path, data, backbone=RESNET)
    none = cli("codes", path)
    assert none.exit_code == EXIT_BAD_INPUT
    assert "nothing is frozen" in none.output + (none.stderr or "")


def test_probe_of_a_recipe_that_trains(data, tmp_path, cache):
    path = tmp_path / "recipe.yaml"
    weights = tmp_path / "weights.safetensors"
    state = timm.create_model("test_resnet", num_classes=0, in_chans=1).state_dict()
    safetensors.torch.save_file(state, weights)
    backbone = {**RESNET, "weights": str(weights)}
    small_recipe(path, data, backbone=backbone, freeze=".*", optim={"lr": 0.1})
    assert cli("probe", path, "--out", tmp_path / "run").exit_code == 0
    assert result(tmp_path / "run")["strategy"] == "codes"
    words = ("codes.layer=[layer2,layer3]", "codes.pool=[max]")
    assert cli("probe", path, *words, "--out", tmp_path / "early").exit_code == 0
    assert set(result(tmp_path / "early")["probe"]["tried"]) == {"layer2 max", "layer3 max"}


def test_plan_says_where_the_network_is_cut_and_what_that_saves(data, tmp_path, cache):
    path = tmp_path / "recipe.yaml"
    small_recipe(path, data, backbone=RESNET, freeze=r"(conv1|bn1|layer[12])\..*")
    said = " ".join(cli("plan", path).output.split())
    assert "computed once: " in said
    assert "layer2" in said
    assert "bytes an image x 260 images" in said
    assert "times as long" in said
    small_recipe(path, data, backbone=RESNET, probe={})
    said = " ".join(cli("plan", path).output.split())
    assert "logistic on codes of penultimate" in said
    assert "penultimate avg - 96" in said
    assert "Fit, on this machine's CPU" in said
    assert "s a pass over 200 codes of 96 features and 10 classes" in said
    small_recipe(path, data, backbone=RESNET, probe={}, codes={"layer": "layer9"})
    assert cli("plan", path).exit_code == EXIT_BAD_INPUT
    small_recipe(path, data, backbone=RESNET, codes={"layer": "layer3"})
    assert cli("plan", path).exit_code == EXIT_BAD_INPUT
    assert not cache.exists() or CodesStore().entries() == []


def test_class_weights_and_the_figure_that_chooses_are_the_recipes(tmp_path, capsys):
    """Of a rare class: weighted and chosen by balanced accuracy it is answered more often than without."""
    folder = put_small_folder(tmp_path / "data", train=90, test=40)
    for path in sorted((folder / "train").glob("*/*.png"))[::2]:
        if path.parent.name > "4":
            path.unlink()
    keys = {"data": {"source": "folder", "validation_fraction": 0.3}, "backbone": RESNET}
    keys["probe"] = {"kind": "logistic", "strengths": [1.0, 0.1], "refit": False}
    weighted = {"loss": {"class_weights": "balanced"}, "evaluate": {"select": "balanced_accuracy"}}
    plain, figures = (
        tlscale.run(small_recipe(tmp_path / f"{name}.yaml", folder, **keys, **more), tmp_path / name)
        for name, more in (("plain", {}), ("weighted", weighted))
    )
    said = capsys.readouterr().out
    assert "balanced_accuracy" in said
    assert "after step" not in said, "a probe makes no steps"
    tried = figures["probe"]["tried"]["penultimate"]
    assert figures["probe"]["select"] == "balanced_accuracy"
    best = max(tried, key=lambda row: (row["held_out_balanced_accuracy"], -row["held_out_loss"]))
    assert figures["probe"]["setting"] == best["setting"]
    assert {"select", "held_out_balanced_accuracy"}.isdisjoint(plain["probe"])
    assert largest_difference(exported(tmp_path / "plain"), exported(tmp_path / "weighted")) > 1e-3
    (tmp_path / "weighted" / "result.json").unlink()
    again = small_recipe(tmp_path / "weighted.yaml", folder, **keys, **weighted)
    assert tlscale.run(again, tmp_path / "weighted", resume=True)["probe"] == figures["probe"]


@pytest.mark.parametrize("select", ["auroc", "mean_average_precision"])
def test_a_probe_is_chosen_by_the_order_of_the_images(select, tmp_path):
    """The figure by which it is chosen is that of the result, where the validation images are scored."""
    folder = put_small_folder(tmp_path / "data")
    shutil.rmtree(folder / "test")
    data = {"source": "folder", "validation_fraction": 0.4}
    probe = {"kind": "logistic", "strengths": [10.0, 0.1, 0.001], "refit": False}
    keys = {"data": data, "backbone": RESNET, "probe": probe, "evaluate": {"select": select}}
    figures = tlscale.run(small_recipe(tmp_path / "r.yaml", folder, **keys), tmp_path / "run")
    assert figures["split"] == "validation"
    tried, key = figures["probe"]["tried"]["penultimate"], f"held_out_{select}"
    assert len({row[key] for row in tried}) > 1
    best = max(tried, key=lambda row: (row[key], -row["held_out_loss"]))
    assert figures["probe"]["setting"] == best["setting"]
    assert figures[select] == pytest.approx(figures["probe"][key], abs=1e-9)


def test_a_probe_gives_no_class_a_weight_of_0(run):
    weights = {str(label): float(label > 0) for label in range(10)}
    with pytest.raises(RecipeError, match="'0' weighs 0") as caught:
        run(loss={"class_weights": weights})
    assert caught.value.key == "loss.class_weights"
