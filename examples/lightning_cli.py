"""LightningCLI: the optimizer by class path, on the command line or in a configuration file.

    python lightning_cli.py fit --optimizer schatten.NorMuon --optimizer.lr 0.01

Lightning's own class builds it on `model.parameters()`, which say nothing of modules; SpectralCLI on the module.
"""

import sys

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from schatten.integrations.lightning import SpectralCLI

tokens = torch.arange(32)


class Counting(L.LightningModule):
    def __init__(self, width: int = 64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Embedding(32, 16), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 16), nn.Linear(16, 32)
        )

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.layers(batch[0]), (batch[0] + 1) % 32)

    def train_dataloader(self):
        return DataLoader(TensorDataset(tokens), batch_size=8, shuffle=True)

    def on_fit_start(self):
        print(self.optimizers().plan)
        self.before = self.training_step((tokens,), 0).item()

    def on_train_end(self):
        print(f"loss before {self.before:.3f}, after {self.training_step((tokens,), 0).item():.3f}")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.argv += ["fit", "--optimizer", "schatten.Muon", "--optimizer.lr", "1e-2", "--trainer.max_epochs", "20"]
        sys.argv += ["--lr_scheduler", "CosineAnnealingLR", "--lr_scheduler.T_max", "20"]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    SpectralCLI(Counting, trainer_defaults={**quiet, "accelerator": "cpu"}, save_config_callback=None)
