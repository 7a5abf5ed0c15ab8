"""The eight optimizers of arXiv 2602.04669, mSGD(S, Q, Z) and Adam(S, Q, Z), and other exponents, against literal twins."""

import math

import pytest
import torch

import schatten
from tests.reference.twins import PRECISION, assert_equals_twin, keller, spectral

POWERS = [1.0, 0.5, 0.25, 0.0, 0.7, -0.5]

LR, DECAY = 0.02, 0.3


def length(D, p, W, normalize):
    if normalize == "rms":
        return 0.2 * math.sqrt(W.numel()) / D.norm()
    return keller(W) if p == 0 else 1.0


def momentum_twin(p, normalize):
    def twin(W, gradients):
        M = None
        for G in gradients:
            M = G if M is None else 0.9 * M + G
            D = spectral(M, lambda s: s**p)
            W = (1 - LR * DECAY) * W - LR * length(D, p, W, normalize) * D
        return W

    return twin


def adam_twin(p, normalize):
    def twin(W, gradients):
        m = v = torch.zeros_like(W)
        for t, G in enumerate(gradients, start=1):
            m = 0.9 * m + 0.1 * G
            v = 0.95 * v + 0.05 * G**2
            ratio = (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
            D = spectral(ratio, lambda s: s**p)
            W = (1 - LR * DECAY) * W - LR * length(D, p, W, normalize) * D
        return W

    return twin


@pytest.mark.parametrize("normalize", [None, "rms"])
# Not a negative power of Adam's ratio: its first one is a matrix of signs, whose rounding it amplifies without bound.
@pytest.mark.parametrize(("family", "p"), [(f, p) for f in ("SGD", "Adam") for p in POWERS if f == "SGD" or p >= 0])
def test_every_exponent_equals_its_formula(family, p, normalize):
    preset, twin = {
        "SGD": (schatten.presets.SpectralSGD, momentum_twin),
        "Adam": (schatten.presets.SpectralAdam, adam_twin),
    }[family]
    # Adam's first ratio is a matrix of signs, singular but for eps = 1e-8, whose rounding its small directions amplify.
    precision = 1e-7 if family == "Adam" else PRECISION
    options = {"normalize": normalize, "solver": None if p == 1 else schatten.solvers.svd()}
    assert_equals_twin(
        lambda params: preset(params, p, lr=LR, weight_decay=DECAY, **options), twin(p, normalize), precision=precision
    )
