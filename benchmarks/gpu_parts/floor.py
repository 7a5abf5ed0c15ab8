"""The floor of a step: bytes and operations that no implementation can do without, counted from shapes.

A step reads weight, gradient and averages once and writes weight and averages once; the signal, the iterates and the
direction are counted as if they never left the chip. Products are those of the form that schatten's solver chooses, whole,
and with symmetric ones (X X^T, polynomials of it) by half. Elementwise arithmetic is not counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from gpu_parts.models import Model
from torch import Tensor

from schatten import solvers
from schatten.solvers.iteration import Quintic, cheaper_form, gram_cost, product_cost
from schatten.solvers.spectral_norm import PRODUCTS, VECTORS
from schatten.solvers.tower import SMOOTH

# What a step computes: AdamW of everything; Muon or a smooth power of matrices, with AdamW of the rest.
TASKS = ("adamw", "muon", "power")

# Running averages of half-precision parameters in schatten are fp32; torch's have the parameter's dtype.
AVERAGE = 4

PLAIN_STEPS = 5


@dataclass(frozen=True)
class Floor:
    """`bytes` read and written, and operations (two for a multiply-add) with whole and with half symmetric products."""

    bytes: int
    flops_whole: float
    flops_symmetric: float

    def milliseconds(self, bandwidth: float, peak: float, symmetric: bool = True) -> float:
        """At `bandwidth` bytes and `peak` operations per second, one after the other."""
        return 1e3 * (self.bytes / bandwidth + (self.flops_symmetric if symmetric else self.flops_whole) / peak)


def floor(model: Model, task: str, work: torch.dtype) -> Floor:
    """Of one step of all parameters of `model`, with products in `work`."""
    whole, symmetric = (
        sum(count * matrix_flops(m, n, task, work, half) for (m, n), count in model.matrices().items())
        for half in (False, True)
    )
    return Floor(step_bytes(model, task), whole, symmetric)


def step_bytes(model: Model, task: str) -> int:
    item, total = model.dtype.itemsize, 0
    for shape in model.shapes:
        if task != "adamw" and shape.layout is not None:
            averages = AVERAGE
        else:
            # Two of them; torch's fused AdamW keeps them in the parameter's dtype.
            averages = 2 * (item if task == "adamw" else AVERAGE)
        total += shape.entries * (3 * item + 2 * averages)
    return total


def matrix_flops(fan_out: int, fan_in: int, task: str, work: torch.dtype, half: bool) -> float:
    """Operations in the products of one matrix."""
    m, n = sorted((fan_out, fan_in))
    if task == "adamw":
        return 0.0
    if task == "muon":
        return 2 * _multiplications(m, n, *solvers.polynomial().form(m, n, work, half), False, half)
    # The tower also multiplies some vectors by X X^T, for its largest eigenvalue.
    form = cheaper_form(m, n, SMOOTH, work, summed=True, half=half)
    return 2 * (_multiplications(m, n, form, SMOOTH, True, half) + PRODUCTS * VECTORS * m * m)


def _multiplications(
    m: int, n: int, form: Callable[..., Tensor], quintics: Sequence[Quintic], summed: bool, half: bool
) -> float:
    if isinstance(form, partial):
        return gram_cost(m, n, len(quintics), len(form.keywords["restarts"]), summed, half)
    return product_cost(m, n, len(quintics), half)


def plain_flops(model: Model) -> float:
    """Operations of five plain Newton-Schulz steps (X X^T, its square, and their sum times X) on every matrix."""
    total = 0
    for (fan_out, fan_in), count in model.matrices().items():
        m, n = sorted((fan_out, fan_in))
        total += count * PLAIN_STEPS * (4 * m * m * n + 2 * m**3)
    return float(total)
