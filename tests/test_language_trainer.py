"""LanguageTrainer: right losses and gradients on the prefixes that were named, whatever the batches."""

import re

import pytest
import torch
from torch import nn

import whichkl as wk
from test_sequence_kl import END, LENGTH, Table, sequences
from whichkl.distillation.language.causal import CausalModel
from whichkl.distillation.language.examples import read_examples, together
from whichkl.distillation.language.head import head_of
from whichkl.distillation.language.rollouts import Rollouts
from whichkl.distillation.language.token_loss import TokenLoss, score_term
from whichkl.distillation.losses import DIVERGENCES
from whichkl.distillation.losses.rows import divergence_named

transformers = pytest.importorskip("transformers")
from whichkl.distillation import LanguageTrainer  # noqa: E402

D = torch.float64


def llama(seed, tokens=24, width=16, **more):
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=tokens, pad_token_id=2, **{**shape, **more}))


def causal(module, tokens=24, who="teacher"):
    one = CausalModel(module, who)
    one.tokens = tokens
    return one


DATA = [{"prompt": [3 + k % 7, 4], "completion": [5 + k % 11] * (1 + k % 6)} for k in range(24)]


def arguments(folder, **changes):
    fixed = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2, "report_to": [], "use_cpu": True}
    fixed |= {"save_strategy": "no", "disable_tqdm": True, "logging_strategy": "steps", "logging_steps": 1, "seed": 5}
    return transformers.TrainingArguments(output_dir=str(folder), **{**fixed, **changes})


def trained(folder, teacher=None, student=None, data=DATA, changes=None, **more):
    student = llama(1) if student is None else student
    trainer = LanguageTrainer(
        teacher=llama(0) if teacher is None else teacher,
        student=student,
        args=arguments(folder, **(changes or {})),
        train_dataset=data,
        **more,
    )
    trainer.train()
    return trainer


# ---- the loss


def by_hand(p, q, rollouts, divergence):
    """The sum over drawn tokens of rows of full logits."""
    total = 0.0
    for row, (begin, end) in enumerate(zip(rollouts.begin.tolist(), rollouts.end.tolist(), strict=True)):
        ids = rollouts.ids[row : row + 1, :end]
        rows = [model(input_ids=ids).logits[0, begin - 1 : end - 1] for model in (p, q)]
        total = total + DIVERGENCES[divergence].function(teacher=rows[0].detach(), student=rows[1], reduction="sum")
    return total


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jeffreys", "total_variation"])
def test_the_loss_is_that_of_full_logits_and_so_are_its_gradients(divergence):
    p, q = llama(0).eval(), llama(1).eval()
    rollouts = together(DATA)
    loss = TokenLoss(causal(p), causal(q), divergence_named(divergence), probe=torch.tensor([[3, 4, 5]]))
    assert all(side.head is not None for side in loss.sides)
    found, known = loss(q, rollouts), by_hand(p, q, rollouts, divergence)
    torch.testing.assert_close(found, known, rtol=1e-5, atol=1e-5)
    for one, other in zip(torch.autograd.grad(found, q.parameters()), torch.autograd.grad(known, q.parameters()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_columns_beyond_the_tokens_have_no_part():
    p, wide = llama(0).eval(), llama(1, tokens=40).eval()
    narrow = llama(1)
    narrow.load_state_dict({name: value[:24] if len(value) == 40 else value for name, value in wide.state_dict().items()})
    rollouts = together(DATA)
    one, other = (
        TokenLoss(causal(p), causal(q), divergence_named("forward_kl"), probe=torch.tensor([[3, 4]]))(q, rollouts)
        for q in (wide, narrow.eval())
    )
    torch.testing.assert_close(one, other)


HEADS = {
    "gemma2": {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    **{kind: {} for kind in ("gpt2", "gpt_neox", "qwen2", "mistral", "bloom", "falcon", "llama4_text")},
}
MORE_HEADS = {
    "cohere2": {"logit_scale": 0.3},
    "granitemoe": {"logits_scaling": 4.0},
    "gemma3_text": {"final_logit_softcapping": 5.0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    **{kind: {} for kind in ("llama", "gemma", "qwen3", "qwen3_moe", "mixtral", "phi", "phi3", "stablelm", "starcoder2")},
    **{kind: {} for kind in ("olmo2", "mpt", "gpt_bigcode", "nemotron", "xglm", "biogpt", "smollm3", "glm4", "gpt_oss", "rwkv")},
}


def tiny(kind, seed=0, **special):
    """A model of an architecture, of two layers and 16 units, whose logits are far from 0."""
    sizes = {name: 2 for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "n_head", "n_heads", "num_heads")}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 16, "n_embd": 16, "d_model": 16}
    sizes |= {"vocab_size": 32, "head_dim": 8, "intermediate_size": 32, "moe_intermediate_size": 16, "num_local_experts": 2}
    sizes |= {"num_experts": 2, "max_position_embeddings": 32, "n_positions": 32, "num_experts_per_tok": 1}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    known = transformers.AutoConfig.for_model(kind)
    fixed = {name for name in sizes if isinstance(getattr(type(known), name, None), property)}
    own = known.to_dict()  # a size that differs between layers can't be read from the configuration
    given = {name: value for name, value in sizes.items() if (name in own or hasattr(known, name)) and name not in fixed}
    if getattr(known, "layer_types", None):
        given["layer_types"] = known.layer_types[:2]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = transformers.AutoConfig.for_model(kind, **{**given, **special})
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for weight in model.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, 0.0, 0.3)
    return model


@pytest.mark.parametrize("kind", [*HEADS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in MORE_HEADS)])
def test_the_heads_of_many_architectures_are_found(kind):
    model = tiny(kind, **{**HEADS, **MORE_HEADS}[kind])
    ids = torch.randint(3, 32, (2, 6), generator=torch.Generator().manual_seed(0))
    head = head_of(model, ids)
    assert head is not None
    hidden = head.backbone(input_ids=ids).last_hidden_state
    logits = model(input_ids=ids).logits
    torch.testing.assert_close(head.logits(hidden), logits, rtol=0, atol=1e-4)
    assert float(logits.detach().std()) > 0.05


def test_a_head_that_isnt_plain_is_left_alone():
    class Adapted(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.weight = layer, layer.weight

        def forward(self, x):
            return self.layer(x) + 1e-2 * x.sum(-1, keepdim=True) * torch.arange(24)

    model = llama(0).eval()
    model.lm_head = Adapted(model.lm_head)
    assert head_of(model, torch.tensor([[3, 4]])) is None
    q = llama(1).eval()
    loss = TokenLoss(causal(model), causal(q), divergence_named("reverse_kl"), probe=torch.tensor([[3, 4]]))
    torch.testing.assert_close(loss(q, together(DATA)), by_hand(model, q, together(DATA), "reverse_kl"), rtol=1e-5, atol=1e-5)


# ---- gradients of sequences, by enumeration


def every_rollout(prompt):
    """All continuations of a prompt."""
    found = list(sequences())
    width = len(prompt) + LENGTH
    ids = torch.tensor([[*prompt, *one, *[END] * (width - len(prompt) - len(one))] for one in found])
    begin = torch.full((len(found),), len(prompt))
    return Rollouts(ids, begin, begin + torch.tensor([len(one) for one in found]), torch.zeros(len(found), dtype=torch.bool))


def log_rows(model, rollouts):
    where = rollouts.drawn[:, 1:].nonzero()
    rows = model(rollouts.ids).double().log_softmax(-1)[where[:, 0], where[:, 1]]
    labels = rollouts.ids[rollouts.drawn]
    return rows, rows.gather(1, labels[:, None])[:, 0], where[:, 0]


def per_sequence(values, sequence, n):
    return torch.zeros(n, dtype=D).index_add(0, sequence, values)


def test_credit_of_the_sequence_gives_the_gradient_of_its_reverse_kl():
    p, q = Table(0, 1.5).double(), Table(1, 1.5).double()
    rollouts = every_rollout([1])
    n = len(rollouts.ids)
    log_p, at_p, sequence = log_rows(p, rollouts)
    log_q, at_q, _ = log_rows(q, rollouts)
    chance = per_sequence(at_q, sequence, n).exp()
    exact = (chance * per_sequence(at_q - at_p.detach(), sequence, n)).sum()
    (known,) = torch.autograd.grad(exact, q.rows, retain_graph=True)
    rows = (log_q.exp() * (log_q - log_p.detach())).sum(-1)
    # each sequence alone, weighted by its chance: without others there is no baseline
    terms = torch.stack([score_term(rows[sequence == k], at_q[sequence == k], sequence[sequence == k] * 0) for k in range(n)])
    mean = (chance.detach() * (per_sequence(rows, sequence, n) + terms)).sum()
    (found,) = torch.autograd.grad(mean, q.rows, retain_graph=True)
    torch.testing.assert_close(found, known, rtol=0, atol=1e-10)
    (without,) = torch.autograd.grad((chance.detach() * per_sequence(rows, sequence, n)).sum(), q.rows)
    assert float((without - known).abs().max()) > 1e-3


def test_the_baseline_leaves_the_mean_gradient_as_it_is():
    p, q = Table(0, 1.5).double(), Table(1, 1.5).double()
    rollouts = every_rollout([1])
    n = len(rollouts.ids)
    log_p, _, sequence = log_rows(p, rollouts)
    log_q, at_q, _ = log_rows(q, rollouts)
    rows = (log_q.exp() * (log_q - log_p)).sum(-1).detach()
    chance = per_sequence(at_q, sequence, n).exp().detach()

    def gradient(a, b):
        chosen = [sequence == one for one in (a, b)]
        number = torch.cat([torch.full((int(one.sum()),), k) for k, one in enumerate(chosen)])
        both = torch.cat([one.nonzero()[:, 0] for one in chosen])
        return torch.autograd.grad(score_term(rows[both], at_q[both], number), q.rows, retain_graph=True)[0]

    b = 200
    alone = sum(chance[k] * gradient_alone(k, rows, at_q, sequence, q) for k in range(n))
    found = sum(chance[k] * gradient(k, b) for k in range(n))
    # b's own part: its sums to come less their mean over the others
    to_go = torch.zeros(n, LENGTH, dtype=D)
    for k in range(n):
        one = rows[sequence == k]
        to_go[k, : len(one)] = one.flip(0).cumsum(0).flip(0) - one
    mine = sequence == b
    gain = (to_go[b] - chance @ to_go)[: int(mine.sum())]
    (own,) = torch.autograd.grad((gain * at_q[mine]).sum(), q.rows, retain_graph=True)
    torch.testing.assert_close(found, alone + own, rtol=0, atol=1e-10)


def gradient_alone(k, rows, at_q, sequence, q):
    chosen = sequence == k
    return torch.autograd.grad(score_term(rows[chosen], at_q[chosen], sequence[chosen] * 0), q.rows, retain_graph=True)[0]


def test_forward_kl_on_teacher_prefixes_has_the_gradient_of_the_sequences_forward_kl():
    p, q = Table(0, 1.5).double(), Table(1, 1.5).double()
    rollouts = every_rollout([2])
    n = len(rollouts.ids)
    log_p, at_p, sequence = log_rows(p, rollouts)
    log_q, at_q, _ = log_rows(q, rollouts)
    chance = per_sequence(at_p, sequence, n).exp().detach()
    exact = (chance * per_sequence(at_p - at_q, sequence, n)).sum()
    rows = (log_p.exp().detach() * (log_p.detach() - log_q)).sum(-1)
    mean = (chance * per_sequence(rows, sequence, n)).sum()
    known, found = (torch.autograd.grad(one, q.rows, retain_graph=True)[0] for one in (exact, mean))
    torch.testing.assert_close(found, known, rtol=0, atol=1e-10)


# ---- training


def test_accumulation_changes_nothing(tmp_path):
    results = []
    for size, parts in ((8, 1), (4, 2), (2, 4)):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "optim": "sgd", "max_steps": 2}
        trainer = trained(tmp_path, changes=changes, prefixes={"data": 0.5, "student": 0.5})
        losses = [one["loss"] for one in trainer.state.log_history if "loss" in one]
        results.append((losses, [weight.detach().clone() for weight in trainer.model.parameters()]))
    for losses, weights in results[1:]:
        assert losses == pytest.approx(results[0][0], abs=1e-4)  # the log rounds to four digits
        for one, other in zip(weights, results[0][1], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_training_brings_the_student_nearer_in_its_own_direction(tmp_path):
    prompts = [one["prompt"] for one in DATA] * 4
    before = wk.distillation.sequence_kl(teacher=llama(0), student=llama(1), prompts=prompts, max_new_tokens=8)
    for objective, prefixes, credit in (
        ("forward_kl", {"teacher": 1.0}, "token"),
        ("reverse_kl", {"student": 1.0}, "token"),
        ("reverse_kl", {"student": 1.0}, "sequence"),
    ):
        trainer = trained(
            tmp_path, objective=objective, prefixes=prefixes, credit=credit, max_new_tokens=8, changes={"max_steps": 40}
        )
        after = wk.distillation.sequence_kl(teacher=llama(0), student=trainer.model, prompts=prompts, max_new_tokens=8)
        here, there = (getattr(one, objective) for one in (before, after))
        assert there.value + 4 * there.stderr < 0.6 * here.value
        assert trainer.tokens_generated["teacher" if "teacher" in prefixes else "student"] > 0


def test_the_same_run_again_and_a_run_that_resumes_have_the_same_weights(tmp_path):
    prefixes = {"data": 0.4, "student": 0.3, "teacher": 0.3}
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trained(tmp_path / "a", changes=changes, prefixes=prefixes)
    trainer = LanguageTrainer(
        teacher=llama(0),
        student=llama(1),
        args=arguments(tmp_path / "b", **changes),
        train_dataset=DATA,
        prefixes=prefixes,
    )
    torch.rand(7)  # what was drawn elsewhere has no part in it
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for one, other in zip(whole.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert trainer.flops == whole.flops and trainer.tokens_generated == whole.tokens_generated


def test_a_teacher_that_shares_parts_with_the_student_leaves_it_in_training_mode(tmp_path):
    teacher, student, seen = llama(0), llama(1), []
    teacher.model.layers[0] = student.model.layers[0]
    student.model.layers[0].register_forward_hook(
        lambda module, args, out: seen.append((module.training, torch.is_grad_enabled()))
    )
    student.train()
    trained(tmp_path, teacher=teacher, student=student, changes={"max_steps": 1})
    assert (True, True) in seen and (False, False) in seen and all(training for training, has_gradient in seen if has_gradient)
    assert student.training


def test_a_teacher_that_would_follow_the_student_is_refused(tmp_path):
    student = llama(1)
    with pytest.raises(wk.InputError, match="it is the student, whose every change it would follow"):
        LanguageTrainer(teacher=student, student=student, args=arguments(tmp_path), train_dataset=DATA)


def test_hard_labels_are_the_cross_entropy_of_the_data(tmp_path):
    p, q = llama(0).eval(), llama(1).eval()
    rollouts = together(DATA)
    loss = TokenLoss(causal(p), causal(q), divergence_named("forward_kl"), hard_label_weight=1.0, probe=torch.tensor([[3, 4]]))
    known = 0.0
    for row, (begin, end) in enumerate(zip(rollouts.begin.tolist(), rollouts.end.tolist(), strict=True)):
        ids = rollouts.ids[row : row + 1, :end]
        logits = q(input_ids=ids).logits[0, begin - 1 : end - 1]
        known = known + nn.functional.cross_entropy(logits, ids[0, begin:], reduction="sum")
    torch.testing.assert_close(loss(q, rollouts), known, rtol=1e-5, atol=1e-5)


def test_one_token_completions_get_gradients_and_evaluation_reports_the_loss(tmp_path):
    data = [{"prompt": [3, 4 + k % 9], "completion": []} for k in range(8)]  # the end token alone
    trainer = trained(tmp_path, data=data, eval_dataset=DATA, changes={"max_steps": 1, "optim": "sgd"})
    assert any(not torch.equal(a, b) for a, b in zip(trainer.model.parameters(), llama(1).parameters(), strict=True))
    q, rollouts = trainer.model.eval(), together([one.to_dict() for one in read_examples(DATA, None, 24, 2)])
    known = float(by_hand(llama(0).eval(), q, rollouts, "forward_kl").detach()) / int((rollouts.end - rollouts.begin).sum())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(known, rel=1e-5)


# ---- data


class Chat:
    """A tokenizer of single letters, with a template."""

    eos_token_id, chat_template = 2, "yes"

    def __len__(self):
        return 24

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [2 if one == "|" else 3 + (ord(one) - 97) % 20 for one in text]}

    def apply_chat_template(self, messages, add_generation_prompt=False, tokenize=False):
        return "".join(f"{one['role'][0]}{one['content']}|" for one in messages) + "a" * add_generation_prompt


def test_examples_are_read_in_every_form():
    chat = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "cd"}]
    read = read_examples(
        ["abc", {"prompt": "ab", "completion": "c"}, {"messages": chat}, {"prompt": [3, 4], "completion": [5, 2]}], Chat(), 24, 2
    )
    assert [one.to_dict() for one in read] == [
        {"prompt": [3], "completion": [4, 5, 2]},
        {"prompt": [3, 4], "completion": [5, 2]},
        {"prompt": Chat()("ub|a")["input_ids"], "completion": [5, 6, 2]},
        {"prompt": [3, 4], "completion": [5, 2]},
    ]


REFUSED = {
    "credit elsewhere": ({"credit": "sequence"}, "belongs to the reverse KL of sequences drawn from the student"),
    "credit of forward": (
        {"credit": "sequence", "objective": "forward_kl", "prefixes": {"student": 1.0}},
        "belongs to the reverse KL of sequences",
    ),
    "credit unknown": ({"credit": "all"}, "neither 'token' nor 'sequence'"),
    "hard labels on draws": ({"hard_label_weight": 0.5, "prefixes": {"student": 1.0}}, "drawn tokens are no labels"),
    "shares": ({"prefixes": {"data": 0.5}}, "numbers between 0 and 1 that sum to 1"),
    "source": ({"prefixes": {"web": 1.0}}, "`web` is none of data, student and teacher"),
    "prompts alone": ({"train_dataset": [{"prompt": [3]}]}, "prompts without completions"),
    "evaluation": ({"eval_dataset": [{"prompt": [3]}]}, "some examples of `eval_dataset` have no completion"),
    "text": ({"train_dataset": ["abc"]}, "is text. Pass `tokenizer=`"),
    "nothing": ({"train_dataset": []}, "there are none"),
    "one": ({"train_dataset": "abc"}, "they are one `str`"),
    "keys": ({"train_dataset": [{"question": [3]}]}, "example 0 has 'question', and no 'prompt'"),
    "id": ({"train_dataset": [{"prompt": [3], "completion": [99]}]}, "has an id that isn't one of 24 tokens"),
    "objective": ({"objective": "forwards"}, "forwards"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_go_together_is_refused(case, tmp_path):
    changed, message = REFUSED[case]
    given = {"teacher": llama(0), "student": llama(1), "args": arguments(tmp_path), "train_dataset": DATA, **changed}
    with pytest.raises(wk.InputError, match=message):
        LanguageTrainer(**given)


def test_prompts_alone_do_on_the_students_own_prefixes(tmp_path):
    trainer = trained(tmp_path, data=[{"prompt": [3, 4 + k % 5]} for k in range(8)], prefixes={"student": 1.0})
    assert trainer.state.global_step == 3


# ---- the whole call


def test_a_language_model_is_distilled_and_measured_on_prompts_it_has_not_seen(tmp_path):
    teacher, student = llama(0), llama(1)
    data = [{"prompt": [3 + k % 19, 4 + k % 5], "completion": [5, 6]} for k in range(190)]
    weights = [weight.detach().clone() for weight in student.parameters()]
    call = {
        "teacher": teacher,
        "student": student,
        "data": data,
        "max_new_tokens": 8,
        "held_out": 0.3,
        "prefixes": {"teacher": 1.0},
    }
    result = wk.distillation.language_model(**call, args=arguments(tmp_path, max_steps=30, per_device_train_batch_size=16))
    assert len({one.prompt for one in result.examples}) == 5 and not result.notes
    assert result.after.forward_kl.value < result.before.forward_kl.value - 4 * result.before.forward_kl.stderr
    assert all(torch.equal(one, other) for one, other in zip(student.parameters(), weights, strict=True))
    assert result.before.prompts >= 28 and result.steps == 30 and len(result.history) == 30 and not result.student.training
    text = str(result)
    assert "forward_kl on the teacher's prefixes: 30 steps" in text and "→" in text
    assert result.to_dict()["after"]["forward_kl"]["value"] == result.after.forward_kl.value


def test_held_out_examples_that_are_trained_on_are_noted(tmp_path):
    data = [{"prompt": [3 + k % 6, 4], "completion": [5, 6]} for k in range(12)]
    result = wk.distillation.language_model(
        teacher=llama(0), student=llama(1), data=data, held_out=data[:3], max_new_tokens=3, args=arguments(tmp_path, max_steps=1)
    )
    assert any("3 of 3 held-out examples are training examples" in note for note in result.notes)
    assert any("rests on 3 distinct prompts" in doubt for doubt in result.verdict.doubts)


def test_a_budget_of_operations_ends_training(tmp_path):
    student, teacher = llama(1), llama(0)
    size = sum(weight.numel() for weight in student.parameters())
    each = 8 * size * 4 * 5  # both models, four examples of five tokens
    data = [{"prompt": [3 + k, 4], "completion": [5, 6]} for k in range(20)]
    for budget, steps in ((3.5, 3), (4.0, 4), (1.0, 1)):
        given = {"teacher": teacher, "student": llama(1), "data": data, "budget": budget * each}
        trainer = trained(tmp_path, **given, changes={"max_steps": 9})
        assert trainer.state.global_step == steps and trainer.flops == steps * each
    weights = [weight.detach().clone() for weight in student.parameters()]
    with pytest.raises(wk.InputError, match=re.escape(f"the first step alone costs {each:.3g} FLOPs")):
        trained(tmp_path, teacher=teacher, student=student, data=data, budget=0.5 * each, changes={"max_steps": 9})
    assert all(torch.equal(one, other) for one, other in zip(student.parameters(), weights, strict=True))


@pytest.mark.parametrize(
    ("budget", "allowed", "note"),
    [(3.5, 9, None), (9.0, 2, "22% of its budget: let `args` allow more")],
)
def test_a_result_states_a_budget_that_was_not_met(budget, allowed, note, tmp_path):
    each = 8 * sum(weight.numel() for weight in llama(1).parameters()) * 4 * 5
    data = [{"prompt": [3 + k, 4], "completion": [5, 6]} for k in range(20)]
    given = {"teacher": llama(0), "student": llama(1), "data": data, "max_new_tokens": 3, "held_out": 0.2}
    args = arguments(tmp_path, max_steps=allowed)
    found = wk.distillation.language_model(**given, args=args, budget=budget * each)
    assert (found.notes == ()) if note is None else (note in found.notes[0] and note in str(found))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"budget": -1.0}, "a positive number of FLOPs"),
        ({"prefixes": "student"}, r"`prefixes='student'`: it is a `str`, .* Say, prefixes={'student': 1.0}"),
        ({"prefixes": ["student"]}, r"`prefixes=…`: it is a `list`, .* Say, prefixes={'data': 0.5, "),
        ({"held_out": 0.0}, "a share lies between 0 and 1"),
        ({"data": DATA[:1]}, "distinct prompts are held out"),
    ],
)
def test_a_distillation_that_cannot_be_made_is_refused(changed, message):
    with pytest.raises(wk.InputError, match=message):
        wk.distillation.language_model(**{"teacher": llama(0), "student": llama(1), "data": DATA, **changed})
