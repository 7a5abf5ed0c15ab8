"""The commands as typer sees them: options, their help, and the dataclasses they fill."""

import time
from pathlib import Path
from typing import Annotated

import typer

from schatten.lab import advise_command, lab_commands, sweep_command
from schatten.lab.config import CompareConfig
from schatten.lab.diagnose_command import diagnose
from schatten.lab.errors import InputError
from schatten.lab.lab_commands import console
from schatten.lab.plan_command import plan

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(lab_commands.app, name="lab")
app.command()(plan)
app.command()(diagnose)
app.command("advise")(advise_command.command)
app.command("sweep")(sweep_command.command)

# The same grid for every optimizer unless --lrs says otherwise.
DEFAULT_LRS = "1e-3,2e-3,4e-3,8e-3"


@app.callback()
def root() -> None:
    """Spectral optimizers: compare them on your data, plan them for your model, look into its weights and gradients."""


@app.command()
def compare(
    data: Annotated[
        str, typer.Option(help="Text or .bin file, folder (train.bin + val.bin, or *.txt), hf:NAME, or pydoc.")
    ] = "pydoc",
    tokens: Annotated[str, typer.Option(help="byte, char, or bpe:N, trained on the text.")] = "byte",
    names: Annotated[
        str,
        typer.Option("--optimizers", help="Comma separated, see --list; all-source: those of the source papers; all."),
    ] = "adamw,muon",
    show: Annotated[bool, typer.Option("--list", help="Show the optimizers, one line each, and exit.")] = False,
    lrs: Annotated[
        list[str] | None,
        typer.Option(
            help="Grid for all optimizers (1e-3,4e-3) or for one (muon=1e-3,4e-3); repeatable. `default`: the documented lr "
            f"of each. Default {DEFAULT_LRS}, with all-source and all `default`."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds 0 .. N-1 for every learning rate.")] = 1,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.")] = 300,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/compare-DATE-TIME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the comparison in --out.")] = False,
    layers: Annotated[int, typer.Option(help="Blocks of the GPT.")] = 4,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    width: Annotated[int, typer.Option(help="Width of the residual stream.")] = 128,
    context: Annotated[int, typer.Option(help="Tokens of a window.")] = 64,
    qk_norm: Annotated[bool, typer.Option("--qk-norm", help="RMS-normalise queries and keys.")] = False,
    dropout: Annotated[float, typer.Option(help="Dropout probability.")] = 0.0,
    batch: Annotated[int, typer.Option(help="Windows of a micro-batch, over all processes.")] = 12,
    accumulate: Annotated[int, typer.Option(help="Micro-batches of a step.")] = 1,
    weight_decay: Annotated[
        float | None,
        typer.Option(help="Decoupled decay of matrices and tables; default 0.1, with --lrs default that of each optimizer."),
    ] = None,
    beta1: Annotated[float, typer.Option(help="AdamW's first beta.")] = 0.9,
    beta2: Annotated[float, typer.Option(help="AdamW's second beta.")] = 0.99,
    warmup: Annotated[int | None, typer.Option(help="Steps of linear warm-up; default a twentieth of --steps.")] = None,
    schedule: Annotated[str, typer.Option(help="cosine, constant, or linear: with a cool-down over the last 40 %.")] = "cosine",
    final_lr: Annotated[float, typer.Option(help="The last learning rate as a share of the peak.")] = 0.1,
    clip: Annotated[float, typer.Option(help="Global gradient norm to clip at; 0 is off.")] = 1.0,
    mixed_precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Shard each model over the processes (FSDP2) instead of DDP.")] = False,
    eval_every: Annotated[int, typer.Option(help="Steps between validations.")] = 50,
    eval_windows: Annotated[int, typer.Option(help="Validation windows during a run.")] = 64,
    final_eval_windows: Annotated[int, typer.Option(help="Validation windows at its end.")] = 2048,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints: what a kill loses at most.")] = 200,
    trackers: Annotated[str, typer.Option(help="Trackers of accelerate, comma separated; empty for none.")] = "tensorboard",
    instruments: Annotated[
        str,
        typer.Option(help="What `schatten.Monitor` measures, for panels in the report: curvature,constraint, ... (seed 0)."),
    ] = "",
    instruments_every: Annotated[int | None, typer.Option(help="Steps between measurements; default --eval-every.")] = None,
) -> None:
    """Train one GPT with several optimizers from the same weights on the same batches, and show who learns faster.

    Leaves config.json, log.jsonl, checkpoints, TensorBoard files, report.html and its pictures in the run folder.
    Works the same under `accelerate launch -m schatten compare ...` and torchrun, by DDP or with --fsdp.
    """
    from schatten.lab.optimizers import named

    if show:
        optimizers()
        return
    chosen = named(names)
    if lrs is None:
        lrs = ["default" if names.strip().lower().startswith("all") else DEFAULT_LRS]
    if weight_decay is None and "default" not in lrs:
        weight_decay = 0.1
    config = CompareConfig(
        data=data,
        tokens=tokens,
        optimizers=chosen,
        lrs=grids(lrs, chosen),
        seeds=seeds,
        steps=steps,
        layers=layers,
        heads=heads,
        width=width,
        context=context,
        qk_norm=qk_norm,
        dropout=dropout,
        batch=batch,
        accumulate=accumulate,
        weight_decay=weight_decay,
        beta1=beta1,
        beta2=beta2,
        warmup=warmup,
        schedule=schedule,
        final_lr=final_lr,
        clip=clip,
        mixed_precision=mixed_precision,
        fsdp=fsdp,
        eval_every=eval_every,
        eval_windows=eval_windows,
        final_eval_windows=final_eval_windows,
        save_every=save_every,
        trackers=tuple(name for name in trackers.split(",") if name),
        instruments=tuple(name.strip() for name in instruments.split(",") if name.strip()),
        instruments_every=instruments_every,
    )
    from schatten.lab import compare as comparison

    folder = out or Path("runs") / time.strftime("compare-%Y%m%d-%H%M%S")
    try:
        comparison.compare(config, folder, resume=resume, console=console())
    except KeyboardInterrupt:
        typer.echo(f"interrupted: the same command with --out {folder} --resume continues from the last save", err=True)
        raise


@app.command()
def optimizers() -> None:
    """List the optimizers that `compare` knows, one line each."""
    from schatten.lab.optimizers import known

    for name, summary in known().items():
        console().print(f"{name:16} {summary}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write report.html and its pictures anew from the files of a run folder."""
    from schatten.lab.report import write_report

    if not (folder / "config.json").exists():
        raise InputError(f"{folder} is no run folder: it has no config.json.")
    console().print(f"report: {write_report(folder)}")


def grids(entries: list[str], names: tuple[str, ...]) -> dict[str, tuple[float, ...]]:
    """`--lrs` as a grid per optimizer: an entry without a name is everybody's, one with a name replaces it there."""
    from schatten.lab.optimizers import default_lr

    found: dict[str, tuple[float, ...]] = {}
    for entry in sorted(entries, key=lambda entry: "=" in entry):
        name, separator, numbers = entry.rpartition("=")
        if numbers.strip() == "default":
            for key in (name,) if separator else names:
                found[key] = (default_lr(key),)
            continue
        try:
            grid = tuple(dict.fromkeys(float(number) for number in numbers.split(",") if number.strip()))
        except ValueError:
            raise InputError(f"--lrs takes numbers such as 1e-3,4e-3 or muon=1e-3,4e-3, got {entry!r}.") from None
        for key in (name,) if separator else names:
            found[key] = grid
    return found
