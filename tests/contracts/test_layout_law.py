"""The law of layouts: any of them is the same optimizer on separately stored blocks, for every preset that reads gradients.

The reference twin cuts blocks out by indexing, one entry at a time, and never calls the code under test.
"""

import itertools
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import schatten
from schatten import Layout, solvers
from schatten.layout import pieces

# (layout, shape of the parameter, blocks as lists of (rows, columns) of a leading index)
CASES = {
    "three equal parts": (Layout(split=3), (12, 5)),
    "q, kv, kv": (Layout(split=(8, 4, 4)), (16, 6)),
    "q, kv, kv in heads": (Layout(split=(8, 4, 4), heads=(4, 2, 2)), (16, 6)),
    "unequal heads": (Layout(split=(8, 4), heads=(2, 4)), (12, 6)),
    "heads of an output projection": (Layout(heads=3, axis="fan_in"), (5, 12)),
    "parts of columns": (Layout(split=(4, 8), axis="fan_in"), (5, 12)),
    "transposed": (Layout(transpose=True), (5, 12)),
    "transposed and split": (Layout(split=(8, 2, 2), transpose=True), (5, 12)),
    "interleaved": (Layout(split=3, groups=2), (12, 5)),
    "interleaved unequal": (Layout(split=(4, 1, 1), groups=2), (12, 5)),
    "interleaved, two groups a head": (Layout(split=2, heads=2, groups=4), (16, 5)),
    "interleaved, two heads a group": (Layout(split=2, heads=4, groups=2), (16, 5)),
    "bank": ("experts", (2, 3, 4, 5)),
    "bank, gate and up": (Layout("experts", split=2), (3, 8, 5)),
    "bank, interleaved, transposed": (Layout("experts", split=2, groups=4, transpose=True), (3, 5, 8)),
    "convolution": ("conv", (6, 4, 3)),
    "grouped convolution": (Layout("conv", heads=2), (6, 4, 3, 2)),
    "grouped transposed convolution": (Layout("conv", heads=2, axis="fan_in", transpose=True), (6, 4, 3, 2)),
    "kernel positions": ("positions", (6, 4, 3, 2)),
    "kernel positions, split": (Layout("positions", split=(4, 2)), (6, 4, 3)),
    "flat": ("flat", (3, 4)),
}


def twin(layout, t):
    """The blocks of `t` as lists of lists of entries' flat positions, by the definitions in words."""
    layout = layout if isinstance(layout, Layout) else Layout(layout)
    place = torch.arange(t.numel()).reshape(t.shape)
    match layout.kind:
        case "flat":
            matrices = [place.reshape(1, -1)[..., None]]
        case "experts":
            matrices = [m[..., None] for m in place.flatten(0, -3)]
        case "positions":
            matrices = [m[..., None] for m in place.flatten(2).unbind(-1)]
        case "conv":
            matrices = [place.flatten(2)]
        case _:
            matrices = [place[..., None]]
    blocks = []
    for m in matrices:
        m = m.transpose(0, 1) if layout.transpose else m
        m = m if layout.axis == "fan_out" else m.transpose(0, 1)
        rows = list(range(len(m)))
        repetition = len(m) // layout.groups
        sizes = layout.split if isinstance(layout.split, tuple) else (repetition // layout.split,) * layout.split
        heads = layout.heads if isinstance(layout.heads, tuple) else (layout.heads,) * len(sizes)
        offsets = [0, *itertools.accumulate(sizes)]
        for size, offset, number in zip(sizes, offsets, heads, strict=False):
            part = [r for r in rows if offset <= r % repetition < offset + size]
            each = len(part) // number
            for h in range(number):
                block = m[part[h * each : (h + 1) * each]]
                blocks.append((block if layout.axis == "fan_out" else block.transpose(0, 1)).flatten(1))
    return blocks


def taken(t, places):
    return t.reshape(-1)[places]


@pytest.mark.parametrize(("layout", "shape"), CASES.values(), ids=CASES)
def test_pieces_read_what_the_definition_reads_and_write_where_they_read(layout, shape):
    t = torch.randn(shape)
    expected = twin(layout, t)
    found = [block for piece in pieces(layout, shape) for block in piece.of(t)]
    assert sorted(b.tolist() for b in found) == sorted(taken(t, b).tolist() for b in expected)
    copy = torch.zeros(shape)
    for piece in pieces(layout, shape):
        place = piece.view(copy)
        place.copy_(piece.of(t).reshape(place.shape))
    assert torch.equal(copy, t)


@pytest.mark.parametrize(("layout", "shape"), CASES.values(), ids=CASES)
def test_a_layout_steps_as_its_separately_stored_blocks(preset, layout, shape):
    # fp64 and the exact solver where a preset has one: batches of another size then differ in the last places only, which
    # five steps multiply by less than 1e4. A misread entry is off by lr, 1e-2.
    options = {"lr": 0.01}
    if "solver" in preset.__init__.__annotations__:
        options["solver"] = solvers.svd()
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    whole = nn.Parameter(start.clone())
    places = twin(layout, start)
    parts = [nn.Parameter(taken(start, b).clone()) for b in places]
    a = preset([{"params": [whole], "layout": layout}], **options)
    b = preset([{"params": parts, "layout": "flat" if layout == "flat" else "matrix"}], **options)
    for _ in range(3):
        G = torch.randn(shape, generator=generator, dtype=torch.float64)
        whole.grad = G
        for p, at in zip(parts, places, strict=True):
            p.grad = taken(G, at)
        a.step()
        b.step()
    for p, at in zip(parts, places, strict=True):
        torch.testing.assert_close(taken(whole.detach(), at), p.detach(), rtol=1e-9, atol=1e-9)


BAD = [
    (Layout(split=(8, 4)), (16, 6), r"W.* of shape \(16, 6\) has 16 there and split=\(8, 4\) adds up to 12\."),
    (Layout(split=(4, 3), groups=2), (16, 6), r"split=\(4, 3\) adds up to 14 in 2 groups\."),
    (Layout(split=3), (16, 6), r"split must cut fan_out into equal parts, but .*W.* has 16 there and split=3\."),
    (Layout(split=4, axis="fan_in"), (16, 6), r"split must cut fan_in .* has 6 there"),
    (Layout(heads=3), (16, 6), r"heads must cut a part of fan_out .* has a part of 16 there and heads=3\."),
    (Layout(split=2, heads=3, groups=4), (24, 6), r"heads=3 with groups=4\."),
    (Layout("matrix", split=2), (2, 4, 4), r"layout 'matrix' needs two dimensions"),
    (Layout(split=2), (2, 4, 4), r"may be a 1-D convolution or a bank"),
]


@pytest.mark.parametrize(("layout", "shape", "message"), BAD, ids=lambda v: str(v)[:30])
def test_a_layout_that_does_not_fit_is_refused_at_construction_by_name(layout, shape, message):
    with pytest.raises(ValueError, match=message):
        schatten.Muon([{"params": [("W", nn.Parameter(torch.zeros(shape)))], "layout": layout}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": 0}, "split must be a positive integer or a tuple of them, got 0"),
        ({"split": (4, -1)}, "split must be a positive integer"),
        ({"split": ()}, "split must be a positive integer"),
        ({"heads": True}, "heads must be a positive integer"),
        ({"heads": (1, 2)}, "heads must be one number or one for each of the 1 parts of split"),
        ({"groups": (2,)}, "groups must be a positive integer, got"),
        ({"axis": "rows"}, "axis must be 'fan_out' or 'fan_in', got 'rows'"),
        ({"transpose": 1}, "transpose must be True or False"),
        ({"kind": "flat", "split": 2}, "flat layout is one row"),
        ({"kind": "linear"}, "layout must be one of"),
    ],
)
def test_values_that_make_no_layout_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Layout(**options)


def test_the_shape_factor_is_that_of_the_block():
    W = nn.Parameter(torch.zeros(12, 4))
    opt = schatten.Muon([{"params": [("qkv", W)], "layout": Layout(split=(8, 2, 2))}], lr=1.0, scale="keller")
    # sqrt(8 / 4) for the queries; keys and values are wide.
    assert opt.metrics()["effective_lr"] == pytest.approx({"qkv.0": 2**0.5, "qkv.1": 1.0})


def test_equal_blocks_are_one_batch(monkeypatch):
    seen = []
    original = schatten.maps.Nuclear.grad
    monkeypatch.setattr(schatten.maps.Nuclear, "grad", lambda self, S: seen.append(tuple(S.shape)) or original(self, S))
    params = [nn.Parameter(torch.randn(12, 4)) for _ in range(5)]
    opt = schatten.Muon([{"params": params, "layout": Layout(split=3)}])
    for p in params:
        p.grad = torch.randn_like(p)
    opt.step()
    assert seen == [(5, 3, 4, 4)]


@dataclass(frozen=True)
class Turned:
    """An average kept transposed: state whose stored shape can be the parameter's by accident."""

    hyperparameters: ClassVar[tuple[str, ...]] = ("momentum",)
    elementwise: ClassVar[bool] = False

    def init(self, W):
        return {"turned": torch.zeros_like(W.mT)}

    def __call__(self, G, state, group):
        M = torch.lerp(state["turned"], G.mT, 1 - group["momentum"])
        return M.mT, {"turned": M}


@pytest.mark.parametrize(("layout", "shape"), CASES.values(), ids=CASES)
def test_state_that_has_the_parameters_shape_by_accident_is_not_taken_for_it(layout, shape):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    weights = []
    for signal in (Turned(), schatten.signals.Momentum(nesterov=False)):
        p = nn.Parameter(start.clone())
        rule = schatten.Rule(signal, schatten.maps.Nuclear(solvers.svd()))
        opt = schatten.SpectralOptimizer([{"params": [p], "layout": layout}], rule, lr=0.1, momentum=0.9)
        gradients = torch.Generator().manual_seed(1)
        for _ in range(3):
            p.grad = torch.randn(shape, generator=gradients, dtype=torch.float64)
            opt.step()
        weights.append(p.detach())
    torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("products", "bound"), [("float32", 1e-3), ("bfloat16", 0.1)])
@pytest.mark.parametrize("layout", [Layout(split=3), Layout(heads=4, axis="fan_in")], ids=str)
def test_in_fp32_a_layout_is_its_blocks_up_to_batching_noise(layout, products, bound):
    # Other strides and another size of batch order sums differently: an ulp of the products, 6e-8 or 4e-3, which ten products
    # of an iteration and the slope at small singular values enlarge. A misread block is off by as much as the update.
    W = torch.randn(384, 128)
    solver = solvers.polynomial(dtype=products)
    places = twin(layout, W)
    whole, parts = nn.Parameter(W.clone()), [nn.Parameter(taken(W, at).clone()) for at in places]
    a = schatten.Muon([{"params": [whole], "layout": layout}], lr=0.01, solver=solver)
    b = schatten.Muon(parts, lr=0.01, solver=solver)
    worst = 0.0
    for _ in range(3):
        before = whole.detach().clone()
        G = torch.randn_like(W)
        whole.grad = G
        for p, at in zip(parts, places, strict=True):
            p.grad = taken(G, at)
        a.step()
        b.step()
        off = max(float((taken(whole.detach(), at) - p.detach()).abs().max()) for p, at in zip(parts, places, strict=True))
        worst = max(worst, off / float((whole.detach() - before).abs().max()))
    print(f"{layout}, {products} products: off by {worst:.1e} of the largest change")
    assert worst <= bound
