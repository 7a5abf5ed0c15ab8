"""What one rank of `test_ef21_muon_ranks.py` does: `of_rank` returns what it saw."""

import copy

import torch
import torch.distributed as dist
from torch import nn

from schatten.compressors import Identity, Natural, RankK, TopK
from schatten.presets.ef21_muon import EF21Muon

SHAPES = ((6, 4), (6, 4), (3, 5), (7,))

STEPS = 5

CHOICES = {
    "top": (TopK(0.3), Identity()),
    "both ways": (TopK(0.3), TopK(0.5)),
    "noise": (Natural(), Natural()),
    "rank": (RankK(2), Identity()),
    "uncompressed": (Identity(), Identity()),
}


def drawn(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def gradients(step, worker):
    return drawn(100 * step + worker)


def parameters(seed=1000):
    return [nn.Parameter(W) for W in drawn(seed)]


def build(params, choice="both ways", **options):
    C, C_server = CHOICES[choice]
    groups = [{"params": params[:-1]}, {"params": params[-1:], "algorithm": "adamw"}]
    return EF21Muon(groups, **{"lr": 0.1, "compressor": C, "server_compressor": C_server, **options})


def step(opt, params, own):
    for p, G in zip(params, own, strict=True):
        p.grad = None if G is None else G.clone()
    opt.step()


def values(params):
    return [p.detach().clone() for p in params]


def seen(opt, params):
    return {
        "weights": values(params),
        "state": [{key: value.clone() for key, value in opt.state[p].items()} for p in params],
        "gradients": [None if p.grad is None else p.grad.clone() for p in params],
        "metrics": opt.metrics(),
    }


def refusal(action):
    try:
        action()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "nothing was refused"


def trained(choice, rank, change=lambda step, own: own):
    params = parameters()
    opt = build(params, choice)
    for k in range(STEPS):
        step(opt, params, change(k, gradients(k, rank)))
    return seen(opt, params)


def with_nan(rank):
    def change(k, own):
        if k == 2 and rank == 1:
            own[0][1, 1] = torch.nan
            own[3][1] = torch.inf
        return own

    return change


def with_missing(rank):
    """The first and the last are without gradient on rank 0 at one step, the second on every rank at another."""

    def change(k, own):
        absent = {1: [0, 3] if rank == 0 else [], 2: [1]}.get(k, [])
        return [None if i in absent else G for i, G in enumerate(own)]

    return change


def resumed(rank):
    params = parameters()
    opt = build(params)
    for k in range(2):
        step(opt, params, gradients(k, rank))
    saved = copy.deepcopy(opt.state_dict())
    of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, saved)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    twin = build(twins)
    foreign = refusal(lambda: twin.load_state_dict(of_ranks[1 - rank]))
    twin.load_state_dict(saved)
    for k in range(2, STEPS):
        step(opt, params, gradients(k, rank))
        step(twin, twins, gradients(k, rank))
    return {"foreign": foreign, "weights": values(twins), "uninterrupted": values(params)}


def with_worker_blocks(rank):
    params = parameters()
    opt = build(params)
    for k in range(STEPS):
        with opt.worker(rank):
            for p, G in zip(params, gradients(k, rank), strict=True):
                p.grad = G.clone()
        opt.step()
    return {"weights": values(params), "other": refusal(lambda: opt.worker(1 - rank).__enter__())}


def in_groups(rank):
    """A group of both, whose optimizer is copied, and one of rank 0 alone."""
    both, alone = dist.new_group([0, 1]), dist.new_group([0])
    params = parameters()
    twin, twins = copy.deepcopy((build(params, group=both), params))
    for k in range(STEPS):
        step(twin, twins, gradients(k, rank))
    found = {"copy": values(twins), "member": None, "outside": None}
    if rank == 0:
        own = parameters()
        step(build(own, group=alone, workers=1), own, gradients(0, 0))
        found["member"] = values(own)
    else:
        found["outside"] = refusal(lambda: build(parameters(), group=alone))
    return found


def refusals(rank):
    def first_step(params, **options):
        before = values(params)
        message = refusal(lambda: step(build(params, **options), params, before))
        return message, all(torch.equal(p, w) for p, w in zip(params, before, strict=True))

    return {
        "weights": first_step(parameters(1000 + rank)),
        "batches": first_step(parameters(), max_batch_bytes=1 if rank else 1 << 20),
        "parameters": first_step(parameters()[rank:]),
        "workers": refusal(lambda: build(parameters(), workers=2)),
    }


def of_rank(rank, size):
    return {
        **{choice: trained(choice, rank) for choice in CHOICES},
        "nan": trained("both ways", rank, with_nan(rank)),
        "missing": trained("both ways", rank, with_missing(rank)),
        "resumed": resumed(rank),
        "blocks": with_worker_blocks(rank),
        "groups": in_groups(rank),
        "refusals": refusals(rank),
    }
