"""Emerging-Optimizers and Megatron-Core (peers.md 1.4): schedules beyond their length, refused dtypes, hidden options."""

import copy
import inspect
import itertools

import pytest
import torch
from torch import nn

import schatten
from schatten import presets, solvers
from schatten.solvers.schedules import SCHEDULES
from tests.peer_bugs.helpers import (
    SOLVERS,
    Opt,
    P,
    assert_caught,
    exact,
    gaussian,
    raises,
    relative,
    solver_of,
    steps,
)
from tests.peer_bugs.mistakes import quintics
from tests.peer_bugs.test_keller_bugs import gradients_are_only_read

# Its table for the row-rescaled AOL iteration, used there on Frobenius-normalised input and repeated when it ends.
AOL = [
    (4.0098, -7.0585, 2.4635),
    (3.4585, -5.5479, 2.5959),
    (2.7573, -3.2939, 1.4254),
    (2.7215, -3.0494, 1.3169),
]

G = gaussian(32, 64)

STEPPED = {
    "polynomial": lambda n: solvers.polynomial(steps=n, dtype="float32"),
    "gram": lambda n: solvers.gram(steps=n, dtype="float32"),
    **{name: (lambda n, name=name: solvers.newton_schulz(name, steps=n, dtype="float32")) for name in SCHEDULES},
}


def any_number_of_steps_descends_or_is_refused(build, enough=5):
    accepted = 0
    for n in (1, 2, 3, 4, 5, 6, 7, 10):
        if raises(ValueError, lambda n=n: build(n)):
            continue
        accepted += 1
        P = build(n)(G)
        assert (P * G).sum() > 0, n
        if n >= enough:
            assert abs(float((P.double() * exact(G)).sum()) / 32 - 1) < 0.25, n
    assert accepted >= 5


@pytest.mark.parametrize("name", STEPPED)
def test_no_number_of_steps_ascends_or_loses_the_polar_factor(name):
    any_number_of_steps_descends_or_is_refused(STEPPED[name])


def test_a_schedule_that_starts_again_at_its_end_is_caught():
    def cycled(n):
        schedule = list(itertools.islice(itertools.cycle(AOL), n))
        return lambda X: quintics(X / X.norm(), schedule)

    with pytest.raises(AssertionError):
        any_number_of_steps_descends_or_is_refused(cycled)


def test_every_solver_with_a_number_of_steps_is_in_that_test():
    counted = {name for name, builder in SOLVERS.items() if "steps" in inspect.signature(builder).parameters}
    assert counted == {"polynomial", "gram", "newton_schulz"}


def test_quintics_that_need_another_normalisation_are_refused():
    # There is no preset of that name, and its quintics send sigma = 1, which Frobenius normalisation may give, below zero.
    assert raises(ValueError, lambda: solvers.newton_schulz("aol"))
    with pytest.raises(ValueError, match="ascends"):
        solvers.newton_schulz(AOL[:1])


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_runs_to_its_end_by_default(name):
    schedule = SCHEDULES[name]
    whole = 5 if schedule.repeats else len(schedule.quintics)
    assert torch.equal(solvers.newton_schulz(name)(G), solvers.newton_schulz(name, steps=whole)(G))
    assert len(solvers.newton_schulz(name).quintics) == whole


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_preset_trains_parameters_of_every_floating_dtype(any_preset, dtype):
    params = [P(16, 8, dtype=dtype), P(5, dtype=dtype)]
    rest = {"layout": "flat"} if any_preset.needs_closure else {"algorithm": "adamw"}
    opt = any_preset([{"params": params[:1]}, {"params": params[1:], **rest}], lr=0.1)
    before = [p.detach().clone() for p in params]
    after = steps(opt, params, 2)
    for w, v in zip(before, after, strict=True):
        assert v.dtype == dtype and v.isfinite().all() and not torch.equal(w, v)


def test_a_closure_is_called_and_its_value_returned(any_preset):
    assert float(any_preset([P(8, 8)]).step(lambda: torch.tensor(3.0))) == 3


@pytest.mark.parametrize("decay", ["explicit", "implicit", "cautious", schatten.retractions.TiedDecay()], ids=repr)
def test_no_form_of_decay_writes_into_the_gradient(decay):
    gradients_are_only_read(lambda params, **options: schatten.Muon(params, decay=decay, weight_decay=0.5, **options))


@pytest.mark.parametrize("name", [n for n, b in SOLVERS.items() if "dtype" in inspect.signature(b).parameters])
def test_a_bf16_solver_does_not_read_the_global_matmul_precision(name):
    solver, before = solver_of(name, "bfloat16"), torch.get_float32_matmul_precision()
    results = []
    try:
        for precision in ("highest", "medium", "highest"):
            torch.set_float32_matmul_precision(precision)
            results.append(solver(gaussian(64, 96)))
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# -- a resume under other settings --------------------------------------------------------------------------------------

# What is no setting of the rule: where it is computed, and who are workers.
NO_SETTING = {"params", "rules", "adamw", "options", "max_batch_bytes", "kernels", "group", "strict"}
NO_SETTING |= {"placement", "process_group"}

# The radius of tables, which a list of matrices has not, and a decay that is refused unless it is 0.
ONE_VALUE = {("Scion", "sign_radius"), ("Hyperball", "weight_decay")}

# A value that is not the default, where the default does not suggest one.
OTHER = {
    "solver": solvers.svd(),
    "decay": "cautious",
    "lr": 0.25,
    "weight_decay": 0.25,
    "betas": (0.5, 0.6),
    "normalize": "rms",
    "variant": "orth",
    "statistics": "gram",
    "compressor": schatten.compressors.TopK(0.5),
    "server_compressor": schatten.compressors.TopK(0.5),
    "map": schatten.maps.Huber(0.1),
    "norm": {"MuonPlus": "row", "TrustRegion": schatten.maps.L1()},
    "penalty": 0.1 * schatten.maps.L1(),
    "form": {"Muon": "sum", "MuonEq": "columns", "LionK": "site"},
    "rounding": "nearest",
    "state_dtype": "bfloat16",
    "count": 3,
    "workers": 2,
}


def another_value(optimizer, option, default):
    value = OTHER.get(option)
    if isinstance(value, dict):
        return value[optimizer.__name__]
    if value is not None:
        return value
    if option == "scale":
        return "none" if default != "none" else "keller"
    if isinstance(default, bool):
        return not default
    assert isinstance(default, (int, float)), f"add another value of {option} ({default!r}) to OTHER"
    return type(default)(default / 2) or 0.25


def shown(opt):
    """Everything a checkpoint of this optimizer says about its first group."""
    return {key: value for key, value in opt.state_dict()["param_groups"][0].items() if key != "params"}


def a_resume_takes_the_saved_setting_or_is_refused(optimizer, option, value):
    saved, other = optimizer([P(8, 8)], **{option: value}), optimizer([P(8, 8)])
    assert shown(saved) != shown(other), f"no checkpoint shows {option}"
    if not raises(ValueError, lambda: other.load_state_dict(saved.state_dict())):
        assert shown(other) == shown(saved), f"{option} of the checkpoint was dropped in silence"


SETTINGS = [
    pytest.param(name, option, id=f"{name}-{option}")
    for name in presets.__all__
    for option in inspect.signature(getattr(presets, name)).parameters
    if option not in NO_SETTING and (name, option) not in ONE_VALUE
]


@pytest.mark.parametrize(("name", "option"), SETTINGS)
def test_a_resume_under_another_setting_takes_the_saved_one_or_is_refused(name, option):
    optimizer = getattr(presets, name)
    default = inspect.signature(optimizer).parameters[option].default
    a_resume_takes_the_saved_setting_or_is_refused(optimizer, option, another_value(optimizer, option, default))


def test_a_checkpoint_without_its_settings_is_caught():
    def check(optimizer):
        a_resume_takes_the_saved_setting_or_is_refused(optimizer, "nesterov", False)

    assert_caught(check, "options stay out of the groups")


def test_a_checkpoint_of_muon_shows_every_setting():
    group = Opt([P(8, 8)]).state_dict()["param_groups"][0]
    assert {"lr", "momentum", "nesterov", "weight_decay", "scale", "solver", "form", "decay"} <= set(group)
    assert "polynomial(tol=0.16, lower=0.001" in group["rule"]


def a_resumed_run_is_the_same_run(optimizer):
    p, b = P(16, 8, dtype=torch.bfloat16), P(5)
    opt = Opt([p, b], optimizer, lr=0.01)
    steps(opt, [p, b], 3)
    q, c = (nn.Parameter(x.detach().clone()) for x in (p, b))
    other = Opt([q, c], optimizer, lr=0.9)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    expected = steps(opt, [p, b], 2, seed=5)
    assert all(torch.equal(x, y) for x, y in zip(steps(other, [q, c], 2, seed=5), expected, strict=True))


def test_a_resumed_run_continues_bit_for_bit(preset):
    a_resumed_run_is_the_same_run(preset)


def test_a_resumed_run_that_differs_by_noise_is_caught():
    # Without rounding noise of its own the small twin resumes exactly.
    def check(optimizer):
        p = P(16, 8)
        opt = Opt([p], optimizer, lr=0.01)
        steps(opt, [p], 3)
        q = nn.Parameter(p.detach().clone())
        other = Opt([q], optimizer, lr=0.9)
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
        assert relative(steps(other, [q], 1)[0], steps(opt, [p], 1)[0]) == 0

    assert_caught(check, "noise in every update")
