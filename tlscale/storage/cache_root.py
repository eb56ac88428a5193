"""Where tlscale keeps what it keeps between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """Return `$TLSCALE_CACHE`, by default `~/.cache/tlscale`."""
    return Path(os.environ.get("TLSCALE_CACHE") or Path.home() / ".cache" / "tlscale")
