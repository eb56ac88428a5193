"""Shards that any number of processes wrote: read by any other number, and verified, each file by some process."""

import json

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tlscale.training.checkpoint.files import file_info
from tlscale.training.checkpoint.tensor_file import CorruptionError, read_part

SHAPES = {"model/a": (7, 3), "optimizer/a.moment": (7, 3), "model/one row": (1, 2, 2), "ema/even": (8,)}


def chunks(tensor, count):
    """As DTensors have them: some of the last may be empty."""
    most = -(-len(tensor) // count)
    return [(most * number, tensor[most * number : most * (number + 1)]) for number in range(count)]


def write(folder, tensors, writers):
    """As torch's distributed checkpoint does."""
    (folder / "shards").mkdir(parents=True)
    infos = {}
    for number in range(writers):
        rows = {name: chunks(tensor, writers)[number] for name, tensor in tensors.items()}
        rows = {name: (start, values) for name, (start, values) in rows.items() if len(values)}
        offsets = {name: {"saved_offsets": [start] + [0] * (values.ndim - 1)} for name, (start, values) in rows.items()}
        path = folder / "shards" / f"shard-{number + 1:05}-model-00001-of-00001.safetensors"
        values = {name: values.contiguous() for name, (_, values) in rows.items()}
        safetensors.torch.save_file(values, path, {"DCP_SHARDING_INFO": json.dumps(offsets)})
        infos[f"shards/{path.name}"] = file_info(path)
    return infos


def drawn():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@settings(max_examples=40, deadline=None)
@given(writers=st.integers(1, 9), readers=st.integers(1, 9))
def test_any_number_of_processes_reads_what_any_number_wrote(tmp_path_factory, writers, readers):
    folder, tensors = tmp_path_factory.mktemp("shards"), drawn()
    infos = write(folder, tensors, writers)
    parts = [read_part(folder, infos, rank, readers) for rank in range(readers)]
    for name, tensor in tensors.items():
        assert all(part[name].shape == tensor.shape for part in parts)
        for (_, expected), part in zip(chunks(tensor, readers), parts, strict=True):
            assert torch.equal(part[name].values, expected)


@pytest.mark.parametrize(("writers", "readers"), [(4, 4), (4, 2), (2, 4), (9, 1), (9, 3)])
def test_every_file_is_verified_by_some_process(tmp_path, writers, readers):
    """Also one of which nobody needs a row."""
    infos = write(tmp_path, drawn(), writers)
    for name in infos:
        path = tmp_path / name
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        found = 0
        for rank in range(readers):
            try:
                read_part(tmp_path, infos, rank, readers)
            except CorruptionError as error:
                assert str(error).startswith(f"{name} has ")  # noqa: PT017
                found += 1
        assert found, name
        path.write_bytes(good)


@pytest.mark.parametrize("which", [0, 1])
def test_rows_that_are_in_no_file_or_in_two_are_corruption(tmp_path, which):
    infos = write(tmp_path, drawn(), 2)
    names = list(infos)
    if which:
        (tmp_path / names[1]).write_bytes((tmp_path / names[0]).read_bytes())
        infos[names[1]] = infos[names[0]]
    else:
        del infos[names[0]]
    with pytest.raises(CorruptionError, match="rows of "):
        read_part(tmp_path, infos, 0, 1)


@pytest.mark.parametrize("header", [b"\xff" * 8, b"\0" * 8, (2).to_bytes(8, "little") + b"[]"])
def test_what_is_no_header_is_corruption(tmp_path, header):
    infos = write(tmp_path, drawn(), 2)
    path = tmp_path / next(iter(infos))
    path.write_bytes(header + path.read_bytes()[len(header) :])
    with pytest.raises(CorruptionError, match="shard-00001"):
        read_part(tmp_path, infos, 1, 2)
