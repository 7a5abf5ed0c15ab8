"""A matrix of a checkpoint in numbers, and what is listed only."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from schatten.diagnostics.constraint import decay_for_radius
from schatten.lab import matrix_kinds
from schatten.lab.spectra import Spectrum, effective_rank
from schatten.scale_names import NAMES
from schatten.scales import Scale

# Names of the scales, of which the first is the library's default.
SCALES = NAMES

# Of one common value: as near as weights come to a bound that they press against.
NEAR = 0.01

QUANTILES = torch.linspace(0, 1, 41, dtype=torch.float64)


@dataclass(frozen=True)
class Row:
    """A matrix: where it is, and its spectrum; nan for what was not measured.

    `peak` is sigma_max over rms (sqrt(m) + sqrt(n)), 1 for random entries; `condition` is at least what it says where
    `condition_bound`. `values` are the singular values, descending.
    """

    name: str
    kind: str
    fan_out: int
    fan_in: int
    dtype: str
    how: str
    method: str
    sigma_max: float
    sigma_median: float
    sigma_min: float
    frobenius: float
    rms: float
    stable_rank: float
    effective_rank: float
    condition: float
    condition_bound: bool
    peak: float
    residual: float
    nonfinite: int
    values: Tensor = field(repr=False, compare=False)

    @property
    def hidden(self) -> bool:
        return self.kind in matrix_kinds.HIDDEN

    @property
    def pile(self) -> float:
        """Share of the singular values but the largest that are within 1 % of it; nan where they are not known."""
        if self.method not in ("svd", "gram") or len(self.values) < 2:
            return math.nan
        return (int((self.values >= (1 - NEAR) * self.sigma_max).sum()) - 1) / (len(self.values) - 1)

    def factor(self, scale: str) -> float:
        """c of a scale."""
        return Scale(scale).factor(self.fan_out, self.fan_in)

    def plain(self) -> dict[str, Any]:
        """For JSON: 41 quantiles in the place of the values, and the decay that has sigma_max as its radius."""
        own = {key: value for key, value in asdict(self).items() if key != "values"}
        bounds = {scale: decay_for_radius(self.sigma_max, self.factor(scale)) for scale in SCALES} if self.sigma_max > 0 else {}
        full = self.method in ("svd", "gram") and len(self.values) > 0
        quantiles = torch.quantile(self.values, QUANTILES).tolist() if full else []
        return {**own, "quantiles": quantiles, "weight_decay": bounds}


@dataclass(frozen=True)
class Unmeasured:
    """A tensor that is listed only."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    why: str
    nonfinite: int = 0


def row_of(name: str, kind: str, matrix: Tensor, dtype: str, how: str, found: Spectrum) -> Row:
    fan_out, fan_in = matrix.shape
    s, full = found.values, found.method in ("svd", "gram")
    sigma = float(s[0]) if len(s) else math.nan
    rms = found.frobenius / math.sqrt(max(fan_out * fan_in, 1))
    edge = rms * (math.sqrt(fan_out) + math.sqrt(fan_in))
    smallest = float(s[-1]) if full and len(s) else math.nan
    counted = max(smallest, found.floor)
    return Row(
        name=name,
        kind=kind,
        fan_out=fan_out,
        fan_in=fan_in,
        dtype=dtype,
        how=how,
        method=found.method,
        sigma_max=sigma,
        sigma_median=float(s.median()) if full and len(s) else math.nan,
        sigma_min=smallest,
        frobenius=found.frobenius,
        rms=rms,
        stable_rank=(found.frobenius / sigma) ** 2 if sigma > 0 else math.nan if math.isnan(sigma) else 0.0,
        effective_rank=effective_rank(s) if full and len(s) else math.nan,
        condition=sigma / counted if counted > 0 else math.nan,
        condition_bound=smallest <= found.floor,
        peak=sigma / edge if edge > 0 else math.nan,
        residual=found.residual,
        nonfinite=found.nonfinite,
        values=s,
    )
