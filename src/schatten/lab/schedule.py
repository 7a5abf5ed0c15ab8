"""The learning rate of a step as a share of its peak."""

import math

SCHEDULES = ("cosine", "linear", "constant")

# The share of a linear schedule that is cool-down; before it the lr is constant.
COOLDOWN = 0.4


def lr_factor(schedule: str, step: int, steps: int, *, warmup: int = 0, final: float = 0.0) -> float:
    """Of step 0 .. steps-1: linear warm-up, then cosine decay, constant with a linear cool-down, or constant.

    `final` is the share that the last steps tend to.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":
        decay = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay = min(1.0, (1 - progress) / COOLDOWN)
    return final + (1 - final) * decay
