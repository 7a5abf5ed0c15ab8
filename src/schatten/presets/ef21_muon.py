"""EF21-Muon: workers send compressed changes of their momentum, the server compressed changes of the weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from schatten.batching import batches
from schatten.compressors import Compressor, Identity, TopK, message_bytes
from schatten.finite import finite_gradient
from schatten.layout import pieces
from schatten.maps import Nuclear
from schatten.optimizer import SpectralOptimizer
from schatten.retractions import Retraction, ServerCompression, named
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import ErrorFeedback
from schatten.solvers import Solver, polynomial
from schatten.state import wide

# What ranks must have in common before the first step, and what to do if they do not.
COMMON = {
    "parameters": "build the same model on every rank and pass its parameters in one order",
    "batches": "give every rank the same number of threads (torch.set_num_threads) and the same max_batch_bytes",
    "weights": "build the model from one seed on every rank, or broadcast rank 0's weights",
}


class EF21Muon(SpectralOptimizer):
    r"""EF21-Muon (Gruntkowska et al., arXiv 2510.00643): Muon with compressed messages and error feedback both ways.

        M_j <- beta M_j + (1 - beta) G_j,   R_j = C(M_j - E_j),   E_j <- E_j + R_j,   S <- S + mean of R_j
        X <- (1 - lr lambda) X - lr c msign(S),   W <- W + C_s(X - W)

    Worker j has a loss of its own, whose gradient at W is G_j, and sends R_j to the server, which sends C_s(X - W) back. With
    `Identity` both ways and one worker this is Muon without Nesterov, bit for bit; under decay Muon's constraint
    ||X||_op <= c / lambda is that of X, which W follows.

    Several workers in one process:

        for j in range(opt.workers):
            with opt.worker(j):
                loss(j).backward()
        opt.step()

    Under torch.distributed every rank is one worker, with gradients of its own: DistributedDataParallel and FSDP, which average
    them, are refused. Messages are gathered on all ranks and each takes the server's step, bit for bit the same on equal
    hardware; so C_s is computed as a server would, but nothing is sent for it. A parameter that is without gradient on some
    ranks counts as zero there; one whose gradient is not finite on some is skipped on all. `step` replaces `p.grad` where
    ranks have to agree; it is never written to.

    Parameters of AdamW groups get the mean gradient, uncompressed. A group may have a compressor of its own, in a rule:
    `{"params": ..., "rule": Rule(ErrorFeedback(RankK(8)), ...)}`.

    Differences from the paper: estimates start at zero instead of at a first gradient, and decay is added. Its official code
    was not compared.

    Args:
        params: a module, or matrices.
        lr: learning rate, with the default scale in AdamW's units; the paper's radius t is lr c.
        weight_decay: decoupled decay lambda.
        momentum: beta.
        compressor: C, of `schatten.compressors`; default `TopK(0.1)`.
        server_compressor: C_s; default `Identity()`, no compression.
        workers: how many are simulated in this process.
        group: the torch.distributed process group whose ranks are the workers; default all ranks of a job of several.
        scale, solver, decay: see `Muon`.
        options: of `SpectralOptimizer`.

    State per matrix: two tensors, with C_s three; a rank one more, N workers in one process 3 N instead of two. With
    `Identity()` for C one, N ranks one each, N workers in one process 2 N. The state of a rank is its own: save one checkpoint
    per rank. Another rank's, or one of another number of workers, is refused.

    Raises ValueError or TypeError for what it cannot use, RuntimeError in a step that lacks a worker's gradients or whose
    ranks have different models; no weight has changed then.

    Example:
        >>> import torch, schatten
        >>> W = torch.nn.Parameter(torch.zeros(8, 8))
        >>> opt = schatten.EF21Muon([W], lr=0.1, compressor=schatten.compressors.TopK(0.1), workers=2)
        >>> for worker, target in enumerate((torch.eye(8), -3 * torch.eye(8))):
        ...     with opt.worker(worker):
        ...         (W - target).square().sum().backward()
        >>> opt.step()
        >>> metrics = opt.metrics()
        >>> metrics["bytes_to_server"], metrics["bytes_dense"]
        (84, 512)
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        *,
        compressor: Compressor | None = None,
        server_compressor: Compressor | None = None,
        workers: int = 1,
        group: Any = None,
        scale: str = "adamw-rms",
        solver: Solver | None = None,
        decay: str | Retraction = "explicit",
        **options: Any,
    ) -> None:
        if isinstance(params, DistributedDataParallel):
            raise TypeError(
                "Each rank is a worker of EF21Muon with gradients of its own, which DistributedDataParallel averages before "
                "they could be compressed: pass the module itself, and do not wrap it."
            )
        if options.get("placement") not in (None, "local"):
            raise ValueError(
                f"placement={options['placement']!r} shares the work of one step, but each rank is a worker of EF21Muon with "
                f"signals of its own and takes the whole step on their mean: leave placement out."
            )
        size, rank = _place(group)
        if rank is not None and workers != 1:
            raise ValueError(
                f"workers are simulated in one process, but this is one of {size} ranks and each is a worker, got "
                f"workers={workers!r}: leave it at 1, or pass a group of this process alone."
            )
        signal = ErrorFeedback(TopK(0.1) if compressor is None else compressor, workers if rank is None else size, rank, group)
        retraction = named(decay)
        if server_compressor not in (None, Identity()):
            retraction = ServerCompression(retraction, server_compressor)
        rule = Rule(signal, Nuclear(polynomial() if solver is None else solver), Scale(scale), retraction)
        # Gradients by worker, until the step that takes them.
        self._delivered: dict[int, dict[Tensor, Tensor]] = {}
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, momentum=momentum, **options)

    # How many parameters were compared between ranks.
    _compared = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_delivered": self._delivered}

    @property
    def _feedback(self) -> ErrorFeedback:
        return self.defaults["rule"].signal

    @property
    def workers(self) -> int:
        """How many workers there are, in this process or as ranks."""
        return self._feedback.workers

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _has_feedback(self, group: Mapping[str, Any]) -> bool:
        return group["algorithm"] == "spectral" and isinstance(self.rule(group).signal, ErrorFeedback)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `SpectralOptimizer`'s; a rule of the group's own with an `ErrorFeedback` gets this optimizer's workers."""
        rule = param_group.get("rule") if isinstance(param_group, dict) else None
        if isinstance(rule, Rule) and isinstance(rule.signal, ErrorFeedback):
            signal = replace(self._feedback, compressor=rule.signal.compressor)
            param_group = {**param_group, "rule": replace(rule, signal=signal)}
        super().add_param_group(param_group)

    def _fresh_state(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        if isinstance(p, DTensor):
            raise TypeError(
                f"A worker of EF21Muon compresses gradients of its own of whole matrices, but a parameter of shape "
                f"{tuple(p.shape)} lies on several ranks ({', '.join(map(str, p.placements))}): give every rank the whole "
                f"model, or take schatten.Muon, which steps sharded ones."
            )
        return super()._fresh_state(p, group)

    # -- several workers in this process -------------------------------------------------------------------------------

    @contextmanager
    def worker(self, index: int) -> Iterator[None]:
        """Gradients computed inside, from none on, are those of worker `index`; those from before are put back at the end.

        The step that follows the last worker replaces every `p.grad` by the mean over workers, in which no gradient counts as
        zero. A second time for one worker replaces the first. One worker's own gradients become `p.grad` at the end.
        """
        feedback = self._feedback
        here = range(feedback.workers) if feedback.rank is None else [feedback.rank]
        if index not in here:
            raise ValueError(f"The workers of this process are {list(here)}, got {index!r}.")
        params = self._params()
        kept = [p.grad for p in params]
        for p in params:
            p.grad = None
        try:
            yield
            self._refuse_unusable_gradients()
            own = {p: p.grad for p in params if p.grad is not None}
            if feedback.simulated:
                self._delivered[index] = own
            else:
                kept = [own.get(p) for p in params]
        finally:
            for p, grad in zip(params, kept, strict=True):
                p.grad = grad

    def evaluate(self, closure: Callable[[], Any] | None) -> Any:
        """Call `closure` if there is one; then take over the workers' gradients, or agree with the other ranks."""
        if self._feedback.simulated:
            self._take_over(closure)
            return None
        loss = super().evaluate(closure)
        if self._feedback.rank is not None:
            self._refuse_unusable_gradients()
            self._compare_ranks()
            self._agree()
        return loss

    def _take_over(self, closure: Callable[[], Any] | None) -> None:
        N = self.workers
        how = "take each worker's gradients in `with opt.worker(j): loss_j.backward()`. No weight was changed."
        if closure is not None:
            raise RuntimeError(f"A closure evaluates one loss, but there are {N} workers with one each: {how}")
        if missing := [j for j in range(N) if j not in self._delivered]:
            raise RuntimeError(f"A step needs the gradients of all {N} workers, those of {missing} are missing: {how}")
        delivered = [self._delivered[j] for j in range(N)]
        self._delivered = {}
        for group in self.param_groups:
            for index, p in enumerate(group["params"]):
                gradients = [own.get(p) for own in delivered]
                shares = [g.to(wide(p.dtype)) / N for g in gradients if g is not None]
                p.grad = sum(shares[1:], shares[0]).to(p.dtype) if shares else None
                if shares and self._has_feedback(group):
                    for m in self._members(index, p, group):
                        kept = m.place("worker_gradients").view(m.piece.blocks[0], N, *m.piece.blocks[1:])
                        for j, g in enumerate(gradients):
                            kept[:, j] = 0 if g is None else m.piece.of(-g if group["maximize"] else g)
                        # A step with one that is not finite is skipped; nothing of it may stay.
                        kept.nan_to_num_(0.0, 0.0, 0.0)

    # -- ranks ---------------------------------------------------------------------------------------------------------

    def _compare_ranks(self) -> None:
        """Before the first step: ranks with different models would wait for each other, or train apart unseen."""
        params = self._params()
        if self._compared == len(params):
            return
        own = {
            "parameters": [(tuple(p.shape), str(p.dtype)) for p in params],
            "batches": [
                [(m.number, m.suffix) for m in batch]
                for group in self.param_groups
                if group["algorithm"] == "spectral"
                for batch in batches(
                    [m for i, p in enumerate(group["params"]) for m in self._members(i, p, group)], self.max_batch_bytes
                )
            ],
            "weights": [repr(float(p.sum(dtype=torch.float64))) for p in params],
        }
        ranks: list[Any] = [None] * self.workers
        dist.all_gather_object(ranks, own, group=self._feedback.process_group)
        for what, way_out in COMMON.items():
            if other := [j for j, theirs in enumerate(ranks) if theirs[what] != ranks[0][what]]:
                raise RuntimeError(f"Ranks {other} have other {what} than rank 0: {way_out}. No weight was changed.")
        self._compared = len(params)

    def _agree(self) -> None:
        """Gradients of the same parameters on every rank, nan where one is not finite, and the mean where none is sent."""
        params, process_group = self._params(), self._feedback.process_group
        device = params[0].device
        absent = torch.tensor([p.grad is None for p in params], device=device)
        fine = torch.ones((), dtype=torch.bool, device=device)
        finite = torch.stack([fine if p.grad is None else finite_gradient(p).to(device) for p in params])
        flags = torch.stack([absent, finite]).to(torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MIN, group=process_group)
        # The one place where a step waits for its device: what has a gradient is the host's affair.
        for p, absent_everywhere, finite_everywhere in zip(params, *flags.tolist(), strict=True):
            if not finite_everywhere:
                p.grad = torch.full_like(p, torch.nan)
            elif p.grad is None and not absent_everywhere:
                p.grad = torch.zeros_like(p)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and not self._has_feedback(group):
                    mean = (p.grad.to(wide(p.dtype)) / self.workers).contiguous()
                    dist.all_reduce(mean, group=process_group)
                    p.grad = mean.to(p.dtype)

    # -- what can be seen ----------------------------------------------------------------------------------------------

    def metrics(self, every: int | None = None) -> dict[str, Any] | None:
        """Those of `SpectralOptimizer`, and the bytes of all messages so far, of all workers and all parameters.

        `bytes_to_server`, `bytes_to_workers` and, to compare either with, `bytes_dense`: those of fp32 gradients.
        """
        found = super().metrics(every)
        if found is None:
            return None
        to_server = to_workers = dense = 0
        for group in self.param_groups:
            up, down = self._compressors(group)
            for p in group["params"]:
                messages = self.workers * int(self.state[p]["step"])
                if messages == 0:
                    continue
                for piece in pieces(group["layout"] if group["algorithm"] == "spectral" else "flat", p.shape):
                    count, *matrix = piece.blocks
                    to_server += messages * count * _bytes(up, *matrix, wide(p.dtype))
                    to_workers += messages * count * _bytes(down, *matrix, wide(p.dtype))
                dense += messages * 4 * p.numel()
        return {**found, "bytes_to_server": to_server, "bytes_to_workers": to_workers, "bytes_dense": dense}

    def _compressors(self, group: Mapping[str, Any]) -> tuple[Compressor, Compressor]:
        rule = self.rule(group)
        up = rule.signal.compressor if isinstance(rule.signal, ErrorFeedback) else Identity()
        return up, rule.retraction.compressor if isinstance(rule.retraction, ServerCompression) else Identity()


def _place(process_group: Any) -> tuple[int, int | None]:
    """The number of ranks in a process group, or by default in the job, and this one's; None for a process alone."""
    if not dist.is_available() or not dist.is_initialized():
        return 1, None
    size, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
    if rank < 0:
        raise ValueError("This process is not in `group`: make the optimizer on the ranks of the group only.")
    return size, rank if size > 1 else None


@lru_cache(maxsize=256)
def _bytes(compressor: Compressor, m: int, n: int, dtype: torch.dtype) -> int:
    if compressor == Identity():
        return m * n * dtype.itemsize
    return message_bytes(compressor.encode(torch.zeros(m, n, dtype=dtype), seed=0))
