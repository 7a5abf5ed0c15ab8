"""The GPT: causal, tied, and routed as its modules say."""

import math

import pytest
import torch

import schatten
from schatten.lab.models import GPT, GPTConfig

CONFIG = GPTConfig(vocabulary=31, context=12, layers=2, heads=2, width=16)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_token_changes_no_earlier_prediction(qk_norm):
    torch.manual_seed(0)
    model = GPT(GPTConfig(31, 12, 2, 2, 16, qk_norm=qk_norm))
    ids = torch.randint(0, 31, (1, 12))
    changed = ids.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 31
    before, after = model.logits(ids), model.logits(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_an_untrained_model_predicts_nearly_uniformly():
    torch.manual_seed(0)
    ids = torch.randint(0, 31, (8, 12))
    # Logits of an initialisation at 0.02 are below 0.1, so the loss is within 0.05 of log(vocabulary).
    assert abs(GPT(CONFIG)(ids, ids.roll(1)).item() - math.log(31)) < 0.05


def test_every_hidden_matrix_is_spectral_and_nothing_else():
    plan = schatten.plan(GPT(CONFIG))
    spectral = {entry.name for entry in plan if entry.route == "spectral"}
    per_block = ("attention.query", "attention.key", "attention.value", "attention.output", "up", "down")
    assert spectral == {f"blocks.{i}.{name}.weight" for i in range(2) for name in per_block}
    reasons = {entry.name: entry.reason for entry in plan}
    assert "tied with head.weight" in reasons["tokens.weight"]
    assert reasons["positions.weight"] == "embedding"
