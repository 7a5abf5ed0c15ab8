"""Triton's kernels: the products, and passes over many tensors in one launch. Imported where they run, and only there."""

from schatten.kernels.triton.adamw import adamw_
from schatten.kernels.triton.division import quotient
from schatten.kernels.triton.momentum import momentum_
from schatten.kernels.triton.product import affine, affine_onto, gram, sym
from schatten.kernels.triton.retract import retract_

__all__ = ["adamw_", "affine", "affine_onto", "gram", "momentum_", "quotient", "retract_", "sym"]
