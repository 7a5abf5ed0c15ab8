"""The report of a sweep: one HTML file that opens offline, and its pictures as PNG, from the study's database alone."""

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from schatten.lab import sweep_plots
from schatten.lab.report import STYLE, png
from schatten.lab.store import write_atomically
from schatten.lab.sweep_results import Result, edges, results, summary
from schatten.lab.sweep_study import Study

# Of the table; the database has all.
SHOWN = 15

UNITS = {"digits": "validation loss, nats", "gpt": "validation loss, nats per token"}

SENSITIVITY = (
    "Loss against {name}: every trial, whatever its other settings; the line joins the best for each value (of a span, for "
    "each tenth of it). Crosses at the top diverged."
)
PARALLEL = "Each complete trial as a line through its settings to its loss; dark is low. Pruned trials are left out."
INTERACTIVE = f"{PARALLEL} Drag along an axis to keep a part of it, drag its name to move it."


def write_report(study: Study, folder: Path) -> Path:
    """Draw the pictures and write report.html in `folder`; returns its path."""
    settings, found = study.settings, results(study.slots())
    space, axis = settings["space"], UNITS[settings["task"]]
    folder.mkdir(parents=True, exist_ok=True)
    tried = [r for r in found if r.params]
    images, panels = {}, []
    if name := _main_name(space):
        images[f"{name}_sensitivity"] = sweep_plots.sensitivity(tried, space, name, axis)
        panels.append((f"{name}_sensitivity", SENSITIVITY.format(name=name)))
    complete = any(r.state == "complete" for r in found)
    if complete and sweep_plots.varied(space):
        images["parallel_coordinates"] = sweep_plots.parallel(tried, space, axis)
        panels.append(("parallel_coordinates", INTERACTIVE))
    pictures = {name: png(figure) for name, figure in images.items()}
    for name, picture in pictures.items():
        (folder / f"{name}.png").write_bytes(picture)
    parts = []
    for name, caption in panels:
        if name == "parallel_coordinates":
            drawn = sweep_plots.interactive(tried, space, axis)
        else:
            drawn = (
                f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{base64.b64encode(pictures[name]).decode()}">'
            )
        parts.append(f"<figure>{drawn}<figcaption>{html.escape(caption)}</figcaption></figure>")
    report = folder / "report.html"
    write_atomically(report, _page(study, settings, found, parts))
    return report


def verdict(found: Sequence[Result], space: Mapping[str, Any]) -> str:
    """The best trial in a line, and a warning where it lies at the edge of what was tried."""
    best = next((r for r in found if r.state == "complete"), None)
    if best is None and found and found[0].state == "failed":
        return f"every trial failed, the first: {found[0].note}"
    if best is None:
        return "no trial ended with a finite loss: lower the learning rates"
    text = f"best: {', '.join(f'{k} {v:.4g}' for k, v in best.params.items())}: loss {best.loss:.5g} (trial {best.slot})"
    if beyond := edges(best, space):
        text += f"; {', '.join(beyond)} at an edge of what was tried, the best may lie beyond"
    return text


def _main_name(space: Mapping[str, Any]) -> str | None:
    names = sweep_plots.varied(space)
    return "lr" if "lr" in names else next(iter(names), None)


def _page(study: Study, settings: Mapping[str, Any], found: Sequence[Result], figures: Sequence[str]) -> str:
    names = list(settings["space"])
    rows = []
    for i, r in enumerate(found[:SHOWN]):
        cells = [str(r.slot), *(f"{r.params[n]:.4g}" if n in r.params else "" for n in names), f"{r.loss:.5g}"]
        cells += ["" if math.isnan(r.seconds) else f"{r.seconds:.1f}", ", ".join(filter(None, (r.state, r.note)))]
        marked = " class=best" if i == 0 and r.state == "complete" else ""
        rows.append(f"<tr{marked}>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>")
    sentence = (
        f"{settings['optimizer']} on {settings['task']}, {settings['steps']} steps of {settings['batch']} examples, "
        f"{settings['seeds']} seed(s); {settings['sampler']} sampler, pruning: {settings['pruner']}."
    )
    return "\n".join(
        [
            "<!doctype html><html lang=en><meta charset=utf-8><title>schatten sweep</title>",
            f"<style>{STYLE}</style>",
            f"<h1>{html.escape(study.name)}</h1>",
            f"<p>{html.escape(sentence)}</p><p>{html.escape(summary(found, study.count))}.</p>",
            f"<p><b>{html.escape(verdict(found, settings['space']))}.</b></p>",
            "<table><tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in ("trial", *names, "loss", "seconds", "")) + "</tr>",
            *rows,
            f"</table><p>The best {min(SHOWN, len(found))} of {len(found)} trials. Loss: {UNITS[settings['task']]}, the mean "
            "over seeds at the end, of a pruned trial its last evaluation; a diverged trial is inf.</p>",
            *figures,
            *(f"<p>Trial {r.slot} failed: {html.escape(r.note)}</p>" for r in found if r.note),
            f"<h2>Settings</h2><pre>{html.escape(json.dumps(settings, indent=1))}</pre></html>",
        ]
    )
