"""Reach the Hugging Face hub without a wait where it has no address.

The hub's client tries each file six times, about 25 seconds, before it gives up on a host that has no address at
all. Where the address is not found, the client uses its cache at once.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import huggingface_hub.constants as hub


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
