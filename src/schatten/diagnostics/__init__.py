"""Instruments: what the theory says, measured on your own model.

One measured quantity per file: functions of tensors (*b, m, n), exported here, and what `schatten.Monitor` logs of it, found by
the listing of this folder. docs/instruments.md has the table of all. A function may have its file's name; the file is then
`importlib.import_module("schatten.diagnostics.curvature")`, and `from schatten.diagnostics.curvature import ...` works as ever.

Example:
    >>> import torch
    >>> from schatten import diagnostics
    >>> G = torch.diag(torch.tensor([3.0, 4.0]))
    >>> float(diagnostics.nuclear_ratio(G)), float(diagnostics.ball_violation(G, weight_decay=0.5))
    (1.96, 2.0)
"""

from schatten.diagnostics.alignment import alignment, cosine
from schatten.diagnostics.attention import logit_bound
from schatten.diagnostics.block_hessian import block_hessian, exact_hessian, mass_within, structure
from schatten.diagnostics.block_mass import block_mass, block_masses
from schatten.diagnostics.conditioning import condition_number, conditioning, numerical_rank
from schatten.diagnostics.constraint import (
    ball_violation,
    constraint_ratio,
    decay_for_radius,
    direction_bound,
    radius_of_decay,
    steps_to_enter,
)
from schatten.diagnostics.curvature import Curvature, along, curvature
from schatten.diagnostics.effective_ranks import effective_rank, nuclear_ratio, stable_rank
from schatten.diagnostics.hessian import Hessian
from schatten.diagnostics.hessian_rank import hessian_rank, hessian_spectrum
from schatten.diagnostics.lanczos import Ritz, lanczos, largest_eigenvalue, shortfall
from schatten.diagnostics.lyapunov import betas_of, first_growth, lyapunov, lyapunov_change_bound, lyapunov_constant
from schatten.diagnostics.noise_scale import micro_gradients, noise_scale, nuclear_noise
from schatten.diagnostics.nuclear_norm import nuclear_norm
from schatten.diagnostics.sharpness import sharpness
from schatten.diagnostics.smoothness import Smoothness, spectral_smoothness
from schatten.diagnostics.spectrum import by_part, histogram, log_edges, spectrum
from schatten.diagnostics.stationarity import frank_wolfe_gap, kkt_residual
from schatten.diagnostics.undisturbed import undisturbed
from schatten.diagnostics.update import rms_ratio, spectral_ratio, update_rms
from schatten.diagnostics.weighted_smoothness import weighted_smoothness
from schatten.diagnostics.weighted_smoothness_fit import fit_weighted_smoothness

__all__ = [
    "Curvature",
    "Hessian",
    "Ritz",
    "Smoothness",
    "alignment",
    "along",
    "ball_violation",
    "betas_of",
    "block_hessian",
    "block_mass",
    "block_masses",
    "by_part",
    "condition_number",
    "conditioning",
    "constraint_ratio",
    "cosine",
    "curvature",
    "decay_for_radius",
    "direction_bound",
    "effective_rank",
    "exact_hessian",
    "first_growth",
    "fit_weighted_smoothness",
    "frank_wolfe_gap",
    "hessian_rank",
    "hessian_spectrum",
    "histogram",
    "kkt_residual",
    "lanczos",
    "largest_eigenvalue",
    "log_edges",
    "logit_bound",
    "lyapunov",
    "lyapunov_change_bound",
    "lyapunov_constant",
    "mass_within",
    "micro_gradients",
    "noise_scale",
    "nuclear_noise",
    "nuclear_norm",
    "nuclear_ratio",
    "numerical_rank",
    "radius_of_decay",
    "rms_ratio",
    "sharpness",
    "shortfall",
    "spectral_ratio",
    "spectral_smoothness",
    "spectrum",
    "stable_rank",
    "steps_to_enter",
    "structure",
    "undisturbed",
    "update_rms",
    "weighted_smoothness",
]
