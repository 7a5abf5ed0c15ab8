"""Sharpness: the largest |eigenvalue| of the Hessian over all parameters together.

A step of gradient descent is stable on a quadratic where its learning rate is below 2 / L. L over all of a model is at least
that of any of its matrices, which `curvature` measures.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from schatten.diagnostics.core import Estimate, Need, Whole
from schatten.diagnostics.hessian import Hessian, check_differentiable
from schatten.diagnostics.lanczos import largest_eigenvalue

ITERATIONS = 20


def sharpness(
    losses: Callable[[], Tensor] | Sequence[Callable[[], Tensor]],
    params: Sequence[Tensor],
    *,
    model: nn.Module | None = None,
    iterations: int = ITERATIONS,
    seed: int = 0,
) -> Estimate:
    """L of the mean of losses in all `params`, from below, and its residual bound (`largest_eigenvalue`), in loss / weight^2.

    Cost: one gradient and `iterations` Hessian-vector products of each loss. Memory: iterations + 3 copies of the parameters.
    Arguments and errors are those of `Hessian`.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.sharpness import sharpness
        >>> a, b = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
        >>> round(float(sharpness(lambda: (a * b).square().sum(), [a, b]).value), 6)
        6.0
    """
    H = Hessian(losses, params, model=model)
    return largest_eigenvalue(H, H.params, iterations, seed=seed)


@dataclass(frozen=True)
class Sharpness:
    """`sharpness` of all trainable parameters, for `Monitor`; under DistributedDataParallel each rank's of its own losses.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.core import Whole
        >>> from schatten.diagnostics.sharpness import Sharpness
        >>> w = torch.ones(2, requires_grad=True)
        >>> found = Sharpness()(Whole({"w": w}, (), [lambda: (2 * w**2).sum()]))
        >>> round(float(found["L"]), 4), round(float(found["edge"]), 4)
        (4.0, 0.5)
    """

    name: ClassVar[str] = "sharpness"
    scope: ClassVar[Literal["matrix", "model"]] = "model"
    needs: ClassVar[frozenset[Need]] = frozenset({"losses"})
    columns: ClassVar[Mapping[str, str]] = {
        "L": "largest |eigenvalue| of the Hessian over all parameters, from below, loss / weight^2",
        "L_error": "residual of L: an eigenvalue lies within it, loss / weight^2",
        "edge": "2 / L, the learning rate above which gradient descent on a quadratic is unstable, weight^2 / loss",
    }
    cost: ClassVar[str] = "one gradient and iterations Hessian-vector products of each loss"

    iterations: int = ITERATIONS
    seed: int = 0

    def check(self, of: Whole) -> None:
        """Raise for parameters that have no products with a Hessian."""
        check_differentiable(list(of.parameters.values()))

    def __call__(self, of: Whole) -> dict[str, Tensor]:
        L = sharpness(of.losses, list(of.parameters.values()), iterations=self.iterations, seed=self.seed)
        return {"L": L.value, "L_error": L.error, "edge": 2 / L.value}


QUANTITY = Sharpness
