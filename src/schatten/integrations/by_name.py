"""Presets by name: for trainers that choose an optimizer by a string and pass its options as text."""

import ast
import importlib
import inspect
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from torch import nn

from schatten import presets
from schatten.optimizer import SpectralOptimizer

WORDS = {"true": True, "false": False, "none": None, "null": None}

OPEN, CLOSED = "([{", ")]}"


def create_optimizer(
    name: str, params: nn.Module | Iterable[Any], options: str | Mapping[str, Any] | None = None, **more: Any
) -> SpectralOptimizer:
    """The preset `name` on a module (or on groups), with `options` as text or a mapping; keywords win over them.

    Raises ValueError for a name that no preset has and TypeError for an option that it does not take, with the nearest.

    Example:
        >>> import torch, schatten
        >>> from schatten.integrations import create_optimizer
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))
        >>> opt = create_optimizer("schatten.Muon", model, "scale=keller, momentum=0.9", lr=0.02)
        >>> opt.param_groups[0]["lr"], opt.param_groups[0]["scale"], opt.param_groups[0]["momentum"]
        (0.02, 'keller', 0.9)
    """
    preset = preset_of(name)
    chosen = {**(options_of(options) if isinstance(options, str) else options or {}), **more}
    # A class of your own is known to no list: its constructor says what it takes.
    if preset.__name__ in presets.__all__:
        known = _options(preset)
        for key in chosen:
            if key not in known:
                raise TypeError(
                    f"{preset.__name__} has no option {key!r}{_did_you_mean(key, known)} It takes {', '.join(known)}."
                )
    return preset(params, **chosen)


def preset_of(name: str) -> type[SpectralOptimizer]:
    """The class that `name` stands for: a preset's name in any case, with or without `_`, or the dotted path of a class.

    The path may lead to any `SpectralOptimizer`, your own included. Raises ValueError for a name that leads nowhere, with
    the nearest presets, and TypeError for a path to something else.

    Example:
        >>> from schatten.integrations import preset_of
        >>> preset_of("muon") is preset_of("schatten.Muon"), preset_of("spectral_sgd").__name__
        (True, 'SpectralSGD')
    """
    path, _, last = name.rpartition(".")
    plain = {_plain(each): each for each in presets.__all__}
    if path in ("", "schatten", "schatten.presets") and _plain(last) in plain:
        return getattr(presets, plain[_plain(last)])
    try:
        found = getattr(importlib.import_module(path), last) if path else None
    except (ImportError, AttributeError):
        found = None
    if found is None:
        raise ValueError(
            f"No optimizer is named {name!r}{_did_you_mean(last, presets.__all__)} The presets are "
            f"{', '.join(presets.__all__)}; another class is named by its whole path, such as 'package.module.Class'."
        )
    if not (isinstance(found, type) and issubclass(found, SpectralOptimizer)):
        raise TypeError(f"{name!r} is {found!r}, not a SpectralOptimizer: trainers build other optimizers themselves.")
    return found


def options_of(text: str) -> dict[str, Any]:
    """The options in `"key=value, key=value"`: values are Python's literals, true, false and none, or else words.

    Commas inside brackets belong to the value. Raises ValueError for a part that is no `key=value` and for a key given
    twice.

    Example:
        >>> from schatten.integrations import options_of
        >>> options_of("lr=3e-4, betas=(0.9, 0.99), nesterov=false, scale=keller")
        {'lr': 0.0003, 'betas': (0.9, 0.99), 'nesterov': False, 'scale': 'keller'}
    """
    options: dict[str, Any] = {}
    for part in _parts(text):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key.isidentifier() and equals and value):
            raise ValueError(f"Options are written 'key=value, key=value', got {part.strip()!r} in {text!r}.")
        if key in options:
            raise ValueError(f"An option is given once, got {key!r} twice in {text!r}.")
        options[key] = _value(value)
    return options


def _parts(text: str) -> list[str]:
    """`text` cut at the commas that stand in no bracket; nothing but space at the end is no part."""
    cuts, depth = [-1], 0
    for i, character in enumerate(text):
        depth += (character in OPEN) - (character in CLOSED)
        if character == "," and depth == 0:
            cuts.append(i)
    parts = [text[start + 1 : end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]
    return parts if parts[-1].strip() else parts[:-1]


def _value(text: str) -> Any:
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _options(preset: type[SpectralOptimizer]) -> list[str]:
    """What a preset's constructor takes, in its order; what it takes as `**options` it hands on to its base's."""
    names: dict[str, None] = {}
    for base in preset.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()
        open_ended = [p.name for p in parameters if p.kind == p.VAR_KEYWORD]
        names |= {p.name: None for p in parameters if p.name not in open_ended}
        if base is SpectralOptimizer or not open_ended:
            break
    # The rule is what the preset is.
    return [name for name in names if name not in ("self", "params", "rule")]


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about a name that is unknown: the nearest of `known`, if any is near."""
    plain = {_plain(each): each for each in known}
    near = [repr(plain[each]) for each in get_close_matches(_plain(name), plain, n=3, cutoff=0.6)]
    return f", did you mean {' or '.join(near)}?" if near else "."
