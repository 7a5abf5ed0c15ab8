"""Twins of Muon and of its solver, each with one mistake of a published library: what the checks of this folder must catch.

`twin(name)` builds the optimizer, `SOLVER_TWINS[name]` is the solver; "none" is the twin without a mistake, on which a check
must pass. Everything is written out in a few lines and exact, by LAPACK; only the mistakes are the libraries'.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OPTIMIZER_MISTAKES = (
    "none",
    "bf16 momentum is normalised in place",
    "bf16 weights are rounded to nearest",
    "state appears with the first gradient",
    "scale from the height and width of the kernel",
    "the signal is written into the gradient",
    "the gradient is dropped",
    "a missing gradient is zero",
    "layers of one shape are one matrix",
    "experts are one matrix",
    "kernels are the matrices",
    "large matrices are cut at 1024",
    "three times as tall is fused QKV",
    "options stay out of the groups",
    "buffers in the groups",
    "momentum is one minus momentum",
    "the scale flag is inverted",
    "decay is added to the gradient",
    "decay is multiplied by the shape factor",
    "noise in every update",
    "vectors take raw momentum",
    "AdamW is NAdam",
    "the learning rate of Keller with the scale of AdamW",
    "groups are flattened",
    "an added group is ignored",
    "steps print",
)


def twin(mistake: str) -> Callable[..., torch.optim.Optimizer]:
    """The constructor `(params, **options)` of a Muon with this mistake."""
    if mistake not in OPTIMIZER_MISTAKES:
        raise ValueError(f"Unknown mistake {mistake!r}.")
    return functools.partial(TwinMuon, mistake=mistake)


class TwinMuon(torch.optim.Optimizer):
    """Muon with exact polar factors, and AdamW where a group says so; its options are named as schatten's."""

    needs_closure = False

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        scale: str = "adamw-rms",
        layout: str = "auto",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        mistake: str = "none",
    ) -> None:
        self.mistake = mistake
        if lr is None:
            lr = 0.02 if mistake == "the learning rate of Keller with the scale of AdamW" else 1e-3
        self.options = dict(momentum=momentum, nesterov=nesterov, scale=scale, layout=layout, betas=betas, eps=eps)
        defaults: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        if mistake == "buffers in the groups":
            defaults["update_buffer"] = torch.zeros(64)
        elif mistake != "options stay out of the groups":
            defaults.update(self.options)
        params = list(params)
        if mistake == "groups are flattened":
            params = [p for group in params for p in (group["params"] if isinstance(group, dict) else [group])]
        super().__init__(params, defaults)
        if mistake != "state appears with the first gradient":
            for group in self.param_groups:
                for p in group["params"]:
                    self._make_state_(p, group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if self.state:
            group = self.param_groups[-1]
            if self.mistake == "an added group is ignored":
                group["ignored"] = True
            for p in group["params"]:
                self._make_state_(p, group)

    def _make_state_(self, p: Tensor, group: dict[str, Any]) -> None:
        keys = ("exp_avg", "exp_avg_sq") if group.get("algorithm") == "adamw" else ("momentum_buffer",)
        dtype = torch.promote_types(p.dtype, torch.float32)
        for key in keys:
            self.state[p][key] = torch.zeros_like(p, dtype=dtype)
        self.state[p]["step"] = torch.zeros(())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        if self.mistake == "steps print":
            print("stepping")
        for stored in self.param_groups:
            group = {**self.options, **stored}
            members = [p for p in group["params"] if self._takes_part(p, group)]
            if group.get("algorithm") == "adamw":
                for p in members:
                    self._vector_step_(p, group)
            else:
                self._matrix_steps_(members, group)
        return loss

    def _takes_part(self, p: Tensor, group: dict[str, Any]) -> bool:
        if p.grad is None and self.mistake == "a missing gradient is zero":
            p.grad = torch.zeros_like(p)
        if p.grad is not None and not self.state[p]:
            self._make_state_(p, group)
        return p.grad is not None and not group.get("ignored")

    def _matrix_steps_(self, members: list[Tensor], group: dict[str, Any]) -> None:
        signals = [self._signal(p, group) for p in members]
        directions = [self._direction(S, group["layout"]) for S in signals]
        if self.mistake == "layers of one shape are one matrix":
            directions = [self._across_layers(S, signals) for S in signals]
        for p, D in zip(members, directions, strict=True):
            self._move_(p, D, self._factor(p, group), group)

    def _signal(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        state, beta = self.state[p], group["momentum"]
        if self.mistake == "momentum is one minus momentum":
            beta = 1 - beta
        M = state["momentum_buffer"]
        assert p.grad is not None
        G = p.grad.to(M.dtype)
        if self.mistake == "decay is added to the gradient":
            G = G + group["weight_decay"] * p
        M.lerp_(G, 1 - beta)
        S = torch.lerp(G, M, beta) if group["nesterov"] else M.clone()
        if self.mistake == "bf16 momentum is normalised in place" and p.dtype == torch.bfloat16 and not group["nesterov"]:
            M.div_(M.norm())
        if self.mistake == "the signal is written into the gradient":
            p.grad.copy_(S)
        if self.mistake == "the gradient is dropped":
            p.grad = None
        return S

    def _direction(self, S: Tensor, layout: str) -> Tensor:
        if S.ndim == 2:
            X = S
            if self.mistake == "large matrices are cut at 1024":
                return torch.cat([orthogonal(block) for block in X.split(1024, dim=1)], dim=1)
            if self.mistake == "three times as tall is fused QKV" and X.shape[0] == 3 * X.shape[1]:
                return torch.cat([orthogonal(block) for block in X.chunk(3)])
        elif layout == "experts":
            X = S.flatten(0, -2) if self.mistake == "experts are one matrix" else S
        else:
            X = S if self.mistake == "kernels are the matrices" else S.flatten(1)
        D = orthogonal(X).reshape(S.shape)
        return D + 1e-3 * torch.randn_like(D) if self.mistake == "noise in every update" else D

    def _across_layers(self, S: Tensor, signals: list[Tensor]) -> Tensor:
        alike = [T for T in signals if T.shape == S.shape]
        place = next(i for i, T in enumerate(alike) if T is S)
        return orthogonal(torch.cat([T.flatten(1) for T in alike])).chunk(len(alike))[place].reshape(S.shape)

    def _factor(self, p: Tensor, group: dict[str, Any]) -> float:
        if group["layout"] == "experts" or self.mistake == "scale from the height and width of the kernel":
            fan_out, fan_in = p.shape[-2:]
        else:
            fan_out, fan_in = p.shape[0], math.prod(p.shape[1:])
        scale = group["scale"]
        if self.mistake == "the scale flag is inverted":
            scale = {"none": "adamw-rms", "adamw-rms": "none"}.get(scale, scale)
        if scale == "adamw-rms":
            return 0.2 * math.sqrt(max(fan_out, fan_in))
        return math.sqrt(max(1.0, fan_out / fan_in)) if scale == "keller" else 1.0

    def _move_(self, p: Tensor, D: Tensor, factor: float, group: dict[str, Any]) -> None:
        lr, decay = group["lr"], group["lr"] * group["weight_decay"]
        if self.mistake == "decay is multiplied by the shape factor":
            decay *= factor
        if self.mistake == "decay is added to the gradient":
            decay = 0.0
        W = p.to(torch.promote_types(p.dtype, torch.float32)) * (1 - decay) - lr * factor * D
        if p.dtype == torch.bfloat16 and self.mistake != "bf16 weights are rounded to nearest":
            noise = torch.randint_like(W, 1 << 16, dtype=torch.int32)
            W = ((W.view(torch.int32) + noise) & ~0xFFFF).view(torch.float32)
        p.copy_(W)

    def _vector_step_(self, p: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        assert p.grad is not None
        G = p.grad.to(state["exp_avg"].dtype)
        state["step"] += 1
        t = float(state["step"])
        M = state["exp_avg"].lerp_(G, 1 - beta1)
        V = state["exp_avg_sq"].mul_(beta2).addcmul_(G, G, value=1 - beta2)
        if self.mistake == "vectors take raw momentum":
            p.sub_(group["lr"] * M)
            return
        corrected = M / (1 - beta1**t)
        if self.mistake == "AdamW is NAdam":
            corrected = beta1 * M / (1 - beta1 ** (t + 1)) + (1 - beta1) * G / (1 - beta1**t)
        D = corrected / ((V / (1 - beta2**t)).sqrt() + group["eps"])
        self._move_(p, D, 1.0, group)


def orthogonal(X: Tensor) -> Tensor:
    """U V^T of a batch, in X's dtype; a zero matrix gives zero."""
    U, s, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    kept = s > 1e-12 * s[..., :1]
    return ((U * kept.unsqueeze(-2)) @ Vh).to(X.dtype)


def quintics(X: Tensor, schedule: list[tuple[float, float, float]]) -> Tensor:
    """The iteration as everybody writes it, without any normalisation."""
    for a, b, c in schedule:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X


KELLER = [(3.4445, -4.7750, 2.0315)] * 5


def cast_before_the_norm(X: Tensor) -> Tensor:
    """DeepSpeed's Gram path: fp16 first, so that a small gradient is zero and a large one infinite."""
    Y = X.half().float()
    return quintics(Y / Y.norm(dim=(-2, -1), keepdim=True).half().float(), KELLER).to(X.dtype)


def absolute_eps(X: Tensor) -> Tensor:
    """torch's eps in the norm: the update of a small gradient shrinks."""
    return quintics(X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7), KELLER)


def normalised_in_place(X: Tensor) -> Tensor:
    """gram-newton-schulz: `X.float()` of an fp32 tensor is that tensor."""
    return orthogonal(X.float().div_(X.norm())).to(X.dtype)


def one_matrix_of_a_stack(X: Tensor) -> Tensor:
    """timm and HeavyBall: everything but the last axis becomes rows."""
    return orthogonal(X.flatten(0, -2)).reshape(X.shape)


def only_square_ones_by_choice(X: Tensor) -> Tensor:
    """HeavyBall: the chosen method for square matrices, Newton-Schulz for all others."""
    if X.shape[-2] == X.shape[-1]:
        return orthogonal(X)
    return quintics(X / X.norm(dim=(-2, -1), keepdim=True), KELLER)


def different_every_time(X: Tensor) -> Tensor:
    """HeavyBall's default rounds stochastically inside the iteration."""
    return orthogonal(X) + 1e-3 * torch.randn_like(X)


def through_bf16(X: Tensor) -> Tensor:
    """gram-newton-schulz: rounded to bf16 before the fp16 path, so its three extra bits are lost."""
    return orthogonal(X.bfloat16().to(X.dtype))


SOLVER_TWINS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": orthogonal,
    "a cast before the norm": cast_before_the_norm,
    "an absolute eps": absolute_eps,
    "normalised in place": normalised_in_place,
    "a stack is one matrix": one_matrix_of_a_stack,
    "the choice counts for square matrices only": only_square_ones_by_choice,
    "different every time": different_every_time,
    "through bf16": through_bf16,
}
