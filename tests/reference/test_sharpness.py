"""The sharpness of a whole model against its explicit Hessian."""

import pytest
import torch

from schatten.diagnostics.core import Whole
from schatten.diagnostics.sharpness import QUANTITY, sharpness
from tests.reference.hessian_models import functional, hard, loss_of, tokens


def test_it_is_the_norm_of_the_whole_hessian_with_all_that_is_hard():
    model, twin, batch = hard(), hard(fused=False), tokens(0)
    torch.manual_seed(5)
    L = sharpness(lambda: loss_of(model, batch), list(model.parameters()), model=model, iterations=90)
    torch.manual_seed(5)
    exact = torch.linalg.eigvalsh(functional(twin, batch)).abs().max()
    # All of the space is not seen in 90 steps, the ends of it are.
    assert float(L.value) == pytest.approx(float(exact), rel=1e-9)


def test_of_micro_batches_it_is_that_of_the_mean_loss():
    model = hard(dropout=0.0)
    losses = [lambda s=s: loss_of(model, tokens(s)) for s in range(2)]
    L = sharpness(losses, list(model.parameters()), model=model, iterations=40)
    H = (functional(hard(fused=False, dropout=0.0), tokens(0)) + functional(hard(fused=False, dropout=0.0), tokens(1))) / 2
    assert float(L.value) == pytest.approx(float(torch.linalg.eigvalsh(H).abs().max()), rel=1e-9)
    found = QUANTITY(iterations=40)(Whole(dict(model.named_parameters()), (), losses))
    assert float(found["L"]) == pytest.approx(float(L.value), rel=1e-12) and float(found["edge"] * found["L"]) == pytest.approx(
        2
    )


def test_gradient_descent_is_stable_below_the_edge_and_not_above():
    torch.manual_seed(0)
    A = torch.randn(8, 8, dtype=torch.float64)
    A = A @ A.mT

    def ends_at(lr):
        w = torch.ones(8, dtype=torch.float64)
        for _ in range(400):
            w = w - lr * A @ w
        return float(w.norm())

    v = torch.ones(8, dtype=torch.float64, requires_grad=True)
    edge = float(2 / sharpness(lambda: v @ A @ v / 2, [v]).value)
    assert ends_at(0.98 * edge) < 3 and ends_at(1.02 * edge) > 100
