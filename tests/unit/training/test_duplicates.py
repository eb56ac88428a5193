"""Equal images under two labels are told at the end of a run, and by a plan that has read all of them."""

from __future__ import annotations

import json

import numpy as np
from click.testing import CliRunner
from PIL import Image

import tlscale
from tests.small_runs import put_small_folder, small_recipe
from tlscale.cli import main
from tlscale.data.sources.open import open_data
from tlscale.training.duplicates import clashing_labels

PROBE = {"backbone": {"name": "test_resnet"}, "probe": {"kind": "ridge"}}


def put(folder, *copies):
    """Images, of which some are copied: pairs of an image and a place."""
    put_small_folder(folder)
    for one, other in copies:
        (folder / other).write_bytes((folder / one).read_bytes())
    return folder


def some_of(folder, role, count=2):
    return [str(path.relative_to(folder)) for path in sorted((folder / role).glob("*/*.png"))][:: 60 // count]


def recipe_of(folder, **keys):
    return small_recipe(folder / "r.yaml", folder, data={"source": "folder", **keys}, **PROBE)


def labels_notes(notes):
    return [note for note in notes if note.startswith("LABELS")]


def test_equal_images_under_two_labels_are_told_with_both(tmp_path):
    folder = put_small_folder(tmp_path / "data")
    one, other = some_of(folder, "train")
    other = f"{other.rpartition('/')[0]}/copy.png"
    put(folder, (one, other))
    result = tlscale.run(recipe_of(folder), tmp_path / "run")
    (note,) = labels_notes(result["notes"])
    assert "2 of 81 images are, byte for byte, there under another label too" in note
    for path in (one, other):
        assert f"{path} is '{path.split('/')[1]}'" in note
    planned = CliRunner().invoke(main, ["plan", str(folder / "r.yaml"), "--check-images"])
    assert "there under another label too" in " ".join(planned.output.split())


def test_across_splits_too_and_not_where_the_labels_are_the_same(tmp_path):
    folder = put_small_folder(tmp_path / "data")
    one = some_of(folder, "train")[0]
    same = f"test/{one.split('/')[1]}/copy.png"
    put(folder, (one, same))
    recipe = recipe_of(folder)
    data = open_data(recipe.data, 0)
    for split in data.splits.values():
        split.digests()
    assert clashing_labels(data) == []
    last = max(path.name for path in (folder / "test").iterdir())
    put(folder, (one, f"test/{last}/other.png"))
    data = open_data(recipe.data, 0)
    assert clashing_labels(data) == []  # nothing was read yet
    for split in data.splits.values():
        split.digests()
    (note,) = clashing_labels(data)
    assert note.startswith("LABELS: 3 of 82 images")


def test_new_tells_both_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), dtype=np.uint8)
    rows = ["path,label"]
    for number, image in enumerate([*images, images[0]]):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{'ash' if number % 2 == 0 and number < 4 else 'oak'}")
    (tmp_path / "list.csv").write_text("\n".join(rows) + "\n")
    done = CliRunner().invoke(main, ["new", "list.csv"])
    said = " ".join(done.output.split())
    assert "which has another label ('oak', and this one 'ash')" in said or (
        "which has another label ('ash', and this one 'oak')" in said
    ), json.dumps(said)
