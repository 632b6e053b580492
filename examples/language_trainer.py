"""Distil a language model: forward KL on the teacher's continuations, and reverse KL on the student's own, from one start."""

import copy
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from whichkl.distillation import LanguageTrainer, sequence_kl


def model(seed, width):
    """A small model with random weights; yours comes from AutoModelForCausalLM.from_pretrained(folder)."""
    torch.manual_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, initializer_range=0.3, eos_token_id=2, pad_token_id=2, **shape))


teacher, start = model(0, 32), model(1, 16)
prompts = [{"prompt": [1, 3 + k % 25, 3 + k % 17]} for k in range(64)]  # texts or conversations, with processing_class=
for objective, prefixes in (("forward_kl", {"teacher": 1.0}), ("reverse_kl", {"student": 1.0})):
    student = copy.deepcopy(start)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=30,
            per_device_train_batch_size=16,
            learning_rate=1e-2,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = LanguageTrainer(
            teacher=teacher,
            student=student,
            objective=objective,
            prefixes=prefixes,
            max_new_tokens=12,
            args=arguments,
            train_dataset=prompts,
        )
        trainer.train()
    found = sequence_kl(teacher=teacher, student=student, prompts=[one["prompt"] for one in prompts], max_new_tokens=12)
    print(f"{objective} on {next(iter(prefixes))} prefixes: forward {found.forward_kl.number}, reverse {found.reverse_kl.number}")
