"""Every optimizer of timm goes on from a checkpoint on disk as if it had not stopped, bit for bit."""

import json
import warnings

import pytest
import safetensors.torch
import torch
from timm.optim import list_optimizers
from torch import nn

from tlscale.errors import CheckpointError, RecipeError
from tlscale.recipe.schema import OptimSection
from tlscale.training.checkpoint.files import Checkpoint, load_checkpoint, save_checkpoint
from tlscale.training.checkpoint.optimizer_state import pack_optimizer, unpack_optimizer
from tlscale.training.optimizer import build_optimizer, parameter_groups, set_lr

# Of other packages, or for CUDA alone; and one that needs second derivatives, which is refused.
ELSEWHERE = ("bnb", "fused", "adahessian")
NAMES = [name for name in list_optimizers() if not name.startswith(ELSEWHERE)]
NAMES += ["lookahead_adamw", "lookahead_sgd", "lookahead_lamb"]


@pytest.fixture(autouse=True)
def _no_compiler():
    """Kron compiles its parts, for a minute; what they compute is the same without."""
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make(name, dtype=torch.float32):
    """A small network with each kind of parameter (4, 2 and 1 dimensions), and its optimizer."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3)).to(dtype)
    section = OptimSection(name=name, lr=1e-2, layer_decay=0.5)
    depth = {parameter: int(parameter[0]) for parameter, _ in network.named_parameters()}
    params = dict(network.named_parameters())
    groups = parameter_groups(params, section, layer_depth=depth, never_decayed=frozenset())
    return network, build_optimizer(groups, section)


def take_steps(network, optimizer, steps):
    param = next(network.parameters())
    for step in steps:
        torch.manual_seed(step)
        images = torch.randn(3, 3, 4, 4).to(param.dtype)
        set_lr(optimizer, 1 / (1 + step))
        nn.functional.cross_entropy(network(images), torch.tensor([0, 1, 2])).backward()
        optimizer.step()
        optimizer.zero_grad()


def go_on(name, tmp_path, dtype=torch.float32, before=3, after=3):
    """A network that never stopped and one that was saved and loaded, each after the same steps."""
    network, optimizer = make(name, dtype)
    take_steps(network, optimizer, range(before))
    tensors, plain = pack_optimizer(optimizer)
    saved = Checkpoint(before, {"model": network.state_dict(), "optimizer": tensors}, {"optimizer": plain})
    loaded = load_checkpoint(save_checkpoint(tmp_path, saved))
    other, fresh = make(name, dtype)
    other.load_state_dict(dict(loaded.tensors["model"]))
    unpack_optimizer(fresh, loaded.tensors["optimizer"], loaded.state["optimizer"])
    steps = range(before, before + after)
    take_steps(network, optimizer, steps)
    take_steps(other, fresh, steps)
    return (network, optimizer), (other, fresh)


def assert_equal(one, two):
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_goes_on_bit_for_bit(name, tmp_path):
    (network, optimizer), (other, fresh) = go_on(name, tmp_path)
    assert_equal(network, other)
    assert not torch.equal(network[3].weight, make(name)[0][3].weight)  # it did move
    assert json.dumps(pack_optimizer(optimizer)[1]) == json.dumps(pack_optimizer(fresh)[1])


@pytest.mark.parametrize("name", ["adamw", "nadam", "nadamw", "lamb", "adafactor", "muon", "sgd", "lookahead_adamw"])
def test_in_float64_too(name, tmp_path):
    (network, _), (other, _) = go_on(name, tmp_path, torch.float64)
    assert_equal(network, other)


@pytest.mark.parametrize("before", [5, 6, 7])
def test_lookahead_looks_at_the_same_steps(before, tmp_path):
    """It moves its slow weights each sixth step."""
    (network, _), (other, _) = go_on("lookahead_adamw", tmp_path, before=before, after=8)
    assert_equal(network, other)


def test_a_generator_of_the_optimizers_own_is_kept(tmp_path):
    (_, optimizer), (_, fresh) = go_on("kron", tmp_path)
    assert optimizer.rng.getstate() == fresh.rng.getstate()
    assert make("kron")[1].rng.getstate() != fresh.rng.getstate()


def test_without_a_step_there_is_nothing_but_the_groups(tmp_path):
    (network, _), (other, _) = go_on("adamw", tmp_path, before=0)
    assert_equal(network, other)


def test_another_number_of_groups_is_refused():
    network, optimizer = make("adamw")
    take_steps(network, optimizer, range(1))
    tensors, plain = pack_optimizer(optimizer)
    for groups in ([], plain["groups"][:-1]):
        with pytest.raises(CheckpointError, match=rf"has {len(groups)} groups of parameters, the recipe makes \d"):
            unpack_optimizer(make("adamw")[1], tensors, {**plain, "groups": groups})


def test_files_hold_tensors_and_json_alone(tmp_path):
    network, optimizer = make("lamb")
    take_steps(network, optimizer, range(2))
    tensors, plain = pack_optimizer(optimizer)
    assert json.loads(json.dumps(plain)) == plain
    safetensors.torch.save_file(
        {key: tensor.contiguous().clone() for key, tensor in tensors.items()}, tmp_path / "x.safetensors"
    )
    steps = [tensor for key, tensor in tensors.items() if key.startswith("group/")]
    assert steps
    assert all(step == 2 for step in steps)


@pytest.mark.parametrize("name", [name for name in list_optimizers() if name.startswith(("bnb", "fused"))])
def test_those_of_other_packages_are_refused_before_training(name):
    if torch.cuda.is_available():
        pytest.skip("they may be there on this machine")
    with pytest.raises(RecipeError, match=f"optim: '{name}' cannot be made: "):
        make(name)
