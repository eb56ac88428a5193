"""Several processes (gloo, on the CPU): the same run as on one, and no process is left waiting for another."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tlscale
from tests.dist.many_checks import BATCH_NORM, EXACT, PROBE, SPLIT, STAGED
from tests.small_runs import (
    REPO,
    environment,
    exported,
    largest_difference,
    lines,
    logged,
    put_small_idx,
    result,
    small_recipe,
    tensors,
    wait_until,
)
from tlscale.errors import EXIT_BAD_INPUT, EXIT_STOPPED

pytestmark = pytest.mark.dist
BIN = Path(sys.executable).parent


def launch(processes, *words, log, launcher="accelerate", cpu="true", kind=("--multi_gpu",), **changes):
    """Starts `words` by a launcher; its output goes to the file `log`."""
    if launcher == "accelerate":
        command = ["accelerate", "launch", *kind, "--num_processes", processes, "--main_process_port", "0"]
    else:
        command = ["torchrun", "--standalone", "--nproc-per-node", processes]
    changes |= {"ACCELERATE_USE_CPU": cpu} if cpu else {}
    with log.open("w") as file:
        return subprocess.Popen(
            [BIN / command[0], *map(str, command[1:]), *map(str, words)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(**changes),
            cwd=REPO,
        )


def exit_code_of(launched, log, timeout_s=70):
    """Waits; a launch that hangs is ended, with all its processes, and is a failure."""
    try:
        return launched.wait(timeout_s)
    except subprocess.TimeoutExpired:
        launched.terminate()  # the launcher ends its workers, which are not of its process group
        launched.wait(60)
        pytest.fail(f"hangs: {log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def alone(idx, tmp_path_factory):
    """The same runs by one process."""
    folder = tmp_path_factory.mktemp("alone")
    runs = {"exact": EXACT, "split": SPLIT, "bn": BATCH_NORM, "staged": STAGED, "probed": PROBE}
    for name, changes in runs.items():
        tlscale.run(small_recipe(folder / f"{name}.yaml", idx, **changes), folder / name)
    return folder


def back_at_first_checkpoint(done, out):
    """A copy of a complete run as it was after its first checkpoint."""
    shutil.copytree(done, out)
    shutil.rmtree(out / "model")
    (out / "result.json").unlink()
    first, *later = sorted((out / "checkpoints").glob("step_*"))
    for folder in later:
        shutil.rmtree(folder)
    for pointer in ("LATEST", "BEST"):
        (out / "checkpoints" / pointer).write_text(first.name + "\n")
    return out


@pytest.fixture(scope="module", params=[(2, "accelerate"), (4, "torchrun")], ids=["2", "4"])
def several(request, idx, alone, tmp_path_factory):
    """The runs of many_checks.py by so many processes: (folder, facts of each rank)."""
    processes, launcher = request.param
    folder = tmp_path_factory.mktemp(f"by{processes}")
    back_at_first_checkpoint(alone / "exact", folder / "begun")
    words = (REPO / "tests" / "dist" / "many_checks.py", folder, idx)
    # A cache of their own: they are to compute the codes together.
    done = launch(processes, *words, log=folder / "log", launcher=launcher, TLSCALE_CACHE=str(folder / "cache"))
    exit_code, output = exit_code_of(done, folder / "log"), (folder / "log").read_text()
    assert exit_code == 0, output[-5000:]
    facts = [json.loads((folder / f"facts{rank}.json").read_text()) for rank in range(processes)]
    assert [fact["world_size"] for fact in facts] == [processes] * processes
    assert [fact["rank"] for fact in facts] == list(range(processes))
    return folder, facts


def test_processes_agree(several):
    _, facts = several
    count = len(facts)
    for rank, fact in enumerate(facts):
        assert fact["any"] == [True, False, True]
        assert fact["sum"] == [count * (count + 1) // 2, 10 * count]
        assert fact["gather"] == [f"of {other}" for other in range(count)]
        assert fact["on_main"] == "by 0"
        assert fact["none fails"] == rank


def test_an_error_of_one_reaches_all_and_one_says_it(several):
    _, facts = several
    for rank, fact in enumerate(facts):
        last = len(facts) - 1
        assert fact["main fails"] == {"kind": "DataError", "message": "main's", "said_by_main": rank != 0}
        assert "odd" in fact["main fails oddly"]["message"]
        assert fact["last fails"] == {"kind": "CheckpointError", "message": "last's", "said_by_main": rank != last}
        assert fact["all fail"] == {"kind": "CheckpointError", "message": "of 0", "said_by_main": rank != 0}


def test_the_images_of_a_step_are_the_same(several, idx):
    from tlscale.data.sampler import DataOrder

    _, facts = several
    order = DataOrder(77, 16, 0, False)
    for step in range(10):
        parts = [fact["rows"][step] for fact in facts]
        assert len({len(part) for part in parts}) == 1, "each process has the same number of forward passes"
        together = [row for chunk in zip(*parts, strict=True) for rows in chunk for row in rows]
        assert together == order.rows(step).tolist()


@pytest.mark.parametrize("name", ["exact", "split"])
def test_weights_are_those_of_one_process(several, alone, name):
    folder, _ = several
    assert largest_difference(exported(alone / name), exported(folder / name)) < 1e-12
    for file in ("model", "ema", "optimizer"):
        ends = [out / name / "checkpoints" / "step_00000010" / f"{file}.safetensors" for out in (alone, folder)]
        assert largest_difference(*map(tensors, ends)) < 1e-12


@pytest.mark.parametrize("name", ["exact", "split"])
def test_the_log_is_that_of_one_process(several, alone, name):
    folder, _ = several
    ours, theirs = lines(folder / name), lines(alone / name)
    same = ("kind", "step", "epoch", "images_seen", "lr", "split", "num_images", "top1", "top5", "macro_f1")
    assert [[r.get(key) for key in same] for r in ours] == [[r.get(key) for key in same] for r in theirs]
    assert [record["loss"] for record in ours] == pytest.approx([record["loss"] for record in theirs], abs=1e-12)
    norms = [[record["grad_norm"] for record in records if record["kind"] == "train"] for records in (ours, theirs)]
    assert norms[0] == pytest.approx(norms[1], abs=1e-12)


def test_every_image_is_evaluated_once(several, alone):
    folder, _ = several
    for name in ("exact", "split"):
        ours, theirs = result(folder / name), result(alone / name)
        for key in ("num_images", "confusion", "per_class", "top1", "top5"):
            assert ours[key] == theirs[key], key
        assert ours["num_images"] == 37


def test_batch_statistics_are_those_of_the_main_process(several):
    folder, facts = several
    for fact in facts:
        assert len(fact["buffers equal"]) >= 4  # steps 3, 4, 8 and 10 at least
        assert all(fact["buffers equal"])
        assert not any(fact["buffers equal unless shared"]), "this run was to show that they differ by themselves"
    assert result(folder / "bn")["num_images"] == 37


def test_a_run_that_one_process_began_goes_on_here(several, alone):
    folder, _ = several
    assert largest_difference(exported(alone / "exact"), exported(folder / "begun")) < 1e-12
    assert [r["lr"] for r in lines(folder / "begun", "train")] == [r["lr"] for r in lines(alone / "exact", "train")]


def test_a_run_that_was_begun_here_goes_on_with_one_process(several, alone, idx, tmp_path):
    folder, _ = several
    out = back_at_first_checkpoint(folder / "exact", tmp_path / "run")
    tlscale.run(small_recipe(tmp_path / "recipe.yaml", idx, **EXACT), out, resume=True)
    assert largest_difference(exported(alone / "exact"), exported(out)) < 1e-12


def test_what_is_unfrozen_at_a_boundary_is_synchronised(several):
    """DDP does not track what gets a gradient after it was made: each stage has to make it again."""
    _, facts = several
    for fact in facts:
        steps = {step: (moments, agree) for step, moments, agree in fact["ranks agree"]}
        assert set(range(1, 13)) <= set(steps)
        assert all(agree for _, agree in steps.values()), steps
        assert steps[5][0] == 2, "the head alone"
        assert steps[5][0] < steps[6][0] < steps[10][0]


def test_stages_on_codes_end_in_the_weights_of_one_process(several, alone):
    folder, _ = several
    assert largest_difference(exported(alone / "staged"), exported(folder / "staged")) < 1e-12
    for file in ("model", "ema", "optimizer"):
        ends = [out / "staged" / "checkpoints" / "step_00000012" / f"{file}.safetensors" for out in (alone, folder)]
        assert largest_difference(*map(tensors, ends)) < 1e-12


def test_codes_are_those_of_one_process(several, alone):
    """Their keys, too: what several processes computed, one finds."""
    from tlscale.codes.store import CodesStore, codes_root

    folder, _ = several
    ours = {entry.digest: entry for entry in CodesStore(folder / "cache" / "codes").entries()}
    theirs = {entry.digest: entry for entry in CodesStore(codes_root()).entries()}
    assert len(ours) >= 4
    assert set(ours) <= set(theirs)
    for digest, entry in ours.items():
        assert entry.complete
        files = {path.name: path.read_bytes() for path in entry.path.iterdir() if path.suffix in (".npy", ".json")}
        assert files == {name: (theirs[digest].path / name).read_bytes() for name in files}
    for key in ("top1", "confusion", "probe"):
        assert result(folder / "probed")[key] == result(alone / "probed")[key]


def test_wrong_starts_end_all_processes(several):
    folder, facts = several
    for rank, fact in enumerate(facts):
        assert fact["taken"]["kind"] == "RunFolderError"
        assert fact["taken"]["said_by_main"] == (rank != 0)
        assert fact["wrong number"]["kind"] == "LaunchError"
        assert f"num_processes = 7, but {len(facts)} run" in fact["wrong number"]["message"]
    # 15 cannot be shared by 2 or by 4.
    assert all(fact["no equal shares"]["kind"] == "RecipeError" for fact in facts)
    assert not (folder / "odd" / "run.json").exists()
    assert not (folder / "wrong").exists()


def test_only_the_main_process_prints(several):
    folder, facts = several
    output = (folder / "log").read_text()
    finished = ["exact", "split", "bn", "apart", "begun", "staged"]
    assert output.count("load it with timm.create_model") == len(finished)
    assert output.count("step 10/10") == len(finished) - 1  # the staged one has 12
    assert output.count("images computed in") == 7, "two splits for two stages, and three for the probe"
    assert f"= {len(facts)} processes x" in output


# --- Launched as a user does ------------------------------------------------------------------------------------------


def test_a_signal_to_one_process_stops_both_at_the_same_step(idx, tmp_path):
    recipe = {"duration": "300 steps", "checkpoint": {"every": "60 epochs"}}
    small_recipe(tmp_path / "recipe.yaml", idx, **recipe)
    out, log = tmp_path / "run", tmp_path / "log"
    words = ("tlscale/run.py", tmp_path / "recipe.yaml", "--out", out)
    launched = launch(2, *words, log=log)
    wait_until(logged(out, 20), launched)
    workers = workers_of(launched.pid)
    assert set(workers) == {0, 1}
    os.kill(workers[1], signal.SIGTERM)
    assert exit_code_of(launched, log, 60) != 0
    output = log.read_text()
    assert output.count("stopped by") == 1
    assert "stopped by a signal to another process after step" in output
    assert f"exitcode  : {EXIT_STOPPED}" in output
    step = int(output.split("another process after step ")[1].split()[0])
    assert (out / "checkpoints" / "LATEST").read_text().strip() == f"step_{step:08}"
    assert max(record["step"] for record in lines(out)) == step
    assert 'Traceback (most recent call last):\n  File "' + str(REPO / "tlscale") not in output


def workers_of(launcher):
    """rank -> process id of a launcher's workers."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        ranks = [variable for variable in variables if variable.startswith(b"RANK=")]
        if parent == launcher and ranks:
            found[int(ranks[0][5:])] = int(entry.name)
    return found


def test_wrong_launches_end_soon_with_one_message(idx, tmp_path):
    """Both at once: a start takes seconds."""
    small_recipe(tmp_path / "wrong.yaml", idx, compute={"num_processes": 3})
    small_recipe(tmp_path / "plain.yaml", idx)
    began = time.monotonic()
    started = {
        "wrong": launch(2, "tlscale/run.py", tmp_path / "wrong.yaml", "--out", tmp_path / "a", log=tmp_path / "wrong"),
        "apart": launch(
            2, "tlscale/run.py", tmp_path / "plain.yaml", "--out", tmp_path / "b",
            log=tmp_path / "apart", launcher="torchrun", cpu="",
        ),
    }  # fmt: skip
    for name, said in (("wrong", "asks for compute.num_processes = 3, but 2 run"), ("apart", "Accelerate joined 1")):
        assert exit_code_of(started[name], tmp_path / name, 60) != 0
        output = (tmp_path / name).read_text()
        assert output.count(said) == 1, output
        assert f"exitcode  : {EXIT_BAD_INPUT}" in output
    assert time.monotonic() - began < 100
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()
