"""`tlscale plan`: everything up to the first step, shown, and what it will need in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from tlscale.optim import build_optimizer
from tlscale.prepare import Prepared, prepare
from tlscale.progress import Progress
from tlscale.recipe.schema import Recipe
from tlscale.screen import show_plan

_SAMPLE_IMAGES = 2  # batch norm in train mode wants more than one


def plan(recipe: Recipe, *, world_size: int) -> None:
    """Show what `run` would do with `world_size` processes; nothing is trained and nothing is written."""
    prepared = prepare(recipe, world_size=world_size)
    screen = Progress(0)
    show_plan(prepared, screen, device=f"planned for {world_size} process{'es' if world_size > 1 else ''}")
    build_optimizer(prepared.groups, recipe.optim)
    screen.table("Memory of a process", ("what", "MiB"), _memory_rows(prepared))


def _memory_rows(prepared: Prepared) -> list[tuple[str, str]]:
    params = list(prepared.classifier.parameters())
    weights = sum(param.numel() * param.element_size() for param in params)
    gradients = sum(param.numel() * param.element_size() for param in params if param.requires_grad)
    micro = prepared.split.micro_batch_size
    activations = activation_bytes(prepared) * micro
    bytes_of = {
        "weights": weights,
        "gradients": gradients,
        "optimizer, two values a parameter (as Adam)": 2 * gradients,
        f"activations of {micro} images, measured on {_SAMPLE_IMAGES} in {prepared.dtype}": activations,
    }
    rows = [(what, f"{count / 2**20:,.1f}") for what, count in bytes_of.items()]
    return [*rows, ("sum, without the libraries' own", f"{sum(bytes_of.values()) / 2**20:,.1f}")]


def activation_bytes(prepared: Prepared) -> float:
    """Bytes that one image's forward pass keeps for the backward pass, measured on the CPU."""
    spec, network = prepared.spec, prepared.classifier
    own = {param.untyped_storage().data_ptr() for param in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    images = torch.zeros(_SAMPLE_IMAGES, spec.in_chans, spec.image_size, spec.image_size, dtype=prepared.dtype)
    with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = network(images)
    del outputs
    for name, buffer in network.named_buffers():
        buffer.copy_(buffers[name])
    return sum(kept.values()) / _SAMPLE_IMAGES
