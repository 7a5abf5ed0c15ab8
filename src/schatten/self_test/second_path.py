"""A step computed a second time, block by block, from a rule's slots alone.

What the engine does with views and batches is done here with slices, one logical matrix at a time, so that a mistake in
reading a parameter, batching it or writing it back shows as a difference. Slow, and used by `schatten.self_test` only.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from schatten.layout import Layout
from schatten.retractions.core import lr_of
from schatten.rule import Rule


def logical(t: Tensor, layout: str | Layout) -> list[Tensor]:
    """The logical matrices of a tensor, cut out by slices: what the documentation of `Layout` says, written a second time.

    Example:
        >>> import torch, schatten
        >>> from schatten.self_test.second_path import logical
        >>> q, k, v = logical(torch.arange(12.0).view(6, 2), schatten.Layout(split=3))
        >>> k.tolist()
        [[4.0, 5.0], [6.0, 7.0]]
    """
    layout = layout if isinstance(layout, Layout) else Layout(layout)
    match layout.kind:
        case "flat":
            return [t.reshape(1, -1)]
        case "experts":
            banks = list(t.reshape(-1, *t.shape[-2:]))
        case "positions":
            banks = list(t.reshape(*t.shape[:2], -1).unbind(-1))
        case _:
            banks = [t.flatten(2) if t.ndim > 2 else t]
    axis = 0 if layout.axis == "fan_out" else 1
    return [block for bank in banks for block in _cut(bank.transpose(0, 1) if layout.transpose else bank, layout, axis)]


def _cut(t: Tensor, layout: Layout, axis: int) -> list[Tensor]:
    """The blocks of (fan_out, fan_in) or (fan_out, channels, kernel)."""
    repeated = t.shape[axis] // layout.groups
    sizes = layout.split if isinstance(layout.split, tuple) else (repeated // layout.split,) * layout.split
    heads = layout.heads if isinstance(layout.heads, tuple) else (layout.heads,) * len(sizes)
    found = []
    for start, size, count in zip(accumulate(sizes, initial=0), sizes, heads, strict=False):
        part = torch.cat([t.narrow(axis, start + g * repeated, size) for g in range(layout.groups)], axis)
        found += [block.flatten(1) for block in part.chunk(count, axis)]
    return found


def assembled(blocks: Sequence[Tensor], shape: Sequence[int], layout: str | Layout) -> Tensor:
    """The tensor whose logical matrices are `blocks`.

    Example:
        >>> import torch
        >>> from schatten.self_test.second_path import assembled, logical
        >>> t = torch.randn(2, 3, 4)
        >>> torch.equal(assembled(logical(t, "positions"), t.shape, "positions"), t)
        True
    """
    # Cutting is a permutation of entries, so its adjoint, which autograd knows, is its inverse.
    with torch.enable_grad():
        t = torch.zeros(tuple(shape), dtype=blocks[0].dtype, device=blocks[0].device, requires_grad=True)
        return torch.autograd.grad(logical(t, layout), t, list(blocks))[0]


def direction(
    rule: Rule, G: Tensor, state: Mapping[str, Tensor] | None, group: Mapping[str, Any]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(S, D, new state) of one gradient matrix (m, n) at step number group["step"]; `state` is None at the first."""
    if state is None:
        state = {key: value.unsqueeze(0) for key, value in rule.init(G.unsqueeze(0)).items()}
    steps = torch.full((1, 1, 1, 1), float(group["step"]), dtype=G.dtype, device=G.device)
    new = {**state, "step": steps}
    S, own = rule.signal((-G if group["maximize"] else G)[None, None], new, group)
    new |= own
    D, own = rule.direction(S, new, group)
    return S[0, 0], D[0, 0], {**new, **own}


def weight(
    rule: Rule, W: Tensor, D: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """(W after the step, new state) of one matrix (m, n) and its direction."""
    D = D[None, None]
    W, own = rule.retraction(W[None, None].clone(), D, lr_of(group) * rule.scale(D), state, group)
    return W[0, 0], {**state, **own}


def adamw(W: Tensor, gradients: Sequence[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
    """The weights after each step of torch.optim.AdamW with the group's numbers."""
    p = torch.nn.Parameter(W.clone())
    # Schedulers that cycle `momentum` mean beta1 by it.
    betas = (group.get("momentum", group["betas"][0]), group["betas"][1])
    options = {"betas": betas, "eps": group["eps"], "weight_decay": group["weight_decay"], "maximize": group["maximize"]}
    reference = torch.optim.AdamW([p], lr=float(group["lr"]), foreach=False, **options)
    found = []
    for G in gradients:
        p.grad = G
        reference.step()
        found.append(p.detach().clone())
    return found
