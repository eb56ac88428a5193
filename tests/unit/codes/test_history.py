"""Data sets with a history: codes are always those of the images, and only new contents are computed."""

import os
import shutil
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.unit.codes.test_extract import KEY, Screen
from tlscale.codes.addresses import SplitImages, ViewImages
from tlscale.codes.extract import extract_codes
from tlscale.codes.shards import BLOCK
from tlscale.codes.store import CodesStore
from tlscale.data import content
from tlscale.data.input_spec import InputSpec
from tlscale.data.loader import ImageStore, train_batch
from tlscale.data.sampler import MicroBatch
from tlscale.data.sources.open import open_data
from tlscale.data.sources.stores import FileStore
from tlscale.data.transforms import Augmenter
from tlscale.distributed.processes import start_processes
from tlscale.recipe.field_types import augmentation_values
from tlscale.recipe.schema import ComputeSection, DataSection

SIZE, TICK_S = 8, 0.02
SPEC = InputSpec(image_size=SIZE, in_chans=1, crop_pct=1.0, interpolation="bilinear", mean=(0.5,), std=(0.5,))
OPERATIONS = ("add", "drop", "rename", "replace", "move", "copy", "copy with times", "relabel", "double")
OPERATIONS += ("swap", "touch", "set back")


def pixels_of(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)


def put(path: Path, number: int) -> None:
    """Of one size, whatever is in it."""
    Image.fromarray(pixels_of(number)).save(path, "BMP")


def network(images_BCHW):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = torch.randn(5, SIZE * SIZE)
    return images_BCHW.flatten(1) @ weights.T, images_BCHW.amax((1, 2, 3))


def inputs(batch):
    return batch.images_BCHW.float() / 255


def expected(images_BCHW) -> list[torch.Tensor]:
    """What the network gives for these images, in blocks."""
    parts = []
    for start in range(0, len(images_BCHW), BLOCK):
        some = images_BCHW[start : start + BLOCK]
        filled = torch.cat([some, some[-1:].expand(BLOCK - len(some), -1, -1, -1)])
        parts.append([value[: len(some)] for value in network(filled)])
    return [torch.cat(values) for values in zip(*parts, strict=True)]


class History:
    """A manifest and its files, and what is in them."""

    def __init__(self, root: Path) -> None:
        self.root, self.next = root / "data", 2
        self.root.mkdir()
        self.rows = {"a.bmp": [0, 0, "train"], "b.bmp": [1, 1, "train"]}  # name: content, label, split
        put(self.root / "a.bmp", 0)
        put(self.root / "b.bmp", 1)

    def apply(self, operation: str, pick: int) -> None:
        """One change; the first two rows stay what they are, so that there are two classes to train on."""
        free = [name for name in self.rows if name not in ("a.bmp", "b.bmp")]
        name = free[pick % len(free)] if free else None
        new, self.next = f"{self.next}.bmp", self.next + 1
        match operation:
            case "copy" | "copy with times":
                copied = self.root.with_name(f"data{self.next}")
                shutil.copytree(
                    self.root, copied, copy_function=shutil.copyfile if operation == "copy" else shutil.copy2
                )
                self.root = copied
            case "add":
                put(self.root / new, self.next)
                self.rows[new] = [self.next, pick % 2, "test" if pick % 3 else "train"]
            case _ if name is None:
                return
            case "drop":
                (self.root / name).unlink()
                del self.rows[name]
            case "rename":
                (self.root / name).rename(self.root / new)
                self.rows[new] = self.rows.pop(name)
            case "replace":  # in place, of the same size, its times set back
                old = (self.root / name).stat()
                put(self.root / name, self.next)
                os.utime(self.root / name, ns=(old.st_atime_ns, old.st_mtime_ns))
                self.rows[name][0] = self.next
            case "move":
                self.rows[name][2] = "train" if self.rows[name][2] == "test" else "test"
            case "relabel":
                self.rows[name][1] = 1 - self.rows[name][1]
            case "touch" | "set back":  # times of a copy that is being made, and of an archive
                times = (time.time(),) * 2 if operation == "touch" else (pick, pick)
                os.utime(self.root / name, times)
            case "swap":  # two files of one size: each name has the other's content, size and, often, times
                other = free[(pick + 1) % len(free)]
                moves = ((name, "aside"), (other, name), ("aside", other)) if name != other else ()
                for source, target in moves:
                    (self.root / source).rename(self.root / target)
                self.rows[name][0], self.rows[other][0] = self.rows[other][0], self.rows[name][0]
            case "double":
                shutil.copyfile(self.root / name, self.root / new)
                self.rows[new] = [self.rows[name][0], *self.rows[name][1:]]

    def opened(self):
        lines = [f"{name},c{label},{split}" for name, (_, label, split) in self.rows.items()]
        (self.root / "list.csv").write_text("\n".join(["path,label,split", *lines]) + "\n")
        section = DataSection(source="manifest", path=str(self.root / "list.csv"), validation_fraction=0.0)
        return open_data(section, seed=0)

    def contents(self, split: str) -> list[int]:
        return [number for number, _, its in self.rows.values() if its == split]


def codes_of(root, pictures):
    processes = start_processes(ComputeSection())
    try:
        return extract_codes(
            CodesStore(root), [KEY], pictures, module=network, processes=processes, console=Screen([]), title="images"
        )
    finally:
        processes.close()


def plain(split) -> SplitImages:
    section = DataSection(source="manifest", path="x", cache_mib=0)
    return SplitImages(split, ImageStore(split, section, SPEC), inputs)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(history=st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 50)), min_size=1, max_size=10))
def test_codes_are_those_of_the_content_and_only_new_contents_are_computed(tmp_path_factory, history):
    root = tmp_path_factory.mktemp("history")
    cache = mock.patch.dict(os.environ, {"TLSCALE_CACHE": str(root / "cache")})
    # What is looked up by its times is trusted sooner, so that the test need not wait for seconds.
    with cache, mock.patch.object(content, "_SETTLED_NS", round(TICK_S * 1e9)):
        data, seen = History(root), set()
        for operation, pick in [("add", 1), ("add", 3), ("add", 4), *history]:
            data.apply(operation, pick)
            time.sleep(1.5 * TICK_S)
            opened = data.opened()
            for split in (opened.train, opened.test):
                if split is None:
                    continue
                numbers = data.contents(split.name)
                codes = codes_of(root / "codes", plain(split))
                assert codes.num_computed == len(set(numbers) - seen)
                seen |= set(numbers)
                images = torch.from_numpy(np.stack([pixels_of(number) for number in numbers]))[:, None].float() / 255
                for got, right in zip(codes.take(np.arange(len(split))), expected(images), strict=True):
                    assert torch.equal(got, right)
        assert sum(entry.num_rows for entry in CodesStore(root / "codes").entries()) == len(seen)


def test_with_warm_codes_and_a_warm_index_no_image_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(content, "_SETTLED_NS", round(TICK_S * 1e9))
    data = History(tmp_path)
    for number in range(70):
        data.apply("add", 3 * number)
    time.sleep(1.5 * TICK_S)
    read = []
    reading = FileStore.read
    monkeypatch.setattr(FileStore, "read", lambda self, row: (read.append(row), reading(self, row))[1])
    assert codes_of(tmp_path / "codes", plain(data.opened().train)).num_computed == len(read) == 72  # each once
    read.clear()
    assert codes_of(tmp_path / "codes", plain(data.opened().train)).num_computed == 0
    assert read == []
    for number in range(5):
        data.apply("add", 3 * number)
    time.sleep(1.5 * TICK_S)
    assert codes_of(tmp_path / "codes", plain(data.opened().train)).num_computed == len(read) == 5


@pytest.mark.slow
@pytest.mark.parametrize("names", [["flip"], ["flip", "crop"], ["flip", "mixup", "cutmix"]])
@pytest.mark.parametrize("cache_mib", [0, 100])
def test_a_view_belongs_to_contents_and_draws(tmp_path, monkeypatch, names, cache_mib):
    """The very images of training; another cache, another folder and other names find them, other pixels do not."""
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "cache"))
    data, augment = History(tmp_path), augmentation_values(names)
    for number in range(20):
        data.apply("add", 3 * number)
    section = DataSection(source="manifest", path="x", cache_mib=cache_mib)
    bare_section, crops = section.model_copy(update={"cache_mib": 0}), "crop" in augment

    def codes(view: int):
        split = data.opened().train
        kept, bare = ImageStore(split, section, SPEC, crops=crops), ImageStore(split, bare_section, SPEC, crops=crops)
        augmenter = Augmenter(augment, SPEC)
        pictures = ViewImages(split, view, 5, augmenter, bare, lambda: kept, mixed)
        found = codes_of(tmp_path / "codes", pictures)
        rows_N = np.arange(len(split))
        right = expected(mixed(train_batch(kept, augmenter, 5, MicroBatch(view, rows_N, len(rows_N)))))
        assert all(torch.equal(got, one) for got, one in zip(found.take(rows_N), right, strict=True))
        return found.num_computed

    def mixed(batch):
        partners = batch.partners_BCHW
        return inputs(batch) if partners is None else (inputs(batch) + partners.float() / 255 * 0.5)

    assert [codes(0), codes(1), codes(0)] == [22, 22, 0]
    data.apply("copy", 0)
    data.apply("rename", 19)  # the last row, so that all stay in their places
    assert codes(1) == 0
    data.apply("replace", 7)
    assert 1 <= codes(1) < 22
