"""What `curvature` must agree with: the explicit Hessian of a small MLP in fp64, by eigenvalues and a full contraction."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from schatten.diagnostics.hessian import Hessian
from tests.reference.hessian_models import explicit

# Of Lanczos run to the end, and sums of some thousand products.
CLOSE = 1e-9


@cache
def problem(seed: int = 0) -> tuple[Hessian, Sequence[Tensor], Tensor]:
    """Products, weights and the explicit Hessian (N, N) of an MLP whose second weight is square."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False)
    ).double()
    x, y = torch.randn(20, 5, dtype=torch.float64), torch.randint(3, (20,))
    params = list(model.parameters())

    def loss() -> Tensor:
        return nn.functional.cross_entropy(2 * model(x), y)

    return Hessian(loss, params), params, explicit(loss, params)


def block(i: int, seed: int = 0) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """The product of weight i alone, its gradient, and its explicit block."""
    H, params, whole = problem(seed)
    at = sum(p.numel() for p in params[:i])
    size = params[i].numel()
    return lambda v: H.within(i, v), H.gradient[i], whole[at : at + size, at : at + size]


def agrees(curvature: Callable[..., Any]) -> None:
    """Raises AssertionError where `curvature` is not what the explicit Hessian gives, for D = U V^T and others."""
    for seed in (0, 1):
        for i in range(3):
            product, G, block_hessian = block(i, seed)
            U, s, Vh = torch.linalg.svd(G, full_matrices=False)
            for D in (None, U @ Vh, U * s.sqrt() @ Vh, G, torch.randn_like(G)):
                C = curvature(product, G, D, iterations=G.numel())
                compare(C, G, U @ Vh if D is None else D, block_hessian)


def compare(C: Any, G: Tensor, D: Tensor, H: Tensor) -> None:
    d, g = D.reshape(-1), G.reshape(-1)
    J, L, along = d @ H @ d, torch.linalg.eigvalsh(H).abs().max(), g @ H @ g
    inner, frobenius = g @ d, torch.linalg.vector_norm(g)
    near(C.J, J)
    near(C.L.value, L)
    near(C.along_gradient, along)
    near(C.inner, inner)
    near(C.nuclear, torch.linalg.svdvals(G).sum())
    near(C.frobenius, frobenius)
    assert bool(C.no_optimum) == bool(J <= 0)
    assert bool(C.condition) == bool(J * frobenius**2 <= L * inner.clamp(min=0) ** 2)
    near(C.euclidean_decrease, frobenius**2 / (2 * L))
    if inner <= 0:
        assert C.decrease == 0 and C.optimal_step == 0
    elif J <= 0:
        assert C.decrease.isinf() and C.optimal_step.isinf() and C.advantage.value.isinf() and C.advantage.error == 0
    else:
        # What the quadratic model loses at its best step, the model evaluated there and not by a formula.
        step = inner / J
        near(C.optimal_step, step)
        near(C.decrease, -(-step * inner + step**2 * J / 2))
        near(C.advantage.value, (inner**2 / J) / (frobenius**2 / L))
        if along > 0:
            near(C.line_advantage, (inner**2 / J) / (frobenius**4 / along))


def near(found: Tensor, expected: Tensor) -> None:
    assert abs(float(found) - float(expected)) <= CLOSE * max(1e-3, abs(float(expected))), (float(found), float(expected))
