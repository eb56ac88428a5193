"""Make a messy folder of about 90 pictures, as people have them, from photos that scikit-learn and matplotlib ship.

    python examples/messy_photos.py FOLDER

Three classes of crops: many formats and sizes, transparent, CMYK, grey, 16-bit and turned by EXIF; with a folder in a
class folder, files that are no images, two that are broken, one in no class, an empty folder, and copies, one of them
with another label. The same bytes each time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy as np
import sklearn
from PIL import Image

PHOTOS = {
    "temple": Path(sklearn.__file__).parent / "datasets" / "images" / "china.jpg",
    "flower": Path(sklearn.__file__).parent / "datasets" / "images" / "flower.jpg",
    "portrait": Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg",
}
COUNTS = {"temple": 41, "flower": 33, "portrait": 12}
_TURNED = 6  # EXIF: turn right


def make_messy_folder(folder: Path) -> Path:
    """Write the pictures into a new folder, and return it."""
    folder.mkdir(parents=True)
    for label, count in COUNTS.items():
        picture = Image.open(PHOTOS[label]).convert("RGB")
        for number in range(count):
            place = folder / label / "close" if label == "flower" and number % 8 == 0 else folder / label
            place.mkdir(parents=True, exist_ok=True)
            save_as(crop_of(picture, np.random.default_rng([number, count])), place / f"IMG_{number:04}", number)
    _make_a_mess(folder)
    return folder


def crop_of(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    width, height = (int(side * rng.uniform(0.35, 0.7)) for side in picture.size)
    left, top = int(rng.integers(picture.width - width)), int(rng.integers(picture.height - height))
    crop = picture.crop((left, top, left + width, top + height))
    return crop.point(lambda value: min(255, int(value * light))) if (light := rng.uniform(0.7, 1.2)) else crop


def save_as(picture: Image.Image, place: Path, number: int) -> None:
    """Write one picture in one of ten ways."""
    match number % 10:
        case 0:
            picture.save(place.with_suffix(".png"))
        case 1:
            alpha = Image.linear_gradient("L").resize(picture.size)
            picture.putalpha(alpha)
            picture.save(place.with_suffix(".PNG"))
        case 2:
            picture.convert("CMYK").save(place.with_suffix(".jpg"), quality=92)
        case 3:
            exif = Image.Exif()
            exif[0x0112] = _TURNED
            picture.transpose(Image.Transpose.ROTATE_90).save(place.with_suffix(".jpeg"), exif=exif, quality=92)
        case 4:
            wide = np.asarray(picture.convert("L")).astype(np.uint16) * 257
            Image.fromarray(wide).save(place.with_suffix(".png"))
        case 5:
            picture.save(place.with_suffix(".tif"))
        case 6:
            picture.convert("L").save(place.with_suffix(".jpg"), quality=92)
        case 7:
            picture.save(place.with_suffix(".webp"), quality=90)
        case _:
            picture.save(place.with_suffix(".JPG"), quality=92)


def _make_a_mess(folder: Path) -> None:
    whole = (folder / "portrait" / "IMG_0008.JPG").read_bytes()
    (folder / "portrait" / "IMG_0100.jpg").write_bytes(whole[: len(whole) * 3 // 5])
    (folder / "temple" / "IMG_0101.png").write_text("<html>404</html>")
    (folder / "temple" / "notes.txt").write_text("the one by the lake is from last year\n")
    (folder / "IMG_0102.jpg").write_bytes((folder / "flower" / "IMG_0009.JPG").read_bytes())
    (folder / "temple" / "copy of IMG_0008.JPG").write_bytes((folder / "temple" / "IMG_0008.JPG").read_bytes())
    (folder / "flower" / "IMG_0103.jpg").write_bytes((folder / "temple" / "IMG_0009.JPG").read_bytes())
    (folder / "to sort").mkdir()
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(make_messy_folder(Path(sys.argv[1])))
