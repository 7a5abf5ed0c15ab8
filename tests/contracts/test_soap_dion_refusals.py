"""What SOAP-Muon, KL-SOAP, Dion and Dion2 refuse, at construction and by the parameter's name."""

import pytest
import torch
from torch import nn

from schatten.presets.dion import Dion
from schatten.presets.dion2 import Dion2
from schatten.presets.kl_soap import KLSOAP
from schatten.presets.soap_muon import SOAPMuon

REFUSED = [
    (SOAPMuon, {"shampoo_beta": 1.0}, "shampoo_beta must lie in"),
    (SOAPMuon, {"max_dim": 0.5}, "max_dim must be"),
    (SOAPMuon, {"eps": -1e-8}, "eps must be finite and >= 0"),
    (SOAPMuon, {"beta2": 1.0}, "beta2 must lie in"),
    (KLSOAP, {"statistics": "fisher"}, "statistics must be 'gram' .* or 'kl'"),
    (KLSOAP, {"eps": float("inf")}, "eps must be finite and >= 0"),
    (KLSOAP, {"betas": (0.9, 1.0)}, "betas must be two numbers"),
    (Dion, {"rank": 8}, "rank must be a share of"),
    (Dion, {"rank": 0.0}, "rank must be a share of"),
    (Dion, {"variant": "qr"}, "variant must be 'dion' .* or 'orth'"),
    (Dion2, {"fraction": 1.5}, "fraction must lie in"),
    (Dion2, {"fraction": True}, "fraction must lie in"),
]


@pytest.mark.parametrize(("preset", "options", "message"), REFUSED, ids=lambda value: getattr(value, "__name__", str(value)))
def test_an_option_out_of_range_is_named(preset, options, message):
    with pytest.raises(ValueError, match=message):
        preset([nn.Parameter(torch.zeros(4, 3))], **options)
