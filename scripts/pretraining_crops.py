"""Crops of pictures, and letters drawn in fonts, by chance.

Part of make_pretraining_images.py. Promise: a crop is a function of its sources and of the state of the generator that
it is given, to the bit, with the same Pillow and NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

LEAST_CROP_DETAIL = 2.0
"""Mean step between neighbours in a thumbnail, of 255: below are sky, shadow and strokes too thin to be seen."""
LEAST_CONTRAST = 70.0
"""Between the brightness of ink and ground, of 255."""
TRIES = 10
FONT_PX = 120

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
SYMBOLS = "".join(map(chr, [*range(0x25A0, 0x2600), *range(0x2600, 0x2700), *range(0x2701, 0x2768)]))
"""Shapes, signs and ornaments; those with digits come after these."""
NO_CHARACTER = "\uffff"
"""What fonts draw in place of a character that they lack, they draw for this one."""

Pixels = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]
Rng = np.random.Generator


@dataclass(frozen=True)
class Picture:
    """A picture in memory, RGB; or RGBA where it is a thing cut out of its ground."""

    name: str
    kind: str
    image: Image.Image


@dataclass(frozen=True)
class Typeface:
    """A font file with Latin letters."""

    name: str
    path: Path

    @cached_property
    def font(self) -> ImageFont.FreeTypeFont:
        return load_font(self.path, FONT_PX)

    @cached_property
    def symbols(self) -> str:
        small = load_font(self.path, 16)
        missing = bytes(small.getmask(NO_CHARACTER))
        masks = {character: bytes(small.getmask(character)) for character in SYMBOLS}
        return "".join(character for character, mask in masks.items() if any(mask) and mask != missing)


@dataclass(frozen=True)
class Pool:
    """What one split is made of."""

    pictures: Sequence[Picture]
    typefaces: Sequence[Typeface]

    @cached_property
    def chances(self) -> npt.NDArray[np.float64]:
        """Of each picture to be cropped: a large one holds more to be seen than a small one, but not by its area."""
        sides = [(picture.image.width * picture.image.height) ** 0.5 for picture in self.pictures]
        total = sum(sides)
        return np.array([side / total for side in sides])

    @cached_property
    def symbolic(self) -> list[Typeface]:
        return [typeface for typeface in self.typefaces if len(typeface.symbols) >= 30]

    def picture(self, rng: Rng) -> Picture:
        return self.pictures[int(rng.choice(len(self.pictures), p=self.chances))]


def picture_crop(picture: Picture, size: int, rng: Rng) -> Image.Image:
    """Draw a random-resized crop, flipped and turned; try again where there is next to nothing in it."""
    make = cut_out if picture.image.mode == "RGBA" else resized_crop
    for _ in range(TRIES):
        crop = make(picture.image, size, rng)
        if detail(thumbnail_of(crop)) >= LEAST_CROP_DETAIL:
            break
    return ImageOps.mirror(crop) if rng.random() < 0.5 else crop


def resized_crop(image: Image.Image, size: int, rng: Rng, least_area: float = 0.04) -> Image.Image:
    """`least_area` to all of the picture's area, evenly in its logarithm; aspect 3/4 to 4/3; some turned."""
    area = image.width * image.height * log_uniform(rng, least_area, 1)
    aspect = log_uniform(rng, 3 / 4, 4 / 3)
    width = min((area * aspect) ** 0.5, image.width)
    height = min((area / aspect) ** 0.5, image.height)
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    box = (left, top, left + width, top + height)
    if rng.random() < 0.75:
        return image.resize((size, size), Image.Resampling.LANCZOS, box, reducing_gap=3.0)
    larger = image.resize((size * 3 // 2,) * 2, Image.Resampling.LANCZOS, box, reducing_gap=3.0)
    return turned(larger, size, rng)


def turned(square: Image.Image, size: int, rng: Rng) -> Image.Image:
    """Cut the middle of a square that is at least 1.42 times as large, so that no corner is empty."""
    angle = rng.uniform(-30, 30) + 90 * (rng.integers(4) if rng.random() < 0.4 else 0)
    middle = (square.width - size) // 2
    return square.rotate(angle, Image.Resampling.BICUBIC).crop((middle, middle, middle + size, middle + size))


def cut_out(image: Image.Image, size: int, rng: Rng) -> Image.Image:
    """Crop a thing on a plain ground: mostly the whole of it with a margin, else a part."""
    if rng.random() < 0.35:
        part = resized_crop(image, size, rng, least_area=0.15)
    else:
        side = max(image.size) * rng.uniform(1.0, 1.5)
        aspect = log_uniform(rng, 0.8, 1.25)
        width, height = side * max(1, aspect), side * max(1, 1 / aspect)
        left, top = -rng.uniform(0, width - image.width), -rng.uniform(0, height - image.height)
        whole = image.crop((round(left), round(top), round(left + width), round(top + height)))
        part = whole.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)
        if rng.random() < 0.25:
            part = part.rotate(rng.uniform(-30, 30), Image.Resampling.BICUBIC)
    ground = Image.new("RGBA", part.size, (*ground_colour(rng), 255))
    return Image.alpha_composite(ground, part).convert("RGB")


def letter_crop(typeface: Typeface, pool: Pool, size: int, rng: Rng, symbol: bool = False) -> Image.Image:
    """One to three letters, or a symbol, over a plain colour or a picture; another try where they are hard to see."""
    for _ in range(TRIES):
        mask = letter_mask(typeface.font, letter_text(rng, typeface.symbols if symbol else LETTERS, symbol), rng)
        ground, ink = ground_and_ink(pool, size, rng)
        crop = Image.composite(ink, ground, placed(mask, size, rng))
        if detail(thumbnail_of(crop)) >= LEAST_CROP_DETAIL:
            break
    return crop


def placed(mask: Image.Image, size: int, rng: Rng) -> Image.Image:
    """Place the mask on a square, from a third of its side to a little more than all, a little stretched."""
    scale = size * rng.uniform(0.35, 1.1) / max(mask.size)
    stretch = log_uniform(rng, 0.9, 1.1)
    width, height = max(round(mask.width * scale * stretch), 3), max(round(mask.height * scale / stretch), 3)
    square = Image.new("L", (size, size))
    resized = mask.resize((width, height), Image.Resampling.LANCZOS)
    square.paste(resized, (random_place(size - width, rng), random_place(size - height, rng)))
    return square


def random_place(room: int, rng: Rng) -> int:
    """Where to begin so that all is inside; or, where it is too large, so that no room is left."""
    return int(rng.integers(min(room, 0), max(room, 0) + 1))


def letter_text(rng: Rng, characters: str, alone: bool) -> str:
    num = 1 if alone else int(rng.choice([1, 2, 3], p=[0.6, 0.25, 0.15]))
    return "".join(characters[int(rng.integers(len(characters)))] for _ in range(num))


def letter_mask(font: ImageFont.FreeTypeFont, text: str, rng: Rng) -> Image.Image:
    """Draw the ink of a text, 0..255, turned and cut to what is drawn."""
    style = rng.choice(["filled", "thick", "outline"], p=[0.6, 0.2, 0.2])
    stroke = 0 if style == "filled" else int(rng.integers(2, 9))
    left, top, right, bottom = (int(edge) for edge in font.getbbox(text, stroke_width=stroke))
    mask = Image.new("L", (right - left, bottom - top))
    draw = ImageDraw.Draw(mask)
    draw.text((-left, -top), text, 255, font, stroke_width=stroke)
    if style == "outline":
        # A stroke lies around the point where the text without one is drawn, so the two are one upon the other.
        draw.text((-left, -top), text, 0, font)
    if rng.random() < 0.5:
        mask = mask.rotate(float(rng.normal(0, 15)), Image.Resampling.BICUBIC, expand=True)
    return mask.crop(mask.getbbox())


def ground_and_ink(pool: Pool, size: int, rng: Rng) -> tuple[Image.Image, Image.Image]:
    """Two images whose brightness differs enough for a letter to be seen."""
    kind = rng.choice(["plain", "picture ground", "picture ink"], p=[0.45, 0.42, 0.13])
    ground, ink = (Image.new("RGB", (size, size), ground_colour(rng)) for _ in range(2))
    if kind == "picture ground":
        ground = picture_crop(pool.picture(rng), size, rng)
    elif kind == "picture ink":
        ink = picture_crop(pool.picture(rng), size, rng)
    for _ in range(TRIES):
        if abs(brightness(ground) - brightness(ink)) >= LEAST_CONTRAST:
            break
        plain = Image.new("RGB", (size, size), ground_colour(rng))
        ground, ink = (plain, ink) if kind == "picture ink" else (ground, plain)
    return ground, ink


def ground_colour(rng: Rng) -> Colour:
    """Black, white, a grey, or any colour."""
    choice = rng.random()
    if choice < 0.3:
        return (0, 0, 0) if choice < 0.15 else (255, 255, 255)
    red, green, blue = (int(value) for value in rng.integers(256, size=3))
    return (red, red, red) if choice < 0.45 else (red, green, blue)


def log_uniform(rng: Rng, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def brightness(image: Image.Image) -> float:
    return float(np.asarray(image.convert("L")).mean())


def thumbnail_of(image: Image.Image) -> Pixels:
    """24 x 24 pixels, over grey."""
    small = image.convert("RGBA").resize((24, 24), Image.Resampling.BOX)
    return np.asarray(Image.alpha_composite(Image.new("RGBA", small.size, (128, 128, 128, 255)), small).convert("RGB"))


def detail(thumbnail: Pixels) -> float:
    """Mean absolute difference of neighbours."""
    values = thumbnail.astype(np.float64)
    return float((np.abs(np.diff(values, axis=0)).mean() + np.abs(np.diff(values, axis=1)).mean()) / 2)


def load_font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    # The other layout engine is an optional library of Pillow's, with which the pixels would differ.
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
