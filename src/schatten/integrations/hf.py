"""Hugging Face Trainer: every preset as a factory, so that it gets the model and not groups of nameless tensors.

Trainer calls an Optimizer class on two groups of its own, decayed and not, which say nothing of modules. What is no Optimizer
class it takes for a factory `X` and calls `X()(model, **kwargs)`, on the sharded model under FSDP. So here each
preset's name is such an `X`, whose call gives the preset:

    from schatten.integrations import hf
    Trainer(model, args, optimizer_cls_and_kwargs=(hf.Muon, {"lr": 3e-4, "weight_decay": 0.1}), ...)
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from schatten import presets
from schatten.integrations.by_name import options_of, preset_of
from schatten.optimizer import SpectralOptimizer

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass(frozen=True)
class Factory:
    """What Trainer calls to get an optimizer's class: `Factory(Muon)()` is `Muon`; `hf.Muon` is `Factory(Muon)`.

    Example:
        >>> import schatten
        >>> from schatten.integrations import hf
        >>> hf.Muon() is schatten.Muon
        True
    """

    preset: type[SpectralOptimizer]

    def __call__(self, *params: Any, **options: Any) -> type[SpectralOptimizer]:
        if params or options:
            raise TypeError(
                f"hf.{self.preset.__name__} is called without arguments and gives the class. Trainer does so from "
                f"transformers 5.2 on; before, build the optimizer yourself: "
                f"Trainer(optimizers=(schatten.{self.preset.__name__}(model, ...), None))."
            )
        return self.preset


def __getattr__(name: str) -> Factory:
    if name not in presets.__all__:
        raise AttributeError(f"schatten.integrations.hf has no preset {name!r}; it has {', '.join(presets.__all__)}.")
    return Factory(getattr(presets, name))


def __dir__() -> list[str]:
    return sorted([*globals(), *presets.__all__])


def from_arguments(args: "TrainingArguments", name: str = "muon", **options: Any) -> tuple[Factory, dict[str, Any]]:
    """Trainer's `optimizer_cls_and_kwargs` for the preset `name` with the numbers of `args`, which it would not get else.

    `args.learning_rate` is lr, `args.weight_decay` the decay of every parameter, `args.adam_beta1`, `adam_beta2` and
    `adam_epsilon` are AdamW's; then `args.optim_args`, a text "key=value, key=value", and last `options` win over them.

    Raises ValueError for an unknown name.

    Example:
        >>> from types import SimpleNamespace
        >>> from schatten.integrations import hf
        >>> args = SimpleNamespace(learning_rate=3e-4, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8,
        ...                        optim_args="scale=keller")
        >>> hf.from_arguments(args, "muon", momentum=0.9)[1]["scale"]
        'keller'
    """
    numbers = {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "adamw": {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon},
    }
    return Factory(preset_of(name)), {**numbers, **options_of(args.optim_args or ""), **options}
