"""Partial losses: those of teachers that can't be asked for whole rows, and the choice among them by a teacher's kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from whichkl.distillation.language.causal import CausalModel
from whichkl.distillation.language.examples import Example
from whichkl.distillation.language.rollouts import Rollouts
from whichkl.distillation.language.stored_teacher import StoredTeacher
from whichkl.distillation.language.teacher_access import Teacher, TokenScores
from whichkl.distillation.language.token_loss import Side, TokenLoss, against_stored, label_losses, places, score_term
from whichkl.distillation.losses import SampledTokens, TopK
from whichkl.divergences.divergence import RowDivergence


def loss_of(
    teacher: Teacher,
    student: CausalModel,
    divergence: RowDivergence,
    examples: Iterable[Example],
    *,
    most: int | None,
    has_credit: bool,
    **settings: Any,
) -> TokenLoss:
    """Return the loss that this teacher's access allows; see `TokenLoss` for the settings.

    `examples` are all that a stored teacher will be asked about, and `most` is where completions are cut.
    """
    if isinstance(teacher, CausalModel):
        return TokenLoss(teacher, student, divergence, has_credit=has_credit, **settings)
    if isinstance(teacher, StoredTeacher):
        return StoredLoss(teacher, student, divergence, teacher.lookup(examples, most), **settings)
    if teacher is None:
        return TextLoss(student, divergence, **settings)
    return ScoreLoss(teacher, student, divergence, has_credit, **settings)


class PartialLoss(TokenLoss, ABC):
    """A loss that asks a teacher for less than its rows; a number per drawn token."""

    def __init__(
        self,
        student: CausalModel,
        divergence: RowDivergence,
        *,
        probe: Int[Tensor, "n t"],
        temperature: float = 1.0,
        hard_label_weight: float = 0.0,
    ) -> None:
        self.student, self.divergence, self.sides = student, divergence, (Side(None, False), Side.of(student, probe))
        self.temperature, self.hard_label_weight = temperature, hard_label_weight

    @abstractmethod
    def values(self, known: Any, q: Float[Tensor, "m k"], labels: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Return the loss of each drawn token, from what the teacher says and the student's rows."""

    def soft(self, known: Any, q: Float[Tensor, "m k"], rollouts: Rollouts, labels: Int[Tensor, " m"]) -> Float[Tensor, ""]:
        """Return the sum."""
        return self.values(known, q, labels).sum()


class StoredLoss(PartialLoss):
    """A divergence from stored rows, in the buckets that they have."""

    def __init__(
        self,
        teacher: StoredTeacher,
        student: CausalModel,
        divergence: RowDivergence,
        places: Mapping[bytes, int],
        **settings: Any,
    ) -> None:
        super().__init__(student, divergence, **settings)
        self.stored, self.places = teacher, dict(places)

    def look_up(self, examples: Iterable[Example], most: int | None) -> None:
        """Find where further examples are stored."""
        self.places |= self.stored.lookup(examples, most)

    def asked(self, rollouts: Rollouts) -> TopK | SampledTokens:
        """Read the rows."""
        return self.stored.rows(rollouts, self.places)

    def values(self, known: Any, q: Float[Tensor, "m k"], labels: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Return the divergence of each row."""
        return self._reduced(known, q, "none")

    def soft(self, known: Any, q: Float[Tensor, "m k"], rollouts: Rollouts, labels: Int[Tensor, " m"]) -> Float[Tensor, ""]:
        """Return the sum, whose gradient comes with it."""
        return self._reduced(known, q, "sum")

    def _reduced(self, known: TopK | SampledTokens, q: Float[Tensor, "m k"], reduction: str) -> Tensor:
        head, tokens = self.sides[1].head, self.student.tokens
        how: dict[str, Any] = {"tokens": tokens, "temperature": self.temperature, "reduction": reduction}
        return against_stored(known, q, head, self.divergence, **how)


class TextLoss(PartialLoss):
    """The cross-entropy of text: the forward KL from whoever wrote it, up to the text's entropy."""

    def asked(self, rollouts: Rollouts) -> None:
        """There is nobody to ask."""

    def values(self, known: Any, q: Float[Tensor, "m k"], labels: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Return −log q of each token."""
        return label_losses(self.sides[1].head, self.student.tokens, q, labels)

    def soft(self, known: Any, q: Float[Tensor, "m k"], rollouts: Rollouts, labels: Int[Tensor, " m"]) -> Float[Tensor, ""]:
        """Return the sum, whose gradient comes with it."""
        return label_losses(self.sides[1].head, self.student.tokens, q, labels, "sum")


class ScoreLoss(PartialLoss):
    """The reverse KL of tokens that the student drew, by the score function: its value is a Monte Carlo estimate.

    With `has_credit` the mean gradient is that of the sequences' reverse KL, without it Σₜ ∇KL(qₜ‖pₜ) at the drawn prefixes.
    """

    def __init__(
        self, teacher: TokenScores, student: CausalModel, divergence: RowDivergence, has_credit: bool, **settings: Any
    ) -> None:
        super().__init__(student, divergence, **settings)
        self.scores, self.has_credit = teacher, has_credit

    def asked(self, rollouts: Rollouts) -> Float[Tensor, " m"]:
        """Return the teacher's log probabilities of the drawn tokens."""
        return self.scores.of(rollouts)

    def values(self, known: Any, q: Float[Tensor, "m k"], labels: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Return log q − log p of each token."""
        log_p: Tensor = known.to(q.device)
        return -label_losses(self.sides[1].head, self.student.tokens, q, labels) - log_p

    def soft(self, known: Any, q: Float[Tensor, "m k"], rollouts: Rollouts, labels: Int[Tensor, " m"]) -> Float[Tensor, ""]:
        """Return the sum of the log ratios, with the gradient of the KL: the log ratio's own has mean 0 and trains nothing."""
        ratio = self.values(known, q, labels)
        sequence = places(rollouts)[:, 0].to(q.device)
        value: Tensor = ratio.detach().sum()
        return value + score_term(ratio, ratio, sequence, own=True, later=self.has_credit)
