"""Instruments on a GPU: the numbers of the CPU, the same training, and no wait between measured steps."""

import copy

import pytest
import torch
from torch import nn

import schatten
from schatten.diagnostics.hessian import Hessian
from schatten.monitor import known

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # torch says so once of the mode in which a wait is an error.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]


def task(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4)).double().to(device)
    x, y = torch.randn(32, 16).double().to(device), torch.randint(0, 4, (32,)).to(device)
    return model, lambda: nn.functional.cross_entropy(model(x), y)


@pytest.mark.parametrize("name", sorted(name for name, q in known().items() if q.scope == "matrix"))
def test_quantities_have_the_values_of_the_cpu(name):
    found = []
    for device in ("cpu", "cuda"):
        model, loss = task(device)
        opt = schatten.Muon(model, lr=0.01, weight_decay=0.1, solver=schatten.solvers.svd())
        with schatten.Monitor(opt, 2, [name], model=model, loss=loss) as monitor:
            for _ in range(2):
                opt.zero_grad()
                loss().backward()
                opt.step()
        found.append(monitor.records)
    for one, other in zip(*found, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if not isinstance(value, (str, list)):
                # fp64 with seeds drawn on the CPU; probes' ratios and power iterations lose some digits.
                assert other[key] == pytest.approx(value, rel=1e-3, abs=1e-6, nan_ok=True), key


def test_training_is_the_same_bits_with_curvature_measured_at_every_step():
    weights = []
    for names in ([], ["curvature", "constraint", "spectrum"]):
        model, loss = task("cuda")
        opt = schatten.Muon(model, lr=0.01)
        monitor = schatten.Monitor(opt, 1, names, model=model, loss=loss) if names else None
        for _ in range(3):
            opt.zero_grad()
            loss().backward()
            opt.step()
        if monitor:
            monitor.close()
        weights.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_products_under_autocast_are_those_of_fp32_to_half_precision():
    model, _ = task("cuda")
    model = model.float()
    x, y = torch.randn(64, 16, device="cuda"), torch.randint(0, 4, (64,), device="cuda")

    def loss(enabled):
        with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
            out = model(x)
        return nn.functional.cross_entropy(out.float(), y)

    params = list(model.parameters())
    v = [torch.randn_like(p) for p in params]
    half, full = (Hessian(lambda on=on: loss(on), params, model=model)(v) for on in (True, False))
    for a, b in zip(half, full, strict=True):
        # bf16 has 3 digits: products of a few layers are off by some 1 % of their norm.
        assert float(torch.linalg.vector_norm(a - b)) < 0.1 * float(torch.linalg.vector_norm(b))


def test_a_step_between_measurements_does_not_synchronise():
    model, loss = task("cuda")
    opt = schatten.Muon(model, lr=0.01)
    with schatten.Monitor(opt, 1000):
        loss().backward()
        opt.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
