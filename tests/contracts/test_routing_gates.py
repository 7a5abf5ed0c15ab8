"""Which Linear named gate scores experts, and which is half of a gated unit."""

import pytest
from torch import nn

import schatten


class Mixture(nn.Module):
    """A gate of `rows` beside four experts, and with `shared` a gated unit around the same name."""

    def __init__(self, rows, shared, num_experts=None):
        super().__init__()
        self.gate = nn.Linear(32, rows, bias=False)
        self.experts = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(4))
        if shared:
            self.up = nn.Linear(32, rows, bias=False)
            self.down = nn.Linear(rows, 32, bias=False)
        if num_experts is not None:
            self.num_experts = num_experts


@pytest.mark.parametrize(
    "module, route",
    [
        (Mixture(16, shared=False), "adamw"),  # of experts elsewhere, of which four are this rank's
        (Mixture(16, shared=True), "spectral"),
        (Mixture(16, shared=True, num_experts=16), "adamw"),
    ],
    ids=["scores", "half of a gated unit", "scores beside a gated unit"],
)
def test_a_gate_is_a_router_unless_it_is_half_of_a_gated_unit(module, route):
    model = nn.ModuleDict({"mlp": module, "head": nn.Linear(32, 8)})
    entry = next(e for e in schatten.plan(model) if e.name == "mlp.gate.weight")
    assert entry.route == route, entry.reason
