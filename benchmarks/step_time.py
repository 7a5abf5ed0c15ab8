"""Time of one optimizer step, torch.optim.Muon against schatten.Muon, on the hidden matrices of GPT-2 small layers.

    python benchmarks/step_time.py [--layers 4] [--rounds 15] [--out FILE.json]

One process, the two optimizers alternating, each on its own copy of the same fp32 weights and gradients; medians and
quartiles, and the ratio of medians. Both run five Newton-Schulz steps in the precision they choose by themselves.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch

import schatten


def matrices(layers: int) -> list[torch.Tensor]:
    """Four 768x768 (Q, K, V, O), one 3072x768 and one 768x3072 for each layer."""
    shapes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    return [torch.randn(shape) * 0.02 for _ in range(layers) for shape in shapes]


def parameters(weights: list[torch.Tensor], gradients: list[torch.Tensor]) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()
    return params


def measure(layers: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each step by optimizer, after one step of warm-up."""
    torch.manual_seed(0)
    weights, gradients = matrices(layers), matrices(layers)
    optimizers = {
        "torch.optim.Muon": torch.optim.Muon(parameters(weights, gradients), lr=1e-3),
        "schatten.Muon": schatten.Muon(parameters(weights, gradients), lr=1e-3, scale="keller"),
    }
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for repeat in range(rounds + 1):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            if repeat > 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step_time.json"))
    args = parser.parse_args()
    times = measure(args.layers, args.rounds)
    rows = {name: statistics.quantiles(t, n=4) for name, t in times.items()}
    ratio = rows["torch.optim.Muon"][1] / rows["schatten.Muon"][1]
    print(f"{6 * args.layers} matrices of {args.layers} GPT-2-small layers, fp32, {args.rounds} alternating steps")
    print(f"{'optimizer':18}{'median ms':>12}{'quartiles ms':>20}")
    for name, (low, median, high) in rows.items():
        print(f"{name:18}{median:12.1f}{f'{low:.1f} - {high:.1f}':>20}")
    print(f"torch.optim.Muon / schatten.Muon = {ratio:.2f}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "benchmark": "step_time",
        "layers": args.layers,
        "ratio_of_medians": ratio,
        "milliseconds": times,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "working_dtype": str(schatten.solvers.core.working_dtype(torch.zeros(1), "auto")),
        "commit": commit,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
