"""Check that all processes still train the same network, before a checkpoint is made of the main one's.

Promise: what a checkpoint holds of parameters, buffers and averages is what every process has, bit for bit; where it is
not, all processes end with the same error and nothing is written. It costs one pass over the bits of what is trained,
and one number from each process.

Letters: T tensors, P positions of a tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tlscale.distributed.processes import Processes
from tlscale.errors import DesyncError, flag

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_POSITIONS = 2**20  # of a tensor that are summed at once, so that its copy as 64-bit integers stays small


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """Sum, over positions p, (2 p + 1) times the bits there as an integer, modulo 2^64; shape (), on its device.

    The weights are odd, and so have inverses modulo 2^64: a change of one element always shows, and of other changes
    about one in 2^64 does not. Nothing waits for the device.
    """
    flat_P = tensor.detach().reshape(-1)
    bits_P = flat_P.view(_INTEGERS[flat_P.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits_P.device)
    for start in range(0, len(bits_P), _POSITIONS):
        part_P = bits_P[start : start + _POSITIONS].to(torch.int64)
        total += (part_P * torch.arange(2 * start + 1, 2 * (start + len(part_P)), 2, device=part_P.device)).sum()
    return total


def check_replicas_agree(tensors: Mapping[str, Tensor], processes: Processes, step: int) -> None:
    """Compare tensors, by names that are the same on all processes, that all should have in the same bits.

    Raises:
        DesyncError: on every process, where not all have the same bits.
    """
    if processes.world_size == 1 or not tensors:
        return
    sums_T = torch.stack([checksum(tensor) for tensor in tensors.values()])
    totals = processes.gather(int(checksum(sums_T)))
    if len(set(totals)) > 1:
        found = difference(list(tensors), processes.gather(sums_T.tolist()))
        raise DesyncError(
            f"the processes do not train the same network any more: after step {step}, {found}. Nothing was saved; the "
            "checkpoints before were compared in the same way. Either a device computes wrongly, or it is of another "
            "kind than the others, or code other than the loop changed weights there",
            remedy="Check the device, then resume from the last checkpoint with " + flag("resume") + ".",
        )


def difference(names: Sequence[str], sums_by_rank: Sequence[Sequence[int]]) -> str:
    """Say which process differs from most of them (from the main one where there is no most), and in which tensors."""
    usual, _ = Counter(map(tuple, sums_by_rank)).most_common(1)[0]  # of equally many, the first
    others = [rank for rank, sums in enumerate(sums_by_rank) if tuple(sums) != usual]
    rank, standard = others[0], [tuple(sums) for sums in sums_by_rank].index(usual)
    differing = [name for name, *pair in zip(names, sums_by_rank[rank], usual, strict=True) if pair[0] != pair[1]]
    also = f"; processes {', '.join(map(str, others[1:]))} differ as well" if len(others) > 1 else ""
    return (
        f"process {rank} of {len(sums_by_rank)} has other values in '{differing[0]}' than process {standard} "
        f"({len(differing)} of {len(names)} tensors differ{also})"
    )
