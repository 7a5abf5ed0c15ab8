"""AdamW over tensors of any sizes in one launch."""

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from schatten.kernels.bucket import Tables
from schatten.kernels.triton.tiles import launch, pointer
from schatten.kernels.triton.weights import TYPES, addresses, aligned, loaded, moves, noise_rows, number, seed, stochastic

# Entries of a program.
TILE = 2048

# Tensors among which a program looks for its own at a time.
LOOKED_AT = 256


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    steps: Sequence[Tensor],
    finite: Sequence[Tensor] | None,
    *,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    eps: float,
    weight_decay: float,
    maximize: bool,
    scale: Tensor | None,
    noise: Sequence[tuple[Tensor, int]] | None,
    tables: Tables,
) -> None:
    """One step of torch.optim.AdamW on contiguous tensors, in fp32 whatever the parameters' precision.

        P <- P - lr lambda P
        M <- beta1 M + (1 - beta1) G,   V <- beta2 V + (1 - beta2) G^2
        P <- P - lr / (1 - beta1^t) M / (sqrt(V / (1 - beta2^t)) + eps)

    The parameters are of one dtype and device, and so are the gradients. The averages M and V are fp32; `steps` holds each
    tensor's t, raised already. Gradients are divided by a GradScaler's `scale` and, with `maximize`, negated. `finite` has a
    flag () for each tensor; where it is false nothing of that tensor changes. `noise` is that of `Onto`, for bf16.
    """
    sizes = [p.numel() for p in params]
    *starts, tiles = accumulate((-(-size // TILE) for size in sizes), initial=0)
    if tiles == 0:
        return
    device = params[0].device
    # What stays where it is from step to step, and what need not: half of a table to make again.
    lasting = addresses(params) + addresses(exp_avg) + addresses(exp_avg_sq)
    passing = addresses(grads)
    kept = (*lasting, *sizes, *starts, *(() if noise is None else noise_rows(noise)))
    given = passing if finite is None else passing + addresses(finite)
    t = torch.stack(list(steps)).double()
    first, first_at = number(beta1, device)
    second, second_at = number(beta2, device)
    rate, rate_at = number(lr, device)
    divisor, divisor_at = number(1.0 if scale is None else scale, device)
    launch(
        _adamw,
        tiles,
        device,
        tables.of(kept, torch.int64, device),
        tables.of(given, torch.int64, device),
        len(sizes),
        first,
        # Of a number on the host the difference is rounded once.
        0.0 if first_at else 1 - float(beta1),
        second,
        0.0 if second_at else 1 - float(beta2),
        beta1**t,
        beta2**t,
        rate,
        float(eps),
        float(weight_decay),
        divisor,
        TYPE=TYPES[params[0].dtype],
        G_TYPE=TYPES[grads[0].dtype],
        MAXIMIZE=maximize,
        FINITE=finite is not None,
        NOISE=noise is not None,
        FIRST_AT=first_at,
        SECOND_AT=second_at,
        LR_AT=rate_at,
        SCALED=scale is not None,
        SCALE_AT=divisor_at,
        ALIGNED=aligned(lasting + passing),
        TILE=TILE,
        LOOKED_AT=LOOKED_AT,
    )


@triton.jit(do_not_specialize=("members",))
def _adamw(
    kept, given, members, beta1, rest1, beta2, rest2, power1, power2, lr, eps, weight_decay, scale,
    TYPE: tl.constexpr, G_TYPE: tl.constexpr, MAXIMIZE: tl.constexpr, FINITE: tl.constexpr, NOISE: tl.constexpr,
    FIRST_AT: tl.constexpr, SECOND_AT: tl.constexpr, LR_AT: tl.constexpr, SCALED: tl.constexpr, SCALE_AT: tl.constexpr,
    ALIGNED: tl.constexpr, TILE: tl.constexpr, LOOKED_AT: tl.constexpr,
):  # fmt: skip
    """One tile of one tensor: of that whose first tile is the last one not after it."""
    tile = tl.program_id(0)
    sizes, starts, noise = kept + 3 * members, kept + 4 * members, kept + 5 * members
    member = -1
    for start in range(0, members, LOOKED_AT):
        others = start + tl.arange(0, LOOKED_AT)
        member += tl.sum((tl.load(starts + others, mask=others < members, other=1 << 62) <= tile).to(tl.int32), axis=0)
    first = (tile - tl.load(starts + member)) * TILE
    left = tl.load(sizes + member) - first
    if FINITE:
        left = tl.where(moves(given + members, member), left, 0)
    chance = 0
    if NOISE:
        chance = seed(noise, member, members)
    p = pointer(kept, member, TYPE, ALIGNED) + first
    m = pointer(kept + members, member, tl.float32, ALIGNED) + first
    v = pointer(kept + 2 * members, member, tl.float32, ALIGNED) + first
    g = pointer(given, member, G_TYPE, ALIGNED) + first
    beta1, beta2, lr = loaded(beta1, FIRST_AT), loaded(beta2, SECOND_AT), loaded(lr, LR_AT)
    if FIRST_AT:
        rest1 = 1 - beta1
    if SECOND_AT:
        rest2 = 1 - beta2
    decay = lr * weight_decay
    size = tl.div_rn(lr, (1 - tl.load(power1 + member)).to(tl.float32))
    root = tl.sqrt(1 - tl.load(power2 + member)).to(tl.float32)
    sign = -1.0 if MAXIMIZE else 1.0
    if SCALED:
        scale = loaded(scale, SCALE_AT)
    # Without a mask for the tiles within a tensor, as one of unknown size hides that accesses can be 16 bytes wide.
    if left >= TILE:
        _entries(p, g, m, v, first, TILE, beta1, rest1, beta2, rest2, size, root, decay, eps, sign, scale, chance,
                 SCALED, NOISE, False, TILE)  # fmt: skip
    else:
        _entries(p, g, m, v, first, left, beta1, rest1, beta2, rest2, size, root, decay, eps, sign, scale, chance,
                 SCALED, NOISE, True, TILE)  # fmt: skip


@triton.jit
def _entries(
    p, g, m, v, first, left, beta1, rest1, beta2, rest2, size, root, decay, eps, sign, scale, chance,
    SCALED: tl.constexpr, NOISE: tl.constexpr, MASKED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The entries that begin at four pointers, `left` of them; they are from `first` on in their tensor."""
    at = tl.arange(0, TILE)
    inside = at < left.to(tl.int32) if MASKED else None
    P = tl.load(p + at, mask=inside).to(tl.float32)
    G = tl.load(g + at, mask=inside).to(tl.float32)
    if SCALED:
        G = tl.div_rn(G, scale)
    G = sign * G
    P -= decay * P
    M = beta1 * tl.load(m + at, mask=inside) + rest1 * G
    V = beta2 * tl.load(v + at, mask=inside) + rest2 * G * G
    P -= tl.div_rn(size * M, tl.div_rn(tl.sqrt_rn(V), root) + eps)
    if NOISE:
        P = stochastic(P, first + at, chance)
    tl.store(p + at, P.to(p.dtype.element_ty), mask=inside)
    tl.store(m + at, M, mask=inside)
    tl.store(v + at, V, mask=inside)
