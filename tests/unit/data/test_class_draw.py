"""Classes are drawn as often as is asked, without a memory, and each image of a class as often as the others."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tlscale.data.sampler import ClassDraw, DataOrder, micro_batches, quotas, split_batch_size

SIZES = st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 0)
POWERS = st.sampled_from([0.0, 0.3, 0.5, 0.9])


def labels_of(sizes, seed=0):
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))


def order_of(labels_N, power, batch_size=16, drop_last=False):
    return DataOrder(len(labels_N), batch_size, 5, drop_last, ClassDraw(labels_N, power, 5))


@given(sizes=SIZES, power=POWERS)
@settings(max_examples=100, deadline=None)
def test_quotas_fill_an_epoch_in_proportion(sizes, power):
    sizes_C = np.array(sizes)
    quotas_C = quotas(sizes_C, power)
    assert quotas_C.sum() == sizes_C.sum()
    assert ((quotas_C > 0) == (sizes_C > 0)).all()
    shares_C = np.where(sizes_C > 0, np.maximum(sizes_C, 1.0) ** power, 0)
    exact_C = shares_C / shares_C.sum() * sizes_C.sum()
    if (exact_C[sizes_C > 0] >= 1).all():
        assert (np.abs(quotas_C - exact_C) < 1 + 1e-9).all()


def test_balanced_is_balanced_and_one_is_as_they_are():
    assert quotas(np.array([900, 90, 10]), 0.0).tolist() == [334, 333, 333]
    assert quotas(np.array([900, 90, 10]), 1.0).tolist() == [900, 90, 10]
    assert quotas(np.array([900, 90, 0, 10]), 0.5).tolist() == [703, 223, 0, 74]  # 30 to 9.49 to 3.16


@given(sizes=SIZES, power=POWERS, num_epochs=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_an_epoch_has_its_quotas_and_images_of_a_class_are_used_alike(sizes, power, num_epochs):
    labels_N = labels_of(sizes)
    order = order_of(labels_N, power)
    used_N = np.zeros(len(labels_N), int)
    for epoch in range(num_epochs):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        rows = np.concatenate([order.rows(step) for step in steps])
        counts_C = np.bincount(labels_N[rows], minlength=len(sizes))
        assert counts_C.tolist() == quotas(np.array(sizes), power).tolist()
        np.add.at(used_N, rows, 1)
        for number in range(len(sizes)):
            used = used_N[labels_N == number]
            assert used.size == 0 or used.max() - used.min() <= 1


@given(sizes=SIZES, power=POWERS, world_size=st.sampled_from([1, 2, 4]), micro=st.sampled_from([None, 1, 3]))
@settings(max_examples=40, deadline=None)
def test_it_is_the_same_at_any_step_and_on_any_number_of_processes(sizes, power, world_size, micro):
    order = order_of(labels_of(sizes), power)
    split = split_batch_size(16, world_size, micro)
    for step in (0, order.steps_per_epoch, 3 * order.steps_per_epoch - 1):
        rows, uses = order.at(step, np.arange(order.num_images_in(step)))
        parts = zip(*(micro_batches(order, step, split, rank) for rank in range(world_size)), strict=True)
        real = [part for chunk in parts for part in chunk if part.num_real]
        assert np.concatenate([part.rows_B for part in real]).tolist() == rows.tolist()
        assert np.concatenate([part.epoch for part in real]).tolist() == uses.tolist()


def test_an_image_that_comes_again_has_another_epoch_of_its_own():
    """So that it is augmented in another way: the pair of image and epoch is never there twice."""
    labels_N = labels_of([50, 2])
    order = order_of(labels_N, 0.0, batch_size=13)
    pairs = []
    for step in range(4 * order.steps_per_epoch):
        rows, uses = order.at(step, np.arange(order.num_images_in(step)))
        pairs += zip(rows.tolist(), uses.tolist(), strict=True)
    assert len(set(pairs)) == len(pairs) == 4 * 52
    of_rare = sorted(use for row, use in pairs if labels_N[row] == 1)
    assert of_rare == sorted([*range(52)] * 2)


def test_places_of_one_epoch_do_not_say_those_of_the_next():
    order = order_of(labels_of([40, 8]), 0.5, batch_size=48)
    first, second = order.rows(0), order.rows(1)
    assert not np.array_equal(first, second)
    assert not np.array_equal(np.sort(first), np.sort(second)), "other images of the large class are left out"


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_the_draw_is_pinned(power):
    order = order_of(np.array([0] * 12 + [1] * 3 + [2]), power, batch_size=16)
    assert order.rows(7).tolist() == PINNED[power]


PINNED = {
    0.0: [0, 15, 10, 13, 12, 1, 15, 4, 15, 11, 14, 15, 15, 13, 9, 13],
    0.5: [1, 15, 6, 12, 13, 5, 13, 2, 15, 4, 7, 15, 12, 9, 8, 10],
}
