"""J and L of the second matrix of a small MLP along gradient descent and Muon, figure 2 of Shen et al. (2505.23737).

784-128-64-10 without biases, ReLU, cross-entropy on 60 MNIST images, learning rate 0.1 for both. Initialisation and
preprocessing are not published. `PUBLISHED`, the experiment muon-vs-gd's, was read off curves to about 0.05; below 0.1 they are
indicative.
"""

import gzip
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import schatten
from schatten.diagnostics.curvature import curvature
from schatten.diagnostics.hessian import Hessian
from schatten.lab.experiments.muon_vs_gd.curvature import COLUMNS, PUBLISHED

__all__ = ["COLUMNS", "PUBLISHED", "Images", "Problem", "condition", "distance", "trajectory"]

MNIST = Path(__file__).parents[3] / "shared" / "data" / "mnist"

LR = 0.1
SAMPLES = 60

# Of the grid, what torchvision's users write most: ToTensor alone, Normalize(0.5, 0.5), Normalize(0.1307, 0.3081).
PREPROCESSING: dict[str, Callable[[Tensor], Tensor]] = {
    "[0, 1]": lambda x: x,
    "[-1, 1]": lambda x: 2 * x - 1,
    "(x - 0.1307) / 0.3081": lambda x: (x - 0.1307) / 0.3081,
}

# What fits the published curves.
FITTED = "[-1, 1]"


class Images(NamedTuple):
    """Pixels in [0, 1], (samples, pixels) in fp64, and labels."""

    name: str
    pixels: Tensor
    labels: Tensor


def mnist() -> Images:
    """The 10,000 test images, from `../shared/data/mnist`."""
    pixels, labels = (
        torch.frombuffer(
            bytearray(gzip.decompress((MNIST / f"t10k-{name}-ubyte.gz").read_bytes())[skipped:]), dtype=torch.uint8
        )
        for name, skipped in (("images-idx3", 16), ("labels-idx1", 8))
    )
    return Images("MNIST test images", pixels.view(-1, 784).double() / 255, labels.long())


def digits() -> Images:
    """The 1,797 digits of 8 x 8 pixels that come with scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("The digits need scikit-learn: pip install scikit-learn") from error
    pixels, labels = load_digits(return_X_y=True)
    return Images("scikit-learn's digits", torch.tensor(pixels).double() / 16, torch.tensor(labels).long())


def images() -> Images:
    return mnist() if MNIST.exists() else digits()


class Problem:
    """The MLP at torch's default initialisation and `SAMPLES` random images, both drawn from `seed`; fp64."""

    def __init__(self, of: Images, seed: int, preprocessing: str = FITTED) -> None:
        torch.manual_seed(seed)
        chosen = torch.randperm(len(of.labels))[:SAMPLES]
        self.x, self.y = PREPROCESSING[preprocessing](of.pixels[chosen]), of.labels[chosen]
        widths = (self.x.shape[1], 128, 64, 10)
        linears = [nn.Linear(n, m, bias=False) for n, m in pairwise(widths)]
        self.net = nn.Sequential(linears[0], nn.ReLU(), linears[1], nn.ReLU(), linears[2]).double()
        self.block = linears[1].weight

    def loss(self) -> Tensor:
        return F.cross_entropy(self.net(self.x), self.y)

    def hessian(self) -> Hessian:
        """Of the block W2, 64 x 128, alone."""
        return Hessian(self.loss, [self.block], model=self.net)

    def optimizer(self, name: str) -> torch.optim.Optimizer:
        if name == "GD":
            return torch.optim.SGD(self.net.parameters(), lr=LR)
        return schatten.SimplifiedMuon(list(self.net.parameters()), lr=LR, adaptive=False)


def measured(H: Hessian) -> dict[str, float]:
    C = curvature(lambda V: H.within(0, V), H.gradient[0])
    numbers = {"loss": H.loss, "J": C.J, "L": C.L.value, "L error": C.L.error}
    return {
        **{name: float(value) for name, value in numbers.items()},
        "nuc^2": float(C.nuclear) ** 2,
        "fro^2": float(C.frobenius) ** 2,
    }


def trajectory(problem: Problem, optimizer: str, steps: int, every: int = 1) -> dict[str, list[float]]:
    """Columns of `measured` at steps 1, 1 + every, ..., before each of these steps, and the step's number."""
    opt = problem.optimizer(optimizer)
    found: dict[str, list[float]] = {"step": []}
    for t in range(1, steps + 1):
        if (t - 1) % every == 0:
            found["step"].append(t)
            for name, value in measured(problem.hessian()).items():
                found.setdefault(name, []).append(value)
        opt.zero_grad()
        problem.loss().backward()
        opt.step()
    return found


def condition(found: dict[str, list[float]]) -> list[bool]:
    """Condition (4), J / L <= nuc^2 / fro^2, at each step."""
    rows = zip(*(found[name] for name in ("J", "L", "nuc^2", "fro^2")), strict=True)
    return [J / L <= nuclear / frobenius for J, L, nuclear, frobenius in rows]


def distance(found: dict[str, list[float]], published: dict[str, list[float]]) -> float:
    """Root mean square of log(found / published) over losses, J and L of the steps they share."""
    at = [found["step"].index(step) for step in published["step"] if step in found["step"]]
    logs = [
        math.log(abs(found[name][i]) / value)
        for name in ("loss", "J", "L")
        for i, value in zip(at, published[name], strict=False)
    ]
    return math.sqrt(sum(x * x for x in logs) / len(logs))
