"""What a run leaves: all of its JSON file but the optimizers, and what is printed."""

import importlib
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import schatten
from benchmarks.train_gpt2_parts.settings import Settings, device_name
from benchmarks.train_gpt2_parts.training import Trainer
from schatten.kernels import choice
from schatten.solvers.core import working_dtype


def versions() -> dict[str, str | None]:
    triton = importlib.import_module("triton").__version__ if not choice.missing() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton,
        "schatten": schatten.__version__,
    }


def described(s: Settings, trainer: Trainer, steps: int) -> dict[str, Any]:
    """All of the JSON file but the optimizers."""
    config, corpus = trainer.plain.config, trainer.corpus
    lacking = choice.lacking(torch.device(s.device))
    return {
        "device": device_name(s.device),
        "versions": versions(),
        "working_dtype": str(working_dtype(torch.zeros(1, device=s.device), "auto")),
        "kernels": f"eager ({lacking})" if lacking else "triton",
        "model": {
            "size": s.size,
            "parameters": sum(p.numel() for p in trainer.plain.parameters()),
            "vocabulary": config.vocabulary,
            "layers": config.layers,
            "heads": config.heads,
            "width": config.width,
            "context": config.context,
        },
        "data": {
            "source": Path(corpus.source).name,
            "vocabulary": corpus.vocabulary,
            "train_tokens": len(corpus.train),
            "validation_tokens": len(corpus.validation),
            "fingerprint": corpus.fingerprint,
        },
        "settings": {
            "steps": steps,
            "batch": s.batch,
            "accumulate": s.accumulate,
            "context": s.context,
            "tokens_per_step": s.tokens,
            "dtype": s.dtype,
            "compiled": s.compiled,
            "schedule": s.schedule,
            "warmup": s.warmup_of(steps),
            "weight_decay": s.weight_decay,
            "clip": s.clip,
            "seed": s.seed,
            "minutes": s.minutes,
        },
        "first_pass_s": trainer.first_pass,
    }


def headline(found: Mapping[str, Any]) -> str:
    model, loop, data = found["model"], found["settings"], found["data"]
    epochs = loop["steps"] * loop["tokens_per_step"] / data["train_tokens"]
    return (
        f"GPT of {model['parameters'] / 1e6:.1f} M parameters, {found['device']}, {loop['dtype']}, "
        f"{'compiled' if loop['compiled'] else 'not compiled'}, kernels {found['kernels']}\n"
        f"{data['source']}, {data['train_tokens']:,} tokens, read {epochs:.1f} times; {loop['steps']} steps of "
        f"{loop['accumulate']} x {loop['batch']} x {loop['context']} tokens; first pass {found['first_pass_s']:.1f} s"
    )


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Medians with quartiles of the second half of the steps; at the end how many numbers each rule trains."""
    lines = [
        f"{'optimizer':24}{'tokens/s':>10}{'quartiles':>20}{'step ms':>10}{'optimizer ms':>14}{'share':>8}"
        f"{'validation':>12}{'peak MiB':>10}{'state MiB':>11}{'first step s':>14}{'spectral':>13}{'adamw':>13}"
    ]
    for name, row in rows.items():
        low, middle, high = row["tokens_per_second"]
        loss = "not finite" if row["validation_loss"] is None else f"{row['validation_loss']:.4f}"
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        lines.append(
            f"{name:24}{middle:10.0f}{f'{low:.0f} - {high:.0f}':>20}{row['step_ms'][1]:10.2f}{row['optimizer_ms'][1]:14.2f}"
            f"{100 * row['optimizer_share'][1]:6.1f} %{loss:>12}{peak:>10}{row['state_bytes'] / 2**20:11.1f}"
            f"{row['first_step_s']:14.2f}{row['parameters']['spectral']:13,}{row['parameters']['adamw']:13,}"
        )
    return "\n".join(lines)
