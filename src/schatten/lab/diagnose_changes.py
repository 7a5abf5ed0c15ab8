"""What changed from one checkpoint to another, matrix by matrix."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from schatten.lab import matrix_kinds
from schatten.lab.checkpoint_reader import Checkpoint
from schatten.lab.diagnose import Progress, unreadable
from schatten.lab.spectra import Matrix, Workspace, effective_rank, overlap, spectrum


@dataclass(frozen=True)
class Change:
    """Second minus first of a matrix; relative sizes are over the first, `cosine` is between the change and the first.

    `left` (of fan_out) and `right` (of fan_in) are mean squared cosines of the principal angles between the subspaces of `top`
    leading singular vectors, 1 for equal ones and top / n by chance; `angle` is the largest of them in degrees. `gap` is the
    singular value number `top` over the next one, of the first: near 1 the subspace is not determined, and angles say nothing.
    """

    name: str
    kind: str
    fan_out: int
    fan_in: int
    relative: float
    relative_spectral: float
    stable_rank: float
    effective_rank: float
    cosine: float
    top: int
    left: float
    right: float
    angle: float
    gap: float
    method: str
    nonfinite: int


@dataclass(frozen=True)
class Comparison:
    """Everything of two: `errors` are one line for each pair that cannot be compared."""

    changes: Sequence[Change]
    only_first: Sequence[str]
    only_second: Sequence[str]
    errors: Sequence[str]


def compare(first: Checkpoint, second: Checkpoint, *, max_size: int, device: str, top: int, progress: Progress) -> Comparison:
    """What changed from `first` to `second`, matrix by matrix, with the alignment of the `top` leading singular subspaces."""
    changes, errors, workspace = [], [], Workspace(device)
    shapes = {name: t.shape for name, t in first.tensors.items()}
    for name, stored in first.tensors.items():
        other = second.tensors.get(name)
        reading = matrix_kinds.read(name, stored.shape, shapes, {**second.config, **first.config})
        if other is not None and other.shape != stored.shape:
            errors.append(f"{name} has shape {stored.shape} in the first and {other.shape} in the second: not compared.")
        elif other is not None and reading.layout is not None:
            why = unreadable(name, stored, shapes) or unreadable(name, other, shapes)
            if why is None and stored.read is not None and other.read is not None:
                pairs = zip(reading.matrices(stored.read()), reading.matrices(other.read()), strict=True)
                for (suffix, kind, W1), (_, _, W2) in pairs:
                    changes.append(_change(name + suffix, kind, W1, W2, workspace, max_size=max_size, top=top))
        first.forget()
        second.forget()
        progress(name, math.prod(stored.shape))
    known, others = {*first.tensors, *first.tied}, {*second.tensors, *second.tied}
    return Comparison(
        changes, [n for n in first.tensors if n not in others], [n for n in second.tensors if n not in known], errors
    )


def _change(name: str, kind: str, W1: Tensor, W2: Tensor, workspace: Workspace, *, max_size: int, top: int) -> Change:
    rows, columns = W1.shape
    k = min(top, rows, columns)
    before = spectrum(Matrix(workspace, W1), max_size=max_size, vectors=k)
    after = spectrum(Matrix(workspace, W2), max_size=max_size, vectors=k)
    delta = spectrum(Matrix(workspace, W1, W2), max_size=max_size)
    nonfinite = before.nonfinite + after.nonfinite
    d = delta.values
    left, right, angle = math.nan, math.nan, math.nan
    if before.left is not None and before.right is not None and after.left is not None and after.right is not None:
        (left, one), (right, two) = overlap(before.left, after.left), overlap(before.right, after.right)
        angle = max(one, two)
        if rows < columns:
            # Spectra are of tall matrices.
            left, right = right, left
    s = before.values
    sizes = before.frobenius, after.frobenius, delta.frobenius
    cosine = (sizes[0] ** 2 + sizes[2] ** 2 - sizes[1] ** 2) / (-2 * sizes[0] * sizes[2]) if sizes[0] * sizes[2] else math.nan
    return Change(
        name=name,
        kind=kind,
        fan_out=rows,
        fan_in=columns,
        relative=_ratio(delta.frobenius, before.frobenius),
        relative_spectral=_ratio(float(d[0]), float(s[0])) if len(d) and len(s) else math.nan,
        stable_rank=(delta.frobenius / float(d[0])) ** 2 if len(d) and d[0] > 0 else 0.0 if len(d) else math.nan,
        effective_rank=effective_rank(d) if delta.method in ("svd", "gram") and len(d) else math.nan,
        cosine=cosine,
        top=k,
        left=left,
        right=right,
        angle=angle,
        gap=_ratio(float(s[k - 1]), float(s[k])) if before.method in ("svd", "gram") and len(s) > k else math.nan,
        method=delta.method,
        nonfinite=nonfinite,
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan if part == 0 or math.isnan(part) else math.inf
