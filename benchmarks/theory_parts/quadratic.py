"""The page's part on the 15 x 20 quadratic (arXiv 2505.23737, figure 3)."""

import statistics
from itertools import pairwise

import numpy as np
import torch
from matplotlib.figure import Figure
from theory_parts.words import SEEDS, Found, save, spread
from torch import Tensor

from schatten.lab.plots import COLOURS
from tests.facts import theory_quadratic

QUADRATIC = """\
## The 15 x 20 quadratic

Figure 3 of 2505.23737: f(W) = tr((W - W*)^T Q (W - W*)) / 2 with W 15 x 20, Q 15 x 15 (the form whose dimensions fit), so that
L = ||Q||_op and L_* = ||Q||_nuc.

Panel (c), the histogram of D_F^2 L / (D_op^2 L_*) for W_0 = 0 and W* with entries from U(-50, 50); {samples} samples. The
ratio ||Q||_nuc / ||Q||_op is not published: {ratio} was inferred from this panel, and of Q nothing else enters.

| bin | {bins} |
|---{rule}
| published counts, share of their sum | {published} |
| inferred before from spectra of W* | {inferred} |
| found | {found} |

Mean {mean:.2f}; published: most samples exceed 2, found: {above:.2%}. Of ratios from 1.20 to 1.42 in steps of 0.01 those that
keep every bin within 1 % of the published share are {fits}.

Panels (a) and (b), 4000 steps from W = 0: gradient descent with step 1/L, Muon with the constant step {step}. Neither Q's
eigenvalues nor W* are published, and W* from U(-50, 50) in all directions with ||Q||_nuc = {ratio} ||Q||_op cannot have been
run with step 1 / ||Q||_op: a direction of eigenvalue x L keeps x (1 - x)^8000 of L in f, so that all together keep at most
{most:.2f} of f(0) = 370 on average, whatever the eigenvalues are; published is 21. (With a geometric spectrum f falls from
370 to {after_one:.0f} in the first step and ends at {even_end:.2f}, and the norm ends at {even_norm:.0f}.) The norm would also
start at {even_start}; published is 180.

So W* must lie almost wholly where Q is small. Our Q does that: W* lies in k directions, scaled to norm 180, in which Q's
eigenvalues are geometric; elsewhere it is a thousandth of that. One eigenvalue is L, the others share what is left of
{ratio} L (with k = 14 nothing is). Two numbers, the lowest eigenvalue and the spread, make gradient descent end at f = 21 and
norm 53; Q's size makes f(0) = 370. Those four numbers are fitted. Mean +- standard deviation over {seeds} draws of W*:

| | published | {heads} |
|---|---|{dashes}
{rows}

![The quadratic: f, distance in spectral norm, and the histogram](images/theory-quadratic.png)

The picture is k = 4, seed {shown}, the nearest. With k = 4 both crossings come out as published, though nothing was fitted to
them; with W* in all small directions (k = 14) Muon's f is the lower one almost from the start. Muon's distance is a straight
line: it is within {line:.1g} of 180 - {step} t until it arrives. What does not come out is the floor of Muon's f, a tenth of
the published one or less: it grows with L, which is not known. So this Q is one that fits, not the one that was used.
"""

SLOW = (3, 4, 14)


def quadratic() -> Found:
    samples = 100_000
    values = theory_quadratic.ratios(samples)
    found = theory_quadratic.shares(values)
    total = sum(theory_quadratic.COUNTS)
    published = [count / total for count in theory_quadratic.COUNTS]
    fits = [
        ratio / 100
        for ratio in range(120, 143)
        if all(
            abs(a - b) <= 0.01
            for a, b in zip(
                theory_quadratic.shares(values * theory_quadratic.NUCLEAR_RATIO * 100 / ratio), published, strict=True
            )
        )
    ]

    problems = {k: [theory_quadratic.fitted(seed, k) for seed in range(SEEDS)] for k in SLOW}
    paths = theory_quadratic.muon([p for k in SLOW for p in problems[k]])
    table: dict[int, list[dict[str, float]]] = {}
    curves = {}
    for i, k in enumerate(SLOW):
        table[k] = []
        for seed, problem in enumerate(problems[k]):
            f, distance = paths[i * SEEDS + seed]
            g, far = theory_quadratic.descent(problem)
            curves[k, seed] = (f, distance, g, far)
            table[k].append(outcome(problem, f, distance, g, far))
    drawn = " | ".join(spread(norms(k), 0) for k in SLOW)
    rows = [
        f"| norm of k x 20 from U(-50, 50), not scaled | 180 | {drawn} |",
        *(
            f"| {label} | {text} | {' | '.join(spread([row[key] for row in table[k]], digits) for k in SLOW)} |"
            for label, text, key, digits in ROWS
        ),
    ]

    shown = min(range(SEEDS), key=lambda s: abs(table[4][s]["f crossing"] - 1000) + abs(table[4][s]["norm crossing"] - 1400))
    save(quadratic_figure(curves[4, shown], values), "quadratic")
    _, distance, _, _ = curves[4, shown]
    until = theory_quadratic.arrival(distance)
    straight = 180 - theory_quadratic.MUON_STEP * torch.arange(until)
    even = [theory_quadratic.even(seed) for seed in range(SEEDS)]
    ends = [theory_quadratic.descent(problem) for problem in even]
    text = QUADRATIC.format(
        samples=f"{samples:,}",
        ratio=theory_quadratic.NUCLEAR_RATIO,
        bins=" | ".join(f"{a:g}-{b:g}" for a, b in pairwise(theory_quadratic.EDGES)),
        rule="|---" * len(found) + "|",
        published=" | ".join(f"{x:.1%}" for x in published),
        inferred=" | ".join(f"{x:.1%}" for x in theory_quadratic.SHARES),
        found=" | ".join(f"{x:.1%}" for x in found),
        mean=float(values.mean()),
        above=float((values > 2).double().mean()),
        fits=", ".join(f"{ratio:.2f}" for ratio in fits),
        step=theory_quadratic.MUON_STEP,
        most=370 * theory_quadratic.most_left(),
        after_one=statistics.mean(float(f[1]) for f, _ in ends),
        even_end=statistics.mean(float(f[-1]) for f, _ in ends),
        even_start=spread(norms(theory_quadratic.ROWS), 0),
        even_norm=statistics.mean(float(d[-1]) for _, d in ends),
        seeds=SEEDS,
        heads=" | ".join(f"k = {k}" for k in SLOW),
        dashes="---|" * len(SLOW),
        rows="\n".join(rows),
        shown=shown,
        line=float((distance[:until] - straight).abs().max()),
    )
    return [text.rstrip()], {"shares": found, "ratios that fit": fits, "runs": {str(k): table[k] for k in SLOW}}


def norms(rows: int) -> list[float]:
    """||W*||_op of 2000 draws with so many rows."""
    W = theory_quadratic.uniform(torch.Generator().manual_seed(0), 2000, rows, theory_quadratic.COLUMNS)
    return torch.linalg.matrix_norm(W, ord=2).tolist()


def outcome(problem: theory_quadratic.Quadratic, f: Tensor, distance: Tensor, g: Tensor, far: Tensor) -> dict[str, float]:
    arrival = theory_quadratic.arrival(distance)
    return {
        "f start": float(g[0]),
        "f end": float(g[-1]),
        "norm start": float(far[0]),
        "norm end": float(far[-1]),
        "f crossing": theory_quadratic.crossing(f[:arrival], g[:arrival]),
        "norm crossing": theory_quadratic.crossing(distance[:arrival], far[:arrival]),
        "arrival": arrival,
        "floor": float(f[3800:].mean()),
        "L": problem.L,
        "nuc/op": problem.nuclear / problem.L,
    }


ROWS = (
    ("f of both at the start (fitted)", "370", "f start", 0),
    ("f of gradient descent at the end (fitted)", "21", "f end", 1),
    ("norm at the start (fitted)", "180", "norm start", 0),
    ("norm of gradient descent at the end (fitted)", "53", "norm end", 1),
    ("step where Muon's f crosses", "near 1000", "f crossing", 0),
    ("step where Muon's norm crosses", "near 1400", "norm crossing", 0),
    ("step where Muon's norm arrives at 0", "near 3720", "arrival", 0),
    ("Muon's f from step 3800 on", "about 0.15", "floor", 3),
    ("L", "not published", "L", 1),
    ("nuc(Q)/op(Q)", "about 1.31", "nuc/op", 3),
)


def quadratic_figure(curves: tuple[Tensor, Tensor, Tensor, Tensor], values: Tensor) -> Figure:
    f, distance, g, far = (c.numpy() for c in curves)
    figure = Figure(figsize=(12.6, 4.0), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axes, muon, descent, label, crossing in ((left, f, g, "f", 1000), (middle, distance, far, r"$\|W - W^*\|_{op}$", 1400)):
        axes.plot(descent, color=COLOURS[1], label="gradient descent, step 1/L")
        axes.plot(muon, color=COLOURS[0], label=f"Muon, step {theory_quadratic.MUON_STEP}")
        axes.axvline(crossing, color="#555555", linestyle="--", linewidth=1, label=f"published crossing, {crossing}")
        axes.set_xlabel("steps")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    left.plot([0, 4000], [370, 21], "o", color="black", markerfacecolor="none", label="published start and end", clip_on=False)
    middle.plot(
        [0, 4000], [180, 53], "o", color="black", markerfacecolor="none", label="published start and end", clip_on=False
    )
    edges = np.array(theory_quadratic.EDGES)
    right.hist(values.numpy(), edges, weights=np.full(len(values), 1e5 / len(values)), color="#56B4E9", label="found")
    counts = 1e4 * np.array(theory_quadratic.COUNTS)
    right.plot((edges[1:] + edges[:-1]) / 2, counts, "o", color="black", markerfacecolor="none", label="published")
    right.set_xlabel(r"$D_F^2\; L\; /\; (D_{op}^2\; L_*)$")
    right.set_ylabel("samples of 100,000")
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    return figure
