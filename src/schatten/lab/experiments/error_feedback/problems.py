"""Two small convex problems: workers that pull in different directions, and a slope on which the largest entry misleads.

    pulling:  f_j(X) = 1/2 ||A_j X - B_j||_F^2,  f = mean of f_j      the f_j differ as much as their minimisers are far
    slope:    f(X) = sqrt(1 + h^2),  h = 1 + <G, X> / ||G||_F          smooth, bounded below by 1, one worker

G of the slope is chosen so that the largest entry of msign(G) stands where G has the other sign. Whoever sends that entry
of the polar factor alone moves h away from 0 by the same amount at every step, as msign does not see how large h is.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from schatten.compressors import Compressor, Identity
from schatten.functions import apply_map
from schatten.maps import Map, Nuclear, Power
from schatten.presets import EF21Muon
from schatten.retractions import DecoupledDecay, ServerCompression
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import ErrorFeedback
from schatten.solvers import svd

# msign(G) is 0.77 at the first entry, its largest, where G is -1; singular values 13.5, 6.7, 0.4.
MISLEADING = ((-1.0, 0.0, 3.0), (3.0, 4.0, -7.0), (5.0, -6.0, -9.0))

Step = Callable[[float], None]


@dataclass(frozen=True)
class Problem:
    """The gradient of every worker at X, and the loss f(X) of them all."""

    start: Tensor
    workers: int
    gradients: Callable[[Tensor], Sequence[Tensor]]
    loss: Callable[[Tensor], float]
    least: float


def pulling(seed: int, workers: int = 4, shape: tuple[int, int] = (16, 8), rows: int = 24) -> Problem:
    """Least squares in fp64 whose minimisers are as far from each other as from the start, which is zero."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    common = draw(*shape)
    A = [draw(rows, shape[0]) / rows**0.5 for _ in range(workers)]
    B = [a @ (common + draw(*shape)) for a in A]

    def loss(X: Tensor) -> float:
        return float(sum((a @ X - b).square().sum() for a, b in zip(A, B, strict=True))) / (2 * workers)

    def gradients(X: Tensor) -> list[Tensor]:
        return [a.mT @ (a @ X - b) for a, b in zip(A, B, strict=True)]

    least = loss(torch.linalg.lstsq(torch.cat(A), torch.cat(B)).solution)
    return Problem(torch.zeros(shape, dtype=torch.float64), workers, gradients, loss, least)


def slope() -> Problem:
    """One worker; f grows with |h|, which is 1 at the start and 0 at the least value 1."""
    G = torch.tensor(MISLEADING, dtype=torch.float64)
    G = G / G.norm()

    def h(X: Tensor) -> Tensor:
        return 1 + (G * X).sum()

    def gradients(X: Tensor) -> list[Tensor]:
        return [h(X) / (1 + h(X).square()).sqrt() * G]

    return Problem(torch.zeros_like(G), 1, gradients, lambda X: float((1 + h(X).square()).sqrt()), 1.0)


# -- where the compressor stands ---------------------------------------------------------------------------------------

EXACT = svd()


def iterates(problem: Problem, way: str, compressor: Compressor, lrs: Sequence[float]) -> Iterator[Tensor]:
    """The X at which gradients are taken, before every step and after the last, of one of WAYS."""
    X = nn.Parameter(problem.start.clone())
    step = WAYS[way](problem, X, compressor)
    for lr in lrs:
        yield X.detach().clone()
        step(lr)
    yield X.detach().clone()


def on_gradient(problem: Problem, X: nn.Parameter, compressor: Compressor) -> Step:
    """EF21-Muon: workers send their gradients with error feedback, the server steps along msign of the mean."""
    return _feedback(problem, X, compressor, Identity(), Nuclear(EXACT), problem.gradients)


def both_ways(problem: Problem, X: nn.Parameter, compressor: Compressor) -> Step:
    """The same with the weights on their way back compressed too."""
    return _feedback(problem, X, compressor, compressor, Nuclear(EXACT), problem.gradients)


def on_output(problem: Problem, X: nn.Parameter, compressor: Compressor) -> Step:
    """Workers send the polar factors of their gradients with error feedback, the server steps along the mean."""
    return _feedback(problem, X, compressor, Identity(), Power(1.0), lambda W: _polars(problem, W))


def after_output(problem: Problem, X: nn.Parameter, compressor: Compressor) -> Step:
    """Workers send compressed polar factors, and nobody remembers what was left out."""

    def step(lr: float) -> None:
        polars = _polars(problem, X.detach())
        received = [compressor.decode(compressor.encode(D, 0), D.shape, D.dtype) for D in polars]
        with torch.no_grad():
            X.sub_(lr * torch.stack(received).mean(0))

    return step


def _polars(problem: Problem, X: Tensor) -> list[Tensor]:
    return [apply_map(G, Nuclear(EXACT)) for G in problem.gradients(X)]


def _feedback(
    problem: Problem, X: nn.Parameter, up: Compressor, down: Compressor, map: Map, sent: Callable[[Tensor], Sequence[Tensor]]
) -> Step:
    """A step of EF21 without momentum: workers send what `sent` gives, `map` of their mean is the direction."""
    rule = Rule(ErrorFeedback(up), map, Scale("none"), ServerCompression(DecoupledDecay(), down))
    optimizer = EF21Muon([{"params": [X], "rule": rule}], weight_decay=0.0, momentum=0.0, workers=problem.workers)

    def step(lr: float) -> None:
        optimizer.param_groups[0]["lr"] = lr
        # The gradients of a single worker are p.grad, as of any optimizer.
        for j, G in enumerate(sent(X.detach())):
            with optimizer.worker(j):
                X.grad = G
        optimizer.step()

    return step


WAYS: Mapping[str, Callable[[Problem, nn.Parameter, Compressor], Step]] = {
    "feedback on the gradient": on_gradient,
    "feedback both ways": both_ways,
    "feedback on the polar factor": on_output,
    "no feedback, on the polar factor": after_output,
}


# -- what is measured --------------------------------------------------------------------------------------------------


def gap(problem: Problem, way: str, compressor: Compressor, steps: int, lr: float) -> dict[str, float]:
    """The share of the initial f - min f that is left after `steps` with lr falling to zero in a line."""
    *_, last = iterates(problem, way, compressor, [lr * (1 - t / steps) for t in range(steps)])
    return {"gap": (problem.loss(last) - problem.least) / (problem.loss(problem.start) - problem.least)}


def stationarity(problem: Problem, way: str, compressor: Compressor, steps: int, radius: float) -> dict[str, float]:
    """Mean and least nuclear norm of grad f over K = `steps` steps of the constant length radius / sqrt(K)."""
    seen = islice(iterates(problem, way, compressor, [radius / math.sqrt(steps)] * steps), steps)
    norms = [float(torch.linalg.matrix_norm(torch.stack(list(problem.gradients(X))).mean(0), "nuc")) for X in seen]
    return {"mean": sum(norms) / steps, "least": min(norms)}
