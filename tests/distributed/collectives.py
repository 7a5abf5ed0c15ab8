"""What a block of code sends through torch.distributed: every collective's name and bytes, and a rank's death at one."""

import os
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The two ways in which torch calls a backend, and what of the second is no collective.
SPACES = ("c10d", "_c10d_functional")
BOOKKEEPING = ("wait_tensor", "_wrap_tensor_autograd")


class Collectives(TorchDispatchMode):
    """A context that lists (name, bytes of its tensors) of what this rank takes part in.

    With `fatal=k` this process ends when it comes to the k-th, counted from 0, as a machine that fails.
    """

    def __init__(self, fatal: int | None = None) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []
        self.fatal = fatal

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            # Taken apart by itself, and what it calls comes here again.
            return NotImplemented
        name = func._schema.name.split("::")[-1]
        if func.namespace in SPACES and name not in BOOKKEEPING:
            if self.fatal == len(self.seen):
                os._exit(1)
            self.seen.append((name, sum(t.nbytes for t in tree_leaves(args) if isinstance(t, Tensor))))
        return func(*args, **(kwargs or {}))
