"""A gradient whose square overflows fp32 is skipped and counted: torch's AdamW lets it stop its entries."""

import pytest
import torch
from torch import nn

import schatten


@pytest.mark.parametrize("size", [1e20, 1e38])
def test_it_moves_nothing_and_the_next_gradient_trains_on(size):
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    opt = schatten.Muon([{"params": [p], "algorithm": "adamw"}], lr=0.1, weight_decay=0.0)
    torchs = torch.optim.AdamW([q], lr=0.1, weight_decay=0.0)
    for g in (torch.tensor([size, 1.0, 1.0, 1.0]), *torch.ones(5, 4)):
        for t, o in ((p, opt), (q, torchs)):
            t.grad = g.clone()
            o.step()
    assert opt.metrics()["skipped"] == {"0.0": 1}
    assert (p < 0.6).all() and opt.state[p]["exp_avg_sq"].isfinite().all()
    # The mistake that is avoided: in torch's AdamW the square drowns those of all later gradients.
    assert torchs.state[q]["exp_avg_sq"][0] > 1e36
