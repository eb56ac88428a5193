"""The clock's ranking of steps, and the window that finds a loss that is not finite."""

import math

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from tests.small_models import classifier
from tlscale.dist import start_processes
from tlscale.errors import CheckpointError
from tlscale.model.classifier import Classifier
from tlscale.model.freeze import fixed_names
from tlscale.recipe.schema import CheckpointSection, ComputeSection, EvaluateSection
from tlscale.run_state import Clock, LossWindow, are_finite, restore_weights, snapshot

FIGURES = st.lists(st.none() | st.sampled_from([0.1, 0.2, 0.5, 0.9]), min_size=1, max_size=12)


@given(figures=FIGURES, keep_best=st.integers(1, 4), select=st.sampled_from(["top1", "loss", "macro_f1"]))
def test_the_best_steps_are_the_best_and_the_earlier_wins_a_tie(figures, keep_best, select):
    clock, evaluation = Clock(), EvaluateSection(select=select)
    entered = []
    for step, figure in enumerate(figures, start=1):
        clock.step = step
        if figure is not None:
            entered.append((step, figure))
        is_among = clock.rank_step(figure, evaluation, CheckpointSection(keep_best=keep_best))
        order = sorted(entered, key=lambda entry: (entry[1] if select == "loss" else -entry[1], entry[0]))[:keep_best]
        assert clock.best == order
        assert is_among == (step in [best for best, _ in order])
        assert clock.best_step == (order[0][0] if order else None)


@pytest.fixture
def processes():
    joined = start_processes(ComputeSection())
    yield joined
    joined.close()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_step_that_is_not_finite_is_found(processes, bad):
    clock = Clock()
    window = LossWindow(clock, processes)
    for step, loss in ((5, 2.0), (6, 4.0), (7, bad), (8, math.nan)):
        window.add(torch.tensor(loss), 4, step)
    assert window.settle() == 7
    assert clock.window_loss == 6.0


def test_the_mean_is_over_images_since_the_last_line(processes):
    clock = Clock(window_loss=10.0, window_images=5)  # as a resumed run begins
    window = LossWindow(clock, processes)
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
    fixed = fixed_names(network)
    assert "backbone.layer1.0.bn1.running_mean" in fixed
    assert not any("layer3" in name or name.startswith("head") for name in fixed)
    optimizer = torch.optim.SGD(
        [{"params": list(network.head.parameters()), "names": ["head.0.weight", "head.0.bias"]}]
    )
    made = Accelerator(cpu=True)
    checkpoint = snapshot(Clock(step=1), network, optimizer, None, made, elapsed_s=0.0, fixed=fixed)
    assert set(checkpoint.tensors["model"]) == set(network.state_dict()) - fixed
    other = classifier(freeze=[r"(conv1|bn1|layer[12])\..*"])
    with torch.no_grad():
        other.head[0].weight.zero_()
    restore_weights(checkpoint, other, None, fixed)
    assert torch.equal(other.head[0].weight, network.head[0].weight)
    with pytest.raises(CheckpointError, match="of step 1 lacks .* of the network's tensors"):
        restore_weights(checkpoint, other, None)
