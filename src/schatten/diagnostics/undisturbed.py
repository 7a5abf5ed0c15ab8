"""Undisturbed: evaluate a model again without training noticing."""

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def undisturbed(model: nn.Module | None, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Inside, a model may be evaluated and differentiated twice; afterwards all is as before.

    Restored are the generators of torch on the CPU and on `devices`, of Python and of NumPy where it is loaded, and the
    buffers of `model` (batch norm's averages). A DistributedDataParallel module reduces no gradients inside and keeps its
    turn of broadcasting buffers. Attention takes its mathematical form inside, since the fused ones have no second
    derivative. Gradients are the caller's: `torch.autograd.grad` leaves `.grad` alone, `backward` does not.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.undisturbed import undisturbed
        >>> norm = torch.nn.BatchNorm1d(2)
        >>> with undisturbed(norm):
        ...     _ = norm(torch.randn(8, 2))
        >>> norm.running_mean
        tensor([0., 0.])
    """
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    wrappers = [m for m in model.modules() if isinstance(m, DistributedDataParallel)] if model is not None else []
    syncs = [wrapper.require_forward_param_sync for wrapper in wrappers]
    # Copies take their place: restored in place, a buffer would look changed to a graph that has saved it.
    kept = [(m, key, b) for m in model.modules() for key, b in m._buffers.items() if b is not None] if model is not None else []
    copies = {b: b.detach().clone() for _, _, b in kept}
    with ExitStack() as stack:
        for kind in {device.type for device in devices} - {"cpu"}:
            numbers = sorted({d.index or 0 for d in devices if d.type == kind})
            stack.enter_context(torch.random.fork_rng(numbers, device_type=kind))
        stack.enter_context(torch.random.fork_rng([]))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for wrapper in wrappers:
            stack.enter_context(wrapper.no_sync())
            wrapper.require_forward_param_sync = False
        for module, key, buffer in kept:
            module._buffers[key] = copies[buffer]
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)
            for wrapper, sync in zip(wrappers, syncs, strict=True):
                wrapper.require_forward_param_sync = sync
            for module, key, buffer in kept:
                module._buffers[key] = buffer


def devices_of(tensors: Iterable[Tensor]) -> list[torch.device]:
    """The devices that tensors lie on."""
    return sorted({t.device for t in tensors}, key=str)
