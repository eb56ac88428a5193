"""Add up one number over all processes: what `tlscale doctor` starts two of, to see that they find each other."""

from __future__ import annotations

import sys
from datetime import timedelta

import torch
import torch.distributed as torch_dist

if __name__ == "__main__":
    torch_dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    numbers = torch.ones(4)
    torch_dist.all_reduce(numbers)
    torch_dist.destroy_process_group()
    sys.exit(0 if numbers.tolist() == [2.0] * 4 else "the processes met, but their sum is wrong")
