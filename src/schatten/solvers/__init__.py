"""Solvers: pure functions `(*b, m, n) -> (*b, m, n)` that compute spectral functions to a stated accuracy.

Each is built by a function of its own file and is a frozen dataclass of plain values, so that its text names it:

- `svd()`: exact, by a double-precision SVD; the oracle.
- `polynomial(tol=...)`: the polar factor by a minimax composition of odd quintics; the default.
- `gram()`: the same in its Gram form, for rectangular matrices.
- `newton_schulz()`: the polar factor by published quintics: Keller Jordan's, as `torch.optim.Muon` runs them, and others.
- `tower()`: any smooth spectral function by seven quintics; `fit` finds its weights.
- `coupled_newton()`: the powers 1/2 and 1/4 as their paper published them, for comparison.
- `coupled_minimax()`: dyadic powers to 1e-4, where the tower is not accurate enough.
- `muon_p(p)`: Muon^p's released recurrences.
- `krylov()`: functions of the leading singular values.
"""

from schatten.solvers.core import FunctionSolver, Solver, SpectralFunction
from schatten.solvers.coupled_minimax import coupled_minimax
from schatten.solvers.coupled_newton import coupled_newton
from schatten.solvers.gram import gram
from schatten.solvers.krylov import krylov
from schatten.solvers.muon_p import muon_p
from schatten.solvers.newton_schulz import newton_schulz
from schatten.solvers.polynomial import polynomial
from schatten.solvers.svd import svd
from schatten.solvers.tower import fit, tower

__all__ = [
    "FunctionSolver",
    "Solver",
    "SpectralFunction",
    "coupled_minimax",
    "coupled_newton",
    "fit",
    "gram",
    "krylov",
    "muon_p",
    "newton_schulz",
    "polynomial",
    "svd",
    "tower",
]
