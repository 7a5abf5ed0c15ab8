"""Metrics: what an optimizer does to each parameter, measured on its own step and read when somebody asks.

Counters are always kept. The rest is measured on the steps that `metrics(every=n)` names, from tensors the step has
anyway, and left on the device; between them a step does nothing more than without, and nothing ever waits but the call
that returns numbers. Where several ranks hold parameters, that call is one of all of them.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from schatten.layout import pieces
from schatten.maps import Nuclear
from schatten.placements.gather import total_norms, whole
from schatten.placements.local import plain
from schatten.placements.ranks import Crew
from schatten.retractions import DecoupledDecay
from schatten.rule import Rule
from schatten.state import suffixes, wide

if TYPE_CHECKING:
    from schatten.optimizer import SpectralOptimizer

# Power iterations for the spectral norm of a weight: its estimate is from below, for a Gaussian 512 x 512 by 2 %.
ITERATIONS = 16


class Recorder:
    """What the last measured step left on the device, by the number of the parameter in the optimizer."""

    def __init__(self) -> None:
        self.every = 0
        self.open = False
        self.step = 0
        self._clear()

    def __getstate__(self) -> dict[str, Any]:
        # A copy measures for itself; what ranks have measured together says nothing of one of them.
        return {"every": self.every}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()
        self.every = state["every"]

    def _clear(self) -> None:
        self.gradients: dict[int, Tensor] = {}
        self.updates: dict[int, list[Tensor]] = defaultdict(list)
        self.errors: dict[tuple[int, str], Tensor] = {}

    def begin(self, step: int) -> None:
        """Open for step number `step`, if that is one to measure, until `end`; again within one step changes nothing."""
        if self.open and step == self.step:
            return
        self.open = self.every > 0 and step % self.every == 0
        if self.open:
            self.step = step
            self._clear()

    def end(self) -> None:
        self.open = False

    def gradient(self, number: int, p: Tensor) -> None:
        assert p.grad is not None
        self.gradients[number] = torch.linalg.vector_norm(p.grad, dtype=wide(p.dtype))

    def direction(self, of: Sequence[tuple[int, str]], D: Tensor, length: float | Tensor, rule: Rule) -> None:
        """The norm of each update lr c D, and how far D (members, blocks, m, n) is from orthogonal where it should be.

        `of` are the numbers of the members' parameters and the suffixes of their pieces.
        """
        squares = (torch.linalg.vector_norm(D, dim=(-2, -1), keepdim=True) * length).square().sum((1, 2, 3))
        for (number, _), square in zip(of, squares, strict=True):
            self.updates[number].append(square)
        if isinstance(rule.map, Nuclear):
            self.grams(of, gram(D))

    def grams(self, of: Sequence[tuple[int, str]], products: Tensor) -> None:
        """How far products D D^T of the shorter side, (members, ..., r, r), are from I."""
        for key, error in zip(of, _off_identity(products).view(len(of), -1).amax(-1), strict=True):
            self.errors[key] = torch.maximum(error, self.errors.get(key, error))

    def update(self, of: Sequence[int], U: Tensor) -> None:
        """The norm of each update, or of this rank's part of it, (members, rows, columns), by the parameter's number."""
        for number, square in zip(of, U.square().sum((-2, -1)), strict=True):
            self.updates[number].append(square)

    def change(self, number: int, before: Tensor, after: Tensor, decay: float | Tensor) -> None:
        """The square of an AdamW update, the decay lr lambda W taken out."""
        update = after.detach().to(wide(after.dtype)) - before * (1 - decay)
        self.updates[number].append(update.square().sum())


def orthogonality_error(D: Tensor) -> Tensor:
    """||D D^T - I||_F / sqrt(r) of matrices (*b, m, n), with D D^T of the shorter side r; 0 for U V^T of full rank.

    Example:
        >>> import torch
        >>> from schatten.metrics import orthogonality_error
        >>> float(orthogonality_error(torch.eye(3)[:2])), float(orthogonality_error(2 * torch.eye(2)))
        (0.0, 3.0)
    """
    return _off_identity(gram(D))


def gram(D: Tensor) -> Tensor:
    """D D^T or D^T D of matrices (*b, m, n), the smaller one."""
    return D.mT @ D if D.shape[-2] > D.shape[-1] else D @ D.mT


def _off_identity(products: Tensor) -> Tensor:
    r = products.shape[-1]
    off = products - torch.eye(r, dtype=products.dtype, device=products.device)
    return torch.linalg.matrix_norm(off) / math.sqrt(max(1, r))


def spectral_norm(W: Tensor) -> Tensor:
    """The largest singular value of matrices (*b, m, n) from below, by power iteration from a fixed start.

    Example:
        >>> import torch
        >>> from schatten.metrics import spectral_norm
        >>> round(float(spectral_norm(torch.diag(torch.tensor([3.0, 1.0])))), 4)
        3.0
    """
    W = W.to(wide(W.dtype))
    size = W.abs().amax((-2, -1), keepdim=True)
    W = W / size.clamp_min(torch.finfo(W.dtype).tiny)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(W.shape[-1], 1, generator=generator, dtype=W.dtype).to(W.device).expand(*W.shape[:-2], -1, 1)
    for _ in range(ITERATIONS):
        v = torch.nn.functional.normalize(W.mT @ (W @ v), dim=-2)
    return torch.linalg.vector_norm(W @ v, dim=-2)[..., 0] * size[..., 0, 0]


def read(opt: "SpectralOptimizer", recorder: Recorder) -> dict[str, Any]:
    """All metrics of `opt`, as plain numbers.

    | key | value |
    |---|---|
    | `skipped`, `skipped_total` | how often a parameter's gradient was not finite, for those where it was; the sum |
    | `without_gradient` | parameters that were never stepped |
    | `effective_lr` | lr c(shape) of a spectral parameter: the spectral norm of an update by U V^T |
    | `spectral_norm` | the largest singular value of a weight, from below; under the nuclear norm |
    | `spectral_bound` | c / lambda, where decoupled decay takes that norm in the end; under the nuclear norm |
    | `measured_step` | the step that what follows was measured on, 0 for none |
    | `update_rms` | root mean square of a parameter's update, decay not counted |
    | `orthogonality_error` | `orthogonality_error` of a direction under the nuclear norm, the worst block's |
    | `norms` | of all weights, gradients and updates of each route |

    A parameter read as blocks of several sizes has an entry for each where they differ, with ".0", ".1" after its name.

    Of parameters that several ranks hold every rank gets the numbers of the whole, and all of them must call this: weights that
    are sharded and have a spectral norm are gathered, one at a time.
    """
    names = {i: name for i, (name, _, _) in enumerate(_parameters(opt))}
    steps, skipped, effective, norms, bounds = {}, {}, {}, {}, {}
    weights: dict[str, list[tuple[Tensor, Tensor]]] = {"spectral": [], "adamw": []}
    routes = {}
    for i, (name, p, group) in enumerate(_parameters(opt)):
        routes[i] = group["algorithm"]
        steps[name], skipped[name] = opt.state[p]["step"], opt.state[p]["skipped"]
        weights[group["algorithm"]].append((p, torch.linalg.vector_norm(plain(p.detach()), dtype=wide(p.dtype))))
        if group["algorithm"] != "spectral":
            continue
        rule = opt.rule(group)
        own = pieces(group["layout"], p.shape)
        W = whole(p.detach()) if p.numel() and isinstance(rule.map, Nuclear) else None
        for piece, suffix in zip(own, suffixes(own), strict=True):
            factor = rule.scale.factor(*piece.blocks[1:])
            effective[name + suffix] = float(group["lr"]) * factor
            if W is not None:
                norms[name + suffix] = spectral_norm(piece.of(W)).amax()
                if isinstance(rule.retraction, DecoupledDecay) and group["weight_decay"]:
                    bounds[name + suffix] = factor / float(group["weight_decay"])
    steps, skipped = _numbers(steps), _numbers(skipped)
    measured = Measured(
        _numbers(recorder.gradients),
        _numbers({i: torch.stack(squares).sum() for i, squares in recorder.updates.items()}),
        _numbers(recorder.errors),
    )
    for crew in opt._ranks.crews if recorder.step else ():
        measured = of_all_ranks(measured, crew)
    gradients, updates = measured.gradients, measured.updates
    totals = dict(zip(weights, _list(total_norms(list(weights.values()), 2.0)), strict=True))
    size = {i: p.numel() for i, (_, p, _) in enumerate(_parameters(opt))}
    of_route = {
        route: {
            "weight": totals[route],
            "gradient": math.hypot(*(norm for i, norm in gradients.items() if routes[i] == route)),
            "update": math.sqrt(sum(square for i, square in updates.items() if routes[i] == route)),
        }
        for route in weights
    }
    return {
        "skipped": {name: int(n) for name, n in skipped.items() if n},
        "skipped_total": int(sum(skipped.values())),
        "without_gradient": [name for name, n in steps.items() if n == 0 and not skipped[name]],
        "effective_lr": effective,
        "spectral_norm": _numbers(norms),
        "spectral_bound": bounds,
        "measured_step": recorder.step,
        # In the order of the groups, whatever this rank has measured first.
        "update_rms": {names[i]: math.sqrt(square / size[i]) for i, square in sorted(updates.items())},
        "orthogonality_error": {names[i] + s: e for (i, s), e in sorted(measured.errors.items())},
        "norms": of_route,
    }


class Measured(NamedTuple):
    """Norms of gradients and squares of updates by the parameter's number, and errors by number and suffix."""

    gradients: dict[int, float]
    updates: dict[int, float]
    errors: dict[tuple[int, str], float]


def of_all_ranks(own: Measured, crew: Crew) -> Measured:
    """What all ranks of a crew have measured of its parameters, from what this one has; two all-reduces on the host."""
    rank = dist.get_rank(crew.group)
    # Of each parameter the squares of gradient and update, whether they were measured, and errors, -1 for none.
    places = [(m.number, suffix) for m in crew.members if m.traveller for suffix in m.traveller.suffixes]
    sums, tops = [], [own.errors.get(place, -1.0) for place in places]
    for m in crew.members:
        i, first = m.number, not any(m.weights.copy_of(rank))
        # What one owner has computed counts wherever it is.
        counts = first or m.way == "owner"
        sums += [own.gradients.get(i, 0.0) ** 2 if first else 0.0, own.updates.get(i, 0.0) if counts else 0.0]
        tops += [float(i in own.gradients), float(i in own.updates)]
    total, top = torch.tensor(sums, dtype=torch.float64), torch.tensor(tops, dtype=torch.float64)
    dist.all_reduce(total, group=crew.host)
    dist.all_reduce(top, dist.ReduceOp.MAX, group=crew.host)
    found = Measured(dict(own.gradients), dict(own.updates), dict(own.errors))
    worst, seen = top.tolist()[: len(places)], top.tolist()[len(places) :]
    found.errors.update({place: error for place, error in zip(places, worst, strict=True) if error >= 0})
    for m, (G, U), (has_gradient, has_update) in zip(crew.members, _pairs(total.tolist()), _pairs(seen), strict=True):
        found.gradients.update({m.number: math.sqrt(G)} if has_gradient else {})
        found.updates.update({m.number: U} if has_update else {})
    return found


def _pairs(values: Sequence[float]) -> list[tuple[float, float]]:
    return list(zip(values[::2], values[1::2], strict=True))


def _parameters(opt: "SpectralOptimizer") -> Iterable[tuple[str, Tensor, Mapping[str, Any]]]:
    for g, group in enumerate(opt.param_groups):
        for i, p in enumerate(group["params"]):
            yield group["param_names"][i] if "param_names" in group else f"{g}.{i}", p, group


def _list(scalars: Sequence[Tensor]) -> list[float]:
    """The values of scalars, with one wait for each device they are on."""
    values: list[float] = [0.0] * len(scalars)
    places: dict[torch.device, list[int]] = defaultdict(list)
    for i, t in enumerate(scalars):
        places[t.device].append(i)
    for at in places.values():
        for i, value in zip(at, torch.stack([scalars[i].double() for i in at]).tolist(), strict=True):
            values[i] = value
    return values


def _numbers(tensors: Mapping[Any, Tensor]) -> dict[Any, float]:
    return dict(zip(tensors, _list(list(tensors.values())), strict=True))
