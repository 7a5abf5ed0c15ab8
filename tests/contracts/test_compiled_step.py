"""`torch.compile(opt.step)`: the same bits, no recompilation over shapes and schedules, and no global setting touched."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import schatten

SHAPES = [(8 + i, 16 + 2 * i) for i in range(20)]


def setup(lr):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    bias = nn.Parameter(torch.randn(7))
    opt = schatten.Muon([{"params": params}, {"params": [bias], "algorithm": "adamw"}], lr=lr)
    for p in (*params, bias):
        p.grad = torch.randn_like(p)
    return opt, [*params, bias]


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["float lr", "tensor lr"])
def test_a_compiled_step_never_recompiles_over_a_schedule_and_twenty_shapes(lr):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    limit, counter = torch._dynamo.config.recompile_limit, CompileCounter()
    opt, params = setup(lr)
    plain, others = setup(lr if isinstance(lr, float) else lr.clone())
    # A schedule wraps `step`, so it comes first.
    schedules = [torch.optim.lr_scheduler.LinearLR(o, total_iters=8) for o in (opt, plain)]
    compiled = torch.compile(opt.step, backend=counter)
    for _ in range(8):
        compiled()
        plain.step()
        for schedule in schedules:
            schedule.step()
    # The step chooses by shapes and counts on the host and stays as it is: no graph, so none to make again.
    assert counter.frame_count == 0
    assert not torch._dynamo.utils.counters["recompile_limit"]
    assert torch._dynamo.config.recompile_limit == limit
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_a_compiled_training_loop_around_an_eager_step_works():
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 2))
    opt = schatten.Muon(net, lr=0.01)
    X = torch.randn(32, 6)
    forward = torch.compile(lambda x: net(x).square().mean(), backend="aot_eager")
    losses = []
    for _ in range(20):
        opt.zero_grad()
        loss = forward(X)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
