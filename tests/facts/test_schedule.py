"""Every rank works out the same schedule: what one sends is what another expects, and a block is computed once."""

import math

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import schatten
from schatten.layout import Layout, pieces
from schatten.placements.regions import Arrangement
from schatten.placements.schedule import TRAVEL_SHARE, Traveller, schedule, whole_step
from schatten.placements.ways import ways
from schatten.state import fresh_state, suffixes

PARAMETERS = [
    ((12, 6), "matrix"),
    ((1, 16), "matrix"),
    ((3, 32), "matrix"),
    ((5, 8, 8), "experts"),
    ((24, 8), Layout("matrix", split=3)),
    ((20, 8), Layout("matrix", split=(8, 4, 8), heads=(2, 1, 2))),
    ((6, 4, 3), "conv"),
]

ARRANGEMENTS = {
    "fsdp 3": (Arrangement((3,), (Shard(0),)),) * 2,
    "tensor parallel": (Arrangement((2,), (Shard(1),)),) * 2,
    "hsdp": (Arrangement((2, 2), (Replicate(), Shard(0))),) * 2,
    "fsdp of tensor parallel": (Arrangement((2, 2), (_StridedShard(0, split_factor=2), Shard(0))),) * 2,
    "owners": (Arrangement((3,), (Replicate(),)),) * 2,
    "zero1": (Arrangement((3,), (Replicate(),)), Arrangement((3,), (Shard(0),))),
}

PRESETS = [schatten.Muon, schatten.NorMuon, schatten.AdaMuon, schatten.SOAPMuon, schatten.Hyperball]


def travellers(preset, weights, averages):
    found = []
    for number, (shape, layout) in enumerate(PARAMETERS):
        p = torch.nn.Parameter(torch.zeros(shape))
        opt = preset([{"params": [p], "layout": layout}])
        group = opt.param_groups[0]
        rule = opt.rule(group)
        own = pieces(group["layout"], p.shape)
        state = {key: tuple(t.shape) for key, t in fresh_state(p, group, rule).items()}
        costs = [float(math.prod(piece.blocks[1:])) for piece in own]
        found.append(Traveller(0, number, own, suffixes(own), rule, weights, averages, state, p.dtype, costs))
    return found


@pytest.fixture(params=ARRANGEMENTS.values(), ids=ARRANGEMENTS)
def arranged(request):
    return request.param


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
@pytest.mark.parametrize("max_bytes", [1, 1 << 12, 1 << 30])
def test_what_a_rank_sends_is_what_another_expects(preset, arranged, max_bytes):
    weights, averages = arranged
    ranks = weights.size
    by_rank = [schedule(travellers(preset, weights, averages), rank, ranks, max_bytes) for rank in range(ranks)]
    assert len({len(buckets) for buckets in by_rank}) == 1
    for seen in zip(*by_rank, strict=True):
        assert len({(b.travels_in, b.travels_out, b.shared) for b in seen}) == 1
        assert len({tuple(item.owners for item in b.items) for b in seen}) == 1

        def of(moves):
            return [(m.item, m.field, m.block, m.cut.entries) for m in moves]

        for one in range(ranks):
            for other in range(ranks):
                assert of(seen[one].given[other]) == of(seen[other].taken[one])
                assert of(seen[one].returned[other]) == of(seen[other].kept[one])


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
def test_an_owner_gets_each_block_whole_and_every_rank_its_own_part_back(preset, arranged):
    weights, averages = arranged
    ranks = weights.size
    for rank in range(ranks):
        for bucket in schedule(travellers(preset, weights, averages), rank, ranks, 1 << 12):
            got = {}
            for moves in bucket.taken:
                for m in moves:
                    got[m.item, m.block, m.field] = got.get((m.item, m.block, m.field), 0) + m.cut.entries
            for i, item in enumerate(bucket.items):
                for b, owner in enumerate(item.owners):
                    for field, spread in item.incoming.items():
                        block = spread.blocks[b]
                        wanted = len(block.rows) * len(block.columns) if owner == rank else 0
                        assert got.get((i, b, field), 0) == wanted
            back = sum(m.cut.entries for moves in bucket.kept for m in moves)
            wanted = sum(
                cut.entries
                for item in bucket.items
                for spread in item.outgoing.values()
                for b in range(len(spread.blocks))
                if (cut := spread.cut(b, rank))
            )
            assert back == wanted


def test_nothing_travels_for_experts_that_ranks_hold_whole():
    on = Arrangement((5,), (Shard(0),))
    bank = [t for t in travellers(schatten.Muon, on, on) if t.shape == (5, 8, 8)]
    (bucket,) = schedule(bank, 0, 5, 1 << 30)
    assert bucket.items[0].owners == (0, 1, 2, 3, 4)
    assert not bucket.travels_in and not bucket.travels_out


def test_experts_that_stay_share_no_bucket_with_what_travels():
    on = Arrangement((5,), (Shard(0),))
    several = [t for t in travellers(schatten.Muon, on, on) if t.shape in ((5, 8, 8), (12, 6), (24, 8))]
    sent, stays = schedule(several, 0, 5, 1 << 30)
    assert {item.traveller.shape for item in sent.items} == {(12, 6), (24, 8)} and sent.travels_in and sent.travels_out
    assert {item.traveller.shape for item in stays.items} == {(5, 8, 8)} and not stays.travels_in and not stays.travels_out


def test_buckets_keep_to_their_bytes_and_their_number_does_not_depend_on_that_of_matrices():
    on = Arrangement((2,), (Shard(0),))
    opt = schatten.Muon([torch.nn.Parameter(torch.zeros(8, 8))])
    rule, own = opt.rule(opt.param_groups[0]), pieces("matrix", (8, 8))

    def buckets(count, max_bytes):
        own_travellers = [
            Traveller(0, n, own, [""], rule, on, on, {"momentum_buffer": (8, 8)}, torch.float32, [1.0]) for n in range(count)
        ]
        return schedule(own_travellers, 0, 2, max_bytes)

    assert len(buckets(4, 1 << 30)) == len(buckets(64, 1 << 30)) == 1
    for bucket in buckets(64, math.ceil(4 * 64 * 16 / TRAVEL_SHARE)):
        # 16 bytes an entry, of signals and updates, there and back.
        assert len(bucket.items) == 2 * 4


def test_small_replicas_are_computed_everywhere_and_large_ones_by_owners():
    on = Arrangement((8,), (Replicate(),))

    def way(n, owners):
        p = torch.nn.Parameter(torch.empty(n, n, device="meta"))
        opt = schatten.Muon([torch.nn.Parameter(torch.zeros(2, 2))])
        rule = opt.rule(opt.param_groups[0])
        same = [(Traveller(0, k, pieces("matrix", p.shape), [""], rule, on, on, {}, p.dtype, [1.0]), p) for k in range(8)]
        return set(ways(same, 8, torch.device("cpu"), owners=owners).values())

    assert (way(8, False), way(2048, False), way(8, True)) == ({"here"}, {"owner"}, {"owner"})


def test_rules_that_need_whole_matrices_are_known():
    def needs(preset):
        opt = preset([torch.nn.Parameter(torch.zeros(4, 4))])
        return whole_step(opt.rule(opt.param_groups[0]))

    assert [needs(preset) for preset in PRESETS] == [False, False, False, True, True]
