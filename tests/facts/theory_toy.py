"""Two singular values against the ball, after figures 1-3 of Chen, Li and Liu (2506.15054), whose toy problem is not published.

X is 2 x 2 and stays diagonal: F(X) = (d - d*)^T A (d - d*) / 2 with d the diagonal of X, A = [[1, 0.6], [0.6, 1]].
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import schatten

A = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)

# A's largest eigenvalue: F is smooth with this constant.
SMOOTHNESS = 1.6

LR = 2e-3
BETAS = (0.9, 0.99)


@dataclass(frozen=True, eq=False)
class Path:
    """Weights and momenta, (steps + 1, 2, 2), and losses, (steps + 1), of Muon with implicit decay; M averages gradients."""

    weights: Tensor
    momenta: Tensor
    losses: Tensor
    weight_decay: float

    @property
    def sigma(self) -> list[tuple[float, float]]:
        """Singular values in the order of the diagonal."""
        return [tuple(d.tolist()) for d in self.weights.diagonal(dim1=-2, dim2=-1).abs()]

    @property
    def excess(self) -> Tensor:
        """V_B."""
        return (torch.linalg.matrix_norm(self.weights, ord=2) - 1 / self.weight_decay).clamp(min=0)


def loss(X: Tensor, optimum: tuple[float, float]) -> Tensor:
    d = X.diagonal() - torch.tensor(optimum, dtype=X.dtype)
    return d @ A @ d / 2


def muon(start: tuple[float, float], optimum: tuple[float, float], weight_decay: float, steps: int) -> Path:
    """Muon as Lion-K with the nuclear norm: exact, two betas, constant learning rate."""
    X = nn.Parameter(torch.diag(torch.tensor(start, dtype=torch.float64)))
    opt = schatten.LionK(
        [X], schatten.maps.Nuclear(schatten.solvers.svd()), lr=LR, weight_decay=weight_decay, betas=BETAS, decay="implicit"
    )
    weights, momenta, losses = [], [], []
    for t in range(steps + 1):
        opt.zero_grad()
        value = loss(X, optimum)
        value.backward()
        weights.append(X.detach().clone())
        momenta.append(opt.state[X]["momentum_buffer"].detach().clone())
        losses.append(value.detach())
        if t < steps:
            opt.step()
    return Path(torch.stack(weights), torch.stack(momenta), torch.stack(losses), weight_decay)
