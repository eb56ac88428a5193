"""One of two processes is asked to stop, in the middle of something long: both stop, and none waits for the other."""

import json

import pytest

from tests.dist.launches import exit_code_of, launch
from tests.small_runs import REPO, put_small_folder, result, small_recipe
from tlscale.errors import EXIT_STOPPED

pytestmark = pytest.mark.dist

DATA = {"source": "folder", "image_size": 32, "validation_fraction": 0.2}
TRAINS = {"data": DATA, "duration": "6 steps", "evaluate": {"every": "3 steps", "batch_size": 1}}
PROBE = {"data": DATA, "probe": {"kind": "logistic"}, "backbone": {"name": "test_resnet"}}
# (recipe, what is asked at which time and on which rank)
PHASES = {
    "decode": (TRAINS, "decoding images@9:1"),
    "evaluation": (TRAINS, "evaluating@2:1"),
    "scan": (TRAINS, "scanning folders@9:1"),
    "scan of the first": (TRAINS, "scanning folders@9"),
    "fit": (PROBE, "fitting the probe@9"),
    "codes": (PROBE, "computing codes:1"),
}
LONG = ("decode", "scan", "scan of the first", "fit", "codes")


@pytest.mark.parametrize(
    "phase", [pytest.param(phase, marks=[pytest.mark.long] if phase in LONG else []) for phase in PHASES]
)
def test_both_stop(phase, tmp_path):
    changes, doing = PHASES[phase]
    recipe, log, out = tmp_path / "r.yaml", tmp_path / "log", tmp_path / "run"
    small_recipe(recipe, put_small_folder(tmp_path / "data"), **changes)
    words = (REPO / "tlscale" / "run.py", recipe, "--out", out, "--resume")
    with launch(2, *words, log=log, launcher="torchrun", TLSCALE_FAULT_STOP=doing) as launched:
        assert exit_code_of(launched, log, 150) != 0  # torchrun makes 1 of what a process ends with
    said = log.read_text()
    assert "stopped by" in json.loads((out / "STOPPED").read_text())["message"], said
    assert "tlscale: stopped by" in said
    assert f"exitcode  : {EXIT_STOPPED}" in said
    assert 'Traceback (most recent call last):\n  File "' + str(REPO / "tlscale") not in said, said
    with launch(2, *words, log=log, launcher="torchrun") as launched:
        assert exit_code_of(launched, log, 150) == 0, log.read_text()
    assert result(out)["num_images"] == 20
