"""Search for the quintics of the tower: iterates of which every smooth spectral function is a weighted sum.

    python scripts/fit_tower.py [--steps 7] [--family smooth] [--lower 9.7e-4] [--rounds 60]

Minimises over all quintics at once, and over one vector of weights per target, the worst relative error of the targets on
[lower, 1]. Sequential linear programming: the errors are linearised in quintics and weights, one linear programme
(SciPy's HiGHS) takes the best step within a trust region, and the weights are then refitted exactly. Needs SciPy.
"""

import argparse
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_matrix, vstack

Array = NDArray[np.float64]

# Where the search starts: the best known towers (reference: V. Srivastava, 2026, and our own earlier searches).
STARTS = {
    7: [
        (3.629, -6.081, 2.964),
        (3.782, -5.243, 2.144),
        (2.479, -2.258, 0.658),
        (2.670, -2.883, 0.999),
        (2.598, -2.961, 1.084),
        (2.170, -2.733, 1.104),
        (1.572, -2.689, 1.738),
    ],
    6: [
        (4.2898, -9.5754, 6.3536),
        (3.4695, -4.162, 1.5688),
        (3.8107, -4.1378, 1.2776),
        (3.4422, -2.9402, 0.6931),
        (3.1144, -2.9164, 0.8135),
        (1.9931, -2.4124, 0.7342),
    ],
    8: [
        (3.059785, -3.569183, 1.466139),
        (2.483037, -2.035164, 0.593904),
        (2.587005, -2.273627, 0.704639),
        (2.532325, -2.285401, 0.721930),
        (2.814393, -2.718119, 0.918760),
        (2.574423, -2.244986, 0.670563),
        (2.420254, -2.053210, 0.632956),
        (3.096905, -3.325603, 1.228698),
    ],
}


def power(p: float) -> Callable[[Array], Array]:
    return lambda s: s**p


# Thresholds stay below 0.025: larger ones are the same function of a smaller argument (`schatten.solvers.tower`).
SMOOTH: dict[str, Callable[[Array], Array]] = {
    **{f"p = {p}": power(p) for p in (0.0, 0.1, 0.25, 0.5, 0.75)},
    **{f"s/sqrt(s^2 + {a}^2)": (lambda s, a=a: s / np.sqrt(s * s + a * a)) for a in (0.025, 0.01, 0.002, 0.001)},
    **{
        f"tanh(s/{a})": (lambda s, a=a: np.tanh(s / a))
        for a in (
            0.025,
            0.021,
            0.018,
            0.013,
            0.01,
            0.0085,
            0.007,
            0.005,
            0.0035,
            0.003,
            0.0025,
            0.0018,
            0.0013,
            0.001,
            0.0007,
            0.0004,
        )
    },
    **{f"s/(s + {a})": (lambda s, a=a: s / (s + a)) for a in (0.025, 0.005)},
}
FAMILIES = {
    "smooth": SMOOTH,
    "inverse": {f"p = {p}": power(p) for p in (-0.9, -0.7, -0.5, -0.3, -0.1, 0.0)},
}

CAP = 1.35  # no iterate exceeds it on [0, 1]; half precision and normalisation errors need the room
BEYOND = 1.06  # up to here the iterates may reach BEYOND_CAP: how far sigma may be underestimated
BEYOND_CAP = 1.6


def iterates(quintics: Array, s: Array) -> tuple[Array, Array]:
    """X_k(s), shape (steps + 1, points), and its derivatives by the quintics, (steps + 1, points, 3 steps)."""
    steps = len(quintics)
    X, D = [s], [np.zeros((s.size, 3 * steps))]
    for k, (a, b, c) in enumerate(quintics):
        x, d = X[-1], D[-1]
        new = d * (a + 3 * b * x**2 + 5 * c * x**4)[:, None]
        new[:, 3 * k] += x
        new[:, 3 * k + 1] += x**3
        new[:, 3 * k + 2] += x**5
        X.append(x * (a + x * x * (b + x * x * c)))
        D.append(new)
    return np.array(X), np.array(D)


def weights(X: Array, h: Array) -> tuple[Array, float]:
    """The weights of least worst relative error |sum w_k X_k / h - 1|, and that error."""
    basis = (X / h).T
    n = basis.shape[1]
    ones = np.ones((basis.shape[0], 1))
    A = np.block([[basis, -ones], [-basis, -ones]])
    b = np.concatenate([np.ones(len(basis)), -np.ones(len(basis))])
    result = linprog(np.eye(n + 1)[n], A_ub=A, b_ub=b, bounds=[(None, None)] * n + [(0, None)], method="highs")
    return result.x[:n], result.x[n]


def search(quintics: Array, targets: list[Array], s: Array, rounds: int, report: Callable[[str], None]) -> Array:
    """Sequential linear programming from `quintics`; returns the best found."""

    steps = len(quintics)
    n, K = 3 * steps, steps + 1

    def fitted(q: Array) -> tuple[list[Array], list[float]]:
        X, _ = iterates(q, s)
        pairs = [weights(X, h) for h in targets]
        return [w for w, _ in pairs], [e for _, e in pairs]

    free = np.linspace(0, 1, 200)[1:]
    outside = np.linspace(1, BEYOND, 4)[1:]
    W, errors = fitted(quintics)
    trust = 0.02
    for round_ in range(rounds):
        X, D = iterates(quintics, s)
        columns = n + K * len(targets) + 1
        rows, rhs = [], []
        for j, (h, w) in enumerate(zip(targets, W, strict=True)):
            block = np.zeros((s.size, columns))
            block[:, :n] = np.tensordot(w, D, (0, 0)) / h[:, None]
            block[:, n + K * j : n + K * (j + 1)] = (X / h).T
            residual = w @ X / h - 1
            for sign in (1, -1):
                signed = sign * block
                signed[:, -1] = -1
                rows.append(csr_matrix(signed))
                rhs.append(-sign * residual)
        for grid, cap in ((free, CAP), (outside, BEYOND_CAP)):
            Xf, Df = iterates(quintics, grid)
            for k in range(1, steps + 1):
                for sign, bound in ((1, cap), (-1, 0.0)):
                    block = np.zeros((grid.size, columns))
                    block[:, :n] = sign * Df[k]
                    rows.append(csr_matrix(block))
                    rhs.append(np.maximum(bound - sign * Xf[k], 0))
        step = trust * np.abs(quintics).reshape(-1)
        bounds = [(-t, t) for t in step] + [(None, None)] * (K * len(targets)) + [(0, None)]
        cost = np.zeros(columns)
        cost[-1] = 1
        result = linprog(cost, A_ub=vstack(rows), b_ub=np.concatenate(rhs), bounds=bounds, method="highs")
        if result.x is None:
            trust /= 4
            continue
        candidate = quintics + result.x[:n].reshape(-1, 3)
        W_new, errors_new = fitted(candidate)
        better = max(errors_new) < max(errors)
        report(f"{round_:3} trust {trust:.1e} predicted {result.x[-1]:.5f} got {max(errors_new):.5f} {'*' if better else ''}")
        if better:
            gain = max(errors) - max(errors_new)
            quintics, W, errors = candidate, W_new, errors_new
            trust = min(1.5 * trust, 0.1)
            if gain < 1e-7:
                break
        else:
            trust /= 3
            if trust < 1e-7:
                break
    return quintics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="smooth")
    parser.add_argument("--lower", type=float, default=9.7e-4)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--points", type=int, default=250)
    args = parser.parse_args()
    s = np.logspace(np.log10(args.lower), 0, args.points)
    targets = FAMILIES[args.family]
    start = np.array(STARTS[args.steps])
    best = search(start, [h(s) for h in targets.values()], s, args.rounds, print)
    print("quintics")
    for row in best:
        print("    ({:.6f}, {:.6f}, {:.6f}),".format(*row))
    fine = np.logspace(np.log10(args.lower), 0, 2000)
    X, _ = iterates(best, fine)
    for name, h in targets.items():
        w, error = weights(X, h(fine))
        print(f"{name:24} error {error:.4%}  sum|w| {np.abs(w).sum():.2f}")


if __name__ == "__main__":
    main()
