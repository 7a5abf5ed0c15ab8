"""What is around a step, on parameters that several ranks hold: metrics, clipping, self test, wrappers, scaler, closures.

Gradients are given, the same bits everywhere, so that one process can be compared with; models are trained where the rule
evaluates gradients itself.
"""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import schatten
from schatten.placements import ways
from tests.distributed.collectives import Collectives
from tests.distributed.faults_runs import KINDS, local, placed
from tests.distributed.parity_model import whole

# On three or four ranks some shards are uneven and some empty.
SHAPES: dict[str, tuple[tuple[int, ...], str | schatten.Layout]] = {
    "tall": ((9, 5), "auto"),
    "wide": ((5, 9), "auto"),
    "unequal": ((11, 4), schatten.Layout(split=(5, 3, 3))),
    "bank": ((3, 6, 4), "experts"),
    "row": ((1, 8), "auto"),
    "table": ((10, 3), "adamw"),
    "bias": ((2,), "adamw"),
}

STEPS = 4

Params = dict[str, nn.Parameter]


def drawn(name: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * seed + list(SHAPES).index(name))
    return torch.randn(SHAPES[name][0], generator=generator, dtype=torch.float64)


def start(
    kind: str, size: int, make: Callable[..., Any] = schatten.Muon, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Params, Any]:
    params = {name: nn.Parameter(placed(drawn(name, 0).to(dtype), kind, size)) for name in SHAPES}
    groups: list[dict[str, Any]] = [
        {"params": [(name, params[name])], **({"algorithm": layout} if layout == "adamw" else {"layout": layout})}
        for name, (_, layout) in SHAPES.items()
    ]
    if kind in ("owners", "zero1"):
        options["placement"] = kind
    return params, make(groups, lr=0.05, weight_decay=0.1, **options)


def give(params: Params, step: int, kind: str, size: int, times: float = 1.0) -> None:
    for name, p in params.items():
        p.grad = placed((times * drawn(name, step + 1)).to(p.dtype), kind, size)


def weights(params: Params) -> dict[str, Tensor]:
    return {name: whole(p.detach()).clone() for name, p in params.items()}


def poison(t: Tensor | None, value: float) -> None:
    """Put a value into this rank's part."""
    assert t is not None
    own = t.to_local() if isinstance(t, DTensor) else t
    if own.numel():
        own.view(-1)[0] = value


def told(action: Callable[[], Any]) -> str | None:
    try:
        action()
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


# -- metrics -------------------------------------------------------------------------------------------------------------


def measured(rank: int, size: int, kind: str) -> dict[str, Any]:
    """Numbers of a measured step, with collectives of that and of the others, and of calls that return none."""
    params, opt = start(kind, size)
    assert opt.metrics(every=2) is not None  # from now on each second step is measured
    sent, found, calls = [], [], []
    for step in range(STEPS):
        give(params, step, kind, size)
        if step == 2 and rank == size - 1:
            poison(params["bank"].grad, torch.nan)
            poison(params["tall"].grad, torch.nan)
            poison(params["table"].grad, torch.inf)
        with Collectives() as seen:
            opt.step()
        sent.append([name for name, _ in seen.seen])
        with Collectives() as seen:
            found.append(opt.metrics(every=2))
        calls.append(len(seen.seen))
    plan = str(opt.plan).splitlines()[-2]  # the last says what computes
    return {"sent": sent, "metrics": found, "calls": calls, "weights": weights(params), "plan": plan}


def measured_together(rank: int, size: int, kind: str) -> dict[str, Any]:
    """As `measured`, with matrices that are cut along their longer side computed where they lie."""
    with mock.patch.object(ways, "cheaper", lambda *_: True):
        return measured(rank, size, kind)


# -- clipping ------------------------------------------------------------------------------------------------------------

# The norm and its bound.
CLIPS = {
    "two": (2.0, 1.0),
    "one": (1.0, 3.0),
    "largest": (math.inf, 0.5),
    "odd": (3.5, 1.0),
    "measured": (2.0, math.inf),
}


def clipped(rank: int, size: int, kind: str) -> dict[str, Any]:
    """Norms and gradients after clipping, where both parts are clipped, and where one rank lacks or spoils a gradient."""
    found: dict[str, Any] = {}
    for name, (order, limit) in CLIPS.items():
        params, opt = start(kind, size, schatten.SpectralSGD, p=0.5)
        give(params, 0, kind, size, times=1e20 if name == "two" else 1.0)
        norms = schatten.clip_grad_norm_(opt, limit, norm_type=order)
        found[name] = (norms._asdict(), {k: whole(p.grad) for k, p in params.items() if p.grad is not None})
    params, opt = start(kind, size)
    give(params, 0, kind, size)
    if rank == size - 1:
        params["tall"].grad = None
        poison(params["table"].grad, torch.inf)
    norms = schatten.clip_grad_norm_(opt, 1.0)
    own = {k: local(p.grad) for k, p in params.items() if p.grad is not None}
    before = {k: local(placed(drawn(k, 1), kind, size)) for k in SHAPES}
    unchanged = all(torch.equal(grad, before[k]) for k, grad in own.items() if grad.isfinite().all())
    return {**found, "spoilt": norms._asdict(), "unchanged": unchanged}


# -- self test -----------------------------------------------------------------------------------------------------------


class ForgetsDecay(schatten.Muon):
    def rule(self, group: Any) -> schatten.Rule:
        group = {**group, "weight_decay": 0.0}
        return super().rule(group)

    def _spectral_step_(self, whole: Any, rule: Any, group: Any, room: Any, scale: Any) -> None:
        super()._spectral_step_(whole, rule, {**group, "weight_decay": 0.0}, room, scale)


def kept(params: Params, opt: Any) -> list[Any]:
    """All that a self test must leave as it is."""
    state = {(n, k): local(t) for n, p in params.items() for k, t in opt.state[p].items()}
    numbers = [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]
    own = {n: (local(p), None if p.grad is None else local(p.grad)) for n, p in params.items()}
    return copy.deepcopy([own, state, numbers, torch.get_rng_state()])


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def self_tested(rank: int, size: int, kind: str) -> dict[str, Any]:
    params, opt = start(kind, size)
    give(params, 0, kind, size)
    opt.step()
    give(params, 1, kind, size)
    before = kept(params, opt)
    report = opt.self_test()
    unchanged = same(kept(params, opt), before)
    opt.step()
    params_again, again = start(kind, size)
    for step in range(2):
        give(params_again, step, kind, size)
        again.step()
    _, forgetful = start(kind, size, ForgetsDecay)
    found = {
        "checks": [(c.check, c.parameter, c.ok) for c in report],
        "unchanged": unchanged,
        "goes on": same(weights(params), weights(params_again)),
        "forgets": told(forgetful.self_test),
    }
    # A group is made another's on one rank alone: it says so, and no rank waits for it.
    _, odd = start(kind, size)
    if rank == 1:
        odd.param_groups[0]["layout"] = schatten.Layout(transpose=True)
    return {**found, "odd": told(odd.self_test)}


# -- wrappers ------------------------------------------------------------------------------------------------------------


def shifted(rank: int, size: int, kind: str) -> dict[str, Any]:
    """Weights ahead and where they stand, a run that goes on from a checkpoint of whole tensors, and bf16 weights."""
    params, inner = start(kind, size)
    opt = schatten.EMANesterov(inner, beta=0.5, decay=0.9)
    for step in range(2):
        give(params, step, kind, size)
        opt.step()
    saved = opt.state_dict()
    saved["ema_nesterov"]["paths"] = [{k: whole(t).clone() for k, t in path.items()} for path in saved["ema_nesterov"]["paths"]]
    values = weights(params)
    others, inner = start(kind, size)
    other = schatten.EMANesterov(inner, beta=0.5, decay=0.9)
    with torch.no_grad():
        for name, p in others.items():
            p.copy_(placed(values[name], kind, size))
    other.load_state_dict(saved)
    give(params, 2, kind, size)
    opt.step()
    ahead = weights(params)
    with opt.unshifted():
        behind = weights(params)
    back = weights(params)
    give(others, 2, kind, size)
    other.step()
    short, inner = start(kind, size, dtype=torch.bfloat16)
    opt = schatten.EMANesterov(inner, beta=0.5, decay=0.9)
    for step in range(3):
        give(short, step, kind, size)
        opt.step()
    return {"ahead": ahead, "behind": behind, "back": back, "resumed": weights(others), "bf16": weights(short)}


def qk_clipped(rank: int, size: int, kind: str) -> dict[str, Any]:
    """Six query heads of two rows, three key heads, and MLA's parts; what a slice of a sharded weight is told."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"query": (12, 4), "key": (6, 4), "query_bias": (12,), "key_bias": (6,)}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    logits = torch.tensor([400.0, 50.0, 300.0, 200.0, torch.inf, 120.0])
    found: dict[str, Any] = {}
    variants: dict[str, dict[str, Any]] = {"grouped": {}, "rotary": {"rotary": 1, "values": 1}}
    for name, more in variants.items():
        params = {k: nn.Parameter(placed(t.clone(), kind, size)) for k, t in drawn.items()}
        biases: dict[str, Any] = {k: params[k] for k in ("query_bias", "key_bias")}
        gammas = schatten.qk_clip_(params["query"], params["key"], logits, **more, **biases)
        found[name] = {"gammas": gammas, **weights(params)}
    query, key = (nn.Parameter(placed(drawn[k].clone(), kind, size)) for k in ("query", "key"))
    return {**found, "slice": told(lambda: schatten.qk_clip_(query.detach()[:12], key, logits))}


# -- closures ------------------------------------------------------------------------------------------------------------

BATCH = 12


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def wrapped(kind: str, size: int) -> tuple[nn.Module, dict[str, Any]]:
    net = model()
    if kind == "FSDP2":
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("shard",))
        for layer in net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
        return net, {}
    if kind in ("owners", "zero1"):
        return DistributedDataParallel(net), {"placement": kind}
    return net, {}


def loss_of(net: nn.Module, step: int, rank: int, size: int) -> Tensor:
    """The mean loss of this rank's share of a step's batch."""
    X = torch.randn(BATCH, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    share = X[rank * BATCH // size : (rank + 1) * BATCH // size]
    return (net(share) - share[:, :3].sin()).square().mean()


def named(net: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): whole(p.detach()).clone() for name, p in net.named_parameters()}


def reduced(rank: int, size: int, kind: str) -> dict[str, Any]:
    """MuonMVR with gradients at the weights of the step before: by a closure, and by hand with a nan there."""
    found = {}
    for how in ("closure", "by hand"):
        net, options = wrapped(kind, size)
        opt: Any = schatten.MuonMVR(net, lr=0.05, gamma=1.0, exact=True, **options)
        for step in range(STEPS):

            def closure(step: int = step, net: nn.Module = net, opt: Any = opt) -> Tensor:
                opt.zero_grad()
                value = loss_of(net, step, rank, size)
                value.backward()
                return value.detach()

            if how == "closure":
                opt.step(closure)
                continue
            closure()
            with opt.previous_weights():
                closure()
                # Replicas have the same gradients, and of a shard one rank has it.
                if step == 2 and (rank == size - 1 or kind != "FSDP2"):
                    poison(next(net.parameters()).grad, torch.nan)
            opt.step()
        found[how] = {**named(net), "skipped": torch.tensor(opt.metrics()["skipped_total"])}
    return found


def estimated(rank: int, size: int, kind: str) -> dict[str, Any]:
    """JaguarMuon, each rank with samples of its own."""
    net, options = wrapped(kind, size)
    opt = schatten.JaguarMuon(net, lr=0.05, share=0.5, **options)
    losses = [float(opt.step(lambda step=step: loss_of(net, step, rank, size))) for step in range(STEPS)]
    return {"losses": losses, "weights": named(net)}


def refusals(rank: int, size: int) -> dict[str, str | None]:
    sharded, replicas = wrapped("FSDP2", size)[0], wrapped("owners", size)[0]
    return {
        "EF21Muon, FSDP2": told(lambda: schatten.EF21Muon(sharded)),
        "EF21Muon, DDP": told(lambda: schatten.EF21Muon(replicas)),
        "EF21Muon, owners": told(lambda: schatten.EF21Muon(model(), placement="owners")),
        "JaguarMuon, FSDP2": told(lambda: schatten.JaguarMuon(sharded)),
        "JaguarMuon, zero1": told(lambda: schatten.JaguarMuon(replicas, placement="zero1")),
        "step_in_backward, FSDP2": told(lambda: schatten.Muon(sharded).step_in_backward()),
        "step_in_backward, DDP, local": told(lambda: schatten.Muon(replicas, placement="local").step_in_backward()),
        "step_in_backward, DDP": told(lambda: schatten.Muon(replicas).step_in_backward()),
    }


# -- what others do with an optimizer ------------------------------------------------------------------------------------


def scaled(rank: int, size: int, kind: str) -> dict[str, Any]:
    """A GradScaler that leaves dividing and skipping to the step, and a gradient that has overflowed on one rank in the end."""
    params, opt = start(kind, size)
    opt._step_supports_amp_scaling = True
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))  # makes it know its scale
    for step in range(3):
        give(params, step, kind, size, times=4.0)
        if step == 2 and rank == size - 1:
            poison(params["table"].grad, torch.inf)
        scaler.step(opt)
        scaler.update()
    state = {f"{n}, {k}": whole(t).clone() for n, p in params.items() for k, t in opt.state[p].items()}
    return {"weights": weights(params), "state": state, "skipped": opt.metrics()["skipped"], "scale": scaler.get_scale()}


def overlapped(rank: int, size: int, kind: str) -> dict[str, Any]:
    """EMA-Nesterov around an optimizer whose updates come back while the next forward runs."""
    net, options = wrapped(kind, size)
    inner = schatten.Muon(net, lr=0.05, **options)
    opt = schatten.EMANesterov(inner, beta=0.5, decay=0.5)
    hooks = inner.overlap(net) if kind == "FSDP2" else nullcontext()
    with hooks:
        for step in range(STEPS):
            loss_of(net, step, rank, size).backward()
            opt.step()
            opt.zero_grad()
    return named(net)


def replaced(rank: int, size: int, kind: str) -> dict[str, Any]:
    """Optimizers of the whole model, into whose groups sharded tensors are put before the first step, as accelerate does."""
    net = model()
    opt = schatten.EMANesterov(inner := schatten.Muon(net, lr=0.05), beta=0.5, decay=0.5)
    if kind == "FSDP2":
        names = {p: name for name, p in net.named_parameters()}
        fully_shard(net, mesh=init_device_mesh("cpu", (size,)))
        own = dict(net.named_parameters())
        for group in inner.param_groups:
            group["params"] = [own[names[p]] for p in group["params"]]
    before = inner.metrics()
    report = inner.self_test()
    for step in range(STEPS):
        loss_of(net, step, rank, size).backward()
        opt.step()
        opt.zero_grad()
    with opt.unshifted():
        # Outside of the model, which FSDP2 would leave gathered.
        behind = [whole(p.detach()).clone() for group in inner.param_groups for p in group["params"]]
    found = {"before": before, "behind": dict(enumerate(behind)), "weights": named(net)}
    return {**found, "checks": [(c.check, c.parameter, c.ok) for c in report], "paths": len(opt._paths)}


SCENARIOS = {
    "metrics": measured,
    "clip": clipped,
    "self test": self_tested,
    "EMA-Nesterov": shifted,
    "qk_clip": qk_clipped,
    "scaler": scaled,
}

# Four ranks are asked for what copies of shards could count twice.
OF_COPIES = ("metrics", "clip", "EMA-Nesterov", "scaler")

MODELS = {"FSDP2": ("MVR",), "owners": ("MVR", "Jaguar"), "zero1": ("MVR",)}


def of_rank(rank: int, size: int) -> dict[str, Any]:
    if size == 4:
        return {f"{name}, copies of shards": SCENARIOS[name](rank, size, "copies of shards") for name in OF_COPIES}
    kinds = [kind for kind in KINDS if kind != "copies of shards"]
    found: dict[str, Any] = {f"{name}, {kind}": run(rank, size, kind) for name, run in SCENARIOS.items() for kind in kinds}
    for kind, rules in MODELS.items():
        found |= {f"{rule}, {kind}": {"MVR": reduced, "Jaguar": estimated}[rule](rank, size, kind) for rule in rules}
    found["together, sharded"] = measured_together(rank, size, "sharded")
    found |= {f"{name}, FSDP2": run(rank, size, "FSDP2") for name, run in {"replaced": replaced, "overlap": overlapped}.items()}
    return {**found, "refusals": refusals(rank, size)}
