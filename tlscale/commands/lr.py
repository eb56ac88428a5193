"""`tlscale lr`: try learning rates, draw what the loss did, and suggest one."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from matplotlib import rc_context, rcdefaults
from matplotlib.figure import Figure

from tlscale.distributed.device import choose_algorithms, naming_memory
from tlscale.distributed.processes import start_processes
from tlscale.errors import LaunchError, RecipeError
from tlscale.recipe.schema import Recipe
from tlscale.storage.files import replacing
from tlscale.tracking.console import Console
from tlscale.training.lr_range import HIGHEST, LOWEST, LrRange, lr_range

_ROWS = 12  # of the table


def lr(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    steps: int = 100,
    low: float = LOWEST,
    high: float = HIGHEST,
) -> LrRange:
    """Train for a few steps with growing learning rates; return what each did, and draw it.

    Args:
        out: the picture; by default `lr_<recipe name>.png`.
        steps: most steps.
        low, high: the first and the last rate.

    Raises:
        LaunchError: several processes.
        TlscaleError: what a run of the recipe would raise, or a loss that never falls.
    """
    processes, console = start_processes(recipe.compute), Console()
    with closing(processes), console.shows_progress(), naming_memory():
        if processes.world_size > 1:
            remedy = "Start it without a launcher"
            raise LaunchError(f"{processes.world_size} processes, and it takes one", key="tlscale lr", remedy=remedy)
        choose_algorithms(processes.device, deterministic=recipe.compute.deterministic)
        found = lr_range(recipe, processes, console, steps=steps, low=low, high=high)
    place = Path(out if out is not None else f"lr_{recipe.name}.png")
    draw(found, place)
    _show(found, place, console)
    if found.suggestion is None:
        remedy = f"Begin with a lower rate, or see whether the recipe can learn (tlscale run); the picture is '{place}'"
        raise RecipeError("the loss never fell below that of the first step", key="optim.lr", remedy=remedy)
    return found


def draw(found: LrRange, place: Path) -> None:
    """Draw the loss against the learning rate to a file; the same figures give the same bytes."""
    with rc_context():
        rcdefaults()  # the working folder may hold a `matplotlibrc` of anybody's
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.semilogx(found.lrs, found.losses, color="#bbbbbb", linewidth=0.8, label="loss of each step")
        axes.semilogx(found.lrs, found.smoothed, color="#0072B2", linewidth=1.8, label="smoothed")
        for rate, what, line in ((found.suggestion, "suggestion", "-"), (found.recipe_lr, "recipe", ":")):
            if rate is None:
                continue
            axes.axvline(rate, color="#D55E00", linestyle=line, linewidth=1.2, label=f"{what}: {rate:.1e}")
        axes.set_ylim(min(found.losses) * 0.9, found.smoothed[0] * 1.5)  # what diverges leaves the picture
        axes.set_xlabel("learning rate")
        axes.set_ylabel("training loss")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.legend(frameon=False)
        with replacing(place) as aside:
            figure.savefig(aside, format=place.suffix.removeprefix(".") or "png", dpi=160)


def _show(found: LrRange, place: Path, console: Console) -> None:
    every = max(1, len(found.lrs) // _ROWS)
    rows = [
        (f"{rate:.1e}", f"{loss:.4f}", f"{smooth:.4f}")
        for rate, loss, smooth in list(zip(found.lrs, found.losses, found.smoothed, strict=True))[::every]
    ]
    console.table("Learning rates", ("lr", "loss", "smoothed"), rows)
    if found.suggestion is None:
        return
    console.say(
        f"suggestion: optim.lr={found.suggestion:.1e}, a tenth of the rate with the least loss "
        f"(the recipe has {found.recipe_lr:.1e}); picture: {place}"
    )
