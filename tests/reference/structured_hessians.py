"""Hessians to measure: symmetric matrices with known spectra, and those of small networks, written out by autograd."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from schatten.diagnostics.hessian import Hessian

SHAPE = (6, 10)
N = 60


def rotated(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    U = torch.linalg.qr(torch.randn(len(values), len(values), generator=gen(seed), dtype=torch.float64)).Q
    return (U * values) @ U.mT


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_values(seed: int = 3) -> Tensor:
    return torch.randn(N, generator=gen(seed), dtype=torch.float64)


# Outliers as networks have them, indefinite; a continuum on both sides of 0; a heavy tail; zeros; each eigenvalue ten times.
SPECTRA = {
    "outliers": torch.cat([torch.tensor([10.0, 6.0, 4.0, -3.0]).double(), 0.3 * random_values()[4:]]),
    "continuum": torch.linspace(-1, 1.5, N, dtype=torch.float64),
    "heavy tail": 1 / torch.arange(1, N + 1, dtype=torch.float64),
    "low rank": torch.where(torch.arange(N) < 20, random_values(), 0.0),
    "multiple": torch.linspace(-1, 2, 6, dtype=torch.float64).repeat_interleave(10),
}


def products(H: Tensor, shape: tuple[int, ...] = SHAPE):
    """V -> H V for V of a shape, with H over its entries."""
    return lambda V: (H @ V.reshape(-1).to(H)).view(shape)


def network(sizes: tuple[int, ...] = (7, 10, 6, 4), activation: type[nn.Module] = nn.Tanh, steps: int = 0):
    """(H v of the second weight, that weight, the loss) of a small network on random data after some steps of descent."""
    torch.manual_seed(0)
    layers = [nn.Linear(i, o, bias=False) for i, o in pairwise(sizes)]
    model = nn.Sequential(*[part for layer in layers for part in (layer, activation())][:-1]).double()
    X, T = torch.randn(30, sizes[0], dtype=torch.float64), torch.randint(0, sizes[-1], (30,))

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(X), T)

    for _ in range(steps):
        for p, g in zip(model.parameters(), torch.autograd.grad(loss(), list(model.parameters())), strict=True):
            p.data.sub_(g, alpha=0.3)
    W = layers[1].weight
    hessian = Hessian(loss, [W], model=model)
    return lambda V: hessian.within(0, V), W, loss
