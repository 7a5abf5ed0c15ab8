"""Learning rates between scales: which lr and which decay make the same step under another factor.

A step is W <- (1 - lr lambda) W - lr c D. With another factor c' it stays the same if lr c and lr lambda do:

    lr' = lr c / c',   lambda' = lambda c' / c

and then so does the constraint, spectral norm <= c / lambda.
"""

import math
from collections.abc import Sequence

from schatten.scales import ADAMW_RMS, RMS, Factor, Scale


def convert_lr(
    lr: float, from_: str | Factor = "keller", to: str | Factor = "adamw-rms", shape: Sequence[int] | None = None
) -> float:
    """The learning rate that makes under scale `to` the update that `lr` makes under scale `from_`: lr c_from / c_to.

    Decay is multiplied by lr, so it has to change the other way: see `convert_weight_decay`.

    Args:
        lr: a learning rate, a number >= 0.
        from_, to: a scale's name, here or in torch, Dion, Emerging-Optimizers, Moonlight, Keras, optax, ...
            (docs/learning-rate.md has the list), or a factor of `schatten.scales`. Where another library has a factor
            r sqrt(max(fan_out, fan_in)) with its own r (Keras' `rms_rate`, optax' `consistent_rms`, `extra_scale_factor`
            of Emerging-Optimizers' and Megatron's "spectral"), that is `schatten.scales.RMS(r)`.
        shape: (fan_out, fan_in) of the matrix as it is orthogonalised: (out, in k k) of a convolution, one head of a
            split projection. May be left out where the ratio is the same for every shape.

    Raises ValueError if the ratio depends on the shape and there is none, for a name that means two factors, and for
    numbers outside their ranges; TypeError for what is no scale.

    Example:
        >>> import schatten
        >>> round(schatten.convert_lr(0.02, from_="keller", to="adamw-rms", shape=(3072, 768)), 6)
        0.003608
        >>> round(schatten.convert_lr(3e-4, from_=schatten.scales.RMS(0.5), to="match_rms_adamw"), 9)
        0.00075
    """
    return _number("lr", lr) * _ratio(from_, to, shape)


def convert_weight_decay(
    weight_decay: float, from_: str | Factor = "keller", to: str | Factor = "adamw-rms", shape: Sequence[int] | None = None
) -> float:
    """The decay that goes with `convert_lr`: lambda c_to / c_from, so that lr lambda stays what it was.

    For libraries that multiply the decay by lr but not by the factor, as torch, Keller, Moonlight, Dion,
    Emerging-Optimizers, Keras and optax do. Arguments and errors are those of `convert_lr`.

    Example:
        >>> import schatten
        >>> lr, decay = 0.02, 0.01
        >>> new_lr = schatten.convert_lr(lr, "keller", "adamw-rms", shape=(768, 768))
        >>> new_decay = schatten.convert_weight_decay(decay, "keller", "adamw-rms", shape=(768, 768))
        >>> round(new_lr, 6), round(new_decay, 6), round(new_lr * new_decay, 9) == round(lr * decay, 9)
        (0.003608, 0.055426, True)
    """
    return _number("weight_decay", weight_decay) / _ratio(from_, to, shape)


def _ratio(from_: str | Factor, to: str | Factor, shape: Sequence[int] | None) -> float:
    """c_from / c_to."""
    before, after = _factor("from_", from_), _factor("to", to)
    size = None if shape is None else _shape(shape)
    targets = _rms(before), _rms(after)
    if before == after:
        return 1.0
    if targets[0] and targets[1]:
        return targets[0] / targets[1]
    if size is None:
        raise ValueError(
            f"From {from_!r} to {to!r} the lr changes by a factor that depends on the matrix: pass shape=(fan_out, fan_in)."
        )
    return before.factor(*size) / after.factor(*size)


def _factor(argument: str, scale: str | Factor) -> Factor:
    if isinstance(scale, str):
        return Scale(scale)
    if isinstance(scale, type) or not isinstance(scale, Factor):
        raise TypeError(f"{argument} must be a scale's name or a factor such as schatten.scales.RMS(0.2), got {scale!r}.")
    return scale


def _rms(factor: Factor) -> float | None:
    """r of a factor r sqrt(max(fan_out, fan_in)), None for others."""
    if isinstance(factor, RMS):
        return factor.target
    return ADAMW_RMS if factor == Scale("adamw-rms") else None


def _shape(shape: Sequence[int]) -> tuple[int, int]:
    size = tuple(shape)
    if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(f"shape must be (fan_out, fan_in), two positive numbers of one logical matrix, got {size}.")
    return size[0], size[1]


def _number(argument: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{argument} must be a finite number >= 0, got {value!r}.")
    return value
