"""The products on Triton, all by one kernel (`product_kernel.product`).

What depends on shapes and strides alone is worked out once and kept, so that a launch is a look-up and a call.
"""

from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from schatten.kernels.bucket import Onto
from schatten.kernels.choice import interpreted, tf32
from schatten.kernels.triton.product_kernel import product
from schatten.kernels.triton.product_tiles import UNFUSED, Tiles, candidates
from schatten.kernels.triton.tuning import choose
from schatten.kernels.triton.weights import TYPES, number, rows

Weight = float | Tensor
Form = tuple[tuple[int, ...], tuple[int, ...]]

# Shapes beyond these share a choice of tiles with the largest: there are more tiles than processors in any case.
LARGEST, MOST = 8192, 64

# A size, address or stride that divides by it lets the compiler load 16 bytes at once.
MULTIPLE = 16


def gram(X: Tensor, out: Tensor | None = None) -> Tensor:
    """`X X^T`, shape (b, m, n) -> (b, m, m), symmetric to the bit."""
    b, m, _ = X.shape
    out = X.new_empty(b, m, m) if out is None else out
    _launch("gram", X, X.mT, None, None, None, out)
    return out


def sym(
    A: Tensor,
    B: Tensor,
    C: Tensor,
    a: float,
    b: float,
    out: Tensor | None = None,
    total: Tensor | None = None,
    weight: Weight = 1.0,
) -> Tensor:
    """`a C + b A B` for symmetric A, B, C that commute, all (b, m, m); symmetric to the bit.

    B is read by its columns, which are its rows: tensor cores take TF32 in that order only.
    """
    out = A.new_empty(A.shape) if out is None else out
    _launch("sym", A, B.mT, C, a, float(b), out, total, weight)
    return out


def affine(
    B: Tensor, X: Tensor, a: float, out: Tensor | None = None, total: Tensor | None = None, weight: Weight = 1.0
) -> Tensor:
    """`a X + B X` for symmetric B, shapes (b, m, m) and (b, m, n) -> (b, m, n), in X's memory layout."""
    if out is None:
        b, m, n = X.shape
        out = X.new_empty(b, n, m).mT if X.stride(-1) != 1 and X.stride(-2) == 1 else X.new_empty(b, m, n)
    _launch("affine", B, X, X, a, None, out, total, weight)
    return out


def affine_onto(B: Tensor, X: Tensor, a: float, onto: Onto) -> None:
    """W <- keep W - length (a X + B X) for B (b, m, m) and X (b, m, n), b = members * blocks; the direction is not stored.

    Weights are (m, n), or (n, m) and move by the transposed direction.
    """
    _launch("affine", B, X, X, a, None, None, onto=onto)


def _launch(
    kind: str,
    P: Tensor,
    Q: Tensor,
    C: Tensor | None,
    a: float | None,
    b: float | None,
    out: Tensor | None,
    total: Tensor | None = None,
    weight: Weight = 1.0,
    onto: Onto | None = None,
) -> None:
    """`b P Q + a C` into `out` and a share of it into `total`, or by `onto` into weights; without C, or without b."""
    if P.is_cuda and P.get_device() != torch.cuda.current_device():
        with torch.cuda.device(P.device):
            return _launch(kind, P, Q, C, a, b, out, total, weight, onto)
    exact = P.dtype != torch.float32 or not tf32()
    added = C if a else None
    place = Q if out is None else out
    forms = (_form(P), _form(Q), _form(added), _form(place), _form(total))
    plan = _planned(kind, P.dtype, P.device, "ieee" if exact else "tf32", forms)
    terms = (P, Q, added, float(a) if a else None, b)
    tiles = choose(kind, plan.key, plan.candidates, partial(_try, plan, terms, place), P.device)
    if total is None and onto is None:
        return _start(plan, tiles, terms, out)
    _start(plan, UNFUSED.get(tiles, tiles), terms, out, total, weight, onto)


def _try(plan: "_Plan", terms: tuple[Any, ...], place: Tensor, tiles: Tiles) -> None:
    """The product into memory of its own, laid out as `place`."""
    _start(plan, tiles, terms, torch.empty_strided(place.shape, place.stride(), dtype=place.dtype, device=place.device))


def _start(
    plan: "_Plan",
    tiles: Tiles,
    terms: tuple[Any, ...],
    out: Tensor | None,
    total: Tensor | None = None,
    weight: Weight = 1.0,
    onto: Onto | None = None,
) -> None:
    P, Q, C, a, b = terms
    grid, constants = plan.launch(tiles)
    share, apart, at = None, 0, False
    if total is not None:
        share, at = number(weight, P.device)
        apart = weight.stride(0) if isinstance(weight, Tensor) and len(weight) > 1 else 0
    ways, flags = (NOWHERE, IDLE) if onto is None else _ways(onto, plan, P.device)
    launch: Any = product[grid]
    launch(
        P, Q, C, out, total, share, *plan.sizes, a, b, *plan.strides, apart, *ways, WEIGHT_AT=at, **flags, **constants
    )  # fmt: skip


# What the kernel is told of weights where there are none.
NOWHERE = (None, None, None, 1, 1, 0, 0, 0)
IDLE = {"W_TYPE": None, "ALIGNED": False, "TALL": False, "FINITE": False, "NOISE": False, "KEEP_AT": False, "LENGTH_AT": False}


def _ways(onto: Onto, plan: "_Plan", device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the kernel is told of weights."""
    weights, (m, n, _) = onto.weights, plan.sizes
    blocks, fan_out, fan_in = weights.shape
    w_block, w_row, w_col = weights.strides
    tall = (fan_out, fan_in) != (m, n)
    if tall:
        fan_out, fan_in, w_row, w_col = fan_in, fan_out, w_col, w_row
    if (fan_out, fan_in) != (m, n) or plan.batch != len(weights) * blocks:
        raise ValueError(
            f"affine_onto moves weights by directions of their shape or its transpose, one for each block: got {plan.batch} of "
            f"({m}, {n}) for {len(weights)} weights {weights.shape}."
        )
    table, aligned = rows(onto)
    keep, keep_at = number(onto.keep, device)
    length, length_at = number(onto.length, device)
    flags = {
        "W_TYPE": TYPES[weights.dtype],
        "ALIGNED": aligned,
        "TALL": tall,
        "FINITE": onto.finite is not None,
        "NOISE": onto.noise is not None,
        "KEEP_AT": keep_at,
        "LENGTH_AT": length_at,
    }
    return (table, keep, length, len(weights), blocks, w_block, w_row, w_col), flags


@dataclass(frozen=True)
class _Plan:
    """What a product of tensors of certain forms needs: the tiles to choose from, and what it is launched with."""

    key: tuple[object, ...]
    candidates: tuple[Tiles, ...]
    batch: int
    sizes: tuple[int, int, int]
    strides: tuple[int, ...]
    symmetric: bool
    precision: str
    known: dict[Tiles, tuple[tuple[int], dict[str, Any]]] = field(default_factory=dict)

    def launch(self, tiles: Tiles) -> tuple[tuple[int], dict[str, Any]]:
        """The grid, and what the kernel must know when it is compiled."""
        found = self.known.get(tiles)
        if found is None:
            found = self.known[tiles] = self._grid(tiles), self._constants(tiles)
        return found

    def _grid(self, tiles: Tiles) -> tuple[int]:
        m, n, _ = self.sizes
        high, wide = -(-m // tiles.rows), -(-n // tiles.cols)
        return (self.batch * (high * (high + 1) // 2 * (tiles.rows // tiles.cols) if self.symmetric else high * wide),)

    def _constants(self, tiles: Tiles) -> dict[str, Any]:
        m, n, k = self.sizes
        return {
            "SYMMETRIC": self.symmetric,
            "PRECISION": self.precision,
            # The interpreter multiplies bf16 by its bits.
            "WIDEN": interpreted(),
            "EVEN_M": m % tiles.rows == 0,
            "EVEN_N": n % tiles.cols == 0,
            "EVEN_K": k % tiles.depth == 0,
            "ROWS": tiles.rows,
            "COLS": tiles.cols,
            "DEPTH": tiles.depth,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
            **({"maxnreg": tiles.registers} if tiles.registers else {}),
        }


def _form(t: Tensor | None) -> Form | None:
    return None if t is None else (t.shape, t.stride())


@lru_cache(maxsize=1024)
def _planned(kind: str, dtype: torch.dtype, device: torch.device, precision: str, forms: tuple[Form | None, ...]) -> _Plan:
    """The plan for tensors P, Q, C, out and total of these forms; raises ValueError if they do not fit."""
    P, Q = forms[0], forms[1]
    assert P is not None
    assert Q is not None
    (batch, m, k), n = P[0], Q[0][-1]
    right = ((batch, m, k), (batch, k, n), *[(batch, m, n)] * 3)
    if any(form is not None and form[0] != shape for form, shape in zip(forms, right, strict=True)):
        shapes = ", ".join(str(tuple(form[0])) for form in forms if form is not None)
        raise ValueError(f"A product needs (b, m, k), (b, k, n) and further tensors of (b, m, n), got {shapes}.")
    strides = tuple(s for form in forms for s in ((0, 0, 0) if form is None else form[1]))
    loose = any(s % MULTIPLE and s != 1 for s in (m, n, k, *strides))
    near = (_power(m, LARGEST), _power(n, LARGEST), _power(k, LARGEST), _power(batch, MOST))
    layout = tuple(s == 1 for form in forms[:4] if form is not None for s in form[1][1:])
    key = (dtype, precision, *near, loose, layout)
    tiles = candidates(kind, near[0], near[1], near[3], dtype, precision, loose, device)
    return _Plan(key, tiles, batch, (m, n, k), strides, kind != "affine", precision)


def _power(size: int, most: int) -> int:
    """The next power of two, up to `most`."""
    return min(most, 1 << max(size - 1, 0).bit_length())
