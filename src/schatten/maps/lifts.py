"""Lifts: what a potential is a function of. Each reads a matrix as magnitudes times directions, and writes it back.

| lift | magnitudes | directions |
|---|---|---|
| `spectrum` | singular values | U_i V_i^T |
| `entries` | absolute entries | signs |
| `rows`, `columns` | Euclidean norms | unit rows, columns |
| `matrix` | the Frobenius norm, one number | S / ||S||_F |

A potential k that is convex, symmetric in its arguments, and non-decreasing gives K(S) = k(magnitudes(S)) with
grad K = the directions times k' and K*(X) = k*(magnitudes(X)) for each of them (Lewis 1995 for the spectrum).
"""

from collections.abc import Callable

import torch
from torch import Tensor

LIFTS = ("spectrum", "entries", "rows", "columns", "matrix")

_UNIT = {
    "entries": ("absolute entry", "absolute entries"),
    "rows": ("row norm", "row norms"),
    "columns": ("column norm", "column norms"),
}
_SPECTRAL = {1.0: "nuclear norm", 2.0: "Frobenius norm", float("inf"): "spectral norm"}


def check_lift(over: str, allowed: tuple[str, ...] = LIFTS) -> None:
    """Refuse a lift that is none."""
    if over not in allowed:
        raise ValueError(f"over must be one of {', '.join(map(repr, allowed))}, got {over!r}.")


def norm_name(over: str, q: float) -> str:
    """What the q-norm of the magnitudes is called."""
    if over == "matrix" or q == 2:
        return "Frobenius norm"
    if over == "spectrum":
        return _SPECTRAL.get(q, f"Schatten-{q:.4g} norm")
    one, many = _UNIT[over]
    return {1.0: f"sum of {many}", float("inf"): f"largest {one}"}.get(q, f"{q:.4g}-norm of the {many}")


def each(over: str) -> str:
    """One magnitude, in a formula."""
    return {"spectrum": "sigma", "entries": "|w|", "rows": "||row||", "columns": "||column||", "matrix": "||W||_F"}[over]


def safe_norm(X: Tensor, dim: int | tuple[int, int]) -> Tensor:
    """The Euclidean norm along `dim`, kept; no square of it over- or underflows."""
    largest = X.abs().amax(dim=dim, keepdim=True)
    unit = torch.where((largest == 0) | ~largest.isfinite(), 1, largest)
    return unit * torch.linalg.vector_norm(X / unit, dim=dim, keepdim=True)


def magnitudes(X: Tensor, over: str) -> Tensor:
    """(*b, m, n) -> (*b, r), non-negative."""
    match over:
        case "spectrum":
            return torch.linalg.svdvals(X)
        case "entries":
            return X.abs().flatten(-2)
        case "rows":
            return safe_norm(X, -1).squeeze(-1)
        case "columns":
            return safe_norm(X, -2).squeeze(-2)
        case _:
            return safe_norm(X, (-2, -1)).squeeze(-1)


def replaced(X: Tensor, over: str, h: Callable[[Tensor], Tensor]) -> Tensor:
    """`X` with its magnitudes s replaced by h(s), (*b, r) -> (*b, r); where s is 0 the direction is 0."""
    if over == "spectrum":
        U, s, Vh = torch.linalg.svd(X, full_matrices=False)
        return (U * h(s).unsqueeze(-2)) @ Vh
    s = magnitudes(X, over)
    factor = h(s)
    if over == "entries":
        return X.sign() * factor.unflatten(-1, X.shape[-2:])
    factor = torch.where(s == 0, 0, factor / torch.where(s == 0, 1, s))
    match over:
        case "rows":
            return X * factor.unsqueeze(-1)
        case "columns":
            return X * factor.unsqueeze(-2)
        case _:
            return X * factor.unsqueeze(-1)
