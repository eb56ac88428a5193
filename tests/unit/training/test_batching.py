"""The batches in which a run scored its images, which prediction takes again."""

from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from tlscale.data.sampler import eval_rows
from tlscale.training.batching import Batching


@given(st.integers(1, 40), st.integers(0, 500), st.integers(2, 6))
def test_a_run_on_several_processes_had_the_batches_of_each_share(size, num_scored, processes):
    rows = [rows for rank in range(processes) for rows in eval_rows(num_scored, rank, processes, size)]
    sizes = list(islice(Batching(size, num_scored, processes).sizes(), len(rows) + 3))
    assert sizes == [*map(len, rows), size, size, size]
    assert [sum(sizes[:at]) for at in range(len(rows))] == [some[0] for some in rows]


@given(st.integers(1, 5000), st.integers(0, 500), st.integers(1, 6))
def test_chunks_are_whole_batches(size, num_scored, processes):
    batching = Batching(size, num_scored, processes)
    chunks = list(islice(batching.chunks(), 4))
    assert all(sum(chunk[:-1]) < 256 <= sum(chunk) for chunk in chunks)
    batches = [one for chunk in chunks for one in chunk]
    assert batches == list(islice(batching.sizes(), len(batches)))
