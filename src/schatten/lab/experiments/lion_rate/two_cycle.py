"""Lion's exact two-cycle on theta^2 / 2."""

from collections.abc import Sequence

import torch
from torch import nn

import schatten
from schatten.lab.experiment import Verdict, verdict
from schatten.lab.ledger import Row

# Lion's published betas, those of the contrast.
BETAS = (0.9, 0.99)

# Two-cycles: half of these pairs satisfy the condition of existence.
PAIRS = ((0.9, 0.99), (0.95, 0.98), (0.5, 0.9), (0.0, 0.5), (0.99, 0.9), (0.9, 0.5), (0.98, 0.95), (0.8, 0.6))
CYCLE_LRS = (0.1, 0.01)


def cycle_momentum(lr: float, beta2: float) -> float:
    """|M| of the two-cycle."""
    return lr * (1 - beta2) / (2 * (1 + beta2))


def cycle_exists(beta1: float, beta2: float) -> bool:
    """Whether the sign of beta1 M + (1 - beta1) theta is that of theta there."""
    return (1 - beta1) * (1 + beta2) > beta1 * (1 - beta2)


def cycle(betas: tuple[float, float], lr: float, steps: int) -> Row:
    """Lion on theta^2 / 2 from the point of the two-cycle: the largest distance of theta and of M from the cycle, over lr."""
    theta = nn.Parameter(torch.full((1,), lr / 2, dtype=torch.float64))
    optimizer = schatten.Lion([theta], lr=0.0, betas=betas)
    # A step of length 0 that leaves the cycle's momentum behind.
    theta.grad = torch.full_like(theta, -cycle_momentum(lr, betas[1]) / (1 - betas[1]))
    optimizer.step()
    optimizer.param_groups[0]["lr"] = lr
    off = momentum_off = 0.0
    for t in range(steps):
        sign = -1 if t % 2 else 1
        M = float(optimizer.state[theta]["momentum_buffer"])
        off = max(off, abs(float(theta.detach()) - sign * lr / 2) / lr)
        momentum_off = max(momentum_off, abs(M + sign * cycle_momentum(lr, betas[1])) / lr)
        theta.grad = theta.detach().clone()
        optimizer.step()
    return {"off": off, "momentum_off": momentum_off}


def stall(betas: tuple[float, float], lr: float, steps: int) -> Row:
    """Mean |f'| over lr of the last `steps`, from theta = 1, M = 0; before them the run has twice the way, and as many."""
    theta = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = schatten.Lion([theta], lr=lr, betas=betas)
    before, total = round(2 / lr) + steps, 0.0
    for t in range(before + steps):
        theta.grad = theta.detach().clone()
        total += abs(float(theta.detach())) * (t >= before)
        optimizer.step()
    return {"stall": total / steps / lr}


def check_cycles(rows: Sequence[Row]) -> list[Verdict]:
    cycles = [row for row in rows if row["phase"] == "cycle"]
    found = []
    if published := [row for row in cycles if tuple(row["betas"]) == BETAS]:
        off, momentum_off = (max(row[name] for row in published) for name in ("off", "momentum_off"))
        text = f"theta off by {off:.1g} lr, M by {momentum_off:.1g} lr"
        lrs = ", ".join(f"{row['lr']:g}" for row in published)
        why = f"{published[0]['steps']} steps at lr {lrs}; 1e-12 lr of fp64 rounding is allowed"
        quantity = "two-cycle of Lion, betas (0.9, 0.99): theta = +-lr/2, M = -+lr/398"
        found.append(verdict(quantity, "repeats exactly (derived)", text, max(off, momentum_off) < 1e-12, why))
    if cycles:
        agree = [(row["off"] < 1e-9) == cycle_exists(*row["betas"]) for row in cycles]
        there = sum(cycle_exists(*row["betas"]) for row in cycles)
        text = f"{sum(agree)} of {len(agree)} as predicted"
        why = (
            f"{len(cycles)} pairs of betas and lr, of which the condition allows {there}; off by more than 1e-9 lr is no cycle"
        )
        quantity = "the two-cycle exists iff (1 - beta1)(1 + beta2) > beta1 (1 - beta2)"
        found.append(verdict(quantity, "iff (derived)", text, all(agree), why))
    for row in rows:
        if row["phase"] == "stall":
            why = "from theta = 1, M = 0; the mean |theta| of any two-cycle through 0 is lr/2; 1 % is allowed"
            quantity = f"constant lr {row['lr']:g}: mean |f'| in the end, over lr"
            found.append(
                verdict(quantity, "1/2 for ever (derived)", f"{row['stall']:.4f}", abs(row["stall"] - 0.5) < 0.005, why)
            )
    return found
