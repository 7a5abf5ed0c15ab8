"""The best odd quintic for an interval, and the best composition of several: Polar Express (Amsel et al., 2505.16932).

On [l, u] the quintic q(x) = a x + b x^3 + c x^5 closest to 1 touches 1 -+ E alternately at four points l < x1 < x2 < u
(Chebyshev). Applying it maps [l, u] into [1 - E, 1 + E], the interval of the next step, and this greedy choice is the
best composition of its length. Two safeguards cost little accuracy:

- `cushion`: on a wide interval the optimum sends interior points as low as q(l), which loses their digits in half
  precision. The quintic is fitted on [max(l, cushion u), u] instead and rescaled so that the images of l and u lie
  symmetrically about 1.
- `margin`: rounding lifts singular values above u, where a steep quintic explodes; each fit reaches beyond u by the
  share margin - 1, less as l nears 1, where the quintic is flat and room would cost accuracy.
"""

import math

from schatten.solvers.remembered import remembered

Quintic = tuple[float, float, float]

# The published Polar Express table for l = 1e-3 uses this value; `tests/facts` regenerates that table from it. With 0
# the same fit is the CANS table (2506.10935). At five steps the cushion costs 0.010 of the band, 0.124 against 0.113.
CUSHION = 0.02407327424182761

# q(x) = (15 x - 10 x^3 + 3 x^5) / 8, the Taylor limit of the optimum as l -> u: its first two derivatives vanish at 1.
TAYLOR: Quintic = (1.875, -1.25, 0.375)


def evaluate(q: Quintic, x: float) -> float:
    """q(x) = a x + b x^3 + c x^5."""
    a, b, c = q
    return x * (a + x * x * (b + x * x * c))


def best_quintic(low: float, high: float) -> Quintic:
    """The odd quintic closest to 1 in the maximum norm on [low, high], 0 < low < high, by Remez exchange."""
    if low / high > 1 - 1e-5:  # the four equations are no longer independent in fp64; the Taylor error is below 1e-15
        a, b, c = TAYLOR
        return a / high, b / high**3, c / high**5
    first, second = low + (high - low) / 4, low + 3 * (high - low) / 4
    a = b = c = 0.0
    previous = math.inf
    for _ in range(100):
        a, b, c, error = _equioscillating(low, first, second, high)
        if abs(previous - error) <= 1e-15:
            break
        previous = error
        root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        first, second = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
    return a, b, c


def _equioscillating(*points: float) -> tuple[float, ...]:
    """(a, b, c, E) with q(x_i) + (-1)^i E = 1 at four points, by elimination with pivoting."""
    rows = [[x, x**3, x**5, (-1.0) ** i, 1.0] for i, x in enumerate(points)]
    for k in range(4):
        rows[k:] = sorted(rows[k:], key=lambda row: -abs(row[k]))
        for i in range(k + 1, 4):
            factor = rows[i][k] / rows[k][k]
            rows[i] = [v - factor * w for v, w in zip(rows[i], rows[k], strict=True)]
    solution = [0.0] * 4
    for k in reversed(range(4)):
        solution[k] = (rows[k][4] - sum(rows[k][j] * solution[j] for j in range(k + 1, 4))) / rows[k][k]
    return tuple(solution)


@remembered
def composition(low: float, steps: int, *, cushion: float = CUSHION, margin: float = 1.0) -> tuple[tuple[Quintic, ...], float]:
    """`steps` quintics for inputs in [low, 1], and the error they leave: outputs lie in [1 - error, 1 + error]."""
    quintics: list[Quintic] = []
    high = 1.0
    for _ in range(steps):
        fit_low, fit_high = max(low, cushion * high), high * (1 + (margin - 1) * max(0.0, 1 - low))
        q = best_quintic(fit_low, fit_high)
        if fit_low > low:
            rescale = 2 / (evaluate(q, low) + evaluate(q, fit_high))
            q = (q[0] * rescale, q[1] * rescale, q[2] * rescale)
        quintics.append(q)
        low = evaluate(q, low)
        high = 2 - low
    return tuple(quintics), abs(1 - low)


@remembered
def steps_for(tol: float, low: float, **safeguards: float) -> int:
    """The shortest composition whose error on [low, 1] is at most `tol`."""
    for steps in range(1, 33) if tol > 1e-15 else ():
        if composition(low, steps, **safeguards)[1] <= tol:
            return steps
    raise ValueError(f"tol must be reachable in double precision, got tol={tol} on [{low}, 1].")
