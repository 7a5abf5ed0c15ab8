"""Alignment: how much of the largest possible decrease a direction takes, <G, D> / (||G||_* ||D||_op)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from schatten.diagnostics.core import Block, Need
from schatten.diagnostics.nuclear_norm import nuclear_norm
from schatten.diagnostics.singular_values import share, singular_values
from schatten.maps.lifts import safe_norm
from schatten.metrics import spectral_norm


def alignment(grad: Tensor, direction: Tensor) -> Tensor:
    """<G, D> / (||G||_* ||D||_op) of matrices (*b, m, n), (*b) in fp64, from -1 to 1.

    The nuclear norm is dual to the spectral one, so no step of a given spectral norm decreases the loss faster to first order
    than one with alignment 1, and those with D = msgn(G) have it. It sees neither the scales of G and D nor common rotations
    or transposition. Two SVDs without vectors. 0 where G or D is 0, nan where one is not finite.

    Raises ValueError where matrices have different shapes, TypeError for what is not real.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.alignment import alignment
        >>> G = torch.diag(torch.tensor([3.0, 1.0]))
        >>> round(float(alignment(G, torch.eye(2))), 6), round(float(alignment(G, G)), 6)
        (1.0, 0.833333)
    """
    g, d = _units(grad, direction)
    return share((g * d).sum((-2, -1)), singular_values(g).sum(-1) * _largest(singular_values(d)))


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """<A, B> / (||A||_F ||B||_F) of matrices (*b, m, n), (*b) in fp64, from -1 to 1; no SVD.

    0 where one is 0, nan where one is not finite. Raises ValueError where matrices have different shapes.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.alignment import cosine
        >>> round(float(cosine(torch.ones(2, 2), torch.eye(2))), 6)
        0.707107
    """
    a, b = _units(first, second)
    return (a * b).sum((-2, -1))


@dataclass(frozen=True)
class Alignment:
    """What the update really made has of the largest decrease the gradient allows, and the momentum with it.

    The direction is minus what the step added to the weight besides decay. The nuclear norm comes from one msgn, with the error
    that `nuclear_norm` states, spectral norms from 16 power iterations from below, by 2 % for a Gaussian 512 x 512 and
    less for U V^T, so a value may be above 1 by that much. The momentum's columns are missing for a rule that keeps none.

    Example:
        >>> import torch, schatten
        >>> from schatten.diagnostics.alignment import Alignment
        >>> from schatten.diagnostics.core import Block
        >>> G = torch.diag(torch.tensor([3.0, 1.0]))[None]
        >>> W, U = torch.zeros(1, 2, 2), -0.1 * torch.eye(2)[None]
        >>> block = Block("w", schatten.Rule(), {}, W, gradient=G, momentum=G, update=U)
        >>> {name: round(float(value), 2) for name, value in Alignment()(block).items()}
        {'update': 1.0, 'update_cosine': 0.89, 'momentum': 0.83, 'momentum_cosine': 1.0}
    """

    name: ClassVar[str] = "alignment"
    scope: ClassVar[Literal["matrix", "model"]] = "matrix"
    needs: ClassVar[frozenset[Need]] = frozenset({"gradient", "momentum", "update"})
    columns: ClassVar[Mapping[str, str]] = {
        "update": "<G, D> / (||G||_* ||D||_op) of gradient G and D = -update, from -1 to 1",
        "update_cosine": "<G, D> / (||G||_F ||D||_F), from -1 to 1",
        "momentum": "<G, M> / (||G||_* ||M||_op) of gradient and momentum, from -1 to 1",
        "momentum_cosine": "<G, M> / (||G||_F ||M||_F), from -1 to 1",
    }
    cost: ClassVar[str] = "one msgn in fp32 (six quintics) and 32 power iterations"

    def __call__(self, of: Block) -> Mapping[str, Tensor]:
        assert of.gradient is not None and of.update is not None
        directions = {"update": -of.update} | ({} if of.momentum is None else {"momentum": of.momentum})
        spread = share(nuclear_norm(of.gradient), _frobenius(of.gradient))
        found: dict[str, Tensor] = {}
        for name, D in directions.items():
            angle = cosine(of.gradient, D)
            found[name] = share(angle * share(_frobenius(D), spectral_norm(D).double()), spread)
            found[f"{name}_cosine"] = angle
        return found


def _frobenius(matrix: Tensor) -> Tensor:
    return safe_norm(matrix.detach().double(), (-2, -1))[..., 0, 0]


def _units(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both in fp64 with Frobenius norm 1, or 0."""
    if first.shape[-2:] != second.shape[-2:]:
        raise ValueError(f"The two must be matrices of one shape, got {tuple(first.shape)} and {tuple(second.shape)}.")
    a, b = (X.detach().double() for X in (first, second))
    return share(a, safe_norm(a, (-2, -1))), share(b, safe_norm(b, (-2, -1)))


def _largest(s: Tensor) -> Tensor:
    return s[..., :1].sum(-1)


QUANTITY = Alignment
