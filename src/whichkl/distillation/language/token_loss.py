"""Token loss: the divergence of next-token laws after given prefixes, from hidden states where the heads are plain."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from whichkl.distillation.language.causal import CausalModel, evaluating, inner_of
from whichkl.distillation.language.head import Head, capturing, head_of
from whichkl.distillation.language.rollouts import Rollouts
from whichkl.distillation.losses import SampledTokens, divergence_named, linear_divergence, of_logits
from whichkl.distillation.losses.stored_rows import StoredRows
from whichkl.divergences.divergence import RowDivergence

_NUMBERS_PER_CHUNK = {"cpu": 1 << 21}
_DEFAULT_NUMBERS_PER_CHUNK = 1 << 25
"""Logits that are held at a time, 8 MB in float32 on a CPU and 128 MB elsewhere; more are no faster."""
_MIN_ROWS_PER_CHUNK = 64
"""Fewer rows at a time read the head's weight too often."""


@dataclass(frozen=True)
class Side:
    """One model: its head, or None where full logits are used, and whether it can leave logits out."""

    head: Head | None
    skips: bool

    @classmethod
    def of(cls, model: CausalModel, ids: Int[Tensor, "n t"]) -> Side:
        """Try the model's head on some tokens."""
        head = head_of(model.module, ids.to(model.device))
        return cls(head, head is not None and "logits_to_keep" in inspect.signature(inner_of(model.module).forward).parameters)


class TokenLoss:
    """Σₜ D(pₜ, qₜ) over drawn tokens, p the teacher and q the student, with gradients for the student.

    Args:
        teacher: p; evaluated without a graph.
        student: q.
        divergence: D.
        temperature: divides both logits.
        hard_label_weight: w in (1 − w) D + w · (−log qₜ(yₜ)).
        has_credit: whether the score-function term is added, for the reverse KL of sequences drawn from q.
        probe: tokens on which the heads are tried.
    """

    def __init__(
        self,
        teacher: CausalModel,
        student: CausalModel,
        divergence: RowDivergence,
        *,
        temperature: float = 1.0,
        hard_label_weight: float = 0.0,
        has_credit: bool = False,
        probe: Int[Tensor, "n t"],
    ) -> None:
        self.teacher, self.student, self.divergence = teacher, student, divergence
        self.temperature, self.hard_label_weight, self.has_credit = temperature, hard_label_weight, has_credit
        sides = (Side.of(teacher, probe), Side.of(student, probe))
        self.sides = sides if all(one.head for one in sides) and not has_credit else (Side(None, False), Side(None, False))

    def __call__(self, model: nn.Module, rollouts: Rollouts) -> Float[Tensor, ""]:
        """Return the sum over the drawn tokens; `model` is the student, as a trainer has wrapped it."""
        labels = rollouts.ids[rollouts.drawn].to(self.student.device)
        known = self.asked(rollouts)  # first: the student's activations aren't there yet
        q = rows_of(self.student, model, self.sides[1], rollouts)
        loss = self.soft(known, q, rollouts, labels)
        if self.hard_label_weight:
            hard = label_losses(self.sides[1].head, self.student.tokens, q, labels, "sum")
            loss = (1 - self.hard_label_weight) * loss + self.hard_label_weight * hard
        return loss

    def asked(self, rollouts: Rollouts) -> Any:
        """Return what the teacher says: a row per drawn token."""
        # a teacher may share parts with the student
        with torch.no_grad(), evaluating(self.teacher), self.teacher.without_adapter():
            return rows_of(self.teacher, self.teacher.module, self.sides[0], rollouts)

    def soft(self, known: Any, q: Float[Tensor, "m k"], rollouts: Rollouts, labels: Int[Tensor, " m"]) -> Float[Tensor, ""]:
        """Return the divergences' sum, from what the teacher says and the student's rows."""
        p, tokens = known.to(q.device), self.student.tokens
        teacher, student = self.sides[0].head, self.sides[1].head
        if teacher is None or student is None:
            common: dict[str, Any] = {"temperature": self.temperature, "vocabulary": tokens}
            rows = of_logits(self.divergence, teacher=p, student=q, reduction="none", **common)
            loss = rows.sum()
            if self.has_credit:
                log_q = q[:, :tokens].float().log_softmax(-1).gather(1, labels[:, None])[:, 0]
                loss = loss + score_term(rows, log_q, places(rollouts)[:, 0].to(q.device))
            return loss
        return linear_divergence(
            hidden_student=q,
            weight_student=student.weight,
            bias_student=student.bias,
            hidden_teacher=p,
            weight_teacher=teacher.weight.to(q.device),
            bias_teacher=None if teacher.bias is None else teacher.bias.to(q.device),
            divergence=self.divergence,
            temperature=self.temperature,
            reduction="sum",
            vocabulary=tokens,
            chunk_size=rows_per_chunk(q, tokens),
            logit_scale_student=student.scale,
            logit_scale_teacher=teacher.scale,
            softcap_student=student.cap,
            softcap_teacher=teacher.cap,
        )


def rows_of(side: CausalModel, model: nn.Module, found: Side, rollouts: Rollouts) -> Tensor:
    """Return a row per drawn token: hidden states, or logits where the head isn't plain; `model` is the side's, maybe wrapped."""
    side.check_length(rollouts.ids.shape[1])
    where = places(rollouts).to(side.device)
    ids, mask = rollouts.ids.to(side.device), rollouts.mask.long().to(side.device)
    given: dict[str, Any] = {"attention_mask": mask} if side.takes_mask else {}
    if found.head is None:
        out: Any = model(input_ids=ids, **given)
        logits: Tensor = getattr(out, "logits", out)
        return logits[where[:, 0], where[:, 1]]
    with capturing(found.head) as hidden:
        none = torch.empty(0, dtype=torch.int64, device=side.device)
        model(input_ids=ids, **given, **({"logits_to_keep": none} if found.skips else {}))
    return hidden[-1][where[:, 0], where[:, 1]]


def places(rollouts: Rollouts) -> Int[Tensor, "m 2"]:
    """Return the sequence and the place of each drawn token's logits, which are those of the token before it."""
    return rollouts.drawn[:, 1:].nonzero()


def rows_per_chunk(rows: Float[Tensor, "m k"], tokens: int) -> int:
    """Return how many rows' logits are held at a time, in chunks of one size: a short last one takes longer per row."""
    most = max(_MIN_ROWS_PER_CHUNK, _NUMBERS_PER_CHUNK.get(rows.device.type, _DEFAULT_NUMBERS_PER_CHUNK) // tokens)
    return -(-len(rows) // max(1, round(len(rows) / most))) or 1


def against_stored(
    stored: StoredRows,
    q: Float[Tensor, "m k"],
    head: Head | None,
    divergence: RowDivergence,
    *,
    tokens: int,
    temperature: float = 1.0,
    reduction: str = "none",
) -> Tensor:
    """Return the divergence of a student's rows from stored ones; `q` are its hidden states, or logits without a head."""
    common: dict[str, Any] = {"temperature": temperature, "reduction": reduction, "vocabulary": tokens}
    if head is None:
        return of_logits(divergence, teacher=stored.part(slice(None), q), student=q, **common)
    return linear_divergence(
        hidden_student=q,
        weight_student=head.weight,
        bias_student=head.bias,
        teacher=stored,
        divergence=divergence,
        logit_scale_student=head.scale,
        softcap_student=head.cap,
        chunk_size=rows_per_chunk(q, tokens),
        **common,
    )


def label_losses(
    head: Head | None, tokens: int, q: Float[Tensor, "m k"], labels: Int[Tensor, " m"], reduction: str = "none"
) -> Tensor:
    """Return −log q of the labels, at temperature 1: the forward KL from laws that are sure of them."""
    sure = SampledTokens(labels[:, None], torch.zeros(len(labels), 1, dtype=torch.float32, device=labels.device))
    return against_stored(sure, q, head, divergence_named("forward_kl"), tokens=tokens, reduction=reduction)


def score_term(
    rows: Float[Tensor, " m"], log_q: Float[Tensor, " m"], sequence: Int[Tensor, " m"], *, own: bool = False, later: bool = True
) -> Float[Tensor, ""]:
    """Return a term of value 0 whose gradient is Σₜ (Gₜ − bₜ) ∇log qₜ(yₜ), Gₜ the sum of the later tokens' divergences.

    With Σₜ ∇KL(qₜ‖pₜ) its mean over draws of q is the gradient of the sequences' reverse KL. The baseline bₜ is the mean Gₜ of
    the other sequences at the same place, which leaves the mean as it is.

    Where `rows` are log ratios log qₜ(yₜ)/pₜ(yₜ), Gₜ has to include the token's `own`: with it alone the mean is Σₜ ∇KL(qₜ‖pₜ) at
    the drawn prefixes, and with the `later` ones too the gradient of the sequences' reverse KL.

    Source: Williams (1992); rewards to go and the leave-one-out baseline as in Kool, van Hoof & Welling (2019).
    """
    n = int(sequence.max()) + 1 if len(sequence) else 0
    count = torch.bincount(sequence, minlength=n)
    place = torch.arange(len(rows), device=rows.device) - (count.cumsum(0) - count)[sequence]
    grid = rows.new_zeros(n, int(place.max()) + 1 if len(rows) else 0).index_put((sequence, place), rows.detach())
    to_go = (grid.flip(1).cumsum(1).flip(1) if later else grid) - (0 if own else grid)
    others = (to_go.sum(0) - to_go) / max(1, n - 1)  # an ended sequence has nothing to come
    gain = (to_go - others)[sequence, place]
    return (gain * (log_q - log_q.detach())).sum()
