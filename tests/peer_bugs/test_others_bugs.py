"""DeepSpeed, dmuon, muon_fsdp_2, Keras and MLX (peers.md 1.14): casts before the norm, groups lost, coupled decay."""

import pytest
import torch

import schatten
from tests.peer_bugs.helpers import (
    SOLVERS,
    Opt,
    P,
    assert_caught,
    assert_solver_caught,
    cos,
    gaussian,
    solver_of,
    step,
)
from tests.peer_bugs.test_pytorch_optimizer_bugs import a_zero_gradient_decays_by_lr_times_decay

# Of an element; DeepSpeed's cast to fp16 loses its sign at 1e-8, the update at 1e-9 and from 1e3 on, and overflows at 1e5.
ELEMENTS = (1e-12, 1e-9, 1e-8, 3e-8, 1e3, 1e5)


def small_and_large_elements_give_the_same_direction(solver):
    G = gaussian(12, 48)
    for s in ELEMENTS:
        a, b = solver(G * s), solver(G)
        assert a.isfinite().all() and cos(a, b) > 0.999 and abs(a.norm() / b.norm() - 1) < 0.01, s


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("name", SOLVERS)
def test_no_solver_casts_before_it_normalises(name, dtype):
    small_and_large_elements_give_the_same_direction(solver_of(name, dtype))


def test_a_cast_before_the_norm_is_caught():
    assert_solver_caught(small_and_large_elements_give_the_same_direction, "a cast before the norm")


def the_callers_groups_are_kept(optimizer):
    groups = [{"params": [P(8, 8)], "lr": 0.1}, {"params": [P(8, 8)], "lr": 0.2, "weight_decay": 0.0}]
    opt = optimizer(groups)
    assert [group["lr"] for group in opt.param_groups] == [0.1, 0.2]
    assert opt.param_groups[1]["weight_decay"] == 0.0


def test_the_callers_groups_keep_their_learning_rates_and_decays(any_preset):
    the_callers_groups_are_kept(any_preset)


def test_flattened_groups_are_caught():
    assert_caught(the_callers_groups_are_kept, "groups are flattened")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_resume_keeps_the_precision_of_state(dtype):
    p = P(8, 8, dtype=dtype)
    opt = Opt([p])
    step(opt, p, gaussian(8, 8).to(dtype))
    other = Opt([P(8, 8, dtype=dtype)])
    other.load_state_dict(opt.state_dict())
    (saved,), (loaded,) = opt.state.values(), other.state.values()
    assert all(loaded[k].dtype == saved[k].dtype and torch.equal(loaded[k], saved[k]) for k in saved)


def test_decay_is_no_part_of_the_gradient():
    a_zero_gradient_decays_by_lr_times_decay(schatten.Muon)


def test_decay_added_to_the_gradient_is_caught():
    assert_caught(a_zero_gradient_decays_by_lr_times_decay, "decay is added to the gradient")


def test_names_are_no_routes():
    # "embed" and "lm_head" in a name say nothing; the modules do.
    model = torch.nn.ModuleDict({"embed_proj": torch.nn.Linear(6, 8), "table": torch.nn.Embedding(12, 6)})
    routes = {entry.name: entry.route for entry in schatten.plan(model)}
    assert routes["embed_proj.weight"] == "spectral" and routes["table.weight"] == "adamw"
