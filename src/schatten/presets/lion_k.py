"""Lion-K: Lion's two betas and decoupled decay around the gradient of any convex K."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from schatten.maps import Frobenius, Map, Nuclear, Scaled, Sum
from schatten.optimizer import SpectralOptimizer
from schatten.retractions import Retraction, named
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import TwoBeta


class LionK(SpectralOptimizer):
    r"""Lion-K (Chen, Liu, Liang and Liu, 2024; Chen, Li and Liu, arXiv 2506.15054): W <- W - lr (grad K(S) + lambda W).

        S = beta1 M + (1 - beta1) G,   M <- beta2 M + (1 - beta2) G,   W <- (W - lr c grad K(S)) / (1 + lr lambda)

    With decay lambda it minimises F(W) + (1/lambda) K*(lambda W). Members:

    | `map` | `betas` | optimizer |
    |---|---|---|
    | `maps.Nuclear()` | (mu^2, mu) | Muon with Nesterov momentum mu, (mu, mu) without |
    | `maps.L1()` | (0.9, 0.99) | Lion; (mu, mu) is Signum, (0, 0) sign descent |
    | `maps.Frobenius()` | (mu, mu) | normalised SGD, of each tensor |
    | `maps.Power(1, over="entries")` | (mu, mu) | SGD with averaged momentum |

    Differences from the paper: M averages G instead of -G, and the direction is subtracted, which is the same as every K
    is even. The paper has no shape factor: `scale="none"`.

    Args:
        params: a module, or tensors. A map on entries (`over="entries"`) or whole tensors (`over="matrix"`) takes
            everything; one on the spectrum, rows or columns takes matrices, and AdamW the rest of a module.
        map: K.
        lr: learning rate. Of the nuclear norm it is the spectral norm of one update, of the l1 norm its largest entry.
        weight_decay: decoupled decay lambda.
        betas: (beta1, beta2) of the signal.
        form: `"paper"`, where S reads the old M, or `"site"`, where it reads the new one (`schatten.signals.TwoBeta`).
        scale: shape factor, see `Muon`.
        decay: `"implicit"` (the paper's equation 3), `"explicit"` (its page and Lion), `"cautious"`, or a retraction.
        options: of `SpectralOptimizer`.

    State: one tensor per parameter.

    Example:
        >>> import torch, schatten
        >>> W = torch.nn.Parameter(torch.zeros(1, 2))
        >>> opt = schatten.LionK([W], schatten.maps.L1(), lr=0.5, weight_decay=0.0)
        >>> W.grad = torch.tensor([[3.0, -4.0]])
        >>> opt.step()
        >>> W.tolist()
        [[-0.5, 0.5]]
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        map: Map | None = None,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.99),
        *,
        form: str = "paper",
        scale: str = "none",
        decay: str | Retraction = "implicit",
        **options: Any,
    ) -> None:
        map = Nuclear() if map is None else map
        whole = reads_any_tensor(map)
        self.others = "spectral" if whole else "adamw"
        if whole and not isinstance(params, nn.Module):
            options = {"layout": "flat", **options}
        rule = Rule(TwoBeta(form), map, Scale(scale), named(decay))
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, betas=betas, **options)


def reads_any_tensor(map: Map) -> bool:
    """Whether a map acts on entries or on the whole tensor, so that it does not matter how the tensor is read as a matrix."""
    if isinstance(map, Sum):
        return all(reads_any_tensor(part) for part in map.maps)
    inner = map.map if isinstance(map, Scaled) else map
    return isinstance(inner, Frobenius) or getattr(inner, "over", "spectrum") in ("entries", "matrix")
