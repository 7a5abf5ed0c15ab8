"""Advice for a model's matrices from a few gradients: should each be orthogonalised, by which power, how far, how decayed.

All of it is of the local quadratic model at the present weights: along a direction D a step t changes the loss by
-t <G, D> + t^2 J(D) / 2 with J(D) = <D, H D>, so the best step is <G, D> / J(D) and gains <G, D>^2 / (2 J(D)). A direction made
of a batch's gradient looks better on that batch than it is: here D is made of one batch, and <G, D> and J(D) are measured on
another. Each pair of batches is an independent draw of what a step of that batch size does; intervals are over pairs.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from schatten import plan
from schatten.diagnostics.constraint import decay_for_radius
from schatten.diagnostics.hessian import Hessian, Loss
from schatten.diagnostics.lanczos import largest_eigenvalue
from schatten.diagnostics.undisturbed import devices_of, undisturbed
from schatten.lab.jackknife import FEWEST, Interval, jackknife, log_jackknife
from schatten.layout import Piece, pieces
from schatten.routing.places import named_parameters
from schatten.scales import RMS, Scale
from schatten.state import wide

# The directions U S^p V^T that are compared: Muon's, two between, and the gradient itself.
POWERS = (0.0, 0.25, 0.5, 1.0)

# Steps that are tried on batches, in units of the joint best step.
TRIED = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)

YES, NO, CONDITION, UNDECIDED = "yes", "no", "by (4) only", "undecided"

# Places of the numbers of one draw: slopes <G, D> and curvatures J(D) for each of POWERS, L, and ||D||_F^2 of the last.
SLOPES, CURVATURES = range(len(POWERS)), range(len(POWERS), 2 * len(POWERS))
L, SQUARE = 2 * len(POWERS), 2 * len(POWERS) + 1


@dataclass(frozen=True)
class Advice:
    """What was found of one matrix, `shape` (fan_out, fan_in).

    Directions have the length the library's default scale gives them, root mean square 0.2, so steps are learning rates of
    `scale="adamw-rms"`: `slopes[p]` is <G, D_p> and `curvatures[p]` J(D_p) for D_p along U S^p V^T of the gradient.

    Attributes:
        factor: c(shape) of `adamw-rms`.
        norm: the spectral norm of the weight.
        smoothness: L, the largest |eigenvalue| of the Hessian in this matrix, mean over batches.
        safe: the gain of the best step along U V^T over what a gradient step can be sure of knowing L alone. Of exact gradients
            that is nuc^2/J over fro^2/L, and above 1 condition (4) of Shen et al. (arXiv 2505.23737); a batch's noise makes the
            step shorter. None where a curvature is not positive.
        best: the same over the gain of the best step along the gradient; at most `safe`.
        verdict: "yes" if U V^T clearly gains more than any gradient step, "by (4) only" if more than the sure one, but clearly
            less than the best one, "no" if clearly less than the sure one, otherwise "undecided".
        power: the p in `POWERS` that gains most; None where none is clearly better than another.
        contenders: those not clearly worse than it.
        lr: the best step along U V^T, this matrix alone; None where slope or curvature is not clearly positive.
        weight_decay: lambda whose ball, spectral norm at most c / lambda, has the wanted radius; inf for a weight of zeros.
    """

    name: str
    shape: tuple[int, int]
    factor: float
    norm: float
    slopes: Mapping[float, Interval]
    curvatures: Mapping[float, Interval]
    smoothness: Interval
    safe: Interval | None
    best: Interval | None
    verdict: str
    power: float | None
    contenders: tuple[float, ...]
    lr: Interval | None
    weight_decay: float


@dataclass(frozen=True)
class Trial:
    """A step of all matrices at once that was tried: the change of the loss on other batches, and what was predicted."""

    lr: float
    change: Interval
    predicted: float


@dataclass(frozen=True)
class Advised:
    """Advice for every matrix, in order, and for the model.

    Attributes:
        draws: independent pairs of batches behind every interval.
        joint: the best step along U V^T of all matrices at once, with their interactions: a learning rate of `adamw-rms`. None
            where slope or curvature is not clearly positive.
        alone: the median of the matrices' own best steps, which leave the others where they are.
        trials: steps around the joint one, tried.
        lr: where to start: the largest step up to the joint one whose trial lowered the loss most.
        weight_decay: the lambda that leaves every matrix the wanted radius or more.
        noise: trace of the gradients' covariance over the gradient's square, in batches: of fewer batches than this a gradient
            is mostly noise (McCandlish et al. 2018). None where the gradient is not distinguished from 0.
    """

    matrices: tuple[Advice, ...]
    draws: int
    joint: Interval | None
    alone: float | None
    trials: tuple[Trial, ...]
    lr: float | None
    weight_decay: float
    noise: float | None

    def __iter__(self) -> Iterator[Advice]:
        return iter(self.matrices)

    def __len__(self) -> int:
        return len(self.matrices)


def advise(
    model: nn.Module,
    losses: Sequence[Loss],
    *,
    rules: Sequence[tuple[Any, ...]] = (),
    only: str = "*",
    radius: float | None = None,
    iterations: int = 8,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Advised:
    """Measure what `losses` say of every matrix that `schatten.plan(model, rules)` routes to a spectral rule; changes nothing.

    Args:
        losses: functions without arguments, each of which evaluates the model on a batch of its own and returns the loss; an
            even number of at least eight. Batches should be independent draws of the size that training will have.
        rules: of `schatten.plan`, as the optimizer would get them.
        only: a glob of parameter names; joint numbers are then of these alone.
        radius: the spectral norm that decay should allow; by default each weight's present one.
        iterations: Lanczos steps for L: each is a product with the Hessian. L is approached from below.
        progress: called with the draws done and their number.

    Cost: for each pair of batches and each matrix 4 + `iterations` Hessian-vector products and an SVD. Memory: the graph of one
    batch's gradient, and three copies of the matrices.

    Raises ValueError for too few losses, a loss or gradient that is not finite, gradients that are all zero, no matrix that
    `only` names, and what `schatten.plan` refuses.

    Example:
        >>> import torch
        >>> from schatten.lab.advise import advise
        >>> layer, target = torch.nn.Linear(6, 4, bias=False), torch.randn(4, 6)
        >>> losses = [lambda x=torch.randn(64, 6): (layer(x) - x @ target.T).square().mean() for _ in range(8)]
        >>> [row.name for row in advise(layer, losses)]
        ['weight']
    """
    if len(losses) < 2 * FEWEST or len(losses) % 2:
        raise ValueError(f"losses must be an even number of at least {2 * FEWEST}, for independent pairs; got {len(losses)}.")
    if radius is not None and not radius > 0:
        raise ValueError(f"radius must be positive, got {radius}.")
    found = _matrices(model, rules, only)
    params = {id(m.p): m.p for m in found}
    trained = list(params.values())
    pairs = list(zip(losses[::2], losses[1::2], strict=True))
    rows, joint, gradients = [], [], _Gradients(trained)
    for done, (first, second) in enumerate(pairs):
        row, whole = _draw(model, found, trained, first, second, iterations, gradients)
        rows.append(row)
        joint.append(whole)
        progress(done + 1, len(pairs))
    if not gradients.squares:
        raise ValueError("All gradients are zero: the losses must evaluate this model, and depend on its matrices.")
    measured, whole = torch.stack(rows, 1), torch.stack(joint)
    advice = tuple(_advice(m, x, radius) for m, x in zip(found, measured, strict=True))
    step = _step(whole, 0, 1)
    own = [row.lr.value for row in advice if row.lr is not None]
    trials = _trials(model, found, pairs, whole, step.value) if step is not None else ()
    falls = [t for t in trials if step is not None and t.lr <= 1.001 * step.value and t.change.sign < 0]
    return Advised(
        advice,
        len(pairs),
        step,
        statistics.median(own) if own else None,
        trials,
        min(falls, key=lambda t: t.change.value).lr if falls else None,
        min(row.weight_decay for row in advice),
        gradients.noise(),
    )


@dataclass(frozen=True, eq=False)
class _Matrix:
    """Block number `index` of a piece of a parameter."""

    name: str
    p: Tensor
    piece: Piece
    index: int

    def of(self, t: Tensor) -> Tensor:
        """This matrix of a tensor of the parameter's shape, (fan_out, fan_in)."""
        return self.piece.of(t)[self.index].to(wide(t.dtype))

    def add_(self, total: Tensor, D: Tensor) -> None:
        """Add a direction where it belongs in a tensor of the parameter's shape."""
        own = D.new_zeros(self.piece.blocks)
        own[self.index] = D
        place = self.piece.view(total)
        place.add_(own.reshape(place.shape).to(total.dtype))


def _matrices(model: nn.Module, rules: Sequence[tuple[Any, ...]], only: str) -> list[_Matrix]:
    params, found = named_parameters(model), []
    for entry in plan(model, rules, strict=False):
        if entry.route != "spectral" or not fnmatchcase(entry.name, only):
            continue
        own = pieces(entry.layout, entry.shape)
        for part, piece in enumerate(own):
            for index in range(piece.blocks[0]):
                name = entry.name + f".{part}" * (len(own) > 1) + f"[{index}]" * (piece.blocks[0] > 1)
                found.append(_Matrix(name, params[entry.name], piece, index))
    if not found:
        raise ValueError(f"No matrix of this model is named {only!r}; `schatten plan` lists the names.")
    return found


def _draw(
    model: nn.Module,
    found: Sequence[_Matrix],
    params: Sequence[Tensor],
    first: Loss,
    second: Loss,
    iterations: int,
    gradients: "_Gradients",
) -> tuple[Tensor, Tensor]:
    """Directions of the first batch measured on the second: numbers of each matrix, and slope and curvature of all together."""
    made_of = dict(zip(map(id, params), _gradient(first, params, model), strict=True))
    H = Hessian(second, params, model=model)
    _check_finite([H.loss, *H.gradient])
    gradients.add(list(made_of.values()))
    gradients.add(H.gradient)
    order = {id(p): i for i, p in enumerate(params)}
    joint = [torch.zeros_like(p, requires_grad=False) for p in params]
    rows = []
    for m in found:
        i = order[id(m.p)]
        G, other = m.of(H.gradient[i]), m.of(made_of[id(m.p)])

        def product(D: Tensor, m: _Matrix = m, i: int = i) -> Tensor:
            whole = torch.zeros_like(m.p, requires_grad=False)
            m.add_(whole, D)
            return m.of(H.within(i, whole))

        D = _directions(other)
        m.add_(joint[i], D[0])
        slopes = [(G * d).sum() for d in D]
        curvatures = [(d * product(d)).sum() for d in D]
        squares = [d.square().sum() for d in D]
        # No direction's curvature is above L, which Lanczos approaches from below.
        quotients = [J.abs() / square.clamp_min(1e-30) for J, square in zip(curvatures, squares, strict=True)]
        bound = torch.stack([largest_eigenvalue(product, G, iterations).value.to(G), *quotients]).max()
        numbers = [*slopes, *curvatures, bound, squares[-1]]
        rows.append(torch.stack([x.reshape(()).to(G) for x in numbers]).cpu().double())
    slope = sum(row[SLOPES[0]] for row in rows)
    curvature = sum((d * h).sum().cpu().double() for d, h in zip(joint, H(joint), strict=True))
    return torch.stack(rows), torch.stack([torch.as_tensor(slope), torch.as_tensor(curvature)])


def _gradient(loss: Loss, params: Sequence[Tensor], model: nn.Module) -> tuple[Tensor, ...]:
    with undisturbed(model, devices_of(params)), torch.enable_grad():
        value = loss()
        found = torch.autograd.grad(value, params, materialize_grads=True)
    _check_finite([value, *found])
    return found


def _check_finite(tensors: Sequence[Tensor]) -> None:
    if not all(bool(t.isfinite().all()) for t in tensors):
        raise ValueError("A loss or its gradient is not finite at these weights: give batches on which the model works.")


def _directions(G: Tensor) -> list[Tensor]:
    """U S^p V^T for each of POWERS in the length of the default scale; singular values that are rounding count as 0."""
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    positive = S > S[0] * max(G.shape) * torch.finfo(S.dtype).eps
    found = []
    for p in POWERS:
        D = (U * torch.where(positive, S.clamp_min(torch.finfo(S.dtype).tiny) ** p, 0)) @ Vh
        found.append(D * (Scale()(D) if p == 0 else RMS()(D)))
    return found


def _advice(m: _Matrix, x: Tensor, radius: float | None) -> Advice:
    """The advice that draws `x`, (draws, numbers), give for one matrix."""
    factor = Scale().factor(*m.piece.blocks[1:])
    norm = float(torch.linalg.matrix_norm(m.of(m.p.detach()).cpu().double(), 2))
    wanted = norm if radius is None else radius
    slopes = {p: jackknife(x, lambda e, i=i: e[..., i]) for p, i in zip(POWERS, SLOPES, strict=True)}
    curvatures = {p: jackknife(x, lambda e, i=i: e[..., i]) for p, i in zip(POWERS, CURVATURES, strict=True)}
    power, contenders = _power(x)
    return Advice(
        m.name,
        (m.piece.blocks[1], m.piece.blocks[2]),
        factor,
        norm,
        slopes,
        curvatures,
        jackknife(x, lambda e: e[..., L]),
        log_jackknife(x, _safe),
        log_jackknife(x, lambda e: _gain(e, 0) / _gain(e, -1)),
        _verdict(x),
        power,
        contenders,
        _step(x, SLOPES[0], CURVATURES[0]),
        decay_for_radius(wanted, factor) if wanted > 0 else math.inf,
    )


def _gain(e: Tensor, i: int) -> Tensor:
    """Twice the gain of the best step along the direction of POWERS[i]; nan where the model has none."""
    return _positive(e[..., SLOPES[i]]).square() / _positive(e[..., CURVATURES[i]])


def _positive(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.nan)


def _guaranteed(e: Tensor) -> Tensor:
    """Twice what a step along the gradient gains for sure, knowing of its curvature only that it is at most L ||D||_F^2."""
    return _positive(e[..., SLOPES[-1]]).square() / (e[..., L] * e[..., SQUARE])


def _better(x: Tensor, i: int, j: int) -> int:
    """1 where the direction of POWERS[i] clearly gains more than that of POWERS[j], -1 where less."""
    a, b, s, t = CURVATURES[i], CURVATURES[j], SLOPES[i], SLOPES[j]
    return _clear(
        x,
        lambda e: _gain(e, i) / _gain(e, j),
        lambda e: e[..., b] * e[..., s].square() - e[..., a] * e[..., t].square(),
    )


def _clear(x: Tensor, ratio: Callable[[Tensor], Tensor], excess: Callable[[Tensor], Tensor]) -> int:
    """1 where a ratio of gains is clearly above 1, -1 where below, told by `excess` where curvatures are not all positive.

    For an equal fall of the loss to first order a direction loses J / slope^2 to curvature. `excess` compares that without
    dividing, so it has a sign where the best step and its gain are not finite.
    """
    found = log_jackknife(x, ratio)
    if found is None:
        return jackknife(x, excess).sign
    return 1 if found.low > 1 else -1 if found.high < 1 else 0


def _verdict(x: Tensor) -> str:
    if not all(jackknife(x, lambda e, i=i: e[..., i]).sign > 0 for i in (SLOPES[0], SLOPES[-1])):
        return UNDECIDED
    best, safe = _better(x, 0, -1), _clear(x, _safe, _safe_excess)
    return YES if best > 0 else NO if safe < 0 else CONDITION if (best, safe) == (-1, 1) else UNDECIDED


def _safe(e: Tensor) -> Tensor:
    return _gain(e, 0) / _guaranteed(e)


def _safe_excess(e: Tensor) -> Tensor:
    bound = e[..., L] * e[..., SQUARE]
    return bound * e[..., SLOPES[0]].square() - e[..., CURVATURES[0]] * e[..., SLOPES[-1]].square()


def _power(x: Tensor) -> tuple[float | None, tuple[float, ...]]:
    """The power that gains most, and those not clearly worse; None where that is every one, or none clearly descends."""
    descends = [jackknife(x, lambda e, i=i: e[..., i]).sign > 0 for i in SLOPES]
    mean = x.mean(0)
    if not any(descends):
        return None, POWERS
    lost = [float(mean[c] / mean[s].square()) for s, c in zip(SLOPES, CURVATURES, strict=True)]
    top = min((i for i, clear in enumerate(descends) if clear), key=lambda i: lost[i])
    kept = tuple(p for i, p in enumerate(POWERS) if descends[i] and (i == top or _better(x, i, top) >= 0))
    return (None if len(kept) == len(POWERS) else POWERS[top]), kept


def _step(x: Tensor, slope: int, curvature: int) -> Interval | None:
    """The best step slope / curvature, where both are clearly positive."""
    if not all(jackknife(x, lambda e, i=i: e[..., i]).sign > 0 for i in (slope, curvature)):
        return None
    return log_jackknife(x, lambda e: e[..., slope] / e[..., curvature])


@torch.no_grad()
def _trials(
    model: nn.Module, found: Sequence[_Matrix], pairs: Sequence[tuple[Loss, Loss]], whole: Tensor, lr: float
) -> tuple[Trial, ...]:
    """Take steps around `lr` along the first batch's directions, look at the second's loss, and put the weights back."""
    params = list({id(m.p): m.p for m in found}.values())
    order = {id(p): i for i, p in enumerate(params)}
    changes = torch.zeros(len(pairs), len(TRIED), dtype=torch.float64)
    for draw, (first, second) in enumerate(pairs):
        slopes = _gradient(first, params, model)
        joint = [torch.zeros_like(p) for p in params]
        for m in found:
            m.add_(joint[order[id(m.p)]], _directions(m.of(slopes[order[id(m.p)]]))[0])
        before = [p.clone() for p in params]
        try:
            start = _value(second, model, params)
            for k, times in enumerate(TRIED):
                for p, W, D in zip(params, before, joint, strict=True):
                    p.copy_(W - times * lr * D)
                changes[draw, k] = _value(second, model, params) - start
        finally:
            for p, W in zip(params, before, strict=True):
                p.copy_(W)
    slope, curvature = whole.mean(0).tolist()
    steps = [times * lr for times in TRIED]
    return tuple(
        Trial(t, jackknife(changes, lambda e, k=k: e[..., k]), -t * slope + t**2 * curvature / 2) for k, t in enumerate(steps)
    )


def _value(loss: Loss, model: nn.Module, params: Sequence[Tensor]) -> float:
    with undisturbed(model, devices_of(params)):
        return float(loss())


class _Gradients:
    """Sums over the gradients of equal batches, from which their noise is told."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.sums = [torch.zeros_like(p, dtype=wide(p.dtype), requires_grad=False) for p in params]
        self.squares, self.count = 0.0, 0

    def add(self, gradients: Sequence[Tensor]) -> None:
        for total, g in zip(self.sums, gradients, strict=True):
            total.add_(g)
        self.squares += sum(float(torch.linalg.vector_norm(g, dtype=wide(g.dtype))) ** 2 for g in gradients)
        self.count += 1

    def noise(self) -> float | None:
        n = self.count
        of_mean = sum(float(torch.linalg.vector_norm(t)) ** 2 for t in self.sums) / n**2
        trace = n / (n - 1) * (self.squares / n - of_mean)
        square = of_mean - trace / n
        return trace / square if square > 0 else None
