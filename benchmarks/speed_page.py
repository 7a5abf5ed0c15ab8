"""Write the tables of docs/speed.md from the JSON files of benchmarks/results/, and nothing else.

    python benchmarks/speed_page.py [--results benchmarks/results] [--out docs/speed.md] [--check]

The page's text is written by hand, in docs/speed.md; what stands there between the marks <!-- tables --> and <!-- /tables -->
is replaced. A file that is not there is named in its place with the command that writes it, and a key that a file of an older
commit does not have becomes a dash. `--check` writes nothing and ends with status 1 if the page would change.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.speed_parts import compiled, cpu, gpu, ranks, training  # noqa: E402
from benchmarks.speed_parts.table import Table  # noqa: E402

TABLES = (*gpu.TABLES, *training.TABLES, *compiled.TABLES, *cpu.TABLES, *ranks.TABLES)

PAGE = ROOT / "docs" / "speed.md"
RESULTS = ROOT / "benchmarks" / "results"

BEGIN, END = "<!-- tables -->\n", "<!-- /tables -->\n"


def recorded(results: Path, file: str) -> dict[str, Any] | None:
    """What a run has written, or None where there is no such file; what is null there is as good as absent."""
    path = results / file
    return json.loads(path.read_text(), object_hook=known) if path.exists() else None


def known(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if value is not None}


def section(table: Table, results: Path) -> str:
    """Heading, what was measured, the command, and a table of what the files hold."""
    found = {file: run for file in table.files if (run := recorded(results, file)) is not None}
    rows = [row for run in found.values() for row in table.rows(run)]
    absent = [
        f"**No {table.files[file]} is recorded yet**: `{table.command}` prints one and writes `benchmarks/results/{file}`."
        for file in table.files
        if file not in found
    ]
    if found and not rows:
        absent.append(f"**Nothing of it is in** {', '.join(f'`benchmarks/results/{file}`' for file in found)}.")
    parts = [f"### {table.title}", f"{table.measured} (`{table.command}`)", *absent]
    if rows:
        parts.append("\n".join(line(cells) for cells in [table.columns, ["---"] * len(table.columns), *rows]))
    return "\n\n".join(parts)


def line(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page(results: Path, text: str) -> str:
    """`text`, a page with the two marks, with the tables between them as `results` has them now.

    Raises ValueError for a page without the marks.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"The page needs the lines {BEGIN.strip()} and {END.strip()}, in this order, around its tables.")
    tables = "\n\n".join(section(table, results) for table in TABLES)
    return f"{before}{BEGIN}\n{tables}\n\n{END}{after}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(arguments)
    if not args.results.is_dir():
        parser.error(f"--results must be a folder of the benchmarks' JSON files, got {args.results}")
    text = (args.out if args.out.exists() else PAGE).read_text()
    written = page(args.results, text)
    if not args.check:
        args.out.write_text(written)
        print(f"written to {args.out}")
    elif written != text or not args.out.exists():
        raise SystemExit(f"{args.out} is not what {args.results} says: run python benchmarks/speed_page.py")


if __name__ == "__main__":
    main()
