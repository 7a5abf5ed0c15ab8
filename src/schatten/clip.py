"""Gradient clipping by norm, for the parameters whose step depends on the norm of their gradient.

AdamW's does, and so does that of a rule as SpectralSGD(p > 0). A scale-free rule, such as Muon, gives U V^T for G and for
c G alike: there clipping changes no step but the balance of steps in the momentum, and a threshold that counts those
gradients clips AdamW's by the size of Muon's. So both norms are reported, and each part is clipped by its own or not at all.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from schatten.placements.gather import total_norms
from schatten.placements.local import plain
from schatten.rule import Rule

if TYPE_CHECKING:
    from schatten.optimizer import SpectralOptimizer

# Where fp32 squares of a tensor with this norm neither overflow nor vanish.
SAFE = (1e-15, 1e15)

# Powers of two round nothing. From 2^16 to 2^-16 a threshold of a map is passed, and Adam's eps of 1e-8 is not yet felt.
FACTORS = (2.0**-16, 1.0, 2.0**16)


class GradNorms(NamedTuple):
    """The norms of all gradients of AdamW groups and of spectral groups before clipping, scalars on the device, fp32."""

    adamw: Tensor
    spectral: Tensor


@torch.no_grad()
def clip_grad_norm_(opt: "SpectralOptimizer", max_norm: float, *, norm_type: float = 2.0) -> GradNorms:
    """Scale gradients of AdamW groups by min(1, max_norm / (norm + 1e-6)), norm that of all of them; both norms before it.

    As torch.nn.utils.clip_grad_norm_ on the AdamW parameters. The same is done, by their own norm, with all gradients of
    spectral groups whose rule is not `scale_free`. Gradients of scale-free rules stay as they are, as clipping does nothing
    to their map; only beside others in a momentum would a shorter gradient count for less.

    Norms are taken without overflow and nothing waits for the device. Where the norm of a part is not finite, that part is
    left alone: `step` skips the parameters that made it so. After a GradScaler's `unscale_`, before its `step`.

    Norms of DTensors (FSDP2, HSDP, tensor parallel) are those of the whole gradients, by one small collective for each mesh:
    all ranks must call this. What other pipeline stages hold is not counted.

    Raises ValueError for a max_norm that is no number >= 0 (infinity only measures) or a norm_type that is not positive.

    Example:
        >>> import torch, schatten
        >>> W, b = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))
        >>> opt = schatten.Muon([{"params": [W]}, {"params": [b], "algorithm": "adamw"}])
        >>> W.grad, b.grad = torch.full((2, 2), 5.0), torch.tensor([3.0, 4.0])
        >>> schatten.clip_grad_norm_(opt, 1.0)
        GradNorms(adamw=tensor(5.), spectral=tensor(10.))
        >>> W.grad[0].tolist(), [round(g, 4) for g in b.grad.tolist()]
        ([5.0, 5.0], [0.6, 0.8])
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be a number >= 0, got {max_norm!r}; infinity measures without clipping.")
    if not norm_type > 0:
        raise ValueError(f"norm_type must be positive, such as 2.0 or infinity, got {norm_type!r}.")
    adamw: list[Tensor] = []
    clipped: list[Tensor] = []
    kept: list[Tensor] = []
    for group in opt.param_groups:
        if group["algorithm"] == "adamw":
            part = adamw
        else:
            part = kept if scale_free(opt.rule(group), group["weight_decay"]) else clipped
        part += group["params"]
    parts = [[(p, _norm(p, norm_type)) for p in part] for part in (adamw, clipped, kept)]
    norms = total_norms(parts, norm_type)
    for part, norm in zip((adamw, clipped), norms, strict=False):
        if own := [_holder(p.grad) for p in part if p.grad is not None]:
            norm = norm.to(torch.promote_types(own[0].dtype, torch.float32))
            # Zero stands for a norm that is not finite: its factor is max_norm / 1e-6, clamped at 1.
            torch.nn.utils.clip_grads_with_norm_(own, max_norm, torch.where(norm.isfinite(), norm, 0.0))
    spectral = torch.linalg.vector_norm(torch.stack([norm.to(norms[1].device) for norm in norms[1:]]), norm_type)
    return GradNorms(norms[0].float(), spectral.float())


def scale_free(rule: Rule, weight_decay: float = 0.0) -> bool:
    """Whether a rule steps alike for gradients G_1, G_2 and c G_1, c G_2, for every c > 0.

    Found by doing two steps on small matrices, in fp64 on the CPU. What is no property of the map alone counts too: Adam's
    ratio in the signal or a measured RMS in the scale make any power scale-free, a clip inside the signal none.

    Example:
        >>> import schatten
        >>> from schatten.clip import scale_free
        >>> huber, rms = schatten.maps.Huber(0.1), schatten.scales.RMS()
        >>> scale_free(schatten.Rule()), scale_free(schatten.Rule(map=huber)), scale_free(schatten.Rule(map=huber, scale=rms))
        (True, False, False)
    """
    try:
        return _scale_free(rule, weight_decay > 0)
    except TypeError:  # a slot of the user's own that has no hash
        return _scale_free.__wrapped__(rule, weight_decay > 0)


@lru_cache(maxsize=256)
def _scale_free(rule: Rule, decays: bool) -> bool:
    numbers = {key: (0.9, 0.95) if key == "betas" else 0.9 for key in rule.hyperparameters}
    group = {"lr": 0.1, "weight_decay": 0.1 if decays else 0.0, **numbers}
    low, middle, high = (_two_steps(rule, group, factor) for factor in FACTORS)
    length = torch.linalg.vector_norm(middle - _weight())
    return all(bool(torch.linalg.vector_norm(W - middle) <= 0.01 * length) for W in (low, high))


def _two_steps(rule: Rule, group: Mapping[str, Any], factor: float) -> Tensor:
    W = _weight()
    state = {key: value.unsqueeze(0) for key, value in rule.init(W[0]).items()}
    # What another evaluation would feed is zero here.
    fed = getattr(rule.signal, "fed_by", None) is not None
    for step in (1, 2):
        state["step"] = torch.full((1, 1, 1, 1), float(step), dtype=W.dtype, device="cpu")
        S = _matrix(step) * factor
        if not fed:
            S, new = rule.signal(S, state, {**group, "step": step})
            state |= new
        D, new = rule.direction(S, state, group)
        state |= new
        W, new = rule.retraction(W, D, group["lr"] * rule.scale(D), state, {**group, "step": step})
        state |= new
    return W


def _weight() -> Tensor:
    return 0.1 * _matrix(7)


def _matrix(seed: int) -> Tensor:
    """A full-rank matrix (1, 1, 4, 3) without zeros."""
    return torch.arange(1, 13, dtype=torch.float64, device="cpu").mul(seed + 0.7).sin().view(1, 1, 4, 3)


def _norm(p: Tensor, norm_type: float) -> Tensor:
    """The norm of this rank's part of a gradient in fp64, where no square of an fp32 number overflows; 0 without one."""
    grad = p.grad
    if isinstance(grad, DTensor) and isinstance(p, DTensor) and grad.placements != p.placements:
        grad = grad.redistribute(p.device_mesh, p.placements)
    if grad is None or not plain(grad).numel():
        return torch.zeros((), dtype=torch.float64, device=plain(p.detach()).device)
    own = plain(grad)
    values = own.coalesce().values() if own.is_sparse else own
    if values.device.type == "cpu":
        # A CPU may look whether fp32 was enough, which takes a fifth of the time of fp64.
        norm = torch.linalg.vector_norm(values, norm_type, dtype=torch.promote_types(values.dtype, torch.float32))
        if SAFE[0] < float(norm) < SAFE[1]:
            return norm.double()
    return torch.linalg.vector_norm(values, norm_type, dtype=torch.float64)


def _holder(grad: Tensor) -> Tensor:
    """What torch's clipping takes for a parameter with this gradient: of a DTensor this rank's part alone, in its memory."""
    own = plain(grad)
    holder = own.detach()
    holder.grad = own
    return holder
