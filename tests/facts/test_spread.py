"""What ranks are said to hold of a block, against the layout's own views and against DTensor's own cuts."""

import itertools

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from schatten.layout import Layout, pieces
from schatten.placements.regions import Arrangement
from schatten.placements.spread import of_parameter, of_state

LAYOUTS = [
    ("matrix", (6, 4)),
    ("conv", (4, 3, 2, 2)),
    ("positions", (4, 3, 2, 2)),
    ("experts", (3, 4, 6)),
    ("experts", (2, 2, 4, 6)),
    ("flat", (3, 4)),
    (Layout("matrix", transpose=True), (6, 4)),
    (Layout("conv", transpose=True), (4, 3, 2)),
    (Layout("matrix", split=(4, 2)), (6, 4)),
    (Layout("matrix", split=(4, 2, 2), heads=(2, 1, 1)), (8, 4)),
    (Layout("matrix", split=2, axis="fan_in"), (6, 4)),
    (Layout("matrix", groups=2, split=3), (12, 4)),
    (Layout("matrix", groups=4, split=2, heads=2), (16, 3)),
    (Layout("matrix", groups=2, heads=4), (16, 3)),
    (Layout("experts", groups=3, split=2, transpose=True), (2, 5, 12)),
    (Layout("conv", split=2, axis="fan_in"), (4, 6, 3)),
]

ARRANGEMENTS = [
    Arrangement((3,), (Shard(0),)),
    Arrangement((4,), (Shard(1),)),
    Arrangement((2, 2), (Replicate(), Shard(0))),
    Arrangement((2, 2), (Shard(0), Shard(1))),
    Arrangement((2, 2), (_StridedShard(0, split_factor=2), Shard(0))),
    Arrangement((2, 2), (Shard(0), Shard(0)), (2, 0, 3, 1)),
    Arrangement((2,), (Replicate(),)),
]


def local(t, on, rank):
    """A rank's part by DTensor's own splitting, left to right."""
    for count, placement, own in zip(on.mesh, on.placements, on.coordinate(rank), strict=True):
        if not placement.is_replicate():
            t = placement._split_tensor(t, count, with_padding=False, contiguous=True)[0][own]
    return t


@pytest.mark.parametrize("layout, shape", LAYOUTS, ids=str)
@pytest.mark.parametrize("on", ARRANGEMENTS, ids=lambda on: f"{on.mesh}{on.placements}")
def test_blocks_are_put_together_from_what_ranks_hold_and_taken_apart_again(layout, shape, on):
    t = torch.arange(float(torch.Size(shape).numel())).view(shape)
    if isinstance(layout, str):
        layout = Layout(layout)
    for piece in pieces(layout, shape):
        spread, wanted = of_parameter(piece, on), piece.of(t)
        assert len(spread.blocks) == len(wanted)
        back = {rank: torch.full_like(spread.reading.stack(local(t, on, rank)), -1) for rank in on.order}
        for b, block in enumerate(wanted):
            for first in on.order:
                found = torch.full(spread.blocks[b].shape, -1.0)
                for rank in on.same_copy(first):
                    cut = spread.cut(b, rank)
                    if cut is not None:
                        stack = spread.reading.stack(local(t, on, rank))
                        cut.into_block_(found, cut.of_stack(stack).reshape(-1))
                assert torch.equal(found, block)
            for rank in on.order:
                cut = spread.cut(b, rank)
                if cut is not None:
                    cut.into_stack_(back[rank], cut.of_block(block).reshape(-1))
        for rank, stack in back.items():
            own = local(t, on, rank)
            mine = torch.zeros_like(t, dtype=torch.bool)
            piece.view(mine).fill_(True)
            mine = local(mine, on, rank)
            found = spread.reading.unstack(stack, own.shape)
            assert torch.equal(found[mine], own[mine]) and bool((found[~mine] == -1).all())


@pytest.mark.parametrize("on", ARRANGEMENTS[:-1], ids=lambda on: f"{on.mesh}{on.placements}")
@pytest.mark.parametrize("shape, blocks", [((5, 2), 1), ((3, 2, 2), 3), ((1, 4), 1), ((7,), 7), ((2, 3), 2)])
def test_state_of_its_own_shape_is_cut_by_its_first_dimension(on, shape, blocks):
    t = torch.arange(float(torch.Size(shape).numel())).view(shape)
    spread = of_state(shape, blocks, on)
    for b in range(blocks):
        found = torch.full((len(spread.blocks[b].rows), len(spread.blocks[b].columns)), -1.0)
        for rank in on.same_copy(0):
            if (cut := spread.cut(b, rank)) is not None:
                cut.into_block_(found, cut.of_stack(spread.reading.stack(local(t, spread.on, rank))).reshape(-1))
        assert torch.equal(found.view(spread.blocks[b].shape), t if blocks == 1 else t[b])


def test_only_ranks_that_have_all_of_a_block_are_its_holders():
    bank = of_parameter(pieces("experts", (4, 6, 2))[0], Arrangement((2, 2), (Replicate(), Shard(0))))
    assert [bank.holders(b) for b in range(4)] == [(0, 2), (0, 2), (1, 3), (1, 3)]
    rows = of_parameter(pieces("matrix", (4, 6))[0], Arrangement((2,), (Shard(0),)))
    assert rows.holders(0) == ()


def test_every_entry_is_held_once_by_each_copy():
    for on, shape in itertools.product(ARRANGEMENTS, [(1, 3), (7, 5), (2, 2)]):
        spread = of_parameter(pieces("matrix", shape)[0], on)
        for rank in on.order:
            cuts = [spread.cut(0, r) for r in on.same_copy(rank)]
            assert sum(cut.entries for cut in cuts if cut is not None) == shape[0] * shape[1]
