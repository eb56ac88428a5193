"""Exponential moving average of the trained parameters, by name.

Parameters that no stage trains have no average; buffers (batch statistics are averages already) are the model's own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """After step s the average has moved towards the parameters by 1 - min(decay, (1 + s) / (10 + s)).

    The smaller decay at the beginning forgets the initial weights sooner, as TensorFlow's and timm's averages do.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], decay: float) -> None:
        self._params = dict(params)
        self._decay = decay
        self.averages: dict[str, Tensor] = {name: param.detach().clone() for name, param in self._params.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages after optimizer step `step` (from 1)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.averages.values()), list(self._params.values()), 1 - decay)

    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Take averages from a checkpoint; exactly those that are kept here."""
        assert averages.keys() == self.averages.keys(), "a checkpoint of other trainable parameters"
        for name, average in self.averages.items():
            average.copy_(averages[name])

    @torch.no_grad()
    def settle(self, names: Collection[str]) -> None:
        """Give these parameters, which are frozen from here on, the value of their average for good."""
        for name in names:
            self._params[name].copy_(self.averages[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within: the model has the averages as its parameters."""
        own = {name: param.detach().clone() for name, param in self._params.items()}
        self._assign(self.averages)
        try:
            yield
        finally:
            self._assign(own)

    @torch.no_grad()
    def _assign(self, values: Mapping[str, Tensor]) -> None:
        for name, param in self._params.items():
            param.copy_(values[name])
