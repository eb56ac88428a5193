"""`tlscale new` on images of other numbers and channels than 8 bits of grey or RGB: a recipe that runs as it is."""

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import tlscale
from tlscale.cli import main
from tlscale.commands.new import new

SHAPE = (24, 20)


def dicom(path, numbers_HW, kind="MONOCHROME2"):
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    tags = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    tags.Rows, tags.Columns = numbers_HW.shape
    tags.SamplesPerPixel, tags.PhotometricInterpretation = 1, kind
    tags.BitsAllocated, tags.BitsStored, tags.HighBit, tags.PixelRepresentation = 16, 12, 11, 0
    tags.RescaleSlope, tags.RescaleIntercept = 1, -1024
    tags.SOPClassUID, tags.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    tags.PixelData = numbers_HW.astype(np.uint16).tobytes()
    tags.save_as(path, enforce_file_format=True)


def tiff(path, numbers_HWC):
    pytest.importorskip("tifffile").imwrite(path, numbers_HWC, photometric="minisblack", planarconfig="contig")


def png16(path, numbers_HW):
    Image.fromarray(numbers_HW).save(path)


def array(path, numbers):
    np.save(path, numbers)


KINDS = {
    # name: the ending, what writes an image, its numbers, and keys of the recipe
    "bands": (".npy", array, lambda draws: draws.integers(0, 3900, (*SHAPE, 5)).astype(np.uint16), ([0, 4095], 5)),
    "first": (".npy", array, lambda draws: draws.integers(0, 256, (5, *SHAPE)).astype(np.uint8), (None, 5)),
    "float": (".npy", array, lambda draws: draws.normal(size=SHAPE).clip(-2, 2).astype(np.float32), ("found", 3)),
    "tiff": (".tif", tiff, lambda draws: draws.integers(0, 60_000, (*SHAPE, 6)).astype(np.uint16), ([0, 65_535], 6)),
    "dark": (".png", png16, lambda draws: draws.integers(0, 4000, SHAPE).astype(np.uint16), ([0, 4095], 3)),
    "full": (".png", png16, lambda draws: draws.integers(0, 65_536, SHAPE).astype(np.uint16), (None, 3)),
    "dicom": (".dcm", dicom, lambda draws: draws.integers(0, 2000, SHAPE), ("found", 3)),
    "turned": (".dcm", lambda *w: dicom(*w, "MONOCHROME1"), lambda d: d.integers(0, 2000, SHAPE), ("found", 3)),
}


def put(folder, name, count=6, seed=0):
    """Write two classes, the second with a bright side."""
    ending, write, draw, _ = KINDS[name]
    draws, least, most = np.random.default_rng(seed), np.inf, -np.inf
    for label in ("ash", "oak"):
        (folder / label).mkdir(parents=True)
        for number in range(count):
            numbers = draw(draws)
            least, most = min(least, numbers.min()), max(most, numbers.max())
            write(folder / label / f"{number}{ending}", numbers)
    return float(least), float(most)


@pytest.mark.parametrize("name", KINDS)
def test_the_recipe_has_the_range_and_the_channels_of_the_images(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    least, most = put(tmp_path / "photos", name)
    ran = CliRunner().invoke(main, ["new", "photos"], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    recipe = tlscale.load_recipe("photos.yaml")
    value_range, channels = KINDS[name][3]
    if value_range == "found":
        value_range = [least - 1024, most - 1024] if name[0] == "d" or name == "turned" else [least, most]
    assert recipe.data.exclude is None
    assert (recipe.data.range and list(recipe.data.range)) == (value_range and pytest.approx(value_range))
    assert recipe.backbone.in_chans == channels
    assert recipe.data.channels_first == (name == "first")
    text = (tmp_path / "photos.yaml").read_text()
    assert ("# range: the numbers (" in text) == (value_range is not None)
    planned = CliRunner().invoke(main, ["plan", "photos.yaml"], catch_exceptions=False)
    assert planned.exit_code == 0, planned.output
    said = " ".join(planned.output.split())
    if value_range is not None:
        assert f"data.range: {value_range[0]:g} is black and {value_range[1]:g} is white" in said
    bits = {"bands": "16 bits", "first": "8 bits", "float": "32-bit floating point", "dicom": "12 bits"}
    assert f"numbers {bits.get(name, {'turned': '12 bits'}.get(name, '16 bits'))}" in said
    assert ("16 bits are scaled to 8" in said) == (name == "full")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bands", "dicom"])
def test_such_a_recipe_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "photos", name)
    new("photos", out="photos.yaml")
    done = tlscale.run(tlscale.load_recipe("photos.yaml"), tmp_path / "run")
    assert done["num_images"] == 12


def test_what_does_not_go_with_the_others_is_left_out_and_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "photos", "bands")
    np.save(tmp_path / "photos" / "ash" / "rgb.npy", np.full((*SHAPE, 4), 7, np.uint16))
    np.save(tmp_path / "photos" / "ash" / "nan.npy", np.full((*SHAPE, 5), np.nan))
    said = CliRunner().invoke(main, ["new", "photos"], catch_exceptions=False).output
    assert "ash/rgb.npy: it has 4 channels, and most have 5" in said
    assert "ash/nan.npy" in said
    assert tlscale.load_recipe("photos.yaml").data.range == [0, 4095]


def test_grey_of_16_and_of_8_bits_together_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "photos", "dark")
    Image.fromarray(np.arange(480, dtype=np.uint8).reshape(SHAPE)).save(tmp_path / "photos" / "ash" / "grey.png")
    said = " ".join(CliRunner().invoke(main, ["new", "photos"], catch_exceptions=False).output.split())
    assert "12 images are grey of 16 bits and others of 8" in said
    assert tlscale.load_recipe("photos.yaml").data.range is None


def test_images_that_a_model_does_not_take_are_told_without_keys_of_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "photos", "bands")
    keys = ["data.range=[0,4095]", "backbone.in_chans=5", "data.image_size=32", "data.validation_fraction=0.3"]
    (tmp_path / "r.yaml").write_text(
        "name: r\ndata: {source: folder, path: photos}\nbackbone: {name: test_resnet, weights: none}\n"
        "probe: {kind: ridge}\n"
    )
    tlscale.run(tlscale.load_recipe("r.yaml", keys), tmp_path / "run")
    Image.new("RGB", (30, 30)).save(tmp_path / "rgb.png")
    made = tlscale.load(tmp_path / "run").predict([tmp_path / "rgb.png", tmp_path / "photos" / "ash" / "0.npy"])
    assert made.errors == ["it has 3 channels (30 x 30 x 3), and the network takes 5", None]
