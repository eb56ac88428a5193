"""The command line: one function a verb, and no torch until a verb needs it."""

from __future__ import annotations

import atexit
import glob
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from tlscale import __version__
from tlscale.cli_parts import (
    began_s,
    codes,
    listed,
    load,
    load_to_start,
    loading,
    numbers,
    recipes,
    reports_errors,
    takes_recipe,
)
from tlscale.errors import TlscaleError
from tlscale.recipe.completion import completion, files, recipe_keys
from tlscale.tracking.stopwatch import Stopwatch, process_began_s

if TYPE_CHECKING:
    from tlscale.recipe.schema import Recipe


class _Main(click.Group):
    """Run the command line; what is called as the program of a process counts its seconds from the start of that."""

    def __call__(self, *args: Any, **keys: Any) -> Any:  # noqa: ANN401 (click's own)
        end = _End()
        atexit.register(end.leave)  # the first one is called last
        try:
            return self.main(*args, obj=process_began_s(), **keys)
        except SystemExit as ended:
            end.code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            raise


class _End:
    """End the process when all who wait for its end were told.

    Else Python searches all that torch and timm made for cycles to free: a second in a run of five.
    """

    code: int | None = None
    """None: something else than an exit code ends it, such as a traceback; then it ends as Python does it."""

    def leave(self) -> None:
        if self.code is None:
            return
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(self.code)


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tlscale")
@reports_errors
def main() -> None:
    """Transfer learning for images: compute only what is trainable.

    A RECIPE is a YAML file; KEY.PATH=VALUE after it changes one of its keys, such as optim.lr=3e-4. On several
    devices: accelerate launch tlscale/run.py RECIPE [KEY.PATH=VALUE ...].
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        raise TlscaleError("the working folder was removed", remedy="Change to a folder that exists") from None


@main.command()
@click.argument("data", shell_complete=files)
@click.option("--backbone", default="resnet10t", show_default=True, metavar="NAME", help="A timm model.")
@click.option("--out", metavar="FILE.yaml", help="The recipe.  [default: named after DATA, here]")
@reports_errors
def new(data: str, backbone: str, out: str | None) -> None:
    """Look at DATA, report what is in it, and write a recipe that runs.

    DATA is a folder of class folders (with or without train and test), or a table (.csv, .tsv, .parquet) with a column
    of paths and one of labels. Every image is read once; what cannot be used is listed, with the reason, in a table
    that the recipe names.

    \b
    Examples:
      tlscale new photos/
      tlscale new labels.csv --out flowers.yaml
    """
    with loading():
        from tlscale.commands.new import new_file
        from tlscale.tracking.console import Console

    new_file(data, backbone=backbone, out=out, console=Console())


@main.command()
@takes_recipe
@click.option("--out", metavar="DIR", help="Run folder.  [default: runs/<recipe name>]")
@click.option("--resume", is_flag=True, help="Resume from the newest checkpoint in DIR; start if there is none.")
@click.option("--overwrite", is_flag=True, help="Replace the run that is in DIR.")
@reports_errors
def run(recipe: str, overrides: Sequence[str], out: str | None, resume: bool, overwrite: bool) -> None:
    """Train (or fit a probe) as RECIPE says, evaluate, and write a model.

    Exit codes: 0 done, 1 failed, 2 wrong recipe or data, 75 stopped by a signal after saving.

    \b
    Examples:
      tlscale run photos.yaml
      tlscale run photos.yaml optim.lr=3e-4 --out runs/photos_3e-4
    """
    at_s = began_s()
    loaded = load_to_start(recipe, overrides, out, resume=resume, overwrite=overwrite)
    _start(loaded, out, at_s, resume=resume, overwrite=overwrite)


@main.command()
@takes_recipe
@click.option("--processes", type=click.IntRange(1), help="Plan for so many processes.  [default: the recipe's, or 1]")
@click.option("--check-images", is_flag=True, help="Decode every image first, and list those that cannot be read.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@reports_errors
def plan(recipe: str, overrides: Sequence[str], processes: int | None, check_images: bool, as_json: bool) -> None:
    """Show what `run` would do, and train nothing: freezing, parameters, steps, batches, memory.

    With --json, standard output has one JSON object and nothing else; its keys are in docs/screen.md.

    Exit codes: 0 done, 2 wrong recipe or data (with --check-images also a damaged image), 75 stopped by a signal.

    \b
    Examples:
      tlscale plan photos.yaml
      tlscale plan photos.yaml optim.lr=3e-4 --json
    """
    loaded = load(recipe, overrides)
    with loading():
        from tlscale.commands.plan import plan as show

    world_size = processes or loaded.compute.num_processes or 1
    show(loaded, world_size=world_size, checks_images=check_images, as_json=as_json)


@main.command()
@takes_recipe
@click.option("--out", metavar="DIR", help="Run folder.  [default: runs/<recipe name>]")
@click.option("--resume", is_flag=True, help="Give the figures of a probe that is in DIR already.")
@click.option("--overwrite", is_flag=True, help="Replace the run that is in DIR.")
@reports_errors
def probe(recipe: str, overrides: Sequence[str], out: str | None, resume: bool, overwrite: bool) -> None:
    """Fit RECIPE's probe: a classifier on codes, without training; the same as `run`.

    From a recipe without `probe:` it takes data, backbone and codes, and fits a logistic regression.

    \b
    Examples:
      tlscale probe photos.yaml
      tlscale probe photos.yaml probe.kind=ridge --out runs/photos_ridge
    """
    at_s = began_s()
    loaded = load_to_start(recipe, overrides, out, resume=resume, overwrite=overwrite)
    if loaded.probe is None:
        from tlscale.recipe.strategies import as_probe

        loaded = as_probe(loaded)
    _start(loaded, out, at_s, resume=resume, overwrite=overwrite)


@main.command()
@click.argument("run_dir", metavar="RUN", shell_complete=files)
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...", shell_complete=recipe_keys)
@click.option(
    "--data", metavar="DATA", help="Other images: a folder, a table (.csv, .tsv, .parquet), or fashion_mnist."
)
@click.option("--split", type=click.Choice(["train", "validation", "test"]), help="[default: test, or see above]")
@click.option("--name", help="Name of the folder of the figures below RUN/evaluations.  [default: the data's]")
@click.option("--out", metavar="DIR", help="Write the figures there instead.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@reports_errors
def evaluate(run_dir: str, overrides: Sequence[str], data: str | None, split: Any, **options: Any) -> None:  # noqa: ANN401
    """Score the model of RUN on labelled images.

    Without --data: the test split of the run's own data, or else its validation split, which chose the model. With
    --data (or data.source=... data.path=...): the test split there, or else every labelled image; how many of them the
    run was trained on is counted by content. Other overrides change how scores are computed, such as
    compute.precision=bf16; keys without effect on an evaluation are an error. The figures are printed and written to
    figures.json in RUN/evaluations/NAME, never over those of the run.

    \b
    Examples:
      tlscale evaluate runs/photos
      tlscale evaluate runs/photos --data more_photos/ --json
    """
    at_s = began_s()
    with loading():
        from tlscale.commands.evaluate import evaluate_run

    evaluate_run(run_dir, overrides, data=data, split_name=split, watch=Stopwatch(at_s), **options)


@main.command()
@click.argument("run_dir", metavar="RUN", shell_complete=files)
@click.argument("places", nargs=-1, metavar="[PATH]...", shell_complete=files)
@click.option("--out", metavar="FILE", help="Write to this .csv, .jsonl or .parquet file.  [default: CSV to stdout]")
@click.option("--top-k", type=click.IntRange(1), default=1, metavar="K", help="So many labels an image.  [default: 1]")
@click.option("--all-probabilities", is_flag=True, help="Add a column for each class.")
@click.option("--images-from", metavar="LIST", help="A file that lists more paths, one a line; - is stdin.")
@click.option("--resume", is_flag=True, help="Complete an unfinished FILE.")
@reports_errors
def predict(run_dir: str, places: Sequence[str], **options: Any) -> None:  # noqa: ANN401 (click's own)
    """Give a label and a probability to each image, by the model of RUN.

    A PATH is a file, a folder (searched through), a glob in quotes, or - for paths on stdin. One row an image, in the
    order given: path, label, probability, and in the column error why an image cannot be read. In CSV a text that
    begins with = + - @ or a tab gets an apostrophe before it, because a spreadsheet would run it.

    Exit codes: 0 done, 1 failed, 2 nothing found or nothing that can be read, 75 stopped by a signal (--resume).

    \b
    Examples:
      tlscale predict runs/photos new_photos/ --out labels.csv
      find new_photos -name '*.jpg' | tlscale predict runs/photos - --top-k 3 > labels_3.csv
    """
    with loading():
        from tlscale.commands.predict import predict_for_people
        from tlscale.distributed.signals import stop_with_launcher

    stop_with_launcher()
    predict_for_people(run_dir, places, **options)


@main.command()
@click.argument("run_dir", metavar="RUN", shell_complete=files)
@click.option("--to", required=True, metavar="FORMAT", help="One of onnx, torch-export, timm, hub.")
@click.option("--out", required=True, metavar="DIR", help="A folder for it; an export to FORMAT there is replaced.")
@click.option("--images", multiple=True, metavar="PATH", help="Compare on these images.  [default: the run's own]")
@click.option("--licence", default="unknown", metavar="NAME", help="For the model card.  [default: unknown]")
@click.option("--with-training-codes", is_flag=True, help="For a knn probe: export its training features as well.")
@reports_errors
def export(run_dir: str, **options: Any) -> None:  # noqa: ANN401 (click's own)
    """Write the model of RUN for use elsewhere, and compare it with the run's on real images.

    onnx: model.onnx, with classes and preprocessing in its metadata. torch-export: model.pt2, which needs torch alone.
    timm: a folder that timm.create_model loads. hub: the same with a model card; nothing is uploaded. A file whose
    logits or accuracy differ from the run's model is not written.

    Exit codes: 0 done, 1 no file that agrees with the model, 2 wrong run, images or folder.

    \b
    Examples:
      tlscale export runs/photos --to onnx --out photos_onnx
      tlscale export runs/photos --to hub --out photos_hub --licence cc-by-4.0
    """
    with loading():
        from tlscale.commands.export import export as write
        from tlscale.commands.export import show

    show(write(run_dir, **options))


@main.command()
@click.argument(
    "words",
    nargs=-1,
    required=True,
    metavar="RECIPE [KEY.PATH=VALUE]... | RECIPE... | RUN...",
    shell_complete=lambda *asked: [*recipe_keys(*asked), *files(*asked)],
)
@click.option("--strategies", callback=listed, metavar="A,B", help="Of one recipe.  [default: all]")
@click.option("--backbones", callback=listed, metavar="A,B", help="In place of strategies, with the recipe's own.")
@click.option("--sizes", callback=numbers, metavar="N,M|all", help="Training images.  [default: the recipe's]")
@click.option("--seeds", callback=numbers, metavar="N,M", help="[default: the recipe's]")
@click.option("--set", "changes", multiple=True, metavar="NAME.KEY.PATH=VALUE", help="Change one strategy or recipe.")
@click.option("--min-steps", type=click.IntRange(0), help="Least steps of training at --sizes.  [default: 200]")
@click.option("--out", metavar="DIR", help="[default: runs/compare_<recipe name>; of RUNs: none]")
@click.option("--resume", is_flag=True, help="Keep the complete runs in DIR, and resume the others.")
@click.option("--print-jobs", is_flag=True, help="Run nothing; print a `tlscale run` line for each run.")
@reports_errors
def compare(words: Sequence[str], seeds: list[int | None], **options: Any) -> None:
    """Run the strategies codes, early_codes, mlp, head, finetune and scratch (lora, too, where it has adapters) of one
    RECIPE side by side, or several RECIPEs as they are: one table and one picture of accuracy, its interval, time and
    what was trained.

    RUNs are folders of finished runs, which are tabulated in the same way. The lines of --print-jobs are independent
    of each other, for a queue or several machines; the line that gathers their table is printed to standard error.

    Exit codes: 0 done, 1 a run failed (the others are in the table), 2 wrong recipe or data, 75 stopped by a signal.

    \b
    Examples:
      tlscale compare photos.yaml --sizes 50,all
      tlscale compare photos.yaml duration="5 epochs" --backbones resnet18,convnext_nano --print-jobs
      tlscale compare runs/*
    """
    at_s = began_s()
    with loading(is_long=not options["print_jobs"]):  # what gathers their table is alone on standard error
        from tlscale.commands.compare import compare as start
        from tlscale.commands.run import run as run_one
        from tlscale.distributed.signals import stop_with_launcher

    stop_with_launcher()
    given = [seed for seed in seeds if seed is not None]
    overrides = [word for word in words if "=" in word and not os.path.exists(word) and not glob.glob(word)]
    places = [word for word in words if word not in overrides]
    start(places, run=run_one, overrides=overrides, seeds=given, watch=Stopwatch(at_s), **options)


@main.command()
@takes_recipe
@click.option("--steps", type=click.IntRange(20), default=100, show_default=True, help="Most steps.")
@click.option("--from", "low", type=float, default=1e-7, show_default=True, metavar="LR", help="The first rate.")
@click.option("--to", "high", type=float, default=10.0, show_default=True, metavar="LR", help="The last rate.")
@click.option("--out", metavar="FILE.png", help="The picture.  [default: lr_<recipe name>.png]")
@reports_errors
def lr(recipe: str, overrides: Sequence[str], out: str | None, **options: Any) -> None:
    """Train RECIPE for a few steps with growing learning rates, draw the loss, and suggest one.

    Only the picture, and the codes of frozen layers, are kept.

    \b
    Examples:
      tlscale lr photos.yaml
      tlscale lr photos.yaml optim.name=sgd --steps 200
    """
    loaded = load(recipe, overrides)
    with loading(is_long=True):
        from tlscale.commands.lr import lr as start
        from tlscale.distributed.signals import stop_with_launcher

    stop_with_launcher()
    start(loaded, out, **options)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@reports_errors
def doctor(as_json: bool) -> None:
    """Show what on this machine would stop or slow a run, and what to do about it.

    Versions, devices, Accelerate's configuration, disks, memory, the cache, whether the hub and W&B can be reached,
    and whether two processes can connect. Exit code 1 if something would stop a run.

    \b
    Examples:
      tlscale doctor
      tlscale doctor --json
    """
    with loading():
        from tlscale.commands.doctor import doctor as show

    if not show(as_json=as_json):
        sys.exit(1)


def _start(recipe: Recipe, out: str | None, at_s: float, *, resume: bool, overwrite: bool) -> None:
    with loading(is_long=True):
        from tlscale.commands.run import run as start
        from tlscale.distributed.signals import stop_with_launcher

    stop_with_launcher()
    start(recipe, out, resume=resume, overwrite=overwrite, watch=Stopwatch(at_s))


main.add_command(codes)
main.add_command(recipes)
main.add_command(completion)

if __name__ == "__main__":
    main(prog_name="tlscale")
