"""Time, accuracy and memory of one optimizer step on the hidden matrices of GPT-2 small layers, side by side.

    python benchmarks/step_time.py [--layers 4] [--rounds 15] [--peers] [--out FILE.json]

One process, the optimizers alternating, each on its own copy of the same fp32 weights and gradients; medians, quartiles
and the ratio of medians to schatten.Muon. Each runs its default number of Newton-Schulz steps in the precision it
chooses by itself. The band is that of the singular values of one update, divided by lr, where the gradient's are at least
1e-2 of its Frobenius norm (a 768x768 matrix with a log-uniform spectrum); the orthogonality error is
||D D^T - I||_F / sqrt(768) of a Gaussian gradient. `--peers` adds pytorch_optimizer and heavyball (`pip install
'.[peers]'`). Memory is what the step of the twelve layers of GPT-2 small allocates at its peak beside state and gradients.
"""

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn

import schatten

LR = 1e-3

Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def builds(peers: bool) -> dict[str, Build]:
    """Each optimizer with the shape factor that is 1 for a square matrix, and without decay."""
    found: dict[str, Build] = {
        "torch.optim.Muon": lambda p: torch.optim.Muon(p, lr=LR, weight_decay=0.0),
        "schatten.Muon": lambda p: schatten.Muon(p, lr=LR, weight_decay=0.0, scale="keller"),
        "schatten.Muon, tol=0.03": lambda p: schatten.Muon(
            p, lr=LR, weight_decay=0.0, scale="keller", solver=schatten.solvers.polynomial(tol=0.03)
        ),
    }
    if peers:
        po: Any = importlib.import_module("pytorch_optimizer")
        heavyball: Any = importlib.import_module("heavyball")
        found["pytorch_optimizer.Muon"] = lambda p: po.Muon([{"params": p, "use_muon": True}], lr=LR)
        found["pytorch_optimizer.Muon, Gram"] = lambda p: po.Muon(
            [{"params": p, "use_muon": True}], lr=LR, ns_method="gram_newton_schulz"
        )
        found["heavyball.Muon"] = lambda p: heavyball.Muon(p, lr=LR)
    return found


def parameters(weights: list[Tensor], gradients: list[Tensor]) -> list[nn.Parameter]:
    params = [nn.Parameter(w.clone()) for w in weights]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()
    return params


def stepping(build: Build, weights: list[Tensor], gradients: list[Tensor]) -> Callable[[], None]:
    """One step on the same gradients; they are set anew, as heavyball drops them in its step."""
    params = parameters(weights, gradients)
    optimizer = build(params)

    def step() -> None:
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
        optimizer.step()

    return step


def direction(build: Build, G: Tensor) -> Tensor:
    """The first update of a zero weight with gradient G, divided by lr, in fp64."""
    (p,) = parameters([torch.zeros_like(G)], [G])
    build([p]).step()
    return -p.detach().double() / LR


def band(build: Build) -> tuple[float, float]:
    """Smallest and largest gain of a direction with sigma >= 1e-2 of the norm."""
    n = 768
    U, V = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for _ in range(2))
    sigma = torch.logspace(0, -3, n, dtype=torch.float64)
    kept = sigma >= 1e-2 * sigma.norm()
    D = direction(build, ((U * sigma) @ V.mT).float())
    gains = (U.mT @ D @ V).diagonal()[kept]
    return float(gains.min()), float(gains.max())


def orthogonality(build: Build) -> float:
    n = 768
    D = direction(build, torch.randn(n, n))
    return float(torch.linalg.matrix_norm(D @ D.mT - torch.eye(n, dtype=torch.float64)) / n**0.5)


def gpt2_memory() -> dict[str, int]:
    """Peak bytes of a schatten.Muon step on all hidden matrices of GPT-2 small, by `max_batch_bytes`."""
    shapes = [(768, 768)] * 48 + [(3072, 768)] * 12 + [(768, 3072)] * 12
    params = parameters([torch.zeros(s) for s in shapes], [torch.randn(s) for s in shapes])
    return {str(mib): common.peak_bytes(schatten.Muon(params, lr=LR, max_batch_bytes=mib << 20).step) for mib in (64, 160, 256)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step_time.json"))
    args = parser.parse_args()
    torch.manual_seed(0)
    weights, gradients = common.matrices(args.layers), common.matrices(args.layers)
    found = builds(args.peers)
    steps = {name: stepping(build, weights, gradients) for name, build in found.items()}
    times = common.alternating(steps, args.rounds)
    rows = {
        name: {
            "milliseconds": times[name],
            "over schatten.Muon": common.median(times[name]) / common.median(times["schatten.Muon"]),
            "band": band(build),
            "orthogonality error": orthogonality(build),
        }
        for name, build in found.items()
    }
    print(f"{6 * args.layers} matrices of {args.layers} GPT-2-small layers, fp32, {args.rounds} alternating steps")
    print(f"{'optimizer':30}{'median ms':>10}{'quartiles':>18}{'ratio':>7}{'band':>16}{'orthogonality':>15}")
    for name, row in rows.items():
        low, high = row["band"]
        print(
            f"{name:30}{common.median(row['milliseconds']):10.1f}{common.spread(row['milliseconds']):>18}"
            f"{row['over schatten.Muon']:7.2f}{f'{low:.3f} - {high:.3f}':>16}{row['orthogonality error']:15.3f}"
        )
    largest = 48 * 768 * 768 * 4
    memory = gpt2_memory()
    for mib, peak in memory.items():
        print(f"max_batch_bytes = {mib} MiB: peak {peak / 2**20:.0f} MiB, {peak / largest:.2f} of the largest same-shape batch")
    result = {"layers": args.layers, "optimizers": rows, "peak_bytes_by_max_batch_mib": memory, "largest_batch": largest}
    common.save(args.out, "step_time", result)


if __name__ == "__main__":
    main()
