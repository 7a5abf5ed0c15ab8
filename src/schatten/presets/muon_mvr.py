"""Muon-MVR: Muon of variance-reduced momentum, with the stored gradient (MVR1) or a second one at the old weights (MVR2)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from schatten.maps import Nuclear
from schatten.optimizer import SpectralOptimizer
from schatten.placements.local import plain
from schatten.placements.states import placed_as
from schatten.retractions import Retraction, named
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import VarianceReduced
from schatten.solvers import Solver, polynomial
from schatten.state import wide


class MuonMVR(SpectralOptimizer):
    r"""Muon-MVR1 and -MVR2 (arXiv 2509.15816): Muon of a momentum that gradient differences correct.

        C = G + gamma beta / (1 - beta) (G - G'),   C <- C / max(1, ||C||_F),   M <- beta M + (1 - beta) C,
        W <- (1 - lr lambda) W - lr c U V^T of M

    MVR1 takes for G' the gradient of the last step. MVR2 (`exact=True`) needs this step's sample at the last weights, so two
    evaluations a step: pass a closure to `step`, which is called twice, or evaluate in `previous_weights()`:

        loss(model(x)).backward()
        with opt.previous_weights():
            loss(model(x)).backward()
        opt.step()

    gamma = 1 without the clip is STORM. The constraint under decay is Muon's, ||W||_op <= c / lambda.

    Differences from the released code: not compared with one; the defaults are those the method was reported with, decay is
    Moonlight's.

    Args:
        params: a module, or matrices.
        lr: learning rate, with the default scale in AdamW's units.
        weight_decay: decoupled decay lambda.
        momentum: beta.
        gamma: strength of the correction; 0.1 for CIFAR-10, 0.05 at 1B parameters.
        clip: bound ||C||_F of each matrix by 1.
        exact: MVR2.
        scale, solver, decay: see `Muon`.
        options: of `SpectralOptimizer`.

    State: two tensors per matrix; with `exact` another copy of every parameter. On several ranks all of them evaluate alike,
    with a backward each time: FSDP2's outermost module keeps the weights it has gathered until then.

    Example:
        >>> import torch, schatten
        >>> W = torch.nn.Parameter(torch.eye(2))
        >>> opt = schatten.MuonMVR([W], exact=True)
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = W.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> round(opt.step(closure).item(), 3), round(opt.step(closure).item(), 3) < 2
        (2.0, True)
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 3e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        *,
        gamma: float = 0.025,
        clip: bool = True,
        exact: bool = False,
        scale: str = "adamw-rms",
        solver: Solver | None = None,
        decay: str | Retraction = "explicit",
        **options: Any,
    ) -> None:
        signal = VarianceReduced(gamma, clip, exact)
        rule = Rule(signal, Nuclear(polynomial() if solver is None else solver), Scale(scale), named(decay))
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, momentum=momentum, **options)

    # Whether gradients at the previous weights were taken since the last step.
    _evaluated = False

    @property
    def exact(self) -> bool:
        """Whether a step needs gradients at the previous weights."""
        return _is_exact(self.defaults["rule"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `SpectralOptimizer`'s; a rule of the group's own must need the same evaluations."""
        rule = param_group.get("rule") if isinstance(param_group, dict) else None
        if isinstance(rule, Rule) and _is_exact(rule) != self.exact:
            raise ValueError(f"rule: all groups are evaluated alike, with exact={self.exact}, got {rule.signal!r} in a group.")
        super().add_param_group(param_group)

    def _fresh_state(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        state = super()._fresh_state(p, group)
        # Of every parameter: the second gradient is of the whole model at its previous weights.
        if self.exact:
            state["previous_weight"] = placed_as(p.detach(), state.get("previous_gradient", p.detach()), wide(p.dtype))
        return state

    @contextmanager
    def previous_weights(self) -> Iterator[None]:
        """Inside, parameters hold the weights before the last step; gradients computed there become MVR2's G'.

        Gradients taken before are put back at the end, so it may come before or after the evaluation at the new weights.
        Scale and accumulate both alike. If G' is not finite, the step skips that matrix and leaves nan in its `p.grad`.
        Raises RuntimeError for MVR1, whose G' is kept from the last step.
        """
        if not self.exact:
            raise RuntimeError("previous_weights() is for MVR2: build the optimizer with exact=True.")
        self._ranks.settle()
        params = [p for group in self.param_groups for p in group["params"]]
        kept = [(p.detach().clone(), p.grad) for p in params]
        for p in params:
            p.grad = None
        with torch.no_grad():
            for p in params:
                if self._started:
                    p.copy_(placed_as(self.state[p]["previous_weight"], p.detach(), p.dtype))
        try:
            yield
            self._keep_previous_gradients()
        finally:
            with torch.no_grad():
                for p, (weight, grad) in zip(params, kept, strict=True):
                    p.copy_(weight)
                    p.grad = grad

    @property
    def _started(self) -> bool:
        # Before the first step the kept weights may be older than ones loaded into the model since.
        return any(group["step"] > 0 for group in self.param_groups)

    def _matrices(self) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
        return ((p, group) for group in self.param_groups if group["algorithm"] == "spectral" for p in group["params"])

    @torch.no_grad()
    def _keep_previous_gradients(self) -> None:
        for p, group in self._matrices():
            # What this sample did not use at the previous weights had gradient zero there, not that of an earlier step.
            G = torch.zeros_like(p) if p.grad is None else p.grad
            _keep_(self.state[p]["previous_gradient"], -G if group["maximize"] else G)
        self._evaluated = True

    def evaluate(self, closure: Callable[[], Any] | None) -> Any:
        """Call `closure` at the previous and at the present weights (MVR2), or once (MVR1)."""
        if not self.exact:
            return super().evaluate(closure)
        if closure is not None and self._started:
            with self.previous_weights(), torch.enable_grad():
                closure()
        if self._started and not self._evaluated:
            raise RuntimeError(
                "MuonMVR(exact=True) needs this step's gradient at the previous weights too: pass a closure to step(), or "
                "evaluate the loss again in `with opt.previous_weights():`. No weight was changed."
            )
        loss = super().evaluate(closure)
        if self._evaluated:
            for p, _ in self._matrices():
                if p.grad is not None:
                    # A gradient that was not finite there skips the step as one here does, on all ranks if on one; `p.grad` is
                    # replaced, not written.
                    previous = plain(self.state[p]["previous_gradient"])
                    grad = p.grad.clone()
                    plain(grad).masked_fill_(~previous.sum().isfinite(), torch.nan)
                    p.grad = grad
                    previous.nan_to_num_(0.0, 0.0, 0.0)
        self._evaluated = False
        for group in self.param_groups:
            for p in group["params"]:
                _keep_(self.state[p]["previous_weight"], p)
        return loss


def _keep_(state: Tensor, value: Tensor) -> None:
    """Write `value`, of a parameter, into state that may be divided among ranks where the parameter is not."""
    own = plain(state)
    own.copy_(plain(placed_as(value.detach(), state, own.dtype)))


def _is_exact(rule: Rule) -> bool:
    return isinstance(rule.signal, VarianceReduced) and rule.signal.exact
