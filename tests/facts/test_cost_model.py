"""Facts of the cost model: what it counts is what a step multiplies, and its times follow from what it counts."""

import dataclasses
import inspect
from dataclasses import dataclass

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import schatten
from schatten import presets
from schatten.directions import NoK
from schatten.placements.cost import block_flops, replicate, work
from schatten.placements.machine import MACHINES, Machine, Operation
from schatten.solvers.core import working_dtype
from schatten.solvers.iteration import gram_cost, product_cost, restarts_for

PRESETS = sorted(
    name
    for name, found in vars(presets).items()
    if inspect.isclass(found) and issubclass(found, schatten.SpectralOptimizer) and found is not schatten.SpectralOptimizer
)

# Below the 512 rows from which a CPU computes half of a symmetric product only.
SHAPES = [(48, 32), (32, 96), (40, 40)]


def built(name: str, p: torch.nn.Parameter) -> schatten.SpectralOptimizer:
    # The trust region solves another problem with decay than without; the model counts a step that decays.
    return getattr(presets, name)([p], **({"weight_decay": 0.1} if name == "TrustRegion" else {}))


def rule_of(name: str, shape: tuple[int, int]) -> schatten.Rule:
    opt = built(name, torch.nn.Parameter(torch.zeros(shape)))
    return opt.rule(opt.param_groups[0])


def seen_in_a_step(name: str, shape: tuple[int, int]) -> float:
    """What torch counts in a third step, when everything that is derived once has been, without evaluating gradients."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(shape))
    opt = built(name, p)

    def closure() -> torch.Tensor:
        p.grad = torch.randn(shape)
        return torch.zeros(())

    for _ in range(2):
        opt.step(closure)
    with FlopCounterMode(display=False) as counter:
        opt.step(closure)
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PRESETS)
def test_the_counted_products_are_those_of_a_step(name, shape):
    dtype = str(working_dtype(torch.zeros(1), "auto")).removeprefix("torch.")
    counted = sum(op.flops for op in work(rule_of(name, shape), *shape, dtype).operations if not op.factorisation)
    assert counted == seen_in_a_step(name, shape)


@pytest.mark.parametrize(("m", "n"), [(64, 64), (64, 256), (256, 64)])
def test_muon_costs_the_products_of_the_cheaper_form(m, n):
    solver = schatten.solvers.polynomial()
    short, long = min(m, n), max(m, n)
    steps, restarts = len(solver.quintics), len(restarts_for(solver.quintics, torch.float32))
    cheaper = min(product_cost(short, long, steps), gram_cost(short, long, steps, restarts, summed=False))
    assert block_flops(schatten.Rule(), m, n) == 2 * cheaper


def test_half_precision_counts_the_product_form_it_takes():
    assert block_flops(schatten.Rule(), 64, 256, "bfloat16") == 2 * product_cost(64, 256, 5)
    assert block_flops(schatten.Rule(), 64, 256, "float32") < 2 * product_cost(64, 256, 5)


def test_factorisations_are_counted_by_their_textbook_formulas():
    n = 30
    exact = work(schatten.Rule(map=schatten.maps.Nuclear(schatten.solvers.svd())), n, 2 * n)
    assert [op.flops for op in exact.operations if op.factorisation] == [6 * 2 * n * n**2 + 20 * n**3]
    soap = work(rule_of("SOAPMuon", (n, 2 * n)), n, 2 * n)
    assert [op.flops for op in soap.signal if op.factorisation] == pytest.approx([8 / 3 * n**3, 8 / 3 * (2 * n) ** 3])


def test_a_rule_on_entries_multiplies_nothing_and_still_reads_and_writes():
    sign = work(rule_of("Lion", (30, 20)), 30, 20)
    assert sign.flops == 0
    assert sign.bytes >= 4 * 30 * 20 * 4  # gradient, momentum and weight in, weight out


def test_cost_grows_with_the_cube_of_a_square_matrix_and_its_entries_with_the_square():
    small, large = work(schatten.Rule(), 64, 64), work(schatten.Rule(), 128, 128)
    assert large.flops == 8 * small.flops
    assert sum(op.bytes for op in large.signal) == pytest.approx(4 * sum(op.bytes for op in small.signal), rel=1e-3)


@dataclass(frozen=True)
class Looks(NoK):
    """A direction that asks for values, as a user's may."""

    def __call__(self, S, state, group):
        return (S if float(S.abs().max()) > 0 else S + 1), {}


def test_a_rule_that_looks_at_values_counts_as_muon():
    assert work(schatten.Rule(map=Looks()), 30, 20) == work(schatten.Rule(), 30, 20)


def test_counting_leaves_no_trace_in_the_random_state():
    state = torch.get_rng_state()
    work.cache_clear()
    work(rule_of("Dion", (30, 20)), 30, 20)
    assert torch.equal(state, torch.get_rng_state())


def test_an_operation_takes_its_arithmetic_or_its_memory_whichever_is_longer():
    machine = Machine(flops=100, bandwidth=1, latency=0, memory_bandwidth=10, factorisation_flops=5, launch=0.5)
    assert machine.seconds([Operation(300, 10)]) == 0.5 + 3
    assert machine.seconds([Operation(300, 100)]) == 0.5 + 10
    assert machine.seconds([Operation(300, 10, factorisation=True)]) == 0.5 + 60
    assert machine.seconds([Operation(300, 10)], matrices=4) == 0.5 + 12


def test_replication_wins_for_small_matrices_and_sharing_for_large_ones():
    machine = MACHINES["h100"]

    def wins(n: int) -> bool:
        return replicate(work(schatten.Rule(), n, n).operations, 8, 4 * n * n, 8, machine)

    found = [wins(n) for n in (64, 128, 256, 512, 1024, 2048, 4096)]
    assert found[0] and not found[-1]
    assert found == sorted(found, reverse=True)  # one cross-over


def test_one_rank_has_nobody_to_share_with():
    assert replicate(work(schatten.Rule(), 512, 512).operations, 8, 4 * 512**2, ranks=1, machine=MACHINES["cpu"])


def test_one_matrix_is_not_divided_among_replicas():
    operations, fast = (
        [Operation(1e6, 0)],
        Machine(flops=1e6, bandwidth=1e12, latency=1e-6, memory_bandwidth=1e12, factorisation_flops=1),
    )
    assert replicate(operations, 1, 1.0, ranks=4, machine=fast)
    assert not replicate(operations, 4, 1.0, ranks=4, machine=fast)


def test_more_collectives_make_sharing_dearer():
    operations, machine = (
        [Operation(1e6, 0)],
        Machine(flops=1e6, bandwidth=1e12, latency=1.0, memory_bandwidth=1e12, factorisation_flops=1),
    )
    assert not replicate(operations, 8, 1.0, ranks=4, machine=machine)
    assert replicate(operations, 8, 1.0, ranks=4, machine=machine, bucket=1)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Machine)])
def test_a_machine_refuses_a_number_that_is_no_rate(field):
    for wrong in (-1.0, float("inf"), float("nan"), True, "fast"):
        with pytest.raises(ValueError, match=field):
            dataclasses.replace(MACHINES["cpu"], **{field: wrong})
