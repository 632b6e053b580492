"""How far is a language model from its teacher over whole continuations? Both KLs, with errors, and what else differs."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from whichkl.distillation import sequence_kl


def model(seed, width):
    """A small model with random weights; yours comes from AutoModelForCausalLM.from_pretrained(folder)."""
    torch.manual_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.2, eos_token_id=2, pad_token_id=2, **shape))


prompts = [[1, 4 + k % 50, 4 + k % 37] for k in range(200)]  # texts or conversations, with `tokenizer=`
found = sequence_kl(teacher=model(0, 32), student=model(1, 16), prompts=prompts, max_new_tokens=32)
print(found)
assert found.forward_kl.value > 4 * found.forward_kl.stderr
