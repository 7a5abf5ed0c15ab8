"""Precision: half-precision weights that move, short averages, the same bits twice, and no host in the way."""

import copy

import pytest
import torch
from torch import nn

import schatten
from schatten import Layout, blockwise, solvers
from tests.contracts.driving import step

HALF = [torch.bfloat16, torch.float16]


def trained(opt, params, steps=4):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        opt.step()
    return [p.detach().double() for p in params]


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_a_bf16_weight_of_one_decays_as_the_formula_says(rounding):
    # 1000 steps of lr 1e-3 and decay 0.1: 0.905. Rounded to nearest it stays 1.0 (users.md, section 6).
    p = nn.Parameter(torch.ones(64, 32, dtype=torch.bfloat16))
    b = nn.Parameter(torch.ones(512, dtype=torch.bfloat16))
    opt = schatten.Muon([{"params": [p]}, {"params": [b], "algorithm": "adamw"}], lr=1e-3, weight_decay=0.1, rounding=rounding)
    p.grad, b.grad = torch.zeros_like(p), torch.zeros_like(b)
    for _ in range(1000):
        opt.step()
    for t in (p, b):
        assert t.float().mean().item() == pytest.approx(0.9048, abs=0.02)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("algorithm", ["spectral", "adamw"])
def test_with_kahan_a_half_precision_weight_follows_its_fp64_twin(dtype, algorithm):
    start = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    results = {}
    for rounding, kind in (("kahan", dtype), ("nearest", dtype), ("nearest", torch.float64)):
        p = nn.Parameter(start.to(kind, copy=True))
        opt = schatten.Muon([{"params": [p], "algorithm": algorithm}], lr=1e-4, rounding=rounding, solver=solvers.svd())
        generator = torch.Generator().manual_seed(1)
        for _ in range(50):
            p.grad = torch.randn(p.shape, generator=generator).to(dtype).to(kind)
            opt.step()
        results[rounding, kind] = p.detach().double()
    twin = results["nearest", torch.float64]
    error = {rounding: float((results[rounding, dtype] - twin).norm()) for rounding in ("kahan", "nearest")}
    # What is kept doubles the bits: the sum is off by the step's own error alone, so the weight by its own rounding, half a
    # unit in the last place, relative to its size, in every entry.
    bound = torch.finfo(dtype).eps / 2 * float(start.double().norm())
    assert error["kahan"] <= 1.2 * bound
    assert error["nearest"] > error["kahan"]


def test_kahans_compensation_is_what_rounding_took_and_is_in_the_checkpoint():
    p = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    opt = schatten.Muon([p], lr=1e-3, rounding="kahan")
    trained(opt, [p])
    lost = opt.state[p]["compensation"]
    assert lost.dtype == torch.bfloat16 and lost.abs().max() > 0
    # At most half a unit in the last place of 1.
    assert lost.abs().max() <= 2**-8
    q = nn.Parameter(p.detach().clone())
    other = schatten.Muon([q], lr=1e-3, rounding="kahan")
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert all(torch.equal(x, y) for x, y in zip(trained(opt, [p]), trained(other, [q]), strict=True))


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_a_rounded_run_repeats_bit_for_bit_without_touching_the_users_random_state(any_preset, rounding):
    runs = []
    for _ in range(2):
        params = [nn.Parameter(torch.ones(6, 4, dtype=torch.bfloat16)), nn.Parameter(torch.ones(3, 6, 4, dtype=torch.bfloat16))]
        opt = any_preset([{"params": params[:1]}, {"params": params[1:], "layout": "experts"}], rounding=rounding)
        state = torch.get_rng_state()
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            step(opt)
        assert torch.equal(torch.get_rng_state(), state)
        runs.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


def test_deterministic_mode_accepts_every_preset(any_preset):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        p = nn.Parameter(torch.ones(6, 4))
        opt = any_preset([p])
        for _ in range(2):
            p.grad = torch.randn_like(p)
            step(opt)
    finally:
        torch.use_deterministic_algorithms(before)
    assert p.isfinite().all()


# -- short averages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("state_dtype", "dtype"), [("bfloat16", torch.bfloat16), ("int8", torch.int8)])
def test_an_average_is_kept_in_the_dtype_asked_for(state_dtype, dtype):
    p = nn.Parameter(torch.zeros(600, 300))
    opt = schatten.Muon([p], state_dtype=state_dtype)
    p.grad = torch.randn_like(p)
    opt.step()
    kept = opt.state[p]
    assert kept["momentum_buffer"].dtype == dtype
    size = sum(t.numel() * t.element_size() for t in kept.values())
    # 2 bytes an entry, or 1 and a scale of 4 for 256 of a row of 300, which needs two.
    assert size == {"bfloat16": 2 * p.numel(), "int8": p.numel() + 4 * 600 * 2}[state_dtype] + 8


@pytest.mark.parametrize(
    "layout", ["matrix", Layout(split=(8, 4, 4)), Layout(transpose=True), Layout(heads=2, axis="fan_in")], ids=str
)
@pytest.mark.parametrize(("state_dtype", "error"), [("bfloat16", 2**-8), ("int8", 1 / 127)])
def test_a_short_average_is_the_long_one_up_to_its_step(layout, state_dtype, error):
    averages = {}
    for kind in (None, state_dtype):
        p = nn.Parameter(torch.zeros(16, 16))
        opt = schatten.Muon([{"params": [p], "layout": layout}], lr=0.0, weight_decay=0.0, momentum=0.9, state_dtype=kind)
        trained(opt, [p], steps=6)
        M = opt.state[p]["momentum_buffer"]
        if kind == "int8":
            scales = [opt.state[p][key] for key in opt.state[p] if key.startswith("momentum_buffer_scales")]
            pieces = schatten.layout.pieces(layout, p.shape)
            whole = torch.zeros(p.shape)
            for piece, scale in zip(pieces, scales, strict=True):
                place = piece.view(whole)
                place.copy_(blockwise.decode(piece.of(M), scale).reshape(place.shape))
            M = whole
        averages[kind] = M.float()
    # Each step adds an error below one step of the grid, of the largest entry here, and beta = 0.9 sums to at most ten.
    bound = 10 * error * float(averages[None].abs().max())
    assert float((averages[state_dtype] - averages[None]).abs().max()) <= bound


def test_stochastic_int8_does_not_stall_where_rounding_to_nearest_would():
    # A constant gradient beside one ten times as large: beta = 0.99 moves the small entry by less than half a step at a
    # time, and yet it arrives. The last place of int8 is 1/127 of the largest.
    p = nn.Parameter(torch.zeros(1, 256))
    opt = schatten.Muon([p], lr=0.0, momentum=0.99, state_dtype="int8")
    G = torch.full((1, 256), 0.1)
    G[0, 0] = 1.0
    for _ in range(600):
        p.grad = G
        opt.step()
    M = blockwise.decode(opt.state[p]["momentum_buffer"].reshape(1, 1, 256), opt.state[p]["momentum_buffer_scales"])
    assert M[..., 1:].mean().item() == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_training_with_a_short_average_ends_where_the_long_one_ends(state_dtype):
    losses = {}
    for kind in (None, state_dtype):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        X = torch.randn(256, 16)
        Y = torch.tanh(X @ torch.randn(16, 4))
        opt = schatten.Muon(net, lr=3e-3, weight_decay=0.0, state_dtype=kind)
        for _ in range(100):
            opt.zero_grad()
            loss = nn.functional.mse_loss(net(X), Y)
            loss.backward()
            opt.step()
        losses[kind] = loss.item()
    # The loss falls from 0.5 to some 0.01 here; the runs differ as two seeds of the noise would.
    assert losses[state_dtype] < 1.5 * losses[None]


def test_a_rule_without_averages_refuses_a_short_one():
    with pytest.raises(ValueError, match=r"state_dtype='int8' shortens running averages .* keeps none"):
        rule = schatten.Rule(signal=schatten.signals.Gradient())
        schatten.SpectralOptimizer([nn.Parameter(torch.zeros(4, 4))], rule, state_dtype="int8")


def test_an_unknown_state_dtype_is_refused():
    with pytest.raises(ValueError, match=r"state_dtype must be one of None, 'bfloat16', 'int8', got 'fp8'"):
        schatten.Muon([nn.Parameter(torch.zeros(4, 4))], state_dtype="fp8")


# -- devices that must not wait ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"rounding": "kahan"}, {"state_dtype": "int8"}], ids=["plain", "kahan", "int8"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_step_reads_no_value_back_to_the_host(preset, kind, options):
    # A tensor on the meta device has no value: whatever asks for one raises. A step that passes here can be captured in
    # a CUDA graph, as far as the host is concerned.
    params = [nn.Parameter(torch.empty(8, 6, device="meta", dtype=kind)) for _ in range(3)]
    params.append(nn.Parameter(torch.empty(4, 8, 6, device="meta", dtype=kind)))
    try:
        opt = preset([{"params": params[:3]}, {"params": params[3:], "layout": "experts"}], **options)
    except ValueError as error:
        assert "keeps none" in str(error)
        return
    for p in params:
        p.grad = torch.empty_like(p)
    for _ in range(2):
        opt.step()


def test_the_noise_of_a_step_follows_the_count_on_the_device():
    # What a captured step replays has no Python in it: the count on the device alone must change the noise.
    p = nn.Parameter(torch.full((64, 64), 1.0, dtype=torch.bfloat16))
    opt = schatten.Muon([p], lr=1e-3, momentum=0.0)
    rounded = []
    for count in (0, 0, 1):
        p.data.fill_(1.0)
        opt.state[p]["step"].fill_(count)
        p.grad = torch.zeros_like(p)
        opt.param_groups[0]["step"] = 7
        opt.step()
        rounded.append(p.detach().clone())
    assert torch.equal(rounded[0], rounded[1]) and not torch.equal(rounded[0], rounded[2])


def test_equal_parameters_are_rounded_by_noise_of_their_own():
    params = [nn.Parameter(torch.full((64, 64), 1.0, dtype=torch.bfloat16)) for _ in range(2)]
    opt = schatten.Muon(params, lr=1e-3, momentum=0.0)
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert not torch.equal(*params)


def test_an_lr_on_the_device_is_not_read_back_when_other_numbers_change():
    p = nn.Parameter(torch.empty(8, 6, device="meta"))
    opt = schatten.Muon([p], lr=torch.tensor(0.1, device="meta"))
    p.grad = torch.empty_like(p)
    for momentum in (0.9, 0.95):
        opt.param_groups[0]["momentum"] = momentum
        opt.step()


@pytest.mark.parametrize("shape", [(4, 4), (3, 4, 4)])
def test_averages_of_simulated_workers_refuse_to_be_shortened_in_silence(shape):
    group = {"params": [nn.Parameter(torch.zeros(shape))], "layout": "matrix" if len(shape) == 2 else "experts"}
    with pytest.raises(ValueError, match=r"state_dtype='int8' .* keeps none in the parameter's shape"):
        schatten.EF21Muon([group], workers=2, state_dtype="int8")
