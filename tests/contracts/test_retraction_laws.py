"""What every retraction promises: pure, blind to its batch, to cuts by rows if it says so, and still where nothing moves it."""

import inspect

import pytest
import torch

from schatten import retractions
from schatten.retractions import CautiousDecay, DecoupledDecay, ServerCompression, TiedDecay, UpdateFloor

# A default of every class of the package, so that a new one is tested without being named here, and other forms.
CLASSES = [kind for name in retractions.__all__ if inspect.isclass(kind := getattr(retractions, name)) and name != "Retraction"]
RETRACTIONS = [kind() for kind in CLASSES] + [
    DecoupledDecay("implicit"),
    TiedDecay(CautiousDecay()),
    UpdateFloor(ratio=30.0),  # longer than any update here, where the default is shorter
    UpdateFloor(ratio=30.0, over="rows"),
]

GROUP = {"step": 1, "lr": 0.1, "initial_lr": 0.4, "weight_decay": 0.5}

# Parameters, blocks, fan_out, fan_in.
SHAPE = (3, 2, 6, 4)

# One number, or one for each matrix as a measured scale gives.
LENGTHS = [0.3, torch.rand(*SHAPE[:2], 1, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.2]


@pytest.fixture(params=RETRACTIONS, ids=repr)
def retraction(request):
    return request.param


@pytest.fixture(params=LENGTHS, ids=["number", "tensor"])
def length(request):
    return request.param


def weights_and_direction():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))


def fresh_state(retraction, W):
    """What the engine would pass: the state of each parameter, stacked."""
    states = [retraction.init(w) for w in W]
    return {key: torch.stack([state[key] for state in states]) for key in states[0]}


def of(length, *index):
    return length[index] if isinstance(length, torch.Tensor) else length


def test_it_writes_to_nothing_it_is_given_and_says_the_same_twice(retraction, length):
    W, D = weights_and_direction()
    state = fresh_state(retraction, W)
    given = {"W": W, "D": D, **({"length": length} if isinstance(length, torch.Tensor) else {}), **state}
    kept = {key: t.clone() for key, t in given.items()}
    group = dict(GROUP)
    first, first_state = retraction(W, D, length, state, group)
    assert all(torch.equal(given[key], t) for key, t in kept.items()) and group == GROUP
    assert first.shape == W.shape and first.dtype == W.dtype and not torch.equal(first, W)
    # Whoever keeps the result may write to it.
    first.zero_()
    assert all(torch.equal(given[key], t) for key, t in kept.items())
    second, second_state = retraction(W, D, length, state, group)
    assert second.count_nonzero() > 0
    assert first_state.keys() == second_state.keys() == state.keys()
    assert all(torch.equal(first_state[key], second_state[key]) for key in state)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_matrix_of_a_batch_ends_where_it_ends_alone(retraction, length, steps):
    W, D = weights_and_direction()
    together, state = W, fresh_state(retraction, W)
    for _ in range(steps):
        together, state = retraction(together, D, length, state, GROUP)
    for i in range(SHAPE[0]):
        for j in range(SHAPE[1]):
            alone = W[i : i + 1, j : j + 1]
            own = fresh_state(retraction, alone)
            for _ in range(steps):
                alone, own = retraction(
                    alone, D[i : i + 1, j : j + 1], of(length, slice(i, i + 1), slice(j, j + 1)), own, GROUP
                )
            # Sums of 24 squares, or singular values, in another order: some ulps of fp64.
            torch.testing.assert_close(together[i, j], alone[0, 0], rtol=1e-13, atol=1e-13)
            for key, value in own.items():
                torch.testing.assert_close(state[key][i, j], value[0, 0], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("retraction", [r for r in RETRACTIONS if r.elementwise], ids=repr)
def test_an_elementwise_one_may_be_given_any_rows_alone(retraction, length):
    W, D = weights_and_direction()
    # The engine cuts states too, which it can only if they have the matrix's shape.
    state = fresh_state(retraction, W)
    assert all(value.shape == W.shape for value in state.values())
    whole, _ = retraction(W, D, length, state, GROUP)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        cut = {key: value[..., rows, :] for key, value in state.items()}
        part, _ = retraction(W[..., rows, :], D[..., rows, :], length, cut, GROUP)
        assert torch.equal(part, whole[..., rows, :])


def test_a_zero_direction_without_decay_leaves_every_bit_of_the_weights_then_and_later(retraction, length):
    W, D = weights_and_direction()
    W[0, 0] = 0  # a matrix that has no direction of its own
    group = {**GROUP, "weight_decay": 0.0}
    state = fresh_state(retraction, W)
    still, state = retraction(W, torch.zeros_like(D), length, state, group)
    assert torch.equal(still, W)
    moved, state = retraction(W, D, length, state, group)
    # What the weight was stored in rounds it: its norm is not what the retraction left.
    moved = moved.to(torch.bfloat16).double()
    still, state = retraction(moved, torch.zeros_like(D), length, state, group)
    # A compressing server sends on what rounding, or earlier messages, left of its own weight.
    ulps = 4 if isinstance(retraction, ServerCompression) else 0
    assert ((still - moved).abs() <= ulps * torch.finfo(W.dtype).eps * moved.abs().amax()).all()


def test_one_zero_direction_in_a_batch_changes_no_neighbours_step(retraction, length):
    W, D = weights_and_direction()
    holed = D.clone()
    holed[1, 0] = 0
    expected, _ = retraction(W, D, length, fresh_state(retraction, W), GROUP)
    result, _ = retraction(W, holed, length, fresh_state(retraction, W), GROUP)
    untouched = torch.ones(SHAPE[:2], dtype=torch.bool)
    untouched[1, 0] = False
    assert torch.equal(result[untouched], expected[untouched]) and result.isfinite().all()


@pytest.mark.parametrize("direction", [1e-30, 1.0, 1e12])
@pytest.mark.parametrize("weight", [1e-30, 1.0, 1e12])
def test_weights_and_directions_of_any_size_stay_finite(retraction, weight, direction):
    W, D = (X.float() * size for X, size in zip(weights_and_direction(), (weight, direction), strict=True))
    state = fresh_state(retraction, W)
    for _ in range(2):
        W, state = retraction(W, D, 0.3, state, GROUP)
    assert W.isfinite().all()


@pytest.mark.parametrize(
    "like", [torch.tensor(1.0), torch.ones(1), torch.ones(1, dtype=torch.float64)], ids=["0-d", "1", "1 fp64"]
)
def test_an_lr_in_a_tensor_acts_as_the_number_and_keeps_the_weights_dtype(retraction, like):
    W, D = (X.float() for X in weights_and_direction())
    group = {**GROUP, "lr": 0.1 * like, "initial_lr": 0.4 * like}
    expected, _ = retraction(W, D, 0.3, fresh_state(retraction, W), GROUP)
    result, _ = retraction(W, D, torch.tensor(0.3), fresh_state(retraction, W), group)
    # One more rounding to fp32 of lr and its products.
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zero", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_an_lr_that_is_zero_throughout_leaves_the_weights(retraction, zero):
    W, D = weights_and_direction()
    group = {**GROUP, "lr": zero, "initial_lr": zero}
    result, _ = retraction(W, D, 0.0, fresh_state(retraction, W), group)
    # FixedNorm divides by a norm and multiplies with it, a composite step goes through singular values: fp64 rounding.
    torch.testing.assert_close(result, W, rtol=1e-13, atol=1e-13)
