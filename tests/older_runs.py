"""Run folders, checkpoints and codes of an older tlscale, in `tests/assets/older_runs`, and the data behind them.

Everything there was made once, by `make.py` in it with the commit 9e77f35, and is not made again: it shows that what
people have still loads. Recipes there name places relative to that folder, so a test works in a copy of it.
"""

import os
import shutil
from pathlib import Path

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

ASSETS = Path(__file__).parent / "assets" / "older_runs"
# Git keeps no times, and the older identity of data has them in it.
CHANGED_NS = 1_760_000_000_123_456_789
MADE_IN = "/tmp/older"

_CFG = {"num_classes": 1000, "first_conv": "conv1.0", "classifier": "fc"}
default_cfgs = generate_default_cfgs({"older_resnet.untrained": _CFG})


@register_model
def older_resnet(pretrained=False, **keys) -> nn.Module:
    """A ResNet of a few thousand parameters, known to timm wherever this module is imported."""
    shape = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (4, 4, 8, 8)}
    return build_model_with_cfg(ResNet, "older_resnet", pretrained, **shape, stem_width=4, stem_type="deep", **keys)


def put_times(folder: Path) -> None:
    """Give all images below `folder` the time of change that the older runs know."""
    for path in folder.rglob("*.png"):
        os.utime(path, ns=(CHANGED_NS, CHANGED_NS))


def put_older_runs(folder: Path) -> Path:
    """A copy of all of it that a test may change; make it the working folder, for the recipes in it.

    A run's own `recipe.yaml` has absolute paths, and a resume compares them; they become those of the copy. `run.json`
    stays as it is: the place in it is not compared.
    """
    shutil.copytree(ASSETS, folder, dirs_exist_ok=True)
    put_times(folder / "photos")
    for recipe in (folder / "runs").glob("*/recipe.yaml"):
        recipe.write_text(recipe.read_text().replace(f"{MADE_IN}/", f"{folder}/"))
    return folder
