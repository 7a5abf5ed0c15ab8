"""EF21's signal: the momentum of several workers as the server knows it from compressed messages."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from schatten.compressors import SERVER, Compressor, Identity, Message, TopK, check_compressor, noise_seed
from schatten.signals.core import State


@dataclass(frozen=True)
class ErrorFeedback:
    """The server's estimate of the workers' mean momentum, built from compressed messages; beta = group["momentum"].

        M_j <- beta M_j + (1 - beta) G_j,   R_j = C(M_j - E_j),   E_j <- E_j + R_j,   S <- S + mean of R_j

    Worker j sends R_j, so E_j is what the server knows of M_j and S the mean of all E_j. What C has left out stays in
    M_j - E_j and is sent later, so E_j tends to M_j where that comes to rest. All start at zero. A rank adds S up over steps,
    as it does not have the E_j of others, and the rounding errors of a gradient 1e7 times the usual one stay in it (fp32).

    `rank` is the worker that this process is; the messages of the others come through `process_group` (None is the default
    group), and each rank adds them in the same order. Without a rank all workers are here, and the gradients of more than
    one are read from state["worker_gradients"], (parameters, blocks, workers, fan_out, fan_in), instead of G.

    State: M_j and E_j; of a rank also S, of several workers here also their gradients. `Identity` needs no E_j and no S.

    Raises TypeError for what is no compressor, ValueError for a number of workers that is no whole number >= 1.

    Example:
        >>> import torch
        >>> from schatten.compressors import TopK
        >>> from schatten.signals import ErrorFeedback
        >>> signal = ErrorFeedback(TopK(0.5))
        >>> G = torch.tensor([[[[4.0, 3.0]]]])
        >>> state = {key: value.unsqueeze(0) for key, value in signal.init(G[0]).items()}
        >>> for step in (1, 2):
        ...     S, state = signal(G, state, {"momentum": 0.0, "step": step})
        ...     print(S.flatten().tolist())
        [4.0, 0.0]
        [4.0, 3.0]
    """

    compressor: Compressor = field(default_factory=lambda: TopK(0.1))
    workers: int = 1
    rank: int | None = None
    process_group: Any = field(default=None, repr=False, compare=False)

    hyperparameters: ClassVar[tuple[str, ...]] = ("momentum",)
    elementwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_compressor("compressor", self.compressor)
        if isinstance(self.workers, bool) or not isinstance(self.workers, int) or not 1 <= self.workers < SERVER:
            raise ValueError(f"workers must be a whole number >= 1, got {self.workers!r}.")

    def __deepcopy__(self, memo: dict[int, Any]) -> "ErrorFeedback":
        # A process group cannot be copied.
        return self

    @property
    def simulated(self) -> bool:
        """Whether several workers are in this process."""
        return self.rank is None and self.workers > 1

    @property
    def fed_by(self) -> str | None:
        return "EF21Muon" if self.simulated or self.rank is not None else None

    def init(self, W: Tensor) -> dict[str, Tensor]:
        own = (W.shape[0], self.workers, *W.shape[1:]) if self.simulated else W.shape
        shapes = {"momentum_buffer": own}
        if self.simulated:
            shapes["worker_gradients"] = own
        if self.compressor != Identity():
            shapes["estimate"] = own
            if self.rank is not None:
                shapes["server_estimate"] = W.shape
        return {key: W.new_zeros(shape) for key, shape in shapes.items()}

    def __call__(self, G: Tensor, state: State, group: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        G = state["worker_gradients"] if self.simulated else G
        M = torch.lerp(state["momentum_buffer"], G, 1 - group["momentum"])
        if self.compressor == Identity():
            return self._exchanged(M, group["step"])[0], {"momentum_buffer": M}
        estimate = state["estimate"]
        mean, own = self._exchanged(M - estimate, group["step"])
        new = {"momentum_buffer": M, "estimate": estimate + own}
        if self.rank is not None:
            S = new["server_estimate"] = state["server_estimate"] + mean
        else:
            # Not added up over steps: that would keep the rounding errors of large gradients for ever.
            S = new["estimate"].mean(2) if self.simulated else new["estimate"]
        return S, new

    def _exchanged(self, X: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The mean over all workers of C(X), and C(X) of the workers that are here."""
        shape = X[:, :, 0].shape if self.simulated else X.shape
        total, own = None, []
        for j, message in enumerate(self._messages(X, step)):
            received = self.compressor.decode(message, shape, X.dtype)
            total = received if total is None else total + received
            if self.rank in (None, j):
                own.append(received)
        assert total is not None
        return total / self.workers, torch.stack(own, 2) if self.simulated else own[0]

    def _messages(self, X: Tensor, step: int) -> Iterable[Message]:
        """Every worker's message, in order."""
        if self.rank is None:
            here = X.unbind(2) if self.simulated else [X]
            return (self.compressor.encode(x, noise_seed(step, j)) for j, x in enumerate(here))
        gathered = []
        for sent in self.compressor.encode(X, noise_seed(step, self.rank)):
            received = [torch.empty_like(sent) for _ in range(self.workers)]
            dist.all_gather(received, sent, group=self.process_group)
            gathered.append(received)
        return zip(*gathered, strict=True)
