"""A step on Triton's kernels is the step of the eager back-end, to the rounding of its products, for every rule and layout."""

import importlib

import pytest
import torch
from torch import nn

import schatten
from schatten import finite, fused, stepping
from schatten.batching import Part
from tests.facts.test_step_memory import peak_bytes

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(20, 36), (36, 20), (20, 36)]

# Entries of an update are lr long or less, and a few roundings to the precision of products apart. In fp32 so few that their
# growth shows: smallest singular values, 0.02 of the norm here, are enlarged fiftyfold, and rounding with them. The Gram form
# of fp16 rounds up to four times as much as the product form.
UNIT = {"bfloat16": 2**-8, "float16": 2**-9, "float32": 2**-18}
BOUND = {dtype: 2 * 0.1 * 5 * unit for dtype, unit in UNIT.items()}  # lr 0.1, two steps


def parameters(shapes=SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype)) for shape in shapes]


def trained(build, shapes=SHAPES, dtype=torch.float32, steps=2, hit=None):
    params = parameters(shapes, dtype)
    opt = build(params)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=generator).to(p)
            if (step, i) == hit:
                p.grad[0, 0] = float("nan")
        opt.step()
    return params, opt


def differences(build, of_state=1e-5, **options):
    (eager, first), (kernels, second) = (
        trained(lambda params, name=name: build(params, kernels=name), **options) for name in ("eager", "triton")
    )
    for a, b in zip(eager, kernels, strict=True):
        for key in first.state[a]:
            # Averages of gradients near 1 are one rounding of fp32 apart.
            torch.testing.assert_close(first.state[a][key], second.state[b][key], rtol=of_state, atol=of_state)
    return max(float((a - b).detach().abs().max()) for a, b in zip(eager, kernels, strict=True))


@pytest.fixture
def seen(monkeypatch):
    """How many batches went whole through the kernels."""
    calls = []
    whole = fused.polar_step_
    monkeypatch.setattr(fused, "polar_step_", lambda *a: calls.append(whole(*a)) or calls[-1])
    return calls


@pytest.mark.parametrize(
    ("solver", "dtype"),
    [(schatten.solvers.polynomial, dtype) for dtype in UNIT]
    + [(solver, "float32") for solver in (schatten.solvers.gram, schatten.solvers.newton_schulz)],
)
def test_a_polar_step_is_the_eager_one_to_the_rounding_of_its_products(solver, dtype, seen):
    worst = differences(lambda p, **o: schatten.Muon(p, lr=0.1, scale="none", solver=solver(dtype=dtype), **o))
    assert seen.count(True) == 2 * 2, "two steps of both shapes were the kernels'"
    assert worst < BOUND[dtype]


OPTIONS = {
    "implicit decay": {"decay": "implicit", "weight_decay": 0.5},
    "a sum": {"form": "sum"},
    "no look-ahead": {"nesterov": False},
    "ascent": {"maximize": True},
    "lr on the device": {"lr": torch.tensor(0.1)},
    "one matrix at a time": {"max_batch_bytes": 1},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_its_options_are_those_of_the_eager_step(name, seen):
    def build(params, **options):
        given = {"lr": 0.1, "scale": "none", "solver": schatten.solvers.polynomial(dtype="float32"), **OPTIONS[name], **options}
        if isinstance(given["lr"], torch.Tensor):
            given["lr"] = given["lr"].to(DEVICE)
        return schatten.Muon(params, **given)

    assert differences(build) < BOUND["float32"] and all(seen[-3:])


LAYOUTS = {
    "fused qkv": ((60, 20), {"split": 3}),
    "heads": ((24, 20), {"heads": 3}),
    "columns": ((20, 48), {"split": 2, "axis": "fan_in"}),
    "transposed": ((20, 60), {"split": 3, "transpose": True}),
    "grouped queries": ((32, 20), {"split": (16, 8, 8)}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_matrices_inside_parameters_are_stepped_in_place(name, seen):
    shape, layout = LAYOUTS[name]

    def build(params, **options):
        group = {"params": params, "layout": schatten.Layout(**layout)}
        solver = schatten.solvers.polynomial(dtype="float32")
        return schatten.Muon([group], lr=0.1, scale="none", solver=solver, **options)

    assert differences(build, shapes=[shape, shape]) < BOUND["float32"] and any(seen)


@pytest.mark.parametrize(("shape", "memory"), [((12, 3, 3, 3), torch.contiguous_format), ((12, 4, 3, 3), torch.channels_last)])
def test_convolutions_are_stepped_in_their_memory_format(shape, memory):
    def build(params, **options):
        for p in params:
            p.data = p.data.contiguous(memory_format=memory)
        solver = schatten.solvers.polynomial(dtype="float32")
        return schatten.Muon(params, lr=0.1, scale="none", solver=solver, **options)

    assert differences(build, shapes=[shape, shape]) < BOUND["float32"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["stochastic", "kahan", "nearest"])
def test_half_precision_weights_are_rounded_as_asked(dtype, rounding):
    def build(params, **options):
        solver = schatten.solvers.polynomial(dtype="float32")
        return schatten.Muon(params, lr=0.1, scale="none", solver=solver, rounding=rounding, **options)

    # A result near the middle between two neighbours, or near the noise, may fall to the other side once.
    unit = {torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert differences(build, dtype=dtype, steps=1) <= 4 * unit


def test_a_gradient_that_is_not_finite_stops_its_own_matrix_only(monkeypatch, seen):
    monkeypatch.setattr(finite, "looking_is_free", lambda p: False)
    build = lambda p, **o: schatten.Muon(p, lr=0.1, solver=schatten.solvers.polynomial(dtype="float32"), **o)  # noqa: E731
    params, opt = trained(lambda p: build(p, kernels="triton"), hit=(1, 2))
    other, plain = trained(lambda p: build(p, kernels="eager"), hit=(1, 2))
    assert all(seen[:3]) and opt.metrics()["skipped"] == plain.metrics()["skipped"] == {"0.2": 1}
    for p, q in zip(params, other, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4)
        assert float(opt.state[p]["step"]) == float(plain.state[q]["step"])


@pytest.mark.parametrize("masked", [False, True])
def test_a_scaler_divides_and_skips(monkeypatch, masked):
    if masked:
        monkeypatch.setattr(finite, "looking_is_free", lambda p: False)

    def build(params, **options):
        opt = schatten.Muon(params, lr=0.1, scale="none", solver=schatten.solvers.polynomial(dtype="float32"), **options)
        opt.grad_scale, opt.found_inf = torch.tensor(1024.0, device=DEVICE), torch.tensor(0.0, device=DEVICE)
        return opt

    assert differences(build) < BOUND["float32"]
    params = parameters()
    opt = build(params, kernels="triton")
    opt.found_inf.fill_(1.0)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))


def test_a_rule_with_other_slots_has_the_known_ones_from_kernels(monkeypatch):
    used = []

    def watched(name):
        real = getattr(fused, name)

        def call(*args):
            result = real(*args)
            used.append((name, result is not None and result is not False))
            return result

        monkeypatch.setattr(fused, name, call)

    watched("signals_")
    watched("retract_")
    tower = schatten.solvers.tower(dtype="float32")
    worst = differences(lambda p, **o: schatten.SpectralSGD(p, p=0.5, lr=0.1, solver=tower, **o))
    # Directions of a tower are sums with weights of a few, and not divided by their norm: 20 times as far apart at most.
    assert worst < 20 * BOUND["float32"]
    assert used.count(("signals_", True)) == used.count(("retract_", True)) == 4


def test_measuring_a_step_changes_it_by_rounding_alone():
    def build(params, **options):
        opt = schatten.Muon(params, lr=0.1, scale="none", solver=schatten.solvers.polynomial(dtype="float32"), **options)
        opt.metrics(every=1)
        return opt

    assert differences(build) < BOUND["float32"]


def test_every_preset_trains_as_on_the_eager_back_end(preset):
    if preset in (schatten.EF21Muon, schatten.JaguarMuon):
        pytest.skip("evaluates gradients in its step")
    options = {"rounding": "nearest"}
    # One step, as what follows from signs and bases that are chosen need not stay near; products may be in bf16, and state
    # may be made of directions.
    of_state = UNIT["bfloat16"]
    worst = differences(lambda p, **o: preset(p, lr=0.01, **options, **o), of_state, steps=1, shapes=SHAPES[:2])
    assert worst < 0.01 * 20 * 5 * UNIT["bfloat16"]


@pytest.mark.parametrize("algorithm", ["spectral", "adamw"])
@pytest.mark.parametrize("map", [schatten.maps.Nuclear, schatten.maps.Frobenius])
def test_a_graph_kept_over_a_step_is_refused(algorithm, map):
    # As after torch's own in-place operations, and unlike after its fused optimizers.
    W = nn.Parameter(torch.ones(4, 4, device=DEVICE))
    rule = schatten.Rule(map=map())
    opt = schatten.SpectralOptimizer([{"params": [W], "algorithm": algorithm}], rule, momentum=0.9, kernels="triton")
    loss = (W * W).sum()
    loss.backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Idle:
    """A kernel that does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.mark.skipif(DEVICE == "cuda", reason="measured by tests/gpu")
@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("shape", [(96, 96), (96, 384), (384, 96), (96, 120)])
def test_the_memory_of_a_polar_step_keeps_to_its_bound(monkeypatch, shape, dtype):
    # What is allocated does not depend on what is computed, which here would take minutes.
    for name in ("product", "momentum", "division"):
        module = importlib.import_module(f"schatten.kernels.triton.{name}")
        for key, value in vars(module).items():
            if hasattr(value, "__getitem__") and type(value).__name__ == "InterpretedFunction":
                monkeypatch.setattr(module, key, Idle())
    params = parameters([shape] * 24)
    for p in params:
        p.grad = torch.ones_like(p)
    for bound in (1 << 20, 1 << 21, 1 << 23):
        solver = schatten.solvers.polynomial(dtype=dtype)
        opt = schatten.Muon(params, solver=solver, max_batch_bytes=bound, kernels="triton")
        opt.step()
        # Tables and norms.
        assert peak_bytes(opt.step) <= bound + (1 << 16)


def test_a_planted_mistake_is_seen(monkeypatch):
    real = stepping.fused.polar_step_

    def late(whole: Part, rule, group, scale, tables):
        return real(whole, rule, {**group, "momentum": 0.0}, scale, tables)

    monkeypatch.setattr(stepping.fused, "polar_step_", late)
    with pytest.raises(AssertionError):
        differences(lambda p, **o: schatten.Muon(p, lr=0.1, solver=schatten.solvers.polynomial(dtype="float32"), **o))
