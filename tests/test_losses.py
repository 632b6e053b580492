"""Row divergences against enumeration in plain Python, their closed-form gradients against autograd, and their laws."""

import math

import pytest
import torch

from whichkl import losses as wl
from whichkl._checks import InputError
from whichkl.divergences.kinds import ROW_DIVERGENCES

INF = math.inf
PARAMETERS = {
    "forward_kl": [{}],
    "reverse_kl": [{}],
    "jeffreys": [{"weight_on_forward": w} for w in (0.0, 0.3, 0.5, 1.0)],
    "jensen_shannon": [{"weight": w} for w in (0.1, 0.5, 0.9)],
    "skew_forward_kl": [{"weight": s} for s in (0.0, 0.1, 0.7)],
    "skew_reverse_kl": [{"weight": s} for s in (0.0, 0.1, 0.7)],
    "renyi": [{"order": a} for a in (0.3, 0.5, 1.0, 2.0, 3.5)],
    "total_variation": [{}],
    "adaptive_kl": [{"head_mass": m} for m in (0.2, 0.5, 0.9)],
    "interpolated_kl": [{"weight_on_teacher": w} for w in (0.2, 0.5, 1.0)],
}
CASES = [(name, given) for name, all_given in PARAMETERS.items() for given in all_given]
IDS = [f"{name}-{'-'.join(str(v) for v in given.values())}" for name, given in CASES]
every_case = pytest.mark.parametrize(("name", "given"), CASES, ids=IDS)
every_name = pytest.mark.parametrize("name", list(PARAMETERS))


def plain_kl(a, b):
    return math.fsum(INF if y == 0 else x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def weigh(weight, value):
    return 0.0 if weight == 0 else weight * value


def enumerate_row(name, given, p, q):
    """The definition, token by token, on lists of probabilities."""
    if name == "forward_kl":
        return plain_kl(p, q)
    if name == "reverse_kl":
        return plain_kl(q, p)
    if name == "jeffreys":
        w = given["weight_on_forward"]
        return weigh(w, plain_kl(p, q)) + weigh(1 - w, plain_kl(q, p))
    if name == "jensen_shannon":
        w = given["weight"]
        m = [w * x + (1 - w) * y for x, y in zip(p, q, strict=True)]
        return w * plain_kl(p, m) + (1 - w) * plain_kl(q, m)
    if name == "skew_forward_kl":
        return plain_kl(p, [given["weight"] * x + (1 - given["weight"]) * y for x, y in zip(p, q, strict=True)])
    if name == "skew_reverse_kl":
        return plain_kl(q, [given["weight"] * y + (1 - given["weight"]) * x for x, y in zip(p, q, strict=True)])
    if name == "renyi":
        a = given["order"]
        if a == 1:
            return plain_kl(p, q)
        if a > 1 and any(x > 0 == y for x, y in zip(p, q, strict=True)):
            return INF
        total = math.fsum(x**a * y ** (1 - a) for x, y in zip(p, q, strict=True) if x > 0 and y > 0)
        return math.log(total) / (a - 1) if total > 0 else INF
    if name == "total_variation":
        return math.fsum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2
    if name == "adaptive_kl":
        head, mass = set(), 0.0
        for token in sorted(range(len(p)), key=lambda i: -p[i]):
            if mass >= given["head_mass"]:
                break
            head.add(token)
            mass += p[token]
        gaps = [abs(x - y) for x, y in zip(p, q, strict=True)]
        w = math.fsum(gaps[i] for i in head) / math.fsum(gaps) if math.fsum(gaps) > 0 else 0.5
        return weigh(w, plain_kl(p, q)) + weigh(1 - w, plain_kl(q, p))
    w = given["weight_on_teacher"]
    m = [x**w * y ** (1 - w) for x, y in zip(p, q, strict=True)]
    total = math.fsum(m)
    return plain_kl([x / total for x in m], q)


def probabilities(row, temperature=1.0):
    top = max(row)
    e = [math.exp((x - top) / temperature) for x in row]
    return [x / math.fsum(e) for x in e]


def pair(rows=5, vocabulary=17, spread=2.0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = [spread * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) for _ in range(2)]
    return draw[0].to(dtype), draw[1].to(dtype)


def of(name, given):
    return wl.DIVERGENCES[name].divergence(**given)


@every_case
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_values_match_enumeration(name, given, temperature):
    for vocabulary in (2, 17, 50):
        teacher, student = pair(vocabulary=vocabulary)
        got = wl.DIVERGENCES[name].function(teacher=teacher, student=student, temperature=temperature, reduction="none", **given)
        for value, t, s in zip(got.tolist(), teacher.tolist(), student.tolist(), strict=True):
            assert value == pytest.approx(
                enumerate_row(name, given, probabilities(t, temperature), probabilities(s, temperature)), abs=1e-10
            )


@every_case
def test_values_match_enumeration_with_impossible_tokens(name, given):
    """Each pattern of −inf: in the teacher, in the student, in both, in nothing else."""
    teacher, student = pair(rows=4, vocabulary=6)
    teacher[0, 1], student[1, 2], teacher[2, 3], student[2, 3] = -INF, -INF, -INF, -INF
    teacher[3, :3], student[3, 3:] = -INF, -INF
    teacher.requires_grad_()
    student.requires_grad_()
    if name == "interpolated_kl" and given["weight_on_teacher"] < 1:  # rows without a common token have no such teacher
        teacher, student = teacher[:3], student[:3]
    values = wl.DIVERGENCES[name].function(teacher=teacher, student=student, reduction="none", **given)
    for value, t, s in zip(values.tolist(), teacher.tolist(), student.tolist(), strict=True):
        assert value == pytest.approx(enumerate_row(name, given, probabilities(t), probabilities(s)), abs=1e-10)
    values.sum().backward()
    log_p, log_q = teacher.detach().log_softmax(-1), student.detach().log_softmax(-1)
    again, slope = of(name, given).gradient(log_p, log_q)
    assert torch.equal(again.isinf(), values.isinf())
    assert slope.isfinite().all()
    assert (slope[values.isinf()] == 0).all()


def gradients(name, given, teacher, student):
    student = student.clone().requires_grad_()
    wl.DIVERGENCES[name].function(teacher=teacher, student=student, reduction="sum", **given).backward()
    return student.grad


@every_case
def test_gradients_match_closed_forms_with_impossible_tokens(name, given):
    teacher, student = pair(rows=3, vocabulary=6)
    teacher[0, 1], student[1, 2], teacher[2, 3], student[2, 3] = -INF, -INF, -INF, -INF
    got = gradients(name, given, teacher, student)
    assert got.isfinite().all()
    _, slope = of(name, given).gradient(teacher.log_softmax(-1), student.log_softmax(-1))
    torch.testing.assert_close(got, slope, atol=1e-10, rtol=0)


@every_case
def test_gradients_match_finite_differences_and_closed_forms(name, given):
    teacher, student = pair(rows=2, vocabulary=9)
    got = gradients(name, given, teacher, student)
    value, slope = of(name, given).gradient(teacher.log_softmax(-1), student.log_softmax(-1))
    torch.testing.assert_close(got, slope, atol=1e-10, rtol=0)
    known, quick = of(name, given).gradient(teacher.log_softmax(-1), student.log_softmax(-1), all_possible=True)
    torch.testing.assert_close(quick, slope, atol=1e-12, rtol=0)
    torch.testing.assert_close(known, value, atol=1e-12, rtol=0)
    torch.testing.assert_close(value, of(name, given).value(teacher.log_softmax(-1), student.log_softmax(-1)), atol=1e-12, rtol=0)
    function = wl.DIVERGENCES[name].function
    if name in ("adaptive_kl", "interpolated_kl"):
        return  # parts are held constant: not the gradient of the value
    assert torch.autograd.gradcheck(
        lambda t, s: function(teacher=t, student=s, temperature=1.3, **given),
        (teacher.requires_grad_(), student.requires_grad_()),
    )


@every_case
def test_laws(name, given):
    teacher, student = pair(rows=50, vocabulary=11)
    function = wl.DIVERGENCES[name].function
    values = function(teacher=teacher, student=student, reduction="none", **given)
    assert (values > 0).all()
    shifted = teacher + torch.randn(50, 1, dtype=torch.float64)
    same = shifted.clone().requires_grad_()
    zero = function(teacher=teacher, student=same, reduction="none", **given)
    torch.testing.assert_close(zero, torch.zeros(50, dtype=torch.float64), atol=1e-14, rtol=0)
    assert (zero >= 0).all()
    exact = function(teacher=teacher, student=teacher, reduction="none", **given)
    assert (exact <= 1e-15).all()
    if name != "total_variation":  # its gradient jumps at equality
        zero.sum().backward()
        assert same.grad.abs().max() < 1e-14
    back = function(teacher=student, student=teacher, reduction="none", **given)
    symmetric = of(name, {}).symmetric and given == {} or given in ({"weight": 0.5}, {"weight_on_forward": 0.5}, {"order": 0.5})
    assert torch.allclose(values, back, atol=1e-12) == symmetric


@every_name
def test_declared_properties_are_true(name):
    entry = wl.DIVERGENCES[name]
    divergence, (teacher, student) = entry.divergence(), pair(rows=30, vocabulary=8)
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    apart_p, apart_q = torch.tensor([[0.0, -INF]]), torch.tensor([[-INF, 0.0]])
    if name != "interpolated_kl":
        assert bool(divergence.value(apart_p, apart_q).isfinite()) == divergence.bounded
    if divergence.sums:
        torch.testing.assert_close(divergence.terms(log_p, log_q).sum(-1), divergence.value(log_p, log_q), atol=1e-12, rtol=0)
    else:
        with pytest.raises(InputError, match="isn't a sum"):
            divergence.terms(log_p, log_q)
    assert entry.function.__name__ == divergence.name == name
    assert set(entry.parameters) == {key for given in PARAMETERS[name] for key in given}


def test_direction():
    """Forward is the expectation under the teacher, reverse under the student, by sampling."""
    teacher, student = pair(rows=1, vocabulary=5, spread=1.0)
    log_p, log_q = teacher.log_softmax(-1)[0], student.log_softmax(-1)[0]
    generator = torch.Generator().manual_seed(1)
    for name, log_a, log_b in (("forward_kl", log_p, log_q), ("reverse_kl", log_q, log_p)):
        tokens = torch.multinomial(log_a.exp(), 20_000, replacement=True, generator=generator)
        ratios = (log_a - log_b)[tokens]
        value = wl.DIVERGENCES[name].function(teacher=teacher, student=student)
        assert abs(ratios.mean() - value) < 4 * ratios.std() / math.sqrt(len(ratios))
    cross_entropy = -(log_p.exp() * log_q).sum()
    entropy = -(log_p.exp() * log_p).sum()
    forward = wl.forward_kl(teacher=teacher, student=student)
    torch.testing.assert_close(forward, cross_entropy - entropy, atol=1e-12, rtol=0)


def test_ends_of_knobs_meet_what_they_should():
    teacher, student = pair()
    forward, reverse = wl.forward_kl(teacher=teacher, student=student), wl.reverse_kl(teacher=teacher, student=student)

    def near(got, wanted, gap):
        assert abs(got - wanted) < gap * wanted

    near(wl.jeffreys(teacher=teacher, student=student, weight_on_forward=1 - 1e-9), forward, 1e-8)
    near(wl.jeffreys(teacher=teacher, student=student, weight_on_forward=1e-9), reverse, 1e-8)
    near(wl.skew_forward_kl(teacher=teacher, student=student, weight=1e-9), forward, 1e-6)
    near(wl.skew_reverse_kl(teacher=teacher, student=student, weight=1e-9), reverse, 1e-6)
    near(wl.renyi(teacher=teacher, student=student, order=1 + 1e-6), forward, 1e-4)
    near(wl.renyi(teacher=teacher, student=student, order=1e-6) / 1e-6, reverse, 1e-4)
    near(wl.interpolated_kl(teacher=teacher, student=student, weight_on_teacher=1 - 1e-9), forward, 1e-6)
    assert wl.jensen_shannon(teacher=teacher, student=student, weight=1e-9) < 1e-6
    near(wl.jensen_shannon(teacher=teacher, student=student, weight=1e-7) / 1e-7, forward, 1e-3)
    assert wl.jensen_shannon(teacher=teacher, student=student) <= math.log(2)


@pytest.mark.parametrize("name", ["skew_forward_kl", "skew_reverse_kl"])
def test_the_former_name_of_the_weight_still_works(name):
    teacher, student = pair()
    with pytest.warns(DeprecationWarning, match="write `weight=`") as seen:
        old = wl.DIVERGENCES[name].function(teacher=teacher, student=student, skew=0.3)
        assert wl.divergence_named(name, skew=0.3) == wl.DIVERGENCES[name].divergence(weight=0.3)
    assert seen[0].filename == __file__
    assert old == wl.DIVERGENCES[name].function(teacher=teacher, student=student, weight=0.3)
    with pytest.raises(TypeError, match="order"):
        wl.DIVERGENCES[name].function(teacher=teacher, student=student, order=0.3)


def test_a_divergence_that_is_registered_is_a_loss():
    assert list(wl.DIVERGENCES) == list(ROW_DIVERGENCES)
    assert all(getattr(wl, name) is entry.function and name in wl.__all__ for name, entry in wl.DIVERGENCES.items())


@every_name
def test_padding_masks_and_reductions(name):
    function = wl.DIVERGENCES[name].function
    teacher, student = pair(rows=6, vocabulary=9)
    plain = function(teacher=teacher, student=student, reduction="none")
    wide_t = torch.cat([teacher, torch.full((6, 3), -INF, dtype=torch.float64)], -1)
    wide_s = torch.cat([student, torch.randn(6, 5, dtype=torch.float64)], -1).requires_grad_()
    padded = function(teacher=wide_t, student=wide_s, reduction="none", vocabulary=9)
    torch.testing.assert_close(padded, plain, atol=1e-12, rtol=0)
    padded.sum().backward()
    assert (wide_s.grad[:, 9:] == 0).all()
    mask = torch.tensor([True, False, True, True, False, False])
    broken_t, broken_s = teacher.clone(), student.clone()
    broken_t[1], broken_s[4], broken_s[5, 0] = math.nan, math.nan, INF
    broken_s.requires_grad_()
    for reduction, wanted in (("none", plain * mask), ("sum", plain[mask].sum()), ("mean", plain[mask].mean())):
        got = function(teacher=broken_t, student=broken_s, mask=mask, reduction=reduction)
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)
        broken_s.grad = None
        got.sum().backward()
        assert broken_s.grad.isfinite().all()
        assert (broken_s.grad[~mask] == 0).all()
    shaped = function(teacher=teacher.view(2, 3, 9), student=student.view(2, 3, 9), mask=mask.view(2, 3))
    torch.testing.assert_close(shaped, plain[mask].mean(), atol=1e-12, rtol=0)
    broken_s.grad = None
    nothing = function(teacher=broken_t, student=broken_s, mask=torch.zeros(6, dtype=torch.bool))
    nothing.backward()
    assert nothing.item() == 0
    assert (broken_s.grad == 0).all()
    assert function(teacher=teacher[:0], student=student[:0]).item() == 0
    assert function(teacher=teacher[0], student=student[0]).item() == pytest.approx(plain[0].item(), abs=1e-12)


def test_temperature_and_its_square():
    teacher, student = pair()
    plain = wl.forward_kl(teacher=teacher / 3, student=student / 3)
    torch.testing.assert_close(wl.forward_kl(teacher=teacher, student=student, temperature=3.0), plain)
    torch.testing.assert_close(
        wl.forward_kl(teacher=teacher, student=student, temperature=3.0, temperature_squared=True), 9 * plain
    )
    sizes = {}
    for squared in (False, True):
        for temperature in (50.0, 500.0):
            leaf = student.clone().requires_grad_()
            wl.forward_kl(teacher=teacher, student=leaf, temperature=temperature, temperature_squared=squared).backward()
            sizes[squared, temperature] = leaf.grad.norm().item()
    assert sizes[False, 500.0] / sizes[False, 50.0] == pytest.approx(1e-2, rel=0.05)
    assert sizes[True, 500.0] / sizes[True, 50.0] == pytest.approx(1, rel=0.05)


@every_name
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_logits_are_summed_in_float32(name, dtype):
    """Late in training the KL is small: rounding in the logits' own dtype would drown it, and turn it negative."""
    teacher = (3 * torch.randn(40, 5000)).to(dtype)
    student = (teacher.float() + 0.02 * torch.randn(40, 5000)).to(dtype)
    got = wl.DIVERGENCES[name].function(teacher=teacher, student=student, reduction="none")
    truth = wl.DIVERGENCES[name].function(teacher=teacher.double(), student=student.double(), reduction="none")
    assert got.dtype == torch.float32
    assert (got >= 0).all()
    torch.testing.assert_close(got.double(), truth, rtol=5e-3, atol=2e-7)
    log_p, log_q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    exact = of(name, {}).gradient(teacher.double().log_softmax(-1), student.double().log_softmax(-1))[1]
    for all_possible in (False, True):
        value, slope = of(name, {}).gradient(log_p, log_q, all_possible=all_possible)
        torch.testing.assert_close(value.double(), truth, rtol=5e-3, atol=2e-7)
        assert (slope - exact).norm() < 1e-3 * exact.norm()


def test_float32_keeps_small_divergences():
    """A KL of about 1e-6 over 32,000 tokens: the normalisers' rounding, which is as large, cancels."""
    teacher = 3 * torch.randn(20, 32_000)
    student = teacher + 1.5e-3 * torch.randn(20, 32_000) + 7.0
    for function in (wl.forward_kl, wl.reverse_kl):
        got = function(teacher=teacher, student=student, reduction="none")
        truth = function(teacher=teacher.double(), student=student.double(), reduction="none")
        assert truth.max() < 3e-6
        torch.testing.assert_close(got.double(), truth, rtol=0.05, atol=0)


BOUNDED_BY_TOP_K = [(name, given) for name, given in CASES if wl.DIVERGENCES[name].divergence.coarsens]


@pytest.mark.parametrize(("name", "given"), BOUNDED_BY_TOP_K, ids=[f"{n}-{g}" for n, g in BOUNDED_BY_TOP_K])
def test_top_k_is_a_lower_bound_that_rises_with_k(name, given):
    teacher, student = pair(rows=8, vocabulary=12)
    function = wl.DIVERGENCES[name].function
    full = function(teacher=teacher, student=student, reduction="none", **given)
    last = torch.zeros(8, dtype=torch.float64)
    for k in (1, 3, 6, 11, 12):
        leaf = student.clone().requires_grad_()
        value = function(teacher=wl.TopK.of(teacher, k), student=leaf, reduction="none", **given)
        assert (value >= last - 1e-12).all()
        assert (value <= full + 1e-12).all()
        value.sum().backward()
        assert leaf.grad.isfinite().all()
        last = value.detach()
    torch.testing.assert_close(last, full, atol=1e-12, rtol=0)
    torch.testing.assert_close(leaf.grad, gradients(name, given, teacher, student), atol=1e-12, rtol=0)
    same = function(teacher=wl.TopK.of(teacher, 3), student=teacher, reduction="none", **given)
    torch.testing.assert_close(same, torch.zeros(8, dtype=torch.float64), atol=1e-14, rtol=0)


def test_top_k_sees_mass_that_renormalising_hides():
    """A student with 10 % of its mass on tokens that hold 94 % of the teacher's, in the teacher's proportions."""
    p = torch.tensor([[0.5, 0.3, 0.14, 0.06, 0.0]], dtype=torch.float64)
    q = torch.tensor([[0.05 / 0.94, 0.03 / 0.94, 0.014 / 0.94, 0.45, 0.45]], dtype=torch.float64)
    stored = wl.TopK.of(p.log(), 3)
    wanted = 0.94 * math.log(0.94 / 0.1) + 0.06 * math.log(0.06 / 0.9)
    assert wl.forward_kl(teacher=stored, student=q.log()).item() == pytest.approx(wanted, abs=1e-12)
    bare = wl.TopK(stored.log_probs, stored.indices.int())
    assert wl.forward_kl(teacher=bare, student=q.log()).item() == pytest.approx(wanted, abs=1e-12)
    whole = wl.TopK(p[:, :4].log(), torch.arange(4)[None], log_rest=torch.tensor([-INF], dtype=torch.float64))
    assert wl.reverse_kl(teacher=whole, student=q.log()).item() == INF


@pytest.mark.parametrize("name", [name for name in PARAMETERS if wl.DIVERGENCES[name].divergence.sums])
@pytest.mark.parametrize("proposal", [False, True])
def test_sampled_tokens_are_unbiased_in_value_and_gradient(name, proposal):
    teacher, student = pair(rows=1, vocabulary=4, spread=0.7, seed=2)
    log_p = teacher.log_softmax(-1)
    log_r = torch.log_softmax(teacher / 2, -1) if proposal else log_p
    draws = 40_000
    tokens = torch.multinomial(log_r[0].exp(), draws, replacement=True, generator=torch.Generator().manual_seed(3))[:, None]
    rows = log_p.expand(draws, -1).gather(-1, tokens)
    stored = wl.SampledTokens(tokens, rows, log_proposal=log_r.expand(draws, -1).gather(-1, tokens) if proposal else None)
    leaf = student.expand(draws, -1).clone().requires_grad_()
    values = wl.DIVERGENCES[name].function(teacher=stored, student=leaf, reduction="none")
    values.sum().backward()
    exact = wl.DIVERGENCES[name].function(teacher=teacher, student=student)
    for got, wanted in ((values.detach()[:, None], exact), (leaf.grad, gradients(name, {}, teacher, student)[0])):
        assert ((got.mean(0) - wanted).abs() <= 4 * got.std(0) / math.sqrt(draws)).all()


def test_adaptive_kl_is_the_same_whether_its_head_is_small_or_not(monkeypatch):
    monkeypatch.setattr("whichkl.divergences.adaptive_kl._TOKENS_TO_SORT", 4)
    for spread in (0.1, 3.0):  # the head is most of the row; it is a token or two
        log_p, log_q = (one.log_softmax(-1) for one in pair(rows=6, vocabulary=40, spread=spread))
        weights = wl.RowAdaptiveKL().weights
        torch.testing.assert_close(weights(log_p, log_q, look=True), weights(log_p, log_q), atol=1e-12, rtol=0)


@every_name
def test_rows_compile_into_one_graph(name, compiling):
    function, (teacher, student) = wl.DIVERGENCES[name].function, pair()
    mask = torch.arange(5) != 2
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    got = compiled(teacher=teacher, student=student, mask=mask, vocabulary=15)
    assert torch.equal(got, function(teacher=teacher, student=student, mask=mask, vocabulary=15))


def test_weights_of_adaptive_kl_say_where_the_student_errs():
    p = torch.tensor([[0.6, 0.2, 0.1, 0.1]], dtype=torch.float64)
    only_head = torch.tensor([[0.2, 0.6, 0.1, 0.1]], dtype=torch.float64)
    weights = wl.RowAdaptiveKL(head_mass=0.7).weights
    assert weights(p.log(), only_head.log()).item() == pytest.approx(1)
    only_tail = torch.tensor([[0.6, 0.2, 0.15, 0.05]], dtype=torch.float64)
    assert weights(p.log(), only_tail.log()).item() == pytest.approx(0)
    assert weights(p.log(), p.log()).item() == 0.5


T, S = torch.zeros(2, 4), torch.zeros(2, 4)
BAD = [
    ({"student": torch.zeros(2, 5)}, "vocabulary="),
    ({"student": torch.zeros(3, 4)}, "the same rows"),
    ({"student": torch.zeros(2, 4, dtype=torch.long)}, "floating-point"),
    ({"vocabulary": 5}, "1 ≤ vocabulary ≤ 4"),
    ({"temperature": 0.0}, "positive"),
    ({"temperature": math.nan}, "positive"),
    ({"mask": torch.ones(2)}, "torch.bool"),
    ({"mask": [True, False]}, r"it is a list, not a tensor.*torch.tensor\(mask\)"),
    ({"temperature": torch.ones(2)}, r"it has the shape \(2,\)"),
    ({"temperature": "2"}, "it is '2'"),
    ({"temperature": None}, "it is None"),
    ({"mask": torch.ones(2, 4, dtype=torch.bool)}, "each row"),
    ({"reduction": "batchmean"}, "mean goes over rows"),
    (
        {"teacher": wl.TopK(torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.long), temperature=2.0)},
        "Store it with `temperature=1.0`",
    ),
    ({"teacher": wl.TopK(torch.zeros(3, 1), torch.zeros(3, 1, dtype=torch.long))}, "the same rows"),
    ({"teacher": T.numpy()}, "the teacher is a ndarray"),
    ({"teacher": wl.TopK(torch.full((2, 2), 0.5), torch.tensor([[0, 1], [1, 2]]))}, "hold a probability of 3.3"),
    ({"teacher": wl.TopK(torch.full((2, 2), -1.0), torch.tensor([[0, 1], [2, 2]]))}, "a token twice"),
    ({"teacher": wl.TopK(torch.full((2, 2), -1.0), torch.tensor([[0, 1], [1, 4]]))}, "names token 4, and the student has 4"),
    ({"teacher": wl.TopK(torch.full((2, 2), -1.0), torch.tensor([[0, 1], [1, 3]])), "vocabulary": 3}, "the student has 3"),
    ({"teacher": wl.SampledTokens(torch.tensor([[0], [-1]]), torch.full((2, 1), -1.0))}, "names token -1"),
    ({"teacher": wl.SampledTokens(torch.tensor([[0], [1]]), torch.ones(2, 1))}, "hold a probability of 2.7"),
]


def buckets(p, q, kept):
    """Rows of the kept tokens and one bucket for all others, by plain sums."""
    return tuple([x[i] for i in kept] + [math.fsum(x[i] for i in range(len(x)) if i not in kept)] for x in (p, q))


PARAMETERS_BY_DEFAULT = {name: dict(entry.parameters) for name, entry in wl.DIVERGENCES.items()}
COARSENED = [name for name, entry in wl.DIVERGENCES.items() if entry.divergence.coarsens and name in PARAMETERS]


@pytest.mark.parametrize("name", COARSENED)
@pytest.mark.parametrize("how", ["index −1", "log-probability −∞", "both", "k = v"])
def test_a_top_p_keeps_another_number_of_tokens_in_each_row(name, how):
    """Empty places leave their token to the rest: each row is that of its own top-k, by enumeration."""
    v, k = 9, 9 if how == "k = v" else 6
    teacher, student = pair(rows=5, vocabulary=v)
    log_probs, indices = teacher.log_softmax(-1).topk(k, -1)
    sizes = torch.tensor([1, 2, 3, 5, k])
    keep = torch.arange(k) < sizes[:, None]
    stored_logs = log_probs if how == "index −1" else log_probs.where(keep, -INF)
    stored_indices = indices if how in ("log-probability −∞", "k = v") else indices.where(keep, torch.tensor(-1))
    student.requires_grad_()
    got = wl.DIVERGENCES[name].function(teacher=wl.TopK(stored_logs, stored_indices), student=student, reduction="none")
    for i, size in enumerate(sizes.tolist()):
        p, q = buckets(probabilities(teacher[i].tolist()), probabilities(student[i].tolist()), indices[i, :size].tolist())
        assert got[i].item() == pytest.approx(enumerate_row(name, PARAMETERS_BY_DEFAULT[name], p, q), abs=1e-9)
    slope = torch.autograd.grad(got.sum(), student)[0]
    alone = []
    for i, size in enumerate(sizes.tolist()):
        stored = wl.TopK(log_probs[i : i + 1, :size], indices[i : i + 1, :size])
        row = wl.DIVERGENCES[name].function(teacher=stored, student=student[i : i + 1], reduction="sum")
        alone.append(torch.autograd.grad(row, student)[0][i])
    torch.testing.assert_close(slope, torch.stack(alone), atol=1e-9, rtol=0)


def test_a_stored_row_without_mass_is_refused_unless_it_does_not_count():
    index = torch.tensor([[[0, 1], [2, 3]]])
    log_probs = torch.tensor([[[-1.0, -2.0], [-INF, -INF]]])
    student = torch.zeros(1, 2, 4)
    with pytest.raises(InputError, match=r"row \(0, 1\) has no entry.*by `mask`"):
        wl.forward_kl(teacher=wl.TopK(log_probs, index), student=student)
    mask = torch.tensor([[True, False]])
    first = wl.forward_kl(teacher=wl.TopK(log_probs[:, :1], index[:, :1]), student=student[:, :1])
    torch.testing.assert_close(wl.forward_kl(teacher=wl.TopK(log_probs, index), student=student, mask=mask), first)
    drawn = {"indices": index, "log_probs": log_probs}
    with pytest.raises(InputError, match=r"row \(0, 1\) holds a token whose log-probability, the teacher's, is −∞"):
        wl.forward_kl(teacher=wl.SampledTokens(**drawn), student=student)
    proposed = wl.SampledTokens(**drawn, log_proposal=torch.full_like(log_probs, -1.0))  # another law may draw what p never does
    assert wl.forward_kl(teacher=proposed, student=student, reduction="none")[0, 1] == 0
    with pytest.raises(InputError, match="the proposal's, is −∞"):
        wl.forward_kl(teacher=wl.SampledTokens(**drawn, log_proposal=log_probs), student=student)
    with pytest.raises(InputError, match="row 0 holds NaN"):
        wl.forward_kl(teacher=wl.TopK(log_probs[0, :1] * math.nan, index[0, :1]), student=student[0, :1])


def test_a_compiled_loss_of_a_row_without_an_entry_is_nan():
    compiled = torch.compile(wl.forward_kl, backend="eager")
    stored = wl.TopK(torch.tensor([[-1.0], [-INF]]), torch.tensor([[0], [1]]))
    found = compiled(teacher=stored, student=torch.zeros(2, 4), reduction="none")
    assert found[0].isfinite() and found[1].isnan()


@every_name
def test_one_column_is_refused(name):
    for shape, options in (((2, 1), {}), ((2, 3), {"vocabulary": 1}), ((2, 0), {})):
        logits = torch.zeros(*shape)
        with pytest.raises(InputError, match=r"column.*torch.cat\(\[z, torch.zeros_like\(z\)\], -1\)"):
            wl.DIVERGENCES[name].function(teacher=logits, student=logits, **options)


def test_a_temperature_may_be_a_tensor_of_one_number_and_is_learnt():
    teacher, student = pair(rows=3, vocabulary=5)
    temperature = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    value = wl.reverse_kl(teacher=teacher, student=student, temperature=temperature, temperature_squared=True)
    assert torch.equal(value, wl.reverse_kl(teacher=teacher, student=student, temperature=1.7, temperature_squared=True))
    (slope,) = torch.autograd.grad(value, temperature)
    up, down = (
        wl.reverse_kl(teacher=teacher, student=student, temperature=1.7 + step, temperature_squared=True)
        for step in (1e-5, -1e-5)
    )
    assert slope.item() == pytest.approx(((up - down) / 2e-5).item(), rel=1e-6)


def test_under_vmap_rows_are_those_of_a_loop_and_what_cannot_be_mapped_is_said():
    teacher, student = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    mask = torch.rand(3, 4) > 0.3
    for entry in wl.DIVERGENCES.values():
        mapped = torch.func.vmap(lambda t, s, m, f=entry.function: f(teacher=t, student=s, mask=m))(teacher, student, mask)
        loop = [entry.function(teacher=t, student=s, mask=m) for t, s, m in zip(teacher, student, mask, strict=True)]
        torch.testing.assert_close(mapped, torch.stack(loop))
    for refused in (
        lambda t: wl.forward_kl(teacher=wl.TopK.of(t, 2), student=t),
        lambda t: wl.forward_kl(teacher=t, student=t, temperature=t[0, 0]),
    ):
        with pytest.raises(InputError, match="inside a transform of torch.func"):
            torch.func.vmap(refused)(teacher)


def test_stored_rows_that_do_not_count_may_hold_anything_and_rounded_ones_pass():
    mask = torch.tensor([True, False])
    stored = wl.TopK(torch.tensor([[-0.5, -1.5], [9.0, 9.0]]), torch.tensor([[0, 1], [0, 0]]))
    found = wl.forward_kl(teacher=stored, student=S, mask=mask)
    whole = wl.TopK(stored.log_probs[:1], stored.indices[:1])
    torch.testing.assert_close(found, wl.forward_kl(teacher=whole, student=S[:1]))
    for dtype in (torch.bfloat16, torch.float16):
        logits = 3 * torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
        kept = wl.TopK.of(logits, 50)
        wl.forward_kl(teacher=wl.TopK(kept.log_probs.to(dtype), kept.indices), student=logits)


@pytest.mark.parametrize(("wrong", "match"), BAD)
def test_bad_input_is_refused(wrong, match):
    with pytest.raises(InputError, match=match):
        wl.forward_kl(**({"teacher": T, "student": S} | wrong))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: wl.jeffreys(teacher=T, student=S, weight_on_forward=1.5), "between 0 and 1"),
        (lambda: wl.jensen_shannon(teacher=T, student=S, weight=0.0), "0 for every pair"),
        (lambda: wl.skew_forward_kl(teacher=T, student=S, weight=1.0), "weight=0.1"),
        (lambda: wl.renyi(teacher=T, student=S, order=0.0), "positive"),
        (lambda: wl.adaptive_kl(teacher=T, student=S, head_mass=1.0), "strictly"),
        (lambda: wl.interpolated_kl(teacher=T, student=S, weight_on_teacher=0.0), "raise it to 1"),
        (lambda: wl.adaptive_kl(teacher=wl.TopK.of(T, 2), student=S), "whole row"),
        (lambda: wl.TopK.of(T, 5), "there are 4"),
        (lambda: wl.kl_estimate(policy=[1.0], reference=T, estimator="k1"), "they are a list and a Tensor"),
        (lambda: wl.TopK(torch.zeros(2, 2), torch.zeros(2, 3, dtype=torch.long)), "one for each"),
        (lambda: wl.divergence_named("kl"), "forward_kl"),
        (lambda: wl.divergence_named("forward_kl", order=2.0), "no parameters"),
        (lambda: wl.divergence_named(wl.RowForwardKL(), order=2.0), "where it is made"),
        (
            lambda: wl.renyi(teacher=wl.SampledTokens(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1)), student=S),
            "a sample would bias it",
        ),
    ],
)
def test_bad_parameters_are_refused(make, match):
    with pytest.raises(InputError, match=match):
        make()
