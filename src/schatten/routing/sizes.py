"""What modules say of themselves: their sizes, heads and experts, whatever their class calls them."""

from collections.abc import Mapping
from numbers import Integral
from typing import Any

from torch import nn

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_q_heads", "heads", "nhead")

KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_n_heads", "kv_heads")

WIDTHS = ("head_dim", "head_size", "attention_head_size", "dim_head")

EXPERTS = ("num_experts", "num_local_experts", "moe_num_experts", "n_routed_experts", "n_experts")


def number(module: nn.Module, *names: str) -> int | None:
    """The first positive integer of these names that the module, or else its `config`, has."""
    config = getattr(module, "config", None)
    for source in (module, config, _of(config, "attn_config")):
        for name in names if source is not None else ():
            value = _of(source, name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _of(source: Any, name: str) -> Any:
    try:
        return source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
    except RuntimeError:  # a config whose layers differ refuses to answer for all of them
        return None


def classes(module: nn.Module) -> list[str]:
    """The names of a module's class and its bases: fully_shard and parametrizations put a class of their own in front."""
    return [c.__name__ for c in type(module).__mro__]


def class_name(module: nn.Module) -> str:
    """A module's class as its author wrote it."""
    names = classes(module)
    return names[names.index("FSDPModule") + 1] if "FSDPModule" in names else names[0]


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is Hugging Face's Conv1D, a Linear stored as (fan_in, fan_out)."""
    return "Conv1D" in classes(module) and hasattr(module, "nf")


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(fan_out, fan_in) of a Linear, of Conv1D, and of what says these sizes of itself as a Linear does; None of the rest."""
    if is_conv1d(module):
        return module.nf, getattr(module, "nx", module.weight.shape[0])  # type: ignore[return-value]
    if isinstance(module, nn.modules.conv._ConvNd):
        pointwise = module.groups == 1 and set(module.kernel_size) == {1}
        return (module.out_channels, module.in_channels) if pointwise else None
    for out, into in (("out_features", "in_features"), ("output_size", "input_size")):
        rows, columns = getattr(module, out, None), getattr(module, into, None)
        if isinstance(rows, Integral) and isinstance(columns, Integral):  # some models have numpy's integers
            return int(rows), int(columns)
    return None


def reads(module: nn.Module) -> int | None:
    """How many features or channels a module takes, if it says."""
    if (sizes := linear_sizes(module)) is not None:
        return sizes[1]
    shape = getattr(module, "normalized_shape", None)
    if isinstance(shape, tuple) and shape:
        return shape[-1]
    found = getattr(module, "in_channels", getattr(module, "num_features", None))
    if not isinstance(found, int) and any("norm" in name.lower() for name in classes(module)):
        weight = getattr(module, "weight", None)
        found = weight.shape[0] if weight is not None and weight.ndim == 1 else None
    return found if isinstance(found, int) else None
