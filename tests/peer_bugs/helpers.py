"""The notation of the tests in this folder: parameters, one-step changes, exact polar factors and their comparison."""

import pytest
import torch
from torch import Tensor, nn

import schatten
from tests.contracts.driving import step as stepped
from tests.contracts.solver_laws import build, builders
from tests.peer_bugs.mistakes import SOLVER_TWINS, twin

# Every solver of the folder by its name, as (name, dtype) -> solver; a new file there is tested without being named here.
SOLVERS = {builder.__name__: builder for builder in builders()}


def solver_of(name: str, dtype: str = "float32"):
    return build(SOLVERS[name], dtype)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def P(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Parameter:
    """A seeded Gaussian parameter."""
    return nn.Parameter(gaussian(*shape, seed=seed).to(dtype))


def Opt(params, optimizer=schatten.Muon, **options):
    """An optimizer of tensors, vectors in an AdamW group; `layout` is that of all matrices."""
    layout = {"layout": options.pop("layout")} if "layout" in options else {}
    matrices, vectors = [p for p in params if p.ndim > 1], [p for p in params if p.ndim < 2]
    groups = [{"params": matrices, **layout}] if matrices else []
    groups += [{"params": vectors, "algorithm": "adamw"}] if vectors else []
    return optimizer(groups, **options)


def decaying(opt, weight_decay: float):
    """The optimizer with this decay in every group; Scion's constructor has none."""
    for group in opt.param_groups:
        group["weight_decay"] = weight_decay
    return opt


def step(opt, p: Tensor, g: Tensor) -> Tensor:
    """The change of `p` in one step on the gradient `g`."""
    before = p.detach().clone()
    p.grad = g.clone()
    stepped(opt)
    return p.detach() - before


def steps(opt, params, count: int, seed: int = 1) -> list[Tensor]:
    """`count` steps on seeded gradients of every parameter; copies of the weights after them."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        stepped(opt)
    return [p.detach().clone() for p in params]


def ds(shapes, optimizer=schatten.Muon, *, dtype=torch.float32, memory_format=torch.contiguous_format, **options):
    """Minus the changes in one step from zeros at lr 1, without decay, momentum or scale, of parameters of these shapes."""
    params = []
    for i, shape in enumerate(shapes):
        p = nn.Parameter(torch.zeros(shape, dtype=dtype).to(memory_format=memory_format))
        p.grad = gaussian(*shape, seed=10 + i).to(dtype).to(memory_format=memory_format)
        params.append(p)
    options = {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.0, "scale": "none", **options}
    Opt(params, optimizer, **options).step()
    return [-p.detach() for p in params]


def d(*shape: int, **options) -> Tensor:
    """`ds` of one parameter."""
    return ds([shape], **options)[0]


def exact(X: Tensor) -> Tensor:
    """U V^T by LAPACK in fp64, without the library."""
    U, _, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    return U @ Vh


def sv(X: Tensor) -> Tensor:
    return torch.linalg.svdvals(X.double())


def cos(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    # Not sqrt of sums of squares alone: the tests go to 1e-30.
    a, b = a / a.abs().max().clamp_min(1e-300), b / b.abs().max().clamp_min(1e-300)
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-300))


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm())


class LM(nn.Module):
    """Embedding, hidden Linear and output head, tied or not."""

    def __init__(self, vocabulary: int, width: int, tie: bool):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.body = nn.Linear(width, width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tie:
            self.lm_head.weight = self.embed.weight


def route(plan) -> dict[str, str]:
    return {entry.name: entry.route for entry in plan}


def momenta(opt) -> list[Tensor]:
    """The momentum of every parameter that has one."""
    return [s["momentum_buffer"] for s in opt.state_dict()["state"].values() if "momentum_buffer" in s]


def assert_caught(check, mistake: str) -> None:
    """`check` passes on the small twin of Muon and fails on the twin with this mistake, and with nothing but an assertion."""
    check(twin("none"))
    with pytest.raises(AssertionError):
        check(twin(mistake))


def assert_solver_caught(check, mistake: str) -> None:
    """`assert_caught` for a check of solvers."""
    check(SOLVER_TWINS["none"])
    with pytest.raises(AssertionError):
        check(SOLVER_TWINS[mistake])


def raises(errors, f) -> bool:
    """Whether `f()` raises one of these errors; any other passes through."""
    try:
        f()
    except errors:
        return True
    return False
