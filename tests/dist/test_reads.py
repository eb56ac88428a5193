"""How often files of checkpoints are read by two processes: once by a save, and once by each process that resumes."""

import pytest

from tests.dist.launches import facts_of
from tests.small_runs import assert_same_runs

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

OURS = {"model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"}
SHARDS = [f"shards/shard-0000{number}-model-00001-of-00001.safetensors" for number in (1, 2)]
STEPS = [f"step_{step:08}" for step in (2, 4, 6, 8)]


@pytest.fixture(scope="module")
def by_two(idx, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reads")
    return folder, facts_of(2, "reads.py", folder, idx, timeout_s=500)


def size_of_header(path):
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_save_reads_each_file_back_once(by_two, engine):
    """By the process that wrote it."""
    _, facts = by_two
    for rank, fact in enumerate(facts):
        written = (OURS if rank == 0 else set()) | ({SHARDS[rank]} if engine == "fsdp2" else set())
        expected = sorted([step, name, 1] for step in STEPS for name in written)
        assert sorted(fact[engine]["saving"]) == expected


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_resume_opens_each_file_once_in_each_process(by_two, engine):
    folder, facts = by_two
    names = {*OURS, "manifest.json", *(SHARDS if engine == "fsdp2" else ())}
    assert [fact[engine]["resuming"] for fact in facts] == [dict.fromkeys(names, 1)] * 2
    assert_same_runs(folder / engine, folder / f"{engine}_resumed")


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_process_reads_what_it_needs_once(by_two, engine):
    """Of another process's shards it reads the header, and no more."""
    folder, facts = by_two
    newest = folder / engine / "checkpoints" / STEPS[-1]
    for rank, fact in enumerate(facts):
        names = {*OURS, "manifest.json"} | ({SHARDS[rank]} if engine == "fsdp2" else set())
        needed = sum((newest / name).stat().st_size for name in names)
        headers = sum(size_of_header(newest / name) for name in SHARDS) if engine == "fsdp2" else 0
        assert needed <= fact[engine]["bytes"] <= needed + headers + 2**16
        assert needed > 2**20
