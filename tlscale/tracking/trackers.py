"""Trackers (W&B, TensorBoard, ...): they get a copy of the log of a run, whose truth is `metrics.jsonl`.

Promise: a tracker never ends a run and never prompts. A tracker whose package is missing is an error at the start; one
that fails later (no network, a dead service) is switched off with one note, and training continues. Trackers run on the
main process only, and get the recipe without secrets. W&B, TensorBoard, MLflow and trackio keep their files inside the
run folder; W&B and TensorBoard take no argv, environment, code, git diff, host or user name, or console output along.
The others are passed through to Accelerate untested: where they write and what they take along is up to their own
settings.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tlscale.errors import RecipeError
from tlscale.recipe.schema import WandbSection
from tlscale.tracking.metrics_log import MetricsFile, read_metrics
from tlscale.tracking.redact import reason, redact
from tlscale.tracking.wandb_tracker import RunGroup, WandbSession, environment, new_run_id
from tlscale.tracking.working_folder import tracker_settings

__all__ = ["MetricsFile", "RunGroup", "Trackers", "open_trackers", "read_metrics"]

# Where a tracker's package has another name than the tracker, or where one of several will do.
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX")}
_REQUIREMENTS = {"tensorboard": "'tlscale[tensorboard]'"}


class _Tracker(Protocol):
    """Take figures for one service; whatever it raises is caught by `Trackers`."""

    name: str

    def log(self, record: Mapping[str, float], step: int) -> None: ...
    def summary(self, figures: Mapping[str, Any]) -> None: ...
    def close(self, exit_code: int) -> None: ...
    def abandon(self) -> None: ...


class Trackers:
    """Hold the trackers that are on; made by `open_trackers`. No method raises because of a tracker.

    Attributes:
        notes: what to show the user (where a run is recorded, which tracker failed), in order.
        wandb_run_id: keep it with the run and give it to `open_trackers` on resume; None without W&B.
    """

    def __init__(
        self,
        wandb_run_id: str | None = None,
        seen: Mapping[str, int] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.notes: list[str] = []
        self.wandb_run_id = wandb_run_id
        self._seen = dict(seen or {})
        self._say = say
        self._trackers: list[_Tracker] = []
        self._environment = contextlib.ExitStack()

    def note(self, text: str) -> None:
        self.notes.append(text)
        if self._say is not None:
            self._say(text)

    def log(self, record: Mapping[str, float], step: int) -> None:
        """Send figures; keys are `<kind>/<figure>` (`train/loss`).

        Figures that the tracker had before the run was resumed (their kind's step is in `seen`) are not sent again.
        """
        new = {key: value for key, value in record.items() if step > self._seen.get(key.split("/")[0], -1)}
        if new:
            self._each("logging", lambda tracker: tracker.log(new, step))

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Send final figures; only numbers and strings, no lists and no tables."""
        plain = {key: redact(value) for key, value in figures.items() if isinstance(value, str | int | float)}
        self._each("writing the summary", lambda tracker: tracker.summary(plain))

    def close(self, exit_code: int = 0) -> None:
        """End all trackers; a second call does nothing."""
        self._each("closing", lambda tracker: tracker.close(exit_code))
        self._trackers.clear()
        self._environment.close()

    def start(self, name: str, make: Callable[[], _Tracker | None], environment: Mapping[str, str]) -> None:
        """Add the tracker that `make` starts; `environment` holds until `close`, except what the user has set."""
        self._environment.enter_context(_environment_defaults(environment))
        try:
            tracker = make()
        except Exception as error:  # a tracker may raise anything, and must not end the run
            self.note(f"{name} could not be started, so it is off for this run ({reason(error)})")
        else:
            if tracker is not None:
                self._trackers.append(tracker)

    def _each(self, doing: str, act: Callable[[_Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                act(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                self.note(
                    f"{tracker.name} failed while {doing} and is switched off ({reason(error)}); the run goes on, "
                    "and metrics.jsonl has everything"
                )
                with contextlib.suppress(Exception):
                    tracker.abandon()


def open_trackers(
    names: Sequence[str],
    *,
    wandb: WandbSection | None,
    run_name: str,
    run_dir: Path,
    config: Mapping[str, Any],
    wandb_run_id: str | None,
    is_main: bool,
    group: RunGroup | None = None,
    seen: Mapping[str, int] | None = None,
    say: Callable[[str], None] | None = None,
) -> Trackers:
    """Start the trackers `names`, on the main process; on others the same object that does nothing.

    Args:
        wandb: the recipe's section; None: its defaults.
        run_dir: the run folder; each tracker has a folder in it.
        config: plain values (the resolved recipe, git sha, versions, world size); redacted here.
        wandb_run_id: that of the run that is resumed; None: a new one.
        group: the runs that W&B shows it with; the others get names alone.
        seen: on resume, kind -> the last step that was logged before (`MetricsFile.truncate_after` gives it).
        say: shows a note as soon as there is one; they are in `notes` as well.

    Raises:
        RecipeError: the package of a tracker is not installed; on every process, so that none is left waiting.
    """
    check_installed(names)
    if "wandb" in names and wandb_run_id is None:
        wandb_run_id = new_run_id()
    trackers = Trackers(wandb_run_id if "wandb" in names else None, seen, say)
    if not is_main:
        return trackers
    run_dir, config = run_dir.resolve(), redact(config)
    for name in names:
        if name == "wandb":
            assert wandb_run_id is not None
            section = wandb or WandbSection()
            session = WandbSession(section, run_name, run_dir, config, wandb_run_id, trackers.note, group)
            trackers.start("W&B", session.start, environment(run_dir / "wandb"))
        elif _may_start(name, trackers):
            folder = run_dir / name
            trackers.start(
                name,
                lambda name=name, folder=folder: _AccelerateTracker(name, run_name, folder, config),  # type: ignore[misc]
                _accelerate_environment(name, folder),
            )
    return trackers


def _may_start(name: str, trackers: Trackers) -> bool:
    """Name what a tracker would take from the working folder; where that names a server, it is off: it has our keys."""
    files, is_server = tracker_settings(name)
    if files:
        where = ", ".join(f"'{path}'" for path in files)
        off = (
            "names a server that would get your key, so it is off for this run: run in another folder, or move it home"
        )
        trackers.note(f"{name}: {where} in the working folder {off if is_server else 'has settings that it takes'}")
    return not is_server


def check_installed(names: Sequence[str]) -> None:
    missing = [
        name
        for name in names
        if not any(importlib.util.find_spec(package) is not None for package in _PACKAGES.get(name, (name,)))
    ]
    if missing:
        wanted = " ".join(_REQUIREMENTS.get(name, name) for name in missing)
        raise RecipeError(
            f"names {' and '.join(missing)}, but the package is not installed",
            key="track",
            remedy=f"Install it (pip install {wanted}), or take it out of 'track'.",
        )


@contextlib.contextmanager
def _environment_defaults(values: Mapping[str, str]) -> Iterator[None]:
    added = [key for key in values if key not in os.environ]
    os.environ.update({key: values[key] for key in added})
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


# --- The others, through Accelerate -----------------------------------------------------------------------------------


def _accelerate_environment(name: str, folder: Path) -> dict[str, str]:
    """Keep files inside the run folder where the tracker reads the place from the environment."""
    match name:
        case "mlflow":
            return {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}"}
        case "trackio":
            return {"TRACKIO_DIR": str(folder)}
    return {}


def _accelerate_arguments(tracker: Any, run_name: str, folder: Path) -> dict[str, Any]:  # noqa: ANN401
    """Return the arguments of one of Accelerate's classes; of one that no test has, those of `init_trackers`."""
    match tracker.name:
        case "tensorboard":
            return {"run_name": folder.name, "logging_dir": folder.parent}
        case "mlflow":
            artifacts = (folder / "artifacts").as_uri()
            return {"experiment_name": "tlscale", "logging_dir": artifacts, "run_name": run_name}
        case "trackio":
            return {"run_name": "tlscale", "name": run_name}
    place = {"logging_dir": str(folder)} if tracker.requires_logging_directory else {}
    return {"run_name": "tlscale", **place}


class _AccelerateTracker:
    """Wrap one of Accelerate's tracker classes, used as `Accelerator.init_trackers` uses it, but one at a time."""

    def __init__(self, name: str, run_name: str, folder: Path, config: Mapping[str, Any]) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # the classes ask it for the main process
        self.name = name
        self._step = 0
        folder.mkdir(parents=True, exist_ok=True)
        tracker = LOGGER_TYPE_TO_CLASS[name]
        self._tracker = tracker(**_accelerate_arguments(tracker, run_name, folder))
        self._tracker.start()
        self._tracker.store_init_configuration(dict(_flat(config)))

    def log(self, record: Mapping[str, float], step: int) -> None:
        self._step = step
        self._tracker.log(dict(record), step=step)

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Log the numbers as figures of the last step, below `final/`: these trackers have no summary."""
        numbers = {f"final/{key}": value for key, value in figures.items() if not isinstance(value, str)}
        self._tracker.log(numbers, step=self._step)

    def close(self, exit_code: int) -> None:
        self._tracker.finish()

    def abandon(self) -> None:
        self._tracker.finish()


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | int | float | bool]]:
    """Return `optim.lr: 0.1`; the trackers take only strings and numbers."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str | int | float) else json.dumps(value)
