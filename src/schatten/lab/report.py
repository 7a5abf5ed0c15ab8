"""The report of a comparison: one HTML file that opens offline, and its pictures as PNG, from a run folder's files alone."""

import base64
import html
import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors.torch import load_file

from schatten.lab import plots
from schatten.lab.compare import Setting, best, summarise
from schatten.lab.config import Run
from schatten.lab.instrument_panels import Panel, alarms, panels
from schatten.lab.store import Store, write_atomically
from schatten.lab.train import newest

CAPTIONS = {
    "loss_steps": "Loss against steps, best learning rate of each optimizer. Line with marks: validation, mean over seeds, "
    "shaded from lowest to highest seed; the last mark is the final evaluation, on more windows. Thin line: training.",
    "loss_seconds": "The same against seconds of training on this machine.",
    "lr_sensitivity": "Final validation loss against learning rate; bars are one standard deviation over seeds. "
    "A cross at the top is a setting with a diverged run.",
    "step_time": "Where a step's time goes.",
    "spectra": "Singular values of the hidden matrices at the end of training, seed 0, pooled over layers. Decoupled decay "
    "keeps a spectral optimizer's weights within the dashed line, spectral norm c/λ.",
}

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child, td:last-child { text-align: left; }
tr.best { font-weight: 600; background: #f3f7fb; }
figure { margin: 2rem 0; }
figure.small { display: inline-block; width: 49%; margin: 1rem 0; vertical-align: top; }
figure img { max-width: 100%; height: auto; }
figcaption { color: #555; font-size: .9rem; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .85rem; }
"""


def write_report(folder: Path) -> Path:
    """Draw the pictures of the finished runs in `folder` and write report.html; returns its path."""
    store = Store(folder)
    config = json.loads((folder / "config.json").read_text())
    results = store.results()
    settings = summarise(list(results.values()))
    chosen = {name: s for name, s in best(settings).items() if math.isfinite(s.mean)}
    pictures: dict[str, Figure] = {}
    if settings:
        pictures["lr_sensitivity"] = plots.lr_sensitivity(settings)
    if chosen:
        curves = _curves(store, chosen)
        pictures["loss_steps"] = plots.loss_curves(chosen, curves, "step")
        pictures["loss_seconds"] = plots.loss_curves(chosen, curves, "seconds")
        pictures["step_time"] = plots.step_time(chosen, config["steps"])
        weights, bounds = _spectra(store, chosen)
        if weights:
            pictures["spectra"] = plots.spectra(weights, bounds)
    measured = _instruments(store, chosen)
    made = [Panel(name, caption, pictures[name]) for name, caption in CAPTIONS.items() if name in pictures]
    images = []
    for panel in [*made, *panels(measured)]:
        images.append((panel, image := png(panel.figure)))
        (folder / f"{panel.name}.png").write_bytes(image)
    report = folder / "report.html"
    write_atomically(report, _page(config, settings, images, alarms(measured)))
    return report


def _curves(store: Store, chosen: dict[str, Setting]) -> dict[str, list[list[dict[str, Any]]]]:
    """Optimizer -> the log records of each seed at its best lr."""
    records = store.records()
    ids = {
        name: [r["run"] for r in records if r["event"] == "done" and (r["optimizer"], r["lr"]) == (name, setting.lr)]
        for name, setting in chosen.items()
    }
    return {name: [[r for r in records if r["run"] == run] for run in runs] for name, runs in ids.items()}


def _instruments(store: Store, chosen: dict[str, Setting]) -> dict[str, list[dict[str, Any]]]:
    """Optimizer -> what instruments measured in its first seed at its best lr."""
    ids = {name: Run(name, setting.lr, 0).id for name, setting in chosen.items()}
    records = [r for r in store.records() if r["event"] == "instruments"]
    found = {name: [r for r in records if r["run"] == run] for name, run in ids.items()}
    return {name: own for name, own in found.items() if own}


def _spectra(store: Store, chosen: dict[str, Setting]) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, dict[str, float]]]:
    weights, bounds = {}, {}
    for result in store.results().values():
        name = result["optimizer"]
        folder = newest(store.checkpoint(result["run"]))
        if folder is None or result["seed"] != 0 or name not in chosen or result["lr"] != chosen[name].lr:
            continue
        tensors = load_file(folder / "model.safetensors")
        hidden = {n: t for n, t in tensors.items() if t.ndim == 2 and ".blocks." in f".{n}"}
        weights[name] = {n: torch.linalg.svdvals(t.double()).numpy() for n, t in hidden.items()}
        if result["bounds"]:
            bounds[name] = result["bounds"]
    return weights, bounds


def png(figure: Figure) -> bytes:
    """A picture as the bytes of a PNG file."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    return buffer.getvalue()


def _page(
    config: dict[str, Any], settings: list[Setting], images: Sequence[tuple[Panel, bytes]], alarms: Sequence[str] = ()
) -> str:
    chosen = best(settings)
    rows = []
    tried = Counter(s.optimizer for s in settings)
    for s in settings:
        mark = tried[s.optimizer] > 1 and chosen[s.optimizer] is s and math.isfinite(s.mean)
        spread = "-" if math.isnan(s.spread) else f"{s.spread:.4f}"
        notes = ", ".join(filter(None, ("best" if mark else "", f"{s.diverged} diverged" if s.diverged else "")))
        cells = (s.optimizer, f"{s.lr:g}", f"{s.mean:.4f}", spread, len(s.losses), f"{s.seconds:.1f}")
        cells = (*cells, f"{100 * s.optimizer_share:.0f} %", notes)
        rows.append(
            f"<tr{' class=best' if mark else ''}>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in cells) + "</tr>"
        )
    head = ("optimizer", "lr", "validation loss", "spread", "seeds", "seconds", "in optimizer", "")
    figures = [
        f"<figure{' class=small' if panel.small else ''}>"
        f'<img alt="{html.escape(panel.caption)}" src="data:image/png;base64,{base64.b64encode(image).decode()}">'
        f"<figcaption>{html.escape(panel.caption)}</figcaption></figure>"
        for panel, image in images
    ]
    return "\n".join(
        [
            "<!doctype html><html lang=en><meta charset=utf-8><title>schatten compare</title>",
            f"<style>{STYLE}</style>",
            f"<h1>{html.escape(' against '.join(config['optimizers']))}</h1>",
            f"<p>{html.escape(_sentence(config))}</p>",
            "<table><tr>" + "".join(f"<th>{c}</th>" for c in head) + "</tr>",
            *rows,
            "</table><p>Losses in nats per token; spread is the standard deviation over seeds; a diverged run is inf.</p>",
            *figures,
            *(
                f"<h2>Alarms of the instruments</h2><ul>{''.join(f'<li>{html.escape(a)}</li>' for a in alarms)}</ul>"
                for _ in alarms[:1]
            ),
            f"<h2>Configuration</h2><pre>{html.escape(json.dumps(config, indent=1))}</pre></html>",
        ]
    )


def _sentence(config: dict[str, Any]) -> str:
    return (
        f"{config['layers']} layers, {config['heads']} heads, width {config['width']}, context {config['context']}, batch "
        f"{config['batch'] * config['accumulate']}, {config['steps']} steps, {config['tokens']} tokens of {config['data']}, "
        f"{config['seeds']} seed(s), {config['schedule']} schedule; equal initial weights and batches for each seed."
    )
