"""Penalties on tokens drawn: values and gradients against enumeration over the vocabulary."""

import math

import pytest
import torch

from whichkl import losses as wl
from whichkl._checks import InputError

V = 6


def logits(seed):
    return torch.randn(V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(leaf, reference):
    return leaf.log_softmax(-1), reference.log_softmax(-1)


def expected_gradient(loss_of_token, drawn_from):
    """The gradient by the logits of E_drawn[loss(token)] where the draws are held fixed, as backpropagation has it."""
    leaf = logits(0).requires_grad_()
    policy, reference = rows(leaf, logits(1))
    (drawn_from.detach() * loss_of_token(policy, reference)).sum().backward()
    return leaf.grad


def true_gradient(function):
    leaf = logits(0).requires_grad_()
    function(teacher=logits(1), student=leaf).backward()
    return leaf.grad


def test_values_against_enumeration():
    policy, reference = rows(logits(0), logits(1))
    truth = wl.reverse_kl(teacher=logits(1), student=logits(0))
    means = {}
    for name in ("k1", "k2", "k3"):
        values = wl.kl_estimate(policy=policy, reference=reference, estimator=name, reduction="none")
        means[name] = (policy.exp() * values).sum()
        assert (values >= 0).all() or name == "k1"
    assert means["k1"].item() == pytest.approx(truth.item(), abs=1e-12)
    assert means["k3"].item() == pytest.approx(truth.item(), abs=1e-12)
    assert abs(means["k2"] - truth) > 0.01 * truth
    near = logits(0) + 1e-3 * logits(1)
    policy, reference = rows(near, logits(0))
    small = wl.reverse_kl(teacher=logits(0), student=near)
    second = (policy.exp() * wl.kl_estimate(policy=policy, reference=reference, estimator="k2", reduction="none")).sum()
    assert second.item() == pytest.approx(small.item(), rel=1e-2)


def test_gradients_of_the_estimators_as_losses_are_what_the_table_says():
    draws = logits(0).softmax(-1)
    reverse, forward = true_gradient(wl.reverse_kl), true_gradient(wl.forward_kl)
    k1 = expected_gradient(lambda a, b: a - b, draws)
    k2 = expected_gradient(lambda a, b: (a - b).square() / 2, draws)
    k3 = expected_gradient(lambda a, b: (a - b) + torch.expm1(b - a), draws)
    torch.testing.assert_close(k1, torch.zeros(V, dtype=torch.float64), atol=1e-14, rtol=0)
    torch.testing.assert_close(k2, reverse, atol=1e-12, rtol=0)
    torch.testing.assert_close(k3, forward, atol=1e-12, rtol=0)
    assert (forward - reverse).norm() > 0.1 * reverse.norm()


def test_the_loss_has_the_gradient_of_reverse_kl_whoever_drew_the_tokens():
    reverse = true_gradient(wl.reverse_kl)
    got = expected_gradient(lambda a, b: wl.kl_penalty_loss(policy=a, reference=b, reduction="none"), logits(0).softmax(-1))
    torch.testing.assert_close(got, reverse, atol=1e-12, rtol=0)
    older = (logits(0) + logits(2)).log_softmax(-1)
    weighted = expected_gradient(
        lambda a, b: wl.kl_penalty_loss(policy=a, reference=b, behaviour=older, reduction="none"), older.exp()
    )
    torch.testing.assert_close(weighted, reverse, atol=1e-12, rtol=0)
    bare = expected_gradient(lambda a, b: wl.kl_penalty_loss(policy=a, reference=b, reduction="none"), older.exp())
    assert (bare - reverse).norm() > 0.1 * reverse.norm()


def test_the_estimates_carry_no_gradient_and_masks_keep_padding_out():
    leaf = torch.tensor([-1.0, math.nan, -2.0], requires_grad=True)
    reference, mask = torch.tensor([-1.5, 0.0, math.nan]), torch.tensor([True, False, False])
    value = wl.kl_estimate(policy=leaf, reference=reference, mask=mask)
    assert value.item() == 0.5
    assert not value.requires_grad
    loss = wl.kl_penalty_loss(
        policy=leaf, reference=reference, behaviour=torch.full((3,), math.nan).masked_fill(mask, -1.0), mask=mask
    )
    loss.backward()
    assert leaf.grad.tolist() == [0.5, 0.0, 0.0]
    nothing = wl.kl_penalty_loss(policy=leaf, reference=reference, mask=~mask & mask)
    assert nothing.item() == 0
    narrow = wl.kl_estimate(policy=torch.tensor([-1.0]).bfloat16(), reference=torch.tensor([-1.5]).bfloat16(), estimator="k2")
    assert narrow.dtype == torch.float32


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"estimator": "k4"}, "k1, k2, k3"),
        ({"reference": torch.zeros(3)}, "one float for each token"),
        ({"reference": torch.zeros(2, dtype=torch.long)}, "one float for each token"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, "torch.bool"),
        ({"reduction": "average"}, "mean, sum, none"),
    ],
)
def test_bad_input_is_refused(wrong, match):
    with pytest.raises(InputError, match=match):
        wl.kl_estimate(**({"policy": torch.zeros(2), "reference": torch.zeros(2)} | wrong))
