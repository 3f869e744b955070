"""Ridge regression of a linear layer, from data that comes in batches."""

import torch
from torch import Tensor, nn


class LeastSquares:
    """
    Collects what a linear layer gets and what it should give.

    Args:
        inputs, outputs: numbers of features.
        device: where the sums are kept, in float64.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device):
        options = {"dtype": torch.float64, "device": device}
        self.count = 0
        # Near the means, so that products in float32 do not round away what varies little beside a large mean.
        self.origin_x: Tensor | None = None
        self.origin_y: Tensor | None = None
        self.sum_x, self.sum_y = torch.zeros(inputs, **options), torch.zeros(outputs, **options)
        self.xx, self.xy = torch.zeros(inputs, inputs, **options), torch.zeros(inputs, outputs, **options)

    def add(self, x: Tensor, y: Tensor, weight: Tensor | None = None):
        """`(..., inputs)`, `(..., outputs)`; `(...)` is the weight of each row in the sum of squares, 1 by default."""
        x, y = x.flatten(0, -2).float(), y.flatten(0, -2).float()
        if self.origin_x is None:
            self.origin_x, self.origin_y = x.mean(0), y.mean(0)
        x, y = x - self.origin_x, y - self.origin_y
        weighted = x if weight is None else x * weight.flatten()[:, None]
        self.count += len(x) if weight is None else weight.sum().item()
        self.sum_x += weighted.sum(0).double()
        self.sum_y += (y if weight is None else y * weight.flatten()[:, None]).sum(0).double()
        self.xx += (weighted.T @ x).double()
        self.xy += (weighted.T @ y).double()

    @property
    def covariance(self) -> Tensor:
        """`(inputs, inputs)` of the inputs, float64."""
        mean = self.sum_x / self.count
        return self.xx / self.count - torch.outer(mean, mean)

    def solve(self, weight: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """
        The weights nearest to the wanted outputs, pulled towards the present ones.

        Args:
            weight: `(outputs, inputs)`, the present weights.
            ridge: strength of the pull, in units of the mean variance of the inputs.

        Returns:
            Weight and bias in the dtype of `weight`.
        """
        mean_x, mean_y = self.sum_x / self.count, self.sum_y / self.count
        xx = self.covariance
        xy = self.xy / self.count - torch.outer(mean_x, mean_y)
        missing = xy - xx @ weight.double().T
        pull = ridge * xx.diagonal().mean().clamp_min(1e-12)
        change = torch.linalg.solve(xx + pull * torch.eye(len(xx), dtype=xx.dtype, device=xx.device), missing)
        solved = weight.double() + change.T
        bias = mean_y + self.origin_y - solved @ (mean_x + self.origin_x)
        return solved.to(weight.dtype), bias.to(weight.dtype)

    def refit(self, linear: nn.Linear, ridge: float):
        """Puts the solution into a linear layer."""
        weight, bias = self.solve(linear.weight, ridge)
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
