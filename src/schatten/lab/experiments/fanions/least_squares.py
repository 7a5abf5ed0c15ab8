"""The first table of Fanions (2512.09678): iterations to a target on a smooth convex problem.

    min F(X) = <X, A X B> / 2   over X of 500 x 500,   grad F(X) = A X B

A = Q diag(a) Q^T and B alike, Q a random orthogonal matrix, a uniform on (0, 1); the start has entries N(0, 0.1^2). Five
directions of the same Nesterov momentum, each with the constant lr and the momentum that were best for it in the paper's
grids, no decay; the score is the number of iterations until F <= 1e-3.

In the authors' code msign is Keller Jordan's quintic three times, in bf16, and the momentum is a sum, which no direction
here can tell from an average. The table hangs on those three quintics. On most seeds Muon and F-Muon end in a cycle of two
iterations, one above 1e-3 and one below; with four quintics, five or an SVD, F-Muon with its published lr stays above. It
arrives for seven of the seeds 0 .. 9 only, with the authors' rounding as with ours, and in fp32 for three of them after
1600 iterations; the other four methods arrive always. The published numbers are of one seed. The ranking does not hang on
this: with `polynomial()` and the lr lowered to 0.006 and 0.012, Muon takes 991 to 1003 and F-Muon 889 to 902 iterations
on seeds 0 .. 2.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from schatten.lab.experiment import Verdict, verdict
from schatten.lab.ledger import Row
from schatten.lab.statistics import mean, summary
from schatten.maps import L1, Frobenius, Map, Nuclear
from schatten.optimizer import SpectralOptimizer
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import Momentum
from schatten.solvers import newton_schulz

SIZE = 500
TARGET = 1e-3
# A run that has not arrived by so many times the published number counts as never arriving.
PATIENCE = 2

# Mean iterations within a tenth of the published number: seeds differ by less.
TOLERANCE = 0.1


@dataclass(frozen=True)
class Method:
    """A direction, the lr and momentum that were published for it, and the iterations it then took."""

    name: str
    map: Map
    lr: float
    momentum: float
    published: int


def methods(dtype: str = "bfloat16") -> tuple[Method, ...]:
    """The five of the table; `dtype` is the precision of msign's products."""
    msign = Nuclear(newton_schulz("keller", steps=3, dtype=dtype))
    return (
        Method("Muon", msign, 0.007, 0.5, 1060),
        Method("NSGD", Frobenius(), 0.08, 0.95, 1020),
        Method("F-Muon", 0.5 * msign + 0.5 * Frobenius(), 0.015, 0.7, 910),
        Method("SignSGD", L1(), 1.6e-4, 0.95, 2650),
        Method("S-Muon", 0.5 * msign + 0.5 * 0.01 * L1(), 0.011, 0.9, 890),
    )


@dataclass(frozen=True)
class Problem:
    """A and B of <X, A X B> / 2, and where to start."""

    A: Tensor
    B: Tensor
    start: Tensor

    @staticmethod
    def draw(size: int, seed: int) -> "Problem":
        """A random problem of size x size in fp32."""
        generator = torch.Generator().manual_seed(seed)

        def semidefinite() -> Tensor:
            Q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator))
            return (Q * torch.rand(size, generator=generator)) @ Q.mT

        return Problem(semidefinite(), semidefinite(), 0.1 * torch.randn(size, size, generator=generator))


def losses(method: Method, problem: Problem) -> Iterator[float]:
    """F at the start and after every iteration, without end."""
    X = nn.Parameter(problem.start.clone())
    rule = Rule(Momentum(form="sum", nesterov=True), method.map, Scale("none"))
    optimizer = SpectralOptimizer([X], rule, lr=method.lr, weight_decay=0.0, momentum=method.momentum)
    while True:
        X.grad = problem.A @ X.detach() @ problem.B
        yield float((X.detach() * X.grad).sum()) / 2
        optimizer.step()


def iterations(method: Method, problem: Problem, target: float = TARGET) -> float:
    """The first iteration after which F is at most `target`; infinite after PATIENCE times the published number."""
    seen = islice(losses(method, problem), PATIENCE * method.published + 1)
    return next((i for i, F in enumerate(seen) if F <= target), math.inf)


def check(rows: Sequence[Row]) -> list[Verdict]:
    """A number is reproduced if every seed arrived and their mean is within TOLERANCE of it."""
    verdicts = []
    for method in methods():
        taken = [row["iterations"] for row in rows if row.get("method") == method.name]
        if not taken:
            continue
        ratio = mean(taken) / method.published
        holds = abs(ratio - 1) <= TOLERANCE
        why = f"ratio {ratio:.2f}, tolerance {TOLERANCE:.0%}; the published run is one seed"
        verdicts.append(
            verdict(f"iterations of {method.name}", f"{method.published}", summary(taken, lost="never arrived"), holds, why)
        )
    return verdicts
