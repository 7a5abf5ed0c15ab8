"""Muon: momentum, orthogonalised."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from schatten.maps import Nuclear
from schatten.optimizer import SpectralOptimizer
from schatten.retractions import Retraction, named
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import Momentum
from schatten.solvers import Solver, polynomial


class Muon(SpectralOptimizer):
    r"""Muon (K. Jordan, 2024): W <- (1 - lr lambda) W - lr c(shape) U V^T of the Nesterov momentum U S V^T.

        M <- beta M + (1 - beta) G,   S = (1 - beta) G + beta M,   D = msign(S),   W <- (1 - lr lambda) W - lr c D

    With decay lambda it solves min F subject to ||W||_op <= c(shape) / lambda for every matrix (arXiv 2506.15054).

    Given a module it routes every parameter by `schatten.plan` and trains what is no hidden matrix by AdamW with the
    same lr and decay; `opt.plan` prints who goes where and why. Given tensors, groups or `(name, tensor)` pairs it takes
    matrices only, as torch.optim.Muon does.

    Args:
        params: a module, or matrices.
        lr: learning rate; with the default scale that of AdamW. lr c(shape) is the spectral norm of one update.
        weight_decay: decoupled decay lambda, multiplied by lr but not by the shape factor.
        momentum: beta, the decay of the average.
        nesterov: use the look-ahead (1 - beta) G + beta M instead of M.
        scale: `"adamw-rms"` (0.2 sqrt(max(fan_out, fan_in))), `"keller"`, `"mup"` or `"none"`; torch's, Dion's,
            Emerging-Optimizers', timm's, Keras' and optax' names are understood too (docs/learning-rate.md).
        solver: how U V^T is computed; default `schatten.solvers.polynomial()`.
        form: `"ema"` or `"sum"` momentum; the direction is the same, the state differs by the factor 1 - beta.
        decay: `"explicit"`, `"implicit"` or `"cautious"` decoupled decay, or a retraction of `schatten.retractions`.
        rounding: how results enter half-precision parameters: `"stochastic"`, `"kahan"` or `"nearest"`.
        state_dtype: `"bfloat16"` or `"int8"` to keep the momentum in a half or a quarter of the memory; None for fp32.
        maximize: ascend.
        adamw: `betas` and `eps` of the AdamW groups.
        rules: overrides for a module's routes, see `schatten.plan`.
        strict: refuse a module with parameters of two or more dimensions whose kind is not known; False trains them by AdamW.
        max_batch_bytes: what a step may allocate at a time, default 160 MiB, on a GPU 512 MiB.
        kernels: `"auto"`, `"eager"` or `"triton"`: what computes, see `SpectralOptimizer`.

    State: one tensor per matrix, two per AdamW parameter, fp32 for half-precision parameters unless
    `state_dtype` says less. Differences from
    torch.optim.Muon: gradients beyond fp32's square range are handled, a non-finite gradient is skipped and counted,
    the solver is a tighter polynomial, convolutions and banks of matrices are read as matrices, and lr means AdamW's
    unless `scale="keller"`.

    Raises ValueError or TypeError for parameters or numbers it cannot use; the message names them.

    Example:
        >>> import torch, schatten
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
        >>> opt = schatten.Muon(model, lr=3e-4, weight_decay=0.1)
        >>> model(torch.randn(4, 8)).square().mean().backward()
        >>> opt.step()
        >>> [entry.route for entry in opt.plan]
        ['spectral', 'adamw', 'spectral', 'adamw']
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        scale: str = "adamw-rms",
        solver: Solver | None = None,
        form: str = "ema",
        decay: str | Retraction = "explicit",
        rounding: str = "stochastic",
        state_dtype: str | None = None,
        maximize: bool = False,
        adamw: Mapping[str, Any] | None = None,
        rules: Sequence[tuple[Any, ...]] = (),
        strict: bool = True,
        max_batch_bytes: int | None = None,
        kernels: str = "auto",
        placement: str | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            scale=Scale(scale).name,
            solver=polynomial() if solver is None else solver,
            form=form,
            decay=decay,
            rounding=rounding,
            state_dtype=state_dtype,
            maximize=maximize,
            adamw=adamw,
            rules=rules,
            strict=strict,
            max_batch_bytes=max_batch_bytes,
            kernels=kernels,
            placement=placement,
            process_group=process_group,
        )

    def rule(self, group: Mapping[str, Any]) -> Rule:
        """Muon's rule with a group's options."""
        return Rule(
            Momentum(form=group["form"], nesterov=group["nesterov"]),
            Nuclear(group["solver"]),
            Scale(group["scale"]),
            named(group["decay"]),
        )
