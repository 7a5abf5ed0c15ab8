"""The page of what was reproduced: for every experiment that has run, published numbers beside ours, from its rows alone."""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from schatten.lab import experiments
from schatten.lab.errors import InputError
from schatten.lab.experiment import NOT_REPRODUCED, OUT_OF_REACH, REPRODUCED, Experiment, Verdict
from schatten.lab.ledger import STAMP, Row, rows_of
from schatten.lab.report import png
from schatten.lab.store import encoded, write_atomically

INTRODUCTION = """\
# What was reproduced

Written by `schatten lab report` from the rows that `schatten lab run` left; every number is a mean +- standard deviation over
seeds where several were run. **Reproduced** means within the tolerance that the line states, **not reproduced** that it was
measured here and is not, **out of reach here** that it needs data or a machine that this run did not have; then the line says
what. A claim that one optimizer is better than another carries n and a two-sided p-value, and p >= 0.05 is no difference.

The sizes are those of the column "size": *quick* fits a laptop, *full* is the published size; an ordering that holds or fails
at the quick size says nothing about the published one.
"""


def write_page(runs: Path, page: Path) -> Path:
    """Write `page`, with its pictures in images/ beside it, from the experiments' folders in `runs`.

    Raises InputError if no experiment has left rows there.
    """
    found = {name: rows for name in experiments.names() if (rows := rows_of(runs / name))}
    if not found:
        raise InputError(f"--runs {runs} has no rows of an experiment: start one with `schatten lab run NAME --out {runs}`.")
    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    verdicts = {name: experiments.load(name).check(rows) for name, rows in found.items()}
    parts = [INTRODUCTION, summary(found, verdicts)]
    for name, rows in found.items():
        experiment = experiments.load(name)
        figures = {}
        for picture, figure in experiment.pictures(rows).items():
            file = images / f"lab-{name}-{picture.replace('_', '-')}.png"
            file.write_bytes(png(figure))
            figures[f"images/{file.name}"] = experiment.captions.get(picture, picture)
        parts.append(section(name, experiment, rows, verdicts[name], figures))
    if missing := [name for name in experiments.names() if name not in found]:
        parts.append(f"## Not run\n\n{', '.join(missing)}\n")
    write_atomically(page, "\n".join(parts))
    return page


def summary(found: Mapping[str, Sequence[Row]], verdicts: Mapping[str, Sequence[Verdict]]) -> str:
    """One line for each experiment."""
    lines = [
        "| experiment | source | size | measured in | reproduced | not reproduced | out of reach here |",
        "|---|---|---|---|---|---|---|",
    ]
    totals: Counter[str] = Counter()
    for name, rows in found.items():
        counts = Counter(verdict.verdict for verdict in verdicts[name])
        totals += counts
        cells = [f"[{name}](#{name})", experiments.load(name).source, size(experiments.load(name), rows), seconds(rows)]
        lines.append("| " + " | ".join([*cells, *(str(counts[word]) for word in WORDS)]) + " |")
    lines.append("| | | | | " + " | ".join(f"**{totals[word]}**" for word in WORDS) + " |")
    return "\n".join(lines) + "\n"


WORDS = (REPRODUCED, NOT_REPRODUCED, OUT_OF_REACH)


def section(
    name: str, experiment: Experiment, rows: Sequence[Row], verdicts: Sequence[Verdict], figures: Mapping[str, str]
) -> str:
    """Claim, settings, verdicts and pictures of one experiment."""
    stamp = rows[-1][STAMP]
    settings = ", ".join(f"{key} {_plain(value)}" for key, value in stamp["config"].items())
    versions = ", ".join(f"{key} {value}" for key, value in stamp["versions"].items() if key in ("schatten", "torch"))
    lines = [f"## {name}", "", f"{experiments.claim(name)} ({experiment.source})", ""]
    lines.append(f"`schatten lab run {name}`, {size(experiment, rows)} size: {settings}.")
    lines.append(f"{len(rows)} rows in {seconds(rows)} on {stamp['device']} ({stamp['machine']}), {versions}.")
    if experiment.lacks:
        lines += ["", f"Left out: {experiment.lacks}"]
    lines += ["", "| quantity | published | ours | verdict | why |", "|---|---|---|---|---|"]
    for v in verdicts:
        word = v.verdict if v.verdict == REPRODUCED else f"**{v.verdict}**" if v.verdict == NOT_REPRODUCED else f"*{v.verdict}*"
        lines.append("| " + " | ".join(_cell(text) for text in (v.quantity, v.published, v.ours, word, v.why)) + " |")
    for file, caption in figures.items():
        lines += ["", f"![{Path(file).stem.removeprefix('lab-')}]({file})", "", caption]
    return "\n".join(lines) + "\n"


def size(experiment: Experiment, rows: Sequence[Row]) -> str:
    """Whether the rows have the quick, the full or another configuration, wherever their data lie."""
    config = rows[-1][STAMP]["config"]
    for word in ("quick", "full"):
        there = json.loads(json.dumps(encoded(dataclasses.asdict(getattr(experiment, word)))))
        if there.keys() == config.keys() and all(config[k] == v or isinstance(v, str) for k, v in there.items()):
            return word
    return "own"


def seconds(rows: Sequence[Row]) -> str:
    total = sum(row[STAMP]["seconds"] for row in rows)
    return f"{total:.0f} s" if total < 600 else f"{total / 60:.0f} min"


def _plain(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
