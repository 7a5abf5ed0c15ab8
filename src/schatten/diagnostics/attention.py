"""Attention logits: how large they can get, from the spectral norms of W_Q and W_K alone."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from schatten.diagnostics.core import Need, Whole
from schatten.diagnostics.singular_values import singular_values
from schatten.solvers.core import check_matrices

# How models name the projections. Where a fused one interleaves its heads (query_key_value) rows do not tell q from k.
QUERY = r"(^|[._])(q_proj|query|to_q|wq|q_lin)\.weight$"
KEY = r"(^|[._])(k_proj|key|to_k|wk|k_lin)\.weight$"
FUSED = r"(^|[._])((qkv|qkv_proj|to_qkv|wqkv|c_attn)\.weight|in_proj_weight)$"


class LogitBound(NamedTuple):
    """Bounds on |logit| of each head, (heads,) in fp64: `product` of two spectral norms, `joint` of the product W_Q^T W_K."""

    product: Tensor
    joint: Tensor


def logit_bound(
    query: Tensor,
    key: Tensor,
    *,
    heads: int = 1,
    key_heads: int | None = None,
    radius: float | None = None,
    scale: float | None = None,
    gain: Tensor | None = None,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> LogitBound:
    """The largest attention logit that inputs of norm at most R can give, of each head.

        |q . k| scale <= ||W_Q^T W_K||_op R^2 scale <= sigma(W_Q) sigma(W_K) R^2 scale

    `joint` is the first, which some inputs x and y of norm R reach, and `product` the second. Query head h reads key head
    h // (heads / key_heads). Rotary embeddings turn q and k by their positions: `product` holds all the same, but logits of two
    different positions may exceed `joint`. With q and k normalised after the projection (QK-norm) logits do not depend on the
    size of the weights and neither bound says anything. Masks and position biases are not counted.

    Args:
        query: W_Q, (heads * head_dim, fan_in); rows of a fused weight will do.
        key: W_K, (key_heads * head_dim, fan_in).
        heads: query heads. Where all are taken for one, its product bounds theirs at the same scale, its joint norm does not.
        key_heads: key heads, a divisor of `heads`; by default as many.
        radius: R, the largest norm of a token's input. By default sqrt(fan_in), which RMSNorm and LayerNorm without gain give.
        scale: of the logits in the softmax, 1 / sqrt(head_dim) by default.
        gain: (fan_in,), the weight of the norm before the projections.
        query_bias, key_bias: of the projections, (rows,). A norm's bias b adds W_Q b and W_K b to them.

    Cost: for each head two QRs and two SVDs without vectors of (head_dim, fan_in) and one of head_dim x head_dim, in fp64; no
    fan_in x fan_in matrix. nan for heads that are not finite. Raises ValueError for shapes that do not fit.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.attention import logit_bound
        >>> q, k = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [3.0, 0.0]])
        >>> [round(float(bound), 4) for bound in logit_bound(q, k, radius=1.0, scale=1.0)]
        [6.0, 3.0]
    """
    key_heads = key_heads or heads
    _check(query, key, heads, key_heads, gain)
    weight = 1.0 if gain is None else gain.detach().double()
    Q, bq = _cut("query", query, query_bias, heads, weight, 1)
    K, bk = _cut("key", key, key_bias, key_heads, weight, heads // key_heads)
    R = math.sqrt(query.shape[1]) if radius is None else radius
    scale = 1 / math.sqrt(Q.shape[1]) if scale is None else scale
    product = (_largest(Q) * R + _length(bq)) * (_largest(K) * R + _length(bk))
    crossed = (_length(K.mT @ bq) + _length(Q.mT @ bk)) * R + (bq * bk).sum((-2, -1)).abs()
    joint = _largest(_triangle(Q) @ _triangle(K).mT) * R**2 + crossed
    return LogitBound(product * scale, joint * scale)


@dataclass(frozen=True)
class Attention:
    """Products of the spectral norms of W_Q and W_K in every attention whose projections their names tell.

    Queries and keys are parameters that `query` and `key` find (regular expressions) under one prefix, or the first rows of
    those that `fused` finds, with q, k and v in turn: three times as high as wide, or of any height where `heads` and
    `key_heads` are given. With `heads` norms are those of each head, of which the largest counts, and logits are bounded, for
    inputs of norm `radius`, by default sqrt(fan_in). The weight of the norm before is not read: where it exceeds 1, pass its
    largest entry times sqrt(fan_in). `logit_bound` says what bounds leave out: rotary embeddings (joint), QK-norm (both).
    Projections that keep q, k and v of each head together (`query_key_value`) and latent attention are not found: call
    `logit_bound` with their rows.

    Raises ValueError where no projection is found, and for heads that do not fit.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.attention import Attention
        >>> from schatten.diagnostics.core import Whole
        >>> found = Attention()(Whole({"a.q_proj.weight": 2 * torch.eye(4), "a.k_proj.weight": 3 * torch.eye(4)}, ()))
        >>> round(float(found["product"]), 4)
        6.0
    """

    name: ClassVar[str] = "attention"
    scope: ClassVar[Literal["matrix", "model"]] = "model"
    needs: ClassVar[frozenset[Need]] = frozenset()
    columns: ClassVar[Mapping[str, str]] = {
        "product": "largest ||W_Q||_op ||W_K||_op of a head; without heads of whole projections, which is no less",
        "joint": "largest ||W_Q^T W_K||_op of a head; with heads only",
        "bound": "largest attention logit that inputs of norm radius can give, by the product; with heads only",
        "joint_bound": "the same by the joint norm, without rotary embeddings; with heads only",
        "products": "the product of each attention, in the order of the parameters, a vector",
        "joints": "the joint norm of each attention, a vector; with heads only",
    }
    cost: ClassVar[str] = (
        "for each head two QRs and three SVDs without vectors, in fp64; twice that with heads, without them two SVDs"
    )

    heads: int | None = None
    key_heads: int | None = None
    radius: float | None = None
    query: str = QUERY
    key: str = KEY
    fused: str = FUSED

    def check(self, of: Whole) -> None:
        """Raise ValueError where no projection is found, or one does not have the heads."""
        if not list(self._projections(of.parameters)):
            raise ValueError(
                f"No parameter is a query and a key projection by name, of {', '.join(of.parameters) or 'none'}: pass "
                f"Attention(query=, key=) or Attention(fused=), regular expressions that find them."
            )

    def __call__(self, of: Whole) -> Mapping[str, Tensor]:
        self.check(of)
        products, joints, bounds = [], [], []
        for own in self._projections(of.parameters):
            if self.heads is None:
                products.append(_largest(own.query.double()) * _largest(own.key.double()))
                continue
            measure = partial(logit_bound, own.query, own.key, heads=self.heads, key_heads=self.key_heads)
            norms = measure(radius=1.0, scale=1.0)
            products.append(norms.product.amax())
            joints.append(norms.joint.amax())
            bounds.append(measure(radius=self.radius, query_bias=own.query_bias, key_bias=own.key_bias))
        found = {"products": _stacked(products)}
        if bounds:
            found |= {
                "joints": _stacked(joints),
                "bound": _stacked([one.product.amax() for one in bounds]).amax(),
                "joint_bound": _stacked([one.joint.amax() for one in bounds]).amax(),
            }
        return {name.removesuffix("s"): found[name].amax() for name in ("products", "joints") if name in found} | found

    def _projections(self, parameters: Mapping[str, Tensor]) -> Iterator["_Projections"]:
        keys = {name[: m.start()]: name for name in parameters if (m := re.search(self.key, name))}
        for name, W in parameters.items():
            if (m := re.search(self.query, name)) and (key := keys.get(name[: m.start()])):
                whole = {n: _whole(parameters[n]) for n in (name, key, _bias(name), _bias(key)) if n in parameters}
                yield _Projections(whole[name], whole[key], whole.get(_bias(name)), whole.get(_bias(key)))
            elif W.ndim == 2 and re.search(self.fused, name):
                whole = {n: _whole(parameters[n]) for n in (name, _bias(name)) if n in parameters}
                W, b = whole[name], whole.get(_bias(name))
                # Hugging Face's Conv1D stores (fan_in, fan_out).
                W = W.mT if W.shape[1] == 3 * W.shape[0] else W
                q, k = self._rows(W, name)
                yield _Projections(W[:q], W[q : q + k], *((None, None) if b is None else (b[:q], b[q : q + k])))

    def _rows(self, W: Tensor, name: str) -> tuple[int, int]:
        """How many rows of a fused weight are queries and how many are keys."""
        heads, key_heads = self.heads or 1, self.key_heads or self.heads or 1
        if W.shape[0] % (heads + 2 * key_heads) or (self.heads is None and W.shape[0] != 3 * W.shape[1]):
            raise ValueError(
                f"{name} of shape {tuple(W.shape)} is not q, k and v of heads={self.heads} and key_heads={self.key_heads}: "
                f"pass the model's numbers, or fused= with an expression that does not find it."
            )
        width = W.shape[0] // (heads + 2 * key_heads)
        return heads * width, key_heads * width


class _Projections(NamedTuple):
    """W_Q, W_K and their biases."""

    query: Tensor
    key: Tensor
    query_bias: Tensor | None
    key_bias: Tensor | None


def _bias(weight: str) -> str:
    """The name of a weight's bias."""
    return weight.removesuffix("weight") + "bias"


def _check(query: Tensor, key: Tensor, heads: int, key_heads: int, gain: Tensor | None) -> None:
    check_matrices(query, "query")
    check_matrices(key, "key")
    if query.ndim != 2 or key.ndim != 2 or query.shape[1] != key.shape[1]:
        raise ValueError(
            f"query and key must be (heads * head_dim, fan_in) of one fan_in, got {tuple(query.shape)} and {tuple(key.shape)}."
        )
    if heads < 1 or key_heads < 1 or heads % key_heads or query.shape[0] * key_heads != key.shape[0] * heads:
        raise ValueError(
            f"query and key must have rows for heads={heads} and key_heads={key_heads}, a divisor of it, of one head_dim; got "
            f"{tuple(query.shape)} and {tuple(key.shape)}."
        )
    if query.shape[0] % heads:
        raise ValueError(f"heads must divide the rows of query, got heads={heads} and shape {tuple(query.shape)}.")
    if gain is not None and gain.shape != query.shape[1:]:
        raise ValueError(f"gain must have shape ({query.shape[1]},), one number for each input, got {tuple(gain.shape)}.")


def _cut(name: str, W: Tensor, bias: Tensor | None, heads: int, gain: Tensor | float, repeats: int) -> tuple[Tensor, Tensor]:
    """A projection's heads (heads, head_dim, fan_in) and biases (heads, head_dim, 1) in fp64, each `repeats` times."""
    if bias is not None and bias.shape != W.shape[:1]:
        raise ValueError(f"{name}_bias must have shape ({W.shape[0]},), got {tuple(bias.shape)}.")
    b = W.new_zeros(W.shape[0]) if bias is None else bias
    cuts = (X.detach().double().reshape(heads, -1, X.shape[-1]) for X in (W, b.unsqueeze(-1)))
    X, B = (cut.repeat_interleave(repeats, 0) for cut in cuts)
    return X * gain, B


def _stacked(numbers: Sequence[Tensor]) -> Tensor:
    """(layers,) on the first one's device, as layers may lie on several."""
    return torch.stack([number.to(numbers[0].device) for number in numbers])


def _largest(X: Tensor) -> Tensor:
    return singular_values(X)[..., :1].sum(-1)


def _triangle(X: Tensor) -> Tensor:
    """R of X^T = Q R: (*b, m, n) -> (*b, min(m, n), m)."""
    return torch.linalg.qr(X.mT, mode="r").R


def _length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(-2, -1))


def _whole(t: Tensor) -> Tensor:
    t = t.detach()
    return t.full_tensor() if isinstance(t, DTensor) else t


QUANTITY = Attention
