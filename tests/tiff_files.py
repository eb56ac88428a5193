"""TIFF files written byte by byte, with no library that could be wrong in the same way, and what they show."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field

import numpy as np

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, LAB = 0, 1, 2, 3, 5, 6, 8
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
_REVERSED = bytes(int(format(byte, "08b")[::-1], 2) for byte in range(256))


@dataclass
class Tiff:
    """How an image is written; `samples_HWS` are whole numbers below 2**bits, or floating point in 0..1."""

    samples_HWS: np.ndarray = field(repr=False)
    bits: int
    photometric: int | None
    order: str = "<"
    planes_apart: bool = False
    form: int = UNSIGNED
    extra: tuple[int, ...] = ()
    fill_order: int = 1
    is_deflated: bool = False
    tile_px: int | None = None
    rows_per_strip: int | None = None
    palette: np.ndarray | None = None
    tags: list[tuple[int, int, list[int]]] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        blocks = [self._packed(block) for plane in self._planes() for block in self._blocks(plane)]
        starts = (8 + np.cumsum([0, *map(len, blocks)])).tolist()
        data = b"".join(blocks)
        data += bytes(len(data) % 2)
        return self._header(8 + len(data)) + data + self._directory(starts[:-1], list(map(len, blocks)), 8 + len(data))

    def _planes(self) -> list[np.ndarray]:
        whole = self.samples_HWS
        return np.split(whole, whole.shape[2], axis=2) if self.planes_apart else [whole]

    def _blocks(self, plane: np.ndarray) -> list[np.ndarray]:
        height, width = plane.shape[:2]
        if self.tile_px is None:
            step = self.rows_per_strip or height
            return [plane[top : top + step] for top in range(0, height, step)]
        side = self.tile_px
        missing = ((0, -height % side), (0, -width % side), (0, 0))
        padded = np.pad(plane, missing)
        tops, lefts = range(0, padded.shape[0], side), range(0, padded.shape[1], side)
        return [padded[top : top + side, left : left + side] for top in tops for left in lefts]

    def _packed(self, block: np.ndarray) -> bytes:
        kind = {UNSIGNED: "u", SIGNED: "i", FLOAT: "f"}[self.form]
        if self.bits in (8, 16, 32, 64):
            data = block.astype(f"{self.order}{kind}{self.bits // 8}").tobytes()
        else:
            rows = ("".join(format(int(value), f"0{self.bits}b") for value in row.ravel()) for row in block)
            rows = (row + "0" * (-len(row) % 8) for row in rows)
            data = b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)
        data = data.translate(_REVERSED) if self.fill_order == 2 else data
        return zlib.compress(data) if self.is_deflated else data

    def _header(self, directory_at: int) -> bytes:
        return {"<": b"II", ">": b"MM"}[self.order] + struct.pack(f"{self.order}HI", 42, directory_at)

    def _directory(self, starts: list[int], sizes: list[int], at: int) -> bytes:
        height, width, samples = self.samples_HWS.shape
        tags = [(256, 4, [width]), (257, 4, [height]), (258, 3, [self.bits] * samples), (277, 3, [samples])]
        tags += [(259, 3, [8 if self.is_deflated else 1]), (284, 3, [2 if self.planes_apart else 1])]
        tags += [(339, 3, [self.form] * samples), *self.tags]
        tags += [(262, 3, [self.photometric])] if self.photometric is not None else []
        tags += [(266, 3, [2])] if self.fill_order == 2 else []
        tags += [(338, 3, list(self.extra))] if self.extra else []
        tags += [(320, 3, self.palette.ravel().tolist())] if self.palette is not None else []
        if self.tile_px is None:
            tags += [(273, 4, starts), (278, 4, [self.rows_per_strip or height]), (279, 4, sizes)]
        else:
            tags += [(322, 4, [self.tile_px]), (323, 4, [self.tile_px]), (324, 4, starts), (325, 4, sizes)]
        more_at = at + 2 + 12 * len(tags) + 4
        entries, more = b"", b""
        for tag, kind, values in sorted(tags):
            raw = b"".join(struct.pack(self.order + {3: "H", 4: "I"}[kind], value) for value in values)
            if len(raw) > 4:
                raw, more = struct.pack(f"{self.order}I", more_at + len(more)), more + raw + bytes(len(raw) % 2)
            entries += struct.pack(f"{self.order}HHI", tag, kind, len(values)) + raw.ljust(4, b"\0")
        return struct.pack(f"{self.order}H", len(tags)) + entries + bytes(4) + more

    def shows(self) -> np.ndarray | None:
        """The picture, as numbers 0..255, H x W x 3, over white; None where nobody can say."""
        if self.form == SIGNED or self.photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK):
            return None
        num_colours = {RGB: 3, CMYK: 4}.get(self.photometric, 1)
        num_extra = self.samples_HWS.shape[2] - num_colours
        if num_extra < 0 or num_extra != len(self.extra):
            return None
        shares_HWS = self.samples_HWS / (1 if self.form == FLOAT else 2**self.bits - 1)
        colour, more = shares_HWS[:, :, :num_colours], shares_HWS[:, :, num_colours:]
        if self.photometric == PALETTE:
            assert self.palette is not None
            colour = self.palette[:, self.samples_HWS[:, :, 0]].transpose(1, 2, 0) / 65535
        if self.photometric == WHITE_IS_ZERO:
            colour = 1 - colour
        if self.photometric == CMYK:
            colour = (1 - colour[:, :, :3]) * (1 - colour[:, :, 3:])
        if self.extra[:1] == (1,):
            colour = np.minimum(colour + 1 - more[:, :, :1], 1)
        if self.extra[:1] == (2,):
            colour = colour * more[:, :, :1] + 1 - more[:, :, :1]
        return np.broadcast_to(255 * colour, (*colour.shape[:2], 3))
