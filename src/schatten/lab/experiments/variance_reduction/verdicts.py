"""What the rows of variance_reduction say of the published rates and orderings."""

import math
from collections.abc import Sequence

from schatten.lab.experiment import OUT_OF_REACH, Verdict, verdict
from schatten.lab.experiments.variance_reduction.rates import ESTIMATORS, slope
from schatten.lab.ledger import Row
from schatten.lab.statistics import compared, mean, p_value, spread, summary

SIGNIFICANT = 0.05


def of(rows: Sequence[Row], part: str, phase: str, optimizer: str) -> list[Row]:
    """The rows of one contender, by seed."""
    wanted = (part, phase, optimizer)
    found = [row for row in rows if (row.get("part"), row.get("phase"), row.get("optimizer")) == wanted]
    return sorted(found, key=lambda row: row["seed"])


def slopes(rows: Sequence[Row], optimizer: str) -> list[float]:
    """The exponent of every seed."""
    found = [slope(row["steps"], row["norms"]) for row in of(rows, "rates", "rate", optimizer)]
    return [value for value in found if math.isfinite(value)]


def check(rows: Sequence[Row]) -> list[Verdict]:
    """Rates against their bounds, then the orderings."""
    verdicts = [_rate(rows, estimator.name, estimator.bound) for estimator in ESTIMATORS if estimator.bound]
    verdicts += [_faster(rows), _floor(rows), *_images(rows), *_text(rows)]
    return [v for v in verdicts if v is not None]


def _rate(rows: Sequence[Row], name: str, bound: float) -> Verdict | None:
    """A bound from above holds unless the norm falls more slowly, by more than two standard errors."""
    found = slopes(rows, name)
    if len(found) < 2:
        return None
    error = spread(found) / math.sqrt(len(found))
    holds = mean(found) - 2 * error <= -bound
    why = (
        f"an upper bound: it holds unless the slope is above -{bound:.3g} by more than two standard errors ({error:.1g} each); "
        f"slopes of {len(found)} seeds over the last factor 32 in T on a problem of ours, {_plain(rows)}"
    )
    return verdict(
        f"exponent of the mean gradient norm, {name}", f"<= -{bound:.3g} up to logarithms (paper)", summary(found), holds, why
    )


def _plain(rows: Sequence[Row]) -> str:
    found = slopes(rows, "momentum")
    return f"where plain momentum has {summary(found, 3)}" if found else "without plain momentum's"


def _faster(rows: Sequence[Row]) -> Verdict | None:
    ours, others = slopes(rows, "MVR2"), slopes(rows, "MVR1")
    if min(len(ours), len(others)) < 2:
        return None
    p = p_value(ours, others)
    holds = mean(ours) < mean(others) and p < SIGNIFICANT
    text = f"{summary(ours, 3)} against {summary(others, 3)}"
    why = f"{compared(ours, others, paired=False)}; exponents along each one's own schedule"
    return verdict("MVR2's exponent is below MVR1's", "-1/3 against -1/4 (paper)", text, holds, why)


def _floor(rows: Sequence[Row]) -> Verdict | None:
    """The norm that the same number of gradients buys, each estimator at its best first lr."""
    names = [estimator.name for estimator in ESTIMATORS]
    final = {name: [row["norms"][-1] for row in of(rows, "rates", "final", name) if row["norms"]] for name in names}
    if min(len(final[name]) for name in ("MVR1", "MVR2")) < 2:
        return None
    holds = mean(final["MVR2"]) < mean(final["MVR1"]) and p_value(final["MVR2"], final["MVR1"]) < SIGNIFICANT
    text = ", ".join(f"{name} {summary(values, 3)}" for name, values in final.items() if values)
    edges = [name for name in names if _on_edge(rows, name)]
    why = (
        f"gradient norm after equally many gradients, {compared(final['MVR2'], final['MVR1'], paired=False)} for MVR2 against "
        f"MVR1{_edge_text(edges)}; gamma 1 with the stored gradient is no published choice"
    )
    return verdict("MVR2 ahead of MVR1 on the synthetic problem", "implied by the rates (inferred)", text, holds, why)


def _on_edge(rows: Sequence[Row], name: str) -> bool:
    tried = {row["lr"] for row in of(rows, "rates", "tune", name)}
    best = {row["lr"] for row in of(rows, "rates", "final", name)}
    return len(tried) > 1 and bool(best & {min(tried), max(tried)})


def _edge_text(edges: Sequence[str]) -> str:
    return f"; the best first lr lies on the edge of its range for {', '.join(edges)}" if edges else ""


def _images(rows: Sequence[Row]) -> list[Verdict]:
    finals = {name: of(rows, "images", "final", name) for name in ("Muon", "MVR1", "MVR2", "STORM", "MARS-M")}
    losses = {name: [row["loss"] for row in found] for name, found in finals.items()}
    muon = losses.pop("Muon")
    verdicts = []
    for name, found in losses.items():
        if not found or len(found) != len(muon):
            continue
        p = p_value(found, muon, paired=True)
        better = mean(found) < mean(muon) and p < SIGNIFICANT
        gamma = f", gamma {finals[name][0]['gamma']:g}" if "gamma" in finals[name][0] else ""
        word = "" if p < SIGNIFICANT else "no difference seen, "
        why = (
            f"{word}{compared(found, muon)}, paired by seed; equal evaluations of the gradient and equal trials, "
            f"lr {finals[name][0]['lr']:.2g}{gamma}"
        )
        ours = f"{summary(found)} against {summary(muon)}"
        verdicts.append(verdict(f"{name} ends below Muon, tuned equally", "below Muon (paper, curves)", ours, better, why))
    return verdicts


def _text(rows: Sequence[Row]) -> list[Verdict]:
    muon = [row["loss"] for row in of(rows, "text", "final", "Muon")]
    mars = [row["loss"] for row in of(rows, "text", "final", "MARS-M")]
    if not muon or len(muon) != len(mars):
        return []
    p = p_value(mars, muon, paired=True)
    better = mean(mars) < mean(muon) and p < SIGNIFICANT
    word = "" if p < SIGNIFICANT else "no difference seen, "
    ours = f"{summary(mars)} against {summary(muon)}"
    config = of(rows, "text", "final", "Muon")[0]["run"]["config"]
    scale = f"a GPT of width {config.get('width')}, {config.get('layers')} layers, {config.get('steps')} steps"
    why = f"{word}{compared(mars, muon)}, paired by seed; {scale}, at the lr best for Muon"
    published = "below Moonlight's Muon at equal hyper-parameters (official code, figures)"
    return [
        verdict("MARS-M ends below Muon at Muon's hyper-parameters", published, ours, better, why),
        Verdict("MARS-M's loss of GPT-2", "figures only", ours, OUT_OF_REACH, f"124M to 1.5B parameters; ours is {scale}"),
    ]
