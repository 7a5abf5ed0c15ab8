"""What takes a rank long to import and to derive, done once in the process that ranks are forked from.

Without threads: a fork would copy locks that they hold.
"""

import torch
import torch._dynamo  # the first operation on a DTensor asks for it
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor.parallel
import torch.nn.parallel

import schatten

torch.set_num_threads(1)
for dtype in ("float32", "bfloat16"):
    schatten.solvers.polynomial(dtype=dtype)(torch.eye(4))
