"""What a tensor of a checkpoint is, from its name, its shape and config.json: no module is there to ask.

`schatten plan` reads a model, which knows more. Here a fused projection is cut only where names and sizes leave one way to do
it, and the table says what was done.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from schatten.layout import Layout, pieces

# Kinds that a spectral optimizer steps as matrices; the others are AdamW's by default (docs/routing.md).
HIDDEN = ("Q", "K", "V", "QKV", "attn out", "MLP in", "MLP gate", "MLP out", "expert in", "expert gate", "expert out")
HIDDEN = (*HIDDEN, "convolution", "other")

EMBEDDING = re.compile(
    r"(wte|wpe|shared|emb|tokens|positions|relative_attention_bias|embeddings?|embed_in|embed|embed_(tokens|positions)"
    r"|(tok|token|word|pos|position|token_type|type)s?_?emb(ed|edding)?s?|lm_embed)"
)
HEAD = re.compile(r"(lm_head|embed_out|heads?|classifier|score|output_layer|cls|logits|decoder_head)")
ROUTER = re.compile(r"(router|gating|routers)")
ATTENTION = re.compile(r"attn|attention|^att$")
# Two dimensions that are no rows and columns: decays of state spaces for each channel and state.
VECTORS = ("a_log", "d_skip")
FUSED_QKV = re.compile(r"(c_attn|qkv|qkv_proj|wqkv|to_qkv|in_proj_weight|query_key_value|w_pack)")
Q = re.compile(r"(w?q|(q|query)_?(proj|lin|proj_weight)?|c_q|to_q|linear_q|q_[ab]_proj)")
K = re.compile(r"(w?k|(k|key)_?(proj|lin|proj_weight)?|c_k|to_k|linear_k)")
V = re.compile(r"(w?v|(v|value)_?(proj|lin|proj_weight)?|c_v|to_v|linear_v)")
OUT = re.compile(r"(w?o|(o|out|output)(_?(proj|lin))?|c_proj|to_out|dense|proj|linear_out)")
GATE_UP = re.compile(r"(gate_up_proj|gate_up|w13|w1_w3)")
GATE = re.compile(r"(gate_proj|wi_0|gate|w_gate|linear_gate)")
UP = re.compile(r"(up_proj|up|w3|v1|wi|wi_1|fc1|c_fc|lin1|linear1|fc_in|dense_h_to_4h|w_up|linear_in)")
DOWN = re.compile(r"(down_proj|down|w2|wo|fc2|c_proj|lin2|linear2|fc_out|dense_4h_to_h|w_down|linear_out)")

# Fused projections whose rows are not q, then k, then v, by model_type.
BY_HEAD = ("gpt_neox", "bloom")
OTHER_ORDERS = ("codegen", "minimax", "deberta", "falcon", "chatglm", "gpt_bigcode", "mpt", "persimmon", "dbrx")

# Stored as (fan_in, fan_out): Hugging Face's Conv1D, in models of these types.
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")


@dataclass(frozen=True)
class Reading:
    """A tensor as matrices: their kind, or one for each part of a cut, and how it was read.

    `layout` is of the whole tensor or, of a bank, of each expert; None where it holds no matrix that is known.
    """

    kinds: tuple[str, ...]
    layout: Layout | None
    how: str
    bank: bool = False

    def matrices(self, t: Tensor) -> Iterator[tuple[str, str, Tensor]]:
        """(suffix of the name, kind, matrix) for each; views but where a cut interleaves."""
        if self.layout is None:
            return
        for e, own in enumerate(t.flatten(0, -3)) if self.bank else enumerate((t,)):
            start = f"[{e}]" * self.bank
            cut = (block for piece in pieces(self.layout, tuple(own.shape)) for block in piece.of(own))
            for i, block in enumerate(cut):
                kind = self.kinds[i % len(self.kinds)]
                yield start + f"[{kind.split()[-1].lower()}]" * (len(self.kinds) > 1), kind, block


def read(name: str, shape: Sequence[int], shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]) -> Reading:
    """How the tensor `name` is read; `shapes` are those of the whole checkpoint."""
    path = [part.lower() for part in name.split(".") if not part.isdigit()] or [name]
    if len(path) > 1 and path[-1] in ("weight", "weights", "kernel"):
        path.pop()
    leaf = re.sub(r"_weights?$", "", path[-1]) if path[-1] != "in_proj_weight" else path[-1]
    if len(shape) < 2:
        return Reading(("vector",), None, "a vector or scalar")
    if leaf in VECTORS or (leaf.endswith("bias") and not EMBEDDING.fullmatch(leaf)):
        return Reading(("vector",), None, "biases or decays of several units, no matrix")
    if math.prod(shape) == 0 or (min(shape[:2]) == 1 and len(shape) == 2):
        return Reading(("vector",), None, "a vector, stored in two dimensions")
    expert = any(re.fullmatch(r"(local_|mlp_)?experts?", part) for part in path)
    if len(shape) == 2:
        return _matrix(name, path, leaf, (shape[0], shape[1]), shapes, config, expert)
    if len(shape) == 3 and (expert or GATE_UP.fullmatch(leaf)):
        return _bank(name, leaf, tuple(shape), shapes, config)
    if len(shape) >= 4 or "conv" in path[-1] or any("conv" in part for part in path[-3:]):
        if len(shape) > 5 or math.prod(shape[1:]) == 1:
            return Reading(("other",), None, f"{len(shape)} dimensions: not known which are rows and columns")
        if shape[1] == 1:
            return Reading(("depthwise",), Layout("conv"), "a kernel for each channel")
        return Reading(("convolution",), Layout("conv"), f"out x (in * kernel), kernel {'x'.join(map(str, shape[2:]))}")
    return Reading(("other",), None, "3 dimensions: not known whether a convolution or a bank of matrices")


def _matrix(
    name: str,
    path: list[str],
    leaf: str,
    shape: tuple[int, int],
    shapes: Mapping[str, Sequence[int]],
    config: Mapping[str, Any],
    expert: bool,
) -> Reading:
    plain = Layout("matrix")
    if re.fullmatch(r"lora_(a|down)|lora_(b|up)", leaf) or any(part in ("lora_a", "lora_b") for part in path):
        return Reading((f"LoRA {'A' if re.search('lora_(a|down)', '.'.join(path)) else 'B'}",), plain, "matrix")
    parent = name[: name.lower().rfind(f".{leaf}")]
    siblings = [other[len(parent) + 1 :].lower() for other in shapes if other.startswith(f"{parent}.")]
    if ROUTER.fullmatch(leaf) or (leaf in ("gate", "wg") and any("expert" in other for other in siblings)):
        return Reading(("router",), plain, "matrix")
    attention = any(ATTENTION.search(part) for part in path[:-1])
    if EMBEDDING.fullmatch(leaf):
        return Reading(("embedding",), plain, "table")
    if HEAD.fullmatch(leaf) or (leaf == "output" and len(path) == 1):
        return Reading(("head",), plain, "matrix")
    if FUSED_QKV.fullmatch(leaf) or (leaf == "in_proj" and attention):
        return _qkv(leaf, shape, config)
    conv1d = str(config.get("model_type")) in CONV1D or _among_conv1d(parent, leaf, shapes)
    whole = Layout("matrix", transpose=conv1d and leaf in ("c_proj", "c_fc"))
    how = "matrix, stored transposed" if whole.transpose else "matrix"
    for kind, pattern in (("Q", Q), ("K", K), ("V", V)):
        if pattern.fullmatch(leaf):
            return Reading((kind,), whole, how)
    if (attention and OUT.fullmatch(leaf)) or (leaf in ("o_proj", "wo") and "q_proj" in " ".join(siblings)):
        return Reading(("attn out",), whole, how)
    if GATE_UP.fullmatch(leaf) and shape[0] % 2 == 0:
        kinds = ("expert gate", "expert in") if expert else ("MLP gate", "MLP in")
        return Reading(kinds, Layout("matrix", split=2), "rows cut into gate, up")
    kind = _mlp(path, leaf, siblings)
    if kind is not None:
        return Reading((f"{'expert' if expert else 'MLP'} {kind}",), whole, how)
    return Reading(("other",), whole, how)


def _mlp(path: list[str], leaf: str, siblings: Sequence[str]) -> str | None:
    """Which projection of a feed-forward network."""
    if leaf == "w1":
        return "gate" if any(re.match(r"(w3|v1)\b", other) for other in siblings) else "in"
    if leaf == "dense" and len(path) > 1 and path[-2] in ("intermediate", "output"):
        return "in" if path[-2] == "intermediate" else "out"
    if GATE.fullmatch(leaf):
        return "gate"
    return "in" if UP.fullmatch(leaf) else "out" if DOWN.fullmatch(leaf) else None


def _among_conv1d(parent: str, leaf: str, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether a c_attn in the same block is stored transposed, so that this is too."""
    if leaf not in ("c_proj", "c_fc"):
        return False
    block = parent.rsplit(".", 1)[0]
    beside = [s for name, s in shapes.items() if name.startswith(f"{block}.") and name.endswith("c_attn.weight")]
    return any(len(s) == 2 and s[1] == 3 * s[0] for s in beside)


def _qkv(leaf: str, shape: tuple[int, int], config: Mapping[str, Any]) -> Reading:
    """A fused projection, cut by rows = 3 columns or by the numbers of heads in config.json."""
    rows, columns = shape
    transposed = columns == 3 * rows and leaf == "c_attn"
    if transposed:
        rows, columns = columns, rows
    family = str(config.get("model_type", ""))
    heads, kv = _number(config, "num_attention_heads", "n_head"), _number(config, "num_key_value_heads")
    kinds = ("Q", "K", "V")
    if leaf == "query_key_value" or family in BY_HEAD:
        if family in BY_HEAD and heads and rows == 3 * columns and rows % (3 * heads) == 0:
            return Reading(kinds, Layout("matrix", split=3, groups=heads), f"cut into q, k, v of each of {heads} heads")
        return Reading(("QKV",), Layout("matrix"), "q, k, v as one matrix: the order of its rows is not known")
    if any(family.startswith(other) for other in OTHER_ORDERS):
        return Reading(("QKV",), Layout("matrix"), f"q, k, v as one matrix: {family} has an order of its own")
    if heads and kv and kv != heads and rows % (heads + 2 * kv) == 0:
        width = rows // (heads + 2 * kv)
        if width in (_number(config, "head_dim"), columns // heads):
            split = (heads * width, kv * width, kv * width)
            return Reading(kinds, Layout("matrix", split=split), f"rows cut into q, k, v of {split} by config.json")
    if rows == 3 * columns and not (kv and heads and kv != heads):
        return Reading(kinds, Layout("matrix", split=3, transpose=transposed), "cut into q, k, v" + ", transposed" * transposed)
    return Reading(("QKV",), Layout("matrix"), "q, k, v as one matrix: sizes do not say where to cut")


def _number(config: Mapping[str, Any], *names: str) -> int | None:
    return next((n for name in names if isinstance(n := config.get(name), int) and not isinstance(n, bool) and n > 0), None)


def _bank(
    name: str, leaf: str, shape: tuple[int, ...], shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]
) -> Reading:
    """A bank of experts, one matrix for each index; gate and up are cut where it is known which axis and order they have."""
    parent = name[: name.lower().rfind(leaf)]
    beside = {other[len(parent) :].lower(): tuple(s) for other, s in shapes.items() if other.startswith(parent) and len(s) == 3}
    fused = next((s for other, s in beside.items() if GATE_UP.match(other)), None)
    down = next((s for other, s in beside.items() if DOWN.match(other)), None)
    straight, transposed = False, False
    if fused is not None and down is not None:
        # (experts, 2 f, d) and (experts, d, f), or (experts, d, 2 f) and (experts, f, d): never both.
        _, out, into = down
        straight, transposed = fused[1:] == (2 * into, out), fused[1:] == (into, 2 * out)
    if not GATE_UP.fullmatch(leaf):
        kind = "expert gate" if GATE.fullmatch(leaf) else "expert in" if UP.fullmatch(leaf) else "other"
        kind = "expert out" if DOWN.fullmatch(leaf) else kind
        return Reading((kind,), Layout("matrix", transpose=transposed and not straight), f"{shape[0]} experts", bank=True)
    if straight != transposed:
        assert down is not None
        groups = (down[2] if straight else down[1]) if config.get("model_type") == "gpt_oss" else 1
        cut = Layout("matrix", split=2, groups=groups, transpose=transposed)
        turn = " in turn" if groups > 1 else ""
        return Reading(("expert gate", "expert in"), cut, f"{shape[0]} experts, each cut into gate, up{turn}", bank=True)
    return Reading(("expert in",), Layout("matrix"), f"{shape[0]} experts, gate and up as one matrix", bank=True)


def depth(name: str) -> tuple[str, int] | None:
    """The stack of layers that a name belongs to and its number there: the first number of the name."""
    found = re.search(r"^(.*?)\.(\d+)(\.|$)", f".{name}")
    return (found[1].removeprefix("."), int(found[2])) if found else None
