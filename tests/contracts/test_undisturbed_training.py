"""Measuring never changes training: weights, gradients, buffers, state and generators are bit for bit as without."""

import random
import sys
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import schatten
from schatten.diagnostics import hessian
from schatten.diagnostics.curvature import curvature
from schatten.diagnostics.hessian import Hessian
from schatten.diagnostics.smoothness import spectral_smoothness
from schatten.diagnostics.undisturbed import Generators, undisturbed
from tests.reference.hessian_models import Hard, hard, loss_of, tokens

STEPS = 5


class Noisy(nn.Module):
    """Draws from every generator of the CPU in its forward, and counts in a buffer that it makes there."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Hard()
        self.register_buffer("seen", None)
        self.linear = self.inner.linear

    def forward(self, x):
        self.seen = torch.zeros(()) if self.seen is None else self.seen + 1
        scale = 1 + 0.01 * random.random() + 0.01 * float(np.random.rand()) + 0.01 * torch.rand(())
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.ones(2))
        self.late.add_(1)
        return self.inner(x) * scale


def measure(model, losses):
    """Everything that evaluates the model again."""
    params = [p for p in model.parameters() if p.ndim == 2]
    H = Hessian(losses, params, model=model)
    names = [i for i, p in enumerate(params) if H.gradient[i].any() and p.shape[0] > 4]
    for i in names:
        C = curvature(lambda v, i=i: H.within(i, v), H.gradient[i], iterations=3)
        assert C.J.isfinite() and C.L.value > 0
        assert spectral_smoothness(lambda v, i=i: H.within(i, v), H.gradient[i], steps=2, iterations=3).lower > 0
    H([torch.ones_like(p) for p in params])
    H.mistake()


def train(when, make=Noisy, several=False, autocast=False):
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    model = make()
    opt = schatten.Muon(model, lr=0.05, weight_decay=0.1, rules=[("*unused", "spectral")])
    record = []
    for step in range(STEPS):
        batch = tokens(step)
        losses = [lambda b=b: loss_of(model, b) for b in (tokens(50 + step), tokens(60 + step))]
        losses = losses if several else losses[0]
        if when == "before":
            measure(model, losses)
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            first = loss_of(model, batch)
            if when == "between":
                measure(model, losses)
            second = loss_of(model, batch.flip(0))
        loss = first + second
        if when == "after forward":
            measure(model, losses)
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        if when == "after backward":
            measure(model, losses)
        for n, p in model.named_parameters():
            assert (p.grad is None) == (n not in gradients) and (p.grad is None or torch.equal(p.grad, gradients[n]))
        opt.step()
        record.append((loss.detach(), gradients))
    drawn = (torch.rand(3), random.random(), np.random.rand())
    state = {n: {k: v for k, v in opt.state[p].items()} for n, p in model.named_parameters()}
    return record, {n: p.detach() for n, p in model.named_parameters()}, list(model.named_buffers()), state, drawn


@cache
def unmeasured(autocast=False):
    return train("never", autocast=autocast)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(s, t) for s, t in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("several", [False, True], ids=["one loss", "micro-batches"])
@pytest.mark.parametrize("when", ["before", "between", "after forward", "after backward"])
def test_training_is_the_same_to_the_bit_with_and_without_measurements(when, several):
    assert same(train(when, several=several), unmeasured())


def test_training_under_autocast_is_the_same_measured_inside_and_outside():
    for when in ("between", "after backward"):
        assert same(train(when, autocast=True), unmeasured(autocast=True))


class Restores:
    """`undisturbed` less one of the things it restores."""

    def __init__(self, forgets):
        self.forgets = forgets

    @contextmanager
    def __call__(self, model, devices=(), generators=None):
        with undisturbed(None if self.forgets == "buffers" else model, devices, generators):
            yield
        if self.forgets == "generators":
            torch.rand(1)


@pytest.mark.parametrize("what", ["generators", "buffers"])
def test_these_runs_differ_where_a_measurement_forgets_to_restore(what, monkeypatch):
    assert same(train("never"), unmeasured())
    monkeypatch.setattr(hessian, "undisturbed", Restores(what))
    assert not same(train("after backward"), unmeasured())


def test_a_measurement_by_backward_would_be_seen(monkeypatch):
    def wrong(outputs, inputs, *args, **kwargs):
        found = grad(outputs, inputs, *args, **kwargs)
        for p, g in zip(inputs, found, strict=True):
            p.grad = g.detach() if p.grad is None else p.grad + g.detach()
        return found

    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", wrong)
    with pytest.raises(AssertionError):
        train("after backward")


def test_generators_of_devices_are_set_back_each_with_its_number(monkeypatch):
    class Device:
        def __init__(self):
            self.states = {}

        def get_rng_state(self, *index):
            return self.states.get(index, "first")

        def set_rng_state(self, state, *index):
            self.states[index] = state

    modules = {"cuda": Device(), "mps": Device()}
    monkeypatch.setattr(torch, "get_device_module", modules.__getitem__)
    before = Generators([torch.device("cuda", 1), torch.device("cuda", 0), torch.device("mps"), torch.device("cpu")])
    for module in modules.values():
        module.states = dict.fromkeys([(0,), (1,), ()], "drawn from")
    before.restore()
    assert modules["cuda"].states == {(0,): "first", (1,): "first", (): "drawn from"}
    # MPS has one device, whose number its functions do not take.
    assert modules["mps"].states[()] == "first" and modules["mps"].states[(0,)] == "drawn from"


def test_evaluation_mode_and_requires_grad_are_left_alone():
    model = hard().eval()
    frozen = model.qkv.weight.requires_grad_(False)
    H = Hessian(lambda: loss_of(model, tokens(0)), [model.embed.weight], model=model)
    H.within(0, torch.ones_like(model.embed.weight))
    assert not model.training and not frozen.requires_grad and frozen.grad is None and model.embed.weight.grad is None


def test_all_is_restored_where_the_loss_raises():
    model = Noisy()
    before, buffers = Generators([]), list(model.named_buffers())
    drawn = (torch.rand(2), random.random(), np.random.rand())
    before.restore()

    def raises():
        loss_of(model, tokens(0))
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        Hessian(raises, list(model.parameters()), model=model)
    assert same((torch.rand(2), random.random(), np.random.rand()), drawn)
    after = list(model.named_buffers())
    assert [n for n, _ in after] == [n for n, _ in buffers] and all(
        a is b for (_, a), (_, b) in zip(after, buffers, strict=True)
    )


def test_buffers_are_the_same_tensors_and_unwritten():
    model = hard()
    buffers = {n: (b, b._version, b.clone()) for n, b in model.named_buffers()}
    with undisturbed(model):
        loss_of(model, tokens(0))
        assert not torch.equal(model.norm.running_mean, buffers["norm.running_mean"][2])
    for n, b in model.named_buffers():
        kept, version, value = buffers[n]
        assert b is kept and b._version == version and torch.equal(b, value)


def test_a_graph_that_training_has_built_can_still_be_differentiated():
    model = hard().train()
    loss = loss_of(model, tokens(0))
    measure(model, lambda: loss_of(model, tokens(1)))
    loss.backward()
    assert model.embed.weight.grad is not None


def test_compiled_models_are_measured_as_they_are_written():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    compiled, x = torch.compile(model, backend="eager"), torch.randn(8, 4)
    compiled(x).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    params = list(model.parameters())
    v = [torch.randn_like(p) for p in params]
    own, other = (Hessian(lambda f=f: f(x).square().mean(), params, model=f)(v) for f in (compiled, model))
    assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(params, gradients, strict=True))
    assert "torch._dynamo" in sys.modules
