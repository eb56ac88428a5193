"""Key codes by a digest of everything that their bits depend on, except the image.

Promise: two keys have the same digest exactly where all their fields are equal, in every process and on every machine;
a change of the format of the store changes all digests, so what an older tlscale stored is never misread.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tlscale.storage.files import text_sha256

FORMAT = 3
DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")
"""What codes may be stored in; `auto`: as the network gives them."""


@dataclass(frozen=True)
class CodesKey:
    """Name everything that determines the codes of an image, except the image."""

    weights: str
    """Digest of the function that computes them: its parameters, its buffers and its structure."""
    transform: Mapping[str, Any]
    """Plain JSON: the input spec and, where there is one, the augmentation."""
    layers: tuple[str, ...]
    """Names of the values, each once."""
    pools: tuple[str, ...]
    """The pooling of each value; `as is` where there is none."""
    dtype: str
    """One of `DTYPES`."""
    compute: Mapping[str, Any]
    """What may change the last bit: precision, device, kind of CPU, size of a block, memory order."""
    versions: Mapping[str, str]
    """Of the libraries that compute: torch, timm, pillow."""

    def __post_init__(self) -> None:
        assert self.dtype in DTYPES, self.dtype
        assert self.layers, "no value is named"
        assert len(self.layers) == len(self.pools) == len(set(self.layers)), (self.layers, self.pools)

    def to_plain(self) -> dict[str, Any]:
        """Return the fields as plain JSON values, as the store's records show them."""
        return {
            "weights": self.weights,
            "transform": _plain(self.transform),
            "layers": list(self.layers),
            "pools": list(self.pools),
            "dtype": self.dtype,
            "compute": _plain(self.compute),
            "versions": _plain(self.versions),
        }

    def digest(self) -> str:
        """Return the SHA-256 of the format and all fields, 64 hex digits: the name of the entry in the store."""
        return json_digest({"format": FORMAT, **self.to_plain()})


def json_digest(plain: Mapping[str, Any]) -> str:
    """Return the SHA-256, in hex, of plain JSON values, whatever the order of their names.

    Raises:
        ValueError: a number is not finite, which JSON cannot express.
    """
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text_sha256(text)


def _plain(value: Any) -> Any:
    """Return `value` with mappings as dicts and tuples as lists.

    Raises:
        TypeError: something that JSON would change, or cannot express.
    """
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Mapping():
            wrong = next((name for name in value if not isinstance(name, str)), None)
            if wrong is not None:
                raise TypeError(f"the name {wrong!r} in the key of codes is not text")
            return {name: _plain(item) for name, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
    raise TypeError(f"a {type(value).__name__} cannot be part of the key of codes: {value!r}")
