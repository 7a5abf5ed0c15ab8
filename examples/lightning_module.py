"""Lightning: `configure_optimizers` builds on the module itself; one optimizer, one scheduler, automatic optimization."""

import tempfile

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import schatten

tokens = torch.arange(32)


class Counting(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16), nn.Linear(16, 32))

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.layers(batch[0]), (batch[0] + 1) % 32)

    def train_dataloader(self):
        return DataLoader(TensorDataset(tokens), batch_size=8, shuffle=True)

    def configure_optimizers(self):
        opt = schatten.Muon(self, lr=1e-2, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=20)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}


def loss(model):
    with torch.no_grad():
        return model.training_step((tokens,), 0).item()


def trainer(folder, epochs):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    return L.Trainer(max_epochs=epochs, callbacks=[saving], gradient_clip_val=1.0, **quiet)


L.seed_everything(0, verbose=False)
model = Counting()
before = loss(model)
with tempfile.TemporaryDirectory() as folder:
    trainer(folder, epochs=10).fit(model)
    halfway = loss(model)
    resumed = Counting()
    trainer(folder, epochs=20).fit(resumed, ckpt_path=f"{folder}/epoch=9.ckpt")
print(f"loss before {before:.3f}, after 10 epochs {halfway:.3f}, after 20 {loss(resumed):.3f}")
