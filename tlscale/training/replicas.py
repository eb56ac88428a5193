"""Name the tensors that every process must have in the same bits."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor

from tlscale.models.classifier import Classifier
from tlscale.training.ema import Ema


def replicated_tensors(network: Classifier, ema: Ema | None) -> dict[str, Tensor]:
    """Return trained parameters by the names that rules match, buffers, and averages: the same names on every process.

    What is sharded over the processes (`compute.engine: fsdp2`) is not among them: each has another shard of it.
    """
    tensors = {name: param for name, param in network.rule_names().items() if param.requires_grad}
    buffers = {name.removeprefix("backbone."): buffer for name, buffer in network.named_buffers()}
    averages = {f"average of {name}": average for name, average in ema.averages.items()} if ema is not None else {}
    return {
        name: tensor for name, tensor in {**tensors, **buffers, **averages}.items() if not isinstance(tensor, DTensor)
    }
