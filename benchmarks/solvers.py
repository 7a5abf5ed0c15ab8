"""Time and error of every solver on the hidden matrices of GPT-2 small layers, against Muon's own direction.

    python benchmarks/solvers.py [--layers 1] [--rounds 7] [--out FILE.json]

One process, all solvers alternating on the same fp32 matrices (batches of equal shape); medians, and ratios of medians to
the direction of `schatten.solvers.polynomial()` with the same kind of products. The error is the worst relative one of
h(sigma) over singular values in [1e-3, 1] of the largest, log-uniform, in a 768x768 and a 768x3072 matrix; for the polar
factor that is the distance of the band from 1.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import common
import torch
from torch import Tensor

from schatten import maps, solvers
from schatten.solvers.power_function import PowerFunction

Direction = Callable[[Tensor], Tensor]
Target = Callable[[Tensor], Tensor]

# Against whose time a solver of that kind of products is compared.
FAST, PRECISE = "polynomial(), auto", "polynomial(), float32"


def directions() -> dict[str, tuple[Direction, Target, str]]:
    """name: (direction, exact function of sigma, the baseline it is compared with)."""

    def one(s: Tensor) -> Tensor:
        return torch.ones_like(s)

    found: dict[str, tuple[Direction, Target, str]] = {
        FAST: (solvers.polynomial(), one, FAST),
        "gram(), auto": (solvers.gram(), one, FAST),
        "newton_schulz(), auto": (solvers.newton_schulz(), one, FAST),
        PRECISE: (solvers.polynomial(dtype="float32"), one, PRECISE),
    }
    for dtype, baseline in (("auto", FAST), ("float32", PRECISE)):
        tower = solvers.tower(dtype=dtype)
        smooth = {
            "Power(0.5)": maps.Power(0.5, solver=tower),
            "Power(0.25)": maps.Power(0.25, solver=tower),
            "LogCosh(0.1)": maps.LogCosh(0.1, solver=tower),
            "PseudoHuber(0.1)": maps.PseudoHuber(0.1, solver=tower),
            "LogSmoothed(0.1)": maps.LogSmoothed(0.1, solver=tower),
        }
        for name, K in smooth.items():
            found[f"tower {name}, {dtype}"] = (K.grad, lambda s, K=K: K.h(s, K.a), baseline)
    for p in (0.5, 0.25):
        f = PowerFunction(p)
        for solver in (solvers.coupled_newton(), solvers.coupled_minimax()):
            name = repr(solver).split("(")[0]
            found[f"{name} p = {p}, float32"] = (partial(solver.apply, f=f), lambda s, p=p: s**p, PRECISE)
    return found


def with_spectrum(m: int, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A matrix with singular values from 1 down to 1e-3, and its factors, in fp64."""
    U, V = (torch.linalg.qr(torch.randn(k, m, dtype=torch.float64)).Q for k in (m, n))
    s = torch.logspace(0, -3, m, dtype=torch.float64)
    return (U * s) @ V.mT, U, s, V


def errors(direction: Direction, h: Target) -> tuple[float, float]:
    """The worst relative error, and the relative Frobenius error on Gaussian matrices."""
    worst = frobenius = 0.0
    for m, n in ((768, 768), (768, 3072)):
        G, U, s, V = with_spectrum(m, n)
        gain = (U.mT @ direction(G.float()).double() @ V).diagonal() / h(s)
        worst = max(worst, float((gain - 1).abs().max()))
        X = torch.randn(m, n)
        U, s, Vh = torch.linalg.svd(X.double(), full_matrices=False)
        exact = (U * h(s)) @ Vh
        difference = torch.linalg.matrix_norm(direction(X).double() - exact) / torch.linalg.matrix_norm(exact)
        frobenius = max(frobenius, float(difference))
    return worst, frobenius


def batches(layers: int) -> list[Tensor]:
    """The matrices of equal shape as one batch each."""
    alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for G in common.matrices(layers):
        alike[G.shape].append(G)
    return [torch.stack(same) for same in alike.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/solvers.json"))
    args = parser.parse_args()
    torch.manual_seed(0)
    inputs = batches(args.layers)
    found = directions()
    times = common.alternating({name: lambda f=f: [f(X) for X in inputs] for name, (f, _, _) in found.items()}, args.rounds)
    rows = {}
    print(f"{6 * args.layers} matrices of {args.layers} GPT-2-small layers, {args.rounds} alternating rounds")
    print(f"{'direction':34}{'median ms':>10}{'quartiles':>18}{'over Muon':>10}{'worst error':>13}{'on Gaussian':>13}")
    for name, (f, h, baseline) in found.items():
        worst, frobenius = errors(f, h)
        ratio = common.median(times[name]) / common.median(times[baseline])
        rows[name] = {"milliseconds": times[name], "over": baseline, "ratio": ratio, "worst": worst, "gaussian": frobenius}
        print(
            f"{name:34}{common.median(times[name]):10.1f}{common.spread(times[name]):>18}{ratio:10.2f}{worst:13.1e}{frobenius:13.1e}"
        )
    for p in (0.5, 0.25):
        published = common.median(times[f"coupled_newton p = {p}, float32"])
        for dtype in ("auto", "float32"):
            ratio = published / common.median(times[f"tower Power({p}), {dtype}"])
            rows[f"coupled_newton over tower, p = {p}, {dtype}"] = {"ratio": ratio}
            print(f"coupled_newton p = {p} takes {ratio:.1f} times as long as the tower in {dtype}")
    common.save(args.out, "solvers", {"layers": args.layers, "solvers": rows})


if __name__ == "__main__":
    main()
