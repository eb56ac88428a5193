"""The seconds that a run reports: the whole process, in parts that add up; and no decoding of what is not used."""

import json
import os
import signal
import time
from functools import partial

import numpy as np
import pytest
from PIL import Image

import tlscale
from tests.small_runs import When, assert_same_bits, exported, logged, result, small_recipe
from tlscale.commands.codes import compute_codes
from tlscale.commands.compare import compare
from tlscale.commands.evaluate import evaluate_run
from tlscale.data.loader import ImageStore
from tlscale.data.sampler import micro_batches
from tlscale.errors import DataError, Stopped
from tlscale.recipe.duration import Duration
from tlscale.tracking.console import Pace
from tlscale.tracking.stopwatch import PARTS, Stopwatch
from tlscale.training.setup import set_up

FOLDER = {"source": "folder", "image_size": 32, "validation_fraction": 0.2}
PROBE = {"probe": {"kind": "ridge"}, "backbone": {"name": "test_resnet"}}


@pytest.fixture
def pictures(tmp_path):
    """300 pictures of noise of 40 px, of which 20 are for testing."""
    noise = np.random.default_rng(0)
    for role, count in (("train", 140), ("test", 10)):
        for name in ("a", "b"):
            (tmp_path / "pictures" / role / name).mkdir(parents=True)
            for number in range(count):
                pixels = noise.integers(0, 256, (40, 40), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pictures" / role / name / f"{number:03}.png")
    return tmp_path / "pictures"


def assert_adds_up(figures, took_s):
    """By who stood beside it with a watch."""
    assert sum(figures["seconds"].values()) == pytest.approx(figures["wall_s"], abs=0.01)
    assert figures["wall_s"] == pytest.approx(took_s, rel=0.02, abs=0.15)


def timed(act):
    began_s = time.monotonic()
    figures = act()
    return figures, time.monotonic() - began_s


@pytest.mark.parametrize("changes", [{}, {"data": {"augment": ["flip"]}}, {"freeze": ".*"}, PROBE])
def test_the_parts_of_a_run_add_up_to_its_time(changes, idx, tmp_path):
    recipe = small_recipe(tmp_path / "r.yaml", idx, **changes)
    figures, took_s = timed(lambda: tlscale.run(recipe, tmp_path / "run"))
    assert_adds_up(figures, took_s)
    assert set(figures["seconds"]) == set(PARTS)
    parts = {part for part, spent_s in figures["seconds"].items() if spent_s > 0}
    codes = {"codes"} if "freeze" in changes or "probe" in changes else {"decode"}
    assert {"start", "scan", "train", "test", "export"} | codes <= parts
    assert figures["images_per_s"] == pytest.approx(figures["images_seen"] / figures["seconds"]["train"], rel=0.1)
    assert figures["waiting_s"] <= figures["seconds"]["train"]


def test_codes_and_evaluate_and_compare_tell_their_time(idx, tmp_path, capsys):
    watch = Stopwatch()
    _, took_s = timed(lambda: compute_codes(small_recipe(tmp_path / "c.yaml", idx, **PROBE), watch))
    assert "seconds: " in capsys.readouterr().out
    assert_adds_up(watch.figures(), took_s)
    recipe = small_recipe(tmp_path / "r.yaml", idx, name="one", duration="3 steps")
    tlscale.run(recipe, tmp_path / "run")
    figures, took_s = timed(lambda: evaluate_run(tmp_path / "run"))
    assert_adds_up(figures, took_s)
    assert figures["seconds"]["evaluate"] > 0
    small_recipe(tmp_path / "s.yaml", idx, name="two", duration="4 steps")
    out = tmp_path / "compared"
    figures, took_s = timed(lambda: compare([tmp_path / "r.yaml", tmp_path / "s.yaml"], run=tlscale.run, out=out))
    written = json.loads((out / "compare.json").read_text())
    assert sum(written["seconds"].values()) == pytest.approx(written["wall_s"], abs=0.01)
    assert written["wall_s"] <= took_s
    assert sum(run["wall_s"] for run in written["runs"]) == pytest.approx(written["seconds"]["runs"], rel=0.05, abs=0.3)
    assert [run["seconds"] for run in written["runs"]] == [result(out / name)["seconds"] for name in ("one", "two")]
    assert any("without the start of the comparison" in line for line in written["notes"])


def test_a_process_counts_from_its_start(idx, tmp_path, forks):
    """By the time at which result.json was written, and that at which somebody started the process."""
    small_recipe(tmp_path / "r.yaml", idx)
    began_s = time.time()
    assert forks.run("run", tmp_path / "r.yaml", "--out", tmp_path / "run", log=tmp_path / "log") == 0
    took_s = (tmp_path / "run" / "result.json").stat().st_mtime - began_s
    assert_adds_up(result(tmp_path / "run"), took_s)
    assert "seconds: " in (tmp_path / "log").read_text()


def test_starts_are_added_up(idx, tmp_path):
    recipe = small_recipe(tmp_path / "r.yaml", idx, duration="40 steps")
    out, spent_s = tmp_path / "run", 0.0
    for step in (5, 15):
        began_s = time.monotonic()
        with When(logged(out, step), lambda: os.kill(os.getpid(), signal.SIGTERM)), pytest.raises(Stopped):
            tlscale.run(recipe, out, resume=True)
        spent_s += time.monotonic() - began_s
        told = json.loads((out / "STOPPED").read_text())["spent_s"]
        assert sum(told.values()) == pytest.approx(spent_s, rel=0.05, abs=0.3)
    figures, took_s = timed(lambda: tlscale.run(recipe, out, resume=True))
    assert figures["wall_s"] == pytest.approx(spent_s + took_s, rel=0.05, abs=0.4)
    assert figures["wall_s"] > took_s
    times = [json.loads(line)["time_s"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert times == sorted(times)


def test_a_start_that_was_killed_counts_up_to_its_last_checkpoint(idx, tmp_path, forks):
    small_recipe(tmp_path / "r.yaml", idx, checkpoint={"every": "4 steps"})
    words = ("run", tmp_path / "r.yaml", "--out", tmp_path / "run", "--resume")
    assert forks.run(*words, log=tmp_path / "log", TLSCALE_FAULT="step@7") == -signal.SIGKILL
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_00000005" / "state.json").read_text())
    before = state["clock"]["spent_s"]
    assert before["train"] > 0
    assert forks.run(*words, log=tmp_path / "log") == 0
    figures = result(tmp_path / "run")
    for part, spent_s in before.items():
        if part != "waiting":
            assert figures["seconds"][part] >= round(spent_s, 3), part


def test_only_the_images_that_the_steps_see_are_decoded(pictures, tmp_path):
    """All others are damaged, and the run of a few steps does not come to know of it; one that needs them does."""
    few = small_recipe(tmp_path / "few.yaml", pictures, data=FOLDER, batch_size=8, duration="3 steps")
    tlscale.run(few, tmp_path / "whole")
    setup = set_up(few, world_size=1)
    train, seen = setup.data.train, set()
    for step in range(3):
        seen.update(*(batch.rows_B.tolist() for batch in micro_batches(setup.order, step, setup.split, 0)))
    for row in set(range(len(train))) - seen:
        os.truncate(train.where(row), 90)  # what its header says stays
    tlscale.run(few, tmp_path / "few")
    assert_same_bits(exported(tmp_path / "whole"), exported(tmp_path / "few"))
    with pytest.raises(DataError, match=r"\.png"):
        tlscale.run(few.model_copy(update={"duration": Duration(2, "epochs")}), tmp_path / "many")
    assert not (tmp_path / "many" / "run.json").exists(), "found when they are decoded, before the run begins"


def test_long_work_says_how_far_it_is():
    now_s, said = [0.0], []
    pace = Pace(1000, said.append, "decoding train", every_s=5.0, clock=lambda: now_s[0])
    for _ in range(100):
        now_s[0] += 0.3
        pace.add(10)
    assert len(said) == 5, "30 s, a line in every 5.1"
    assert said[0] == "decoding train: 170 of 1,000 images, 33 images/s, eta 25s"
    said.clear()
    pace = Pace(1000, said.append, "decoding train", clock=lambda: now_s[0])
    pace.add(1000)
    assert said == []


@pytest.mark.parametrize("augment", [[], ["flip", {"crop": 0.5}]])
def test_decoding_is_counted_as_it_goes_on(augment, pictures, tmp_path):
    """In blocks of 256, whether images are kept as they are or as the network sees them."""
    data = {**FOLDER, "validation_fraction": 0.0, "augment": augment}
    setup, counts = set_up(small_recipe(tmp_path / "r.yaml", pictures, data=data), world_size=1), []
    crops = bool(augment)
    store = partial(ImageStore, setup.data.train, setup.recipe.data, setup.spec, crops=crops, on_images=counts.append)
    kept = store()
    assert counts == [256, 24]
    assert kept.cached
    few = store(keep=False)
    assert counts == [256, 24]
    assert not few.cached
    rows = np.array([279, 0, 7])
    for one, other in zip(kept.images(rows), few.images(rows), strict=True):
        assert one.equal(other)
