"""What `schatten diagnose` measures: spectra against SVDs, how tensors are read as matrices, bounds, and changes."""

import itertools
import math
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from schatten.diagnostics.effective_ranks import effective_rank as effective_rank_of
from schatten.diagnostics.effective_ranks import stable_rank
from schatten.lab import diagnose, diagnose_changes, diagnose_rows, matrix_kinds, spectra
from schatten.lab.checkpoint_reader import open_checkpoint
from schatten.lab.spectra import Matrix, Workspace, spectrum

BIG = 1 << 20

SHAPES = [(40, 24), (24, 40), (30, 30), (1, 9), (7, 1)]


def quiet(name: str, entries: int) -> None:
    pass


def measured(folder: Any, tensors: dict[str, torch.Tensor], max_size: int = BIG) -> diagnose.Diagnosis:
    save_file(tensors, folder / "m.safetensors")
    return diagnose.diagnose(open_checkpoint(folder / "m.safetensors"), max_size=max_size, device="cpu", progress=quiet)


def compared(folder: Any, one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], top: int = 4, max_size: int = BIG) -> Any:
    save_file(one, folder / "one.safetensors")
    save_file(two, folder / "two.safetensors")
    files = (open_checkpoint(folder / f"{name}.safetensors") for name in ("one", "two"))
    return diagnose_changes.compare(*files, max_size=max_size, device="cpu", top=top, progress=quiet)


def orthogonal(rows: int, columns: int) -> torch.Tensor:
    """Orthonormal columns."""
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64))[0].contiguous()


# -- spectra ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gram_matrix_gives_the_singular_values_of_an_svd(monkeypatch, shape):
    """To a relative 1e-13 of the largest here: values near it lose nothing, those at half of it little."""
    monkeypatch.setattr(spectra, "SVD_SIDE", 0)
    monkeypatch.setattr(spectra, "SLICE", 100)  # several slices
    A = torch.randn(shape)
    found = spectrum(Matrix(Workspace(), A), max_size=BIG)
    s = torch.linalg.svdvals(A.double())
    assert found.method == "gram"
    # An eigenvalue is off by some eps sigma_1^2, a singular value by that over twice itself.
    assert torch.allclose(found.values**2, s**2, rtol=0, atol=1e-14 * float(s[0]) ** 2 * min(shape))
    assert math.isclose(found.frobenius, float(torch.linalg.vector_norm(A.double())), rel_tol=1e-13)


def test_values_below_the_stated_floor_are_all_that_a_gram_matrix_loses(monkeypatch):
    monkeypatch.setattr(spectra, "SVD_SIDE", 0)
    true = torch.logspace(0, -12, 60, dtype=torch.float64)
    A = orthogonal(80, 60) @ torch.diag(true) @ orthogonal(60, 60).T
    found = spectrum(Matrix(Workspace(), A), max_size=BIG)
    kept = true > 10 * found.floor
    assert kept.sum() > 25 and not kept.all()
    assert torch.allclose(found.values[kept], true[kept], rtol=0.01, atol=0)
    assert (found.values[~kept] <= 20 * found.floor).all()


@pytest.mark.parametrize("spike", [1.0, 1.3], ids=["flat", "with an outlier"])
@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
def test_krylov_iteration_gives_the_largest_value_and_a_residual_that_bounds_its_error(monkeypatch, shape, spike):
    """From below; a flat Gaussian spectrum is the hard case."""
    A = torch.randn(shape)
    U, s, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    A = ((U * torch.cat([s[:1] * spike, s[1:]])) @ Vh).float()
    s = torch.linalg.svdvals(A.double())
    monkeypatch.setattr(spectra, "SVD_SIDE", 0)
    found = spectrum(Matrix(Workspace(), A), max_size=10)
    error = 1 - float(found.values[0] / s[0])
    # fp32 products: rounding is some eps = 6e-8.
    assert found.method == "krylov" and -1e-6 < error < 1e-4
    nearest = float(((found.values[0] - s) / s[0]).abs().min())
    assert nearest <= found.residual + 1e-6
    assert math.isclose(found.frobenius, float(torch.linalg.vector_norm(s)), rel_tol=1e-12)


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_no_square_overflows_or_underflows(monkeypatch, size):
    monkeypatch.setattr(spectra, "SVD_SIDE", 0)
    A = torch.randn(20, 10, dtype=torch.float64)
    found = spectrum(Matrix(Workspace(), A * size), max_size=BIG)
    assert torch.allclose(found.values / size, torch.linalg.svdvals(A), rtol=1e-10)


@pytest.mark.parametrize("method", ["svd", "gram", "krylov"])
def test_leading_vectors_are_those_of_an_svd(monkeypatch, method):
    if method != "svd":
        monkeypatch.setattr(spectra, "SVD_SIDE", 0)
    true = torch.tensor([9.0, 7.0, 5.0, *[1.0] * 17], dtype=torch.float64)
    U, V = orthogonal(50, 20), orthogonal(20, 20)
    found = spectrum(Matrix(Workspace(), U @ torch.diag(true) @ V.T), max_size=10 if method == "krylov" else BIG, vectors=3)
    assert found.method == method and found.left is not None and found.right is not None
    for own, expected in ((found.left, U[:, :3]), (found.right, V[:, :3])):
        mean, angle = spectra.overlap(own.double(), expected)
        assert mean > 1 - 1e-6 and angle < 0.1


def test_ranks_are_those_of_schatten_diagnostics(tmp_path):
    A = torch.randn(30, 20) @ torch.diag(torch.logspace(0, -2, 20))
    (row,) = measured(tmp_path, {"w": A}).rows
    assert math.isclose(row.stable_rank, float(stable_rank(A)), rel_tol=1e-9)
    assert math.isclose(row.effective_rank, float(effective_rank_of(A)), rel_tol=1e-9)
    s = torch.linalg.svdvals(A.double())
    assert math.isclose(row.condition, float(s[0] / s[-1]), rel_tol=1e-6) and not row.condition_bound
    assert math.isclose(row.rms, float(A.double().square().mean().sqrt()), rel_tol=1e-9)
    # torch's median is the lower of two.
    assert math.isclose(row.sigma_median, float(s.median()), rel_tol=1e-9)


def test_random_entries_have_peak_one_and_an_outlier_more(tmp_path):
    A = torch.randn(400, 200)
    plain, spiked = measured(tmp_path, {"a": A, "b": A + 0.5}).rows
    assert abs(plain.peak - 1) < 0.03 and spiked.peak > 3
    assert plain.pile < 0.02


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_a_matrix_of_lower_rank_has_a_condition_that_is_a_bound(tmp_path, rank):
    A = torch.randn(12, rank, dtype=torch.float64) @ torch.randn(rank, 9, dtype=torch.float64)
    (row,) = measured(tmp_path, {"w": A}).rows
    assert row.condition_bound and (rank == 0) == math.isnan(row.condition)
    assert rank == 0 or row.condition > 1e13


@pytest.mark.parametrize("method", ["svd", "gram", "krylov"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_entries_that_are_not_finite_are_counted_and_named(tmp_path, monkeypatch, method, bad):
    if method != "svd":
        monkeypatch.setattr(spectra, "SVD_SIDE", 0)
    A = torch.randn(30, 20)
    A[3, 4] = A[20, 0] = bad
    found = measured(tmp_path, {"w": A, "ok": torch.eye(3), "b": torch.tensor([1.0, bad])}, 5 if method == "krylov" else BIG)
    by_name = {row.name: row for row in found.rows}
    assert by_name["w"].nonfinite == 2 and math.isnan(by_name["w"].sigma_max) and by_name["ok"].nonfinite == 0
    assert [(t.name, t.nonfinite) for t in found.unmeasured] == [("b", 1)]
    assert sum(ball.matrices for ball in found.balls) == 1


# -- how tensors are read --------------------------------------------------------------------------------------------------

NAMES = {
    "model.embed_tokens.weight": "embedding",
    "transformer.wte.weight": "embedding",
    "tokens.weight": "embedding",
    "bert.embeddings.word_embeddings.weight": "embedding",
    "shared.weight": "embedding",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "embedding",
    "lm_head.weight": "head",
    "output.weight": "head",
    "classifier.weight": "head",
    "model.layers.0.self_attn.q_proj.weight": "Q",
    "layers.3.attention.wk.weight": "K",
    "encoder.block.0.layer.0.SelfAttention.v.weight": "V",
    "blocks.0.attention.query.weight": "Q",
    "blocks.0.attention.output.weight": "attn out",
    "model.layers.0.self_attn.o_proj.weight": "attn out",
    "layers.3.attention.wo.weight": "attn out",
    "vit.blocks.0.attn.proj.weight": "attn out",
    "bert.encoder.layer.0.attention.output.dense.weight": "attn out",
    "bert.encoder.layer.0.output.dense.weight": "MLP out",
    "bert.encoder.layer.0.intermediate.dense.weight": "MLP in",
    "unet.mid.attn.to_out.0.weight": "attn out",
    "model.layers.0.mlp.gate_proj.weight": "MLP gate",
    "model.layers.0.mlp.up_proj.weight": "MLP in",
    "model.layers.0.mlp.down_proj.weight": "MLP out",
    "encoder.block.0.layer.1.DenseReluDense.wo.weight": "MLP out",
    "blocks.0.up.weight": "MLP in",
    "blocks.0.down.weight": "MLP out",
    "model.layers.0.mlp.experts.7.up_proj.weight": "expert in",
    "model.layers.0.block_sparse_moe.experts.3.w2.weight": "expert out",
    "model.layers.0.mlp.shared_expert.up_proj.weight": "MLP in",
    "model.layers.0.mlp.gate.weight": "router",
    "base.layers.0.q_proj.lora_A.default.weight": "LoRA A",
    "base.layers.0.q_proj.lora_B.weight": "LoRA B",
    "something.else.weight": "other",
}


@pytest.mark.parametrize("name", NAMES)
def test_kinds_are_told_by_names(name):
    shapes = {"model.layers.0.mlp.experts.7.up_proj.weight": (8, 8), name: (8, 8)}
    reading = matrix_kinds.read(name, (8, 8), shapes, {})
    assert reading.kinds == (NAMES[name],) and reading.layout is not None


@pytest.mark.parametrize(
    ("name", "shape", "config", "expected"),
    [
        ("h.0.attn.c_attn.weight", (8, 24), {}, "columns"),
        ("blocks.0.attn.qkv.weight", (24, 8), {}, "rows"),
        ("layers.0.self_attn.in_proj_weight", (24, 8), {}, "rows"),
        ("layers.0.self_attn.qkv_proj.weight", (16, 8), {"num_attention_heads": 4, "num_key_value_heads": 2}, (8, 4, 4)),
        ("layers.0.attention.query_key_value.weight", (24, 8), {"model_type": "gpt_neox", "num_attention_heads": 2}, "heads"),
        ("layers.0.attention.query_key_value.weight", (24, 8), {}, None),
        ("layers.0.self_attn.qkv_proj.weight", (16, 8), {}, None),
        ("layers.0.attn.qkv_proj.weight", (24, 8), {"model_type": "codegen", "n_head": 4}, None),
        ("mixer.in_proj.weight", (24, 8), {}, None),
    ],
)
def test_a_fused_projection_is_cut_only_where_names_and_sizes_say_how(name, shape, config, expected):
    t = torch.randn(shape)
    found = [(kind, block) for _, kind, block in matrix_kinds.read(name, shape, {name: shape}, config).matrices(t)]
    if expected is None:
        assert len(found) == 1 and torch.equal(found[0][1], t)
        return
    if expected == "columns":
        blocks = [t[:, i * 8 : i * 8 + 8].T for i in range(3)]
    elif expected == "rows":
        blocks = list(t.split(8))
    elif expected == "heads":
        blocks = [torch.cat([t[h * 12 + i * 4 : h * 12 + i * 4 + 4] for h in range(2)]) for i in range(3)]
    else:
        blocks = list(t.split(expected))
    assert [kind for kind, _ in found] == ["Q", "K", "V"]
    assert all(torch.equal(own, block) for (_, own), block in zip(found, blocks, strict=True))


def test_what_is_stored_transposed_is_read_by_its_fans(tmp_path):
    """As in GPT-2, where c_fc is (fan_in, fan_out)."""
    tensors = {"h.0.attn.c_attn.weight": torch.randn(8, 24), "h.0.mlp.c_fc.weight": torch.randn(8, 32)}
    rows = {row.name: (row.fan_out, row.fan_in) for row in measured(tmp_path, tensors).rows}
    assert rows["h.0.mlp.c_fc.weight"] == (32, 8) and rows["h.0.attn.c_attn.weight[q]"] == (8, 8)


def test_banks_of_experts_are_read_expert_by_expert(tmp_path):
    up, down = torch.randn(3, 12, 8), torch.randn(3, 8, 6)
    tensors = {"l.0.mlp.experts.gate_up_proj": up, "l.0.mlp.experts.down_proj": down}
    rows = {row.name: row for row in measured(tmp_path, tensors).rows}
    assert len(rows) == 9
    for e in range(3):
        expected = {"gate_up_proj": {"[gate]": up[e, :6], "[in]": up[e, 6:]}, "down_proj": {"": down[e]}}
        for name, parts in expected.items():
            for suffix, block in parts.items():
                row = rows[f"l.0.mlp.experts.{name}[{e}]{suffix}"]
                assert math.isclose(row.sigma_max, float(torch.linalg.matrix_norm(block.double(), 2)), rel_tol=1e-9)
                assert (row.fan_out, row.fan_in) == tuple(block.shape)


def test_gate_and_up_in_turn_are_told_apart_in_gpt_oss():
    shapes = {"l.0.mlp.experts.gate_up_proj": (2, 8, 12), "l.0.mlp.experts.down_proj": (2, 6, 8)}
    t = torch.randn(2, 8, 12)
    reading = matrix_kinds.read("l.0.mlp.experts.gate_up_proj", t.shape, shapes, {"model_type": "gpt_oss"})
    found = [block for _, _, block in reading.matrices(t)]
    for (e, i), block in zip(itertools.product(range(2), range(2)), found, strict=True):
        assert torch.equal(block, t[e, :, i::2].T)
    down = torch.randn(2, 6, 8)
    reading = matrix_kinds.read("l.0.mlp.experts.down_proj", down.shape, shapes, {"model_type": "gpt_oss"})
    assert [tuple(block.shape) for _, _, block in reading.matrices(down)] == [(8, 6), (8, 6)]


@pytest.mark.parametrize("name", ["mlp.experts.gate_up_proj_bias", "mixer.A_log", "attn.q_proj.bias"])
def test_two_dimensions_of_biases_and_decays_are_no_matrix(name):
    assert matrix_kinds.read(name, (4, 8), {}, {}).layout is None


def test_a_convolution_is_one_matrix_and_three_dimensions_without_a_name_are_listed(tmp_path):
    tensors = {
        "stem.conv.weight": torch.randn(6, 3, 2, 2),
        "thing.weight": torch.randn(2, 3, 4),
        "a.conv1d.weight": torch.ones(5, 1, 4),
    }
    found = measured(tmp_path, tensors)
    assert {(row.name, row.fan_out, row.fan_in) for row in found.rows} == {
        ("stem.conv.weight", 6, 12),
        ("a.conv1d.weight", 5, 4),
    }
    assert [t.name for t in found.unmeasured] == ["thing.weight"]


def test_quantised_weights_with_scales_apart_are_not_taken_for_weights(tmp_path):
    w = torch.randn(4, 4).to(torch.float8_e4m3fn)
    found = measured(tmp_path, {"a.weight": w, "a.weight_scale_inv": torch.ones(1, 1), "b.weight": w.clone()})
    assert [row.name for row in found.rows] == ["b.weight"]
    assert "quantised" in next(t.why for t in found.unmeasured if t.name == "a.weight")


# -- balls -----------------------------------------------------------------------------------------------------------------


def saturated(decay: float, scale: str, share: float = 1.0) -> dict[str, torch.Tensor]:
    """Matrices of three shapes whose largest singular values are at c / decay, but for some of them."""
    tensors = {}
    shapes = [(48, 48), (96, 24), (24, 96)]
    for i, (m, n) in enumerate(shapes * 6):
        s = torch.rand(min(m, n), dtype=torch.float64) * (0.5 if i >= share * 18 else 1.0)
        if i < share * 18:
            s[:8] = 1.0
        else:
            s *= 0.2 + 0.04 * i
        c = diagnose_rows.Scale(scale).factor(m, n)
        tensors[f"blocks.{i}.w{i % 3}.weight"] = (c / decay * orthogonal(m, min(m, n)) * s @ orthogonal(n, min(m, n)).T).float()
    return tensors


@pytest.mark.parametrize("scale", diagnose_rows.SCALES[:3])
def test_a_bound_that_the_weights_press_against_is_found_with_its_scale(tmp_path, scale):
    found = measured(tmp_path, saturated(0.1, scale, share=0.8)).bound
    assert found is not None and found.supported and found.scale == scale
    assert math.isclose(found.weight_decay, 0.1, rel_tol=0.01) and found.near == 15 and found.matrices == 18
    assert "evidence, no proof" in found.sentence()


def test_weights_with_norms_of_their_own_support_no_bound(tmp_path):
    found = measured(tmp_path, saturated(0.1, "adamw-rms", share=0.2)).bound
    assert found is not None and not found.supported and "No common bound" in found.sentence()


def test_equal_shapes_at_their_initial_values_are_no_evidence(tmp_path):
    """Random entries have nearly equal norms in all matrices of a shape."""
    found = measured(tmp_path, {f"blocks.{i}.w.weight": 0.02 * torch.randn(300, 300) for i in range(6)}).bound
    assert found is not None and found.near >= 4 and not found.supported
    assert "random entries" in found.sentence()


def test_one_shape_alone_is_no_evidence(tmp_path):
    tensors = {f"blocks.{i}.w.weight": orthogonal(32, 32).float() for i in range(6)}
    found = measured(tmp_path, tensors).bound
    assert found is not None and found.near == 6 and not found.supported and "same c" in found.sentence()


def test_one_shape_with_many_singular_values_at_the_largest_is_evidence_without_a_scale(tmp_path):
    tensors = {}
    for i in range(6):
        s = torch.rand(32, dtype=torch.float64)
        s[:10] = 1.0
        tensors[f"blocks.{i}.w.weight"] = (orthogonal(32, 32) * s) @ orthogonal(32, 32)
    found = measured(tmp_path, tensors).bound
    assert found is not None and found.supported and 0.25 < found.pile < 0.4 and "each scale fits" in found.sentence()


def test_the_ball_of_a_kind_holds_all_its_matrices(tmp_path):
    tensors = {f"blocks.{i}.up.weight": (i + 1) * torch.randn(12, 8) for i in range(3)}
    found = measured(tmp_path, tensors)
    (ball,) = found.balls
    assert ball.kind == "MLP in" and ball.radius == max(row.sigma_max for row in found.rows)
    for scale, decay in ball.weight_decay.items():
        radius = diagnose_rows.Scale(scale).factor(12, 8) / decay
        assert math.isclose(radius, ball.radius, rel_tol=1e-12)


# -- changes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
@pytest.mark.parametrize("method", ["svd", "gram"])
def test_a_change_is_measured_against_its_svd(tmp_path, monkeypatch, shape, method):
    if method == "gram":
        monkeypatch.setattr(spectra, "SVD_SIDE", 0)
    W1 = torch.randn(shape)
    W2 = W1 + 0.1 * torch.randn(shape)
    (change,) = compared(tmp_path, {"w": W1}, {"w": W2}).changes
    A, B = W1.double(), W2.double()
    s = torch.linalg.svdvals(B - A)
    assert change.method == method
    assert math.isclose(change.relative, float((B - A).norm() / A.norm()), rel_tol=1e-9)
    assert math.isclose(change.relative_spectral, float(s[0] / torch.linalg.svdvals(A)[0]), rel_tol=1e-9)
    assert math.isclose(change.stable_rank, float((s / s[0]).square().sum()), rel_tol=1e-9)
    assert math.isclose(change.cosine, float(torch.sum((B - A) * A) / (B - A).norm() / A.norm()), rel_tol=1e-9)
    (U1, _, V1), (U2, _, V2) = torch.linalg.svd(A, full_matrices=False), torch.linalg.svd(B, full_matrices=False)
    left, right = U1[:, :4].T @ U2[:, :4], V1[:4] @ V2[:4].T
    # Angles come out of cosines, which lose half the digits.
    assert math.isclose(change.left, float(left.square().sum() / 4), rel_tol=1e-6)
    assert math.isclose(change.right, float(right.square().sum() / 4), rel_tol=1e-6)
    least = min(float(torch.linalg.svdvals(left).min()), float(torch.linalg.svdvals(right).min()))
    assert math.isclose(change.angle, math.degrees(math.acos(least)), abs_tol=1e-3)


def test_equal_checkpoints_have_no_change(tmp_path):
    W = torch.randn(9, 7)
    (change,) = compared(tmp_path, {"w": W}, {"w": W}).changes
    assert change.relative == change.stable_rank == 0 and change.left > 1 - 1e-12 and math.isnan(change.cosine)


def test_a_rotation_of_the_rows_alone_moves_the_left_vectors_alone(tmp_path):
    W = torch.randn(40, 30, dtype=torch.float64) @ torch.diag(torch.logspace(0, -2, 30, dtype=torch.float64))
    (change,) = compared(tmp_path, {"w": W}, {"w": orthogonal(40, 40) @ W}).changes
    assert change.right > 1 - 1e-9 and change.left < 0.5 and change.angle > 45 and change.gap > 1.1


def test_names_and_shapes_that_do_not_meet_are_said(tmp_path):
    one = {"a": torch.randn(4, 4), "b": torch.randn(4, 4), "c": torch.randn(4, 4)}
    two = {"b": torch.randn(4, 5), "c": torch.randn(4, 4).bfloat16(), "d": torch.randn(4, 4)}
    found = compared(tmp_path, one, two)
    assert [change.name for change in found.changes] == ["c"]
    assert (found.only_first, found.only_second) == (["a"], ["d"])
    assert len(found.errors) == 1 and "(4, 4)" in found.errors[0] and "(4, 5)" in found.errors[0]


def test_a_change_between_matrices_that_are_not_finite_is_counted(tmp_path):
    W = torch.randn(4, 4)
    W[0, 0] = math.nan
    (change,) = compared(tmp_path, {"w": W}, {"w": torch.eye(4)}).changes
    assert change.nonfinite == 1 and math.isnan(change.relative)
