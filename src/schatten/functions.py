"""Spectral functions as functions: any power of the singular values, any map."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from schatten.maps import Map
from schatten.solvers import tower
from schatten.solvers.core import check_matrices, dtype_name
from schatten.solvers.power_function import PowerFunction


def spectral_power(G: Tensor, p: float, *, dtype: torch.dtype | None = None) -> Tensor:
    """U S^p V^T of G = U S V^T, p in [-0.9, 1], shape (*b, m, n) -> (*b, m, n), in G's dtype.

    The error is at most 2 % of sigma^p for every singular value of at least 1e-3 of the largest, in fp32; smaller ones
    tend to 0 with sigma, also for p < 0, and zero gives zero. c G gives c^p times the result. By seven quintics for
    p >= 0 and eight below (`schatten.solvers.tower`). A non-finite matrix gives non-finite values and leaves the others of
    its batch alone.

    Args:
        p: the exponent; p = 0 is the polar factor, for which `schatten.polar` takes a tolerance, p = 1 is G.
        dtype: precision of the products; default fp64 for fp64 input and fp32 for everything else. fp16 is off by at most
            3.5 % and bf16 by 14 % for p >= 0.1 (for sigma >= 1e-2 of the largest 2.5 % and 5 %); below p = 0 rounding is
            amplified, and a precision that does not hold it is refused.

    Raises ValueError for p outside [-0.9, 1] or a `dtype` that cannot hold it, TypeError for complex or integer input.

    Example:
        >>> import torch, schatten
        >>> D = schatten.spectral_power(torch.diag(torch.tensor([4.0, 1.0])), 0.5)
        >>> bool(((D.diagonal() - torch.tensor([2.0, 1.0])).abs() < 0.04).all())
        True
    """
    check_matrices(G, "G")
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not -0.9 <= p <= 1:
        raise ValueError(f"spectral_power needs -0.9 <= p <= 1, got p={p!r}; for other powers take solvers.svd().")
    if p == 1:
        return G.clone()
    f = PowerFunction(float(p))
    solver = tower(dtype=_precise(G) if dtype is None else dtype)
    solver.check(f)
    return solver.apply(G, f)


def apply_map(G: Tensor, map: Map, *, dtype: torch.dtype | None = None) -> Tensor:
    """grad K(G), the direction of `map`, shape (*b, m, n) -> (*b, m, n), in G's dtype.

    Solvers of the map whose precision is left open ("auto") multiply in `dtype`, by default fp32 (fp64 for fp64 input),
    where an optimizer takes the fastest of the device. Accuracy is that of the map's solver, see its docstring.

    Raises TypeError for what is no map and for complex or integer input.

    Example:
        >>> import torch, schatten
        >>> D = schatten.apply_map(torch.diag(torch.tensor([3.0, 0.1])), schatten.maps.LogCosh(1.0))
        >>> bool((D.diagonal() - torch.tensor([3.0, 0.1]).tanh()).abs().max() < 0.02)
        True
    """
    check_matrices(G, "G")
    if not isinstance(map, Map) or isinstance(map, type):
        raise TypeError(f"map must be a map of schatten.maps, such as Huber(0.1), got {map!r}.")
    return with_dtype(map, _precise(G) if dtype is None else dtype_name(dtype)).grad(G)


def _precise(G: Tensor) -> str:
    return "float64" if G.dtype == torch.float64 else "float32"


def with_dtype(thing: Any, dtype: str) -> Any:
    """`thing` (a map or a solver) with every open precision inside set to `dtype`."""
    if isinstance(thing, tuple):
        return tuple(with_dtype(part, dtype) for part in thing)
    if not dataclasses.is_dataclass(thing) or isinstance(thing, type):
        return thing
    changes = {}
    for field in dataclasses.fields(thing):
        value = getattr(thing, field.name)
        new = dtype if field.name == "dtype" and value == "auto" else with_dtype(value, dtype)
        if new is not value:
            changes[field.name] = new
    return dataclasses.replace(thing, **changes) if changes else thing
