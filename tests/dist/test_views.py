"""`evaluate.views` on two processes, with DDP and with FSDP2: the answers and figures of one process."""

import json
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest

import tlscale
from tests.chaos.killing import Place, assert_ended_as, assert_same_answers, last_codes, start_all
from tests.dist.many_checks import HALF_VIT
from tests.forks import HANGS
from tests.small_runs import exported, largest_difference, last_checkpoint, lines, put_teacher, result
from tlscale.training.checkpoint.files import SHARDS

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

# Of 19 and 37 images in batches of 6 the first process has a batch more than the other. In float64, in which two
# processes give the answers of one.
TEN = {
    "data": {"crop_pct": 0.8},
    "compute": {"precision": "fp64"},
    "duration": "6 steps",
    "evaluate": {"every": "3 steps", "batch_size": 6, "views": ["flip", "five_crop"], "select": "auroc"},
}
FROZEN = {**TEN, "freeze": HALF_VIT, "codes": {"keep": "always"}}
TAUGHT = {
    **TEN,
    "data": {"augment": ["flip"], "workers": 0},
    "codes": {"views": 2},
    "evaluate": {"every": "3 steps", "batch_size": 6, "views": ["flip"], "select": "distill_loss"},
    "distill": {"image_size": 48, "match": {"penultimate": "penultimate"}},
}
KINDS = {
    "images": {**TEN, "optim": {"ema_decay": 0.9}},
    "codes": FROZEN,
    "sharded images": {**FROZEN, "codes": {"keep": "never"}, "optim": {"ema_decay": 0.9}},
    "sharded codes": FROZEN,
    "taught": TAUGHT,
    "probe": {"probe": {"kind": "logistic"}, "data": {"crop_pct": 0.8}, "evaluate": {"views": ["flip", "five_crop"]}},
}


def place_of(kind, folder, idx):
    changes = KINDS[kind]
    if "distill" in changes:
        folder.mkdir()
        teacher = {"name": "test_resnet", "weights": str(put_teacher(folder / "teacher.safetensors"))}
        changes = {**changes, "distill": {**changes["distill"], "teacher": teacher}}
    return [Place(folder / str(number), changes, idx) for number in (1, 2)]


def close_to(figures):
    return {k: pytest.approx(v, rel=1e-9, abs=1e-11) if isinstance(v, float) else v for k, v in figures.items()}


FIRST = ("images", "sharded codes")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in FIRST else pytest.mark.long) for kind in KINDS]
)
def test_two_processes_answer_as_one(kind, forks, idx, tmp_path):
    one, two = place_of(kind, tmp_path / "runs", idx)
    assert forks.wait(one.start(forks)) == 0, one.output()
    is_sharded = kind.startswith("sharded")
    two.words += ("compute.engine=fsdp2",) if is_sharded else ()
    assert [forks.wait(pid) for pid in start_all(forks, two, 2)] == [0, 0], two.output()
    assert json.loads((two.out / "run.json").read_text())["world_size"] == 2
    assert kind == "probe" or is_sharded == (last_checkpoint(two.out) / SHARDS).is_dir()
    tables = [pq.read_table(place.out / "predictions.parquet") for place in (one, two)]
    logits = [np.array(table["logits"].to_pylist()) for table in tables]
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-11)
    assert tables[0]["label"].equals(tables[1]["label"])
    assert largest_difference(exported(one.out), exported(two.out)) < 1e-11
    first, second = result(one.out), result(two.out)
    assert second["views"] == first["views"] == KINDS[kind]["evaluate"]["views"]
    for name in ("num_images", "top1", "loss", "ece", "per_class", "confusion"):
        assert second[name] == close_to(first)[name], name
    assert first["num_images"] == 37
    evaluated = [lines(place.out, "evaluate") for place in (one, two)]
    assert [close_to(line) for line in evaluated[0]] == evaluated[1]
    assert len(evaluated[0]) == (1 if kind == "probe" else 2)
    assert tlscale.load(two.out).views == tuple(first["views"])
    if "codes" in kind:
        assert first["codes"] == second["codes"]  # those of all views, by both processes together


def test_killed_in_the_codes_of_another_view_and_resumed(forks, idx, tmp_path):
    """Each start comes a little further, and the other process ends by itself."""
    whole, place = (Place(tmp_path / name, "viewed", idx) for name in ("whole", "killed"))
    assert [forks.wait(pid) for pid in start_all(forks, whole, 2)] == [0, 0], whole.output()
    # A split is one shard here, the main process's: two blocks of training images, one of validation, one of its flips.
    for fault in ("codes.block@4", "codes.place", "codes.shard", "codes.block@2"):
        ends = [forks.wait(pid) for pid in start_all(forks, place, 2, TLSCALE_FAULT=fault)]
        assert ends[0] == -signal.SIGKILL, (fault, ends, place.output())
        assert ends[1] not in (0, HANGS), (fault, ends, place.output())
        assert last_codes(place, rank=0).startswith("validation, center+")
    assert [forks.wait(pid) for pid in start_all(forks, place, 2)] == [0, 0], place.output()
    assert_ended_as(whole.out, place.out)
    assert_same_answers(whole.out, place.out)
