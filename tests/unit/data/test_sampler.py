"""The order of images: a bijection, pinned, fair, and the same whatever the number of processes."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tlscale.data.sampler import (
    BatchSplit,
    DataOrder,
    Stream,
    eval_rows,
    image_keys,
    least_in_a_pass,
    micro_batches,
    permute,
    split_batch_size,
)
from tlscale.errors import RecipeError

SEEDS = st.integers(0, 2**63 - 1)

GOLDEN_TEN = [1, 2, 5, 9, 4, 6, 8, 3, 0, 7]
GOLDEN_DIGEST = "49d2c963e67d0a941c395ca1a012ba588b71a13be387e98857f259544fb0f01d"
GOLDEN_FAR = [868460187718, 287721208227, 792627234366]
GOLDEN_KEYS = ["0x10229a48deb2d0c6", "0x18138fc7121fe1af", "0x9cb92384e59e8971"]


def whole(num_images: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return permute(np.arange(num_images), num_images=num_images, seed=seed, epoch=epoch)


def test_the_order_is_pinned():
    """An upgrade that changes one of these changes the order of every run: a resumed run would repeat images."""
    assert whole(10).tolist() == GOLDEN_TEN
    digest = hashlib.sha256(whole(60_000, seed=2**63 - 1, epoch=89).astype("<i8").tobytes()).hexdigest()
    assert digest == GOLDEN_DIGEST
    far = permute(np.array([0, 1, 10**12 - 1]), num_images=10**12, seed=5, epoch=3)
    assert far.tolist() == GOLDEN_FAR
    keys = image_keys(7, 2, np.array([0, 1, 10**9]), Stream.OWN)
    assert [hex(key) for key in keys.tolist()] == GOLDEN_KEYS


@given(num_images=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 10**6))
def test_every_image_once_an_epoch(num_images, seed, epoch):
    assert np.array_equal(np.sort(whole(num_images, seed, epoch)), np.arange(num_images))


@given(data=st.data(), num_images=st.integers(1, 2**40), seed=SEEDS)
def test_positions_are_independent_of_what_is_asked_with_them(data, num_images, seed):
    positions = np.array(data.draw(st.lists(st.integers(0, num_images - 1), min_size=1, max_size=20, unique=True)))
    rows = permute(positions, num_images=num_images, seed=seed, epoch=1)
    alone = [permute(positions[i : i + 1], num_images=num_images, seed=seed, epoch=1)[0] for i in range(len(positions))]
    assert rows.tolist() == alone
    assert len(set(alone)) == len(alone)
    assert all(0 <= row < num_images for row in alone)


def test_a_billion_images_need_no_memory():
    positions = 10**9 - 4096 + np.arange(4096)
    rows = permute(positions, num_images=10**9, seed=1, epoch=1)
    assert len(np.unique(rows)) == 4096
    # Far from each other although the positions are neighbours: the mean gap of random pairs is a third of the range.
    assert 0.31e9 < np.abs(np.diff(rows)).mean() < 0.36e9


@pytest.mark.slow
@pytest.mark.parametrize("num_images", [2, 3, 7, 16, 50])
def test_every_image_is_as_likely_at_every_position(num_images):
    epochs = 600
    counts = np.zeros((num_images, num_images))
    for epoch in range(epochs):
        counts[np.arange(num_images), whole(num_images, epoch=epoch)] += 1
    expected = epochs / num_images
    chi_square, freedom = ((counts - expected) ** 2 / expected).sum(), (num_images - 1) ** 2
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5 + 2


@pytest.mark.slow
def test_every_order_of_four_images_is_as_likely():
    orders = Counter(tuple(whole(4, seed=seed).tolist()) for seed in range(1200))
    assert set(orders) == set(itertools.permutations(range(4)))
    chi_square = sum((count - 50) ** 2 / 50 for count in orders.values())
    assert chi_square < 23 + 4 * 46**0.5


def test_no_trace_of_the_order_before():
    """Neighbours, and the same position in the next epoch and with the next seed, are uncorrelated."""
    first = whole(20_000)
    for other in (np.roll(first, 1), whole(20_000, epoch=1), whole(20_000, seed=1), np.arange(20_000)):
        assert abs(np.corrcoef(first, other)[0, 1]) < 4 / 20_000**0.5


def test_keys_differ_by_seed_epoch_image_and_stream():
    rows = np.arange(50)
    keys = [image_keys(seed, epoch, rows, stream) for seed in range(4) for epoch in range(4) for stream in Stream]
    assert len(np.unique(np.concatenate(keys))) == 4 * 4 * 3 * 50


@given(
    num_images=st.integers(1, 300),
    share=st.integers(1, 12),
    world_size=st.integers(1, 64),
    limit=st.none() | st.integers(1, 12),
    drop_last=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_the_processes_together_take_the_global_batch_once(num_images, share, world_size, limit, drop_last):
    batch_size = share * world_size
    if drop_last and num_images < batch_size:
        return
    order = DataOrder(num_images, batch_size, seed=3, drop_last=drop_last)
    split = split_batch_size(batch_size, world_size, limit)
    seen: list[int] = []
    for num_steps in {1, order.steps_per_epoch, order.steps_per_epoch + 1}:
        steps = {0, min(num_steps, order.steps_per_epoch) - 1}
        parts = [
            part for step in steps for rank in range(world_size) for part in micro_batches(order, step, split, rank)
        ]
        assert least_in_a_pass(order, split, num_steps) == min(len(part.rows_B) for part in parts)
    for step in range(order.steps_per_epoch, min(2 * order.steps_per_epoch, order.steps_per_epoch + 6)):
        ranks = [micro_batches(order, step, split, rank) for rank in range(world_size)]
        assert {len(parts) for parts in ranks} == {split.num_micro_batches(order.num_images_in(step))}
        for parts in ranks:
            assert all(1 <= len(part.rows_B) <= split.micro_batch_size for part in parts)
            assert all(part.num_real in (0, len(part.rows_B)) for part in parts)
            assert all(len(part.rows_B) == 1 for part in parts if part.num_real == 0)
            assert {part.epoch for part in parts} == {1}
        together = [row for chunk in zip(*ranks, strict=True) for part in chunk for row in part.rows_B[: part.num_real]]
        assert together == order.rows(step).tolist()
        seen += together
    assert len(set(seen)) == len(seen)


def test_a_thousand_processes_and_a_million_images():
    order = DataOrder(10**6, 8192, seed=0, drop_last=False)
    split = split_batch_size(8192, 1024, 4)
    last = order.steps_per_epoch - 1
    assert order.num_images_in(last) == 10**6 % 8192 == 576  # fewer images than processes
    for step in (0, 77, last):
        ranks = [micro_batches(order, step, split, rank) for rank in range(1024)]
        assert {len(parts) for parts in ranks} == {2 if step < last else 1}
        together = [row for chunk in zip(*ranks, strict=True) for part in chunk for row in part.rows_B[: part.num_real]]
        assert together == order.rows(step).tolist()


@given(num_images=st.integers(1, 200), batch_size=st.integers(1, 64), drop_last=st.booleans())
@settings(deadline=None)
def test_order_arithmetic(num_images, batch_size, drop_last):
    if drop_last and num_images < batch_size:
        with pytest.raises(RecipeError, match="drop_last: true leaves no step"):
            DataOrder(num_images, batch_size, 0, drop_last)
        return
    order = DataOrder(num_images, batch_size, 0, drop_last)
    sizes = [len(order.rows(step)) for step in range(order.steps_per_epoch)]
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
    assert sum(sizes) == (num_images // batch_size * batch_size if drop_last else num_images)
    assert [order.num_images_in(step) for step in range(len(sizes))] == sizes
    assert [order.images_seen(step) for step in range(2 * len(sizes) + 1)] == np.cumsum([0, *sizes, *sizes]).tolist()
    assert [order.epoch(step) for step in range(2 * len(sizes))] == [0] * len(sizes) + [1] * len(sizes)


def test_no_images_is_an_error():
    with pytest.raises(RecipeError, match="no training images"):
        DataOrder(0, 4, 0, drop_last=False)


def test_epochs_have_different_orders_and_steps_do_not_overlap():
    order = DataOrder(100, 32, seed=9, drop_last=True)
    first = np.concatenate([order.rows(step) for step in range(3)])
    second = np.concatenate([order.rows(step) for step in range(3, 6)])
    assert len(np.unique(first)) == len(np.unique(second)) == 96
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize(
    ("batch_size", "world_size", "limit", "expected"),
    [
        (256, 2, 32, "256 images a step = 2 processes x 4 micro-batches x 32"),
        (256, 2, None, "256 images a step = 2 processes x 1 micro-batch x 128"),
        (60, 1, 25, "60 images a step = 1 process x 3 micro-batches x 20"),
        (7, 1, 6, "7 images a step = 1 process x 7 micro-batches x 1"),
        (8, 8, 100, "8 images a step = 8 processes x 1 micro-batch x 1"),
    ],
)
def test_split_batch_size(batch_size, world_size, limit, expected):
    assert split_batch_size(batch_size, world_size, limit).describe() == expected


@pytest.mark.parametrize(
    ("batch_size", "world_size", "near"), [(100, 8, "96 or 104"), (3, 4, "to 4,"), (65, 64, "64 or 128")]
)
def test_a_batch_that_cannot_be_shared_names_the_nearest_that_can(batch_size, world_size, near):
    with pytest.raises(RecipeError, match=f"batch_size: {batch_size} .*{world_size} processes.*{near}"):
        split_batch_size(batch_size, world_size, None)


def test_a_short_batch_gives_parts_that_differ_by_one_and_padding_without_weight():
    order = DataOrder(5, 16, seed=0, drop_last=False)
    split = BatchSplit(world_size=8, micro_batch_size=1, accumulation=2)
    parts = [micro_batches(order, 0, split, rank)[0] for rank in range(8)]
    assert [part.num_real for part in parts] == [1] * 5 + [0] * 3
    assert [len(part.rows_B) for part in parts] == [1] * 8


@given(num_images=st.integers(0, 200), world_size=st.integers(1, 20), batch_size=st.integers(1, 30))
def test_evaluation_takes_each_image_once(num_images, world_size, batch_size):
    batches = [list(eval_rows(num_images, rank, world_size, batch_size)) for rank in range(world_size)]
    assert all(1 <= len(rows) <= batch_size for parts in batches for rows in parts)
    assert [row for parts in batches for rows in parts for row in rows.tolist()] == list(range(num_images))
