"""Undisturbed: evaluate a model again without training noticing."""

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel


class Generators:
    """The states of the generators a model may draw from: torch's on the CPU and on `devices`, Python's, NumPy's if loaded.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.undisturbed import Generators
        >>> before, first = Generators([]), torch.rand(3)
        >>> before.restore()
        >>> torch.equal(torch.rand(3), first)
        True
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        numpy = sys.modules.get("numpy")
        self._python, self._numpy = random.getstate(), numpy.random.get_state() if numpy else None
        self._cpu = torch.get_rng_state()
        # MPS has one device, which its functions do not take.
        places = sorted(
            {(d.type, *([] if d.type == "mps" else [d.index or 0])) for d in devices if d.type not in ("cpu", "meta")}
        )
        self._others = [(kind, index, torch.get_device_module(kind).get_rng_state(*index)) for kind, *index in places]

    def restore(self) -> None:
        """Set all of them to the states they had when this was made."""
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        for kind, index, state in self._others:
            torch.get_device_module(kind).set_rng_state(state, *index)


@contextmanager
def undisturbed(
    model: nn.Module | None, devices: Iterable[torch.device] = (), generators: Generators | None = None
) -> Iterator[None]:
    """Inside, a model may be evaluated and differentiated twice; afterwards all is as before.

    Restored are the generators of torch on the CPU and on `devices`, of Python and of NumPy where it is loaded, and the
    buffers of `model` (batch norm's averages). Inside, the generators start from `generators` if given. A
    DistributedDataParallel module reduces no gradients inside and keeps its turn of broadcasting buffers. Attention takes its
    mathematical form, and compiled modules run as they are written, since fused attention and compiled graphs have no second
    derivative. Gradients are the caller's: `torch.autograd.grad` leaves `.grad` alone, `backward` does not. What hooks of the
    model keep elsewhere is not restored.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.undisturbed import undisturbed
        >>> norm = torch.nn.BatchNorm1d(2)
        >>> with undisturbed(norm):
        ...     _ = norm(torch.randn(8, 2))
        >>> norm.running_mean
        tensor([0., 0.])
    """
    before = Generators(devices)
    modules = list(model.modules()) if model is not None else []
    wrappers = [m for m in modules if isinstance(m, DistributedDataParallel)]
    syncs = [wrapper.require_forward_param_sync for wrapper in wrappers]
    kept = [(module, dict(module._buffers)) for module in modules]
    # Copies take their place: restored in place, a buffer would look changed to a graph that has saved it.
    copies = {b: b.detach().clone() for _, buffers in kept for b in buffers.values() if b is not None}
    with ExitStack() as stack:
        # Importing it takes seconds, and without it nothing is compiled.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for wrapper in wrappers:
            stack.enter_context(wrapper.no_sync())
            wrapper.require_forward_param_sync = False
        for module, buffers in kept:
            module._buffers.update({key: copies[b] for key, b in buffers.items() if b is not None})
        if generators is not None:
            generators.restore()
        try:
            yield
        finally:
            before.restore()
            for wrapper, sync in zip(wrappers, syncs, strict=True):
                wrapper.require_forward_param_sync = sync
            for module, buffers in kept:
                module._buffers.clear()
                module._buffers.update(buffers)


def devices_of(tensors: Iterable[Tensor]) -> list[torch.device]:
    """The devices that tensors lie on."""
    return sorted({t.device for t in tensors}, key=str)
