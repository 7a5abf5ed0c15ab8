"""Where looking at a value makes the host wait, a step masks instead of filtering: the same results, for every preset.

The masked path is that of accelerators; here it runs on the CPU.
"""

import pytest
import torch
from torch import nn

from schatten import finite

SHAPES = [(6, 4), (6, 4), (3, 5), (6, 4)]


@pytest.fixture
def masked(monkeypatch):
    def switch(on):
        monkeypatch.setattr(finite, "looking_is_free", lambda p: not on)

    return switch


def trained(preset, dtype, hit=None):
    """Weights and state after four steps; `hit` is a matrix whose third gradient is nan."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    opt = preset(params, lr=0.05, rounding="nearest")
    for step in range(4):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            if step == 2 and i == hit:
                p.grad[0, 0] = float("nan")
        opt.step()
    return [p.detach() for p in params], [opt.state[p] for p in params], opt.metrics()


def assert_equal(a, b):
    for x, y in zip(a[0], b[0], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    for x, y in zip(a[1], b[1], strict=True):
        assert x.keys() == y.keys()
        for key in x:
            torch.testing.assert_close(x[key], y[key], rtol=0, atol=0, msg=lambda text, key=key: f"{key}: {text}")
    assert a[2] == b[2]


def test_a_masked_step_is_bit_equal_to_a_filtered_one(preset, dtype, masked):
    masked(False)
    filtered = trained(preset, dtype)
    masked(True)
    assert_equal(trained(preset, dtype), filtered)


def test_a_masked_nan_leaves_its_matrix_and_counts_it_once(preset, dtype, masked):
    masked(True)
    weights, states, metrics = trained(preset, dtype, hit=1)
    assert metrics["skipped"] == {"0.1": 1}
    assert [int(state["step"]) for state in states] == [4, 3, 4, 4]
    assert all(w.isfinite().all() for w in weights)
    assert all(t.isfinite().all() for state in states for t in state.values())
    untouched, _, _ = trained(preset, dtype)
    # A matrix that a nan spread to would differ; batched kernels may round the others anew.
    noise = {torch.float64: 1e-12, torch.float32: 2e-3, torch.bfloat16: 2**-6}[dtype]
    for i in (0, 2, 3):
        torch.testing.assert_close(weights[i], untouched[i], rtol=noise, atol=noise)
