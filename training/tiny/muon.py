"""Muon in float32, for CPUs; in bfloat16 for those that have instructions for it.

``torch.optim.Muon`` is the same with its matrices in bfloat16, which other CPUs multiply so slowly
that a step of the embedded DiT takes three times as long.

Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), for the
method and the coefficients; Liu et al. (arXiv 2502.16982) for the size of an update.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_A, _B, _C = 3.4445, -4.7750, 2.0315
_ROUNDS = 5
_LIKE_ADAMW = 0.2
"""Root mean square of an update of AdamW, so that rates and decay mean what they do there."""


def orthogonalized(matrix: Tensor) -> Tensor:
    """The matrix with all singular values brought near 1, by Newton-Schulz iteration."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_ROUNDS):
        a = x @ x.T
        x = torch.addmm(x, torch.addmm(a, a, a, beta=_B, alpha=_C), x, beta=_A)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each matrix is orthogonalized.

    Args:
        matrices: Parameters with two dimensions.
        lr: Rate, as for AdamW.
        momentum: Share of the former momentum that is kept (Nesterov's).
        weight_decay: Decoupled, as in AdamW.
        dtype: What updates are orthogonalized in.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the parameters that have a gradient."""
        for group in self.param_groups:
            lr, keep = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                mean = state["momentum"].lerp_(parameter.grad, 1 - keep)
                update = orthogonalized(parameter.grad.lerp(mean, keep).to(self.dtype))
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.sub_(
                    update.to(parameter.dtype), alpha=lr * _LIKE_ADAMW * max(parameter.shape) ** 0.5
                )
