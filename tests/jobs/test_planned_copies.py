"""`tlscale plan --check-images` of a cross-validation tells of the copies that the run then notes, and of as many."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from click.testing import CliRunner

import tlscale
from tests.small_runs import put_small_folder, small_recipe
from tlscale.cli import main
from tlscale.commands.plan import plan

RESNET = {"name": "test_resnet", "weights": "none"}
KINDS = {
    "refitted": {"backbone": RESNET, "probe": {"kind": "ridge", "strengths": [1.0]}},
    "not refitted": {"backbone": RESNET, "probe": {"kind": "ridge", "strengths": [1.0], "refit": False}},
    "trained": {"duration": "1 epochs"},
}
slow = pytest.mark.slow


def put_copies(folder):
    """Two in three training images three times, one of them under another label, and two of them in test."""
    put_small_folder(folder, train=60, test=6)
    for place in (folder / "train").iterdir():
        if len(list(place.iterdir())) < 4:  # too few for folds, without the copies
            shutil.rmtree(place)
            shutil.rmtree(folder / "test" / place.name, ignore_errors=True)
    files = sorted((folder / "train").glob("*/*.png"))
    for file in [file for number, file in enumerate(files) if number % 3]:
        for copy in (1, 2):
            shutil.copyfile(file, file.with_name(f"{copy}_{file.name}"))
    shutil.copyfile(files[0], files[-1].with_name("other.png"))
    for file in files[1:3]:
        place = folder / "test" / file.parent.name
        place.mkdir(exist_ok=True)
        shutil.copyfile(file, place / f"copy_{file.name}")
    return files


@pytest.mark.parametrize(
    ("kind", "evaluate", "data"),
    [
        ("refitted", {"folds": 3}, {}),
        pytest.param("not refitted", {"folds": 2, "repeats": 2}, {}, marks=slow),
        pytest.param("trained", {"folds": 2}, {}, marks=slow),
        pytest.param("refitted", {"folds": 2}, {"duplicates": "drop"}, marks=slow),
        pytest.param("refitted", {"folds": 2}, {"on_bad_image": "skip"}, marks=slow),
    ],
)
def test_a_plan_tells_of_the_copies_that_the_run_notes(kind, evaluate, data, tmp_path):
    folder = tmp_path / "data"
    files = put_copies(folder)
    if "on_bad_image" in data:
        for file in (files[1], files[1].with_name(f"1_{files[1].name}")):  # two equal ones that cannot be read
            file.write_bytes(file.read_bytes()[:70])
    data = {"source": "folder", "validation_fraction": 0.4, **data}
    recipe = small_recipe(tmp_path / "r.yaml", folder, data=data, evaluate=evaluate, **KINDS[kind])
    done = CliRunner().invoke(main, ["plan", str(tmp_path / "r.yaml"), "--check-images"])
    assert done.exit_code == 0, done.output
    planned = " ".join(done.output.split()).replace(f"{folder}/", "")
    figures = tlscale.run(recipe, tmp_path / "run")
    notes = [note for note in figures["notes"] if re.match("LEAK|DUPLICATES|LABELS|DROPPED|SKIPPED", note)]
    for note in notes:
        assert note in planned, note
    for word in ("LEAK", "LABELS", "DUPLICATES", "DROPPED", "SKIPPED"):
        assert planned.count(f"{word}: ") == sum(note.startswith(f"{word}: ") for note in notes), word
    answers = [note for note in notes if "answers are on images" in note]
    assert len(answers) == (data.get("duplicates") != "drop")
    if answers:
        assert any(note.startswith("LEAK: 2 of ") and "images of test are" in note for note in notes)
        assert int(answers[0].split()[1].replace(",", "")) > 14
    given = len(list((folder / "test").glob("*/*.png")))
    assert f"the given split of {given}, scored once by this model" in planned


def test_a_plan_of_folds_says_what_the_start_was_fitted_to(tmp_path):
    """Of a given test split a note, and of the folds the number of all their images."""
    files = put_copies(tmp_path / "data")
    probe = KINDS["refitted"]
    data = {"source": "folder", "validation_fraction": 0.4}
    tlscale.run(small_recipe(tmp_path / "a.yaml", tmp_path / "data", data=data, **probe), tmp_path / "start")
    start = {**probe, "backbone": {"name": "test_resnet", "weights": f"run:{tmp_path / 'start'}"}}
    folds = small_recipe(tmp_path / "b.yaml", tmp_path / "data", data=data, evaluate={"folds": 2}, **start)
    count = len(list((tmp_path / "data" / "train").glob("*/*.png")))
    with pytest.raises(tlscale.TlscaleError, match=rf"was fitted to {count} of {count} images of the folds"):
        plan(folds, world_size=1)
    # The images of test are those that the start was fitted to, and the folds are of others.
    other = tmp_path / "other"
    put_small_folder(other, train=80)
    shutil.rmtree(other / "test")
    seen = {file.read_bytes() for file in (tmp_path / "data").rglob("*.png")}
    for file in other.rglob("*.png"):
        if file.read_bytes() in seen:
            file.unlink()
    rows = [
        f"{file},{file.parent.name},{split}"
        for split, some in (("train", other.rglob("*.png")), ("test", files))
        for file in some
    ]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split", *rows]) + "\n")
    data = {"source": "manifest", "path": str(tmp_path / "list.csv")}
    small_recipe(tmp_path / "c.yaml", tmp_path / "list.csv", data=data, evaluate={"folds": 2}, **start)
    done = CliRunner().invoke(main, ["plan", str(tmp_path / "c.yaml"), "--json"])
    assert done.exit_code == 0, done.output
    (note,) = [note for note in json.loads(done.stdout)["notes"] if note.startswith("LEAK")]
    assert f"LEAK: {len(files)} of {len(files)} images of test are among those that the run of backbone.weights" in note
