"""Tell in `result.json` what a run's score is of: whose it is, and what the scored images have chosen.

- `scored_model`: `exported`, or `before_refit`: the score is of a probe's classifier that was fitted to the training
  images alone, and the exported one was fitted again, to the validation images too, and has no score of its own.
- `exported_model`: `fitted_on_train`, or `refitted_on_train_and_validation`.
- `selected_on`: `validation` where there is no test split and the scored images have chosen the step, layer, pooling
  or strength, so that the score is likely somewhat too high; else null.
- `majority`: `label`, the most frequent class of the training images, and `top1`, its share of the scored images.
"""

from __future__ import annotations

from typing import Any

from tlscale.codes.probes.select import Choice
from tlscale.data.sources.open import ImageSplit
from tlscale.training.metrics import majority
from tlscale.training.setup import RunSetup


def score_of_training(setup: RunSetup, split: ImageSplit, *, has_chosen: bool) -> dict[str, Any]:
    """Return the four keys of a run that trained.

    Args:
        setup: of the run.
        split: that is scored.
        has_chosen: whether the weights were chosen among several steps; one evaluation, in the end, chooses nothing.
    """
    return _score(setup, split, has_chosen=has_chosen, refitted=False)


def score_of_probe(setup: RunSetup, choice: Choice, split: ImageSplit) -> dict[str, Any]:
    """Return the four keys of a probe."""
    has_chosen = sum(map(len, choice.table.values())) > 1
    return _score(setup, split, has_chosen=has_chosen, refitted=choice.probe.refitted)


def _score(setup: RunSetup, split: ImageSplit, *, has_chosen: bool, refitted: bool) -> dict[str, Any]:
    data = setup.data
    return {
        "scored_model": "before_refit" if refitted and data.test is None else "exported",
        "exported_model": "refitted_on_train_and_validation" if refitted else "fitted_on_train",
        "selected_on": split.name if split.name == "validation" and has_chosen else None,
        "majority": majority(data.train.labels_N, split.labels_N, data.classes),
    }


def fitted(setup: RunSetup, *, refitted: bool = False) -> dict[str, Any]:
    """Return the keys of the exported model's `config.json` that tell what it was fitted and scored on."""
    scored_on = "test" if setup.data.test is not None else None if refitted else "validation"
    return {"fitted_on": ["train", "validation"] if refitted else ["train"], "scored_on": scored_on}
