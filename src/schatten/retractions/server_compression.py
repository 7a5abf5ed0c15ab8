"""EF21's retraction: the server steps, and the weight follows by compressed messages."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from schatten.compressors import SERVER, Compressor, Identity, check_compressor, noise_seed
from schatten.retractions.core import Retraction, State
from schatten.retractions.decoupled_decay import DecoupledDecay


@dataclass(frozen=True)
class ServerCompression:
    """The server's X takes the step of `inner`; what reaches the weight W, on which gradients are taken, is compressed.

        X <- inner(X, D),   W <- W + C(X - W)

    State: X - W, which starts at zero, so that weights may be loaded after construction, and that of `inner`.

    Raises TypeError for what is no compressor.

    Example:
        >>> import torch, schatten
        >>> from schatten.compressors import TopK
        >>> from schatten.retractions import ServerCompression
        >>> step = ServerCompression(schatten.retractions.DecoupledDecay(), TopK(0.5))
        >>> W, D, group = torch.zeros(1, 2), torch.tensor([[4.0, 3.0]]), {"lr": 1.0, "weight_decay": 0.0, "step": 1}
        >>> W, state = step(W, D, 1.0, step.init(W), group)
        >>> W.tolist(), state["server_error"].tolist()
        ([[-4.0, 0.0]], [[0.0, -3.0]])
    """

    inner: Retraction = field(default_factory=DecoupledDecay)
    compressor: Compressor = field(default_factory=Identity)

    hyperparameters: ClassVar[tuple[str, ...]] = ()
    elementwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_compressor("server_compressor", self.compressor)
        object.__setattr__(self, "hyperparameters", self.inner.hyperparameters)

    def init(self, W: Tensor) -> dict[str, Tensor]:
        return {"server_error": torch.zeros_like(W), **self.inner.init(W)}

    def __call__(
        self, W: Tensor, D: Tensor, length: float | Tensor, state: State, group: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        X, new = self.inner(W + state["server_error"], D, length, state, group)
        message = self.compressor.encode(X - W, noise_seed(group["step"], SERVER))
        W = W + self.compressor.decode(message, W.shape, W.dtype)
        return W, {**new, "server_error": X - W}
