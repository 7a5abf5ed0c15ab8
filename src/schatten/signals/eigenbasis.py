"""The eigenbases in which SOAP's family works, for signals that are averaged, divided or scaled there."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from schatten.signals.core import State

# The least share of the mean eigenvalue that whitening divides by: directions that never had a gradient have none of their own.
DAMPING = 1e-4


class Turn(NamedTuple):
    """The bases of one step, stacks of orthogonal matrices or None for the identity, and how they follow the last step's."""

    left: Tensor | None
    right: Tensor | None
    left_order: Tensor | None
    right_order: Tensor | None
    unit: Tensor
    shrink: Tensor

    def into(self, X: Tensor) -> Tensor:
        """Q_L^T X Q_R, in units of `unit`."""
        X = X / self.unit
        X = X if self.left is None else self.left.mT @ X
        return X if self.right is None else X @ self.right

    def back(self, P: Tensor) -> Tensor:
        """Q_L P Q_R^T."""
        P = P if self.left is None else self.left @ P
        return P if self.right is None else P @ self.right.mT

    def carried(self, V: Tensor) -> Tensor:
        """An average of squares of the last step's `into`, in this step's unit and order of basis vectors."""
        if self.left_order is not None:
            V = V.gather(-2, self.left_order.unsqueeze(-1).expand_as(V))
        if self.right_order is not None:
            V = V.gather(-1, self.right_order.unsqueeze(-2).expand_as(V))
        return V * self.shrink


@dataclass(frozen=True)
class Eigenbasis:
    """Eigenbases Q_L, Q_R of averages of G G^T and G^T G, refreshed at every step (SOAP, arXiv 2409.11321). No signal itself.

        L <- beta L + (1 - beta) G H_R G^T,   R <- beta R + (1 - beta) G^T H_L G
        Q <- eigenvectors of L at a group's first step, later qr(L Q), its columns first sorted by diag(Q^T L Q); Q_R alike

    Both averages start at their first value, as in KL-SOAP's release: from 0 the second gradient would turn the bases by half
    of the way and Adam's moments with them. `statistics="gram"` is H = I, Shampoo's. `"kl"` whitens each side by the other's
    last estimate, KL-Shampoo's (arXiv 2509.03378): H_R = Q_R diag(a / (d + f a)) Q_R^T with d = diag(Q_R^T R Q_R), a the mean
    of d and f = max(beta^(t-1), 1e-4), the share of an isotropic start that is left. The paper's H_R is R^-1; the factor a
    gives L the unit of G^2 and leaves its fixed points where they are but for a factor, so that no scale matters.

    The step's own gradient is in the basis it is read in. A matrix that gets its first gradient after the group's first step
    starts from the identity. A side longer than `max_dim` keeps the identity: its L would be larger than the weight, its QR
    slower than everything else. Everything is in units of a decaying maximum of |G|, so no square over- or underflows.

    State: L, Q_L, R and Q_R, twice m^2 + n^2 numbers for an m x n matrix, and one for the unit. Eigenvectors and QR are
    computed in the precision of state, fp32 at least.

    Raises ValueError for another `statistics`, a beta outside [0, 1) or a `max_dim` below 0.

    Example:
        >>> import torch, schatten
        >>> from schatten.signals.eigenbasis import Eigenbasis
        >>> basis, G = Eigenbasis(), torch.tensor([[[[0.0, 3.0], [4.0, 0.0]]]])
        >>> state = {**basis.init(G), "step": torch.ones(1, 1, 1, 1)}
        >>> turn, state = basis(G, state, {"step": 1}, memory=0.95)
        >>> (turn.into(G) * turn.unit).abs()[0, 0].tolist()
        [[4.0, 0.0], [0.0, 3.0]]
    """

    statistics: Literal["gram", "kl"] = "gram"
    beta: float = 0.9
    max_dim: int = 8192

    def __post_init__(self) -> None:
        if self.statistics not in ("gram", "kl"):
            raise ValueError(f"statistics must be 'gram' (Shampoo's) or 'kl' (KL-Shampoo's), got {self.statistics!r}.")
        if isinstance(self.beta, bool) or not isinstance(self.beta, (int, float)) or not 0 <= self.beta < 1:
            raise ValueError(f"shampoo_beta must lie in [0, 1), got {self.beta!r}.")
        if isinstance(self.max_dim, bool) or not isinstance(self.max_dim, int) or self.max_dim < 0:
            raise ValueError(f"max_dim must be a number of rows or columns >= 0, got {self.max_dim!r}.")

    def init(self, W: Tensor) -> dict[str, Tensor]:
        """Zeros; a basis becomes the identity at the first step of its matrix."""
        state = {"unit": W.new_zeros(*W.shape[:-2], 1, 1)}
        for side, size in zip(("left", "right"), W.shape[-2:], strict=True):
            if size <= self.max_dim:
                square = W.new_zeros(*W.shape[:-2], size, size)
                state |= {side: square, f"{side}_basis": square.clone()}
        return state

    def __call__(self, G: Tensor, state: State, group: Mapping[str, Any], memory: float) -> tuple[Turn, dict[str, Tensor]]:
        """The bases that know G, and the new state. `memory` is the slowest decay of what is kept in their unit."""
        old = state["unit"]
        keep = max(memory, self.beta**0.5)
        unit = torch.maximum(old * keep, G.abs().amax((-2, -1), keepdim=True))
        divisor = torch.where(unit > 0, unit, 1.0)
        # At most 1 / keep^2; where nothing is kept, a new unit far below the old one would make it 0 times inf.
        shrink = (old / divisor).square() if keep > 0 else torch.zeros_like(old)
        G = G / divisor
        step = state["step"]
        sides = ("left", "right")
        kept = {side: size <= self.max_dim for side, size in zip(sides, G.shape[-2:], strict=True)}
        averages = {side: state[side] for side in sides if kept[side]}
        bases = {side: _started(state[f"{side}_basis"], step) for side in sides if kept[side]}
        halves = {"left": G, "right": G.mT}
        if self.statistics == "kl":
            fade = (self.beta ** (step - 1)).clamp(min=DAMPING)
            for side, other in (sides, sides[::-1]):
                if kept[other]:
                    halves[side] = halves[side] @ _whitening(averages[other], bases[other], fade)
        share = 1 - self.beta * (step > 1).to(G.dtype)
        new, orders = {"unit": unit}, {}
        for side in averages:
            X = halves[side]
            A = averages[side] * (self.beta * shrink) + X @ X.mT * share
            if group["step"] == 1:
                # One matrix that is not finite would make LAPACK raise for all; it is masked where results are stored. In
                # fp32 it fails on one in twenty of those whose entries are graded.
                Q = torch.linalg.eigh(A.nan_to_num().double())[1].flip(-1).to(A.dtype)
            else:
                Q, orders[side] = _refreshed(A, bases[side])
            new |= {side: A, f"{side}_basis": Q}
        left, right = new.get("left_basis"), new.get("right_basis")
        return Turn(left, right, orders.get("left"), orders.get("right"), divisor, shrink), new


def quotient(P: Tensor, V: Tensor, eps: float) -> Tensor:
    """P / (sqrt(V) + eps ||sqrt(V)||_F), 0 where that is 0 / 0. Below eps of the norm entries of P are rounding errors."""
    root = V.sqrt()
    root = root + eps * torch.linalg.vector_norm(root, dim=(-2, -1), keepdim=True)
    return torch.where(root > 0, P / root, 0.0)


def _started(Q: Tensor, step: Tensor) -> Tensor:
    return torch.where(step == 1, torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device), Q)


def _whitening(A: Tensor, Q: Tensor, fade: Tensor) -> Tensor:
    """Q diag(h^1/2) for H = Q diag(h) Q^T above; half of it, as G H G^T is the square of G Q diag(h^1/2)."""
    d = (Q * (A @ Q)).sum(-2, keepdim=True)
    mean = d.mean(-1, keepdim=True)
    return Q * torch.where(mean > 0, mean / (d + fade * mean), 1.0).sqrt()


def _refreshed(A: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """One power step from Q towards the eigenvectors of A, largest first, and the order in which Q's columns went in."""
    AQ = A @ Q
    order = (Q * AQ).sum(-2).argsort(dim=-1, descending=True, stable=True)
    return torch.linalg.qr(AQ.gather(-1, order.unsqueeze(-2).expand_as(AQ)))[0], order
