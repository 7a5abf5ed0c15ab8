"""Numbers as text, and where pictures go."""

import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

IMAGES = Path(__file__).parents[2] / "docs" / "images"

SEEDS = 10

# Lines of the page, and what is saved of them.
Found = tuple[list[str], dict[str, Any]]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean +- standard deviation; the mean alone where that is all there is to see."""
    mean, sd = statistics.mean(values), statistics.stdev(values)
    return f"{mean:.{digits}f}" if sd < 0.5 * 10**-digits else f"{mean:.{digits}f} +- {sd:.{digits}f}"


def save(figure: Figure, name: str) -> None:
    """As `docs/images/theory-NAME.png`, of 128 colours, in less than 100 kB."""
    IMAGES.mkdir(exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    Image.open(drawn).convert("RGB").quantize(128).save(IMAGES / f"theory-{name}.png", optimize=True)


def rounded(value: Any) -> Any:
    """Four digits of every number in lists and dictionaries."""
    if isinstance(value, dict):
        return {str(key): rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(entry) for entry in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
