"""The self test: it passes for every preset, says what it did not check, and leaves no trace."""

import copy

import pytest
import torch
from torch import nn

import schatten
from schatten import Layout, maps, retractions, solvers
from schatten.self_test import SelfTestError, self_test
from schatten.self_test.second_path import assembled, logical
from schatten.self_test.trial import Trial

LAYOUTS = {
    "qkv.weight": Layout(split=(8, 4, 4), heads=(2, 1, 1)),
    "out.weight": Layout(heads=2, axis="fan_in"),
    "bank": Layout("experts", groups=4, split=2, transpose=True),
}


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 16), nn.Linear(8, 8)
        self.up, self.gate, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.conv = nn.Conv2d(3, 4, 3)
        self.bank = nn.Parameter(torch.randn(3, 8, 8))
        self.head = nn.Linear(8, 11)


def mixed(preset, dtype=torch.float32, **options):
    rules = [(name, "spectral", {"layout": layout}) for name, layout in LAYOUTS.items()]
    return preset(Mixed().to(dtype), rules=rules, **options)


def not_checked(report):
    return {(c.check, c.parameter): c.measured for c in report if c.ok is None}


def small():
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_preset_passes_with_its_documented_defaults(any_preset, dtype):
    report = self_test(mixed(any_preset, dtype))
    assert all(check.ok is not False for check in report)
    if any_preset.needs_closure:
        assert not_checked(report) == {("step", "all"): "not checked: step() needs a closure that returns the loss"}
        return
    # In bf16 one step at a documented lr may be less than a unit in the last place.
    unresolved = {"step"} if dtype == torch.bfloat16 else set()
    assert {check for check, _ in not_checked(report)} <= {"singular values", *unresolved}
    for kind in ("update", "momentum", "decay", "twice the lr", "accumulation", "no gradient", "read only"):
        assert any(check.check == kind and check.ok for check in report), kind


OPTIONS = {
    "implicit": {"decay": "implicit"},
    "cautious": {"decay": "cautious"},
    "tied": {"decay": retractions.TiedDecay()},
    "floor": {"decay": retractions.UpdateFloor()},
    "keller's quintic": {"solver": solvers.newton_schulz()},
    "svd": {"solver": solvers.svd()},
    "sum": {"form": "sum", "nesterov": False},
    "ascent": {"maximize": True},
    "no decay": {"weight_decay": 0.0},
    "tensor lr": {"lr": torch.tensor(0.01)},
    "nearest": {"rounding": "nearest"},
    "kahan": {"rounding": "kahan"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_form_of_muon_passes(name, dtype):
    self_test(mixed(schatten.Muon, dtype, **OPTIONS[name]))


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("map", [maps.Nuclear(), maps.Huber(0.1)], ids=["nuclear", "huber"])
def test_short_momentum_passes(map, state_dtype):
    rule = schatten.Rule(map=map)
    self_test(schatten.SpectralOptimizer(small(), rule, lr=0.01, momentum=0.9, state_dtype=state_dtype))


def test_a_scheduled_optimizer_passes_also_where_a_warm_up_begins_at_zero():
    opt = schatten.Muon(small(), decay=retractions.TiedDecay())
    torch.optim.lr_scheduler.LambdaLR(opt, lambda t: t / 10)
    assert opt.param_groups[0]["lr"] == 0.0
    report = self_test(opt)
    assert all(check.ok for check in report)
    steps = [check for check in report if check.check == "step"]
    assert steps and all((check.expected, check.measured) == ("no change", "length 0") for check in steps)


def trace(opt, model):
    """Everything that must be bit-identical after a self test."""
    return copy.deepcopy(
        {
            "weights": [p.detach() for p in model.parameters()],
            "gradients": [p.grad for p in model.parameters()],
            "state": [opt.state[p] for p in model.parameters()],
            "groups": [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups],
            "random": torch.get_rng_state(),
        }
    )


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nothing_of_the_optimizer_and_no_random_state_changes(preset, dtype):
    model = small().to(dtype)
    opt = preset(model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    opt.step()
    model[1].bias.grad = None
    before, grads = trace(opt, model), [p.grad for p in model.parameters()]
    self_test(opt)
    assert same(trace(opt, model), before)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert len(opt.state) == len(list(model.parameters())) and not hasattr(opt, "found_inf")


def test_a_run_with_self_tests_is_the_run_without():
    results = []
    for tested in (False, True):
        torch.manual_seed(0)
        model = small().bfloat16()
        opt = schatten.Muon(model, lr=0.1)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            if tested:
                self_test(opt)
            opt.step()
        results.append([p.detach() for p in model.parameters()])
    assert same(*results)


def test_a_report_is_the_same_every_time_and_prints_as_a_table():
    opt = mixed(schatten.Muon)
    report = self_test(opt)
    assert self_test(opt) == report
    lines = str(report).splitlines()
    assert lines[0].split() == ["check", "parameter", "expected", "measured", "ok"]
    assert len(lines) == len(report) + 2


def test_a_failure_names_check_parameter_and_both_values_and_carries_the_report():
    opt = schatten.Muon(small(), lr=0.01)
    opt.param_groups[0]["weight_decay"] = 0.0
    with pytest.raises(SelfTestError, match=r"2 of \d+ checks failed; no weight was changed") as caught:
        self_test(opt)
    failed = [check for check in caught.value.report if check.ok is False]
    assert {(c.check, c.parameter) for c in failed} == {("numbers", f"{i}.weight") for i in (0, 2)}
    assert "lr 0.01, weight_decay 0.1" in str(caught.value) and "lr 0.01, weight_decay 0.0" in str(caught.value)


def test_hand_made_groups_keep_their_own_numbers_and_pass():
    model = small()
    matrices, rest = [[p for p in model.parameters() if (p.ndim == 2) is want] for want in (True, False)]
    groups = [{"params": matrices, "lr": 0.3}, {"params": rest, "algorithm": "adamw", "lr": 1e-4, "betas": (0.8, 0.9)}]
    self_test(schatten.Muon(groups, lr=0.02))


def test_a_parameter_added_later_is_tested_too():
    model = small()
    opt = schatten.Muon(model)
    opt.add_param_group({"params": [("late", nn.Parameter(torch.randn(5, 7)))]})
    assert any(c.parameter == "late" and c.check == "update" for c in self_test(opt))


@pytest.mark.parametrize(
    ("opt", "why"),
    [
        (lambda: schatten.MuonMVR(small(), exact=True), "reads what MuonMVR evaluates"),
        (lambda: schatten.EF21Muon(small(), workers=2), "reads what EF21Muon evaluates"),
        (lambda: schatten.JaguarMuon(small()), "needs a closure"),
    ],
    ids=["second gradient", "workers", "closure"],
)
def test_what_needs_more_than_gradients_is_said_to_be_unchecked(opt, why):
    ((_, measured),) = not_checked(self_test(opt())).items()
    assert measured.startswith("not checked: ") and why in measured


def test_a_hook_that_takes_gradients_in_backward_is_said_to_leave_accumulation_unchecked():
    opt = schatten.Muon(small())
    with opt.step_in_backward():
        skipped = not_checked(self_test(opt))
    assert {check for check, _ in skipped} == {"accumulation"}
    assert not not_checked(self_test(opt))


def test_a_frozen_parameter_with_an_old_gradient_is_caught():
    model = small()
    opt = schatten.Muon(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    model[2].weight.requires_grad_(False)
    with pytest.raises(SelfTestError, match=r"frozen +2.weight +no gradient"):
        self_test(opt)
    model[2].weight.grad = None
    self_test(opt)


def test_a_weight_that_is_not_finite_is_caught_by_name():
    model = small()
    model[2].weight.data[1, 2] = float("nan")
    with pytest.raises(SelfTestError, match=r"update +2.weight"):
        self_test(schatten.Muon(model))


def test_only_one_or_two_parameters_of_each_shape_are_copied():
    model = nn.Sequential(nn.Embedding(300_000, 4), *(nn.Linear(16, 16) for _ in range(5)), nn.Linear(1100, 1000, bias=False))
    opt = schatten.Muon(model)
    subjects = Trial(opt, {name: "matrix" for name in dict(model.named_parameters())}).subjects
    counts = {tuple(s.start.shape): sum(t.start.shape == s.start.shape for t in subjects) for s in subjects}
    # A large matrix is alone, and a large table's first rows stand for it.
    assert counts == {(262_144, 4): 1, (16, 16): 2, (16,): 2, (1000, 1100): 1}


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((24, 6), Layout("matrix", split=(12, 6, 6), heads=(4, 2, 1))),
        ((24, 6), Layout("matrix", split=3, groups=4)),
        ((24, 6), Layout("matrix", split=3, heads=4, groups=2)),
        ((6, 24), Layout("matrix", split=3, groups=4, axis="fan_in")),
        ((6, 24), Layout("matrix", split=2, transpose=True)),
        ((4, 6, 3, 2), Layout("conv", heads=3, axis="fan_in")),
        ((4, 6, 3), Layout("conv", split=3, transpose=True)),
        ((4, 6, 3, 2), Layout("positions", split=2)),
        ((2, 3, 4, 6), Layout("experts", split=2, transpose=True)),
        ((4, 6, 3), "flat"),
        ((), "flat"),
    ],
    ids=str,
)
def test_both_paths_cut_the_same_blocks(shape, layout):
    t = torch.randn(shape)
    blocks = logical(t, layout)
    engine = [block for piece in schatten.layout.pieces(layout, shape) for block in piece.of(t)]
    assert sorted((tuple(b.shape), b.flatten().tolist()) for b in blocks) == sorted(
        (tuple(b.shape), b.flatten().tolist()) for b in engine
    )
    assert torch.equal(assembled(blocks, shape, layout), t)
