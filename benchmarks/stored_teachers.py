"""What storing a teacher costs: forward KL on the data's prefixes from a live teacher, stored laws and text alone.

The text and both models are those of `language_text.py`; every arm has the same examples, order and number of steps.
"""

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path

from language_text import prepared

WAYS = {"live": None, "k = 32": {"k": 32}, "k = 8": {"k": 8}, "50 draws": {"draws": 50}, "text": {}}


def main():
    read = argparse.ArgumentParser()
    read.add_argument("models", help="folder of the text and the models; made where it is missing")
    read.add_argument("--examples", type=int, default=960)
    read.add_argument("--prompts", type=int, default=200)
    asked = read.parse_args()
    from transformers import TrainingArguments

    from whichkl.distillation import LanguageTrainer, capture, sequence_kl

    teacher, start, tokenizer, text, _ = prepared(asked.models)
    data, unseen = text["train"][: asked.examples], [one["prompt"] for one in text["held_out"][: asked.prompts]]
    print("| teacher | mass stored | bytes a token | capture, CPU s | training, CPU s | forward KL | reverse KL |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, way in WAYS.items():
            known, begin, cells = teacher if way is None else None, time.process_time(), ["", "", ""]
            if way:
                known = capture(teacher=teacher, tokenizer=tokenizer, data=data, folder=Path(folder) / name, **way)
                held = known.manifest
                size = sum(one["bytes"] for one in held["shards"]) / held["tokens"]
                cells = [f"{held['mass']['mean']:.3f}", f"{size:.0f}", f"{time.process_time() - begin:.0f}"]
            student = copy.deepcopy(start)
            arguments = TrainingArguments(
                output_dir=folder, per_device_train_batch_size=32, num_train_epochs=2, learning_rate=1e-3, warmup_steps=0.05,
                use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no", seed=0,
            )  # fmt: skip
            begin = time.process_time()
            LanguageTrainer(
                teacher=known, student=student, args=arguments, train_dataset=data, processing_class=tokenizer
            ).train()
            cells.append(f"{time.process_time() - begin:.0f}")
            found = sequence_kl(teacher=teacher, student=student, tokenizer=tokenizer, prompts=unseen, max_new_tokens=64)
            cells += [found.forward_kl.number, found.reverse_kl.number]
            print("|", " | ".join([name, *cells]), "|", flush=True)
    found = sequence_kl(teacher=teacher, student=start, tokenizer=tokenizer, prompts=unseen, max_new_tokens=64)
    print("| start | | | | |", found.forward_kl.number, "|", found.reverse_kl.number, "|")
    print(json.dumps({"examples": len(data), "prompts": len(unseen)}))


if __name__ == "__main__":
    main()
