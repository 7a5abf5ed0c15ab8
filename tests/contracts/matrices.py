"""Matrices with known spectra, and a way to read a solver's output along the singular vectors of its input.

Not a test file: `contracts`, `facts` and `planted` import it.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from schatten.lab.models import GPT, GPTConfig


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    """A seeded standard Gaussian in fp64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(m: int, r: int, seed: int = 0) -> Tensor:
    """m x r with orthonormal columns."""
    return torch.linalg.qr(gaussian(m, r, seed=seed))[0]


def with_spectrum(m: int, n: int, sigma: Tensor, seed: int = 0) -> Tensor:
    """m x n in fp64 with singular values `sigma` and random singular vectors."""
    r = sigma.numel()
    return orthonormal(m, r, seed) @ torch.diag(sigma.double()) @ orthonormal(n, r, seed + 1).mT


def _repeated() -> Tensor:
    return with_spectrum(60, 72, torch.tensor([3.0, 1.0, 0.05]).repeat_interleave(20))


# Each name is a way in which implementations have failed: orientation, ill-conditioning, rank, ties, degenerate sides.
ZOO: dict[str, Tensor] = {
    "Gaussian tall": gaussian(96, 40),
    "Gaussian wide": gaussian(40, 96),
    "Gaussian square": gaussian(64, 64),
    "log-uniform 1 to 1e-3": with_spectrum(80, 64, torch.logspace(0, -3, 64)),
    "rank one": gaussian(48, 1) @ gaussian(1, 80, seed=1),
    "low rank plus noise": gaussian(64, 4) @ gaussian(4, 96, seed=1) + 1e-3 * gaussian(64, 96, seed=2),
    "repeated singular values": _repeated(),
    "log-uniform 1 to 1e-6": with_spectrum(64, 80, torch.logspace(0, -6, 64)),
    "power law 1/k^2": with_spectrum(60, 90, 1 / torch.arange(1, 61).double() ** 2, seed=5),
    "near zero": gaussian(30, 40, seed=6) * 1e-30,
    "huge": gaussian(40, 30, seed=7) * 1e30,
    "tiny entries": gaussian(30, 30, seed=8) * 1e-12,
    "power law 1/k": with_spectrum(96, 80, 1 / torch.arange(1, 81)),
    "one row": gaussian(1, 50),
    "one column": gaussian(50, 1),
    "1 x 1": gaussian(1, 1),
    "all ones 96 x 130": torch.ones(96, 130, dtype=torch.float64),
}


@lru_cache(maxsize=1)
def gpt_gradients() -> dict[str, Tensor]:
    """Gradients of the demo's GPT at random weights: one attention matrix and both of a network, in fp64."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocabulary=64, layers=2, width=48))
    ids = torch.randint(0, 64, (8, 65), generator=generator)
    # Words that repeat, as text has them: a random sequence has a gradient of noise only.
    ids = ids.sort(dim=-1).values
    model(ids[:, :-1], ids[:, 1:]).backward()
    named = dict(model.named_parameters())
    chosen = ("query", "output", "up", "down")
    return {
        f"GPT gradient {name}": p.grad.double()
        for name, p in named.items()
        if p.grad is not None and "blocks.1" in name and any(f"{part}.weight" in name for part in chosen)
    }


ZOO |= gpt_gradients()


class Reading(NamedTuple):
    """A solver's output P for an input U S V^T, in the input's own basis.

    `sigma`: the input's singular values over its Frobenius norm. `gain`: the diagonal of U^T P V, what became of each.
    `mixed`: U^T P V without its diagonal, what leaked from one direction into another. `outside`: what P holds outside
    the input's row and column space.

    The singular values of P alone would not do. They are blind to sign, so an output of -1, ascent along that
    direction, looks perfect; they are blind to a pairing of the wrong left with the wrong right vectors; and as they
    are sorted they cannot be matched to the sigma they came from.
    """

    sigma: Tensor
    gain: Tensor
    mixed: Tensor
    outside: Tensor

    def above(self, floor: float) -> "Reading":
        """The same, of the directions with sigma >= floor only."""
        kept = self.sigma >= floor
        return Reading(self.sigma[kept], self.gain[kept], self.mixed[kept][:, kept], self.outside)


def read(G: Tensor, P: Tensor) -> Reading:
    """`P` along the singular vectors of `G`, in fp64."""
    G, P = G.double(), P.double()
    largest = G.abs().max()
    U, s, Vh = torch.linalg.svd(G / largest, full_matrices=False)
    M = U.mT @ P @ Vh.mT
    gain = M.diagonal()
    return Reading(s / s.norm(), gain, M - torch.diag(gain), P - U @ M @ Vh)


def spectral_norm(M: Tensor) -> float:
    """The largest singular value; 0 for a matrix without entries."""
    return float(torch.linalg.matrix_norm(M, ord=2)) if M.numel() else 0.0
