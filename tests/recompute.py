"""The scored figures of a run out of its predictions.parquet, by NumPy alone: nothing of tlscale is imported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy.stats import binomtest

SCORED = (
    *("num_images", "top1", "top5", "loss", "macro_f1", "balanced_accuracy", "ece"),
    *("num_without_answer", "per_class", "confusion"),
)
RANKED = ("auroc", "average_precision")  # of each class


def figures_from(path: Path) -> dict:
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"tlscale"])
    classes = about["classes"]
    place = {name: number for number, name in enumerate(classes)}
    true_N = np.array([place[name] for name in table["true_label"].to_pylist()])
    label_N = np.array([place.get(name, -1) for name in table["label"].to_pylist()])
    has_N, hit_N = label_N >= 0, label_N == true_N
    num_images, num_classes = len(true_N), len(classes)
    probability_N = np.array(table["probability"].to_pylist(), dtype=float)
    truth_N = np.array(table["true_probability"].to_pylist(), dtype=float)
    per_class = {name: _of_class(true_N == c, label_N == c, hit_N) for c, name in enumerate(classes)}
    f1s = [row["f1"] for row in per_class.values() if row["f1"] is not None]
    confusion = np.zeros((num_classes, num_classes), dtype=int)
    np.add.at(confusion, (true_N[has_N], label_N[has_N]), 1)
    with np.errstate(divide="ignore"):
        loss = float(-np.log(truth_N).mean())
    return {
        "num_images": num_images,
        "top1": hit_N.mean(),
        "top5": _top5(table, place, true_N, has_N) if num_classes > 5 else None,
        "loss": loss if np.isfinite(loss) else None,
        "macro_f1": float(np.mean(f1s)),
        "balanced_accuracy": float(np.mean([hit_N[true_N == c].mean() for c in np.unique(true_N)])),
        "ece": _calibration_error(probability_N[has_N], hit_N[has_N]),
        "num_without_answer": int((~has_N).sum()),
        "per_class": per_class,
        "confusion": confusion.tolist(),
    }


def ranked_from(path: Path) -> dict:
    """`auroc` and `average_precision` of each class, by their definitions, of the images that have an answer."""
    table = pq.read_table(path).filter(pc.is_valid(pc.field("label")))
    classes = json.loads(table.schema.metadata[b"tlscale"])["classes"]
    true_N = np.array(table["true_label"].to_pylist())
    logits_NC = np.nan_to_num(np.array(table["logits"].to_pylist(), dtype=float).reshape(-1, len(classes)))
    share_NC = np.exp(logits_NC - logits_NC.max(1, keepdims=True))
    share_NC /= np.sort(share_NC, axis=1).sum(1, keepdims=True)  # in one order: what ties is not told by rounding
    return {name: _ranked(true_N == name, share_NC[:, c]) for c, name in enumerate(classes)}


def _ranked(is_true_N, score_N) -> dict:
    own, others = score_N[is_true_N], score_N[~is_true_N]
    pairs = (own[:, None] > others).sum() + (own[:, None] == others).sum() / 2
    precisions = [is_true_N[score_N >= score].mean() for score in own]
    return {
        "auroc": pairs / len(own) / len(others) if len(own) and len(others) else None,
        "average_precision": np.mean(precisions) if len(own) else None,
    }


def calibrated_from(path: Path) -> dict:
    """`loss`, `ece` and the sets by the calibration that the file names, of the images that have an answer."""
    table = pq.read_table(path).filter(pc.is_valid(pc.field("label")))
    about = json.loads(table.schema.metadata[b"tlscale"])
    true_N = np.array([about["classes"].index(name) for name in table["true_label"].to_pylist()])
    logits_NC = np.nan_to_num(np.array(table["logits"].to_pylist(), dtype=float)) / about["calibration"]["temperature"]
    share_NC = np.exp(logits_NC - logits_NC.max(1, keepdims=True))
    share_NC /= share_NC.sum(1, keepdims=True)
    sure_N, hit_N = share_NC.max(1), np.array(table["label"].to_pylist()) == np.array(table["true_label"].to_pylist())
    np.testing.assert_allclose(table["calibrated_probability"].to_numpy(), sure_N, rtol=1e-12)
    in_set_NC = (share_NC >= about["calibration"]["sets"]["threshold"] - 1e-12) | (share_NC == sure_N[:, None])
    return {
        "loss": -np.log(share_NC[np.arange(len(true_N)), true_N]).mean(),
        "ece": _calibration_error(sure_N, hit_N),
        "coverage": in_set_NC[np.arange(len(true_N)), true_N].mean(),
        "mean_size": in_set_NC.sum(1).mean(),
    }


def _of_class(is_true_N, is_label_N, hit_N) -> dict:
    images, answers, hits = int(is_true_N.sum()), int(is_label_N.sum()), int((hit_N & is_true_N).sum())
    return {
        "accuracy": hits / images if images else None,
        "accuracy_interval95": list(binomtest(hits, images).proportion_ci(0.95, "wilson")) if images else None,
        "precision": hits / answers if images and answers else None,
        "f1": 2 * hits / (images + answers) if images else None,
        "num_images": images,
    }


def _top5(table, place, true_N, has_N) -> float:
    if "logits" not in table.column_names:
        best = [[place[name] for name in names] for names in table["top_labels"].to_pylist()]
    else:
        logits_NC = np.nan_to_num(np.array(table["logits"].to_pylist(), dtype=float))
        best = np.argsort(-logits_NC, axis=1, kind="stable")[:, :5]
    return float(np.mean([true in row and has for true, row, has in zip(true_N, best, has_N, strict=True)]))


def _calibration_error(probability_N, hit_N, num_bins=15) -> float | None:
    if not len(hit_N):
        return None
    # As float32, in which the bins are found: 0.2 is an edge.
    bins_N = np.clip(np.ceil(probability_N.astype(np.float32) * np.float32(num_bins)).astype(int) - 1, 0, num_bins - 1)
    gaps = [abs(hit_N[bins_N == m].sum() - probability_N[bins_N == m].sum()) for m in range(num_bins)]
    return float(sum(gaps) / len(hit_N))


def assert_follows(result: dict, path: Path, rel: float = 2e-6) -> None:
    """Whatever `result` says of the scored split is what the predictions say."""
    import pytest

    calibrated = result.get("calibration", {})
    if calibrated.get("loss") is not None and result["split"] != "folds":  # there each fold has another one
        found = {**calibrated, **calibrated["sets"]}
        for key, value in calibrated_from(path).items():
            assert found[key] == pytest.approx(value, rel=rel, abs=1e-7), key
    result = {**result, "per_class": {name: dict(row) for name, row in result["per_class"].items()}}
    ranked = {name: {key: row.pop(key) for key in RANKED if key in row} for name, row in result["per_class"].items()}
    if any(ranked.values()):
        expected = ranked_from(path)
        for name, row in ranked.items():
            assert row == {key: value and pytest.approx(value, abs=1e-9) for key, value in expected[name].items()}, name
        for key, name in (("auroc", "auroc"), ("mean_average_precision", "average_precision")):
            values = [row[name] for row in expected.values() if row[name] is not None]
            assert result[key] == (pytest.approx(np.mean(values), abs=1e-9) if values else None), key
    found = figures_from(path)
    for name, row in found["per_class"].items():  # the only floats of it that are not one division
        interval = row.pop("accuracy_interval95")
        there = result["per_class"][name].get("accuracy_interval95")
        assert there == (interval if interval is None else pytest.approx(interval, abs=1e-9)), name
    assert found["per_class"] == {
        name: {key: value for key, value in row.items() if key != "accuracy_interval95"}
        for name, row in result["per_class"].items()
    }
    exact = ("num_images", "top1", "top5", "num_without_answer", "confusion")
    for key in exact:
        assert found[key] == (pytest.approx(result[key]) if isinstance(result[key], float) else result[key]), key
    for key in ("loss", "macro_f1", "balanced_accuracy", "ece"):
        expected = result[key]
        assert found[key] == (expected if expected is None else pytest.approx(expected, rel=rel, abs=1e-7)), key
