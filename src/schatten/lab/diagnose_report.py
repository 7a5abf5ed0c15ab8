"""The report of a diagnosed checkpoint: one HTML file that opens offline, its pictures, and data.json."""

import base64
import html
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from schatten.lab import spectra_plots
from schatten.lab.diagnose import Diagnosis
from schatten.lab.diagnose_changes import Comparison
from schatten.lab.diagnose_rows import SCALES, Row
from schatten.lab.diagnose_table import (
    BALL_HEAD,
    CHANGE_HEAD,
    MATRIX_HEAD,
    ball_cells,
    change_cells,
    matrix_cells,
    most_changed,
    not_finite,
)
from schatten.lab.report import STYLE, png
from schatten.lab.store import encoded, write_atomically

CAPTIONS = {
    "spectra": "Singular values by kind, pooled over layers; the dashed line is R, the largest of them. A pile at the line is "
    "what a spectral bound leaves, a single value far right of the rest is an outlier. Values below R/1000 are left out.",
    "sigma_by_depth": "The largest singular value against the layer. Where a layer has several matrices of a kind (experts), "
    "the line is their median and the shade goes from the least to the largest.",
    "stable_rank_by_depth": "Stable rank (Frobenius over spectral norm, squared) in share of the smaller side, against the "
    "layer: 100 % is a multiple of an orthogonal matrix, 25 % a square random one, near 0 a few directions alone.",
    "change_by_depth": "How far each matrix moved, the Frobenius norm of the change over that of the first checkpoint's.",
}

# Rows that a browser still shows at once; data.json has all.
ROWS = 4000


def content(path: Path, found: Diagnosis, notes: Sequence[str], compared: Comparison | None, other: Path | None) -> Any:
    """All numbers, as data.json and --json have them; infinities and nan by their names."""
    bound = found.bound
    own: dict[str, Any] = {
        "checkpoint": str(path),
        "notes": list(notes),
        "matrices": [row.plain() for row in found.rows],
        "not_measured": [asdict(tensor) for tensor in found.unmeasured],
        "balls": [asdict(ball) for ball in found.balls],
        "bound": bound and {**asdict(bound), "supported": bound.supported, "sentence": bound.sentence()},
    }
    if compared is not None:
        own["against"] = {"checkpoint": str(other), **asdict(compared)}
    return encoded(own)


def write_report(
    folder: Path, path: Path, found: Diagnosis, notes: Sequence[str], compared: Comparison | None, other: Path | None
) -> Path:
    """Write report.html, the pictures as PNG and data.json into `folder`; returns the report's path."""
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Figure | None] = {
        "spectra": spectra_plots.spectra(found.rows, found.bound),
        "sigma_by_depth": spectra_plots.sigma_by_depth(found.rows),
        "stable_rank_by_depth": spectra_plots.stable_rank_by_depth(found.rows),
        "change_by_depth": spectra_plots.change_by_depth(compared.changes) if compared else None,
    }
    images = {name: png(figure) for name, figure in figures.items() if figure is not None}
    for name, image in images.items():
        (folder / f"{name}.png").write_bytes(image)
    write_atomically(folder / "data.json", json.dumps(content(path, found, notes, compared, other), indent=1) + "\n")
    report = folder / "report.html"
    write_atomically(report, _page(path, found, notes, compared, other, images))
    return report


def _page(
    path: Path,
    found: Diagnosis,
    notes: Sequence[str],
    compared: Comparison | None,
    other: Path | None,
    images: dict[str, bytes],
) -> str:
    against = f" against {other}" if other else ""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>schatten diagnose</title>",
        # Names of matrices are long: a wider page than a comparison's, and tables that scroll.
        f"<style>{STYLE} body {{ max-width: 80rem; }} .wide {{ overflow-x: auto; }} td, th {{ white-space: nowrap; }}"
        " td:last-child { text-align: right; } .bad { color: #b00; }</style>",
        f"<h1>{html.escape(path.name + (f' against {other.name}' if other else ''))}</h1>",
        f"<p>{html.escape(str(path) + against)}: {len(found.rows):,} matrices.</p>",
        *(f"<p>{html.escape(note)}</p>" for note in notes),
    ]
    bad = [t for t in (*found.rows, *found.unmeasured) if t.nonfinite]
    parts += [f"<p class=bad>{html.escape(t.name)}: {not_finite(t.nonfinite)}</p>" for t in bad]
    parts += ["<h2>The balls that they fit</h2>", _table(BALL_HEAD, found.balls, ball_cells)]
    parts.append(
        f"<p>R is the largest singular value of the kind; λ is the largest decay whose ball c/λ holds all of them, by the "
        f"scale c: {', '.join(SCALES)}.</p>"
    )
    if found.bound is not None:
        parts.append(f"<p>{html.escape(found.bound.sentence())}</p>")
    if compared is not None:
        parts += _changes(compared)
    parts += [_figure(name, image) for name, image in images.items()]
    parts += [f"<h2>Matrices</h2>{_more(len(found.rows))}", _table(READ_HEAD, found.rows[:ROWS], _read_cells)]
    if found.unmeasured:
        listed = (f"{t.name}\t{'x'.join(map(str, t.shape)) or 'scalar'}\t{t.dtype}\t{t.why}" for t in found.unmeasured)
        parts.append(f"<h2>Not measured</h2><pre>{html.escape(chr(10).join(listed))}</pre>")
    return "\n".join([*parts, "</html>"])


READ_HEAD = (*MATRIX_HEAD, "read as")


def _read_cells(row: Row) -> tuple[str, ...]:
    return (*matrix_cells(row), row.how)


def _changes(compared: Comparison) -> list[str]:
    parts = [f"<h2>What changed</h2>{_more(len(compared.changes))}"]
    parts.append(_table(CHANGE_HEAD, most_changed(compared.changes)[:ROWS], change_cells))
    parts += [f"<p class=bad>{html.escape(error)}</p>" for error in compared.errors]
    for names, which in ((compared.only_first, "first"), (compared.only_second, "second")):
        if names:
            parts.append(f"<p>Only in the {which}: {html.escape(', '.join(names))}</p>")
    return parts


def _more(count: int) -> str:
    return f"<p>The first {ROWS:,} of {count:,}; data.json has all.</p>" if count > ROWS else ""


def _table(head: Sequence[str], rows: Sequence[Any], cells: Callable[[Any], Sequence[str]]) -> str:
    lines = ["<div class=wide><table><tr>" + "".join(f"<th>{html.escape(title)}</th>" for title in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(row)) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table></div>"])


def _figure(name: str, image: bytes) -> str:
    caption = html.escape(CAPTIONS[name])
    source = base64.b64encode(image).decode()
    return f'<figure><img alt="{caption}" src="data:image/png;base64,{source}"><figcaption>{caption}</figcaption></figure>'
