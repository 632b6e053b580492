"""KL of rows of probabilities: right whatever the floats, nothing bad gets through, and no copy of the whole is made."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from whichkl._checks import InputError
from whichkl.divergences.exact import discrete
from whichkl.divergences.exact.discrete import rows
from whichkl.divergences.kinds import ForwardKLDivergence, ReverseKLDivergence

D = torch.float64
FORWARD, REVERSE = ForwardKLDivergence(), ReverseKLDivergence()


def reference(p, q):
    """The sum in long doubles, of the rows divided by their sums."""
    p, q = (np.asarray(one.to(D).numpy(), dtype=np.longdouble) for one in (p, q))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * (np.log(p) - np.log(q)), 0)
    return torch.from_numpy(terms.sum(-1).astype(np.float64))


def dirichlet(seed, n, atoms, concentration=1.0, dtype=torch.float32):
    rng = np.random.default_rng(seed)
    gammas = torch.from_numpy(rng.standard_gamma(concentration, size=(n, atoms)))
    return (gammas / gammas.sum(-1, keepdim=True)).to(dtype)


def close(p, q, rtol=1e-6, atol=1e-14):
    torch.testing.assert_close(rows(p, q, FORWARD), reference(p, q), rtol=rtol, atol=atol)
    torch.testing.assert_close(rows(q, p, REVERSE), reference(p, q), rtol=rtol, atol=atol)


# ---- right


@pytest.mark.parametrize("concentration", [0.01, 0.1, 1.0, 30.0])
@pytest.mark.parametrize(("n", "atoms"), [(40, 1), (500, 2), (300, 37), (7, 50_000), (2, 300_000)])
def test_rows_of_float32_are_right_to_a_millionth(n, atoms, concentration):
    p, q = dirichlet(0, n, atoms, concentration), dirichlet(1, n, atoms, concentration)
    close(p, q)


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3, 1e-5, 1e-7])
def test_near_rows_are_done_again_in_float64(size):
    p = dirichlet(0, 50, 1000)
    q = p * (1 + size * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))).clamp(min=0.1)
    close(p, q / q.sum(-1, keepdim=True))


def test_rounding_that_is_the_same_in_every_atom_stays_within_a_millionth():
    for size in np.geomspace(1e-3, 0.9, 60):
        q = torch.tensor([1 + size, 1 - size] * 500, dtype=D) / 1000
        close(torch.full((1, 1000), 1e-3), q.float()[None])


def test_a_row_from_itself_is_at_distance_zero():
    for dtype in (torch.float32, D):
        for concentration in (0.001, 1.0):
            p = dirichlet(0, 20, 5000, concentration, dtype)
            assert bool((rows(p, p, FORWARD) == 0).all())
            assert bool((rows(p, p * (1 + 3e-5), FORWARD) < 1e-12).all())


def test_float64_keeps_its_digits():
    for concentration in (0.01, 1.0, 1e4):
        p, q = (dirichlet(seed, 50, 2000, concentration, D) for seed in (0, 1))
        close(p, q, rtol=1e-12)
        close(p.float(), q, rtol=1e-12)


def test_sums_that_are_off_within_the_tolerance_are_divided_out():
    p, q = dirichlet(0, 20, 500), dirichlet(1, 20, 500)
    close(p * (1 + 8e-5), q * (1 - 8e-5))
    close(p * (1 + 9.95e-5), q)


def test_zeros_count_nothing_in_p_and_are_infinite_in_q():
    p, q = dirichlet(0, 30, 400), dirichlet(1, 30, 400)
    for one in (p, q):
        one[:, :100] = 0
        one /= one.sum(-1, keepdim=True)
    close(p, q)
    p[3, 200] = 0
    p[3] /= p[3].sum()
    close(p, q)
    assert rows(q, p, FORWARD)[3] == math.inf
    assert rows(p, q, REVERSE)[3] == math.inf
    assert int(rows(q, p, FORWARD).isinf().sum()) == 1
    hot = torch.eye(5)
    assert bool((rows(hot, hot, FORWARD) == 0).all())
    assert bool((rows(hot, hot.roll(1, 0), FORWARD) == math.inf).all())


@pytest.mark.parametrize("least", [1e-45, 1e-42, 1e-38, 1e-31, 1e-29])
def test_tiny_probabilities_of_float32_are_themselves(least):
    q = dirichlet(1, 20, 50)
    q[:, :9] = least
    q /= q.sum(-1, keepdim=True)
    close(dirichlet(0, 20, 50), q)
    close(q, dirichlet(0, 20, 50))
    close(q, q.flip(0))


def test_tiny_probabilities_of_float64_are_themselves():
    p, q = dirichlet(0, 4, 50, dtype=D), dirichlet(1, 4, 50, dtype=D)
    q[:, :9], q[0, 3] = 5e-324, 1e-300
    q /= q.sum(-1, keepdim=True)
    close(p, q, rtol=1e-12)
    close(q, p, rtol=1e-12)


def test_logits_may_be_huge_or_minus_infinity():
    logits = torch.tensor([[1e30, 0.0, -math.inf], [-1e4, -1e4, -1e4], [3e4, 3e4 - 1, -math.inf]])
    other = torch.tensor([[1e30, 1e30, -math.inf], [0.0, 0.0, math.log(2)], [1.0, 0.0, 0.0]])
    values = rows(logits, other, FORWARD, "logits")
    first, last = torch.tensor([1.0, 0.0]).softmax(0), torch.tensor([1.0, 0.0, 0.0]).softmax(0)
    wanted = [math.log(2), math.log(4 / 3) * 2 / 3 + math.log(2 / 3) / 3, float((first * (first / last[:2]).log()).sum())]
    assert values.tolist() == pytest.approx(wanted, rel=1e-6)
    assert rows(other, logits, FORWARD, "logits")[2] == math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_floats_are_right_or_refused(dtype):
    p, q = torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=dtype), torch.tensor([[0.5, 0.5], [0.125, 0.875]], dtype=dtype)
    close(p, q)
    with pytest.raises(InputError, match=r"row 0 of p sums to (1.00098|0.999756)"):
        rows(torch.full((1, 10), 0.1, dtype=dtype), torch.full((1, 10), 0.1, dtype=dtype), FORWARD)


def test_shapes_strides_gradients_and_blocks_change_nothing(monkeypatch):
    p, q = dirichlet(0, 60, 35).requires_grad_(), dirichlet(1, 60, 35)
    whole = rows(p, q, FORWARD)
    assert not whole.requires_grad
    torch.testing.assert_close(rows(p.reshape(3, 20, 35), q.reshape(3, 20, 35), FORWARD), whole.reshape(3, 20))
    torch.testing.assert_close(rows(p[4], q[4], FORWARD), whole[4])
    torch.testing.assert_close(rows(p.detach().T.contiguous().T, q, FORWARD), whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        rows(p, q[:1].expand(60, -1), FORWARD), reference(p.detach(), q[:1].expand(60, -1)), rtol=1e-6, atol=0
    )
    monkeypatch.setattr(discrete, "_NUMBERS_PER_KL_BLOCK", 8)  # a row in five blocks
    torch.testing.assert_close(rows(p, q, FORWARD), whole, rtol=1e-6, atol=0)


# ---- nothing bad gets through

BAD = [
    (-1e-12, "is -1e-12 at row 999, atom 999"),
    (math.nan, "is nan at row 999, atom 999"),
    (math.inf, "is inf at row 999, atom 999"),
    (-math.inf, "is -inf at row 999, atom 999"),
    (3e38, "row 999 of [pq] sums to 3e\\+38, not 1"),
    (3e-2, "row 999 of [pq] sums to 1.0[23]"),
]


@pytest.mark.parametrize(("value", "message"), BAD)
@pytest.mark.parametrize("kind", [FORWARD, REVERSE], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_the_last_atom_of_the_last_row_is_checked(value, message, kind, dtype):
    p, q = dirichlet(0, 1000, 1000, dtype=dtype), dirichlet(1, 1000, 1000, dtype=dtype)
    for who, one in (("p", p), ("q", q)):
        before = one[-1, -1].clone()
        one[-1, -1] = value
        with pytest.raises(InputError, match=message) as error:
            rows(p, q, kind)
        assert f"{who} is" in str(error.value) or f"of {who} sums" in str(error.value)
        one[-1, -1] = before
    rows(p, q, kind)


def test_two_negatives_make_no_positive():
    p, q = torch.tensor([[0.5, 0.6, -0.1]]), torch.tensor([[0.6, 0.5, -0.1]])
    with pytest.raises(InputError, match="p is -0.1 at row 0, atom 2"):
        rows(p, q, FORWARD)
    with pytest.raises(InputError, match="q is -0.2 at row 0, atom 1"):
        rows(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.2, -0.2]]), FORWARD)


def test_bad_rows_among_infinite_ones_are_found():
    p, q = torch.eye(4), torch.eye(4).roll(1, 0)
    q[2] = torch.tensor([0.5, 0.5, 0.5, 0.0])
    with pytest.raises(InputError, match=r"row 2 of q sums to 1.5"):
        rows(p, q, FORWARD)


# ---- memory

PROGRAM = """
import json, resource, torch
from whichkl.divergences.exact.discrete import rows
from whichkl.divergences.kinds import ForwardKLDivergence
torch.set_num_threads(1)
p, q = torch.rand(2, 2500, 20_000)
p /= p.sum(-1, keepdim=True); q /= q.sum(-1, keepdim=True)
rows(p[:20], q[:20], ForwardKLDivergence())
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
rows(p, q, ForwardKLDivergence()); forward = peak() - before
rows(p, (p + 1e-3 * q) / 1.001, ForwardKLDivergence())
print(json.dumps([before, forward, p.nbytes / 2**20]))
"""


def test_no_copy_of_the_whole_is_made():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    before, extra, size = json.loads(done.stdout)
    assert before > 2 * size
    assert extra < size / 10
