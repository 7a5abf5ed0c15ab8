"""Products with the Hessian of a loss, by differentiating its gradient once more (Pearlmutter 1994)."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from schatten.diagnostics.undisturbed import Generators, devices_of, undisturbed

Loss = Callable[[], Tensor]


class Hessian:
    """The Hessian H of a loss in some parameters, as products H v; the mean over losses, and over ranks under DDP.

    Args:
        loss: evaluates the model on a fixed batch and returns the loss, without `backward`; or several of micro-batches, whose
            mean is meant. Its own autocast, accumulation and reduction are the caller's.
        params: the parameters, in the order of vectors.
        model: the module whose buffers must stay as they are. A DistributedDataParallel module makes gradient and products the
            mean over its ranks, all of which must ask for the same ones.

    Every evaluation draws the random numbers of the first, so dropout is one fixed function whatever is drawn between. The
    graph of a single loss is kept until this object is dropped: making it costs about two gradients, a product about two
    more. Of several losses each product makes the graphs anew, one at a time. `products` counts them. Products have the
    parameters' dtype, so half-precision parameters have Hessians of that precision.

    Kernels of one's own may have no second derivative and yet raise nothing: `mistake` finds them.

    It belongs to the weights it was made at: drop it before they change. Autograd notices most changes, but not those of
    torch's fused optimizers, after which products would be of both.

    Raises TypeError for a loss that is no callable, for DTensors (FSDP2, tensor parallel), whose gathering has no second
    derivative; ValueError for parameters without `requires_grad`, a loss that does not depend on the parameters, and one with
    reentrant checkpoints.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.hessian import Hessian
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> H = Hessian(lambda: (w**3).sum(), [w])
        >>> H.gradient[0], H([torch.ones(2)])[0]
        (tensor([ 3., 12.]), tensor([ 6., 12.]))
    """

    def __init__(self, loss: Loss | Sequence[Loss], params: Sequence[Tensor], *, model: nn.Module | None = None) -> None:
        self._losses = [loss] if callable(loss) else list(loss) if isinstance(loss, Sequence) else []
        if not self._losses or not all(callable(one) for one in self._losses):
            raise TypeError(f"loss must be a function without arguments that returns the loss, or several, got {loss!r}.")
        self.params, self._model = list(params), model
        check_differentiable(self.params)
        self._group = model.process_group if isinstance(model, DistributedDataParallel) else None
        self._devices = devices_of(self.params)
        self._generators = Generators(self._devices)
        self.products = 0
        self.loss, sums, slopes = self._gradient()
        self.gradient = tuple(sums)
        self._kept = slopes if len(self._losses) == 1 else None

    def __call__(self, vectors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """H v, in the shapes of the parameters, over all of them together."""
        return self._product(range(len(self.params)), vectors)

    def within(self, i: int, vector: Tensor) -> Tensor:
        """H_ii v, of parameter number i alone: its diagonal block times a tensor of its shape."""
        return self._product([i], [vector])[0]

    def mistake(self, seed: int = 0) -> Tensor:
        """||H v - d|| / ||d||, d the difference of gradients at w + h v and w - h v over 2 h, for a Gaussian v.

        Of the order of 1 it says that part of the second derivative is missing, or that the loss is not smooth: the gradients
        of a ReLU network jump, and d is of its jumps. h ||v|| is 1e-3 ||w||, so that rounding in fp32 leaves some 1e-3 to
        1e-2; under bf16 autocast it hides the difference. One product and two gradients.
        """
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(p.shape, generator=generator).to(p) for p in self.params]
        size = (_inner(self.params, self.params) / _inner(drawn, drawn)).sqrt()
        v = [one * (1e-3 * size).to(one) for one in drawn]
        # Other tensors take the weights' place: written to, weights would look changed to a graph that has saved them.
        before = [p.data for p in self.params]
        sides = []
        for sign in (1, -1):
            try:
                for p, w, one in zip(self.params, before, v, strict=True):
                    p.data = w + sign * one
                sides.append(self._gradient()[1])
            finally:
                for p, w in zip(self.params, before, strict=True):
                    p.data = w
        d = [(a.double() - b.double()) / 2 for a, b in zip(*sides, strict=True)]
        off = [found.double() - right for found, right in zip(self(v), d, strict=True)]
        return (_inner(off, off) / _inner(d, d)).sqrt()

    def _gradient(self) -> tuple[Tensor, list[Tensor], tuple[Tensor, ...]]:
        """The mean of losses, that of their gradients, and the gradient of the last with its graph."""
        sums, values, slopes = [torch.zeros_like(p, requires_grad=False) for p in self.params], [], ()
        for one in self._losses:
            value, slopes = self._slopes(one)
            values.append(value.detach())
            for total, slope in zip(sums, slopes, strict=True):
                total.add_(slope.detach(), alpha=1 / len(self._losses))
        loss = torch.stack(values).mean()
        self._mean_([*sums, loss])
        return loss, sums, slopes

    def _slopes(self, loss: Loss) -> tuple[Tensor, tuple[Tensor, ...]]:
        with undisturbed(self._model, self._devices, self._generators), torch.enable_grad():
            value = loss()
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise TypeError(f"loss must return a tensor with one element, got {getattr(value, 'shape', value)!r}.")
            if not value.requires_grad:
                raise ValueError("The loss does not depend on the parameters: evaluate it with gradients, not under no_grad.")
            if _recomputes_in_hiding(value):
                raise ValueError(
                    "The loss checkpoints activations with use_reentrant=True, which hides the parameters inside from "
                    "torch.autograd.grad: checkpoint with use_reentrant=False, or not at all while measuring."
                )
            slopes = torch.autograd.grad(value.reshape(()), self.params, create_graph=True, materialize_grads=True)
            return value.reshape(()), slopes

    def _product(self, numbers: Sequence[int], vectors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        params = [self.params[i] for i in numbers]
        sums = [torch.zeros_like(p, requires_grad=False) for p in params]
        for one in self._losses:
            slopes = self._kept if self._kept is not None else self._slopes(one)[1]
            # Where a loss is linear in a parameter, its slope has no graph and the product is 0.
            pairs = [(slopes[i], v.to(slopes[i])) for i, v in zip(numbers, vectors, strict=True) if slopes[i].requires_grad]
            if not pairs:
                continue
            outputs, weights = zip(*pairs, strict=True)
            with undisturbed(self._model, self._devices):
                found = torch.autograd.grad(
                    outputs, params, weights, retain_graph=self._kept is not None, materialize_grads=True
                )
            for total, part in zip(sums, found, strict=True):
                total.add_(part, alpha=1 / len(self._losses))
        self._mean_(sums)
        self.products += 1
        return tuple(sums)

    def _mean_(self, tensors: Sequence[Tensor]) -> None:
        if self._group is not None and dist.get_world_size(self._group) > 1:
            for t in tensors:
                dist.all_reduce(t, group=self._group)
                t.div_(dist.get_world_size(self._group))


def _recomputes_in_hiding(value: Tensor) -> bool:
    """Whether the graph has a reentrant checkpoint, inside which autograd.grad takes parameters for constants."""
    nodes, seen = [value.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        nodes.extend(before for before, _ in node.next_functions)
    return False


def check_differentiable(params: Sequence[Tensor]) -> None:
    """Raise TypeError for DTensors and ValueError for parameters that are not trained: a loss has no Hessian in them."""
    for p in params:
        if isinstance(p, DTensor):
            raise TypeError(
                f"Hessian products need whole parameters, but one of shape {tuple(p.shape)} is a DTensor (FSDP2, tensor "
                f"parallel), whose gathering has no second derivative: measure on a copy of the model on one process."
            )
        if not p.requires_grad:
            raise ValueError(f"A parameter of shape {tuple(p.shape)} has requires_grad=False: the loss has no Hessian there.")


def _inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(s.double() * t.double()).sum() for s, t in zip(a, b, strict=True)]).sum()
