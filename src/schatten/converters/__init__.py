"""Other optimizers' checkpoints as ours: each function returns a state_dict that `opt.load_state_dict` takes, or raises.

Example:
    >>> import schatten
    >>> [name for name in schatten.converters.__all__ if "keller" in name]
    ['from_keller']
"""

from schatten.converters.adamw import from_adamw
from schatten.converters.dion import from_dion
from schatten.converters.keller import from_keller
from schatten.converters.moonlight import from_moonlight
from schatten.converters.pytorch_optimizer import from_pytorch_optimizer
from schatten.converters.torch_muon import from_torch_muon, is_torch_muon

__all__ = [
    "from_adamw",
    "from_dion",
    "from_keller",
    "from_moonlight",
    "from_pytorch_optimizer",
    "from_torch_muon",
    "is_torch_muon",
]
