"""EF21-Muon's place between Muon and lossy averaging: what feedback saves, and that without compression nothing changes."""

import pytest
import torch
from torch import nn

import schatten
from schatten.compressors import Identity, Natural, RankK, Sign, TopK
from schatten.presets.ef21_muon import EF21Muon

WORKERS = 4

STEPS = 300


def trained(optimizer, params, gradients):
    for step in gradients:
        for p, G in zip(params, step, strict=True):
            p.grad = G.to(p.dtype)
        optimizer.step()
    return [p.detach().clone() for p in params]


def matrices(dtype):
    return [nn.Parameter(torch.randn(6, 4).to(dtype)), nn.Parameter(torch.randn(3, 8).to(dtype))]


@pytest.mark.parametrize("decay", ["explicit", "implicit", "cautious"])
def test_without_compression_one_worker_is_muon_without_nesterov_bit_for_bit(decay, dtype):
    start = matrices(dtype)
    gradients = [[torch.randn(6, 4), torch.randn(3, 8)] for _ in range(5)]
    weights = []
    for build in (
        lambda params: EF21Muon(params, lr=0.1, compressor=Identity(), decay=decay),
        lambda params: schatten.Muon(params, lr=0.1, nesterov=False, decay=decay),
    ):
        params = [nn.Parameter(p.detach().clone()) for p in start]
        weights.append(trained(build(params), params, gradients))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def least_squares(seed=0, fan_out=16, fan_in=8, rows=24):
    """1/2 ||A_j W - B_j||^2 for each worker, whose minimisers are as far apart as they are from zero."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    common = draw(fan_out, fan_in)
    A = [draw(rows, fan_out) / rows**0.5 for _ in range(WORKERS)]
    return A, [a @ (common + draw(fan_out, fan_in)) for a in A]


def loss(W, A, B):
    return sum(0.5 * (a @ W - b).square().sum() for a, b in zip(A, B, strict=True)) / WORKERS


def gap(train, steps):
    """The share of the initial distance to the least loss that is left after training with lr falling to zero."""
    A, B = least_squares()
    least = loss(torch.linalg.lstsq(torch.cat(A), torch.cat(B)).solution, A, B)
    W = nn.Parameter(torch.zeros(16, 8, dtype=torch.float64))
    start = loss(W.detach(), A, B)
    train(W, A, B, [0.1 * (1 - t / steps) for t in range(steps)])
    return float((loss(W.detach(), A, B) - least) / (start - least))


OPTIONS = {"weight_decay": 0.0, "scale": "none", "solver": schatten.solvers.svd()}


def with_feedback(C, C_server=None):
    def train(W, A, B, lrs):
        opt = EF21Muon([W], momentum=0.9, compressor=C, server_compressor=C_server, workers=WORKERS, **OPTIONS)
        for lr in lrs:
            opt.param_groups[0]["lr"] = lr
            for j in range(WORKERS):
                with opt.worker(j):
                    W.grad = A[j].T @ (A[j] @ W.detach() - B[j])
            opt.step()

    return train


def without_feedback(C):
    """Workers send their compressed momentum itself, and the server orthogonalises the mean."""

    def train(W, A, B, lrs):
        opt = schatten.Muon([W], momentum=0.0, nesterov=False, **OPTIONS)
        M = [torch.zeros_like(W.detach())] * WORKERS
        for step, lr in enumerate(lrs):
            opt.param_groups[0]["lr"] = lr
            M = [0.9 * m + 0.1 * a.T @ (a @ W.detach() - b) for m, a, b in zip(M, A, B, strict=True)]
            W.grad = sum(C.decode(C.encode(m, step), m.shape, m.dtype) for m in M) / WORKERS
            opt.step()

    return train


# Seen with 300 steps: uncompressed 1.1e-7, Natural 2.3e-7, TopK(0.05) 6.6e-5, Sign and TopK both ways 5.4e-4.
@pytest.mark.parametrize(
    ("train", "bound"),
    [
        (with_feedback(Identity()), 1e-6),
        (with_feedback(Natural()), 1e-6),
        (with_feedback(TopK(0.05)), 1e-3),
        (with_feedback(Sign()), 1e-2),
        (with_feedback(RankK(1)), 1e-2),
        (with_feedback(TopK(0.05), TopK(0.05)), 1e-2),
    ],
    ids=["Identity", "Natural", "TopK", "Sign", "RankK", "TopK both ways"],
)
def test_feedback_brings_compressed_training_to_the_least_loss(train, bound):
    assert gap(train, STEPS) < bound


@pytest.mark.parametrize("C", [TopK(0.05), RankK(1)], ids=repr)
def test_without_feedback_training_ends_far_from_it_however_long_it_is(C):
    # The workers' gradients cancel at the least loss, but what is kept of them does not. Seen: 0.30 and 0.30
    # for TopK, 0.09 and 0.07 for RankK.
    assert gap(without_feedback(C), STEPS) > 0.05
    assert gap(without_feedback(C), 2 * STEPS) > 0.05


@pytest.mark.parametrize("C", [TopK(0.1), Sign(), RankK(1), Natural()], ids=repr)
def test_under_a_constant_gradient_the_estimate_tends_to_it_at_the_rate_of_the_contraction(C):
    p, G = nn.Parameter(torch.zeros(8, 6, dtype=torch.float64)), torch.randn(8, 6, dtype=torch.float64)
    opt = EF21Muon([p], lr=0.0, momentum=0.5, compressor=C)
    for _ in range(200):
        p.grad = G.clone()
        opt.step()
    # ||M - E|| shrinks by sqrt(1 - alpha) or more while ||M - G|| halves; their sum over steps adds a factor of at most 3.
    rate = max(0.5, (1 - C.contraction(8, 6)) ** 0.5)
    assert (opt.state[p]["estimate"] - G).norm() < (3 * rate**200 + 1e-14) * G.norm()


def test_a_large_gradient_leaves_no_rounding_error_in_the_estimate():
    p = nn.Parameter(torch.zeros(4, 4))
    opt = EF21Muon([p], lr=0.0, momentum=0.5, compressor=TopK(0.5), workers=2)
    for step in range(120):
        for j in range(2):
            with opt.worker(j):
                p.grad = torch.full((4, 4), 1e20 if step == 0 else 1.0 + j)
        opt.step()
    # 1e20 halved 119 times is 1.5e-16; half of the entries is sent at a time.
    assert (opt.state[p]["estimate"].mean(0) - 1.5).abs().max() < 1e-5


def test_messages_cost_what_the_compressors_say():
    W, bank, bias = (nn.Parameter(torch.randn(shape)) for shape in ((64, 64), (3, 8, 5), (10,)))
    groups = [{"params": [W]}, {"params": [bank], "layout": "experts"}, {"params": [bias], "algorithm": "adamw"}]
    opt = EF21Muon(groups, compressor=TopK(0.1), server_compressor=Natural(), workers=2)
    for step in range(3):
        for j in range(2):
            with opt.worker(j):
                for p in (W, bank, bias):
                    # A gradient that is skipped is no message.
                    p.grad = torch.full_like(p, torch.nan if step == 2 and p is W else 1.0)
        opt.step()
    # Values in fp32 and positions in two bytes, of 410 of 4096 and 4 of 40 entries; a byte per entry and a scale.
    metrics = opt.metrics()
    assert metrics["bytes_to_server"] == 2 * (2 * 410 * 6 + 3 * 3 * 4 * 6 + 3 * 10 * 4)
    assert metrics["bytes_to_workers"] == 2 * (2 * (4096 + 4) + 3 * 3 * (40 + 4) + 3 * 10 * 4)
    assert metrics["bytes_dense"] == 2 * 4 * (2 * 4096 + 3 * 120 + 3 * 10)
