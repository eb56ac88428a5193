"""The seconds that a run reports: the whole process, in parts that add up; and no decoding of what is not used."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
from PIL import Image
from rich.console import Console as RichConsole

import tlscale
from tests.small_runs import When, assert_same_bits, exported, last_checkpoint, logged, result, small_recipe
from tlscale.commands.codes import compute_codes
from tlscale.commands.compare import compare
from tlscale.commands.evaluate import evaluate_run
from tlscale.data import loader
from tlscale.data.loader import ImageStore
from tlscale.data.sampler import micro_batches
from tlscale.errors import DataError, Stopped
from tlscale.recipe.duration import Duration
from tlscale.tracking.console import Console
from tlscale.tracking.progress import Pace
from tlscale.tracking.stopwatch import PARTS
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


# No file holds the seconds of its own writing, and the kernel knows to 0.01 s when a process began. The more processes
# want the cores, the longer it is from the last look at the clock to the file.
SLACK_S = 0.05 + 0.03 * os.getloadavg()[0]


def assert_adds_up(figures, took_s):
    """By who stood beside it with a watch."""
    assert sum(figures["seconds"].values()) == pytest.approx(figures["wall_s"], abs=0.01)
    assert figures["wall_s"] == pytest.approx(took_s, rel=0.02, abs=SLACK_S)


def timed(act, file):
    """What it gives, and the seconds from the call to when it wrote the file with its figures."""
    began_s = time.time()
    figures = act()
    return figures, file.stat().st_mtime - began_s


@pytest.mark.parametrize("changes", [{}, {"data": {"augment": ["flip"]}}, {"freeze": ".*"}, PROBE])
def test_the_parts_of_a_run_add_up_to_its_time(changes, idx, tmp_path):
    recipe = small_recipe(tmp_path / "r.yaml", idx, **changes)
    run = tlscale.run  # at the first mention it is imported, which is not of the run
    figures, took_s = timed(lambda: run(recipe, tmp_path / "run"), tmp_path / "run" / "result.json")
    assert_adds_up(figures, took_s)
    assert figures["seconds"] == result(tmp_path / "run")["seconds"]
    assert set(figures["seconds"]) == set(PARTS)
    parts = {part for part, spent_s in figures["seconds"].items() if spent_s > 0}
    codes = {"codes"} if "freeze" in changes or "probe" in changes else {"decode"}
    assert {"start", "scan", "train", "test", "export"} | codes <= parts
    assert figures["images_per_s"] == pytest.approx(figures["images_seen"] / figures["seconds"]["train"], rel=0.1)
    assert figures["waiting_s"] <= figures["seconds"]["train"]


def test_codes_and_evaluate_and_compare_tell_their_time(idx, tmp_path, capsys):
    began_s = time.monotonic()
    compute_codes(small_recipe(tmp_path / "c.yaml", idx, **PROBE))
    took_s = time.monotonic() - began_s
    # Its parts are not asked for: those that round to 0.0 s are not shown, and all may.
    (shown,) = re.findall(r"seconds: ([0-9.]+) s\b", capsys.readouterr().out)
    assert float(shown) == pytest.approx(took_s, rel=0.02, abs=0.05 + SLACK_S)  # it is rounded
    recipe = small_recipe(tmp_path / "r.yaml", idx, name="one", duration="3 steps")
    tlscale.run(recipe, tmp_path / "run")
    figures, took_s = timed(
        lambda: evaluate_run(tmp_path / "run"), tmp_path / "run" / "evaluations" / "test" / "figures.json"
    )
    assert_adds_up(figures, took_s)
    assert figures["seconds"]["evaluate"] > 0
    small_recipe(tmp_path / "s.yaml", idx, name="two", duration="4 steps")
    out = tmp_path / "compared"
    _, took_s = timed(
        lambda: compare([tmp_path / "r.yaml", tmp_path / "s.yaml"], run=tlscale.run, out=out), out / "compare.json"
    )
    written = json.loads((out / "compare.json").read_text())
    assert_adds_up(written, took_s)
    assert written["seconds"]["report"] > 0, "the table and the picture"
    assert sum(run["wall_s"] for run in written["runs"]) <= written["seconds"]["runs"] + SLACK_S
    assert [run["seconds"] for run in written["runs"]] == [result(out / name)["seconds"] for name in ("one", "two")]
    assert any("without the start of the comparison" in line for line in written["notes"])


# verb -> (words after it, the file with its figures)
VERBS = {
    "run": (("r.yaml", "--out", "out"), "out/result.json"),
    "probe": (("p.yaml", "--out", "out"), "out/result.json"),
    "evaluate": (("run",), "run/evaluations/test/figures.json"),
    "compare": (("r.yaml", "s.yaml", "--out", "out"), "out/compare.json"),
}


@pytest.fixture
def recipes(idx, tmp_path, forks, monkeypatch):
    assert forks.run("--version", log=tmp_path / "version") == 0  # the first one waits for an import
    monkeypatch.chdir(tmp_path)
    for name, changes in {"r": {}, "s": {"seed": 1}, "p": PROBE}.items():
        small_recipe(tmp_path / f"{name}.yaml", idx, name=name, **changes)
    return tmp_path


@pytest.mark.parametrize("verb", VERBS)
def test_a_process_counts_from_its_start(verb, recipes, forks):
    """By the time at which its figures were written, and that at which somebody started the process."""
    words, figures = VERBS[verb]
    words = [recipes / word if "." in word or word in ("out", "run") else word for word in words]
    if verb == "evaluate":
        assert forks.run("run", recipes / "r.yaml", "--out", recipes / "run", log=recipes / "before") == 0
    began_s = time.time()
    assert forks.run(verb, *words, log=recipes / "log") == 0, (recipes / "log").read_text()
    assert_adds_up(json.loads((recipes / figures).read_text()), (recipes / figures).stat().st_mtime - began_s)
    assert "seconds: " in (recipes / "log").read_text()


def test_codes_count_from_the_start_of_the_process(recipes, forks):
    began_s = time.time()
    assert forks.run("codes", recipes / "p.yaml", log=recipes / "log") == 0
    took_s = (recipes / "log").stat().st_mtime - began_s  # the seconds are the last that it says
    (shown,) = re.findall(r"seconds: ([0-9.]+) s: start ", (recipes / "log").read_text())
    assert float(shown) == pytest.approx(took_s, rel=0.02, abs=0.05 + SLACK_S)  # it is rounded


def test_a_process_ends_without_a_search_for_cycles():
    """It took longer than many a run."""
    program = """
import gc
gc.disable()
class Cycle:
    def __init__(self): self.me = self
    def __del__(self): print("searched for cycles")
Cycle()
from tlscale.cli import main
main(["--version"])
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "version" in ended.stdout
    assert "cycles" not in ended.stdout


def test_starts_are_added_up(idx, tmp_path):
    recipe = small_recipe(tmp_path / "r.yaml", idx, duration="40 steps")
    out, spent_s = tmp_path / "run", 0.0
    for step in (5, 15):
        began_s = time.time()
        with When(logged(out, step), lambda: os.kill(os.getpid(), signal.SIGTERM)), pytest.raises(Stopped):
            tlscale.run(recipe, out, resume=True)
        spent_s += (out / "STOPPED").stat().st_mtime - began_s
        told = json.loads((out / "STOPPED").read_text())["spent_s"]
        assert sum(told.values()) == pytest.approx(spent_s, rel=0.02, abs=2 * SLACK_S)
    figures, took_s = timed(lambda: tlscale.run(recipe, out, resume=True), out / "result.json")
    assert figures["wall_s"] == pytest.approx(spent_s + took_s, rel=0.02, abs=3 * SLACK_S)
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


@pytest.fixture
def decoded(monkeypatch, tmp_path):
    """The images that were decoded, as often as they were."""
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "cache"))
    places, decode = [], loader.decode_image
    monkeypatch.setattr(
        loader, "decode_image", lambda raw, **given: (places.append(given["where"]), decode(raw, **given))[1]
    )
    return places


def seen_in(setup, steps):
    """The training images of some steps."""
    rows = {row for step in steps for batch in micro_batches(setup.order, step, setup.split, 0) for row in batch.rows_B}
    return {setup.data.train.where(int(row)) for row in rows}


def test_a_few_steps_after_stages_on_codes_decode_what_they_see(pictures, tmp_path, decoded):
    """The codes are warm: only the images of the last stage's three steps are decoded, and those that are evaluated."""
    stages = [{"freeze": ".*", "duration": "2 epochs"}, {"freeze": r"(conv1|bn1)\..*", "duration": "3 steps"}]
    changes = {"backbone": {"name": "test_resnet"}, "batch_size": 8, "data": FOLDER}
    warm = small_recipe(tmp_path / "w.yaml", pictures, codes={"keep": "always"}, stages=stages[:1], **changes)
    tlscale.run(warm, tmp_path / "warm")
    recipe = small_recipe(tmp_path / "r.yaml", pictures, codes={"keep": "auto"}, stages=stages, **changes)
    setup = set_up(recipe, world_size=1)
    train = {setup.data.train.where(row) for row in range(len(setup.data.train))}
    decoded.clear()
    tlscale.run(recipe, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["keeps_codes"] == {"0": True, "1": False}
    assert train & set(decoded) == seen_in(setup, range(setup.stages[1].start_step, setup.total_steps))


def test_the_last_steps_of_a_resumed_run_decode_what_they_see(pictures, tmp_path, decoded):
    recipe = small_recipe(tmp_path / "r.yaml", pictures, data=FOLDER, batch_size=8, duration="56 steps")
    out = tmp_path / "run"
    with When(logged(out, 50), lambda: os.kill(os.getpid(), signal.SIGTERM)), pytest.raises(Stopped):
        tlscale.run(recipe, out)
    setup = set_up(recipe, world_size=1)
    train = {setup.data.train.where(row) for row in range(len(setup.data.train))}
    stopped_at = int(last_checkpoint(out).name.removeprefix("step_"))
    assert stopped_at < setup.total_steps
    decoded.clear()
    tlscale.run(recipe, out, resume=True)
    assert train & set(decoded) == seen_in(setup, range(stopped_at, setup.total_steps))


def test_long_work_says_how_far_it_is():
    now_s, file = [0.0], io.StringIO()
    console = Console(console=RichConsole(file=file, force_terminal=False))
    pace = Pace(1000, "decoding train", console, every_s=5.0, clock=lambda: now_s[0])
    for _ in range(100):
        now_s[0] += 0.3
        pace.add(10)
    said = file.getvalue().splitlines()
    assert len(said) == 5, "30 s, a line in every 5.1"
    assert said[0] == "decoding train: 170 of 1,000 images, 33 images/s, eta 25s"
    pace = Pace(1000, "decoding train", console, clock=lambda: now_s[0])
    pace.add(1000)
    assert len(file.getvalue().splitlines()) == 5


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


def test_a_run_that_waits_for_images_names_the_workers_that_would_do(pictures, tmp_path, capsys, monkeypatch):
    """A forked worker takes 30 ms an image here: on a busy machine too that is more than this small step."""
    decode = loader.decode_image
    monkeypatch.setattr(loader, "decode_image", lambda raw, **given: (time.sleep(0.03), decode(raw, **given))[1])
    data = FOLDER | {"cache_mib": 0, "workers": 1}
    changes = {"data": data, "duration": "10 steps", "batch_size": 6, "log_every": "2 steps"}
    recipe = small_recipe(tmp_path / "r.yaml", pictures, **changes, evaluate={"every": "10 steps"})
    tlscale.run(recipe, tmp_path / "run")
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"training waits for images \d+% of the time: .*\(now 1\)|training waits .* there are cores for", shown
    )
