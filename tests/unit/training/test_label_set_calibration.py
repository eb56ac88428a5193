"""The temperature of several labels: the one that SciPy finds, 1 where nothing tells it from 1, and no figure of what
chose it."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from sklearn.metrics import log_loss, precision_recall_curve, roc_auc_score

from tlscale.models.calibration import Calibration
from tlscale.training.calibration import calibration_error
from tlscale.training.label_set_calibration import choose_label_temperature, label_calibration_by
from tlscale.training.label_set_figures import add_label_figures
from tlscale.training.label_set_metrics import label_calibration_error

CLASSES = ["a", "b", "c"]
ROWS = {"per_class": {name: {} for name in CLASSES}}


def made(num_images=400, *, heat=1.0, seed=0):
    """Logits that are `heat` times those of the very probabilities by which labels are drawn."""
    draws = np.random.default_rng(seed)
    logits_NC = draws.normal(size=(num_images, 3)) * 1.5 - 1
    labels_NC = draws.random((num_images, 3)) < 1 / (1 + np.exp(-logits_NC))
    return labels_NC, logits_NC * heat


def table_of(labels_NC, logits_NC, **about):
    names = [[name for name, has in zip(CLASSES, row, strict=True) if has] for row in labels_NC]
    table = pa.table({"true_labels": names, "labels": names, "logits": logits_NC.astype(np.float32).tolist()})
    return table.replace_schema_metadata({"tlscale": json.dumps({"classes": CLASSES, **about})})


@pytest.mark.parametrize("heat", [0.3, 1.0, 4.0])
def test_the_temperature_has_the_least_cross_entropy(heat):
    labels_NC, logits_NC = made(heat=heat)
    target = 401 / 402

    def loss(temperature):
        shares_NC = 1 / (1 + np.exp(-logits_NC / temperature))
        targets_NC = np.where(labels_NC, target, 1 - target)
        return -np.mean(targets_NC * np.log(shares_NC) + (1 - targets_NC) * np.log(1 - shares_NC))

    found = minimize_scalar(loss, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-9})
    temperature = choose_label_temperature(labels_NC, logits_NC)
    assert temperature == pytest.approx(found.x, rel=1e-5)
    assert temperature == pytest.approx(heat, rel=0.15)


def test_images_that_are_all_right_do_not_make_all_answers_certain():
    labels_NC, _ = made(20)
    assert choose_label_temperature(labels_NC, np.where(labels_NC, 3.0, -3.0)) > 0.5


def test_it_is_one_where_the_images_do_not_tell_it_from_one():
    assert label_calibration_by(table_of(*made(400))).temperature == 1.0
    chosen = label_calibration_by(table_of(*made(400, heat=4.0)))
    assert (chosen.temperature, chosen.num_images, chosen.sets) == (pytest.approx(4.0, rel=0.15), 400, None)
    labels_NC, logits_NC = made(30, heat=4.0)
    logits_NC[:10, 1] = np.nan
    assert label_calibration_by(table_of(labels_NC, logits_NC)).num_images == 20
    assert label_calibration_by(table_of(labels_NC[:10], logits_NC[:10])) is None


def test_the_calibration_error_is_the_mean_of_that_of_each_class():
    labels_NC, logits_NC = made(300, heat=3.0)
    labels_NC[:, 2] = False
    shares_NC = 1 / (1 + np.exp(-logits_NC))
    each = [calibration_error(shares_NC[:, label], labels_NC[:, label]) for label in (0, 1)]
    assert label_calibration_error(shares_NC, labels_NC) == pytest.approx(np.mean(each))
    bins_N = np.clip(np.ceil(shares_NC[:, 0] * 15).astype(int) - 1, 0, 14)
    gaps = [abs((labels_NC[bins_N == b, 0] - shares_NC[bins_N == b, 0]).sum()) for b in range(15)]
    assert each[0] == pytest.approx(sum(gaps) / 300)
    unanswered_NC = np.concatenate([shares_NC, np.full((5, 3), np.nan)])
    with_them = label_calibration_error(unanswered_NC, np.concatenate([labels_NC, labels_NC[:5]]))
    assert with_them == label_calibration_error(shares_NC, labels_NC)


def test_images_that_did_not_choose_it_judge_it(tmp_path):
    labels_NC, logits_NC = made(300, heat=3.0, seed=1)
    calibration = Calibration(temperature=3.0, num_images=50)
    pq.write_table(table_of(labels_NC, logits_NC, calibration=calibration.model_dump()), tmp_path / "p.parquet")
    told = add_label_figures(ROWS, tmp_path / "p.parquet")["calibration"]
    shares_NC = calibration.label_probabilities(torch.from_numpy(logits_NC.astype(np.float32))).numpy()
    expected = np.mean([log_loss(labels_NC[:, label], shares_NC[:, label]) for label in range(3)])
    assert told["loss"] == pytest.approx(expected, rel=1e-6)
    own = label_calibration_error(1 / (1 + np.exp(-logits_NC)), labels_NC)
    assert told["ece"] == pytest.approx(label_calibration_error(shares_NC, labels_NC))
    assert told["ece"] < own / 2
    chosen = add_label_figures(ROWS, tmp_path / "p.parquet", have_chosen=True)["calibration"]
    assert chosen == {"temperature": 3.0, "loss": None, "ece": None}
    pq.write_table(table_of(labels_NC, logits_NC), tmp_path / "q.parquet")
    assert "calibration" not in add_label_figures(ROWS, tmp_path / "q.parquet")


def test_rankings_curves_and_recalls_are_those_of_scikit_learn_and_wilson(tmp_path):
    labels_NC, logits_NC = made(200, seed=2)
    table = table_of(labels_NC, logits_NC)
    given_NC = logits_NC > 0.2
    names = [[name for name, has in zip(CLASSES, row, strict=True) if has] for row in given_NC]
    groups = [f"g{number // 4}" for number in range(200)]
    for file, more in (("p", {}), ("q", {"group": groups})):
        written = table.drop_columns("labels").append_column("labels", [names])
        for name, column in more.items():
            written = written.append_column(name, [column])
        pq.write_table(written.replace_schema_metadata(table.schema.metadata), tmp_path / f"{file}.parquet")
    found = add_label_figures({"mean_average_precision": 0.0, **ROWS}, tmp_path / "p.parquet")
    shares_NC = 1 / (1 + np.exp(-logits_NC.astype(np.float32).astype(np.float64)))
    each = roc_auc_score(labels_NC, shares_NC, average=None)
    assert [found["per_class"][name]["auroc"] for name in CLASSES] == pytest.approx(each)
    assert found["auroc"] == pytest.approx(roc_auc_score(labels_NC, shares_NC))
    for number, name in enumerate(CLASSES):
        precision, recall, score = precision_recall_curve(labels_NC[:, number], shares_NC[:, number])
        at_R = [int(np.abs(score - at).argmin()) for at in found["pr_curves"][name]["score"]]
        curve = found["pr_curves"][name]
        ours = list(zip(curve["precision"], curve["recall"], strict=True))
        np.testing.assert_allclose(score[at_R], curve["score"], rtol=1e-6)
        np.testing.assert_allclose(ours, np.stack([precision[at_R], recall[at_R]], axis=1))
        own, hits = labels_NC[:, number], labels_NC[:, number] & given_NC[:, number]
        wilson = binomtest(int(hits.sum()), int(own.sum())).proportion_ci(0.95, "wilson")
        assert found["per_class"][name]["recall_interval95"] == pytest.approx(list(wilson))
    over_groups = add_label_figures(ROWS, tmp_path / "q.parquet")["per_class"]["a"]["recall_interval95"]
    assert over_groups != found["per_class"]["a"]["recall_interval95"]


def test_an_image_without_an_answer_ranks_last_and_is_not_found(tmp_path):
    labels_NC, logits_NC = made(40, seed=3)
    labels_NC[:3, 0], logits_NC[:3] = True, np.nan
    table = table_of(labels_NC, logits_NC)
    names = [None, None, None, *([["a"]] * 37)]
    written = table.drop_columns("labels").append_column("labels", pa.chunked_array([pa.array(names)]))
    pq.write_table(written.replace_schema_metadata(table.schema.metadata), tmp_path / "p.parquet")
    found = add_label_figures(ROWS, tmp_path / "p.parquet")["per_class"]["a"]
    assert found["auroc"] == pytest.approx(roc_auc_score(labels_NC[:, 0], np.nan_to_num(logits_NC[:, 0], nan=-1e9)))
    count = int(labels_NC[:, 0].sum())
    wilson = binomtest(count - 3, count).proportion_ci(0.95, "wilson")
    assert found["recall_interval95"] == pytest.approx(list(wilson))
