"""Steps with and without `opt.overlap(model)`: in every placement, where ranks differ, and where a loop does what it may not.

As `tests/distributed/ranks.py` runs it.
"""

import time
import weakref
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import schatten
from schatten.placements import Overlap, ways
from schatten.placements.lane import Lane
from tests.distributed.collectives import Collectives
from tests.distributed.faults_runs import FAULTS, absent, drawn, local, placed, seen, start
from tests.distributed.parity_model import GPT, RULES, loss, whole
from tests.distributed.parity_runs import PLACEMENTS

STEPS = 10

# Bytes of which every matrix has a bucket of its own, and of which all have one.
SEVERAL, ONE = 1, 1 << 27

# What a preset must be told.
FIRST = {"SpectralAdam": (0.5,)}

# Placement, preset, bytes of a step, dtype of weights.
Run = tuple[str, str, int, str]

# -- a model in every placement ------------------------------------------------------------------------------------------


def built(run: Run, rank: int, size: int) -> tuple[nn.Module, schatten.SpectralOptimizer, Callable[[int], Tensor]]:
    """A model, its optimizer, and the loss of a step."""
    name, preset, max_bytes, dtype = run
    placement = PLACEMENTS[name]
    model, part, parts = placement.wrap(GPT().to(getattr(torch, dtype)), rank, size)
    options: dict[str, Any] = {"placement": placement.option} if placement.option else {}
    # Hyperball keeps norms, which decay would change.
    decay = 0.0 if preset == "Hyperball" else 0.1
    make = getattr(schatten.presets, preset)
    opt = make(model, *FIRST.get(preset, ()), lr=3e-3, weight_decay=decay, rules=RULES, max_batch_bytes=max_bytes, **options)
    return model, opt, lambda step: loss(model, step, part, parts)


def everything(model: nn.Module, opt: schatten.SpectralOptimizer) -> dict[str, Tensor]:
    """Weights and state, each whole."""
    found = {name: p for name, p in model.named_parameters()}
    for group in opt.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            found |= {f"{name}: {key}": value for key, value in opt.state[p].items()}
    return {name: whole(t.detach()).clone() for name, t in found.items()}


def trained(run: Run, rank: int, size: int, overlapped: bool) -> dict[str, Any]:
    """What there is after the steps; of each step how many buckets had started and were computed, and waited after it."""
    model, opt, loss_of = built(run, rank, size)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.7)
    ahead, waiting = [], []
    with mock.patch.object(ways, "cheaper", lambda *_: False), opt.overlap(model) if overlapped else nullcontext() as handle:
        for step in range(STEPS):
            loss_of(step).backward()
            if isinstance(handle, Overlap):
                ahead.append([lane.ahead for lane in handle.lanes.values()])
            # What was computed before a step takes the lr of that step, and so do weights that are written after it.
            for group in opt.param_groups:
                group["lr"] *= 0.9
            opt.step()
            schedule.step()
            opt.zero_grad()
            if isinstance(handle, Overlap):
                waiting.append(len(handle.waiting))
    return {"found": everything(model, opt), "ahead": ahead, "waiting": waiting}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """What is not identical."""
    return [key for key in expected if not torch.equal(found[key], expected[key])] + sorted(found.keys() ^ expected.keys())


def in_placements(rank: int, size: int, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What differs with overlap in each run, and what has overlapped."""
    outcome = []
    for run in runs:
        plain, overlapped = (trained(run, rank, size, on) for on in (False, True))
        differs = same(overlapped.pop("found"), plain["found"])
        outcome.append({"differs": differs, **overlapped})
    return outcome


# -- ranks that differ ---------------------------------------------------------------------------------------------------


class Held(nn.Module):
    """One parameter, whose gradient is what it is told."""

    def __init__(self, p: nn.Parameter) -> None:
        super().__init__()
        self.p = p

    def forward(self, gradient: Tensor) -> Tensor:
        own = self.p.to_local() if isinstance(self.p, DTensor) else self.p
        return (own * local(gradient)).sum()


class Matrices(nn.Module):
    """The parameters of `faults_runs`, each in a module of its own."""

    def __init__(self, params: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.held = nn.ModuleList(Held(p) for p in params.values())

    def forward(self, gradients: dict[str, Tensor | None]) -> list[Tensor]:
        pairs = zip(self.held, gradients.values(), strict=True)
        return [held(gradient) for held, gradient in pairs if gradient is not None]


class Loop:
    """A training loop on such parameters."""

    def __init__(self, kind: str, size: int, overlapped: bool, max_bytes: int = SEVERAL) -> None:
        self.kind, self.size = kind, size
        self.params, self.opt = start(kind, size, max_batch_bytes=max_bytes)
        self.model = Matrices(self.params)
        self.overlap = self.opt.overlap(self.model) if overlapped else None
        self.started = self.computed = 0

    def backward(self, step: int, without: Collection[str] = (), change: Callable[[str, Tensor], object] | None = None) -> None:
        """The gradients of a step, those of the last parameter first; `change` may write to this rank's part of each."""
        gradients: dict[str, Tensor | None] = {}
        for name in self.params:
            gradients[name] = None if name in without else placed(drawn(name, step + 1), self.kind, self.size)
            if change is not None and (G := gradients[name]) is not None:
                change(name, G.to_local() if isinstance(G, DTensor) else G)
        for part in reversed(self.model(gradients)):
            part.backward()
            # What others have sent meanwhile may have arrived.
            time.sleep(0.01)

    def step(self) -> str | None:
        """Step; what was raised."""
        for lane in self.overlap.lanes.values() if self.overlap is not None else ():
            started, computed = lane.ahead
            self.started, self.computed = self.started + started, self.computed + computed
        try:
            self.opt.step()
        except (RuntimeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            self.opt.zero_grad()
        return None

    def seen(self) -> dict[str, Any]:
        if self.overlap is not None:
            self.overlap.finish()
        return {**seen(self.params, self.opt), "started": self.started, "computed": self.computed}

    def unchanged(self, before: dict[str, Tensor]) -> bool:
        return all(torch.equal(local(p), before[name]) for name, p in self.params.items())

    def weights(self) -> dict[str, Tensor]:
        return {name: local(p) for name, p in self.params.items()}


def missing(loop: Loop, rank: int) -> dict[str, Any]:
    for step in range(4):
        loop.backward(step, absent(step, rank))
        loop.step()
    return loop.seen()


def not_finite(loop: Loop, rank: int) -> dict[str, Any]:
    """Rank 1 has a nan in its part of one parameter, of another at each step."""
    for step, wrong in enumerate([None, "a", "bank", "b"]):

        def spoil(name: str, G: Tensor, wrong: str | None = wrong) -> None:
            if rank == 1 and name == wrong:
                G.view(-1)[0] = torch.nan

        loop.backward(step, change=spoil)
        loop.step()
    return loop.seen()


def refused(loop: Loop, rank: int) -> dict[str, Any]:
    """Rank 1 has another decay, then a negative lr, in the middle of a training."""
    told = []
    loop.backward(0)
    loop.step()
    for step, fault in enumerate(["another decay", "negative lr"]):
        loop.backward(1 + step, absent(1, rank))
        saved = [dict(group) for group in loop.opt.param_groups]
        if rank == 1:
            FAULTS[fault][0](loop.params, loop.opt)
        if loop.overlap is not None:
            loop.overlap.finish()
        before = loop.weights()
        told.append((loop.step(), loop.unchanged(before)))
        for group, own in zip(loop.opt.param_groups, saved, strict=True):
            group.update({key: own[key] for key in ("lr", "weight_decay")})
        loop.backward(1 + step)
        loop.step()
    return {**loop.seen(), "told": told}


def behind(loop: Loop, rank: int) -> dict[str, Any]:
    """Rank 1 computes nothing before a step, the others all; of the steps one meets an inf, one is refused."""
    told = []
    with mock.patch.object(Lane, "compute", lambda lane: None) if rank == 1 else nullcontext():
        for step in range(4):

            def spoil(name: str, G: Tensor, step: int = step) -> None:
                if (step, rank, name) == (1, 0, "b"):
                    G.view(-1)[0] = torch.inf

            loop.backward(step, change=spoil)
            if loop.overlap is not None and rank != 1:
                for lane in loop.overlap.lanes.values():
                    with torch.no_grad():
                        while lane.computed < len(lane.flights):
                            lane.compute()
            lr = loop.opt.param_groups[0]["lr"]
            loop.opt.param_groups[0]["lr"] = -1.0 if (step, rank) == (2, 0) else lr
            told.append(loop.step())
            loop.opt.param_groups[0]["lr"] = lr
    return {**loop.seen(), "told": told}


SCENARIOS: dict[str, Callable[[Loop, int], dict[str, Any]]] = {
    "missing": missing,
    "not finite": not_finite,
    "refused": refused,
    "behind": behind,
}

# Of a bucket of several parameters some may move and others not.
BUCKETS = {"a bucket each": SEVERAL, "one bucket": ONE}


def differing(rank: int, size: int, kinds: Collection[str]) -> dict[str, Any]:
    return {
        f"{kind}, {name}, {buckets}": [run(Loop(kind, size, on, max_bytes), rank) for on in (False, True)]
        for kind in kinds
        for name, run in SCENARIOS.items()
        for buckets, max_bytes in BUCKETS.items()
    }


# -- what a loop may not do ----------------------------------------------------------------------------------------------


def clipped(loop: Loop, rank: int) -> None:
    loop.backward(1)
    for p in loop.params.values():
        assert p.grad is not None
        p.grad.mul_(0.5)


def clipped_by_one(loop: Loop, rank: int) -> None:
    loop.backward(1)
    if rank == 1:
        local_gradient(loop.params["b"]).mul_(0.5)


def accumulated(loop: Loop, rank: int) -> None:
    loop.backward(1)
    loop.backward(1)


def skipped(loop: Loop, rank: int) -> None:
    loop.backward(1)
    loop.opt.zero_grad()
    loop.backward(2)


def scaled(loop: Loop, rank: int) -> None:
    loop.backward(1)
    loop.opt.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]


def other_momentum(loop: Loop, rank: int) -> None:
    loop.backward(1)
    for group in loop.opt.param_groups[:2]:
        group["momentum"] = 0.5


def other_state(loop: Loop, rank: int) -> None:
    loop.backward(1)
    loop.opt.load_state_dict(loop.opt.state_dict())


def another_group(loop: Loop, rank: int) -> None:
    loop.backward(1)
    loop.opt.add_param_group({"params": [("late", nn.Parameter(torch.zeros(2, 2)))]})


def local_gradient(p: nn.Parameter) -> Tensor:
    assert isinstance(p.grad, DTensor)
    return p.grad.to_local()


MISUSES = (clipped, clipped_by_one, accumulated, skipped, scaled, other_momentum, other_state, another_group)


def misused(rank: int, size: int) -> dict[str, Any]:
    """What each rank was told, whether anything moved, and whether the next step is as it would have been without."""
    outcome = {}
    for misuse in MISUSES:
        plain, loop = (Loop("sharded", size, on) for on in (False, True))
        for one in (plain, loop):
            one.backward(0)
            one.step()
        assert loop.overlap is not None
        loop.overlap.finish()
        before = loop.weights()
        misuse(loop, rank)
        told, unchanged = loop.step(), loop.unchanged(before)
        loop.opt.grad_scale = None  # type: ignore[attr-defined]
        for group in loop.opt.param_groups[:2]:
            group["momentum"] = 0.95
        for one in (plain, loop):
            one.backward(3)
            told_next = one.step()
        outcome[misuse.__name__] = {
            "told": told,
            "unchanged": unchanged,
            "told next": told_next,
            "differs": same(loop.seen()["weights"], plain.seen()["weights"]),
        }
    return outcome


def discarded(rank: int, size: int) -> list[str]:
    """A loop that skips a step, and one that never had it."""
    found = []
    for on in (False, True):
        loop = Loop("sharded", size, on)
        loop.backward(0)
        loop.step()
        if loop.overlap is not None:
            # Not of all ranks alike.
            loop.backward(1, absent(1, rank))
            loop.opt.zero_grad()
            loop.overlap.discard()
        loop.backward(2)
        assert loop.step() is None
        found.append(loop.seen()["weights"])
    return same(*found)


def changed_after_backward(rank: int, size: int) -> list[str]:
    """Gradients accumulated and clipped, with another momentum, where only updates overlap."""
    found = []
    for on in (False, True):
        loop = Loop("sharded", size, False)
        loop.overlap = loop.opt.overlap(loop.model, backward=False) if on else None
        for step in (0, 2):
            loop.backward(step)
            loop.backward(step + 1)
            for p in loop.params.values():
                assert p.grad is not None
                p.grad.mul_(0.5)
            for group in loop.opt.param_groups[:2]:
                group["momentum"] = 0.5
            assert loop.step() is None
            assert loop.overlap is None or loop.overlap.waiting
        found.append(loop.seen()["weights"])
    return same(*found)


def freed(rank: int, size: int) -> int:
    """How many gradients are still there while updates are on their way."""
    loop = Loop("sharded", size, True)
    loop.backward(0)
    with torch.no_grad():
        gradients = [weakref.ref(p.grad.to_local()) for p in loop.params.values() if isinstance(p.grad, DTensor)]
    loop.step()
    assert len(gradients) == len(loop.params) and loop.overlap is not None and loop.overlap.waiting
    return sum(gradient() is not None for gradient in gradients)


# -- weights that are read between steps ---------------------------------------------------------------------------------

FSDP: Run = ("FSDP2", "Muon", SEVERAL, "float32")
OWNERS: Run = ("DDP, owners", "Muon", SEVERAL, "float32")


class Stepped:
    """A model after two steps, whose updates are on their way."""

    def __init__(self, run: Run, rank: int, size: int, overlapped: bool) -> None:
        self.run = run
        self.model, self.opt, self.loss = built(run, rank, size)
        self.opt.metrics(every=2)
        with mock.patch.object(ways, "cheaper", lambda *_: False):
            self.overlap = self.opt.overlap(self.model) if overlapped else None
            for step in range(2):
                self.train(step)

    def train(self, step: int) -> None:
        self.loss(step).backward()
        self.opt.step()
        self.opt.zero_grad()


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(t).clone() for name, t in model.state_dict().items()}


def _state(opt: schatten.SpectralOptimizer) -> dict[str, Tensor]:
    saved = opt.state_dict()["state"]
    return {f"{i}: {key}": whole(t).clone() for i, own in saved.items() for key, t in own.items()}


def _evaluated(stepped: Stepped) -> dict[str, Tensor]:
    with torch.inference_mode():
        return {"loss": stepped.loss(7).clone()}


def _loaded(stepped: Stepped) -> dict[str, Tensor]:
    stepped.model.load_state_dict({name: torch.zeros_like(t) for name, t in stepped.model.state_dict().items()})
    return _weights(stepped.model)


def _reloaded(stepped: Stepped) -> dict[str, Tensor]:
    stepped.opt.load_state_dict(stepped.opt.state_dict())
    stepped.train(2)
    return _weights(stepped.model)


def _prefetched(stepped: Stepped) -> dict[str, Tensor]:
    model: Any = stepped.model
    if stepped.run == FSDP:
        model.stem.set_modules_to_forward_prefetch(list(model.blocks))
    for step in (2, 3):
        stepped.train(step)
    return _weights(model)


def _closed(stepped: Stepped) -> dict[str, Tensor]:
    """Without overlap from here, with it again, and without."""
    for step in (2, 3, 4):
        if stepped.overlap is not None:
            stepped.overlap.close()
        if stepped.overlap is not None and step == 3:
            stepped.overlap = stepped.opt.overlap(stepped.model, backward=False)
        stepped.train(step)
    return _weights(stepped.model)


def _measured(stepped: Stepped) -> dict[str, Tensor]:
    found = stepped.opt.metrics(every=2)
    assert found is not None and found["measured_step"] == 2
    numbers = {key: found[key] for key in ("update_rms", "orthogonality_error", "spectral_norm")}
    return {f"{key} of {name}": torch.tensor(x) for key, own in numbers.items() for name, x in own.items()}


READINGS: dict[str, Callable[[Stepped], dict[str, Tensor]]] = {
    "the model's state dict": lambda stepped: _weights(stepped.model),
    "a submodule's state dict": lambda stepped: _weights(next(stepped.model.children())),
    "the optimizer's state dict": lambda stepped: _state(stepped.opt),
    "an evaluation": _evaluated,
    "a loaded model": _loaded,
    "a loaded optimizer": _reloaded,
    "FSDP2's forward prefetching": _prefetched,
    "overlap that ends and begins": _closed,
    "metrics": _measured,
}


def read(rank: int, size: int) -> dict[str, list[str]]:
    """What differs with overlap in what is read when updates are on their way."""
    outcome = {}
    for run in (FSDP, OWNERS):
        for name, reading in READINGS.items():
            plain, stepped = (Stepped(run, rank, size, on) for on in (False, True))
            assert stepped.overlap is not None and stepped.overlap.waiting
            found = reading(stepped)
            outcome[f"{run[0]}, {name}"] = same(found, reading(plain))
            assert stepped.opt.self_test()
    return outcome


def unsharded(stepped: Stepped) -> None:
    model: Any = stepped.model
    model.blocks[0].unshard(async_op=True)
    stepped.loss(2)


def edited(stepped: Stepped) -> None:
    model: Any = stepped.model
    with torch.no_grad():
        model.blocks[0].mlp.up.weight.mul_(2.0)
    stepped.loss(2)


def read_before(stepped: Stepped) -> None:
    model: Any = stepped.model
    model.module.blocks[0].mlp.up.weight.square().sum().backward()


WRONG_READINGS = {"unsharded": (unsharded, FSDP), "edited": (edited, FSDP), "read before": (read_before, OWNERS)}


def wrongly_read(rank: int, size: int) -> dict[str, str]:
    """What a loop is told that reads or writes weights on whose updates nobody has waited."""
    told = {}
    for name, (reading, run) in WRONG_READINGS.items():
        stepped = Stepped(run, rank, size, True)
        told[name] = _told(lambda reading=reading, stepped=stepped: reading(stepped))
        told[f"{name}, then the optimizer's state dict"] = _told(stepped.opt.state_dict)
    return told


def _told(action: Callable[[], object]) -> str:
    try:
        action()
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def wrongly_asked(rank: int, size: int) -> dict[str, str]:
    loop = Loop("sharded", size, False)
    told = {"another model": _told(lambda: loop.opt.overlap(nn.Linear(2, 2)))}
    handle = loop.opt.overlap(loop.model)
    told["twice"] = _told(lambda: loop.opt.overlap(loop.model))
    handle.close()
    handle.close()
    jaguar = schatten.JaguarMuon([nn.Parameter(torch.zeros(2, 2))])
    told["no backward"] = _told(lambda: jaguar.overlap(loop.model))
    return told


# -- death ---------------------------------------------------------------------------------------------------------------

# One bucket's way: to its owners in backward, the agreement of the step, and back.
COLLECTIVES = 3


def dying(rank: int, size: int, fatal: int) -> dict[str, Any]:
    """Rank 1 dies in the second iteration at its collective number `fatal`; what the others are told, and what is left."""
    loop = Loop("sharded", size, True, ONE)
    loop.backward(0)
    loop.step()
    assert loop.overlap is not None
    loop.overlap.finish()
    before, begun = _kept(loop), time.monotonic()

    def iteration() -> None:
        loop.backward(1)
        loop.opt.step()
        loop.backward(2)

    with Collectives(fatal if rank == 1 else None):
        told = _told(iteration)
    return {
        "told": told,
        "seconds": time.monotonic() - begun,
        "unchanged": not same(_kept(loop), before),
        "saved": _told(loop.opt.state_dict),
    }


def _kept(loop: Loop) -> dict[str, Tensor]:
    """This rank's part of weights and state."""
    state = {f"{name}: {key}": t for name, p in loop.params.items() for key, t in loop.opt.state[p].items()}
    return {key: local(t) for key, t in {**loop.params, **state}.items()}


# -- one start of ranks for many of these --------------------------------------------------------------------------------


def on_two(rank: int, size: int, runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "placements": in_placements(rank, size, runs),
        "misused": misused(rank, size),
        "discarded": discarded(rank, size),
        "changed after backward": changed_after_backward(rank, size),
        "freed": freed(rank, size),
        "read": read(rank, size),
        "wrongly read": wrongly_read(rank, size),
        "wrongly asked": wrongly_asked(rank, size),
    }


def on_more(rank: int, size: int, runs: Sequence[Run], kinds: Collection[str]) -> dict[str, Any]:
    return {"placements": in_placements(rank, size, runs), "differing": differing(rank, size, kinds)}
