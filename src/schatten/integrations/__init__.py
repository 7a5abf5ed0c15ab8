"""The trainers people use: how each of them gets a preset with the module it must be routed by.

`by_name` needs torch alone; `hf` and `lightning` are imported by name and need the package they are for. accelerate, DDP and
torch.distributed.checkpoint take the optimizers as they are (docs/frameworks.md).
"""

from schatten.integrations.by_name import create_optimizer, options_of, preset_of

__all__ = ["create_optimizer", "options_of", "preset_of"]
