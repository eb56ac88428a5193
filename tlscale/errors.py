"""The errors that tlscale raises on purpose.

Promise: a message of these says what is wrong with which value, where it came from and what to do; the command
line prints it without a traceback and exits with `exit_code`. Anything else that escapes is a bug of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: saved, run the same line again with --resume


class TlscaleError(Exception):
    """A run failed for a reason that we can name.

    Attributes:
        reported_by_main: the main process raises it as well, and another need not say it again. True for what all
            processes find at once; set on what one process hands to the others.
    """

    exit_code = EXIT_FAILED
    reported_by_main = False


class RecipeError(TlscaleError):
    """The recipe, or an override of it, is wrong."""

    exit_code = EXIT_BAD_INPUT
    reported_by_main = True


class DataError(TlscaleError):
    """The data that the recipe names are missing or wrong."""

    exit_code = EXIT_BAD_INPUT


class ModelError(TlscaleError):
    """The backbone, its weights, the freeze rules or the head do not fit together."""

    exit_code = EXIT_BAD_INPUT


class RunFolderError(TlscaleError):
    """The run folder is in use, not ours, or holds another run."""

    exit_code = EXIT_BAD_INPUT


class LaunchError(TlscaleError):
    """The processes that were launched are not those that the recipe or the launcher asked for."""

    exit_code = EXIT_BAD_INPUT
    reported_by_main = True


class CheckpointError(TlscaleError):
    """A checkpoint is damaged, or was made by another recipe."""


class ResumeError(CheckpointError):
    """The run cannot go on with this recipe or these inputs; its checkpoints are fine."""

    exit_code = EXIT_BAD_INPUT


class WorkerError(TlscaleError):
    """A process that reads images was killed."""


class NonFiniteLossError(TlscaleError):
    """The loss, a gradient or a weight became NaN or infinite.

    Attributes:
        step: the step, counted from 1, that made it so.
    """

    reported_by_main = True

    def __init__(self, message: str, step: int = 0) -> None:
        super().__init__(message)
        self.step = step


class DesyncError(TlscaleError):
    """The processes do not have the same weights any more."""

    reported_by_main = True


class Stopped(TlscaleError):  # noqa: N818 (a stop is no error)
    """Not a failure: the run was asked to stop, and saved itself first."""

    exit_code = EXIT_STOPPED
    reported_by_main = True


def did_you_mean(word: str, known: Iterable[str], limit: int = 3) -> str:
    """` Did you mean 'x' or 'y'?` with the names in `known` nearest to `word`; empty when none is near."""
    near = difflib.get_close_matches(word, list(known), n=limit, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
