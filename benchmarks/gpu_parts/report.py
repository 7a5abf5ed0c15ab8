"""From records to rows, from rows to a printed table, and the targets."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from gpu_parts import contenders as who
from gpu_parts.contenders import Contender
from gpu_parts.first_step import LIMIT_SECONDS
from gpu_parts.floor import TASKS, floor, plain_flops
from gpu_parts.models import Model
from gpu_parts.turns import Record

Entry = dict[str, Any]

# Filled in where there is a time.
MEASURED = (
    "milliseconds",
    "wall_milliseconds",
    "host_milliseconds",
    "steps_per_round",
    "over_adamw",
    "over_reference",
    "over_floor_symmetric",
    "over_floor_whole",
    "effective_teraflops",
    "effective_over_peak",
    "extra_bytes",
    "max_batch_bytes",
)


def described(model: Model) -> Entry:
    """What a model is, for the JSON."""
    matrices = [{"count": count, "fan_out": m, "fan_in": n} for (m, n), count in model.matrices().items()]
    return {
        "title": model.title,
        "dtype": str(model.dtype).removeprefix("torch."),
        "tensors": len(model.shapes),
        "parameters": model.entries,
        "matrix_parameters": sum(m["count"] * m["fan_out"] * m["fan_in"] for m in matrices),
        "matrices": matrices,
    }


def floors(model: Model, ceilings: Iterable[Mapping[str, Any]], work: torch.dtype) -> Entry:
    """The best of the measured rates, and the floors they make."""
    ceilings = list(ceilings)
    peak = max(c["peak_teraflops"] for c in ceilings)
    bandwidth = max(c["copy_gigabytes_per_second"] for c in ceilings)
    found = {}
    for task in TASKS:
        least = floor(model, task, work)
        found[task] = {
            "bytes": least.bytes,
            "flops_whole": least.flops_whole,
            "flops_symmetric": least.flops_symmetric,
            "milliseconds_whole": least.milliseconds(1e9 * bandwidth, 1e12 * peak, symmetric=False),
            "milliseconds_symmetric": least.milliseconds(1e9 * bandwidth, 1e12 * peak),
        }
    rates = {"peak_teraflops": peak, "bandwidth_gigabytes_per_second": bandwidth}
    return {**rates, "plain_flops": plain_flops(model), "floors": found}


def rows(contenders: Sequence[Contender], records: Mapping[str, Record], known: Mapping[str, Any]) -> Entry:
    """`reference` and `rows`; `known` has what `floors` found."""
    names = [c.name for c in contenders]
    reference = who.TRITON if who.TRITON in names else who.EAGER
    found: dict[str, Entry] = {c.name: _row(c, records[c.name], known) for c in contenders}
    for row in found.values():
        for key, other in (("over_adamw", who.ADAMW), ("over_reference", reference)):
            below = found[other]["milliseconds"]
            if row["milliseconds"] is not None and below is not None:
                row[key] = row["milliseconds"]["median"] / below["median"]
    return {"reference": reference, "rows": found}


def _row(contender: Contender, record: Record, known: Mapping[str, Any]) -> Entry:
    row: Entry = {
        "task": contender.task,
        "ours": contender.ours,
        "peer": contender.peer,
        "note": contender.note,
        "error": record.error,
        **dict.fromkeys(MEASURED),
    }
    if record.error is not None:
        return row
    times = [t.milliseconds for t in record.times]
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    least = known["floors"][contender.task]
    row |= {
        "milliseconds": {"median": median, "low": low, "high": high, "all": times},
        "wall_milliseconds": statistics.median(t.wall for t in record.times),
        "host_milliseconds": statistics.median(t.host for t in record.times),
        "steps_per_round": record.steps,
        "over_floor_symmetric": median / least["milliseconds_symmetric"],
        "over_floor_whole": median / least["milliseconds_whole"],
        "extra_bytes": record.extra_bytes,
        "max_batch_bytes": record.max_batch_bytes,
    }
    if contender.task != "adamw":
        rate = 1e-12 * known["plain_flops"] / (1e-3 * median)
        row |= {"effective_teraflops": rate, "effective_over_peak": rate / known["peak_teraflops"]}
    return row


# -- printing ----------------------------------------------------------------------------------------------------------

COLUMNS = (
    ("median ms", 10),
    ("quartiles", 20),
    ("host ms", 9),
    ("/AdamW", 8),
    ("/ref", 7),
    ("/floor", 8),
    ("/whole", 8),
    ("TFLOP/s", 9),
    ("/peak", 7),
    ("extra MiB", 10),
    ("of MiB", 7),
)


def table(model: Mapping[str, Any], quick: bool) -> str:
    """A model's rows under a heading with what they are compared with."""
    before, after = (model["ceilings"][when] for when in ("before", "after"))
    size = f"{model['parameters'] / 1e6:.4g} M parameters in {model['dtype']}, {model['tensors']} tensors"
    count = sum(m["count"] for m in model["matrices"])
    turns = "contenders alternate" if model["together"] else "each alone, twice"
    lines = [
        f"{model['title']}{' (narrow)' if quick else ''}: {size}, {count} matrices; {turns}",
        f"  {before['dtype']} products {before['peak_teraflops']:.4g} and after {after['peak_teraflops']:.4g} TFLOP/s, copies "
        f"{before['copy_gigabytes_per_second']:.4g} and {after['copy_gigabytes_per_second']:.4g} GB/s",
    ]
    for task, least in model["floors"].items():
        whole, symmetric = (f"{least[f'flops_{kind}'] / 1e12:.3g}" for kind in ("whole", "symmetric"))
        lines.append(
            f"  floor of {task:6} {least['milliseconds_symmetric']:.4g} ms, with whole products "
            f"{least['milliseconds_whole']:.4g} ms: {least['bytes'] / 1e9:.3g} GB, {symmetric} or {whole} TFLOP"
        )
    lines.append(f"  {'':30}" + "".join(f"{title:>{width}}" for title, width in COLUMNS))
    for name, row in model["rows"].items():
        note = f"  ({row['note']})" if row["note"] else ""
        lines.append(f"  {name:30}" + (f" {row['error']}" if row["error"] else _cells(row) + note))
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> str:
    times = row["milliseconds"]
    cells = (
        f"{times['median']:.3f}",
        f"{times['low']:.3f} - {times['high']:.3f}",
        f"{row['host_milliseconds']:.2f}",
        _number(row["over_adamw"], ".2f"),
        _number(row["over_reference"], ".2f"),
        _number(row["over_floor_symmetric"], ".2f"),
        _number(row["over_floor_whole"], ".2f"),
        _number(row["effective_teraflops"], ".3g"),
        _number(row["effective_over_peak"], ".2f"),
        _number(row["extra_bytes"] / 2**20, ".1f"),
        _number(row["max_batch_bytes"] and row["max_batch_bytes"] / 2**20, ".0f"),
    )
    return "".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, COLUMNS, strict=True))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


# -- targets -----------------------------------------------------------------------------------------------------------


def targets(models: Mapping[str, Mapping[str, Any]], first_step: Mapping[str, Any] | None) -> list[Entry]:
    """What the step is to reach on a Hopper-class GPU, held against rows of a GPU; `at_floor` is what a step that takes no
    longer than its floor would reach, all else as measured.
    """
    found: list[Entry] = []

    def add(
        target: str, contender: str, model: str, measured: float | None, sign: str, limit: float, at_floor: float | None = None
    ) -> None:
        if measured is not None:
            met = measured >= limit if sign == ">=" else measured <= limit
            told = {"target": target, "contender": contender, "model": model, "measured": measured, "at_floor": at_floor}
            found.append({**told, "limit": f"{sign} {limit:g}", "met": met})

    for contender in (who.TRITON, who.GRAPH):
        taken, torchs, adamw = (_median(models, "gpt2", name) for name in (contender, who.TORCH_MUON, who.ADAMW))
        if taken is not None and torchs is not None:
            least = torchs / _floor(models["gpt2"], "muon")
            add("times faster than torch.optim.Muon", contender, "gpt2", torchs / taken, ">=", 4, least)
        if taken is not None and adamw is not None:
            least = _floor(models["gpt2"], "muon") / adamw
            add("times fused AdamW", contender, "gpt2", taken / adamw, "<=", 2.5, least)
        taken = _median(models, "llama-1b", contender)
        if taken is not None:
            plain = 1e3 * models["llama-1b"]["plain_flops"] / (1e12 * models["llama-1b"]["peak_teraflops"])
            least = plain / _floor(models["llama-1b"], "muon")
            add("effective rate over measured peak", contender, "llama-1b", plain / taken, ">=", 1.3, least)
    for key, model in models.items():
        power, muon = _median(models, key, who.POWER), _median(models, key, who.TRITON)
        if power is not None and muon is not None:
            least = _floor(model, "power") / muon
            add("smooth map over schatten.Muon, Triton", who.POWER, key, power / muon, "<=", 1.6, least)
        for contender, row in model["rows"].items():
            if row["ours"] and row["error"] is None and row["extra_bytes"] is not None:
                share = row["extra_bytes"] / row["max_batch_bytes"]
                add("extra memory over max_batch_bytes", contender, key, share, "<=", 1)
    if first_step is not None:
        for cache in ("cold", "warm"):
            seconds = first_step[cache]["first_seconds"]
            add(f"seconds of the first step, caches {cache}", who.TRITON, first_step["model"], seconds, "<=", LIMIT_SECONDS)
    return found


def _median(models: Mapping[str, Mapping[str, Any]], key: str, contender: str) -> float | None:
    times = models[key]["rows"].get(contender, {}).get("milliseconds") if key in models else None
    return None if times is None else times["median"]


def _floor(model: Mapping[str, Any], task: str) -> float:
    return model["floors"][task]["milliseconds_symmetric"]


def verdicts(found: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(
        f"  {'met   ' if t['met'] else 'missed'} {t['model']:9} {t['contender']:28} {t['target']}: "
        f"{t['measured']:.3g} ({t['limit']}{_at_floor(t['at_floor'])})"
        for t in found
    )


def _at_floor(value: float | None) -> str:
    return "" if value is None else f"; at the floor {value:.3g}"
