"""LanguageTrainer under what users ask of transformers' Trainer: it works as there, or is refused."""

import math

import pytest
import torch

import whichkl as wk
from whichkl.distillation.language.examples import together
from whichkl.distillation.language.token_loss import TokenLoss
from whichkl.distillation.losses import DIVERGENCES
from whichkl.distillation.losses.rows import divergence_named

transformers = pytest.importorskip("transformers")
from test_language_trainer import DATA, arguments, causal, llama, trained  # noqa: E402
from whichkl.distillation import LanguageTrainer  # noqa: E402


def losses(trainer, name="loss"):
    return [one[name] for one in trainer.state.log_history if name in one]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The losses of a run without anything special."""
    return losses(trained(tmp_path_factory.mktemp("plain"), max_new_tokens=6))


class Stops(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == 2


WORKS = {
    "worker processes": {"changes": {"dataloader_num_workers": 1}},
    "activation checkpointing": {"changes": {"activation_checkpointing": True}},
    "arguments that say nothing": {"data_collator": None, "compute_metrics": None},
}


@pytest.mark.parametrize("case", WORKS)
def test_what_should_change_nothing_changes_nothing(case, plain, tmp_path):
    assert losses(trained(tmp_path, max_new_tokens=6, **WORKS[case])) == pytest.approx(plain, rel=1e-5)


@pytest.mark.slow
def test_a_compiled_student_is_trained_as_another(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # torch's compiler switches it off
    changes = {"torch_compile": True, "torch_compile_backend": "eager"}
    assert losses(trained(tmp_path, max_new_tokens=6, changes=changes)) == pytest.approx(plain, rel=1e-5)


def test_a_stream_is_trained_on_as_the_list_of_its_examples(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            for k in range(10_000):  # more than are needed
                assert k < 40
                yield DATA[k % len(DATA)]

    given = {"prefixes": {"data": 0.5, "student": 0.5}, "max_new_tokens": 6}
    known = trained(tmp_path, changes={"train_sampling_strategy": "sequential"}, **given)
    assert losses(trained(tmp_path, data=Stream(), **given)) == losses(known)


@pytest.mark.slow  # it collects garbage at every attempt
def test_a_batch_that_is_too_large_for_the_memory_is_halved(tmp_path, monkeypatch):
    sizes, whole = [], LanguageTrainer.compute_loss

    def scarce(self, model, inputs, *others, **more):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise RuntimeError("CUDA out of memory.")
        return whole(self, model, inputs, *others, **more)

    monkeypatch.setattr(LanguageTrainer, "compute_loss", scarce)
    trainer = trained(tmp_path, changes={"auto_find_batch_size": True})
    assert sizes[0] == 4 and set(sizes[-3:]) <= {1, 2} and trainer.state.global_step == 3


def test_callbacks_schedules_and_optimisers_are_transformers_own(tmp_path):
    changes = {"max_steps": 4, "optim": "adafactor", "lr_scheduler_type": "cosine"}
    changes |= {"include_num_input_tokens_seen": "non_padding"}
    trainer = trained(tmp_path, changes=changes, callbacks=[Stops()])
    assert trainer.state.global_step == 2
    assert losses(trainer, "learning_rate") == pytest.approx([1e-2 * (1 + math.cos(math.pi * k / 4)) / 2 for k in (0, 1)])
    lengths = [1 + k % 6 + 1 + 2 for k in range(24)]  # completions, end tokens, prompts
    assert 8 * min(lengths) < trainer.state.num_input_tokens_seen < 8 * max(lengths)
    assert type(trainer.optimizer.optimizer).__name__ == "Adafactor"


def test_evaluations_by_name_during_training_choose_the_best_checkpoint(tmp_path):
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "eval_on_start": True}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_two_loss", "learning_rate": 5.0, "optim": "sgd"}
    held_out = {"one": DATA[:5], "two": DATA}
    trainer = trained(tmp_path, eval_dataset=held_out, changes={**every, **best})
    seen = losses(trainer, "eval_two_loss")
    assert len(seen) == 4 and trainer.state.best_metric == min(seen[1:])
    assert trainer.evaluate()["eval_two_loss"] == pytest.approx(min(seen[1:]), rel=1e-6)
    for data, name in ((DATA, "two"), (DATA[:5], "one")):  # the end token is added here too
        assert trainer.evaluate(data)["eval_loss"] == trainer.evaluate()[f"eval_{name}_loss"]
        assert trainer.predict(data).metrics["test_loss"] == trainer.evaluate(data)["eval_loss"]
    with pytest.raises(wk.InputError, match="have no completion"):
        trainer.evaluate([{"prompt": [3]}])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("narrow", ["teacher", "student", "both"])
def test_narrow_models_never_have_a_negative_divergence(narrow, autocast):
    p, q = llama(0).eval(), llama(0).eval()  # as near as rounding lets them be
    p, q = (one.bfloat16() if narrow in (who, "both") else one for one, who in ((p, "teacher"), (q, "student")))
    for name in ("forward_kl", "reverse_kl", "jeffreys", "renyi"):
        loss = TokenLoss(causal(p), causal(q), divergence_named(name), probe=torch.tensor([[3, 4]]))
        for one in DATA[:6]:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found = loss(q, together([one])).detach()
            assert found.dtype == torch.float32 and 0 <= float(found) < 0.1
    assert name in DIVERGENCES


@pytest.mark.parametrize("model", ["trainer", "teacher", "student", "both"])
def test_training_in_bfloat16_learns(model, plain, tmp_path):
    sides = {who: llama(seed).bfloat16() for seed, who in enumerate(("teacher", "student")) if model in (who, "both")}
    trainer = trained(tmp_path, max_new_tokens=6, changes={"bf16": model == "trainer"}, **sides)
    assert losses(trainer) == pytest.approx(plain, rel=0.05)  # seven bits of the weights and of Adam's steps


def test_a_loss_that_is_not_a_number_is_shown(tmp_path):
    student = llama(1)
    with torch.no_grad():
        student.model.norm.weight[0] = math.nan
    assert all(math.isnan(one) for one in losses(trained(tmp_path, student=student)))


def test_threads_of_one_process_share_no_student(tmp_path):
    args = arguments(tmp_path)
    assert args.n_gpu <= 1
    args._n_gpu = 2  # as on a machine of two
    trainer = LanguageTrainer(teacher=llama(0), student=llama(1), args=args, train_dataset=DATA)
    assert trainer.args.n_gpu == 1 and args.n_gpu == 2 and trainer.args.train_batch_size == 4


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield DATA[0]


class Empty(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([])


class Alone(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([{"prompt": [3]}])


REFUSED = {
    "model": ({"model": llama(0)}, "use `model=` here: the student is the model that is trained. Pass it as `student=`"),
    "model_init": ({"model_init": lambda: llama(0)}, "use `model_init=` here"),
    "collator": ({"data_collator": list}, "use `data_collator=` here: examples are padded here"),
    "loss": ({"compute_loss_func": print}, "the loss is a divergence of the teacher. Pass a RowDivergence"),
    "metrics": ({"compute_metrics": print}, "use `compute_metrics=` here: an evaluation keeps no logits"),
    "smoothing": ({"changes": {"label_smoothing_factor": 0.1}}, "use this `label_smoothing_factor`: the teacher's laws"),
    "by length": ({"changes": {"train_sampling_strategy": "group_by_length"}}, "use this `train_sampling_strategy`: lengths"),
    "no arguments": ({"args": {"max_steps": 3}}, "use these `args`: they are a `dict`"),
    "stream without steps": ({"train_dataset": Endless(), "changes": {"max_steps": -1}}, "`max_steps` isn't set"),
    "empty stream": ({"train_dataset": Empty()}, "train on this stream: it is empty"),
    "stream of prompts": ({"train_dataset": Alone()}, "some examples are prompts without completions"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_meaning_here_is_refused(case, tmp_path):
    given, message = REFUSED[case]
    given = dict(given)
    args = arguments(tmp_path, **given.pop("changes", {}))
    with pytest.raises(wk.InputError, match=f"Cannot .*{message}"):
        LanguageTrainer(**{"teacher": llama(0), "student": llama(1), "args": args, "train_dataset": DATA, **given})


def test_other_examples_are_evaluated_where_they_are_stored(tmp_path):
    stored = wk.distillation.capture(teacher=llama(0), data=DATA, folder=tmp_path / "stored", k=24)
    trainer = trained(tmp_path / "out", teacher=stored, data=DATA[:12], changes={"max_steps": 1})
    live = trained(tmp_path / "out", data=DATA[:12], changes={"max_steps": 1})
    assert trainer.evaluate(DATA[12:])["eval_loss"] == pytest.approx(live.evaluate(DATA[12:])["eval_loss"], rel=1e-5)
    with pytest.raises(wk.InputError, match="example 0 isn't one of the 24 sequences that were captured"):
        trainer.evaluate([{"prompt": [3], "completion": [9]}])


def test_a_stream_is_refused_where_its_examples_are_looked_up_first(tmp_path):
    stored = wk.distillation.capture(teacher=llama(0), data=DATA, folder=tmp_path / "stored", k=3)
    with pytest.raises(wk.InputError, match="train on this stream: a stored teacher's examples are looked up first"):
        LanguageTrainer(teacher=stored, student=llama(1), args=arguments(tmp_path), train_dataset=Endless())


@pytest.mark.parametrize(
    ("name", "said"), [("objectiv", "Use `objective=`"), ("optimiser", "Use `optimizers=`"), ("zzz", "Leave")]
)
def test_an_argument_that_no_trainer_takes_is_refused(name, said, tmp_path):
    with pytest.raises(wk.InputError, match=f"Cannot use `{name}=`: no trainer takes such an argument. {said}"):
        LanguageTrainer(teacher=llama(0), student=llama(1), args=arguments(tmp_path), train_dataset=DATA, **{name: 1})
