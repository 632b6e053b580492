"""How losses of any signature are called: by their arguments' names, as rows, as classes, and through functions of the user's."""

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import whichkl as wk
from whichkl._checks import InputError


def rows(teacher, student):
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def mean(values, mask):
    return (values * mask).sum() / mask.sum().clamp(min=1)


class OfClasses(nn.Module):
    """A classifier's loss, normalised over the second axis of rows (n, classes)."""

    def __init__(self, temperature=4.0):
        super().__init__()
        self.temperature = temperature

    def forward(self, y_s, y_t):
        log_q, p = F.log_softmax(y_s / self.temperature, dim=1), F.softmax(y_t / self.temperature, dim=1)
        return F.kl_div(log_q, p, reduction="batchmean") * self.temperature**2


class NeedsTemperature(OfClasses):
    def __init__(self, temperature):
        super().__init__(temperature)


def hinton(outputs, teacher_outputs, targets, alpha=0.3):
    return alpha * F.cross_entropy(outputs, targets) + (1 - alpha) * rows(teacher_outputs, outputs).mean()


def with_mask(name, body="mean(rows(teacher_logits, student_logits), {name})"):
    made = {}
    code = f"def loss(student_logits, teacher_logits, {name}): return {body.format(name=name)}"
    exec(code, {"mean": mean, "rows": rows}, made)  # noqa: S102
    return made["loss"]


MASKS = ("mask", "loss_mask", "attention_mask", "completion_mask", "response_mask", "padding_mask", "assistant_masks")


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_of_any_usual_name_is_passed(name):
    result = wk.audit(with_mask(name))
    assert result.passed and result.call == f"loss(student_logits=, teacher_logits=, {name}=)"
    assert next(one for one in result.checks if one.name == "mask").outcome == "pass"
    unused = wk.audit(with_mask(name, "rows(teacher_logits, student_logits).mean()"))
    assert unused.wrong == {"mask_ignored"}


def test_a_padding_mask_may_be_true_for_padding_and_no_other():
    inverted = "mean(rows(teacher_logits, student_logits), ~{name})"
    result = wk.audit(with_mask("padding_mask", inverted))
    assert result.passed and "the mask is True for padding" in result.call
    assert wk.audit(with_mask("loss_mask", inverted)).wrong == {"mask_inverted"}


def test_a_mask_of_numbers_is_passed_where_bool_is_refused():
    result = wk.audit(with_mask("mask", "mean(rows(teacher_logits, student_logits), 1 - (1 - {name}))"))
    assert result.passed and result.call.endswith("a mask of int64")


CALLED = {
    "two names": (lambda student_logits, teacher_logits: rows(teacher_logits, student_logits).mean(), {}, "mean over tokens"),
    "the other order": (lambda teacher_logits, logits: rows(teacher_logits, logits).mean(), {}, "mean over tokens"),
    "positional only": (lambda s, t, /: rows(t, s).mean(), {}, "mean over tokens"),
    "knobs by default": (lambda s, t, T=1.0: rows(t / T, s / T).mean(), {}, "mean over tokens"),
    "per token": (lambda student, teacher: rows(teacher, student), {}, "a number for each token"),
    "per token, flat": (lambda student, teacher: rows(teacher, student).flatten(), {}, "a number for each token"),
    "per sequence, means": (
        lambda student, teacher: rows(teacher, student).mean(1),
        {},
        "a number for each sequence, its mean over tokens",
    ),
    "per sequence, sums": (
        lambda student, teacher: rows(teacher, student).sum(1),
        {},
        "a number for each sequence, its sum over tokens",
    ),
    "a tuple": (lambda student, teacher: ({"kl": 1}, rows(teacher, student).mean()), {}, "mean over tokens"),
    "a dict": (
        lambda student, teacher: {"accuracy": torch.tensor(1.0), "loss": rows(teacher, student).mean()},
        {},
        "mean over tokens",
    ),
    "an object": (
        lambda student, teacher: type("Output", (), {"loss": rows(teacher, student).mean()})(),
        {},
        "mean over tokens",
    ),
    "an instance": (OfClasses(1.0), {"adapter": "rows"}, "mean over tokens"),
    "its own name": (partial(hinton, alpha=0.0), {}, "mean over tokens"),
    "rows by position": (
        lambda a, b, c: F.kl_div(a.log_softmax(1), b.softmax(1), reduction="batchmean") + 0 * F.cross_entropy(a, c),
        {"adapter": "rows"},
        "mean over tokens",
    ),
    "a function without a mask": (
        lambda a, b: rows(b, a).mean(),
        {"adapter": lambda loss, *, teacher, student: loss(student, teacher)},
        "mean over tokens",
    ),
    "a function that leaves its mask": (
        lambda a, b: rows(b, a).mean(),
        {"adapter": lambda loss, *, teacher, student, mask: loss(student, teacher)},
        "mean over tokens",
    ),
    "a function with labels": (
        partial(hinton, alpha=0.0),
        {
            "adapter": lambda loss, *, teacher, student, labels: loss(
                student.flatten(0, 1), teacher.flatten(0, 1), labels.flatten()
            )
        },
        "mean over tokens",
    ),
    "torch's, of logarithms": (
        nn.KLDivLoss(reduction="batchmean", log_target=True),
        {},
        "sum over positions, mean over sequences",
    ),
}


@pytest.mark.parametrize("name", CALLED)
def test_the_first_call_works(name):
    loss, options, reduction = CALLED[name]
    result = wk.audit(loss, **options)
    assert result.passed, str(result)
    assert result.identified.name == "forward_kl" and result.identified.reduction == reduction
    assert result.identified.weight == pytest.approx(1, abs=1e-3)


def test_classes_are_made_and_what_a_classifiers_loss_does_to_sequences_is_said():
    wrong = wk.audit(OfClasses)
    assert wrong.wrong == {"wrong_axis"} and 'adapter="rows"' in " ".join(str(wrong).split())
    right = wk.audit(OfClasses, adapter="rows")
    assert right.passed and (right.identified.temperature, right.identified.weight) == (4.0, pytest.approx(16))
    assert wk.audit(nn.KLDivLoss).wrong == {"mean_over_vocabulary"}
    mixed = wk.audit(hinton)
    assert mixed.identified.hard_labels == pytest.approx(0.3) and mixed.identified.weight == pytest.approx(0.7)
    assert mixed.passed and "of rows (n, v)" in mixed.call
    assert wk.audit(hinton, claims="forward_kl").wrong >= {"depends_on_labels", "not_zero_at_teacher"}


@pytest.mark.parametrize(("alpha", "temperature", "power"), [(0.5, 2.0, 2), (0.1, 4.0, 2), (0.9, 3.0, 2), (0.5, 4.0, 0)])
def test_the_loss_of_hinton_passes_without_options(alpha, temperature, power):
    def loss(student_logits, teacher_logits, labels):
        soft = F.kl_div(
            (student_logits / temperature).log_softmax(-1), (teacher_logits / temperature).softmax(-1), reduction="none"
        )
        soft = soft.sum(-1).mean() * temperature**power
        return alpha * F.cross_entropy(student_logits, labels) + (1 - alpha) * soft

    found = wk.audit(loss)
    assert found.wrong == frozenset(), str(found)
    assert found.identified.name == "forward_kl" and found.identified.temperature == pytest.approx(temperature, abs=1e-3)
    assert found.identified.hard_labels == pytest.approx(alpha, abs=1e-3)
    text = " ".join(str(found).split())
    assert f"{alpha:.4g} × the cross-entropy with them is added" in text
    assert ("factor T²: gradients keep" if power else "without the factor T²") in text


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (NeedsTemperature, "NeedsTemperature is a class, and without arguments it raises TypeError.*Pass an instance"),
        (lambda a, b: 0, "called as loss\\(teacher=, student=.*student_teacher, rows, labels"),
        (lambda student_log_probs, teacher_log_probs: 0, "the argument `student_log_probs` takes no logits"),
        (lambda hidden_student, hidden_teacher: 0, "the argument `hidden_student` takes no logits"),
        (lambda student, teacher, must: 0, "missing 1 required"),
        (nn.CrossEntropyLoss(), "called as loss"),
        (dict, "it returned|is a class"),
    ],
)
def test_what_cannot_be_called_says_why_and_what_to_pass(loss, said):
    with pytest.raises(InputError, match=said) as error:
        wk.audit(loss)
    assert re.fullmatch(r"Cannot [^:]+: .*\.", str(error.value).replace("\n", " "))


def test_two_grades_are_explained_where_they_are_found():
    both = str(wk.audit(with_mask("mask", "rows(teacher_logits, student_logits).mean()")))
    assert "\nwrong: " in both and "\nfragile: " in both
    none = str(wk.audit(wk.losses.forward_kl))
    assert "no finding" in none and "wrong" not in none and "fragile" not in none
