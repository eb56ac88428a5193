"""The command line: one function a verb, and no torch until a verb needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from tlscale import __version__
from tlscale.errors import TlscaleError

if TYPE_CHECKING:
    from tlscale.recipe.schema import Recipe


def _reports_errors(verb: Callable[..., None]) -> Callable[..., None]:
    """Errors of ours end as one message and their exit code; all others keep their traceback."""

    @wraps(verb)
    def wrapper(*args: Any, **options: Any) -> None:  # noqa: ANN401
        try:
            verb(*args, **options)
        except TlscaleError as error:
            if os.environ.get("TLSCALE_TRACEBACK"):
                raise
            if int(os.environ.get("RANK", "0")) == 0 or not error.said_by_main:
                click.echo(f"tlscale: {error}", err=True)
            sys.stdout.flush()
            sys.exit(error.exit_code)

    return wrapper


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tlscale")
def main() -> None:
    """Transfer learning for images: compute only what is trainable.

    A RECIPE is a YAML file; KEY.PATH=VALUE after it changes one of its keys, such as optim.lr=3e-4. On several
    devices: accelerate launch tlscale/run.py RECIPE [KEY.PATH=VALUE ...].
    """


@main.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--out", metavar="DIR", help="Run folder.  [default: runs/<recipe name>]")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in DIR; start if there is none.")
@click.option("--overwrite", is_flag=True, help="Replace the run that is in DIR.")
@_reports_errors
def run(recipe: str, overrides: Sequence[str], out: str | None, resume: bool, overwrite: bool) -> None:
    """Train as RECIPE says, evaluate, and write a model that timm loads.

    Exit codes: 0 done, 1 failed, 2 wrong recipe or data, 75 stopped by a signal after saving.
    """
    if resume and overwrite:
        raise click.UsageError("--resume goes on with a run, --overwrite replaces it: give one of them")
    loaded = _load(recipe, overrides)
    from tlscale.jobs.run import run as start
    from tlscale.stop import stop_with_launcher

    stop_with_launcher()
    start(loaded, out, resume=resume, overwrite=overwrite)


@main.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--processes", type=click.IntRange(1), help="Plan for so many processes.  [default: the recipe's, or 1]")
@_reports_errors
def plan(recipe: str, overrides: Sequence[str], processes: int | None) -> None:
    """Show what `run` would do, and train nothing: freezing, parameters, steps, batches, memory."""
    loaded = _load(recipe, overrides)
    from tlscale.jobs.plan import plan as show

    show(loaded, world_size=processes or loaded.compute.num_processes or 1)


@main.command()
@click.argument("run_dir", metavar="RUN")
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--split", type=click.Choice(["train", "validation", "test"]), help="[default: test, or validation]")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@_reports_errors
def evaluate(run_dir: str, overrides: Sequence[str], split: str | None, as_json: bool) -> None:
    """Evaluate the model of RUN on a split of its data, or on other data: data.source=folder data.path=DIR.

    The figures are printed and written to RUN/evaluation_<split>.json.
    """
    from tlscale.jobs.evaluate import evaluate_run

    evaluate_run(run_dir, overrides, split_name=split, as_json=as_json)


@main.group(invoke_without_command=True)
@click.pass_context
@_reports_errors
def recipes(context: click.Context) -> None:
    """List the recipes that ship with tlscale; `copy` one to change it."""
    if context.invoked_subcommand is not None:
        return
    from tlscale.recipe.shipped import recipe_summary, shipped_recipes

    for name, path in shipped_recipes().items():
        click.echo(f"{name:<28} {recipe_summary(path)}")


@recipes.command("copy")
@click.argument("name")
@click.argument("path", required=False)
@_reports_errors
def recipes_copy(name: str, path: str | None) -> None:
    """Copy the shipped recipe NAME to PATH (by itself NAME.yaml here)."""
    from tlscale.recipe.shipped import copy_recipe

    click.echo(f"copied to {copy_recipe(name, path or f'{name}.yaml')}")


def _load(recipe: str, overrides: Sequence[str]) -> Recipe:
    from tlscale.recipe.load import load_recipe

    return load_recipe(recipe, overrides)


if __name__ == "__main__":
    main(prog_name="tlscale")
