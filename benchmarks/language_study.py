"""The study of language models: five objectives × two sources of prefixes × six seeds at equal FLOPs, from one warm student.

The text and both models are those of `language_text.py`. The study is kept in a folder: if interrupted, run it again. With
`--table` it prints what is there.
"""

import argparse
import json
import sys
from pathlib import Path

from language_text import prepared

OBJECTIVES = ("forward_kl", "reverse_kl", "jeffreys:0.5", "jensen_shannon:0.5", "total_variation")
PREFIXES = ("data", "student")
BUDGET = 8e11
"""FLOPs of a cell: forward KL on the data's prefixes takes about 20 CPU seconds on one core."""


def target_of(teacher, tokenizer, text, budget):
    from transformers import TrainingArguments

    from whichkl.distillation import LanguageTarget

    seen = {tuple(one["prompt"]) for one in text["train"]}
    unseen = {tuple(one["prompt"]): one for one in text["held_out"] if tuple(one["prompt"]) not in seen}
    arguments = TrainingArguments(
        output_dir="unused", per_device_train_batch_size=32, learning_rate=1e-3, warmup_steps=0.05, num_train_epochs=1_000,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=20, dataloader_pin_memory=False,
    )  # fmt: skip
    return LanguageTarget(
        teacher=teacher, tokenizer=tokenizer, data=text["train"], held_out=list(unseen.values()), max_new_tokens=64,
        budget=budget, args=arguments,
    )  # fmt: skip


def table(study):
    """Print both KLs of every arm, with errors over seeds, and the start."""
    from whichkl.study.arms import mean_and_error, rows_by_arm

    names = ("forward_kl", "reverse_kl", "entropy", "length", "agreement", "ece", "cpu_seconds")
    rows = [row for row in study.rows if row["status"] != "failed"]

    def text(mine, name, ending=""):
        found = mean_and_error(mine, name + ending)
        return "" if found is None else f"{found[0]:.3g}" if found[1] is None else f"{found[0]:.4g} ± {found[1]:.1g}"

    print("| arm | seeds |", " | ".join(names), "|\n|", "---|" * (len(names) + 2), sep="")
    print("| start | |", " | ".join(text(rows, name, "_before") for name in names), "|")
    print("| teacher | |", " | ".join(text(rows, name, "_teacher") for name in names), "|")
    for arm, mine in rows_by_arm(rows).items():
        print(f"| {arm} | {len(mine)} |", " | ".join(text(mine, name) for name in names), "|")
    print(study.verdict)


def main():
    read = argparse.ArgumentParser()
    read.add_argument("models", help="folder of the text and the models; made where it is missing")
    read.add_argument("--out", default="language_study", help="folder of the study")
    read.add_argument("--seeds", type=int, default=6)
    read.add_argument("--budget", type=float, default=BUDGET)
    read.add_argument("--table", action="store_true", help="print what is there, and compute nothing")
    read.add_argument("--report", help="write the report to this file too")
    asked = read.parse_args()
    import whichkl as wk
    from whichkl.study import Study

    if asked.table:
        study = Study.load(asked.out)
    else:
        teacher, student, tokenizer, text, facts = prepared(asked.models)
        print(json.dumps(facts), file=sys.stderr)
        arms = [f"{objective}@{prefixes}" for prefixes in PREFIXES for objective in OBJECTIVES]

        def tell(progress):
            if progress.cell is not None:
                row = progress.cell.row
                said = [f"{row[name]:.3g}" for name in ("forward_kl", "reverse_kl", "cpu_seconds") if row.get(name) is not None]
                print(progress.done, "of", progress.of, row["objective"], row["seed"], *said, row["error"] or "", file=sys.stderr)

        target = target_of(teacher, tokenizer, text, asked.budget)
        study = wk.compare(target, {"student": student}, arms, seeds=asked.seeds, out=asked.out, tell=tell)
    table(study)
    if asked.report:
        wk.report(study, asked.report)
    rows = [{name: row.get(name) for name in ("objective", "seed", "forward_kl", "reverse_kl", "flops")} for row in study.rows]
    facts = json.loads((Path(asked.models) / "facts.json").read_text())
    print(json.dumps({"benchmark": "language_study", "text": facts["text"], "verdict": study.verdict.outcome, "rows": rows}))


if __name__ == "__main__":
    main()
