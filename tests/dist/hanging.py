"""A run in which the network of one process waits for ever in the middle; test_hang.py launches it."""

import os
import sys
import time
from pathlib import Path

import timm
from timm.models import register_model
from torch import nn

import tlscale
from tests.small_runs import small_recipe


class Stuck(nn.Module):
    """Passes images on, for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images):
        self.calls += self.training
        if self.calls > 6 and os.environ["RANK"] == "1":
            self.wait_for_ever()
        return images

    def wait_for_ever(self):
        time.sleep(600)


@register_model
def stuck_vit(pretrained=False, **keys):
    network = timm.create_model("test_vit", pretrained=False, **keys)
    network.patch_embed.proj = nn.Sequential(Stuck(), network.patch_embed.proj)
    return network


if __name__ == "__main__":
    place, data = Path(sys.argv[1]), Path(sys.argv[2])
    changes = {"backbone": {"name": "stuck_vit"}, "compute": {"hang_timeout_s": 6, "num_processes": 2}}
    tlscale.run(small_recipe(place / f"{os.environ['RANK']}.yaml", data, **changes), place / "run")
