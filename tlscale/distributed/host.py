"""Describe the machine that this process runs on: its cores, the packages that are installed, and its devices."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

import torch

from tlscale.distributed.device import Device


def num_cores() -> int:
    """Count the cores that the process is allowed on; a container or Slurm may give it fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Return the installed version of each package; `none` where it is not installed."""
    return {name: _version(name) for name in packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def device_for(device: torch.device) -> Device:
    """Return the object for this kind of device."""
    if device.type != "xla":
        return Device(device)
    from tlscale.distributed.xla import XlaDevice

    return XlaDevice(device)
