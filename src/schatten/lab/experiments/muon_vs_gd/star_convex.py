"""Theorem 4.11 on a convex quadratic: f - f* of simplified Muon against its bounds, and the rates they decay with.

    adaptive step ||G||_nuc / L_sp:    f(W_t) - f* <= 2 L_sp Delta D^2 / (2 L_sp D^2 + t Delta)
    constant step eta:                 f(W_T) - f* <= (1 - eta/D)^T Delta + L_sp D eta / 2

with Delta = f(W_0) - f* and D the largest ||W_t - W*||_op. Ours: f = tr((W - W*)^T Q (W - W*)) / 2, W 15 x 20 from 0, Q's
eigenvalues geometric from 1 to 1e-3, W* from U(-1, 1); for T steps eta = (D/T) log(T Delta / (D^2 L_sp)), D = ||W*||_op, the
step that balances the two terms; it makes the bound decay as log T / T.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

import schatten
from schatten.lab.experiment import OUT_OF_REACH, Verdict, verdict
from schatten.lab.ledger import Ledger, Row
from schatten.lab.statistics import line, mean, spread

SHAPE = (15, 20)
CONDITION = 1e3
LENGTHS = (100, 200, 400, 800, 1600)

# The adaptive run's slope is fitted from here on.
TAIL = 0.1

Path = tuple[Tensor, Tensor]


def problem(seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Q's eigenvalues (15) and W* of every seed (seeds, 15, 20)."""
    q = CONDITION ** -torch.linspace(0, 1, SHAPE[0], dtype=torch.float64)
    draws = [torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return q, 2 * torch.stack(draws) - 1


def descend(q: Tensor, optimum: Tensor, lr: float, adaptive: bool, steps: int) -> Path:
    """f - f* (steps + 1, seeds), and the largest ||W_t - W*||_op of each seed."""
    weights = [nn.Parameter(torch.zeros(SHAPE, dtype=torch.float64)) for _ in optimum]
    opt = schatten.SimplifiedMuon(weights, lr=lr, adaptive=adaptive)
    errors, farthest = [], torch.zeros(len(optimum), dtype=torch.float64)
    for t in range(steps + 1):
        D = torch.stack([W.detach() for W in weights]) - optimum
        errors.append((q[:, None] * D.square()).sum((-2, -1)) / 2)
        farthest = torch.maximum(farthest, torch.linalg.matrix_norm(D, ord=2))
        if t < steps:
            for W, G in zip(weights, q[:, None] * D, strict=True):
                W.grad = G
            opt.step()
    return torch.stack(errors), farthest


def adaptive_bound(t: Tensor, delta: Tensor, D: Tensor, L: float) -> Tensor:
    return 2 * L * delta * D**2 / (2 * L * D**2 + t * delta)


def constant_bound(t: Tensor, delta: Tensor, D: Tensor, L: float, eta: float) -> Tensor:
    """For eta <= D."""
    return (1 - eta / D) ** t * delta + L * D * eta / 2


def against(errors: Tensor, D: Tensor, bound: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """The largest (f - f*) / bound over steps from the first on, for each seed."""
    t = torch.arange(1, len(errors), dtype=torch.float64)[:, None]
    return (errors[1:] / bound(t, errors[0], D)).amax(0)


def adaptive(seeds: Sequence[int], steps: int) -> Row:
    """The slope of log error against log t of each seed with its standard error, and the largest error over bound."""
    q, optimum = problem(seeds)
    L = float(q.sum())
    errors, D = descend(q, optimum, 1 / L, True, steps)
    t = sorted({round(x) for x in np.geomspace(max(1, TAIL * steps), steps, 40)})
    fits = [line([math.log(s) for s in t], column.log().tolist()) for column in errors[t].T]
    shown = sorted({round(x) for x in np.geomspace(1, steps, 60)})
    bound = adaptive_bound(torch.tensor(shown), errors[0, 0], D[0], L)
    curves = {"t": shown, "error": errors[shown, 0].tolist(), "bound": bound.tolist()}
    worst = against(errors, D, lambda t, delta, D: adaptive_bound(t, delta, D, L)).tolist()
    return {"slopes": [slope for slope, _ in fits], "slope errors": [error for _, error in fits], "worst": worst, **curves}


def constant(seeds: Sequence[int], steps: int) -> Row:
    """f - f* at the end of so many steps, and the largest error over bound."""
    q, optimum = problem(seeds)
    L, D = float(q.sum()), float(torch.linalg.matrix_norm(optimum, ord=2).max())
    delta = float(((q[:, None] * optimum.square()).sum((-2, -1)) / 2).max())
    eta = D / steps * math.log(max(math.e, steps * delta / (D**2 * L)))
    errors, farthest = descend(q, optimum, eta, False, steps)
    worst = against(errors, farthest, lambda t, delta, D: constant_bound(t, delta, D, L, eta)).tolist()
    return {"eta": eta, "errors": errors[-1].tolist(), "worst": worst}


def run(steps: int, seeds: Sequence[int], ledger: Ledger) -> None:
    of = list(seeds)
    ledger.measure({"part": "star-convex", "step": "adaptive", "steps": steps, "seeds": of}, lambda: adaptive(of, steps))
    for T in LENGTHS:
        if T <= steps:
            case = {"part": "star-convex", "step": "constant", "steps": T, "seeds": of}
            ledger.measure(case, lambda T=T: constant(of, T))


def check(rows: Sequence[Row]) -> list[Verdict]:
    found = []
    of = [row for row in rows if row["part"] == "star-convex"]
    for step in ("adaptive", "constant"):
        chosen = sorted((row for row in of if row["step"] == step), key=lambda row: row["steps"])
        if not chosen:
            continue
        worst = max(value for row in chosen for value in row["worst"])
        why = f"at every step of {len(chosen)} lengths x {len(chosen[0]['worst'])} seeds; 1 is the bound"
        quantity = f"Thm 4.11, {step} step: largest (f - f*) / bound"
        found.append(verdict(quantity, "<= 1 (paper)", f"{worst:.4g}", worst <= 1 + 1e-9, why))
        if step == "adaptive":
            slopes = chosen[-1]["slopes"]
            last = chosen[-1]["steps"]
            fit = f"from t = {TAIL * last:g} to {last}, standard error of a fit {mean(chosen[-1]['slope errors']):.2g}"
        elif len(chosen) < 3:
            continue
        else:
            x = [math.log(row["steps"]) for row in chosen]
            columns = zip(*(row["errors"] for row in chosen), strict=True)
            slopes = [line(x, [math.log(e) for e in column])[0] for column in columns]
            fit = f"T from {chosen[0]['steps']} to {chosen[-1]['steps']}, up to log T"
        error = spread(slopes) / math.sqrt(len(slopes))
        quantity = f"Thm 4.11, {step} step: exponent of t in f - f*"
        ours = f"{mean(slopes):.3f} +- {error:.3f} (standard error, n = {len(slopes)})"
        if math.isnan(error):
            found.append(
                Verdict(quantity, "-1 or less (paper)", ours, OUT_OF_REACH, "a standard error needs two seeds or more")
            )
            continue
        why = f"{fit}; the bound is from above, so faster is within it; holds if the exponent less two errors reaches -1"
        found.append(verdict(quantity, "-1 or less (paper)", ours, mean(slopes) - 2 * error <= -1, why))
    return found
