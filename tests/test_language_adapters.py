"""LanguageTrainer with PEFT: adapters anywhere are trained, the base isn't, and it may be the teacher."""

import copy

import pytest
import torch

import whichkl as wk
from whichkl.distillation.language.examples import together
from whichkl.distillation.language.token_loss import TokenLoss
from whichkl.distillation.losses.rows import divergence_named

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from test_language_trainer import DATA, by_hand, causal, llama, trained  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{said}")
    for said in ("`is_gradient_checkpointing`", ".*tie_word_embeddings=True", "Setting `save_embedding")
]


def lora(**settings):
    return peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings})


ADAPTERS = {
    "attention": (lora(), True),
    "head": (lora(target_modules=["q_proj", "lm_head"]), False),
    "dora": (lora(use_dora=True), True),
    "whole head": (lora(modules_to_save=["lm_head"]), True),
    "whole embeddings": (lora(modules_to_save=["embed_tokens"]), True),
    "some embeddings": (lora(trainable_token_indices=[3, 4]), True),
    "ia3": (
        peft.IA3Config(target_modules=["k_proj", "lm_head"], feedforward_modules=[], task_type="CAUSAL_LM"),
        False,
    ),
}


def adapted(name="attention", **shape):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return peft.get_peft_model(llama(1, **shape), copy.deepcopy(ADAPTERS[name][0]))


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_part_of_an_adapter_is_trained_and_nothing_else(name, tmp_path):
    student = adapted(name)
    before = {key: value.detach().clone() for key, value in student.named_parameters()}
    own = copy.deepcopy(student.get_base_model().generation_config)
    changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trained(tmp_path, student=student, prefixes={"data": 0.5, "student": 0.5}, max_new_tokens=6, changes=changes)
    assert (trainer.token_loss.sides[1].head is not None) is ADAPTERS[name][1]
    for key, value in student.named_parameters():
        assert torch.equal(value, before[key]) is not value.requires_grad, key
    assert student.get_base_model().generation_config == own
    saved = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved


@pytest.mark.parametrize("shape", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["attention", "head", "whole head"])
def test_the_loss_of_an_adapted_student_is_that_of_its_full_logits(name, shape):
    p, q = llama(0).eval(), adapted(name, **shape).eval()
    loss = TokenLoss(causal(p), causal(q), divergence_named("reverse_kl"), probe=torch.tensor([[3, 4, 5]]))
    with torch.no_grad():  # until then it changed nothing
        for weight in q.parameters():
            if weight.requires_grad:
                weight += 0.1
    known = [weight for weight in q.parameters() if weight.requires_grad]
    found, full = loss(q, together(DATA)), by_hand(p, q, together(DATA), "reverse_kl")
    torch.testing.assert_close(found, full, rtol=1e-5, atol=1e-5)
    for one, other in zip(torch.autograd.grad(found, known), torch.autograd.grad(full, known), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared", ["the student itself", "its base"])
def test_a_base_model_teaches_its_own_adapter(shared, tmp_path):
    given = {"prefixes": {"data": 0.4, "teacher": 0.6}, "max_new_tokens": 6, "hard_label_weight": 0.0}
    students = []
    for is_shared in (True, False):
        student = adapted()
        with torch.no_grad():
            for weight in student.parameters():
                if weight.requires_grad:
                    weight += 0.2
        own = student if shared == "the student itself" else student.get_base_model()
        trainer = trained(tmp_path, teacher=own if is_shared else llama(1), student=student, eval_dataset=DATA, **given)
        students.append((student, trainer.evaluate()["eval_loss"]))
        assert all(weight.requires_grad for name, weight in student.named_parameters() if "lora_" in name)
    assert students[0][1] == pytest.approx(students[1][1], rel=1e-5) and students[0][1] > 0.01
    for one, other in zip(students[0][0].parameters(), students[1][0].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_sequences_of_a_base_and_of_its_adapter_are_compared():
    student = adapted()
    with torch.no_grad():
        for weight in student.parameters():
            if weight.requires_grad:
                weight += 0.2
    prompts = [one["prompt"] for one in DATA]
    found, known = (
        wk.distillation.sequence_kl(teacher=one, student=student, prompts=prompts, max_new_tokens=6)
        for one in (student.get_base_model(), llama(1))
    )
    assert found.forward_kl.value == pytest.approx(known.forward_kl.value, rel=1e-5) and known.forward_kl.value > 0.1


def test_prompt_tuning_is_refused(tmp_path):
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(wk.InputError, match="Cannot use this student"):
        trained(tmp_path, student=peft.get_peft_model(llama(1), config))
