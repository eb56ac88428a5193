"""Cache the decoded images of a run: each split is decoded once in this process, and stays in memory where it fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from functools import partial

from tlscale.data.loader import ImageStore
from tlscale.data.sources.open import ImageData, ImageSplit
from tlscale.data.transforms import InputSpec
from tlscale.recipe.schema import DataSection
from tlscale.tracking.console import Pace
from tlscale.tracking.stopwatch import Stopwatch


@dataclass
class ImageCache:
    """Open the image stores of a run's splits when they are first asked for, and keep them open."""

    data: ImageData
    section: DataSection
    spec: InputSpec
    _: KW_ONLY
    crops: bool
    """Training cuts its images at random, and so needs them in their own size."""
    watch: Stopwatch
    """Measures decoding."""
    say: Callable[[str], None] = lambda text: None
    """Reports the progress of decoding."""
    _stores: dict[str, ImageStore] = field(default_factory=dict)

    def train(self, num_seen: int | None = None) -> ImageStore:
        """Return the training images as training wants them.

        Args:
            num_seen: how many will be used, an image that is used again counted again. Where that is less than there
                are, decoding all of them beforehand would be for nothing. None: all of them.

        Raises:
            DataError: an image cannot be read.
        """
        split = self.data.train
        keep = num_seen is None or num_seen >= len(split) or "train" in self._stores
        return self._store("train" if keep else "few of train", split, crops=self.crops, keep=keep)

    def of(self, split: ImageSplit) -> ImageStore:
        """Return the images of a split as evaluation wants them.

        Raises:
            DataError: an image cannot be read.
        """
        return self._store(f"{split.name}, evaluated", split)

    def uncached(self, split: ImageSplit, *, crops: bool = False) -> ImageStore:
        """Return a split's images as evaluation (with `crops`, training) wants them, for one pass: none is cached."""
        return ImageStore(split, self.section.model_copy(update={"cache_mib": 0}), self.spec, crops=crops)

    def _store(self, name: str, split: ImageSplit, *, crops: bool = False, keep: bool = True) -> ImageStore:
        if name not in self._stores:
            # Looked up when it is called: `say` changes with the console.
            pace = Pace(len(split), lambda text: self.say(text), f"decoding {split.name}")
            make = partial(ImageStore, split, self.section, self.spec, crops=crops, keep=keep, on_images=pace.add)
            with self.watch("decode"):
                self._stores[name] = make()
        return self._stores[name]
