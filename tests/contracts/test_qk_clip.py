"""QK-clip: after it the largest logit of each head of a real attention is min(old, threshold), and nothing else moved."""

import math

import pytest
import torch
from torch import nn

import schatten
from schatten.qk_clip import qk_clip_

WIDTH, HEAD_DIM, TOKENS = 12, 6, 20


class Attention(nn.Module):
    """The logits of an attention with `heads` query heads and `key_heads` key heads, as any model computes them."""

    def __init__(self, heads, key_heads, bias, dtype=torch.float64):
        super().__init__()
        self.heads, self.key_heads = heads, key_heads
        self.query = nn.Linear(WIDTH, heads * HEAD_DIM, bias=bias, dtype=dtype)
        self.key = nn.Linear(WIDTH, key_heads * HEAD_DIM, bias=bias, dtype=dtype)

    def forward(self, x):
        q = self.query(x).unflatten(-1, (self.heads, HEAD_DIM)).transpose(1, 2)
        k = self.key(x).unflatten(-1, (self.key_heads, HEAD_DIM)).transpose(1, 2)
        return q @ k.repeat_interleave(self.heads // self.key_heads, dim=1).mT / HEAD_DIM**0.5


def maxima(attention, x):
    """The largest logit of each head over batch and positions."""
    with torch.no_grad():
        return attention(x).amax((0, 2, 3))


def clip(attention, max_logits, threshold):
    return qk_clip_(
        attention.query.weight,
        attention.key.weight,
        max_logits,
        threshold,
        query_bias=attention.query.bias,
        key_bias=attention.key.bias,
    )


def state(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 3), (6, 2), (4, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("over", [0, 1, 2, 99], ids=lambda n: f"{n} heads over")
def test_the_largest_logit_of_every_head_becomes_the_smaller_of_itself_and_the_threshold(heads, bias, over):
    attention, x = Attention(*heads, bias), torch.randn(3, TOKENS, WIDTH, dtype=torch.float64)
    old = maxima(attention, x)
    if over == 0:
        threshold = 2 * old.max().item()
    elif over >= heads[0]:
        threshold = 0.5 * old.min().item()
    else:
        threshold = old.sort(descending=True).values[over - 1 : over + 1].mean().item()
    gamma = clip(attention, old, threshold)
    # fp64: three roundings of 1e-16 per product of two entries, sums of 6 and 12 of either sign.
    torch.testing.assert_close(maxima(attention, x), old.clamp(max=threshold), rtol=1e-13, atol=0)
    torch.testing.assert_close(gamma, (threshold / old).clamp(max=1), rtol=1e-15, atol=0)
    assert (gamma < 1).sum() == min(over, heads[0])


def test_every_logit_of_a_head_is_multiplied_by_its_gamma():
    attention, x = Attention(6, 3, True), torch.randn(3, TOKENS, WIDTH, dtype=torch.float64)
    logits = attention(x).detach()
    gamma = clip(attention, maxima(attention, x), 0.5)
    expected = logits * gamma.view(-1, 1, 1)
    # Logits are sums that may cancel, so the error is relative to the largest.
    torch.testing.assert_close(attention(x).detach(), expected, rtol=0, atol=1e-14)


def test_one_key_head_per_query_head_shares_the_factor_evenly():
    query, key = torch.ones(4, 3), torch.ones(4, 3)
    gamma = qk_clip_(query, key, torch.tensor([400.0, 1600.0]))
    assert gamma.tolist() == [0.25, 0.0625]
    assert query[:, 0].tolist() == key[:, 0].tolist() == [0.5, 0.5, 0.25, 0.25]


def test_a_shared_key_head_is_scaled_by_what_all_of_its_query_heads_need_and_no_weight_grows():
    query, key = torch.ones(4, 3), torch.ones(2, 3)
    qk_clip_(query, key, torch.tensor([400.0, 1600.0, 1600.0, 50.0]))
    # Group one needs 1/4 and 1/16: the key gives 1/2, the queries 1/2 and 1/8. In group two one head needs nothing.
    assert key[:, 0].tolist() == [0.5, 1.0]
    assert query[:, 0].tolist() == [0.5, 0.125, 0.0625, 1.0]


class LatentAttention(nn.Module):
    """MLA's logits: each head has own rows, and rotary rows that meet one rotary key of all heads."""

    def __init__(self, heads, own=4, rotary=2, values=3):
        super().__init__()
        self.heads, self.own, self.rotary, self.values = heads, own, rotary, values
        self.query = nn.Linear(WIDTH, heads * (own + rotary), bias=False, dtype=torch.float64)
        self.key_value = nn.Linear(WIDTH, heads * (own + values), bias=False, dtype=torch.float64)
        self.rotary_key = nn.Linear(WIDTH, rotary, bias=False, dtype=torch.float64)

    def rotate(self, z):
        angle = torch.arange(z.shape[-2], dtype=z.dtype)
        a, b = z.unbind(-1)
        return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    def forward(self, x):
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.key_value(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)[..., : self.own]
        rotary = self.rotate(q[..., self.own :]) @ self.rotate(self.rotary_key(x)).unsqueeze(1).mT
        return (q[..., : self.own] @ k.mT + rotary) / (self.own + self.rotary) ** 0.5


def test_latent_attention_is_clipped_with_its_shared_rotary_key_and_its_values_untouched():
    attention, x = LatentAttention(4), torch.randn(3, TOKENS, WIDTH, dtype=torch.float64)
    old, before = maxima(attention, x), state(attention)
    threshold = old.median().item()
    qk_clip_(attention.query.weight, attention.key_value.weight, old, threshold, rotary=2, values=3)
    torch.testing.assert_close(maxima(attention, x), old.clamp(max=threshold), rtol=1e-13, atol=0)
    after = state(attention)
    assert torch.equal(after["rotary_key.weight"], before["rotary_key.weight"])
    values = [weights["key_value.weight"].unflatten(0, (4, -1))[:, 4:] for weights in (before, after)]
    assert torch.equal(*values)
    assert not torch.equal(after["key_value.weight"], before["key_value.weight"])


def test_latent_attention_gives_the_rotary_rows_gamma_and_the_others_its_root():
    query, key = torch.ones(4, 3), torch.ones(3, 3)
    qk_clip_(query, key, torch.tensor([400.0]), rotary=2, values=1)
    assert query[:, 0].tolist() == [0.5, 0.5, 0.25, 0.25]
    assert key[:, 0].tolist() == [0.5, 0.5, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_heads_within_the_threshold_keep_their_bits_and_others_are_rounded_once(dtype):
    attention = Attention(4, 4, True, dtype)
    before = state(attention)
    gamma = clip(attention, torch.tensor([30.0, 300.0, -5.0, 100.0]), 100.0)
    assert gamma.dtype == torch.float32 and torch.equal(gamma != 1, torch.tensor([False, True, False, False]))
    for key, value in attention.state_dict().items():
        old, new = (weights.unflatten(0, (4, HEAD_DIM)) for weights in (before[key], value))
        assert torch.equal(new[[0, 2, 3]], old[[0, 2, 3]])
        # Half a unit in the last place, and four roundings of fp32 in the factor and the product.
        tolerance = torch.finfo(dtype).eps / 2 + 4 * 2**-24
        torch.testing.assert_close(new[1].double(), old[1].double() / 3**0.5, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
def test_the_bound_holds_to_rounding_in_lower_precision(dtype, heads):
    attention, x = Attention(*heads, True, dtype), torch.randn(3, TOKENS, WIDTH, dtype=torch.float64)
    old = maxima(attention.double(), x)
    threshold = 0.3 * old.min().item()
    clip(attention.to(dtype), old.float(), threshold)
    # Each weight moves by at most half a unit in the last place u, so q and k by u of sum |w| |x|, here below four times
    # their size; both enter a logit.
    tolerance = 8 * torch.finfo(dtype).eps / 2
    torch.testing.assert_close(maxima(attention.double(), x), old.clamp(max=threshold), rtol=tolerance, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_a_head_with_a_non_finite_maximum_is_left_as_it_is(bad, key_heads):
    attention = Attention(4, key_heads, True, torch.float32)
    before = state(attention)
    gamma = clip(attention, torch.tensor([50.0, bad, 400.0, 400.0]), 100.0)
    assert gamma.tolist() == [1.0, 1.0, 0.25, 0.25]
    for key, value in attention.state_dict().items():
        half = len(value) // 2
        assert torch.equal(value[:half], before[key][:half]) and not torch.equal(value[half:], before[key][half:])
        assert value.isfinite().all()


def test_maxima_at_the_end_of_fp32_leave_finite_weights():
    query, key = torch.ones(4, 3), torch.ones(2, 3)
    gamma = qk_clip_(query, key, torch.tensor([3e38, 3e38]), 1e-8)
    assert (gamma > 0).all() and query.isfinite().all() and key.isfinite().all()


def test_parts_of_a_fused_projection_are_clipped_in_place():
    qkv = nn.Parameter(torch.ones(12, 3))
    with torch.no_grad():
        qk_clip_(qkv[:4], qkv[4:8], torch.tensor([400.0, 1.0]))
    assert qkv[:, 0].tolist() == [0.5, 0.5, 1, 1] * 2 + [1.0] * 4


def test_parameters_stay_leaves_that_train_on():
    attention, x = Attention(4, 2, True, torch.float32), torch.randn(2, TOKENS, WIDTH)
    opt = schatten.Muon(attention, lr=0.1, solver=schatten.solvers.svd())
    for _ in range(3):
        opt.zero_grad()
        logits = attention(x)
        (-logits.square().mean()).backward()
        opt.step()
        clip(attention, maxima(attention, x), 2.0)
        # fp32: sums of some tens of products.
        assert maxima(attention, x).max() <= 2.0 * (1 + 1e-5)
    assert all(p.is_leaf and p.requires_grad for p in attention.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0.0}, "threshold must be positive"),
        ({"threshold": math.inf}, "threshold must be positive"),
        ({"threshold": math.nan}, "threshold must be positive"),
        ({"max_logits": torch.tensor(5.0)}, "one number per query head"),
        ({"max_logits": torch.ones(2, 2)}, "one number per query head"),
        ({"max_logits": torch.ones(0)}, "one number per query head"),
        ({"max_logits": torch.ones(5)}, "with heads=5, got shape"),
        ({"query": torch.ones(8)}, "query must be"),
        ({"key": torch.ones(7, 3)}, r"key must be \(key_heads \* 2, fan_in\)"),
        ({"key": torch.ones(6, 3)}, "a divisor of heads=4"),
        ({"key": torch.ones(16, 3)}, "a divisor of heads=4"),
        ({"query_bias": torch.ones(4)}, r"query_bias must have shape \(8,\)"),
        ({"key_bias": torch.ones(8)}, r"key_bias must have shape \(4,\)"),
        ({"rotary": 2}, "rotary must lie from 0 to less than the 2 rows"),
        ({"rotary": -1}, "rotary must lie"),
        ({"values": -1}, "values must be >= 0"),
    ],
)
def test_wrong_input_is_refused_and_changes_nothing(arguments, message):
    fitting = {"query": torch.ones(8, 3), "key": torch.ones(4, 3), "max_logits": torch.full((4,), 400.0)}
    fitting.update(arguments)
    before = {key: value.clone() for key, value in fitting.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(ValueError, match=message):
        qk_clip_(**fitting)
    assert all(torch.equal(fitting[key], value) for key, value in before.items())
