"""The shape factor moves the constraint (style.md, 4.1): weights converge into the spectral ball of radius c / lambda."""

import pytest
import torch

import schatten
from tests.contracts.matrices import gaussian


@pytest.mark.parametrize(
    ("scale", "factor"), [("keller", 2.0), ("mup", 2.0), ("none", 1.0), ("adamw-rms", 0.2 * 12**0.5)], ids=lambda v: str(v)
)
@pytest.mark.parametrize("decay", ["explicit", "implicit"])
def test_a_12_x_3_weight_with_a_far_target_settles_at_factor_over_decay(scale, factor, decay):
    # "Keller's factor for a 12 x 3 weight is 2, so with lambda = 0.5 and a far target the norm settles at 4."
    target = 100 * gaussian(12, 3).float()
    W = torch.nn.Parameter(torch.zeros(12, 3))
    opt = schatten.Muon([W], lr=0.1, weight_decay=0.5, scale=scale, decay=decay, solver=schatten.solvers.svd())
    for _ in range(200):
        W.grad = W.detach() - target
        opt.step()
    # (1 - lr lambda)^200 = 3e-5 of the way is left; every singular value settles, as the target is far in all directions.
    assert torch.linalg.svdvals(W.detach()) == pytest.approx(torch.full((3,), factor / 0.5), rel=1e-3)
    assert schatten.maps.Nuclear().violation(W.detach() * 0.5 / factor) < 1e-3
