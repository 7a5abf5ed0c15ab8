"""The verdicts: every published number, which is out of reach at a small scale, and every published ordering, which is not."""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from scipy import stats

from schatten.lab.experiment import OUT_OF_REACH, Verdict, verdict
from schatten.lab.experiments.spectral_powers import variants
from schatten.lab.experiments.spectral_powers.published import (
    ADAM,
    BEST,
    BEST_LR,
    LOSSES,
    MSGD,
    NOISE,
    POWERS,
    SMALL,
    STEP_SECONDS,
    name,
    ranked,
)
from schatten.lab.experiments.spectral_powers.reading import Key, by_variant, tuned, whole_grids
from schatten.lab.ledger import Row
from schatten.lab.statistics import compared, mean, p_value, summary

LEVEL = 0.05

# A share of the best loss: about the distance of neighbours on the small grids, and what the published ones resolve.
WIDTH_TOLERANCE, PUBLISHED_TOLERANCE = 0.05, 0.01

MUON, ADAM_1, ADAM_Z, ADAM_S, SGD = (MSGD, 0.0), (ADAM, 1.0), (ADAM, 0.0), (ADAM, 0.5), (MSGD, 1.0)

# Whose whole grid is run on more than one seed.
WIDTHS = (MUON, SGD)


def check(rows: Sequence[Row]) -> list[Verdict]:
    """Numbers of every variant that was run, then the orderings whose variants all were."""
    finals = by_variant(rows, "final")
    if not finals:
        return []
    config = rows[0]["run"]["config"]
    losses = {key: [row["score"] for row in own] for key, own in finals.items()}
    best_lr = {key: own[0]["lr"] for key, own in finals.items()}
    edges = _edges(rows, best_lr)
    scale = f"at {_parameters(config) / 1e6:.2g}M parameters and {config['steps']} steps"
    found = [*_numbers(losses, best_lr, edges, config), *_orders(losses, scale)]
    family = {f: {p: losses[f, p] for p in POWERS if (f, p) in losses} for f in (MSGD, ADAM)}
    if all(len(own) == len(POWERS) for own in family.values()):
        found += [_spread(rows, family, scale), _best_lr(best_lr, edges, scale), _best_overall(losses, scale)]
    if {MUON, ADAM_1} <= losses.keys():
        found += _muon_against_adam(losses, scale)
    if {MUON, ADAM_1, ADAM_Z} <= losses.keys():
        found.append(_no_better(losses, scale))
    found += [*_stability(rows, scale), *_widths(rows, scale), *_seconds(rows, scale)]
    return found


def _edges(rows: Sequence[Row], best_lr: Mapping[Key, float]) -> list[str]:
    grids = tuned(rows)
    at_edge = [key for key, lr in best_lr.items() if key in grids and lr in (min(grids[key]), max(grids[key]))]
    return [name(*key) for key in at_edge]


def _parameters(config: Mapping[str, int]) -> int:
    """Weights of the blocks and the embeddings; the vocabulary of bytes where none is given."""
    layers, width = config["layers"], config["width"]
    return 12 * layers * width**2 + ((config["vocabulary"] or 256) + config["context"]) * width


def _published_size(config: Mapping[str, int]) -> bool:
    return _parameters(config) > 1.2e8 and config["steps"] * config["batch"] * config["context"] > 9e10


def _numbers(losses, best_lr: Mapping[Key, float], edges: Sequence[str], config: Mapping[str, int]) -> list[Verdict]:
    found = []
    for key, best in BEST.items():
        if key not in losses:
            continue
        text = f"{best} at lr {BEST_LR[key]:g}"
        ours = f"{summary(losses[key])} at lr {best_lr[key]:g}"
        quantity = f"best validation loss, {name(*key)} (p = {key[1]:g}), GPT-2 124M"
        edge = "; the best lr lies on the edge of its grid" if name(*key) in edges else ""
        if _published_size(config):
            why = f"within {NOISE}, by which neighbouring lr's differ without a trend; the published run is one seed{edge}"
            found.append(verdict(quantity, text, ours, abs(mean(losses[key]) - best) <= NOISE, why))
        else:
            why = f"124M parameters and 98.3 billion tokens need --full on a GPU; ours is another model and text{edge}"
            found.append(Verdict(quantity, text, ours, OUT_OF_REACH, why))
    return found


def _orders(losses: Mapping[Key, Sequence[float]], scale: str) -> list[Verdict]:
    """The order of the eight as a whole, against the paper's and the independent run's."""
    ours = {key: mean(own) for key, own in losses.items() if key in BEST}
    if len(ours) < len(BEST):
        return []
    found = []
    for title, theirs in (("124M parameters", BEST), ("0.8M parameters, independent, second-hand", SMALL)):
        # The published runs have no p-value; this one is that of a chance order of ours.
        rho = p = math.nan
        if len(set(ours.values())) > 1:
            result: Any = stats.spearmanr([ours[key] for key in theirs], list(theirs.values()))
            rho, p = float(result.statistic), float(result.pvalue)
        why = f"{scale}: Spearman's rho {rho:.2f}, n = 8 variants, p = {p:.2g}; reproduced if rho > 0 and p < {LEVEL}"
        holds = rho > 0 and p < LEVEL
        found.append(verdict(f"order of the eight, {title}", _order(theirs), _order(ours), holds, why))
    return found


def _order(losses: Mapping[Key, float]) -> str:
    return " < ".join(f"{name(*key)} {losses[key]:.4g}" for key in ranked(dict(losses)))


def _spread(rows: Sequence[Row], family: Mapping[str, Mapping[float, Sequence[float]]], scale: str) -> Verdict:
    """Per seed, the worst of the four powers less the best."""
    ranges = {
        f: [max(seed) - min(seed) if all(map(math.isfinite, seed)) else math.inf for seed in zip(*own.values(), strict=False)]
        for f, own in family.items()
    }
    p = _p(ranges[ADAM], ranges[MSGD])
    theirs = {f: max(v) - min(v) for f in (ADAM, MSGD) for v in [[loss for (g, _), loss in BEST.items() if g == f]]}
    between = [f"{name(*key)} {summary([r['score'] for r in own], 3)}" for key, own in by_variant(rows, "between").items()]
    why = f"{scale}, paired by seed: {_claim(ranges[ADAM], ranges[MSGD])}"
    return verdict(
        "spread of the bests over p: less in the Adam family",
        f"{theirs[ADAM]:.3f} < {theirs[MSGD]:.3f}",
        f"Adam {summary(ranges[ADAM], 3)}, mSGD {summary(ranges[MSGD], 3)}",
        mean(ranges[ADAM]) < mean(ranges[MSGD]) and p < LEVEL,
        f"{why}{'; in between, lr interpolated, ' + ', '.join(between) if between else ''}",
    )


def _best_lr(best_lr: Mapping[Key, float], edges: Sequence[str], scale: str) -> Verdict:
    powers = (1.0, 0.5, 0.25, 0.0)
    ours = [best_lr[MSGD, p] for p in powers]
    holds = all(a > b for a, b in pairwise(ours))
    why = f"{scale}: strictly falling, one tuning seed; neighbours on a grid are as far apart as its factor"
    on_edge = [edge for edge in edges if edge.startswith(MSGD)]
    return verdict(
        "best lr of mSGD falls with p = 1, 1/2, 1/4, 0",
        ", ".join(f"{BEST_LR[MSGD, p]:g}" for p in powers),
        ", ".join(f"{lr:g}" for lr in ours),
        holds,
        f"{why}; on the edge: {', '.join(on_edge) or 'none'}",
    )


def _best_overall(losses: Mapping[Key, Sequence[float]], scale: str) -> Verdict:
    order = ranked({key: mean(own) for key, own in losses.items() if key in BEST})
    rival = order[1] if order[0] == ADAM_S else order[0]
    p = _p(losses[ADAM_S], losses[rival])
    why = f"{scale}, against {name(*rival)}: {_claim(losses[ADAM_S], losses[rival])}; theirs is 0.001 below Adam, one seed"
    ours = ", ".join(f"{name(*key)} {summary(losses[key])}" for key in (ADAM_S, rival))
    return verdict("AdamS is the best of all", "2.870", ours, order[0] == ADAM_S and p < LEVEL, why)


def _muon_against_adam(losses: Mapping[Key, Sequence[float]], scale: str) -> list[Verdict]:
    muon, adam = losses[MUON], losses[ADAM_1]
    certain = _p(muon, adam) < LEVEL
    ours = f"Adam {summary(adam)}, Muon {summary(muon)}"
    why = f"{scale}, paired by seed: {_claim(muon, adam)}"
    return [
        verdict("Adam beats Muon (124M)", "2.871 < 2.887", ours, certain and mean(adam) < mean(muon), why),
        verdict(
            "Muon beats Adam (0.8M, independent, second-hand)",
            f"{SMALL[MUON]} < {SMALL[ADAM_1]}",
            ours,
            certain and mean(muon) < mean(adam),
            f"{why}; other text, 200 steps and lr's that are not known there",
        ),
    ]


def _no_better(losses: Mapping[Key, Sequence[float]], scale: str) -> Verdict:
    """Reproduced unless both p = 0 are surely better than Adam."""
    adam = losses[ADAM_1]
    better = {key: mean(losses[key]) < mean(adam) and _p(losses[key], adam) < LEVEL for key in (ADAM_Z, MUON)}
    tests = ", ".join(f"{name(*key)} {_claim(losses[key], adam)}" for key in better)
    return verdict(
        "p = 0 does not consistently beat Adam",
        "AdamZ 2.879, Muon 2.887, Adam 2.871",
        ", ".join(f"{name(*key)} {summary(losses[key])}" for key in (ADAM_Z, MUON, ADAM_1)),
        not all(better.values()),
        f"{scale}, paired by seed against Adam: {tests}; not reproduced if both are better",
    )


def _stability(rows: Sequence[Row], scale: str) -> list[Verdict]:
    """The spikes at the best lr, paired by power and seed."""
    finals = by_variant(rows, "final")
    powers = [p for p in POWERS if {(MSGD, p), (ADAM, p)} <= finals.keys()]
    if not powers:
        return []
    ratio, momentum = ([row["spike"] for p in powers for row in finals[family, p]] for family in (ADAM, MSGD))
    grids = tuned(rows)
    lost = {f: [loss for (g, _), own in grids.items() if g == f for loss in own.values()] for f in (ADAM, MSGD)}
    counts = ", ".join(f"{f} {sum(map(math.isinf, own))} of {len(own)}" for f, own in lost.items())
    why = f"{scale}, largest rise of the training loss at the best lr, paired by p and seed: {_claim(ratio, momentum)}"
    return [
        verdict(
            "RMS-normalised input trains more stably than momentum",
            "mSGDS diverges at 0.3, mSGD spikes at 5 and 10; no Adam variant does",
            f"spikes: Adam family {summary(ratio, 3)}, mSGD family {summary(momentum, 3)}",
            mean(ratio) < mean(momentum) and _p(ratio, momentum) < LEVEL,
            f"{why}; diverged trials: {counts}",
        )
    ]


def _own(losses: dict[float, float], tolerance: float = WIDTH_TOLERANCE) -> tuple[float, bool]:
    """The width of the range about a variant's own best."""
    return variants.width(losses, (1 + tolerance) * min(losses.values()))


def _decades(found: Sequence[tuple[float, bool]]) -> list[float]:
    return [math.log10(factor) for factor, _ in found]


def _widths(rows: Sequence[Row], scale: str) -> list[Verdict]:
    grids = {key: whole_grids(rows, key) for key in WIDTHS}
    if not all(grids.values()):
        return []
    found = {key: [_own(losses) for losses in own] for key, own in grids.items()}
    muon, sgd = (_decades(found[key]) for key in (MUON, SGD))
    # A variant that learns little has much room about its best: one level for both tells how much of it is of use.
    pairs = list(zip(grids[MUON], grids[SGD], strict=False))
    level = [(1 + WIDTH_TOLERANCE) * min(losses.values()) for _, losses in pairs]
    both = [_decades([variants.width(pair[k], bound) for pair, bound in zip(pairs, level, strict=True)]) for k in (0, 1)]
    theirs = {key: _own(LOSSES[key], PUBLISHED_TOLERANCE) for key in LOSSES if key[0] == MSGD}
    others = {key: _own(losses) for key, losses in tuned(rows).items() if key not in WIDTHS}
    why = (
        f"{scale}, decades of lr within {WIDTH_TOLERANCE:.0%} of each's best, paired by seed: {_claim(muon, sgd)}; at the "
        f"level of mSGD's best + {WIDTH_TOLERANCE:.0%} for both: mSGDZ {summary(both[0], 3)}, mSGD {summary(both[1], 3)}, "
        f"{_claim(*both)}; on the tuning seed {_factors(others)}. Theirs, within {PUBLISHED_TOLERANCE:.0%}, end with the grids"
    )
    at_least = any(open_ for own in found.values() for _, open_ in own)
    return [
        verdict(
            "orthogonalisation widens the usable lr range on momentum",
            f"said of most rates; their grids show {_factors(theirs)}",
            f"decades: mSGDZ {summary(muon, 3)}, mSGD {summary(sgd, 3)}{'; some end with the grid' if at_least else ''}",
            mean(muon) > mean(sgd) and _p(muon, sgd) < LEVEL,
            why,
        )
    ]


def _p(ours: Sequence[float], others: Sequence[float]) -> float:
    """Paired as far as both were run: a run that is going on may have one grid more of a variant."""
    count = min(len(ours), len(others))
    return p_value(ours[:count], others[:count], paired=True)


def _claim(ours: Sequence[float], others: Sequence[float]) -> str:
    count = min(len(ours), len(others))
    return compared(ours[:count], others[:count])


def _factors(found: Mapping[Key, tuple[float, bool]]) -> str:
    return ", ".join(f"{name(*key)} {'>= ' if open_ else ''}{factor:.2g}x" for key, (factor, open_) in found.items())


def _seconds(rows: Sequence[Row], scale: str) -> list[Verdict]:
    finals = by_variant(rows, "final")
    if not {MUON, ADAM_1} <= finals.keys():
        return []
    # Shares of a run bear a machine that is busy with other things; both have the same forward and backward pass.
    muon, adam = (statistics.median(row["optimizer_seconds"] / row["seconds"] for row in finals[key]) for key in (MUON, ADAM_1))
    theirs = STEP_SECONDS["Muon"] / STEP_SECONDS["Adam"]
    return [
        Verdict(
            "time of a Muon step over Adam's, 124M on one CPU thread (second-hand)",
            f"{STEP_SECONDS['Muon']} s / {STEP_SECONDS['Adam']:g} s = {theirs:.0f}",
            f"{(1 - adam) / (1 - muon):.1f} (the optimizer takes {muon:.0%} of a step, Adam {adam:.0%})",
            OUT_OF_REACH,
            f"{scale} a step is another mix of products; theirs has 45 products of 50304 x 768 for the embedding",
        )
    ]
