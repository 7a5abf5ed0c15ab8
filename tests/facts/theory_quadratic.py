"""The 15 x 20 quadratic of 2505.23737, figure 3, as the experiment muon-vs-gd has it, and what else is asked of it."""

import torch

from schatten.lab.experiments.muon_vs_gd.quadratic import (
    ARRIVAL,
    COLUMNS,
    COUNTS,
    CROSSING,
    CROSSING_NORM,
    EDGES,
    END,
    END_NORM,
    FLOOR,
    MUON_STEP,
    NUCLEAR_RATIO,
    ROWS,
    START,
    START_NORM,
    STEPS,
    Quadratic,
    arrival,
    crossing,
    descent,
    fitted,
    muon,
    ratios,
    scaled,
    shares,
    uniform,
)

__all__ = [
    "ARRIVAL",
    "COLUMNS",
    "COUNTS",
    "CROSSING",
    "CROSSING_NORM",
    "EDGES",
    "END",
    "END_NORM",
    "FLOOR",
    "MUON_STEP",
    "NUCLEAR_RATIO",
    "ROWS",
    "SHARES",
    "START",
    "START_NORM",
    "STEPS",
    "Quadratic",
    "arrival",
    "crossing",
    "descent",
    "even",
    "fitted",
    "most_left",
    "muon",
    "ratios",
    "shares",
    "uniform",
]

# Panel (c)'s shares inferred from the spectra of W*, before anything was drawn here.
SHARES = [0.002, 0.083, 0.419, 0.407, 0.086, 0.003]


def even(seed: int) -> Quadratic:
    """W* from U(-50, 50) in all directions, Q's eigenvalues geometric with the published ratio, f(0) = 370."""
    optimum = uniform(torch.Generator().manual_seed(seed), ROWS, COLUMNS)
    q = (1 - 1 / NUCLEAR_RATIO) ** torch.arange(ROWS, dtype=torch.float64)
    return scaled(q, optimum)


def most_left(nuclear_ratio: float = NUCLEAR_RATIO) -> float:
    """The most of f(0) that gradient descent with step 1 / L can leave after 4000 steps if W* is even in all directions.

    A direction keeps x (1 - x)^8000 of L, x = q / L, which is largest at x = 1 / 8001; the largest one keeps nothing.
    """
    x = 1 / (2 * STEPS + 1)
    return (ROWS - 1) * x * (1 - x) ** (2 * STEPS) / nuclear_ratio
