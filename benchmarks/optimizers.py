"""The step of every preset relative to Muon's, on the hidden matrices of a small transformer.

python benchmarks/optimizers.py [--rounds 11] [--out benchmarks/results/optimizers.json]

Twelve matrices in fp32, two layers of width 256 with MLPs of 1024 x 256 and 256 x 1024; every
preset with its defaults. Steps take turns, so the machine's noise falls on all; medians with quartiles, ratios in one run.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import alternating, median, save, spread
from schatten import presets

SHAPES = [(256, 256)] * 4 + [(1024, 256), (256, 1024)]


def stepper(name: str):
    """A step of a preset on its own matrices; the zero-order one evaluates a loss of one sum."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape) * 0.02) for shape in SHAPES * 2]
    opt = getattr(presets, name)(params)
    for p in params:
        p.grad = torch.randn_like(p)
    if opt.needs_closure:
        return lambda: opt.step(lambda: params[0].sum())
    return opt.step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "optimizers.json")
    options = parser.parse_args()
    times = alternating({name: stepper(name) for name in presets.__all__}, options.rounds)
    base = median(times["Muon"])
    rows = {
        name: {"ms": median(t), "quartiles": spread(t), "over_muon": median(t) / base}
        for name, t in sorted(times.items(), key=lambda item: median(item[1]))
    }
    for name, row in rows.items():
        print(f"{name:16} {row['ms']:9.1f} ms  {row['over_muon']:7.2f}  ({row['quartiles']})")
    save(options.out, "optimizers", {"shapes": SHAPES * 2, "rounds": options.rounds, "presets": rows})


if __name__ == "__main__":
    main()
