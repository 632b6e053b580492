"""Checks of how tokens are combined: reductions, shifts, masks, padding, labels; parts of a batch, chunks, lost rows."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from whichkl._checks import InputError
from whichkl.distillation.audit.identify import Examination, Reduction
from whichkl.distillation.audit.probes import VOCABULARY, Logits, Mask, pair_of_logits, some_labels, wider
from whichkl.distillation.audit.result import Check, failed, not_applicable, passed
from whichkl.distillation.audit.subject import Answer, Subject

CHUNKS = ("chunk_size", "chunk", "chunks", "num_chunks", "num_output_chunks", "n_chunks")
"""Knobs that say how rows are divided, which must not change the loss."""
_NO_MASK = "this call leaves no tokens out"
_CUT_ALIKE = "cut logits, labels and masks at the same places, the last piece too"
_REDUCTIONS: dict[tuple[float, float], str] = {
    (0, 0): "mean over tokens",
    (1, 1): "sum",
    (1, 0): "sum of means of sequences",
    (0, 1): "sum over positions, mean over sequences",
}
_OF_SEQUENCES = {0.0: "a number for each sequence, its mean over tokens", 1.0: "a number for each sequence, its sum over tokens"}


def shifted(subject: Subject, expected: int | None) -> Check:
    """Find where the logits of a label lie, and set `subject.shift`; and whether the mask is True for padding."""
    teacher, student = subject.pair(2, 6)
    mask = None
    if subject.adapter.masks:
        mask = torch.zeros(2, 6, dtype=torch.bool, device="cpu")
        mask[0, 3] = True
    moved = _moved(subject(teacher, student, mask))
    all_but_it = [(i, j) for i in range(2) for j in range(6) if (i, j) != (0, 3)]
    if moved == all_but_it:
        subject.adapter = replace(subject.adapter, inverted=True)
        subject.assumed.append("the mask is True for padding")
        moved = [(0, 3)]
    all_but_last = [(i, j) for i in range(2) for j in range(5)]
    if moved == [(0, 2)] or (moved != [(0, 3)] and _moved(subject(teacher, student)) == all_but_last):
        subject.shift = 1
    said = "labels are shifted by one inside: logits at t answer for the label at t + 1" if subject.shift else "no shift"
    subject.assumed += ["labels are shifted by one inside"] * bool(subject.shift)
    if expected is not None and subject.shift != expected:
        return failed(said, "shift labels by one, once" if expected else "don't shift again what is aligned", "shift")
    if subject.shift and not subject.adapter.labels:
        return failed("the mask, or the last row, is moved by one position", "use rows as they come", "shift")
    if mask is not None and moved not in ([(0, 2)], [(0, 3)]):
        return not_applicable(f"one token that counts moves {len(moved)} rows")
    return passed(said)


def _moved(answer: Answer) -> list[tuple[int, int]]:
    size = answer.gradient.norm(dim=-1)
    return [(int(i), int(j)) for i, j in (size > 1e-9 * size.max()).nonzero()]


def reduction(subject: Subject, mask_works: bool, is_known: bool) -> tuple[Check, Reduction | None]:
    """Check how the value scales with the number of sequences, positions and, if it is a known divergence, of tokens."""
    teacher, student = _one_row(subject, 4, 8)
    s = subject.shift
    # the same labels everywhere, so that a part of the loss that reads them stays the same
    fixed = torch.zeros(4, 8, dtype=torch.long, device="cpu")
    first, *others = [subject(teacher[:b, :t], student[:b, :t], labels=fixed[:b, :t]) for b, t in ((2, 4), (4, 4), (2, 8))]
    wide_teacher, wide_student = (wider(x[:2, :4], subject.unit) for x in (teacher, student))
    if not 0 < abs(first.value) < float("inf"):
        return not_applicable("its value is 0 or infinite"), None
    by_b, by_t = (one.value / first.value for one in others)
    by_v = subject(wide_teacher, wide_student, labels=fixed[:2, :4]).value / first.value
    near = max(1e-3, subject.tolerance)
    b, t, v = _power(by_b, 2, near), _power(by_t, (8 - s) / (4 - s), near), _power(by_v, 2, near)
    name = {"token": "a number for each token", "sequence": _OF_SEQUENCES.get(t, "")}.get(first.form, _REDUCTIONS.get((b, t), ""))
    if v == -1:
        seen = "twice as many columns of probability 0 halve it: it's a mean over the vocabulary"
        change = "sum over the last axis first (with F.kl_div reduction='batchmean' on flat rows), then mean over tokens"
        return failed(seen, change, "mean_over_vocabulary"), Reduction(name + ", mean over v", b, t, v)
    if not name or (v != 0 and is_known):
        seen = f"doubled sequences, positions, columns change it {by_b:.3g}-, {by_t:.3g}-, {by_v:.3g}-fold"
        return failed(seen, "sum over the vocabulary; then a mean or a sum over tokens", "reduction"), None
    if (b, t) == (0, 0) and mask_works and _counts_sequences(subject):
        name = "mean over sequences of their means"
    found = Reduction(name, b, t, 0)
    if first.form == "number" and (b, t) == (0, 1) and not subject.adapter.rows:
        seen = f"{name}: value and gradient grow with the length of sequences, 512-fold at 512 tokens"
        change = "divide by the tokens that count; with F.kl_div reduction='batchmean', pass flat rows (n, v)"
        return failed(seen, change, "grows_with_length", decides=False), found
    return passed(name), found


def _counts_sequences(subject: Subject) -> bool:
    """Whether sequences of 6 and of 3 equal tokens move the student alike: a token of the short one twice as much."""
    teacher, student = _one_row(subject, 2, 6 + subject.shift)
    mask = torch.ones(2, 6 + subject.shift, dtype=torch.bool, device="cpu")
    mask[1, 3 + subject.shift :] = False
    fixed = torch.zeros(mask.shape, dtype=torch.long, device="cpu")
    size = subject(teacher, student, mask, labels=fixed).gradient.norm(dim=-1)
    if bool(size[1, 3 + subject.shift :].any()):  # the mask isn't used
        return False
    size = size.sum(1)
    return float((size[0] / size[1] - 1).abs()) < max(1e-3, subject.tolerance)


def _one_row(subject: Subject, b: int, t: int) -> tuple[Logits, Logits]:
    """Return the same row everywhere, so that values show how rows are weighted and nothing else."""
    teacher, student = subject.pair(1, 1, gap=1.0)
    return teacher.expand(b, t, VOCABULARY).clone(), student.expand(b, t, VOCABULARY).clone()


def _power(ratio: float, by: float, near: float) -> float:
    """0, 1 or −1 if the ratio is that power of `by`; else NaN."""
    return next((float(k) for k in (0, 1, -1) if abs(ratio / by**k - 1) < near), float("nan"))


def padded(subject: Subject) -> tuple[Logits, Logits, Mask, Mask]:
    """Return logits, a mask, and which rows of logits belong to labels that count."""
    mask = torch.ones(3, 5, dtype=torch.bool, device="cpu")
    mask[0, 2:], mask[1, 4:] = False, False
    counts = mask.roll(-subject.shift, 1)
    if subject.shift:
        counts[:, -1] = False
    return *subject.pair(3, 5), mask, counts


def masked(e: Examination) -> Check:
    """Check that logits at masked tokens change nothing."""
    subject = e.subject
    if not subject.adapter.masks:
        return not_applicable(_NO_MASK)
    teacher, student, mask, counts = padded(subject)
    clean = subject(teacher, student, mask)
    changed = [torch.where(counts[..., None], x, x.flip(-1) * 3 + subject.unit) for x in (teacher, student)]
    other = subject(changed[0], changed[1], mask)
    size = clean.gradient.norm(dim=-1)
    if subject.adapter.inverted and not subject.adapter.may_be_inverted:
        seen = "tokens where the mask is False count, the others don't: it's the other way around"
        return failed(seen, "invert the mask where it is made, or in the loss", "mask_inverted")
    if e.same(other.value, clean.value) and not other.gradient[~counts].any():
        return passed("other logits at masked tokens change nothing, and get no gradient")
    whole = subject(teacher, student)
    ignored = e.same(clean.value, whole.value) and bool(size[~counts].any())
    if not ignored:
        seen = "logits at masked tokens move the loss"
        seen += ", although they get no gradient" if not size[~counts].any() else ", and get a gradient"
        return failed(seen, "leave masked tokens out before the mean", "mask_ignored")
    return failed("the mask changes nothing", "leave masked tokens out before the mean", "mask_ignored")


def _without_mask(e: Examination) -> Check | None:
    """Why nothing that needs a mask can be checked; None where the mask works."""
    if not e.subject.adapter.masks:
        return not_applicable(_NO_MASK)
    return None


def count_of_tokens(e: Examination) -> Check:
    """Check that a mean is divided by the number of tokens that count."""
    subject, how = e.subject, e.reduction
    if (why := _without_mask(e)) is not None:
        return why
    if how is None:
        return not_applicable("the reduction isn't known")
    teacher, student = _one_row(subject, 2, 8)
    mask = torch.ones(2, 8, dtype=torch.bool, device="cpu")
    mask[:, 4:] = False
    fixed = torch.zeros(2, 8, dtype=torch.long, device="cpu")
    share = (4 - subject.shift) / (8 - subject.shift)
    ratio = subject(teacher, student, mask, labels=fixed).value / subject(teacher, student, labels=fixed).value
    near = max(1e-4, subject.tolerance)
    if abs(ratio - (1 if how.t == 0 else share)) < near:
        return passed(how.name if "sequence" in how.name else f"a {'mean' if how.t == 0 else 'sum'} over tokens that count")
    if how.t == 0 and abs(ratio - share) < near:
        seen = "the sum over tokens that count is divided by all tokens, padding too"
        return failed(seen, "divide by the number of tokens that count", "mean_counts_padding")
    return failed(f"a mask of half the equal tokens changes it {ratio:.3g}-fold", "divide by their number", "count")


def nan_in_padding(e: Examination) -> Check:
    """Check that NaN and infinities at masked tokens reach neither value nor gradient."""
    if (why := _without_mask(e)) is not None:
        return why
    teacher, student, mask, counts = padded(e.subject)
    clean, broken = e.subject(teacher, student, mask), []
    for what, bad in (("NaN", float("nan")), ("inf", float("inf")), ("−inf", -float("inf"))):
        try:
            spoilt = [torch.where(counts[..., None], x, bad) for x in (teacher, student)]
            answer = e.subject(spoilt[0], spoilt[1], mask)
        except InputError:
            broken.append(f"{what} raises")
            continue
        if not e.same(answer.value, clean.value):
            broken.append(f"{what} reaches the value")
        elif not answer.gradient.isfinite().all():
            broken.append(f"{what} reaches the gradient")
    if broken:
        change = "fill masked logits with 0, or select rows, before the softmax: 0 · NaN is NaN"
        return failed("; ".join(broken), change, "padding_leaks_nan", decides=False)
    return passed("NaN and ±inf at masked tokens reach neither value nor gradient")


def all_masked(e: Examination) -> Check:
    """Check that a batch of padding only gives 0."""
    if (why := _without_mask(e)) is not None:
        return why
    teacher, student = e.subject.pair(3, 5)
    what, change = "a batch of padding only", "divide by the count, but at least by 1, and keep the graph"
    try:
        answer = e.subject(teacher, student, torch.zeros(3, 5, dtype=torch.bool, device="cpu"))
    except InputError as error:
        return failed(f"{what} raises: {error}", change, "all_masked", decides=False)
    if not answer.finite:
        given = f"{answer.value:.3g}" if not math.isfinite(answer.value) else "a gradient that isn't finite"
        return failed(f"{what} gives {given}, and poisons all weights", change, "all_masked")
    if answer.value != 0 or answer.gradient.any():
        return failed(f"{what} gives {answer.value:.3g}", change, "all_masked")
    if not answer.graph:
        return failed(f"{what} gives a constant without a graph: backward() raises", change, "all_masked", decides=False)
    return passed(f"{what} gives 0, with a gradient of 0")


def other_labels(e: Examination) -> Check:
    """Check that labels only say which tokens count, or are learned by a cross-entropy that is added to the divergence."""
    if not e.subject.adapter.labels:
        return not_applicable("this call has no labels")
    teacher, student = e.subject.pair(3, 5)
    values = [e.subject(teacher, student, labels=some_labels(student.shape, step)).value for step in (7, 11)]
    if e.same(*values):
        return passed("labels say which tokens count, and nothing else")
    hard = e.nature.identified.hard_labels
    if hard and e.claims is None:
        return passed(f"they are learned, too: {hard:.4g} × the cross-entropy with them is added to the divergence")
    seen = f"other labels change it from {values[0]:.4g} to {values[1]:.4g}: it holds a cross-entropy with the labels"
    return failed(seen, "give that part weight 0, and audit the divergence alone", "depends_on_labels")


def accumulation(e: Examination) -> Check:
    """Check that a batch in two parts gives the same as the whole, with the parts weighted by their reduction."""
    subject = e.subject
    teacher, student = subject.pair(4, 5)
    mask = torch.ones(4, 5, dtype=torch.bool, device="cpu")
    if subject.adapter.masks:
        mask[0, 3:], mask[1, 4:], mask[3, 2:] = False, False, False
    labels = some_labels(student.shape)

    def part(i: int, j: int) -> Answer:
        return subject(teacher[i:j], student[i:j], mask[i:j] if subject.adapter.masks else None, labels=labels[i:j])

    whole, first, second = part(0, 4), part(0, 1), part(1, 4)
    tokens = mask[:, subject.shift :].sum(1).double()
    share = float(tokens[0] / tokens.sum())
    weights = {
        "by sums: parts add up": (1.0, 1.0),
        "a mean: parts weighted by their tokens add up; accumulate sums, divide by all tokens": (share, 1 - share),
        "sequences count the same, long or short: parts weighted by their sequences add up": (0.25, 0.75),
    }
    if e.reduction is not None and "mean over sequences" in e.reduction.name:
        weights = dict(reversed(weights.items()))  # with sequences of one length both ways of weighting agree
    for said, (a, b) in weights.items():
        pieces = torch.cat([a * first.gradient, b * second.gradient])
        off = float((pieces - whole.gradient).norm())
        near = max(1e-4, subject.tolerance) * float(whole.gradient.norm())
        if e.same(a * first.value + b * second.value, whole.value) and off <= near:
            return passed(said)
    seen = "two parts of a batch, under any weighting, don't give the whole: rows depend on each other"
    return failed(seen, "compute each token on its own, and divide by one count", "split")


def chunks_and_lengths(e: Examination) -> Check:
    """Check that every chunk size and every sequence length gives the same number per token."""
    subject, how = e.subject, e.reduction
    generator, off = subject.generator(), {}
    knob = next((one for one in (*e.knobs, *CHUNKS) if one in CHUNKS and subject.has_knob(one)), None)
    if knob is not None and subject.adapter.name != "chunks":
        teacher, student = subject.scaled(*pair_of_logits(generator, 2, 7))
        whole = subject(teacher, student, knobs={knob: 64})
        for size in (1, 2, 3, 5, 7):
            one = subject(teacher, student, knobs={knob: size})
            slope = float((one.gradient - whole.gradient).norm()) / max(float(whole.gradient.norm()), 1e-300)
            off[f"{knob}={size}"] = max(slope, abs(one.value - whole.value) / max(abs(whole.value), 1e-300))
    if how is None and knob is None:
        return not_applicable("it has no chunks, and its reduction isn't known")
    if how is not None:
        try:
            off |= _lengths(subject, generator, how)
        except InputError as error:
            return failed(f"a length is refused: {error}", _CUT_ALIKE, "chunks")
    where = max(off, key=lambda name: math.inf if math.isnan(off[name]) else off[name], default="")
    if where and not off[where] <= max(2e-4, subject.tolerance):
        return failed(f"off by {off[where]:.2g} of the value with {where}", _CUT_ALIKE, "chunks")
    return passed(("every chunk size and " if knob else "") + "every length gives what single positions give")


def _lengths(subject: Subject, generator: torch.Generator, how: Reduction) -> dict[str, float]:
    """By how much each length is off from what its positions give one by one, relatively."""
    teacher, student = subject.scaled(*pair_of_logits(generator, 1, 13))
    labels, s = some_labels(student.shape), subject.shift

    def value(begin: int, end: int) -> float:
        return subject(teacher[:, begin:end], student[:, begin:end], labels=labels[:, begin:end]).value

    alone = [value(t, t + 1 + s) for t in range(13 - s)]
    off = {}
    for t in range(2 + s, 14):
        said = sum(alone[: t - s]) / (t - s if how.t == 0 else 1)
        off[f"{t} positions"] = abs(value(0, t) - said) / max(abs(said), 1e-300)
    return off
