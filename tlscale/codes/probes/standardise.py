"""Scale codes to mean 0 and deviation 1, feature by feature.

Letters: N images that set the scale, M other images, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Scale:
    """Hold mean and standard deviation of each feature, float64; the deviation is 1 where all images agree."""

    mean_D: Tensor
    std_D: Tensor

    def apply(self, codes_MD: Tensor) -> Tensor:
        """Standardise other codes by this scale."""
        return (codes_MD.to(self.mean_D) - self.mean_D) / self.std_D


def standardise(codes_ND: Tensor) -> tuple[Scale, Tensor]:
    """Return the scale of some codes, and them standardised by it: float64 (N, D)."""
    # A device without float64 (mps) leaves the work to the CPU.
    device = torch.device("cpu") if codes_ND.device.type == "mps" else codes_ND.device
    constant_D = (codes_ND == codes_ND[0]).all(dim=0).to(device)
    result_ND = codes_ND.to(device, torch.float64, copy=True)
    mean_D = result_ND.mean(0)
    result_ND -= mean_D
    std_D = torch.where(constant_D, 1.0, result_ND.square().mean(0).sqrt())
    result_ND /= std_D
    # The mean of equal numbers may miss them by a rounding.
    result_ND[:, constant_D] = 0
    return Scale(mean_D, std_D), result_ND
