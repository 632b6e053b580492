"""Checks of how tokens are combined: reductions, masks, padding, shifts, labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whichkl._checks import InputError
from whichkl.distillation.audit.probes import VOCABULARY, one_row
from whichkl.distillation.audit.result import Check
from whichkl.distillation.audit.subject import Subject, some_labels

_LOGIT_OF_PADDING = -1e4


@dataclass(frozen=True)
class Reduction:
    """How the value scales with sequences, positions and tokens of the vocabulary: 0 for a mean, 1 for a sum."""

    name: str
    b: float
    t: float
    v: float

    def weight(self, factor: float, b: int, t: int, v: int) -> float:
        """Return what multiplies the divergence, from the factor of the sum in a call of these sizes."""
        return float(factor * float(b) ** (1 - self.b) * float(t) ** (1 - self.t) * float(v) ** (-self.v))


def shifted(subject: Subject, expected: int | None) -> Check:
    """Find where the logits of a label lie, and set `subject.shift`."""
    name = "causal shift"
    teacher, student = subject.pair(2, 6)
    mask = None
    if subject.adapter.masks:
        mask = torch.zeros(2, 6, dtype=torch.bool, device="cpu")
        mask[0, 3] = True
    moved = _moved(subject(teacher, student, mask).gradient)
    if moved == [(0, 2)]:
        subject.shift = 1
    elif moved != [(0, 3)]:
        if _moved(subject(teacher, student).gradient) == [(i, j) for i in range(2) for j in range(5)]:
            subject.shift = 1
    said = "labels are shifted by one inside: logits at t answer for the label at t + 1" if subject.shift else "no shift"
    if expected is not None and subject.shift != expected:
        change = "shift labels by one, once" if expected else "don't shift again what is aligned"
        return Check(name, "fail", said, change, "shift")
    if subject.shift and not subject.adapter.labels:
        return Check(name, "fail", "the mask, or the last row, is moved by one position", "use rows as they come", "shift")
    if mask is not None and moved not in ([(0, 2)], [(0, 3)]):
        return Check(name, "not applicable", f"one token that counts moves {len(moved)} rows")
    return Check(name, "pass", said)


def reduction(subject: Subject) -> tuple[Check, Reduction | None]:
    """Check how the value scales with the number of sequences, positions and tokens of the vocabulary."""
    generator = subject.generator()
    teacher, student = one_row(generator, 4, 8)
    s = subject.shift
    # the same labels everywhere, so that a part of the loss that reads them stays the same
    fixed = torch.zeros(4, 8, dtype=torch.long, device="cpu")
    sizes = ((2, 4), (4, 4), (2, 8))
    values = [subject(teacher[:b, :t], student[:b, :t], labels=fixed[:b, :t]) for b, t in sizes]
    wide = [
        torch.cat([x[:2, :4], torch.full((2, 4, VOCABULARY), _LOGIT_OF_PADDING, dtype=x.dtype, device="cpu")], -1)
        for x in (teacher, student)
    ]
    base, by_b, by_t = (one.value for one in values)
    by_v = subject(wide[0], wide[1], labels=fixed[:2, :4]).value
    if not 0 < abs(base) < float("inf"):
        return Check("reduction", "not applicable", "its value is 0 or infinite"), None
    b, t = _power(by_b / base, 2), _power(by_t / base, (8 - s) / (4 - s))
    v = _power(by_v / base, 2)
    names: dict[tuple[float, float], str] = {
        (0, 0): "mean over tokens",
        (1, 1): "sum",
        (1, 0): "sum of means of sequences",
        (0, 1): "sum over positions, mean over sequences",
    }
    name = "a number for each token" if values[0].rows else names.get((b, t), "")
    if v == -1:
        seen = "twice as many columns of probability 0 halve it: it's a mean over the vocabulary"
        change = "sum over the last axis first (with F.kl_div reduction='batchmean' on flat rows), then mean over tokens"
        return Check("reduction", "fail", seen, change, "mean_over_vocabulary"), Reduction(name + ", mean over v", b, t, v)
    if not name or v != 0:
        seen = f"doubled sequences, positions, columns change it {by_b / base:.3g}-, {by_t / base:.3g}-, {by_v / base:.3g}-fold"
        return Check("reduction", "fail", seen, "sum over the vocabulary; then a mean or a sum over tokens", "reduction"), None
    return Check("reduction", "pass", name), Reduction(name, b, t, 0)


def masked(subject: Subject, how: Reduction | None) -> list[Check]:
    """Check what a mask leaves out: finite logits, NaN and infinities, the count of tokens, whole batches."""
    names = ("mask", "count of tokens", "NaN in padding", "all masked", "other labels")
    if not subject.adapter.masks:
        return [Check(one, "not applicable", "this call leaves no tokens out") for one in names]
    teacher, student = subject.pair(3, 5)
    mask = torch.ones(3, 5, dtype=torch.bool, device="cpu")
    mask[0, 2:], mask[1, 4:] = False, False
    counts = mask.roll(-subject.shift, 1)  # the rows of logits that belong to labels that count
    if subject.shift:
        counts[:, -1] = False
    clean = subject(teacher, student, mask)
    full = subject(teacher, student)
    other = [torch.where(counts[..., None], x, x.flip(-1) * 5 + 1) for x in (teacher, student)]
    answer = subject(other[0], other[1], mask)
    checks = []
    if same(answer.value, clean.value) and not answer.gradient[~counts].any():
        checks.append(Check("mask", "pass", "other logits at masked tokens change nothing, and get no gradient"))
    else:
        ignored = same(clean.value, full.value)
        seen = "the mask changes nothing" if ignored else "logits at masked tokens move the loss"
        checks.append(Check("mask", "fail", seen, "leave masked tokens out before the mean", "mask_ignored"))
        rest = [Check(one, "not applicable", "the mask doesn't work") for one in names[1:4]]
        return [*checks, *rest, _labels(subject, teacher, student)]
    checks += [_count(subject, how), _nan(subject, teacher, student, mask, counts)]
    return [*checks, _all_masked(subject, teacher, student), _labels(subject, teacher, student)]


def _count(subject: Subject, how: Reduction | None) -> Check:
    name = "count of tokens"
    if how is None:
        return Check(name, "not applicable", "the reduction isn't known")
    teacher, student = one_row(subject.generator(), 2, 8)
    mask = torch.ones(2, 8, dtype=torch.bool, device="cpu")
    mask[:, 4:] = False
    fixed = torch.zeros(2, 8, dtype=torch.long, device="cpu")
    share = (4 - subject.shift) / (8 - subject.shift)
    ratio = subject(teacher, student, mask, labels=fixed).value / subject(teacher, student, labels=fixed).value
    if abs(ratio - (1 if how.t == 0 else share)) < 1e-4:
        return Check(name, "pass", "a mean over tokens that count" if how.t == 0 else "a sum over tokens that count")
    if how.t == 0 and abs(ratio - share) < 1e-4:
        seen = "the sum over tokens that count is divided by all tokens, padding too"
        return Check(name, "fail", seen, "divide by the number of tokens that count", "mean_counts_padding")
    return Check(name, "fail", f"a mask of half the equal tokens changes it {ratio:.3g}-fold", "divide by their number", "count")


def _nan(subject: Subject, teacher: Tensor, student: Tensor, mask: Tensor, counts: Tensor) -> Check:
    name, clean, broken = "NaN in padding", subject(teacher, student, mask), []
    for what, bad in (("NaN", float("nan")), ("inf", float("inf")), ("−inf", -float("inf"))):
        try:
            one, other = (torch.where(counts[..., None], x, bad) for x in (teacher, student))
            answer = subject(one, other, mask)
        except InputError:
            broken.append(f"{what} raises")
            continue
        if not same(answer.value, clean.value):
            broken.append(f"{what} reaches the value")
        elif not answer.gradient.isfinite().all():
            broken.append(f"{what} reaches the gradient")
    if broken:
        change = "fill masked logits with 0, or select rows, before the softmax: 0 · NaN is NaN"
        return Check(name, "fail", "; ".join(broken), change, "padding_leaks_nan", decides=False)
    return Check(name, "pass", "NaN and ±inf at masked tokens reach neither value nor gradient")


def _all_masked(subject: Subject, teacher: Tensor, student: Tensor) -> Check:
    name, change = "all masked", "divide by the count, but at least by 1, and keep the graph"
    try:
        answer = subject(teacher, student, torch.zeros(teacher.shape[:2], dtype=torch.bool, device="cpu"))
    except InputError as error:
        return Check(name, "fail", f"a batch of padding only raises: {error}", change, "all_masked", decides=False)
    if not answer.finite:
        seen = f"a batch of padding only gives {answer.value:.3g}, and poisons all weights"
        return Check(name, "fail", seen, change, "all_masked")
    if answer.value != 0 or answer.gradient.any():
        return Check(name, "fail", f"a batch of padding only gives {answer.value:.3g}", change, "all_masked")
    if not answer.graph:
        seen = "a batch of padding only gives a constant without a graph: backward() raises"
        return Check(name, "fail", seen, change, "all_masked", decides=False)
    return Check(name, "pass", "a batch of padding only gives 0, with a gradient of 0")


def _labels(subject: Subject, teacher: Tensor, student: Tensor) -> Check:
    if not subject.adapter.labels:
        return Check("other labels", "not applicable", "this call has no labels")
    values = [subject(teacher, student, labels=some_labels(student.shape, step)).value for step in (7, 11)]
    if same(*values):
        return Check("other labels", "pass", "labels say which tokens count, and nothing else")
    seen = f"other labels change it from {values[0]:.4g} to {values[1]:.4g}: it holds a cross-entropy with the labels"
    return Check("other labels", "fail", seen, "give that part weight 0, and audit the divergence alone", "depends_on_labels")


def _moved(gradient: Tensor) -> list[tuple[int, int]]:
    size = gradient.norm(dim=-1)
    return [(int(i), int(j)) for i, j in (size > 1e-9 * size.max()).nonzero()]


def _power(ratio: float, by: float) -> float:
    """0, 1 or −1 if the ratio is that power of `by`; else NaN."""
    return next((float(k) for k in (0, 1, -1) if abs(ratio / by**k - 1) < 1e-3), float("nan"))


def same(a: float, b: float) -> bool:
    """Whether two values are the same up to single precision."""
    return abs(a - b) <= 1e-5 * max(abs(a), abs(b), 1e-12)
