"""Match a user's regular expressions against names within a time limit.

Promise: an expression that would take for ever (`(a+)+b`) is refused after a few seconds, in any thread, with all that
`re` knows (look-aheads and the rest). `re` cannot be interrupted but from the main thread, and holds the others up
while it matches; so what may take long is tried in a process of its own first.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import lru_cache

from tlscale.errors import RecipeError

LIMIT_S = 5.0
_TRIAL = """
import json, re, sys
pattern, names, searches = json.load(sys.stdin)
compiled = re.compile(pattern)
for name in names:
    compiled.search(name) if searches else compiled.fullmatch(name) or compiled.match(name)
"""
_ESCAPED = re.compile(r"\\[^1-9]|\[\^?\]?(?:\\.|[^\]\\])*\]")  # stands for one sign; a back-reference does not
_UNBOUNDED = re.compile(r"[*+]|\{\d*,\d*\}")


def is_quick(pattern: str) -> bool:
    """Return whether an expression takes at most the square of a name's length: two repeats, none of a group."""
    plain = _ESCAPED.sub("x", pattern)
    return "\\" not in plain and len(_UNBOUNDED.findall(plain)) <= 2 and not re.search(r"\)[*+{]", plain)


@lru_cache(maxsize=256)
def check_time(pattern: str, names: tuple[str, ...], where: str, *, searches: bool = False) -> None:
    """Check that an expression is matched against all names, or searched for in them, within `LIMIT_S`.

    Raises:
        RecipeError: it takes longer.
    """
    if is_quick(pattern) or not sys.executable:
        return
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRIAL],
            input=json.dumps([pattern, names, searches]).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RecipeError(
            f"the rule '{pattern}' takes more than {LIMIT_S:g} s to match {len(names):,} names",
            key=where,
            remedy="Write it without a repeat within a repeat, such as (a+)+, and with fewer of '.*'.",
        ) from None
    except OSError:  # no process can be started: matched as it is
        return
