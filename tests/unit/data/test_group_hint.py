"""Which names look like groups, and which do not."""

from __future__ import annotations

import re

import pytest

from tlscale.data.group_hint import PATTERNS, hint_by_column, hint_by_path


def paths_of(form: str, groups: int = 12, photos: int = 4) -> tuple[list[str], list[str]]:
    """Paths such as `{label}/patient{group}_{photo}.jpg`, and labels."""
    rows = [("ab"[group % 2], group, photo) for group in range(groups) for photo in range(photos)]
    paths = [form.format(label=label, group=group, photo=photo, sign="wxyz"[photo % 4]) for label, group, photo in rows]
    return paths, [label for label, _, _ in rows]


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ("{label}/patient{group}_{photo}.jpg", 0),
        ("train/{label}/P-{group:03}-{photo:02}.png", 0),
        ("{label}/2024-05-{group:02}_{photo}.JPG", 0),
        ("{label}/moth {group}.{photo}.jpg", 0),
        ("{label}/leaf{group}{sign}.tif", 1),
        ("{label}/patient{group}/view_{sign}.jpg", 2),
    ],
)
def test_names_that_look_like_groups(form, pattern):
    paths, labels = paths_of(form)
    hint = hint_by_path(paths, labels)
    assert (hint.key, hint.value) == ("group_regex", PATTERNS[pattern])
    assert f"names such as {paths[0]} look like 12 groups of 4 images" in hint.about
    groups = [re.search(hint.value, path)[1] for path in paths]
    assert len(set(groups)) == 12
    assert [len(set(groups[start : start + 4])) for start in range(0, 48, 4)] == [1] * 12


@pytest.mark.parametrize(
    "form",
    [
        "{label}/IMG_{group}{photo}.jpg",
        "{label}/{group:04}{photo}.png",
        "{label}/{label}_{group}{photo}.jpg",
        "{label}/{label}.{group}{photo}.jpg",
        "{label}/photo {group}{photo}.jpg",
    ],
)
def test_names_that_do_not(form):
    assert hint_by_path(*paths_of(form)) is None


def test_one_name_that_does_not_fit_or_one_large_group_is_no_hint():
    paths, labels = paths_of("{label}/patient{group}_{photo}.jpg")
    assert hint_by_path([*paths, "a/portrait.jpg"], [*labels, "a"]) is None
    assert hint_by_path([*paths, *(f"a/other_{row}.jpg" for row in range(20))], [*labels, *["a"] * 20]) is None
    assert hint_by_path(*paths_of("{label}/patient{group}_{photo}.jpg", photos=1)) is None
    assert hint_by_path([], []) is None


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (["path", "label", "patient"], "patient"),
        (["Path", "Label", "Patient_ID"], "Patient_ID"),
        (["path", "label", "scene id", "width"], "scene id"),
        (["path", "label", "id"], None),
        (["path", "label", "patient", "case"], None),
    ],
)
def test_columns_with_a_usual_name(columns, found):
    hint = hint_by_column(columns)
    assert (hint and hint.value) == found
