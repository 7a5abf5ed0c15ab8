"""What a self test found: its checks, printed as a table, and the error that carries them."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One line of a report; `ok` is None for what could not be checked."""

    check: str
    parameter: str
    expected: str
    measured: str
    ok: bool | None


@dataclass(frozen=True)
class Report:
    """What `self_test` checked; iterable, and printed as a table.

    Example:
        >>> from schatten.self_test import Check, Report
        >>> print(Report((Check("decay", "weight", "length 0.5", "length 0.5, off by 0.0 %", True),)))
        check  parameter  expected    measured                  ok
        -----  ---------  ----------  ------------------------  ---
        decay  weight     length 0.5  length 0.5, off by 0.0 %  yes
    """

    checks: tuple[Check, ...]

    def __iter__(self) -> Iterator[Check]:
        return iter(self.checks)

    def __len__(self) -> int:
        return len(self.checks)

    def __str__(self) -> str:
        words = {True: "yes", False: "NO", None: "-"}
        rows: list[tuple[str, ...]] = [("check", "parameter", "expected", "measured", "ok")]
        rows += [(c.check, c.parameter, c.expected, c.measured, words[c.ok]) for c in self.checks]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, tuple("-" * w for w in widths))
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


class SelfTestError(RuntimeError):
    """An optimizer does not do what its plan and groups say; `report` has every check, the message those that failed."""

    def __init__(self, report: Report) -> None:
        self.report = report
        failed = Report(tuple(c for c in report if c.ok is False))
        super().__init__(f"{len(failed)} of {len(report)} checks failed; no weight was changed.\n{failed}")
