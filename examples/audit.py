"""You have a distillation loss, yours or another's: find out what it computes, and what is wrong with it."""

import torch

import whichkl as wk


def forward_kl_they_say(student, teacher, labels):
    """A common form: the teacher's entropy is missing, so it's a cross-entropy, and isn't 0 when the student is the teacher."""
    rows = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)
    counts = labels != -100
    return (rows * counts).sum() / counts.sum().clamp(min=1)


def dial(*, teacher, student, mask=None, beta=0.5):
    """The generalised Jensen–Shannon divergence, with the two KLs put in its place at the ends."""
    if beta in (0, 1):
        return (wk.losses.reverse_kl if beta else wk.losses.forward_kl)(teacher=teacher.detach(), student=student, mask=mask)
    return wk.losses.jensen_shannon(teacher=teacher.detach(), student=student, mask=mask, weight=beta)


said = wk.audit(forward_kl_they_say, claims="forward_kl")  # the arguments' names tell how it's called
print(said)
assert not said.passed and said.identified.name == "cross_entropy"
assert said.wrong == {"cross_entropy", "not_zero_at_teacher", "not_what_it_claims"}

swept = wk.audit(dial, knobs={"beta": (0, 1)})
print(f"\n{swept.checks[-1]}")
assert swept.passed and swept.findings == {"knob_jumps"}

right = wk.audit(wk.losses.forward_kl, claims="forward_kl")
print(f"\n{right.identified}: {'passed' if right.passed else 'not passed'}")
assert right.passed and not right.findings

teacher = torch.randn(4, 7, 100)
assert wk.losses.forward_kl(teacher=teacher, student=teacher) == 0 < forward_kl_they_say(teacher, teacher, torch.ones(4, 7))
