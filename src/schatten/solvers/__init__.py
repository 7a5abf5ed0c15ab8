"""Solvers: pure functions `(*b, m, n) -> (*b, m, n)` that compute the polar factor U V^T to a stated accuracy.

Each is built by a function of its own file and is a frozen dataclass of plain values, so that its text names it:

- `svd()`: the exact factor by a double-precision SVD; the oracle.
- `polynomial(tol=...)`: a minimax composition of odd quintics chosen from a tolerance; the default.
- `newton_schulz()`: Keller Jordan's five steps, as `torch.optim.Muon` runs them.
"""

from schatten.solvers.core import Solver
from schatten.solvers.newton_schulz import newton_schulz
from schatten.solvers.polynomial import polynomial
from schatten.solvers.svd import svd

__all__ = ["Solver", "newton_schulz", "polynomial", "svd"]
