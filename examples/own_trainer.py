"""Distil with a Trainer of your own: fifteen lines, the same weights as LanguageTrainer's on prefixes of the data."""

import copy
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from whichkl.distillation import LanguageTrainer
from whichkl.losses import reverse_kl


class Distilling(Trainer):
    """A Trainer whose loss is a divergence of a teacher, on batches of `input_ids`, `attention_mask` and `labels`."""

    teacher: torch.nn.Module

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return this micro-batch's share of the step's mean over tokens."""
        labels = inputs.pop("labels")[:, 1:]  # −100 in prompts and padding; a place's logits are of the token after it
        with torch.no_grad():
            known = self.teacher(**inputs).logits[:, :-1]
        out = model(**inputs)
        total = reverse_kl(teacher=known, student=out.logits[:, :-1], mask=labels != -100, reduction="sum")
        here = (labels != -100).sum() * self.accelerator.num_processes
        loss = total * self.accelerator.num_processes / (here if num_items_in_batch is None else num_items_in_batch)
        return (loss, out) if return_outputs else loss


def model(seed, width):
    """A small model with random weights; yours comes from AutoModelForCausalLM.from_pretrained(folder)."""
    torch.manual_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, initializer_range=0.3, eos_token_id=2, pad_token_id=2, **shape))


def padded(examples):
    """Pad on the right; labels are −100 where the loss doesn't count."""
    rows = [one["prompt"] + one["completion"] for one in examples]
    width = max(map(len, rows))
    ids = torch.tensor([row + [2] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    at = torch.arange(width)
    begin = torch.tensor([len(one["prompt"]) for one in examples])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where((mask == 1) & (at >= begin[:, None]), ids, -100)}


teacher, student = model(0, 32).eval(), model(1, 16)
data = [{"prompt": [1, 3 + k % 25], "completion": [3 + k % 17] * (1 + k % 5) + [2]} for k in range(48)]
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder, max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=2, optim="sgd",
        learning_rate=1e-2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no",
        remove_unused_columns=False,
    )  # fmt: skip
    mine = Distilling(model=copy.deepcopy(student), args=arguments, train_dataset=data, data_collator=padded)
    mine.teacher = teacher
    theirs = LanguageTrainer(teacher=teacher, student=student, objective="reverse_kl", args=arguments, train_dataset=data)
    for trainer in (mine, theirs):
        trainer.train()
pairs = zip(mine.model.parameters(), theirs.model.parameters(), strict=True)
apart = max(float((one - other).detach().abs().max()) for one, other in pairs)
assert apart < 1e-5, apart
print(f"weights differ by {apart:.1e} at most")
