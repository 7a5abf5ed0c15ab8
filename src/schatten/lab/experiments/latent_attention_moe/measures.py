"""What a model and its optimizer cost: products of a step, bytes of memory, time of a next token."""

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from schatten.lab import optimizers
from schatten.lab.ledger import Row
from schatten.lab.models import GPT, LatentMoE

BETAS = (0.9, 0.95)

# Next tokens behind one timing, the fastest of which counts: others are slowed down by what else the machine does.
REPEATS = 20


def cost(model: GPT | LatentMoE, optimizer: str, batch: int, context: int) -> Row:
    """Parameters, those that a token meets, FLOPs of a step and of the optimizer in it, and bytes.

    FLOPs are those of matrix products, as torch's counter sees them on the CPU: of one window, times `batch`, and of the
    optimizer's step.
    """
    opt = optimizers.build(optimizer, model, lr=1e-3, weight_decay=0.1, betas=BETAS)
    ids = torch.randint(0, model.config.vocabulary, (1, context), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(ids, ids).backward()
        window = counter.get_total_flops()
        opt.step()
    own = counter.get_total_flops() - window
    caches = model.caches(1, context)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops": batch * window + own,
        "optimizer_flops": own,
        "weight_bytes": sum(p.nbytes for p in model.parameters()),
        "state_bytes": sum(t.nbytes for state in opt.state.values() for t in state.values() if isinstance(t, torch.Tensor)),
        "cache_bytes": sum(kept.nbytes for cache in caches for kept in cache) / context,
    }


def next_token(model: GPT | LatentMoE, batch: int, context: int) -> float:
    """Seconds of the next token of `batch` texts of `context` tokens, on the accelerator where there is one."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = model.to(device).eval()
    ids, caches = torch.zeros(batch, dtype=torch.long, device=device), model.caches(batch, context)
    taken = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        model.next(ids, caches, context - 1)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])
