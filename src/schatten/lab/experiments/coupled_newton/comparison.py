"""The verdicts: what was printed beside what was measured, p = 1/2 and p = 1/4 in one line."""

import statistics
from collections.abc import Sequence

from schatten.lab.experiment import Verdict, verdict
from schatten.lab.experiments.coupled_newton.published import (
    AT_MOST,
    BAND,
    BETWEEN_DRAWS,
    BULGE,
    DAMPING,
    ERRORS,
    PAPER,
    POWERS,
    PRESCRIBED,
    PRODUCTS,
    RANDOM,
    RANGES,
    ROUNDING,
    SCALED,
    SMALLEST,
    agrees,
    within_factor,
)
from schatten.lab.ledger import Row
from schatten.lab.statistics import compared, mean, summary

OTHERS = ("tower", "coupled_minimax", "svd")

EXACT = f"printed digits and {ROUNDING:.0%}: draws differ in rounding alone"
DRAWN = f"factor {BETWEEN_DRAWS:.2f}, the widest stated between draws; the published error is of one draw"


def check(rows: Sequence[Row]) -> list[Verdict]:
    """A verdict for every published number whose rows are there."""
    parts = {
        part: [row for row in rows if row.get("part") == part] for part in ("error", "gain", "products", "quintic", "time")
    }
    return [
        *_errors(parts["error"]),
        *_damping(parts["gain"]),
        *_scaled(parts["error"]),
        *(v for row in parts["products"] for v in _products(row)),
        *_quintic(parts["quintic"]),
        *_times(parts["time"]),
    ]


def _of(rows: Sequence[Row], name: str, scale: float, solver: str = PAPER) -> list[list[float]]:
    """The errors of one input over seeds, for p = 1/2 and p = 1/4."""
    return [[r[solver] for r in rows if (r["input"], r["scale"], r["p"]) == (name, scale, p)] for p in POWERS]


def _errors(rows: Sequence[Row]) -> list[Verdict]:
    found = []
    for name, printed in ERRORS.items():
        ours = _of(rows, name, 1.0)
        if not all(ours):
            continue
        drawn = name in RANDOM
        holds = all((within_factor if drawn else agrees)(p, mean(o)) for p, o in zip(printed, ours, strict=True))
        spectrum = f"singular values {name}" if name in PRESCRIBED else name
        why = f"{DRAWN if drawn else EXACT}; {_beside(rows, name, 1.0)}"
        found.append(verdict(f"error, p = 1/2, 1/4: {spectrum}", ", ".join(printed), _pair(ours), holds, why))
        if name == "Gaussian 256x256":
            holds = all(float(low) <= mean(o) <= float(high) for (low, high), o in zip(RANGES, ours, strict=True))
            published = ", ".join(f"{low} to {high}" for low, high in RANGES)
            shown = ", ".join(f"{min(o):.2g} to {max(o):.2g}" for o in ours)
            why = f"the mean of n = {len(ours[0])} draws lies within the published range"
            found.append(verdict("its range over draws, p = 1/2, 1/4", published, shown, holds, why))
    return found


def _damping(rows: Sequence[Row]) -> list[Verdict]:
    by_power = [next((row for row in rows if row["p"] == p), None) for p in POWERS]
    found = []
    for s, printed in DAMPING.items():
        if not all(by_power):
            break
        index = [min(range(len(row["s"])), key=lambda i, row=row: abs(row["s"][i] / s - 1)) for row in by_power if row]
        ours, limit, tower = (
            [row[name][i] for row, i in zip(by_power, index, strict=True) if row] for name in (PAPER, "converged", "tower")
        )
        holds = all(agrees(p, o, 0.002) for p, o in zip(printed, ours, strict=True))
        why = f"printed digits and 0.2 %; many steps would leave {_list(limit, 3)}, the tower leaves {_list(tower, 3)}"
        found.append(verdict(f"left of s^p at s = {s:g} of the largest", ", ".join(printed), _list(ours, 3), holds, why))
    return found


def _scaled(rows: Sequence[Row]) -> list[Verdict]:
    found = []
    for (name, c), most in AT_MOST.items():
        ours = _of(rows, name, c)
        if all(ours):
            holds = all(agrees(most, max(o)) or max(o) <= float(most) for o in ours)
            why = f"largest of n = {len(ours[0])} draws; {_beside(rows, name, c)}"
            found.append(verdict(f"error of c X, c = {c:g}: {name}", f"at most {most}", _pair(ours), holds, why))
    for (name, c), printed in SCALED.items():
        ours = _of(rows, name, c)
        if all(ours):
            # Here the ridge makes the error, and the draw next to nothing.
            holds = all(agrees(p, mean(o)) for p, o in zip(printed, ours, strict=True))
            why = f"{EXACT}; {_beside(rows, name, c)}"
            found.append(verdict(f"error of c X, c = {c:g}: {name}", ", ".join(printed), _pair(ours), holds, why))
    return found


def _products(row: Row) -> list[Verdict]:
    count = row["count"]
    found = []
    for name, printed in PRODUCTS.items():
        if name in count:
            same = [
                f"; {o} {n:.0f}" for o, n in count.items() if o not in PRODUCTS and o.split(" p ")[-1] == name.split(" p ")[-1]
            ]
            why = f"flops / 2 n^3 of a 256x256 matrix, counted by torch{''.join(same)}"
            found.append(
                verdict(f"square products, {name}", f"{printed}", f"{count[name]:.1f}", round(count[name]) == printed, why)
            )
    return found


def _quintic(rows: Sequence[Row]) -> list[Verdict]:
    found = []
    for row in rows:
        steps = row["steps"]
        holds = agrees(BAND[0], row["low"], 0) and agrees(BAND[1], row["high"], 0)
        ours = f"[{row['low']:.4f}, {row['high']:.4f}]"
        found.append(
            verdict(f"p = 0: image of [0.01, 1], {steps} steps", f"[{', '.join(BAND)}]", ours, holds, "printed digits")
        )
        if steps == 5:
            holds = agrees(BULGE, row["bulge"], 0)
            found.append(verdict("p = 0: maximum below 0.01, 5 steps", BULGE, f"{row['bulge']:.4f}", holds, "printed digits"))
        if steps in SMALLEST:
            made, printed = row["smallest"], SMALLEST[steps]
            inside = min(made) <= float(printed) <= max(made)
            why = f"one draw: within the range of {len(made)} of ours (bf16), or printed digits and {ROUNDING:.0%} of the mean"
            ours = f"{min(made):.3g} to {max(made):.3g}, mean {mean(made):.3g}"
            holds = inside or agrees(printed, mean(made))
            found.append(verdict(f"p = 0: least singular value, Gaussian 256x256, {steps} steps", printed, ours, holds, why))
    return found


def _times(rows: Sequence[Row]) -> list[Verdict]:
    """Ratios of times to the counted ratios of products; a factor of 2 is allowed, as small products cost more each."""
    found = []
    for row in rows:
        taken = row["milliseconds"]
        for p in POWERS:
            name, base = f"{PAPER} p = {p}", "quintic, 5 steps"
            if name in taken and base in taken:
                counted = PRODUCTS[name] / PRODUCTS[base]
                ratios = [a / b for a, b in zip(taken[name], taken[base], strict=True)]
                ratio = statistics.median(ratios)
                beside = ", ".join(f"{o} {_ratio(taken, name, f'{o} p = {p}'):.2g}" for o in OTHERS if f"{o} p = {p}" in taken)
                why = f"factor 2; as many times the time of: {beside}; one run, in turns, {compared(taken[name], taken[base])}"
                found.append(
                    verdict(
                        f"time over five quintics, p = {p}, {row['size']}x{row['size']}",
                        f"{counted:.1f} (ratio of products)",
                        f"{ratio:.1f} ({min(ratios):.1f} to {max(ratios):.1f}, n = {len(ratios)})",
                        0.5 <= ratio / counted <= 2,
                        why,
                    )
                )
    return found


def _ratio(taken: dict[str, list[float]], name: str, other: str) -> float:
    return statistics.median(taken[name]) / statistics.median(taken[other])


def _beside(rows: Sequence[Row], name: str, scale: float) -> str:
    """What the other solvers of the library are off by there."""
    return ", ".join(f"{other} {_list([mean(e) for e in _of(rows, name, scale, other)], 2)}" for other in OTHERS)


def _pair(errors: Sequence[Sequence[float]]) -> str:
    return ", ".join(summary(e, 3) for e in errors)


def _list(values: Sequence[float], digits: int) -> str:
    return ", ".join(f"{v:.{digits}g}" for v in values)
