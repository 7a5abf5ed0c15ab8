"""QK-clip: attention logits that grew too large, brought back by scaling the projections they come from."""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from schatten.placements.local import plain
from schatten.placements.states import cut


@torch.no_grad()
def qk_clip_(
    query: Tensor,
    key: Tensor,
    max_logits: Tensor,
    threshold: float = 100.0,
    *,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    rotary: int = 0,
    values: int = 0,
) -> Tensor:
    r"""Scale, in place, the projections of each head so that its largest logit is at most `threshold` (Kimi K2, 2507.20534).

        gamma = min(1, threshold / max_logit),   W_q <- sqrt(gamma) W_q,   W_k <- sqrt(gamma) W_k    for each head

    Logits are bilinear in the two projections, so those of a head are multiplied by gamma: on the input that gave
    `max_logits` the largest is min(max_logit, threshold) afterwards. A head within the threshold is not changed by a bit.
    With Muon around it this is MuonClip: call it after `opt.step()` with the maxima of that step's forward pass.

    Grouped queries: with fewer key heads than query heads, query head h reads key head h // (heads / key_heads), and
    every head's logits are still multiplied by its own gamma. The key head takes sqrt(Gamma), Gamma being the largest gamma
    of its query heads, which all of them need; each query head the rest, gamma / sqrt(Gamma). So the key is scaled only if
    every head that reads it is over the threshold, and no factor exceeds 1.

    Latent attention (MLA): the rotary key is one for all heads and stays as it is, so the rotary rows of the query
    take the whole gamma. Biases are scaled like their rows.

    Args:
        query: W_q, (heads * head_dim, fan_in). A slice of rows of a fused weight will do.
        key: W_k, (key_heads * head_dim, fan_in), with key_heads a divisor of heads.
        max_logits: (heads,), the largest logit of each query head, with the softmax's scale and without position biases
            that are added to it, over the batch, all positions and all ranks; on the weights' device.
        threshold: the largest logit allowed, > 0. Kimi K2 used 100.
        query_bias, key_bias: of the two projections, (rows,).
        rotary: the last so many rows of each query head are rotary and meet the shared rotary key (MLA); 0 in ordinary
            attention, also with rotary embeddings.
        values: the last so many rows of each key head are not keys and stay as they are (MLA's fused key and value
            projection).

    Returns:
        gammas (heads,), fp32 (fp64 for fp64 maxima). Nothing waits for the device.

    A `max_logits` of inf or nan says nothing about how far to scale: that head is left as it is and its gamma is 1, so
    check `max_logits` itself. Factors are applied in fp32 and rounded once to the weights' precision. It has no effect
    where queries and keys are normalised after the projection. Raises ValueError for shapes that do not fit.

    Weights and biases may be DTensors (FSDP2, tensor parallel), each rank scaling the rows it has; every rank must pass the
    maxima of all heads, over all ranks. Raises TypeError for a slice of a DTensor, which is a copy.

    Example:
        >>> import torch, schatten
        >>> query, key = torch.ones(4, 3), torch.ones(4, 3)  # two heads of two rows
        >>> schatten.qk_clip_(query, key, torch.tensor([400.0, 50.0]))
        tensor([0.2500, 1.0000])
        >>> query[:, 0]
        tensor([0.5000, 0.5000, 1.0000, 1.0000])
    """
    if not 0 < threshold < math.inf:
        raise ValueError(f"threshold must be positive and finite, got {threshold}.")
    for name, W in (("query", query), ("key", key), ("query_bias", query_bias), ("key_bias", key_bias)):
        if isinstance(W, DTensor) and not isinstance(W, nn.Parameter):
            raise TypeError(
                f"{name} of shape {tuple(W.shape)} is a DTensor that is no parameter: a slice of a sharded weight is a copy, "
                f"and scaling it would change nothing. Keep query and key as weights of their own and pass these."
            )
    if isinstance(max_logits, DTensor):
        max_logits = max_logits.full_tensor()
    heads, key_heads = _heads(query, key, max_logits, rotary, values)
    for name, bias, weight in (("query_bias", query_bias, query), ("key_bias", key_bias, key)):
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{name} must have shape ({weight.shape[0]},), got {tuple(bias.shape)}.")
    exact = torch.promote_types(max_logits.dtype, torch.float32)
    largest = max_logits.to(exact)
    over = (largest > threshold) & (largest < math.inf)
    # Heads within the threshold get exactly 1, which the quotient need not be; `own` divides by it, so it may not vanish.
    gamma = torch.where(over, (threshold / largest).clamp(min=torch.finfo(exact).tiny), 1.0)
    shared = gamma.view(key_heads, -1).amax(1).sqrt()
    own = gamma / shared.repeat_interleave(heads // key_heads)
    keyed = query.shape[0] // heads - rotary
    of_query = torch.cat([own.unsqueeze(1).expand(-1, keyed), gamma.unsqueeze(1).expand(-1, rotary)], 1)
    of_key = shared.unsqueeze(1).repeat(1, key.shape[0] // key_heads)
    of_key[:, of_key.shape[1] - values :] = 1
    for W, factors in ((query, of_query), (query_bias, of_query), (key, of_key), (key_bias, of_key)):
        if W is not None:
            _scale_rows_(W, factors.flatten())
    return gamma


def _scale_rows_(W: Tensor, factors: Tensor) -> None:
    """Multiply each row of `W`, or of what this rank has of it, by its factor."""
    if isinstance(W, DTensor):
        by_rows = tuple(p if getattr(p, "dim", None) == 0 else Replicate() for p in W.placements)
        factors = plain(cut(factors, W.device_mesh, by_rows))
    own = plain(W)
    own.copy_(own * factors.view(-1, *[1] * (own.ndim - 1)))


def _heads(query: Tensor, key: Tensor, max_logits: Tensor, rotary: int, values: int) -> tuple[int, int]:
    """(query heads, key heads), after checking that the shapes fit together."""
    if max_logits.ndim != 1 or max_logits.numel() == 0:
        raise ValueError(f"max_logits must hold one number per query head, (heads,), got shape {tuple(max_logits.shape)}.")
    heads = max_logits.numel()
    if query.ndim != 2 or query.shape[0] % heads or query.shape[0] == 0:
        raise ValueError(f"query must be (heads * head_dim, fan_in) with heads={heads}, got shape {tuple(query.shape)}.")
    head_dim = query.shape[0] // heads
    if not 0 <= rotary < head_dim or values < 0:
        raise ValueError(
            f"rotary must lie from 0 to less than the {head_dim} rows of a query head and values must be >= 0, "
            f"got rotary={rotary} and values={values}."
        )
    rows = head_dim - rotary + values
    if key.ndim != 2 or key.shape[0] % rows or key.shape[0] == 0 or heads % (key.shape[0] // rows):
        raise ValueError(
            f"key must be (key_heads * {rows}, fan_in) with key_heads a divisor of heads={heads}, got shape "
            f"{tuple(key.shape)}; a query head has {head_dim} rows, rotary={rotary} and values={values}."
        )
    return heads, key.shape[0] // rows
