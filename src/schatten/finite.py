"""Finite: which gradients a step may take, and the counters of the steps taken and skipped."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from schatten.state import wide

# One launch for many tensors.
FOREACH_NORM = torch.ops.aten._foreach_norm.Scalar
FOREACH_ADD = torch.ops.aten._foreach_add_.List
FOREACH_COUNT = torch.ops.aten._foreach_add_.Scalar


def looking_is_free(p: Tensor) -> bool:
    """Whether the host may look at a value without waiting for a device; where not, results are masked instead."""
    return p.device.type == "cpu"


def finite_gradient(p: Tensor, squared: bool = False) -> Tensor:
    """Whether the gradient is finite, on its device, with room for sums of a thousand such; or for their squares."""
    assert p.grad is not None
    if not p.grad.numel():
        return torch.ones((), dtype=torch.bool, device=p.device)
    # Widened: compared with a half-precision inf the limit would be one itself.
    low, high = (t.to(wide(p.dtype)) for t in torch.aminmax(p.grad.detach()))
    limit = _limit(p.dtype, squared)
    # False for nan, which aminmax passes on.
    return (low >= -limit) & (high <= limit)


def _limit(dtype: torch.dtype, squared: bool) -> float:
    return (torch.finfo(wide(dtype)).max / 1024) ** (0.5 if squared else 1.0)


def usable(p: Tensor, found_inf: Tensor | None, squared: bool) -> bool:
    """Whether the step may take the gradient, where looking is free."""
    assert p.grad is not None
    # On numbers of the host, as five operations on tiny tensors take longer.
    low, high = (float(t) for t in torch.aminmax(p.grad.detach()))
    limit = _limit(p.dtype, squared)
    return -limit <= low and high <= limit and (found_inf is None or not bool(found_inf))


def counted(
    params: Sequence[Tensor], states: Sequence[Mapping[str, Tensor]], found_inf: Tensor | None, squared: bool
) -> list[tuple[bool, Tensor | None]]:
    """Count this step of parameters, or its skipping: for each whether it may move, and a flag on the device that decides.

    A step moves nothing where the gradient is not finite or a GradScaler has found one that is not (`found_inf`). On a
    device all parameters are looked at in a few launches.
    """
    found: list[tuple[bool, Tensor | None]] = [(False, None)] * len(params)
    counters: list[Tensor] = []
    alike: dict[tuple[torch.device, torch.dtype, torch.dtype], list[int]] = defaultdict(list)
    for i, (p, state) in enumerate(zip(params, states, strict=True)):
        if looking_is_free(p):
            moved = usable(p, found_inf, squared)
            counters.append(state["step" if moved else "skipped"])
            found[i] = moved, None
        else:
            assert p.grad is not None
            alike[p.device, p.grad.dtype, p.dtype].append(i)
    if counters:
        FOREACH_COUNT(counters, 1)
    for (device, _, dtype), own in alike.items():
        # Largest magnitudes, which pass nan on; widened as above.
        grads = [params[i].grad for i in own]
        sizes = torch.stack(FOREACH_NORM(grads, float("inf"))).to(wide(dtype))
        flags = sizes <= _limit(dtype, squared)
        if found_inf is not None:
            flags = flags & (found_inf.to(device) == 0)
        FOREACH_ADD([states[i]["step"] for i in own], list(flags.float()))
        FOREACH_ADD([states[i]["skipped"] for i in own], list((~flags).float()))
        for i, flag in zip(own, flags, strict=True):
            found[i] = True, flag
    return found


def refuse_unusable(p: Tensor, name: Callable[[], str]) -> None:
    """Raise RuntimeError for a gradient that no rule can take; `name` makes the parameter's, for the message."""
    if p.grad is None:
        return
    if p.grad.layout != torch.strided:
        raise RuntimeError(
            f"Gradients must be dense, but that of {name()}, shape {tuple(p.shape)}, is {p.grad.layout}: build the layer with "
            f"sparse=False. No weight was changed."
        )
    if p.grad.shape != p.shape or not p.grad.is_floating_point():
        raise RuntimeError(
            f"A gradient must have its parameter's shape and be real, but that of {name()}, shape {tuple(p.shape)}, has shape "
            f"{tuple(p.grad.shape)} and is {p.grad.dtype}. No weight was changed."
        )
