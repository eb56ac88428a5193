"""Several labels an image, from the table to predictions: a network that is trained, and a probe."""

import csv
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

import tlscale
from tests.garments import CLASSES, SEVERAL, put_garments
from tests.small_runs import small_recipe
from tlscale.cli import main
from tlscale.errors import EXIT_BAD_INPUT, RecipeError, TlscaleError


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return put_garments(tmp_path_factory.mktemp("data"), num_test=30)


@pytest.fixture(scope="module")
def trained(table, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    recipe = small_recipe(out / "r.yaml", table, data=SEVERAL, loss={"class_weights": "balanced"})
    return tlscale.run(recipe, out / "run")


@pytest.fixture(scope="module")
def probed(table, tmp_path_factory):
    out = tmp_path_factory.mktemp("probe")
    keys = {"backbone": {"name": "test_resnet"}, "codes": {"layer": ["layer2", "penultimate"]}}
    recipe = small_recipe(out / "r.yaml", table, data=SEVERAL, probe={"kind": "logistic"}, **keys)
    return tlscale.run(recipe, out / "run")


@pytest.fixture(params=["trained", "probed"])
def result(request):
    return request.getfixturevalue(request.param)


def rows_of(file):
    with file.open() as lines:
        return list(csv.DictReader(lines))


def predictions(folder):
    """The file's table, the probabilities and the labels, (N, C)."""
    table = pq.read_table(folder / "predictions.parquet")
    logits_NC = np.array(table["logits"].to_pylist())
    truth_NC = np.array([[name in own for name in CLASSES] for own in table["true_labels"].to_pylist()])
    return table, 1 / (1 + np.exp(-logits_NC.astype(np.float64))), truth_NC


def test_figures_are_scikit_learns_on_the_saved_predictions(result):
    table, shares_NC, truth_NC = predictions(result.folder)
    about = json.loads(table.schema.metadata[b"tlscale"])
    given_NC = np.array([[name in own for name in CLASSES] for own in table["labels"].to_pylist()])
    assert (about["classes"], about["task"]) == (list(CLASSES), "multi_label")
    assert (given_NC == (shares_NC >= np.array(about["thresholds"]))).all()
    assert truth_NC.any(axis=0).all()
    per_class = [result["per_class"][name] for name in CLASSES]
    assert [row["average_precision"] for row in per_class] == pytest.approx(
        average_precision_score(truth_NC, shares_NC, average=None)
    )
    assert [row["f1"] for row in per_class] == pytest.approx(f1_score(truth_NC, given_NC, average=None))
    assert result["mean_average_precision"] == result.mean_average_precision
    assert result["mean_average_precision"] == pytest.approx(average_precision_score(truth_NC, shares_NC))
    assert [row["threshold"] for row in per_class] == about["thresholds"]
    assert result["num_images"] == 30
    assert [row["auroc"] for row in per_class] == pytest.approx(roc_auc_score(truth_NC, shares_NC, average=None))
    assert result["auroc"] == pytest.approx(roc_auc_score(truth_NC, shares_NC))
    assert list(result["pr_curves"]) == list(CLASSES)
    assert all(row["recall_interval95"][0] <= row["recall"] <= row["recall_interval95"][1] for row in per_class)
    low, high = result.interval
    assert low < result["mean_average_precision"] < high
    assert result["chance"]["mean_average_precision"] == pytest.approx(truth_NC.mean())
    assert f"mAP {result['mean_average_precision']:.4f}" in repr(result)
    assert "AP" in result._repr_html_()
    assert set(result) >= {"macro_f1", "micro_f1", "subset_accuracy"}
    assert result["ece"] == pytest.approx(np.mean([row["ece"] for row in per_class]))
    assert not set(result) & {"top1", "majority"}


def test_thresholds_are_of_the_validation_images_and_in_the_model(result):
    config = json.loads((result.folder / "model" / "config.json").read_text())["tlscale"]
    model = tlscale.load(result.folder)
    assert (config["format"], config["task"]) == (4 if "calibration" in config else 3, "multi_label")
    assert model.thresholds == tuple(row["threshold"] for row in result["per_class"].values())
    assert set(model.thresholds) != {0.5}


def test_predict_gives_the_labels_of_the_run(result, table, tmp_path):
    file, shares_NC, _ = predictions(result.folder)
    paths = [str(table.parent / path) for path in file["path"].to_pylist()]
    made = tlscale.load(result.folder).predict(paths)
    assert made.labels == [tuple(own) for own in file["labels"].to_pylist()]
    np.testing.assert_allclose(made.probabilities, shares_NC, rtol=1e-5)
    (tmp_path / "no.png").write_bytes(b"x")
    out = tlscale.predict(result.folder, [*paths, str(tmp_path / "no.png")], tmp_path / "labels.csv")
    rows = rows_of(out)
    assert list(rows[0]) == ["path", "labels", *(f"p_{name}" for name in CLASSES), "error"]
    assert [row["labels"] for row in rows[:30]] == ["|".join(own) for own in file["labels"].to_pylist()]
    assert rows[30]["labels"] == rows[30]["p_boot"] == ""
    assert rows[30]["error"]
    parquet = tlscale.predict(result.folder, paths, tmp_path / "labels.parquet")
    assert pq.read_table(parquet)["labels"].to_pylist() == [row["labels"] for row in rows[:30]]
    with pytest.raises(TlscaleError, match="any number of labels"):
        tlscale.predict(result.folder, paths, tmp_path / "labels_2.csv", top_k=2)
    assert len(made.to_pandas().columns) == 7


def test_evaluate_gives_the_figures_of_the_run(result):
    found = tlscale.evaluate(result.folder)
    assert found["mean_average_precision"] == pytest.approx(result["mean_average_precision"])
    for name, row in result["per_class"].items():
        again = dict(found["per_class"][name])
        assert again.pop("recall_interval95") == row["recall_interval95"]
        assert again == pytest.approx({key: row[key] for key in again}, rel=1e-6, nan_ok=True)
    assert tlscale.evaluate(result.folder, split="train")["num_images"] == 48


def test_copies_of_images_that_chose_do_not_say_what_the_temperature_is_worth(trained, table, tmp_path):
    own = tlscale.evaluate(trained.folder, split="validation", out=tmp_path / "own").folder
    paths = pq.read_table(own / "predictions.parquet")["path"].to_pylist()
    label_of = {row["path"]: row["label"] for row in rows_of(table)}
    rows = ["path,label", *(f"{number}.png,{label_of[path]}" for number, path in enumerate(paths))]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    for number, path in enumerate(paths):
        shutil.copy(table.parent / path, tmp_path / f"{number}.png")
    new = tlscale.evaluate(trained.folder, data=str(tmp_path / "list.csv"))
    assert (new["num_selected_on"], new["num_trained_on"]) == (len(paths), 0)
    assert (new["calibration"]["loss"], new["calibration"]["ece"]) == (None, None)
    assert "too good by those" in new["notes"][-1]


def test_validation_chose_the_weights_by_map(trained):
    assert trained["choice"]["select"] == "mean_average_precision"
    assert trained["choice"]["standard_error"] > 0


def test_a_probe_tells_the_held_out_mean_average_precision(probed):
    tried = [row for rows in probed["probe"]["tried"].values() for row in rows]
    assert probed["probe"]["held_out_mean_average_precision"] == max(
        row["held_out_mean_average_precision"] for row in tried
    )
    assert probed["probe"]["held_out_top1"] is None


def test_a_resumed_run_ends_in_the_same_figures(trained, table, tmp_path):
    import shutil

    shutil.copytree(trained.folder, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "model")
    again = tlscale.run(trained.folder / "recipe.yaml", tmp_path / "run", resume=True)
    assert again["mean_average_precision"] == trained["mean_average_precision"]
    assert again["per_class"] == trained["per_class"]


@pytest.mark.slow  # exporters take seconds
def test_exports_carry_the_thresholds(trained, tmp_path):
    import onnx

    tlscale.export(trained.folder, to="onnx", out=tmp_path / "onnx")
    props = {prop.key: json.loads(prop.value) for prop in onnx.load(tmp_path / "onnx" / "model.onnx").metadata_props}
    model = tlscale.load(trained.folder)
    assert (props["task"], props["thresholds"]) == ("multi_label", list(model.thresholds))
    tlscale.export(trained.folder, to="hub", out=tmp_path / "hub")
    assert tlscale.load(tmp_path / "hub").thresholds == model.thresholds
    card = (tmp_path / "hub" / "README.md").read_text()
    assert f"Mean average precision {trained['mean_average_precision']:.4f}" in card
    assert "answers with one of them" not in card


def test_a_hold_out_scores_on_what_chose_the_thresholds(table, tmp_path):
    rows = [row for row in rows_of(table) if row["split"] == "train"]
    with (table.parent / "train.csv").open("w") as file:
        csv.writer(file).writerows([("path", "label"), *((row["path"], row["label"]) for row in rows)])
    keys = {"backbone": {"name": "test_resnet"}, "probe": {"kind": "logistic", "strengths": [0.1]}}
    result = tlscale.run(
        small_recipe(tmp_path / "r.yaml", table.parent / "train.csv", data=SEVERAL, **keys), tmp_path / "run"
    )
    assert (result["split"], result["selected_on"]) == ("validation", "validation")
    assert result["scored_model"] == "before_refit"


def test_a_model_of_several_labels_is_no_teacher_of_one(trained, tmp_path):
    from tests.small_runs import put_small_idx

    recipe = small_recipe(
        tmp_path / "r.yaml",
        put_small_idx(tmp_path / "data"),
        distill={"run": str(trained.folder), "logits": 1.0, "codes": 0.0},
    )
    with pytest.raises(RecipeError, match=r"distill.logits: .*several labels an image"):
        tlscale.run(recipe, tmp_path / "run")


def test_new_finds_them_and_plan_counts_them(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["new", str(table), "--out", "a.yaml"])
    assert done.exit_code == 0, done.output
    assert "90 images with any number of 4 classes" in done.output
    assert "tlscale compare a.yaml" in done.output
    data = yaml.safe_load((tmp_path / "a.yaml").read_text())["data"]
    assert (data["task"], data["label_separator"]) == ("multi_label", ";")
    planned = CliRunner().invoke(main, ["plan", "a.yaml"])
    assert "an image on average, at most 2" in planned.output
    flags = [(row["path"], *(int(name in row["label"]) for name in CLASSES)) for row in rows_of(table)]
    with (table.parent / "flags.csv").open("w") as file:
        csv.writer(file).writerows([("path", *CLASSES), *flags])
    done = CliRunner().invoke(main, ["new", str(table.parent / "flags.csv"), "--out", "b.yaml"])
    assert done.exit_code == 0, done.output
    assert yaml.safe_load((tmp_path / "b.yaml").read_text())["data"]["label_columns"] == list(CLASSES)


def test_what_cannot_be_told_apart_is_exit_code_2(table, tmp_path):
    small_recipe(tmp_path / "r.yaml", table, data={"source": "manifest"})
    done = CliRunner().invoke(main, ["plan", str(tmp_path / "r.yaml")])
    assert done.exit_code == EXIT_BAD_INPUT
    assert "They look like several an image, with ';' between them" in done.output
