"""Text for language models without a download, and two small models of it: a teacher, and a student to start from.

The text is Python's own: the signature of a function, then the first paragraph of its docstring, from the standard library and
installed packages. Models and text are kept in a folder, where later runs find them.
"""

import ast
import hashlib
import importlib.util
import json
import math
import sys
import sysconfig
import time
from pathlib import Path

import torch

PACKAGES = ("torch", "numpy", "scipy", "sympy", "transformers", "accelerate")
VOCABULARY, MAX_PROMPT, MAX_COMPLETION = 1_024, 48, 64
TEACHER, STUDENT = (192, 4, 512), (96, 3, 256)
"""Width, layers and width between them: 1.97 and 0.43 million parameters."""
END, PAD = 0, 1


def functions(path):
    """Yield signature and first docstring paragraph of the functions in a file."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (text := ast.get_docstring(node)):
            completion = " ".join(text.strip().split("\n\n")[0].split())
            if completion.isprintable() and len(completion) > 8:
                yield f"def {node.name}({ast.unparse(node.args)}):\n", completion


def pairs():
    """Return prompts with completions, each completion once, in an order that no file system decides."""
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    roots += [Path(importlib.util.find_spec(name).submodule_search_locations[0]) for name in PACKAGES]
    found = {}
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            if root != roots[0] or "site-packages" not in path.parts:
                for prompt, completion in functions(path):
                    found.setdefault(completion, prompt)
    return sorted(((prompt, completion) for completion, prompt in found.items()), key=lambda one: digest(one[1]))


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def tokenizer_of(texts):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["</s>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    marks = {"eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, padding_side="left", **marks)


def parts(texts, tokenizer):
    """Return token ids for training, for stopping and held out, and the hash of the text. Parts share no completion."""
    found, text = {"train": [], "stop": [], "held_out": []}, hashlib.sha256()
    for prompt, completion in texts:
        ids = [tokenizer(one, add_special_tokens=False)["input_ids"] for one in (prompt, completion)]
        if len(ids[0]) > MAX_PROMPT or len(ids[1]) >= MAX_COMPLETION:
            continue
        text.update(f"{prompt}{completion}\n".encode())
        share = int(digest(completion)[:8], 16) / 16**8
        name = "train" if share < 0.91 else "stop" if share < 0.94 else "held_out"
        found[name].append({"prompt": ids[0], "completion": [*ids[1], END]})
    return found, text.hexdigest()


def model(shape, seed):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    width, layers, between = shape
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=between, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=END, pad_token_id=PAD,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batches(examples, size, generator):
    """Yield shuffled batches of examples of about one length: ids, and labels, which are −100 but for completions."""
    order = torch.randperm(len(examples), generator=generator).tolist()
    order.sort(key=lambda k: (len(examples[k]["prompt"]) + len(examples[k]["completion"])) // 8)
    groups = [order[first : first + size] for first in range(0, len(order), size)]
    for number in torch.randperm(len(groups), generator=generator).tolist():
        rows = [(one["prompt"], one["completion"]) for one in (examples[k] for k in groups[number])]
        longest = max(len(prompt) + len(completion) for prompt, completion in rows)
        ids, labels = torch.full((len(rows), longest), PAD), torch.full((len(rows), longest), -100)
        for k, (prompt, completion) in enumerate(rows):
            ids[k, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
            labels[k, len(prompt) : len(prompt) + len(completion)] = torch.tensor(completion)
        yield ids, labels


def train(one, examples, passes, rate, size=32):
    """Train by cross-entropy on completions, with a warm-up and a cosine to 0; return the CPU seconds."""
    begin, generator = time.process_time(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(one.parameters(), lr=rate, weight_decay=0.05, betas=(0.9, 0.98))
    steps = passes * -(-len(examples) // size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / 100, 0.5 * (1 + math.cos(math.pi * k / steps)) + 0.01)
    )
    for number in range(passes):
        for ids, labels in batches(examples, size, generator):
            loss = one(input_ids=ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(one.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        print(f"pass {number + 1}: last loss {loss:.3f}, {time.process_time() - begin:.0f} CPU s", file=sys.stderr, flush=True)
    return time.process_time() - begin


@torch.no_grad()
def nll(one, examples):
    """Return −log probability per token of the completions."""
    total = count = 0.0
    for ids, labels in batches(examples, 64, torch.Generator().manual_seed(0)):
        n = int((labels[:, 1:] != -100).sum())
        total, count = total + n * float(one(input_ids=ids, labels=labels).loss), count + n
    return total / count


def prepared(folder):
    """Return teacher, warm student, tokenizer, the parts of the text and facts about them; made once and kept in a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(folder)
    if not (folder / "facts.json").exists():
        make(folder)
    facts = json.loads((folder / "facts.json").read_text())
    found = json.loads((folder / "text.json").read_text())
    models = [AutoModelForCausalLM.from_pretrained(folder / who, local_files_only=True) for who in ("teacher", "student")]
    return *models, AutoTokenizer.from_pretrained(folder / "teacher", local_files_only=True), found, facts


def make(folder):
    folder.mkdir(parents=True, exist_ok=True)
    texts = pairs()
    tokenizer = tokenizer_of(prompt + completion for prompt, completion in texts)
    found, hashed = parts(texts, tokenizer)
    facts = {"text": hashed, **{name: len(some) for name, some in found.items()}}
    facts["tokens"] = sum(len(one["prompt"]) + len(one["completion"]) for one in found["train"])
    print(facts, file=sys.stderr, flush=True)
    (folder / "text.json").write_text(json.dumps(found))
    for who, shape, passes, rate in (("teacher", TEACHER, 3, 2e-3), ("student", STUDENT, 1, 2e-3)):
        one = model(shape, 0 if who == "teacher" else 1)
        seconds = train(one, found["train"], passes, rate)
        one.eval()
        facts[who] = {"parameters": sum(weight.numel() for weight in one.parameters()), "cpu_s": round(seconds)}
        facts[who] |= {"nll": round(nll(one, found["held_out"]), 4), "nll_training": round(nll(one, found["train"][:2000]), 4)}
        one.save_pretrained(folder / who)
        tokenizer.save_pretrained(folder / who)
        print(who, facts[who], file=sys.stderr, flush=True)
    (folder / "facts.json").write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    prepared(sys.argv[1] if len(sys.argv) > 1 else "language_models")
