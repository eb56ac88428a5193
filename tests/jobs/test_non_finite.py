"""A loss that is not finite: the run fails, or skips the step; and loses nothing."""

import os
import signal

import pytest

import tests.small_models  # noqa: F401 (makes per_image_resnet known to timm)
import tlscale
from tests.small_runs import (
    When,
    assert_same_bits,
    assert_same_runs,
    exported,
    lines,
    logged,
    put_small_idx_with_one_white,
    result,
    small_recipe,
    tensors,
)
from tlscale.errors import NonFiniteLossError, RecipeError, Stopped

BASE = {
    "backbone": {"name": "per_image_resnet"},
    "data": {"augment": ["flip"], "workers": 0},
    "optim": {"ema_decay": 0.9},
    "compute": {"micro_batch_size": 8},
    "duration": "3 epochs",
    "checkpoint": {"every": "1 steps", "keep": 100},
}


@pytest.fixture(scope="module")
def with_one_colour(tmp_path_factory):
    return put_small_idx_with_one_white(tmp_path_factory.mktemp("white"))


def run(place, name, data, resume=False, **changes):
    recipe = small_recipe(place / f"{name}.yaml", data, **{**BASE, **changes})
    return tlscale.run(recipe, place / name, resume=resume)


@pytest.fixture(scope="module")
def skipped(with_one_colour, tmp_path_factory):
    place = tmp_path_factory.mktemp("skipped")
    run(place, "run", with_one_colour, non_finite={"action": "skip"})
    return place / "run"


def test_a_step_that_is_left_out_leaves_no_trace(skipped):
    left_out = result(skipped)["steps_left_out"]
    assert len(left_out) == 3, "the white image comes once an epoch"
    assert [record["step"] for record in lines(skipped, "left_out")] == left_out
    for step in left_out:
        assert step > 1
        before, after = (skipped / "checkpoints" / f"step_{at:08}" for at in (step - 1, step))
        for file in ("model", "optimizer", "ema"):  # batch statistics are in the model
            assert_same_bits(tensors(before / f"{file}.safetensors"), tensors(after / f"{file}.safetensors"))
    for step in set(range(2, 16)) - set(left_out):
        folders = (skipped / "checkpoints" / f"step_{at:08}" for at in (step - 1, step))
        before, after = (tensors(folder / "model.safetensors") for folder in folders)
        assert any((before[name] != after[name]).any() for name in before)
    assert all(tensor.isfinite().all() for tensor in exported(skipped).values())


def test_a_run_that_was_to_roll_back_is_resumed_as_one_that_skips(skipped, with_one_colour, tmp_path, capsys):
    """Of a version that had `rollback`, which ended in the same weights."""
    step = result(skipped)["steps_left_out"][0]
    stop = When(logged(tmp_path / "run", step, "left_out"), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped), stop:
        run(tmp_path, "run", with_one_colour, non_finite={"action": "skip"})
    stored = tmp_path / "run" / "recipe.yaml"
    text = stored.read_text()
    assert "action: skip" in text
    stored.write_text(text.replace("action: skip", "action: rollback"))
    run(tmp_path, "run", with_one_colour, resume=True, non_finite={"action": "skip"})
    assert "non_finite.action = 'rollback', as the run began, is retired: read as 'skip'" in capsys.readouterr().out
    assert_same_runs(skipped, tmp_path / "run")


def test_to_roll_back_is_no_recipe(with_one_colour, tmp_path):
    with pytest.raises(RecipeError, match="non_finite.action = 'rollback': retired. Write skip"):
        small_recipe(tmp_path / "recipe.yaml", with_one_colour, non_finite={"action": "rollback"})


def test_a_failed_run_goes_on_with_another_policy(skipped, with_one_colour, tmp_path):
    with pytest.raises(NonFiniteLossError, match="non_finite.action=skip skips single steps") as caught:
        run(tmp_path, "run", with_one_colour)
    assert caught.value.step == result(skipped)["steps_left_out"][0]
    run(tmp_path, "run", with_one_colour, resume=True, non_finite={"action": "skip"})
    assert_same_runs(skipped, tmp_path / "run")


def test_too_many_steps_fail_the_run(skipped, with_one_colour, tmp_path):
    with pytest.raises(NonFiniteLossError, match="non_finite.most_steps is 2, and 3 steps were skipped") as caught:
        run(tmp_path, "run", with_one_colour, non_finite={"action": "skip", "most_steps": 2})
    assert caught.value.step == result(skipped)["steps_left_out"][2]
    assert not (tmp_path / "run" / "result.json").exists()


def test_stopped_after_a_step_was_left_out_and_resumed(skipped, with_one_colour, tmp_path):
    step = result(skipped)["steps_left_out"][0]
    stop = When(logged(tmp_path / "run", step, "left_out"), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped), stop:
        run(tmp_path, "run", with_one_colour, non_finite={"action": "skip"})
    run(tmp_path, "run", with_one_colour, resume=True, non_finite={"action": "skip"})
    assert_same_runs(skipped, tmp_path / "run")


def test_weights_that_overflow_by_themselves_end_the_run_all_the_same(with_one_colour, tmp_path):
    """Losses and gradients are finite, the update is what is wrong: there is no step to skip."""
    optim = {"name": "sgd", "lr": 1e38, "weight_decay": 1e3}
    with pytest.raises(NonFiniteLossError):
        run(
            tmp_path,
            "run",
            with_one_colour,
            optim=optim,
            schedule={"warmup": "0 steps"},
            non_finite={"action": "skip"},
        )


def test_a_limit_without_effect_is_refused(with_one_colour, tmp_path):
    with pytest.raises(RecipeError, match="non_finite.most_steps: has no effect with action=raise"):
        small_recipe(tmp_path / "recipe.yaml", with_one_colour, non_finite={"most_steps": 3})
