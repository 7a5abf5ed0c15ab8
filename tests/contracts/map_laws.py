"""The laws of a convex map K, one function each: `law(K)` returns if it holds and raises AssertionError if not.

`test_map_laws.py` applies them to every map found in the folder, `planted/` to broken ones they must catch. All in fp64
with an exact solver, so tolerances are fp64 rounding of sums of some fifty products, unless said otherwise.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from schatten import maps, solvers
from schatten.maps import Map
from schatten.maps.lifts import LIFTS, magnitudes, replaced
from tests.contracts.matrices import gaussian, orthonormal, with_spectrum

ROUNDING = 1e-10

# What is found by iteration (the conjugate of a sum) has this relative error, by its docstring.
NUMERIC = 1e-6

SHAPES = ((5, 8), (8, 5), (6, 6))


def classes() -> list[type]:
    """Every map of `schatten.maps`, found by its listing."""
    return [getattr(maps, name) for name in maps.__all__ if name != "Map"]


# Arguments beside the defaults with which a map obeys the laws too, and what combinations are made of.
ARGUMENTS: dict[str, list[tuple[Any, ...]]] = {
    "Power": [(0.25,), (0.5,), (1.0,)],
    "Schatten": [(1.0,), (1.5,), (2.0,), (4.0,), (float("inf"),)],
    "Huber": [(1.1,), (0.3,)],
    "Clip": [(1.1,), (0.3,)],
    "SoftThreshold": [(1.1,), (0.3,)],
    "HardGate": [(1.1,), (0.3,)],
    "PseudoHuber": [(1.0,), (0.2,)],
    "LogCosh": [(1.0,), (0.2,)],
    "LogSmoothed": [(1.0,), (0.2,)],
    "KyFan": [(1,), (3,), (50,)],
    "Ordered": [((1.0,),), ((2.0, 1.0, 0.5),)],
}


def exact(cls: type, *arguments: Any, **options: Any) -> Any:
    """The map with the oracle where it takes a solver."""
    fields = {field.name for field in dataclasses.fields(cls)}
    return cls(*arguments, **({"solver": solvers.svd()} if "solver" in fields else {}), **options)


def instances() -> dict[str, Any]:
    """Every map of the folder on every lift it has, by a readable name, and a few combinations."""
    found: dict[str, Any] = {}
    for cls in classes():
        if cls in (maps.Scaled, maps.Sum):
            continue
        has_lifts = any(field.name == "over" for field in dataclasses.fields(cls))
        for arguments in ARGUMENTS.get(cls.__name__, [()]):
            # One set of arguments on every lift, the others on those whose directions differ in kind.
            every = arguments == ARGUMENTS.get(cls.__name__, [()])[-1]
            for over in (LIFTS if every else ("spectrum", "rows")) if has_lifts else (None,):
                try:
                    K = exact(cls, *arguments, **({"over": over} if over else {}))
                except ValueError as error:
                    assert str(error).startswith("over must be one of"), error
                    continue
                found[f"{cls.__name__}{arguments or '()'} {over or ''}".strip()] = K
    nuclear, fro, l1 = exact(maps.Nuclear), maps.Frobenius(), maps.L1()
    return {
        **found,
        "2.5 Nuclear": 2.5 * nuclear,
        "0.5 Huber entries": 0.5 * exact(maps.Huber, 0.3, over="entries"),
        "F-Muon": 0.5 * nuclear + 0.5 * fro,
        "S-Muon": 0.5 * nuclear + 0.5 * l1,
        "F-Fanion-2": 0.5 * exact(maps.KyFan, 2) + 0.5 * fro,
        "Huber + L1 rows": exact(maps.Huber, 1.1) + 0.3 * maps.L1(over="rows"),
    }


def lift_of(K: Any) -> str:
    """What `K` is a function of; of everything for maps that do not say."""
    if isinstance(K, maps.Scaled):
        return lift_of(K.map)
    if isinstance(K, maps.Sum):
        lifts = {lift_of(part) for part in K.maps}
        return lifts.pop() if len(lifts) == 1 else next(over for over in ("rows", "entries", "spectrum") if over in lifts)
    return "matrix" if isinstance(K, maps.Frobenius) else getattr(K, "over", "spectrum")


def inner(A: Tensor, B: Tensor) -> Tensor:
    return (A * B).sum((-2, -1))


def generic() -> Iterator[Tensor]:
    """Full rank with a distinct spectrum, where a spectral K is differentiable."""
    for seed, (m, n) in enumerate(SHAPES):
        r = min(m, n)
        yield with_spectrum(m, n, torch.linspace(0.4, 2.0, r), seed=10 * seed)


def sparse() -> Iterator[Tensor]:
    """Rank one and two, and few entries: the corners that dense matrices never visit."""
    for seed, (m, n) in enumerate(SHAPES):
        yield with_spectrum(m, n, torch.tensor([1.3]), seed=10 * seed + 3)
        yield with_spectrum(m, n, torch.tensor([1.3, 0.6]), seed=10 * seed + 5)
    few = torch.zeros(5, 8, dtype=torch.float64)
    few[1, 2], few[3, 4] = 1.3, -0.7
    yield few


def pairs() -> Iterator[tuple[Tensor, Tensor]]:
    points = [*generic(), *sparse()]
    for A in points:
        for B in points:
            if A.shape == B.shape and A is not B:
                yield A, B
        yield A, 3 * A
        yield A, -A
        yield A, torch.zeros_like(A)


def gradient_is_the_derivative_of_the_value(K: Map) -> None:
    h = 1e-5  # central differences: h^2 of truncation, 1e-16 / h of rounding, both near 1e-10
    for S in generic():
        for seed in range(4):
            D = gaussian(*S.shape, seed=100 + seed)
            slope = (K.value(S + h * D) - K.value(S - h * D)) / (2 * h)
            assert abs(slope - inner(K.grad(S), D)) < 1e-7, f"{tuple(S.shape)}: slope {slope}, gradient {inner(K.grad(S), D)}"


def gradient_is_a_subgradient(K: Map) -> None:
    for A, B in pairs():
        assert K.value(B) >= K.value(A) + inner(K.grad(A), B - A) - ROUNDING


def gradient_is_monotone(K: Map) -> None:
    for A, B in pairs():
        assert inner(K.grad(A) - K.grad(B), A - B) >= -ROUNDING


def fenchel_young_holds_with_equality_at_the_gradient(K: Map) -> None:
    for S in (*generic(), *sparse()):
        D = K.grad(S)
        gap = K.value(S) + K.conjugate(D) - inner(S, D)
        assert abs(gap) < (NUMERIC if isinstance(K, maps.Sum) else ROUNDING), (
            f"{tuple(S.shape)}: K(S) + K*(D) - <S, D> = {float(gap)}"
        )


def fenchel_young_holds_as_an_inequality_elsewhere(K: Map) -> None:
    for S, X in pairs():
        assert K.value(S) + K.conjugate(X) >= inner(S, X) - ROUNDING


def probes(X: Tensor, over: str) -> Iterator[Tensor]:
    """Directions in which <S, X> - K(S) may grow: the supremum shares directions with X, and every ordered vector of
    magnitudes is a positive combination of the k-leading indicators."""
    s = magnitudes(X, over)
    ranking = s.argsort(descending=True).argsort()
    for k in range(1, min(s.numel(), 9)):
        yield replaced(X, over, lambda _, k=k: (ranking < k).double())
    yield replaced(X, over, lambda s: (s > 0).double())
    for power in (1 / 3, 0.5, 1, 2):
        yield replaced(X, over, lambda s, power=power: s**power)
    for seed in range(3):
        ordered = gaussian(s.numel(), seed=seed).abs().sort(descending=True).values
        yield replaced(X, over, lambda _, ordered=ordered: ordered[ranking])
    yield gaussian(*X.shape, seed=7)


LENGTHS = (0.0, 0.01, 0.1, 1.0, 10.0, 1e5)


def conjugate_is_the_supremum(K: Map) -> None:
    """K*(X) = sup <S, X> - K(S), from below by probing; where it claims infinity the probes must grow without bound."""
    for X in (*generic(), *sparse()):
        X = X / torch.linalg.matrix_norm(X, ord=2)
        directions = torch.stack([S for over in LIFTS for S in probes(X, over)])
        values = [K.value(t * directions) for t in LENGTHS]
        for radius in (0.1, 0.5, 0.9, 0.99, 1.01, 1.1, 2.0, 10.0):
            Y = radius * X
            claimed = float(K.conjugate(Y))
            reached = [float((t * inner(directions, Y) - value).max()) for t, value in zip(LENGTHS, values, strict=True)]
            what = f"rank {int(torch.linalg.matrix_rank(X))}, spectral norm {radius}: K* = {claimed}, but <S, X> - K(S) reaches"
            if claimed == float("inf"):
                # 1 % outside, S of length 1e5: at least 1e3 for a norm, less where only a sum of magnitudes is out.
                assert reached[-1] > min(100, 1e4 * float(K.violation(Y))), f"{what} only {reached[-1]}"
            else:
                assert max(reached) <= claimed + 1e-8, f"{what} {max(reached)}"  # rounding of 1e5-sized sums: 1e-10


def violation_is_zero_exactly_where_the_conjugate_is_finite(K: Map) -> None:
    for S in (*generic(), *sparse()):
        assert K.violation(K.grad(S)) == 0, "a gradient lies in the domain of K*"
        previous = 0.0
        for radius in (0.0, 0.3, 0.9, 1.01, 1.5, 3.0, 30.0):
            X = radius * S / torch.linalg.matrix_norm(S, ord=2)
            violation = float(K.violation(X))
            assert violation >= previous, "moving outwards never reduces the violation"
            assert (violation > 0) == (float(K.conjugate(X)) == float("inf")), f"radius {radius}: violation {violation}"
            previous = violation


def value_is_convex(K: Map) -> None:
    for A, B in pairs():
        for t in (0.25, 0.5, 0.9):
            assert K.value(t * A + (1 - t) * B) <= t * K.value(A) + (1 - t) * K.value(B) + ROUNDING


def rotations_change_nothing(K: Map) -> None:
    for seed, S in enumerate((*generic(), *sparse())):
        Q, R = orthonormal(S.shape[0], S.shape[0], seed + 40), orthonormal(S.shape[1], S.shape[1], seed + 60)
        T = Q @ S @ R
        assert abs(K.value(T) - K.value(S)) < ROUNDING
        assert (K.grad(T) - Q @ K.grad(S) @ R).abs().max() < ROUNDING
        for X, Y in ((S, T), (0.2 * S, 0.2 * T)):
            assert torch.allclose(K.conjugate(X), K.conjugate(Y), rtol=NUMERIC, atol=ROUNDING)
            assert torch.allclose(K.violation(X), K.violation(Y), rtol=NUMERIC, atol=ROUNDING)


def transposing_changes_nothing(K: Map) -> None:
    for S in (*generic(), *sparse()):
        assert (K.grad(S.mT) - K.grad(S).mT).abs().max() < ROUNDING
        for verb in (K.value, K.conjugate, K.violation):
            assert torch.allclose(verb(S.mT), verb(S), rtol=0, atol=ROUNDING)


def a_batch_is_its_matrices(K: Map) -> None:
    for m, n in SHAPES:
        full = [with_spectrum(m, n, torch.linspace(0.3, 1 + i, min(m, n)), seed=i) for i in range(5)]
        S = torch.stack([*full, torch.zeros(m, n)]).view(2, 3, m, n)
        for verb in (K.value, K.grad, K.conjugate, K.violation):
            singles = torch.stack([torch.stack([verb(s) for s in row]) for row in S])
            assert verb(S).shape == (S.shape if verb == K.grad else (2, 3))
            assert torch.allclose(verb(S), singles, rtol=0, atol=ROUNDING)


def arguments_are_only_read(K: Map) -> None:
    for S in generic():
        for verb in (K.value, K.grad, K.conjugate, K.violation):
            before = S.clone()
            verb(S)
            assert torch.equal(S, before)


LAWS: tuple[Callable[[Map], None], ...] = (
    gradient_is_the_derivative_of_the_value,
    gradient_is_a_subgradient,
    gradient_is_monotone,
    fenchel_young_holds_with_equality_at_the_gradient,
    fenchel_young_holds_as_an_inequality_elsewhere,
    conjugate_is_the_supremum,
    violation_is_zero_exactly_where_the_conjugate_is_finite,
    value_is_convex,
    a_batch_is_its_matrices,
    arguments_are_only_read,
)

# Of maps that are functions of the singular values, as opposed to entries, rows or columns.
SPECTRAL_LAWS = (rotations_change_nothing,)

# Of all maps but those of rows or of columns.
SYMMETRIC_LAWS = (transposing_changes_nothing,)
