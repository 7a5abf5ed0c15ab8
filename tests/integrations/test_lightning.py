"""Lightning: `configure_optimizers`, the command line, and a run resumed from a checkpoint file."""

import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import schatten

L = pytest.importorskip("lightning", reason="needs Lightning: pip install 'schatten[lightning]'")
pytest.importorskip("jsonargparse", reason="needs jsonargparse: pip install 'schatten[lightning]'")

import jsonargparse  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.cli import LightningCLI, OptimizerCallable  # noqa: E402

from schatten.integrations.lightning import SpectralCLI  # noqa: E402

pytestmark = [
    # Lightning asks torch and jsonargparse in ways that these have deprecated; what it writes of data loaders is advice.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning:lightning"),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .train_dataloader. does not have many workers"),
    # A resumed run goes on in the folder of the run it resumes.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 2,
    "accumulate_grad_batches": 2,
    "gradient_clip_val": 0.5,
    "log_every_n_steps": 1,
}


class Plain(L.LightningModule):
    """A module that leaves its optimizer to the command line."""

    def __init__(self, width: int = 6):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 2))
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) / 2

    def training_step(self, batch, _):
        x, y = batch
        return nn.functional.mse_loss(self.layers(x), y)

    def train_dataloader(self):
        x = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x, x[:, :2]), batch_size=4)


class Configured(Plain):
    """A module that builds its optimizer and its scheduler itself."""

    preset = schatten.Muon

    def configure_optimizers(self):
        opt = self.preset(self, lr=0.05)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=6)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Injected(Plain):
    """A module whose constructor is given what builds its optimizer."""

    def __init__(self, optimizer: OptimizerCallable, width: int = 6):
        super().__init__(width)
        self.build = optimizer

    def configure_optimizers(self):
        return self.build(self)


def every_epoch(folder):
    # An epoch is three steps; Lightning resumes exactly from the end of one only, unless data loaders keep their place.
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1)


def fitted(model, folder, resume=None, **options):
    trainer = L.Trainer(callbacks=[every_epoch(folder)], **{**QUIET, **options})
    trainer.fit(model, ckpt_path=resume)
    return model


def on_command_line(cli, module, monkeypatch, *words, **options):
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", *words])
    defaults = {**QUIET, "enable_checkpointing": False, **options}
    return cli(module, trainer_defaults=defaults, save_config_callback=None, seed_everything_default=0)


def assert_same_weights(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("name", ["Muon", "NorMuon", "SOAPMuon"])
def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path, name):
    def model():
        module = Configured()
        module.preset = getattr(schatten, name)
        return module

    whole = fitted(model(), tmp_path)
    rest = fitted(model(), tmp_path, resume=tmp_path / "step=3.ckpt")
    assert_same_weights(whole, rest)
    opt = rest.trainer.optimizers[0]
    assert [group["step"] for group in opt.param_groups] == [6] * len(opt.param_groups)


def test_gradients_are_clipped_in_mixed_precision(tmp_path):
    # Lightning refuses to clip for an optimizer that says it unscales gradients itself, in bf16 too, where nothing is scaled.
    model = fitted(Configured(), tmp_path, precision="bf16-mixed", gradient_clip_val=0.5)
    assert model.trainer.global_step == 6


def test_its_checkpoint_loads_without_running_code(tmp_path):
    fitted(Configured(), tmp_path)
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    assert {group["algorithm"] for group in saved["optimizer_states"][0]["param_groups"]} == {"spectral", "adamw"}


def test_metrics_are_read_from_within_a_resumed_fit(tmp_path):
    class Reading(Configured):
        def on_train_batch_end(self, *_):
            self.read = self.optimizers().metrics()

    fitted(Reading(), tmp_path)
    model = fitted(Reading(), tmp_path, resume=tmp_path / "step=3.ckpt", max_steps=4, max_epochs=None)
    # The scheduler has stepped four times on lr 0.05, and Lightning's proxy reads the groups that the checkpoint left.
    lr = model.trainer.optimizers[0].param_groups[0]["lr"]
    assert lr == pytest.approx(0.05 * 0.25)
    factor = schatten.scales.Scale().factor(6, 4)
    assert model.read["effective_lr"]["layers.0.weight"] == pytest.approx(lr * factor)
    assert model.read["without_gradient"] == []


def test_the_command_line_builds_a_preset_on_the_module(monkeypatch):
    words = ["--optimizer", "schatten.Muon", "--optimizer.lr", "0.01", "--optimizer.scale", "keller"]
    schedule = ["--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "1"]
    cli = on_command_line(SpectralCLI, Plain, monkeypatch, *words, *schedule, max_steps=1)
    (opt,) = cli.trainer.optimizers
    assert type(opt) is schatten.Muon
    assert opt.plan == schatten.plan(Plain())
    # A scheduler that Lightning steps by epochs has not stepped yet.
    assert (opt.param_groups[0]["initial_lr"], opt.param_groups[0]["scale"]) == (0.01, "keller")


def test_the_command_line_resumes_to_the_uninterrupted_run(monkeypatch, tmp_path):
    words = ["--optimizer", "schatten.NorMuon", "--optimizer.lr", "0.01"]

    def run(*more):
        options = {"callbacks": every_epoch(tmp_path), "enable_checkpointing": True}
        return on_command_line(SpectralCLI, Plain, monkeypatch, *words, *more, **options).model

    assert_same_weights(run(), run("--ckpt_path", str(tmp_path / "step=3.ckpt")))


def test_the_command_line_still_builds_other_optimizers(monkeypatch):
    cli = on_command_line(SpectralCLI, Plain, monkeypatch, "--optimizer", "torch.optim.AdamW", "--optimizer.lr", "0.5")
    (opt,) = cli.trainer.optimizers
    assert type(opt) is torch.optim.AdamW and opt.param_groups[0]["lr"] == 0.5


def test_without_an_optimizer_the_module_configures_its_own(monkeypatch):
    cli = on_command_line(SpectralCLI, Configured, monkeypatch)
    assert cli.trainer.optimizers[0].param_groups[0]["initial_lr"] == 0.05


def test_a_schedule_without_an_optimizer_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="give both, or neither"):
        on_command_line(SpectralCLI, Plain, monkeypatch, "--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "1")


def test_an_option_that_no_preset_has_is_refused_by_the_parser(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        on_command_line(SpectralCLI, Plain, monkeypatch, "--optimizer", "schatten.Muon", "--optimizer.scael", "keller")
    assert "Option 'scael' is not accepted" in capsys.readouterr().err


def test_lightnings_own_command_line_is_refused_because_it_passes_no_modules(monkeypatch):
    with pytest.raises(ValueError, match=r"A spectral rule needs matrices, but .* Pass the model itself"):
        on_command_line(LightningCLI, Plain, monkeypatch, "--optimizer", "schatten.Muon")


def test_a_module_that_is_given_what_builds_its_optimizer_needs_no_class_of_ours(monkeypatch):
    words = ["--model.optimizer", "schatten.NorMuon", "--model.optimizer.lr", "0.01"]
    cli = on_command_line(LightningCLI, Injected, monkeypatch, *words, max_steps=1)
    (opt,) = cli.trainer.optimizers
    assert type(opt) is schatten.NorMuon and opt.plan == schatten.plan(cli.model)
    assert (opt.param_groups[0]["lr"], opt.param_groups[0]["weight_decay"]) == (0.01, 0.0), "its own default decay"


def test_every_preset_is_configured_from_its_signature(any_preset):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(torch.optim.Optimizer, "optimizer", skip={"params"}, instantiate=False)
    path = f"schatten.{any_preset.__name__}"
    # The first is each preset's own, the second its base's, which it takes as **options.
    given = parser.parse_args([f"--optimizer={path}", "--optimizer.lr=0.5", "--optimizer.rounding=nearest"])
    options = parser.instantiate(given).optimizer.init_args.as_dict()
    model = nn.Linear(4, 6)
    opt, own = any_preset(model, **options), any_preset(model, lr=0.5, rounding="nearest")
    # Everything that was not given is passed as the signature's default: that must change nothing.
    assert opt.plan == own.plan
    assert [{**group, "params": 0} for group in opt.param_groups] == [{**group, "params": 0} for group in own.param_groups]
