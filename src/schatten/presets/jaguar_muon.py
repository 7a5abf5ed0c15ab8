"""JAGUAR Muon: training from values of the loss alone."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from schatten.maps import L1, Nuclear
from schatten.optimizer import SpectralOptimizer
from schatten.retractions import Retraction, named
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import State
from schatten.solvers import Solver, polynomial
from schatten.state import wide


@dataclass(frozen=True)
class BlockMomentum:
    """M <- beta M + (1 - beta) G on the block rows x columns of the state, M elsewhere; S = M, or M on the block alone."""

    block_alone: bool = False

    fed_by: ClassVar[str] = "JaguarMuon"
    hyperparameters: ClassVar[tuple[str, ...]] = ("momentum",)
    elementwise: ClassVar[bool] = False

    def init(self, W: Tensor) -> dict[str, Tensor]:
        rows, columns = W.new_zeros(*W.shape[:-1], 1), W.new_zeros(*W.shape[:-2], 1, W.shape[-1])
        return {"momentum_buffer": torch.zeros_like(W), "rows": rows, "columns": columns}

    def __call__(self, G: Tensor, state: State, group: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        block = (state["rows"] * state["columns"]) > 0
        old = state["momentum_buffer"]
        M = torch.where(block, torch.lerp(old, G, 1 - group["momentum"]), old)
        return torch.where(block, M, 0.0) if self.block_alone else M, {"momentum_buffer": M}


class JaguarMuon(SpectralOptimizer):
    r"""JAGUAR Muon (arXiv 2506.04430), zero-order: `step` calls a closure that returns the loss, twice, without backward.

        f+- = loss at W +- eps E,   rho = (f+ - f-) / (2 eps),   M <- beta M + (1 - beta) rho on the block,
        W <- (1 - lr lambda) W - lr U V^T of M  (matrices),   W <- (1 - lr lambda) W - lr sign(M) on the block  (all else)

    E is 1 on a random block of `share` of the rows times `share` of the columns of every matrix, `share` of the entries of
    everything else, and 0 elsewhere; all parameters are moved at once, so a step is two evaluations whatever their number.
    Blocks are drawn from the step's number, not from torch's generators. With decay lambda the constraint is that of Muon,
    ||W||_op <= 1 / lambda, and |w| <= 1 / lambda for entries of vectors.

    Differences from the released code: blocks are the same on every device and rank, and decay is added. The estimate is left
    in `p.grad` after the step. On several ranks under DistributedDataParallel, or with `placement="owners"`, the losses of all
    are averaged, each of its own samples; otherwise the closure must return their mean.

    Args:
        params: a module, all of which it trains, or matrices; other tensors in a group with `layout="flat"`.
        lr: the spectral norm of a matrix's update, the size of a vector entry's.
        weight_decay: decoupled decay lambda.
        momentum: beta; 0 puts rho itself into the buffer.
        eps: how far weights are moved for the estimate; half-precision ones by their machine epsilon at least (2^-7 in
            bf16), which a weight of 1 just feels. Larger weights feel it rounded: keep them in fp32.
        share: of rows, columns and entries in a block.
        solver, decay: see `Muon`.
        options: of `SpectralOptimizer`.

    Raises RuntimeError in `step` without a closure, TypeError for sharded parameters (FSDP2, tensor parallel). State: one
    tensor per parameter, and a copy of the weights in a step.

    Example:
        >>> import torch, schatten
        >>> W = torch.nn.Parameter(torch.eye(4))
        >>> opt = schatten.JaguarMuon([W], lr=0.1, share=0.5)
        >>> losses = [float(opt.step(lambda: W.square().sum())) for _ in range(20)]
        >>> losses[-1] < losses[0]
        True
    """

    others = "spectral"
    needs_closure = True

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        *,
        eps: float = 1e-3,
        share: float = 0.1,
        solver: Solver | None = None,
        decay: str | Retraction = "explicit",
        **options: Any,
    ) -> None:
        for name, value, high in (("eps", eps, 1e30), ("share", share, 1.0)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= high:
                raise ValueError(f"{name} must be a number in (0, {high:g}], got {value!r}.")
        if options.get("placement") == "zero1":
            raise ValueError(
                "JaguarMuon draws a block of each matrix into its state, which placement='zero1' divides among ranks: take "
                "placement='owners'."
            )
        self._map = Nuclear(polynomial() if solver is None else solver)
        self._decay = named(decay)
        super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=momentum, eps=eps, share=share, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_map": self._map, "_decay": self._decay}

    def _fresh_state(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        if isinstance(p, DTensor):
            raise TypeError(
                f"JaguarMuon moves weights and evaluates the loss without a backward, until which FSDP2 goes on with the "
                f"weights it has gathered, but a parameter of shape {tuple(p.shape)} lies on several ranks "
                f"({', '.join(map(str, p.placements))}): give every rank the whole model, as in DistributedDataParallel."
            )
        return super()._fresh_state(p, group)

    def rule(self, group: Mapping[str, Any]) -> Rule:
        """The polar factor for matrices, the sign on the block for what is read as a vector."""
        flat = group["layout"] == "flat"
        return Rule(BlockMomentum(block_alone=flat), L1() if flat else self._map, Scale("none"), self._decay)

    def evaluate(self, closure: Callable[[], Any] | None) -> Any:
        """The mean of the two values; afterwards every `p.grad` is the estimate rho."""
        if closure is None:
            raise RuntimeError(
                "JaguarMuon estimates gradients from the loss: pass step() a closure that returns the loss of this step's "
                "batch; it is called twice, without gradients. No weight was changed."
            )
        if any(group["algorithm"] == "adamw" for group in self.param_groups):
            raise RuntimeError(
                "JaguarMuon estimates gradients for its own rule alone, and a group has algorithm='adamw': put its parameters "
                "into a spectral group with layout='flat'. No weight was changed."
            )
        members = [(group, p) for group in self.param_groups for p in group["params"]]
        kept = [p.detach().clone() for _, p in members]
        moves = [self._draw_block(p, group, index) for index, (group, p) in enumerate(members)]
        values = []
        try:
            for sign in (1, -1):
                for (group, p), weight, E in zip(members, kept, moves, strict=True):
                    p.copy_(weight + E.to(weight) * (sign * _reach(p, group)))
                values.append(torch.as_tensor(closure()).detach())
        finally:
            for (_, p), weight in zip(members, kept, strict=True):
                p.copy_(weight)
        ahead, behind = self._of_all_ranks(torch.stack(values))
        for group, p in members:
            rho = (ahead - behind) / (2 * _reach(p, group))
            p.grad = rho.to(p).expand(p.shape)
        return (ahead + behind) / 2

    def _of_all_ranks(self, losses: Tensor) -> Tensor:
        """The mean of the losses of the ranks that share a step, each of which has samples of its own."""
        if self._ranks.placement == "owners":
            process_group = self._ranks.process_group
            dist.all_reduce(losses, group=process_group)
            losses /= dist.get_world_size(process_group)
        return losses

    def _draw_block(self, p: Tensor, group: Mapping[str, Any], index: int) -> Tensor:
        """Draw this step's block into the parameter's state; 1 on it and 0 elsewhere, in the parameter's shape."""
        generator = torch.Generator().manual_seed((group["step"] * 1_000_003 + index) % 2**63)
        E = torch.zeros(p.shape, dtype=wide(p.dtype), device=p.device)
        for m in self._members(index, p, group):
            count, fan_out, fan_in = m.piece.blocks
            block = []
            for name, size, shape in (("rows", fan_out, (count, fan_out, 1)), ("columns", fan_in, (count, 1, fan_in))):
                place = m.place(name)
                block.append(place.copy_(chosen(count, size, group["share"], generator).view(place.shape)).reshape(shape))
            place = m.piece.view(E)
            place.copy_((block[0] * block[1]).view(place.shape))
        return E


def _reach(p: Tensor, group: Mapping[str, Any]) -> float:
    """How far a parameter's entries are moved; never less than its precision shows at 1."""
    return max(group["eps"], torch.finfo(p.dtype).eps)


def chosen(count: int, size: int, share: float, generator: torch.Generator) -> Tensor:
    """(count, size) of 0 and 1 with ceil(share * size) ones in each row, drawn on the CPU so that every device agrees."""
    order = torch.rand(count, size, generator=generator).argsort(dim=-1).argsort(dim=-1)
    return (order < math.ceil(share * size)).float()
