"""The temperature of the model on all images: chosen by the answers of all folds, and judged crosswise."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from tests.recompute import _calibration_error
from tlscale.data.sources.folds import Fold
from tlscale.models.calibration import Calibration, LabelSets
from tlscale.training.calibration import choose_calibration
from tlscale.training.fold_calibration import FITTED_TO_ALL, about_fold_calibration, choose_by_folds, crosswise_figures
from tlscale.training.fold_parts import Part
from tlscale.training.label_set_calibration import label_calibration_by
from tlscale.training.label_set_metrics import label_calibration_error

CLASSES = ["a", "b", "c"]


def table_of(labels_N, logits_NC, folds_N, repeats_N=None, groups_N=None):
    """Predictions of folds: in order of the images, repeat by repeat."""
    logits_NC = logits_NC.astype(np.float32)
    repeats_N = np.ones(len(labels_N), int) if repeats_N is None else repeats_N
    answers_N = logits_NC.argmax(1)
    columns = {
        "row": np.arange(len(labels_N)) % (len(labels_N) // repeats_N.max()),
        "true_label": [CLASSES[label] for label in labels_N],
        "label": pa.array([CLASSES[answer] for answer in answers_N], mask=np.isnan(logits_NC).any(1)),
        "probability": softmax(logits_NC, 1.0).max(1),
        "logits": logits_NC.tolist(),
        "fold": folds_N,
        "repeat": repeats_N,
        **({} if groups_N is None else {"group": [str(group) for group in groups_N]}),
    }
    return pa.table(columns).replace_schema_metadata({"tlscale": json.dumps({"classes": CLASSES})})


def softmax(logits_NC, temperature):
    shares_NC = np.exp((logits_NC - logits_NC.max(1, keepdims=True)).astype(float) / temperature)
    return shares_NC / shares_NC.sum(1, keepdims=True)


def drawn(count, heat, seed=0):
    """Logits that are `heat` times those of the probabilities by which labels are drawn, and four folds."""
    draws = np.random.default_rng(seed)
    logits_NC = draws.normal(0, 2, (count, 3)).astype(np.float32)
    labels_N = (logits_NC + draws.gumbel(size=logits_NC.shape)).argmax(1)
    return labels_N, heat * logits_NC, 1 + np.arange(count) % 4


def of_several(labels_N, logits_NC, folds_N):
    """The same of several labels: a class is there where a draw by its own logit says so."""
    has_NC = np.random.default_rng(len(labels_N)).random(logits_NC.shape) < 1 / (1 + np.exp(-logits_NC / 3))
    names = [[name for name, has in zip(CLASSES, row, strict=True) if has] for row in has_NC]
    columns = {"row": np.arange(len(names)), "true_labels": names, "labels": names, "logits": logits_NC.tolist()}
    table = pa.table({**columns, "fold": folds_N, "repeat": np.ones(len(names), int)})
    return has_NC, table.replace_schema_metadata({"tlscale": json.dumps({"classes": CLASSES})})


def test_it_is_chosen_by_each_image_once():
    labels_N, logits_NC, folds_N = drawn(200, 3.0)
    once = choose_by_folds(table_of(labels_N, logits_NC, folds_N))
    assert once == choose_calibration(labels_N, logits_NC)
    assert (once.temperature, once.num_images) == (pytest.approx(3.0, rel=0.3), 200)
    twice = table_of(
        np.tile(labels_N, 2), np.concatenate([logits_NC, -logits_NC]), np.concatenate([folds_N, folds_N + 4]),
        repeats_N=np.repeat([1, 2], 200),
    )  # fmt: skip
    assert choose_by_folds(twice) == once
    assert choose_by_folds(table_of(*drawn(200, 1.0))).temperature == 1.0


def test_photos_of_one_patient_do_not_tell_it_from_one_as_often_as_there_are_photos():
    """Of 60 draws of good probabilities, each of 30 patients with 8 photos of one answer."""
    found = {True: 0, False: 0}
    for seed in range(60):
        labels_N, logits_NC, folds_N = (np.repeat(of_each, 8, axis=0) for of_each in drawn(30, 1.0, seed))
        for has_groups in found:
            groups_N = np.repeat(np.arange(30), 8) if has_groups else None
            chosen = choose_by_folds(table_of(labels_N, logits_NC, folds_N, groups_N=groups_N))
            found[has_groups] += chosen.temperature != 1
    assert found[True] <= 12
    assert found[False] >= 30


def test_figures_are_of_what_the_other_folds_of_the_repeat_chose():
    (labels_N, logits_NC, folds_N), again = drawn(120, 3.0), drawn(120, 5.0, seed=1)
    labels_N, logits_NC = np.tile(labels_N, 2), np.concatenate([logits_NC, again[1]])
    folds_N, repeats_N = np.concatenate([folds_N, folds_N + 4]), np.repeat([1, 2], 120)
    figures = crosswise_figures(table_of(labels_N, logits_NC, folds_N, repeats_N))
    sure_N, true_N, covered_N, sizes_N = np.zeros((4, 240))
    for fold in range(1, 9):
        here_N = folds_N == fold
        others_N = (repeats_N == repeats_N[here_N][0]) & ~here_N
        chosen = choose_calibration(labels_N[others_N], logits_NC[others_N])
        shares_PC = softmax(logits_NC[here_N], chosen.temperature)
        in_set_PC = (shares_PC >= chosen.sets.threshold) | (shares_PC == shares_PC.max(1, keepdims=True))
        sure_N[here_N], sizes_N[here_N] = shares_PC.max(1), in_set_PC.sum(1)
        true_N[here_N] = shares_PC[np.arange(30), labels_N[here_N]]
        covered_N[here_N] = in_set_PC[np.arange(30), labels_N[here_N]]
    assert figures["loss"] == pytest.approx(-np.log(true_N).mean())
    assert figures["ece"] == pytest.approx(_calibration_error(sure_N, logits_NC.argmax(1) == labels_N))
    assert figures["sets"]["coverage"] == pytest.approx(covered_N.mean())
    assert figures["sets"]["mean_size"] == pytest.approx(sizes_N.mean())
    assert figures["ece_interval95"][0] <= figures["ece"] <= figures["ece_interval95"][1]


def test_figures_of_several_labels_are_of_what_the_other_folds_chose():
    labels_N, logits_NC, folds_N = drawn(160, 3.0)
    has_NC, table = of_several(labels_N, logits_NC, folds_N)
    shares_NC = np.zeros((160, 3))
    for fold in range(1, 5):
        chosen = label_calibration_by(table.filter(pa.array(folds_N != fold)))
        assert chosen.temperature != 1
        shares_NC[folds_N == fold] = 1 / (1 + np.exp(-logits_NC[folds_N == fold] / chosen.temperature))
    figures = crosswise_figures(table)
    assert figures["loss"] == pytest.approx(-np.log(np.where(has_NC, shares_NC, 1 - shares_NC)).mean(), rel=1e-5)
    assert figures["ece"] == pytest.approx(label_calibration_error(shares_NC, has_NC), rel=1e-4)
    assert choose_by_folds(table) == label_calibration_by(table)


def test_an_image_without_an_answer_neither_chooses_nor_is_scored():
    labels_N, logits_NC, folds_N = drawn(80, 3.0)
    kept_N = np.arange(80) >= 7
    whole = table_of(labels_N[kept_N], logits_NC[kept_N], folds_N[kept_N])
    logits_NC[:7, 1] = np.nan
    table = table_of(labels_N, logits_NC, folds_N)
    assert choose_by_folds(table) == choose_by_folds(whole)
    assert crosswise_figures(table) == crosswise_figures(whole)
    logits_NC[folds_N != 1] = np.nan
    alone = about_fold_calibration(
        choose_by_folds(table_of(labels_N, logits_NC, folds_N)).model_dump() | {"also_chose": False},
        table_of(labels_N, logits_NC, folds_N),
    )
    assert alone["temperature"] > 0
    assert (alone["loss"], alone["ece"], alone["sets"]["coverage"]) == (None, None, None)


def test_of_a_model_that_an_older_version_began_there_is_none():
    table = table_of(*drawn(80, 3.0))
    told = about_fold_calibration({"temperature": None, "why": "there is no validation split"}, table)
    assert told == {"temperature": None, "why": FITTED_TO_ALL}


@pytest.mark.parametrize("sets", [None, LabelSets(level=0.9, threshold=0.1 + 0.2)])
def test_run_json_keeps_it_bit_for_bit(sets):
    part = Part(Fold(3, 1, None), 1 / 3, calibration=Calibration(temperature=1 / 0.7, num_images=9, sets=sets))
    assert Part.from_plain(json.loads(json.dumps(part.to_plain()))) == part
    assert "calibration" not in part._replace(calibration=None).to_plain()


@pytest.mark.slow
@pytest.mark.long  # 300 cross-validations
def test_figures_are_nearly_those_of_new_images():
    """Ridge on 60 images, too sure of itself: the loss against that of the same models on 600 new images each."""
    crosswise, at_once, fresh = (np.zeros(300) for _ in range(3))
    for seed in range(300):
        draws = np.random.default_rng(seed)
        centres = draws.normal(size=(3, 20)) / 2
        labels_N, new_N, folds_N = np.arange(60) % 3, np.arange(600) % 3, 1 + np.arange(60) // 3 % 5
        images_ND, new_ND = (centres[of] + draws.normal(size=(len(of), 20)) for of in (labels_N, new_N))
        logits_NC, new_NCK = np.zeros((60, 3)), []
        for fold in range(1, 6):
            rest_N = folds_N != fold
            mean_D = images_ND[rest_N].mean(0)
            from_mean_ND, targets_NC = images_ND[rest_N] - mean_D, np.eye(3)[labels_N[rest_N]] - 1 / 3
            weight_DC = 20 * np.linalg.solve(from_mean_ND.T @ from_mean_ND + np.eye(20), from_mean_ND.T @ targets_NC)
            logits_NC[~rest_N] = (images_ND[~rest_N] - mean_D) @ weight_DC
            new_NCK.append((new_ND - mean_D) @ weight_DC)
        table = table_of(labels_N, logits_NC, folds_N)
        crosswise[seed] = crosswise_figures(table)["loss"]
        at_once[seed] = loss_of(labels_N, logits_NC, choose_by_folds(table).temperature)
        chosen = [choose_calibration(labels_N[folds_N != k], logits_NC[folds_N != k]).temperature for k in range(1, 6)]
        fresh[seed] = np.mean([loss_of(new_N, of, by) for of, by in zip(new_NCK, chosen, strict=True)])
    assert (at_once - fresh).mean() < -0.025
    assert -0.03 < (crosswise - fresh).mean() < 0.02
    assert (crosswise - at_once).mean() > 0.02


def loss_of(labels_N, logits_NC, temperature):
    return -np.log(softmax(logits_NC, temperature)[np.arange(len(labels_N)), labels_N]).mean()
