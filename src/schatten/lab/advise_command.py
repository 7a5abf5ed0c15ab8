"""`schatten advise`: what a few gradients of your own model say about orthogonalising its matrices."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from schatten.lab import advise_inputs, data, zoo
from schatten.lab.advice import Advised
from schatten.lab.advise import advise
from schatten.lab.errors import InputError, named
from schatten.lab.jackknife import FEWEST, Interval

# What the table needs in a file or a pipe.
WIDE = 160


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help=f"gpt, {', '.join(zoo.MODELS)}, or your own as package.module:function.")
    ],
    batches: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A text file, folder, hf:NAME or pydoc for language models; or package.module:function, which returns "
            "batches, or functions of the model that return a loss.",
        ),
    ],
    loss: Annotated[
        str | None, typer.Option(help="package.module:function(model, batch) -> loss; default model(batch), or its .loss.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights to load: safetensors, or torch.save's.")] = None,
    count: Annotated[int, typer.Option("--batches", help="Gradient batches; each pair is one independent draw.")] = 16,
    size: Annotated[int, typer.Option("--batch", help="Windows of a batch of text: as many as training will have.")] = 12,
    context: Annotated[int, typer.Option(help="Tokens of a window.")] = 64,
    tokens: Annotated[str, typer.Option(help="byte, char, or bpe:N, trained on the text.")] = "byte",
    only: Annotated[str, typer.Option(help="Glob of parameter names to look at.")] = "*",
    radius: Annotated[
        float | None, typer.Option(help="Spectral norm that weight decay should allow; default each weight's present one.")
    ] = None,
    iterations: Annotated[int, typer.Option(help="Lanczos steps for L, a Hessian-vector product each.")] = 8,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default the accelerator, if there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Of the initial weights.")] = 0,
    out: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file, too.")] = None,
) -> None:
    """Say for each matrix of a model whether to orthogonalise, by which power, how far to step and how much to decay.

    Reads a few batches and changes nothing. What it says is local: of the loss near these weights, and of batches of this
    size. `docs/advise.md` says how it is measured and how far to trust it.
    """
    from schatten.lab.commands import console

    for option, value, least in (("--batch", size, 1), ("--context", context, 1), ("--iterations", iterations, 1)):
        if value < least:
            raise InputError(f"{option} must be at least {least}, got {value}.")
    if count < 2 * FEWEST or count % 2:
        raise InputError(f"--batches must be an even number of at least {2 * FEWEST}, got {count}.")
    if radius is not None and not radius > 0:
        raise InputError(f"--radius must be positive, got {radius:g}.")
    if out is not None and out.is_dir():
        raise InputError(f"--json {out} is a folder: name a file.")
    where = _device(device)
    torch.manual_seed(seed)
    own = advise_inputs.is_own_data(batches)
    with named("DATA"):
        corpus = None if own else data.load(batches, tokens, context)
    if own and model == advise_inputs.DEMO:
        raise InputError(f"MODEL {model} reads text: give a text as DATA, or a model of your own.")
    if loss is not None and not own:
        raise InputError("--loss goes with DATA as package.module:function; of a text the loss is the model's.")
    network = advise_inputs.build(model, corpus.vocabulary if corpus else 0, context)
    if checkpoint is not None:
        advise_inputs.load_weights(network, checkpoint)
    network.to(where)
    if corpus is not None:
        losses = advise_inputs.text_losses(network, corpus, context, size, count, where)
    else:
        evaluate = advise_inputs.imported(loss, "--loss") if loss is not None else None
        losses = advise_inputs.own_losses(network, batches, count, evaluate, where)
    screen = console()
    if not screen.is_terminal:
        screen = Console(width=WIDE)
    try:
        with Progress(console=screen, disable=not screen.is_terminal, transient=True) as bars:
            task = bars.add_task("pairs of batches", total=count // 2)
            found = advise(
                network,
                losses,
                only=only,
                radius=radius,
                iterations=iterations,
                progress=lambda done, of: bars.update(task, completed=done),
            )
    except (ValueError, TypeError) as error:
        raise InputError(str(error).splitlines()[0]) from None
    show(found, f"{model} on {batches}: {found.draws} pairs of batches", radius, screen)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(_plain(asdict(found)), indent=1) + "\n")


def show(found: Advised, title: str, radius: float | None, console: Console) -> None:
    """The table for people and the lines for the whole model."""
    table = Table(title=title, title_justify="left", highlight=False, box=box.SIMPLE_HEAD, padding=(0, 1))
    left = ("matrix", "orthogonalise", "best p")
    for column in ("matrix", "shape", "orthogonalise", "gain / best G", "gain / sure G", "best p", "lr", "norm", "decay"):
        table.add_column(column, justify="left" if column in left else "right", overflow="fold")
    for row in found:
        table.add_row(
            row.name.removesuffix(".weight"),
            f"{row.shape[0]}x{row.shape[1]}",
            row.verdict,
            _within(row.best),
            _within(row.safe),
            _powers(row.power, row.contenders),
            _within(row.lr),
            f"{row.norm:.3g}",
            f"{row.weight_decay:.2g}",
        )
    console.print(table)
    for line in lines(found, radius):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def lines(found: Advised, radius: float | None) -> list[str]:
    """What is said of the model as a whole."""
    verdicts = [row.verdict for row in found]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
    told = [f"orthogonalise: {counts}, of {len(found)} matrices"]
    if found.joint is None:
        told.append("lr: no best step, since slope or curvature of all matrices together is not clearly positive")
    else:
        alone = f"; {found.alone:.2g} is the median for each matrix alone" if found.alone is not None else ""
        told.append(f"best step of all matrices together: lr {_within(found.joint)}{alone}")
        tried = "; ".join(f"{t.lr:.2g}: {_change(t.change)} (predicted {t.predicted:+.2g})" for t in found.trials)
        told.append(f"change of the loss on other batches at lr {tried}")
        none = "none, since no trial clearly lowered the loss"
        told.append(f"starting lr: {none if found.lr is None else f'{found.lr:.2g}'}")
    held = "the present spectral norms" if radius is None else f"a spectral norm of {radius:g}"
    told.append(f"weight decay up to {found.weight_decay:.2g} allows every matrix {held}")
    if found.noise is None:
        told.append("gradient noise: the gradient is not told from 0 by these batches")
    else:
        told.append(f"gradient noise scale: {max(found.noise, 0):.2g} of these batches; a smaller batch is mostly noise")
    return told


def _within(x: Interval | None) -> str:
    return "-" if x is None else f"{x.value:.2g} ({x.low:.2g} to {x.high:.2g})"


def _powers(power: float | None, contenders: tuple[float, ...]) -> str:
    if power is None:
        return "undecided"
    others = ", ".join(f"{p:g}" for p in contenders if p != power)
    return f"{power:g}" + f" or {others}" * bool(others)


def _plain(value: Any) -> Any:
    """JSON values: powers as text, what is not finite as null."""
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    if isinstance(value, dict):
        return {f"{key:g}" if isinstance(key, float) else key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _change(x: Interval) -> str:
    return f"{x.value:+.3g} +- {(x.high - x.low) / 2:.1g}" if math.isfinite(x.value) else "not finite"


def _device(name: str | None) -> torch.device:
    if name is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device
