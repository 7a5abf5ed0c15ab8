"""Lion-K against the paper's and the project page's equations, with their signs and indices, and Lion against its paper."""

import pytest
import torch

import schatten
from schatten import maps
from tests.reference.twins import assert_equals_twin, polar, spectral

LR, DECAY, BETAS = 0.03, 0.4, (0.85, 0.95)

MAPS = {
    "nuclear": (lambda: maps.Nuclear(schatten.solvers.svd()), polar),
    "l1": (maps.L1, torch.sign),
    "frobenius": (maps.Frobenius, lambda X: X / X.norm()),
    "sgd": (lambda: maps.Power(1, over="entries"), lambda X: X),
    "huber": (
        lambda: maps.Huber(0.3, solver=schatten.solvers.svd()),
        lambda X: spectral(X, lambda s: (s / 0.3).clamp(max=1)),
    ),
    "soft": (
        lambda: maps.SoftThreshold(0.3, solver=schatten.solvers.svd()),
        lambda X: spectral(X, lambda s: (s - 0.3).clamp(min=0)),
    ),
}


def paper(gradK, decay):
    """arXiv 2506.15054, equations 2 and 3: M averages the negative gradient, N reads the old M, the direction is added."""

    def twin(X, gradients):
        beta1, beta2 = BETAS
        M = torch.zeros_like(X)
        for G in gradients:
            N = beta1 * M - (1 - beta1) * G
            M = beta2 * M - (1 - beta2) * G
            X = (X + LR * gradK(N)) / (1 + LR * DECAY) if decay == "implicit" else X + LR * (gradK(N) - DECAY * X)
        return X

    return twin


def site(gradK):
    """The project page: N reads the new M, explicit decay."""

    def twin(X, gradients):
        b_n, b_p = BETAS
        M = torch.zeros_like(X)
        for G in gradients:
            M = b_p * M - (1 - b_p) * G
            N = b_n * M - (1 - b_n) * G
            X = X + LR * (gradK(N) - DECAY * X)
        return X

    return twin


@pytest.mark.parametrize("decay", ["implicit", "explicit"])
@pytest.mark.parametrize("name", MAPS)
def test_lion_k_equals_the_papers_equations_for_any_map(name, decay):
    K, gradK = MAPS[name]
    assert_equals_twin(
        lambda params: schatten.LionK(params, K(), lr=LR, weight_decay=DECAY, betas=BETAS, decay=decay), paper(gradK, decay)
    )


@pytest.mark.parametrize("name", MAPS)
def test_the_sites_form_equals_the_project_pages_equations(name):
    K, gradK = MAPS[name]
    options = {"betas": BETAS, "form": "site", "decay": "explicit"}
    assert_equals_twin(lambda params: schatten.LionK(params, K(), lr=LR, weight_decay=DECAY, **options), site(gradK))


def test_lion_equals_its_paper():
    assert_equals_twin(
        lambda params: schatten.Lion(params, lr=LR, weight_decay=DECAY, betas=BETAS), paper(torch.sign, "explicit")
    )
