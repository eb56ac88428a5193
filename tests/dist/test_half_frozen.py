"""Frozen parts, recomputed activations, torch.compile and 2 processes: together they train what each would alone."""

import shutil

import pytest

import tlscale
from tests.dist.half_frozen import RUNS
from tests.dist.launches import facts_of
from tests.small_runs import (
    assert_same_bits,
    largest_difference,
    last_checkpoint,
    put_small_idx,
    result,
    small_recipe,
    tensors,
)

pytestmark = [pytest.mark.dist, pytest.mark.long, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return put_small_idx(tmp_path_factory.mktemp("data"), train=64, test=32)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """By one process, without any of it."""
    folder = tmp_path_factory.mktemp("alone")
    for name in ("plain", "drops"):
        tlscale.run(small_recipe(folder / "recipe.yaml", data, **RUNS[name]), folder / name)
    return folder


@pytest.fixture(scope="module")
def eager(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eager")
    facts_of(2, "half_frozen.py", folder, data, "plain", "recomputed", "drops", "drops_recomputed")
    return folder


def saved(folder, name):
    return tensors(last_checkpoint(folder / name) / "model.safetensors")


def test_recomputed_it_is_the_same_to_the_bit(eager, alone):
    assert_same_bits(saved(eager, "recomputed"), saved(eager, "plain"))
    assert_same_bits(saved(eager, "drops_recomputed"), saved(eager, "drops"))
    assert largest_difference(saved(eager, "plain"), saved(alone, "plain")) < 1e-12
    assert largest_difference(saved(eager, "drops"), saved(eager, "plain")) > 1e-6, "nothing was dropped"


@pytest.mark.parametrize("name", ["compiled", "both"])
def test_compiled_it_is_the_same_to_1e_10(eager, data, tmp_path, name):
    """In float64; the compiler sums in another order."""
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler, and there is no g++ on this machine")
    facts_of(2, "half_frozen.py", tmp_path, data, name, timeout_s=900)
    found = largest_difference(saved(tmp_path, name), saved(eager, "plain"))
    print(f"{name}: {found:.2e}")
    assert found < 1e-10
    assert result(tmp_path / name)["top1"] == result(eager / "plain")["top1"]
