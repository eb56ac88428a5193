"""Codes are computed once: the same bits for any subset, order and number of processes, and only what is missing."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.small_runs import environment, sample_images, wait_until
from tests.unit.codes.test_store import contents, flip
from tlscale.codes.blocks import Extraction, fixed_threads
from tlscale.codes.extract import extract_codes, plan_shards, shards_of
from tlscale.codes.key import CodesKey
from tlscale.codes.shards import BLOCK
from tlscale.codes.store import CodesStore
from tlscale.data.content import content_digest, digest_array
from tlscale.distributed.processes import start_processes
from tlscale.distributed.signals import StopRequest
from tlscale.errors import DataError, ModelError, Stopped
from tlscale.recipe.schema import ComputeSection
from tlscale.tracking.console import Console

IMAGES = torch.from_numpy(sample_images("train", 700)[0])[:, None]
IDS = digest_array([content_digest(image.numpy()) for image in IMAGES])
SHARD_BYTES = 2 * BLOCK * (8 * 10 * 10 + 16) * 4  # two blocks
KEY = CodesKey(
    weights="w",
    transform={},
    layers=("map", "vector"),
    pools=("as is", "as is"),
    dtype="auto",
    compute={},
    versions={},
)


class Tiny(nn.Module):
    """A map in the memory order of `channels_last`, and a vector; counts what goes through it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(1, 8, 3, stride=3, padding=1).to(memory_format=torch.channels_last)
            self.linear = nn.Linear(8, 16)
        self.sizes: list[int] = []

    def forward(self, images_BCHW):
        assert not torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        self.sizes.append(len(images_BCHW))
        maps = self.conv(images_BCHW.to(memory_format=torch.channels_last)).relu()
        return maps, self.linear(maps.mean((2, 3)))


@dataclass
class Rows:
    """Some of the images, by content; `unknown` are those that nobody has read before."""

    rows: object
    unknown: object = ()
    num_read: int = 0
    num_decoded: int = 0

    def known(self):
        known_N = ~np.isin(self.rows, list(self.unknown))
        return digest_array(
            [IDS[row] if is_known else b"" for row, is_known in zip(self.rows, known_N, strict=True)]
        ), known_N

    def name(self):
        return str(list(self.rows))

    def read(self, positions_B, *, are_new):
        self.num_read += len(positions_B)
        return [(content_digest(IMAGES[row].numpy()), row) for row in np.asarray(self.rows)[positions_B].tolist()]

    def found(self, ids_N):
        assert (ids_N == IDS[np.asarray(self.rows)]).all()

    def inputs(self, read):
        self.num_decoded += len(set(read))
        return IMAGES[list(read)].float() / 255

    def where(self, position):
        return f"row {self.rows[position]}"


@dataclass
class Run:
    """What one run of tlscale would do with the store."""

    root: object
    key: CodesKey = KEY
    module: object = field(default_factory=Tiny)
    said: list = field(default_factory=list)
    shard_bytes: int = SHARD_BYTES
    limit_bytes: int | None = None
    unknown: object = ()

    def __call__(self, rows, **keys):
        self.rows = Rows(np.asarray(rows).tolist(), self.unknown)
        processes = start_processes(ComputeSection())
        try:
            return extract_codes(
                self.store,
                self.key if isinstance(self.key, list) else [self.key],
                self.rows,
                module=self.module,
                processes=processes,
                console=Screen(self.said),
                title="train",
                **keys,
            )
        finally:
            processes.close()

    @property
    def store(self):
        return CodesStore(self.root, self.limit_bytes, shard_bytes=self.shard_bytes)

    @property
    def num_images(self):
        """What went through the network, padding included."""
        return sum(self.module.sizes)


class Screen(Console):
    """The real one, which also keeps what it says."""

    def __init__(self, said) -> None:
        super().__init__()
        self._said = said

    def say(self, text, style=None):
        self._said.append(text)
        super().say(text, style)


def direct(rows):
    """What the network gives for these rows, in blocks as they come."""
    module, parts = Tiny(), []
    rows = np.asarray(rows)
    with torch.no_grad():
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK]
            filled = np.resize(block, BLOCK) if len(block) < BLOCK else block
            parts.append([value[: len(block)] for value in module(IMAGES[filled].float() / 255)])
    return tuple(torch.cat(values) for values in zip(*parts, strict=True))


def assert_equal(codes, rows):
    for some in (codes, codes.load()):
        for got, expected in zip(some.take(np.arange(len(rows))), direct(rows), strict=True):
            assert got.dtype == expected.dtype
            assert torch.equal(got, expected)


def test_a_miss_gives_what_the_network_gives_and_a_hit_the_same(tmp_path):
    first, second = Run(tmp_path), Run(tmp_path)
    rows = np.random.default_rng(0).permutation(700)[:500]
    missed = first(rows)
    assert first.module.sizes == [BLOCK] * 8  # the last one is filled up; the first is not computed twice
    assert missed.num_computed == 500
    found = second(rows)
    assert second.module.sizes == []
    assert found.num_computed == 0
    for codes in (missed, found):
        assert_equal(codes, rows)
        maps, _ = codes.take(np.arange(3))
        assert maps.is_contiguous(memory_format=torch.channels_last)
    assert [spec.shape for spec in found.values] == [(8, 10, 10), (16,)]
    assert [spec.channels_last for spec in found.values] == [True, False]


def test_what_is_said(tmp_path):
    run = Run(tmp_path)
    run(range(100))
    place = f"'{run.store.folder(KEY)}'"
    assert run.said[0] == (
        "codes of train: computing 100 images (map 8 x 10 x 10 float32, vector 16 float32), 0.3 MiB in " + place
    )
    assert run.said[1].startswith("codes of train: 100 images computed in 0s, ")
    assert run.said[1].endswith("images/s")
    run.said.clear()
    run(range(50))
    assert run.said == [f"codes of train: found in the cache, 50 images x 3,264 bytes, in {place}"]
    run.said.clear()
    run(range(150))
    assert "computing 50 of 150 images" in run.said[0]


ROWS = st.lists(st.integers(0, 699), min_size=1, max_size=150, unique=True)


@settings(max_examples=15, deadline=None)
@given(requests=st.lists(ROWS, min_size=1, max_size=3))
def test_only_what_is_missing_is_computed(tmp_path_factory, requests):
    root, there = tmp_path_factory.mktemp("codes"), set()
    for rows in requests:
        run, new = Run(root), set(rows) - there
        codes = run(rows)
        assert codes.num_computed == len(new)
        assert run.num_images == -(-len(new) // BLOCK) * BLOCK
        assert_equal(codes, rows)
        there |= new


def test_subsets_and_parts_of_one_table_share(tmp_path):
    assert Run(tmp_path)(range(0, 100)).num_computed == 100
    assert Run(tmp_path)(range(0, 300)).num_computed == 200
    assert Run(tmp_path)(range(250, 350)).num_computed == 50
    assert Run(tmp_path)(range(349, -1, -1)).num_computed == 0


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, num_rows=st.integers(1, 50), world_size=st.integers(1, 9))
def test_shards_do_not_depend_on_the_number_of_processes(rows, num_rows, world_size):
    shards = plan_shards(np.array(rows), num_rows)
    assert np.concatenate(shards).tolist() == rows
    assert [len(shard) for shard in shards[:-1]] == [num_rows] * (len(shards) - 1)
    shares = [shards_of(shards, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1  # all processes have the same number of rounds
    written = [shard.tolist() for share in shares for shard in share if len(shard)]
    assert sorted(written) == sorted(shard.tolist() for shard in shards)


def test_files_do_not_depend_on_the_number_of_processes(tmp_path):
    """Every process's share is computed here, one process after the other, by a network of its own."""
    rows_N = np.arange(450)
    Run(tmp_path / "1")(rows_N)
    for world_size in (2, 3, 7):
        store = CodesStore(tmp_path / str(world_size), shard_bytes=SHARD_BYTES)
        for rank in reversed(range(world_size)):
            inventories = (store.take_inventory(KEY, IDS[rows_N], "0"),)
            known_N = np.ones(len(rows_N), bool)
            pictures = Rows(rows_N.tolist())
            work = Extraction(store, [KEY], pictures, Tiny(), "0", None, IDS[rows_N], known_N, inventories=inventories)
            work.learn(rows_N[:BLOCK])
            for positions_P in shards_of(plan_shards(rows_N, 2 * BLOCK), rank, world_size):
                _, new, values = work.chunk(positions_P, lambda count: None)
                if len(new):
                    work.write(new, values)
        assert contents(store.folder(KEY)) == contents(CodesStore(tmp_path / "1").folder(KEY))


def test_the_layout_of_shards_changes_no_code(tmp_path):
    for number, shard_bytes in enumerate((1, 10**5, 10**9)):
        run = Run(tmp_path / str(number), shard_bytes=shard_bytes)
        assert_equal(run(range(200)), range(200))
        assert len(list(run.store.folder(KEY).glob("*.0.safetensors"))) == (4, 4, 1)[number]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_codes_are_kept_in_the_dtype_of_the_key(tmp_path, dtype):
    run = Run(tmp_path, replace(KEY, dtype=dtype))
    codes = run(range(70))
    maps, vectors = codes.take(np.arange(70))
    expected = direct(range(70))
    assert torch.equal(maps, expected[0].to(getattr(torch, dtype)))
    assert torch.equal(vectors, expected[1].to(getattr(torch, dtype)))
    assert codes.num_bytes == 70 * 816 * {"float64": 8}.get(dtype, 2)


def test_damaged_codes_are_computed_again_and_it_is_said_once(tmp_path):
    Run(tmp_path)(range(300))
    run = Run(tmp_path)
    sound = contents(run.store.folder(KEY))
    flip(next(run.store.folder(KEY).glob("*.0.safetensors")))
    codes = run(range(300))
    assert 0 < codes.num_computed <= 2 * BLOCK
    assert len([line for line in run.said if "are corrupt, and not used" in line]) == 1
    assert contents(run.store.folder(KEY)) == sound
    assert_equal(codes, range(300))


# --- Images whose contents are not known yet -------------------------------------------------------------------------


def test_what_nobody_has_read_is_read_once_and_computed_only_where_it_is_missing(tmp_path):
    first = Run(tmp_path, unknown=range(300))
    codes = first(range(300))
    assert (codes.num_computed, first.num_images) == (300, 5 * BLOCK)
    assert (first.rows.num_read, first.rows.num_decoded) == (300, 300)  # hashed as it is read for decoding
    assert_equal(codes, range(300))
    again = Run(tmp_path, unknown=range(300))  # as after a copy
    codes = again(range(250))
    assert (codes.num_computed, again.num_images) == (0, 0)
    assert (again.rows.num_read, again.rows.num_decoded) == (250, 0)
    assert_equal(codes, range(250))
    more = Run(tmp_path, unknown=range(700), shard_bytes=10**9)
    rows = np.random.default_rng(0).permutation(350)
    codes = more(rows)
    assert (codes.num_computed, more.num_images) == (50, BLOCK)  # one block, wherever the new ones are
    assert (more.rows.num_read, more.rows.num_decoded) == (350, 50)
    assert_equal(codes, rows)


@pytest.mark.parametrize("unknown", [(), range(700)])
def test_equal_images_are_computed_and_kept_once(tmp_path, unknown):
    rows = [*range(100), *range(50, 150), *range(0, 150, 3)]
    run = Run(tmp_path, unknown=unknown, shard_bytes=1)
    codes = run(rows)
    assert codes.num_computed == 150
    assert sum(entry.num_rows for entry in run.store.entries()) == 150
    assert_equal(codes, rows)


@pytest.mark.parametrize("is_unknown", [True, False])
def test_damage_in_what_turns_out_to_be_there_is_computed_again(tmp_path, is_unknown):
    Run(tmp_path)(range(300))
    run = Run(tmp_path, unknown=range(300) if is_unknown else ())
    flip(next(run.store.folder(KEY).glob("*.1.safetensors")))
    codes = run(range(300))
    assert 0 < codes.num_computed <= 2 * BLOCK
    assert_equal(codes, range(300))


def test_an_image_that_changed_since_it_was_looked_up_gets_the_codes_of_what_it_is(tmp_path):
    class Changed(Rows):
        def known(self):
            ids_N, known_N = super().known()
            ids_N[3] = bytes([7]) * 32  # as the index had it
            return ids_N, known_N

    pictures, processes = Changed(list(range(10))), start_processes(ComputeSection())
    console = Screen([])
    codes = extract_codes(
        CodesStore(tmp_path), [KEY], pictures, module=Tiny(), processes=processes, console=console, title="x"
    )
    processes.close()
    assert_equal(codes, range(10))
    assert CodesStore(tmp_path).open(KEY, digest_array([bytes([7]) * 32])) is None
    assert Run(tmp_path)(range(10)).num_computed == 0


def test_each_value_is_looked_up_by_itself_and_row_by_row(tmp_path):
    maps, vectors = (replace(KEY, layers=(name,), pools=("as is",)) for name in KEY.layers)

    class Only(nn.Module):
        def __init__(self, *places):
            super().__init__()
            self.tiny, self.places = Tiny(), places
            self.sizes = self.tiny.sizes

        def forward(self, images):
            values = self.tiny(images)
            return tuple(values[place] for place in self.places)

    assert Run(tmp_path, [maps], Only(0))(range(200)).num_computed == 200
    assert Run(tmp_path, [vectors], Only(1))(range(100, 150)).num_computed == 50
    both = Run(tmp_path, [maps, vectors], Only(0, 1))
    codes = both(range(250))
    assert codes.num_computed == 200  # 50 have both
    assert_equal(codes, range(250))
    for key in (maps, vectors):
        assert Run(tmp_path, [key], Only(0))(range(250)).num_computed == 0
    assert {entry.num_rows for entry in both.store.entries()} == {250}  # nothing is kept twice
    turned = Run(tmp_path, [vectors, maps], Only(1, 0))(range(250))
    assert torch.equal(turned.take([7])[0], codes.take([7])[1])


# --- Bits ------------------------------------------------------------------------------------------------------------

MORE_NETWORKS = ("test_efficientnet", "test_convnext", "test_mambaout", "test_nfnet")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *(("test_resnet", precision) for precision in ("fp32", "bf16")),
        *(("test_vit", precision) for precision in ("fp32", "bf16")),
        *((name, "fp32") for name in MORE_NETWORKS),
        *(pytest.param(name, "bf16", marks=pytest.mark.long) for name in MORE_NETWORKS),
    ],
)
def test_bits_hang_on_neither_place_nor_neighbours_nor_threads(name, precision):
    """What the key leaves out: only the block, the kind of CPU and the versions are in it."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        options = {"img_size": 64} if name == "test_vit" else {}
        network = timm.create_model(name, num_classes=0, in_chans=3, **options).eval()
        images, others, order = torch.randn(BLOCK, 3, 64, 64), torch.randn(BLOCK, 3, 64, 64), torch.randperm(BLOCK)
        others[40:45] = images[:5]
        before = torch.get_num_threads()
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                torch.set_num_threads(1)
                alone = network(images)
                for allowed in (1, 2, 3, 8):
                    torch.set_num_threads(allowed)
                    with fixed_threads():
                        assert torch.equal(network(images[order]), alone[order]), allowed
                        assert torch.equal(network(others)[40:45], alone[:5]), allowed
                    assert torch.get_num_threads() == allowed
        finally:
            torch.set_num_threads(before)


# --- What cannot be kept ----------------------------------------------------------------------------------------------


def finite_but_for(bad):
    """Gives a vector an image; those of the rows in `bad` have one bad value in it."""

    def module(images):
        out = images.mean((2, 3)).repeat(1, 3)
        for row, value in bad.items():
            out[(images.flatten(1) == IMAGES[row].flatten().float() / 255).all(1), 1] = value
        return (out,)

    return module


VECTOR = replace(KEY, layers=("vector",), pools=("avg",))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_codes_that_are_not_finite_are_named_and_not_kept(tmp_path, value):
    run = Run(tmp_path, VECTOR, finite_but_for({130: value, 129: value}))
    with pytest.raises(DataError) as caught:
        run(range(200))
    assert "the codes 'vector' of these images are NaN or infinite" in str(caught.value)
    assert caught.value.problem.endswith(": row 129, row 130")
    assert run.store.open(VECTOR, IDS[[129]]) is None
    good = Run(tmp_path, VECTOR, finite_but_for({}))
    assert good(range(200)).num_computed == 200


def test_codes_that_a_dtype_cannot_hold_say_which(tmp_path):
    key = replace(VECTOR, dtype="float16")
    with pytest.raises(DataError, match=r"are too large for float16: row 3. Set codes\.dtype"):
        Run(tmp_path, key, finite_but_for({3: 1e6}))(range(5))


def test_many_bad_rows_are_not_all_listed(tmp_path):
    with pytest.raises(DataError, match="row 0, row 1, row 2, row 3, row 4 and 59 more"):
        Run(tmp_path, VECTOR, lambda images: (images.mean((2, 3)) * float("nan"),))(range(80))


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (lambda images: (images.sum(),), r"is \(\) for 64 images"),
        (lambda images: (images.flatten(1).repeat(2, 1),), r"is \(128, 784\) for 64 images"),
        (lambda images: (images.flatten(1)[:, :2].to(torch.complex64),), "is of dtype complex64"),
    ],
)
def test_values_that_are_no_codes_are_refused(tmp_path, module, why):
    with pytest.raises(ModelError, match=why):
        Run(tmp_path, VECTOR, module)(range(3))


def test_a_value_whose_shape_changes_is_refused(tmp_path):
    widths = iter([3, 3, 4])
    with pytest.raises(ModelError, match=r"the value 'vector' is \(64, 4\) for these 64 images and \(64, 3\)"):
        Run(tmp_path, VECTOR, lambda images: (images.flatten(1)[:, : next(widths)],))(range(200))


def test_integers_and_truth_values_are_kept_as_they_are(tmp_path):
    key = replace(VECTOR, layers=("a", "b"), pools=("as is",) * 2, dtype="float16")
    codes = Run(tmp_path, key, lambda images: (images.flatten(1).argmax(1), images[:, 0, :2] > 0.5))(range(9))
    assert [(spec.shape, spec.dtype) for spec in codes.values] == [((), "int64"), ((2, 28), "bool")]
    assert torch.equal(codes.take([4])[0], (IMAGES[[4]].float() / 255).flatten(1).argmax(1))


# --- Stopping, limits -------------------------------------------------------------------------------------------------


def test_stopped_and_run_again_goes_on_from_what_was_finished(tmp_path):
    module, run = Tiny(), Run(tmp_path)

    def asked_in_the_sixth_block(images_BCHW):
        if len(module.sizes) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return module(images_BCHW)

    run.module = asked_in_the_sixth_block
    with StopRequest(), pytest.raises(Stopped, match="SIGTERM while computing codes. What is computed stays"):
        run(range(500))
    again = Run(tmp_path)
    codes = again(range(500))
    assert codes.num_computed == 500 - 6 * BLOCK  # the last of them in a shard that is not full
    assert_equal(codes, range(500))


def test_room_is_made_before_anything_is_computed(tmp_path):
    other = replace(KEY, weights="other")
    Run(tmp_path, other)(range(300))
    run = Run(tmp_path, limit_bytes=1_500_000)
    run(range(300))
    entries = {entry.digest: entry for entry in run.store.entries()}
    assert entries[KEY.digest()].num_rows == 300
    assert 0 < entries[other.digest()].num_rows < 300  # no more is removed than has to be
    assert sum(entry.num_bytes for entry in entries.values()) <= 1_500_000
    assert f"'{run.store.folder(other)}'" in next(line for line in run.said if line.startswith("codes removed"))


# --- Two runs at once -------------------------------------------------------------------------------------------------

SLOW = """
import sys
import time
from pathlib import Path
from tests.unit.codes import test_extract as t
go, root = Path(sys.argv[1]), sys.argv[2]
class Waits(t.Tiny):
    def forward(self, images):
        if len(self.sizes) == 3:
            print("holds it", flush=True)
            while not go.exists():
                time.sleep(0.01)
        return super().forward(images)
print(t.Run(Path(root), module=Waits())(range(300)).num_computed, flush=True)
"""


@pytest.fixture
def slow(tmp_path):
    """Another process that computes the same codes, in the middle of it until the file `go` is there."""
    log = tmp_path / "log"
    with log.open("w") as file:
        command = [sys.executable, "-c", SLOW, str(tmp_path / "go"), str(tmp_path / "codes")]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment())
    wait_until(lambda: "holds it" in log.read_text(), process)
    yield process, log
    process.kill()
    process.wait()


def when_waiting(run, act):
    """Calls `act` as soon as the run says that it waits."""

    class Said(list):
        def append(self, text):
            super().append(text)
            if "waiting for another run that computes the same codes" in text:
                act()

    run.said = Said()


@pytest.mark.slow
def test_the_second_run_waits_and_computes_nothing(slow, tmp_path):
    process, log = slow
    other = Run(tmp_path / "codes", replace(KEY, weights="other"))
    assert other(range(10)).num_computed == 10
    assert not [line for line in other.said if "waiting" in line]
    run = Run(tmp_path / "codes")
    when_waiting(run, (tmp_path / "go").touch)
    codes = run(range(300))
    assert codes.num_computed == run.num_images == 0
    assert len([line for line in run.said if "waiting" in line]) == 1
    assert_equal(codes, range(300))
    assert process.wait(60) == 0
    assert log.read_text().splitlines()[-1] == "300"


@pytest.mark.slow
def test_the_lock_dies_with_its_process(slow, tmp_path):
    process, _ = slow
    (tmp_path / "STOP").touch()
    with StopRequest(tmp_path / "STOP"), pytest.raises(Stopped, match="waiting for another run"):
        Run(tmp_path / "codes")(range(300))  # who waits can be stopped
    run = Run(tmp_path / "codes")
    when_waiting(run, process.kill)
    codes = run(range(300))
    assert codes.num_computed == 300 - 2 * BLOCK  # one shard was finished
    assert_equal(codes, range(300))
