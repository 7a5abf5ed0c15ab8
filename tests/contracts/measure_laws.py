"""Laws of measures of a matrix, (*b, m, n) -> (*b), as the contracts assert and the planted mistakes must break."""

import math

import torch


def matrix(*shape, seed=0):
    """Gaussian with a spectrum that falls, in fp64, so that no two norms are near each other."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(*shape, generator=generator, dtype=torch.float64)
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    return U * (s * torch.logspace(0, -2, s.shape[-1], dtype=torch.float64)).unsqueeze(-2) @ Vh


def rotation(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q


# fp64 SVDs of these small matrices agree to some 1e-14; quotients of norms lose little of it.
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def same(measure, *pairs):
    for first, second in pairs:
        torch.testing.assert_close(measure(first), measure(second), **CLOSE)


def scale_is_not_seen(measure):
    X = matrix(3, 6, 4)
    for c in (1e-30, 1e-3, -2.0, 1e30):
        same(measure, (X, c * X))


def scale_carries_over(measure):
    X = matrix(3, 6, 4)
    for c in (1e-30, 1e-3, 1e30):
        torch.testing.assert_close(measure(c * X) / c, measure(X), **CLOSE)


def rotations_and_transposition_are_not_seen(measure):
    for shape in ((5, 5), (4, 7), (7, 2), (1, 6), (6, 1)):
        X = matrix(2, *shape, seed=sum(shape))
        same(measure, (X, rotation(shape[0], 1) @ X @ rotation(shape[1], 2)), (X, X.mT))


def lies_between_one_and_the_rank(measure):
    for shape, rank in (((6, 5), 5), ((6, 5), 2), ((4, 9), 4), ((1, 7), 1)):
        X = matrix(shape[0], rank, seed=rank) @ matrix(rank, shape[1], seed=rank + 1)
        value = float(measure(X))
        assert 1 - 1e-9 <= value <= rank + 1e-6, (shape, rank, value)
    equal = 3 * rotation(6, 3)[:, :4]
    torch.testing.assert_close(measure(equal), torch.tensor(4.0, dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(measure(matrix(6, 1) @ matrix(1, 5)), torch.tensor(1.0, dtype=torch.float64), **CLOSE)


def zero_has(measure, value):
    for X in (torch.zeros(4, 3), torch.zeros(2, 3, 4)):
        found = measure(X)
        torch.testing.assert_close(found, torch.full(X.shape[:-2], value, dtype=found.dtype), equal_nan=True)


def non_finite_stays_in_its_matrix(measure):
    X = matrix(4, 3, 5)
    X[1, 0, 0], X[2, 1, 1] = math.inf, math.nan
    found = measure(X)
    assert found.isnan().tolist() == [False, True, True, False]
    torch.testing.assert_close(found[[0, 3]], measure(X[[0, 3]]), **CLOSE)


def any_batch_will_do(measure):
    X = matrix(2, 3, 5, 4)
    found = measure(X)
    assert found.shape == (2, 3)
    torch.testing.assert_close(found[1, 2], measure(X[1, 2]), **CLOSE)
    assert measure(X[:, :0]).shape == (2, 0)
    assert measure(X[0, 0]).shape == ()


def half_precision_is_taken_for_its_value(measure):
    X = matrix(5, 4).bfloat16()
    found = measure(X)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, measure(X.double()), rtol=1e-5, atol=1e-7)
