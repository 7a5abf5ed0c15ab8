"""Parameters that hold a flat piece of a matrix: recognised and refused, because no rule can see the matrix any more.

FSDP1 stores all weights of a unit as one vector and DeepSpeed's ZeRO-3 leaves an empty tensor behind; routing by the
number of dimensions then sends every matrix to AdamW, without a word. FSDP2 shards each parameter by itself, as a DTensor.
"""

from torch import Tensor, nn

WAYS_OUT = (
    "Use torch.distributed.fsdp.fully_shard (FSDP2), which keeps every parameter's shape, or build the optimizer for an "
    "unsharded model, as under DistributedDataParallel."
)

# The modules whose weight has two dimensions or more, and one only where it has been flattened.
_MATRICES = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)


def flat_piece(p: Tensor, module: nn.Module | None = None, attribute: str = "weight") -> str | None:
    """What flattened a parameter, or None for one that has its own shape. `module` is its owner where there is one."""
    if getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False):
        return "is a flat parameter of FSDP1 (FullyShardedDataParallel) or a view of one"
    if hasattr(p, "ds_id") or hasattr(p, "ds_tensor"):
        return "is partitioned by DeepSpeed's ZeRO-3"
    if attribute == "weight" and isinstance(module, _MATRICES) and p.ndim == 1:
        return f"is the flattened weight of a {type(module).__name__}"
    return None


def refuse_flat(name: str, p: Tensor, module: nn.Module | None = None, attribute: str = "weight") -> None:
    """Raise ValueError, naming the parameter and what works instead, if it is a flat shard.

    Example:
        >>> import torch
        >>> from schatten.routing.sharding import refuse_flat
        >>> p = torch.nn.Parameter(torch.zeros(0))
        >>> p.ds_id = 0
        >>> try: refuse_flat("'body.weight'", p)
        ... except ValueError as error: print(str(error).split(". ")[0])
        A spectral rule needs whole matrices, but 'body.weight' of shape (0,) is partitioned by DeepSpeed's ZeRO-3
    """
    if (what := flat_piece(p, module, attribute)) is not None:
        raise ValueError(f"A spectral rule needs whole matrices, but {name} of shape {tuple(p.shape)} {what}. {WAYS_OUT}")
