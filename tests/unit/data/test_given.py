"""Images that somebody gives: how they are found, and that they are read as a run reads its own."""

import io

import numpy as np
import pytest
from PIL import Image

from tlscale.data.decode import decode_image
from tlscale.data.given import find_images, lines_of, name_of, read_given
from tlscale.data.input_spec import InputSpec
from tlscale.data.transforms import eval_transform

SPEC = InputSpec(16, 3, (0.5,) * 3, (0.5,) * 3, "bilinear", 0.875)


def found(*places, notes=None, **options):
    return list(find_images(places, [].append if notes is None else notes.append, **options))


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in ("b.png", "a.JPG", "10/x.png", "9/y.tif", "9/deep/z.webp", "9/notes.txt", ".hidden/h.png", "Thumbs.db"):
        (tmp_path / "t" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "t" / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)


def test_a_folder_is_searched_in_the_order_of_a_runs_classes(tree):
    assert found("t") == ["t/a.JPG", "t/b.png", "t/9/y.tif", "t/9/deep/z.webp", "t/10/x.png"]


def test_globs_files_and_folders_come_as_they_are_named(tree):
    assert found("t/10", "t/*.png", "gone.png", "t/9/notes.txt", "t/b.png") == [
        "t/10/x.png", "t/b.png", "gone.png", "t/9/notes.txt", "t/b.png",
    ]  # fmt: skip
    assert found("t/**/*.tif") == ["t/9/y.tif"]


def test_a_name_with_the_signs_of_a_glob_is_a_name_where_it_is_there(tree, tmp_path):
    (tmp_path / "a[1].png").write_bytes(b"")
    assert found("a[1].png") == ["a[1].png"]
    assert found("b[1].png", expand=False) == ["b[1].png"]


def test_what_is_passed_over_is_told(tree, tmp_path):
    """Else a camera's raw files would be missing without a word."""
    notes = []
    (tmp_path / "t" / "IMG.CR3").write_bytes(b"")
    assert len(found("t", notes=notes)) == 5
    assert notes == ["'t': passed over 2 files without an image's ending, such as 'IMG.CR3'"]


def test_what_is_empty_is_told(tree, tmp_path):
    notes = []
    (tmp_path / "empty").mkdir()
    assert found("empty", "no*thing", notes=notes) == []
    assert notes == ["'empty' has no images", "nothing matches 'no*thing'"]


def test_links_in_a_circle_end(tree, tmp_path):
    (tmp_path / "t" / "10" / "round").symlink_to(tmp_path / "t")
    assert found("t/10") == ["t/10/x.png", "t/10/round/a.JPG", "t/10/round/b.png", "t/10/round/9/y.tif",
                             "t/10/round/9/deep/z.webp"]  # fmt: skip


def test_a_list_has_a_path_a_line():
    assert list(lines_of(io.BytesIO(b"a b.png\r\n\nc.png\n  \r\n=d.png"))) == ["a b.png", "c.png", "=d.png"]
    assert list(lines_of(io.BytesIO(b"\xef\xbb\xbfa.png\r\n b.png \r\n"))) == ["a.png", " b.png "], "of Notepad"


def put_odd_images(folder):
    """One of each kind that Pillow's convert('RGB') gets wrong, as files."""
    colours = np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb = Image.fromarray(colours[..., :3])
    rgb.save(folder / "turned.jpg", exif=exif)
    rgb.save(folder / "turned.png", exif=exif)
    Image.fromarray(colours).save(folder / "clear.png")
    rgb.quantize(8).save(folder / "palette.png", transparency=3)
    Image.fromarray(colours[..., :2].copy().view(np.uint16)[..., 0]).save(folder / "deep.png")
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    rgb.convert("1").save(folder / "bits.tif")
    return sorted(folder.iterdir())


def as_a_run_reads(path):
    return eval_transform(decode_image(path.read_bytes(), in_chans=3, max_pixels=10**6, where=""), SPEC)


@pytest.mark.parametrize("kind", ["path", "bytes", "opened", "loaded", "from bytes"])
def test_images_are_read_as_a_run_reads_its_own(kind, tmp_path):
    paths = put_odd_images(tmp_path)

    def given(path):
        if kind == "path":
            return str(path)
        if kind == "bytes":
            return path.read_bytes()
        image = Image.open(path if kind != "from bytes" else io.BytesIO(path.read_bytes()))
        if kind == "loaded":
            image.load()
        return image

    images = [given(path) for path in paths]
    pixels, errors = read_given(images, SPEC, 10**6)
    for image in images if kind not in ("path", "bytes") else ():
        image.close()
    assert errors == [None] * len(paths)
    for path, own in zip(paths, pixels, strict=True):
        np.testing.assert_array_equal(own, as_a_run_reads(path), err_msg=path.name)


def test_what_pillow_holds_is_left_as_it_was(tmp_path):
    image = Image.open(put_odd_images(tmp_path)[-1])
    before = image.tobytes()  # which decodes it
    read_given([image], SPEC, 10**6)
    assert image.tobytes() == before
    assert name_of(image) == str(tmp_path / "turned.png")


def test_what_cannot_be_read_is_a_reason(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG nothing")
    given = [str(tmp_path / "a.png"), np.zeros((3, 3, 3), np.uint8), str(tmp_path / "b.png"), np.zeros((2, 2))]
    pixels, errors = read_given(given, SPEC, 10**6)
    assert len(pixels) == 1
    assert errors[1] is None
    assert errors[2] == "cannot be read: No such file or directory"
    assert errors[0].startswith("not an image of the formats")
    assert "float64" in errors[3]
