"""Find and read images that somebody gives: by path, by folder, by glob, or in memory.

Promise: they are found one after the other and never listed as a whole, in an order that the names alone decide; and
they become pixels by the functions that read a run's own images. What cannot be read is a reason, and no exception.
"""

from __future__ import annotations

import codecs
import glob
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile

from tlscale.data.decode import ARRAYS, EXTENSIONS, BadImageError, Pixels, decode_image
from tlscale.data.input_spec import InputSpec
from tlscale.data.sources.folder import LEFT_BY_DESKTOPS
from tlscale.data.sources.labels import sort_labels
from tlscale.data.sources.stores import read_image_file
from tlscale.data.transforms import eval_transform
from tlscale.data.views import CENTER
from tlscale.data.workers import map_in_threads
from tlscale.errors import one_line

InMemory = Image.Image | npt.NDArray[Any]
Given = str | bytes | InMemory
"""A path, the bytes of an image file, or an image."""


def find_images(
    places: Iterable[str | os.PathLike[str]], note: Callable[[str], None], *, expand: bool = True
) -> Iterator[str]:
    """Give the paths of images: files as they are named, folders searched through, globs expanded.

    A file that is named is tried whatever its name ends in; in folders endings tell images. What is not there comes as
    it is, to be reported when it is read. Of arrays (`.npy`) a folder is searched where it has no other images.

    Args:
        note: is told of folders and globs in which nothing is found, and of folders that cannot be listed.
        expand: whether a name that is not there may be a glob.
    """
    for given in places:
        place = os.fspath(given)
        if os.path.isdir(place):
            yield from _Search(place, note).images()
        elif expand and (matches := matches_of(place)) is not None:
            if not matches:
                note(f"nothing matches '{place}'")
            for match in matches:
                yield from find_images([match], note)
        else:
            yield place


def matches_of(place: str) -> list[str] | None:
    """Return what a glob matches, which a shell leaves as it is in quotes; None of a name that is none, or is there."""
    if not glob.has_magic(place) or os.path.lexists(place):
        return None
    return sorted(glob.glob(os.path.expanduser(place), recursive=True))


def lines_of(file: BinaryIO) -> Iterator[str]:
    """Give paths from a list, one a line; lines of blanks are skipped, and the mark with which Windows begins UTF-8."""
    for number, line in enumerate(file):
        path = os.fsdecode((line if number else line.removeprefix(codecs.BOM_UTF8)).rstrip(b"\r\n"))
        if path.strip():
            yield path


class _Search:
    """Search a folder through, and tell what was passed over."""

    def __init__(self, folder: str, note: Callable[[str], None]) -> None:
        self._folder, self._note = folder, note
        self._endings, self._num_others, self._other = EXTENSIONS, 0, ""

    def images(self) -> Iterator[str]:
        found = False
        for self._endings in (EXTENSIONS, ARRAYS):
            self._num_others, self._other = 0, ""
            for path in self._below(self._folder, ()):
                found = True
                yield path
            if found:
                break
        else:
            self._note(f"'{self._folder}' has no images")
        if self._num_others:
            others = "a file" if self._num_others == 1 else f"{self._num_others:,} files"
            self._note(f"'{self._folder}': passed over {others} without an image's ending, such as '{self._other}'")

    def _below(self, folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
        """Give the images of a folder, then those of the folders in it, in the order in which a run sorts classes."""
        try:
            status = os.stat(folder)
            files, folders = self._listed(folder)
        except OSError as error:
            if self._endings is ARRAYS:
                return  # which was told
            self._note(f"'{folder}' cannot be listed: {error.strerror or error}")
            return
        own = status.st_dev, status.st_ino
        if own in above:
            return  # links that go round in a circle
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in self._endings:
                yield os.path.join(folder, name)
            else:
                self._num_others, self._other = self._num_others + 1, self._other or name
        for name in sort_labels(folders):
            yield from self._below(os.path.join(folder, name), (*above, own))

    def _listed(self, folder: str) -> tuple[list[str], list[str]]:
        files: list[str] = []
        folders: list[str] = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.name not in LEFT_BY_DESKTOPS:
                    (folders if os.path.isdir(entry.path) else files).append(entry.name)
        return files, folders


def name_of(given: Given) -> str:
    """Return what an image is called in predictions: its path; of one in memory its file's, if it has one."""
    if isinstance(given, str):
        return given
    return str(getattr(given, "filename", "") or "")


def read_given(
    images: Sequence[Given], spec: InputSpec, max_pixels: int, places: Sequence[str] = (CENTER,)
) -> tuple[list[Pixels], list[str | None]]:
    """Read images as a run reads those that it evaluates, cropped at these places.

    Returns:
        Those that can be read, each as `eval_transform` gives it; and for each given one why it cannot, or None.
    """

    def read(given: Given) -> Pixels | str:
        where = one_line(name_of(given))
        try:
            pixels = decode_image(
                _raw(given, where), in_chans=spec.in_chans, max_pixels=max_pixels, where=where, reading=spec.reading
            )
            return eval_transform(pixels, spec, places)
        except BadImageError as error:
            return getattr(error.why, "of_model", error.why)

    read_B = list(map_in_threads(read, images))
    pixels_B = [pixels for pixels in read_B if not isinstance(pixels, str)]
    return pixels_B, [pixels if isinstance(pixels, str) else None for pixels in read_B]


def _raw(given: Given, where: str) -> bytes | InMemory:
    if isinstance(given, str):
        return read_image_file(Path(given), where)
    if isinstance(given, bytes):
        return given
    # What Pillow has opened and not yet decoded is its file, of which more is known than Pillow tells.
    name = getattr(given, "filename", "")
    if isinstance(given, ImageFile.ImageFile) and given.tile and name and os.path.isfile(name):
        return read_image_file(Path(name), where)
    return given if not isinstance(given, np.ndarray) else np.ascontiguousarray(given)
