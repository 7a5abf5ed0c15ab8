"""The table of benchmarks/train_gpt2.py."""

from benchmarks.speed_parts.table import ABSENT, STAMP, Row, Run, Table, mebibytes, quartered, stamp


def training(run: Run) -> list[Row]:
    rows = []
    model, settings = run.get("model", {}), run.get("settings", {})
    millions = model.get("parameters")
    size = ABSENT if millions is None else f"{millions / 1e6:.2f}M"
    form = ", ".join([settings.get("dtype", ABSENT), *(["compiled"] if settings.get("compiled") else [])])
    for name, row in run.get("optimizers", {}).items():
        cells = [size, form, name, *(quartered(row.get(key)) for key in ("tokens_per_second", "step_ms", "optimizer_ms"))]
        cells += [quartered(row.get("optimizer_share"), 100, " %"), _loss(row), mebibytes(row.get("peak_bytes"))]
        rows.append(
            [
                *cells,
                mebibytes(row.get("state_bytes")),
                run.get("kernels", ABSENT) if name.startswith("schatten") else ABSENT,
                *stamp(run),
            ]
        )
    return rows


def _loss(row: Run) -> str:
    loss, tokens = row.get("validation_loss"), row.get("tokens")
    return ABSENT if loss is None or tokens is None else f"{loss:.3f} after {tokens}"


TABLES = (
    Table(
        title="Training",
        files={"train_gpt2.json": "run on a GPU", "train_gpt2_cpu.json": "run on a CPU"},
        measured="The same initial weights on the same tokens in the same order, one optimizer after another: tokens per "
        "second, milliseconds of a whole step and of the optimizer's part of it over the second half of the steps, validation "
        "loss in nats at equal tokens, the most a run has allocated, and what the optimizer keeps between steps.",
        command="python benchmarks/train_gpt2.py",
        columns=(
            *("parameters", "products", "optimizer", "tokens/s", "step, ms", "optimizer, ms", "share", "loss, tokens"),
            *("peak, MiB", "state, MiB", "kernels", *STAMP),
        ),
        rows=training,
    ),
)
