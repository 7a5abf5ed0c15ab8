"""Scales by the names other libraries give them: which of our factors each is, and where that was read.

One table serves the names that are accepted, the refusal of a name that means two things, and docs/learning-rate.md.
"""

from dataclasses import dataclass

NAMES = ("adamw-rms", "keller", "mup", "none")


@dataclass(frozen=True)
class Peer:
    """A library's setting: the direction is multiplied by `times` the factor of our `scale`, as read in `source`.

    `name` is what a user may write for it here, empty where the setting has none of its own.
    """

    library: str
    setting: str
    name: str
    scale: str
    times: float
    source: str

    def __str__(self) -> str:
        lr = "" if self.times == 1 else f" with {self.times:g} times the lr and {1 / self.times:.3g} times the decay"
        return f"{self.setting} of {self.library} is {self.scale!r}{lr}"


_DEEPSPEED = "deepspeedai/DeepSpeed: deepspeed/runtime/zero/muon/original_muon.py"
_TORCH = "pytorch/pytorch: torch/optim/_muon.py"
_DION = "microsoft/dion: dion/megabatch_base.py"
_GRAM = "Dao-AILab/gram-newton-schulz: gram_newton_schulz/muon/muon_utils/muon_opt_utils.py"
_EMERGING = "NVIDIA-NeMo/Emerging-Optimizers: emerging_optimizers/orthogonalized_optimizers/muon.py"
_MEGATRON = "NVIDIA/Megatron-LM: megatron/core/optimizer/muon.py, which calls Emerging-Optimizers"
_TIMM = "huggingface/pytorch-image-models: timm/optim/muon.py"
_KERAS = "keras-team/keras: keras/src/optimizers/muon.py"
_OPTAX = "google-deepmind/optax: optax/contrib/_muon.py"
_DEEPMD = "deepmodeling/deepmd-kit: deepmd/pt/optimizer/hybrid_muon.py"
_KOZISTR = "kozistr/pytorch_optimizer: pytorch_optimizer/optimizer/muon.py"

# The first setting of a library is its default. 5 and 0.9 are 1 and 0.18 over the 0.2 of "adamw-rms".
PEERS = (
    Peer("Keller", "the factor", "keller", "keller", 1.0, "KellerJordan/Muon: muon.py"),
    Peer("Moonlight", "the factor", "moonlight", "adamw-rms", 1.0, "MoonshotAI/Moonlight: examples/toy_train.py"),
    Peer("DeepSpeed", "the factor", "deepspeed", "keller", 1.0, _DEEPSPEED),
    Peer("torch", "adjust_lr_fn='original'", "original", "keller", 1.0, _TORCH),
    Peer("torch", "adjust_lr_fn='match_rms_adamw'", "match_rms_adamw", "adamw-rms", 1.0, _TORCH),
    Peer("Dion", "adjust_lr='spectral_norm'", "spectral_norm", "mup", 1.0, _DION),
    Peer("Dion", "adjust_lr='rms_norm'", "rms_norm", "adamw-rms", 1.0, _DION),
    Peer("Dion", "adjust_lr=None", "", "none", 1.0, _DION),
    Peer("gram-newton-schulz", "adjust_lr='rms_norm'", "rms_norm", "adamw-rms", 1.0, _GRAM),
    Peer("gram-newton-schulz", "adjust_lr='spectral_norm'", "spectral_norm", "mup", 1.0, _GRAM),
    Peer("gram-newton-schulz", "adjust_lr=None", "", "none", 1.0, _GRAM),
    Peer("Emerging-Optimizers", "scale_mode='spectral'", "spectral", "adamw-rms", 5.0, _EMERGING),
    Peer("Emerging-Optimizers", "scale_mode='shape_scaling'", "shape_scaling", "keller", 1.0, _EMERGING),
    Peer("Emerging-Optimizers", "scale_mode='unit_rms_norm'", "unit_rms_norm", "mup", 1.0, _EMERGING),
    Peer("Megatron", "muon_scale_mode='spectral'", "spectral", "adamw-rms", 5.0, _MEGATRON),
    Peer("Megatron", "muon_scale_mode='shape_scaling'", "shape_scaling", "keller", 1.0, _MEGATRON),
    Peer("Megatron", "muon_scale_mode='unit_rms_norm'", "unit_rms_norm", "mup", 1.0, _MEGATRON),
    Peer("Scion", "norm='Auto' or 'Spectral', scale=1", "spectral", "mup", 1.0, "LIONS-EPFL/scion: scion.py"),
    Peer("timm", "adjust_lr_fn='match_rms_adamw'", "match_rms_adamw", "adamw-rms", 1.0, _TIMM),
    Peer("timm", "adjust_lr_fn='original'", "original", "keller", 1.0, _TIMM),
    Peer("timm", "adjust_lr_fn='rms_to_rms'", "rms_to_rms", "mup", 1.0, _TIMM),
    Peer("Keras", "rms_rate=0.2", "rms_rate", "adamw-rms", 1.0, _KERAS),
    Peer("Keras", "rms_rate=None", "", "none", 1.0, _KERAS),
    Peer("optax", "consistent_rms=None", "", "keller", 1.0, _OPTAX),
    Peer("optax", "consistent_rms=0.2", "consistent_rms", "adamw-rms", 1.0, _OPTAX),
    Peer("deepmd", "lr_adjust <= 0, lr_adjust_coeff=0.18", "match_rms", "adamw-rms", 0.9, _DEEPMD),
    Peer("deepmd", "lr_adjust <= 0, lr_adjust_coeff=0.2", "match_rms", "adamw-rms", 1.0, _DEEPMD),
    Peer("deepmd", "lr_adjust > 0", "", "keller", 1.0, _DEEPMD),
    Peer("pytorch_optimizer", "use_adjusted_lr=False", "", "keller", 1.0, _KOZISTR),
    Peer("pytorch_optimizer", "use_adjusted_lr=True", "", "adamw-rms", 1.0, _KOZISTR),
)


def meanings(name: str) -> tuple[Peer, ...]:
    """The settings that `name`, a setting's or a library's in lower case, may stand for."""
    return tuple(peer for peer in PEERS if name and name in (peer.name, peer.library.lower()))


def _unambiguous(name: str, scale: str) -> bool:
    return {(peer.scale, peer.times) for peer in meanings(name)} == {(scale, 1.0)}


ALIASES = {p.name: p.scale for p in PEERS if p.name not in NAMES and _unambiguous(p.name, p.scale)}


def own_name(name: str) -> str:
    """The name of a scale here, given that or another library's; raises ValueError for one unknown or with two meanings.

    Example:
        >>> from schatten.scale_names import own_name
        >>> own_name("match_rms_adamw"), own_name("mup")
        ('adamw-rms', 'mup')
    """
    if name in NAMES:
        return name
    if name in ALIASES:
        return ALIASES[name]
    if found := meanings(name):
        raise ValueError(f"scale {name!r} is not one factor: {'; '.join(map(str, found))}. Write the name it has here.")
    raise ValueError(
        f"scale must be one of {', '.join(map(repr, NAMES))}, got {name!r}; of other libraries' names these are understood: "
        f"{', '.join(ALIASES)}."
    )
