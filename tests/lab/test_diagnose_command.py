"""`schatten diagnose` as a user runs it: tables, report and JSON, and a file larger than the memory it may take."""

import base64
import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from schatten import cli
from schatten.lab.commands import app
from schatten.lab.errors import InputError

MIB = 1 << 20


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["diagnose", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def model(layers: int = 3, size: float = 1.0) -> dict[str, torch.Tensor]:
    tensors = {"embed_tokens.weight": torch.randn(40, 16), "norm.weight": torch.ones(16)}
    for i in range(layers):
        for name, shape in (("self_attn.qkv_proj", (48, 16)), ("self_attn.o_proj", (16, 16)), ("mlp.up_proj", (64, 16))):
            tensors[f"layers.{i}.{name}.weight"] = size * torch.randn(shape)
        tensors[f"layers.{i}.mlp.experts.down_proj"] = torch.randn(2, 16, 8)
    return tensors


@pytest.fixture
def checkpoint(tmp_path):
    save_file(model(), tmp_path / "model.safetensors")
    return tmp_path


def test_the_table_shows_the_most_notable_first_and_as_many_as_asked(checkpoint):
    tensors = model()
    tensors["layers.1.mlp.up_proj.weight"][2, 3] = float("nan")
    tensors["layers.2.self_attn.o_proj.weight"] += 5
    save_file(tensors, checkpoint / "model.safetensors")
    output = run(checkpoint, "--limit", 3).splitlines()
    lines = [line.split() for line in output if line.strip().startswith("layers") and ":" not in line]
    assert [line[0] for line in lines[:2]] == ["layers.1.mlp.up_proj", "layers.2.self_attn.o_proj"] and len(lines) == 3
    assert "layers.1.mlp.up_proj.weight: 1 entry is nan or infinite" in "\n".join(output)
    everything = run(checkpoint, "--limit", 0)
    assert sum(line.strip().startswith("layers") and ":" not in line for line in everything.splitlines()) == 21
    assert "layers.0.self_attn.qkv_proj[q]" in everything


def test_the_report_is_one_file_with_its_pictures_inside(checkpoint, tmp_path):
    save_file(model(size=1.1), checkpoint / "second.safetensors")
    out = tmp_path / "out" / "put"
    output = run(checkpoint / "model.safetensors", "--against", checkpoint / "second.safetensors", "--out", out)
    assert str(out / "report.html") in output
    page = (out / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']?(http|//|\w+\.png)""", page)
    images = [base64.b64decode(found) for found in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    assert len(images) == 4 and all(image.startswith(b"\x89PNG") for image in images)
    assert {file.read_bytes() for file in out.glob("*.png")} == set(images)
    assert "layers.2.mlp.experts.down_proj[1]" in page and "What changed" in page


def test_names_of_a_file_cannot_write_into_the_report_or_the_terminal(tmp_path):
    save_file({"<script>x</script>": torch.eye(3), "\x1b[2Jw": torch.eye(3)}, tmp_path / "m.safetensors")
    output = run(tmp_path / "m.safetensors", "--out", tmp_path / "out")
    assert "\x1b" not in output and "<script>" not in (tmp_path / "out" / "report.html").read_text()


def test_json_has_every_number_and_is_the_reports(checkpoint, tmp_path):
    run(checkpoint, "--json", tmp_path / "deep" / "d.json", "--out", tmp_path / "out", "--against", checkpoint)
    content = json.loads((tmp_path / "deep" / "d.json").read_text())
    assert content == json.loads((tmp_path / "out" / "data.json").read_text())
    rows = {row["name"]: row for row in content["matrices"]}
    row = rows["layers.0.self_attn.o_proj.weight"]
    s = torch.linalg.svdvals(load_file(checkpoint / "model.safetensors")["layers.0.self_attn.o_proj.weight"].double())
    assert row["sigma_max"] == pytest.approx(float(s[0]), rel=1e-9)
    assert row["quantiles"][0] == pytest.approx(float(s[-1])) and row["quantiles"][-1] == pytest.approx(float(s[0]))
    assert row["weight_decay"]["adamw-rms"] == pytest.approx(0.2 * 4 / float(s[0]))
    assert [t["name"] for t in content["not_measured"]] == ["norm.weight"]
    assert all(change["relative"] == 0 for change in content["against"]["changes"])


def test_quick_leaves_small_matrices_exact_and_iterates_on_large_ones(tmp_path):
    save_file({"big": torch.randn(520, 600), "small": torch.randn(20, 30)}, tmp_path / "m.safetensors")
    run(tmp_path / "m.safetensors", "--quick", "--json", tmp_path / "d.json")
    rows = {row["name"]: row for row in json.loads((tmp_path / "d.json").read_text())["matrices"]}
    assert rows["big"]["method"] == "krylov" and rows["big"]["sigma_median"] == "nan" and rows["big"]["quantiles"] == []
    assert rows["small"]["method"] == "svd"


@pytest.mark.parametrize(("option", "value"), [("--limit", "-1"), ("--top", "0"), ("--max-size", "0"), ("--device", "none")])
def test_wrong_options_are_one_line(checkpoint, option, value):
    result = CliRunner().invoke(app, ["diagnose", str(checkpoint), option, value])
    assert isinstance(result.exception, InputError) and option in str(result.exception)


def test_outputs_that_cannot_be_written_are_refused_before_anything_is_measured(checkpoint):
    for option, path in (("--out", checkpoint / "model.safetensors" / "x"), ("--json", checkpoint)):
        result = CliRunner().invoke(app, ["diagnose", str(checkpoint), option, str(path)])
        assert isinstance(result.exception, InputError) and option in str(result.exception)


def test_a_damaged_file_ends_with_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    (tmp_path / "m.safetensors").write_bytes(b"garbage that is no header")
    monkeypatch.setattr(sys, "argv", ["schatten", "diagnose", str(tmp_path / "m.safetensors")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    written = capsys.readouterr()
    assert stopped.value.code == 2 and written.out == ""
    assert written.err.startswith("error: ") and written.err.count("\n") == 1


# Peak memory of a process after small files and after each large one; anonymous memory alone is limited meanwhile.
MEASURE = """
import json, resource, sys
from pathlib import Path
from schatten.lab.checkpoint_reader import open_checkpoint
from schatten.lab.diagnose import diagnose

def measure(path):
    diagnose(open_checkpoint(Path(path)), max_size=4096, device="cpu", progress=lambda name, count: None)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

limit, *files = sys.argv[1:]
small = [measure(file) for file in files[:2]][-1]
now = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (now + int(limit), now + int(limit)))
print(json.dumps([small, *(measure(file) for file in files[2:])]))
"""


def sparse(path: Path, count: int, shape: tuple[int, int]) -> Path:
    """A safetensors file of zeros that takes no room on the disk, but is as long as its tensors."""
    size = 4 * shape[0] * shape[1]
    entries = {
        f"w{i}": {"dtype": "F32", "shape": list(shape), "data_offsets": [i * size, (i + 1) * size]} for i in range(count)
    }
    text = json.dumps(entries).encode()
    # The format aligns its data to eight bytes.
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + count * size)
    return path


def large_torch_file(path: Path, count: int, shape: tuple[int, int]) -> Path:
    torch.save({f"w{i}": torch.ones(shape) for i in range(count)}, path)
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's accounts of memory")
def test_files_larger_than_the_memory_they_may_take_are_measured(tmp_path):
    """512 MiB of safetensors and 192 of torch, with 96 MiB of memory beyond what files of one matrix took.

    A private map of the file, as safetensors' own reader and torch.load(mmap=True) make, counts as memory to that limit, as
    does any copy; and the pages that are in memory at once stay as few.
    """
    shape = (64, 16384)
    files = [sparse(tmp_path / "s1", 1, shape), large_torch_file(tmp_path / "t1", 1, shape)]
    files += [sparse(tmp_path / "s2", 128, shape), large_torch_file(tmp_path / "t2", 48, shape)]
    command = [sys.executable, "-c", MEASURE, str(96 * MIB), *map(str, files)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    small, *large = json.loads(result.stdout)
    assert [file.stat().st_size > size * MIB for file, size in zip(files[2:], (512, 192), strict=True)] == [True, True]
    assert max(large) - small < 64 * MIB, [(peak - small) / MIB for peak in large]
