"""Compare directions and prefixes of a language model's distillation, at equal FLOPs from one student, and let tests decide."""

import sys

import whichkl as wk
from whichkl.distillation import LanguageTarget

try:
    from transformers import LlamaConfig, LlamaForCausalLM
except ImportError:
    print("Language models need transformers: pip install 'whichkl[lm]'")
    sys.exit()
import torch


def model(seed, width):
    """A small model with random weights; yours comes from AutoModelForCausalLM.from_pretrained(folder)."""
    torch.manual_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, initializer_range=0.3, eos_token_id=2, pad_token_id=2, **shape))


data = [{"prompt": [1, 3 + k % 25, 3 + k % 17]} for k in range(400)]  # texts or conversations, with tokenizer=
target = LanguageTarget(teacher=model(0, 32), data=data, max_new_tokens=8, held_out=0.25, budget=1e8)
print(wk.advise(target).verdict)

arms = ["forward_kl@teacher", "reverse_kl@student", "reverse_kl@student:sequence"]
study = wk.compare(target, {"small": model(1, 16)}, arms, seeds=6)  # out="study" keeps it, and resumes it
print(study)
print(study.verdict)
