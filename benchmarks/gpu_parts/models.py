"""The parameters of models as lists of shapes, read as matrices the way `schatten.plan` reads the models themselves.

A matrix has a layout; what AdamW trains (embeddings, heads, norms, biases) has none. Nothing is downloaded or run forward.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from schatten import Layout
from schatten.layout import Piece, pieces

# Memory of a GPU that is left to what a step allocates, to CUDA itself and to fragments.
SPARE_BYTES = 8 << 30

LLAMA_LAYERS = 32


@dataclass(frozen=True)
class Shape:
    """A parameter, and how a spectral rule reads it; None leaves it to AdamW."""

    name: str
    shape: tuple[int, ...]
    layout: str | Layout | None = None

    @property
    def entries(self) -> int:
        return math.prod(self.shape)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return () if self.layout is None else pieces(self.layout, self.shape, self.name)


@dataclass(frozen=True)
class Model:
    """A list of parameters of one dtype."""

    title: str
    dtype: torch.dtype
    shapes: tuple[Shape, ...]

    @property
    def entries(self) -> int:
        return sum(s.entries for s in self.shapes)

    def matrices(self) -> Counter[tuple[int, int]]:
        """(fan_out, fan_in) of the logical matrices, and how many there are of each."""
        found: Counter[tuple[int, int]] = Counter()
        for shape in self.shapes:
            for piece in shape.pieces:
                blocks, fan_out, fan_in = piece.blocks
                found[fan_out, fan_in] += blocks
        return found


def resnet18(quick: bool, free: int) -> Model:
    """ResNet-18 of 1000 classes: every convolution is a matrix out x (in * kernel), the first among them."""
    width, classes = (8, 10) if quick else (64, 1000)
    shapes = [Shape("conv1.weight", (width, 3, 7, 7), "conv"), *_norm("bn1", width)]
    into = width
    for stage in range(4):
        out = width << stage
        for block in range(2):
            name, first = f"layer{stage + 1}.{block}", into if block == 0 else out
            shapes += [Shape(f"{name}.conv1.weight", (out, first, 3, 3), "conv"), *_norm(f"{name}.bn1", out)]
            shapes += [Shape(f"{name}.conv2.weight", (out, out, 3, 3), "conv"), *_norm(f"{name}.bn2", out)]
            if first != out:
                shapes += [Shape(f"{name}.downsample.0.weight", (out, first, 1, 1), "conv")]
                shapes += _norm(f"{name}.downsample.1", out)
        into = out
    shapes += [Shape("fc.weight", (classes, into)), Shape("fc.bias", (classes,))]
    return Model("ResNet-18", torch.float32, tuple(shapes))


def gpt2(quick: bool, free: int) -> Model:
    """GPT-2 small: 12 layers of width 768."""
    sizes = (2, 96, 512, 64) if quick else (12, 768, 50257, 1024)
    return Model("GPT-2 small", torch.float32, tuple(_gpt(*sizes)))


def llama_1b(quick: bool, free: int) -> Model:
    """1.3 billion parameters: 24 layers of width 2048, with an MLP of four times the width."""
    sizes = (2, 128, 512, 64) if quick else (24, 2048, 50304, 2048)
    return Model("1.3B, 24 layers of width 2048", torch.float32, tuple(_gpt(*sizes)))


def llama_8b(quick: bool, free: int) -> Model:
    """As many layers of Llama 8B, of its 32, as `free` bytes hold, in bf16; neither embedding nor head."""
    width, kv, hidden = (64, 16, 224) if quick else (4096, 1024, 14336)

    def layer(k: int) -> list[Shape]:
        rows = {"q_proj": (width, width), "k_proj": (kv, width), "v_proj": (kv, width), "o_proj": (width, width)}
        rows |= {"gate_proj": (hidden, width), "up_proj": (hidden, width), "down_proj": (width, hidden)}
        matrices = [Shape(f"layers.{k}.{name}.weight", shape, "matrix") for name, shape in rows.items()]
        return matrices + [
            Shape(f"layers.{k}.{name}.weight", (width,)) for name in ("input_layernorm", "post_attention_layernorm")
        ]

    # Weight and gradient in bf16, and either a momentum in fp32 or AdamW's two averages in bf16.
    each = (2 + 2 + 4) * sum(s.entries for s in layer(0))
    layers = 2 if quick else max(1, min(LLAMA_LAYERS, int((free - SPARE_BYTES) // each)))
    shapes = [shape for k in range(layers) for shape in layer(k)]
    return Model(f"Llama 8B, {layers} of {LLAMA_LAYERS} layers", torch.bfloat16, tuple(shapes))


def experts(quick: bool, free: int) -> Model:
    """A bank of 64 experts 1408 x 2048 and its projection down, in bf16."""
    bank, hidden, width = (8, 44, 64) if quick else (64, 1408, 2048)
    shapes = (Shape("experts.up", (bank, hidden, width), "experts"), Shape("experts.down", (bank, width, hidden), "experts"))
    return Model(f"{bank} experts {hidden} x {width}, up and down", torch.bfloat16, shapes)


MODELS: dict[str, Callable[[bool, int], Model]] = {
    "resnet18": resnet18,
    "gpt2": gpt2,
    "llama-1b": llama_1b,
    "llama-8b": llama_8b,
    "experts": experts,
}


def _gpt(layers: int, width: int, vocabulary: int, positions: int) -> Iterator[Shape]:
    """GPT-2's own parameters, stored as nn.Linear does; the head is tied with the embedding."""
    yield Shape("wte.weight", (vocabulary, width))
    yield Shape("wpe.weight", (positions, width))
    for k in range(layers):
        linear = {
            "attn.c_attn": (3 * width, width, Layout("matrix", split=3)),
            "attn.c_proj": (width, width, "matrix"),
            "mlp.c_fc": (4 * width, width, "matrix"),
            "mlp.c_proj": (width, 4 * width, "matrix"),
        }
        for name, (fan_out, fan_in, layout) in linear.items():
            yield Shape(f"h.{k}.{name}.weight", (fan_out, fan_in), layout)
            yield Shape(f"h.{k}.{name}.bias", (fan_out,))
        yield from _norm(f"h.{k}.ln_1", width)
        yield from _norm(f"h.{k}.ln_2", width)
    yield from _norm("ln_f", width)


def _norm(name: str, width: int) -> list[Shape]:
    return [Shape(f"{name}.weight", (width,)), Shape(f"{name}.bias", (width,))]


class Parameters:
    """A model's parameters with random gradients, one copy that all contenders step in turn."""

    def __init__(self, model: Model, device: torch.device) -> None:
        self.model = model
        generator = torch.Generator(device).manual_seed(0)
        self.own: list[nn.Parameter] = []
        for shape in model.shapes:
            values = [torch.empty(shape.shape, dtype=model.dtype, device=device) for _ in range(2)]
            weight, gradient = (t.normal_(0, 0.02, generator=generator) for t in values)
            self.own.append(_with_gradient(weight, gradient))

    def groups(self) -> list[dict[str, Any]]:
        """What `schatten.plan` gives an optimizer: one group for each layout, and what AdamW trains."""
        groups: dict[str | Layout | None, dict[str, Any]] = {}
        for shape, p in zip(self.model.shapes, self.own, strict=True):
            options = {"algorithm": "adamw"} if shape.layout is None else {"layout": shape.layout}
            groups.setdefault(shape.layout, {"params": [], **options})["params"].append((shape.name, p))
        return list(groups.values())

    def matrices(self) -> list[nn.Parameter]:
        """The same logical matrices as two-dimensional parameters, views of the same memory: for optimizers that take no
        layouts, a fused projection or a bank is a parameter for each block, a convolution one of out x (in * kernel).
        """
        found = []
        for shape, p in zip(self.model.shapes, self.own, strict=True):
            assert p.grad is not None
            for piece in shape.pieces:
                blocks = zip(piece.of(p.detach()), piece.of(p.grad), strict=True)
                found += [_with_gradient(weight, gradient) for weight, gradient in blocks]
        return found

    def rest(self) -> list[nn.Parameter]:
        """What is no hidden matrix."""
        return [p for shape, p in zip(self.model.shapes, self.own, strict=True) if shape.layout is None]


def _with_gradient(weight: Tensor, gradient: Tensor) -> nn.Parameter:
    p = nn.Parameter(weight)
    p.grad = gradient
    return p
