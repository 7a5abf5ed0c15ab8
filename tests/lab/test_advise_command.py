"""`schatten advise` as typed: its table, its JSON, and one line with exit code 2 for every kind of wrong input."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from schatten import cli
from schatten.lab import advise_inputs
from schatten.lab.errors import InputError

USERS_FILE = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 64))

class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = model()

    def forward(self, x):
        return {"loss": (self.body(x) - x).square().mean()}

def with_loss():
    return WithLoss()

def batches():
    g = torch.Generator().manual_seed(0)
    while True:
        yield torch.randn(32, 64, generator=g)

def few():
    return [torch.zeros(1, 64)] * 3

def integers():
    return 3

def squares(model, batch):
    return (model(batch) - batch).square().mean()

def infinite(model, batch):
    return squares(model, batch) * float("inf")

def vectors():
    return nn.LayerNorm(4)

def tiny_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=32, n_embd=32, n_layer=1, n_head=2))

def losses():
    return [lambda model, x=x: squares(model, x) for x in torch.randn(8, 32, 64)]

def of_others():
    x = torch.ones(2, requires_grad=True)
    return [lambda model: x.sum()] * 8

NUMBER = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "advise_user.py").write_text(USERS_FILE)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "advise_user", raising=False)
    return tmp_path


def advise(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["schatten", "advise", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


SMALL = ("--batches=8", "--iterations=2")


def test_a_users_model_gets_a_table_and_the_numbers_as_json(here, monkeypatch, capsys):
    options = ("advise_user:model", "advise_user:batches", "--loss=advise_user:squares", "--json=out/advice.json", "--radius=2")
    assert advise(monkeypatch, *options, *SMALL) == 0
    told = capsys.readouterr().out
    assert "orthogonalise" in told and "0  " in told and "starting lr: " in told and "gradient noise scale" in told
    found = json.loads((here / "out/advice.json").read_text())
    assert [row["name"] for row in found["matrices"]] == ["0.weight", "2.weight"]
    assert found["matrices"][0]["weight_decay"] == pytest.approx(0.2 * 64**0.5 / 2)
    assert set(found["matrices"][0]["slopes"]) == {"0", "0.25", "0.5", "1"}
    assert found["draws"] == 4 and len(found["joint"]) == 3


def test_a_model_that_returns_its_loss_needs_no_function_for_it(here, monkeypatch, capsys):
    assert advise(monkeypatch, "advise_user:with_loss", "advise_user:batches", "--only=body.2*", *SMALL) == 0
    told = capsys.readouterr().out
    assert "body.2" in told and "body.0" not in told


def test_data_may_be_functions_of_the_model(here, monkeypatch, capsys):
    assert advise(monkeypatch, "advise_user:model", "advise_user:losses", *SMALL) == 0
    assert "of 2 matrices" in capsys.readouterr().out


def test_the_labs_gpt_reads_a_text_and_loads_what_a_comparison_saved(here, monkeypatch, capsys):
    from safetensors.torch import save_model

    from schatten.lab.models import GPT, GPTConfig

    model = GPT(GPTConfig(256, 64))
    with torch.no_grad():
        model.blocks[0].up.weight.copy_(3 * torch.eye(512, 128))
    save_model(model, here / "model.safetensors")
    options = ("gpt", "text.txt", "--checkpoint=model.safetensors", "--only=blocks.0.up*", "--batch=2", *SMALL)
    assert advise(monkeypatch, *options) == 0
    (row,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("blocks.0.up")]
    assert row[-2] == "3"  # the spectral norm of the weight that was loaded


def test_a_hugging_face_model_reads_a_text_its_fused_projection_as_three_matrices(here, monkeypatch, capsys):
    pytest.importorskip("transformers")
    options = ("advise_user:tiny_gpt2", "text.txt", "--context=16", "--batch=2", "--only=*c_attn*", *SMALL)
    assert advise(monkeypatch, *options) == 0
    told = capsys.readouterr().out
    assert all(f"c_attn.weight[{i}]" in told for i in range(3)) and "of 3 matrices" in told


def test_torch_checkpoints_are_read_without_running_what_is_in_them(here):
    model = nn.Linear(3, 2)
    torch.save({"model": {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}}, here / "good.pt")
    advise_inputs.load_weights(model, here / "good.pt")
    assert bool((model.weight == 1).all())
    ran = here / "ran"
    torch.save({"model": _Runs(ran)}, here / "bad.pt")
    with pytest.raises(InputError, match="no weights that can be read"):
        advise_inputs.load_weights(model, here / "bad.pt")
    assert not ran.exists()


class _Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpt2", "pydoc"), "MODEL has no 'gpt2'; known are gpt, llama-8b"),
        (("nosuchmodule:f", "pydoc"), "MODEL nosuchmodule:f cannot be imported"),
        (("advise_user:nothing", "pydoc"), "cannot be imported"),
        (("advise_user:NUMBER", "text.txt"), "must be a function, got int"),
        (("advise_user:integers", "text.txt"), "must return a torch.nn.Module, got int"),
        (("advise_user:vectors", "advise_user:batches"), "No parameter of this model is routed to a spectral rule"),
        (("llama-70b", "text.txt"), "billion parameters"),
        (("gpt", "missing.txt"), "missing.txt does not exist"),
        (("gpt", "advise_user:batches"), "reads text"),
        (("advise_user:model", "advise_user:integers"), "must return an iterable of batches"),
        (("advise_user:model", "advise_user:few"), "gave 3 batches, --batches asks for 8"),
        (("advise_user:model", "advise_user:batches"), "got a tensor of shape (32, 64): give --loss"),
        (("advise_user:model", "advise_user:batches", "--loss=advise_user:infinite"), "not finite"),
        (("advise_user:model", "advise_user:of_others"), "All gradients are zero"),
        (("advise_user:model", "advise_user:batches", "--loss=nothing"), "--loss has no 'nothing'"),
        (("gpt", "text.txt", "--loss=advise_user:squares"), "--loss goes with DATA as package.module:function"),
        (("gpt", "text.txt", "--only=nothing*"), "No matrix of this model is named 'nothing*'"),
        (("gpt", "text.txt", "--batches=7"), "--batches must be an even number of at least 8"),
        (("gpt", "text.txt", "--batch=0"), "--batch must be at least 1"),
        (("gpt", "text.txt", "--radius=0"), "--radius must be positive"),
        (("gpt", "text.txt", "--json=."), "is a folder"),
        (("gpt", "text.txt", "--device=abacus"), "--device abacus cannot be used"),
        (("gpt", "text.txt", "--checkpoint=none.pt"), "--checkpoint none.pt does not exist"),
        (("gpt", "text.txt", "--checkpoint=text.txt"), "holds no weights that can be read"),
        (("gpt", "text.txt", "--checkpoint=other.safetensors"), "of another model"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(here, monkeypatch, capsys, arguments, message):
    from safetensors.torch import save_file

    save_file({"other": torch.zeros(2)}, here / "other.safetensors")
    assert advise(monkeypatch, *SMALL, *arguments) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and told.err.count("\n") == 1
    assert message in told.err
