"""An image that a run has read, and that is another one of equal size when it is resumed, is noticed; a copy is not."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

import tlscale
from tests.small_runs import as_after, assert_same_bits, exported, sample_images, small_recipe
from tlscale.data.sampler import micro_batches
from tlscale.errors import ResumeError, RunFolderError
from tlscale.storage.run_folder import RunFolder
from tlscale.training.read_contents import record_contents, replaced_images
from tlscale.training.run_files import read_run_info
from tlscale.training.setup import set_up


def put_bmps(root):
    """All of one size, as images of BMP are."""
    for role, count in (("train", 40), ("test", 8)):
        for row, image_HW in enumerate(sample_images(role, count)[0]):
            (root / role / "ab"[row % 2]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image_HW).save(root / role / "ab"[row % 2] / f"{row:02}.bmp")
    return root


def recipe_of(tmp_path, folder):
    """Images are decoded when they are used: else all are read, and known by content, before the run begins."""
    changes = {"duration": "2 steps", "batch_size": 8, "checkpoint": {"every": "1 step", "keep": 9}}
    data = {"source": "folder", "workers": 0, "cache_mib": 0}
    return small_recipe(tmp_path / "recipe.yaml", folder, data=data, **changes)


def replace_in_place(path):
    """Other pixels in the same file, of the same size and time."""
    old = path.stat()
    content = bytearray(path.read_bytes())
    content[-300] ^= 255
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (old.st_size, old.st_mtime_ns)


@pytest.fixture
def ran(tmp_path):
    """(a folder of images, a recipe, a run of it, an image that it had read when it made its first checkpoint)."""
    folder = put_bmps(tmp_path / "images")
    recipe = recipe_of(tmp_path, folder)
    tlscale.run(recipe, tmp_path / "whole")
    setup = set_up(recipe, world_size=1)
    batch = next(iter(micro_batches(setup.order, 0, setup.split, 0)))
    return folder, recipe, tmp_path / "whole", setup.data.train.file_of(int(batch.rows_B[0]))


def test_an_image_that_was_read_is_refused_when_it_is_another(ran, tmp_path):
    folder, recipe, whole, path = ran
    replace_in_place(path)
    with pytest.raises(ResumeError, match=rf"1 images that it read are other ones now, such as .*{path.name}"):
        tlscale.run(recipe, as_after(1, whole, tmp_path / "run"), resume=True)


def test_copies_of_the_images_are_the_same(ran, tmp_path):
    folder, recipe, whole, _ = ran
    copy = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(folder)
    copy.rename(folder)
    tlscale.run(recipe, as_after(1, whole, tmp_path / "run"), resume=True)
    assert_same_bits(exported(whole), exported(tmp_path / "run"))


def test_only_what_was_read_is_compared_and_saves_add_to_it(ran, tmp_path):
    folder, recipe, whole, _ = ran
    run, recorded = RunFolder(whole), read_run_info(RunFolder(whole))["data"]
    assert recorded["used_by"] == "place"
    run.contents.unlink()
    files = {}
    for step in range(2):
        data = set_up(recipe, world_size=1).data
        files = {i: data.train.file_of(i) for i in range(3)}
        data.train.read(step)
        record_contents(run, data)
    assert np.count_nonzero(np.load(run.contents) != b"") == 2
    for path in files.values():
        replace_in_place(path)
    now = set_up(recipe, world_size=1).data
    assert replaced_images(run, now, recorded) == [str(files[0]), str(files[1])]
    assert replaced_images(run, now, {**recorded, "repaired": [["train", 1]]}) == [str(files[0])]
    run.contents.write_bytes(run.contents.read_bytes()[:-5])
    with pytest.raises(RunFolderError, match=r"contents.npy' is damaged"):
        replaced_images(run, now, recorded)
