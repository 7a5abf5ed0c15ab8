"""What a self test measures: steps of the twin against the same steps on the second path."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from schatten.maps import Nuclear, Scaled
from schatten.rule import Rule
from schatten.self_test import second_path
from schatten.self_test.plan_checks import layouts
from schatten.self_test.report import Check
from schatten.self_test.trial import Subject, Trial

if TYPE_CHECKING:
    from schatten.optimizer import SpectralOptimizer

# By how much of its length a change may differ from the second path's. Products in bf16, summed in another order, have
# differed by up to 1.7 %, after an 8-bit momentum by 3 %; cautious decay spares entries by the sign of a direction, and
# has differed by 9 %. AdamW's arithmetic is fp32 throughout.
TOLERANCE = {"spectral": 0.05, "int8": 0.1, "decay": 0.15, "adamw": 1e-4}

# How much one rounding may change a weight of size 1: stochastic rounding by a whole unit in the last place.
ROUNDING = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-22, torch.float64: 2**-50}

# Distance of singular values from 1: that of Keller Jordan's quintic, for solvers that do not state their own.
BAND = 0.35
HALF_PRECISION = 0.05


@dataclass
class Reference:
    """A subject on the second path; of a rule with its first direction, from which a step with any numbers follows."""

    s: Subject
    rule: Rule | None

    def __post_init__(self) -> None:
        self.W, self.G = self.s.blocks(self.s.start), self.s.blocks(self.s.gradients[0])
        rule, group = self.rule, {**self.s.group, "step": 1}
        self.first = [] if rule is None else [second_path.direction(rule, G, None, group) for G in self.G]

    @property
    def trial_lr(self) -> float:
        """The lr of an update as long as the weight, so that rounding hides neither; 1 where there is no such."""
        length = math.sqrt(self.s.start.numel())
        if (rule := self.rule) is not None:
            length = _length([rule.scale(D[None, None]) * D for _, D, _ in self.first])
        weight = _length(self.W)
        return weight / length if 0 < weight < math.inf and 0 < length < math.inf else 1.0

    def step(self, numbers: Mapping[str, Any]) -> list[Tensor]:
        """The weights after one step."""
        if self.rule is None:
            return second_path.adamw(self.W[0], self.G, {**self.s.group, **numbers})
        return [W for W, _ in self._first_step(self.rule, numbers)]

    def second_step(self, after: Tensor, numbers: Mapping[str, Any]) -> list[Tensor]:
        """The weights after a second step from `after`."""
        G = self.s.blocks(self.s.gradients[1])
        group = {**self.s.group, **numbers, "step": 2}
        if (rule := self.rule) is None:
            first, second = second_path.adamw(self.W[0], [*self.G, *G], group)
            return [self.s.blocks(after)[0] + (second - first)]
        states = [state for _, state in self._first_step(rule, numbers)]
        found = []
        for W, g, state in zip(self.s.blocks(after), G, states, strict=True):
            _, D, state = second_path.direction(rule, g, state, group)
            found.append(second_path.weight(rule, W, D, state, group)[0])
        return found

    def _first_step(self, rule: Rule, numbers: Mapping[str, Any]) -> list[tuple[Tensor, dict[str, Tensor]]]:
        group = {**self.s.group, **numbers, "step": 1}
        return [second_path.weight(rule, W, D, state, group) for W, (_, D, state) in zip(self.W, self.first, strict=True)]


class Steps:
    """The checks that need steps: those of the twin, and the same on the second path."""

    def __init__(self, opt: "SpectralOptimizer") -> None:
        self.trial = Trial(opt, layouts(opt))
        self.subjects = self.trial.subjects
        twin = self.trial.twin
        self.references = [Reference(s, twin.rule(s.group) if s.spectral else None) for s in self.subjects]

    def checks(self) -> Iterator[Check]:
        trial, subjects, references = self.trial, self.subjects, self.references
        numbers = self._trial_numbers()
        plain = trial.run(numbers, _whole)
        for s in subjects:
            s.p.grad = s.gradients[1].clone()
        second = trial.step()
        yield from self._compared("update", numbers, None, plain)
        for s, r, own, W, after in zip(subjects, references, numbers, plain, second, strict=True):
            changes = zip(r.second_step(W, own), s.blocks(W), s.blocks(after), s.blocks(W), strict=True)
            yield _compared("momentum", s, changes, _tolerance(s, "momentum"))
        for r, own, W in zip(references, numbers, plain, strict=True):
            if r.rule is not None and (polar := _polar(r.rule.map)) is not None:
                yield _orthogonality(r, r.rule, own, W, *polar)
        yield from self._compared("step", trial.own, None, trial.run(trial.own, _whole))
        decaying = [{**own, "weight_decay": 0.5 / float(own["lr"])} for own in numbers]
        yield from self._compared("decay", decaying, (numbers, plain), trial.run(decaying, _whole))
        twice = [{**own, "lr": 2 * own["lr"]} for own in numbers]
        yield from self._compared("twice the lr", twice, None, trial.run(twice, _whole))
        yield from self._accumulation(numbers, plain)
        yield from self._without_gradient(numbers)
        written = dict.fromkeys(trial.written)
        yield Check("read only", "all", "gradients, lr and decay", ", ".join(written) or "unchanged", not written)

    def _trial_numbers(self) -> list[dict[str, Any]]:
        """No decay, and for each group an lr as long as the weights; a scheduled one counts as half of its start."""
        lrs: dict[int, float] = defaultdict(float)
        for r in self.references:
            lrs[id(r.s.group)] = max(lrs[id(r.s.group)], r.trial_lr)
        found = []
        for s, own in zip(self.subjects, self.trial.own, strict=True):
            lr = lrs[id(s.group)]
            values = {"lr": lr, "weight_decay": 0.0, "initial_lr": 2 * lr}
            found.append({key: _like(values[key], old) for key, old in own.items()})
        return found

    def _compared(
        self,
        check: str,
        numbers: Sequence[Mapping[str, Any]],
        base: tuple[Sequence[Mapping[str, Any]], Sequence[Tensor]] | None,
        after: Sequence[Tensor],
    ) -> Iterator[Check]:
        """A step with `numbers`, or what it adds to one with the numbers of `base`, against the second path."""
        for i, (s, r) in enumerate(zip(self.subjects, self.references, strict=True)):
            wanted, found = (r.W, r.W) if base is None else (r.step(base[0][i]), s.blocks(base[1][i]))
            changes = zip(r.step(numbers[i]), wanted, s.blocks(after[i]), found, strict=True)
            yield _compared(check, s, changes, _tolerance(s, check))

    def _accumulation(self, numbers: Sequence[Mapping[str, Any]], plain: Sequence[Tensor]) -> Iterator[Check]:
        trial = self.trial
        trial.begin(numbers)
        start = [self._kept(s) for s in self.subjects]
        for s in self.subjects:
            G = s.gradients[0]
            # A sum that no rounding changes: every entry comes from one of the two.
            mask = torch.arange(G.numel(), device=G.device).view(G.shape) % 3 == 0
            with torch.enable_grad():
                for part in (mask, ~mask):
                    (s.p * torch.where(part, G, 0.0)).sum().backward()
        still = [_same(self._kept(s), kept) for s, kept in zip(self.subjects, start, strict=True)]
        for s, W, whole, kept in zip(self.subjects, trial.step(), plain, still, strict=True):
            if s.hooked:
                yield Check("accumulation", s.name, "no step in backward", "not checked: a hook takes its gradient", None)
            elif not kept:
                yield Check("accumulation", s.name, "no step in backward", "a step before step()", False)
            else:
                changes = zip(s.blocks(whole), s.blocks(s.start), s.blocks(W), s.blocks(s.start), strict=True)
                yield _compared("accumulation", s, changes, TOLERANCE["adamw"])

    def _without_gradient(self, numbers: Sequence[Mapping[str, Any]]) -> Iterator[Check]:
        """Every second subject has no gradient, so that it misses from a batch, too."""
        start: dict[str, list[Tensor]] = {}

        def give(i: int, s: Subject) -> None:
            s.p.grad = s.gradients[0].clone() if i % 2 else None
            start[s.name] = self._kept(s)

        self.trial.run(numbers, give)
        still = self.subjects[::2]
        wrong = [s.name for s in still if not _same(self._kept(s), start[s.name])]
        expected = f"no change of {len(still)} parameters"
        yield Check("no gradient", "every second", expected, f"changed: {', '.join(wrong) or 'none'}", not wrong)

    def _kept(self, s: Subject) -> list[Tensor]:
        """A copy of the weight and its state."""
        return [t.detach().clone() for t in (s.p, *self.trial.twin.state[s.p].values())]


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _whole(i: int, s: Subject) -> None:
    s.p.grad = s.gradients[0].clone()


def _like(value: float, old: float | Tensor) -> float | Tensor:
    return torch.full_like(old, value) if isinstance(old, Tensor) else value


def _length(tensors: Sequence[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(t)) for t in tensors))


def _tolerance(s: Subject, check: str) -> float:
    if not s.spectral:
        return TOLERANCE["adamw"]
    if check == "momentum" and s.group["state_dtype"] == "int8":
        return TOLERANCE["int8"]
    return TOLERANCE["decay" if check == "decay" else "spectral"]


def _compared(check: str, s: Subject, changes: Iterable[tuple[Tensor, Tensor, Tensor, Tensor]], tolerance: float) -> Check:
    """The worst block of (expected, from where, measured, from where), with room for rounding a weight at either end."""
    unit, rows = ROUNDING[s.start.dtype], []
    for E, B, M, C in changes:
        length, found, off = (float(torch.linalg.vector_norm(t)) for t in (E - B, M - C, (M - C) - (E - B)))
        allowed = tolerance * length + unit * (_length([E]) + _length([B]))
        # What is not finite is not within any bound.
        ok = off <= allowed and (found > 0 or length <= allowed)
        rows.append((ok, allowed - off, length, found, off, allowed))
    ok, _, length, found, off, allowed = min(rows, key=lambda row: row[:2])
    if length == 0:
        return Check(check, s.name, "no change", f"length {found:.4g}", ok)
    if ok and allowed > length:
        why = f"not checked: less than {str(s.start.dtype).removeprefix('torch.')} resolves in one step"
        return Check(check, s.name, f"length {length:.4g}", why, None)
    text = f"length {found:.4g}, off by {off / length:.2%} of at most {allowed / length:.2%}"
    return Check(check, s.name, f"length {length:.4g}", text, ok)


def _polar(K: object) -> tuple[float, Nuclear] | None:
    """(c, K) where the map is c times the nuclear norm K."""
    if isinstance(K, Scaled):
        inner = _polar(K.map)
        return None if inner is None else (K.c * inner[0], inner[1])
    return (1.0, K) if isinstance(K, Nuclear) else None


def _orthogonality(r: Reference, rule: Rule, numbers: Mapping[str, Any], after: Tensor, c: float, K: Nuclear) -> Check:
    """How far singular values of an update over lr c are from 1, in the mean square, for gradients that have none near 0."""
    stated = getattr(K.solver, "error", None)
    limit = (stated if isinstance(stated, float) else BAND) + HALF_PRECISION
    worst = 0.0
    for W, G, A, (S, D, state) in zip(r.W, r.G, r.s.blocks(after), r.first, strict=True):
        length = float(numbers["lr"]) * float(rule.scale(D[None, None]))
        spectrum_kept = abs(float(torch.cosine_similarity(S.flatten(), G.flatten(), dim=0))) > 0.999
        step = second_path.weight(rule, W, D, state, {**r.s.group, **numbers, "step": 1})[0] - W
        if not spectrum_kept or _length([step + length * D]) > 1e-3 * _length([step]):
            why = "not checked: the signal or the retraction reshapes it"
            return Check("singular values", r.s.name, f"1 within {limit:.2f}", why, None)
        X = (W - A) / (length * c)
        X = X.mT if X.shape[0] > X.shape[1] else X
        squares = X @ X.mT - torch.eye(X.shape[0], dtype=X.dtype, device=X.device)
        worst = max(worst, float(torch.linalg.matrix_norm(squares)) / (2 * math.sqrt(X.shape[0])))
    measured = f"1 within {worst:.2f} in the mean square"
    return Check("singular values", r.s.name, f"1 within {limit:.2f}", measured, worst <= limit)
