"""What the curves say of the published claims."""

import math
from collections.abc import Iterator, Sequence
from statistics import median

import numpy as np
from scipy import stats

from schatten.lab.experiment import OUT_OF_REACH, Verdict, verdict
from schatten.lab.experiments.critical_batch.curves import Curve, Form, curve, lack_of_fit, logs_of_b0, mean_fit
from schatten.lab.experiments.critical_batch.variants import ADAMW, LOW_BETA, MUON, NEITHER, NO_DECAY, NO_NESTEROV, VARIANTS
from schatten.lab.ledger import Row
from schatten.lab.statistics import mean, p_value, summary

# A fit whose rms error is less than a tenth of the steps serves to choose a batch.
TOLERANCE = 0.1

# The default polynomial's singular values end within 1 +- 0.16 (`schatten.solvers.polynomial`), and the radius with them.
SLACK = 1.16

# "Expect its order of magnitude" (diagnostics.noise_scale).
MAGNITUDE = 10

SETTINGS = {"tuned": "lr tuned for each batch", "fixed": "one lr for all batches"}
NAMES: dict[Form, str] = {"bound": "Xb/((eps^2-Z)b-Y)", "hyperbola": "a(1+c/b)"}
FORMS: dict[str, Form] = {"tuned": "hyperbola", "fixed": "bound"}


def check(rows: Sequence[Row]) -> list[Verdict]:
    """One verdict per claim; what the rows do not hold has none."""
    verdicts = [*_shapes(rows), *_effects(rows), *_bounds(rows), *_noise(rows)]
    if not verdicts:
        return []
    why = "the paper claims a lower bound of b*, qualitative in beta and lambda: noise, precision and rank are not observable"
    return [*verdicts, Verdict("b* as a number", "none (paper)", "see above", OUT_OF_REACH, why)]


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % t-interval; nan ends of fewer than two values."""
    center = mean(values)
    if len(values) < 2:
        return center, math.nan, math.nan
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return center, center - half, center + half


def _shapes(rows: Sequence[Row]) -> Iterator[Verdict]:
    """The form of T(b), the existence of a critical batch and of a minimum of N, by Muon's curves."""
    for phase, setting in SETTINGS.items():
        whole = curve(rows, phase, MUON)
        if whole is None:
            continue
        of = whole.arrived
        if len(of.batches) >= 4:
            fits = {form: mean_fit(form, of) for form in NAMES}
            texts = [
                f"{name}: rms {fits[form].rms:.0%}, F-test p = {lack_of_fit(form, of):.2g}" for form, name in NAMES.items()
            ]
            yield verdict(
                f"Muon's T(b) has the bound's form, {setting}",
                "X/T + Y/b + Z <= eps^2 (inferred)",
                "; ".join(texts),
                fits["bound"].rms <= TOLERANCE,
                f"holds at rms <= {TOLERANCE:.0%} of the steps; {len(of.batches)} batches reached the target, "
                f"n = {len(of.steps)}; a small p tells the fit from the means of seeds{_edges(rows, phase)}",
            )
            yield _critical(of, whole.batches, phase, setting)
        yield _minimum(whole, setting)


def _critical(of: Curve, batches: np.ndarray, phase: str, setting: str) -> Verdict:
    """Within the measured batches, with its 95 % interval over seeds."""
    form, factor = FORMS[phase], 2 if FORMS[phase] == "bound" else 1
    center, low, high = (factor * math.exp(x) for x in interval(logs_of_b0(form, of)))
    N = np.exp(np.log(of.gradients).mean(0))
    name = "b* = 2Y/(eps^2-Z)" if form == "bound" else "c of a(1+c/b)"
    return verdict(
        f"a critical batch exists, {setting}",
        "yes (paper)",
        f"{name} = {center:.3g}, 95 % {low:.3g} to {high:.3g}; N({of.batches[-1]:g}) = {N[-1] / N.min():.3g} min N",
        batches[0] < low and high < batches[-1],
        f"holds if the interval lies within the batches {batches[0]:g} to {batches[-1]:g}; interval over "
        f"{len(of.steps)} seeds, each with its own fit, the tuned lr held",
    )


def _minimum(of: Curve, setting: str) -> Verdict:
    """Both ends of N(b) against its smallest mean; N of a run that did not arrive is at least what it had spent."""
    N, arrived = of.gradients, np.isfinite(of.steps)
    means = np.log(N).mean(0)
    complete = [i for i in range(len(of.batches)) if arrived[:, i].all()]
    best = min(complete, key=lambda i: means[i], default=0)
    texts, above = [], [bool(complete)]
    for end in (0, len(of.batches) - 1):
        p = p_value(np.log(N[:, end]).tolist(), np.log(N[:, best]).tolist(), paired=True)
        lost = f", {int((~arrived[:, end]).sum())} of {len(N)} not arrived" if not arrived[:, end].all() else ""
        sign = ">=" if lost else "="
        texts.append(f"N({of.batches[end]:g}) {sign} {math.exp(means[end] - means[best]):.3g} min (p = {p:.2g}{lost})")
        above.append(end != best and p < 0.05 and means[end] > means[best])
    return verdict(
        f"N(b) has a minimum between the ends, {setting}",
        "at b* (paper)",
        f"least N = {math.exp(means[best]):.3g} at b = {of.batches[best]:g}; {', '.join(texts)}",
        all(above),
        f"both ends must be above it, n = {len(N)} pairs by seed; the least of {len(of.batches)} means flatters itself",
    )


def _effects(rows: Sequence[Row]) -> Iterator[Verdict]:
    """Ratios of critical batches: decay, Nesterov, beta, AdamW."""
    published = "qualitative in lambda, no number (paper)"
    for phase, setting in SETTINGS.items():
        logs = {v.name: _logs(rows, phase, v.name) for v in VARIANTS}
        four = [logs[n] for n in (MUON, NO_DECAY, NO_NESTEROV, NEITHER)]
        if _alike(*four):
            both, nesterov, decay, neither = (np.array(one) for one in four)
            effect = (both + decay - nesterov - neither) / 2
            yield _ratio(f"decay moves the critical batch, {setting}", published, effect, phase)
            effect = (both + nesterov - decay - neither) / 2
            yield _ratio(f"Nesterov moves the critical batch, {setting}", "no number (paper)", effect, phase)
        elif _alike(logs[MUON], logs[NO_DECAY]):
            effect = np.array(logs[MUON]) - np.array(logs[NO_DECAY])
            yield _ratio(f"decay moves the critical batch, {setting}", published, effect, phase)
        if _alike(logs[LOW_BETA], logs[NEITHER]):
            effect = np.array(logs[LOW_BETA]) - np.array(logs[NEITHER])
            text = "Y ~ (1 - beta): larger, at one lr 4 times (inferred)"
            yield _ratio(f"beta 0.8 against 0.95, {setting}", text, effect, phase, above=True)
        if _alike(logs[ADAMW], logs[MUON]):
            effect = np.array(logs[MUON]) - np.array(logs[ADAMW])
            yield _ratio(f"Muon's critical batch over AdamW's, {setting}", "larger (from memory)", effect, phase, above=True)


def _alike(*logs: Sequence[float]) -> bool:
    """Whether all were measured, on as many seeds."""
    return all(logs) and len({len(one) for one in logs}) == 1


def _ratio(quantity: str, published: str, effect: np.ndarray, phase: str, above: bool = False) -> Verdict:
    center, low, high = (math.exp(x) for x in interval(effect.tolist()))
    p = p_value(effect.tolist(), [0.0] * len(effect), paired=True)
    form = "2Y/(eps^2-Z)" if FORMS[phase] == "bound" else "c"
    seen = p < 0.05 and (center > 1 or not above)
    return verdict(
        quantity,
        published,
        f"ratio of {form} {center:.3g}, 95 % {low:.3g} to {high:.3g}",
        seen,
        f"n = {len(effect)} pairs by seed, p = {p:.2g}{'' if p < 0.05 else ': no difference seen'}; "
        "the lr is tuned on other seeds",
    )


def _logs(rows: Sequence[Row], phase: str, name: str) -> list[float]:
    of = curve(rows, phase, name)
    if of is None or len(of.arrived.batches) < 4:
        return []
    return logs_of_b0(FORMS[phase], of.arrived)


def _edges(rows: Sequence[Row], phase: str) -> str:
    """Which tuned lr lie on the edge of their grid."""
    if phase != "tuned":
        return ""
    grid = [r["lr"] for r in rows if r.get("phase") in ("tune", "tuned")]
    on_edge: dict[str, set[int]] = {}
    for r in rows:
        if r.get("phase") == "tuned" and r["lr"] in (min(grid), max(grid)):
            on_edge.setdefault(r["optimizer"], set()).add(r["batch"])
    found = "; ".join(f"{name} at {', '.join(map(str, sorted(batches)))}" for name, batches in on_edge.items())
    return f". Best lr on the edge of the grid: {found or 'none'}"


def _bounds(rows: Sequence[Row]) -> Iterator[Verdict]:
    """max ||W_t||_op over max(||W_0||_op, c / lambda) during training, by lr x lambda."""
    found: dict[float, list[Row]] = {}
    for row in rows:
        if row.get("phase") == "bound":
            found.setdefault(row["product"], []).append(row)
    inside = {product: [r["settled"] for r in those] for product, those in found.items() if 0 < product <= 1}
    if inside:
        texts = [f"lr lambda {product:g}: {summary(values, 3)}" for product, values in inside.items()]
        largest = max(r["largest"] for product in inside for r in found[product])
        yield verdict(
            "||W||_op over c/lambda once settled, lr <= 1/lambda",
            "bounded (paper); 1 for exact msign",
            "; ".join(texts),
            max(max(values) for values in inside.values()) <= SLACK and largest <= SLACK,
            f"at most {SLACK}, the polynomial's overshoot; the second half of a run, all matrices and seeds. Over "
            f"max(||W_0||_op, c/lambda) from the first step on: {largest:.3g}",
        )
    if 0.0 in found:
        growth = [r["growth"] for r in found[0.0]]
        yield verdict(
            "without decay ||W|| grows on",
            "no bound (paper)",
            f"||W|| at the end over halfway {summary(growth, 3)}",
            len(growth) > 1 and p_value(growth, [1.0] * len(growth), paired=True) < 0.05 and mean(growth) > 1,
            f"more than 1, n = {len(growth)}, p = {p_value(growth, [1.0] * len(growth), paired=True):.2g}; "
            f"a finite run shows growth, not that no bound exists",
        )
    outside = {product: [r["settled"] for r in those] for product, those in found.items() if product > 1}
    if outside:
        texts = [f"lr lambda {product:g}: {summary(values, 3)}" for product, values in outside.items()]
        yield verdict(
            "||W||_op over c/lambda once settled, lr > 1/lambda",
            "lr <= 1/lambda is assumed (paper)",
            "; ".join(texts),
            all(min(values) > SLACK for values in outside.values()),
            f"holds if all exceed {SLACK}; the condition is sufficient: up to lr lambda = 2 the decay still contracts, and "
            "||W|| <= lr c / (2 - lr lambda)",
        )


def _noise(rows: Sequence[Row]) -> Iterator[Verdict]:
    """The gradient-noise scale at the target beside the critical batch."""
    found = [r for r in rows if r.get("phase") == "noise"]
    logs = _logs(rows, "tuned", MUON)
    if not found or not logs:
        return
    b_c = math.exp(mean(logs))
    simple = [r["simple"] for r in found]
    low, high = (median([r[end] for r in found]) for end in ("nuclear_low", "nuclear_high"))
    ratio = median(simple) / b_c
    yield verdict(
        "the gradient-noise scale at the target predicts c",
        "its order of magnitude, for SGD (1812.06162)",
        f"B_simple = {median(simple):.3g}, from {min(simple):.3g} to {max(simple):.3g}, in nuclear norms {low:.3g} to "
        f"{high:.3g}; c = {b_c:.3g}",
        1 / MAGNITUDE <= ratio <= MAGNITUDE,
        f"B_simple / c = {ratio:.2g}, within a factor {MAGNITUDE}; medians of {len(found)} seeds, infinite where noise "
        "drowns the gradient; B grows during a run and is taken at its end",
    )
