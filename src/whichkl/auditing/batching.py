"""Checks of how tokens are put together: reductions, masks, padding, shifts, accumulation, chunks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from whichkl._checks import InputError
from whichkl.auditing.calling import Subject, some_labels
from whichkl.auditing.identify import Nature
from whichkl.auditing.matching import total
from whichkl.auditing.probes import VOCABULARY, one_row, pair
from whichkl.auditing.result import Check

_PADDING = -1e4
CHUNKS = ("chunk_size", "chunk", "chunks", "num_chunks", "num_output_chunks", "n_chunks")


@dataclass(frozen=True)
class Reduction:
    """How the value goes with sequences, positions and tokens of the vocabulary: 0 where it's a mean, 1 where it's a sum."""

    name: str
    b: float
    t: float
    v: float

    def weight(self, factor: float, b: int, t: int, v: int) -> float:
        """What multiplies the divergence, from the factor of the sum in a call of these sizes."""
        return float(factor * float(b) ** (1 - self.b) * float(t) ** (1 - self.t) * float(v) ** (-self.v))


def shifted(subject: Subject, seed: int, expected: int | None) -> Check:
    """Where the logits of a label lie; sets `subject.shift`."""
    name = "causal shift"
    teacher, student = pair(torch.Generator().manual_seed(seed), 2, 6)
    mask = None
    if subject.adapter.masks:
        mask = torch.zeros(2, 6, dtype=torch.bool)
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


def reduction(subject: Subject, seed: int) -> tuple[Check, Reduction | None]:
    """How the value goes with the number of sequences, positions and tokens of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    teacher, student = one_row(generator, 4, 8)
    s = subject.shift
    same = torch.zeros(4, 8, dtype=torch.long)  # labels, so that a part of the loss that reads them stays the same, too
    sizes = ((2, 4), (4, 4), (2, 8))
    values = [subject(teacher[:b, :t], student[:b, :t], labels=same[:b, :t]) for b, t in sizes]
    wide = [torch.cat([x[:2, :4], torch.full((2, 4, VOCABULARY), _PADDING, dtype=x.dtype)], -1) for x in (teacher, student)]
    base, by_b, by_t = (one.value for one in values)
    by_v = subject(wide[0], wide[1], labels=same[:2, :4]).value
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


def masked(subject: Subject, seed: int, how: Reduction | None) -> list[Check]:
    """What a mask leaves out: finite logits, NaN and infinities, the count of tokens, whole batches."""
    names = ("mask", "count of tokens", "NaN in padding", "all masked", "other labels")
    if not subject.adapter.masks:
        return [Check(one, "not applicable", "this call leaves no tokens out") for one in names]
    teacher, student = pair(torch.Generator().manual_seed(seed), 3, 5)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, 2:], mask[1, 4:] = False, False
    counts = mask.roll(-subject.shift, 1)  # the rows of logits that stand behind labels
    if subject.shift:
        counts[:, -1] = False
    clean = subject(teacher, student, mask)
    full = subject(teacher, student)
    other = [torch.where(counts[..., None], x, x.flip(-1) * 5 + 1) for x in (teacher, student)]
    answer = subject(other[0], other[1], mask)
    checks = []
    if _same(answer.value, clean.value) and not answer.gradient[~counts].any():
        checks.append(Check("mask", "pass", "other logits at masked tokens change nothing, and get no gradient"))
    else:
        ignored = _same(clean.value, full.value)
        seen = "the mask changes nothing" if ignored else "logits at masked tokens move the loss"
        checks.append(Check("mask", "fail", seen, "leave masked tokens out before the mean", "mask_ignored"))
        rest = [Check(one, "not applicable", "the mask doesn't work") for one in names[1:4]]
        return [*checks, *rest, _labels(subject, teacher, student)]
    return [*checks, _count(subject, seed, how), _nan(subject, teacher, student, mask, counts), *_end(subject, teacher, student)]


def _end(subject: Subject, teacher: Tensor, student: Tensor) -> list[Check]:
    return [_none(subject, teacher, student), _labels(subject, teacher, student)]


def _count(subject: Subject, seed: int, how: Reduction | None) -> Check:
    name = "count of tokens"
    if how is None:
        return Check(name, "not applicable", "the reduction isn't known")
    teacher, student = one_row(torch.Generator().manual_seed(seed), 2, 8)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[:, 4:] = False
    same = torch.zeros(2, 8, dtype=torch.long)
    share = (4 - subject.shift) / (8 - subject.shift)
    ratio = subject(teacher, student, mask, labels=same).value / subject(teacher, student, labels=same).value
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
        if not _same(answer.value, clean.value):
            broken.append(f"{what} reaches the value")
        elif not answer.gradient.isfinite().all():
            broken.append(f"{what} reaches the gradient")
    if broken:
        change = "fill masked logits with 0, or select rows, before the softmax: 0 · NaN is NaN"
        return Check(name, "fail", "; ".join(broken), change, "padding_leaks_nan", decides=False)
    return Check(name, "pass", "NaN and ±inf at masked tokens reach neither value nor gradient")


def _none(subject: Subject, teacher: Tensor, student: Tensor) -> Check:
    name, change = "all masked", "divide by the count, but at least by 1, and keep the graph"
    try:
        answer = subject(teacher, student, torch.zeros(teacher.shape[:2], dtype=torch.bool))
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
    if _same(*values):
        return Check("other labels", "pass", "labels say which tokens count, and nothing else")
    seen = f"other labels change it from {values[0]:.4g} to {values[1]:.4g}: it holds a cross-entropy with the labels"
    return Check("other labels", "fail", seen, "weigh that part by 0, and audit the divergence alone", "depends_on_labels")


def split(subject: Subject, seed: int) -> Check:
    """A batch in two parts gives the same, once the parts are weighed by what their reduction says."""
    name = "accumulation"
    teacher, student = pair(torch.Generator().manual_seed(seed), 4, 5)
    mask = torch.ones(4, 5, dtype=torch.bool)
    if subject.adapter.masks:
        mask[0, 3:], mask[1, 4:], mask[3, 2:] = False, False, False
    use = (lambda rows: mask[rows]) if subject.adapter.masks else (lambda rows: None)
    labels = some_labels(student.shape)
    whole = subject(teacher, student, use(slice(0, 4)), labels=labels)
    parts = [subject(teacher[i:j], student[i:j], use(slice(i, j)), labels=labels[i:j]) for i, j in ((0, 1), (1, 4))]
    tokens = [float(mask[i:j, subject.shift :].sum()) for i, j in ((0, 1), (1, 4))]
    weights = {
        "by sums: parts add up": (1.0, 1.0),
        "a mean: parts weighed by their tokens give the whole; accumulate sums, and divide by all tokens": _shares(tokens),
        "sequences count the same, long or short: parts weighed by their sequences give the whole": _shares([1.0, 3.0]),
    }
    size = float(whole.gradient.norm())
    for said, (first, second) in weights.items():
        pieces = torch.cat([first * parts[0].gradient, second * parts[1].gradient])
        value = first * parts[0].value + second * parts[1].value
        if _same(value, whole.value) and float((pieces - whole.gradient).norm()) <= 1e-4 * size:
            return Check(name, "pass", said)
    seen = "two parts of a batch, however weighed, don't give the whole: rows bear on each other"
    return Check(name, "fail", seen, "let each token stand alone, and divide by one count", "split")


def chunked(subject: Subject, seed: int, nature: Nature, how: Reduction | None, given: Mapping[str, Any]) -> Check:
    """The same for every size of chunks, and for sequences of every length."""
    name = "chunks and lengths"
    generator, worst, where = torch.Generator().manual_seed(seed), 0.0, ""
    knob = next((one for one in (*given, *CHUNKS) if one in CHUNKS and subject.knob_there(one)), None)
    if knob is not None and knob not in subject.fixed and subject.adapter.name != "chunks":
        teacher, student = pair(generator, 2, 7)
        answers = {size: subject(teacher, student, knobs={knob: size}) for size in (1, 2, 3, 5, 7, 64)}
        for size, one in answers.items():
            off = float((one.gradient - answers[64].gradient).norm()) / max(float(answers[64].gradient.norm()), 1e-300)
            off = max(off, abs(one.value - answers[64].value) / max(abs(answers[64].value), 1e-300))
            worst, where = (off, f"{knob}={size}") if not off <= worst else (worst, where)
    match = nature.gradient if nature.value is nature.gradient and not nature.entropy_kept else None
    if match is not None and how is not None and not match.on_labels and nature.identified.weight is not None:
        for t in range(1 + subject.shift, 14):
            teacher, student = pair(generator, 2, t)
            rows = slice(0, t - subject.shift)
            batch = (x[:, rows].reshape(-1, x.shape[-1]) for x in (teacher, student))
            said = float(total(match.divergence, match.temperature, *batch))
            n = t - subject.shift
            said *= nature.identified.weight / how.weight(1.0, 2, n, VOCABULARY)
            try:
                found = subject(teacher, student).value
            except InputError as error:
                return Check(name, "fail", f"{t} positions: {error}", "cut logits, labels and masks at the same places", "chunks")
            off = abs(found - said) / abs(said)
            worst, where = (off, f"{t} positions") if not off <= worst else (worst, where)
    elif knob is None:
        return Check(name, "not applicable", "it has no chunks, and its divergence isn't known")
    if not worst <= 2e-4:
        seen = f"off by {worst:.2g} of the value with {where}"
        return Check(name, "fail", seen, "cut logits, labels and masks at the same places, the last piece too", "chunks")
    return Check(name, "pass", ("every chunk size and " if knob else "") + "every length give the same a token")


def dropped(nature: Nature) -> Check:
    """Every row moves the student."""
    still, count = nature.dropped
    if still and nature.gradient is not None or 0 < still < count:
        seen = f"{still} of {count} rows that count get no gradient"
        return Check("every row counts", "fail", seen, "look for a remainder that is cut off", "rows_dropped")
    return Check("every row counts", "pass", "all rows get a gradient" if not still else "no row gets one")


def _moved(gradient: Tensor) -> list[tuple[int, int]]:
    size = gradient.norm(dim=-1)
    return [(int(i), int(j)) for i, j in (size > 1e-9 * size.max()).nonzero()]


def _power(ratio: float, by: float) -> float:
    """0, 1 or −1 if the ratio is that power of `by`; else NaN."""
    return next((float(k) for k in (0, 1, -1) if abs(ratio / by**k - 1) < 1e-3), float("nan"))


def _shares(x: list[float]) -> tuple[float, float]:
    return x[0] / sum(x), x[1] / sum(x)


def _same(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-5 * max(abs(a), abs(b), 1e-12)
