"""The size of updates: their root mean square, and how large they are beside the weight they change."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from schatten.diagnostics.core import Block, Need
from schatten.diagnostics.singular_values import singular_values
from schatten.maps.lifts import safe_norm
from schatten.metrics import spectral_norm
from schatten.solvers.core import check_matrices


def update_rms(update: Tensor) -> Tensor:
    """||U||_F / sqrt(m n), the root mean square of the entries of matrices (*b, m, n): (*b) in fp64, in the weight's unit.

    An update lr U V^T of full rank has lr / sqrt(max(m, n)). nan for a matrix that is not finite. Raises TypeError and
    ValueError for what is no batch of real matrices.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.update import update_rms
        >>> float(update_rms(0.1 * torch.eye(4, 16).double()))
        0.025
    """
    check_matrices(update, "update")
    norm = safe_norm(update.detach().double(), (-2, -1))[..., 0, 0]
    return (norm + 0.0 * norm) / math.sqrt(update.shape[-2] * update.shape[-1])


def rms_ratio(update: Tensor, weight: Tensor) -> Tensor:
    """RMS(U) / RMS(W) of matrices (*b, m, n), (*b) in fp64: the share of the weight that one step changes.

    A common rule of thumb wants about 1e-3. 0 for a zero update, inf for another one of a zero weight, nan where one is not
    finite. Raises as `update_rms`.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.update import rms_ratio
        >>> round(float(rms_ratio(torch.full((2, 2), 0.01), torch.ones(2, 2))), 6)
        0.01
    """
    return _beside(update_rms(update), update_rms(weight))


def spectral_ratio(update: Tensor, weight: Tensor) -> Tensor:
    """||U||_op / ||W||_op of matrices (*b, m, n), (*b) in fp64: the same share in the norm that Muon bounds.

    Two SVDs without vectors. 0 for a zero update, inf for another one of a zero weight, nan where one is not finite; raises as
    `singular_values`.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.update import spectral_ratio
        >>> round(float(spectral_ratio(torch.eye(2), torch.diag(torch.tensor([4.0, 1.0])))), 6)
        0.25
    """
    return _beside(singular_values(update)[..., 0], singular_values(weight)[..., 0])


@dataclass(frozen=True)
class Update:
    """Size of what a step added to each matrix, decay not counted, and its share of the weight in two norms.

    Spectral norms come from 16 power iterations, from below, by 2 % for a Gaussian 512 x 512.

    Example:
        >>> import torch, schatten
        >>> from schatten.diagnostics.core import Block
        >>> from schatten.diagnostics.update import Update
        >>> W = torch.diag(torch.tensor([4.0, 3.0]))[None]
        >>> found = Update()(Block("w", schatten.Rule(), {}, W, update=-0.1 * torch.eye(2)[None]))
        >>> {name: round(float(value), 3) for name, value in found.items()}
        {'rms': 0.071, 'rms_ratio': 0.028, 'spectral': 0.1, 'spectral_ratio': 0.025}
    """

    name: ClassVar[str] = "update"
    scope: ClassVar[Literal["matrix", "model"]] = "matrix"
    needs: ClassVar[frozenset[Need]] = frozenset({"update"})
    columns: ClassVar[Mapping[str, str]] = {
        "rms": "root mean square of the update's entries, in the weight's unit",
        "rms_ratio": "RMS(update) / RMS(weight)",
        "spectral": "||update||_op, in the weight's unit",
        "spectral_ratio": "||update||_op / ||weight||_op",
    }
    cost: ClassVar[str] = "32 power iterations"

    def __call__(self, of: Block) -> Mapping[str, Tensor]:
        assert of.update is not None
        spectral, weight = spectral_norm(of.update).double(), spectral_norm(of.weight).double()
        return {
            "rms": update_rms(of.update),
            "rms_ratio": rms_ratio(of.update, of.weight),
            "spectral": spectral,
            "spectral_ratio": _beside(spectral, weight),
        }


def _beside(update: Tensor, weight: Tensor) -> Tensor:
    return torch.where(update == 0, weight * 0, update / weight)


QUANTITY = Update
