"""A finished run of two processes becomes the longer one, bit for bit; see `tests/jobs/test_lengthened.py`."""

import pytest

from tests.dist.launches import exit_code_of, launch
from tests.jobs.test_lengthened import CONSTANT
from tests.small_runs import REPO, assert_same_bits, exported, last_checkpoint, result, small_recipe, tensors

pytestmark = [pytest.mark.dist, pytest.mark.long]


def test_by_two_processes(idx, tmp_path):
    for name, duration, words in (
        ("run", "1 epochs", []),
        ("run", "2 epochs", ["--resume"]),
        ("whole", "2 epochs", []),
    ):
        recipe = tmp_path / f"{name}.yaml"
        small_recipe(recipe, idx, **CONSTANT, duration=duration)
        log = tmp_path / "log"
        line = [REPO / "tlscale" / "run.py", recipe, "--out", tmp_path / name, "compute.num_processes=2", *words]
        with launch(2, *line, log=log) as launched:
            exit_code = exit_code_of(launched, log)
        assert exit_code == 0, log.read_text()[-5000:]
    assert result(tmp_path / "run")["steps"] == result(tmp_path / "whole")["steps"] == 10
    ends = [last_checkpoint(tmp_path / name) for name in ("run", "whole")]
    for file in sorted(path.name for path in ends[0].glob("*.safetensors")):
        assert_same_bits(*(tensors(end / file) for end in ends))
    assert_same_bits(exported(tmp_path / "run"), exported(tmp_path / "whole"))
