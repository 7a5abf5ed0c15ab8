"""Monitor measures the steps it says it measures, in every kind of loop, and nothing between."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import schatten
from schatten.monitor import Monitor
from tests.contracts.monitoring import Reads, of_one_matrix, one_matrix, reading, stepped


def test_steps_are_counted_as_the_optimizer_counts_them_also_after_a_resume():
    W, opt = one_matrix()
    seen = []
    with Monitor(opt, 3, ["update"], to=lambda record: seen.append(record["step"])):
        stepped(opt, W, 7)
        saved = copy.deepcopy(opt.state_dict())
        V, again = one_matrix()
        again.load_state_dict(saved)
        with Monitor(again, 3, ["update"], to=lambda record: seen.append(record["step"])):
            stepped(again, V, 3)
    assert seen == [3, 6, 9]


def test_a_closed_monitor_and_copies_of_the_optimizer_measure_nothing():
    W, opt = one_matrix()
    seen = []
    with Monitor(opt, 1, ["update"], to=seen.append):
        stepped(opt, W, 1)
        for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
            p = twin.param_groups[0]["params"][0]
            stepped(twin, p, 1)
    stepped(opt, W, 1)
    assert len(seen) == 1 and not opt._optimizer_step_pre_hooks and not opt._optimizer_step_post_hooks


def test_a_step_that_a_scaler_skips_has_no_record_and_others_have_unscaled_gradients():
    W, opt = one_matrix()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    read = reading("gradient")
    seen = []
    with Monitor(opt, 1, [read], to=seen.append):
        scaler.scale((W * math.inf).sum()).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        scaler.scale(W.sum()).backward()
        scaler.step(opt)
    assert [record["step"] for record in seen] == [1]
    assert torch.equal(read.blocks[-1].gradient[0], torch.ones_like(W))


def test_a_scaler_that_leaves_unscaling_to_the_optimizer_is_followed():
    W, opt = one_matrix()
    opt._step_supports_amp_scaling = True
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    read, seen = reading("gradient"), []
    with Monitor(opt, 1, [read], to=seen.append):
        for factor in (math.inf, 1.0):
            opt.zero_grad()
            scaler.scale((W * factor).sum()).backward()
            scaler.step(opt)
            scaler.update()
    assert torch.equal(read.blocks[-1].gradient[0], torch.ones_like(W))
    assert len(seen) == 1


def test_accumulated_gradients_are_measured_once_and_whole():
    W, opt = one_matrix()
    read = reading("gradient")
    with Monitor(opt, 1, [read]):
        for _ in range(3):
            W.sum().backward()
        opt.step()
    assert len(read.blocks) == 1 and torch.equal(read.blocks[0].gradient[0], 3 * torch.ones_like(W))


def test_steps_in_backward_leave_quantities_of_the_weight_and_say_why():
    model = nn.Linear(4, 4)
    opt = schatten.Muon(model)
    weight, gradient = reading(), "gradient"
    with opt.step_in_backward(), Monitor(opt, 1, [weight, gradient, "update"]) as monitor:
        model(torch.ones(1, 4)).sum().backward()
        with pytest.warns(UserWarning, match="step_in_backward frees gradients before. Call step"):
            opt.step()
        model(torch.ones(1, 4)).sum().backward()
        opt.step()  # said once
    assert [set(record) for record in monitor.records] == [{"step", "name", "reads/norm"}]


def test_schedulers_and_wrappers_go_on_and_the_inner_optimizer_is_measured():
    W, opt = one_matrix()
    ema = schatten.EMANesterov(opt)
    scheduler = torch.optim.lr_scheduler.StepLR(ema, 1)
    with Monitor(ema, 2, ["update"]) as monitor:
        for _ in range(2):
            W.grad = torch.randn_like(W)
            ema.step()
            scheduler.step()
    assert monitor.opt is opt and monitor.records[0]["step"] == 2


class Counts(TorchDispatchMode):
    """Operations on tensors."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        return function(*args, **(kwargs or {}))


def operations_of_a_step(every):
    W, opt = one_matrix()
    if every is not None:
        Monitor(opt, every, of_one_matrix)
    stepped(opt, W, 1)
    W.grad = torch.randn_like(W)
    with Counts() as counts:
        opt.step()
    return counts.operations


def test_a_step_between_measurements_has_not_one_operation_more():
    assert operations_of_a_step(3) == operations_of_a_step(None) < operations_of_a_step(2)


class Fails(Reads):
    def __call__(self, of):
        torch.linalg.cholesky(-torch.eye(2))


def test_a_factorisation_that_fails_is_an_undefined_number_and_does_not_end_the_run():
    W, opt = one_matrix()
    with Monitor(opt, 1, [Fails()]) as monitor:
        stepped(opt, W, 1)
    assert math.isnan(monitor.records[0]["reads/norm"])


def test_what_fails_in_a_step_leaves_no_half_measurement():
    W, opt = one_matrix()
    seen = []
    with Monitor(opt, 1, ["update", "gradient"], to=seen.append):

        def closure():
            raise KeyError("data")

        with pytest.raises(KeyError, match="data"):
            opt.step(closure)
        stepped(opt, W, 1)
    assert len(seen) == 1
