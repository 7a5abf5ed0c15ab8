"""A twin of an optimizer: the same class and numbers, with copies of a few parameters, to step without touching anything.

The twin's `step` is the real one. Each shape has a group of its own, so that each can have an lr of its own; state is fresh,
and gradients are seeded and of known, moderate spectrum, so that no direction is rounding noise.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from schatten.layout import Layout
from schatten.placements import Ranks
from schatten.placements.gather import whole
from schatten.self_test.second_path import assembled, logical
from schatten.state import wide

if TYPE_CHECKING:
    from schatten.optimizer import SpectralOptimizer

# Two of a shape are stepped as a batch; of larger matrices one, to save memory.
PAIRED = 1 << 20

# AdamW acts on entries, so that the first rows of a large table are enough.
ENTRIES = 1 << 20

# What a trial sets in a group; `initial_lr` is there after a scheduler was made.
NUMBERS = ("lr", "weight_decay", "initial_lr")


@dataclass
class Subject:
    """A parameter, read only, its copy `p` in group `group` of the twin, and the gradients of two steps.

    `hooked` says whether a hook takes the parameter's gradient in `backward`.
    """

    name: str
    start: Tensor
    p: nn.Parameter
    layout: str | Layout
    group: dict[str, Any]
    gradients: tuple[Tensor, Tensor]
    hooked: bool

    @property
    def spectral(self) -> bool:
        return self.group["algorithm"] == "spectral"

    def blocks(self, t: Tensor) -> list[Tensor]:
        """The logical matrices of a tensor of the parameter's shape, in the precision of arithmetic; AdamW's are the whole."""
        t = t.detach().to(wide(t.dtype))
        return logical(t, self.layout) if self.spectral else [t]


def subjects(opt: "SpectralOptimizer", layouts: Mapping[str, str | Layout]) -> Iterator[Subject]:
    """One or two trainable parameters of each shape of each group, with their names in `layouts` if they are spectral."""
    for g, group in enumerate(opt.param_groups):
        alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for i, p in enumerate(group["params"]):
            chosen = alike[p.shape, p.dtype, p.device]
            if p.requires_grad and p.numel() and len(chosen) < (2 if p.numel() <= PAIRED else 1):
                chosen.append(i)
        for chosen in alike.values():
            own = {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items()}
            own |= {"params": [], "step": 0}
            if "param_names" in group:
                own["param_names"] = [group["param_names"][i] for i in chosen]
            for i in chosen:
                name = group["param_names"][i] if "param_names" in group else f"{g}.{i}"
                yield _subject(name, group["params"][i], layouts.get(name, "-"), own, seed=g << 32 | i)


# Of a DTensor all ranks come here, in one order: it is the one thing of a self test that they do together.
def _subject(name: str, p: Tensor, layout: str | Layout, group: dict[str, Any], seed: int) -> Subject:
    start = whole(p.detach())
    if group["algorithm"] == "adamw" and p.numel() > ENTRIES:
        start = start[: max(1, ENTRIES * len(p) // p.numel())]
    copied = nn.Parameter(start.clone())
    group["params"].append(copied)
    generator = torch.Generator(device=p.device).manual_seed(seed)
    if group["algorithm"] == "adamw":
        first, second = (torch.randn(start.shape, generator=generator, device=p.device) for _ in range(2))
    else:
        blocks = [graded(block, generator) for block in logical(start, layout)]
        first, second = (assembled(own, start.shape, layout) for own in (blocks, [turned(G) for G in blocks]))
    # torch has no public word for these hooks.
    hooked = bool(getattr(p, "_post_accumulate_grad_hooks", None))
    return Subject(name, start, copied, layout, group, (first.to(p.dtype), second.to(p.dtype)), hooked)


def graded(like: Tensor, generator: torch.Generator) -> Tensor:
    """A matrix of `like`'s shape with singular values between 1 and 4 and neither rows nor columns orthogonal."""
    X = torch.empty(like.shape, dtype=wide(like.dtype), device=like.device)
    nn.init.orthogonal_(X, generator=generator)
    for shape in ((X.shape[0], 1), (1, X.shape[1])):
        X *= 1 + torch.rand(shape, generator=generator, dtype=X.dtype, device=X.device)
    return X


def turned(G: Tensor) -> Tensor:
    """G with pairs of columns, or of rows if tall, turned by 90 degrees: a G + b turned(G) is singular for no a, b > 0."""
    if G.shape[0] > G.shape[1]:
        return turned(G.mT).mT
    half = G.shape[1] // 2
    return torch.cat([-G[:, half : 2 * half], G[:, :half], G[:, 2 * half :]], 1)


class Trial:
    """The twin of `opt` with its subjects. `own` and `numbers` are the numbers of its groups, one dict for each subject."""

    def __init__(self, opt: "SpectralOptimizer", layouts: Mapping[str, str | Layout]) -> None:
        self.subjects = list(subjects(opt, layouts))
        groups = list({id(s.group): s.group for s in self.subjects}.values())
        # Where deepcopy meets these it takes what stands here: no parameter and no state is copied, and no other rank asked.
        alone = {id(opt.param_groups): groups, id(opt.state): defaultdict(dict), id(opt._ranks): Ranks("local", None)}
        self.twin = copy.deepcopy(opt, alone)
        self.own = [{key: s.group[key] for key in NUMBERS if key in s.group} for s in self.subjects]
        # What a step has written to that it should only read.
        self.written: list[str] = []

    def begin(self, numbers: Sequence[Mapping[str, Any]]) -> None:
        """Put weights, state and counters back to the start, and `numbers` into the groups."""
        for s, own in zip(self.subjects, numbers, strict=True):
            s.group.update(own, step=0)
            s.p.copy_(s.start)
            s.p.grad = None
            self.twin.state[s.p] = self.twin._fresh_state(s.p, s.group)

    def step(self) -> list[Tensor]:
        """One step with the gradients there are; the weights after it."""
        before = [None if s.p.grad is None else s.p.grad.clone() for s in self.subjects]
        numbers = [{key: s.group[key] for key in NUMBERS if key in s.group} for s in self.subjects]
        self.twin.step()
        for s, G, own in zip(self.subjects, before, numbers, strict=True):
            if G is not None and (s.p.grad is None or not torch.equal(s.p.grad, G)):
                self.written.append(f"gradient of {s.name}")
            self.written += [f"{key} of {s.name}'s group" for key in own if s.group[key] != own[key]]
        return [s.p.detach().clone() for s in self.subjects]

    def run(self, numbers: Sequence[Mapping[str, Any]], give: Callable[[int, Subject], None]) -> list[Tensor]:
        """The weights after one step from the start, `give(i, subject)` setting the gradients."""
        self.begin(numbers)
        for i, s in enumerate(self.subjects):
            give(i, s)
        return self.step()
