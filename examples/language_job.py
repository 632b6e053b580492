"""Distil a language model as a job: a run that resumes, both KLs on the way, a report, and a folder for from_pretrained."""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import whichkl as wk
from whichkl.distillation import LanguageDistillation, language_model


def model(seed, width):
    """A small model with random weights; yours comes from AutoModelForCausalLM.from_pretrained(folder)."""
    torch.manual_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, initializer_range=0.3, eos_token_id=2, pad_token_id=2, **shape))


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    result = language_model(
        teacher=model(0, 32),
        student=model(1, 16),
        data=[{"prompt": [1, 3 + k % 25, 3 + k % 17]} for k in range(96)],  # texts or conversations, with tokenizer=
        prefixes={"teacher": 1.0},
        held_out=0.3,
        max_new_tokens=12,
        evaluations=1,
        args={"per_device_train_batch_size": 16, "learning_rate": 1e-2, "num_train_epochs": 6},
        journal=folder / "journal",  # if interrupted, the same call resumes
    )
    print(f"{result.verdict.outcome}. {result.verdict.sentence}")
    for one in result.curve:
        print(f"after {one.step} steps: forward {one.found.forward_kl.number}, reverse {one.found.reverse_kl.number}")
    print("memory:", result.settings["memory"])
    wk.report(result, folder / "report.html")
    result.save(folder / "student")
    result.journal.clear()
    student = AutoModelForCausalLM.from_pretrained(folder / "student")
    same = torch.equal(student.lm_head.weight, LanguageDistillation.load(folder / "student").student.lm_head.weight)
    print("from_pretrained reads the same weights:", same)
