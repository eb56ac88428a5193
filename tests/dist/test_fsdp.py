"""FSDP2 on several processes (gloo, on the CPU): really spread, and the same weights as one process has.

The code is what runs on GPUs: torch's `fully_shard` does not ask what a device is.
"""

import json
import shutil
import time

import pyarrow.parquet as pq
import pytest
import torch

import tlscale
from tests.dist.fsdp_checks import FAMILIES, RUNS, SOME
from tests.dist.launches import back_at_first_checkpoint, exit_code_of, facts_of, launch
from tests.small_runs import (
    REPO,
    assert_same_bits,
    assert_same_evaluation,
    exported,
    largest_difference,
    last_checkpoint,
    lines,
    result,
    small_recipe,
    tensors,
)
from tlscale.errors import EXIT_BAD_INPUT
from tlscale.training.checkpoint.files import SHARDS, corruption_of, load_checkpoint

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]  # a start of several takes most of it


@pytest.fixture(scope="module")
def alone(idx, tmp_path_factory):
    """The same runs by one process, which spreads nothing."""
    folder = tmp_path_factory.mktemp("alone")
    for name in SOME:
        tlscale.run(small_recipe(folder / f"{name}.yaml", idx, **RUNS[name]), folder / name)
    return folder


@pytest.fixture(scope="module")
def all_alone(idx, alone):
    """The runs that only four processes make are there as well."""
    for name in RUNS.keys() - SOME:
        tlscale.run(small_recipe(alone / f"{name}.yaml", idx, **RUNS[name]), alone / name)


def by_several(processes, launcher, folder, idx, parts):
    """The runs of fsdp_checks.py by so many processes: (folder, facts of each rank)."""
    options = {"launcher": launcher, "TLSCALE_CACHE": str(folder / "cache")}
    return folder, facts_of(processes, "fsdp_checks.py", folder, idx, parts, timeout_s=500, **options)


@pytest.fixture(scope="module")
def by_two(idx, alone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("by2")
    for name in ("exact", "codes"):
        back_at_first_checkpoint(alone / name, folder / f"begun_{name}_by_1")
    return by_several(2, "accelerate", folder, idx, "some")


@pytest.fixture(scope="module")
def by_four(idx, all_alone, tmp_path_factory):
    return by_several(4, "torchrun", tmp_path_factory.mktemp("by4"), idx, "all")


@pytest.fixture(scope="module")
def by_four_then_two(idx, by_four, tmp_path_factory):
    folder = tmp_path_factory.mktemp("by4then2")
    for name in ("exact", "codes"):
        back_at_first_checkpoint(by_four[0] / name, folder / f"begun_{name}_by_4")
    return by_several(2, "torchrun", folder, idx, "begun")


@pytest.fixture(scope="module", params=["by_two", pytest.param("by_four", marks=pytest.mark.long)])
def several(request):
    return request.getfixturevalue(request.param)


each_run = pytest.mark.parametrize(
    ("several", "name"),
    [
        *(("by_two", name) for name in SOME),
        *(pytest.param("by_four", name, marks=pytest.mark.long) for name in RUNS),
    ],
    indirect=["several"],
)


def test_what_is_trained_is_really_spread(several):
    _, facts = several
    for name in facts[0]["spread"]:
        of_ranks = [fact["spread"][name] for fact in facts]
        assert len(of_ranks[0]) >= 2, "checkpoints at which it was looked at"
        for at_rank in of_ranks:
            for seen in at_rank:
                assert seen["spread"], name
                assert seen["shares"], name
                assert seen["num_moments"] == 2 * seen["num_trained"] > 0
                assert seen["frozen whole"]
                assert seen["were whole"] >= seen["num_trained"]
                assert seen["still whole"] == 0, f"{name}: whole tensors are held beside the shares"
        for seen in zip(*of_ranks, strict=True):
            assert sum(share["held"] for share in seen) == seen[0]["of"]
            assert max(share["held"] for share in seen) < 1.5 * seen[0]["of"] / len(facts)


@each_run
def test_weights_are_those_of_one_process(several, alone, name):
    folder, _ = several
    assert largest_difference(exported(alone / name), exported(folder / name)) < 1e-12
    ours, theirs = (load_checkpoint(last_checkpoint(out / name)).tensors for out in (folder, alone))
    assert ours.keys() == theirs.keys()
    for group in ours:
        assert largest_difference(dict(ours[group]), dict(theirs[group])) < 1e-12, group


@each_run
def test_the_log_is_that_of_one_process(several, alone, name):
    folder, _ = several
    ours, theirs = lines(folder / name), lines(alone / name)
    same = ("kind", "step", "epoch", "images_seen", "lr", "split", "num_images", "top1", "top5", "macro_f1")
    assert [[r.get(key) for key in same] for r in ours] == [[r.get(key) for key in same] for r in theirs]
    for key in ("loss", "grad_norm"):
        pairs = [(one[key], two[key]) for one, two in zip(ours, theirs, strict=True) if key in one]
        assert [one for one, _ in pairs] == pytest.approx([two for _, two in pairs], abs=1e-11)


def test_every_image_is_evaluated_once(several, alone):
    folder, facts = several
    for name in facts[0]["spread"]:
        assert_same_evaluation(folder / name, alone / name)
        same = ["path", "row", "true_label", "label"]
        ours, theirs = (pq.read_table(out / name / "predictions.parquet", columns=same) for out in (folder, alone))
        assert ours.equals(theirs), name


def test_codes_were_trained_on(several):
    folder, _ = several
    for name in ("codes", "convnext"):
        assert set(result(folder / name)["codes"]["kept_mib"]) == {"train", "validation", "test"}
    assert result(folder / "exact")["codes"] is None


def test_what_is_frozen_has_the_same_bits(several, alone):
    folder, _ = several
    for name in ("codes", "convnext"):
        trained = {key for key in load_checkpoint(last_checkpoint(alone / name)).tensors["model"]}
        ours, theirs = exported(folder / name), exported(alone / name)
        frozen = {key for key in theirs if not any(t.removeprefix("backbone.") == key for t in trained)}
        frozen = {key for key in frozen if not key.startswith("head")}
        assert len(frozen) > 5
        assert_same_bits({key: ours[key] for key in frozen}, {key: theirs[key] for key in frozen})


def test_batch_norm_ends_as_with_ddp(several):
    folder, _ = several
    assert largest_difference(exported(folder / "bn_ddp"), exported(folder / "bn_fsdp2")) < 1e-12


@pytest.fixture(scope="module")
def by_both_engines(idx, tmp_path_factory):
    return by_several(2, "torchrun", tmp_path_factory.mktemp("both"), idx, "both")[0]


@pytest.mark.long
def test_a_step_that_is_not_finite_on_one_process_is_left_out_on_all(by_both_engines):
    ddp, fsdp2 = (by_both_engines / f"spoilt_{engine}" for engine in ("ddp", "fsdp2"))
    assert result(ddp)["steps_left_out"] == result(fsdp2)["steps_left_out"] == [5]
    assert largest_difference(exported(ddp), exported(fsdp2)) < 1e-12


@pytest.mark.long
@pytest.mark.parametrize(("name", "most"), [("fp32", 1e-5), ("bf16", 0.05), ("bf16_bn", 0.05)])
def test_other_precisions_end_near_ddp(by_both_engines, name, most):
    ddp, fsdp2 = (by_both_engines / f"{name}_{engine}" for engine in ("ddp", "fsdp2"))
    losses = [[record["loss"] for record in lines(out, "train")] for out in (ddp, fsdp2)]
    assert losses[0] == pytest.approx(losses[1], abs=most)
    assert largest_difference(exported(ddp), exported(fsdp2)) < most
    saved = load_checkpoint(last_checkpoint(fsdp2)).tensors
    floats = [t for group in ("model", "optimizer") for t in saved[group].values() if t.is_floating_point()]
    assert {tensor.dtype for tensor in floats} == {torch.float32}, "weights and moments are kept in fp32"


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_families_end_as_with_ddp(by_both_engines, name):
    ends = [exported(by_both_engines / f"{name}_{engine}") for engine in ("ddp", "fsdp2")]
    assert largest_difference(*ends) < 1e-12


def test_bf16_is_what_is_exchanged(several):
    _, facts = several
    for fact in facts:
        assert fact["types"][0] == {"norm": ["torch.float32"], "other": ["torch.bfloat16"]}


def test_an_evaluation_in_step_counts_every_image_once(several):
    _, facts = several
    for fact in facts:
        uneven = fact["uneven"]
        assert uneven["passes"] == [2] * uneven["most"]
        assert uneven["num_images"] == uneven["all"]


def test_shares_lie_in_a_file_of_each_process_without_pickle(several):
    folder, facts = several
    checkpoint = last_checkpoint(folder / "exact")
    assert len(list((checkpoint / "shards").glob("*.safetensors"))) == len(facts)
    suffixes = {path.suffix for path in checkpoint.rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json"}
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert sum(name.startswith("shards/") for name in manifest["files"]) == len(facts)
    held = sum(len(named) for named in map(tensors, (checkpoint / "shards").glob("*.safetensors")))
    assert held > 0
    assert tensors(checkpoint / "ema.safetensors") == {}, "all of it is spread"


def test_a_damaged_share_is_found(by_two, tmp_path):
    folder, _ = by_two
    for number, damage in enumerate((lambda data: data[:-1], lambda data: data[:-9] + b"\1" + data[-8:], None)):
        copy = shutil.copytree(last_checkpoint(folder / "exact"), tmp_path / str(number) / "step_00000010")
        assert corruption_of(copy) is None
        share = copy / "shards" / "shard-00002-model-00001-of-00001.safetensors"
        assert share.is_file()
        share.write_bytes(damage(share.read_bytes())) if damage else share.unlink()
        assert "shards/shard-00002" in corruption_of(copy)
    shutil.copy(copy / "shards" / "shard-00001-model-00001-of-00001.safetensors", copy / "shards" / "a.safetensors")
    assert "a.safetensors is not in its manifest" in corruption_of(copy)


@pytest.mark.parametrize("name", ["exact", "codes"])
def test_a_run_that_one_process_began_goes_on_here(by_two, alone, name):
    folder, _ = by_two
    out = folder / f"begun_{name}_by_1"
    assert largest_difference(exported(alone / name), exported(out)) < 1e-12
    assert [r["lr"] for r in lines(out, "train")] == [r["lr"] for r in lines(alone / name, "train")]


@pytest.mark.parametrize("name", ["exact", "codes"])
def test_a_run_that_was_begun_here_goes_on_with_one_process(several, alone, idx, tmp_path, name):
    out = back_at_first_checkpoint(several[0] / name, tmp_path / "run")
    assert (last_checkpoint(out) / SHARDS).is_dir()
    tlscale.run(small_recipe(tmp_path / "recipe.yaml", idx, **RUNS[name]), out, resume=True)
    assert largest_difference(exported(alone / name), exported(out)) < 1e-12


@pytest.mark.long
@pytest.mark.parametrize("name", ["exact", "codes"])
def test_a_run_that_four_began_goes_on_with_two(by_four, by_four_then_two, alone, name):
    out = by_four_then_two[0] / f"begun_{name}_by_4"
    assert (last_checkpoint(out) / SHARDS).is_dir()
    assert largest_difference(exported(alone / name), exported(out)) < 1e-12
    assert [r["lr"] for r in lines(out, "train")] == [r["lr"] for r in lines(by_four[0] / name, "train")]


def test_an_optimizer_that_cannot_work_on_shares_is_refused(several):
    _, facts = several
    for fact in facts:
        assert fact["wrong optimizer"]["kind"] == "RecipeError"
        assert (
            "optim.name: 'adafactor' is not supported with compute.engine: fsdp2" in fact["wrong optimizer"]["message"]
        )


def test_one_process_that_cannot_write_fails_all(several):
    folder, facts = several
    for rank, fact in enumerate(facts):
        error = fact["one cannot write"]
        assert error["kind"] == "CheckpointError", error
        assert "cannot save the checkpoint of step 5" in error["message"]
        assert "File too large" in error["message"]
        assert error["said_by_main"] == (rank != 0)
    assert list((folder / "full" / "checkpoints").iterdir()) == [], "nothing half-written is left"
    assert not (folder / "full" / "model").exists()


def test_a_process_that_fails_in_the_network_ends_all(idx, tmp_path):
    log = tmp_path / "log"
    began = time.monotonic()
    script = REPO / "tests" / "dist" / "trouble.py"
    with launch(2, script, tmp_path, idx, "fails", log=log, launcher="torchrun") as launched:
        assert exit_code_of(launched, log, 120) != 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["world_size"] == 2
    assert "a layer of rank 1 fails" in log.read_text()
    # Five steps; one pass more was on trial, before the first.
    assert max(record["step"] for record in lines(tmp_path / "run")) == 5
    assert time.monotonic() - began < 100, "well before compute.hang_timeout_s"


# --- Launched in another way than the recipe says ---------------------------------------------------------------------


def test_the_recipe_decides_and_not_the_launcher(idx, tmp_path):
    small_recipe(tmp_path / "recipe.yaml", idx)
    words = ("tlscale/run.py", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
    kind = ("--use_fsdp", "--fsdp_version", "1")
    with launch(2, *words, log=tmp_path / "log", kind=kind) as launched:
        assert exit_code_of(launched, tmp_path / "log", 200) != 0
    output = (tmp_path / "log").read_text()
    said = "in the recipe, but 'accelerate launch' asks for FSDP (ACCELERATE_USE_FSDP). It is version 1, too"
    assert output.count(said) == 1, output
    assert f"exitcode  : {EXIT_BAD_INPUT}" in output
    assert not (tmp_path / "run").exists()
