"""Steps until a problem is solved, by an optimizer whose lr is constant or decays geometrically."""

import itertools
import math
from collections.abc import Callable

import torch
from torch import nn

import schatten
from schatten.lab.experiments.preconditioning.problems import Problem
from schatten.lab.ledger import Row

TARGET = 1e-6
METHODS = ("Muon", "GD", "Adam")

# lr (in the problem's unit) and decay q: ten of each.
GRIDS = {
    "Muon": tuple(itertools.product((0.03, 0.1, 0.3, 1.0, 3.0), (0.9, 0.98))),
    "GD": tuple((lr, 1.0) for lr in (0.05, 0.1, 0.25, 0.35, 0.5, 0.7, 0.85, 1.0, 1.4, 1.9)),
    "Adam": tuple(itertools.product((0.003, 0.01, 0.03, 0.1, 0.3), (0.98, 1.0))),
}

# A path this short against the first step moves no error across the target.
SPENT = 1e-10

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], float], torch.optim.Optimizer]] = {
    "Muon": lambda params, lr: schatten.SimplifiedMuon(params, lr=lr, adaptive=False),
    "GD": lambda params, lr: torch.optim.SGD(params, lr=lr),
    "Adam": lambda params, lr: torch.optim.Adam(params, lr=lr),
}


def descend(problem: Problem, method: str, lr: float, q: float, cap: int, target: float = TARGET) -> Row:
    """`steps` of each start until its error is at most `target`, inf beyond `cap`, with step t of length lr q^t units.

    `lowest` is the least error of the last hundred steps, `curve` has up to a hundred (step, error) of the first start.
    """
    weights = [nn.Parameter(W.clone()) for W in problem.start]
    lr = lr * problem.unit(method)
    optimizer = OPTIMIZERS[method](weights, lr)
    steps, errors = [math.inf] * len(weights), []
    for t in range(cap + 1):
        gradients, error = problem.evaluate(torch.stack([W.detach() for W in weights]))
        errors.append(error.tolist())
        steps = [min(s, t) if e <= target else s for s, e in zip(steps, errors[-1], strict=True)]
        # What is left of a decaying lr's path is the sum of its steps.
        spent = q < 1 and q**t / (1 - q) < SPENT
        if max(steps) < math.inf or spent or not all(math.isfinite(e) for e in errors[-1]):
            break
        for W, G in zip(weights, gradients, strict=True):
            W.grad = G
        for group in optimizer.param_groups:
            group["lr"] = lr * q**t
        optimizer.step()
    lowest = [min(column) for column in zip(*errors[-100:], strict=True)]
    # Even steps: an error that jumps to and fro is shown from one side.
    shown = [*range(0, len(errors) - 1, 2 * math.ceil(len(errors) / 200)), len(errors) - 1]
    return {"steps": steps, "lowest": lowest, "curve": [[i, errors[i][0]] for i in shown]}
