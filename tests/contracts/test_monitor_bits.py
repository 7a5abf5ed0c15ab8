"""Training does not notice a Monitor, to the last bit."""

import warnings
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from schatten.monitor import Alarm, Monitor, known
from tests.contracts.monitoring import Fused, Plain, adamw_too, in_bytes, loss_of, muon, of_tensors, small

RUNS = {
    "Muon": (Plain, muon, torch.float32),
    "an AdamW group": (Plain, adamw_too, torch.float32),
    "bf16 weights, stochastic rounding": (Plain, muon, torch.bfloat16),
    "fused QKV": (Fused, muon, torch.float32),
    "state in bytes": (Plain, in_bytes, torch.float32),
}


def trained(kind, monitored, steps=10, quantities=None):
    """Everything a run leaves, weights, buffers, state, gradients and generators, and the names of what was measured."""
    make, build, dtype = RUNS[kind]
    torch.manual_seed(0)
    model = make().to(dtype)
    opt = build(model)
    loss = loss_of(model, dtype)
    monitors = []
    if monitored and quantities is None:
        # The Hessian of half-precision parameters has their precision, so its quantities are for the others.
        names = of_tensors if dtype == torch.bfloat16 else known()
        of_hessian = [small(name, make) for name in names if "hessian" in known()[name].needs]
        others = [small(name, make) for name in names if "hessian" not in known()[name].needs]
        monitors.append(Monitor(opt, 1, others, model=model, loss=[loss] * 3))
        # Of one loss the graph is kept between products.
        monitors += [Monitor(opt, 1, of_hessian, model=model, loss=loss)] if of_hessian else []
    elif monitored:
        monitors.append(Monitor(opt, 1, quantities, model=model, loss=loss))
    for _ in range(steps):
        opt.zero_grad()
        loss().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Alarm)
            opt.step()
    left = [dict(model.state_dict()), {i: opt.state[p] for i, p in enumerate(model.parameters())}]
    left += [[p.grad for p in model.parameters()], torch.get_rng_state(), torch.rand(3)]
    return left, {key.partition("/")[0] for monitor in monitors for record in monitor.records for key in record}


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return (a is None) == (b is None) and (a is None or torch.equal(a, b))


@pytest.mark.parametrize("kind", RUNS)
def test_ten_steps_are_the_same_bits_with_every_quantity_at_every_step(kind):
    without, _ = trained(kind, False)
    found, measured = trained(kind, True)
    assert same(found, without)
    assert measured >= set(of_tensors if RUNS[kind][2] == torch.bfloat16 else known())


@dataclass(frozen=True)
class Draws:
    """A quantity that forgets itself and draws from the global generator."""

    name: ClassVar[str] = "draws"
    scope: ClassVar[str] = "matrix"
    needs: ClassVar[frozenset[str]] = frozenset()
    columns: ClassVar[dict[str, str]] = {"number": "a random number"}
    cost: ClassVar[str] = "none"

    def __call__(self, of):
        return {"number": torch.rand(())}


def test_a_quantity_that_draws_random_numbers_changes_no_training():
    assert same(trained("Muon", True, quantities=[Draws()])[0], trained("Muon", False)[0])


def test_every_preset_is_measured_and_steps_as_without(any_preset):
    def run(names):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        opt = any_preset(model, *((0.5,) if any_preset.__name__ == "SpectralAdam" else ()), lr=0.01)
        x = torch.randn(5, 6)

        def closure():
            opt.zero_grad()
            loss = model(x).square().mean()
            if torch.is_grad_enabled():
                loss.backward()
            return loss

        monitor = Monitor(opt, 1, names) if names else None
        for _ in range(3):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Alarm)
                opt.step(closure)
        return list(model.parameters()), monitor

    quantities = [known()[name]() for name in of_tensors if name != "attention"]
    weights, monitor = run(quantities)
    assert all(map(torch.equal, weights, run([])[0]))
    measured = {key.partition("/")[0] for record in monitor.records for key in record}
    assert {"update", "gradient", "spectrum"} <= measured
