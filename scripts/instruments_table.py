"""Write the tables of docs/instruments.md: quantities from their files, costs from benchmarks/results/monitor.json.

python scripts/instruments_table.py
"""

import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from schatten.monitor import page  # noqa: E402

PAGE = ROOT / "docs" / "instruments.md"


def costs() -> str:
    """A line for each measured set of quantities."""
    result = json.loads((ROOT / "benchmarks" / "results" / "monitor.json").read_text())
    every = result["every"]
    lines = [f"| quantities | a measurement, ms | share at every={every} |", "|---|---|---|"]
    steps = [time for row in result["quantities"].values() for time in row["plain"]]
    for name, row in result["quantities"].items():
        one = ", of one matrix" if row["one_matrix"] else ""
        lines.append(f"| {name}{one} | {_short(row['cost_ms'])} | {_short(100 * row['share'])} % |")
    return "\n".join([*lines, "", f"A training step without a monitor takes {statistics.median(steps):.3g} ms.", ""])


def _short(number: float) -> str:
    return f"{number:.2f}" if number < 10 else f"{number:.0f}"


def with_part(text: str, name: str, part: str) -> str:
    """`text` with what stands between the marks of `name` replaced."""
    before, _, rest = text.partition(f"<!-- {name} -->\n")
    _, mark, after = rest.partition(f"<!-- /{name} -->\n")
    if not mark:
        raise SystemExit(f"docs/{PAGE.name} has no marks <!-- {name} --> and <!-- /{name} -->, each on a line.")
    return f"{before}<!-- {name} -->\n{part}{mark}{after}"


def main() -> None:
    text = with_part(PAGE.read_text(), "quantities", page())
    PAGE.write_text(with_part(text, "costs", costs()))
    print(f"written to docs/{PAGE.name}")


if __name__ == "__main__":
    main()
