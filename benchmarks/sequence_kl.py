"""Sequence KL: variance relative to plain Monte Carlo and to Rao-Blackwellisation alone, and its time next to drawing alone."""

import json
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from whichkl.distillation import sequence_kl
from whichkl.distillation.language.causal import CausalModel
from whichkl.distillation.language.control_variate import PromptSums
from whichkl.distillation.language.rollouts import continued
from whichkl.distillation.language.sequence_kl import evaluated

PROMPTS, MOST, VOCABULARY = 400, 48, 1_024


def model(seed, width):
    torch.manual_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.05, eos_token_id=2, pad_token_id=2, **shape)
    return LlamaForCausalLM(config).eval()


def moved(one, size):
    """Move every weight by a little."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in one.parameters():
            weight.add_(size * torch.randn(weight.shape, generator=generator))
    return one


def causal(module):
    found = CausalModel(module, "teacher")
    found.tokens = VOCABULARY
    return found


def variances(p, q, prompts):
    """Return the variance of one prompt's estimate: Monte Carlo, Rao-Blackwell, both joined."""
    draws = evaluated(causal(p), causal(q), continued(causal(p), prompts, (2,), MOST, 0))
    sums = PromptSums(torch.arange(len(prompts)), draws.conditional, draws.log_ratio, draws.tokens)
    return float(draws.log_ratio.var()), float(draws.conditional.var()), sums.per_sequence()[1] ** 2 * len(prompts)


def main():
    prompts = [[1, 4 + k % 1_000, 4 + k % 731] for k in range(PROMPTS)]
    pairs = {"near": (model(0, 64), moved(model(0, 64), 0.02)), "far": (model(0, 64), model(1, 32))}
    found = {}
    for name, (p, q) in pairs.items():
        plain, conditional, joined = variances(p, q, prompts)
        begin = time.process_time()
        result = sequence_kl(teacher=p, student=q, prompts=prompts, max_new_tokens=MOST)
        spent = time.process_time() - begin
        begin = time.process_time()
        for one in (p, q):
            for first in range(0, PROMPTS, 64):
                continued(causal(one), prompts[first : first + 64], (2,), MOST, 0)
        alone = time.process_time() - begin
        ratios = f"variance {joined / plain:.2f} of Monte Carlo's and {joined / conditional:.2f} of Rao-Blackwell's"
        print(f"{name}: KL(p‖q) {result.forward_kl.number} nats, {ratios}; {spent:.1f} CPU s, {spent / alone:.2f} × drawing")
        found[name] = {"of_monte_carlo": round(joined / plain, 3), "of_rao_blackwell": round(joined / conditional, 3)}
        found[name] |= {"cpu_s": round(spent, 2), "of_drawing": round(spent / alone, 3)}
    print(json.dumps({"benchmark": "sequence_kl", **found}))


if __name__ == "__main__":
    main()
