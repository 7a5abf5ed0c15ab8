"""The baseline of zero-order fine-tuning: two losses along one random direction (SPSA; MeZO, arXiv 2305.17333)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class RandomDirection(torch.optim.Optimizer):
    """Stochastic gradient descent along Gaussian directions Z, from two losses a step and without a backward.

        rho = (f(W + eps Z) - f(W - eps Z)) / (2 eps),   W <- W - lr rho Z,   or W <- W - lr sign(rho) Z

    Z is drawn anew from the step's seed wherever it is needed, so nothing is held beside the weights. They are moved in
    place, and come back up to rounding.
    """

    def __init__(self, params: Iterable[Any], lr: float, eps: float = 1e-3, signed: bool = False, seed: int = 0) -> None:
        super().__init__(params, {"lr": lr, "eps": eps})
        self._signed, self._seed, self._steps = signed, seed, 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Tensor:  # type: ignore[override]
        """One step; the mean of the two losses."""
        losses = []
        for move in (1, -2):
            self._move(lambda group, move=move: move * group["eps"])
            losses.append(torch.as_tensor(closure()).detach())
        difference = losses[0] - losses[1]

        def back_and_step(group: dict[str, Any]) -> Tensor:
            length = difference.sign() if self._signed else difference / (2 * group["eps"])
            return group["eps"] - group["lr"] * length

        self._move(back_and_step)
        self._steps += 1
        return (losses[0] + losses[1]) / 2

    def _move(self, length: Callable[[dict[str, Any]], Any]) -> None:
        """W <- W + length Z."""
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.device not in generators:
                    generators[p.device] = torch.Generator(p.device).manual_seed(self._seed + self._steps)
                p.add_(length(group) * torch.randn(p.shape, generator=generators[p.device], dtype=p.dtype, device=p.device))
