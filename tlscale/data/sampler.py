"""Sample: which image is where in the order, in which step, on which process.

Promise: a pure function of (seed, epoch, position). Nothing is remembered and nothing depends on the number of
processes, so a run is resumed at any step, on any number of processes, with exactly the images that it had left. Memory
is O(images requested), whatever the size of the data set.

The order is a Feistel network on the smallest power of four that holds all positions, keyed by (seed, epoch), and
cycle walking back into the range: Black and Rogaway, Ciphers with Arbitrary Finite Domains (CT-RSA 2002). Only 64-bit
integer arithmetic, and no generator of a library, whose stream an upgrade could change; a test pins the order.

Shape letters: N images of a data set, C classes, B images of a batch, P positions that are requested.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from tlscale.errors import RecipeError

Ints = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

_ROUNDS = 8  # six pass the chi-square test as well; two more cost little
_LEAST_HALF_BITS = 3  # with two, the chi-square of a handful of images is too high
_WEYL = 0x9E3779B97F4A7C15


class Stream(IntEnum):
    """What the random numbers of an image are for; each use has its own."""

    OWN = 1
    PARTNER = 2
    MIX = 3


def _mix64(values: Keys) -> Keys:
    """Mix by the finalizer of splitmix64 (Steele, Lea, Flood 2014): each bit in flips half of the bits out."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _mix_in(key: Keys, number: int | Ints) -> Keys:
    """Make a new key from a key and one more number, or from one key and many numbers."""
    added = np.atleast_1d(np.asarray(number, dtype=np.int64)).astype(np.uint64)
    return _mix64((key ^ _mix64(added + np.uint64(_WEYL))) + np.uint64(_WEYL))


def _epoch_key(seed: int, epoch: int | Ints) -> Keys:
    return _mix_in(_mix_in(np.zeros(1, np.uint64), seed), epoch)


def image_keys(seed: int, epoch: int | Ints, rows_B: Ints, stream: Stream) -> Keys:
    """Make a 64-bit key for what is random about each image in this epoch, or each in its own: shape (B,)."""
    return _mix_in(_mix_in(_epoch_key(seed, epoch), int(stream)), rows_B)


def permute(positions_P: Ints, *, num_images: int, seed: int, epoch: int) -> Ints:
    """Return the images at these positions of the epoch's order.

    Args:
        positions_P: 0 <= position < num_images, in any order.
        num_images: at least 1.

    Returns:
        int64 of shape (P,); over all positions, each of 0..num_images-1 once.
    """
    half_bits = max(_LEAST_HALF_BITS, -(-(num_images - 1).bit_length() // 2))
    round_keys = _mix_in(_epoch_key(seed, epoch), np.arange(-_ROUNDS, 0))
    values_P = _feistel(np.asarray(positions_P, dtype=np.int64).astype(np.uint64), half_bits, round_keys)
    # Cycle walking: a value outside the range is mapped again until it is inside; a bijection stays one.
    outside = np.flatnonzero(values_P >= np.uint64(num_images))
    while outside.size:
        values_P[outside] = _feistel(values_P[outside], half_bits, round_keys)
        outside = outside[values_P[outside] >= np.uint64(num_images)]
    return values_P.astype(np.int64)


def _feistel(values_P: Keys, half_bits: int, round_keys: Keys) -> Keys:
    shift, low = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    left, right = values_P >> shift, values_P & low
    for key in round_keys:
        # The high bits of the mix: the low ones of a product depend on few bits of its factors.
        left, right = right, left ^ (_mix64(right + key) >> (np.uint64(64) - shift))
    return (left << shift) | right


class ClassDraw:
    """Draw class c in proportion to n_c ** power of its n_c images: 0: all classes alike, 1: as they are.

    In each epoch a class has its quota of places, exactly; over epochs each of its images is used as often as the
    others, but for one time: an image comes again only after all others of its class.

    Args:
        labels_N: class numbers.
        power: from 0 to 1.
        seed: of the order of each class.
    """

    def __init__(self, labels_N: Ints, power: float, seed: int) -> None:
        sizes_C = np.bincount(labels_N)
        self._members = np.split(np.argsort(labels_N, kind="stable"), np.cumsum(sizes_C)[:-1])
        self.quotas_C = quotas(sizes_C, power)
        self._starts_C = np.concatenate([[0], np.cumsum(self.quotas_C)])
        self._seeds = [_derived_seed(seed, number) for number in range(len(sizes_C))]

    def at(self, places_P: Ints, epoch: int) -> tuple[Ints, Ints]:
        """Return the image at each place, and how often it was used before, which stands for the epoch in its draws.

        Args:
            places_P: 0 <= place < N, after the order of the epoch.
        """
        rows_P, uses_P = np.empty_like(places_P), np.empty_like(places_P)
        classes_P = np.searchsorted(self._starts_C, places_P, side="right") - 1
        for number in np.unique(classes_P).tolist():
            here = np.flatnonzero(classes_P == number)
            members = self._members[number]
            turns = epoch * self.quotas_C[number] + places_P[here] - self._starts_C[number]
            uses_P[here], turns = np.divmod(turns, len(members))
            for use in np.unique(uses_P[here]).tolist():
                now = uses_P[here] == use
                chosen = permute(turns[now], num_images=len(members), seed=self._seeds[number], epoch=use)
                rows_P[here[now]] = members[chosen]
        return rows_P, uses_P


def quotas(sizes_C: Ints, power: float) -> Ints:
    """Return the places of each class in an epoch of as many places as there are images, by largest remainders.

    A class that has images has a place. Of equal remainders the first class is served.
    """
    shares_C = np.where(sizes_C > 0, np.maximum(sizes_C, 1).astype(np.float64) ** power, 0.0)
    exact_C = shares_C / shares_C.sum() * sizes_C.sum()
    quotas_C: Ints = np.maximum(np.floor(exact_C).astype(np.int64), sizes_C > 0)
    rest = int(sizes_C.sum() - quotas_C.sum())
    if rest > 0:
        # Rounded: the shares of equal classes differ by what a sum in another order makes.
        most_C = np.argsort(-np.round(exact_C - quotas_C, 9), kind="stable")
        quotas_C[most_C[:rest]] += 1
    for _ in range(-rest):  # taken by classes that would have had no place
        quotas_C[np.argmax(quotas_C)] -= 1
    return quotas_C


def _derived_seed(seed: int, number: int) -> int:
    """Return another seed for each number from 0."""
    return int(_mix_in(_mix_in(np.zeros(1, np.uint64), seed), -1 - number)[0] >> np.uint64(1))


@dataclass(frozen=True, slots=True)
class DataOrder:
    """The training images in the order in which the steps take them, the same for any number of processes.

    Raises:
        RecipeError: `drop_last` would leave no batch at all.
    """

    num_images: int
    batch_size: int  # over all processes
    seed: int
    drop_last: bool
    draw: ClassDraw | None = None
    """None: each image once an epoch."""

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise RecipeError("there are no training images")
        if self.steps_per_epoch == 0:
            raise RecipeError(
                f"drop_last: true leaves no step: batch_size is {self.batch_size}, but there are only "
                f"{self.num_images:,} training images",
                remedy="Set batch_size to at most that, or take drop_last out.",
            )

    @property
    def steps_per_epoch(self) -> int:
        full, rest = divmod(self.num_images, self.batch_size)
        return full if self.drop_last or not rest else full + 1

    @property
    def images_per_epoch(self) -> int:
        return self.steps_per_epoch * self.batch_size if self.drop_last else self.num_images

    def epoch(self, step: int) -> int:
        """Return the epoch, from 0, that `step` belongs to."""
        return step // self.steps_per_epoch

    def images_seen(self, step: int) -> int:
        """Return the number of images that the steps before `step` took, over all processes and epochs."""
        epochs, rest = divmod(step, self.steps_per_epoch)
        return epochs * self.images_per_epoch + rest * self.batch_size

    def num_images_in(self, step: int) -> int:
        """Return the size of the global batch of `step`; only the last one of an epoch may be short."""
        start = step % self.steps_per_epoch * self.batch_size
        return min(self.batch_size, self.num_images - start)

    def at(self, step: int, offsets_P: Ints) -> tuple[Ints, int | Ints]:
        """Return the images at these offsets (from 0) inside the global batch of `step`, and their epoch.

        Where classes are drawn, each image has an epoch of its own: so often it was used before.
        """
        start, epoch = step % self.steps_per_epoch * self.batch_size, self.epoch(step)
        places_P = permute(start + offsets_P, num_images=self.num_images, seed=self.seed, epoch=epoch)
        return (places_P, epoch) if self.draw is None else self.draw.at(places_P, epoch)

    def rows(self, step: int) -> Ints:
        """Return the global batch of `step`, in order: int64 of shape (B,)."""
        return self.at(step, np.arange(self.num_images_in(step)))[0]


@dataclass(frozen=True, slots=True)
class BatchSplit:
    """How one global batch becomes forward passes."""

    world_size: int
    micro_batch_size: int  # images of one process in one forward pass
    accumulation: int  # forward passes of one process in one step

    def describe(self) -> str:
        """Show the arithmetic: `256 images a step = 2 processes x 4 micro-batches x 32`."""
        total = self.world_size * self.accumulation * self.micro_batch_size
        processes = "process" if self.world_size == 1 else "processes"
        micro_batches = "micro-batch" if self.accumulation == 1 else "micro-batches"
        return (
            f"{total} images a step = {self.world_size} {processes} x {self.accumulation} {micro_batches} "
            f"x {self.micro_batch_size}"
        )

    def num_micro_batches(self, num_images: int) -> int:
        """Return the forward passes of each process for a global batch of so many images: fewer where it is short."""
        return -(-num_images // (self.world_size * self.micro_batch_size))


def split_batch_size(batch_size: int, world_size: int, limit: int | None) -> BatchSplit:
    """Find the split with the fewest forward passes.

    Args:
        limit: most images of one process in one forward pass; None: its whole share.

    Raises:
        RecipeError: the processes cannot have equal shares.
    """
    share, rest = divmod(batch_size, world_size)
    if rest or not share:
        near = [size for size in (share * world_size, (share + 1) * world_size) if size]
        raise RecipeError(
            f"batch_size: {batch_size} cannot be shared equally by {world_size} processes",
            remedy=f"Set batch_size to {' or '.join(map(str, near))}, or start another number of processes.",
        )
    most = share if limit is None else min(limit, share)
    micro_batch_size = next(size for size in range(most, 0, -1) if share % size == 0)
    return BatchSplit(world_size, micro_batch_size, share // micro_batch_size)


@dataclass(frozen=True)
class MicroBatch:
    """The images of one process in one forward pass; rows from `num_real` on are padding and weigh nothing."""

    epoch: int | Ints
    """Or each image's own, (B,)."""
    rows_B: Ints
    num_real: int


def micro_batches(order: DataOrder, step: int, split: BatchSplit, rank: int) -> list[MicroBatch]:
    """Return the forward passes of process `rank` in `step`; every process has the same number of them.

    The global batch is cut into chunks of `world_size * micro_batch_size`, and process r takes the r-th part of each.
    In a short chunk the parts differ by one image at most; a process that gets none takes the chunk's first image as
    padding, because it must run a forward and a backward pass for the others' sake.
    """
    num_images, chunk = order.num_images_in(step), split.world_size * split.micro_batch_size
    spans = [
        (start, *_part(min(chunk, num_images - start), split.world_size, rank)) for start in range(0, num_images, chunk)
    ]
    # Only this process's positions are permuted, all of them at once.
    offsets = [start + np.arange(first, last) if last > first else np.array([start]) for start, first, last in spans]
    rows, epoch = order.at(step, np.concatenate(offsets))
    ends = np.cumsum([len(part) for part in offsets])
    parts = [slice(end - len(part), end) for end, part in zip(ends, offsets, strict=True)]
    return [
        MicroBatch(epoch if isinstance(epoch, int) else epoch[part], rows[part], last - first)
        for part, (_, first, last) in zip(parts, spans, strict=True)
    ]


def least_in_a_pass(order: DataOrder, split: BatchSplit, num_steps: int) -> int:
    """Return the fewest images, with padding, that any process takes through the network at once in so many steps."""
    chunk = split.world_size * split.micro_batch_size
    sizes = {order.num_images_in(0), order.num_images_in(min(num_steps, order.steps_per_epoch) - 1)}
    full = [split.micro_batch_size for size in sizes if size >= chunk]
    return min(full + [max(size % chunk // split.world_size, 1) for size in sizes if size % chunk])


def _part(count: int, parts: int, index: int) -> tuple[int, int]:
    """Return first and last (exclusive) of the `index`-th of `parts` contiguous parts, the longer ones first."""
    size, longer = divmod(count, parts)
    first = index * size + min(index, longer)
    return first, first + size + (index < longer)


def eval_rows(num_images: int, rank: int, world_size: int, batch_size: int) -> Iterator[Ints]:
    """Yield the images that process `rank` evaluates, in batches: over all processes each once, without padding.

    A process may have fewer batches than others, or none: nothing in evaluation waits for the others inside a batch.
    """
    first, last = _part(num_images, world_size, rank)
    for start in range(first, last, batch_size):
        yield np.arange(start, min(start + batch_size, last))
