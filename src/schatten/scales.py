"""Scales: how long an update is, as a factor c(fan_out, fan_in) on the direction.

The factor multiplies the direction but not the decay, so it moves the constraint: a spectral direction with decay
lambda keeps weights within spectral norm c / lambda. Other libraries' names are accepted; "spectral" is refused, as two
of them use it for different factors.
"""

import math
from dataclasses import dataclass

from torch import Tensor

NAMES = ("adamw-rms", "keller", "mup", "none")

ALIASES = {
    "match_rms_adamw": "adamw-rms",  # torch.optim.Muon
    "rms_norm": "adamw-rms",  # Dion, gram-newton-schulz
    "original": "keller",  # torch.optim.Muon
    "shape_scaling": "keller",  # Emerging-Optimizers
    "spectral_norm": "mup",  # Dion, gram-newton-schulz
    "unit_rms_norm": "mup",  # Emerging-Optimizers
}


@dataclass(frozen=True)
class Scale:
    """The factor by name, for a direction of fan_out x fan_in (rows x columns).

    | name | factor | what it keeps |
    |---|---|---|
    | `adamw-rms` | 0.2 sqrt(max(fan_out, fan_in)) | the update RMS of AdamW, so its lr carries over (Moonlight, 2025) |
    | `keller` | sqrt(max(1, fan_out / fan_in)) | Keller Jordan's Muon, torch's "original" |
    | `mup` | sqrt(fan_out / fan_in) | the RMS-to-RMS operator norm, so lr transfers across width |
    | `none` | 1 | spectral norm 1 |

    Example:
        >>> import schatten
        >>> schatten.scales.Scale("keller").factor(12, 3), schatten.scales.Scale("match_rms_adamw").name
        (2.0, 'adamw-rms')
    """

    name: str = "adamw-rms"

    def __post_init__(self) -> None:
        name = ALIASES.get(self.name, self.name)
        if name == "spectral":
            raise ValueError(
                "scale 'spectral' is sqrt(max(fan_out, fan_in)) in one library and sqrt(fan_out / fan_in) in others: "
                "write 'adamw-rms' (with 5 times the lr) or 'mup'."
            )
        if name not in NAMES:
            raise ValueError(f"scale must be one of {', '.join(map(repr, NAMES))}, got {self.name!r}.")
        object.__setattr__(self, "name", name)

    def factor(self, fan_out: int, fan_in: int) -> float:
        """c(fan_out, fan_in)."""
        match self.name:
            case "adamw-rms":
                return 0.2 * math.sqrt(max(fan_out, fan_in))
            case "keller":
                return math.sqrt(max(1.0, fan_out / fan_in))
            case "mup":
                return math.sqrt(fan_out / fan_in)
            case _:
                return 1.0

    def __call__(self, D: Tensor) -> float:
        """c of directions D of shape (*b, fan_out, fan_in)."""
        return self.factor(*D.shape[-2:])
