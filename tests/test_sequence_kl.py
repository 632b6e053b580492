"""Sequence KL: right against enumeration, with errors that hold, whatever the models' settings, which stay as they are."""

import copy
import itertools
import json
import math

import pytest
import torch
from torch import nn

import whichkl as wk
from programs import LANGUAGE, whichkl
from whichkl.distillation import SequenceKL, sequence_kl
from whichkl.distillation.language.causal import CausalModel
from whichkl.distillation.language.control_variate import PromptSums
from whichkl.distillation.language.loading import load_prompts
from whichkl.distillation.language.prompts import read_prompts
from whichkl.distillation.language.rollouts import continued
from whichkl.distillation.language.verdict import verdict_of

D = torch.float64
TOKENS, LENGTH, END = 5, 4, 0


class Table(nn.Module):
    """The next token's law depends on the last two tokens; the end token ends."""

    def __init__(self, seed, sharpness=1.0, near=None):
        super().__init__()
        rows = sharpness * torch.randn(TOKENS, TOKENS, TOKENS, generator=torch.Generator().manual_seed(seed))
        self.rows = nn.Parameter(rows if near is None else near.rows.detach() + rows)
        self.config = type("Config", (), {"eos_token_id": END})

    def forward(self, input_ids, attention_mask=None):
        before = torch.cat([torch.zeros_like(input_ids[:, :1]), input_ids[:, :-1]], 1)
        return self.rows[before, input_ids]


def sequences():
    """Every continuation of at most LENGTH tokens that ends with its end token, or is cut."""
    for length in range(1, LENGTH + 1):
        for one in itertools.product(range(TOKENS), repeat=length):
            if END not in one[:-1] and (one[-1] == END or length == LENGTH):
                yield one


def enumerated(p, q, prompt):
    """KL(p‖q) of the sequences, and the mean number of tokens, over all of them."""
    kl = tokens = 0.0
    for one in sequences():
        ids = torch.tensor([[*prompt, *one]])
        rows = slice(len(prompt) - 1, ids.shape[1] - 1)
        at = torch.tensor(one)
        log_p, log_q = (
            float(model(ids)[0, rows].double().log_softmax(-1).gather(1, at[:, None]).sum().detach()) for model in (p, q)
        )
        kl += math.exp(log_p) * (log_p - log_q)
        tokens += math.exp(log_p) * len(one)
    return kl, tokens


PROMPTS = [[1], [2], [3, 1], [4, 4, 2]]
PAIRS = {
    "near": lambda: (Table(0), Table(5, 0.2, Table(0))),
    "far": lambda: (Table(0, 2.0), Table(1, 2.0)),
    "sure": lambda: (Table(2, 4.0), Table(3, 1.0)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_both_directions_are_those_of_enumeration(pair):
    p, q = PAIRS[pair]()
    for prompt in PROMPTS:
        found = sequence_kl(teacher=p, student=q, prompts=[prompt] * 1_500, max_new_tokens=LENGTH)
        for one, per_token, sides in (
            (found.forward_kl, found.forward_kl_per_token, (p, q)),
            (found.reverse_kl, found.reverse_kl_per_token, (q, p)),
        ):
            kl, tokens = enumerated(*sides, prompt)
            assert abs(one.value - kl) < 4 * one.stderr < kl
            assert abs(per_token.value - kl / tokens) < 4 * per_token.stderr


@pytest.mark.parametrize(("prompts", "samples"), [(3, 500), (5, 1), (10, 20), (40, 1)])
def test_few_prompts_have_no_more_error_than_rao_blackwellisation(prompts, samples):
    p, q = PAIRS["far"]()
    given = [[1 + k % 4, 1 + k // 4 % 4, 1 + k // 16] for k in range(prompts)]
    repeats = max(6, 3_000 // (prompts * samples))
    index = torch.arange(prompts).repeat(samples)
    drawn = CausalModel(p, "teacher")
    drawn.tokens = TOKENS
    rows = parts_of(p, q, continued(drawn, given * samples * repeats, (END,), LENGTH, 5))
    truth = sum(enumerated(p, q, one)[0] for one in given) / prompts
    errors = []
    for part in zip(*(one.split(prompts * samples) for one in rows), strict=True):
        value = PromptSums(index, *part).per_sequence()[0]
        assert value >= 0
        errors.append((value - truth, float(part[0].mean()) - truth))
    mine, plain = torch.tensor(errors).square().mean(0).sqrt().tolist()
    assert mine <= 1.1 * plain


def test_a_prompt_that_is_given_again_is_no_independent_one():
    p, q = PAIRS["near"]()
    once, again = (
        sequence_kl(teacher=p, student=q, prompts=PROMPTS * times, samples=400 // times, max_new_tokens=LENGTH)
        for times in (1, 100)
    )
    assert once.forward_kl == again.forward_kl and once.measures == again.measures
    assert once.clusters == 4 and any("rests on 4 distinct prompts" in note for note in once.forward_kl.notes)
    assert any("rests on 4 distinct prompts" in doubt for doubt in verdict_of(once, again).doubts)
    many = sequence_kl(teacher=p, student=q, prompts=[[1, k % 5, k // 5] for k in range(25)], max_new_tokens=LENGTH)
    assert many.clusters == 25 and not any("distinct" in note for note in many.forward_kl.notes)


@pytest.mark.parametrize("repeats", [120, pytest.param(2_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("pair", ["near", "far"])
def test_intervals_cover(pair, repeats):
    p, q = PAIRS[pair]()
    truth, tokens = enumerated(p, q, PROMPTS[0])
    drawn = CausalModel(p, "teacher")
    drawn.tokens = TOKENS
    hits, hits_per_token, n = 0, 0, 60
    rollouts = continued(drawn, [PROMPTS[0]] * (n * repeats), (END,), LENGTH, 7)
    conditional, ratio, length = parts_of(p, q, rollouts)
    for k in range(repeats):
        rows = slice(n * k, n * (k + 1))
        sums = PromptSums(torch.arange(n), conditional[rows], ratio[rows], length[rows])
        for which, (value, error) in enumerate((sums.per_sequence(), sums.per_token())):
            hit = abs(value - truth / (tokens if which else 1)) < 1.96 * error
            hits, hits_per_token = hits + (hit and not which), hits_per_token + (hit and bool(which))
    least, most = (0.93, 0.97) if repeats > 1_000 else (0.95 - 3.5 * 0.02, 1.0)  # 3.5 binomial errors
    assert least <= hits / repeats <= most
    assert least <= hits_per_token / repeats <= most


def parts_of(p, q, rollouts):
    """Sums of conditional KLs and of log ratios, and lengths, of many rollouts."""
    logs = [model(rollouts.ids).detach().double().log_softmax(-1)[:, :-1] for model in (p, q)]
    drawn = rollouts.drawn[:, 1:].double()
    token = rollouts.ids[:, 1:, None]
    conditional = ((logs[0].exp() * (logs[0] - logs[1])).sum(-1) * drawn).sum(1)
    ratio = ((logs[0] - logs[1]).gather(2, token)[..., 0] * drawn).sum(1)
    return conditional, ratio, rollouts.end - rollouts.begin


@pytest.mark.parametrize("pair", PAIRS)
def test_the_variance_is_at_most_that_of_either_estimator(pair):
    for p, q in (PAIRS[pair](), PAIRS[pair]()[::-1]):
        drawn = CausalModel(p, "teacher")
        drawn.tokens = TOKENS
        rollouts = continued(drawn, [PROMPTS[0]] * 4_000, (END,), LENGTH, 3)
        conditional, ratio, length = parts_of(p, q, rollouts)
        sums = PromptSums(torch.arange(4_000), conditional, ratio, length)
        mine = sums.per_sequence()[1] ** 2 * 4_000
        assert mine <= 1.05 * min(float(conditional.var()), float(ratio.var()))


def test_where_rao_blackwellisation_loses_the_control_variate_wins():
    # p: ax or by, ½ each; q: a with 0.9, then x with 1/9; b with 0.1, then y surely. Plain Monte Carlo has variance 0.
    a, b, x, y = 1, 2, 3, 4

    def table(first, after_a):
        one = Table(0)
        rows = torch.full((TOKENS, TOKENS, TOKENS), -math.inf)
        rows[:, :, END] = 0.0
        rows[:, a], rows[:, b] = -math.inf, -math.inf
        rows[0, 0, [a, b]] = torch.tensor(first).log()
        rows[0, a, [x, y]] = torch.tensor(after_a).log()
        rows[0, b, y] = 0.0
        rows[0, 0, END] = -math.inf
        one.rows = nn.Parameter(rows)
        return one

    p, q = table([0.5, 0.5], [1.0, 0.0]), table([0.9, 0.1], [1 / 9, 8 / 9])
    found = sequence_kl(teacher=p, student=q, prompts=[[0]] * 100, max_new_tokens=3)
    assert found.forward_kl.value == pytest.approx(math.log(5), abs=1e-5) and found.forward_kl.stderr < 1e-5
    assert found.reverse_kl.value == math.inf and found.reverse_kl.finite == "infinite"
    assert "gives a possible token no chance" in found.reverse_kl.notes[-1]


def test_equal_models_have_no_divergence_and_narrow_ones_none_below_zero():
    p = Table(0)
    same = sequence_kl(teacher=p, student=p, prompts=PROMPTS, max_new_tokens=LENGTH)
    assert same.forward_kl.value == same.reverse_kl.value == 0.0 and same.agreement.value == 1.0
    narrow = sequence_kl(teacher=copy.deepcopy(p).bfloat16(), student=p, prompts=PROMPTS * 20, max_new_tokens=LENGTH)
    assert narrow.forward_kl.value > 0 and narrow.reverse_kl.value > 0


def test_nothing_of_the_users_changes_and_the_seed_fixes_everything():
    p, q = Table(0), Table(1)
    p.dropout = nn.Dropout(0.5)
    p.train()
    q.eval()
    state = torch.get_rng_state()
    first = sequence_kl(teacher=p, student=q, prompts=PROMPTS * 5, max_new_tokens=LENGTH)
    assert p.training and p.dropout.training and not q.training
    assert torch.equal(state, torch.get_rng_state())
    assert first == sequence_kl(teacher=p, student=q, prompts=PROMPTS * 5, max_new_tokens=LENGTH)
    assert first != sequence_kl(teacher=p, student=q, prompts=PROMPTS * 5, max_new_tokens=LENGTH, seed=1)
    assert SequenceKL.from_dict(json.loads(json.dumps(first.to_dict()))) == first
    assert "KL(teacher‖student)" in str(first) and len(repr(first)) < 300


def test_cut_draws_are_counted_and_called_a_lower_bound():
    found = sequence_kl(teacher=Table(0), student=Table(1), prompts=PROMPTS * 20, max_new_tokens=1)
    assert 0 < found.cut["teacher"] < 1
    for one in (found.forward_kl, found.reverse_kl):
        said = f"cut at 1 tokens: {one.quantity} is a lower bound of that of whole ones"
        assert not one.reliable and any(said in note for note in one.notes)


def test_a_model_that_is_moved_is_found_where_it_is():
    model = CausalModel(Table(0), "student")
    assert model.device.type == "cpu"
    model.module.to("meta")
    assert model.device.type == "meta"


class Wider(Table):
    """The same with columns that are no token."""

    def forward(self, input_ids, attention_mask=None):
        logits = super().forward(input_ids)
        return torch.cat([logits, torch.full((*logits.shape[:2], 3), 5.0)], -1)


class Words:
    """A tokenizer of five words."""

    eos_token_id, chat_template = END, None

    def __len__(self):
        return TOKENS

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [int(one) for one in text.split()]}


def test_widths_may_differ_by_padding():
    p, q = Table(0), Table(1)
    wide = Wider(1)
    texts = ["1", "2 3"] * 20
    plain = sequence_kl(teacher=p, student=q, tokenizer=Words(), prompts=texts, max_new_tokens=LENGTH)
    assert plain == sequence_kl(teacher=p, student=wide, tokenizer=Words(), prompts=texts, max_new_tokens=LENGTH)


class Ends(Table):
    def __init__(self, seed, end):
        super().__init__(seed)
        self.config = type("Config", (), {"eos_token_id": end})


class Flat(nn.Module):
    def forward(self, input_ids):
        return torch.zeros(3)


class Raises(nn.Module):
    def forward(self, input_ids):
        raise KeyError("no such layer")


REFUSED = {
    "no module": ({"teacher": 3}, "it is a `int`, not a torch.nn.Module"),
    "shape": ({"teacher": Flat()}, r"returned shape \(3,\)"),
    "raises": ({"student": Raises()}, "call the student: it raised KeyError"),
    "widths": ({"student": Wider(1)}, "which columns are padding only a tokenizer tells. Pass `tokenizer=`"),
    "narrow": ({"tokenizer": type("Many", (Words,), {"__len__": lambda self: 9})()}, "it has 5 logits, and the tokenizer has 9"),
    "end tokens": (
        {"student": Ends(1, 2)},
        "they end sequences by different tokens: the teacher's are 0 and the student's are 2",
    ),
    "no end token": ({"teacher": Ends(0, None), "student": Ends(1, None)}, "neither the models nor a tokenizer name the token"),
    "end beyond": ({"teacher": Ends(0, 7), "student": Ends(1, 7)}, "the end token 7 isn't one of the 5 tokens"),
    "text": ({"prompts": ["1", "2"]}, "prompt 0 is text. Pass `tokenizer=`"),
    "one text": ({"prompts": "1 2"}, "they are one `str`"),
    "a number": ({"prompts": 3}, "they are one `int`"),
    "none": ({"prompts": []}, "there are none"),
    "one prompt": ({"prompts": [[1]]}, "an error needs two prompts"),
    "empty prompt": ({"prompts": [[1], []]}, "prompt 1 has no token"),
    "an id too large": ({"prompts": [[1], [9]]}, "prompt 1 has the token 9, and there are 5 tokens"),
    "fractions": ({"prompts": [[1.5], [2]]}, "prompt 0 is a `list` of something else"),
    "chat": (
        {"prompts": [[{"role": "user", "content": "1"}]], "tokenizer": Words()},
        "prompt 0 is a conversation, and the tokenizer has no chat template",
    ),
    "no tokens": ({"max_new_tokens": 0}, "whole number of at least 1"),
    "samples": ({"samples": 1.5}, "isn't a whole number"),
    "seed": ({"seed": -1}, "whole number of at least 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compared_is_refused(case):
    changed, message = REFUSED[case]
    with pytest.raises(wk.InputError, match=f"Cannot .*{message}"):
        sequence_kl(**{"teacher": Table(0), "student": Table(1), "prompts": PROMPTS, **changed})


def test_prompts_are_read_from_arrays_and_tensors():
    ids = torch.tensor([[1, 2], [3, 4]])
    assert read_prompts(ids, None, 5) == read_prompts(ids.numpy(), None, 5) == [[1, 2], [3, 4]]


# ---- transformers

transformers = pytest.importorskip("transformers")


def test_completions_of_the_data_are_compared_too(tmp_path):
    p, q = PAIRS["near"]()
    data = [{"prompt": prompt, "completion": [1 + k % 4] * (1 + k % 3)} for k, prompt in enumerate(PROMPTS * 3)]
    found = sequence_kl(teacher=p, student=q, prompts=data, max_new_tokens=LENGTH)
    alone = sequence_kl(teacher=p, student=q, prompts=PROMPTS * 3, max_new_tokens=LENGTH)
    assert found.forward_kl == alone.forward_kl and "data_nll" not in alone.measures
    for model, one in ((p, found.measures["data_nll"].teacher), (q, found.measures["data_nll"].student)):
        total = tokens = 0.0
        for example in data:
            completion = [*example["completion"], END]
            rows = model(torch.tensor([[*example["prompt"], *completion]]))[0].double().log_softmax(-1)
            first = len(example["prompt"]) - 1
            total -= sum(float(rows[first + k, token].detach()) for k, token in enumerate(completion))
            tokens += len(completion)
        assert one.value == pytest.approx(total / tokens, rel=1e-5)
    assert SequenceKL.from_dict(found.to_dict()).measures == found.measures
    with pytest.raises(wk.InputError, match="no 'prompt' or 'messages'"):
        sequence_kl(teacher=p, student=q, prompts=[{"completion": [1]}] * 3)
    (tmp_path / "data.jsonl").write_text('{"prompt": [1], "completion": [2]}\n' * 2)
    assert load_prompts(str(tmp_path / "data.jsonl")) == [{"prompt": [1], "completion": [2]}] * 2
    (tmp_path / "data.jsonl").write_text('{"prompt": [1], "completion": [2]}\n{"prompt": [1]}\n')
    assert load_prompts(str(tmp_path / "data.jsonl")) == [[1]] * 2


def llama(seed, tokens=32, **settings):
    config = transformers.LlamaConfig(
        vocab_size=tokens, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=3, pad_token_id=3, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model


IDS = [[4 + (k * j) % 28 for j in range(1, 2 + k % 5)] for k in range(1, 41)]
ALTERED = {
    "repetition_penalty": 3.0, "min_p": 0.3, "suppress_tokens": [5, 6, 7], "top_k": 2, "temperature": 0.1,
    "no_repeat_ngram_size": 1, "forced_eos_token_id": 3,
}  # fmt: skip


def test_a_models_generation_settings_have_no_part_in_its_draws():
    plain = sequence_kl(teacher=llama(0), student=llama(1), prompts=IDS, max_new_tokens=8)
    altered = llama(0, **ALTERED)
    assert plain == sequence_kl(teacher=altered, student=llama(1, **ALTERED), prompts=IDS, max_new_tokens=8)
    assert all(getattr(altered.generation_config, name) == value for name, value in ALTERED.items())


def test_draws_by_generate_have_the_chances_of_the_softmax():
    model = CausalModel(llama(0, min_p=0.2), "teacher")
    model.tokens = 32
    n = 4_000
    rollouts = continued(model, [[5, 9, 4], [7]] * n, (3,), 1, 0)
    for row, prompt in enumerate(([5, 9, 4], [7])):
        ids = torch.tensor([prompt])
        chance = model.logits(ids, torch.ones_like(ids, dtype=torch.bool))[0, -1].double().softmax(-1)
        drawn = rollouts.ids[row::2].gather(1, rollouts.begin[row::2, None])[:, 0]
        seen = torch.bincount(drawn, minlength=32).double()
        # Pearson's statistic has mean 31 and variance 62 for 32 tokens
        assert float(((seen - n * chance).square() / (n * chance)).sum()) < 31 + 5 * math.sqrt(62)


def test_prompts_of_any_length_are_padded_without_a_trace():
    p, q = CausalModel(llama(0).eval(), "teacher"), CausalModel(llama(1).eval(), "student")
    p.tokens = q.tokens = 32
    rollouts = continued(p, IDS, (3,), 8, 0)
    together = p.logits(rollouts.ids, rollouts.mask)
    for row, (begin, end) in enumerate(zip(rollouts.begin.tolist(), rollouts.end.tolist(), strict=True)):
        alone = rollouts.ids[row : row + 1, :end]
        torch.testing.assert_close(
            p.logits(alone, torch.ones_like(alone, dtype=torch.bool))[0, begin - 1 :],
            together[row, begin - 1 : end],
            rtol=1e-4,
            atol=1e-5,
        )
        assert 3 not in alone[0, begin : end - 1].tolist()
        assert (int(alone[0, -1]) == 3) != bool(rollouts.cut[row])


def saved(folder, seed, words=("a", "b", "c")):
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = {"<s>": 0, "</s>": 1, "<unk>": 2, **{word: 3 + k for k, word in enumerate(words)}}
    tokenizer = Tokenizer(models.WordLevel(known, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = dict(zip(("bos_token", "eos_token", "unk_token"), known, strict=False))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)
    model = llama(seed, tokens=len(known))
    model.generation_config.eos_token_id = model.config.eos_token_id = 1
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)


def test_the_command_compares_two_folders(tmp_path):
    teacher, student = saved(tmp_path / "p", 0), saved(tmp_path / "q", 1)
    (tmp_path / "prompts.txt").write_text("a b\nc\n\nb a c\n" * 5)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a b"}\n"c"\n{"prompt": "b a c"}\n' * 5)
    command = ("estimate", "--teacher", teacher, "--student", student, "--max-new-tokens", "6", "--prompts")
    shown = whichkl(*command, tmp_path / "prompts.txt", loads=LANGUAGE)
    assert shown.returncode == 0 and "forward_kl KL(teacher‖student)" in shown.stdout, shown.stderr
    found = [json.loads(whichkl(*command, tmp_path / name, "--json").stdout) for name in ("prompts.txt", "prompts.jsonl")]
    assert found[0]["forward_kl"] == found[1]["forward_kl"] and found[0]["prompts"] == 15
    bare = [str(tmp_path / name) for name in ("bare p", "bare q")]
    for seed, folder in enumerate(bare):
        llama(seed).save_pretrained(folder)
    without = ("estimate", "--teacher", bare[0], "--student", bare[1], "--prompts")
    (tmp_path / "ids.jsonl").write_text("[4, 5]\n[6]\n" * 5)
    by_ids = whichkl(*without, tmp_path / "ids.jsonl", "--max-new-tokens", "6", "--json")
    assert by_ids.returncode == 0 and json.loads(by_ids.stdout)["prompts"] == 10, by_ids.stderr
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"question": "b"}\n')
    other = saved(tmp_path / "other", 1, ("b", "a", "c"))
    for arguments, said in (
        ((*command, tmp_path / "bad.jsonl"), "line 2 has neither `prompt` nor `messages`"),
        ((*command, tmp_path / "none.txt"), "no such file"),
        ((*without, tmp_path / "prompts.txt"), "is text. Pass `tokenizer=`"),
        ((*without[:4], student, "--prompts", tmp_path / "ids.jsonl"), "the teacher's has none"),
        (("estimate", "--teacher", teacher), "`--student` is missing"),
        (("estimate", "--p", "Normal(0,1)"), "`--q` is missing"),
        ((*command[:4], other, *command[5:], tmp_path / "prompts.txt"), "2 tokens have other ids, such as 'a' is 3 and 4"),
        ((*command[:4], tmp_path / "nothing", *command[5:], tmp_path / "prompts.txt"), "there is no such folder"),
    ):
        refused = whichkl(*arguments)
        assert refused.returncode in (2, 4) and said in refused.stderr.lower() + refused.stderr, refused.stderr
        assert "Traceback" not in refused.stderr
