"""Whatever is damaged in a run folder, a command that opens it ends in an error of ours, or as if it were sound."""

import json
import random
import shutil
from pathlib import Path

import pytest

import tlscale
from tests.mutations import mutate
from tests.small_runs import put_small_idx, result, small_recipe
from tlscale.commands.compare_outcomes import finished
from tlscale.commands.evaluate import evaluate_run
from tlscale.commands.paired_tests import read_scored
from tlscale.errors import RunFolderError, TlscaleError
from tlscale.storage.run_folder import RunFolder

FILES = ("run.json", "result.json", "recipe.yaml", "metrics.jsonl", "predictions.parquet", "STOPPED")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, its recipe, and a folder to damage copies in."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = small_recipe(folder / "r.yaml", put_small_idx(folder / "data", train=24, test=8), duration="2 steps")
    tlscale.run(recipe, folder / "sound")
    (folder / "sound" / "STOPPED").write_text(json.dumps({"by": "SIGTERM", "spent_s": {"train": 1.5}}))
    return folder / "sound", recipe, folder / "copy"


def compare(folder, recipe):
    """As `tlscale compare` reads a run that is complete."""
    done = tlscale.run(recipe, folder, resume=True)
    outcome = finished("head", None, 0, RunFolder(folder), done)
    read_scored(folder, outcome.scored_sha256)


def finish(folder, recipe):
    """The run as if it had been killed before its end."""
    (folder / "result.json").unlink(missing_ok=True)
    tlscale.run(recipe, folder, resume=True)


USES = {"evaluate": lambda folder, recipe: evaluate_run(folder), "compare": compare, "finish": finish}


def check(run, seeds, uses):
    sound, recipe, copy = run
    wrong, refused = [], 0
    for seed in seeds:
        rng = random.Random(seed)
        name = rng.choice(uses)
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(sound, copy)
        aside = copy / "aside"
        aside.mkdir()
        for file in FILES:
            shutil.move(copy / file, aside / file)
        done = mutate(aside, rng)
        for path in aside.iterdir():
            shutil.move(path, copy / path.name)
        aside.rmdir()
        try:
            USES[name](copy, recipe)
        except TlscaleError:
            refused += 1
        except Exception as error:
            wrong.append(f"{seed}, {name}, {done}: {type(error).__name__}: {error!s:.150}")
    assert wrong == [], f"{len(wrong)} of {len(seeds)}, {refused} refused"
    print(f"{refused} of {len(seeds)} refused")


def test_a_few_damaged_run_folders(run, capsys):
    check(run, range(8), ["evaluate", "compare"])


@pytest.mark.long
@pytest.mark.parametrize("use", USES)
def test_many_damaged_run_folders(run, use):
    check(run, range(170), [use])


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("run.json", lambda plain: plain["data"].pop("num_images")),
        ("run.json", lambda plain: plain.update(weights=3)),
        ("run.json", lambda plain: plain["data"].pop("used_by")),
        ("run.json", lambda plain: plain.update(bad_images=[1])),
        ("run.json", lambda plain: plain.pop("input")),
        ("result.json", lambda plain: plain.update(top1="0.9")),
        ("result.json", lambda plain: plain.update(top1_interval95=[0.1])),
        ("result.json", lambda plain: plain.update(best=None)),
    ],
)
def test_a_damaged_file_is_named(run, file, change):
    sound, recipe, copy = run
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(sound, copy)
    plain = json.loads((copy / file).read_text())
    change(plain)
    (copy / file).write_text(json.dumps(plain))
    with pytest.raises(RunFolderError, match=rf"{file}' is damaged, or was changed: .*\. Bring it back"):
        compare(copy, recipe)


def test_a_probe_that_begins_again_keeps_its_earlier_test_splits(tmp_path):
    place: Path = put_small_idx(tmp_path / "data", train=24, test=8)
    recipe = small_recipe(tmp_path / "r.yaml", place, probe={"kind": "ridge"})
    tlscale.run(recipe, tmp_path / "out")
    (tmp_path / "out" / "result.json").unlink()  # as if it had been stopped
    then = json.loads((tmp_path / "out" / "run.json").read_text())["data"]["scored_sha256"]
    path = place / "test-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    tlscale.run(recipe, tmp_path / "out", resume=True)
    now = json.loads((tmp_path / "out" / "run.json").read_text())["data"]
    assert now["earlier_scored_sha256"] == [then]
    assert now["scored_sha256"] == result(tmp_path / "out")["scored_sha256"] != then
