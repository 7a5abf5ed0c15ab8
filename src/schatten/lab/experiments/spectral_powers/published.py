"""Best validation losses of GPT-2 124M by matrix learning rate: the figure data of the released code, one seed."""

import math

MSGD, ADAM = "mSGD", "Adam"
POWERS = (0.0, 0.25, 0.5, 1.0)

# (family, p) -> lr -> loss
LOSSES: dict[tuple[str, float], dict[float, float]] = {
    (ADAM, 0.0): {1e-3: 2.921, 3e-3: 2.887, 6e-3: 2.880, 7e-3: 2.879, 8e-3: 2.880, 1e-2: 2.880},
    (ADAM, 0.25): {6e-4: 2.976, 6e-3: 2.882, 1e-2: 2.877, 2e-2: 2.872, 3e-2: 2.873, 4e-2: 2.876},
    (ADAM, 0.5): {6e-4: 2.918, 6e-3: 2.873, 8e-3: 2.872, 9e-3: 2.871, 1e-2: 2.870, 2e-2: 2.871},
    (ADAM, 1.0): {6e-4: 2.884, 3e-3: 2.889, 4e-3: 2.871, 6e-3: 2.882, 8e-3: 2.891, 1e-2: 2.945},
    (MSGD, 0.0): {3e-3: 2.891, 6e-3: 2.888, 7e-3: 2.887, 8e-3: 2.889, 9e-3: 2.891, 1e-2: 2.891},
    (MSGD, 0.25): {3e-3: 3.030, 6e-3: 2.969, 1e-2: 2.938, 3e-2: 2.904, 4e-2: 2.876, 5e-2: 2.879},
    (MSGD, 0.5): {1e-2: 3.054, 3e-2: 2.955, 1e-1: 2.908, 1.25e-1: 2.904, 2e-1: 2.895, 3e-1: math.inf},
    (MSGD, 1.0): {1e-1: 3.649, 5e-1: 3.226, 1.0: 3.147, 2.0: 3.092, 5.0: 3.092, 10.0: 3.164},
}

# Neighbouring lr's differ by as much without a trend.
NOISE = 0.01

# mSGD's best is printed for 2 and 5 alike; the authors name 5.
BEST_LR = {key: min(found, key=lambda lr, found=found: (found[lr], -lr)) for key, found in LOSSES.items()}
BEST = {key: min(found.values()) for key, found in LOSSES.items()}

# An independent run of 0.8M parameters: TinyStories characters, 200 steps; its lr's are not known.
SMALL = {
    (ADAM, 1.0): 2.324,
    (ADAM, 0.5): 2.272,
    (ADAM, 0.25): 2.219,
    (ADAM, 0.0): 2.297,
    (MSGD, 1.0): 3.097,
    (MSGD, 0.5): 2.333,
    (MSGD, 0.25): 2.298,
    (MSGD, 0.0): 2.164,
}

# Seconds of a step of the 124M model on one CPU thread there.
STEP_SECONDS = {"Adam": 12.0, "Muon": 157.6}

SUFFIX = {1.0: "", 0.5: "S", 0.25: "Q", 0.0: "Z"}


def name(family: str, p: float) -> str:
    """mSGD, mSGDS, ... of the paper, or family and p in between."""
    return f"{family}{SUFFIX[p]}" if p in SUFFIX else f"{family}({p:g})"


def ranked(losses: dict[tuple[str, float], float]) -> list[tuple[str, float]]:
    """The variants, best first."""
    return sorted(losses, key=lambda key: losses[key])
