"""Held-out loss: what can be measured of a student on unseen prompts where its teacher doesn't give whole laws."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from whichkl._checks import InputError, cannot, plain
from whichkl.distillation.language.causal import CausalModel, evaluating
from whichkl.distillation.language.clusters import clusters_of, notes_on
from whichkl.distillation.language.examples import Example, together
from whichkl.distillation.language.measures import cut_note, ratio_estimate
from whichkl.distillation.language.partial_losses import PartialLoss, loss_of
from whichkl.distillation.language.rollouts import Rollouts, continued
from whichkl.distillation.language.stored_teacher import StoredTeacher
from whichkl.distillation.language.teacher_access import TeacherAccess, TokenScores
from whichkl.distillation.language.token_loss import label_losses, rows_of
from whichkl.distillation.losses import divergence_named
from whichkl.divergences import Estimate
from whichkl.files.reading import rebuilt
from whichkl.printable import HTML

_ROWS_PER_CALL = 16


@dataclass(frozen=True)
class HeldOutLoss(HTML):
    """What can be measured of a student where its teacher can't be evaluated in full, with errors clustered by prompt.

    Numbers are nats per token; from scores nats per sequence, since their reverse KL is that of sequences. A `SequenceKL` takes
    its place where the teacher is a model.
    """

    access: str
    """What is known of the teacher."""
    forward_kl: Estimate | None
    """On the data's prefixes: from stored rows; or from text alone, which gives it up to the entropy."""
    reverse_kl: Estimate | None
    """From stored rows on the data's prefixes; or from scores on the student's own, by Monte Carlo."""
    nll: Estimate | None
    """−log q of the data's tokens."""
    prompts: int
    tokens: int
    """Number of tokens that were measured."""
    per: str = "token"
    """What the numbers are of: a token, or a sequence."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        fields: dict[str, Any] = plain(asdict(self))
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> HeldOutLoss:
        """Rebuild it from `to_dict`."""
        return rebuilt(cls, fields)

    def __repr__(self) -> str:
        known = ", ".join(f"{name}={one.number}" for name, one in self._known.items())
        return f"HeldOutLoss({known}, prompts={self.prompts})"

    def __str__(self) -> str:
        """A line for every number, then what they mean."""
        lines = [f"{self.prompts:,} held-out prompts, {self.tokens:,} tokens; of the teacher: {self.access}"]
        lines += [f"  {name + one.constant:<28}{one.number} nats a {self.per}" for name, one in self._known.items()]
        notes = dict.fromkeys(note for one in self._known.values() for note in one.notes)
        return "\n".join([*lines, *(f"  {note}" for note in notes)])

    @property
    def _known(self) -> dict[str, Estimate]:
        every = {name: getattr(self, name) for name in ("forward_kl", "reverse_kl", "nll")}
        return {name: one for name, one in every.items() if one is not None}


def held_out_loss(
    teacher: StoredTeacher | TokenScores | None,
    student: CausalModel,
    examples: Sequence[Example],
    *,
    ends: Sequence[int],
    most: int,
    seed: int,
    tell: Callable[[float], None],
) -> HeldOutLoss:
    """Measure a student on examples that it wasn't trained on, with what its teacher can be asked.

    Raises:
        InputError: a stored teacher doesn't have one of the examples, or scores can't be used.
    """
    known = TeacherAccess.of(teacher)
    is_drawn = known.source == "student"
    if not is_drawn and any(one.completion is None for one in examples):
        because = "some held-out examples are prompts without completions"
        raise InputError(cannot("measure the held-out loss", because, "Add completions"))
    losses = _losses(teacher, known, student, examples, most)
    prompts = clusters_of([one.prompt for one in examples])
    clusters = int(prompts.max()) + 1
    sums: dict[str, Tensor] = {}
    count, cut = torch.zeros(clusters, 2, dtype=torch.float64, device="cpu"), 0  # of tokens and of sequences
    for first in range(0, len(examples), _ROWS_PER_CALL):
        part = examples[first : first + _ROWS_PER_CALL]
        with torch.no_grad(), evaluating(student):
            if is_drawn:
                rollouts = continued(student, [one.prompt for one in part], ends, most, seed + first)
            else:
                rollouts = together([one.to_dict() for one in part], most)
            found = _values(losses, rollouts, has_labels=not is_drawn)
        which = prompts[first : first + len(part)]
        row = which.repeat_interleave(rollouts.end - rollouts.begin)
        count += torch.stack([torch.bincount(one, minlength=clusters) for one in (row, which)], 1)
        cut += int(rollouts.cut.sum())
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + torch.bincount(row, value.double().cpu(), clusters)
        tell(min(1.0, (first + len(part)) / len(examples)))
    per, method = ("sequence" if is_drawn else "token"), "per {}, clustered by prompt".format
    units = count[:, int(is_drawn)]
    estimates: dict[str, Any] = {name: ratio_estimate(name, one, units, "nats", method(per)) for name, one in sums.items()}
    known_of = _notes(teacher)
    if is_drawn and cut:
        known_of = dict.fromkeys(sums, (cut_note(cut / len(examples), "student", most, "reverse_kl"),))
    for name, one in estimates.items():
        notes = known_of.get(name, ())
        is_bound = any("lower bound" in note for note in notes)
        estimates[name] = dataclasses.replace(one, notes=(*notes, *notes_on(clusters)), reliable=one.reliable and not is_bound)
    if teacher is None:
        estimates["forward_kl"] = dataclasses.replace(estimates["nll"], quantity="forward_kl", up_to="entropy_p")
    forward, reverse, nll = (estimates.get(name) for name in ("forward_kl", "reverse_kl", "nll"))
    return HeldOutLoss(known.what, forward, reverse, nll, clusters, int(count[:, 0].sum()), per)


def _losses(
    teacher: Any, known: TeacherAccess, student: CausalModel, examples: Sequence[Example], most: int
) -> dict[str, PartialLoss]:
    """Return the losses that can be measured, by name."""
    probe = torch.tensor([examples[0].prompt], dtype=torch.int64, device="cpu")
    settings: dict[str, Any] = {"most": most, "has_credit": False, "probe": probe, "temperature": known.temperature or 1.0}
    divergences = [one for one in map(divergence_named, ("forward_kl", "reverse_kl")) if known.allows(one)]
    with evaluating(student):
        return {one.name: loss_of(teacher, student, one, examples, **settings) for one in divergences}  # type: ignore[misc]


def _values(losses: dict[str, PartialLoss], rollouts: Rollouts, *, has_labels: bool) -> dict[str, Tensor]:
    """Return a number per token for every loss, and for the data's tokens."""
    one = next(iter(losses.values()))
    student, side = one.student, one.sides[1]
    labels = rollouts.ids[rollouts.drawn].to(student.device)
    known, q = one.asked(rollouts), rows_of(student, student.module, side, rollouts)
    found = {"nll": label_losses(side.head, student.tokens, q, labels)} if has_labels else {}
    return found | {name: loss.values(known, q, labels) for name, loss in losses.items()}


def _notes(teacher: Any) -> dict[str, tuple[str, ...]]:
    """Return what a reader has to know of each number."""
    if not isinstance(teacher, StoredTeacher):
        return {}
    k, at = teacher.manifest["k"], "" if teacher.temperature == 1 else f", at temperature {teacher.temperature:g}"
    if k is None:
        return {"forward_kl": (f"forward_kl is estimated from draws without bias, so that it may be below 0{at}",)}
    if k == teacher.tokens:
        return {}
    bound = f"is a lower bound{at}: the tokens beyond the {k:,} likeliest are one bucket"
    return {name: (f"{name} {bound}",) for name in ("forward_kl", "reverse_kl")}
