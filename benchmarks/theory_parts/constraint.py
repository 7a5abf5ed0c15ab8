"""The page's parts on the constraint (arXiv 2506.15054): rates, the Lyapunov inequality, a toy problem, histograms."""

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from theory_parts.words import Found, save
from torch import Tensor, nn

import schatten
from schatten import maps
from schatten.diagnostics.constraint import ball_violation
from schatten.diagnostics.lyapunov import first_growth, lyapunov
from schatten.lab.instrument_plots import Trajectory, ball_trajectories, lyapunov_curves, spectrum_history
from tests.facts import lyapunov_problems, theory_mlp, theory_toy
from tests.facts.theory_mlp import FITTED, PREPROCESSING, Problem

SVD = schatten.solvers.svd()


CONTRACTION = """\
## The excess over the ball shrinks by the rate of the decay

V_B = max(||W||_op - 1/lambda, 0) (2506.15054, equation 7). One step of exact Muon from outside the ball, {count} matrices of
1 x 1 to 12 x 12 with lr lambda from 0.001 to 0.9 and gradients of every size, rank and direction. "Rate" is what V_B is
multiplied with at most; the paper states the first rate, for implicit decay, which has the second.

| decay | rate | largest V_B(W+) - rate V_B(W) | gradient -W: largest difference from rate V_B(W) |
|---|---|---|---|"""


def contraction() -> Found:
    count, worst = 1000, {}
    for decay in ("explicit", "implicit"):
        generator = torch.Generator().manual_seed(0)
        beyond, sharp = [], []
        for i in range(count):
            m, n, rank = (int(torch.randint(1, 13, (), generator=generator)) for _ in range(3))
            eta_lambda = 10 ** (-3 + 2.95 * float(torch.rand((), generator=generator)))
            weight_decay = 10 ** (-1 + 2 * float(torch.rand((), generator=generator)))
            W = torch.randn(m, n, generator=generator, dtype=torch.float64)
            W *= (
                (1 + 10 ** (-3 + 4 * float(torch.rand((), generator=generator))))
                / weight_decay
                / torch.linalg.matrix_norm(W, ord=2)
            )
            G = torch.randn(m, rank, generator=generator, dtype=torch.float64) @ torch.randn(
                rank, n, generator=generator, dtype=torch.float64
            )
            rate = 1 - eta_lambda if decay == "explicit" else 1 / (1 + eta_lambda)
            before = float(ball_violation(W, weight_decay))
            for gradient, kept in ((10.0 ** (i % 13 - 6) * G, beyond), (-W, sharp)):
                p = nn.Parameter(W.clone())
                p.grad = gradient
                lr = eta_lambda / weight_decay
                schatten.Muon([p], lr=lr, weight_decay=weight_decay, momentum=0.0, scale="none", decay=decay, solver=SVD).step()
                kept.append(float(ball_violation(p.detach(), weight_decay)) - rate * before)
        worst[decay] = {"beyond": max(beyond), "sharp": max(map(abs, sharp))}
    rows = [
        f"| {decay} | {rate} | {worst[decay]['beyond']:.0e} | {worst[decay]['sharp']:.0e} |"
        for decay, rate in (("explicit", "1 - lr lambda"), ("implicit", "1 / (1 + lr lambda)"))
    ]
    closing = ["", "Expected: at most 0, for any gradient. The gradient -W is the worst: it attains the rate."]
    return [CONTRACTION.format(count=count), *rows, *closing], worst


DESCENT = """\
## V_K falls where the loss need not

The inequality for V_K(W+, M+) - V_K(W, M) (`schatten.diagnostics.lyapunov_change_bound`) on {problems} random problems x
{steps} steps of `schatten.LionK`: {maps} maps in turn; quadratic, logistic and non-convex losses with known smoothness; random
betas, lr, lambda, shape factors and starts inside. "Slack" is what the bound leaves of a step, relative to the size of V_K.

| decay | problems | steps | violations beyond rounding ({rounding:g}) | smallest slack | steps in which V_K rose |
|---|---|---|---|---|---|"""

DESCENT_READING = """\
Expected: no violation. (The paper's constant is not known to us; this one, and the inequality, are derived.) V_K may rise by
the curvature of a step, of order lr^2, as it does around a minimum; these problems have lr up to 0.5 to make the bound work."""


def descent() -> Found:
    fours = list(lyapunov_problems.problems(100))
    rows, result = [], {}
    for decay in ("implicit", "explicit"):
        own = [four for four in fours if four.decay == decay]
        slacks, values = [], []
        for four in own:

            def kept(*args: Any, steps: list[Tensor], **options: Any) -> Tensor:
                steps.append(lyapunov(*args, **options))
                return steps[-1]

            values.append([])
            slacks += lyapunov_problems.slacks(four, value=partial(kept, steps=values[-1]))
        V = torch.stack([torch.stack(steps, -1) for steps in values])
        rises = int((V.diff() > lyapunov_problems.ROUNDING * (1 + V[..., :-1].abs())).sum())
        violations = sum(slack < -lyapunov_problems.ROUNDING for slack in slacks)
        count, least = V[..., 0].numel(), min(slacks)
        result[decay] = {"steps": len(slacks), "violations": violations, "smallest": least, "rises": rises}
        rows.append(f"| {decay} | {count} | {len(slacks)} | {violations} | {least:.0e} | {rises} |")
    head = DESCENT.format(
        problems=sum(four.start.shape[0] for four in fours),
        steps=lyapunov_problems.STEPS,
        maps=len(lyapunov_problems.MAPS),
        rounding=lyapunov_problems.ROUNDING,
    )
    return [head, *rows, "", DESCENT_READING], result


BALL = """\
## Two singular values and the ball

After figures 1 to 3 of 2506.15054, whose toy problem is not published. Ours: the diagonal d of a 2 x 2 matrix,
F = (d - d*)^T A (d - d*) / 2 with A = [[1, 0.6], [0.6, 1]]; Muon as Lion-K with betas {betas}, lr {lr} and implicit decay.

![Trajectories of two singular values against the ball](images/theory-ball.png)

![The loss, V_B and V_K of one run](images/theory-lyapunov.png)

| run | published | found |
|---|---|---|"""

LAMBDA_INSIDE, LAMBDA_OUTSIDE = 1.25, 4.0
INSIDE, OUTSIDE = (0.6, 0.3), (0.6, 0.5)
NEAR = (0.3, 0.6)
LONG, SHOWN = 1500, 900


def ball() -> Found:
    inside = {f"from {start}": theory_toy.muon(start, INSIDE, LAMBDA_INSIDE, LONG) for start in ((0.1, 0.7), (0.75, 0.7))}
    outside = {f"from {start}": theory_toy.muon(start, OUTSIDE, LAMBDA_OUTSIDE, LONG) for start in ((0.9, 0.4), (0.3, 1.0))}
    entering = theory_toy.muon((1.6, 1.4), NEAR, LAMBDA_INSIDE, SHOWN)
    values = lyapunov(
        maps.Nuclear(SVD), entering.weights, entering.momenta, entering.losses, theory_toy.LR, LAMBDA_INSIDE, theory_toy.BETAS
    )
    figure = ball_trajectories(
        {
            "λ = 1.25, minimum inside": {
                name: Trajectory(path.sigma, 1 / LAMBDA_INSIDE, INSIDE) for name, path in inside.items()
            },
            "λ = 4, minimum outside": {
                name: Trajectory(path.sigma, 1 / LAMBDA_OUTSIDE, OUTSIDE) for name, path in outside.items()
            },
        }
    )
    save(figure, "ball")
    figure = lyapunov_curves(
        range(SHOWN + 1),
        entering.losses.tolist(),
        entering.excess.tolist(),
        values.tolist(),
        "Muon, λ = 1.25, from (1.6, 1.4) to a minimum inside",
    )
    save(figure, "lyapunov")

    off = max(max(abs(s - o) for s, o in zip(path.sigma[-1], INSIDE, strict=True)) for path in inside.values())
    at = max(max(abs(s - 1 / LAMBDA_OUTSIDE) for s in path.sigma[-1]) for path in outside.values())
    growing = sum(int((path.excess.diff() > 0).sum()) for path in outside.values())
    losses, excess, V_K = entering.losses.tolist(), entering.excess.tolist(), values.tolist()
    growth = first_growth(excess, V_K)
    assert growth is not None and growth.name == "V_K"
    rises = [after - before for before, after in pairwise(losses[: growth.step]) if after > before]
    # ||grad K + lambda X||_F^2 is at most 2^2 in each of two singular values.
    allowed = theory_toy.SMOOTHNESS * theory_toy.LR**2 / 2 * 8
    beyond = first_growth(excess, V_K, allowed=allowed)
    result = {
        "off_minimum": off,
        "off_boundary": at,
        "V_B_growing": growing,
        "loss_rises": len(rises),
        "V_K_first_rise": growth._asdict(),
        "V_K_beyond_allowed": beyond,
    }
    left = V_K[growth.step] / V_K[excess.index(0.0)]
    rows = [
        f"| λ = 1.25, start and minimum inside | both reach the minimum | both end within {off:.1g} of it; "
        f"lr is {theory_toy.LR:g} |",
        f"| λ = 4, start and minimum outside | converges to the boundary, V_B monotone | both singular values end within "
        f"{at:.0e} of 1/λ; V_B grew in {growing} of {len(outside) * LONG} steps |",
        f"| λ = 1.25, from outside to a minimum inside | loss not monotone; V_B, then V_K monotone | the loss rises in "
        f"{len(rises)} of the first {growth.step - 1} steps, by up to {max(rises):.1g} at a time; V_B, then V_K in none |",
        f"| the same, around the minimum | | V_K first rises at step {growth.step}, by {growth.amount:.0e}, where it is "
        f"{left:.0e} of what it was on entry; {'no' if beyond is None else 'a'} rise is larger than the {allowed:.0e} "
        f"that a step's curvature allows |",
    ]
    return [BALL.format(betas=theory_toy.BETAS, lr=theory_toy.LR), *rows], result


SPECTRA = """\
## All singular values enter the ball

Figure 4 of 2506.15054 has a ResNet-18 on CIFAR-10 with lambda = 2: many singular values are above 1/2 at the start, nearly all
below by about step 400. When that is depends on lambda times the sum of lr, here {product:g} in {steps} steps: the first
matrix ({shape}) of the MLP below on batches of {batch} of {data}, exact Muon with momentum 0.95, lr {lr:g} and lambda = 2.

![Singular values of a matrix over steps as a heat map, with the bound](images/theory-spectra.png)

| step | share above 1/2 | largest | largest that the rate allows |
|---|---|---|---|"""


def spectra() -> Found:
    data, problem = theory_mlp.images(), Problem(theory_mlp.images(), seed=0)
    lr, weight_decay, steps, every, batch = 0.01, 2.0, 400, 10, 250
    opt = schatten.Muon(list(problem.net.parameters()), lr=lr, weight_decay=weight_decay, scale="none", solver=SVD)
    first = next(problem.net.parameters())
    generator = torch.Generator().manual_seed(0)
    shown, history = [], []
    for t in range(steps + 1):
        if t % every == 0:
            shown.append(t)
            history.append(torch.linalg.svdvals(first.detach()))
        chosen = torch.randint(len(data.labels), (batch,), generator=generator)
        problem.x, problem.y = PREPROCESSING[FITTED](data.pixels[chosen]), data.labels[chosen]
        opt.zero_grad()
        problem.loss().backward()
        opt.step()
    title = f"First matrix of an MLP, Muon, λ = {weight_decay:g}, lr {lr:g}"
    save(spectrum_history(shown, [s.tolist() for s in history], 1 / weight_decay, title), "spectra")
    rows, result = [], {}
    initial = float(history[0].max()) - 0.5
    for t in (0, 10, 20, 50, 100, 200, 400):
        s = history[t // every]
        # What lies on the sphere itself is above it by rounding or not.
        above, allowed = float((s > 0.5 + 1e-9).double().mean()), 0.5 + initial * (1 - lr * weight_decay) ** t
        result[t] = {"above": above, "largest": float(s.max()), "allowed": allowed}
        rows.append(f"| {t} | {above:.0%} | {float(s.max()):.4f} | {allowed:.4f} |")
    head = SPECTRA.format(
        product=lr * weight_decay * steps,
        steps=steps,
        shape=" x ".join(map(str, first.shape)),
        batch=batch,
        data=data.name,
        lr=lr,
    )
    return [head, *rows], result
