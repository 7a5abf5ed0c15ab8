"""Where a model registers its parameters: modules, names and memory, without the wrappers around them.

Routing asks for the module that owns a parameter and for the one above it, under the names of the plain model: torch.compile,
DDP and activation checkpointing put a module between that neither a reason nor a rule should see.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

# Children that stand for their parent: torch.compile, activation checkpointing, FSDP1.
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


@dataclass(frozen=True, eq=False)
class Place:
    """One registration of a parameter; a shared parameter has several.

    `path` names the modules from the model down to `module`, whose attribute the parameter is, and `above[i]` is the module
    whose child `path[i]` is. `wrapped` is the name with the wrappers' parts, as `named_parameters` of the wrapped model has it.
    """

    parameter: Tensor
    attribute: str
    module: nn.Module
    path: tuple[str, ...]
    above: tuple[nn.Module, ...]
    wrapped: str

    @property
    def name(self) -> str:
        return ".".join((*self.path, self.attribute))

    @property
    def names(self) -> tuple[str, ...]:
        """What a rule may call the parameter: its name in the plain model or in the wrapped one."""
        return (self.name,) if self.wrapped == self.name else (self.name, self.wrapped)

    @property
    def block(self) -> nn.Module | None:
        """The module that `module` is a part of, which knows the heads of a projection or the experts of a router."""
        return self.above[-1] if self.above else None

    @property
    def child(self) -> str:
        """What `block` calls `module`."""
        return self.path[-1] if self.path else ""

    def up(self, to: int) -> "Place":
        """The place the parameter would have if the module at `path[to - 1]` owned it, as that of an adapter's base layer."""
        module = self.above[to] if to < len(self.path) else self.module
        return Place(self.parameter, self.attribute, module, self.path[:to], self.above[:to], self.wrapped)


def places(model: nn.Module) -> list[Place]:
    """Every registration, in the order of `named_parameters(remove_duplicate=False)`."""
    return list(_walk(model, (), (), ()))


def _walk(module: nn.Module, path: tuple[str, ...], above: tuple[nn.Module, ...], wrapped: tuple[str, ...]) -> Iterator[Place]:
    for attribute, p in module.named_parameters(recurse=False, remove_duplicate=False):
        yield Place(p, attribute, module, path, above, ".".join((*wrapped, attribute)))
    for name, child in module._modules.items():
        if child is None:
            continue
        stands_for = name in WRAPPED or (name == "module" and isinstance(module, (DistributedDataParallel, DataParallel)))
        own = (path, above) if stands_for else ((*path, name), (*above, module))
        yield from _walk(child, *own, (*wrapped, name))


def by_parameter(found: Iterable[Place]) -> dict[int, list[Place]]:
    """id of a parameter -> its places."""
    owners: dict[int, list[Place]] = {}
    for place in found:
        owners.setdefault(id(place.parameter), []).append(place)
    return owners


def named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Name in the plain model -> parameter, each parameter once, as the entries of a plan are named.

    Example:
        >>> import torch, schatten
        >>> model = torch.compile(torch.nn.Linear(2, 2), backend="eager")
        >>> [name for name, _ in model.named_parameters()], list(schatten.routing.named_parameters(model))
        (['_orig_mod.weight', '_orig_mod.bias'], ['weight', 'bias'])
    """
    return {owners[0].name: owners[0].parameter for owners in by_parameter(places(model)).values()}


def span(p: Tensor) -> tuple[int, int, int]:
    """(storage, first byte, end) of a parameter's memory; storages are told apart on the meta device too."""
    if isinstance(p, UninitializedParameter):
        return id(p), 0, 0
    try:
        storage = p.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return id(p), 0, 0
    first = int(p.storage_offset()) * p.element_size()
    extent = 1 + sum((n - 1) * stride for n, stride in zip(p.shape, p.stride(), strict=True)) if p.numel() else 0
    return storage, first, first + int(extent) * p.element_size()


def overlaps(params: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Pairs of names of different parameters whose memory overlaps, each with the nearest before it in memory."""
    spans = sorted((*span(p), name) for name, p in params.items())
    found = []
    reach: tuple[int, int, str] | None = None  # the storage, the furthest end in it so far and whose it is
    for storage, first, end, name in spans:
        if reach is not None and reach[0] == storage and first < reach[1] and first < end:
            found.append((reach[2], name))
        if reach is None or reach[0] != storage or end > reach[1]:
            reach = (storage, end, name)
    return found
