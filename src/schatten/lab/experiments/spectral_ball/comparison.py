"""What the rows say beside what was published."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from schatten.lab.experiment import OUT_OF_REACH, Verdict, verdict
from schatten.lab.experiments.spectral_ball import toy
from schatten.lab.experiments.spectral_ball.networks import MARGIN, OVERSHOOT, PARTS
from schatten.lab.ledger import Row
from schatten.lab.statistics import compared, mean, p_value, summary

# A constant lr moves along every singular value by up to 2 lr in each step, and so ends within that of the optimum.
NEAR = 2 * toy.LR

# Weights are fp32 and the allowance a product of up to some thousand factors; half-precision products widen the band of a
# polynomial by 0.015 (`schatten.solvers.polynomial`).
ROUNDING = {"exact": 1e-3, "polynomial": 0.02, "keller": 0.02}

# Of "many above" and "nearly all below", which the paper does not say in numbers.
MANY, FEW = 0.2, 0.05

SIGNIFICANT = 0.05


def check(rows: Sequence[Row]) -> list[Verdict]:
    """One verdict for each message of figures 1 to 6."""
    parts = {part: [row for row in rows if row["part"] == part] for part in ("toy", "network", "adamw")}
    return [*_toy(parts["toy"]), *_balls(parts["network"]), *_figure_4(parts["network"]), *_figure_6(**parts)]


def _toy(rows: Sequence[Row]) -> list[Verdict]:
    cases = {case.name: [row for row in rows if row["case"] == case.name] for case in toy.CASES}
    found = []
    for name, own in cases.items():
        if not own:
            continue
        quantity = f"toy, lambda {own[0]['decay']:g}, {WORDS[name]}"
        off, steps = [row["off"] for row in own], own[0]["steps"]
        found.append(
            verdict(
                f"{quantity}: distance of the singular values from {TARGETS[name]} at the end",
                f"{REACHED[name]} (figures 1-3, curve)",
                summary(off, 2),
                max(off) <= NEAR,
                f"tolerance {NEAR:g}, a step of the constant lr {toy.LR:g} there and back; {steps} steps; the toy is ours",
            )
        )
        grown = sum(row["V_B_rises"] for row in own)
        if name == "outside":
            found.append(
                verdict(
                    f"{quantity}: steps in which V_B grows",
                    "none, V_B monotone (figure 3, curve)",
                    f"{grown} of {steps * len(own)}",
                    grown == 0,
                    "up to rounding of fp64; no gradient can change this, so no tolerance",
                )
            )
            continue
        rises, beyond = [row["loss_rises"] for row in own], sum(row["V_K_beyond"] for row in own)
        left = max((row["V_K_left"] for row in own if row["V_K_left"] is not None), default=1.0)
        found.append(
            verdict(
                f"{quantity}: steps in which the loss rises, and in which V_B or V_K grows",
                f"the loss {'spikes' if name == 'inside' else 'is not monotone'}; V_B, then V_K monotone (figures 1-3, curve)",
                f"loss in {summary(rises, 3)} of the first {summary([row['monotone'] for row in own], 3)} steps, by up to "
                f"{max(row['loss_largest'] for row in own):.1g}; in these V_B in {grown}, V_K in 0; V_K in {beyond} later",
                min(rises) > 0 and grown == 0 and beyond == 0,
                f"the first steps end where V_K first rises by any amount, fallen to at most {left:.0e} of what it was; "
                f"then, around the minimum, it rises in {sum(row['V_K_rises'] for row in own)} steps of all seeds, which count "
                f"only where by more than the curvature of a step, L lr^2 / 2 times its squared length, as the theory allows",
            )
        )
    return found


WORDS = {
    "inside": "start and optimum inside",
    "outside": "start and optimum outside",
    "entering": "start outside, optimum inside",
}
TARGETS = {"inside": "the optimum", "outside": "the boundary's corner (0.25, 0.25)", "entering": "the optimum"}
REACHED = {"inside": "reach it", "outside": "converge to the boundary", "entering": "enter the ball and reach it"}


def groups(rows: Sequence[Row]) -> dict[tuple[str, str, float], list[Row]]:
    """The rows of every network, solver and decay, in their order."""
    found: dict[tuple[str, str, float], list[Row]] = {}
    for row in rows:
        found.setdefault((row["network"], row["solver"], row["decay"]), []).append(row)
    return found


def _balls(rows: Sequence[Row]) -> list[Verdict]:
    found = []
    for network, solver in dict.fromkeys((row["network"], row["solver"]) for row in rows):
        own = {decay: rs for (n, s, decay), rs in groups(rows).items() if (n, s) == (network, solver)}
        every = [row for rs in own.values() for row in rs]
        top, slack, name = 1 + OVERSHOOT[solver], ROUNDING[solver], f"{network}, directions {DIRECTIONS[solver]}"
        inside = " Some start inside, of which this says that they stay." if min(row["first"] for row in every) <= top else ""
        found.append(
            verdict(
                f"{name}: largest ||W||_op lambda of {every[0]['matrices']} hidden matrices at the end",
                "at most 1, 'all fall below 1/lambda' (figure 5, curve, other networks, single runs)"
                if solver == "exact"
                else f"at most {top:.4g} (derived from the singular values of the directions)",
                _each(own, lambda rs: f"{_summary(rs, 'first', 3)} to {_summary(rs, 'last', 4)}"),
                max(row["last"] for row in every) <= top * (1 + MARGIN),
                f"tolerance {MARGIN:.0%} of the radius, which is reached in the limit.{inside} "
                f"Loss {_each(own, lambda rs: _summary(rs, 'loss', 3))}",
            )
        )
        promised = all(math.isfinite(row["predicted"]) for row in every)
        # A ball is seen to be entered at the next measurement.
        in_time = promised and all(row["entered"] <= math.ceil(row["predicted"] / row["every"]) * row["every"] for row in every)
        beyond = max(row["beyond"] for row in every)
        step = verdict(
            f"{name}: step from which on all are within {MARGIN:.0%} of the ball of radius {_radius(top)}",
            f"at the latest {_each(own, lambda rs: _summary(rs, 'predicted', 3))} ((1 - lr lambda) contraction, derived)",
            _each(own, lambda rs: _summary(rs, "entered", 3)),
            in_time and beyond <= slack,
            f"measured every {every[0]['every']} steps; the largest excess of all matrices over what the rate allows "
            f"is {max(beyond, 0):.1g} of the radius, tolerance {slack:g}"
            + ("" if promised else "; the sum of lr lambda is too small for the theory to promise the ball by the end"),
        )
        found.append(step if promised or beyond > slack else replace(step, verdict=OUT_OF_REACH))
    return found


def _each(own: Mapping[float, Sequence[Row]], text: Callable[[Sequence[Row]], str]) -> str:
    return "; ".join(f"lambda {decay:g}: {text(rows)}" for decay, rows in own.items())


def _summary(rows: Sequence[Row], key: str, digits: int) -> str:
    return summary([row[key] for row in rows], digits)


DIRECTIONS = {"exact": "exact", "polynomial": "polynomial (default)", "keller": "Keller's quintics"}


def _radius(top: float) -> str:
    return "1/lambda" if top == 1 else f"{top:.4g}/lambda"


def _figure_4(rows: Sequence[Row]) -> list[Verdict]:
    found = []
    for (network, solver, decay), own in groups(rows).items():
        if network != "resnet" or solver != "exact" or decay != 2:
            continue
        inside = [_settled(row) for row in own]
        first = [row["share"][0] for row in own]
        stays = max(max(row["share"][i:], default=1.0) for row, i in zip(own, inside, strict=True))
        steps = [row["step"][i] if i < len(row["step"]) else math.inf for row, i in zip(own, inside, strict=True)]
        spent = [row["spent"][i] if i < len(row["spent"]) else math.inf for row, i in zip(own, inside, strict=True)]
        measured = f"measured every {own[0]['every']} steps, beyond {MARGIN:.0%} of the radius, exact directions"
        found += [
            verdict(
                "resnet, lambda 2: share of singular values above 1/2, at the start and once inside",
                "many at iteration 0, nearly none later, stays (figure 4, ResNet-18 on CIFAR-10, curve)",
                f"{summary(first, 3)}; then at most {stays:.3g} from step {summary(steps, 3)} to step {own[0]['step'][-1]}",
                min(first) >= MANY and all(map(math.isfinite, steps)),
                f"'many' is taken as {MANY:.0%}, 'nearly none' as {FEW:.0%}; {measured}",
            ),
            Verdict(
                "resnet, lambda 2: iterations until nearly all are below 1/2",
                "about 400 (figure 4, curve)",
                f"step {summary(steps, 3)}, lambda times the sum of lr {summary(spent, 3)}",
                OUT_OF_REACH,
                "a statement about lambda times the sum of lr, which is not published, on a ResNet-18 and CIFAR-10",
            ),
        ]
    return found


def _settled(row: Row) -> int:
    """The number of the measurement from which on at most FEW of the singular values are above the radius."""
    return max((i + 1 for i, share in enumerate(row["share"]) if share > FEW), default=0)


def _figure_6(toy: Sequence[Row], network: Sequence[Row], adamw: Sequence[Row]) -> list[Verdict]:
    lrs: dict[float, list[Row]] = {}
    for row in adamw:
        lrs.setdefault(row["lr"], []).append(row)
    if not lrs:
        return []
    losses = {lr: mean([row["loss"] for row in own]) for lr, own in lrs.items()}
    best = min(losses, key=lambda lr: losses[lr])
    edge = ", on the edge of those tried" if best in (min(lrs), max(lrs)) else ""
    others = "; ".join(f"lr {lr:g}: {_described(own)}" for lr, own in lrs.items())
    found = []
    for (name, solver, decay), own in groups(network).items():
        if name != "gpt" or solver != "polynomial":
            continue
        for quantity, of, published in (
            ("standard deviation of the singular values", _spread, "Muon narrow, AdamW wide"),
            ("largest singular value", _largest, "Muon bounded, AdamW large values"),
        ):
            ours, theirs = _paired(own, lrs[best], of)
            pairs = [_paired(own, rows, of) for rows in lrs.values()]
            wins = sum(map(_smaller, pairs))
            found.append(
                verdict(
                    f"gpt, W_Q, W_K and W_V at the end, lambda {decay:g}: {quantity}",
                    f"{published} (figure 6, LLaMA-0.5B, curve)",
                    f"Muon {summary(ours, 3)}, AdamW {summary(theirs, 3)} at its best lr {best:g}{edge}"
                    if ours
                    else "no pairs",
                    _smaller((ours, theirs)),
                    f"{compared(ours, theirs)}; smaller with p < {SIGNIFICANT} against {wins} of {len(lrs)} lr of AdamW "
                    f"({others}); Muon: {_described(own)}; at the start {_started(own)}; {_size(own)}",
                )
            )
    return found


def _smaller(pair: tuple[list[float], list[float]]) -> bool:
    ours, theirs = pair
    return bool(ours) and mean(ours) < mean(theirs) and p_value(ours, theirs, paired=True) < SIGNIFICANT


def _described(rows: Sequence[Row]) -> str:
    own = [row for row in rows if row["attention"]]
    loss = f"loss {summary([row['loss'] for row in rows], 4)}"
    if not own:
        return loss
    relative = mean([_spread(row) / _pooled(row).mean() for row in own])
    return f"{loss}, deviation {mean([_spread(row) for row in own]):.3g}, {relative:.2g} of the mean"


def _started(rows: Sequence[Row]) -> str:
    s = np.array([value for row in rows for value in row.get("attention_first", ())])
    return f"deviation {s.std():.3g}, {s.std() / s.mean():.2g} of the mean, largest {s.max():.3g}" if len(s) else "not known"


def _paired(ours: Sequence[Row], others: Sequence[Row], of) -> tuple[list[float], list[float]]:
    """The numbers of the seeds that both have, in one order."""
    first, second = ({row["seed"]: of(row) for row in rows if row["attention"]} for rows in (ours, others))
    seeds = sorted(first.keys() & second.keys())
    return [first[s] for s in seeds], [second[s] for s in seeds]


def _pooled(row: Row) -> np.ndarray:
    return np.array([s for part in PARTS for s in row["attention"].get(part, ())])


def _spread(row: Row) -> float:
    return float(_pooled(row).std())


def _largest(row: Row) -> float:
    return float(_pooled(row).max())


def _size(rows: Sequence[Row]) -> str:
    config: Mapping = rows[0].get("run", {}).get("config", {})
    return f"width {config['width']}, {config['layers']} layers" if config.keys() >= {"width", "layers"} else "no size known"


def _percent(values: Sequence[float]) -> str:
    return f"{100 * mean(values):.3g} %" + (f" (n = {len(values)})" if len(values) > 1 else "")
