"""Checks of batches: a batch in two parts, chunks of every size, sequences of every length, lost rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from whichkl._checks import InputError
from whichkl.distillation.audit.identify import Nature
from whichkl.distillation.audit.probes import pair
from whichkl.distillation.audit.result import Check
from whichkl.distillation.audit.subject import Subject, some_labels
from whichkl.distillation.audit.token_checks import Reduction, same

CHUNKS = ("chunk_size", "chunk", "chunks", "num_chunks", "num_output_chunks", "n_chunks")
_CUT_ALIKE = "cut logits, labels and masks at the same places, the last piece too"


def split(subject: Subject) -> Check:
    """Check that a batch in two parts gives the same as the whole, with the parts weighted by their reduction."""
    name = "accumulation"
    teacher, student = subject.pair(4, 5)
    mask = torch.ones(4, 5, dtype=torch.bool, device="cpu")
    if subject.adapter.masks:
        mask[0, 3:], mask[1, 4:], mask[3, 2:] = False, False, False
    use = (lambda rows: mask[rows]) if subject.adapter.masks else (lambda rows: None)
    labels = some_labels(student.shape)
    whole = subject(teacher, student, use(slice(0, 4)), labels=labels)
    parts = [subject(teacher[i:j], student[i:j], use(slice(i, j)), labels=labels[i:j]) for i, j in ((0, 1), (1, 4))]
    tokens = [float(mask[i:j, subject.shift :].sum()) for i, j in ((0, 1), (1, 4))]
    weights = {
        "by sums: parts add up": (1.0, 1.0),
        "a mean: parts weighted by their tokens give the whole; accumulate sums, and divide by all tokens": _shares(tokens),
        "sequences count the same, long or short: parts weighted by their sequences give the whole": _shares([1.0, 3.0]),
    }
    size = float(whole.gradient.norm())
    for said, (first, second) in weights.items():
        pieces = torch.cat([first * parts[0].gradient, second * parts[1].gradient])
        value = first * parts[0].value + second * parts[1].value
        if same(value, whole.value) and float((pieces - whole.gradient).norm()) <= 1e-4 * size:
            return Check(name, "pass", said)
    seen = "two parts of a batch, under any weighting, don't give the whole: rows depend on each other"
    return Check(name, "fail", seen, "compute each token on its own, and divide by one count", "split")


def chunked(subject: Subject, how: Reduction | None, given: Mapping[str, Any]) -> Check:
    """Check that every chunk size and every sequence length gives the same number per token."""
    name = "chunks and lengths"
    generator, worst, where = subject.generator(), 0.0, ""
    knob = next((one for one in (*given, *CHUNKS) if one in CHUNKS and subject.has_knob(one)), None)
    if knob is not None and knob not in subject.fixed and subject.adapter.name != "chunks":
        teacher, student = pair(generator, 2, 7)
        answers = {size: subject(teacher, student, knobs={knob: size}) for size in (1, 2, 3, 5, 7, 64)}
        for size, one in answers.items():
            off = float((one.gradient - answers[64].gradient).norm()) / max(float(answers[64].gradient.norm()), 1e-300)
            off = max(off, abs(one.value - answers[64].value) / max(abs(answers[64].value), 1e-300))
            worst, where = (off, f"{knob}={size}") if not off <= worst else (worst, where)
    if how is not None:
        teacher, student = pair(generator, 1, 13)
        labels, s = some_labels(student.shape), subject.shift
        try:
            alone = [
                subject(teacher[:, t : t + 1 + s], student[:, t : t + 1 + s], labels=labels[:, t : t + 1 + s]).value
                for t in range(13 - s)
            ]
            for t in range(2 + s, 14):
                said = sum(alone[: t - s]) / (t - s if how.t == 0 else 1)
                found = subject(teacher[:, :t], student[:, :t], labels=labels[:, :t]).value
                off = abs(found - said) / max(abs(said), 1e-300)
                worst, where = (off, f"{t} positions") if not off <= worst else (worst, where)
        except InputError as error:
            return Check(name, "fail", f"a length is refused: {error}", _CUT_ALIKE, "chunks")
    elif knob is None:
        return Check(name, "not applicable", "it has no chunks, and its reduction isn't known")
    if not worst <= 2e-4:
        seen = f"off by {worst:.2g} of the value with {where}"
        return Check(name, "fail", seen, _CUT_ALIKE, "chunks")
    return Check(name, "pass", ("every chunk size and " if knob else "") + "every length gives what single positions give")


def dropped(nature: Nature) -> Check:
    """Check that every row moves the student."""
    still, count = nature.dropped
    if still and nature.gradient is not None or 0 < still < count:
        seen = f"{still} of {count} rows that count get no gradient"
        return Check("every row counts", "fail", seen, "look for a remainder that is cut off", "rows_dropped")
    if still:
        return Check("every row counts", "not applicable", "no row gets a gradient")
    return Check("every row counts", "pass", "all rows get a gradient")


def _shares(x: list[float]) -> tuple[float, float]:
    return x[0] / sum(x), x[1] / sum(x)
