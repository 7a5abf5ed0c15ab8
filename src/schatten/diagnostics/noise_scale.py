"""The gradient-noise scale: how many samples it takes until the mean gradient is larger than its noise.

McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch Training" (arXiv 1812.06162), who compare a small with a
large batch. Here many micro-batches of one size give the same unbiased estimates and, leaving out one at a time, their errors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from schatten.diagnostics.core import Estimate, Need, Whole
from schatten.diagnostics.nuclear_norm import MSGN
from schatten.diagnostics.probes import mean_of, widening
from schatten.diagnostics.undisturbed import devices_of, undisturbed
from schatten.solvers import Solver

Gradients = Sequence[Sequence[Tensor]]


class NoiseScale(NamedTuple):
    """tr(Sigma) of one sample's gradient, |G|^2 of the true gradient, and their ratio B, in samples; scalars in fp64."""

    noise: Estimate
    signal: Estimate
    scale: Estimate


class NuclearNoise(NamedTuple):
    """E ||noise||_*^2 in samples, and two estimates of ||G||_* of the true gradient, one too small and one too large."""

    noise: Estimate
    lower: Estimate
    upper: Estimate

    @property
    def scale(self) -> tuple[Tensor, Tensor]:
        """noise / ||G||_*^2 in samples, with the larger and with the smaller ||G||_*; inf where that is not above 0."""
        low, high = (_over(self.noise.value, bound.value.abs() * bound.value) for bound in (self.upper, self.lower))
        return low, high


def micro_gradients(
    losses: Sequence[Callable[[], Tensor]], params: Sequence[Tensor], *, model: nn.Module | None = None
) -> list[tuple[Tensor, ...]]:
    """The gradient of each loss in `params`, without training noticing: what `noise_scale` takes.

    Random numbers are drawn on from loss to loss, so every micro-batch has its own dropout, as in training. Afterwards the
    generators and the buffers of `model` are as before. `.grad` is not touched. A parameter no loss depends on gets 0.

    Cost: one backward pass for each loss, and memory for all gradients at once.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.noise_scale import micro_gradients
        >>> w = torch.ones(2, requires_grad=True)
        >>> micro_gradients([lambda: (w * 3).sum(), lambda: w[0]], [w])
        [(tensor([3., 3.]),), (tensor([1., 0.]),)]
    """
    with undisturbed(model, devices_of(params)), torch.enable_grad():
        return [torch.autograd.grad(loss(), list(params), materialize_grads=True) for loss in losses]


def noise_scale(
    gradients: Gradients,
    batch_size: int = 1,
    *,
    product: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None,
) -> NoiseScale:
    """B_simple = tr(Sigma) / |G|^2 from the gradients g_i of n micro-batches of `batch_size` b (arXiv 1812.06162, eq. 2.9).

        tr(Sigma) = b / (n - 1) * sum |g_i - mean|^2,      |G|^2 = (|sum g_i|^2 - sum |g_i|^2) / (n (n - 1))

    Both are unbiased, for independent micro-batches of any distribution. Their ratio is not, by a share of about its relative
    error squared. Errors are the jackknife's, leaving out one micro-batch at a time, widened for few (`probes.widening`). Where
    the estimate of |G|^2 is not above 0, noise drowns the gradient and B is larger than these samples can tell: inf. Where
    that happens without one of the micro-batches, the error is inf.

    With `product`, of the loss's Hessian with a vector (`Hessian`), noise and signal are tr(H Sigma) and G^T H G and their
    ratio is B_noise (eq. 2.8), which needs no H = c I; one Hessian-vector product for each micro-batch more.

    As an estimate of the critical batch size B has limits. Its theory is that of one SGD step with the best learning rate on a
    quadratic loss, where batches of B samples need 1 + B_noise / B times as many steps as the full gradient; B_simple assumes
    H = c I besides. Expect its order of magnitude, no more. Other optimizers follow other norms: of orthogonalised
    updates see `nuclear_noise`. B grows as the loss falls, so it belongs to one time of a training. Its unit is what
    `batch_size` counts, and these must be independent: tokens of one sequence are not, so count sequences. Dropout counts as
    noise. Means over ranks (DDP) are not taken: each has the noise scale of its own losses.

    Args:
        gradients: for each micro-batch its gradients, tensors in one order; at least 3 micro-batches.
        batch_size: samples in each, whose mean is its loss.
        product: of a loss's Hessian with a vector in the gradients' shapes.

    Cost: n^2 inner products of gradients in fp64; with `product` n Hessian-vector products. nan where a gradient is not finite.
    Raises ValueError for fewer than 3 micro-batches, different shapes and a batch_size below 1.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.noise_scale import noise_scale
        >>> true, noise = torch.full((100,), 0.2), torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
        >>> found = noise_scale([(true + one,) for one in noise])  # tr(Sigma) = 100, |G|^2 = 4
        >>> bool((found.scale.value - 25).abs() < 2 * found.scale.error)
        True
    """
    _check(gradients, batch_size)
    return _estimates(_grams(gradients, product).sum(0), batch_size)


def nuclear_noise(gradients: Gradients, batch_size: int = 1, *, solver: Solver = MSGN) -> NuclearNoise:
    """The noise scale in Muon's norms: E ||noise||_*^2 / ||G||_*^2 of matrices, from the gradients of n micro-batches.

    Where SGD's analysis has tr(Sigma) / |G|^2, that of Muon (arXiv 2505.23737, Thm 4.1 and 4.3) compares ||G||_* with
    E ||noise||_*, which it bounds by sqrt(r) sigma. So B = E ||noise of one sample||_*^2 / ||G||_*^2 is the batch whose noise
    is as long as the gradient, before momentum averages it. Norms are sums over all matrices, dual to the largest of their
    spectral norms.

    `noise` is batch_size times the mean of ||g_i - mean||_*^2 n / (n - 1), which is exact in expectation for Gaussian noise.
    The noise of few samples is not Gaussian: it has low rank and a smaller nuclear norm, so that of larger batches is longer
    than `noise` says. Let micro-batches be large beside the rank of one sample's gradient.
    ||G||_* has no unbiased estimate, but bounds in expectation: `upper`, the norm of the mean gradient, which noise lengthens,
    and `lower`, the mean of <g_i, msgn(mean of the others)>, as a direction from independent samples is at best the right one.
    `scale` uses one and the other. Errors are of sampling, widened for few micro-batches, and leave these biases out.

    Args:
        gradients: for each micro-batch its gradients, matrices (*b, m, n) in one order; at least 3 micro-batches.
        batch_size: samples in each, whose mean is its loss.
        solver: of the polar factor; the default's error is that of `nuclear_norm`.

    Cost: 2 n + 1 msgn for each matrix. nan where a gradient is not finite. Raises as `noise_scale`, and ValueError for vectors.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.noise_scale import nuclear_noise
        >>> noise = torch.randn(32, 6, 6, generator=torch.Generator().manual_seed(0))
        >>> found = nuclear_noise([(torch.eye(6) + one,) for one in noise])  # ||G||_* = 6
        >>> bool(found.lower.value < 6 < found.upper.value)
        True
    """
    _check(gradients, batch_size)
    if any(t.ndim < 2 for t in gradients[0]):
        raise ValueError(
            "nuclear_noise needs matrices (*b, m, n), but a gradient is a vector: leave out biases and norms' weights."
        )
    device = gradients[0][0].device
    parts = [[part.to(device) for part in _nuclear_parts(one, solver)] for one in zip(*gradients, strict=True)]
    noise, lower, left_out, upper = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
    return NuclearNoise(mean_of(batch_size * noise.square()), mean_of(lower), Estimate(upper[0], _jackknife(left_out)))


@dataclass(frozen=True)
class Noise:
    """The gradient-noise scale of the whole model and of each of its parameters, from the losses of micro-batches.

    `batch_size` is the number of samples in each; 1 makes micro-batches the unit. `noise_scale` says what estimates are worth.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.core import Whole
        >>> from schatten.diagnostics.noise_scale import Noise
        >>> w = torch.zeros(2, requires_grad=True)
        >>> found = Noise()(Whole({"w": w}, (), [lambda k=k: (w * k).sum() for k in (1.0, 2.0, 3.0)]))
        >>> round(float(found["noise"]), 4), round(float(found["signal"]), 4)
        (2.0, 7.3333)
    """

    name: ClassVar[str] = "noise"
    scope: ClassVar[Literal["matrix", "model"]] = "model"
    needs: ClassVar[frozenset[Need]] = frozenset({"losses"})
    columns: ClassVar[Mapping[str, str]] = {
        "scale": "B_simple = tr(Sigma) / |G|^2, in samples",
        "scale_error": "its standard error",
        "noise": "tr(Sigma) of one sample's gradient, in the gradient's unit squared",
        "noise_error": "its standard error",
        "signal": "|G|^2 of the true gradient, unbiased, so it may be negative; in the gradient's unit squared",
        "signal_error": "its standard error",
        "scales": "B_simple of each parameter alone, in samples, in the order of the parameters; a vector",
        "scales_error": "their standard errors; a vector",
    }
    cost: ClassVar[str] = "one gradient for each loss, all kept at once, and their inner products in fp64"

    batch_size: int = 1

    def check(self, of: Whole) -> None:
        """Raise ValueError for fewer than three losses."""
        _enough(len(of.losses))

    def __call__(self, of: Whole) -> Mapping[str, Tensor]:
        gradients = micro_gradients(of.losses, list(of.parameters.values()))
        _check(gradients, self.batch_size)
        grams = _grams(gradients, None)
        each = _estimates(grams, self.batch_size).scale
        total = _estimates(grams.sum(0), self.batch_size)
        found = {}
        for name, estimate in total._asdict().items():
            found |= {name: estimate.value, f"{name}_error": estimate.error}
        return {**found, "scales": each.value, "scales_error": each.error}


def _enough(number: int) -> None:
    if number < 3:
        raise ValueError(
            f"A noise scale needs the losses or gradients of at least 3 micro-batches, whose spread has an error, got {number}."
        )


def _check(gradients: Gradients, batch_size: int) -> None:
    _enough(len(gradients))
    if isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size must be the number of samples in a micro-batch, at least 1, got {batch_size!r}.")
    shapes = {tuple(tuple(t.shape) for t in one) for one in gradients}
    if len(shapes) > 1 or shapes == {()}:
        raise ValueError(f"gradients must be of the same parameters for every micro-batch, got shapes {sorted(shapes)}.")


def _nuclear_parts(gradients: Sequence[Tensor], solver: Solver) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of n gradients: ||noise||_*, <g_i, msgn(mean of the others)>, ||mean of the others||_*, each (n); ||mean||_*, (1)."""
    G = torch.stack([g.detach().to(torch.promote_types(g.dtype, torch.float32)) for g in gradients])
    n, mean = len(G), G.mean(0, keepdim=True)
    others, residuals = (n * mean - G) / (n - 1), (G - mean) * (n / (n - 1)) ** 0.5
    polar = solver(others)
    return _inner(residuals, solver(residuals)), _inner(G, polar), _inner(others, polar), _inner(mean, solver(mean))


def _grams(gradients: Gradients, product: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None) -> Tensor:
    """<g_i, g_j>, or <g_i, H g_j>, of each parameter: (parameters, n, n) in fp64 on the first one's device."""
    images = gradients if product is None else [product(one) for one in gradients]
    device = gradients[0][0].device
    grams = []
    for ours, theirs in zip(zip(*gradients, strict=True), zip(*images, strict=True), strict=True):
        left, right = (torch.stack([t.detach().double().flatten() for t in one]) for one in (ours, theirs))
        grams.append((left @ right.mT).to(device))
    K = torch.stack(grams)
    return (K + K.mT) / 2


def _estimates(K: Tensor, batch_size: int) -> NoiseScale:
    """From inner products (*b, n, n) to estimates (*b)."""
    n, squares, rows = K.shape[-1], K.diagonal(dim1=-2, dim2=-1), K.sum(-1)
    trace, total = squares.sum(-1), rows.sum(-1)
    left = (trace[..., None] - squares, total[..., None] - 2 * rows + squares)
    noise, signal = _noise_and_signal(trace, total, n, batch_size)
    noises, signals = _noise_and_signal(*left, n - 1, batch_size)
    ratio, ratios = _over(noise, signal), _over(noises, signals)
    error = torch.where((signals <= 0).any(-1) | (signal <= 0), torch.inf, _jackknife(ratios))
    return NoiseScale(Estimate(noise, _jackknife(noises)), Estimate(signal, _jackknife(signals)), Estimate(ratio, error))


def _noise_and_signal(trace: Tensor, total: Tensor, n: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """Unbiased tr(Sigma) and |G|^2 from sum |g_i|^2 and |sum g_i|^2 of n micro-batches."""
    return batch_size * (trace - total / n) / (n - 1), (total - trace) / (n * (n - 1))


def _over(noise: Tensor, signal: Tensor) -> Tensor:
    return torch.where(signal <= 0, torch.inf, noise / signal)


def _jackknife(values: Tensor) -> Tensor:
    """The standard error from values (*b, n), each without one of n samples, widened for small n."""
    n = values.shape[-1]
    return widening(n) * ((n - 1) / n * (values - values.mean(-1, keepdim=True)).square().sum(-1)).sqrt()


def _inner(first: Tensor, second: Tensor) -> Tensor:
    """(n, *b, m, n) -> (n) in fp64."""
    return (first * second).flatten(1).sum(-1, dtype=torch.float64)


QUANTITY = Noise
