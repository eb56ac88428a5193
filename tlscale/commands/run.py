"""A recipe's run: everything up to the first step or fit, the same for training and for a probe.

Chapters: process; folder; data, model and weights; plan; and then the job that the recipe asks for.
"""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from tlscale.commands.probe import probe
from tlscale.commands.tables import show_plan
from tlscale.data.identity import scored_identity, used_identity
from tlscale.data.sources.open import BadImages
from tlscale.distributed.processes import start_processes
from tlscale.distributed.signals import StopRequest
from tlscale.errors import ResumeError, Stopped
from tlscale.recipe.load import diff_recipes, load_stored_recipe, with_values
from tlscale.recipe.schema import Recipe
from tlscale.storage.run_folder import Mode, RunFolder, claim, naming_disk_errors, write_json
from tlscale.tracking.console import Console
from tlscale.tracking.stopwatch import Stopwatch
from tlscale.training.corrections import refuse_uncorrected
from tlscale.training.loop import train
from tlscale.training.run_info import read_record
from tlscale.training.setup import RunSetup, set_up

# A resumed run may differ in these: they change nothing of what is learned, or only rounding. The exception is batch
# norm and dropout on other passes (`compute.micro_batch_size`, the number of processes), which `computed` announces.
MAY_CHANGE = (
    "checkpoint.",
    "codes.cache_gib",
    "codes.disk_gib",
    "codes.keep",
    "codes.memory_mib",
    "compute.engine",
    "compute.num_processes",
    "compute.hang_timeout_s",
    "compute.micro_batch_size",
    "data.cache_mib",
    "data.workers",
    "evaluate.batch_size",
    "log_every",
    "non_finite.",
    "track",
    "wandb",
)


def run(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    watch: Stopwatch | None = None,
) -> dict[str, Any]:
    """Train, or fit a probe, as the recipe says.

    Args:
        recipe: from `load_recipe`.
        out: the run folder; by itself `runs/<recipe name>`.
        resume: go on from the newest valid checkpoint there, or start if there is none.
        overwrite: replace a run that is there.
        watch: measures the run; by default from this call.

    Returns:
        What `result.json` holds.

    Raises:
        TlscaleError: wrong input, a run that failed, or `Stopped` after a signal, when all is saved.
    """
    watch = watch or Stopwatch()
    # -- process ------------------------------------------------------------------------------------------------
    processes = start_processes(recipe.compute)
    torch.use_deterministic_algorithms(recipe.compute.deterministic)
    mode: Mode = "resume" if resume else "overwrite" if overwrite else "fresh"
    folder = RunFolder(Path(out) if out is not None else Path("runs") / recipe.name)
    # -- folder: the main process holds it for all ----------------------------------------------------------------
    stop = StopRequest(folder.stop if processes.is_main else None)
    with closing(processes), stop, processes.main_holds(lambda: claim(folder.path, mode)):
        console = Console(enabled=processes.is_main)
        processes.run_on_main(_obey_earlier_stop, folder)
        processes.run_on_main(_forget_stop, folder, console)
        record = None if overwrite else processes.run_on_main(read_record, folder)
        if record is not None:
            recipe = with_values(recipe, processes.run_on_main(_refuse_other_recipe, recipe, folder, console))
            done = processes.run_on_main(lambda: folder.result.read_text() if folder.result.exists() else None)
            if done is not None:
                console.say(f"'{folder.path}' is complete already; its figures are in {folder.result}")
                return dict(json.loads(done))

        # -- data, model and weights: whatever is wrong with them ends the run here -------------------------------
        bad_images = BadImages.from_plain(record["bad_images"]) if record else None
        with processes.main_first():  # what a hub has to give is fetched once
            setup = set_up(recipe, world_size=processes.world_size, bad_images=bad_images, watch=watch)

        # -- plan -------------------------------------------------------------------------------------------------
        show_plan(setup, console, device=str(processes.device))
        if record is not None:
            processes.run_on_main(_refuse_other_inputs, record, setup, folder)
            record = processes.run_on_main(_compare_data, record, setup, folder, console)
            processes.run_on_main(_refuse_other_transform, record, setup, folder)
            record = processes.run_on_main(refuse_uncorrected, folder, setup, record)
        if resume:
            watch.add_earlier(processes.run_on_main(_spent_before, folder))
        processes.run_on_main(folder.stopped.unlink, missing_ok=True)
        job = train if recipe.probe is None else probe
        try:
            return job(setup, folder, processes, stop, record, console)
        except Stopped as stopped:
            if processes.is_main:
                _mark_stopped(folder, stop, stopped, watch)
            raise


def _obey_earlier_stop(folder: RunFolder) -> None:
    """torchrun takes a stop for a failure, and with --max_restarts it starts the processes again that just stopped.

    Raises:
        Stopped: this is such a start.
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and folder.stopped.exists():
        raise Stopped(f"'{folder.path}' was stopped, and this is only torchrun's restart: nothing was done")


def _forget_stop(folder: RunFolder, console: Console) -> None:
    """A request to stop is one to a run that is there."""
    if folder.stop.exists():
        console.say(f"'{folder.stop}' is from before this start, and removed")
        folder.stop.unlink()


def _spent_before(folder: RunFolder) -> dict[str, float]:
    """The seconds of all starts up to one that was stopped; none where the last one was not."""
    try:
        return {
            str(part): float(spent_s) for part, spent_s in json.loads(folder.stopped.read_text())["spent_s"].items()
        }
    except (OSError, ValueError, KeyError, AttributeError):  # of an older version, or put there by hand
        return {}


def _mark_stopped(folder: RunFolder, stop: StopRequest, stopped: Stopped, watch: Stopwatch) -> None:
    """Leave word for a launcher, which sees no exit code of ours, and take away the request that was obeyed."""
    by = stop.by or "a signal to another process"
    with naming_disk_errors(folder.stopped):
        write_json(folder.stopped, {"by": by, "message": str(stopped), "spent_s": watch.spent()})
    folder.stop.unlink(missing_ok=True)


def _refuse_other_recipe(recipe: Recipe, folder: RunFolder, console: Console) -> dict[str, dict[str, object]]:
    """Compare the recipe with that of the run.

    Returns:
        By section the keys that came after the run began, with what it does all the same.
    """
    stored, older, notes = load_stored_recipe(folder.recipe)
    for note in notes:
        console.say(note)
    for section, keys in older.items() if recipe.probe is None else ():  # a probe has no use for them
        for key, value in keys.items():
            console.say(f"{section}.{key}: {value}, as the run began: it is older than this key")
    changes = [
        f"{key}: {old!r} -> {new!r}"
        for key, old, new in diff_recipes(stored, with_values(recipe, older))
        if not key.startswith(MAY_CHANGE) or (key == "codes.keep" and _sees_other_views(stored, recipe))
    ]
    if changes:
        lines = "\n  ".join(changes)
        raise ResumeError(
            f"'{folder.path}' cannot be resumed with another recipe:\n  {lines}\n  Its own recipe is "
            f"'{folder.recipe}'; another recipe wants another folder: --out DIR"
        )
    return older


def _sees_other_views(stored: Recipe, recipe: Recipe) -> bool:
    """With `codes.keep: always` a single view is kept for all epochs; otherwise each epoch sees a new one."""
    is_one = bool(recipe.data.augment) and recipe.codes.views == 1 and recipe.distill is None
    return is_one and (stored.codes.keep == "always") != (recipe.codes.keep == "always")


def _refuse_other_inputs(record: dict[str, Any], setup: RunSetup, folder: RunFolder) -> None:
    now, then = {"weights": setup.weights.sha256}, {"weights": record["weights"]["sha256"]}
    if setup.teacher is not None:
        now["teacher's weights"], then["teacher's weights"] = setup.teacher.digest, record["teacher"]["sha256"]
    for what, digest in then.items():
        _refuse_another(what, digest, now[what], folder)


def _refuse_other_transform(record: dict[str, Any], setup: RunSetup, folder: RunFolder) -> None:
    """Refuse a run of an older version, which took the size of the first training image for that of all."""
    then, now = record["input"], setup.spec.to_plain()
    changes = [f"{key}: {then.get(key)!r} -> {value!r}" for key, value in now.items() if then.get(key) != value]
    if changes:
        keep = f", with data.crop_pct={then['crop_pct']:g} to have it as it was" if "crop_pct" in then else ""
        raise ResumeError(
            f"'{folder.path}' cannot be resumed: its images would be fed in another way ({', '.join(changes)}). "
            "Versions of tlscale before this one took crop_pct from the size of the first training image; now it "
            f"comes from the median size of the training split. Start another run: --out DIR{keep}"
        )


def _compare_data(record: dict[str, Any], setup: RunSetup, folder: RunFolder, console: Console) -> dict[str, Any]:
    """Refuse other training or validation images; announce and record another test split.

    Returns:
        What `run.json` holds from now on.

    Raises:
        ResumeError: the run would go on with other data.
    """
    data, then = setup.data, record["data"]
    if "used_sha256" not in then:
        console.say(f"'{folder.path}' is of an older tlscale: its data were compared by the older identity")
        _refuse_another("data", then["fingerprint"], str(data.identity["fingerprint"]), folder)
        return record
    _refuse_another("data", then["used_sha256"], used_identity(data, then["used_by"]).sha256, folder)
    if data.test is None and "test" not in then["num_images"]:
        return record  # the validation split is scored, and that is the same
    scored = scored_identity(data, then["scored_by"])
    if scored.sha256 == then["scored_sha256"]:
        return record
    console.say(
        f"WARNING: the test split is not the one that '{folder.path}' was started with ({then['scored_sha256'][:12]} "
        f"then, {scored.sha256[:12]} now). Training is not affected; the score will be of the new one",
        style="bold red",
    )
    earlier = [*then.get("earlier_scored_sha256", []), then["scored_sha256"]]
    now = {"scored_sha256": scored.sha256, "scored_by": scored.by, "num_images": data.identity["num_images"]}
    record = {**record, "data": {**then, **now, "earlier_scored_sha256": earlier}}
    with naming_disk_errors(folder.run_json):
        write_json(folder.run_json, record)
    return record


def _refuse_another(what: str, then: str, now: str, folder: RunFolder) -> None:
    if then != now:
        raise ResumeError(
            f"'{folder.path}' cannot be resumed: its {what} are not those that it was started with "
            f"({then[:12]} then, {now[:12]} now). Bring them back, or start another: --out DIR"
        )
