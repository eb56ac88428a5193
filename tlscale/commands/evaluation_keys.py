"""Check which keys of a recipe an evaluation depends on, and expand `--data DATA`.

Promise: an override that would change nothing is an error, and names what has an effect.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from tlscale.data.sources.manifest import TABLE_ENDINGS
from tlscale.data.sources.open import source_of
from tlscale.errors import RecipeError, option
from tlscale.recipe.schema import DataSection, Recipe
from tlscale.recipe.schema_keys import all_keys
from tlscale.recipe.sources import SOURCE_KEYS, SOURCES

# What an evaluation depends on: where its images are, how they are read, how it is computed. Nothing else.
_PLACE = ("source", *(key for key in SOURCE_KEYS if key != "task"), "train_split", "validation_split", "test_split")
_ALLOWED = frozenset(
    (
        *(f"data.{key}" for key in (*_PLACE, "on_bad_image", "max_megapixels", "workers", "cache_mib")),
        *("evaluate.batch_size", "compute.precision", "compute.channels_last", "compute.deterministic"),
        *("compute.threads", "compute.num_processes", "compute.hang_timeout_s"),
    )
)


def changes_for_evaluation(own: Recipe, overrides: Sequence[str], data: str | None) -> tuple[list[str], bool]:
    """Return the overrides in full, and whether they name other data than the run's.

    Raises:
        RecipeError: one of them has no effect on an evaluation.
    """
    given = {text.partition("=")[0].strip(): text.partition("=")[2].strip() for text in overrides}
    if data is not None and "data.path" in given:
        problem = "both name the place of the images"
        raise RecipeError(problem, key=option("data") + ", data.path", remedy="Give one of them")
    place = [] if data is None else _as_overrides(data, given.get("data.source"))
    keys = [text.partition("=")[0] for text in place] + list(given)
    is_other = any(key.removeprefix("data.") in _PLACE for key in keys if key.startswith("data."))
    _check_effects(given, is_other=is_other)
    texts = [*place, *overrides]
    if not is_other:
        return texts, False
    source = next((text.partition("=")[2] for text in reversed(texts) if text.startswith("data.source=")), None)
    forgotten: Sequence[str] = ()  # what belongs to the run's own data
    if source not in (None, own.data.source):
        forgotten = [*(key for key in _PLACE if key != "source"), "groups_across_splits"]
    elif "data.path" in keys:
        forgotten = ("config", "revision", "exclude", "group_column", "group_regex", "groups_across_splits")
    return [*(f"data.{key}={_default(key)}" for key in forgotten), *texts], True


def _default(key: str) -> str:
    value = DataSection.model_fields[key].default
    return "null" if value is None else str(value)


def _check_effects(given: dict[str, str], *, is_other: bool) -> None:
    idle = [key for key in given if key not in _ALLOWED and _is_known(key)]
    if is_other and given.get("data.validation_fraction") in ("0", "0.0"):  # which is how it is
        idle.remove("data.validation_fraction")
    if idle:
        raise RecipeError(
            "no effect on an evaluation. Images are prepared as the run's model wants them, its classes and "
            "network are its own, and nothing is trained, limited or held out",
            key=", ".join(idle),
            remedy=f"Take {'it' if len(idle) == 1 else 'them'} out. What has an effect: {', '.join(sorted(_ALLOWED))}",
        )


def _is_known(key: str) -> bool:
    """Report whether a recipe has the key, or one above it that takes any mapping; the others are misspelt."""
    keys, parts = all_keys(), key.split(".")
    above = [keys.get(".".join(parts[:count])) for count in range(1, len(parts))]
    return key in keys or any(found is not None and found.section is None for found in above)


def _as_overrides(data: str, source: str | None) -> list[str]:
    """Expand `--data DATA` to overrides; raise `DataError` where it is not there, or not known as data."""
    path = f"data.path={json.dumps(data)}"  # in quotes, as a path may look like anything
    if source is not None:
        return [path]
    kinds = f"a folder, a table ({', '.join(TABLE_ENDINGS)}) or fashion_mnist"
    remedy = f"It takes {kinds}; for a data set of the hub add data.source=hub"
    found = source_of(data, key=option("data"), remedy=remedy)
    return [f"data.source={found}", *([] if SOURCES[found].path == "none" else [path])]
