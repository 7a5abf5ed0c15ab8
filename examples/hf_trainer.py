"""Hugging Face Trainer is given the optimizer and its schedule: `optimizers=`, for one process or DDP, not for FSDP."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import schatten

torch.manual_seed(0)
shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=1, **shape))
counting = (torch.arange(32)[:, None] + torch.arange(8)) % 32
data = [{"input_ids": row, "labels": row} for row in counting]

opt = schatten.Muon(model, lr=5e-3, weight_decay=0.1)
schedule = schatten.schedules.PowerCool(opt, end=60)
print(opt.plan)


def loss():
    model.eval()
    with torch.no_grad():
        return model(input_ids=counting, labels=counting).loss.item()


before = loss()
with tempfile.TemporaryDirectory() as folder:
    args = TrainingArguments(
        folder,
        max_steps=60,
        save_strategy="no",
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model, args, train_dataset=data, optimizers=(opt, schedule)).train()
print(f"loss before {before:.3f}, after {loss():.3f}")
