"""Optimizers with one mistake each, most of them found in a training code base; the self test must name every one."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

import schatten
from schatten import Layout, Muon, batching, layout, optimizer, retractions, scales
from schatten.adamw import adamw_steps_
from schatten.self_test import SelfTestError, self_test

RULES = [
    ("qkv.weight", "spectral", {"layout": Layout(split=3, heads=2)}),
    ("bank", "spectral", {"layout": "experts"}),
]


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.qkv, self.norm = nn.Embedding(11, 8), nn.Linear(8, 24), nn.LayerNorm(8)
        self.up, self.gate = nn.Linear(8, 12), nn.Linear(8, 12)
        self.conv = nn.Conv2d(4, 6, 3)
        self.bank = nn.Parameter(torch.randn(3, 8, 8))


def built(kind=Muon, **options):
    return kind(Network(), lr=0.02, weight_decay=0.1, rules=RULES, **options)


# -- mistakes in a step ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clipped:
    """DeepSpeed 8439: the gradient clip meets the orthogonalised update, whose norm grows with the width."""

    scale: Any

    def factor(self, fan_out, fan_in):
        return self.scale.factor(fan_out, fan_in)

    def __call__(self, D):
        return self.scale(D) / torch.linalg.vector_norm(D, dim=(-2, -1), keepdim=True).clamp(min=1.0)


class WithRule(Muon):
    """Steps by another rule than its group's."""

    def changed(self, rule):
        return rule

    def _spectral_step_(self, whole, rule, group, room, scale):
        super()._spectral_step_(whole, self.changed(rule), group, room, scale)


class ClipsTheUpdate(WithRule):
    def changed(self, rule):
        return replace(rule, scale=Clipped(rule.scale))


class IsSGD(WithRule):
    """DeepSpeed 8441: no orthogonalisation at all on the default path."""

    def changed(self, rule):
        return replace(rule, map=schatten.maps.Power(1.0, over="entries"))


class HalfOrthogonal(WithRule):
    def changed(self, rule):
        return replace(rule, map=schatten.maps.Power(0.25))


class ForgetsTheShape(WithRule):
    def changed(self, rule):
        return replace(rule, scale=scales.Scale("none"))


class ForgetsNesterov(WithRule):
    def changed(self, rule):
        return replace(rule, signal=replace(rule.signal, nesterov=False))


class DecaysByTheShapeFactor(WithRule):
    """Keller Jordan's first versions and others since: the decay is multiplied by c as the update is."""

    def changed(self, rule):
        @dataclass(frozen=True)
        class Scaled(retractions.DecoupledDecay):
            def __call__(self, W, D, length, state, group):
                return super().__call__(W, D, length, state, {**group, "weight_decay": group["weight_decay"] * 3.0})

        return replace(rule, retraction=Scaled())


class WithGroup(Muon):
    """Steps by other numbers than its group's."""

    def changed(self, group):
        return group

    def _step_parameters_(self, indexed, group, room):
        super()._step_parameters_(indexed, self.changed(group), room)


class NeverDecays(WithGroup):
    """modded-nanogpt PR 279: decay in the logs, none in the step."""

    def changed(self, group):
        return {**group, "weight_decay": 0.0}


class DecaysVectorsOnly(WithGroup):
    def changed(self, group):
        return {**group, "weight_decay": 0.0} if group["algorithm"] == "spectral" else group


class TakesTheLrOfTheConstructor(WithGroup):
    """DeepSpeed 7713: a scheduler's lr never arrives, or one of them overwrites the other."""

    def changed(self, group):
        return {**group, "lr": self.defaults["lr"]}


class GivesAdamWAnotherLr(WithGroup):
    """speculators PR 866: what moved to AdamW also got a tenth of the lr."""

    def changed(self, group):
        return {**group, "lr": group["lr"] * 0.1} if group["algorithm"] == "adamw" else group


class TakesOneLrForAllGroups(WithGroup):
    def changed(self, group):
        return {**group, "lr": self.param_groups[0]["lr"]}


class TakesOtherBetas(WithGroup):
    def changed(self, group):
        return {**group, "betas": (0.9, 0.999)} if group["algorithm"] == "adamw" else group


class Ascends(WithGroup):
    def changed(self, group):
        return {**group, "maximize": True}


class ResetsTheLr(Muon):
    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = 0.02
        return super().step(closure)


class NormalisesGradients(Muon):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad /= p.grad.norm() + 1e-6
        return super().step(closure)


class DecaysWithoutGradient(Muon):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    p.data.mul_(0.99)
        return super().step(closure)


class StepsPerMicroBatch(Muon):
    """DeepSpeed PR 8600: under ZeRO-3 every micro-batch is orthogonalised."""

    def _fresh_state(self, p, group):
        def step(p):
            p.data.sub_(p.grad, alpha=1e-3)

        p.register_post_accumulate_grad_hook(step)
        return super()._fresh_state(p, group)


MISTAKES = {
    ClipsTheUpdate: "update",
    IsSGD: "update",
    HalfOrthogonal: "update",
    ForgetsTheShape: "update",
    ForgetsNesterov: "momentum",
    DecaysByTheShapeFactor: "decay",
    NeverDecays: "decay",
    DecaysVectorsOnly: "decay",
    TakesTheLrOfTheConstructor: "update",
    GivesAdamWAnotherLr: "update",
    TakesOneLrForAllGroups: "update",
    TakesOtherBetas: "momentum",
    Ascends: "update",
    ResetsTheLr: "read only",
    NormalisesGradients: "read only",
    DecaysWithoutGradient: "no gradient",
}


def failed(opt):
    with pytest.raises(SelfTestError) as caught:
        self_test(opt)
    return {check.check: check.parameter for check in caught.value.report if check.ok is False}


def test_without_a_mistake_it_passes():
    self_test(built())


@pytest.mark.parametrize("kind", MISTAKES, ids=lambda kind: kind.__name__)
def test_a_mistake_in_the_step_is_named(kind):
    assert MISTAKES[kind] in failed(built(kind))


@pytest.mark.parametrize("kind", [ClipsTheUpdate, IsSGD, NeverDecays, TakesTheLrOfTheConstructor], ids=lambda k: k.__name__)
def test_it_is_named_in_bf16_too(kind):
    model = Network().bfloat16()
    # An lr and a decay whose effect on a bf16 weight rounding hides.
    assert MISTAKES[kind] in failed(kind(model, lr=1e-5, weight_decay=0.01, rules=RULES, rounding="nearest"))


def test_a_step_for_each_micro_batch_is_named():
    opt = built()
    # From here on, as hooks that are on the parameters themselves say that accumulation is not meant.
    opt.__class__ = StepsPerMicroBatch
    assert "accumulation" in failed(opt)


# -- mistakes in the parts a step is made of ---------------------------------------------------------------------------


def no_orthogonalisation(patch):
    patch.setattr(schatten.maps.Nuclear, "grad", lambda self, S: S / S.norm(dim=(-2, -1), keepdim=True))
    return "singular values", "qkv.weight"


def reading(patch, changed):
    """The engine's layouts become what `changed` makes of kind and shape; the plan's stay."""
    real = layout.pieces
    patch.setattr(optimizer, "pieces", lambda own, shape, *name: real(changed(own, shape), shape, *name))


def convolutions_by_kernel(patch):
    # ultralytics PR 25846 took the factor from the kernel's height and width.
    reading(patch, lambda own, shape: "positions" if len(shape) == 4 else own)
    return "update", "conv.weight"


def experts_across(patch):
    # maxtext 4798: the expert axis became a side of the matrix.
    reading(patch, lambda own, shape: "conv" if own == "experts" else own)
    return "update", "bank"


def fused_projections_whole(patch):
    reading(patch, lambda own, shape: "matrix" if isinstance(own, Layout) else own)
    return "update", "qkv.weight"


def heads_interleaved(patch):
    other = Layout("matrix", groups=2, split=3)
    reading(patch, lambda own, shape: other if isinstance(own, Layout) else own)
    return "update", "qkv.weight"


def momentum_normalised_in_place(patch):
    # torch.optim.Muon, pytorch PR 194664.
    real = batching.Part.keep_state_

    def keep(self, new):
        real(self, {key: M / M.norm(dim=(-2, -1), keepdim=True) for key, M in new.items()})

    patch.setattr(batching.Part, "keep_state_", keep)
    return "momentum", "qkv.weight"


def momentum_forgotten(patch):
    patch.setattr(batching.Part, "keep_state_", lambda self, new: None)
    return "momentum", "qkv.weight"


def weights_of_a_batch_exchanged(patch):
    real = batching.Part.keep_weights_
    patch.setattr(batching.Part, "keep_weights_", lambda self, new, rounding: real(self, new.flip(0), rounding))
    return "update", "up.weight"


def coupled_decay(patch):
    # L2 decay in the gradient, which Adam's ratio then divides away, instead of AdamW's.
    def step(members, group, *rest):
        grads = [m.p.grad for m in members]
        for m in members:
            m.p.grad = m.p.grad + group["weight_decay"] * m.p
        adamw_steps_(members, {**group, "weight_decay": 0.0}, *rest)
        for m, grad in zip(members, grads, strict=True):
            m.p.grad = grad

    patch.setattr(optimizer, "adamw_steps_", step)
    return "decay", "norm.weight"


PARTS = [
    no_orthogonalisation,
    convolutions_by_kernel,
    experts_across,
    fused_projections_whole,
    heads_interleaved,
    momentum_normalised_in_place,
    momentum_forgotten,
    weights_of_a_batch_exchanged,
    coupled_decay,
]


@pytest.mark.parametrize("mistake", PARTS, ids=lambda mistake: mistake.__name__)
def test_a_mistake_in_a_part_is_named_with_its_parameter(monkeypatch, mistake):
    opt = built()
    check, parameter = mistake(monkeypatch)
    with pytest.raises(SelfTestError) as caught:
        self_test(opt)
    assert (check, parameter) in {(c.check, c.parameter) for c in caught.value.report if c.ok is False}


# -- groups that are not the plan's ------------------------------------------------------------------------------------


def moved_to_adamw(opt):
    opt.param_groups[0]["algorithm"] = "adamw"
    opt.param_groups[0].update(betas=(0.9, 0.95), eps=1e-8)


def lost(opt):
    opt.param_groups[0]["params"].pop()
    opt.param_groups[0]["param_names"].pop()


def twice(opt):
    for key in ("params", "param_names"):
        opt.param_groups[1][key].append(opt.param_groups[0][key][0])


def read_otherwise(opt):
    next(g for g in opt.param_groups if g["layout"] == "experts")["layout"] = "conv"


def another_lr(opt):
    opt.param_groups[-1]["lr"] = 0.5


def without_decay(opt):
    opt.param_groups[0]["weight_decay"] = 0.0


GROUPS = {moved_to_adamw: "routes", lost: "routes", twice: "routes", read_otherwise: "routes", another_lr: "numbers"}
GROUPS[without_decay] = "numbers"


@pytest.mark.parametrize("mistake", GROUPS, ids=lambda mistake: mistake.__name__)
def test_groups_that_are_not_the_plan_s_are_named(mistake):
    opt = built()
    mistake(opt)
    assert GROUPS[mistake] in failed(opt)
