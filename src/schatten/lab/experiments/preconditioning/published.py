"""The numbers of the reconstruction, all derived: steps to 1e-6, by problem and condition number."""

import math

# The longest run of the published table, whose entries beyond are ">2e4".
PUBLISHED_CAP = 20_000

KAPPAS = (1, 10, 100, 1_000, 10_000)
STEPS = {
    ("factorisation", "Muon"): dict(zip(KAPPAS, (569, 633, 641, 633, 595), strict=True)),
    ("factorisation", "GD"): dict(zip(KAPPAS, (68, 521, 4888, math.inf, math.inf), strict=True)),
    ("attention", "Muon"): {1: 4, 10: 323, 100: 324, 1_000: 306},
    ("attention", "GD"): {1: 1, 10: 1723, 100: math.inf, 1_000: math.inf},
}
PUBLISHED_LR = {
    ("factorisation", "Muon"): 0.3,
    ("factorisation", "GD"): 0.25,
    ("attention", "Muon"): 0.5,
    ("attention", "GD"): 1.0,
}
Q = 0.98

# Steps on the factorisation by the decay q of the lr.
BY_DECAY = {10: {0.9: 123, 0.95: 252, 0.98: 639, 0.99: 1271}, 1_000: {0.9: 122, 0.95: 242, 0.98: 625, 0.99: 1241}}

# Where a constant lr stalls on the factorisation, as a range of relative residuals.
STALLS = {0.3: (0.36, 0.38), 0.01: (0.012, 0.012)}
