"""Units: which module reads a parameter, so that what is written before that module's forward has been written in time.

| model | a parameter's unit |
|---|---|
| FSDP2 | the module that gathers it, with those it was sharded together with |
| other | the innermost element of a `ModuleList`, `ModuleDict` or `Sequential` that has it, or the model |

Not the module that owns it, as some read the weights of their children: `nn.MultiheadAttention` its projection's.
"""

from collections import defaultdict
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class Unit(NamedTuple):
    """Modules before whose forward, whichever is the first, these parameters must have been written."""

    modules: list[nn.Module]
    parameters: set[Tensor]


def units(model: nn.Module) -> list[Unit]:
    """The units of a model, whose FSDP2 modules are sharded again where they are not."""
    found: dict[int, Unit] = {}
    _walk(model, model, found, defaultdict(set))
    return list(found.values())


def _walk(module: nn.Module, unit: nn.Module, found: dict[int, Unit], seen: dict[int, set[int]]) -> None:
    if isinstance(module, FSDPModule):
        # Gathered, it has other parameters than the optimizer.
        module.reshard()
        unit = module
    if id(unit) in seen[id(module)]:
        return
    seen[id(module)].add(id(unit))
    sharded = isinstance(unit, FSDPModule)
    own = found.setdefault(id(unit._get_fsdp_state() if isinstance(unit, FSDPModule) else unit), Unit([], set()))
    if unit not in own.modules:
        own.modules.append(unit)
    own.parameters.update(p for p in module._parameters.values() if p is not None)
    for child in module.children():
        # What has no forward of its own is read by who has it.
        calls = isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) and type(child) not in LISTS
        _walk(child, child if calls and not sharded else unit, found, seen)


def gathers_others(module: nn.Module) -> bool:
    """Whether this FSDP2 module gathers the weights of others in its own forward."""
    return isinstance(module, FSDPModule) and bool(module._get_fsdp_state()._states_to_forward_prefetch)


def gathered(module: nn.Module) -> bool:
    """Whether this FSDP2 module has gathered its weights already, or has begun to."""
    if not isinstance(module, FSDPModule):
        return False
    state: Any = module._get_fsdp_state()
    # One group of parameters before torch 2.12, several since.
    groups = getattr(state, "_fsdp_param_groups", None) or [g for g in [state._fsdp_param_group] if g is not None]
    return any(group._all_gather_result is not None or group.is_unsharded for group in groups)
