"""Advice for a model's matrices from a few gradients: should each be orthogonalised, by which power, how far, how decayed.

All of it is of the local quadratic model at the present weights: along a direction D a step t changes the loss by
-t <G, D> + t^2 J(D) / 2 with J(D) = <D, H D>, so the best step is <G, D> / J(D) and gains <G, D>^2 / (2 J(D)). A direction made
of a batch's gradient looks better on that batch than it is: here D is made of one batch, and <G, D> and J(D) are measured on
another. Each pair of batches is an independent draw of what a step of that batch size does; intervals are over pairs.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from schatten import plan
from schatten.diagnostics.hessian import Hessian, Loss
from schatten.diagnostics.lanczos import largest_eigenvalue
from schatten.diagnostics.undisturbed import devices_of, undisturbed
from schatten.lab.advice import POWERS, SLOPES, Advised, Trial, advice_of, best_step
from schatten.lab.jackknife import FEWEST, jackknife
from schatten.layout import Piece, pieces
from schatten.routing.places import named_parameters
from schatten.scales import RMS, Scale
from schatten.state import wide

# Steps that are tried on batches, in units of the joint best step.
TRIED = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)


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
    advice = tuple(advice_of(m.name, m.of(m.p.detach()), x, radius) for m, x in zip(found, measured, strict=True))
    step = best_step(whole, 0, 1)
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
