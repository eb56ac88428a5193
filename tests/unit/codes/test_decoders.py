"""Which packages' versions are part of the address of codes, beside Pillow's."""

import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tlscale.codes import decoders
from tlscale.data.input_spec import InputSpec
from tlscale.data.sources.stores import FileStore
from tlscale.data.sources.tables import ImageSplit, LabelledTable

PLAIN = InputSpec(32, 3, (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)
WIDE = InputSpec(32, 3, (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, range=(0, 4095))


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(file, kind)
    return file.getvalue()


KINDS = {"png": encoded("PNG"), "tif": encoded("TIFF"), "dcm": bytes(128) + b"DICM", "gone": None, "npy": b"\x93NUMPY"}


@pytest.mark.parametrize("kind", KINDS)
def test_versions_are_of_what_decodes_the_images(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(decoders, "READS_DICOM", True)  # as where pydicom is installed
    if KINDS[kind] is not None:
        (tmp_path / "0").write_bytes(KINDS[kind])
    store = FileStore(str(tmp_path), pa.array(["0"], pa.large_string()), "", np.zeros((1, 5), np.int64), 0)
    split = ImageSplit("train", LabelledTable(store, np.zeros(1, np.int64)), np.arange(1))
    first = [(decoders.decoders_of(split, spec) or ("",))[0] for spec in (PLAIN, WIDE)]
    assert first == {"tif": ["", "tifffile"], "dcm": ["pydicom"] * 2}.get(kind, ["", ""])
