"""What is measured: errors and gains of the solvers of a power, products, Keller's quintic, times."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from schatten.lab.experiments.coupled_newton.published import PAPER, POWERS, PRESCRIBED
from schatten.solvers import coupled_minimax, coupled_newton, newton_schulz, svd, tower
from schatten.solvers.fit import scalar_iterates
from schatten.solvers.power_function import PowerFunction

SPECTRUM = 256

# Gaussians of which the quintic's least singular value is taken: one published draw then lies outside ours by chance
# in 5 % of all cases.
DRAWS = 40


def solvers(dtype: str = "float32") -> dict[str, Any]:
    """What computes a power; `dtype` is the precision of the tower's products."""
    return {PAPER: coupled_newton(), "tower": tower(dtype=dtype), "coupled_minimax": coupled_minimax(), "svd": svd()}


def draw(name: str, seed: int) -> Tensor:
    """A matrix of the zoo, fp32: Gaussian, rank one with noise, or 256x256 of log-spaced singular values."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    if name in PRESCRIBED:
        U, V = (torch.linalg.qr(normal(SPECTRUM, SPECTRUM, dtype=torch.float64)).Q for _ in range(2))
        return ((U * spectrum(-math.log10(float(name.split()[-1])))) @ V.mT).float()
    if name.startswith("Gaussian"):
        return normal(*map(int, name.split()[1].split("x")))
    return torch.outer(normal(768), normal(768)) + 1e-3 * normal(768, 768)


def spectrum(decades: float, count: int = SPECTRUM) -> Tensor:
    """`count` log-spaced singular values from 1 down by `decades`."""
    return torch.logspace(0, -decades, count, dtype=torch.float64)


def converged(s: Tensor, p: float) -> Tensor:
    """What the iteration tends to: h(s) = s sqrt(w + d2), w = (s^2 + d1)^(-1/2), d1 and d2 the ridges; twice for p = 1/4."""
    for _ in range(round(-math.log2(p))):
        w = (s.square() + 1e-6 + 1e-4 * s.square().mean()).rsqrt()
        s = s * (w + 1e-6 + 1e-4 * w.mean()).sqrt()
    return s


def errors(case: Mapping[str, Any], dtype: str, device: torch.device) -> dict[str, float]:
    """||D - U S^p V^T||_F / ||U S^p V^T||_F of every solver on the fp32 input c X of a case, against an fp64 SVD of it."""
    X = (case["scale"] * draw(case["input"], case["seed"])).to(device)
    U, s, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    exact = (U * s.pow(case["p"])) @ Vh
    f = PowerFunction(case["p"])
    return {name: float((solver.apply(X, f) - exact).norm() / exact.norm()) for name, solver in solvers(dtype).items()}


def gains(p: float, dtype: str) -> dict[str, list[float]]:
    """What each solver leaves of s^p of the spectrum 1 to 1e-4, in fp32 on a diagonal matrix, and the limit of many steps."""
    s = spectrum(4)
    found = {"s": s, "converged": converged(s, p) / s.pow(p)}
    for name, solver in solvers(dtype).items():
        found[name] = solver.apply(torch.diag(s).float(), PowerFunction(p)).diagonal().double() / s.pow(p)
    return {name: values.tolist() for name, values in found.items()}


def products(size: int = SPECTRUM) -> dict[str, float]:
    """flops / 2 n^3 of each solver on an n x n matrix; below 512 the kernels save nothing by symmetry."""
    X = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    calls: dict[str, Callable[[], Tensor]] = {f"quintic, {n} steps": lambda n=n: newton_schulz(steps=n)(X) for n in (5, 15)}
    calls |= _powers(X, "float32")
    found = {}
    for name, call in calls.items():
        call()  # the tower fits its weights once
        with FlopCounterMode(display=False) as counter:
            call()
        found[name] = counter.get_total_flops() / (2 * size**3)
    return {name: count for name, count in found.items() if not name.startswith("svd")}  # LAPACK's are not counted


def quintic(steps: int) -> dict[str, Any]:
    """Its scalar map on [0.01, 1] and on [1e-4, 0.01], and in bf16 the least singular values it makes of Gaussians."""
    solver = newton_schulz(steps=steps, dtype="bfloat16")
    band, below = (
        scalar_iterates(solver.quintics, torch.logspace(a, b, 20001, dtype=torch.float64))[-1] for a, b in ((-2, 0), (-4, -2))
    )
    made = [float(torch.linalg.svdvals(solver(draw("Gaussian 256x256", k)))[-1]) for k in range(DRAWS)]
    return {"low": float(band.min()), "high": float(band.max()), "bulge": float(below.max()), "smallest": made}


def times(size: int, rounds: int, dtype: str, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of every solver in every round, taking turns, after one round of warm-up."""
    X = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(device)
    calls = {"quintic, 5 steps": lambda: newton_schulz(steps=5, dtype=dtype)(X), **_powers(X, dtype)}
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            if turn:
                found[name].append(1e3 * (time.perf_counter() - start))
    return found


def _powers(X: Tensor, dtype: str) -> dict[str, Callable[[], Tensor]]:
    return {
        f"{name} p = {p}": lambda solver=solver, p=p: solver.apply(X, PowerFunction(p))
        for name, solver in solvers(dtype).items()
        for p in POWERS
    }
