"""`tlscale evaluate`: the figures of a finished run's model, on its own data or on other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from tlscale.data.loaders import ImageStore, default_workers, eval_batches
from tlscale.data.sources import BadImages, ImageData, ImageSplit, open_data
from tlscale.dist import start_processes
from tlscale.errors import DataError, RunFolderError
from tlscale.evaluate import InputPath, evaluate
from tlscale.model.export import TrainedModel, load
from tlscale.objective import Objective
from tlscale.progress import Pace, Progress, number
from tlscale.recipe.load import load_recipe
from tlscale.recipe.schema import LossSection, Recipe
from tlscale.run_folder import write_json
from tlscale.screen import show_classes
from tlscale.stopwatch import Stopwatch, describe_seconds


def evaluate_run(
    run: str | Path,
    overrides: Sequence[str] = (),
    *,
    split_name: str | None = None,
    as_json: bool = False,
    watch: Stopwatch | None = None,
) -> dict[str, Any]:
    """Figures of the run's exported model.

    Args:
        run: a run folder.
        overrides: changes to its recipe, such as other data.
        split_name: train, validation or test; by itself test, or validation where there is none.
        as_json: print the figures as JSON rather than as tables.
        watch: measures it; by default from this call.

    Returns:
        The figures, which are also written to `evaluation_<split>.json` in the run folder.

    Raises:
        TlscaleError: no such run, or data that do not fit its classes.
    """
    watch = watch or Stopwatch()
    folder = Path(run)
    if not (folder / "recipe.yaml").is_file():
        raise RunFolderError(f"'{run}' is not a run folder: there is no '{folder / 'recipe.yaml'}'")
    if any(override.startswith("data.source=") for override in overrides):
        overrides = ["data.fallback=null", *overrides]  # other data have no shipped sample to fall back to
    recipe = load_recipe(folder / "recipe.yaml", overrides)
    trained = load(folder)
    with closing(start_processes(recipe.compute.without_engine())) as processes:
        own_data = not any(override.startswith("data.") for override in overrides)
        skipped = _skipped(folder) if own_data else None
        with watch("scan"):
            split = _split(_open(recipe, trained, skipped), split_name)
        screen = Progress(0, enabled=processes.is_main and not as_json)
        with watch("decode"):
            pace = Pace(len(split), screen.say, f"decoding {split.name}")
            store = ImageStore(split, recipe.data, trained.input_spec, on_images=pace.add)
        dtype = torch.float64 if recipe.compute.precision == "fp64" else torch.float32
        workers = default_workers(
            recipe.data, cached=store.cached, augmented=False, device=processes.device, processes=processes.world_size
        )
        batch_size = recipe.evaluate.batch_size or recipe.batch_size
        with watch("evaluate"):
            figures = evaluate(
                trained.model.to(processes.device, dtype),
                eval_batches(store, processes.rank, processes.world_size, batch_size, workers),
                inputs=InputPath(trained.input_spec, dtype, processes.device, recipe.compute.channels_last),
                num_images=len(split),
                objective=Objective(LossSection(label_smoothing=recipe.loss.label_smoothing), None),
                classes=trained.classes,
                processes=processes,
            )
        figures |= watch.figures(parts=("start", "scan", "decode", "evaluate"))
        figures = {"split": split.name, "source": recipe.data.source, **figures}
        if processes.is_main:
            write_json(folder / f"evaluation_{split.name}.json", figures)
            _show(figures, as_json=as_json)
    return figures


def _skipped(folder: Path) -> BadImages | None:
    """The images that the run skipped, so that its splits are drawn as they were; None where it has no record."""
    file = folder / "run.json"
    return BadImages.from_plain(json.loads(file.read_text())["bad_images"]) if file.is_file() else None


def _open(recipe: Recipe, trained: TrainedModel, skipped: BadImages | None) -> ImageData:
    # The model's classes are the truth: a class list that other data would give by themselves may be in another order.
    section = recipe.data.model_copy(update={"classes": list(trained.classes)})
    return open_data(section, recipe.seed, bad_images=skipped)


def _split(data: ImageData, name: str | None) -> ImageSplit:
    splits = {split.name: split for split in (data.test, data.validation, data.train) if split is not None}
    if name is None:
        return next(iter(splits.values()))
    if name not in splits:
        raise DataError(f"the data have no split '{name}'; there are: {', '.join(splits)}")
    return splits[name]


def _show(figures: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(figures))
        return
    screen = Progress(0)
    show_classes(figures, screen)
    low, high = figures["top1_interval95"]
    screen.say(
        f"{figures['num_images']:,} {figures['split']} images: top1 {number(figures['top1'])} "
        f"(95% interval {low:.4f} to {high:.4f}), loss {number(figures['loss'])}, "
        f"macro-F1 {number(figures['macro_f1'])}, ECE {number(figures['ece'])}",
        style="bold",
    )
    screen.say(f"seconds: {describe_seconds(figures)}")
