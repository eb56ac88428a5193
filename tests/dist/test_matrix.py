"""1, 2 and 4 processes, 1, 2 and 4 forward passes a step: one and the same training, and the same evaluation."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import tlscale
from tests.dist import matrix
from tests.dist.launches import back_at_first_checkpoint, facts_of
from tests.small_runs import (
    assert_same_bits,
    exported,
    largest_difference,
    last_checkpoint,
    lines,
    result,
    small_recipe,
    tensors,
)
from tlscale.data.transforms import normalise
from tlscale.recipe.seeds import derive_seed
from tlscale.training.setup import set_up
from tlscale.training.specs import open_image_cache

pytestmark = [pytest.mark.dist, pytest.mark.long, pytest.mark.timeout(1500)]
PROCESSES = (1, 2, 4)
OTHERS = [
    (processes, passes) for processes in PROCESSES for passes in matrix.ACCUMULATIONS if (processes, passes) != (1, 1)
]
EPOCH = [16, 16, 16, 16, 13]  # images of its steps


@pytest.fixture(scope="module")
def trained(idx, tmp_path_factory):
    """Number of processes -> (folder of the runs, facts of each rank)."""
    alone = tmp_path_factory.mktemp("by1")
    found = {1: (alone, [{"steps": matrix.train(alone, idx), "evaluations": matrix.evaluations(alone, idx)}])}
    for processes, launcher in ((2, "accelerate"), (4, "torchrun")):
        folder = tmp_path_factory.mktemp(f"by{processes}")
        facts = facts_of(processes, "matrix.py", folder, idx, "train", launcher=launcher, timeout_s=900)
        found[processes] = folder, facts
    return found


def saved(folder, name, file="model"):
    return tensors(last_checkpoint(folder / name) / f"{file}.safetensors")


def files_of(folder, name):
    return sorted(path.stem for path in last_checkpoint(folder / name).glob("*.safetensors"))


def assert_close(first, second, bound, what):
    """Two sets of tensors by name are equal to `bound`, and to 10 times that where attention makes queries and keys.

    A bias of keys moves all scores of a row alike, and softmax takes it out: its gradient is rounding and nothing else;
    and while attention is still even all over, those of queries and keys are not much more. AdamW divides a gradient by
    its own size, and so makes steps of full length of such rounding.
    """
    assert first.keys() == second.keys()
    found = {"queries and keys": 0.0, "all else": 0.0}
    for name in first:
        kind = "queries and keys" if ".attn.qkv." in name else "all else"
        found[kind] = max(found[kind], float((first[name].double() - second[name].double()).abs().max()))
    print(f"{what}: " + ", ".join(f"{kind} {value:.1e}" for kind, value in found.items()))
    assert found["all else"] < bound
    assert found["queries and keys"] < 10 * bound


def assert_same_training(first, second, names, bound=1e-12):
    """Weights, averages and moments of two runs, each a (folder, name)."""
    assert files_of(*first) == files_of(*second) == names
    for file in names:
        assert_close(saved(*first, file), saved(*second, file), bound, f"{file} of {first[1]} and {second[1]}")


@pytest.mark.parametrize("processes", PROCESSES)
def test_steps_are_cut_as_planned(trained, processes):
    """Else the others would compare what is the same anyway."""
    _, facts = trained[processes]
    for name, (passes, _) in matrix.RUNS.items():
        by_rank = [fact["steps"][name] for fact in facts]
        size = matrix.BATCH // (processes * passes)
        for step, num_images in enumerate(2 * EPOCH):
            parts = [steps[step] for steps in by_rank]
            assert sum(map(sum, parts)) == num_images
            assert {len(part) for part in parts} == {math.ceil(num_images / (processes * size))}
            if num_images == matrix.BATCH:
                assert parts == [[size] * passes] * processes
    uneven = [fact["steps"]["sgd_fp64_4"][4] for fact in facts]
    assert processes == 1 or len(set(map(sum, uneven))) > 1, "the last batch is to be shared unequally"


@pytest.mark.parametrize(("processes", "passes"), OTHERS)
@pytest.mark.parametrize("optim", matrix.OPTIMS)
def test_float64_to_1e_12(trained, optim, processes, passes):
    files = ["ema", "model", "optimizer"] if optim == "adamw" else ["model", "optimizer"]
    first, second = (trained[1][0], f"{optim}_fp64_1"), (trained[processes][0], f"{optim}_fp64_{passes}")
    assert_same_training(first, second, files)


@pytest.mark.parametrize(("processes", "passes"), OTHERS)
@pytest.mark.parametrize("optim", matrix.OPTIMS)
def test_float32_to_1e_5(trained, optim, processes, passes):
    first, second = saved(trained[1][0], f"{optim}_fp32_1"), saved(trained[processes][0], f"{optim}_fp32_{passes}")
    if optim == "adamw":  # see assert_close
        keys_biases = [name for name in first if name.endswith(".attn.qkv.bias")]
        assert len(keys_biases) == 6
        first, second = ({k: v for k, v in some.items() if k not in keys_biases} for some in (first, second))
    assert_close(first, second, 1e-5, f"{optim}, {processes} processes, {passes} passes")


def plain_loop(recipe, clip):
    """Plain PyTorch: each step one batch, the mean over its images, however many they are."""
    setup = set_up(recipe, world_size=1)
    (stage,) = setup.stages
    images = open_image_cache(setup).train().images(torch.arange(len(setup.data.train)).numpy())
    labels, network = torch.from_numpy(setup.data.train.labels_N), setup.classifier.train()
    groups = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in stage.groups]
    optimizer = torch.optim.SGD(groups, momentum=0.9) if clip else torch.optim.AdamW(groups)
    peaks = [group["lr"] for group in groups]
    for step in range(setup.total_steps):
        rows = torch.from_numpy(setup.order.rows(step))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * stage.lr_factor(step)
        logits = network(normalise(images[rows], setup.spec, torch.float64))
        F.cross_entropy(logits, labels[rows]).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return network.state_dict()


@pytest.mark.parametrize(("optim", "clip"), [("sgd", 1.0), ("adamw", None)])
@pytest.mark.parametrize("processes", PROCESSES)
def test_a_short_batch_in_short_windows_is_one_batch_of_a_plain_loop(trained, idx, tmp_path, optim, clip, processes):
    recipe = small_recipe(tmp_path / "recipe.yaml", idx, **matrix.changes_of(f"{optim}_fp64_1", 1))
    ours = saved(trained[processes][0], f"{optim}_fp64_4")
    assert_close(plain_loop(recipe, clip), ours, 1e-12, f"{optim}, {processes} processes, and a plain loop")


@pytest.mark.parametrize("processes", PROCESSES)
def test_mixed_and_smoothed_labels_and_class_weights(trained, processes):
    assert_same_training((trained[1][0], "mixed"), (trained[processes][0], "mixed"), ["ema", "model", "optimizer"])


@pytest.mark.parametrize("processes", PROCESSES)
def test_adapters_behind_cached_codes(trained, processes):
    files = ["ema", "model", "optimizer"]
    assert_same_training((trained[1][0], "adapters"), (trained[processes][0], "adapters"), files)
    assert any("lora_B" in name for name in saved(trained[processes][0], "adapters"))


@pytest.mark.parametrize("processes", PROCESSES)
def test_a_student_is_taught_the_same(trained, processes):
    assert_same_training((trained[1][0], "taught"), (trained[processes][0], "taught"), ["model", "optimizer"])
    last = [result(trained[number][0] / "taught") for number in (1, processes)]
    assert last[0]["distill_loss"] == pytest.approx(last[1]["distill_loss"], rel=1e-12)
    assert last[1]["codes"]["kept_mib"] == last[0]["codes"]["kept_mib"]


@pytest.mark.parametrize("processes", PROCESSES)
def test_norms_rates_and_losses_in_the_log(trained, processes):
    for name in ("sgd_fp64_1", "sgd_fp64_4", "mixed"):
        ours, theirs = lines(trained[processes][0] / name, "train"), lines(trained[1][0] / name, "train")
        assert len(ours) == 10
        for key in ("step", "epoch", "images_seen", "lr"):
            assert [line[key] for line in ours] == [line[key] for line in theirs]
        for key in ("grad_norm", "loss"):
            assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], rel=1e-12)
        assert max(line["grad_norm"] for line in ours) > 0.5, "nothing was clipped"


@pytest.mark.parametrize("processes", PROCESSES)
def test_evaluation_in_between_changes_nothing(trained, processes):
    """With batch norm, whose statistics an evaluation of several processes gets from the main one."""
    folder, _ = trained[processes]
    assert len(lines(folder / "evaluated_often", "evaluate")) == 10
    assert len(lines(folder / "evaluated_rarely", "evaluate")) == 1
    for file in ("model", "optimizer"):
        assert_same_bits(saved(folder, "evaluated_often", file), saved(folder, "evaluated_rarely", file))


# --- Evaluation -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(trained, idx, tmp_path_factory):
    """Number of processes -> what each rank got: 3 too, of which only two of the numbers of images are multiples."""
    facts = {processes: [fact["evaluations"] for fact in by_rank] for processes, (_, by_rank) in trained.items()}
    three = facts_of(3, "matrix.py", tmp_path_factory.mktemp("by3"), idx, "evaluate")
    return {**facts, 3: [fact["evaluations"] for fact in three]}


@pytest.mark.parametrize("num_images", matrix.EVALUATED)
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_evaluation_is_that_of_one_process(evaluated, processes, num_images):
    (expected,) = evaluated[1]
    expected = expected[str(num_images)]
    assert expected["num_images"] == num_images
    assert sum(map(sum, expected["confusion"])) == num_images
    rounded = ("loss", "ece")  # sums of float64, which depend on their order in the last bit
    for by_rank in evaluated[processes]:
        found = by_rank[str(num_images)]
        assert found.keys() == expected.keys()
        for key, value in found.items():
            assert value == (pytest.approx(expected[key], rel=1e-12, abs=1e-15) if key in rounded else expected[key]), (
                key
            )


# --- Saved by N processes, resumed by M -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resumed(trained, idx, tmp_path_factory):
    """Number of processes -> (folder with begun_NAME.fromN, gone on with to the end, facts of each rank)."""
    found = {}
    for processes in PROCESSES:
        folder = tmp_path_factory.mktemp(f"resumed{processes}")
        for name, before in itertools.product(matrix.SAVED, PROCESSES):
            back_at_first_checkpoint(trained[before][0] / name, folder / f"begun_{name}.from{before}")
        if processes == 1:
            for out in sorted(path for path in folder.glob("begun_*") if path.is_dir()):
                name = out.name.removeprefix("begun_").split(".")[0]
                tlscale.run(small_recipe(folder / "recipe.yaml", idx, **matrix.changes_of(name, 1)), out, resume=True)
        facts = facts_of(processes, "matrix.py", folder, idx, "resume", timeout_s=600) if processes > 1 else []
        found[processes] = folder, facts
    return found


@pytest.mark.parametrize(("before", "after"), list(itertools.product(PROCESSES, PROCESSES)))
@pytest.mark.parametrize("name", matrix.SAVED)
def test_saved_by_some_and_resumed_by_others(trained, resumed, name, before, after):
    (folder, facts), run = resumed[after], f"begun_{name}.from{before}"
    assert result(folder / run)["steps"] == 10
    assert_same_training((trained[1][0], name), (folder, run), ["ema", "model", "optimizer"])
    assert largest_difference(exported(trained[1][0] / name), exported(folder / run)) < 1e-11
    assert [line["lr"] for line in lines(folder / run, "train")] == [
        line["lr"] for line in lines(trained[1][0] / name, "train")
    ]
    for fact in facts:
        # The state of random numbers is not kept but made anew, of the step: the same on all, whoever saved.
        assert fact["resumed"][run]["seeds"] == [derive_seed(0, "step", step) for step in range(3, 10)]
        assert fact["resumed"][run]["agreed"] == [[step, True] for step in (6, 9, 10)]


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("name", matrix.SAVED)
def test_resumed_by_as_many_the_bits_are_the_same(trained, resumed, name, processes):
    """By 4, too, although DDP arranges its buckets anew after the first backward pass of each start."""
    run = f"begun_{name}.from{processes}"
    for file in ("ema", "model", "optimizer"):
        assert_same_bits(saved(trained[processes][0], name, file), saved(resumed[processes][0], run, file))
