"""Triton's interpreter, made to round and to pass on nan as a GPU does."""

import importlib.util
import os

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def interpreted_as_on_hardware(monkeypatch):
    """The interpreter cuts fp32 off where it should round to bf16, and numpy warns of nan where a GPU passes it on."""
    with np.errstate(all="ignore"):
        if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
            monkeypatch.setattr("triton.runtime.interpreter._convert_float", _converted)
        yield


def _converted(values, source, target, _):
    """An array of fp32 as bits of bf16, or the other way round."""
    if target.name == "bf16":
        return torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16).view(torch.int16).numpy()
    assert source.name == "bf16"
    return torch.from_numpy(np.ascontiguousarray(values).view(np.int16)).view(torch.bfloat16).float().numpy()
