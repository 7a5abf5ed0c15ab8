"""Measurement: one step's numbers. What can be known before the step is found there, and what the step does after it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from schatten.diagnostics.core import Block, Quantity, Whole
from schatten.diagnostics.hessian import Hessian
from schatten.diagnostics.undisturbed import devices_of, undisturbed
from schatten.monitor.reading import Kept, Place, blocks, gradient_of, kept, named, places, with_gradients
from schatten.monitor.values import Found
from schatten.optimizer import SpectralOptimizer

Loss = Callable[[], Tensor]

# The name of a record of all parameters together.
MODEL = "model"


class Measurement:
    """What quantities find in one step of an optimizer, as tensors on the devices.

    Weights, gradients and momentum are those that the step starts from. Where it evaluates a closure its gradients come to be
    within it: quantities of gradients wait till after the step and read copies of weights and momentum made before; those of
    the Hessian too take the gradient of the same loss.
    """

    def __init__(
        self,
        opt: SpectralOptimizer,
        quantities: Sequence[Quantity],
        model: nn.Module | None,
        losses: Sequence[Loss],
        closure: bool,
    ) -> None:
        self.opt, self.model, self.losses = opt, model, losses
        self.found: list[Found] = []
        self.without_gradient = False
        late = {"update", "gradient"} if closure else {"update"}
        self._late = [q for q in quantities if q.needs & late and "hessian" not in q.needs]
        early = [q for q in quantities if q not in self._late]
        self._scale: Tensor | None = getattr(opt, "grad_scale", None)
        self._places = places(opt)
        self._devices = devices_of(p for _, p, _ in named(opt))
        self._kept: dict[int, Kept] = {}
        with self._aside():
            self._measure(early, graded=not closure)
            momentum = any("momentum" in q.needs for q in self._late)
            for place in self._places if self._late else ():
                self._kept[place.number] = kept(place, opt.state[place.p], momentum)

    def finish(self) -> list[Found]:
        """What the step has done, and everything found."""
        if self._late:
            with self._aside():
                # A step that overlaps with the next forward is not on the weights yet.
                self.opt._ranks.settle()
                self._measure(self._late, graded=True)
            self._kept.clear()
        return self.found

    def _measure(self, quantities: Sequence[Quantity], graded: bool) -> None:
        """Call these; `graded` says whether parameters have the gradients of this step."""
        needs = {need for q in quantities for need in q.needs}
        by_scope = {scope: [q for q in quantities if q.scope == scope] for scope in ("matrix", "model")}
        gradients = with_gradients(self._places) if needs & {"gradient", "update"} and graded else None
        hessian, numbers = self._hessian() if "hessian" in needs else (None, {})
        for place in self._places if by_scope["matrix"] else ():
            for block in self._blocks(place, by_scope["matrix"], gradients, hessian, numbers.get(place.number)):
                for q in by_scope["matrix"]:
                    # A rule may keep no momentum, which quantities know; what else is missing is so in this step alone.
                    if all(getattr(block, need) is not None for need in q.needs - {"losses", "momentum"}):
                        self._add(block.name, q, block, block.weight.shape[0])
        for q in by_scope["model"]:
            read = Lazily(
                lambda place, q=q: self._blocks(place, [q], gradients, hessian, numbers.get(place.number)), self._places
            )
            parameters = {name: p for name, p, _ in named(self.opt) if p.requires_grad}
            with torch.enable_grad():
                self._add(MODEL, q, Whole(parameters, read, self.losses), None)
        spectral = bool(self._places) and any(q.scope == "matrix" and q.needs & {"gradient", "update"} for q in quantities)
        self.without_gradient |= spectral and gradients is not None and not gradients

    def _add(self, name: str, quantity: Quantity, of: Any, blocks: int | None) -> None:
        if columns := _called(quantity, of):
            self.found.append(Found(name, quantity.name, columns, blocks))

    def _blocks(
        self,
        place: Place,
        quantities: Iterable[Quantity],
        gradients: set[int] | None,
        hessian: Hessian | None,
        index: int | None,
    ) -> Iterator[Block]:
        needs = {need for q in quantities for need in q.needs}
        moved, G = gradients is not None and place.number in gradients, None
        if "gradient" in needs and moved:
            G = gradient_of(place, self._scale)
        elif "gradient" in needs and gradients is None and hessian is not None and index is not None:
            G = hessian.gradient[index]
        yield from blocks(
            place,
            needs - (set() if moved else {"update"}),
            self.opt.state[place.p],
            gradient=G,
            before=self._kept.get(place.number),
            hessian=hessian,
            index=index,
        )

    def _hessian(self) -> tuple[Hessian, dict[int, int]]:
        """The Hessian in the spectral parameters, and which of its parameters each number is."""
        trained = [place for place in self._places if place.p.requires_grad]
        hessian = Hessian(self.losses, [place.p for place in trained], model=self.model)
        return hessian, {place.number: i for i, place in enumerate(trained)}

    @contextmanager
    def _aside(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind in {device.type for device in self._devices}:
                stack.enter_context(torch.autocast(kind, enabled=False))
            stack.enter_context(undisturbed(self.model, self._devices))
            stack.enter_context(torch.no_grad())
            yield


class Lazily(Sequence[Block]):
    """The blocks of all places, made while they are asked for: of parameters that ranks divide only one is whole at a time."""

    def __init__(self, make: Callable[[Place], Iterator[Block]], all_places: Sequence[Place]) -> None:
        self._make, self._places = make, all_places

    def __iter__(self) -> Iterator[Block]:
        return (block for place in self._places for block in self._make(place))

    def __len__(self) -> int:
        return sum(len(place.pieces) for place in self._places)

    def __getitem__(self, i: Any) -> Any:
        return list(self)[i]


def _called(quantity: Quantity, of: Any) -> Mapping[str, Tensor]:
    try:
        return quantity(of)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        # No factorisation of what is not finite: the optimizer skips such a gradient, and a look at it must not end the run.
        return {column: torch.tensor(torch.nan) for column in quantity.columns}


def refuse(opt: SpectralOptimizer, quantities: Sequence[Quantity], model: nn.Module | None, losses: Sequence[Loss]) -> None:
    """Raise for quantities that cannot be measured here."""
    if losses and model is None:
        raise ValueError("loss evaluates a model, whose buffers must stay as they are: pass that as model=, too.")
    for q in quantities:
        if q.needs & {"hessian", "losses"} and not losses:
            raise ValueError(
                f"{q.name} evaluates the loss: pass loss=, a function without arguments that returns the loss of a batch, or a "
                f"list of them for several micro-batches, and model=."
            )
        if q.needs >= {"hessian", "update"}:
            raise ValueError(f"{q.name} needs the Hessian before a step and the update after it, which are not there together.")
        check: Callable[[Whole], None] | None = getattr(q, "check", None)
        if check is not None:
            check(Whole({name: p for name, p, _ in named(opt) if p.requires_grad}, (), losses))
        divided = next((name for name, p, _ in named(opt) if isinstance(p, DTensor)), None)
        if "hessian" in q.needs and divided is not None:
            raise TypeError(
                f"{q.name} needs products with the Hessian, but {divided} is a DTensor (FSDP2, tensor parallel), whose "
                f"gathering has no second derivative: measure it on a copy of the model on one process."
            )
