"""What `Monitor` costs: training steps of the demo model with and without it, and one measurement of every quantity.

    python benchmarks/monitor.py [--rounds 15] [--every 100] [--runs 5] [--out FILE.json]

One process on one thread; the model, batch and optimizer of `schatten compare`'s defaults (a GPT of width 128 with 4 layers, 12
windows of 64 bytes, Muon). Measured and plain steps alternate, each on its own copy of the model, in milliseconds of processor
time, which other processes do not lengthen as they do the clock's. A measurement costs the difference of the medians; its
quartiles are those of the differences in each round. The share at `--every` is what that and the hooks of all steps add to
`--every` steps. Quantities of the Hessian are measured on one matrix, 128 x 128, alone. At the end whole runs of `--every`
steps alternate with runs without a monitor, from equal weights, and must end at equal ones.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import common
import torch
from torch import nn

import schatten
from schatten.lab.models import GPT, GPTConfig
from schatten.monitor import Monitor, known

CHEAP = ["constraint", "gradient"]

# What evaluates the loss takes up to seconds for one matrix: a few rounds are enough to see it.
FEW = 2

# The matrix that quantities of the Hessian are measured on; all others go to AdamW.
ONE = [("blocks.0.attention.query.weight", "spectral"), ("blocks.*", "adamw")]

# Evaluations of the loss that a quantity of micro-batches gets.
MICRO_BATCHES = 4


class Run:
    """A model in training, with a monitor or without."""

    def __init__(self, quantities: list[str], every: int = 1) -> None:
        torch.manual_seed(0)
        self.model = GPT(GPTConfig(256))
        self.ids, self.targets = torch.randint(0, 256, (12, 64)), torch.randint(0, 256, (12, 64))
        needs = {need for name in quantities for need in known()[name].needs}
        self.opt = schatten.Muon(self.model, lr=1e-3, weight_decay=0.1, rules=ONE if "hessian" in needs else ())
        count = 1 if "hessian" in needs else MICRO_BATCHES if "losses" in needs else 0
        loss = [lambda: self.model(self.ids, self.targets)] * count
        self.monitor = Monitor(self.opt, every, quantities, model=self.model, loss=loss or None) if quantities else None

    def step(self) -> None:
        self.opt.zero_grad()
        self.model(self.ids, self.targets).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.opt.step()


def alternating(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of processor time of each call in each round, the calls taking turns, after one round of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if repeat > 0:
                times[name].append(1e3 * (time.process_time() - start))
    return times


def hooks(calls: int = 20000) -> float:
    """Milliseconds that a monitor adds to a step it does not measure."""
    opt = schatten.Muon([nn.Parameter(torch.zeros(2, 2))])
    with Monitor(opt, 10**9, CHEAP) as monitor:
        start = time.process_time()
        for _ in range(calls):
            monitor._before_step(opt, (opt,), {})
            monitor._after_step(opt)
        return 1e3 * (time.process_time() - start) / calls


def measured(quantities: list[str], rounds: int, every: int) -> dict[str, Any]:
    needs = {need for name in quantities for need in known()[name].needs}
    one = "hessian" in needs
    runs = {"measured": Run(quantities), "plain": Run([])}
    times = alternating({name: run.step for name, run in runs.items()}, FEW if needs & {"hessian", "losses"} else rounds)
    step = common.median(times["plain"])
    cost = common.median(times["measured"]) - step
    own = [a - b for a, b in zip(times["measured"], times["plain"], strict=True)]
    share = (cost / every + hooks()) / step
    name = " + ".join(quantities) + (" (one matrix)" if one else "")
    print(f"{name:36}{step:9.1f}{cost:14.1f}{common.spread(own):>20}{100 * share:12.2f} %", flush=True)
    return {"one_matrix": one, **times, "cost_ms": cost, "share": share}


def whole_runs(count: int, every: int) -> dict[str, Any]:
    """Runs of `every` steps, one of them measured, alternating with runs without a monitor."""
    runs = {"monitor": Run(CHEAP, every), "plain": Run([])}
    times = alternating({name: lambda run=run: [run.step() for _ in range(every)] for name, run in runs.items()}, count)
    if not all(map(torch.equal, runs["plain"].model.parameters(), runs["monitor"].model.parameters())):
        raise SystemExit("Weights differ: the monitor has changed training.")
    shares = [a / b - 1 for a, b in zip(times["monitor"], times["plain"], strict=True)]
    print(
        f"{count} pairs of runs of {every} steps: Monitor(every={every}, {CHEAP}) adds {100 * statistics.median(shares):.2f} % "
        f"({100 * min(shares):.2f} to {100 * max(shares):.2f} %); weights are equal to the last bit"
    )
    return {**times, "shares": shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/monitor.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    matrices = sum(entry.route == "spectral" for entry in schatten.plan(Run([]).model))
    print(f"GPT of width 128 with 4 layers, {matrices} matrices; {args.rounds} rounds")
    print(f"{'quantities':36}{'step ms':>9}{'measurement':>14}{'quartiles':>20}{f'at every={args.every}':>14}")
    rows = {" + ".join(names): measured(names, args.rounds, args.every) for names in [CHEAP, *([name] for name in known())]}
    between = hooks()
    print(f"a step that is not measured: {1e3 * between:.1f} microseconds")
    result = {"every": args.every, "hooks_ms": between, "quantities": rows, "runs": whole_runs(args.runs, args.every)}
    common.save(args.out, "monitor", result)


if __name__ == "__main__":
    main()
