"""What only a GPU shows of Triton's kernels in a step: streams, captures, waits, compilations, memory and large banks.

That each kernel computes what it should is shown in `tests/kernels`, which run compiled where there is a GPU.
"""

from pathlib import Path

import pytest
import torch
from torch import nn

import schatten
from schatten import kernels, maps

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # torch says so once of the mode in which a wait is an error.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]
pytest.importorskip("triton")

# Wide, tall, equal ones together, one whose sides are no multiples of a tile, a bank and a vector.
SHAPES = [(64, 32), (64, 32), (48, 96), (65, 33), (128, 128), (3, 24, 40), (40,)]

RULES = {
    "Muon": {},
    "p = 1/2": {"rule": schatten.Rule(map=maps.Power(0.5))},
}


def setup(device="cuda", dtype=torch.float32, rule="Muon", **options):
    """An optimizer of parameters of SHAPES with gradients, the same for the same dtype."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter((torch.randn(shape, generator=generator) / 8).to(device, dtype)) for shape in SHAPES]
    bank, vector = {"params": [params[-2]], "layout": "experts"}, {"params": [params[-1]], "algorithm": "adamw"}
    options = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9, **options}
    kind = schatten.Muon if rule == "Muon" else schatten.SpectralOptimizer
    opt = kind([{"params": params[:-2]}, bank, vector], **RULES[rule], **options)
    gradients(params, generator)
    return opt, params


def gradients(params, generator):
    """New ones, at new places."""
    old = [p.grad for p in params]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p)
    return old


def moved(params, before):
    return [p.detach().double().cpu() - w for p, w in zip(params, before, strict=True)]


def copies(params):
    return [p.detach().double().cpu() for p in params]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_the_eager_path_to_the_rounding_of_bf16(rule, dtype):
    changes = {}
    for backend in ("eager", "triton"):
        opt, params = setup(dtype=dtype, rule=rule, kernels=backend, rounding="nearest", lr=0.1)
        generator, before = torch.Generator().manual_seed(1), copies(params)
        for _ in range(5):
            opt.step()
            gradients(params, generator)
        changes[backend] = moved(params, before)
    for one, other in zip(changes["triton"], changes["eager"], strict=True):
        # Each iterate is rounded to 8 bits, in another order of sums; small singular values amplify that.
        assert float((one - other).norm()) < 0.05 * float(other.norm())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_captured_step_replays_as_steps_do_with_a_schedule(rule, dtype):
    rates = [torch.tensor(0.01, device="cuda") for _ in range(2)]
    (opt, params), (plain, others) = (setup(dtype=dtype, rule=rule, kernels="triton", lr=lr) for lr in rates)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        opt.step()
    torch.cuda.current_stream().wait_stream(stream)
    plain.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    for k in range(4):
        for p, q in zip(params, others, strict=True):
            p.grad.mul_(-0.5)  # where it lies: a graph reads the same places again
            q.grad.mul_(-0.5)
        for lr in rates:
            lr.fill_(0.01 / (k + 1))
        graph.replay()
        plain.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_a_graph_replays_after_more_steps_than_tables_are_remembered_for():
    # What a graph reads must be there, however many tables were made since.
    (opt, params), (plain, others) = (setup(kernels="triton") for _ in range(2))
    opt.step()
    plain.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    plain.step()
    kept = [p.grad for p in params]
    tensors = [*params, *(t for p in params for t in opt.state[p].values())]
    before, generator = [t.detach().clone() for t in tensors], torch.Generator().manual_seed(2)
    # Nothing is freed on the way, so that each step finds its gradients where none was before.
    steps = [(gradients(params, generator), opt.step()) for _ in range(100)]
    with torch.no_grad():
        for t, was in zip(tensors, before, strict=True):
            t.copy_(was)
    for p, g in zip(params, kept, strict=True):
        p.grad = g
    del steps
    graph.replay()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_with_gradients_at_new_places_does_not_synchronise(rule, dtype):
    opt, params = setup(dtype=dtype, rule=rule, kernels="triton")
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        opt.step()
        old = gradients(params, generator)
    before = copies(params)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    del old
    assert all(float(change.norm()) > 0 for change in moved(params, before))


def test_a_step_runs_on_the_current_stream():
    (opt, params), (plain, others) = (setup(kernels="triton") for _ in range(2))
    opt.step()
    plain.step()
    wanted = [torch.randn_like(p) for p in params]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Gradients arrive late: a kernel on another stream would read the old ones.
        torch.cuda._sleep(200_000_000)
        for p, g in zip(params, wanted, strict=True):
            p.grad.copy_(g)
        opt.step()
    torch.cuda.current_stream().wait_stream(stream)
    for p, g in zip(others, wanted, strict=True):
        p.grad.copy_(g)
    plain.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_parameters_on_a_device_that_is_not_current_are_stepped_there():
    (opt, params), (plain, others) = (setup(f"cuda:{i}", kernels="triton") for i in (1, 0))
    for _ in range(2):
        opt.step()
        plain.step()
    assert torch.cuda.current_device() == 0
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p.cpu(), q.cpu(), rtol=0, atol=0)


def test_a_gradient_with_inf_is_skipped_alone_in_its_launch():
    opt, params = setup(kernels="triton")
    opt.step()
    params[1].grad[3, 5] = torch.inf
    params[-1].grad[7] = torch.nan
    before = copies(params)
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    still = [float(change.norm()) == 0 for change in moved(params, before)]
    assert still == [False, True, False, False, False, False, True]
    assert [int(opt.state[p]["skipped"]) for p in params] == [0, 1, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("rule", RULES)
def test_a_schedule_of_lr_and_momentum_compiles_nothing(rule, monkeypatch, tmp_path):
    opt, params = setup(rule=rule, kernels="triton")
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        opt.step()
        gradients(params, generator)
    # What is compiled from here on leaves files in this folder.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for k in range(50):
        for group in opt.param_groups:
            # Whole numbers too, which a kernel may see as another type, and 1 and 0, which it may compile in.
            group["lr"] = 0 if k == 0 else 1 if k == 1 else 0.1 / (k + 1)
            group["weight_decay"] = 0 if k == 2 else 0.1 * k / 50
            if "momentum" in group:
                group["momentum"] = 0.85 + 0.1 * k / 50
        opt.step()
        gradients(params, generator)
    assert list(tmp_path.iterdir()) == []
    # Guards the line above against a folder nothing is ever written to: another dtype is another kernel.
    own = nn.Parameter(torch.ones(17, 19, device="cuda", dtype=torch.float16))
    own.grad = torch.ones_like(own)
    new = schatten.Muon([own], kernels="triton", form="sum", nesterov=False, maximize=True)
    new.step()
    assert any(Path(tmp_path).iterdir())


@pytest.mark.parametrize("mebibytes", [16, 160])
@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_allocates_no_more_than_max_batch_bytes(rule, dtype, backend, mebibytes):
    shapes = [(768, 768)] * 24 + [(3072, 768)] * 6 + [(768, 3072)] * 6
    params = [nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    kind = schatten.Muon if rule == "Muon" else schatten.SpectralOptimizer
    opt = kind(params, **RULES[rule], momentum=0.9, kernels=backend, max_batch_bytes=mebibytes << 20)
    for _ in range(2):
        opt.step()  # the libraries' workspaces, tables, and what a search of tiles needs
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    opt.step()
    torch.cuda.synchronize()
    # One matrix at least is stepped at a time, of up to 32 bytes an entry; flags and norms are some kilobytes.
    allowed = max(mebibytes << 20, 32 * 3072 * 768) + (1 << 20)
    assert torch.cuda.max_memory_allocated() - before <= allowed


def test_gradients_go_through_a_polar_factor_on_a_gpu():
    X = torch.randn(8, 12, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    schatten.polar(X).float().square().sum().backward()
    assert X.grad is not None and bool(X.grad.isfinite().all())


@pytest.fixture
def bank():
    """More than 2^31 entries in bf16, as 33 matrices."""
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    X = torch.empty(33, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    for matrix in X:
        matrix.normal_()
    yield X
    del X
    torch.cuda.empty_cache()


def test_banks_of_more_than_two_to_the_31_entries_are_found_whole(bank):
    with kernels.use("triton"):
        found = kernels.gram(bank)
    for i in (0, 31, 32):
        wanted = bank[i].float() @ bank[i].float().mT
        # Rounded once to bf16.
        assert float((found[i].float() - wanted).norm()) < 0.01 * float(wanted.norm())
        assert torch.equal(found[i], found[i].mT)
    last = bank[32].float().norm()
    with kernels.use("triton"):
        out = kernels.quotient(bank, torch.full((33, 1, 1), 2.0, device="cuda"), torch.bfloat16)
    assert torch.equal(out[32].float(), bank[32].float() / 2) and bool(last.isfinite())
    del out
    with kernels.use("triton"):
        moved = kernels.affine(found, bank, 0.5)
    wanted = 0.5 * bank[32].float() + found[32].float() @ bank[32].float()
    assert float((moved[32].float() - wanted).norm()) < 0.01 * float(wanted.norm())
