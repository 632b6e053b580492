"""Teachers that aren't whole: stored laws, text alone, scores of tokens; right against the live teacher and enumeration."""

import hashlib
import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

import whichkl as wk
from programs import LANGUAGE, Program, whichkl
from test_sequence_kl import Table, saved
from whichkl._checks import IntegrityError
from whichkl.commands.capture import capture as capture_command
from whichkl.distillation import HeldOutLoss, StoredTeacher, TokenScores, capture
from whichkl.distillation.language import capture as capturing
from whichkl.distillation.language.causal import CausalModel
from whichkl.distillation.language.examples import read_examples, together
from whichkl.distillation.language.held_out_loss import held_out_loss
from whichkl.distillation.language.loading import load_examples
from whichkl.distillation.language.partial_losses import ScoreLoss, StoredLoss, TextLoss
from whichkl.distillation.language.token_loss import TokenLoss
from whichkl.distillation.losses import DIVERGENCES
from whichkl.distillation.losses.rows import divergence_named
from whichkl.files.saving import checksum

transformers = pytest.importorskip("transformers")
from test_language_trainer import (  # noqa: E402
    DATA,
    Chat,
    arguments,
    by_hand,
    causal,
    every_rollout,
    llama,
    log_rows,
    per_sequence,
    trained,
)
from whichkl.distillation import LanguageTrainer  # noqa: E402

D = torch.float64
EXAMPLES = read_examples(DATA, None, 24, 2)
ROLLOUTS = together([one.to_dict() for one in EXAMPLES])
PROBE = torch.tensor([[3, 4]])
COARSENS = [name for name, entry in DIVERGENCES.items() if entry.divergence.coarsens]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Captures of one teacher: all tokens, some, draws, and another temperature."""
    root, teacher = tmp_path_factory.mktemp("kept"), llama(0)
    ways = {"all": {"k": 24}, "some": {"k": 5}, "draws": {"draws": 50}, "warm": {"k": 24, "temperature": 2.0}}
    return {name: capture(teacher=teacher, data=DATA, folder=root / name, **way) for name, way in ways.items()}


def stored_loss(stored, student, divergence):
    student = causal(student.eval(), who="student")
    places = stored.lookup(EXAMPLES, None)
    return StoredLoss(stored, student, divergence_named(divergence), places, temperature=stored.temperature, probe=PROBE)


def values(loss, student, rollouts):
    """The loss of each token."""
    where = rollouts.drawn[:, 1:].nonzero()
    hidden = student.model(input_ids=rollouts.ids).last_hidden_state[where[:, 0], where[:, 1]]
    return loss.values(loss.asked(rollouts), hidden, rollouts.ids[rollouts.drawn])


def live_rows(student, rollouts, divergence, temperature=1.0):
    p, q, where = llama(0).eval(), student.eval(), rollouts.drawn[:, 1:].nonzero()
    rows = [one(input_ids=rollouts.ids).logits[where[:, 0], where[:, 1]] for one in (p, q)]
    how = {"temperature": temperature, "reduction": "none"}
    return DIVERGENCES[divergence].function(teacher=rows[0].detach(), student=rows[1], **how)


# ---- stored laws against the live teacher


@pytest.mark.parametrize("divergence", COARSENS)
def test_all_tokens_stored_are_the_live_teacher_in_value_and_gradient(kept, divergence):
    student, rollouts = llama(1).eval(), ROLLOUTS
    loss = stored_loss(kept["all"], student, divergence)
    assert loss.sides[1].head is not None
    found, known = loss(student, rollouts), by_hand(llama(0).eval(), student, rollouts, divergence)
    assert float(found.detach()) == pytest.approx(float(known.detach()), rel=1e-6)
    pairs = zip(torch.autograd.grad(found, student.parameters()), torch.autograd.grad(known, student.parameters()), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6 * float(other.abs().max()) + 1e-6)


def test_a_teacher_in_bfloat16_is_stored_as_it_trains(tmp_path):
    teacher, student = llama(0).to(torch.bfloat16).eval(), llama(1).eval()
    stored = capture(teacher=teacher, data=DATA, folder=tmp_path / "a", k=24)
    live = TokenLoss(causal(teacher), causal(student, who="student"), divergence_named("forward_kl"), probe=PROBE)
    assert live.sides[0].head is not None
    found, known = (loss(student, ROLLOUTS) for loss in (stored_loss(stored, student, "forward_kl"), live))
    assert float(found.detach()) == pytest.approx(float(known.detach()), rel=1e-6)


@pytest.mark.parametrize("divergence", COARSENS)
def test_some_tokens_are_a_lower_bound_of_every_row_and_never_below_zero(kept, divergence):
    student, rollouts = llama(1).eval(), ROLLOUTS
    found = values(stored_loss(kept["some"], student, divergence), student, rollouts).detach()
    known = live_rows(student, rollouts, divergence).detach()
    assert bool((found <= known + 1e-5).all()) and bool((found > -1e-6).all())
    assert float(found.sum()) > 0.1 * float(known.sum())


def test_another_temperature_is_stored_and_used(kept):
    student, rollouts = llama(1).eval(), ROLLOUTS
    found = values(stored_loss(kept["warm"], student, "reverse_kl"), student, rollouts)
    torch.testing.assert_close(found, live_rows(student, rollouts, "reverse_kl", 2.0), rtol=1e-4, atol=1e-5)


def test_draws_have_the_mean_of_the_live_teacher_in_value_and_gradient(tmp_path):
    student, rollouts = llama(1).eval(), ROLLOUTS
    many = [capture(teacher=llama(0), data=DATA, folder=tmp_path / str(seed), draws=20, seed=seed) for seed in range(30)]
    losses = [stored_loss(one, student, "forward_kl") for one in many]
    found = torch.stack([values(loss, student, rollouts).sum() for loss in losses]).detach()
    known = float(live_rows(student, rollouts, "forward_kl").sum().detach())
    assert abs(float(found.mean()) - known) < 4 * float(found.std()) / len(many) ** 0.5
    weight = student.lm_head.weight
    slopes = torch.stack([torch.autograd.grad(loss(student, rollouts), weight)[0] for loss in losses])
    (slope,) = torch.autograd.grad(live_rows(student, rollouts, "forward_kl").sum(), weight)
    z = (slopes.mean(0) - slope) / (slopes.std(0) / len(many) ** 0.5 + 1e-6)
    assert float(z.abs().max()) < 6 and float(z.square().mean().sqrt()) < 1.4


def test_a_teacher_without_a_plain_head_is_captured_from_its_logits(tmp_path):
    teacher = Table(3)
    data = [{"prompt": [1 + k % 4], "completion": [1 + k % 3, 2, 4 - k % 4]} for k in range(9)]
    stored = capture(teacher=teacher, data=data, folder=tmp_path / "a", k=3)
    examples = read_examples(data, None, 5, 0)
    rollouts = together([one.to_dict() for one in examples])
    rows = stored.rows(rollouts, stored.lookup(examples, None))
    where = rollouts.drawn[:, 1:].nonzero()
    law = teacher(rollouts.ids).log_softmax(-1)[where[:, 0], where[:, 1]].detach()
    torch.testing.assert_close(rows.log_probs, law.topk(3).values)
    torch.testing.assert_close(rows.log_rest.exp(), 1 - law.topk(3).values.exp().sum(-1), rtol=1e-4, atol=1e-6)
    held = rows.log_probs.exp().sum(-1)
    assert stored.manifest["mass"]["min"] < stored.manifest["mass"]["mean"] == pytest.approx(_mean_once(held, rollouts, examples))


def _mean_once(held, rollouts, examples):
    """The mean over distinct sequences, which are stored once."""
    at, seen = rollouts.drawn.nonzero()[:, 0], {}
    for row, one in enumerate(examples):
        seen.setdefault((tuple(one.prompt), tuple(one.completion)), held[at == row])
    return float(torch.cat(list(seen.values())).double().mean())


def test_the_rest_is_exact_where_it_is_far_below_rounding(tmp_path):
    teacher = Table(0)
    teacher.rows.data = torch.full_like(teacher.rows, -40.0)
    teacher.rows.data[..., 2] = 0.0
    stored = capture(teacher=teacher, data=[{"prompt": [1], "completion": [2]}], folder=tmp_path / "a", k=1)
    examples = read_examples([{"prompt": [1], "completion": [2]}], None, 5, 0)
    rows = stored.rows(together([one.to_dict() for one in examples]), stored.lookup(examples, None))
    torch.testing.assert_close(rows.log_rest, torch.full((2,), 4.0).log() - 40)


@pytest.mark.parametrize("way", ["all", "draws"])
def test_a_trainer_reads_stored_laws_in_any_order_and_cuts_completions(kept, tmp_path, way):
    changes = {"optim": "sgd", "max_steps": 4, "gradient_accumulation_steps": 2}
    found = trained(tmp_path / "a", teacher=kept[way], changes=changes, max_new_tokens=3, eval_dataset=DATA[:5])
    live = trained(tmp_path / "b", changes=changes, max_new_tokens=3, eval_dataset=DATA[:5])
    if way == "all":
        for one, other in zip(found.model.parameters(), live.model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert found.evaluate()["eval_loss"] == pytest.approx(live.evaluate()["eval_loss"], rel=1e-5)
    size = sum(one.numel() for one in live.model.parameters())
    assert live.flops == found.flops / 6 * 8 and found.flops % (6 * size) == 0  # no teacher was run


# ---- capture


def test_a_capture_of_several_shards_is_the_same_and_says_what_it_holds(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(capturing, "_TOKENS_PER_SHARD", 20)
    heard = []
    stored = capture(teacher=llama(0), data=DATA, folder=tmp_path / "a", k=5, tell=lambda step, done: heard.append(done))
    assert len(stored.manifest["shards"]) > 3 and heard == sorted(heard) and heard[-1] == 1
    rollouts = ROLLOUTS
    one, other = (x.rows(rollouts, x.lookup(EXAMPLES, None)) for x in (stored, kept["some"]))
    for name in ("log_probs", "log_rest"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name))
    distinct = {(tuple(x.prompt), tuple(x.completion)) for x in EXAMPLES}
    count = sum(len(y) for _, y in distinct)
    text = str(stored)
    assert f"the 5 likeliest of 24 tokens, and the rest's mass at temperature 1, after each of {count} tokens" in text
    mass = one.log_probs.exp().sum(-1)
    assert stored.manifest["sequences"] == len(distinct) and float(mass.min()) == pytest.approx(stored.manifest["mass"]["min"])


SHORT = [{"prompt": [1 + k % 4, 1 + k // 4], "completion": [1 + k % 3] * 5} for k in range(16)]
SCRIPT = """
import sys, time, torch
sys.path.insert(0, {tests!r})
from test_sequence_kl import Table, saved
from whichkl.distillation import capture
from whichkl.distillation.language import capture as capturing
capturing._TOKENS_PER_SHARD = 20
class Slow(Table):
    def forward(self, input_ids, attention_mask=None):
        time.sleep(0.3)
        return super().forward(input_ids)
capture(teacher=Slow(0), data={data!r}, folder={folder!r}, draws=7, seed=3)
"""


def same_shards(one, other):
    """Whether two captures hold the same numbers; the order of a file's metadata is the system's."""
    pairs = list(zip(one.manifest["shards"], other.manifest["shards"], strict=True))
    for a, b in pairs:
        first, second = (load((x.folder / y["file"]).read_bytes()) for x, y in ((one, a), (other, b)))
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    return one.manifest["mass"] == other.manifest["mass"] and len(pairs) > 2


def test_a_killed_capture_resumes_with_the_same_bytes(tmp_path, monkeypatch):
    folder = tmp_path / "killed"
    tests = str(Path(__file__).parent)
    program = Program("-c", SCRIPT.format(tests=tests, folder=str(folder), data=SHORT), loads=LANGUAGE)
    end = time.monotonic() + 120
    while not list(folder.glob("*/shard-00001*")):
        assert program.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    program.send_signal(signal.SIGKILL)
    program.wait()
    with pytest.raises(wk.InputError, match=r"no `teacher\.json` in it"):
        StoredTeacher.open(folder)
    monkeypatch.setattr(capturing, "_TOKENS_PER_SHARD", 20)
    asked, own = [], capturing._captured
    monkeypatch.setattr(capturing, "_captured", lambda *given: asked.append(len(given[2])) or own(*given))
    call = {"teacher": Table(0), "data": SHORT, "draws": 7, "seed": 3}
    resumed, count = capture(folder=folder, **call), len(asked)
    whole = capture(folder=tmp_path / "whole", **call)
    assert 0 < count == len(whole.manifest["shards"]) - 2
    assert same_shards(resumed, whole) and not list(folder.glob("**/.new-*"))
    capture(folder=folder, **call)
    assert len(asked) == count + len(whole.manifest["shards"])  # nothing was left to ask


def test_damaged_shards_are_asked_for_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(capturing, "_TOKENS_PER_SHARD", 20)
    call = {"teacher": llama(0), "data": DATA, "folder": tmp_path / "a", "k": 3}
    before = capture(**call)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before.folder, shard = tmp_path / "b", tmp_path / "a" / before.manifest["shards"][1]["file"]
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(IntegrityError, match="was cut short"):
        StoredTeacher.open(tmp_path / "a")
    assert same_shards(capture(**call), before) and "Its work is repeated" in caplog.text


OTHER = {
    "k": {"k": 4},
    "teacher": {"teacher": lambda: llama(7)},
    "text": {"data": DATA[:5]},
    "temperature": {"temperature": 1.5},
}


@pytest.mark.parametrize("changed", OTHER)
def test_a_folder_of_another_capture_is_left_alone(kept, changed):
    folder = kept["some"].folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    given = {"teacher": llama(0), "data": DATA, "k": 5, "folder": folder, **OTHER[changed]}
    given["teacher"] = given["teacher"] if isinstance(given["teacher"], torch.nn.Module) else given["teacher"]()
    with pytest.raises(wk.InputError, match="holds the capture of another teacher, text or setting"):
        capture(**given)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(wk.InputError, match=r"holds something else, `notes\.txt`"):
        capture(teacher=llama(0), data=DATA, folder=tmp_path)
    with pytest.raises(wk.InputError, match="it is a file"):
        capture(teacher=llama(0), data=DATA, folder=tmp_path / "notes.txt")
    assert [one.name for one in tmp_path.iterdir()] == ["notes.txt"]


class Broken(Table):
    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids) * torch.nan


BAD_CAPTURES = {
    "both": ({"k": 3, "draws": 3}, "stored in one way"),
    "none of k": ({"k": 0}, "between 1 and 32,767"),
    "too many": ({"k": 25}, "there are 24"),
    "no draws": ({"draws": -1}, "between 1 and 32,767"),
    "temperature": ({"temperature": 0.0}, "logits are divided by it"),
    "prompt": ({"data": [{"prompt": [3]}]}, "example 0 is a prompt without a completion"),
    "text": ({"data": ["abc"]}, "is text. Pass `tokenizer=`"),
    "empty": ({"data": []}, "there are none"),
    "teacher": ({"teacher": "gpt2"}, "not a torch.nn.Module"),
    "id": ({"data": [{"prompt": [3], "completion": [24]}]}, "isn't one of 24 tokens"),
    "completion": ({"data": [{"prompt": [3], "completion": 4}]}, "the completion of example 0 is of type `int`"),
    "words": ({"data": [{"prompt": [3], "completion": ["a"]}]}, "the completion of example 0 is a `list` of something else"),
    "tokenizer": ({"tokenizer": 3}, "it is a `int`, not a tokenizer"),
    "odd tokenizer": ({"tokenizer": Chat(), "data": ["abc"]}, r"the `Chat` has no `get_vocab\(\)`"),
    "no name": ({"folder": ""}, "it has no name"),
    "vocabulary": ({"vocabulary": 25}, "the vocabulary is of 25 tokens"),
    "NaN": ({"teacher": Broken(0), "data": [{"prompt": [3], "completion": [1]}], "k": 2}, "its logits are NaN"),
}


@pytest.mark.parametrize("case", BAD_CAPTURES)
def test_what_cannot_be_captured_is_refused(case, tmp_path):
    changed, message = BAD_CAPTURES[case]
    with pytest.raises(wk.InputError, match=message):
        capture(**{"teacher": llama(0), "data": DATA, "folder": tmp_path / "a", **changed})
    assert not (tmp_path / "a" / "teacher.json").exists()


def test_padding_is_left_out_by_the_number_of_tokens(tmp_path):
    wide = llama(3, tokens=40)
    stored = capture(teacher=wide, data=DATA, folder=tmp_path / "a", k=24, vocabulary=24)
    student, rollouts = llama(1).eval(), ROLLOUTS
    found = stored_loss(stored, student, "forward_kl")(student, rollouts)
    narrow = llama(3)
    narrow.load_state_dict({name: one[:24] if len(one) == 40 else one for name, one in wide.state_dict().items()})
    torch.testing.assert_close(found, by_hand(narrow.eval(), student, rollouts, "forward_kl"), rtol=1e-5, atol=1e-5)


# ---- what was stored is checked


def damaged(source, folder, change):
    """Copy a capture with a shard that was changed, and checksums that fit it."""
    shutil.copytree(source, folder)
    fields = json.loads((folder / "teacher.json").read_text())
    path = folder / fields["shards"][0]["file"]
    tensors = load(path.read_bytes())
    change(fields, tensors)
    data = save(tensors)
    path.write_bytes(data)
    fields["shards"][0] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    fields["checksum"] = checksum(fields)
    (folder / "teacher.json").write_text(json.dumps(fields))
    return folder


FORGED = {
    "NaN": (lambda fields, x: x["log_probs"].__setitem__((0, 0), torch.nan), "shard-00000.*holds NaN"),
    "above 1": (lambda fields, x: x["log_probs"].__setitem__((0, 0), 0.5), "holds a probability above 1"),
    "without its tail": (lambda fields, x: x["log_rest"].fill_(-torch.inf), "row 0 is no law"),
    "no tail": (lambda fields, x: x.pop("log_rest"), "it holds completion, ids"),
    "token": (lambda fields, x: x["indices"].__setitem__((0, 0), 24), "isn't one of 24"),
    "text": (lambda fields, x: x["ids"].__setitem__(0, 9), "its text isn't the one that was captured"),
    "rows": (lambda fields, x: x.update(completion=x["completion"] + 1), "don't fit each other"),
    "kind": (lambda fields, x: fields.update(k=6), "has .* numbers, not"),
    "version": (lambda fields, x: fields.update(format=9), "a newer version wrote it"),
    "elsewhere": (lambda fields, x: fields["shards"].append({**fields["shards"][0], "file": "/etc/hosts"}), "is no shard"),
    "type": (lambda fields, x: fields.update(temperature="warm"), "temperature is 'warm'"),
}


@pytest.mark.parametrize("case", FORGED)
def test_laws_that_cannot_be_are_refused_even_with_right_checksums(kept, case, tmp_path):
    change, message = FORGED[case]
    with pytest.raises(IntegrityError, match=message):
        StoredTeacher.open(damaged(kept["some"].folder, tmp_path / "a", change))


def test_draws_that_are_too_few_are_refused(kept, tmp_path):
    def fewer(fields, x):
        x["counts"][0] -= 1

    with pytest.raises(IntegrityError, match="row 0 is no law"):
        StoredTeacher.open(damaged(kept["draws"].folder, tmp_path / "a", fewer))


CHANGED = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "`shard-00000.*` was cut short"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b" "), "`shard-00000.*` was changed"),
    "bit": (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x07"), "`shard-00000.*` was changed: its SHA-256"),
    "missing": (lambda path: path.unlink(), "`shard-00000.*` is missing"),
    "manifest": (
        lambda path: (path.parents[1] / "teacher.json").write_text('{"k": 5}'),
        r"`teacher\.json` isn't what was captured: its checksum differs",
    ),
    "not JSON": (lambda path: (path.parents[1] / "teacher.json").write_text("k"), "it isn't JSON"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_changed_file_is_named(kept, case, tmp_path):
    change, message = CHANGED[case]
    shutil.copytree(kept["some"].folder, tmp_path / "a")
    change(tmp_path / "a" / kept["some"].manifest["shards"][0]["file"])
    with pytest.raises(IntegrityError, match=message) as caught:
        StoredTeacher.open(tmp_path / "a")
    assert "Run the same `capture` into this folder again" in str(caught.value)


def test_a_folder_without_a_stored_teacher_is_refused(tmp_path):
    with pytest.raises(wk.InputError, match="there is no such folder"):
        StoredTeacher.open(tmp_path / "a")
    with pytest.raises(wk.InputError, match=r"there is no `teacher\.json` in it"):
        StoredTeacher.open(tmp_path)


class Letters:
    """A tokenizer of single letters."""

    eos_token_id, special_tokens_map, chat_template = 2, {"eos_token": "|"}, None

    def __init__(self, shift=0):
        self.shift = shift

    def __len__(self):
        return 24

    def get_vocab(self):
        return {"|": 2, **{chr(97 + k): 3 + (k + self.shift) % 21 for k in range(21)}}

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [self.get_vocab()[one] for one in text]}


TEXTS = [{"prompt": "ab", "completion": "cd" * (1 + k % 3) + chr(97 + k)} for k in range(12)]


def test_another_tokenizer_and_another_text_are_refused(tmp_path):
    stored = capture(teacher=llama(0), tokenizer=Letters(), data=TEXTS, folder=tmp_path / "a", k=5)
    assert repr(StoredTeacher.open(tmp_path / "a", tokenizer=Letters())) == repr(stored)
    for other in (Letters(1), type("Odd", (Letters,), {"special_tokens_map": {"eos_token": "!"}})()):
        with pytest.raises(wk.InputError, match="captured with another tokenizer. Pass the tokenizer that `capture` had"):
            StoredTeacher.open(tmp_path / "a", tokenizer=other)
    given = {"teacher": stored, "student": llama(1), "args": arguments(tmp_path / "b")}
    with pytest.raises(wk.InputError, match="captured with another tokenizer"):
        LanguageTrainer(**given, train_dataset=TEXTS, processing_class=Letters(1))
    with pytest.raises(wk.InputError, match="example 1 isn't one of the 12 sequences that were captured"):
        changed = [TEXTS[0], {"prompt": "ab", "completion": "x"[:0] + "u"}]
        LanguageTrainer(**given, train_dataset=changed, processing_class=Letters())
    LanguageTrainer(**given, train_dataset=TEXTS, processing_class=Letters())


def test_ids_were_captured_without_a_tokenizer(kept):
    with pytest.raises(wk.InputError, match="captured as token ids, without a tokenizer"):
        StoredTeacher.open(kept["some"].folder, tokenizer=Letters())


# ---- text alone


def test_text_alone_is_its_cross_entropy(tmp_path):
    student, rollouts = llama(1).eval(), ROLLOUTS
    loss = TextLoss(causal(student, who="student"), divergence_named("forward_kl"), probe=PROBE)
    where = rollouts.drawn[:, 1:].nonzero()
    logits = student(input_ids=rollouts.ids).logits[where[:, 0], where[:, 1]]
    known = torch.nn.functional.cross_entropy(logits, rollouts.ids[rollouts.drawn], reduction="sum")
    torch.testing.assert_close(loss(student, rollouts), known, rtol=1e-5, atol=1e-5)
    changes = {"max_steps": 20, "learning_rate": 3e-2, "logging_steps": 20, "per_device_train_batch_size": 24}
    trainer = LanguageTrainer(
        teacher=None, student=student, args=arguments(tmp_path, **changes), train_dataset=DATA, eval_dataset=DATA
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before


# ---- scores of given tokens


def scores_of(model):
    def score(ids, mask):
        log_p, out = torch.zeros(ids.shape, dtype=D), model(ids)
        log_p[:, 1:] = getattr(out, "logits", out).double().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
        return log_p

    return TokenScores(score)


@pytest.mark.parametrize("credit", ["token", "sequence"])
def test_scores_give_the_gradient_of_the_reverse_kl_by_enumeration(credit):
    p, q = Table(0, 1.5).double(), Table(1, 1.5).double()
    rollouts = every_rollout([1])
    n = len(rollouts.ids)
    log_p, at_p, sequence = log_rows(p, rollouts)
    log_q, at_q, _ = log_rows(q, rollouts)
    chance = per_sequence(at_q, sequence, n).exp()
    if credit == "sequence":
        exact = (chance * per_sequence(at_q - at_p.detach(), sequence, n)).sum()
    else:
        rows = (log_q.exp() * (log_q - log_p.detach())).sum(-1)
        exact = (chance.detach() * per_sequence(rows, sequence, n)).sum()
    (known,) = torch.autograd.grad(exact, q.rows, retain_graph=True)
    student = CausalModel(q, "student")
    student.tokens = 5
    loss = ScoreLoss(scores_of(p), student, divergence_named("reverse_kl"), credit == "sequence", probe=torch.tensor([[1]]))
    mean = value = 0.0
    for k in range(n):  # each alone, so that there is no baseline
        one = loss(q, rollouts.rows(k, k + 1))
        mean, value = mean + chance[k].detach() * one, value + float((chance[k] * one).detach())
    (found,) = torch.autograd.grad(mean, q.rows)
    torch.testing.assert_close(found, known, rtol=0, atol=1e-10)
    truth = float((chance * per_sequence(at_q - at_p, sequence, n)).sum().detach())
    assert value == pytest.approx(truth, abs=1e-10)


@pytest.mark.parametrize("credit", ["token", "sequence"])
def test_the_baseline_of_scores_leaves_the_mean_gradient_as_it_is(credit):
    p, q = Table(0, 1.5).double(), Table(1, 1.5).double()
    rollouts = every_rollout([1])
    _, at_q, sequence = log_rows(q, rollouts)
    chance = per_sequence(at_q, sequence, len(rollouts.ids)).exp().detach()
    student = CausalModel(q, "student")
    student.tokens = 5
    loss = ScoreLoss(scores_of(p), student, divergence_named("reverse_kl"), credit == "sequence", probe=torch.tensor([[1]]))
    generator = torch.Generator().manual_seed(0)
    draws = torch.multinomial(chance, 600 * 4, replacement=True, generator=generator).view(600, 4)

    def gradient(rows):
        batch = type(rollouts)(rollouts.ids[rows], rollouts.begin[rows], rollouts.end[rows], rollouts.cut[rows])
        return torch.autograd.grad(loss(q, batch), q.rows)[0].flatten()

    known = 4 * sum(chance[k] * gradient(torch.tensor([k])) for k in range(len(chance)))
    # along random directions: single entries of the gradient have heavy tails
    ways = torch.randn(len(known), 5, generator=generator, dtype=D)
    slopes = torch.stack([gradient(rows) for rows in draws]) @ ways
    assert bool(((slopes.mean(0) - known @ ways).abs() < 4 * slopes.std(0) / 600**0.5).all())


def test_a_trainer_learns_from_scores_alone(tmp_path):
    teacher = llama(0).eval()
    prompts = [{"prompt": [3, 4 + k % 5]} for k in range(64)]
    ids = [one["prompt"] for one in prompts]
    before = wk.distillation.sequence_kl(teacher=teacher, student=llama(1), prompts=ids, max_new_tokens=8)
    changes = {"max_steps": 40, "per_device_train_batch_size": 32, "learning_rate": 2e-2}
    choice = {"objective": "reverse_kl", "prefixes": {"student": 1.0}, "credit": "sequence", "max_new_tokens": 8}
    trainer = trained(tmp_path, teacher=scores_of(teacher), data=prompts, changes=changes, **choice)
    after = wk.distillation.sequence_kl(teacher=teacher, student=trainer.model, prompts=ids, max_new_tokens=8)
    assert after.reverse_kl.value + 4 * after.reverse_kl.stderr < 0.7 * before.reverse_kl.value


SCORES = {
    "shape": (lambda ids, mask: torch.zeros(3), r"returned torch\.float32 \(3,\) for ids of shape"),
    "kind": (lambda ids, mask: [0.0], "returned a `list`"),
    "above": (lambda ids, mask: torch.full(ids.shape, 0.7), "has the log probability 0.7. Return log probabilities in nats"),
    "NaN": (lambda ids, mask: torch.full(ids.shape, torch.nan), "has the log probability nan"),
    "infinite": (lambda ids, mask: torch.full(ids.shape, -torch.inf), "the reverse KL is infinite"),
    "raises": (lambda ids, mask: 1 / 0, "ZeroDivisionError"),
}


@pytest.mark.parametrize("case", SCORES)
def test_scores_that_cannot_be_are_refused(case):
    score, message = SCORES[case]
    with pytest.raises(wk.InputError, match=message):
        TokenScores(score).of(ROLLOUTS)


# ---- what a teacher can't be asked


def refusals(kept):
    scores = scores_of(llama(0))
    student = {"prefixes": {"student": 1.0}}
    return {
        "stored on drawn": ({"teacher": kept["some"], **student}, "it has no laws after drawn tokens"),
        "stored mixed": ({"teacher": kept["some"], "prefixes": {"data": 0.5, "teacher": 0.5}}, "no laws after drawn tokens"),
        "stored warmer": ({"teacher": kept["warm"]}, "captured at temperature 2, and 1 needs .* Use temperature=2"),
        "stored adaptive": ({"teacher": kept["some"], "objective": "adaptive_kl"}, "merged tokens don't bound this divergence"),
        "draws reverse": ({"teacher": kept["draws"], "objective": "reverse_kl"}, "see nothing of what only the student writes"),
        "text reverse": (
            {"teacher": None, "objective": "reverse_kl"},
            "minimise reverse_kl with text alone: nobody can be asked",
        ),
        "text drawn": ({"teacher": None, **student}, "minimise forward_kl on drawn prefixes with text alone"),
        "text labels": ({"teacher": None, "hard_label_weight": 0.5}, "is the whole loss"),
        "text warm": ({"teacher": None, "temperature": 2.0}, "text has no other temperature"),
        "scores forward": ({"teacher": scores, **student}, "scores of given tokens give the log ratio"),
        "scores data": ({"teacher": scores, "objective": "reverse_kl"}, "Use objective='reverse_kl', prefixes="),
        "scores evaluation": (
            {"teacher": scores, "objective": "reverse_kl", **student, "eval_dataset": DATA},
            "only scores tokens",
        ),
        "a name": ({"teacher": "gpt2"}, "not a torch.nn.Module"),
        "ends": ({"teacher": kept["some"], "student": llama(1, eos_token_id=5)}, "end sequences by different tokens"),
        "width": ({"teacher": kept["some"], "student": llama(1, tokens=20)}, "it has 20 logits"),
        "fewer tokens": ({"teacher": kept["some"], "vocabulary": 20}, "captured over 24 tokens"),
        "both": ({"teacher": llama(0), "vocabulary": 23, "processing_class": Letters()}, "the tokenizer has 24 tokens"),
    }


CASES = list(refusals(dict.fromkeys(("some", "warm", "draws"))))


@pytest.mark.parametrize("case", CASES)
def test_what_a_teacher_cannot_be_asked_is_refused_with_the_way_out(kept, case, tmp_path):
    changed, message = refusals(kept)[case]
    with pytest.raises(wk.InputError, match=message):
        LanguageTrainer(**{"student": llama(1), "args": arguments(tmp_path), "train_dataset": DATA, **changed})


def test_scores_need_a_function():
    with pytest.raises(wk.InputError, match="not a function"):
        TokenScores(3)


def test_widths_that_differ_by_padding_need_the_number_of_tokens(tmp_path):
    given = {"teacher": llama(0), "student": llama(1, tokens=40), "args": arguments(tmp_path), "train_dataset": DATA}
    with pytest.raises(wk.InputError, match="or the number of tokens as `vocabulary=`"):
        LanguageTrainer(**given)
    assert LanguageTrainer(**given, vocabulary=24)._student.tokens == 24
    prompts = [[3], [4, 5]]
    found = wk.distillation.sequence_kl(teacher=llama(0), student=llama(0, tokens=40), prompts=prompts, vocabulary=24)
    assert found.forward_kl.value > 0


# ---- what is reported


def held_out(teacher, student, examples=EXAMPLES):
    q = causal(student.eval(), who="student")
    return held_out_loss(teacher, q, examples, ends=(2,), most=12, seed=0, tell=lambda done: None)


def test_held_out_numbers_of_stored_laws_are_those_of_the_live_teacher_clustered_by_prompt(kept):
    student, rollouts = llama(1).eval(), ROLLOUTS
    found = held_out(kept["all"], student)
    which = torch.tensor([hash(tuple(one.prompt)) for one in EXAMPLES])
    prompts = which.unique(return_inverse=True)[1][rollouts.drawn.nonzero()[:, 0]]
    tokens = torch.bincount(prompts).double()
    for name in ("forward_kl", "reverse_kl"):
        rows = live_rows(student, rollouts, name).detach().double()
        sums = torch.bincount(prompts, rows)
        estimate, ratio = getattr(found, name), float(sums.sum() / tokens.sum())
        assert estimate.value == pytest.approx(ratio, rel=1e-5)
        assert estimate.notes == ("the error rests on 7 distinct prompts, which are few",)
        error = float((sums - ratio * tokens).std() / tokens.mean() / len(tokens) ** 0.5)
        assert estimate.stderr == pytest.approx(error * 2.44691 / 1.959964, rel=1e-4)
    assert found.tokens == int(tokens.sum()) and found.prompts == len(tokens) == 7
    some, draws = (held_out(kept[name], student) for name in ("some", "draws"))
    assert 0 < some.forward_kl.value < found.forward_kl.value and "a lower bound" in some.forward_kl.notes[0]
    assert not some.forward_kl.reliable and some.nll.reliable and found.forward_kl.reliable
    assert draws.reverse_kl is None and draws.forward_kl.value == pytest.approx(found.forward_kl.value, rel=0.2)
    assert HeldOutLoss.from_dict(json.loads(json.dumps(some.to_dict()))) == some and "a lower bound" in str(some)


def test_held_out_numbers_of_text_and_of_scores():
    student = llama(1).eval()
    text = held_out(None, student)
    assert text.forward_kl.up_to == "entropy_p" and text.forward_kl.value == text.nll.value and text.reverse_kl is None
    examples = read_examples([{"prompt": [3, 4 + k]} for k in range(20)] * 6, None, 24, 2)
    scores = held_out(scores_of(llama(0).eval()), student, examples)
    known = wk.distillation.sequence_kl(
        teacher=llama(0), student=student, prompts=[one.prompt for one in examples[:20]], samples=8, max_new_tokens=12, seed=9
    ).reverse_kl
    assert scores.per == "sequence" and text.per == "token"
    assert abs(scores.reverse_kl.value - known.value) < 4 * (scores.reverse_kl.stderr + known.stderr)
    assert scores.forward_kl is None and scores.nll is None and scores.prompts == 20


WAYS = {
    "stored": lambda kept: ({"teacher": kept["some"]}, "forward_kl"),
    "text": lambda kept: ({"teacher": None}, "forward_kl, H(p) included"),
    "scores": lambda kept: (
        {"teacher": scores_of(llama(0)), "objective": "reverse_kl", "prefixes": {"student": 1.0}},
        "reverse_kl",
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_language_model_is_distilled_from_what_is_left_of_a_teacher(kept, way, tmp_path):
    given, name = WAYS[way](kept)
    result = wk.distillation.language_model(
        student=llama(1), data=DATA, held_out=0.3, max_new_tokens=6, args=arguments(tmp_path, max_steps=2), **given
    )
    assert isinstance(result.before, HeldOutLoss) and result.after.prompts == 2 and result.steps == 2
    text = str(result)
    assert f"  {name}" in text and f"nats a {'sequence' if way == 'scores' else 'token'}" in text and "held-out prompts" in text
    json.dumps(result.to_dict())


def test_errors_about_examples_name_them_as_the_user_knows_them(kept, tmp_path):
    data = [{"prompt": [4], "completion": [4, 4, 4]}, *DATA]
    with pytest.raises(wk.InputError, match="example 0 isn't one of the 24 sequences"):
        wk.distillation.language_model(teacher=kept["some"], student=llama(1), data=data, held_out=0.3)
    with pytest.raises(wk.InputError, match="held-out example 0 isn't one of the 24 sequences"):
        wk.distillation.language_model(teacher=kept["some"], student=llama(1), data=DATA, held_out=data[:2])
    path = tmp_path / "data.jsonl"
    for line, said in (
        ('{"promt": [3]}', "has 'promt', and no 'prompt'.* if you mean 'prompt'"),
        ('{"prompt": [3], "completions": [4]}', "has 'completions', and no 'completion'"),
        ('{"prompt": [3], "completion": [99]}', "has an id that isn't one of 24 tokens"),
        ('{"prompt": "a", "completion": [4]}', "is text"),
    ):
        path.write_text('{"prompt": [3], "completion": [4]}\n\n' + line)
        with pytest.raises(wk.InputError, match=f"line 3 of `.*data.jsonl` {said}"):
            read_examples(load_examples(str(path)), None, 24, 2)
    for name in ("data.csv", "data.parquet"):
        (tmp_path / name).write_text("prompt,completion\na,b\n")
        with pytest.raises(wk.InputError, match="it is a table.*Write a .jsonl"):
            load_examples(str(tmp_path / name))


def test_held_out_prompts_without_completions_are_refused():
    with pytest.raises(wk.InputError, match="some held-out examples are prompts without completions"):
        held_out(None, llama(1), read_examples([{"prompt": [3]}, *DATA], None, 24, 2))


# ---- the command line


def test_the_command_captures_and_verifies(tmp_path, capsys):
    teacher = saved(tmp_path / "p", 0)
    lines = ['{"prompt": "a b", "completion": "c a"}', '"c a b"', '{"prompt": "b a c", "completion": "b"}']
    (tmp_path / "data.jsonl").write_text("\n".join(lines * 2))
    given = {"teacher": str(teacher), "data": str(tmp_path / "data.jsonl"), "out": tmp_path / "out", "k": 2}
    options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    shown = whichkl("distill", "capture", *options, loads=LANGUAGE)
    assert shown.returncode == 0 and "the 2 likeliest of 6 tokens" in shown.stdout, shown.stderr
    assert "3 sequences, in 1 shard\n  3 more were given again" in shown.stdout and "Stored in" in shown.stdout
    whole = whichkl("verify", tmp_path / "out")
    assert whole.returncode == 0 and "stored teacher" in whole.stdout, whole.stderr
    path = next((tmp_path / "out").glob("*/shard-00000*"))
    path.write_bytes(path.read_bytes()[:-3])
    refused = whichkl("verify", tmp_path / "out")
    assert refused.returncode == 5 and "was cut short" in refused.stderr and "Traceback" not in refused.stderr
    capsys.readouterr()
    capture_command(**given, as_json=True)  # asks again
    again = json.loads(capsys.readouterr().out)
    assert again["tokens"] == 8 and again["k"] == 2 and len(again["shards"]) == 1
    for changed, said in (({"k": 9}, "there are 6. Use `k=6`, or fewer"), ({"draws": 5}, "a law is stored in one way")):
        with pytest.raises(wk.InputError, match=said):
            capture_command(**{**given, **changed})
