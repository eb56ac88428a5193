"""For keys that no other row of wrong recipes is about: a value that the key does not take.

The message names the key and the value. Which other keys the recipe needs for it is in `BESIDE`.
"""

from __future__ import annotations

import copy
from typing import Any

import yaml

WRONG_VALUES: dict[str, Any] = {
    "data.source": "folders",
    "data.config": ["a", "b"],
    "data.revision": 7,
    "data.image_column": ["image"],
    "data.class_folder": "middle",
    "data.exclude": ["a.png", "b.png"],
    "data.train_split": None,
    "data.validation_split": ["val", "valid"],
    "data.test_split": 3,
    "data.validation_fraction": 0.6,
    "data.classes": "cat",
    "data.train_limit": 0,
    "data.fallback": "samples",
    "data.on_bad_image": "ignore",
    "data.max_megapixels": 0,
    "data.interpolation": "lanczos9",
    "data.crop_pct": 1.5,
    "data.channels_first": "CHW",
    "data.std": [0.0],
    "data.workers": -1,
    "data.cache_mib": "all of it",
    "backbone.sha256": "abc",
    "backbone.allow_pickle": "perhaps",
    "backbone.min_matched": 1.5,
    "backbone.drop_rate": 1.0,
    "backbone.drop_path_rate": -0.1,
    "adapters.lora.alpha": 0,
    "codes.layer": 4,
    "codes.dtype": "int8",
    "codes.disk_gib": -1,
    "codes.memory_mib": -1,
    "codes.cache_gib": -1,
    "probe.neighbours": 0,
    "probe.refit": "sometimes",
    "distill.teacher.name": ["resnet18"],
    "distill.teacher.weights": ["a", "b"],
    "distill.teacher.sha256": "abc",
    "distill.teacher.allow_pickle": "perhaps",
    "distill.teacher.min_matched": 2,
    "distill.teacher.in_chans": 0,
    "distill.teacher.drop_rate": 1.0,
    "distill.teacher.drop_path_rate": 1.0,
    "distill.run": ["a", "b"],
    "distill.image_size": 0,
    "distill.codes": -1,
    "distill.labels": "none",
    "stages.freeze": 5,
    "stages.lr_rules": ["a"],
    "stages.layer_decay": 0,
    "stages.schedule.warmup": "a while",
    "stages.schedule.decay": "cosinus",
    "stages.schedule.min_factor": 2,
    "stages.schedule.step_factor": 0,
    "optim.name": ["sgd", "adam"],
    "optim.weight_decay": -1,
    "optim.decay_norm_and_bias": "only bias",
    "optim.options": ["nesterov"],
    "optim.lr_rules": {"head": "fast"},
    "optim.weight_decay_rules": {"head": -1},
    "optim.layer_decay": 1.5,
    "optim.clip_grad_norm": 0,
    "optim.ema_decay": 1.0,
    "schedule.warmup": "5 minutes",
    "schedule.min_factor": -0.1,
    "loss.negative_margin": 1.0,
    "non_finite.most_steps": 0,
    "compute.gradient_checkpointing": "half",
    "compute.deterministic": "mostly",
    "compute.threads": 0,
    "compute.num_processes": 0,
    "compute.hang_timeout_s": 0,
    "evaluate.views": ["fliip"],
    "evaluate.batch_size": 0,
    "evaluate.select": "accuracy",
    "evaluate.choose": "last",
    "checkpoint.every": "5%%",
    "checkpoint.keep": 0,
    "checkpoint.keep_best": -1,
    "log_every": "often",
    "wandb.project": ["a", "b"],
    "wandb.entity": 5,
    "wandb.mode": "sometimes",
    "wandb.tags": "a, b",
}

BESIDE: dict[str, Any] = {
    "adapters": {"lora": {"layers": "a"}},
    "distill": {"teacher": {"name": "a"}, "match": {"layer4": "layer4"}},
    "stages": [{"duration": "1 epochs"}],
}


def value_rows() -> list[tuple[str, str, list[str], list[str]]]:
    """Rows of wrong recipes, each right but for one of these values."""
    return [(f"value_of_{key}", _text(key, value), [], [f": {_named(key)}"]) for key, value in WRONG_VALUES.items()]


def _named(key: str) -> str:
    """How the message names the key: with its place in a list of stages, and of an item that is wrong."""
    of_item = "[0]" if key in ("data.std", "evaluate.views") else ""
    return key.replace("stages.", "stages[0].") + f"{of_item} = "


def _text(key: str, value: Any) -> str:
    """A recipe with this value of a key."""
    recipe: dict[str, Any] = {"name": "a", "data": {"source": "fashion_mnist"}, "backbone": {"name": "resnet18"}}
    top, *names = key.split(".")
    if top == "wandb":
        recipe["track"] = ["wandb"]
    recipe.setdefault(top, copy.deepcopy(BESIDE.get(top, {})))
    *above, last = [top, *names]
    at: Any = recipe
    for name in above:
        at = at.setdefault(name, {})
        at = at[0] if isinstance(at, list) else at
    at[last] = value
    return yaml.safe_dump(recipe, sort_keys=False)
