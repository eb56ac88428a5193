"""A stop in every phase of every verb: it ends with 75, what is finished is kept, and a run goes on to the same end."""

import json

import pytest

from tests.small_runs import assert_same_runs, exported, put_small_folder, result, small_recipe
from tlscale.errors import EXIT_STOPPED

pytestmark = pytest.mark.slow

TRAINS = {"duration": "6 steps", "evaluate": {"every": "3 steps", "batch_size": 1}}
PROBE = {"probe": {"kind": "logistic"}, "backbone": {"name": "test_resnet"}}
SKIPS = {"data": {"on_bad_image": "skip"}}

# (recipe, what the process is at when it is asked)
RUNS = {
    "scan": (TRAINS, "scanning folders@20"),
    "check": (TRAINS | SKIPS, "checking images@20"),
    "set up": (TRAINS, "setting up@2"),
    "decode": (TRAINS, "decoding images@20"),
    "validation": (TRAINS, "evaluating@2"),
    "last validation": (TRAINS, "evaluating@14"),
    "test": (TRAINS, "evaluating@30"),
    "codes": (PROBE, "computing codes"),
    "fit": (PROBE, "fitting the probe@9"),
    "fit again": (PROBE, "fitting the probe@60"),
    "test of a probe": (PROBE, "evaluating"),
}
LONG = ("set up", "validation", "fit again", "test of a probe", "codes", "evaluate")


def sampled(names):
    """Those that take a path like another one's are run by `make test-long`."""
    return [pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in names]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return put_small_folder(tmp_path_factory.mktemp("pictures"))


class Place:
    """Runs of one recipe in a folder, as processes of their own."""

    def __init__(self, folder, forks, pictures, changes):
        self.folder, self._forks = folder, forks
        data = {"source": "folder", "image_size": 32, "validation_fraction": 0.2, **changes.get("data", {})}
        self.recipe = folder / "r.yaml"
        folder.mkdir(exist_ok=True)
        small_recipe(self.recipe, pictures, **{**changes, "data": data})

    def __call__(self, *words, **variables):
        self.log = self.folder / "log"
        self.log.unlink(missing_ok=True)
        pid = self._forks.start(*words, log=self.log, TLSCALE_CACHE=str(self.folder / "cache"), **variables)
        return self._forks.wait(pid, timeout_s=280)

    def is_stopped(self, code, doing):
        said = self.log.read_text()
        assert code == EXIT_STOPPED, said
        assert "tlscale: stopped" in said
        assert "Traceback" not in said
        return True


@pytest.fixture(scope="module")
def whole(tmp_path_factory, forks, pictures):
    """The folder of an uninterrupted run of a recipe; made once for all that share it."""
    made = {}

    def of(changes):
        key = json.dumps(changes)
        if key not in made:
            place = Place(tmp_path_factory.mktemp("whole"), forks, pictures, changes)
            assert place("run", place.recipe, "--out", place.folder / "run") == 0, place.log.read_text()
            made[key] = place.folder / "run"
        return made[key]

    return of


@pytest.mark.parametrize("phase", sampled(RUNS))
def test_a_run_is_stopped_and_goes_on(phase, whole, forks, pictures, tmp_path):
    changes, doing = RUNS[phase]
    place, out = Place(tmp_path / "place", forks, pictures, changes), tmp_path / "run"
    words = ("run", place.recipe, "--out", out, "--resume")
    assert place.is_stopped(place(*words, TLSCALE_FAULT_STOP=doing), doing)
    assert json.loads((out / "STOPPED").read_text())["by"] == "SIGTERM"
    assert not (out / "result.json").exists()
    assert place(*words) == 0, place.log.read_text()
    assert not (out / "STOPPED").exists()
    assert sorted(path.name for path in out.iterdir() if path.name != ".lock") == sorted(
        path.name for path in whole(changes).iterdir() if path.name != ".lock"
    )
    if "probe" in changes:
        same = ("top1", "loss", "probe", "confusion")
        assert {key: result(out)[key] for key in same} == {key: result(whole(changes))[key] for key in same}
        assert all(value.equal(exported(out)[name]) for name, value in exported(whole(changes)).items())
    else:
        assert_same_runs(whole(changes), out)


def test_a_layer_that_is_fitted_is_not_fitted_again(whole, forks, pictures, tmp_path):
    changes = PROBE | {"codes": {"layer": ["layer1", "layer2", "penultimate"], "pool": "avg"}}
    place, out = Place(tmp_path / "place", forks, pictures, changes), tmp_path / "run"
    words = ("run", place.recipe, "--out", out, "--resume")
    # While the first one is kept.
    assert place.is_stopped(place(*words, signals=[(".fits/", "SIGTERM")]), "fitting")
    assert len(list((out / ".fits").iterdir())) == 1
    assert place(*words) == 0, place.log.read_text()
    assert not (out / ".fits").exists()
    assert result(out)["probe"] == result(whole(changes))["probe"]
    assert all(value.equal(exported(out)[name]) for name, value in exported(whole(changes)).items())


@pytest.mark.parametrize("verb", sampled(["plan", "codes", "evaluate", "export", "exporter", "compare"]))
def test_the_other_verbs_are_stopped_too(verb, whole, forks, pictures, tmp_path):
    place = Place(tmp_path / "place", forks, pictures, TRAINS)
    words, doing = {
        "plan": (("plan", place.recipe), "scanning folders@20"),
        "codes": (("codes", place.recipe, "codes.layer=penultimate"), "computing codes"),
        "evaluate": (("evaluate", whole(TRAINS)), "evaluating"),
        "export": (("export", whole(TRAINS), "--to", "timm", "--out", tmp_path / "out"), "scanning folders@20"),
        "exporter": (("export", whole(TRAINS), "--to", "onnx", "--out", tmp_path / "out"), "exporting"),
        "compare": (
            ("compare", place.recipe, "--strategies", "scratch", "--seeds", "0,1", "--out", tmp_path / "all"),
            "comparing@2",
        ),
    }[verb]
    assert place.is_stopped(place(*words, TLSCALE_FAULT_STOP=doing), doing)
    if verb == "exporter":
        assert not any((tmp_path / "out").glob("*")), "nothing is half there"
    if verb == "compare":
        (first,) = (tmp_path / "all").glob("*/result.json")
        written_ns = first.stat().st_mtime_ns
        assert place(*words, "--resume") == 0, place.log.read_text()
        assert first.stat().st_mtime_ns == written_ns
    else:
        assert place(*words) == 0, place.log.read_text()
