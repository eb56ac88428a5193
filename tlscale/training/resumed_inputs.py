"""Check that a run is resumed with the weights, images and transform that it was started with.

Promise: other inputs are refused, but another test split, which is announced and recorded: it has no part in training.
"""

from __future__ import annotations

from typing import Any

from tlscale.data.identity import scored_identity, used_identity
from tlscale.errors import ResumeError, Text, option
from tlscale.storage.files import naming_disk_errors, write_json
from tlscale.storage.run_folder import RunFolder
from tlscale.tracking.console import Console
from tlscale.training.corrections import refuse_uncorrected
from tlscale.training.read_contents import replaced_images
from tlscale.training.setup import RunSetup

_OTHER_DATA = "Bring them back, or start another: " + option("out", "DIR")
_OTHER_DRAWS = (
    "They are random, by seed, and come out otherwise on another kind of CPU and with another torch or timm. Resume it "
    "where it began, or start another: "
) + option("out", "DIR")


def checked_run_info(run_info: dict[str, Any], setup: RunSetup, folder: RunFolder, console: Console) -> dict[str, Any]:
    """Check that a run can be resumed with these inputs; return what `run.json` holds from now on.

    Raises:
        ResumeError: its weights, data, transform or version are not those that it was started with.
    """
    remedy = _OTHER_DRAWS if setup.weights.num_tensors == 0 else _OTHER_DATA
    _refuse_another("weights", run_info["weights"]["sha256"], setup.weights.sha256, folder, remedy)
    if setup.teacher is not None:
        _refuse_another("teacher's weights", run_info["teacher"]["sha256"], setup.teacher.digest, folder)
    run_info = _compare_data(run_info, setup, folder, console)
    _refuse_other_transform(run_info, setup, folder)
    return refuse_uncorrected(folder, setup, run_info)


def _refuse_other_transform(run_info: dict[str, Any], setup: RunSetup, folder: RunFolder) -> None:
    """Refuse a run of an older version, which took the size of the first training image for that of all."""
    then, now = run_info["input"], setup.spec.to_plain()
    changes = {key: f"{then.get(key)!r} -> {value!r}" for key, value in now.items() if then.get(key) != value}
    if changes:
        listed = ", ".join(f"{key}: {change}" for key, change in changes.items())
        why = keep = ""
        if "crop_pct" in changes and "crop_pct" in then:
            why = (
                ". Versions of tlscale before this one took crop_pct from the size of the first training image; now it "
                "comes from the median size of the training split"
            )
            keep = f", with data.crop_pct={then['crop_pct']:g} to have it as it was"
        raise ResumeError(
            f"'{folder.path}' cannot be resumed: its images would be fed in another way ({listed}){why}",
            remedy="Start another run: " + option("out", "DIR") + keep,
        )


def _compare_data(run_info: dict[str, Any], setup: RunSetup, folder: RunFolder, console: Console) -> dict[str, Any]:
    """Refuse other training or validation images; announce and record another test split, as `checked_run_info`."""
    data, then = setup.data, run_info["data"]
    if "used_sha256" not in then:
        console.say(f"'{folder.path}' is of an older tlscale: its data were compared by the older identity")
        _refuse_another("data", then["fingerprint"], str(data.identity["fingerprint"]), folder)
        return run_info
    used = used_identity(data, then["used_by"])
    if used.sha256 != then["used_sha256"]:
        run_info = _with_repairs(run_info, setup, used.sha256, folder, console)
        then = run_info["data"]
    if replaced := replaced_images(folder, data, then):
        raise ResumeError(
            f"'{folder.path}' cannot be resumed: {len(replaced):,} images that it read are other ones now, such as "
            f"{replaced[0]}",
            remedy=_OTHER_DATA,
        )
    if data.test is None and "test" not in then["num_images"]:
        return run_info  # the validation split is scored, and that is the same
    scored = scored_identity(data, then["scored_by"])
    if scored.sha256 == then["scored_sha256"]:
        return run_info
    console.say(
        f"WARNING: the test split is not the one that '{folder.path}' was started with ({then['scored_sha256'][:12]} "
        f"then, {scored.sha256[:12]} now). Training is not affected; the score will be of the new one",
        style="bold red",
    )
    earlier = [*then.get("earlier_scored_sha256", []), then["scored_sha256"]]
    now = {"scored_sha256": scored.sha256, "scored_by": scored.by, "num_images": data.identity["num_images"]}
    run_info = {**run_info, "data": {**then, **now, "earlier_scored_sha256": earlier}}
    with naming_disk_errors(folder.run_json):
        write_json(folder.run_json, run_info)
    return run_info


def _with_repairs(
    run_info: dict[str, Any], setup: RunSetup, used_sha256: str, folder: RunFolder, console: Console
) -> dict[str, Any]:
    """Accept other training or validation images where only those differ that ended the run, as they could not be read.

    Returns:
        What `run.json` holds from now on.

    Raises:
        ResumeError: others differ, too.
    """
    then = dict(run_info["data"])
    unread = then.pop("unread", {"images": [], "rest_sha256": ""})
    images = [(split, int(position)) for split, position in unread["images"]]
    if used_identity(setup.data, then["used_by"], without=images).sha256 != unread["rest_sha256"]:
        _refuse_another("data", then["used_sha256"], used_sha256, folder)
    splits = {split.name: split for split in (setup.data.train, setup.data.validation) if split is not None}
    for split, position in images:
        console.say(f"{splits[split].where(position)}, which could not be read, is another file now: repaired")
    repaired = [*then.get("repaired", []), *unread["images"]]
    run_info = {**run_info, "data": {**then, "used_sha256": used_sha256, "repaired": repaired}}
    with naming_disk_errors(folder.run_json):
        write_json(folder.run_json, run_info)
    return run_info


def _refuse_another(what: str, then: str, now: str, folder: RunFolder, remedy: Text = _OTHER_DATA) -> None:
    if then != now:
        raise ResumeError(
            f"'{folder.path}' cannot be resumed: its {what} are not those that it was started with "
            f"({then[:12]} then, {now[:12]} now)",
            remedy=remedy,
        )
