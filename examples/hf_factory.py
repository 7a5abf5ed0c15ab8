"""Hugging Face Trainer builds the optimizer: a preset of `schatten.integrations.hf` as its factory, then a resumed run."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from schatten.integrations import hf

counting = (torch.arange(32)[:, None] + torch.arange(8)) % 32
data = [{"input_ids": row, "labels": row} for row in counting]


def new_model():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=1, **shape))


def loss(model):
    with torch.no_grad():
        return model(input_ids=counting, labels=counting).loss.item()


with tempfile.TemporaryDirectory() as folder:
    args = TrainingArguments(
        folder,
        max_steps=40,
        save_steps=20,
        per_device_train_batch_size=16,
        max_grad_norm=1.0,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    # A pair of a factory and its options; Trainer passes learning_rate and weight_decay of `args` to its own optimizers
    # alone, so a preset is given them here, or takes them by hf.from_arguments(args, "muon").
    chosen = (hf.Muon, {"lr": 5e-3, "weight_decay": 0.1})

    trainer = Trainer(new_model(), args, train_dataset=data, optimizer_cls_and_kwargs=chosen)
    trainer.train()
    # Trainer holds accelerate's wrapper; the preset and its plan are inside.
    print(trainer.optimizer.optimizer.plan)

    resumed = Trainer(new_model(), args, train_dataset=data, optimizer_cls_and_kwargs=chosen)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-20")

print(f"loss before {loss(new_model()):.3f}, after {loss(trainer.model):.3f}, after a resumed run {loss(resumed.model):.3f}")
