"""Every compressor obeys every law of `compressor_laws`, costs the bytes it should and attains its alpha."""

import dataclasses
import math
import pickle

import pytest
import torch
import torch.distributed as dist

from schatten import compressors
from schatten.compressors import Compressor, Identity, Natural, RankK, Sign, TopK, message_bytes
from tests.contracts.compressor_laws import (
    CARRIED,
    LAWS,
    UNBIASED,
    classes,
    energy,
    instances,
    single,
    the_mean_is_the_input,
    through,
)
from tests.contracts.matrices import ZOO, gaussian, with_spectrum

COMPRESSORS = instances()


def test_the_listing_finds_the_compressors():
    assert {cls.__name__ for cls in classes()} >= {"Identity", "TopK", "RankK", "Natural", "Sign"}
    assert len(COMPRESSORS) >= 8


@pytest.mark.parametrize(
    ("law", "C"), [pytest.param(law, C, id=f"{name}-{law.__name__}") for name, C in COMPRESSORS.items() for law in LAWS]
)
def test_compressor(law, C):
    law(C)


@pytest.mark.parametrize("C", [C for C in COMPRESSORS.values() if type(C).__name__ in UNBIASED], ids=repr)
def test_unbiased_compressors_have_their_input_as_mean(C):
    the_mean_is_the_input(C)


@pytest.mark.parametrize("C", COMPRESSORS.values(), ids=repr)
def test_compressors_are_values(C):
    assert isinstance(C, Compressor)
    assert pickle.loads(pickle.dumps(C)) == C and hash(pickle.loads(pickle.dumps(C))) == hash(C)
    assert eval(repr(C), {**vars(compressors)}) == C
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
        C.anything = None


# Bytes of a 64 x 64, a 200 x 300 (more than 2^15 positions) and a 5 x 7 matrix in fp32, then of the first in fp64.
BYTES = {
    Identity(): (4 * 4096, 4 * 60000, 4 * 35, 8 * 4096),
    TopK(0.1): (410 * (4 + 2), 6000 * (4 + 4), 4 * (4 + 2), 410 * (8 + 2)),
    RankK(4): (4 * 4 * 128, 4 * 4 * 500, 4 * 4 * 12, 8 * 4 * 128),
    Natural(): (4096 + 4, 60000 + 4, 35 + 4, 4096 + 8),
    Sign(): (512 + 4, 7500 + 4, 5 + 4, 512 + 8),
}


def test_the_table_of_bytes_names_every_compressor():
    assert {type(C) for C in BYTES} == set(classes())


@pytest.mark.parametrize("C", BYTES, ids=repr)
def test_a_message_costs_what_it_should(C):
    matrices = [gaussian(64, 64).float(), gaussian(200, 300).float(), gaussian(5, 7).float(), gaussian(64, 64)]
    assert tuple(message_bytes(C.encode(X, 0)) for X in matrices) == BYTES[C]
    assert message_bytes(C.encode(gaussian(2, 3, 64, 64).float(), 0)) == 6 * BYTES[C][0]
    assert C == Identity() or all(BYTES[C][i] < matrices[i].nbytes for i in (0, 1, 3))


# 4/3 of a power of two is where natural compression errs most.
WORST = {
    Identity(): gaussian(16, 24),
    TopK(0.1): torch.ones(16, 24, dtype=torch.float64),
    RankK(4): with_spectrum(16, 24, torch.ones(16)),
    Natural(): torch.full((256, 256), 4 / 3, dtype=torch.float64),
    Sign(): single(16, 24),
}


@pytest.mark.parametrize("C", WORST, ids=repr)
def test_contraction_is_attained(C):
    X = WORST[C]
    error = energy(through(C, X) - X) / energy(X)
    # Hoeffding for 65536 errors between 1/16 and 1/4 of natural compression, at a chance of 1e-9; rounding for the others.
    tolerance = 3 / 16 * math.sqrt(math.log(2e9) / (2 * X.numel())) if C == Natural() else 1e-12
    assert abs(error - (1 - C.contraction(*X.shape))) < tolerance


@pytest.fixture
def gloo():
    """A group of one process: what the backend refuses it refuses there too."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("C", COMPRESSORS.values(), ids=repr)
def test_what_is_gathered_is_decoded(C, gloo):
    X = gaussian(3, 12, 20).float()
    received = []
    for t in C.encode(X, 4):
        gathered = [torch.empty_like(t)]
        dist.all_gather(gathered, t)
        received.append(gathered[0])
    assert torch.equal(C.decode(tuple(received), X.shape, X.dtype), through(C, X, 4))


def test_gloo_carries_what_the_laws_allow_and_no_int16(gloo):
    for dtype in CARRIED:
        gathered = [torch.zeros(4, dtype=dtype)]
        dist.all_gather(gathered, torch.ones(4, dtype=dtype))
        assert gathered[0].all()
    with pytest.raises(RuntimeError, match="Invalid scalar type"):
        dist.all_gather([torch.zeros(4, dtype=torch.int16)], torch.ones(4, dtype=torch.int16))


@pytest.mark.parametrize("C", [Natural(), RankK(2)], ids=repr)
def test_another_seed_is_other_noise(C):
    X = gaussian(12, 20)
    assert (through(C, X, 0) - through(C, X, 1)).norm() > 1e-2 * X.norm()


def test_top_k_keeps_the_largest_and_rounds_their_number_up():
    X = gaussian(9, 11).float()
    Y = through(TopK(0.25), X)
    kept = Y != 0
    assert kept.sum() == 25  # of 99
    assert torch.equal(Y[kept], X[kept]) and X[kept].abs().min() > X[~kept].abs().max()
    # 0.07 * 100 = 7.000000000000001 in floating point.
    assert [TopK(0.07).count(10, 10), TopK(0.071).count(10, 10), TopK(1e-9).count(3, 3), TopK(1.0).count(7, 9)] == [7, 8, 1, 63]


@pytest.mark.parametrize(("m", "n"), [(128, 256), (181, 182), (32768, 1)])
def test_top_k_finds_the_last_of_the_positions(m, n):
    # 2^15 entries, the last position an int16 can hold, and a few more.
    X = torch.zeros(m, n)
    X[-1, -1] = -3.0
    assert torch.equal(through(TopK(1e-9), X), X)
    assert message_bytes(TopK(1e-9).encode(X, 0)) == 4 + (2 if m * n <= 1 << 15 else 4)


@pytest.mark.parametrize("name", ZOO)
def test_rank_k_is_near_the_best(name):
    X = ZOO[name]
    k = min(8, *X.shape)
    best = torch.linalg.svdvals(X)[:k].square().sum()
    for seed in range(5):
        Y = through(RankK(k), X, seed)
        assert torch.linalg.matrix_rank(Y) <= k
        # 0.83 is the least of twenty seeds, on a Gaussian matrix; one round gives 0.71 there.
        assert energy(Y) > 0.8 * best


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_rank_k_reproduces_what_has_rank_k(shape, dtype):
    X = with_spectrum(*shape, torch.tensor([1.0, 1e-2, 1e-4])).to(dtype)
    for rank in (3, 5, 40):
        assert (through(RankK(rank), X) - X).abs().max() < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_natural_rounds_to_a_neighbouring_power_of_two(dtype):
    # Within the window of 2^-126, 38 orders of magnitude, and nearly all of it.
    X = (gaussian(40, 50) * torch.logspace(3, -30, 50, dtype=torch.float64)).to(dtype)
    Y = through(Natural(), X)
    below = torch.exp2(X.double().abs().log2().floor()).to(dtype)
    assert torch.equal(Y.sign(), X.sign())
    assert ((Y.abs() == below) | (Y.abs() == 2 * below)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_natural_keeps_powers_of_two_and_zeros(dtype):
    powers = torch.exp2(torch.arange(-100, 26, dtype=torch.float64)).to(dtype)
    X = torch.stack([powers, -powers, torch.zeros_like(powers)])
    for seed in range(10):
        assert torch.equal(through(Natural(), X, seed), X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_natural_is_unbiased_below_its_window_too(dtype):
    # The largest entry 1 is just below t = 2, so the window ends at w = 2^-125.
    w = 2.0**-125
    X = torch.full((256, 256), 0.3 * w, dtype=dtype)
    X[0, 0] = 1.0
    small = through(Natural(), X).flatten()[1:].double()
    assert set(small.unique().tolist()) == {0.0, w}
    # Hoeffding with results in [0, w], at a chance of 1e-9.
    assert abs(small.mean() - 0.3 * w) < w * math.sqrt(math.log(2e9) / (2 * small.numel()))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2.0**127), (torch.float64, 2.0**1023)])
def test_natural_refuses_to_round_to_infinity(dtype, limit):
    below = torch.nextafter(torch.tensor(limit, dtype=dtype), torch.tensor(0.0, dtype=dtype))
    X = torch.stack([below.expand(4, 4), torch.full((4, 4), limit, dtype=dtype)])
    Y = through(Natural(), X)
    assert (Y[0] >= limit / 2).all() and (Y[0] <= limit).all()
    assert Y[1].isnan().all()


def test_sign_sends_zeros_as_plus_the_mean():
    X = torch.tensor([[0.0, -0.0, -3.0], [5.0, 0.0, -4.0]])
    assert torch.equal(through(Sign(), X), torch.tensor([[2.0, 2.0, -2.0], [2.0, 2.0, -2.0]]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(0.0), r"TopK needs a share 0 < share <= 1 of the entries, got share=0\.0\."),
        (lambda: TopK(10), r"got share=10\."),
        (lambda: TopK(math.nan), r"got share=nan\."),
        (lambda: TopK(True), r"got share=True\."),
        (lambda: TopK("0.1"), r"got share='0\.1'\."),
        (lambda: RankK(0), r"RankK needs a whole rank >= 1, got rank=0\."),
        (lambda: RankK(2.0), r"got rank=2\.0\."),
        (lambda: RankK(True), r"got rank=True\."),
    ],
)
def test_impossible_choices_are_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()
