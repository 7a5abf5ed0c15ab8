"""The models: shapes, masks and caches, a mixture against its literal form, and how the plan routes them."""

import json
import math

import pytest
import torch

import schatten
from schatten.lab.errors import InputError
from schatten.lab.models import (
    GPT,
    MLP,
    GPTConfig,
    LatentAttention,
    LatentAttentionConfig,
    LatentMoE,
    LatentMoEConfig,
    Mixture,
    MixtureConfig,
    ResNet,
    ResNetConfig,
    ViT,
    ViTConfig,
    classifier,
    decoder,
)
from schatten.lab.models.latent_attention import rotate

MOE = LatentMoEConfig(31, layers=2, heads=2, width=16, latent=6, rotary=4, experts=5, active=2, hidden=8)
RESNET = ResNetConfig(channels=1, widths=(8, 12), blocks=(1, 2))
VIT = ViTConfig(channels=1, height=8, pixel_width=12, patch=4, layers=2, heads=2, width=16)

MODELS = {
    "mlp": lambda: MLP((64, 32, 10)),
    "resnet": lambda: ResNet(RESNET),
    "vit": lambda: ViT(VIT),
    "vit-mean": lambda: ViT(ViTConfig(channels=1, height=8, pixel_width=8, layers=1, heads=2, width=16, pooling="mean")),
    "gpt": lambda: GPT(GPTConfig(31, 12, 2, 2, 16)),
    "latent-moe": lambda: LatentMoE(MOE),
}


def wide(model):
    """Weights large enough for attention and routers to tell tokens apart; fp64."""
    for p in model.parameters():
        if p.ndim >= 2:
            torch.nn.init.normal_(p, std=0.3)
    return model.double().eval()


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (2, 9, 7)])
def test_a_resnet_takes_images_of_any_size_and_channels(shape):
    model = ResNet(ResNetConfig(channels=shape[0], classes=7, widths=(4, 8, 8), blocks=(1, 2, 1)))
    assert model(torch.zeros(2, *shape)).shape == (2, 7)


def test_the_default_resnet_is_resnet_18():
    with torch.device("meta"):
        model = ResNet(ResNetConfig())
    # 11,173,962 of the CIFAR form of ResNet-18, with 3 x 3 stem and 10 classes: 62 tensors, of which 20 are convolutions.
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    assert sum(p.ndim == 4 for p in model.parameters()) == 20


def test_a_block_adds_its_input():
    model = ResNet(ResNetConfig(channels=1, widths=(8,), blocks=(1,))).eval()
    for p in model.stages.parameters():
        torch.nn.init.zeros_(p)
    image = torch.randn(2, 1, 6, 6)
    stem = model.stem_norm(model.stem(image)).relu()
    torch.testing.assert_close(model(image), model.head(stem.mean((-2, -1))))


def test_a_vit_sees_patches_and_their_places():
    model = wide(ViT(VIT))
    image = torch.randn(1, 1, 8, 12, dtype=torch.float64)
    assert model(image).shape == (1, 10)
    moved = image.roll(4, dims=-1)  # the patches in another order
    assert not torch.allclose(model(image), model(moved))
    torch.nn.init.zeros_(model.positions.weight)
    # Without positions attention is a function of the set of patches: equal but for the order of fp64 sums.
    torch.testing.assert_close(model(image), model(moved), rtol=0, atol=1e-10)


def test_every_patch_reaches_every_other():
    model = wide(MODELS["vit-mean"]())
    image = torch.randn(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    patches = model.blocks[0](model.patches(image).flatten(2).mT)
    (gradient,) = torch.autograd.grad(patches[0, 0].sum(), image)
    assert (gradient != 0).all()  # a causal mask would leave the first patch blind to the others


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNet(ResNetConfig(widths=(8, 16), blocks=(1,))), "one number of blocks per width"),
        (lambda: ViT(ViTConfig(height=9)), "patch must divide"),
        (lambda: LatentAttention(LatentAttentionConfig(8, 2, 4, 4, 3)), "rotary must be even"),
        (lambda: Mixture(MixtureConfig(8, 4, 5, 8)), "active must be 1"),
        (lambda: Mixture(MixtureConfig(8, 4, 0, 8)), "active must be 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- decoders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt", "latent-moe"])
def test_a_token_changes_no_earlier_prediction(name):
    torch.manual_seed(0)
    model = wide(MODELS[name]())
    ids = torch.randint(0, 31, (1, 12))
    changed = ids.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 31
    before, after = model.logits(ids), model.logits(changed)
    # Experts see tokens in another order then, and matrix products of other sizes round otherwise in fp64.
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-12)
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("name", ["gpt", "latent-moe", "gpt-qk-norm"])
def test_token_by_token_with_a_cache_the_scores_are_those_of_the_whole_text(name):
    torch.manual_seed(0)
    model = wide(GPT(GPTConfig(31, 12, 2, 2, 16, qk_norm=True)) if name == "gpt-qk-norm" else MODELS[name]())
    ids, caches = torch.randint(0, 31, (3, 12)), model.caches(3, 12)
    scores = torch.stack([model.next(ids[:, t], caches, t) for t in range(12)], 1)
    # fp64, sums in another order.
    torch.testing.assert_close(scores, model.logits(ids), rtol=0, atol=1e-11)


def test_the_latent_cache_holds_latents_and_one_rotated_key():
    kept = sum(part.numel() for cache in LatentMoE(MOE).caches(1, 10) for part in cache)
    assert kept == 10 * MOE.layers * (MOE.latent + MOE.rotary)
    full = sum(part.numel() for cache in GPT(GPTConfig(31, 12, 2, 2, 16)).caches(1, 10) for part in cache)
    assert full == 10 * 2 * 2 * 16


def test_rotated_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 6, dtype=torch.float64)
    at = lambda x, position: rotate(x.expand(1, 6), position)[0]  # noqa: E731
    torch.testing.assert_close(at(q, 9) @ at(k, 4), at(q, 25) @ at(k, 20))
    torch.testing.assert_close(at(q, 0), q)
    assert not torch.allclose(at(q, 9) @ at(k, 4), at(q, 9) @ at(k, 5))


def literal_attention(attention, x):
    """A token and a head at a time, as the docstring's equations."""
    config, T = attention.config, x.shape[0]
    P = {name: p for name, p in attention.named_parameters()}
    head = lambda name, h, n: P[f"{name}.weight"][h * n : (h + 1) * n]  # noqa: E731
    latents = [c / (c.square().mean() + torch.finfo(c.dtype).eps).sqrt() for c in x @ P["latent.weight"].T]
    keys = [rotate((P["key_rotary.weight"] @ x[t])[None], t)[0] for t in range(T)]
    out = []
    for t in range(T):
        heads = []
        for h in range(config.heads):
            q = head("query", h, config.head) @ x[t]
            r = rotate((head("query_rotary", h, config.rotary) @ x[t])[None], t)[0]
            K, V = head("key", h, config.head), head("value", h, config.head)
            scores = torch.stack([(q @ (K @ latents[s]) + r @ keys[s]) for s in range(t + 1)])
            weights = (scores / math.sqrt(config.head + config.rotary)).softmax(0)
            heads.append(sum(w * (V @ c) for w, c in zip(weights, latents, strict=False)))
        out.append(P["output.weight"] @ torch.cat(heads))
    return torch.stack(out)


def test_latent_attention_is_its_equations():
    torch.manual_seed(0)
    attention = wide(LatentAttention(LatentAttentionConfig(12, heads=3, head=4, latent=5, rotary=2)))
    x = torch.randn(6, 12, dtype=torch.float64)
    torch.testing.assert_close(attention(x[None])[0], literal_attention(attention, x), rtol=0, atol=1e-10)


def literal_mixture(mixture, x):
    config, out = mixture.config, []
    silu = lambda z: z / (1 + (-z).exp())  # noqa: E731
    for token in x:
        s = 1 / (1 + (-(mixture.router.weight @ token)).exp())
        chosen = sorted(range(config.experts), key=lambda e: -(s[e] + mixture.bias[e]).item())[: config.active]
        own = mixture.shared
        y = own.down.weight @ (silu(own.gate.weight @ token) * (own.up.weight @ token))
        for e in chosen:
            bank = mixture.experts
            expert = bank.down[e] @ (silu(bank.gate[e] @ token) * (bank.up[e] @ token))
            y = y + s[e] / sum(s[c] for c in chosen) * expert
        out.append(y)
    return torch.stack(out)


def test_a_mixture_is_its_equations_and_so_are_its_gradients():
    torch.manual_seed(0)
    mixture = wide(Mixture(MixtureConfig(width=6, experts=5, active=2, hidden=4, shared=2)))
    mixture.bias += torch.randn(5)
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    found, expected = mixture(x).flatten(0, 1), literal_mixture(mixture, x.flatten(0, 1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    weights = torch.randn_like(found)
    ours = torch.autograd.grad((found * weights).sum(), list(mixture.parameters()))
    theirs = torch.autograd.grad((expected * weights).sum(), list(mixture.parameters()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_an_expert_that_nobody_chose_is_left_out():
    mixture = wide(Mixture(MixtureConfig(width=6, experts=4, active=2, hidden=4)))
    mixture.bias -= torch.tensor([0.0, 10.0, 0.0, 0.0])
    mixture(torch.randn(9, 6, dtype=torch.float64)).sum().backward()
    assert all((bank.grad[1] == 0).all() and (bank.grad[0] != 0).any() for bank in mixture.experts.parameters())


def test_the_bias_evens_out_the_load_and_moves_in_training_alone():
    torch.manual_seed(0)
    mixture = wide(Mixture(MixtureConfig(width=6, experts=4, active=1, hidden=4, balance=0.02)))
    x = torch.randn(512, 6, dtype=torch.float64) + 1  # a mean that some experts like better

    def loads():
        return mixture.route(x)[0].flatten().bincount(minlength=4)

    before = loads()
    mixture(x)
    with torch.no_grad():
        mixture.train()(x)
    assert (mixture.bias == 0).all()
    for _ in range(200):
        mixture(x)
    # An even load is 128. The bias moves by 0.02 a step, which is a few per cent of the tokens, about it.
    assert before.max() > 200 and (loads() - 128).abs().max() < 40
    assert "bias" in mixture.state_dict()


def test_an_untrained_decoder_predicts_nearly_uniformly():
    torch.manual_seed(0)
    ids = torch.randint(0, 31, (8, 12))
    # Logits of an initialisation at 0.02 are below 0.1, so the loss is within 0.05 of log(vocabulary).
    assert abs(LatentMoE(MOE)(ids, ids.roll(1)).item() - math.log(31)) < 0.05


def test_active_parameters_are_those_that_a_token_meets():
    model = LatentMoE(MOE)
    everything = sum(p.numel() for p in model.parameters())
    expert = 3 * MOE.width * MOE.hidden
    assert model.active_parameters() == everything - MOE.layers * (MOE.experts - MOE.active) * expert


# -- routing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_planned_and_trained_by_muon(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    opt = schatten.Muon(model)
    ids = torch.randint(0, 31, (4, 12))
    inputs = {"mlp": torch.randn(4, 64), "resnet": torch.randn(4, 1, 8, 8), "vit": torch.randn(4, 1, 8, 12)}
    inputs["vit-mean"] = torch.randn(4, 1, 8, 8)
    before = {key: p.clone() for key, p in model.named_parameters()}
    loss = model(inputs[name]).square().mean() if name in inputs else model(ids, ids)
    loss.backward()
    opt.step()
    # A parameter without a gradient at the start, as a norm behind zero weights has, may stay.
    moved = [key for key, p in model.named_parameters() if not torch.equal(p, before[key])]
    assert {entry.name for entry in opt.plan if entry.route == "spectral"} <= set(moved)


def test_experts_are_matrices_of_their_own_and_routers_adamws():
    plan = {entry.name: entry for entry in schatten.plan(LatentMoE(MOE))}
    for bank in ("gate", "up", "down"):
        entry = plan[f"blocks.0.mixture.experts.{bank}"]
        assert entry.route == "spectral" and entry.layout == "experts"
    assert plan["blocks.1.mixture.router.weight"].route == "adamw"
    adamw = {name for name, entry in plan.items() if entry.route == "adamw" and len(entry.shape) > 1}
    assert adamw == {"tokens.weight", "blocks.0.mixture.router.weight", "blocks.1.mixture.router.weight"}


def test_a_step_on_a_bank_is_a_step_on_each_expert():
    torch.manual_seed(0)
    model = LatentMoE(MOE)
    bank = model.blocks[0].mixture.experts.up
    opt = schatten.Muon(model, lr=0.1, weight_decay=0.0)
    ids = torch.randint(0, 31, (8, 12))
    model(ids, ids.roll(1)).backward()
    before, gradient = bank.detach().clone(), bank.grad.clone()
    opt.step()
    for e in range(MOE.experts):
        alone = torch.nn.Linear(MOE.width, MOE.hidden, bias=False)
        alone.weight.data.copy_(before[e])
        alone.weight.grad = gradient[e].clone()
        schatten.Muon([alone.weight], lr=0.1, weight_decay=0.0).step()
        # fp32: one expert or five in a batch of products round differently.
        torch.testing.assert_close(bank[e], alone.weight, rtol=0, atol=1e-4)


def test_image_models_keep_tables_and_heads_from_the_spectral_rule():
    for name, tables in (("vit", {"positions.weight", "head.weight"}), ("resnet", {"head.weight"})):
        plan = schatten.plan(MODELS[name]())
        assert {entry.name for entry in plan if entry.route == "adamw" and len(entry.shape) > 1} == tables


# -- transformers ------------------------------------------------------------------------------------------------------

SMALL = {
    "llama": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 31},
    "vit": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4},
}


def written(folder, kind):
    file = folder / "config.json"
    file.write_text(json.dumps({"model_type": kind, **SMALL[kind]}))
    return file


def test_models_of_a_configuration_train_with_the_plans_routes(tmp_path):
    pytest.importorskip("transformers", reason="needs schatten[hf]")
    torch.manual_seed(0)
    ids = torch.randint(0, 29, (2, 6))
    model = decoder(str(written(tmp_path, "llama")), vocab_size=29, num_key_value_heads=1)
    assert abs(model(ids, ids.roll(1)).item() - math.log(29)) < 0.1
    images = classifier(str(written(tmp_path, "vit").parent), num_labels=7, image_size=8, num_channels=1)
    assert images(torch.zeros(3, 1, 8, 8)).shape == (3, 7)
    for built, loss in ((model, lambda: model(ids, ids)), (images, lambda: images(torch.randn(3, 1, 8, 8)).square().mean())):
        plan = {entry.name: entry.route for entry in schatten.plan(built)}
        tables = [name for name in plan if "embed_tokens" in name or "lm_head" in name or "classifier.weight" in name]
        assert tables and all(plan[name] == "adamw" for name in tables)
        assert sum(route == "spectral" for route in plan.values()) >= 6
        opt = schatten.Muon(built)
        loss().backward()
        opt.step()


def test_a_configuration_that_gives_no_such_model_is_named(tmp_path):
    pytest.importorskip("transformers", reason="needs schatten[hf]")
    with pytest.raises(InputError, match=r"config\.json gives no AutoModelForCausalLM"):
        decoder(str(written(tmp_path, "vit")))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json gives no AutoModelForCausalLM"):
        decoder(str(tmp_path / "config.json"))
