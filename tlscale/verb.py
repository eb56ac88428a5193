"""What all verbs of the command line share: how errors are shown, when the process began, how a recipe is read."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tlscale.distributed.signals import StopRequest
from tlscale.errors import RecipeError, TlscaleError

if TYPE_CHECKING:
    from tlscale.recipe.schema import Recipe


def reports_errors(verb: Callable[..., None]) -> Callable[..., None]:
    """Show errors of ours, and those of files, as one message and their exit code; others keep their traceback."""

    @wraps(verb)
    def wrapper(*args: Any, **options: Any) -> None:  # noqa: ANN401
        try:
            # From the first moment on: also while a verb imports, or has nothing to save.
            with StopRequest():
                verb(*args, **options)
            sys.stdout.flush()  # what was said may be lost only now
        except (TlscaleError, OSError) as raised:
            error = _as_ours(raised)
            if os.environ.get("TLSCALE_TRACEBACK") or error is None:
                raise
            if int(os.environ.get("RANK", "0")) == 0 or not error.reported_by_main:
                with suppress(OSError):
                    click.echo(f"tlscale: {error}", err=True)
            _give_up_output()
            sys.exit(error.exit_code)

    return wrapper


def _give_up_output() -> None:
    """Write what is left, where that can be done: else Python tries again at its end, and makes the exit code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _as_ours(error: TlscaleError | OSError) -> TlscaleError | None:
    """Return an error that is reported without a traceback; None for that of a reader of our output who has left."""
    if isinstance(error, TlscaleError):
        return error
    from tlscale.storage.files import disk_error

    return None if isinstance(error, BrokenPipeError) else disk_error(error)


def began_s() -> float:
    """Return when this process began, or this call where a program of somebody else's made it."""
    at_s = click.get_current_context().find_root().obj
    return time.monotonic() if at_s is None else float(at_s)


def load(recipe: str, overrides: Sequence[str], out: str | None = None, *, resume: bool = False) -> Recipe:
    """Read a recipe with overrides; of a run that is resumed, keys without effect are no mistake."""
    from tlscale.recipe.load import load_recipe

    try:
        return load_recipe(recipe, overrides)
    except RecipeError:
        # A run that an older version began may have a key that is refused today, as it has no effect.
        began = load_recipe(recipe, overrides, resumed=True) if resume else None
        if began is None or not (Path(out or Path("runs") / began.name) / "recipe.yaml").exists():
            raise
        return began
