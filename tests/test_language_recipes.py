"""The recipe for TRL in docs/language_models.md: its loss is the divergence's mean over tokens, whatever the micro-batches."""

import re
from pathlib import Path

import pytest
import torch

import whichkl.losses

transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")
pytest.importorskip("datasets")
from test_language_trainer import llama  # noqa: E402


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<s>": 0, "<unk>": 1, "</s>": 2, **{f"w{k}": k for k in range(3, 24)}}
    made = Tokenizer(models.WordLevel(words, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **marks)
    found.chat_template = "{% for m in messages %}{{ m['content'] }} {% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    return found


@pytest.mark.filterwarnings("ignore")
def test_the_recipe_for_trl_trains_on_the_divergence(tmp_path, monkeypatch):
    import datasets
    from trl.experimental.gkd import GKDConfig

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    page = (Path(__file__).parents[1] / "docs" / "language_models.md").read_text()
    (block,) = re.findall(r"```py\n(.*?)```", page, flags=re.DOTALL)
    names = {"reverse_kl": whichkl.losses.reverse_kl}
    exec(block, names)  # noqa: S102
    words = [[f"w{3 + (5 * k + 3 * j) % 21}" for j in range(3 + k % 4)] for k in range(8)]
    chats = [[{"role": "user", "content": "w3 w4"}, {"role": "assistant", "content": " ".join(one)}] for one in words]
    common = {"max_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
    common |= {"activation_checkpointing": False, "logging_steps": 1, "lmbda": 0.0, "max_length": 32, "dataset_num_proc": None}
    found = []
    for size, parts in ((8, 1), (2, 4)):
        teacher, student = llama(0), llama(1)
        trainer = names["DistillingGKD"](
            model=student, teacher_model=teacher, processing_class=tokenizer(),
            args=GKDConfig(str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=parts, **common),
            train_dataset=datasets.Dataset.from_dict({"messages": chats}),
        )  # fmt: skip
        (batch,) = [trainer.data_collator([trainer.train_dataset[k] for k in range(8)])]
        trainer.train()
        found.append(next(one["loss"] for one in trainer.state.log_history if "loss" in one))
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    rows = [model.eval()(**given).logits[:, :-1] for model in (llama(0), llama(1))]
    known = whichkl.losses.reverse_kl(teacher=rows[0], student=rows[1], mask=batch["labels"][:, 1:] != -100)
    assert found == pytest.approx([float(known.detach())] * 2, rel=1e-4)
    assert torch.is_tensor(known)
