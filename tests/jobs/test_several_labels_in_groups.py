"""Several labels an image, and several images a patient: no patient is divided, and intervals are over patients."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

import tlscale
from tests.garments import CLASSES, PROBE, SEVERAL, put_garments
from tests.small_runs import result, small_recipe
from tlscale.cli import main
from tlscale.data.sources.tables import number_groups
from tlscale.training.label_set_metrics import LabelFigures, probabilities

KEYS = {**SEVERAL, "group_column": "patient", "validation_fraction": 0.3}
TRAINED = {"duration": "4 steps", "evaluate": {"every": "2 steps"}, "checkpoint": {"every": "2 steps", "keep": 9}}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """90 pictures, three of each patient."""
    return put_garments(tmp_path_factory.mktemp("data"), photos=3)


@pytest.fixture(scope="module")
def trained(table, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return tlscale.run(small_recipe(out / "r.yaml", table, data=KEYS, **TRAINED), out / "run")


@pytest.fixture(scope="module")
def probed(table, tmp_path_factory):
    out = tmp_path_factory.mktemp("probe")
    return tlscale.run(small_recipe(out / "r.yaml", table, data=KEYS, **PROBE), out / "run")


def figures_over_groups(file) -> LabelFigures:
    """The figures of a file of predictions, computed anew."""
    table = pq.read_table(file)
    shares_NC = probabilities(torch.tensor(table["logits"].to_pylist(), dtype=torch.float32)).numpy()
    truth_NC = np.array([[name in own for name in CLASSES] for own in table["true_labels"].to_pylist()])
    groups_N = number_groups(table["group"].combine_chunks().cast("large_string"))
    return LabelFigures(shares_NC, truth_NC, np.zeros(len(table)), groups_N)


@pytest.mark.parametrize("kind", ["trained", "probed"])
def test_no_patient_is_divided_and_the_interval_is_over_patients(kind, request):
    figures = request.getfixturevalue(kind)
    table = pq.read_table(figures.folder / "predictions.parquet")
    patients = table["group"].to_pylist()
    assert len(patients) == 3 * len(set(patients)) == 27
    assert figures["mean_average_precision_interval95_by"] == {"groups": 9}
    again = figures_over_groups(figures.folder / "predictions.parquet").summary(CLASSES, None)
    assert list(figures.interval) == pytest.approx(again["mean_average_precision_interval95"])
    assert f"over {9} groups" in repr(figures)
    assert figures["groups"]["num_groups"] == {"train": 30}


def test_the_error_of_what_chooses_the_weights_is_over_patients(trained):
    # There is no test split, so the predictions are of the chosen step on the images that chose it.
    choice = trained["choice"]
    assert choice["standard_error_by"] == {"groups": 9}
    file = trained.folder / "predictions.parquet"
    assert choice["standard_error"] == pytest.approx(figures_over_groups(file).standard_error("mean_average_precision"))


def test_evaluations_go_by_the_patients(trained):
    found = tlscale.evaluate(trained.folder, split="validation")
    for key in ("mean_average_precision", "mean_average_precision_interval95", "mean_average_precision_interval95_by"):
        assert found[key] == (pytest.approx(trained[key], abs=1e-6) if "by" not in key else trained[key])


def test_a_resumed_run_ends_in_the_same_interval(trained, table, tmp_path):
    out = tmp_path / "run"
    recipe = small_recipe(tmp_path / "r.yaml", table, data=KEYS, **TRAINED)
    tlscale.run(recipe, out)
    (out / "result.json").unlink()
    tlscale.run(recipe, out, resume=True)
    assert result(out)["mean_average_precision_interval95"] == trained["mean_average_precision_interval95"]


def test_a_limit_and_a_table_with_other_rows_keep_whole_patients(table, tmp_path):
    out = tmp_path / "run"
    limited = tlscale.run(small_recipe(tmp_path / "r.yaml", table, data={**KEYS, "train_limit": 40}, **PROBE), out)
    patients = pq.read_table(out / "predictions.parquet")["group"].to_pylist()
    assert len(patients) == 3 * len(set(patients))
    assert sum(json.loads((out / "run.json").read_text())["data"]["num_images"].values()) == 40
    assert limited["mean_average_precision_interval95_by"] == {"groups": len(set(patients))}


def test_new_hints_at_the_groups(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["new", str(table), "--out", "a.yaml"])
    assert done.exit_code == 0, done.output
    assert "the column 'patient' may tell which images belong together" in " ".join(done.output.split())
    assert "# group_column: patient" in (tmp_path / "a.yaml").read_text()
