"""Penalties KL(policy‖reference) on tokens sampled from the policy: the estimators k1, k2 and k3, and a loss."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.distillation.losses.reduction import check_mask, check_reduction, reduce

LogProbs = Float[Tensor, "..."]
Mask = Bool[Tensor, "..."]

ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(
    *, policy: LogProbs, reference: LogProbs, estimator: str = "k1", mask: Mask | None = None, reduction: str = "mean"
) -> LogProbs:
    """Estimate KL(policy‖reference) from tokens drawn from the policy: a number to log, without a gradient.

    With r = log policy − log reference of a token drawn from the policy:

    ======  ==================  =====================  ==========================================================
    name    formula             value unbiased?        gradient, if it were used as a loss
    ======  ==================  =====================  ==========================================================
    k1      r                   yes; may be < 0        0 in expectation: it trains nothing
    k2      r²/2                no; ≥ 0, right to the  that of KL(policy‖reference), where the tokens were drawn
                                second order           from the present policy
    k3      r + e^(−r) − 1      yes; ≥ 0; its          that of KL(reference‖policy), the other direction
                                variance may be ∞
    ======  ==================  =====================  ==========================================================

    To train, use `kl_penalty_loss`. With logits available, `reverse_kl(teacher=reference, student=policy)` is exact for
    each position and has no variance.

    Args:
        policy: (…), log-probabilities in nats of the tokens drawn, under the policy that drew them.
        reference: (…), those under the reference.
        estimator: "k1", "k2" or "k3".
        mask: (…), True for tokens that count.
        reduction: "mean" over tokens that count (0 if there is none), "sum" or "none".

    Raises:
        InputError: shapes, the estimator, the mask or the reduction can't be used.

    Source: Schulman, Approximating KL divergence (2020); Tang & Munos, On a few pitfalls in KL divergence gradient
    estimation for RL (2025).

    >>> import torch
    >>> kl_estimate(policy=torch.tensor([-1.0, -2.0]), reference=torch.tensor([-1.5, -1.8]), estimator="k3")
    tensor(0.0640)
    """
    if not isinstance(estimator, str) or estimator not in ESTIMATORS:
        raise InputError(cannot(f"use estimator={estimator!r}", "it isn't known", f"Use one of {', '.join(ESTIMATORS)}"))
    ratio = _log_ratio(policy, reference, mask, reduction).detach()
    values = {"k1": lambda r: r, "k2": lambda r: r.square() / 2, "k3": lambda r: r + torch.expm1(-r)}[estimator](ratio)
    return reduce(values, mask, reduction)


def kl_penalty_loss(
    *, policy: LogProbs, reference: LogProbs, behaviour: LogProbs | None = None, mask: Mask | None = None, reduction: str = "mean"
) -> LogProbs:
    """Return a loss whose gradient is an unbiased estimate of that of KL(policy‖reference), from tokens drawn.

    w · r²/2 with r = log policy − log reference, and w = policy/behaviour held constant. Its gradient is w r ∇log policy; the
    mean of it over tokens of the behaviour policy is Σ r ∇policy = ∇KL(policy‖reference). Its value isn't a KL: log
    `kl_estimate`. Without w, tokens of an older policy give the gradient of something else.

    Each position is taken on its own, given what came before. The gradient of the KL of whole sequences has a further part, how
    a token changes what is penalised later: where that matters, put −r into the reward and let the policy gradient carry it.

    Args:
        policy: (…), log-probabilities in nats of the tokens drawn, with a gradient.
        reference: (…), those under the reference, a constant.
        behaviour: (…), those under the policy that drew the tokens; None: the policy itself, as it is now.
        mask: (…), True for tokens that count.
        reduction: "mean" over tokens that count (0 if there is none), "sum" or "none".

    Raises:
        InputError: shapes, the mask or the reduction can't be used.

    Source: Schulman, Approximating KL divergence (2020), k2; Tang & Munos (2025), for its gradient.

    >>> import torch
    >>> policy = torch.tensor([-1.0, -2.0], requires_grad=True)
    >>> kl_penalty_loss(policy=policy, reference=torch.tensor([-1.5, -1.8]), reduction="sum").backward()
    >>> policy.grad
    tensor([ 0.5000, -0.2000])
    """
    ratio = _log_ratio(policy, reference, mask, reduction)
    values = ratio.square() / 2
    if behaviour is not None:
        values = values * _log_ratio(policy, behaviour, mask, reduction).detach().exp()
    return reduce(values, mask, reduction)


def _log_ratio(policy: Any, reference: Any, mask: Mask | None, reduction: str) -> LogProbs:
    check_reduction(reduction)
    if not isinstance(policy, Tensor) or not isinstance(reference, Tensor):
        because = f"they are a {type(policy).__name__} and a {type(reference).__name__}"
        raise InputError(cannot("compare these log-probabilities", because, "Pass torch tensors"))
    check_mask(mask, policy.shape)
    if policy.shape != reference.shape or not (policy.is_floating_point() and reference.is_floating_point()):
        because = f"they are {policy.dtype} {tuple(policy.shape)} and {reference.dtype} {tuple(reference.shape)}"
        raise InputError(cannot("compare these log-probabilities", because, "Pass one float for each token drawn, of both"))
    dtype = torch.promote_types(torch.promote_types(policy.dtype, reference.dtype), torch.float32)
    if mask is not None:  # padding may hold anything, NaN too
        policy, reference = policy.masked_fill(~mask, 0.0), reference.masked_fill(~mask, 0.0)
    ratio: Tensor = policy.to(dtype) - reference.detach().to(dtype)
    return ratio
