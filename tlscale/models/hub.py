"""Reach the Hugging Face hub without a wait where it has no address.

The hub's client tries each file six times, about 25 seconds, before it gives up on a host that has no address at
all. Where the address is not found, the client uses its cache at once.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub.constants as hub
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

_PICKLE = "pytorch_model.bin"  # where a repository names no file


def hub_has_address() -> bool:
    """Return whether the hub's host has an address; a proxy does its own look-up, so with one the answer is yes."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        socket.getaddrinfo(urlsplit(hub.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


@contextmanager
def cache_only_when_unreachable() -> Iterator[None]:
    """Let hub calls within use the cache alone where the hub has no address, so that they fail at once, not late."""
    before = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = before or not hub_has_address()
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def hub_weights(place: str, filename: str | None) -> Path:
    """Fetch the weights of a repository, or find them in the cache; a pickle only where it has no safetensors.

    Args:
        place: `owner/name`, or `owner/name@revision`.
        filename: that its settings name, if any.

    Raises:
        EntryNotFoundError: it has none, or none is in the cache and the hub is not reached.
    """
    repository, _, revision = place.partition("@")
    filename = filename or _PICKLE
    stem = filename.rpartition(".")[0]
    names = (f"{stem.replace('pytorch_model', 'model')}.safetensors", f"{stem}.safetensors", filename)
    for name in names:
        with suppress(EntryNotFoundError):
            return Path(hf_hub_download(repository, name, revision=revision or None))
    return Path(hf_hub_download(repository, filename, revision=revision or None))
