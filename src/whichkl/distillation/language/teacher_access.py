"""Teacher access: what can be asked of a teacher decides which objectives there are.

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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.access import Access
from whichkl.distillation.language.causal import CausalModel, agree, taught_by
from whichkl.distillation.language.rollouts import Rollouts
from whichkl.distillation.language.stored_teacher import StoredTeacher
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


@dataclass(frozen=True)
class TeacherAccess:
    """What can be asked of a teacher, which needs no teacher: the matrix of objectives reads it and nothing else.

    >>> TeacherAccess.of(None).access, TeacherAccess.named("model").access.cell
    (<Access: samples>, 'both')
    """

    kind: str
    """``"model"``, ``"text"``, ``"scores"``, or what is stored: ``"top_k"`` or ``"draws"``."""
    access: Access
    """What can be done with the teacher's law of sequences."""
    situation: str
    """One sentence on it."""
    what: str
    """What there is of the teacher, in few words."""
    reason: str = ""
    """Why what is possible is possible; of a model it depends on the prefixes."""
    temperature: float | None = None
    """What divided the logits of stored laws; None where that is free, or isn't known."""

    @classmethod
    def of(cls, teacher: Any) -> TeacherAccess:
        """Return the access to a teacher; anything that is no kind of its own is a model."""
        if isinstance(teacher, StoredTeacher):
            kind = "draws" if teacher.has_draws else "top_k"
            return cls._stored(kind, teacher.what, teacher.temperature)
        return cls.named("text" if teacher is None else "scores" if isinstance(teacher, TokenScores) else "model")

    @classmethod
    def named(cls, kind: str) -> TeacherAccess:
        """Return the access to a teacher of a kind.

        Raises:
            InputError: there is no such kind.
        """
        if kind in _STORED:
            return cls._stored(kind, _STORED[kind], None)
        if kind not in _KINDS:
            known = ", ".join([*_KINDS, *_STORED])
            because = "it is neither a folder of a language model nor a kind of teacher"
            raise InputError(cannot(f"use the teacher `{kind}`", because, f"Give a folder, or choose among {known}"))
        return _KINDS[kind]

    @classmethod
    def _stored(cls, kind: str, what: str, temperature: float | None) -> TeacherAccess:
        situation = f"You have {what} after each token of fixed text, and can ask the teacher nothing else."
        return cls(kind, Access.SAMPLES, situation, what, f"{what} are stored after every token of the data", temperature)

    @property
    def label(self) -> str:
        """The access to the teacher; stored laws are less than any access to a distribution."""
        return {"top_k": "stored laws of next tokens", "draws": "stored draws of next tokens"}.get(self.kind, self.access.label)

    @property
    def source(self) -> str:
        """Whose prefixes a student can be measured on without drawing from the teacher."""
        return "student" if self.kind == "scores" else "data"

    def allows(self, divergence: RowDivergence) -> bool:
        """Whether the teacher can be asked for a divergence on prefixes of `source`."""
        shares = {"data": 0.0, "student": 0.0, self.source: 1.0}
        try:
            check_access(self, divergence, shares, temperature=self.temperature or 1.0)
        except InputError:
            return False
        return True


_KINDS = {
    one.kind: one
    for one in (
        TeacherAccess(
            "model",
            Access.SAMPLER | Access.LOG_PROB | Access.NORMALIZED,
            "You can sample the teacher and evaluate it.",
            "the model",
        ),
        TeacherAccess(
            "text",
            Access.SAMPLES,
            "You have the teacher's text, and can ask it nothing.",
            "its text",
            "the data are the teacher's text, whose cross-entropy is the forward KL up to the text's entropy",
        ),
        TeacherAccess(
            "scores",
            Access.LOG_PROB | Access.NORMALIZED,
            "You can have the teacher score given tokens, and not sample it.",
            "its scores of given tokens",
            "the student draws continuations of the prompts, and the teacher scores their tokens",
        ),
    )
}
"""Every kind of teacher that stores nothing."""
_STORED = {"top_k": "the likeliest tokens with the mass of the rest", "draws": "draws of the next token"}
"""What there is of teachers that were stored, where it isn't known more exactly."""


Teacher = CausalModel | StoredTeacher | TokenScores | None


def teacher_of(teacher: Any, student: CausalModel | None = None) -> Teacher:
    """Return a teacher in the form in which it is asked; anything that is no kind of its own is a model."""
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
    known: TeacherAccess,
    divergence: RowDivergence,
    shares: Mapping[str, float],
    *,
    hard_label_weight: float = 0.0,
    temperature: float = 1.0,
) -> None:
    """Refuse what a teacher of this access can't be asked.

    Raises:
        InputError: the objective, the prefixes or the temperature need more of the teacher.
    """
    name = divergence.name
    refusals: list[tuple[bool, str, str, str]] = []
    if known.kind in ("top_k", "draws"):
        use, minimise = "use this stored teacher", f"minimise {name} with this stored teacher"
        captured = temperature if known.temperature is None else known.temperature
        refusals += [
            (shares["data"] < 1, use, "it has no laws after drawn tokens", "Use prefixes={'data': 1.0}, or pass a model"),
            (
                temperature != captured,
                f"use `temperature={temperature:g}` with stored laws",
                f"they were captured at temperature {captured:g}, and {temperature:g} needs the tokens that were left out",
                f"Use temperature={captured:g}, or capture it again",
            ),
            (
                known.kind == "top_k" and not divergence.coarsens,
                minimise,
                "it has a part of the teacher's law, and merged tokens don't bound this divergence",
                "Use objective='forward_kl', or pass a model",
            ),
            (
                known.kind == "draws" and name != "forward_kl",
                minimise,
                "it has draws of the teacher, which see nothing of what only the student writes",
                "Use objective='forward_kl', or capture the likeliest tokens by k=",
            ),
        ]
    elif known.kind == "text":
        refusals += [
            (
                name != "forward_kl" or shares["data"] < 1,
                f"minimise {name} {'' if shares['data'] == 1 else 'on drawn prefixes '}with text alone",
                "nobody can be asked, and the text's cross-entropy is the forward KL on its own prefixes, up to the entropy",
                "Use objective='forward_kl' and prefixes={'data': 1.0}, or pass a teacher",
            ),
            (
                bool(hard_label_weight) or temperature != 1,
                f"use `{'hard_label_weight' if hard_label_weight else 'temperature'}=` with text alone",
                "the cross-entropy of the text is the whole loss, and text has no other temperature",
                "Use hard_label_weight=0 and temperature=1, or pass a teacher",
            ),
        ]
    elif known.kind == "scores":
        is_wrong = name != "reverse_kl" or shares["student"] < 1 or temperature != 1
        because = "scores of given tokens give the log ratio of tokens that the student drew, and nothing else of a law"
        instead = "Use objective='reverse_kl', prefixes={'student': 1.0} and temperature=1, or pass a model"
        refusals += [(is_wrong, "train on `TokenScores` here", because, instead)]
    for is_refused, do, because, instead in refusals:
        if is_refused:
            raise InputError(cannot(do, because, instead))
