"""GPT-2 trained by schatten.Muon, by torch.optim.Muon + AdamW and by AdamW: speed, loss at equal tokens, memory.

    python benchmarks/train_gpt2.py [--data TOKENS] [--steps N] [--batch B] [--context C] [--accumulate K] [--minutes M]
        [--optimizers schatten.Muon,torch.optim.Muon+AdamW,AdamW] [--compile | --no-compile] [--dtype bf16] [--out FILE.json]

Each optimizer trains the same initial weights on the same tokens in the same order, in one process, one after another. On a
GPU the model is GPT-2 124M (12 layers, 12 heads, width 768, 50,304 rows of the tied table, no biases), compiled, under bf16
autocast with fp32 weights; on a CPU a tiny one (2 layers, width 64, context 64), neither compiled nor in bf16 unless asked.
`--data` is what `schatten compare` reads: a token file of nanoGPT (uint16) or a folder with train.bin and val.bin, a text
file or a folder of such (their tokens by `--tokens`), by default the English texts of the standard library as bytes. Those
are 0.4 million tokens, which GPT-2 reads seven times in 40 steps: its speed may be told from them, its loss needs more.

Learning rates are one number for all, AdamW's: 6e-4 for GPT-2 (nanoGPT's) and 1e-2 for the tiny model (near AdamW's best over
its few steps); decay 0.1 on matrices and tables, betas 0.9 and 0.95. One number will do because schatten.Muon's default scale
"adamw-rms" and torch's adjust_lr_fn="match_rms_adamw" are the same factor 0.2 sqrt(max(fan_out, fan_in)), which gives a Muon
update the size of AdamW's. `--lr`, `--lr-schatten`, `--lr-torch` and `--lr-adamw` set others.

First the model is compiled by one forward and backward pass, which belongs to no optimizer. Then each optimizer takes a few
steps that are thrown away: they bring what only a first step costs (kernels that are compiled and tuned), tell how long a step
takes, and with `--minutes` how many steps all of them can do, which is then the number for each. Then each trains. Times are
between CUDA events that are read at the end, on a CPU of the clock; a step is from its batch to the end of the optimizer's
work. Where neither --batch nor --accumulate is given and the memory does not suffice, the batch is halved and accumulated.

Speeds are over the second half of the steps: `quartiles` below are [lower quartile, median, upper quartile]. The JSON file
(benchmarks/results/train_gpt2.json, on a CPU train_gpt2_cpu.json) is an object with

    benchmark        "train_gpt2"
    device           "cpu", or the GPU's name
    versions         python, torch, schatten, and cuda and triton or null; `torch`, `threads`, `cores`, `machine`, `commit`
                     and `working_dtype`, of schatten's solvers on the device, stand beside it
    kernels          "triton", or "eager (why)": what schatten.Muon's products run on
    model            size, parameters, vocabulary, layers, heads, width, context
    data             source, vocabulary, train_tokens, validation_tokens, fingerprint
    settings         steps, batch, accumulate, context, tokens_per_step, dtype ("bf16" or "fp32"), compiled (true or false),
                     schedule, warmup (steps), weight_decay, clip, seed, minutes (or null)
    first_pass_s     seconds of the first forward and backward pass, in which torch.compile works
    optimizers       name -> object with
        lr                      the peak
        parameters              route -> numbers in it: "spectral", "adamw"
        tokens_per_second       quartiles
        step_ms, optimizer_ms   quartiles, of a whole step and of the optimizer's part of it
        optimizer_share         quartiles of optimizer_ms / step_ms, between 0 and 1
        first_step_s            wall-clock seconds of its very first step, forward and backward included
        first_optimizer_step_s  of these the optimizer's
        tokens                  how many it has seen in all
        train_loss              of every step, nats; null where it is not finite
        validation              pairs [tokens, loss], from [0, loss of the initial weights] on; null likewise
        validation_loss         the last of them
        peak_bytes              the most that torch.cuda has allocated in the run; null on a CPU
        state_bytes             what the optimizer keeps between steps
        seconds                 of the whole run, evaluations included

Wrong input ends with one line on standard error and exit code 2.
"""

import argparse
import gc
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import common  # noqa: E402
from benchmarks.train_gpt2_parts.report import described, headline, table  # noqa: E402
from benchmarks.train_gpt2_parts.settings import DTYPES, OPTIMIZERS, SIZES, Settings, settings  # noqa: E402
from benchmarks.train_gpt2_parts.training import Rehearsal, Trainer, affordable  # noqa: E402
from schatten.lab.data import EMBEDDED, Corpus, load  # noqa: E402
from schatten.lab.errors import InputError  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"

# The fewest steps that --minutes may leave of more.
FEWEST = 10

# Of the time that is left, so that --minutes is kept though steps vary.
RESERVE = 0.95


class Parser(argparse.ArgumentParser):
    """One whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def parser() -> Parser:
    found = Parser(prog="train_gpt2.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--data", default=EMBEDDED, help="token file, text file, folder of either, hf:NAME, or pydoc")
    found.add_argument("--tokens", default="byte", help="of a text: byte, char or bpe:N")
    found.add_argument("--size", choices=SIZES, help="default gpt2 on a GPU, tiny on a CPU")
    found.add_argument("--device", choices=("cuda", "cpu"), help="default cuda where there is one")
    found.add_argument("--steps", type=int, help="of each optimizer")
    found.add_argument("--batch", type=int, help="windows of a micro-batch")
    found.add_argument("--context", type=int, help="tokens of a window")
    found.add_argument("--accumulate", type=int, help="micro-batches of a step, default 1")
    found.add_argument("--minutes", type=float, help="for the whole command: fewer steps, as many for each optimizer")
    found.add_argument("--optimizers", default=",".join(OPTIMIZERS), help="comma separated")
    found.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default on a GPU")
    found.add_argument("--compile-backend", default="inductor", help="torch.compile's")
    found.add_argument("--dtype", choices=DTYPES, help="of autocast, default bf16 on a GPU")
    found.add_argument("--lr", type=float, help="peak of every optimizer")
    found.add_argument("--lr-schatten", type=float)
    found.add_argument("--lr-torch", type=float, help="of torch.optim.Muon and its AdamW")
    found.add_argument("--lr-adamw", type=float)
    found.add_argument("--weight-decay", type=float, default=0.1)
    found.add_argument("--schedule", default="cosine", help="cosine, constant, or linear: with a cool-down over the last 40 %%")
    found.add_argument("--warmup", type=int, help="steps, default a tenth of --steps")
    found.add_argument("--clip", type=float, default=1.0, help="global gradient norm, 0 is off")
    found.add_argument("--eval-every", type=int, help="steps, default an eighth of --steps")
    found.add_argument("--eval-windows", type=int)
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--out", type=Path, help="default benchmarks/results/train_gpt2.json, on a CPU train_gpt2_cpu.json")
    return found


def output(out: Path | None, device: str) -> Path:
    """Where the JSON file goes; raises InputError where it could not be written at the end."""
    path = out or RESULTS / ("train_gpt2.json" if device == "cuda" else "train_gpt2_cpu.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {path} cannot be written: {error.strerror}.") from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"--out {path} cannot be written: give the name of a file in a folder of yours.")
    return path


def rehearsed(s: Settings, corpus: Corpus) -> tuple[Trainer, dict[str, Rehearsal]]:
    """The trainer, once every optimizer has rehearsed on it: whose memory suffices for them all."""
    while True:
        try:
            trainer = Trainer(s, corpus)
            return trainer, {name: trainer.rehearse(name) for name in s.lrs}
        except torch.OutOfMemoryError:
            # The error holds the tensors of its frames: they are free only after this block.
            pass
        trainer = None
        s = s.halved()
        torch.compiler.reset()
        gc.collect()
        print(f"out of memory: now {s.batch} windows in each of {s.accumulate} micro-batches", flush=True)


def steps_within(s: Settings, trainer: Trainer, rehearsals: dict[str, Rehearsal], spent: float) -> int:
    """The steps of each optimizer: those asked for, or as many as --minutes leave for all after `spent` seconds."""
    if s.minutes is None:
        return s.steps
    evaluating = trainer.evaluation * len(s.evaluations(s.steps)) * len(s.lrs)
    left = RESERVE * (60 * s.minutes - spent) - evaluating
    steps = affordable(s.steps, left, sum(rehearsal.step for rehearsal in rehearsals.values()))
    if steps < min(s.steps, FEWEST):
        raise InputError(
            f"--minutes {s.minutes:g} leaves {steps} steps for each optimizer after {spent:.0f} seconds of preparation: give "
            f"more, or a smaller --batch, --size or list of --optimizers."
        )
    return steps


def run(arguments: list[str] | None = None) -> dict[str, Any]:
    """The whole command; returns what it writes. Raises InputError for wrong input."""
    start = time.perf_counter()
    args = parser().parse_args(arguments)
    s = settings(args)
    out = output(args.out, s.device)
    corpus = load(args.data, args.tokens, s.context)
    trainer, rehearsals = rehearsed(s, corpus)
    s = trainer.settings
    steps = steps_within(s, trainer, rehearsals, time.perf_counter() - start)
    found = described(s, trainer, steps)
    print(headline(found), flush=True)
    rows: dict[str, dict[str, Any]] = {}
    for name, rehearsal in rehearsals.items():
        row = trainer.train(name, steps, lambda step, loss, name=name: print(f"{name} {step} {loss:.4f}", flush=True))
        first = {"first_step_s": rehearsal.first_step, "first_optimizer_step_s": rehearsal.first_optimizer_step}
        rows[name] = {**row, **first}
        # After each, so that a run which is cut off leaves what it has.
        common.save(out, "train_gpt2", {**found, "optimizers": rows})
    print(table(rows))
    return {**found, "optimizers": rows}


def main() -> None:
    try:
        run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
