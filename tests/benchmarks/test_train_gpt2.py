"""benchmarks/train_gpt2.py at tiny sizes: three optimizers, one start, one order of tokens; what it writes, what it refuses."""

import json
from functools import cache
from itertools import accumulate
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import schatten
from benchmarks import train_gpt2
from benchmarks.train_gpt2_parts import settings as chosen
from benchmarks.train_gpt2_parts import training
from benchmarks.train_gpt2_parts.optimizers import BETAS, build
from benchmarks.train_gpt2_parts.settings import ADAMW, OPTIMIZERS, SCHATTEN, TORCH
from schatten.lab import data
from schatten.lab.errors import InputError
from schatten.lab.models import GPT

TINY = ["--device", "cpu", "--size", "tiny", "--context", "16", "--batch", "4", "--steps", "6", "--eval-windows", "4"]

# fp32 sums over a batch, in another order.
SAME = 1e-5


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """The command's result, which is what it wrote; one run for each list of arguments."""

    @cache
    def command(*more):
        out = tmp_path_factory.mktemp("run") / "found.json"
        result = train_gpt2.run([*TINY, "--out", str(out), *map(str, more)])
        assert "NaN" not in out.read_text()
        assert json.loads(out.read_text()).items() >= json.loads(json.dumps(result)).items()
        return result

    return command


def build_settings(*more):
    return chosen.settings(train_gpt2.parser().parse_args([*TINY, *map(str, more)]))


def test_three_optimizers_train_the_same_start_on_the_same_tokens(train):
    rows = train()["optimizers"]
    assert list(rows) == list(OPTIMIZERS)
    first = [row["train_loss"][0] for row in rows.values()]
    assert first == pytest.approx([first[0]] * 3, rel=SAME)
    assert len({tuple(row["validation"][0]) for row in rows.values()}) == 1
    assert {row["tokens"] for row in rows.values()} == {6 * 4 * 16}
    for row in rows.values():
        assert row["train_loss"][-1] < row["train_loss"][0] - 0.5
        assert row["validation_loss"] < row["validation"][0][1] - 0.5
        assert row["validation"][-1] == [row["tokens"], row["validation_loss"]]


def test_a_table_is_printed_with_a_line_for_each_optimizer(train, capsys):
    capsys.readouterr()
    rows = train("--eval-every", 3, "--optimizers", f"{ADAMW},{SCHATTEN}")["optimizers"]
    *_, header, first, second = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["optimizer", "tokens/s"]
    for name, line in zip(rows, (first, second), strict=True):
        assert line.startswith(f"{name}  ") and f" {rows[name]['validation_loss']:.4f} " in line


def test_shares_and_quartiles_are_in_order(train):
    for row in train()["optimizers"].values():
        for key in ("tokens_per_second", "step_ms", "optimizer_ms", "optimizer_share"):
            low, middle, high = row[key]
            assert 0 < low <= middle <= high
        assert row["optimizer_share"][2] < 1
        assert 0 < row["first_optimizer_step_s"] < row["first_step_s"]


def test_every_key_of_the_file_is_in_the_docstring_and_always_there(train):
    found = train("--optimizers", ADAMW)
    nested = [found, *(found[key] for key in ("model", "data", "settings")), found["optimizers"][ADAMW]]
    words = set(train_gpt2.__doc__.replace(",", " ").replace("`", " ").split())
    assert not [key for part in nested for key in part if key not in words]
    assert set(found["versions"]) == {"python", "torch", "cuda", "triton", "schatten"}
    assert (found["device"], found["optimizers"][ADAMW]["peak_bytes"]) == ("cpu", None)
    assert set(found["optimizers"][ADAMW]) == {
        *("lr", "parameters", "tokens_per_second", "step_ms", "optimizer_ms", "optimizer_share", "first_step_s"),
        *("first_optimizer_step_s", "tokens", "train_loss", "validation", "validation_loss", "peak_bytes", "state_bytes"),
        "seconds",
    }


def test_routes_and_state_are_counted(train):
    found = train()
    total, width = found["model"]["parameters"], found["model"]["width"]
    hidden = 2 * 12 * width**2
    vectors = 256 * width + 16 * width + 5 * width
    assert total == hidden + vectors
    rows = found["optimizers"]
    for name in (SCHATTEN, TORCH):
        assert rows[name]["parameters"] == {"spectral": hidden, "adamw": vectors}
        # One momentum of a matrix, two averages of the rest, and counters.
        assert 0 <= rows[name]["state_bytes"] - 4 * (hidden + 2 * vectors) < 2000
    assert rows[ADAMW]["parameters"] == {"spectral": 0, "adamw": total}
    assert 0 <= rows[ADAMW]["state_bytes"] - 8 * total < 2000


def test_a_row_does_not_depend_on_what_ran_before_it(train):
    together = train()["optimizers"]
    for names in ([TORCH], [ADAMW, SCHATTEN]):
        found = train("--optimizers", ",".join(names))["optimizers"]
        assert list(found) == names
        assert all(found[name]["train_loss"] == together[name]["train_loss"] for name in names)


def test_the_loop_is_that_of_a_literal_twin(train):
    row = train("--optimizers", ADAMW, "--lr", 1e-2, "--seed", 3, "--warmup", 2, "--schedule", "linear")["optimizers"][ADAMW]
    corpus = data.load("pydoc", "byte", 16)
    torch.manual_seed(3)
    model = GPT(chosen.gpt_config(build_settings(), corpus))
    groups = [[p for p in model.parameters() if (p.ndim == 2) == wide] for wide in (True, False)]
    opt = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}], lr=1e-2, betas=BETAS
    )
    losses = []
    # Warm-up over two steps, then constant until 40 % of the remaining four are left.
    for step, factor in enumerate((1 / 3, 2 / 3, 1, 1, 1, 0.625)):
        for group in opt.param_groups:
            group["lr"] = 1e-2 * factor
        loss = model(*data.batch(corpus.train, 16, 4, seed=3, step=step))
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        losses.append(loss.item())
    assert row["train_loss"] == pytest.approx(losses, rel=SAME)


def test_micro_batches_of_a_step_are_its_batch_in_pieces(train):
    whole = train("--optimizers", ADAMW)
    pieces = train("--optimizers", ADAMW, "--batch", 1, "--accumulate", 4)
    assert pieces["settings"]["tokens_per_step"] == whole["settings"]["tokens_per_step"]
    # Adam's ratio is discontinuous at 0, where the order of a sum decides the sign.
    assert pieces["optimizers"][ADAMW]["train_loss"] == pytest.approx(whole["optimizers"][ADAMW]["train_loss"], rel=1e-3)


def test_a_compiled_model_trains_alike_and_its_optimizer_sees_plain_names(train):
    compiled = train("--optimizers", SCHATTEN, "--compile", "--compile-backend", "eager")
    assert (train()["settings"]["compiled"], compiled["settings"]["compiled"]) == (False, True)
    assert compiled["optimizers"][SCHATTEN]["train_loss"] == train()["optimizers"][SCHATTEN]["train_loss"]
    trainer = training.Trainer(build_settings("--compile", "--compile-backend", "eager"), data.load("pydoc", "byte", 16))
    (opt,) = trainer.begin(SCHATTEN)
    names = [entry.name for entry in opt.plan]
    assert names == [name for name, _ in trainer.plain.named_parameters()]
    assert trainer.model is not trainer.plain
    assert names == [entry.name for entry in schatten.plan(trainer.model)]


def test_autocast_computes_in_bf16_and_keeps_weights_in_fp32(train):
    plain, short = train("--optimizers", ADAMW), train("--optimizers", ADAMW, "--dtype", "bf16")
    a, b = (found["optimizers"][ADAMW]["train_loss"] for found in (plain, short))
    assert a != b
    assert b == pytest.approx(a, rel=2**-6)
    assert short["optimizers"][ADAMW]["state_bytes"] == plain["optimizers"][ADAMW]["state_bytes"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_token_files_of_nanogpt_are_read(train, tmp_path, kind):
    tokens = (np.arange(4000) ** 2 % 300).astype(np.uint16)
    if kind == "file":
        tokens.tofile(tmp_path / "tokens.bin")
        source, parts = tmp_path / "tokens.bin", (3600, 400)
    else:
        source, parts = tmp_path / "tokens", (4000, 100)
        source.mkdir()
        tokens.tofile(source / "train.bin")
        tokens[:100].tofile(source / "val.bin")
    found = train("--data", source, *(("--optimizers", SCHATTEN) if kind == "folder" else ()))
    assert (found["data"]["train_tokens"], found["data"]["validation_tokens"]) == parts
    assert found["model"]["vocabulary"] == found["data"]["vocabulary"] == 1 + int(tokens.max())
    for row in found["optimizers"].values():
        assert row["train_loss"][-1] < row["train_loss"][0]


def test_a_text_file_is_read_in_the_tokens_asked_for(train, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat. " * 60)
    found = train("--data", path, "--tokens", "char", "--optimizers", SCHATTEN)
    assert found["data"]["source"] == "text.txt"
    assert found["model"]["vocabulary"] == len(set("the cat sat on the mat. "))


def test_each_optimizer_takes_its_own_lr():
    s = build_settings("--lr", 1e-3, "--lr-torch", 2e-3, "--lr-adamw", 3e-3)
    assert s.lrs == {SCHATTEN: 1e-3, TORCH: 2e-3, ADAMW: 3e-3}
    model = GPT(chosen.gpt_config(s, data.load("pydoc", "byte", 16)))
    for name, lr in s.lrs.items():
        groups = [group for optimizer in build(name, model, lr, 0.1) for group in optimizer.param_groups]
        assert {group["lr"] for group in groups} == {lr}
        gains = {id(p) for p in model.parameters() if p.ndim < 2}
        for group in groups:
            assert {id(p) in gains for p in group["params"]} == {group["weight_decay"] == 0}
    assert set(build_settings("--size", "gpt2").lrs.values()) == {6e-4}


def test_a_loss_that_is_not_finite_is_null(train):
    row = train("--optimizers", ADAMW, "--lr", 1e30, "--clip", 0, "--warmup", 0)["optimizers"][ADAMW]
    assert row["train_loss"][0] is not None
    assert row["train_loss"][-1] is None and row["validation_loss"] is None


# -- time and memory ---------------------------------------------------------------------------------------------------


def test_minutes_shorten_every_optimizer_alike():
    s, trainer = build_settings("--steps", 100, "--minutes", 1), SimpleNamespace(evaluation=0.1)
    rehearsals = {name: training.Rehearsal(1.0, 0.5, step) for name, step in zip(OPTIMIZERS, (0.2, 0.3, 0.5), strict=True)}
    # 0.95 of 40 seconds, less three times nine evaluations, at one second for a step of each.
    assert len(s.evaluations(100)) == 9
    assert train_gpt2.steps_within(s, trainer, rehearsals, 20) == 35
    assert train_gpt2.steps_within(s, trainer, rehearsals, -1000) == 100
    with pytest.raises(InputError, match="--minutes 1 leaves 0 steps"):
        train_gpt2.steps_within(s, trainer, rehearsals, 70)


def test_fewer_steps_within_minutes_are_a_run_of_so_many(train, monkeypatch):
    asked = train("--optimizers", ADAMW, "--steps", 10)
    monkeypatch.setattr(train_gpt2, "affordable", lambda *_: 10)
    found = train("--optimizers", ADAMW, "--steps", 40, "--minutes", 1)
    assert (found["settings"]["steps"], found["settings"]["warmup"]) == (10, 1)
    for key in ("train_loss", "validation"):
        assert found["optimizers"][ADAMW][key] == asked["optimizers"][ADAMW][key]


def test_speeds_are_of_the_second_half_of_the_steps(monkeypatch):
    trainer = training.Trainer(build_settings(), data.load("pydoc", "byte", 16))
    # Three marks of each of six steps, seconds apart: 100 in the first half; then a step of 2 seconds, the optimizer's 0.5.
    apart = iter([100.0] * 9 + [100.0, 1.5, 0.5] * 3)
    now = accumulate(apart)
    monkeypatch.setattr(trainer.clock, "mark", lambda: next(now))
    row = trainer.train(ADAMW, 6, lambda *_: None)
    assert row["step_ms"] == [2000] * 3
    assert row["optimizer_ms"] == [500] * 3
    assert row["optimizer_share"] == [0.25] * 3
    assert row["tokens_per_second"] == [4 * 16 / 2] * 3


def test_on_a_gpu_time_is_between_events_once_the_device_has_been_waited_for(monkeypatch):
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("record")

        def elapsed_time(self, other):
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    clock = training.Clock("cuda")
    start, end = clock.mark(), clock.mark()
    clock.wait()
    assert (clock.seconds(start, end), calls) == (0.25, ["record", "record", "wait"])


def test_a_batch_that_does_not_fit_is_halved_and_accumulated_where_it_was_not_asked_for(monkeypatch, capsys):
    class Small(training.Trainer):
        def rehearse(self, name):
            if self.settings.batch > 2:
                raise torch.OutOfMemoryError("too large")
            return super().rehearse(name)

    monkeypatch.setattr(train_gpt2, "Trainer", Small)
    corpus = data.load("pydoc", "byte", 16)
    arguments = [*TINY[: TINY.index("--batch")], "--eval-windows", "4"]
    free = chosen.settings(train_gpt2.parser().parse_args(arguments))
    trainer, found = train_gpt2.rehearsed(free, corpus)
    assert (trainer.settings.batch, trainer.settings.accumulate) == (2, 4)
    assert trainer.settings.tokens == free.tokens
    assert list(found) == list(OPTIMIZERS)
    assert "out of memory: now 2 windows in each of 4" in capsys.readouterr().out
    with pytest.raises(InputError, match="--batch 4 of --context 16 does not fit"):
        train_gpt2.rehearsed(build_settings(), corpus)


@pytest.mark.parametrize(
    ("gigabytes", "context", "lean", "batch"),
    [
        (80, 1024, True, 64),
        (80, 1024, False, 32),
        (40, 1024, True, 32),
        (24, 1024, True, 16),
        (80, 2048, True, 32),
        (1, 1024, False, 1),
    ],
)
def test_a_gpus_batch_follows_its_memory(monkeypatch, gigabytes, context, lean, batch):
    device = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    assert chosen._fitting(chosen.SIZES["gpt2"], "cuda", context, lean) == batch


def test_gpt2_has_the_parameters_of_gpt2():
    corpus = SimpleNamespace(vocabulary=50257, source="tokens")
    s = build_settings("--size", "gpt2", "--context", 1024)
    with torch.device("meta"):
        model = GPT(chosen.gpt_config(s, corpus))
    # OpenAI's has 124,439,808, of which 102,144 are biases; the padded table has 47 rows more.
    assert sum(p.numel() for p in model.parameters()) == 124_439_808 - 102_144 + 47 * 768


# -- wrong input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.bin"], "--data nowhere.bin does not exist"),
        (["--tokens", "words"], "--tokens must be byte, char or bpe:N"),
        (["--context", "100000"], "smaller --context"),
        (["--size", "large"], "argument --size: invalid choice: 'large'"),
        (["--dtype", "fp8"], "argument --dtype: invalid choice"),
        (["--optimizers", "Lion,AdamW"], "--optimizers takes some of .*, got Lion"),
        (["--optimizers", ","], "--optimizers takes some of .*, got none"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--steps", "3"], "--steps must be at least 4, got 3"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--context", "0"], "--context must be at least 1, got 0"),
        (["--accumulate", "0"], "--accumulate must be at least 1, got 0"),
        (["--eval-every", "0"], "--eval-every must be at least 1, got 0"),
        (["--eval-windows", "0"], "--eval-windows must be at least 1, got 0"),
        (["--warmup", "-1"], "--warmup must be at least 0, got -1"),
        (["--warmup", "6"], "--warmup must end before the last of --steps 6, got 6"),
        (["--lr", "0"], "--lr must be a positive number, got 0"),
        (["--lr-torch", "nan"], "--lr-torch must be a positive number, got nan"),
        (["--weight-decay", "-0.1"], "--weight-decay must be at least 0, got -0.1"),
        (["--clip", "inf"], "--clip must be at least 0, got inf"),
        (["--schedule", "square"], "--schedule must be one of cosine"),
        (["--minutes", "0"], "--minutes must be a positive number, got 0"),
        (["--minutes", "1e-6"], "--minutes 1e-06 leaves 0 steps"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--compile-backend", "none", "--compile"], "--compile-backend must be one of .*, got 'none'"),
        (["--speed"], "unrecognized arguments: --speed"),
    ],
)
def test_wrong_input_is_one_line_that_names_the_flag(arguments, message, tmp_path, monkeypatch, capsys):
    with pytest.raises(InputError, match=message) as raised:
        train_gpt2.run([*TINY, "--out", str(tmp_path / "out.json"), *arguments])
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out.json").exists()
    monkeypatch.setattr("sys.argv", ["train_gpt2.py", *TINY, "--out", str(tmp_path / "out.json"), *arguments])
    with pytest.raises(SystemExit) as ended:
        train_gpt2.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip().splitlines() == [f"error: {raised.value}"]


def test_an_out_that_cannot_be_written_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file" / "out.json"):
        with pytest.raises(InputError, match=r"--out .* cannot be written"):
            train_gpt2.run([*TINY, "--out", str(out)])


def test_tokens_beyond_gpt2s_table_are_refused(tmp_path):
    np.full(400, 60000, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    with pytest.raises(InputError, match=r"tokens up to 60,000, --size gpt2 has 50,304"):
        train_gpt2.run([*TINY, "--size", "gpt2", "--data", str(tmp_path / "tokens.bin"), "--out", str(tmp_path / "o.json")])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="--device cuda needs a GPU"):
        train_gpt2.run(["--device", "cuda"])


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon of its own before 2.9")
def test_an_older_torch_is_told_to_leave_its_muon_out(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(InputError, match=r"needs torch 2\.9 or later"):
        build_settings()
    assert list(build_settings("--optimizers", ADAMW).lrs) == [ADAMW]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_events_and_memory_are_read(tmp_path):
    found = train_gpt2.run([*TINY[2:], "--device", "cuda", "--compile", "--out", str(tmp_path / "out.json")])
    assert found["device"] == torch.cuda.get_device_name()
    assert found["settings"]["dtype"] == "bf16"
    rows = found["optimizers"]
    assert all(row["peak_bytes"] > row["state_bytes"] and 0 < row["optimizer_share"][1] < 1 for row in rows.values())
    first = [row["train_loss"][0] for row in rows.values()]
    assert first == pytest.approx([first[0]] * 3, rel=SAME)
