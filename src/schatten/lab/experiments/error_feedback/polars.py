"""Workers that orthogonalise their own noisy gradients and send the polar factors: how short is the mean?

    shrink = ||mean_j msign(G + noise_j)||_F / sqrt(r),   G of rank r = min(m, n),   j = 1 .. N

With c the mean product <O_i, O_j> / r of two workers' factors, the mean square is c + (1 - c) / N for every N: of equal
factors 1, of unrelated ones 1 / N.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from schatten.functions import apply_map
from schatten.maps import Nuclear
from schatten.solvers import svd

# Spectrum of the signal by name, k = 1 .. r.
SIGNALS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "flat": torch.ones_like,
    "k^-1/2": lambda k: k**-0.5,
    "k^-2/3": lambda k: k ** (-2 / 3),
    "k^-1": lambda k: 1 / k,
    "rank r/4": lambda k: (k <= len(k) / 4).to(k.dtype),
}

# The signal's size of which the noise is a multiple, as the deviation of an entry of an m x n matrix.
UNITS: Mapping[str, Callable[[Tensor], float]] = {
    "Frobenius norm": lambda G: float(G.norm()) / math.sqrt(G.numel()),
    "operator norm": lambda G: float(torch.linalg.matrix_norm(G, 2)) / sum(map(math.sqrt, G.shape)),
    "entry, of msign(G)": lambda G: float(torch.linalg.matrix_norm(G, 2)),
}

WORKERS = (2, 3, 5, 8, 11)

NOISES = (0.25, 0.5, 1.0, 1.5, 2.0, 4.0)


def signal(name: str, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """m x n with the spectrum of SIGNALS[name] and random singular vectors, m <= n."""
    m, n = shape
    bases = [torch.linalg.qr(torch.randn(size, m, generator=generator, dtype=torch.float64))[0] for size in (m, n)]
    return bases[0] * SIGNALS[name](torch.arange(1, m + 1, dtype=torch.float64)) @ bases[1].mT


def shrink(G: Tensor, deviation: float, workers: int, generator: torch.Generator) -> float:
    """The length of the mean of `workers` polar factors of G with Gaussian entries of `deviation` added, in units of one."""
    noise = torch.randn(workers, *G.shape, generator=generator, dtype=G.dtype)
    mean = apply_map(G + deviation * noise, Nuclear(svd())).mean(0)
    return float(mean.norm()) / math.sqrt(min(G.shape))


def measured(name: str, unit: str, size: int, seed: int) -> dict[str, Sequence[tuple[float, float]]]:
    """(workers, shrink) at noise 1 and (noise, shrink) of 11 workers, for the size x size signal of `seed`."""
    generator = torch.Generator().manual_seed(seed)
    G = signal(name, (size, size), generator)
    deviation = UNITS[unit](G)
    by_workers = [(N, shrink(G, deviation, N, generator)) for N in WORKERS]
    return {"by_workers": by_workers, "by_noise": [(x, shrink(G, x * deviation, WORKERS[-1], generator)) for x in NOISES]}
