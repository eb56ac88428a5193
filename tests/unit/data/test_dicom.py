"""DICOM: what a viewer shows by the file's window, or the numbers by a range; made by pydicom itself."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from tlscale.data.decode import EXTENSIONS, BadImageError, Reading, decode_image, header_hw
from tlscale.data.given import find_images
from tlscale.data.input_spec import resolve_input, sampled_sizes
from tlscale.data.loader import ImageStore
from tlscale.data.sources.open import open_data
from tlscale.errors import DataError
from tlscale.recipe.schema import DataSection

pydicom = pytest.importorskip("pydicom")
RANDOM = np.random.default_rng(0)


def dicom(pixels, kind="MONOCHROME2", **tags) -> bytes:
    """Bytes of a file with these pixels, H x W (x 3), and further tags by name."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID, made.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    made.Rows, made.Columns = pixels.shape[:2]
    made.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    if pixels.ndim == 3:
        made.PlanarConfiguration = 0
    made.PhotometricInterpretation = kind
    made.BitsAllocated = made.BitsStored = pixels.dtype.itemsize * 8
    made.HighBit = made.BitsStored - 1
    made.PixelRepresentation = int(pixels.dtype.kind == "i")
    made.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(made, name, value)
    file = io.BytesIO()
    made.save_as(file, enforce_file_format=True)
    return file.getvalue()


def decoded(raw, in_chans=1, value_range=None):
    return decode_image(raw, in_chans=in_chans, max_pixels=10**6, where="here", reading=Reading(value_range))


def wrong(raw, **keys) -> str:
    with pytest.raises(BadImageError) as caught:
        decoded(raw, **keys)
    return str(caught.value)


HOUNSFIELD = RANDOM.integers(-1000, 2000, (12, 9)).astype(np.int16)
CT = {"RescaleSlope": 2, "RescaleIntercept": -1024}


def stored(values):
    return ((values + 1024) // 2).astype(np.int16)


def test_a_range_is_of_the_numbers_after_slope_and_intercept():
    raw = dicom(stored(HOUNSFIELD), **CT)
    values = stored(HOUNSFIELD) * 2.0 - 1024
    expected = ((values + 160) / 400).clip(0, 1).astype(np.float32)
    assert np.array_equal(decoded(raw, value_range=(-160, 240))[:, :, 0], expected)
    assert len(np.unique(expected)) > 10
    inverted = decoded(dicom(stored(HOUNSFIELD), "MONOCHROME1", **CT), value_range=(-160, 240))
    assert np.allclose(inverted[:, :, 0], 1 - expected, atol=1e-6)
    assert header_hw(io.BytesIO(raw), "here") == (12, 9)
    assert ".dcm" in EXTENSIONS


@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_without_a_range_the_window_of_the_file_holds_as_pydicom_has_it(function):
    from pydicom.pixels import apply_rescale, apply_windowing

    tags = {**CT, "WindowCenter": [40, 300], "WindowWidth": [400, 1500]}
    raw = dicom(stored(HOUNSFIELD), **tags, **({} if function is None else {"VOILUTFunction": function}))
    file = pydicom.dcmread(io.BytesIO(raw))
    shown = apply_windowing(apply_rescale(file.pixel_array, file), file)
    low, high = -(2**15) * 2 - 1024, (2**15 - 1) * 2 - 1024  # all that 16 bits can hold
    expected = (shown - low) / (high - low) * 255
    assert np.abs(decoded(raw)[:, :, 0] - expected).max() <= 0.51
    three = decoded(raw, 3)
    assert np.array_equal(three, np.repeat(decoded(raw), 3, axis=2))
    inverted = dicom(stored(HOUNSFIELD), "MONOCHROME1", **tags)
    assert np.array_equal(decoded(inverted), 255 - decoded(dicom(stored(HOUNSFIELD), **tags)))


def test_eight_bits_and_colours_are_as_they_are():
    grey = RANDOM.integers(0, 256, (6, 8), dtype=np.uint8)
    assert np.array_equal(decoded(dicom(grey))[:, :, 0], grey)
    assert np.array_equal(decoded(dicom(grey, "MONOCHROME1"))[:, :, 0], 255 - grey)
    color = RANDOM.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    assert np.array_equal(decoded(dicom(color, "RGB"), 3), color)


def test_what_is_not_read_says_what_to_do():
    assert "a DICOM of 16 bits without a window" in (said := wrong(dicom(stored(HOUNSFIELD))))
    assert "Set data.range: [low, high]" in said
    frames = dicom(np.zeros((12, 8), np.uint8), NumberOfFrames=3, Rows=4)
    assert "a DICOM of 3 frames" in (said := wrong(frames))
    assert "a file of its own" in said
    assert "without an image" in wrong(dicom_without_pixels())
    assert "more than the" in wrong(dicom(np.zeros((2000, 2000), np.uint8)))
    raw = dicom(np.zeros((30, 30), np.uint8))
    assert "damaged or cut short" in wrong(raw[:-200])


def dicom_without_pixels() -> bytes:
    file = pydicom.dcmread(io.BytesIO(dicom(np.zeros((4, 4), np.uint8))))
    del file.PixelData
    raw = io.BytesIO()
    file.save_as(raw)
    return raw.getvalue()


def test_a_folder_of_dicom_is_data_like_any_other(tmp_path):
    for name in ("air", "bone"):
        (tmp_path / name).mkdir()
        for image in range(4):
            (tmp_path / name / f"{image}.dcm").write_bytes(dicom(stored(HOUNSFIELD[:, ::-1]), **CT))
    keys = {"source": "folder", "path": str(tmp_path), "range": [-1000, 1000], "on_bad_image": "skip"}
    section = DataSection(**keys, validation_fraction=0.0, image_size=[12, 9])
    data = open_data(section, 0)
    assert len(data.train) == 8
    sizes = sampled_sizes(data.train.table)
    assert set(sizes) == {(12, 9)}
    spec = resolve_input(section, in_chans=1, pretrained_cfg={}, sizes=sizes)
    images = ImageStore(data.train, section, spec).images(np.arange(8))
    expected = ((stored(HOUNSFIELD[:, ::-1]) * 2.0 - 1024 + 1000) / 2000).clip(0, 1).astype(np.float32)
    assert torch.equal(images, torch.from_numpy(expected).expand(8, 1, -1, -1))
    assert len(list(find_images([tmp_path], print))) == 8


def test_originals_beside_their_pictures_are_not_trained_on(tmp_path):
    for name in ("train/air/1.dcm", "train/bone/1.dcm", "test/air/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    with pytest.raises(DataError, match=r"several kinds by their endings: pictures, such as 'test/air/1.png'; DICOM"):
        open_data(DataSection(source="folder", path=str(tmp_path)), 0)


def test_what_is_there_and_empty_is_not_there():
    grey = RANDOM.integers(0, 256, (6, 8), dtype=np.uint8)
    empty = dict.fromkeys(("WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept", "PixelPaddingValue"))
    assert np.array_equal(decoded(dicom(grey, **empty))[:, :, 0], grey)
    assert "without a window" in wrong(dicom(stored(HOUNSFIELD), **CT, WindowCenter=40, WindowWidth=None))
    raw = dicom(stored(HOUNSFIELD), RescaleSlope=None, RescaleIntercept=-1024)
    assert np.array_equal(
        decoded(raw, value_range=(-2000, 2000)), decoded(dicom_of_intercept(), value_range=(-2000, 2000))
    )


def dicom_of_intercept() -> bytes:
    return dicom(stored(HOUNSFIELD), RescaleSlope=1, RescaleIntercept=-1024)


@pytest.mark.parametrize("alone", [{"RescaleIntercept": -1024}, {"RescaleSlope": 3}])
def test_slope_and_intercept_hold_each_by_itself(alone):
    values = stored(HOUNSFIELD) * float(alone.get("RescaleSlope", 1)) + alone.get("RescaleIntercept", 0)
    found = decoded(dicom(stored(HOUNSFIELD), **alone), value_range=(-2000, 5000))
    assert np.array_equal(found[:, :, 0], ((values + 2000) / 7000).clip(0, 1).astype(np.float32))


@pytest.mark.parametrize("padding", [{"PixelPaddingValue": 0}, {"PixelPaddingValue": 3, "PixelPaddingRangeLimit": 0}])
def test_padding_is_black_where_numbers_are_turned_round(padding):
    numbers = np.arange(60, dtype=np.uint16).reshape(6, 10)
    raw = dicom(numbers, "MONOCHROME1", WindowCenter=30, WindowWidth=60, **padding)
    is_padding = numbers <= padding["PixelPaddingValue"]
    plain = decoded(dicom(numbers, "MONOCHROME1", WindowCenter=30, WindowWidth=60))
    for found, other in (
        (decoded(raw), plain),
        (decoded(raw, value_range=(0, 60)), decoded(dicom(numbers, "MONOCHROME1"), value_range=(0, 60))),
    ):
        assert not found[is_padding].any()
        assert np.array_equal(found[~is_padding], other[~is_padding])
        assert found.dtype == other.dtype
    unsigned = dicom(HOUNSFIELD, "MONOCHROME1")
    file = pydicom.dcmread(io.BytesIO(unsigned))
    file.add_new("PixelPaddingValue", "US", int(HOUNSFIELD.astype(np.uint16)[0, 0]))
    out = io.BytesIO()
    file.save_as(out)
    assert decoded(out.getvalue(), value_range=(-5000, 5000))[0, 0, 0] == 0


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_a_window_of_no_width_is_none(function):
    tags = {"WindowCenter": 40, "WindowWidth": 0, "VOILUTFunction": function}
    assert "without a window" in wrong(dicom(stored(HOUNSFIELD), **tags))
    grey = RANDOM.integers(0, 256, (6, 8), dtype=np.uint8)
    assert np.array_equal(decoded(dicom(grey, **tags))[:, :, 0], grey)
    assert decoded(dicom(grey, WindowCenter=128, WindowWidth="0.1", VOILUTFunction="SIGMOID")).max() == 255
