"""Put back what a run changes for the whole process: the next one there, or a notebook, begins as if none had been."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # of deterministic algorithms on CUDA


@contextmanager
def cpu_threads(number: int) -> Iterator[None]:
    """Compute with so many CPU threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_settings() -> Callable[[], None]:
    """Note the settings of this process that runs change.

    Returns:
        A function that puts them back.
    """
    from timm.layers import set_reentrant_ckpt, use_reentrant_ckpt

    threads, reentrant = torch.get_num_threads(), use_reentrant_ckpt()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, workspace = torch.backends.cudnn.benchmark, os.environ.get(_WORKSPACE)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]

    def put_back() -> None:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        os.environ.pop(_WORKSPACE, None)
        os.environ.update({} if workspace is None else {_WORKSPACE: workspace})
        set_reentrant_ckpt(reentrant)
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
        if devices:
            torch.cuda.set_rng_state_all(devices)

    return put_back
