"""Hugging Face Trainer trains, saves and resumes with a preset, and no bit tells the resumed run from an uninterrupted one."""

import pytest
import torch

import schatten

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'schatten[hf]'")

from schatten.integrations import hf  # noqa: E402

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}


def tiny_llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_dropout=0.1,
    )
    return transformers.LlamaForCausalLM(config)


def tokens(count=16):
    ids = torch.randint(0, 32, (count, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder, **options):
    defaults = {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return transformers.TrainingArguments(str(folder), **{**defaults, **options})


def trainer(folder, model=None, args=None, **options):
    return transformers.Trainer(
        tiny_llama() if model is None else model,
        arguments(folder) if args is None else args,
        train_dataset=tokens(),
        **options,
    )


def trained(folder, resume=None, **options):
    run = trainer(folder, **options)
    run.train(resume_from_checkpoint=resume)
    return run


def assert_same_weights(a, b):
    for (name, p), q in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize(
    "name", ["Muon", "NorMuon", "SOAPMuon", "Dion", "MuonMVR", "Lion"]
)  # momentum alone, other state, an eigenbasis, a factor, gradients of the last step, all parameters by the rule
def test_a_resumed_run_of_the_factory_is_the_uninterrupted_one(tmp_path, name):
    chosen = (getattr(hf, name), OPTIONS)
    whole = trained(tmp_path, optimizer_cls_and_kwargs=chosen)
    rest = trained(tmp_path, resume=str(tmp_path / "checkpoint-2"), optimizer_cls_and_kwargs=chosen)
    assert_same_weights(whole, rest)
    assert whole.state.log_history[-2]["loss"] == rest.state.log_history[-2]["loss"]
    assert type(rest.optimizer.optimizer) is getattr(schatten, name)
    assert [group["step"] for group in rest.optimizer.param_groups] == [4] * len(rest.optimizer.param_groups)


def test_a_resumed_run_of_a_given_optimizer_and_scheduler_is_the_uninterrupted_one(tmp_path):
    def run(resume=None):
        model = tiny_llama()
        opt = schatten.Muon(model, **OPTIONS)
        scheduler = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, total_iters=4)
        return trained(tmp_path, resume, model=model, optimizers=(opt, scheduler))

    assert_same_weights(run(), run(str(tmp_path / "checkpoint-2")))


def test_the_factory_and_a_given_optimizer_train_alike(tmp_path):
    model = tiny_llama()
    given = trained(tmp_path, model=model, optimizers=(schatten.Muon(model, **OPTIONS), None))
    made = trained(tmp_path, optimizer_cls_and_kwargs=(hf.Muon, OPTIONS))
    assert_same_weights(given, made)
    assert made.optimizer.optimizer.plan == given.optimizer.optimizer.plan == schatten.plan(tiny_llama())


def test_every_preset_is_reached_by_its_name(tmp_path, any_preset):
    run = trainer(tmp_path, optimizer_cls_and_kwargs=(getattr(hf, any_preset.__name__), {"lr": 0.5}))
    opt = run.create_optimizer()
    assert type(opt) is any_preset
    assert opt.param_groups[0]["lr"] == 0.5
    assert [entry.name for entry in opt.plan] == [name for name, _ in run.model.named_parameters()]


def test_the_names_of_all_presets_are_listed_and_others_refused():
    assert set(schatten.presets.__all__) <= set(dir(hf))
    with pytest.raises(AttributeError, match=r"has no preset 'Moun'; it has .*Muon"):
        _ = hf.Moun
    with pytest.raises(ImportError, match="cannot import name 'Moun'"):
        from schatten.integrations.hf import Moun  # noqa: F401


def test_the_class_itself_is_refused_because_it_gets_no_module(tmp_path):
    with pytest.raises(ValueError, match=r"A spectral rule needs matrices, but .* Pass the model itself"):
        trained(tmp_path, optimizer_cls_and_kwargs=(schatten.Muon, OPTIONS))


def test_a_factory_called_as_an_optimizer_is_refused_with_the_way_out():
    # What transformers before 5.2 does with whatever it is given.
    with pytest.raises(TypeError, match=r"transformers 5.2 on.*Trainer\(optimizers=\(schatten.Muon\(model"):
        hf.Muon([{"params": list(tiny_llama().parameters())}], **OPTIONS)


def test_a_rule_that_needs_the_loss_is_refused_by_the_step(tmp_path):
    with pytest.raises(RuntimeError, match="JaguarMuon estimates gradients from the loss: pass step"):
        trained(tmp_path, optimizer_cls_and_kwargs=(hf.JaguarMuon, {}))


def test_the_numbers_of_the_training_arguments_reach_the_optimizer(tmp_path):
    args = arguments(
        tmp_path,
        learning_rate=0.5,
        weight_decay=0.25,
        adam_beta1=0.7,
        adam_beta2=0.8,
        adam_epsilon=1e-5,
        optim_args="scale=keller, momentum=0.6",
    )
    run = trainer(tmp_path, args=args, optimizer_cls_and_kwargs=hf.from_arguments(args, "muon", momentum=0.5))
    matrices, rest = run.create_optimizer().param_groups
    assert (matrices["lr"], matrices["weight_decay"], matrices["scale"]) == (0.5, 0.25, "keller")
    assert matrices["momentum"] == 0.5, "an option wins over optim_args"
    assert (rest["lr"], rest["weight_decay"], rest["betas"], rest["eps"]) == (0.5, 0.25, (0.7, 0.8), 1e-5)


def test_a_rule_for_the_plan_reaches_it_through_trainer(tmp_path):
    options = {**OPTIONS, "rules": [("*layernorm.weight", "adamw", {"weight_decay": 0.0})]}
    opt = trainer(tmp_path, optimizer_cls_and_kwargs=(hf.Muon, options)).create_optimizer()
    free = [name for group in opt.param_groups if group["weight_decay"] == 0 for name in group["param_names"]]
    assert sorted(free) == ["model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"]


def test_accumulated_micro_batches_step_as_the_large_batch_does(tmp_path):
    def run(batch, parts):
        args = arguments(
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=parts,
            save_strategy="no",
            max_steps=2,
            warmup_steps=0,
        )
        model = tiny_llama()
        model.config.attention_dropout = 0.0
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.0
        return trained(tmp_path, args=args, model=model, optimizer_cls_and_kwargs=(hf.Muon, {"lr": 1e-3}))

    large, parts = run(8, 1), run(2, 4)
    start = dict(tiny_llama().named_parameters())
    for (name, p), q in zip(large.model.named_parameters(), parts.model.parameters(), strict=True):
        moved = (p - start[name]).norm()
        # Sums in another order differ by fp32's rounding, which the polar factor amplifies by the condition of a gradient.
        assert moved > 0 and (p - q).norm() < 1e-2 * moved, name
