"""The clock's ranking of steps, and the window that finds a loss that is not finite."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from tests.small_models import classifier
from tlscale.distributed.processes import start_processes
from tlscale.errors import CheckpointError
from tlscale.models.classifier import Classifier
from tlscale.models.freeze import unchanging_keys
from tlscale.recipe.schema import CheckpointSection, ComputeSection, EvaluateSection
from tlscale.training.checkpoint.files import Checkpoint
from tlscale.training.checkpoint.run_state import restore_weights, saved_loop_state, snapshot
from tlscale.training.loop_state import Due, LoopState, LossMeter
from tlscale.training.nonfinite import are_finite

FIGURES = st.lists(st.none() | st.sampled_from([0.1, 0.2, 0.5, 0.9]), min_size=1, max_size=12)


@given(figures=FIGURES, keep_best=st.integers(1, 4), select=st.sampled_from(["top1", "loss", "macro_f1"]))
def test_the_best_steps_are_the_best_and_the_earlier_wins_a_tie(figures, keep_best, select):
    clock, evaluation = LoopState(), EvaluateSection(select=select, choose="best")
    entered = []
    for step, figure in enumerate(figures, start=1):
        clock.step = step
        if figure is not None:
            entered.append((step, figure))
        is_among = clock.rank_step(figure, evaluation, CheckpointSection(keep_best=keep_best))
        order = sorted(entered, key=lambda entry: (entry[1] if select == "loss" else -entry[1], entry[0]))[:keep_best]
        assert clock.best == order
        assert is_among == (step in [best for best, _ in order])
        assert clock.chosen_step == (order[0][0] if order else None)


ENTRIES = st.lists(
    st.none() | st.tuples(st.sampled_from([0.1, 0.2, 0.45, 0.5, 0.85, 0.9]), st.sampled_from([None, 0.0, 0.06, 0.4])),
    min_size=1,
    max_size=14,
)


@given(
    entries=ENTRIES,
    keep_best=st.integers(1, 4),
    select=st.sampled_from(["top1", "loss"]),
    stops=st.sets(st.integers(1, 14)),
)
def test_the_latest_step_within_one_standard_error_of_the_best_is_chosen(entries, keep_best, select, stops):
    """By the definition, looking at all figures so far; resumed anywhere; and no checkpoint is needed that is gone."""
    clock, keeping = LoopState(), CheckpointSection(keep_best=keep_best)
    evaluation, sign = EvaluateSection(select=select), 1 if select == "loss" else -1
    entered, on_disk = [], set()
    for step, entry in enumerate(entries, start=1):
        clock.step = step
        figure, error = entry or (None, None)
        if figure is not None:
            entered.append((step, figure, error))
        is_kept = clock.rank_step(figure, evaluation, keeping, error)
        if entered:
            best = min(entered, key=lambda one: (sign * one[1], one[0]))
            chosen = max(one for one in entered if sign * (one[1] - best[1]) <= (best[2] or 0.0))
            assert clock.chosen_step == chosen[0]
            plain = [dict(zip(("step", "figure", "standard_error"), one, strict=True)) for one in (chosen, best)]
            made = {"select": select, "choose": "latest_within_se", **plain[0], "best": plain[1]}
            assert clock.choice(evaluation) == made
        kept = set(clock.kept_steps(keeping))
        assert is_kept == (step in kept)
        assert clock.chosen_step is None or clock.chosen_step in kept
        assert kept <= on_disk | {step}, "what was removed is wanted again"
        on_disk = kept
        if step in stops:  # as a checkpoint has it
            state = json.loads(json.dumps({"clock": asdict(clock)}))
            clock = saved_loop_state(Checkpoint(step, {}, state))


@given(
    figures=FIGURES,
    patience=st.integers(1, 4),
    every=st.integers(1, 3),
    last=st.integers(0, 2),
    stage=st.integers(0, 8),
)
def test_patience_ends_after_so_many_evaluations_that_are_no_better(figures, patience, every, last, stage):
    """By the definition, counted from evaluation to evaluation, where the state knows the best one alone."""
    clock, evaluation = LoopState(), EvaluateSection(select="loss")
    last_step = every * len(figures) + min(last, every - 1)
    due = Due(last_step, [last_step], 1, 1, every, patience, stage)
    best, since = math.inf, 0
    for step in range(1, last_step):
        clock.step = step
        if not due.evaluate(step):
            assert not due.stop_early(step, clock.best_step)
            continue
        figure = figures[step // every - 1]
        clock.rank_step(figure, evaluation, CheckpointSection())
        is_better = figure is not None and figure < best
        best, since = (figure, 0) if is_better else (best, since + (step > stage))
        assert due.stop_early(step, clock.best_step) == (step > stage and since >= patience)
    assert not due.stop_early(last_step, clock.best_step)


def test_a_checkpoint_of_an_older_version_has_chosen_the_best():
    older = {"step": 3, "best": [[2, 0.5]], "keeps_codes": {}}
    clock = saved_loop_state(Checkpoint(3, {}, {"clock": older}))
    assert (clock.chosen_step, clock.chosen, clock.best_error) == (2, None, None)


@pytest.fixture
def processes():
    joined = start_processes(ComputeSection())
    yield joined
    joined.close()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_step_that_is_not_finite_is_found(processes, bad):
    clock = LoopState()
    window = LossMeter(clock, processes)
    for step, loss in ((5, 2.0), (6, 4.0), (7, bad), (8, math.nan)):
        window.add(torch.tensor(loss), 4, step)
    assert window.settle() == 7
    assert clock.window_loss == 6.0


def test_the_mean_is_over_images_since_the_last_line(processes):
    clock = LoopState(window_loss=10.0, window_images=5)  # as a resumed run begins
    window = LossMeter(clock, processes)
    assert window.settle() is None
    window.add(torch.tensor(2.0), 3, 1)
    assert window.settle() is None
    window.add(torch.tensor(4.0), 2, 2)
    assert window.settle() is None
    assert window.take_mean() == 1.6
    window.add(torch.tensor(3.0), 1, 3)
    window.settle()
    assert window.take_mean() == 3.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_found(bad):
    network = Classifier(torch.nn.Linear(2, 3), torch.nn.Sequential(torch.nn.Linear(3, 2)))
    assert are_finite(network)
    with torch.no_grad():
        network.head[0].bias[1] = bad
    assert not are_finite(network)


def test_what_cannot_change_is_not_kept_and_what_can_must_be_there():
    network = classifier(freeze=[r"(conv1|bn1|layer[12])\..*"])
    fixed = unchanging_keys(network)
    assert "backbone.layer1.0.bn1.running_mean" in fixed
    assert not any("layer3" in name or name.startswith("head") for name in fixed)
    optimizer = torch.optim.SGD(
        [{"params": list(network.head.parameters()), "names": ["head.0.weight", "head.0.bias"]}]
    )
    made = Accelerator(cpu=True)
    checkpoint = snapshot(LoopState(step=1), network, optimizer, None, made, unchanging_keys=fixed)
    assert set(checkpoint.tensors["model"]) == set(network.state_dict()) - fixed
    other = classifier(freeze=[r"(conv1|bn1|layer[12])\..*"])
    with torch.no_grad():
        other.head[0].weight.zero_()
    restore_weights(checkpoint, other, None, fixed)
    assert torch.equal(other.head[0].weight, network.head[0].weight)
    with pytest.raises(CheckpointError, match="of step 1 lacks .* of the network's tensors"):
        restore_weights(checkpoint, other, None)


def test_names_on_disk_are_those_of_the_first_version():
    """A field may be renamed; what is in the checkpoints of users may not."""
    loop = LoopState(step=7, best=[(4, 0.5)], chosen=(7, 0.4, 0.2), keeps_codes={"0": True}, skipped_steps=[2, 5])
    saved = loop.to_plain()
    assert list(saved) == [
        "step", "spent_s", "window_loss", "window_images", "best", "best_error", "chosen", "run_id", "wandb_run_id",
        "keeps_codes", "left_out",
    ]  # fmt: skip
    assert saved["left_out"] == [2, 5]
    assert LoopState.from_plain(json.loads(json.dumps(saved))) == loop
