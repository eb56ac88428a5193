"""Parts of the command line: what all its verbs share, and the groups of verbs `codes` and `recipes`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tlscale.distributed.signals import StopRequest, stoppable
from tlscale.errors import TlscaleError, first_line
from tlscale.recipe.completion import files, recipe_keys
from tlscale.tracking.stopwatch import Stopwatch

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
        error.in_python = False  # also of a function that is there for Python, too
        return error
    from tlscale.storage.files import disk_error

    return None if isinstance(error, BrokenPipeError) else disk_error(error)


@contextmanager
def loading(*, is_long: bool = False) -> Iterator[None]:
    """Tell, while a verb imports, what takes so long: PyTorch and timm take seconds, and minutes from a network's disk.

    Args:
        is_long: the verb itself takes long, so that a log has this line as well; on a terminal it vanishes again.
    """
    is_terminal = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    is_shown = (is_terminal or is_long) and os.environ.get("RANK", "0") == "0"
    if is_shown:
        with suppress(OSError):  # nobody has to hear it
            click.echo("loading PyTorch and timm", err=True, nl=not is_terminal)
    try:
        # A launcher stops the others as soon as one process refuses what is wrong: the main one is still to report it.
        is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        with stoppable("loading PyTorch and timm") if is_alone else nullcontext():
            yield
    except (ImportError, RuntimeError) as error:
        if "torchvision" not in str(error):
            raise
        raise TlscaleError(
            f"torchvision is not installed, or does not fit torch: {first_line(error)}",
            remedy="`tlscale doctor` gives the line that installs the one that fits",
        ) from error
    finally:
        if is_shown and is_terminal:
            with suppress(OSError):
                click.echo("\r\x1b[K", err=True, nl=False)


def began_s() -> float:
    """Return when this process began, or this call where a program of somebody else's made it."""
    at_s = click.get_current_context().find_root().obj
    return time.monotonic() if at_s is None else float(at_s)


def load(recipe: str, overrides: Sequence[str]) -> Recipe:
    """Read a recipe with overrides."""
    from tlscale.recipe.load import load_recipe

    return load_recipe(recipe, overrides)


def load_to_start(recipe: str, overrides: Sequence[str], out: str | None, *, resume: bool, overwrite: bool) -> Recipe:
    """Read a recipe with overrides, as `load_to_run` does."""
    from tlscale.recipe.load import load_to_run
    from tlscale.storage.run_folder import refuse_both

    refuse_both(resume=resume, overwrite=overwrite)
    return load_to_run(recipe, overrides, out, resume=resume)


def takes_recipe(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the arguments RECIPE and KEY.PATH=VALUE."""
    overrides = click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...", shell_complete=recipe_keys)
    return click.argument("recipe", shell_complete=files)(overrides(verb))


def listed(_context: click.Context, _option: click.Parameter, text: str | None) -> list[str]:
    """Read `a,b` as a list."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def numbers(context: click.Context, option: click.Parameter, text: str | None) -> list[int | None]:
    """Read `100,1000,all` as a list, in which None stands for all."""
    words = listed(context, option, text)
    wrong = [word for word in words if not word.isdecimal() and (word, option.name) != ("all", "sizes")]
    if wrong:
        raise click.BadParameter(f"'{wrong[0]}' is not a whole number; write them with commas between, such as 1,2")
    return [None if word == "all" else int(word) for word in words]


class _CodesGroup(click.Group):
    """Group verbs, the first of which is optional: what names no verb is a recipe."""

    def resolve_command(self, context: click.Context, args: list[str]) -> Any:  # noqa: ANN401 (click's own)
        if args and self.get_command(context, args[0]) is None:
            args = ["compute", *args]
        return super().resolve_command(context, args)


@click.group(cls=_CodesGroup, subcommand_metavar="RECIPE [KEY.PATH=VALUE]... [--out FILE] | list | verify | prune")
def codes() -> None:
    """Compute the codes that RECIPE needs, ahead of its run; or look after those that are cached.

    Codes are cached features: a run does not compute what it finds there. They are stored in $TLSCALE_CACHE/codes (by
    default ~/.cache/tlscale/codes). --out FILE (.parquet, .npy) writes them for other tools; see `tlscale codes compute
    --help`.

    \b
    Examples:
      tlscale codes photos.yaml
      tlscale codes photos.yaml --out codes.parquet "codes.layer=[layer3, penultimate]"
    """


@codes.command("compute", hidden=True)
@takes_recipe
@click.option("--out", metavar="FILE", help="Write the codes to this .parquet or .npy file as well.")
@click.option(
    "--near-duplicates",
    "near",
    type=click.FloatRange(0.0, 1.0, min_open=True),
    metavar="COSINE",
    help="Show images that look like one of another split or fold: codes with at least this cosine, such as 0.98.",
)
@click.option(
    "--near-duplicates-to",
    "near_file",
    metavar="FILE",
    help="Write those of train (or validation, or all but one of folds) to this .csv file, which data.exclude takes.",
)
@reports_errors
def codes_compute(
    recipe: str, overrides: Sequence[str], out: str | None, near: float | None, near_file: str | None
) -> None:
    """Compute and cache the codes of RECIPE's images: of codes.layer, or of what it freezes.

    With --out FILE those of codes.layer (by default penultimate) are written for other tools. Parquet: path, split,
    label, row, and a column for each layer. NumPy (.npy): the matrix of one layer, and the other columns as .csv.

    \b
    Examples:
      tlscale codes photos.yaml --out codes.parquet "codes.layer=[layer3, penultimate]"
      tlscale codes photos.yaml backbone.weights=run:runs/photos --out codes.npy
      tlscale codes photos.yaml --near-duplicates 0.98 --near-duplicates-to alike.csv
    """
    at_s = began_s()
    loaded = load(recipe, overrides)
    with loading(is_long=True):
        from tlscale.commands.codes import compute_codes
        from tlscale.distributed.signals import stop_with_launcher

    stop_with_launcher()
    to, near_to = (None if name is None else Path(name) for name in (out, near_file))
    compute_codes(loaded, Stopwatch(at_s), out=to, near=near, near_file=near_to)


@codes.command("list")
@reports_errors
def codes_list() -> None:
    """List the cached codes, those used last first.

    \b
    Examples:
      tlscale codes list
      TLSCALE_CACHE=/shared/cache tlscale codes list
    """
    from tlscale.commands.codes import list_codes

    list_codes()


@codes.command("verify")
@click.argument("digest", required=False)
@reports_errors
def codes_verify(digest: str | None) -> None:
    """Read every cached byte (or those of the entry DIGEST) and compare it with what was written.

    \b
    Examples:
      tlscale codes verify
      tlscale codes verify 72304d74a367
    """
    from tlscale.commands.codes import verify_codes

    verify_codes(digest)


@codes.command("prune")
@click.argument("digests", nargs=-1, metavar="[DIGEST]...")
@click.option(
    "--keep-gib",
    type=click.FloatRange(0),
    metavar="N",
    help="Evict least recently used entries until the cache is at most N GiB.",
)
@click.option("--all", "everything", is_flag=True, help="Remove all cached codes.")
@reports_errors
def codes_prune(digests: tuple[str, ...], keep_gib: float | None, everything: bool) -> None:
    """Remove cached codes: those named by the first digits of their DIGEST, or by --keep-gib or --all.

    \b
    Examples:
      tlscale codes prune --keep-gib 10
      tlscale codes prune 72304d74a367
    """
    if sum([bool(digests), keep_gib is not None, everything]) != 1:
        raise click.UsageError("name digests, or give one of --keep-gib and --all")
    from tlscale.commands.codes import prune_codes

    prune_codes(digests, keep_gib=keep_gib, everything=everything)


@click.group(invoke_without_command=True)
@click.pass_context
@reports_errors
def recipes(context: click.Context) -> None:
    """List the recipes that ship with tlscale; `copy` one to change it.

    \b
    Examples:
      tlscale recipes
      tlscale recipes copy lite0_codes_fmnist
    """
    if context.invoked_subcommand is not None:
        return
    from tlscale.recipe.shipped import recipe_summary, shipped_recipes

    for name, path in shipped_recipes().items():
        click.echo(f"{name:<28} {recipe_summary(path)}")


@recipes.command("schema")
@reports_errors
def recipes_schema() -> None:
    """Print the JSON Schema of recipes, for editors.

    \b
    Examples:
      tlscale recipes schema > recipe.schema.json
      tlscale recipes schema | python -m json.tool
    """
    from tlscale.recipe.editor_schema import editor_schema

    click.echo(json.dumps(editor_schema(), indent=1))


def _shipped(_context: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    from tlscale.recipe.shipped import shipped_recipes

    return [name for name in shipped_recipes() if name.startswith(incomplete)]


@recipes.command("copy")
@click.argument("name", shell_complete=_shipped)
@click.argument("path", required=False)
@reports_errors
def recipes_copy(name: str, path: str | None) -> None:
    """Copy the shipped recipe NAME to PATH (by default NAME.yaml here).

    \b
    Examples:
      tlscale recipes copy lite0_codes_fmnist
      tlscale recipes copy resnet_fmnist photos.yaml
    """
    from tlscale.recipe.shipped import copy_recipe

    click.echo(f"copied to {copy_recipe(name, path or f'{name}.yaml')}")
