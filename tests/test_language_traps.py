"""Mistakes that distillation of language models invites, each as a test that it isn't made here.

In other files: settings of a generation configuration (test_sequence_kl), completions of one token and resumed draws
(test_language_trainer), narrow teachers (test_language_arguments), adapters on the head (test_language_adapters), truncated
laws and their temperature (test_stored_teachers), tokenizers with other ids (test_sequence_kl, `whichkl estimate`).
"""

import pytest
import torch

import whichkl as wk
from whichkl.distillation.language.causal import CausalModel
from whichkl.distillation.language.examples import read_examples, together
from whichkl.distillation.language.rollouts import Rollouts, continued
from whichkl.distillation.language.token_draws import drawn_tokens
from whichkl.distillation.language.token_loss import TokenLoss
from whichkl.distillation.losses.rows import divergence_named
from whichkl.distillation.losses.specs import row_divergence_of

transformers = pytest.importorskip("transformers")
from test_language_trainer import DATA, arguments, by_hand, causal, llama, tiny, trained  # noqa: E402
from whichkl.distillation import LanguageTrainer  # noqa: E402

PROBE = torch.tensor([[3, 4]])


def test_the_mean_is_over_the_tokens_that_were_drawn_not_over_those_of_the_data(tmp_path):
    data = [{"prompt": [3 + k, 4], "completion": [5] * 7} for k in range(8)]
    changes = {"per_device_train_batch_size": 8, "max_steps": 1}
    trainer = LanguageTrainer(
        teacher=llama(0), student=llama(1), args=arguments(tmp_path, **changes), train_dataset=data, prefixes={"student": 1.0},
        max_new_tokens=5,
    )  # fmt: skip
    batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    rollouts = Rollouts(*(batches[0][name] for name in ("input_ids", "begin", "end", "cut")))
    assert count == rollouts.drawn.sum() < 8 * 8
    known = by_hand(llama(0).eval(), llama(1).eval(), rollouts, "forward_kl") / count
    found = trainer.compute_loss(trainer.model.eval(), batches[0], num_items_in_batch=count)
    torch.testing.assert_close(found, known, rtol=1e-5, atol=1e-6)


def test_no_top_k_is_hidden_in_the_draws():
    model = CausalModel(llama(0, tokens=80, initializer_range=1e-4), "teacher")  # all tokens are as likely
    model.tokens = 80
    drawn = continued(model, [[5]] * 2_000, (2,), 1, 0).ids[:, 1]
    assert len(drawn.unique()) == 80  # transformers' default keeps 50 where nothing else is said


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ({"teacher": {"eos_token_id": 3}}, "they end sequences by different tokens: the teacher's are 3 and the student's are 2"),
        ({"student": {"tokens": 40}}, "which columns are padding only a tokenizer tells"),
    ],
)
def test_models_of_other_tokens_are_refused(sides, message, tmp_path):
    given = {who: llama(seed, **sides.get(who, {})) for seed, who in enumerate(("teacher", "student"))}
    with pytest.raises(wk.InputError, match=message):
        LanguageTrainer(**given, args=arguments(tmp_path), train_dataset=DATA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_are_drawn_by_their_chances_wherever_they_stand(dtype):
    chances = torch.zeros(600, dtype=torch.float64)  # three groups, and impossible tokens at the ends of each
    likely = torch.tensor([3, 254, 256, 300, 510, 598])
    chances[likely] = torch.tensor([0.3, 0.05, 0.2, 0.25, 0.15, 0.05], dtype=torch.float64)
    n = 20_000
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = drawn_tokens(chances.log().to(dtype).expand(n, -1), "student")
    seen = torch.bincount(drawn, minlength=600).double()
    assert float(seen[chances == 0].sum()) == 0
    # Pearson's statistic has mean 5 and variance 10 for 6 tokens
    assert float(((seen - n * chances).square() / (n * chances))[likely].sum()) < 5 + 5 * 10**0.5


@pytest.mark.parametrize("has_generate", [True, False])
def test_a_model_whose_logits_are_nan_is_not_drawn_from(has_generate):
    module = llama(0)
    with torch.no_grad():
        module.lm_head.weight[7] = float("nan")
    model = causal(module if has_generate else Bare(module), who="student")
    with pytest.raises(wk.InputError, match="Cannot draw from the student: its logits of the next token are NaN, or infinite"):
        continued(model, [[3, 4]], (2,), 4, 0)


class Bare(torch.nn.Module):
    """A model without a `generate` of its own."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids):
        return self.inner(input_ids=input_ids).logits


def test_layers_that_share_keys_see_all_places():
    """Gemma 4 computes such layers at the last place alone where `generate` needs no other."""
    p, q = (
        tiny("gemma4_text", seed, num_hidden_layers=3, num_kv_shared_layers=1, global_head_dim=8, hidden_size_per_layer_input=8,
             vocab_size_per_layer_input=32, layer_types=["sliding_attention", "full_attention", "full_attention"])
        for seed in (0, 1)
    )  # fmt: skip
    loss = TokenLoss(causal(p, 32), causal(q, 32), divergence_named("reverse_kl"), probe=PROBE)
    rollouts = together(DATA)
    assert all(one.head is not None for one in loss.sides)
    torch.testing.assert_close(loss(q, rollouts), by_hand(p, q, rollouts, "reverse_kl"), rtol=1e-4, atol=1e-4)


def test_neighbours_in_a_batch_move_no_position():
    p, q = llama(0).eval(), llama(1).eval()
    loss = TokenLoss(causal(p), causal(q), divergence_named("reverse_kl"), probe=PROBE)
    rollouts = together([*DATA, {"prompt": [3] * 20, "completion": [4] * 20}])
    apart = [loss(q, rollouts.rows(k, k + 1)) for k in range(len(rollouts.ids))]
    torch.testing.assert_close(loss(q, rollouts), torch.stack(apart).sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dial", "ends"), [("jeffreys", ("reverse_kl", "forward_kl"))])
def test_a_dial_has_no_jump_at_its_ends(dial, ends):
    p, q = llama(0).eval(), llama(1).eval()

    def gradient(objective, **settings):
        loss = TokenLoss(causal(p), causal(q), row_divergence_of(objective), probe=PROBE, **settings)(q, together(DATA))
        return torch.cat([loss.detach().view(1), *(one.flatten() for one in torch.autograd.grad(loss, list(q.parameters())))])

    size = float(gradient(dial).abs().max())
    for end, name in zip((0, 1), ends, strict=True):
        near = gradient(f"{dial}:{abs(end - 1e-6)}")
        torch.testing.assert_close(near, gradient(name), rtol=0, atol=1e-5 * size)
        torch.testing.assert_close(near, gradient(f"{dial}:{end}"), rtol=0, atol=1e-5 * size)
    soft, hard = gradient("forward_kl"), gradient("forward_kl", hard_label_weight=1.0)
    for weight, known in ((1e-6, soft), (1 - 1e-6, hard)):
        torch.testing.assert_close(gradient("forward_kl", hard_label_weight=weight), known, rtol=0, atol=1e-5 * size)


def test_an_advantage_of_the_prefix_alone_is_audited_as_training_nothing():
    def by_advantage(student, teacher):
        """The log ratio summed over all tokens weighs its own chances: their mean score is 0."""
        log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
        advantage = (log_q.exp() * (log_q - log_p)).sum(-1).detach()
        return (advantage * (log_q.exp().detach() * log_q).sum(-1)).mean()

    result = wk.audit(by_advantage, claims="reverse_kl")
    assert not result.passed and "no_gradient" in result.wrong and "nothing can be learnt from it" in str(result)


def test_a_students_own_samples_are_no_labels(tmp_path):
    for prefixes in ({"student": 1.0}, {"data": 0.5, "teacher": 0.5}):
        with pytest.raises(wk.InputError, match="drawn tokens are no labels"):
            trained(tmp_path, prefixes=prefixes, hard_label_weight=1.0)
    with pytest.raises(wk.InputError, match="minimise forward_kl on drawn prefixes with text alone"):
        LanguageTrainer(teacher=None, student=llama(1), args=arguments(tmp_path), train_dataset=DATA, prefixes={"student": 1.0})


def test_an_end_token_that_is_also_padding_stays_in_the_loss():
    p, q = llama(0).eval(), llama(1).eval()
    assert q.config.pad_token_id == q.config.eos_token_id == 2
    rollouts = together([one.to_dict() for one in read_examples(DATA, None, 24, 2)])
    last = rollouts.ids.gather(1, rollouts.end[:, None] - 1)[:, 0]
    assert bool((last == 2).all()) and int(rollouts.drawn.sum()) == sum(len(one["completion"]) + 1 for one in DATA)
    loss = TokenLoss(causal(p), causal(q), divergence_named("forward_kl"), probe=PROBE)
    torch.testing.assert_close(loss(q, rollouts), by_hand(p, q, rollouts, "forward_kl"), rtol=1e-5, atol=1e-5)
    drawn = continued(causal(q), [[3, 4]] * 50, (2,), 6, 0)
    ended = ~drawn.cut
    assert bool(ended.any()) and bool((drawn.ids.gather(1, drawn.end[:, None] - 1)[ended] == 2).all())


def test_other_draws_before_a_step_change_nothing_of_it(tmp_path):
    steps = []
    for others in (0, 5):
        trainer = LanguageTrainer(
            teacher=llama(0), student=llama(1), args=arguments(tmp_path), train_dataset=DATA, max_new_tokens=6,
            prefixes={"data": 0.2, "student": 0.4, "teacher": 0.4},
        )  # fmt: skip
        batch = trainer.data_collator(trainer.train_dataset[:4])
        torch.rand(others)
        trainer.state.global_step = 3  # as after a resume
        steps.append(trainer.get_batch_samples(iter([batch, batch]), 2, torch.device("cpu"))[0])
    for one, other in zip(*steps, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"]) and torch.equal(one["end"], other["end"])
    assert not torch.equal(steps[0][0]["end"], steps[0][1]["end"])  # the same prompts twice, drawn apart
