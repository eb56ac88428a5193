"""A run that is spread over processes, one of which fails in the middle of a forward pass; test_fsdp.py launches it."""

import os
import sys
from pathlib import Path

import timm
from timm.models import register_model
from torch import nn

import tlscale
from tests.small_runs import small_recipe


class Failing(nn.Module):
    """Passes images on, for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images):
        self.calls += self.training
        if self.calls > 6 and os.environ["RANK"] == "1":
            raise RuntimeError("a layer of rank 1 fails")
        return images


@register_model
def failing_vit(pretrained=False, **keys):
    network = timm.create_model("test_vit", pretrained=False, **keys)
    network.norm_pre = Failing()
    return network


if __name__ == "__main__":
    place, data = Path(sys.argv[1]), Path(sys.argv[2])
    changes = {"backbone": {"name": "failing_vit"}, "compute": {"engine": "fsdp2", "num_processes": 2}}
    tlscale.run(small_recipe(place / f"{os.environ['RANK']}.yaml", data, **changes), place / "run")
