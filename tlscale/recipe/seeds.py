"""Everything random follows from the recipe's seed through here.

Promise: independent streams by name, the same on every machine and version of Python, torch and NumPy.
"""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *stream: str | int) -> int:
    """Return a 63-bit seed for one stream, such as `derive_seed(0, "dropout", step, rank)`."""
    text = "/".join(str(part) for part in (seed, *stream))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
