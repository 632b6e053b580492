"""Mutants: losses with one mistake each, of kinds found in published code, caught under its own name and no other."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import whichkl as wk
from test_audit import kl, logs, mean
from whichkl import losses as wl


def of_rows(rows):
    """A loss of teacher, student and mask from its rows: their mean over tokens that count."""

    def loss(*, teacher, student, mask=None):
        return mean(rows(teacher, student), mask)

    loss.__name__ = getattr(rows, "__name__", "loss")
    return loss


def of_probabilities(rows):
    return of_rows(lambda t, s: rows(t.softmax(-1), s.softmax(-1)))


def of_logs(rows):
    return of_rows(lambda t, s: rows(*logs(t, s)))


def reduced(combine):
    """A loss whose rows are those of forward KL, combined by `combine(rows, mask)`."""

    def loss(*, teacher, student, mask=None):
        mask = torch.ones(student.shape[:-1], dtype=torch.bool) if mask is None else mask
        return combine(wl.forward_kl(teacher=teacher.detach(), student=student, reduction="none"), mask)

    return loss


def forgot_log_target(student, teacher):
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none").sum(-1).mean()


def raw_logits(student, teacher):
    return F.kl_div(student, teacher, reduction="batchmean")


def square_root_of_difference(*, teacher, student, mask=None):
    return mean((teacher - student).sqrt().sum(-1), mask)


def kl_div_of_student(t, s):
    return F.kl_div(t.log_softmax(-1), s.softmax(-1), reduction="none").sum(-1)


def mixture_of_probabilities(p, q):
    m = (p + q) / 2
    return ((p * (p.log() - m.log())).sum(-1) + (q * (q.log() - m.log())).sum(-1)) / 2


def bhattacharyya(p, q):
    return -(p.sqrt() * q.sqrt()).sum(-1).log() * 2


def epsilon(p, q, e=1e-10):
    return (p * ((p + e).log() - (q + e).log())).sum(-1)


def clamped_probabilities(p, q):
    return (q * (q.clamp(min=1e-12).log() - p.clamp(min=1e-12).log())).sum(-1)


def with_dropout(t, s):
    return kl(*logs(t, F.dropout(s, 0.1)))


def noisy_teacher(t, s):
    return kl(*logs(t + 0.1 * torch.randn_like(t), s))


class Centred(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.centre = 0.0

    def forward(self, student, teacher):
        loss = kl(*logs(teacher, student)).mean()
        self.centre = 0.9 * self.centre + 0.1 * loss.detach()
        return loss - self.centre


def divides_teacher(t, s):
    return kl(*logs(t.div_(2.0), s / 2))


def centres_student(t, s):
    s -= s.detach().amax(-1, keepdim=True)
    return kl(*logs(t, s))


def clears_labels(student, teacher, labels):
    keep = labels != -100
    labels[~keep] = 0
    return (kl(*logs(teacher, student)) * keep).sum() / keep.sum().clamp(min=1)


def labels_and_teacher_itself(student, teacher, labels):
    log_p = teacher.log_softmax(-1)
    return 0.9 * kl(log_p, log_p).mean() + 0.1 * F.cross_entropy(student.flatten(0, 1), labels.flatten())


def student_with_itself(t, s):
    return kl(*logs(s.detach(), s)) + 0 * t.sum(-1)


def entropy_alone(t, s):
    log_q = s.log_softmax(-1)
    return -(log_q.exp() * log_q).sum(-1)


def over_axis(axis):
    def rows(t, s):
        return kl(t.log_softmax(axis), s.log_softmax(axis))

    return of_rows(rows)


def teacher_over_positions(t, s):
    return (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(-1))).sum(-1)


def over_everything(t, s):
    return kl(*(x.flatten().log_softmax(0).view_as(x) for x in (t, s)))


def squared_logits(t, s):
    return (t - s).square().mean(-1)


def student_not_normalised(t, s):
    return (t.softmax(-1) * (t.log_softmax(-1) - s)).sum(-1)


def weighted_by_largest_entropy(t, s):
    log_p, log_q = logs(t, s)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return kl(log_p, log_q) * entropy / entropy.mean()


def standardised_over_batch(t, s):
    return kl(*logs(t, (s - s.mean((0, 1))) / s.std((0, 1))))


def root_of_mean(*, teacher, student, mask=None):
    return mean(kl(*logs(teacher, student)), mask).sqrt()


def minus_infinity_at_padding(*, teacher, student, mask=None):
    log_p, log_q = logs(teacher, student)
    if mask is None:
        return kl(log_q, log_p).mean()
    log_q = log_q + mask.double().log()[..., None].to(log_q.dtype)
    return torch.nan_to_num(log_q.exp() * (log_q - log_p)).sum() / mask.sum().clamp(min=1)


def mask_upside_down(*, teacher, student, mask=None):
    return mean(kl(*logs(teacher, student)), None if mask is None else ~mask)


def other_name(*, teacher, student, loss_mask=None):
    return kl(*logs(teacher, student)).mean()


def mask_on_the_teacher(*, teacher, student, mask=None):
    log_p, log_q = logs(teacher, student)
    terms = log_p.exp() * (1 if mask is None else mask[..., None]) * log_p - log_p.exp() * log_q
    return terms.sum(-1).mean()


def truncated(t, s, k=20):
    log_p, log_q = logs(t, s)
    top = log_p.topk(k, -1)
    return (top.values.exp() * (top.values - log_q.gather(-1, top.indices))).sum(-1)


def truncated_at_student(t, s, k=8):
    log_p, log_q = logs(t, s)
    top = log_q.topk(k, -1)
    return (top.values.exp() * (top.values - log_p.gather(-1, top.indices))).sum(-1)


def renormalised(t, s, k=64, temperature=1.0):
    top = t.topk(k, -1)
    return kl(*logs(top.values / temperature, s.gather(-1, top.indices) / temperature))


def clipped_terms(log_p, log_q, clip=0.02):
    return (log_p.exp() * (log_p - log_q)).clamp(max=clip).sum(-1)


def sorted_probabilities(p, q):
    return (p.sort(-1).values - q.sort(-1).values).abs().sum(-1)


def cosine_of_logits(t, s):
    return 1 - F.cosine_similarity(t - t.mean(-1, keepdim=True), s - s.mean(-1, keepdim=True), dim=-1)


def k3_as_a_loss(log_p, log_q):
    r = log_q - log_p
    return (log_q.exp().detach() * (r + (-r).exp() - 1)).sum(-1)


def detached_weight(log_p, log_q):
    return (log_q.exp().detach() * (log_q - log_p)).sum(-1) + log_q.logsumexp(-1)


def detached_mixture(log_p, log_q):
    return kl(log_q, torch.logaddexp(log_p + math.log(0.9), log_q.detach() + math.log(0.1)))


def cross_entropy(log_p, log_q):
    return -(log_p.exp() * log_q).sum(-1)


def half_a_cross_entropy(log_p, log_q):
    return (cross_entropy(log_p, log_q) + kl(log_q, log_p)) / 2


def misaligned(t, s):
    return kl(*logs(t.roll(1, 1), s))


def hard_labels_too(student, teacher, labels):
    hard = F.cross_entropy(student.flatten(0, 1), labels.flatten(), ignore_index=-100)
    return 0.5 * hard + 0.5 * wl.jensen_shannon(teacher=teacher, student=student, temperature=0.9, mask=labels != -100)


def in_chunks(*, teacher, student, mask=None, chunk_size=4):
    whole = teacher.shape[1] // chunk_size * chunk_size or teacher.shape[1]
    rows = kl(*logs(teacher, student))[:, :whole]
    return rows.mean() if mask is None else (rows * mask[:, :whole]).sum() / mask.sum().clamp(min=1)


def first_sequence_dropped(*, teacher, student, mask=None):
    rows = kl(*logs(teacher, student))
    rows = torch.cat([0 * rows[:1], rows[1:]]) if len(rows) > 1 else rows
    return mean(rows, mask)


def moved_by_one(*, teacher, student, mask=None):
    mask = torch.ones(student.shape[:-1], dtype=torch.bool) if mask is None else mask
    rows = kl(*logs(teacher[:, :-1], student[:, :-1]))
    return (rows * mask[:, 1:]).sum() / mask[:, 1:].sum().clamp(min=1)


def narrow(t, s):
    return kl(t.bfloat16().log_softmax(-1), s.bfloat16().log_softmax(-1))


def narrow_heads(hidden, head, hidden_teacher, head_teacher, labels):
    with torch.autocast("cpu", torch.bfloat16):
        student, teacher = hidden.float() @ head.float().T, hidden_teacher.float() @ head_teacher.float().T
    return mean(kl(*logs(teacher.float(), student.float())), labels != -100)


def narrow_inside(log_p, log_q):
    return kl(log_p.half(), log_q.half()).float()


def zeroed_infinities(log_p, log_q):
    return torch.nan_to_num(log_p.exp() * (log_p - log_q), nan=0.0, posinf=0.0, neginf=0.0).sum(-1)


WRONG = {
    "forgot log_target": (forgot_log_target, "nan"),
    "kl_div of raw logits": (raw_logits, "nan"),
    "root of a difference": (square_root_of_difference, "nan"),
    "dropout": (of_rows(with_dropout), "random"),
    "a noisy teacher": (of_rows(noisy_teacher), "random"),
    "a running mean": (Centred, "state"),
    "student detached": (of_rows(lambda t, s: kl(*logs(t, s.detach()))), "no_gradient"),
    "nothing": (of_rows(lambda t, s: 0 * (t + s).sum(-1)), "no_gradient"),
    "labels, and the teacher with itself": (labels_and_teacher_itself, "no_gradient"),
    "labels alone": (lambda student, teacher, labels: F.cross_entropy(student.flatten(0, 1), labels.flatten()), "no_gradient"),
    "student with itself": (of_rows(student_with_itself), "no_gradient"),
    "entropy of the student": (of_rows(entropy_alone), "no_gradient"),
    "a top-1, renormalised": (of_rows(partial(renormalised, k=1)), "no_gradient"),
    "over positions": (over_axis(1), "wrong_axis"),
    "over sequences": (over_axis(0), "wrong_axis"),
    "the teacher over positions": (of_rows(teacher_over_positions), "wrong_axis"),
    "over everything": (of_rows(over_everything), "wrong_axis"),
    "squares of logits": (of_rows(squared_logits), "not_normalised"),
    "student not normalised": (of_rows(student_not_normalised), "not_normalised"),
    "weighted by mean entropy": (of_rows(weighted_by_largest_entropy), "rows_mixed"),
    "root of the mean": (root_of_mean, "rows_mixed"),
    "−inf at padding": (minus_infinity_at_padding, "nan_at_masked_tokens"),
    "mask upside down": (mask_upside_down, "mask_inverted"),
    "mask of another name": (other_name, "mask_ignored"),
    "mask on one term": (mask_on_the_teacher, "mask_ignored"),
    "rows over the square of the length": (reduced(lambda rows, mask: (rows * mask).sum() / mask.shape[1] ** 2), "reduction"),
    "mean counts padding": (reduced(lambda rows, mask: (rows * mask).mean()), "mean_counts_padding"),
    "count and one": (reduced(lambda rows, mask: (rows * mask).sum() / (mask.sum() + 1)), "reduction"),
    "nan when nothing counts": (reduced(lambda rows, mask: rows[mask].mean()), "all_masked"),
    "longest sequence": (reduced(lambda rows, mask: (rows * mask).sum() / mask.sum(1).max().clamp(min=1) / len(mask)), "split"),
    "remainder of chunks": (in_chunks, "chunks"),
    "first sequence dropped": (first_sequence_dropped, "rows_dropped"),
    "moved by one": (moved_by_one, "shift"),
    "clamped at 0, top-k of the student": (of_rows(lambda t, s: truncated_at_student(t, s).clamp(min=0)), "clamped"),
    "free bits": (of_logs(lambda p, q: (kl(p, q) - 0.05).relu()), "clamped"),
    "capped": (of_logs(lambda p, q: kl(p, q).clamp(max=3)), "clamped"),
    "sorted": (of_probabilities(sorted_probabilities), "zero_elsewhere"),
    "cosine": (of_rows(cosine_of_logits), "zero_elsewhere"),
    "truncated": (of_rows(truncated), "negative"),
    "clipped terms": (of_logs(clipped_terms), "negative"),
    "sign": (of_logs(lambda p, q: -kl(q, p)), "sign"),
    "cross-entropy": (of_logs(cross_entropy), {"cross_entropy", "not_zero_at_teacher"}),
    "half a cross-entropy": (of_logs(half_a_cross_entropy), {"cross_entropy", "not_zero_at_teacher"}),
    "k3": (of_logs(k3_as_a_loss), "gradient_of_another"),
    "detached mixture": (of_logs(detached_mixture), "gradient_of_another"),
    "one temperature": (of_rows(lambda t, s: kl(*logs(t / 2, s))), "not_zero_at_teacher"),
    "rows of the teacher moved": (of_rows(misaligned), "misaligned"),
    "T for T²": (of_rows(lambda t, s: 3 * kl(*logs(t / 3, s / 3))), "factor_t"),
    "T for T², sharp": (of_rows(lambda t, s: 0.1 * kl(*logs(t / 0.1, s / 0.1))), "factor_t"),
    "hard labels too": (hard_labels_too, {"all_masked"}),
    "renormalised top-k": (of_rows(renormalised), "renormalised_top_k"),
    "renormalised top-k, sharp": (of_rows(partial(renormalised, k=16, temperature=0.1)), "renormalised_top_k"),
    "renormalised top-k, flat": (of_rows(partial(renormalised, k=16, temperature=20.0)), "renormalised_top_k"),
}
FRAGILE = {
    "reverse by kl_div": (of_rows(kl_div_of_student), "nan_on_sure_rows", "reverse_kl"),
    "mixture of probabilities": (of_probabilities(mixture_of_probabilities), "nan_on_sure_rows", "jensen_shannon"),
    "roots of probabilities": (of_probabilities(bhattacharyya), "nan_on_sure_rows", "renyi"),
    "ε in the logarithm": (of_probabilities(epsilon), "wrong_on_sure_rows", "forward_kl"),
    "a larger ε": (of_probabilities(partial(epsilon, e=1e-6)), "wrong_on_sure_rows", "forward_kl"),
    "clamped probabilities": (of_probabilities(clamped_probabilities), "wrong_on_sure_rows", "reverse_kl"),
    "divides the teacher in place": (of_rows(divides_teacher), "writes_inputs", "forward_kl"),
    "centres the student in place": (of_rows(centres_student), "writes_inputs", "forward_kl"),
    "clears labels": (clears_labels, "writes_inputs", "forward_kl"),
    "batchmean of sequences": (torch.nn.KLDivLoss(reduction="batchmean"), "grows_with_length", "forward_kl"),
    "teacher not detached": (of_logs(kl), "teacher_gradient", "forward_kl"),
    "bfloat16 inside": (of_rows(narrow), "bf16_rounding", "forward_kl"),
    "products in bfloat16": (narrow_heads, "bf16_rounding", "forward_kl"),
    "float16 inside": (of_logs(narrow_inside), "padding_leaks_nan", "forward_kl"),
    "sums in the dtype given": (of_logs(kl), "bf16_rounding", "forward_kl"),
    "infinities zeroed": (of_logs(zeroed_infinities), "infinity_hidden", "forward_kl"),
    "NaN of padding": (of_logs(kl), "padding_leaks_nan", "forward_kl"),
    "0 · log 0": (of_logs(kl), "impossible_tokens", "forward_kl"),
}
ADAPTERS = {forgot_log_target: "student_teacher", raw_logits: "student_teacher", narrow_heads: "heads"}


def audited(loss):
    return wk.audit(loss, adapter=ADAPTERS.get(loss) if callable(loss) and not isinstance(loss, torch.nn.Module) else None)


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_caught_under_its_own_name_and_no_other_decides(name):
    loss, finding = WRONG[name]
    result = audited(loss)
    assert result.wrong == ({finding} if isinstance(finding, str) else finding), str(result)
    assert not result.passed
    for check in result.checks:
        assert (check.change != "") == (check.outcome == "fail")


@pytest.mark.parametrize("name", FRAGILE)
def test_what_breaks_at_an_edge_is_named_and_does_not_decide(name):
    loss, finding, divergence = FRAGILE[name]
    result = audited(loss)
    assert result.passed and finding in result.fragile, str(result)
    assert result.identified.name == divergence


def check_own(name, loss, temperature, weight=1.0, allowed=frozenset()):
    result = wk.audit(loss, claims=name)
    assert result.passed and result.findings <= allowed, str(result)
    found = result.identified
    assert (found.name, found.reduction) == (name, "mean over tokens")
    assert found.temperature == pytest.approx(temperature, rel=1e-2) and found.weight == pytest.approx(weight, rel=1e-2)


@pytest.mark.parametrize("name", wl.DIVERGENCES)
def test_no_loss_of_this_library_is_accused_at_the_ends_of_temperature(name):
    for temperature in (0.05, 100.0):
        loss = partial(wl.DIVERGENCES[name].function, temperature=temperature, temperature_squared=True)
        check_own(name, loss, temperature, temperature**2)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.05, 0.07, 0.1, 0.2, 0.3, 0.4, 0.7, 1.0, 1.5, 2.3, 3.0, 5.0, 8.0, 17.0, 50.0, 100.0])
@pytest.mark.parametrize("name", wl.DIVERGENCES)
def test_no_loss_of_this_library_is_accused_at_any_temperature_and_dtype(name, temperature):
    function = wl.DIVERGENCES[name].function
    check_own(name, partial(function, temperature=temperature), temperature)

    for dtype in (torch.float32, torch.bfloat16, torch.float16):

        def rounded(*, teacher, student, mask=None, dtype=dtype):
            return function(teacher=teacher.to(dtype), student=student.to(dtype), mask=mask, temperature=temperature)

        check_own(name, rounded, temperature, allowed={"teacher_gradient"})
