"""A run in which the network of one process fails, or waits for ever, in the middle; test_fsdp.py and test_hang.py
launch it.
"""

import os
import sys
import time
from pathlib import Path

import timm
from timm.models import register_model
from torch import nn

import tlscale
from tests.small_runs import small_recipe


class Trouble(nn.Module):
    """Passes images on, for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images):
        self.calls += self.training
        if self.calls > 6 and os.environ["RANK"] == "1":
            KINDS[sys.argv[3]][0]()
        return images


def fail():
    raise RuntimeError("a layer of rank 1 fails")


def wait_for_ever():
    time.sleep(600)


KINDS = {"fails": (fail, {"engine": "fsdp2"}), "hangs": (wait_for_ever, {"hang_timeout_s": 6})}


@register_model
def troubled_vit(pretrained=False, **keys):
    network = timm.create_model("test_vit", pretrained=False, **keys)
    network.norm_pre = Trouble()
    return network


if __name__ == "__main__":
    place, data, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    changes = {"backbone": {"name": "troubled_vit"}, "compute": {"num_processes": 2, **KINDS[kind][1]}}
    tlscale.run(small_recipe(place / f"{os.environ['RANK']}.yaml", data, **changes), place / "run")
