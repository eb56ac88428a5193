"""Several processes (gloo, on the CPU): the same run as on one, and no process is left waiting for another."""

import itertools
import os
import signal
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

import tlscale
from tests.dist.launches import back_at_first_checkpoint, exit_code_of, facts_of, launch, workers_of
from tests.dist.many_checks import BATCH_NORM, EXACT, PROBE, SPLIT, STAGED
from tests.recompute import assert_follows
from tests.small_runs import (
    REPO,
    assert_same_bits,
    assert_same_evaluation,
    exported,
    largest_difference,
    lines,
    logged,
    result,
    sample_images,
    small_recipe,
    tensors,
    wait_until,
)
from tlscale.errors import EXIT_BAD_INPUT, EXIT_STOPPED

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def alone(idx, tmp_path_factory):
    """The same runs by one process."""
    folder = tmp_path_factory.mktemp("alone")
    runs = {"exact": EXACT, "split": SPLIT, "bn": BATCH_NORM, "staged": STAGED, "probed": PROBE}
    for name, changes in runs.items():
        tlscale.run(small_recipe(folder / f"{name}.yaml", idx, **changes), folder / name)
    return folder


# With more than two, gradients are added in an order that can differ, so four stand for two in `make test`.
BY = [pytest.param((2, "accelerate"), id="2", marks=pytest.mark.long), pytest.param((4, "torchrun"), id="4")]


@pytest.fixture(scope="module", params=BY)
def several(request, idx, alone, tmp_path_factory):
    """The runs of many_checks.py by so many processes: (folder, facts of each rank)."""
    processes, launcher = request.param
    folder = tmp_path_factory.mktemp(f"by{processes}")
    back_at_first_checkpoint(alone / "exact", folder / "begun")
    # A cache of their own: they are to compute the codes together.
    cache = str(folder / "cache")
    return folder, facts_of(processes, "many_checks.py", folder, idx, launcher=launcher, TLSCALE_CACHE=cache)


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
        assert_same_evaluation(folder / name, alone / name)


@pytest.mark.parametrize("name", ["exact", "split", "staged", "probed"])
def test_predictions_are_those_of_one_process(several, alone, name):
    """The rows of all processes, each image once, in the order of the split; and all scored figures follow."""
    folder, _ = several
    ours, theirs = (pq.read_table(out / name / "predictions.parquet") for out in (folder, alone))
    for column in ("path", "row", "true_label", "label"):
        assert ours[column].equals(theirs[column]), column
    assert ours["row"].to_pylist() == list(range(37))
    logits = [np.array(table["logits"].to_pylist()) for table in (ours, theirs)]
    assert np.abs(logits[0] - logits[1]).max() < (1e-12 if name != "probed" else 1e-4)
    if name in ("staged", "probed"):  # the others' loss is smoothed
        assert_follows(result(folder / name), folder / name / "predictions.parquet")


def test_batch_statistics_are_those_of_the_main_process(several):
    folder, facts = several
    for fact in facts:
        assert len(fact["buffers equal"]) >= 4  # steps 3, 4, 8 and 10 at least
        assert all(fact["buffers equal"])
        assert fact["not shared"]["kind"] == "DesyncError", "this run was to show that they differ by themselves"
        assert ".running_mean' than process 0" in fact["not shared"]["message"]
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


def test_all_processes_begin_with_the_same_weights(several):
    _, facts = several
    assert [fact["begin with equal weights"] for fact in facts] == [True] * len(facts)


def test_dropout_differs_between_processes_and_comes_again(several):
    folder, facts = several
    for fact in facts:
        assert len(fact["dropout masks"]) >= 10, "two forward passes a step, but for a short last batch"
        assert fact["dropout masks"] == fact["dropout masks again"]
        assert len(set(fact["dropout masks"])) == len(fact["dropout masks"]), "no pass has the mask of another"
    for one, other in itertools.combinations(facts, 2):
        assert not set(one["dropout masks"]) & set(other["dropout masks"])
    assert_same_bits(exported(folder / "dropout"), exported(folder / "dropout_again"))


def test_processes_that_come_apart_are_found_before_a_checkpoint_is_made(several):
    folder, facts = several
    last = len(facts) - 1
    for fact in facts:
        assert fact["apart"]["kind"] == "DesyncError"
        assert fact["apart"]["said_by_main"]
        message = fact["apart"]["message"]
        assert f"after step 6, process {last} of {len(facts)} has other values in 'blocks.3.mlp.fc1.weight'" in message
    checkpoints = folder / "apart" / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("*step_*")) == ["step_00000002", "step_00000004"]
    assert (checkpoints / "LATEST").read_text().strip() == "step_00000004"
    assert not (folder / "apart" / "result.json").exists()


def test_codes_are_those_of_one_process(several, alone):
    """Their keys, too: what several processes computed, one finds."""
    from tlscale.codes.store import CodesStore

    folder, _ = several
    ours = {entry.digest: entry for entry in CodesStore(folder / "cache" / "codes").entries()}
    theirs = {entry.digest: entry for entry in CodesStore().entries()}
    assert len(ours) >= 4
    assert set(ours) <= set(theirs)
    for digest, entry in ours.items():
        assert entry.complete
        files = {
            path.name: path.read_bytes() for path in entry.path.iterdir() if path.suffix in (".safetensors", ".json")
        }
        assert files == {name: (theirs[digest].path / name).read_bytes() for name in files}
    for key in ("top1", "confusion", "probe"):
        assert result(folder / "probed")[key] == result(alone / "probed")[key]


@pytest.mark.parametrize("name", ["bn", "staged", "probed"])
def test_one_process_gives_the_scored_images_the_bits_of_several(several, name):
    """Each process had a share of them in batches of its own, and prediction takes the same ones."""
    folder, _ = several
    made = tlscale.load(folder / name).predict(sample_images("test", 37)[0])
    table = pq.read_table(folder / name / "predictions.parquet")
    assert made.labels == table["label"].to_pylist()
    told = "calibrated_probability" if "calibrated_probability" in table.column_names else "probability"
    np.testing.assert_array_equal(made.probabilities.max(1), table[told].to_numpy().astype(np.float32))


def test_wrong_starts_end_all_processes(several):
    folder, facts = several
    for rank, fact in enumerate(facts):
        assert fact["taken"]["kind"] == "RunFolderError"
        assert fact["taken"]["said_by_main"] == (rank != 0)
        assert fact["wrong number"]["kind"] == "LaunchError"
        assert f"compute.num_processes: 7 in the recipe, but {len(facts)} run" in fact["wrong number"]["message"]
        assert fact["spare"]["kind"] == "ModelError"
        assert r"freeze: 'spare\.weight|spare\.bias'; or train on one process" in fact["spare"]["message"]
    assert result(folder / "spared")["steps"] == 3, "the remedy that the message names"
    assert not (folder / "spare" / "run.json").exists()
    # 15 cannot be shared by 2 or by 4.
    assert all(fact["no equal shares"]["kind"] == "RecipeError" for fact in facts)
    assert not (folder / "odd" / "run.json").exists()
    assert not (folder / "wrong").exists()


def test_only_the_main_process_prints(several):
    folder, facts = several
    output = (folder / "log").read_text()
    of_ten_steps = ["exact", "split", "bn", "begun", "dropout", "dropout_again"]
    assert output.count("step 10/10") == len(of_ten_steps)
    loaded_by_timm = ["exact", "split", "bn", "begun", "staged", "spared"]  # those with a head of one layer
    assert output.count("load it with timm.create_model") == len(loaded_by_timm)
    assert output.count("images computed in") == 7, "two splits for two stages, and three for the probe"
    assert f"= {len(facts)} processes x" in output


# --- Launched as a user does ------------------------------------------------------------------------------------------


def test_a_signal_to_one_process_stops_both_at_the_same_step(idx, tmp_path):
    recipe = {"duration": "300 steps", "checkpoint": {"every": "60 epochs"}}
    small_recipe(tmp_path / "recipe.yaml", idx, **recipe)
    out, log = tmp_path / "run", tmp_path / "log"
    words = ("tlscale/run.py", tmp_path / "recipe.yaml", "--out", out)
    with launch(2, *words, log=log) as launched:
        wait_until(logged(out, 20), launched)
        workers = workers_of(launched.pid)
        assert set(workers) == {0, 1}
        os.kill(workers[1], signal.SIGTERM)
        assert exit_code_of(launched, log) != 0
    output = log.read_text()
    assert output.count("stopped by") == 1
    assert "stopped by a signal to another process after step" in output
    assert f"exitcode  : {EXIT_STOPPED}" in output
    step = int(output.split("another process after step ")[1].split()[0])
    assert (out / "checkpoints" / "LATEST").read_text().strip() == f"step_{step:08}"
    assert max(record["step"] for record in lines(out)) == step
    assert 'Traceback (most recent call last):\n  File "' + str(REPO / "tlscale") not in output


def test_wrong_launches_end_soon_with_one_message(idx, tmp_path):
    """Both at once: a start takes seconds."""
    small_recipe(tmp_path / "wrong.yaml", idx, compute={"num_processes": 3})
    small_recipe(tmp_path / "plain.yaml", idx)
    began = time.monotonic()
    torchrun = {"launcher": "torchrun", "cpu": ""}
    with (
        launch(2, "tlscale/run.py", tmp_path / "wrong.yaml", "--out", tmp_path / "a", log=tmp_path / "wrong") as wrong,
        launch(
            2, "tlscale/run.py", tmp_path / "plain.yaml", "--out", tmp_path / "b", log=tmp_path / "apart", **torchrun
        ) as apart,
    ):
        for launched, name, said in (
            (wrong, "wrong", "compute.num_processes: 3 in the recipe, but 2 run"),
            (apart, "apart", "Accelerate joined 1"),
        ):
            assert exit_code_of(launched, tmp_path / name) != 0
            output = (tmp_path / name).read_text()
            assert output.count(said) == 1, output
            assert f"exitcode  : {EXIT_BAD_INPUT}" in output
    assert time.monotonic() - began < 100
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()
