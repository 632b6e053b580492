"""Ask a teacher once, keep the likeliest tokens of its laws in a folder, and train a student without the teacher."""

import copy
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from whichkl.distillation import LanguageTrainer, StoredTeacher, capture, sequence_kl


def model(seed, width):
    """A small model with random weights; yours comes from AutoModelForCausalLM.from_pretrained(folder)."""
    torch.manual_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.3, eos_token_id=2, pad_token_id=2, **shape))


teacher, start = model(0, 32), model(1, 16)
prompts = [[1, 3 + k % 60, 3 + k % 17] for k in range(128)]
text = [{"prompt": ids, "completion": [3 + (5 * ids[1] + k) % 60 for k in range(8)]} for ids in prompts]  # or texts
common = {"max_steps": 25, "per_device_train_batch_size": 32, "learning_rate": 1e-2, "use_cpu": True, "report_to": []}
common |= {"save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}

with tempfile.TemporaryDirectory() as folder:
    ways = {"live": None, "k = 64, all": {"k": 64}, "k = 8": {"k": 8}, "50 draws": {"draws": 50}}
    for number, (name, way) in enumerate(ways.items()):
        stored = Path(folder) / str(number)
        if way is not None:
            print(name, "·", capture(teacher=teacher, data=text, folder=stored, **way))
        known = teacher if way is None else StoredTeacher.open(stored)  # days later, on a machine without the teacher
        student = copy.deepcopy(start)
        args = TrainingArguments(output_dir=folder, **common)
        LanguageTrainer(teacher=known, student=student, args=args, train_dataset=text).train()
        found = sequence_kl(teacher=teacher, student=student, prompts=prompts, max_new_tokens=12)
        print(f"{name}: forward {found.forward_kl.number} nats a sequence")
