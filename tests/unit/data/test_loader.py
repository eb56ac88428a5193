"""Batches: the same whatever the workers, the cache, the processes and the step that a run begins with."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from tlscale.data.decode import BadImageError
from tlscale.data.input_spec import InputSpec
from tlscale.data.loader import ImageStore, eval_batches, train_batches
from tlscale.data.sampler import DataOrder, split_batch_size
from tlscale.data.sources.bad_images import find_bad_images
from tlscale.data.sources.open import ImageSplit
from tlscale.data.sources.stores import FileStore
from tlscale.data.sources.tables import LabelledTable
from tlscale.data.transforms import ImageBatch, eval_transform
from tlscale.data.workers import default_workers, load_in_order
from tlscale.errors import WorkerError
from tlscale.recipe.field_types import augmentation_values
from tlscale.recipe.schema import DataSection

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
NUM_IMAGES, SIZE = 37, 16
ALL_AUGMENTATIONS = ["flip", "crop", "trivialaugment", "erasing", "mixup", "cutmix"]


@dataclass(eq=False)
class Pictures:
    """Images by row, in memory: files, or pixels."""

    items: list[bytes | np.ndarray]
    content: str = "pictures"

    def __len__(self) -> int:
        return len(self.items)

    def read(self, row: int) -> bytes | np.ndarray:
        return self.items[row]

    def where(self, row: int) -> str:
        return f"picture {row}"

    def stamps(self, rows_N) -> None:
        return None

    def places(self, rows_N) -> list[str]:
        return [str(row) for row in rows_N.tolist()]


def split_of(items: list[bytes | np.ndarray]) -> ImageSplit:
    """Labels count 0 1 2 3 4 0 1..."""
    table = LabelledTable(Pictures(items), np.arange(len(items)) % 5)
    return ImageSplit("train", table, np.arange(len(items)))


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def files(count: int = NUM_IMAGES) -> list[bytes | np.ndarray]:
    """PNG files of many sizes."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(10, 40, (count, 2))
    return [png(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for height, width in sizes]


def section(**keys) -> DataSection:
    return DataSection(source="fashion_mnist", **keys)


def spec_of(chans: int = 3, **keys) -> InputSpec:
    values = {"image_size": SIZE, "in_chans": chans, "mean": (0.5,) * chans, "std": (0.2,) * chans}
    return InputSpec(**({"interpolation": "bilinear", "crop_pct": 1.0} | values | keys))


def plan(augment: list, *, cache_mib: int = 100, batch_size: int = 8, world_size: int = 1, limit: int | None = 4):
    """Store, order and split, and what `train_batches` needs besides."""
    store = ImageStore(split_of(files()), section(cache_mib=cache_mib), spec_of(), crops="crop" in augment)
    order = DataOrder(NUM_IMAGES, batch_size, seed=1, drop_last=False)
    options = {"seed": 1, "augment": augmentation_values(augment)}
    return store, order, split_batch_size(batch_size, world_size, limit), options


def run(planned, rank: int = 0, start: int = 0, stop: int = 7, **keys) -> list[list[ImageBatch]]:
    store, order, split, options = planned
    return list(train_batches(store, order, split, rank, start_step=start, stop_step=stop, **options, **keys))


def same(a: ImageBatch, b: ImageBatch) -> bool:
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in fields(ImageBatch)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def all_same(a: list[list[ImageBatch]], b: list[list[ImageBatch]]) -> bool:
    return [len(step) for step in a] == [len(step) for step in b] and all(
        same(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("augment", [[], ["flip", "mixup"], ALL_AUGMENTATIONS], ids=["none", "flip-mixup", "all"])
@pytest.mark.parametrize("cache_mib", [0, 100])
def test_workers_change_nothing(augment, cache_mib):
    planned = plan(augment, cache_mib=cache_mib)
    assert planned[0].cached == (cache_mib > 0)
    state = torch.get_rng_state()
    alone = run(planned)
    for workers in (2, 4):
        assert all_same(run(planned, workers=workers), alone)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("augment", [[], ["flip"], ALL_AUGMENTATIONS], ids=["none", "flip", "all"])
def test_the_cache_changes_nothing(augment):
    assert all_same(run(plan(augment, cache_mib=0)), run(plan(augment)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_at_any_step_as_if_it_had_not_stopped(workers):
    planned = plan(ALL_AUGMENTATIONS)
    whole = run(planned, stop=12)  # five steps are an epoch
    for start in (1, 4, 5, 11) if workers == 0 else (6,):
        assert all_same(run(planned, start=start, stop=12, workers=workers), whole[start:])


@pytest.mark.parametrize("world_size", [2, 8])
def test_the_number_of_processes_changes_no_image(world_size):
    """Row by row: the same pixels, labels and partners, wherever the row is computed."""

    def by_row(ranks: list[list[list[ImageBatch]]], step: int) -> dict[int, tuple]:
        found = {}
        for batch in (batch for rank in ranks for batch in rank[step]):
            for i in range(batch.num_real):
                values = [getattr(batch, f.name) for f in fields(ImageBatch)]
                row = tuple(value[i].numpy().tobytes() for value in values if isinstance(value, torch.Tensor))
                assert found.setdefault(int(batch.rows_B[i]), row) is row, "an image was seen twice"
        return found

    alone = [run(plan(ALL_AUGMENTATIONS, limit=None))]
    planned = plan(ALL_AUGMENTATIONS, world_size=world_size, limit=2)
    ranks = [run(planned, rank) for rank in range(world_size)]
    assert any(batch.num_real == 0 for rank in ranks for step in rank for batch in step)
    for step in range(7):
        assert by_row(ranks, step) == by_row(alone, step)
        assert len({len(rank[step]) for rank in ranks}) == 1


def test_an_epoch_has_each_image_once_with_its_label_and_pixels():
    planned = plan([])
    store = planned[0]
    batches = [batch for step in run(planned, start=5, stop=10) for batch in step]
    rows = torch.cat([batch.rows_B for batch in batches])
    assert sorted(rows.tolist()) == list(range(NUM_IMAGES))
    assert torch.equal(torch.cat([batch.labels_B for batch in batches]), rows % 5)
    for batch in batches:
        for row, image in zip(batch.rows_B.tolist(), batch.images_BCHW, strict=True):
            pixels = np.asarray(Image.open(io.BytesIO(store.split.read(row))))
            assert np.array_equal(image.permute(1, 2, 0).numpy(), eval_transform(pixels, store.spec))


def test_partners_carry_the_labels_of_their_images():
    batch = run(plan(["mixup"]), stop=1)[0][0]
    store = plan([])[0]
    every = store.images(np.arange(NUM_IMAGES))
    for label, partner in zip(batch.partner_labels_B.tolist(), batch.partners_BCHW, strict=True):
        matches = (every == partner).flatten(1).all(1).nonzero().flatten().tolist()
        assert [row % 5 for row in matches] == [label]


def test_augmentation_differs_between_epochs():
    planned = plan(["trivialaugment"], batch_size=NUM_IMAGES, limit=None)
    (first,), (second,) = run(planned, stop=2)
    order = [batch.rows_B.argsort() for batch in (first, second)]
    assert not torch.equal(first.images_BCHW[order[0]], second.images_BCHW[order[1]])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3, 50])
def test_evaluation_has_every_image_once_and_no_padding(workers, world_size):
    store = ImageStore(split_of(files()), section(cache_mib=0), spec_of())
    ranks = (0, 1, 49) if world_size == 50 else range(world_size)
    batches = [b for rank in ranks for b in eval_batches(store, rank, world_size, 5, workers)]
    rows = [row for batch in batches for row in batch.rows_B.tolist()]
    assert rows == ([0, 1] if world_size == 50 else list(range(NUM_IMAGES)))
    assert all(batch.num_real == len(batch.images_BCHW) <= 5 for batch in batches)


def test_arrays_of_the_right_size_come_through_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (600, 28, 28), dtype=np.uint8)
    store = ImageStore(split_of(list(pixels)), section(), spec_of(1, image_size=28))
    assert np.array_equal(store.images(np.arange(600)).numpy()[:, 0], pixels)
    assert store.kept_mib == pixels.nbytes / 2**20


def test_what_is_kept_and_what_it_takes_is_told():
    kept = ImageStore(split_of(files()), section(), spec_of())
    assert kept.describe() == f"train: 37 images, decoded once and cached as 16 x 16 x 3: {37 * 768 / 2**20:.1f} MiB"
    assert (
        ImageStore(split_of(files()), section(), spec_of(), crops=True)
        .describe()
        .startswith("train: 37 images, decoded once and cached as they are: 0.1 MiB")
    )
    assert ImageStore(split_of(files()), section(cache_mib=0), spec_of()).describe() == (
        "train: 37 images, decoded each time they are used (data.cache_mib is 0)"
    )


def test_images_are_kept_only_within_the_budget():
    large = split_of([np.zeros((300, 300, 3), np.uint8)] * 8)  # 2.06 MiB as they are, 0.006 MiB prepared
    assert not ImageStore(large, section(cache_mib=2), spec_of(), crops=True).cached
    assert ImageStore(large, section(cache_mib=3), spec_of(), crops=True).cached
    assert ImageStore(large, section(cache_mib=1), spec_of()).cached
    assert not ImageStore(large, section(cache_mib=1), spec_of(image_size=300)).cached


def test_a_budget_that_later_images_overrun_is_kept_nonetheless():
    """The sample of sizes sees small images only; the large ones between them do not fit."""
    items = [np.zeros((10, 10, 3), np.uint8)] * 1000
    sampled = set(np.linspace(0, 999, 64).astype(int).tolist())
    for row in range(1000):
        if row not in sampled:
            items[row] = np.full((30, 30, 3), row % 256, np.uint8)
    assert not ImageStore(split_of(items), section(cache_mib=1), spec_of(), crops=True).cached
    store = ImageStore(split_of(items), section(cache_mib=4), spec_of(), crops=True)
    assert store.cached
    assert [image.shape[1] for image in store.images(np.array([0, 1, 999, 998]))] == [10, 30, 10, 30]
    assert store.images(np.array([700]))[0].unique().item() == 700 % 256


def damaged() -> ImageSplit:
    items = files()
    items[9] = items[9][:100]
    items[30] = b"<html>"
    return split_of(items)


@pytest.mark.parametrize("cache_mib", [0, 100])
@pytest.mark.parametrize("crops", [False, True])
def test_a_bad_image_is_an_error_that_names_it(cache_mib, crops):
    with pytest.raises(BadImageError, match=r"^picture (9|30): "):
        ImageStore(damaged(), section(cache_mib=cache_mib), spec_of(), crops=crops).images(np.arange(NUM_IMAGES))


def test_a_bad_image_in_a_worker_is_the_same_error():
    store = ImageStore(damaged(), section(cache_mib=0), spec_of())
    messages = []
    for workers in (0, 2):
        with pytest.raises(BadImageError) as caught:
            list(eval_batches(store, 0, 1, 8, workers))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert messages[0].startswith("picture 9: ")
    assert not multiprocessing.active_children()


def test_bad_images_are_found_with_their_reasons():
    bad = find_bad_images(damaged(), max_pixels=10**6)
    assert [row for row, _ in bad] == [9, 30]
    assert all(reason.startswith(f"picture {row}: ") for row, reason in bad)
    assert find_bad_images(split_of(files()), max_pixels=10**6) == []
    assert find_bad_images(damaged().without([9, 30]), max_pixels=10**6) == []


def test_a_file_that_is_gone_is_a_bad_image(tmp_path):
    (tmp_path / "there.png").write_bytes(files()[0])
    stats_N5 = np.zeros((2, 5), np.int64)
    store = FileStore(str(tmp_path), pa.array(["there.png", "gone.png"], pa.large_string()), "", stats_N5, 0)
    split = ImageSplit("train", LabelledTable(store, np.zeros(2, np.int64)), np.arange(2))
    ((row, reason),) = find_bad_images(split, max_pixels=10**6)
    assert row == 1
    assert "gone.png" in reason


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_is_killed_is_named_and_leaves_no_handler(workers):
    def load(key: int) -> torch.Tensor:
        if key == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.full((1000,), key)

    handler = signal.getsignal(signal.SIGCHLD)
    batches = load_in_order(load, range(20), workers, pin_memory=False)
    assert [int(next(batches)[0]) for _ in range(3)] == [0, 1, 2]
    assert signal.getsignal(signal.SIGCHLD) == handler, "torch's would raise anywhere in the main thread"
    with pytest.raises(WorkerError, match=r"was killed \(.*data.workers=1") as caught:
        list(batches)
    assert not multiprocessing.active_children(), caught


@pytest.mark.parametrize("error", [ConnectionResetError, FileNotFoundError, RuntimeError])
def test_what_a_worker_raises_itself_is_no_killed_worker(error):
    def load(key: int) -> torch.Tensor:
        raise error(f"of image {key}")

    with pytest.raises(error, match="of image 0") as caught:
        next(load_in_order(load, range(3), 1, pin_memory=False))
    assert not multiprocessing.active_children(), caught


def test_workers_end_when_the_iterator_is_closed():
    store, order, split, options = plan(["flip"], cache_mib=0)
    batches = train_batches(store, order, split, 0, start_step=0, stop_step=10**6, workers=2, **options)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert not multiprocessing.active_children()


def test_workers_outlive_the_signals_that_everybody_gets():
    store, order, split, options = plan(["flip"], cache_mib=0)
    alone = run((store, order, split, options), stop=30)
    batches = train_batches(store, order, split, 0, start_step=0, stop_step=30, workers=2, **options)
    steps = [next(batches)]
    workers = multiprocessing.active_children()
    for name in ("TERM", "INT", "TERM"):
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    time.sleep(0.1)
    assert all(worker.is_alive() for worker in workers)
    steps += list(batches)
    assert all_same(steps, alone)
    assert not multiprocessing.active_children()


def test_a_worker_obeys_its_parent():
    """Else a process that fails without closing the iterator would hang at its end, waiting for its workers."""
    store, order, split, options = plan([], cache_mib=0)
    batches = train_batches(store, order, split, 0, start_step=0, stop_step=10**6, workers=1, **options)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(5)
    assert not worker.is_alive()
    with pytest.raises(WorkerError, match="killed"):
        for _ in batches:
            pass


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers notice by themselves, after some seconds")
def test_workers_die_with_a_process_that_is_killed():
    """They hold what it held, such as the lock of the run folder, for as long as they live."""
    read, write = os.pipe()
    parent = os.fork()
    if not parent:
        try:
            store, order, split, options = plan([], cache_mib=0)
            batches = train_batches(store, order, split, 0, start_step=0, stop_step=10**6, workers=2, **options)
            next(batches)
            os.write(write, " ".join(str(worker.pid) for worker in multiprocessing.active_children()).encode())
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.close(write)
    workers = os.read(read, 100).decode().split()
    assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == -signal.SIGKILL
    assert len(workers) == 2
    # The pipe is open in whoever is left of them; torch's own watch would end them after five seconds.
    assert select.select([read], [], [], 2.5)[0]
    assert os.read(read, 1) == b""
    os.close(read)


def test_what_a_worker_needs_can_be_sent_to_it():
    """Where processes are not forked."""
    store = plan(ALL_AUGMENTATIONS)[0]
    sent = pickle.loads(pickle.dumps(store))
    assert all(torch.equal(a, b) for a, b in zip(sent.images(np.arange(5)), store.images(np.arange(5)), strict=True))


def test_default_workers():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu, cpu = {"device": torch.device("cuda")}, {"device": torch.device("cpu")}
    assert default_workers(section(), cached=True, augmented=False, **gpu) == 0
    assert default_workers(section(workers=7), cached=True, augmented=False, **cpu) == 7
    assert default_workers(section(workers=0), cached=False, augmented=True, **gpu) == 0
    for need in ({"cached": False, "augmented": False}, {"cached": True, "augmented": True}):
        assert default_workers(section(), **need, **gpu) == min(16, cores - 1)  # one is left to the process itself
        assert default_workers(section(), **need, **gpu, processes=cores) == 0
        assert default_workers(section(), **need, **cpu) == 0


def test_pinned_memory_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    for workers in (0, 2):
        for step in run(plan(["mixup"]), workers=workers, pin_memory=True):
            for batch in step:
                assert batch.images_BCHW.is_pinned()
                assert batch.lam_B.is_pinned()
                assert same(batch.to("cuda", non_blocking=True).to("cpu"), batch)
