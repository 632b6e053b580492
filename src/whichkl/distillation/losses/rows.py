"""Divergences between rows of logits: forward KL is KL(teacher‖student), reverse KL is KL(student‖teacher)."""

from __future__ import annotations

from whichkl.distillation.losses.adaptive import RowAdaptiveKL, RowInterpolatedKL
from whichkl.distillation.losses.kinds import (
    RowForwardKL,
    RowJeffreys,
    RowJensenShannon,
    RowRenyi,
    RowReverseKL,
    RowSkewForwardKL,
    RowSkewReverseKL,
    RowTotalVariation,
)
from whichkl.distillation.losses.logits import Logits, Loss, Mask, Teacher, of_logits


def forward_kl(
    *,
    teacher: Teacher,
    student: Logits,
    temperature: float = 1.0,
    mask: Mask | None = None,
    reduction: str = "mean",
    vocabulary: int | None = None,
    temperature_squared: bool = False,
) -> Loss:
    """KL(teacher‖student) = Σ p log(p/q), the expectation under the teacher; 0 only where the rows agree.

    It isn't the cross-entropy: the teacher's entropy is taken away. Mass-covering: what the teacher does, the student must.

    Arguments, results and errors are those of `of_logits`. Source: Hinton, Vinyals & Dean, Distilling the knowledge in a
    neural network (2015).

    >>> import torch
    >>> forward_kl(teacher=torch.tensor([[0.0, 1.0, 2.0]]), student=torch.zeros(1, 3))
    tensor(0.2662)
    """
    return of_logits(
        RowForwardKL(),
        teacher=teacher,
        student=student,
        temperature=temperature,
        mask=mask,
        reduction=reduction,
        vocabulary=vocabulary,
        temperature_squared=temperature_squared,
    )


def reverse_kl(
    *,
    teacher: Teacher,
    student: Logits,
    temperature: float = 1.0,
    mask: Mask | None = None,
    reduction: str = "mean",
    vocabulary: int | None = None,
    temperature_squared: bool = False,
) -> Loss:
    """KL(student‖teacher) = Σ q log(q/p), the expectation under the student.

    What the student does must be likely under the teacher; what it leaves out costs little.

    Arguments, results and errors are those of `of_logits`. Source: Gu et al., MiniLLM (2024).

    >>> import torch
    >>> reverse_kl(teacher=torch.tensor([[0.0, 1.0, 2.0]]), student=torch.zeros(1, 3))
    tensor(0.3090)
    """
    return of_logits(
        RowReverseKL(),
        teacher=teacher,
        student=student,
        temperature=temperature,
        mask=mask,
        reduction=reduction,
        vocabulary=vocabulary,
        temperature_squared=temperature_squared,
    )


def jeffreys(
    *,
    teacher: Teacher,
    student: Logits,
    weight_on_forward: float = 0.5,
    temperature: float = 1.0,
    mask: Mask | None = None,
    reduction: str = "mean",
    vocabulary: int | None = None,
    temperature_squared: bool = False,
) -> Loss:
    """Return w KL(teacher‖student) + (1 − w) KL(student‖teacher), w = `weight_on_forward` in [0, 1].

    Continuous at both ends. Jeffreys' own J counts both KLs fully: it is twice the value at w = ½.

    Arguments, results and errors are those of `of_logits`. Source: Jeffreys (1946).

    >>> import torch
    >>> jeffreys(teacher=torch.tensor([[0.0, 1.0, 2.0]]), student=torch.zeros(1, 3))
    tensor(0.2876)
    """
    return of_logits(
        RowJeffreys(weight_on_forward),
        teacher=teacher,
        student=student,
        temperature=temperature,
        mask=mask,
        reduction=reduction,
        vocabulary=vocabulary,
        temperature_squared=temperature_squared,
    )


def jensen_shannon(
    *,
    teacher: Teacher,
    student: Logits,
    weight: float = 0.5,
    temperature: float = 1.0,
    mask: Mask | None = None,
    reduction: str = "mean",
    vocabulary: int | None = None,
    temperature_squared: bool = False,
) -> Loss:
    """Return w KL(p‖m) + (1 − w) KL(q‖m), m = w p + (1 − w) q, w = `weight` on the teacher, strictly in (0, 1).

    At most log 2, never infinite. It falls to 0 as w goes to 0 or 1: w is no dial between the two KLs; `jeffreys` has one.

    Arguments, results and errors are those of `of_logits`. Source: Lin (1991); Agarwal et al., GKD (2024), β = `weight`.

    >>> import torch
    >>> jensen_shannon(teacher=torch.tensor([[0.0, 1.0, 2.0]]), student=torch.zeros(1, 3))
    tensor(0.0687)
    """
    return of_logits(
        RowJensenShannon(weight),
        teacher=teacher,
        student=student,
        temperature=temperature,
        mask=mask,
        reduction=reduction,
        vocabulary=vocabulary,
        temperature_squared=temperature_squared,
    )


def skew_forward_kl(
    *,
    teacher: Teacher,
    student: Logits,
    skew: float = 0.1,
    temperature: float = 1.0,
    mask: Mask | None = None,
    reduction: str = "mean",
    vocabulary: int | None = None,
    temperature_squared: bool = False,
) -> Loss:
    """KL(p‖s p + (1 − s) q), s = `skew` in [0, 1): the forward KL at 0, at most −log s above it.

    Arguments, results and errors are those of `of_logits`. Source: Ko et al., DistiLLM (2024).

    >>> import torch
    >>> skew_forward_kl(teacher=torch.tensor([[0.0, 1.0, 2.0]]), student=torch.zeros(1, 3))
    tensor(0.2165)
    """
    return of_logits(
        RowSkewForwardKL(skew),
        teacher=teacher,
        student=student,
        temperature=temperature,
        mask=mask,
        reduction=reduction,
        vocabulary=vocabulary,
        temperature_squared=temperature_squared,
    )


def skew_reverse_kl(
    *,
    teacher: Teacher,
    student: Logits,
    skew: float = 0.1,
    temperature: float = 1.0,
    mask: Mask | None = None,
    reduction: str = "mean",
    vocabulary: int | None = None,
    temperature_squared: bool = False,
) -> Loss:
    """KL(q‖s q + (1 − s) p), s = `skew` in [0, 1): the reverse KL at 0, at most −log s above it.

    The gradient includes that through the mixture.

    Arguments, results and errors are those of `of_logits`. Source: Ko et al., DistiLLM (2024).

    >>> import torch
    >>> skew_reverse_kl(teacher=torch.tensor([[0.0, 1.0, 2.0]]), student=torch.zeros(1, 3))
    tensor(0.2345)
    """
    return of_logits(
        RowSkewReverseKL(skew),
        teacher=teacher,
        student=student,
        temperature=temperature,
        mask=mask,
        reduction=reduction,
        vocabulary=vocabulary,
        temperature_squared=temperature_squared,
    )


def renyi(
    *,
    teacher: Teacher,
    student: Logits,
    order: float = 0.5,
    temperature: float = 1.0,
    mask: Mask | None = None,
    reduction: str = "mean",
    vocabulary: int | None = None,
    temperature_squared: bool = False,
) -> Loss:
    """Return log Σ p^a q^(1−a) / (a − 1), a = `order` > 0: the forward KL at order 1.

    As a → 0 what is left, over a, is the reverse KL; above order 1 mass that the student lacks weighs more.

    Arguments, results and errors are those of `of_logits`. Source: Rényi (1961); van Erven & Harremoës (2014).

    >>> import torch
    >>> renyi(teacher=torch.tensor([[0.0, 1.0, 2.0]]), student=torch.zeros(1, 3))
    tensor(0.1457)
    """
    return of_logits(
        RowRenyi(order),
        teacher=teacher,
        student=student,
        temperature=temperature,
        mask=mask,
        reduction=reduction,
        vocabulary=vocabulary,
        temperature_squared=temperature_squared,
    )


def total_variation(
    *,
    teacher: Teacher,
    student: Logits,
    temperature: float = 1.0,
    mask: Mask | None = None,
    reduction: str = "mean",
    vocabulary: int | None = None,
    temperature_squared: bool = False,
) -> Loss:
    """½ Σ |p − q|, between 0 and 1: the most that any event's probability differs by.

    Its gradient doesn't shrink as the rows agree.

    Arguments, results and errors are those of `of_logits`. Source: Wen et al., f-divergence minimization for sequence-level
    knowledge distillation (2023).

    >>> import torch
    >>> total_variation(teacher=torch.tensor([[0.0, 1.0, 2.0]]), student=torch.zeros(1, 3))
    tensor(0.3319)
    """
    return of_logits(
        RowTotalVariation(),
        teacher=teacher,
        student=student,
        temperature=temperature,
        mask=mask,
        reduction=reduction,
        vocabulary=vocabulary,
        temperature_squared=temperature_squared,
    )


def adaptive_kl(
    *,
    teacher: Teacher,
    student: Logits,
    head_mass: float = 0.5,
    temperature: float = 1.0,
    mask: Mask | None = None,
    reduction: str = "mean",
    vocabulary: int | None = None,
    temperature_squared: bool = False,
) -> Loss:
    """Return w KL(p‖q) + (1 − w) KL(q‖p), w the share of |p − q| in the teacher's head.

    The head is the teacher's likeliest tokens up to `head_mass`. The weights are constants in the gradient.

    Arguments, results and errors are those of `of_logits`. Source: Wu et al., Rethinking Kullback-Leibler divergence in
    knowledge distillation (2024).

    >>> import torch
    >>> adaptive_kl(teacher=torch.tensor([[0.0, 1.0, 2.0]]), student=torch.zeros(1, 3))
    tensor(0.2876)
    """
    return of_logits(
        RowAdaptiveKL(head_mass),
        teacher=teacher,
        student=student,
        temperature=temperature,
        mask=mask,
        reduction=reduction,
        vocabulary=vocabulary,
        temperature_squared=temperature_squared,
    )


def interpolated_kl(
    *,
    teacher: Teacher,
    student: Logits,
    weight_on_teacher: float = 0.5,
    temperature: float = 1.0,
    mask: Mask | None = None,
    reduction: str = "mean",
    vocabulary: int | None = None,
    temperature_squared: bool = False,
) -> Loss:
    """KL(m‖q), m ∝ p^w q^(1−w), w = `weight_on_teacher` in (0, 1], q a constant in m.

    A teacher that starts near the student: raise w to 1 in the course of training.

    Arguments, results and errors are those of `of_logits`. Source: Shing et al., TAID (2025).

    >>> import torch
    >>> interpolated_kl(teacher=torch.tensor([[0.0, 1.0, 2.0]]), student=torch.zeros(1, 3))
    tensor(0.0784)
    """
    return of_logits(
        RowInterpolatedKL(weight_on_teacher),
        teacher=teacher,
        student=student,
        temperature=temperature,
        mask=mask,
        reduction=reduction,
        vocabulary=vocabulary,
        temperature_squared=temperature_squared,
    )
