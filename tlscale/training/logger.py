"""Write down a run while it runs: to `metrics.jsonl`, trackers and the console."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor

from tlscale.distributed.processes import Processes
from tlscale.errors import EXIT_FAILED
from tlscale.recipe.schema import Recipe
from tlscale.storage import faults
from tlscale.storage.run_folder import RunFolder
from tlscale.tracking.console import Console, number
from tlscale.tracking.redact import REDACTED, places_of, without_places
from tlscale.tracking.stopwatch import describe_seconds
from tlscale.tracking.trackers import MetricsFile, RunGroup, Trackers, open_trackers
from tlscale.training.evaluate import scalars
from tlscale.training.fold_parts import group_name
from tlscale.training.loop_state import LoopState
from tlscale.training.result import score_of
from tlscale.training.setup import RunSetup

_SHOWN = (
    "top1",
    "mean_average_precision",
    "loss",
    "macro_f1",
    "distill_loss",
)  # of an evaluation, besides what chooses the weights


class RunLogger:
    """Write lines of the loop to `metrics.jsonl`, trackers and the console, and measure the speed of training."""

    def __init__(
        self,
        setup: RunSetup,
        folder: RunFolder,
        processes: Processes,
        loop: LoopState,
        run_info: dict[str, Any],
        console: Console,
    ) -> None:
        recipe = setup.recipe
        self._order, self._loop, self._console = setup.order, loop, console
        self._watch, self._train_s, self._window_images = setup.watch, setup.watch.train_s(), 0
        self._has_trained = False
        self._metrics = MetricsFile(folder.metrics) if processes.is_main else None
        seen = (
            self._metrics.truncate_after(loop.step, owes_evaluation=loop.awaits_evaluation)
            if self._metrics is not None
            else {}
        )
        self.trackers: Trackers = open_trackers(
            recipe.track,
            wandb=recipe.wandb,
            run_name=recipe.name,
            run_dir=folder.path,
            config=_config(recipe, run_info),
            wandb_run_id=loop.wandb_run_id,
            is_main=processes.is_main,
            group=None if setup.part is None else setup.part.tracked_as,
            seen=seen,
            say=console.say,
        )
        loop.wandb_run_id = self.trackers.wandb_run_id

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.trackers.close(0 if error is None else getattr(error, "exit_code", EXIT_FAILED))
        if self._metrics is not None:
            self._metrics.close()

    def sync(self) -> None:
        """Force the log to the disk: a run that resumes from a checkpoint must find all lines up to it."""
        if self._metrics is not None:
            self._metrics.sync()

    def trained(self, num_images: int) -> None:
        """Count a step over so many images, of all processes."""
        self._window_images += num_images
        if not self._has_trained:
            self._has_trained = True
            self._console.detail(f"first step after {describe_seconds(self._watch.this_start())}")
        faults.at("step")

    def write_training(self, loss: float, lr: float, grad_norm: Tensor | None) -> None:
        """Write a line on training since the last one, with its speed: waiting for data counts, evaluation does not."""
        train_s = self._watch.train_s()
        speed = round(self._window_images / max(train_s - self._train_s, 1e-9), 1)
        self._train_s, self._window_images = train_s, 0
        norm = {} if grad_norm is None else {"grad_norm": float(grad_norm)}
        self._write("train", {"loss": loss, "lr": lr, **norm, "images_per_s": speed})
        self._console.update(
            self._loop.step,
            loss=loss,
            lr=lr,
            images_per_s=speed,
            epoch=self._loop.step / self._order.steps_per_epoch,
            best=self._loop.best[0][1] if self._loop.best else None,
        )

    def write_evaluation(
        self, split: str, figures: dict[str, Any], *, is_best: bool, error_of: str | None = None
    ) -> None:
        """Write a line on an evaluation; `error_of` is shown with its standard error, `is_best` is what is exported."""
        self._write("evaluate", {"split": split, **scalars(figures)})
        keys = [key for key in dict.fromkeys((*_SHOWN, error_of)) if key in figures]
        errors = {key: f" ± {number(figures[f'{key}_se'])}" for key in keys if key == error_of}
        shown = "  ".join(f"{key} {number(figures[key])}{errors.get(key, '')}" for key in keys)
        when = f" after step {self._loop.step}" if self._loop.step else ""  # a probe makes no steps
        rank = "best so far" if self._loop.chosen is None else "within one standard error of the best"
        self._console.detail(f"{split}{when}: {shown}{f'  ({rank})' if is_best else ''}")
        faults.at("evaluated")

    def write_skipped(self, count: int, most: int) -> None:
        """Write a line on a step that changed nothing, because it was not finite."""
        self._write("left_out", {"count": count})
        step = self._loop.step
        self._console.say(
            f"WARNING: step {step} is not finite and skipped ({count} of at most {most})", style="bold red"
        )

    def write_probe(self, codes: str, setting: float, top1: float | None, loss: float | None) -> None:
        """Write a line on one setting of a probe: its figures on the validation split."""
        self._write("probe", {"codes": codes, "setting": setting, "held_out_top1": top1, "held_out_loss": loss})

    def write_summary(self, result: dict[str, Any]) -> None:
        """Send the final figures to the trackers."""
        self.trackers.summary(_summary(result))

    def _write(self, kind: str, figures: dict[str, Any]) -> None:
        step = self._loop.step
        where = {
            "epoch": round(step / self._order.steps_per_epoch, 4),
            "images_seen": self._order.images_seen(step),
            "time_s": round(self._watch.total_s(), 3),
        }
        if self._metrics is not None:
            self._metrics.write({"kind": kind, "step": step, **where, **figures})
        self.trackers.log({f"{kind}/{key}": value for key, value in scalars({**where, **figures}).items()}, step)


def track_whole(
    recipe: Recipe,
    folder: RunFolder,
    processes: Processes,
    run_info: dict[str, Any],
    result: dict[str, Any],
    console: Console,
) -> None:
    """Send the final figures of a cross-validation to the trackers, as a run of its own among those of its folds.

    Its id is that of the cross-validation, so that one that is finished again gets no second run.
    """
    name = group_name(recipe, run_info)
    trackers = open_trackers(
        recipe.track,
        wandb=recipe.wandb,
        run_name=recipe.name,
        run_dir=folder.path,
        config=_config(recipe, run_info),
        wandb_run_id=run_info.get("id"),
        is_main=processes.is_main,
        group=None if name is None else RunGroup(name, "cross-validation"),
        say=console.say,
    )
    trackers.summary(_summary(result))
    trackers.close()


def _summary(result: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a result: its figures, with the interval of its score, those over folds, and seconds."""
    interval = result.get(f"{score_of(result)}_interval95")
    ends = {} if interval is None else dict(zip(("low", "high"), interval, strict=True))
    parts = {"interval95": ends, "folds": scalars(result.get("folds", {})), "seconds": result["seconds"]}
    nested = {f"{part}/{key}": value for part, figures in parts.items() for key, value in figures.items()}
    return {**scalars(result), **nested}


def _config(recipe: Recipe, run_info: dict[str, Any]) -> dict[str, Any]:
    """Return what trackers get of a run: its recipe and `run.json`, without places and without the W&B entity."""
    plain = recipe.to_plain()
    if recipe.wandb is not None and recipe.wandb.entity is not None:
        plain["wandb"] = {**plain["wandb"], "entity": REDACTED}
    config: dict[str, Any] = without_places({**plain, "run": run_info}, places_of(recipe))
    return config
