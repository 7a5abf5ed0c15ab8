"""Spectral initialisation: hidden matrices start with the spectral norm that keeps activations the same size."""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from schatten.layout import pieces
from schatten.routing import named_parameters, plan

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def init_spectral_(model: Model, rules: Sequence[tuple[Any, ...]] = ()) -> Model:
    r"""Rescale, in place, every hidden matrix to ||W||_op = sqrt(fan_out / fan_in), Muon++'s start (arXiv 2601.01306).

        W <- sqrt(fan_out / fan_in) W / ||W||_op

    By it a matrix maps inputs of RMS 1 to outputs of RMS at most 1, at every width. Call it on an initialised model
    before training; singular vectors and the ratios of singular values stay what the initialisation made them.

    Hidden matrices are those `schatten.plan(model, rules)` trains by the spectral rule, each read by its layout: every
    matrix of a bank is scaled alone, a convolution as fan_out x (fan_in * kernel), and what is read flat, being no matrix,
    is left. Nothing else is touched. The norm is the largest singular value in fp64; weights are scaled in fp64 and
    rounded once, which for half precision moves the norm by some 2^-8 (bf16) or 2^-11 (fp16) of itself.

    Args:
        model: a module whose parameters have values.
        rules: overrides for the routes, as for `schatten.plan` and the optimizer.

    Returns the model. Raises ValueError, before anything is changed, naming every matrix that has no direction to scale:
    an all-zero one (a projection that is meant to start at zero is zeroed after this call, any other is initialised
    before it), one that holds inf or nan, and one on the meta device.

    Example:
        >>> import torch, schatten
        >>> model = schatten.init_spectral_(torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Linear(16, 4)))
        >>> [round(float(torch.linalg.matrix_norm(layer.weight.detach(), 2)), 4) for layer in model]
        [2.0, 0.5]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"init_spectral_ rescales the matrices of a torch.nn.Module, got {type(model).__name__}.")
    params = named_parameters(model)
    scaled, unusable = [], []
    for entry in plan(model, rules, strict=False):
        p = params[entry.name]
        if entry.route != "spectral" or entry.layout == "flat" or p.numel() == 0:
            continue
        if p.is_meta:
            unusable.append(f"{entry.name!r} is on the meta device")
            continue
        for piece in pieces(entry.layout, entry.shape):
            count, fan_out, fan_in = piece.blocks
            norms = _spectral_norms(piece.of(p.double()))
            for i, norm in enumerate(norms.tolist()):
                if not 0 < norm < math.inf:
                    place = f", matrix {i} of {count}," if count > 1 else ""
                    problem = "is zero" if norm == 0 else "holds inf or nan"
                    unusable.append(f"{entry.name!r} of shape {entry.shape}{place} {problem}")
            scaled.append((p, piece, math.sqrt(fan_out / fan_in) / norms))
    if unusable:
        raise ValueError(
            f"init_spectral_ scales matrices, and there is nothing to scale here: {'; '.join(unusable)}. Initialise them "
            f"first, and zero what is meant to start at zero after the call. No weight was changed."
        )
    for p, piece, factors in scaled:
        place = piece.view(p.detach())
        place.copy_((piece.of(p) * factors.view(-1, 1, 1)).view(place.shape))  # in fp64, as the factors are
    return model


def _spectral_norms(X: Tensor) -> Tensor:
    """The largest singular value of each matrix of X (b, m, n), nan for one with inf or nan, which LAPACK refuses."""
    nan = X.new_tensor(math.nan)
    return torch.stack([torch.linalg.svdvals(W)[0] if W.isfinite().all() else nan for W in X])
