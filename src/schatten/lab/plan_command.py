"""`schatten plan`: what an optimizer would do with a model, and with --simulate what a step would cost on a mesh."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from schatten import Plan, Rule
from schatten import plan as plan_of
from schatten.batching import MAX_BATCH_BYTES
from schatten.lab import zoo
from schatten.lab.errors import InputError
from schatten.lab.mesh import Mesh
from schatten.lab.optimizers import BASELINE, contestants
from schatten.lab.shares import DIRECTIONS, SENT
from schatten.lab.simulate import PYTHON, Simulation, simulate
from schatten.placements.machine import MACHINES, Machine
from schatten.presets.lion_k import reads_any_tensor


def plan(
    model: Annotated[str, typer.Option(help=f"{', '.join(zoo.MODELS)}, or your own as package.module:function.")],
    simulated: Annotated[bool, typer.Option("--simulate", help="Work out one step on --mesh, without starting it.")] = False,
    mesh: Annotated[
        str, typer.Option(help="dp=N (FSDP2), replicate=N (DDP, with dp HSDP), tp=N, ep=N (experts), comma separated.")
    ] = "dp=8",
    optimizer: Annotated[str, typer.Option(help="Any that `schatten optimizers` lists but adamw.")] = "muon",
    machine: Annotated[str, typer.Option(help=f"What a rank can do: {', '.join(MACHINES)}.")] = "h100",
    flops: Annotated[float | None, typer.Option(help="FLOP/s of a rank in products, instead of the machine's.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Bytes/s a rank sends to other nodes, likewise.")] = None,
    latency: Annotated[float | None, typer.Option(help="Seconds of an empty collective, likewise.")] = None,
    memory_bandwidth: Annotated[float | None, typer.Option(help="Bytes/s of a rank's memory, likewise.")] = None,
    max_bytes: Annotated[int, typer.Option(help="max_batch_bytes of the optimizer.")] = MAX_BATCH_BYTES,
    out: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file, too.")] = None,
) -> None:
    """Show which parameters of a model an optimizer steps as matrices, and why; with --simulate what a step costs on a mesh.

    Models are built without data, so any size fits. `docs/scaling.md` says what is counted and how far to trust it.
    """
    from schatten.lab.commands import console

    rule, others = _optimizer(optimizer)
    built = zoo.build(model)
    try:
        routes = plan_of(built, others=others, strict=False)
    except ValueError as error:
        raise InputError(str(error).splitlines()[0]) from None
    if not simulated:
        print(routes)
        _write(out, {"model": model, "optimizer": optimizer, "parameters": _rows(routes)})
        return
    ranks = _machine(machine, flops=flops, bandwidth=bandwidth, latency=latency, memory_bandwidth=memory_bandwidth)
    if max_bytes < 1:
        raise InputError(f"--max-bytes must be positive, got {max_bytes}.")
    on = Mesh.parse(mesh)
    # Where products are computed, and in which precision if the rule leaves it open.
    device, dtype = ("cpu", "float32") if machine == "cpu" else ("cuda", "bfloat16")
    step = simulate(routes, on, rule, ranks, dtype=dtype, device=device, max_bytes=max_bytes)
    show(step, f"{optimizer} on {model}, {mesh}: {step.ranks} ranks of {machine}", console())
    _write(out, {"model": model, "optimizer": optimizer, "mesh": asdict(on), "machine": asdict(ranks), **numbers(step)})


def show(step: Simulation, title: str, console: Console) -> None:
    """The table for people."""
    table = Table("", "", title=title, title_justify="left", show_header=False, highlight=False)
    share = f"{step.matrices:,} matrices; the busiest rank does {step.imbalance:.2f} times the mean"
    table.add_row("work", share + f", {step.idle_ranks} ranks do none" * (step.idle_ranks > 0))
    table.add_row("FLOPs of a rank", f"{_si(step.flops)}FLOP at most, {_si(step.mean_flops)}FLOP on average")
    table.add_row("collectives", f"{step.collectives}, for {step.buckets} bucket{'s' * (step.buckets != 1)}")
    table.add_row("bytes a rank sends", f"{_si(step.sent)}B at most")
    table.add_row("buffers of a rank", f"{_si(step.peak)}B at their peak")
    table.add_row("state of a rank", f"{_si(step.state)}B, with AdamW {_si(step.adamw_state)}B")
    table.add_section()
    for name, seconds in step.seconds.items():
        table.add_row(name, f"{1e3 * seconds:9.2f} ms")
    if step.hidden:
        table.add_row("hidden behind the others", f"{-1e3 * step.hidden:9.2f} ms")
    table.add_row("optimizer step", f"{1e3 * step.total:9.2f} ms")
    table.add_row("AdamW's", f"{1e3 * step.adamw_seconds:9.2f} ms")
    table.add_row("bottleneck", f"{step.bottleneck}{_why(step)}")
    console.print(table)


def numbers(step: Simulation) -> dict[str, Any]:
    """A simulation as JSON has it."""
    return {**asdict(step), "total": step.total, "imbalance": step.imbalance}


def _why(step: Simulation) -> str:
    if step.bottleneck == PYTHON:
        return ": the host takes longer to cut and place the pieces of matrices than devices to compute them"
    if step.bottleneck == DIRECTIONS and step.idle_ranks:
        return f": {step.matrices} matrices for {step.ranks} ranks, and a matrix is not divided"
    if step.bottleneck == SENT and step.idle_ranks:
        return f": {step.matrices} matrices for {step.ranks} ranks, so few of them send to all others"
    return ""


def _optimizer(name: str) -> tuple[Rule, str]:
    """The rule of an optimizer with its own defaults, and where it takes parameters that are no hidden matrices."""
    known = contestants()
    if name.lower() not in known:
        raise InputError(
            f"--optimizer must be one of those that `schatten optimizers` lists, got {name!r}."
            if name.lower() != BASELINE
            else "--optimizer adamw steps no matrices: its time is shown beside that of any other."
        )
    contestant = known[name.lower()]
    opt = contestant.preset([nn.Parameter(torch.zeros(2, 2))], **contestant.options)
    any_tensor = "map" in contestant.options and reads_any_tensor(contestant.options["map"])
    return opt.rule(opt.param_groups[0]), "spectral" if any_tensor else contestant.preset.others


def _machine(name: str, **rates: float | None) -> Machine:
    if name not in MACHINES:
        raise InputError(f"--machine must be one of {', '.join(MACHINES)}, got {name!r}.")
    try:
        return replace(MACHINES[name], **{key: value for key, value in rates.items() if value is not None})
    except ValueError as error:
        raise InputError(f"--{str(error).replace('_', '-')}") from None


def _rows(routes: Plan) -> list[dict[str, Any]]:
    return [{"name": e.name, "shape": e.shape, "route": e.route, "layout": str(e.layout), "reason": e.reason} for e in routes]


def _write(out: Path | None, content: Mapping[str, Any]) -> None:
    if out is None:
        return
    if out.is_dir():
        raise InputError(f"--json {out} is a folder: name a file.")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")


def _si(number: float) -> str:
    """Three digits and a prefix: 1.23 G."""
    for prefix in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} P"
