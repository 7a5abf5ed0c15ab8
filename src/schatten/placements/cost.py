"""What a rule costs on one matrix, counted by running it once on a tensor without data.

The operations of a rule depend on shapes alone, so its slots run on the meta device, where every kernel is seen and none is
computed: a new map, signal or solver is counted without a formula of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from schatten.functions import with_dtype
from schatten.placements.machine import Machine, Operation
from schatten.rule import Rule

aten = torch.ops.aten


class Work(NamedTuple):
    """What each slot of a rule does on one matrix; the scale's share is the direction's."""

    signal: tuple[Operation, ...]
    direction: tuple[Operation, ...]
    retraction: tuple[Operation, ...]

    @property
    def operations(self) -> tuple[Operation, ...]:
        return self.signal + self.direction + self.retraction

    @property
    def flops(self) -> float:
        return sum(operation.flops for operation in self.operations)

    @property
    def bytes(self) -> float:
        """What is read and written by all operations."""
        return sum(operation.bytes for operation in self.operations)


def block_flops(rule: Rule, fan_out: int, fan_in: int, dtype: str = "float32") -> float:
    """Floating point operations (2 for a multiply-add) of one step of a fan_out x fan_in matrix in products and factorisations.

    Work on entries counts as nothing here, so a rule without products costs 0; its time is in `work`. `dtype` is the precision
    of products that the rule leaves open.

    Example:
        >>> import schatten
        >>> from schatten.placements.cost import block_flops
        >>> rule = schatten.Rule(map=schatten.maps.Nuclear(schatten.solvers.newton_schulz(dtype="float32")))
        >>> block_flops(rule, 16, 16) == 2 * 5 * 3 * 16**3  # five steps of three products
        True
    """
    return work(rule, fan_out, fan_in, dtype).flops


@lru_cache(maxsize=4096)
def work(rule: Rule, fan_out: int, fan_in: int, dtype: str = "float32") -> Work:
    """The operations of one step of a matrix in fp32, past a parameter's first; products the rule leaves open are in `dtype`.

    A slot that looks at values cannot run without them: the rule then counts as Muon's.

    Example:
        >>> import schatten
        >>> from schatten.placements.cost import work
        >>> counted = work(schatten.Rule(), 64, 32)
        >>> sum(op.flops for op in counted.signal), len(counted.signal) > 0
        (0.0, True)
    """
    try:
        return _counted(with_dtype(rule, dtype), fan_out, fan_in)
    except (RuntimeError, TypeError):
        return _counted(with_dtype(Rule(), dtype), fan_out, fan_in)


def replicate(
    operations: Sequence[Operation], blocks: int, size: float, ranks: int, machine: Machine, *, bucket: int | None = None
) -> bool:
    """Whether replicas are faster if each computes all directions than if they share the work and exchange the results.

    `operations` for each of `blocks` equal matrices, whose direction takes `size` bytes to send. Shared, a rank computes
    blocks / ranks of them, rounded up, and sends each to every other rank, in collectives of `bucket` blocks, default all.

    Example:
        >>> import schatten
        >>> from schatten.placements.cost import replicate, work
        >>> from schatten.placements.machine import MACHINES
        >>> rule, machine = schatten.Rule(), MACHINES["h100"]
        >>> [replicate(work(rule, n, n).operations, 8, 4 * n * n, ranks=8, machine=machine) for n in (64, 4096)]
        [True, False]
    """
    own = -(-blocks // ranks)
    collectives = -(-blocks // (bucket or blocks))
    exchange = collectives * machine.collective(own / collectives * size * (ranks - 1), ranks)
    # A rank's own go in, and out to every rank; those of all come back.
    pieces = own * (2 + ranks) + blocks
    return machine.seconds(operations, blocks) <= machine.seconds(operations, own) + exchange + pieces * machine.host


def _counted(rule: Rule, fan_out: int, fan_in: int) -> Work:
    W = torch.empty(1, 1, fan_out, fan_in, device="meta")
    G, step = torch.empty_like(W), torch.empty(1, 1, 1, 1, device="meta")
    group: dict[str, Any] = {key: 0.5 for key in rule.hyperparameters} | {"lr": 0.5, "weight_decay": 0.5, "step": 2}
    group = {key: (0.5, 0.5) if key == "betas" else value for key, value in group.items()}
    with torch.no_grad():
        state = {key: value.unsqueeze(0) for key, value in rule.init(W[0]).items()} | {"step": step}
        (S, new), signal = seen(lambda: rule.signal(G, state, group))
        state |= new

        def direction() -> tuple[Tensor, Mapping[str, Tensor], float | Tensor]:
            D, new = rule.direction(S, state, group)
            return D, new, group["lr"] * rule.scale(D)

        (D, new, length), directed = seen(direction)
        state |= new
        _, retracted = seen(lambda: rule.retraction(W, D, length, state, group))
    return Work(signal, directed, retracted)


def seen(call: Callable[[], Any]) -> tuple[Any, tuple[Operation, ...]]:
    with _Seen() as seen:
        result = call()
    return result, tuple(seen.operations)


class _Seen(TorchDispatchMode):
    """Every kernel on the meta device; what a solver derives on the host for itself, once, is none of them."""

    def __init__(self) -> None:
        super().__init__()
        # Not at the top: it imports Triton, where that is installed, and with it half a second.
        from torch.utils.flop_counter import flop_registry

        self.registry = flop_registry
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view or func in FREE:
            return out
        written = _memory(out)
        if written:
            size = written + _memory((args, {key: value for key, value in kwargs.items() if key != "out"}))
            packet = func.overloadpacket
            if packet in FACTORISATIONS:
                self.operations.append(Operation(float(FACTORISATIONS[packet](*args, **kwargs)), size, factorisation=True))
            else:
                flops = self.registry[packet](*args, **kwargs, out_val=out) if packet in self.registry else 0
                self.operations.append(Operation(float(flops), size))
        return out


def _memory(tensors: Any) -> int:
    """Bytes of tensors without data; those that share memory, as X and its transpose, count once."""
    meta = [t for t in tree_leaves(tensors) if isinstance(t, Tensor) and t.device.type == "meta"]
    return sum({t.untyped_storage()._cdata: t.numel() * t.element_size() for t in meta}.values())


# Memory without work.
FREE = {aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default, aten._unsafe_view.default}


def _qr(X: Tensor, mode: str = "reduced") -> float:
    """Householder's, with Q formed: Golub and Van Loan, section 5.2, twice 2 n^2 (m - n/3)."""
    batch, m, n = _sizes(X)
    n = min(m, n)
    return batch * 4 * n**2 * (m - n / 3)


def _svd(X: Tensor, full_matrices: bool = False, compute_uv: bool = True, **_: Any) -> float:
    """Golub and Van Loan, figure 8.6.1: R-SVD, 6 m n^2 + 20 n^3 with U and V; singular values alone 2 m n^2 + 2 n^3."""
    batch, m, n = _sizes(X)
    m, n = max(m, n), min(m, n)
    return batch * (6 * m * n**2 + 20 * n**3 if compute_uv else 2 * m * n**2 + 2 * n**3)


def _eigh(X: Tensor, *_: Any, **__: Any) -> float:
    """Golub and Van Loan, section 8.3: 9 n^3 with eigenvectors."""
    batch, n, _same = _sizes(X)
    return batch * 9 * n**3


def _sizes(X: Tensor) -> tuple[int, int, int]:
    m, n = X.shape[-2:]
    return X.numel() // max(1, m * n), m, n


FACTORISATIONS: dict[Any, Callable[..., float]] = {aten.linalg_qr: _qr, aten._linalg_svd: _svd, aten._linalg_eigh: _eigh}
