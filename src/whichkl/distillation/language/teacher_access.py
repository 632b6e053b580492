"""Teacher access: what can be asked of a teacher decides which losses there are; here those without its whole rows.

==================  ==========================================  ==========================================================
teacher             what it can be asked                        objectives
==================  ==========================================  ==========================================================
a model             everything                                  all, on every prefix
`StoredTeacher`     stored rows on fixed text                   k likeliest tokens: lower bounds; draws: the forward KL
None                nothing: there is its text                  the forward KL up to the entropy, which is a cross-entropy
`TokenScores`       log probabilities of given tokens           the reverse KL on the student's own prefixes
==================  ==========================================  ==========================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.distillation.language.causal import CausalModel, agree, taught_by
from whichkl.distillation.language.examples import Example
from whichkl.distillation.language.rollouts import Rollouts
from whichkl.distillation.language.stored_teacher import StoredTeacher
from whichkl.distillation.language.token_loss import Side, TokenLoss, against_stored, label_losses, places, score_term
from whichkl.distillation.losses import SampledTokens, TopK
from whichkl.distillation.losses.reduction import widened
from whichkl.divergences.divergence import RowDivergence
from whichkl.process.memory import refuse_if_ran_out
from whichkl.user_code import said_of

_ROUNDING = 1e-3
"""Largest log probability that counts as 0."""


class TokenScores:
    """A teacher that only scores given tokens, such as a server that returns log probabilities of a text.

    Args:
        score: a function of ids (n, t) and a mask (n, t), True where there are tokens, both on the CPU, that returns (n, t): the
            teacher's log probability of each token given those before it, in nats. The first column isn't used, nor is what the
            mask leaves out.

    >>> uniform = TokenScores(lambda ids, mask: torch.full(ids.shape, 0.25).log())
    """

    def __init__(self, score: Callable[[Int[Tensor, "n t"], Tensor], Float[Tensor, "n t"]]) -> None:
        if not callable(score) or isinstance(score, type):
            because = f"it is a `{type(score).__name__}`, not a function"
            raise InputError(cannot("use these scores", because, "Pass a function of ids (n, t) and a mask (n, t)"))
        self.score = score

    def of(self, rollouts: Rollouts) -> Float[Tensor, " m"]:
        """Return the log probabilities of the drawn tokens.

        Raises:
            InputError: the function can't be called, or returns what can't be log probabilities of these tokens.
        """
        do, shape = "use these scores", tuple(rollouts.ids.shape)
        try:
            with torch.no_grad():
                found = self.score(rollouts.ids, rollouts.mask)
        except (KeyboardInterrupt, InputError):
            raise
        except BaseException as error:  # SystemExit too: it is the user's code
            refuse_if_ran_out(error, "score tokens")
            because = f"{said_of(error)} for ids of shape {shape}"
            raise InputError(cannot("score tokens", because, "Correct the function")) from error
        if not isinstance(found, Tensor) or found.shape != shape or not found.is_floating_point():
            kind = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else f"a `{type(found).__name__}`"
            because = f"the function returned {kind} for ids of shape {shape}"
            raise InputError(cannot(do, because, "Return a float per id: its log probability given those before it"))
        at = widened(found.detach().cpu()[rollouts.drawn])
        wrong = at.isnan() | (at > _ROUNDING) | (at == -torch.inf)
        if bool(wrong.any()):
            row, column = rollouts.drawn.nonzero()[int(wrong.nonzero()[0])].tolist()
            value = float(at[wrong][0])
            because = f"token {column} of sequence {row} has the log probability {value:.4g}"
            instead = "Return log probabilities in nats, at most 0"
            if value < 0:
                because += ", and the student drew it: the reverse KL is infinite"
                instead = "Return finite log probabilities, or keep the student from tokens that the teacher can't write"
            raise InputError(cannot(do, because, instead))
        return at


Teacher = CausalModel | StoredTeacher | TokenScores | None


def teacher_of(teacher: Any, student: CausalModel | None = None) -> Teacher:
    """Return a teacher in the form in which its access can be seen; anything that is no kind of its own is a model."""
    if teacher is None or isinstance(teacher, (StoredTeacher, TokenScores)):
        return teacher
    return CausalModel(teacher, "teacher") if student is None else taught_by(teacher, student)


def settled(teacher: Teacher, student: CausalModel, tokenizer: Any, vocabulary: int | None) -> tuple[int, ...]:
    """Settle which columns are tokens, and return the tokens that end a sequence: `agree`, for teachers of every kind."""
    if isinstance(teacher, StoredTeacher):
        teacher.check_tokenizer(tokenizer)
        if vocabulary not in (None, teacher.width()):
            because = f"the laws were captured over {teacher.width():,} tokens"
            raise InputError(cannot(f"use `vocabulary={vocabulary}`", because, "Leave it out"))
        return agree(teacher, student, tokenizer, teacher.width())
    return agree(teacher if isinstance(teacher, CausalModel) else None, student, tokenizer, vocabulary)


def check_access(
    teacher: Teacher,
    divergence: RowDivergence,
    shares: Mapping[str, float],
    *,
    hard_label_weight: float = 0.0,
    temperature: float = 1.0,
) -> None:
    """Refuse what this teacher can't be asked.

    Raises:
        InputError: the objective, the prefixes or the temperature need more of the teacher.
    """
    name = divergence.name
    refusals: list[tuple[bool, str, str, str]] = []
    if isinstance(teacher, StoredTeacher):
        use, minimise, known = "use this stored teacher", f"minimise {name} with this stored teacher", teacher.temperature
        refusals += [
            (shares["data"] < 1, use, "it has no laws after drawn tokens", "Use prefixes={'data': 1.0}, or pass a model"),
            (
                temperature != known,
                use,
                f"it was captured at temperature {known:g}, and {temperature:g} needs the tokens that were left out",
                f"Use temperature={known:g}, or capture it again",
            ),
            (
                not teacher.has_draws and not divergence.coarsens,
                minimise,
                "it has a part of the teacher's law, and merged tokens don't bound this divergence",
                "Use objective='forward_kl', or pass a model",
            ),
            (
                teacher.has_draws and name != "forward_kl",
                minimise,
                "it has draws of the teacher, which see nothing of what only the student writes",
                "Use objective='forward_kl', or capture the likeliest tokens by k=",
            ),
        ]
    elif teacher is None:
        refusals += [
            (
                name != "forward_kl" or shares["data"] < 1,
                "use `teacher=None` here",
                "there is only text, whose cross-entropy is the forward KL up to the entropy",
                "Use objective='forward_kl' and prefixes={'data': 1.0}, or pass a teacher",
            ),
            (
                bool(hard_label_weight) or temperature != 1,
                "use `teacher=None` here",
                "the cross-entropy of the text is the whole loss, and text has no other temperature",
                "Use hard_label_weight=0 and temperature=1, or pass a teacher",
            ),
        ]
    elif isinstance(teacher, TokenScores):
        is_wrong = name != "reverse_kl" or shares["student"] < 1 or temperature != 1
        because = "scores of given tokens give the log ratio of tokens that the student drew, and nothing else of a law"
        instead = "Use objective='reverse_kl', prefixes={'student': 1.0} and temperature=1, or pass a model"
        refusals += [(is_wrong, "train on `TokenScores` here", because, instead)]
    for is_refused, do, because, instead in refusals:
        if is_refused:
            raise InputError(cannot(do, because, instead))


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
