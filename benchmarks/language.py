"""Distilling a language model next to TRL: CPU time of a step and peak memory, on student prefixes and on the data's.

Each run is a process of its own. On student prefixes the peer is TRL's `DistillationTrainer`, on data its `GKDTrainer`.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time

STEPS, BATCH, PARTS, MOST = 5, 8, 2, 48


def model(vocabulary, width, layers, seed):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 4, "max_position_embeddings": 512}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, bos_token_id=0, eos_token_id=1, pad_token_id=2, **shape))


def tokenizer_of(vocabulary):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "<pad>": 2, **{f"w{k}": k for k in range(3, vocabulary)}}
    made = Tokenizer(models.WordLevel(words, "<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<pad>"}
    found = PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **marks)
    found.chat_template = "{% for m in messages %}{{ m['content'] }} {% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    return found


def examples(vocabulary):
    """Prompts of 40 words with completions of 25, as signatures of functions with their first paragraph have."""
    text = [[f"w{3 + (17 * k + 31 * j) % (vocabulary - 3)}" for j in range(65)] for k in range(STEPS * BATCH * PARTS)]
    return [(" ".join(one[:40]), " ".join(one[40:])) for one in text]


def side(who, prefixes, vocabulary):
    """Run one side, and print its median CPU time of a step and its peak memory."""
    from transformers import TrainerCallback

    ends = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            ends.append(time.process_time())

        def on_step_end(self, *_, **__):
            ends.append(time.process_time())

    teacher, student = model(vocabulary, 192, 4, 0), model(vocabulary, 96, 3, 1)
    known, tokenizer = examples(vocabulary), tokenizer_of(vocabulary)
    common = {"max_steps": STEPS, "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": PARTS, "report_to": []}
    common |= {"use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-3}
    common |= {"activation_checkpointing": False, "logging_strategy": "no"}
    with tempfile.TemporaryDirectory() as folder:
        common["output_dir"] = folder
        if who == "whichkl":
            from transformers import TrainingArguments

            from whichkl.distillation import LanguageTrainer

            trainer = LanguageTrainer(
                teacher=teacher, student=student, objective="reverse_kl", prefixes={prefixes: 1.0}, max_new_tokens=MOST,
                args=TrainingArguments(**common), processing_class=tokenizer, callbacks=[Clock()],
                train_dataset=[{"prompt": prompt, "completion": completion} for prompt, completion in known],
            )  # fmt: skip
        elif prefixes == "student":
            from datasets import Dataset
            from trl import DistillationConfig, DistillationTrainer

            trainer = DistillationTrainer(
                model=student, teacher_model=teacher, processing_class=tokenizer, callbacks=[Clock()],
                args=DistillationConfig(**common, max_completion_length=MOST, beta=1.0),
                train_dataset=Dataset.from_dict({"prompt": [prompt for prompt, _ in known]}),
            )  # fmt: skip
        else:
            from datasets import Dataset
            from trl.experimental.gkd import GKDConfig, GKDTrainer

            chats = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in known]
            trainer = GKDTrainer(
                model=student, teacher_model=teacher, processing_class=tokenizer, callbacks=[Clock()],
                args=GKDConfig(**common, max_new_tokens=MOST, beta=1.0, lmbda=0.0, temperature=1.0, max_length=256),
                train_dataset=Dataset.from_dict({"messages": chats}),
            )  # fmt: skip
        begin = time.process_time()
        trainer.train()
        total = time.process_time() - begin
    print(json.dumps({"step_s": total / STEPS, "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def main(rounds):
    found = {}
    for prefixes, vocabulary in (("student", 1_024), ("student", 32_768), ("data", 32_768)):
        results = {"whichkl": [], "trl": []}
        for _ in range(rounds):
            for who, runs in results.items():
                command = [sys.executable, __file__, who, prefixes, str(vocabulary)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr[-3000:])
                runs.append(json.loads(done.stdout.splitlines()[-1]))
        ours, theirs = (
            {key: statistics.median(one[key] for one in results[who]) for key in ("step_s", "mib")} for who in results
        )
        name = f"{prefixes} prefixes, {vocabulary:,} tokens"
        found[name] = {"cpu": round(ours["step_s"] / theirs["step_s"], 3), "memory": round(ours["mib"] / theirs["mib"], 3)}
        shown = [f"{one['step_s']:.2f} CPU s a step, {one['mib']:.0f} MiB" for one in (ours, theirs)]
        print(f"{name}: {shown[0]}; TRL {shown[1]}")
    print(json.dumps({"benchmark": "language", **found}))


if __name__ == "__main__":
    if len(sys.argv) == 4:
        side(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) == 2 else 3)
