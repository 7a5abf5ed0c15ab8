"""The rows beside what was published: training to a loss, perplexity, memory and inference."""

import math
from collections.abc import Sequence

from schatten.lab.experiment import OUT_OF_REACH, Verdict, verdict
from schatten.lab.experiments.latent_attention_moe.spaces import at_ends
from schatten.lab.ledger import Row
from schatten.lab.statistics import compared, mean, p_value, summary

# The paper's smallest decoder: below it, its numbers are not ours to reproduce.
PUBLISHED_SIZE = 30e6

# Significance of an ordering.
LEVEL = 0.05

# A number counts as the published one within so much of it, the width of the published ranges and of ours over seeds.
TOLERANCE = 0.1


def check(rows: Sequence[Row]) -> list[Verdict]:
    """A verdict for each published number and, at our size, for each ordering behind it."""
    found = [*_training(rows), *_perplexity(rows), *_memory(rows), *_inference(rows)]
    return [v for v in found if v is not None]


def finals(rows: Sequence[Row], model: str, optimizer: str) -> list[Row]:
    """The runs at the best setting, in the order of their seeds."""
    chosen = [r for r in rows if (r.get("model"), r.get("phase"), r.get("optimizer")) == (model, "final", optimizer)]
    return sorted(chosen, key=lambda row: row["seed"])


def costs(rows: Sequence[Row], model: str, optimizer: str) -> Row | None:
    """What a step of the pair costs."""
    return next((r for r in rows if (r.get("model"), r.get("phase"), r.get("optimizer")) == (model, "cost", optimizer)), None)


def shares(rows: Sequence[Row]) -> list[float]:
    """Of every seed, the share of AdamW's steps after which Muon has AdamW's final loss.

    Between two schedules it lies on the line through their losses; below the shortest it is not sought, so that a share is
    rather too large. inf where Muon never arrives.
    """
    adamw, muon = finals(rows, "latent-moe", "adamw"), finals(rows, "latent-moe", "muon")
    found = []
    for target, whole in zip(adamw, muon, strict=False):
        seed = whole["seed"]
        shorter = [(r["horizon"], r["loss"]) for r in rows if r.get("phase") == "horizon" and r.get("seed") == seed]
        found.append(crossing(sorted([*shorter, (1.0, whole["loss"])]), target["loss"]))
    return found


def crossing(curve: Sequence[tuple[float, float]], target: float) -> float:
    """The first place of a polygon of (share, loss) where the loss is at most `target`; its first point at the earliest."""
    before: tuple[float, float] | None = None
    for share, loss in curve:
        if loss <= target:
            if before is None or not math.isfinite(before[1]):
                return share
            return before[0] + (share - before[0]) * (before[1] - target) / (before[1] - loss)
        before = (share, loss)
    return math.inf


def _training(rows: Sequence[Row]) -> list[Verdict]:
    ours = shares(rows)
    if not ours:
        return []
    usual, own = (costs(rows, "latent-moe", optimizer) for optimizer in ("adamw", "muon"))
    size = _size(rows)
    ends = at_ends([*finals(rows, "latent-moe", "adamw"), *finals(rows, "latent-moe", "muon")])
    edge = f"; at an end of its range: {', '.join(ends)}" if ends else ""
    first = min((r["horizon"] for r in rows if r.get("phase") == "horizon"), default=1.0)
    bound = f"; {first:g} was the shortest schedule" if first in ours else ""
    verdicts = [
        _number(
            rows,
            "share of AdamW's steps that Muon takes to its loss",
            "0.48-0.52 (abstract)",
            ours,
            0.5,
            f"{size}{bound}{edge}",
        ),
        _fewer("Muon takes fewer steps than AdamW to its loss", "0.48-0.52 of them", ours, f"{size}{bound}{edge}"),
    ]
    if usual is not None and own is not None:
        ratio = own["flops"] / usual["flops"]
        spent = f"{size}; a step of Muon has {ratio:.2f} times the products of AdamW's, at {_batch(rows)}"
        verdicts.append(
            _fewer("Muon takes less compute, its own included", "0.48-0.52 of it", [ratio * s for s in ours], spent)
        )
    pairs = zip(finals(rows, "latent-moe", "adamw"), finals(rows, "latent-moe", "muon"), strict=False)
    seconds = [m["seconds"] / a["seconds"] for a, m in pairs if a["seconds"] > 0]
    if len(seconds) == len(ours):
        slower = f"{size}; a step of Muon takes {mean(seconds):.2f} times as long here"
        timed = [s * share for s, share in zip(seconds, ours, strict=True)]
        verdicts.append(_fewer("Muon takes less time", "no number", timed, slower))
    return verdicts


def _perplexity(rows: Sequence[Row]) -> list[Verdict]:
    """exp of the losses' differences, seed by seed: of all three together, and of each alone."""
    losses = {(m, o): [r["loss"] for r in finals(rows, m, o)] for m in ("latent-moe", "gpt") for o in ("adamw", "muon")}
    if len({len(found) for found in losses.values()}) > 1 or not all(losses.values()):
        return []
    ours, base = losses["latent-moe", "muon"], losses["gpt", "adamw"]
    gains = [1 - math.exp(a - b) for a, b in zip(ours, base, strict=True)]
    parts = {
        "Muon alone": [1 - math.exp(a - b) for a, b in zip(losses["gpt", "muon"], base, strict=True)],
        "the model alone": [1 - math.exp(a - b) for a, b in zip(losses["latent-moe", "adamw"], base, strict=True)],
    }
    why = f"{_size(rows)}; " + ", ".join(f"{name} {mean(found):.1%}" for name, found in parts.items())
    holds = mean(gains) > 0 and p_value(ours, base, paired=True) < LEVEL
    shown = summary(gains, 3)
    quantity = "perplexity less by, latent attention + mixture + Muon against dense + AdamW"
    better = verdict("that perplexity is lower", "lower", shown, holds, f"{compared(ours, base)}, paired by seed; {why}")
    model_ours, model_base = losses["latent-moe", "muon"], losses["gpt", "muon"]
    same = [1 - math.exp(a - b) for a, b in zip(model_ours, model_base, strict=True)]
    lower = mean(same) > 0 and p_value(model_ours, model_base, paired=True) < LEVEL
    under = verdict(
        "the model's part of it, both by Muon",
        "'multiplicative gains' (abstract)",
        summary(same, 3),
        lower,
        f"{compared(model_ours, model_base)}, paired by seed; {_size(rows)}; the sparse model has as many parameters in all",
    )
    return [_number(rows, quantity, "0.08-0.12 (abstract)", gains, 0.1, _size(rows), 0.04), better, under]


def _memory(rows: Sequence[Row]) -> list[Verdict]:
    new, old = costs(rows, "latent-moe", "muon"), costs(rows, "gpt", "adamw")
    if new is None or old is None:
        return []
    saved = {name: 1 - new[name] / old[name] for name in ("cache_bytes", "state_bytes", "weight_bytes")}
    training = 1 - (new["weight_bytes"] + new["state_bytes"]) / (old["weight_bytes"] + old["state_bytes"])
    cache = verdict(
        "cache of a token smaller by, latent against full attention",
        "0.68 less memory, not said which (abstract)",
        f"{saved['cache_bytes']:.2f}: {new['cache_bytes']:.0f} and {old['cache_bytes']:.0f} bytes",
        saved["cache_bytes"] > 0,
        "smaller is what is judged; how much is arithmetic of the sizes chosen, latent + rotary against 2 x width",
    )
    state = verdict(
        "weights and optimizer state smaller by, with Muon against AdamW",
        "0.68 less memory, not said which (abstract)",
        f"{training:.2f}: {_bytes(new)} and {_bytes(old)}",
        training > 0,
        f"smaller is what is judged; weights {saved['weight_bytes']:+.2f}, state {saved['state_bytes']:+.2f}: Muon keeps one "
        f"number per weight where AdamW keeps two, and tables keep AdamW's; with gradients, and without activations",
    )
    return [cache, state]


def _inference(rows: Sequence[Row]) -> list[Verdict]:
    new, old = ([r["seconds"] for r in rows if r.get("phase") == "decode" and r["model"] == m] for m in ("latent-moe", "gpt"))
    if not new or len(new) != len(old):
        return []
    ratios = [b / a for a, b in zip(new, old, strict=True)]
    config = rows[0]["run"]["config"] if "run" in rows[0] else {}
    where = f"{_size(rows)}, {config.get('batch', '?')} texts of {config.get('decode', '?')} tokens; n are rounds of timing"
    holds = mean(ratios) > 1 and p_value(new, old, paired=True) < LEVEL
    return [
        _number(rows, "a next token is faster by a factor of", "3.2 (abstract)", ratios, 3.2, where, 0.32),
        verdict("that it is faster", "faster", summary(ratios, 3), holds, f"{compared(new, old)}; {where}"),
    ]


def _fewer(quantity: str, published: str, ours: Sequence[float], why: str) -> Verdict:
    """A share is below 1, significantly."""
    whole = [1.0] * len(ours)
    holds = mean(ours) < 1 and p_value(ours, whole, paired=True) < LEVEL
    return verdict(quantity, published, summary(ours, 3), holds, f"{compared(ours, whole)} against 1; {why}")


def _number(
    rows: Sequence[Row],
    quantity: str,
    published: str,
    ours: Sequence[float],
    center: float,
    why: str,
    within: float = TOLERANCE,
) -> Verdict:
    """A published number: out of reach of models much smaller than the published."""
    parameters = max((r["parameters"] for r in rows if r.get("phase") == "cost"), default=0)
    if parameters < PUBLISHED_SIZE:
        return Verdict(quantity, published, summary(ours, 3), OUT_OF_REACH, f"published at 30 to 200M parameters, here {why}")
    return verdict(quantity, published, summary(ours, 3), abs(mean(ours) - center) <= within, f"tolerance {within:g}; {why}")


def _size(rows: Sequence[Row]) -> str:
    parameters = next((r["parameters"] for r in rows if r.get("phase") == "cost"), None)
    return "size unknown" if parameters is None else f"at {parameters / 1e6:.2g}M parameters"


def _batch(rows: Sequence[Row]) -> str:
    config = rows[0]["run"]["config"] if rows and "run" in rows[0] else {}
    return f"{config['batch'] * config['context']} tokens a step" if {"batch", "context"} <= set(config) else "this batch"


def _bytes(row: Row) -> str:
    return f"{(row['weight_bytes'] + row['state_bytes']) / 1e6:.3g} MB"
