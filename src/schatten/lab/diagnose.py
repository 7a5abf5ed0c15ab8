"""A checkpoint's weights in numbers: every matrix is measured, one after the other, and what ball they fit is found."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from schatten.lab import matrix_kinds
from schatten.lab.checkpoint_reader import Checkpoint
from schatten.lab.diagnose_balls import Ball, Bound, balls, bound
from schatten.lab.diagnose_rows import Row, Unmeasured, row_of
from schatten.lab.mapped_file import Stored
from schatten.lab.spectra import Matrix, Workspace, spectrum

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Diagnosis:
    """Everything of one checkpoint."""

    rows: Sequence[Row]
    unmeasured: Sequence[Unmeasured]
    balls: Sequence[Ball]
    bound: Bound | None


def diagnose(checkpoint: Checkpoint, *, max_size: int, device: str, progress: Progress) -> Diagnosis:
    """Measure every matrix of a checkpoint, one after the other; `progress` is told each tensor's name and entries."""
    rows, unmeasured, workspace = [], [], Workspace(device)
    shapes = {name: t.shape for name, t in checkpoint.tensors.items()}
    for name, stored in checkpoint.tensors.items():
        reading = matrix_kinds.read(name, stored.shape, shapes, checkpoint.config)
        why = unreadable(name, stored, shapes) or ("" if reading.layout else reading.how)
        if why:
            unmeasured.append(Unmeasured(name, stored.shape, stored.dtype, why, _nonfinite(stored)))
        elif stored.read is not None:
            for suffix, kind, matrix in reading.matrices(stored.read()):
                found = spectrum(Matrix(workspace, matrix), max_size=max_size)
                rows.append(row_of(name + suffix, kind, matrix, stored.dtype, reading.how, found))
        checkpoint.forget()
        progress(name, math.prod(stored.shape))
    return Diagnosis(rows, unmeasured, balls(rows), bound(rows))


def unreadable(name: str, stored: Stored, shapes: Mapping[str, Sequence[int]]) -> str | None:
    """Why a tensor's entries are no weights to measure."""
    if stored.read is None:
        return f"{stored.dtype}: not an array of numbers that is read here"
    dtype = getattr(torch, stored.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return f"{stored.dtype}: no floating-point numbers"
    scales = (f"{name}_scale_inv", f"{name}_scale", f"{name}_scales")
    if dtype.itemsize == 1 and any(scale in shapes for scale in scales):
        return f"{stored.dtype}: quantised, its scales are another tensor"
    return None


def _nonfinite(stored: Stored) -> int:
    """How many entries of a vector are not finite."""
    dtype = getattr(torch, stored.dtype, None)
    if stored.read is None or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return 0
    flat = stored.read().flatten()
    return sum(int((~part.float().isfinite()).sum()) for part in flat.split(1 << 22)) if flat.numel() else 0
