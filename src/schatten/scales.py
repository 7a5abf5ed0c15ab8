"""Scales: how long an update is, as a factor c(fan_out, fan_in) on the direction.

The factor multiplies the direction but not the decay, so it moves the constraint: a spectral direction with decay
lambda keeps weights within spectral norm c / lambda. Other libraries' names are accepted and become ours
(`schatten.scale_names`); `schatten.convert_lr` takes a learning rate from one scale to another.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from schatten.maps.lifts import safe_norm
from schatten.scale_names import own_name

# The root mean square of AdamW's updates over lr, as Moonlight (arXiv 2502.16982) rounds it.
ADAMW_RMS = 0.2


@runtime_checkable
class Factor(Protocol):
    """A scale: `factor` is what a shape implies, the call what these directions (*b, fan_out, fan_in) get.

    The call returns a number, or a tensor (*b, 1, 1) where it is measured.
    """

    def factor(self, fan_out: int, fan_in: int) -> float: ...

    def __call__(self, D: Tensor) -> float | Tensor: ...


@dataclass(frozen=True)
class Scale:
    """The factor by name, for a direction of fan_out x fan_in (rows x columns).

    | name | factor | what it keeps |
    |---|---|---|
    | `adamw-rms` | 0.2 sqrt(max(fan_out, fan_in)) | the update RMS of AdamW, so its lr carries over (Moonlight, 2025) |
    | `keller` | sqrt(max(1, fan_out / fan_in)) | Keller Jordan's Muon, torch's "original" |
    | `mup` | sqrt(fan_out / fan_in) | the RMS-to-RMS operator norm, so lr transfers across width |
    | `none` | 1 | spectral norm 1 |

    A name of torch, Dion, Emerging-Optimizers, timm, Keras, optax and others becomes one of these; one that means two
    factors, such as "spectral", raises ValueError with both. An empty matrix counts as one column or row.

    Example:
        >>> import schatten
        >>> schatten.scales.Scale("keller").factor(12, 3), schatten.scales.Scale("match_rms_adamw").name
        (2.0, 'adamw-rms')
    """

    name: str = "adamw-rms"

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", own_name(self.name))

    def factor(self, fan_out: int, fan_in: int) -> float:
        """c(fan_out, fan_in)."""
        match self.name:
            case "adamw-rms":
                return ADAMW_RMS * math.sqrt(max(fan_out, fan_in))
            case "keller":
                return math.sqrt(max(1.0, fan_out / max(1, fan_in)))
            case "mup":
                return math.sqrt(max(1, fan_out) / max(1, fan_in))
            case _:
                return 1.0

    def __call__(self, D: Tensor) -> float:
        """c of directions D of shape (*b, fan_out, fan_in)."""
        return self.factor(*D.shape[-2:])


@dataclass(frozen=True)
class RMS:
    """The measured factor that makes the root mean square of an update's entries `target`: target sqrt(mn) / ||D||_F.

    One lr then serves directions of any size, such as all spectral powers, and with 0.2 it is AdamW's. Of U V^T it is
    0.2 sqrt(max(m, n)), the `adamw-rms` factor, which is what `factor` returns. A zero direction stays zero.

    Raises ValueError for a target outside (0, inf).

    Example:
        >>> import torch, schatten
        >>> float(schatten.scales.RMS(0.2)(torch.full((2, 2), 4.0)))
        0.05000000074505806
    """

    target: float = ADAMW_RMS

    def __post_init__(self) -> None:
        if isinstance(self.target, bool) or not isinstance(self.target, (int, float)) or not 0 < self.target < math.inf:
            raise ValueError(f"target must lie in (0, inf), got {self.target!r}.")

    def factor(self, fan_out: int, fan_in: int) -> float:
        """c of a semi-orthogonal fan_out x fan_in direction."""
        return self.target * math.sqrt(max(fan_out, fan_in))

    def __call__(self, D: Tensor) -> Tensor:
        """c of directions D of shape (*b, fan_out, fan_in), as (*b, 1, 1)."""
        size = safe_norm(D, (-2, -1)) if D.numel() else D.new_zeros(*D.shape[:-2], 1, 1)
        return torch.where(size > 0, self.target * math.sqrt(D.shape[-2] * D.shape[-1]) / size, 0.0)
