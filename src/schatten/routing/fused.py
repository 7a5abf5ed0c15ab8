"""Fused projections: which rows of one weight are matrices of their own.

A projection is cut where its output is cut into operands with different parts to play: query, key and value, gate and up, a
latent and a key, the x, z, B, C and dt of a state space. Its sizes are read from the module around it, and the order of its
rows from that module's class where it is not the usual one, operand after operand. Rows of one operand, as the heads of a
query, stay one matrix.
"""

import re
from dataclasses import dataclass

from torch import nn

from schatten.routing.sizes import HEADS, KV_HEADS, WIDTHS, classes, linear_sizes, number, reads

# Attention that stores q, k and v head by head, besides what is called query_key_value as in Megatron-LM.
BY_HEAD = ("DisentangledSelfAttention", "MiniMaxLightningAttention")


@dataclass(frozen=True)
class Cut:
    """Rows of a projection: `groups` repetitions of the parts `split`; `known` is False where the order is a guess."""

    what: str
    split: int | tuple[int, ...]
    groups: int = 1
    known: bool = True


def cut(block: nn.Module, child: str, rows: int, columns: int) -> Cut | None:
    """How the projection `child` of `block`, rows x columns, is fused; None for one matrix."""
    if isinstance(block, (nn.Sequential, nn.ModuleList)):
        return _before_glu(block, child, rows)
    for found in (_state_space, _latent, _query_key_value, _key_value, _gated_query, _parts):
        if (answer := found(block, child, rows, columns)) is not None:
            return answer
    return None


def _before_glu(block: nn.Module, child: str, rows: int) -> Cut | None:
    """In a sequence a projection feeds the next module, so only a GLU (GEGLU, SwiGLU) there reads halves of it."""
    names = list(block._modules)
    after = names[names.index(child) + 1 :][:1] if isinstance(block, nn.Sequential) else []
    gated = any("GLU" in type(block._modules[name]).__name__.upper() for name in after)
    return Cut("halves of a gated unit", 2) if gated and rows % 2 == 0 else None


def _state_space(block: nn.Module, child: str, rows: int, columns: int) -> Cut | None:
    """Mamba's in_proj and x_proj, Mamba-2's in_proj, and the projections of Gated DeltaNet."""
    inner = number(block, "intermediate_size", "d_inner")
    state = number(block, "ssm_state_size", "d_state")
    if child == "in_proj_qkvz" or child == "in_proj_ba":
        groups, value_heads = number(block, "num_k_heads"), number(block, "num_v_heads")
        key, value = number(block, "head_k_dim"), number(block, "head_v_dim")
        if not (groups and value_heads and key and value):
            return None
        own = value_heads // groups
        if child == "in_proj_ba":
            return Cut("b, a of each key head", 2, groups)
        return Cut("q, k, v, z of each key head", (key, key, own * value, own * value), groups)
    if not hasattr(block, "A_log") or not state:
        return None
    rank = number(block, "time_step_rank", "dt_rank")
    if child == "x_proj" and rank and rows == rank + 2 * state:
        return Cut("dt, B, C", (rank, state, state))
    if child == "in_proj" and inner:
        if rows == 2 * inner:
            return Cut("x, z of each channel", 2, inner) if "ZambaMambaMixer" in classes(block) else Cut("x, z", 2)
        heads, groups = number(block, "num_heads", "nheads"), number(block, "n_groups", "ngroups")
        if heads and groups and rows == 2 * inner + 2 * groups * state + heads:
            return Cut("z, x, B, C, dt", (inner, inner, groups * state, groups * state, heads))
        return Cut("projection of a state space", 1, known=False)
    return None


def _latent(block: nn.Module, child: str, rows: int, columns: int) -> Cut | None:
    """Multi-head latent attention (DeepSeek-V2): the latent and the shared rotary key, and what k and v are made of."""
    rank, rotary = number(block, "kv_lora_rank"), number(block, "qk_rope_head_dim")
    if not rank or not rotary:
        return Cut("latent, rotary key", 1, known=False) if child == "kv_a_proj_with_mqa" else None
    if "kv" in child and rows == rank + rotary:
        return Cut("latent, rotary key", (rank, rotary))
    heads, key, value = number(block, *HEADS), number(block, "qk_nope_head_dim"), number(block, "v_head_dim")
    if "kv" in child and columns == rank and heads and key and value and rows == heads * (key + value):
        return Cut("k, v of each head", (key, value), heads)
    return None


def _query_key_value(block: nn.Module, child: str, rows: int, columns: int) -> Cut | None:
    named = re.search(r"qkv|query_key_value|c_attn", child, re.IGNORECASE) is not None
    own = classes(block)
    by_head = child == "query_key_value" or any(name in BY_HEAD for name in own)
    if "GPTBigCodeAttention" in own:
        by_head = not getattr(block, "multi_query", False)
    heads = number(block, *HEADS)
    if not named and not (by_head and child == "in_proj"):
        # Sizes alone tell such a projection, but not the order of its rows.
        fits = heads and child != "in_proj" and rows == 3 * columns and _feeds(block, child, columns, columns, later=False)
        return Cut("q, k, v", 3, known=False) if fits and not _is_read(block, rows) else None
    if "CodeGenAttention" in own:
        return Cut("q, v, k of each of 4 shards", 3, 4)
    if child == "in_proj_qkv" and (key := number(block, "key_dim")) and (value := number(block, "value_dim")):
        return Cut("q, k, v", (key, key, value))
    if rows == 2 * columns and "q_attn" in block._modules:
        return Cut("k, v", 2)
    kv_heads = heads and _kv_heads(block, heads, rows, columns)
    if not heads or not kv_heads:
        thirds = rows % 3 == 0 and (rows == 3 * columns or _is_read(block, rows // 3))
        return Cut("q, k, v", 3 if rows % 3 == 0 else 1, known=thirds and not by_head)
    width = rows // (heads + 2 * kv_heads)
    if by_head and kv_heads > 1:
        query = heads // kv_heads * width
        return Cut("q, k, v of each head", 3 if query == width else (query, width, width), kv_heads)
    return Cut("q, k, v", 3 if heads == kv_heads else (heads * width, kv_heads * width, kv_heads * width))


def _kv_heads(block: nn.Module, heads: int, rows: int, columns: int) -> int | None:
    """How many heads k and v have, of those the block speaks of, for the rows to add up."""
    width = number(block, *WIDTHS) or columns // heads
    return next((n for n in (number(block, *KV_HEADS), heads) if n and rows == (heads + 2 * n) * width), None)


def _key_value(block: nn.Module, child: str, rows: int, columns: int) -> Cut | None:
    """A key and value projection whose two halves the heads of the block confirm."""
    if re.fullmatch(r"(to_)?w?kv(_?proj|_linear)?", child, re.IGNORECASE) is None:
        return None
    heads, width = number(block, *KV_HEADS) or number(block, *HEADS), number(block, *WIDTHS)
    halves = (heads and width and rows == 2 * heads * width) or _feeds(block, child, columns, rows // 2, later=False)
    return Cut("k, v", 2) if halves and rows % 2 == 0 else None


def _gated_query(block: nn.Module, child: str, rows: int, columns: int) -> Cut | None:
    """A query projection with an output gate for each head, as Qwen3-Next's: twice the heads, and the output reads half."""
    heads, width = number(block, *HEADS), number(block, *WIDTHS)
    if child != "q_proj" or not heads or not width or rows != 2 * heads * width:
        return None
    output = next((m for name, m in block._modules.items() if name in ("o_proj", "out_proj")), None)
    gated = output is not None and linear_sizes(output) == (columns, rows // 2)
    return Cut("query, gate of each head", 2, heads) if gated else None


def _parts(block: nn.Module, child: str, rows: int, columns: int) -> Cut | None:
    """A projection of which nothing reads all rows, and a later one half of them: gated linear units, by whatever name."""
    if re.search(r"gate_up|up_gate|w13|w1_w3", child) and rows % 2 == 0:
        return Cut("gate, up", 2)
    if child.startswith("pointwise_conv") and _feeds(block, child, columns, rows // 2):
        return Cut("halves of a gated unit", 2)
    # Of attention the output may read half as many features as queries have, where values are narrower.
    if any("attention" in name.lower() for name in classes(block)) or any(hasattr(block, name) for name in (*HEADS, *WIDTHS)):
        return None
    for n in (2, 3, 4) if child == "in_proj" else (2,):
        if rows % n == 0 and _feeds(block, child, columns, rows // n) and not _is_read(block, rows):
            return Cut("halves of a gated unit" if n == 2 else f"{n} parts of a gated unit", n)
    return None


def _feeds(block: nn.Module, child: str, rows: int, columns: int, later: bool = True) -> bool:
    """Whether another projection of the block, a later one by default, is rows x columns."""
    names = list(block._modules)
    others = names[names.index(child) + 1 :] if later and child in names else [name for name in names if name != child]
    return any((m := block._modules[name]) is not None and linear_sizes(m) == (rows, columns) for name in others)


def _is_read(block: nn.Module, features: int) -> bool:
    return any(reads(m) == features for m in block.modules())
