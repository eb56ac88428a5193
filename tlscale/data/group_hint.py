"""Find out whether the names of images look as if several of them were of one patient, animal or scene.

Promise: it is a hint for a person, and never acted on. What it names fits every image, and makes groups.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tlscale.errors import one_line

PATTERNS = (
    r"([^/]*[^/_. -])[_. -]+[0-9]+\.[^./]+$",  # patient12_3.jpg
    r"([^/]*[0-9])[a-z]\.[^./]+$",  # patient12a.jpg
    r"([^/]+)/[^/]+$",  # patient12/front.jpg, below the class
)
COLUMNS = frozenset(
    ("patient", "subject", "participant", "case", "animal", "individual", "scene", "group", "slide", "specimen")
)
"""Usual names of a column of groups; also with `_id`."""
_LEAST_PER_CLASS, _MOST_SHARE = 3, 0.2
_LEAST_SIZE = 1.5  # images of a group, on average


@dataclass(frozen=True)
class GroupHint:
    """Groups that a recipe may name."""

    key: str
    """`group_regex` or `group_column`."""
    value: str
    about: str
    """What makes one think so."""


def hint_by_path(paths: Sequence[str], labels: Sequence[str]) -> GroupHint | None:
    """Return an expression that finds groups in all paths; None where none is likely.

    Likely are at least three groups a class, none of which has a fifth of the images.

    Args:
        paths: below the data.
        labels: of the same images.
    """
    for pattern in PATTERNS:
        matches = [match for path in paths if (match := re.search(pattern, path)) is not None]
        if len(matches) < len(paths) or not matches:
            continue
        names = [match[1] for match in matches]
        sizes, used = Counter(names), set(labels)
        if used & sizes.keys() or len(sizes) < _LEAST_PER_CLASS * len(used):
            continue  # names of classes, not of groups
        if len(names) >= _LEAST_SIZE * len(sizes) and max(sizes.values()) <= _MOST_SHARE * len(names):
            few, many = min(sizes.values()), max(sizes.values())
            how_many = f"{few}" if few == many else f"{few} to {many}"
            shown = paths[next(at for at, name in enumerate(names) if sizes[name] > 1)]
            about = f"names such as {one_line(shown)} look like {len(sizes):,} groups of {how_many} images"
            return GroupHint("group_regex", pattern, about)
    return None


def hint_by_column(columns: Sequence[str]) -> GroupHint | None:
    """Return the column of a table whose name is usual for groups; None where there is none, or several."""
    likely = [name for name in columns if re.sub(r"[\W_]*id$", "", name.strip().lower()) in COLUMNS]
    if len(likely) != 1:
        return None
    return GroupHint(
        "group_column", likely[0], f"the column {one_line(likely[0])!r} may tell which images belong together"
    )
