"""What the sweeps say of the derived and the published claims."""

import math
from collections.abc import Iterator, Sequence

from schatten.lab.experiment import OUT_OF_REACH, Verdict, verdict
from schatten.lab.experiments.width_transfer.contenders import CONTENDERS, FULL, RESCALED_ONLY, START_ONLY, UPDATES, Contender
from schatten.lab.experiments.width_transfer.fits import (
    at_end,
    best_losses,
    by_width,
    interval,
    slopes,
    sweeps,
    vertices,
)
from schatten.lab.ledger import Row
from schatten.lab.statistics import compared, mean, p_value, summary

# "No dependence on width": the whole 95 % interval of a slope against log2 width lies within this of 0. Over three doublings
# that is less than one step of the lr grid, a factor 2.
MARGIN = 0.25

# ||dW||_op of Muon++ over lr sqrt(m/n): half of this is the power iteration's error, half the cancellation in W - W'.
UPDATE_TOLERANCE = 0.02


def check(rows: Sequence[Row]) -> list[Verdict]:
    """One verdict per claim; what the rows do not hold has none."""
    parts = (_shifts, _transfer, _enough, _coordinates, _conditions, _ablation)
    return [v for part in parts for v in part(rows)]


def _shifts(rows: Sequence[Row]) -> Iterator[Verdict]:
    """The drift of the best lr, per doubling of the width."""
    for contender in CONTENDERS:
        found = vertices(rows, contender.name)
        values = slopes(found)
        if not values:
            continue
        center, low, high = interval(values)
        flat = contender.shift == (0, 0)
        best = ", ".join(f"{w}: {mean(ks):.2f}" for w, ks in found.items())
        ends = sum(at_end(losses) for of in sweeps(rows, contender.name).values() for losses in of.values())
        rule = f"holds if the 95 % interval lies within +-{MARGIN}" if flat else "holds if the 95 % interval lies below 0"
        yield verdict(
            f"best log2 lr per doubling of the width, {contender.name}",
            "0 (derived)" if flat else f"{contender.shift[0]:g} to {contender.shift[1]:g} (derived)",
            f"{center:+.2f}, 95 % {low:+.2f} to {high:+.2f} (best log2 lr {best})",
            (-MARGIN <= low and high <= MARGIN) if flat else high < 0,
            f"{rule}; {compared(values, [0.0] * len(values))}; {ends} of {sum(map(len, found.values()))} minima at an end of "
            f"what was tried{_octave(rows, contender)}",
        )


def _octave(rows: Sequence[Row], contender: Contender) -> str:
    """How flat the optimum is: the excess loss a factor 2 away from the best lr, over all widths and seeds."""
    excess = []
    for of in sweeps(rows, contender.name).values():
        for losses in of.values():
            k = min(losses, key=lambda k: losses[k])
            excess += [losses[n] - losses[k] for n in (k - 1, k + 1) if math.isfinite(losses.get(n, math.inf))]
    return f"; a factor 2 in lr costs {mean(excess):.2g} nats" if excess else ""


def _regrets(rows: Sequence[Row], contender: str) -> list[float]:
    """At the widest: the loss with the narrowest's best lr minus that with the best lr there, by seed."""
    swept = sweeps(rows, contender)
    moved = by_width(rows, "transfer", contender, lambda r: r["loss"])
    if len(swept) < 2 or max(swept) not in moved:
        return []
    best = best_losses(swept[max(swept)])
    return [a - b for a, b in zip(moved[max(swept)], best, strict=True)] if len(best) == len(moved[max(swept)]) else []


def _transfer(rows: Sequence[Row]) -> Iterator[Verdict]:
    """The price of keeping the lr of the narrowest model, controlled updates against the other scales."""
    ours = _regrets(rows, UPDATES)
    for other in (c.name for c in CONTENDERS if c.shift != (0, 0)):
        theirs = _regrets(rows, other)
        if not ours or len(ours) != len(theirs):
            continue
        p = p_value(ours, theirs, paired=True)
        lost = mean(theirs) == math.inf
        yield verdict(
            f"keeping the narrowest's lr at the widest costs less with mup than with {other}",
            "lr transfers (derived)",
            f"{summary(ours, 2)} against {summary(theirs, 2)} nats above the best lr",
            mean(ours) < mean(theirs) and (p < 0.05 or lost),
            f"{compared(ours, theirs)} paired by seed{'' if p < 0.05 or lost else ': no difference seen'}",
        )


def _enough(rows: Sequence[Row]) -> Iterator[Verdict]:
    """Whether updates alone do as well as the full rule at the widest."""
    full, updates = sweeps(rows, FULL), sweeps(rows, UPDATES)
    if not full or not updates or max(full) != max(updates):
        return
    ours, theirs = best_losses(updates[max(updates)]), best_losses(full[max(full)])
    if not ours or len(ours) != len(theirs):
        return
    p = p_value(ours, theirs, paired=True)
    worse = p < 0.05 and mean(ours) > mean(theirs)
    shift = interval(slopes(vertices(rows, UPDATES)) or [math.nan])
    flat = -MARGIN <= shift[1] and shift[2] <= MARGIN
    yield verdict(
        f"control of the updates alone suffices, at width {max(full)}",
        "yes, for moderately large models (paper)",
        f"loss {summary(ours)} with updates controlled, {summary(theirs)} with Muon++",
        flat and not worse,
        f"{compared(ours, theirs)} paired by seed; needs a loss not above Muon++'s ({'above' if worse else 'not above'}, "
        f"p >= 0.05 is no difference seen) and a flat best lr ({'yes' if flat else 'not shown'}); a seed's lr chosen by others",
    )


def _coordinates(rows: Sequence[Row]) -> Iterator[Verdict]:
    """Slopes of log2 RMS change against log2 width, of the layer that depends on width most."""
    for contender in CONTENDERS:
        layers = max((len(r["change"]) for r in rows if _is(r, "coordinates", contender.name)), default=0)
        found = []
        for layer in range(layers):

            def change(r: Row, layer: int = layer) -> float | None:
                return math.log2(r["change"][layer]) if layer < len(r["change"]) and r["change"][layer] > 0 else None

            values = slopes(by_width(rows, "coordinates", contender.name, change))
            if values:
                found.append(interval(values))
        if not found:
            continue
        flat = contender.shift == (0, 0)
        yield verdict(
            f"coordinate check: change of outputs ~ width^s, {contender.name}",
            _expected(contender),
            "s by layer " + "; ".join(f"{c:+.2f} ({low:+.2f} to {high:+.2f})" for c, low, high in found),
            all(-MARGIN <= low and high <= MARGIN for _, low, high in found) if flat else found[-1][1] > 0,
            f"95 % intervals over seeds; {'holds if all lie within +-' + str(MARGIN) if flat else 'holds if it lies above 0'}",
        )


def _expected(contender: Contender) -> str:
    if contender.shift != (0, 0):
        return "s > 0 for the head (derived)"
    return "s = 0 for every layer (derived)" if contender.spectral else "s = 0, if control of updates suffices (paper)"


def _conditions(rows: Sequence[Row]) -> Iterator[Verdict]:
    """The two spectral conditions along training and width."""
    for contender in (c for c in CONTENDERS if c.name in (FULL, UPDATES)):
        those = [r for r in rows if _is(r, "transfer", contender.name) and r["weights"] and r["updates"]]
        if not those:
            continue
        sizes = [x for r in those for at in r["weights"] for x in at]
        largest = by_width(rows, "transfer", contender.name, lambda r: math.log2(max(map(max, r["weights"]))))
        center, low, high = interval(slopes(largest) or [math.nan])
        yield verdict(
            f"||W||_op / sqrt(m/n) during training does not depend on width, {contender.name}",
            "bounded: max(start, 1/lambda) (derived)" if contender.spectral else "not controlled",
            f"{min(sizes):.2f} to {max(sizes):.2f} over matrices, times, widths; largest ~ width^{center:.2f} "
            f"({low:.2f} to {high:.2f})",
            -MARGIN <= low and high <= MARGIN,
            f"holds if the exponent's 95 % interval lies within +-{MARGIN}; n = {len({r['seed'] for r in those})}",
        )
        moves = [x for r in those for at in r["updates"] for x in at]
        yield verdict(
            f"||dW||_op / (lr sqrt(m/n)) during training, {contender.name}",
            "1 (rule)",
            f"{min(moves):.3f} to {max(moves):.3f} over matrices, times, widths",
            max(abs(x - 1) for x in moves) <= UPDATE_TOLERANCE,
            f"tolerance {UPDATE_TOLERANCE:.0%}: power iteration and cancellation in the difference of weights",
        )


def _ablation(rows: Sequence[Row]) -> Iterator[Verdict]:
    """Parts of Muon++ against the mup scale alone, at the width at which all were tried."""
    cases = (
        (FULL, "the full rule", "+0.00512, worse"),
        (START_ONLY, "the spectral start alone", "+0.00228, worse"),
        (RESCALED_ONLY, "the rescaled update alone", "+0.00067, no difference"),
    )
    width = max(sweeps(rows, START_ONLY), default=None)
    base = sweeps(rows, UPDATES).get(width) if width is not None else None
    if not base:
        return
    for name, text, published in cases:
        of = sweeps(rows, name).get(width) if width is not None else None
        if not of or len(of) != len(base):
            continue
        ours, theirs = best_losses(of), best_losses(base)
        if not ours or len(ours) != len(theirs):
            continue
        p = p_value(ours, theirs, paired=True)
        difference = [a - b for a, b in zip(ours, theirs, strict=True)]
        center, low, high = interval(difference)
        null = name == RESCALED_ONLY
        yield verdict(
            f"{text} against the mup scale alone: sign, at width {width}",
            f"{published} (second-hand)",
            f"{center:+.4f}, 95 % {low:+.4f} to {high:+.4f} nats of training loss",
            p >= 0.05 if null else p < 0.05 and center > 0,
            f"{compared(ours, theirs)} paired by seed{'' if p < 0.05 else ': no difference seen'}; best of equally many lr, "
            "chosen on the other seeds",
        )
    why = "validation loss of a tuned stack at another scale, second-hand; here the training loss of an MLP"
    yield Verdict("the ablation's numbers", "+0.00512, +0.00228, +0.00067 (second-hand)", "see above", OUT_OF_REACH, why)


def _is(row: Row, phase: str, contender: str) -> bool:
    return row.get("phase") == phase and row.get("contender") == contender
