"""Write docs/theory.md and its pictures: numbers of the theory's papers, published against found. About two minutes.

python benchmarks/theory.py
"""

import sys
import time
from pathlib import Path

import common
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from theory_parts.constraint import ball, contraction, descent, spectra  # noqa: E402
from theory_parts.mlp import mlp  # noqa: E402
from theory_parts.quadratic import quadratic  # noqa: E402
from theory_parts.words import rounded  # noqa: E402

PAGE = ROOT / "docs" / "theory.md"
RESULTS = Path(__file__).parent / "results" / "theory.json"

INTRODUCTION = f"""\
# The theory's numbers, published and found

`python benchmarks/theory.py` runs everything here and writes this page, its pictures and `benchmarks/results/theory.json`
(torch {torch.__version__}, fp64 throughout); `tests/facts/test_theory_reproduction.py` holds the numbers with their
tolerances. Sources: Chen, Li and Liu, *Muon optimizes under spectral norm constraints* (arXiv 2506.15054), and Shen et al.,
*On the convergence analysis of Muon* (arXiv 2505.23737). Most published numbers were read off curves, to about the width of
a line; what the papers leave open is said where it matters.
"""


def main() -> None:
    start = time.perf_counter()
    text, results = [INTRODUCTION], {}
    for part in (contraction, descent, ball, spectra, mlp, quadratic):
        lines, results[part.__name__] = part()
        text += [*lines, ""]
        print(f"{part.__name__}: {time.perf_counter() - start:.0f} s")
    PAGE.write_text("\n".join(text).rstrip() + "\n")
    print(f"written to {PAGE}")
    common.save(RESULTS, "theory", rounded(results))


if __name__ == "__main__":
    main()
