"""Show lists of names in messages: quoted, and no more of them than anybody reads."""

from __future__ import annotations

from collections.abc import Sequence


def first_few(items: Sequence[str], limit: int = 5) -> str:
    """Return `a, b, c and 7 more`."""
    rest = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {rest:,} more" if rest > 0 else "")


def quoted(names: Sequence[str]) -> list[str]:
    """Return names as a message shows them: in quotes, with unprintable characters escaped."""
    return [repr(name) for name in names]


def quoted_list(names: Sequence[str], limit: int = 20) -> str:
    return first_few(quoted(names), limit) if names else "none"
