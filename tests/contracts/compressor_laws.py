"""The laws of a compressor C, one function each: `law(C)` returns if it holds and raises AssertionError if not.

`test_compressors.py` applies them to every compressor of the module, `planted/` to broken ones they must catch. Errors are
measured in fp64.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from schatten import compressors
from schatten.compressors import Compressor, Message
from tests.contracts.matrices import gaussian, with_spectrum

DTYPES = (torch.float32, torch.float64)

# What both backends send; `test_compressors.py` asks gloo, for NCCL it is the list in its documentation. No int16.
CARRIED = {torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64}

# The share that is not a whole number of entries, ranks below and above the smaller side.
ARGUMENTS: dict[str, list[tuple[Any, ...]]] = {"TopK": [(0.1,), (1.0,)], "RankK": [(1,), (4,), (100,)]}

# Their mean over seeds is X itself.
UNBIASED = ("Identity", "Natural")


def classes() -> list[type]:
    """Every compressor of the module, found by looking."""
    return [thing for thing in vars(compressors).values() if isinstance(thing, type) and dataclasses.is_dataclass(thing)]


def instances() -> dict[str, Any]:
    """Every compressor with every set of arguments, by its repr."""
    found = [cls(*arguments) for cls in classes() for arguments in ARGUMENTS.get(cls.__name__, [()])]
    return {repr(C): C for C in found}


def through(C: Compressor, X: Tensor, seed: int = 0) -> Tensor:
    return C.decode(C.encode(X, seed), X.shape, X.dtype)


def energy(X: Tensor) -> Tensor:
    return X.double().square().sum()


def single(m: int, n: int, value: float = 1.0) -> Tensor:
    """One entry, the last, where positions are largest."""
    X = torch.zeros(m, n, dtype=torch.float64)
    X[-1, -1] = value
    return X


@lru_cache(maxsize=1)
def matrices() -> dict[str, Tensor]:
    """Ordinary ones, and every compressor's worst: flat for TopK, orthogonal for RankK, one entry for Sign, 4/3 for Natural."""
    # More than 2^15 entries, the positions an int16 holds.
    found = {"large": gaussian(200, 170, seed=2), "one entry, large": single(200, 170)}
    for m, n in ((24, 40), (40, 24), (12, 12), (17, 5), (1, 9)):
        found |= {
            f"Gaussian {m} x {n}": gaussian(m, n),
            f"rank two {m} x {n}": with_spectrum(m, n, torch.tensor([1.3, 0.6])[: min(m, n)]),
            f"orthogonal {m} x {n}": with_spectrum(m, n, torch.ones(min(m, n)), seed=3),
            f"one entry {m} x {n}": single(m, n, -1.3),
            f"constant {m} x {n}": torch.full((m, n), -4 / 3, dtype=torch.float64),
            f"rows from 1 to 1e-12 {m} x {n}": gaussian(m, n, seed=4) * torch.logspace(0, -12, m, dtype=torch.float64)[:, None],
            f"mostly zeros {m} x {n}": gaussian(m, n, seed=5) * (gaussian(m, n, seed=6) > 1.5),
        }
    for scale in (1e-20, 1e20):
        found[f"Gaussian times {scale}"] = scale * gaussian(24, 40, seed=7)
    # Its entries, and the singular direction's in a factor, are within fp32; its norm and sum are not.
    found["near the end of fp32"] = torch.full((64, 64), 1e37, dtype=torch.float64)
    return found


def close(found: float, bound: float, what: str) -> None:
    assert found <= bound, f"{what}: {found} > {bound}"


def contraction_bounds_the_error(C: Compressor) -> None:
    for name, exact in matrices().items():
        for dtype in DTYPES:
            X = exact.to(dtype)
            if not X.any():
                continue
            errors = torch.stack([energy(through(C, X, seed).double() - X.double()) / energy(X) for seed in range(32)])
            # The law is about the mean over seeds: five standard errors, none for what does not depend on the seed; and
            # the rounding of products of up to 40 terms.
            allowed = 5 * errors.std() / math.sqrt(len(errors)) + 100 * torch.finfo(dtype).eps
            close(float(errors.mean()), float(1 - C.contraction(*X.shape) + allowed), f"{name} {dtype}")


def contraction_is_between_zero_and_one(C: Compressor) -> None:
    for shape in ((1, 1), (1, 9), (9, 1), (300, 400)):
        assert 0 < C.contraction(*shape) <= 1, f"alpha = {C.contraction(*shape)} of {shape}"


def results_have_the_shape_and_the_dtype_asked_for(C: Compressor) -> None:
    for shape in ((5, 7), (7, 5), (1, 1), (3, 6, 4), (2, 3, 4, 5)):
        for dtype in DTYPES:
            X = gaussian(*shape).to(dtype)
            for asked in DTYPES:
                Y = C.decode(C.encode(X, 0), X.shape, asked)
                assert (Y.shape, Y.dtype) == (X.shape, asked), f"{X.shape} {dtype} came back as {Y.shape} {Y.dtype}"
                # Of entries of size 1, in the coarser dtype.
                assert (Y - through(C, X)).abs().max() < 1e-5


def zero_gives_zero(C: Compressor) -> None:
    for dtype in DTYPES:
        X = torch.stack([torch.zeros(6, 5), gaussian(6, 5), torch.zeros(6, 5)]).to(dtype)
        Y = through(C, X)
        assert not Y[0].any() and Y[1].any() and not Y[2].any()


def the_seed_alone_decides(C: Compressor) -> None:
    X = gaussian(12, 20)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = C.encode(X, 5)
    assert torch.equal(torch.get_rng_state(), before), "the user's random state was moved"
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, C.encode(X, 5), strict=True))


def a_batch_is_its_matrices(C: Compressor) -> None:
    for m, n in ((6, 9), (9, 6)):
        scales = torch.logspace(-3, 3, 6, dtype=torch.float64).view(2, 3, 1, 1)
        X = gaussian(2, 3, m, n) * scales
        X[1, 1] = 0
        singles = torch.stack([torch.stack([through(C, x, 3) for x in row]) for row in X])
        # Batched products may add in another order; entries are of the size of their matrix's scale.
        assert ((through(C, X, 3) - singles) / scales).abs().max() < 1e-10


def sizes(message: Message) -> list[tuple[torch.Size, torch.dtype]]:
    return [(t.shape, t.dtype) for t in message]


def message_shapes_depend_on_the_shape_alone(C: Compressor) -> None:
    for dtype in DTYPES:
        X = torch.stack([gaussian(24, 40), single(24, 40), torch.zeros(24, 40), torch.ones(24, 40), 1e20 * gaussian(24, 40)])
        found = [sizes(C.encode(x.to(dtype), seed)) for seed in (0, 1) for x in X]
        assert all(other == found[0] for other in found), found


def nothing_waits_for_a_value(C: Compressor) -> None:
    """On tensors without values: reading one raises, as it would make a GPU's queue run dry."""
    try:
        with FakeTensorMode():
            X = torch.empty(3, 24, 40)
            message = C.encode(X, 0)
            Y = C.decode(message, X.shape, X.dtype)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise AssertionError(f"a value was read: {error}") from error
    assert sizes(message) == sizes(C.encode(gaussian(3, 24, 40).float(), 0)) and Y.shape == X.shape


def layouts() -> Iterator[Tensor]:
    """The same kind of matrices as they lie in memory: in order, transposed, with batch dimensions exchanged, every other."""
    for dtype in DTYPES:
        yield gaussian(2, 3, 6, 5).to(dtype)
        yield gaussian(2, 3, 5, 6).to(dtype).mT
        yield gaussian(3, 2, 6, 5).to(dtype).transpose(0, 1)
        yield gaussian(6, 10).to(dtype)[:, ::2]


def messages_can_be_sent(C: Compressor) -> None:
    for X in layouts():
        for t in C.encode(X, 0):
            assert t.is_contiguous(), f"{tuple(t.shape)} with strides {t.stride()}"
            assert t.dtype in CARRIED, f"{t.dtype} is not carried by every backend"


def the_layout_in_memory_does_not_matter(C: Compressor) -> None:
    for X in layouts():
        # Products may add in another order.
        assert (through(C, X) - through(C, X.contiguous())).abs().max() < 100 * torch.finfo(X.dtype).eps


def a_message_is_a_snapshot(C: Compressor) -> None:
    X = gaussian(3, 6, 5)
    kept = X.clone()
    message = C.encode(X, 0)
    assert torch.equal(X, kept), "the input was written to"
    copies = tuple(t.clone() for t in message)
    expected = C.decode(copies, X.shape, X.dtype).clone()
    X.zero_()
    assert torch.equal(C.decode(message, X.shape, X.dtype), expected), "the message changed with the input"
    assert all(torch.equal(a, b) for a, b in zip(message, copies, strict=True)), "the message was written to"


def a_non_finite_matrix_shows_and_does_not_spread(C: Compressor) -> None:
    for dtype in DTYPES:
        for value in (math.inf, -math.inf, math.nan):
            X = gaussian(3, 6, 5).to(dtype)
            expected = through(C, X)
            X[1, 2, 3] = value
            Y = through(C, X)
            assert not Y[1].isfinite().all(), f"{value} came back as a finite matrix"
            assert (Y[[0, 2]] - expected[[0, 2]]).abs().max() < 100 * torch.finfo(dtype).eps


LAWS: tuple[Callable[[Compressor], None], ...] = (
    contraction_bounds_the_error,
    contraction_is_between_zero_and_one,
    results_have_the_shape_and_the_dtype_asked_for,
    zero_gives_zero,
    the_seed_alone_decides,
    a_batch_is_its_matrices,
    message_shapes_depend_on_the_shape_alone,
    nothing_waits_for_a_value,
    messages_can_be_sent,
    the_layout_in_memory_does_not_matter,
    a_message_is_a_snapshot,
    a_non_finite_matrix_shows_and_does_not_spread,
)

DRAWS = 1 << 16


def the_mean_is_the_input(C: Compressor) -> None:
    """Of the unbiased ones, DRAWS equal entries with noise of their own."""
    for dtype in DTYPES:
        for value in (1.001, -4 / 3, 1.5, -1.999, 0.7, 1.9e-30, 3e30):
            X = torch.full((256, DRAWS // 256), value, dtype=dtype)
            mean, x = float(through(C, X).double().mean()), float(X[0, 0])
            # Hoeffding: the two results are at most |x| apart, so the chance of this deviation is 1e-9.
            close(abs(mean - x), abs(x) * math.sqrt(math.log(2e9) / (2 * DRAWS)), f"{dtype} {x}")
