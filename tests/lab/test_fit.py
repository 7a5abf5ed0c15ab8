"""The training loop: a function of task, optimizer, loop and seed; a killed run goes on bit for bit."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import schatten
from schatten.lab.data import Corpus
from schatten.lab.fit import Fit, Loop, fit
from schatten.lab.images import Images
from schatten.lab.models import GPT, MLP, GPTConfig, ResNet, ResNetConfig
from schatten.lab.schedule import lr_factor
from schatten.lab.tasks import Classification, NextToken

TOKENS = np.random.default_rng(0).integers(0, 11, 2000) // 3
TEXT = NextToken(
    Corpus(TOKENS[:1500], TOKENS[1500:], 11, "made", ""), 6, lambda: GPT(GPTConfig(11, 6, 1, 2, 8, dropout=0.1)), 8
)


def images(classes=3):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % classes
    pixels = torch.randn(40, 1, 4, 4, generator=generator) + labels[:, None, None, None]
    return Images(pixels, labels, pixels[:12], labels[:12], classes, "made")


PICTURES = Classification(images(), lambda: MLP((16, 8, 3)))
NORMED = Classification(images(), lambda: ResNet(ResNetConfig(channels=1, classes=3, widths=(8,), blocks=(1,))))
LOOP = Loop(steps=8, batch=8, warmup=2, eval_every=3)


def muon(model):
    return schatten.Muon(model, lr=0.02, weight_decay=0.1)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def same(a, b):
    """Everything but the clocks."""
    clocks = {"seconds": 0.0, "optimizer_seconds": 0.0}
    return replace(a, **clocks) == replace(b, **clocks)


def final(task, build, loop, **options):
    """What was found, and the weights at the end."""
    weights = {}

    def keep(step, model, optimizer):
        weights.update({name: t.detach().clone() for name, t in model.state_dict().items()})

    return fit(task, build, loop, watch=keep, **options), weights


# -- a function of its arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [TEXT, PICTURES, NORMED], ids=["text", "pictures", "batch norm"])
def test_equal_runs_are_equal_and_other_seeds_are_not(task):
    first = fit(task, muon, LOOP, seed=1)
    torch.rand(3)  # the caller's own draws
    assert same(first, fit(task, muon, LOOP, seed=1))
    assert not same(first, fit(task, muon, LOOP, seed=2))
    assert [step for step, _ in first.curve] == [3, 6, 8] and [step for step, _ in first.train] == list(range(1, 9))
    assert first.loss == first.curve[-1][1] == first.scores["loss"] and first.steps == 8 and not first.diverged


def test_evaluations_change_nothing():
    _, often = final(TEXT, muon, replace(LOOP, eval_every=1))
    _, never = final(TEXT, muon, replace(LOOP, eval_every=0))
    assert all(torch.equal(often[name], never[name]) for name in often)


def test_a_run_is_the_literal_loop():
    loop = Loop(steps=5, batch=8, warmup=2, schedule="linear", final_lr=0.1, clip=0.01)
    found, weights = final(PICTURES, adamw, loop, seed=4)
    torch.manual_seed(4)
    model = PICTURES.model()
    optimizer, losses = adamw(model), []
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 0.01 * lr_factor("linear", step, 5, warmup=2, final=0.1)
        pixels, labels = PICTURES.batch(8, seed=4, step=step)
        loss = F.cross_entropy(model(pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        losses.append((step + 1, loss.item()))
    assert found.train == losses
    assert all(torch.equal(weights[name], p) for name, p in model.state_dict().items())


def test_every_group_keeps_its_own_peak():
    seen = []

    def build(model):
        matrix, *rest = model.parameters()
        return torch.optim.SGD([{"params": [matrix], "lr": 1.0}, {"params": rest, "lr": 0.1}])

    fit(PICTURES, build, Loop(4, 8, warmup=1), watch=lambda step, model, o: seen.append([g["lr"] for g in o.param_groups]))
    assert all(b == pytest.approx(a / 10) for a, b in seen)
    assert [a for a, _ in seen[1:]] == pytest.approx([lr_factor("cosine", step, 4, warmup=1) for step in range(4)])


def test_pieces_of_a_batch_are_the_batch():
    whole, weights = final(PICTURES, adamw, replace(LOOP, clip=0.5))
    for accumulate in (2, 8):
        pieces, others = final(PICTURES, adamw, replace(LOOP, clip=0.5, accumulate=accumulate))
        assert pieces.steps == whole.steps == 8
        # fp32 sums in another order, over eight steps of AdamW, which divides by small numbers.
        assert [loss for _, loss in pieces.train] == pytest.approx([loss for _, loss in whole.train], rel=1e-4)
        for name in weights:
            torch.testing.assert_close(others[name], weights[name], rtol=0, atol=1e-3)


def test_pieces_must_be_of_one_size():
    with pytest.raises(ValueError, match="accumulate must divide batch, got 3 and 8"):
        fit(PICTURES, adamw, replace(LOOP, accumulate=3))


def test_a_start_is_made_before_the_optimizer():
    def start(model):
        for p in model.parameters():
            torch.nn.init.constant_(p, 0.5)

    seen = []
    fit(PICTURES, lambda m: seen.append({p.min().item() for p in m.parameters()}) or adamw(m), Loop(1, 8), start=start)
    assert seen == [{0.5}]


# -- ends before the end -----------------------------------------------------------------------------------------------


def huge(model):
    return torch.optim.SGD(model.parameters(), lr=1e30)


def test_divergence_ends_a_run_with_an_infinite_loss():
    steep = Classification(images(), lambda: MLP((16, 8, 8, 3)))
    found = fit(steep, huge, Loop(50, 8, schedule="constant", eval_every=1))
    assert found.diverged and found.loss == math.inf and found.steps < 50
    assert found.tail() == math.inf


def test_divergence_after_a_finite_evaluation_is_infinite_too():
    def breaks(step, model, optimizer):
        if step == 5:
            for p in model.parameters():
                torch.nn.init.constant_(p, math.nan)

    found = fit(PICTURES, adamw, LOOP, watch=breaks)
    assert [step for step, _ in found.curve] == [3] and math.isfinite(found.curve[0][1])
    assert found.diverged and found.loss == math.inf and found.steps == 6


def test_a_report_ends_a_run():
    reported = []
    found = fit(PICTURES, adamw, LOOP, report=lambda step, loss: reported.append((step, loss)) or step >= 6)
    assert found.steps == 6 and reported == found.curve and found.loss == reported[-1][1] and not found.diverged


def test_what_a_fit_says_of_itself():
    curve = [(10, 3.0), (20, 2.0), (30, 2.5)]
    found = Fit(loss=2.5, steps=30, curve=curve, train=[(i, float(30 - i)) for i in range(1, 31)])
    assert found.best == 2.0 and found.steps_to(2.2) == 20 and found.steps_to(2.0) == 20 and found.steps_to(1.9) == math.inf
    assert found.tail(0.1) == pytest.approx(1.0) and Fit().tail() == math.inf and Fit().best == math.inf


# -- closures ----------------------------------------------------------------------------------------------------------


class Twice(torch.optim.Optimizer):
    """Gradient descent that evaluates the closure a second time, without a gradient, at the new weights."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.seen = []

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad
        self.seen.append((float(loss), float(closure())))
        return loss


def test_an_optimizer_with_a_closure_sees_the_loss_of_the_steps_batch():
    made = []

    def build(model):
        made.append(Twice(model.parameters(), lr=0.1))
        return made[0]

    loop = Loop(6, 8, warmup=1)
    found = fit(PICTURES, build, loop, closure=True)
    plain = fit(PICTURES, lambda model: torch.optim.SGD(model.parameters(), lr=0.1), loop)
    (optimizer,) = made
    # The same step written in another order of fp32 operations.
    assert found.loss == pytest.approx(plain.loss, rel=1e-5) and len(optimizer.seen) == 6
    assert [first for first, _ in optimizer.seen] == pytest.approx([loss for _, loss in plain.train], rel=1e-5)


def test_the_librarys_closure_optimizers_train():
    found = fit(PICTURES, lambda m: schatten.MuonMVR(m, lr=0.02, exact=True), Loop(6, 8), closure=True)
    assert found.steps == 6 and math.isfinite(found.loss)


def test_a_closure_takes_no_pieces():
    with pytest.raises(ValueError, match="accumulate=1, got 2"):
        fit(PICTURES, adamw, replace(LOOP, accumulate=2), closure=True)


# -- checkpoints -------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def killer(at):
    def watch(step, model, optimizer):
        if step == at:
            raise Killed

    return watch


@pytest.mark.parametrize("task", [TEXT, NORMED], ids=["dropout", "batch norm"])
@pytest.mark.parametrize("build", [muon, adamw])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, task, build):
    loop = Loop(8, 8, warmup=2, eval_every=3, save_every=2)
    whole, weights = final(task, build, loop, seed=5)
    folder = tmp_path / "run"
    for at in (3, 6, 7):
        with pytest.raises(Killed):
            fit(task, build, loop, seed=5, folder=folder, watch=killer(at))
        assert (folder / "fit.json").exists()
    resumed, others = final(task, build, loop, seed=5, folder=folder)
    assert same(resumed, whole)
    assert weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)
    assert not folder.exists()


def test_a_kill_between_two_checkpoints_leaves_the_earlier_one(tmp_path):
    loop = Loop(8, 8, save_every=2)
    whole = fit(PICTURES, muon, loop)
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        fit(PICTURES, muon, loop, folder=folder, watch=killer(5))
    folder.rename(tmp_path / "run.old")
    (tmp_path / "run.partial").mkdir()  # half written
    assert same(fit(PICTURES, muon, loop, folder=folder), whole)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_without_a_kill_leaves_no_files(tmp_path):
    plain = fit(PICTURES, muon, LOOP)
    assert same(fit(PICTURES, muon, replace(LOOP, save_every=3), folder=tmp_path / "deep" / "run"), plain)
    assert not (tmp_path / "deep" / "run").exists()


def test_runs_of_several_precisions_share_a_process():
    plain = fit(PICTURES, adamw, LOOP)
    half = fit(PICTURES, adamw, replace(LOOP, mixed_precision="bf16"))
    assert half.train != plain.train
    # bf16 has 8 bits: a loss near one is off by some hundredths.
    assert half.loss == pytest.approx(plain.loss, abs=0.1)
    assert same(fit(PICTURES, adamw, LOOP), plain)
