"""What only a GPU shows: a captured step, a scaler on the device, the same update as on the CPU."""

import pytest
import torch
from torch import nn

import schatten

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # torch says so once of the mode in which a wait is an error.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]


def setup(device, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(0)
    params = [
        nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in ((64, 32), (64, 32), (48, 96))
    ]
    bias = nn.Parameter(torch.zeros(32, device=device, dtype=dtype))
    opt = schatten.Muon([{"params": params}, {"params": [bias], "algorithm": "adamw"}], **options)
    for p in (*params, bias):
        p.grad = torch.randn(p.shape, generator=generator).to(p)
    return opt, [*params, bias]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_step_replays_as_eager_steps_do_with_a_schedule(dtype):
    lr, other_lr = (torch.tensor(0.01, device="cuda") for _ in range(2))
    opt, params = setup("cuda", dtype, lr=lr)
    plain, others = setup("cuda", dtype, lr=other_lr)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        opt.step()  # a warm-up, as capture wants it
    torch.cuda.current_stream().wait_stream(stream)
    plain.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    for k in range(4):
        lr.fill_(0.01 / (k + 1))
        other_lr.fill_(0.01 / (k + 1))
        graph.replay()
        plain.step()
    # One and the same kernels in the same order; noise follows the count on the device.
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_a_scaler_on_the_device_skips_an_overflow_without_a_wait():
    opt, params = setup("cuda", lr=0.01)
    opt._step_supports_amp_scaling = True
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    scaler.scale(torch.zeros((), device="cuda"))
    before = [p.detach().clone() for p in params]
    params[0].grad[0, 0] = torch.inf
    scaler.step(opt)
    scaler.update()
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True)) and scaler.get_scale() == 512.0


def test_a_step_does_not_synchronise():
    opt, params = setup("cuda", lr=0.01)
    opt.step()
    before = [p.detach().clone() for p in params]
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(not torch.equal(p, w) for p, w in zip(params, before, strict=True))


def test_a_step_is_that_of_the_cpu():
    on_gpu, a = setup("cuda", lr=0.01, solver=schatten.solvers.polynomial(dtype="float32"))
    on_cpu, b = setup("cpu", lr=0.01, solver=schatten.solvers.polynomial(dtype="float32"))
    for _ in range(3):
        on_gpu.step()
        on_cpu.step()
    # fp32 products in another order; TF32 is off by default for matmul in torch.
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-3, atol=1e-4)
