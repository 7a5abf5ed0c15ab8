"""LightningCLI whose `--optimizer` gets the module it trains.

Lightning's own builds an optimizer on `model.parameters()`, tensors without modules, which a preset refuses or reads as
hidden matrices alone. A LightningModule that builds its optimizer itself needs nothing from here: its
`configure_optimizers` returns `schatten.Muon(self, ...)`.
"""

import importlib
from functools import wraps
from types import MethodType
from typing import Any

from torch.optim import Optimizer

from schatten.optimizer import SpectralOptimizer

try:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, instantiate_class
except ImportError as error:
    raise ImportError("SpectralCLI needs Lightning: pip install 'schatten[lightning]'", name=error.name) from error


class SpectralCLI(LightningCLI):
    """LightningCLI for any optimizer: presets are built on the module, so that it routes itself, others on its parameters.

        python train.py fit --optimizer schatten.Muon --optimizer.lr 0.01 --lr_scheduler CosineAnnealingLR ...

    Its arguments are LightningCLI's without `auto_configure_optimizers`. The optimizer is built when the trainer asks for it.
    Raises ValueError for an lr scheduler without an optimizer.

    Example: `SpectralCLI(MyModule)` as the last line of train.py; examples/lightning_cli.py runs.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, auto_configure_optimizers=False, **options)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """LightningCLI's arguments and those of `--optimizer` and `--lr_scheduler`."""
        super().add_core_arguments_to_parser(parser)
        parser.add_optimizer_args((Optimizer,))
        parser.add_lr_scheduler_args()

    def instantiate_classes(self) -> None:
        """As LightningCLI's; a chosen optimizer replaces the module's own `configure_optimizers`."""
        super().instantiate_classes()
        config = self.config_init[self.subcommand] if self.subcommand else self.config_init
        optimizer, lr_scheduler = config.get("optimizer"), config.get("lr_scheduler")
        if lr_scheduler and not optimizer:
            raise ValueError("--lr_scheduler schedules what --optimizer builds: give both, or neither.")
        if not optimizer:
            return

        @wraps(self.configure_optimizers)
        def configure(model: LightningModule) -> Any:
            module, _, name = optimizer["class_path"].rpartition(".")
            routes = issubclass(getattr(importlib.import_module(module), name), SpectralOptimizer)
            built = instantiate_class(model if routes else model.parameters(), optimizer)
            return self.configure_optimizers(model, built, lr_scheduler and instantiate_class(built, lr_scheduler))

        self.model.configure_optimizers = MethodType(configure, self.model)
