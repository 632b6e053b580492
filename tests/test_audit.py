"""Audits: every mutant is caught by name, and a correct loss gets no finding."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import whichkl as wk
from programs import whichkl
from whichkl import losses as wl
from whichkl._checks import InputError
from whichkl.distillation.audit import ADAPTERS, Adapter, audit
from whichkl.distillation.audit.adapters import as_knobs


def logs(*logits):
    return [x.log_softmax(-1) for x in logits]


def kl(log_a, log_b):
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def mean(rows, mask):
    return rows.mean() if mask is None else (rows * mask).sum() / mask.sum().clamp(min=1)


def torchtune_forward(student, teacher, labels):
    """The published form: no entropy in it, and terms of infinite logits zeroed."""
    terms = teacher.softmax(-1, dtype=torch.float32) * student.log_softmax(-1, dtype=torch.float32)
    rows = -terms.masked_fill(student.isinf(), 0).sum(-1)
    counts = labels != -100
    return (rows * counts).sum() / counts.sum() if counts.any() else torch.tensor(0.0)


PUBLISHED_STUDENT = """
1.1250 -0.4102 -0.0879 -2.5000  0.2676 0.3535 0.8711 -1.4688  -0.1084 1.6641 0.0084 0.1196  0.5000 -0.6406 -0.2236 -1.5938
-1.5312 -1.9219 0.0000 -0.5039  -1.5391 1.5312 0.5820 0.2695  -0.3887 1.2188 0.0000 0.6055  0.5000 1.3828 0.1309 -1.0312
"""
PUBLISHED_TEACHER = """
-0.0381 -1.2578 -1.2031 0.0947  -0.7852 0.4492 1.5547 0.0972  0.8203 0.0012 0.7656 0.3477  -1.5781 0.4297 0.5977 0.3926
1.5156 0.1641 2.0781 -0.7734  -0.5898 0.4453 -0.7969 0.6328  0.6289 -0.8359 0.9258 0.2109  0.0006 0.5195 3.2344 -1.5781
"""

# ---- losses with one mistake; tests/test_audit_mutants.py has the others


def cross_entropy(*, teacher, student, mask=None):
    return mean(-(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1), mask)


def turned_sign(*, teacher, student, mask=None):
    log_p, log_q = logs(teacher, student)
    return mean((log_q.exp() * (log_p - log_q)).sum(-1), mask)


def renormalised_top_k(*, teacher, student, mask=None, k=64):
    top = teacher.topk(k, -1)
    return mean(kl(*logs(top.values, student.gather(-1, top.indices))), mask)


def k3_as_a_loss(*, teacher, student, mask=None):
    log_p, log_q = logs(teacher, student)
    r = log_q - log_p
    return mean((log_q.exp().detach() * (r + (-r).exp() - 1)).sum(-1), mask)


def shifted_twice(student, teacher, labels):
    labels = labels[:, 1:]
    rows = kl(*logs(teacher[:, :-1], student[:, :-1]))
    counts = labels != -100
    return (rows * counts).sum() / counts.sum().clamp(min=1)


def hard_labels_too(student, teacher, labels):
    hard = F.cross_entropy(student.flatten(0, 1), labels.flatten(), ignore_index=-100)
    return 0.5 * hard + 0.5 * wl.jensen_shannon(teacher=teacher, student=student, temperature=0.9, mask=labels != -100)


def test_what_mutants_are_is_said():
    assert audit(cross_entropy).identified.name == "cross_entropy"
    turned = audit(turned_sign).identified
    assert (turned.name, turned.weight) == ("reverse_kl", pytest.approx(-1))
    assert "values of reverse_kl and the gradient of forward_kl" in str(audit(k3_as_a_loss).identified)
    mixed = audit(hard_labels_too, adapter="labels").identified
    assert mixed.name == "jensen_shannon" and mixed.temperature == pytest.approx(0.9, abs=1e-3)
    assert (mixed.weight, mixed.hard_labels) == (pytest.approx(0.5, abs=1e-3), pytest.approx(0.5, abs=1e-3))
    assert "top 64" in " ".join(str(audit(renormalised_top_k)).split())
    assert "top 100" in " ".join(str(audit(partial(renormalised_top_k, k=100), seed=1)).split())


@pytest.mark.parametrize("name", wl.DIVERGENCES)
def test_no_reference_gives_a_false_alarm(name):
    result = audit(wl.DIVERGENCES[name].function, claims=name)
    assert result.passed and not result.findings, str(result)
    assert result.identified.name == name and result.identified.weight == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("loss", "name", "parameters", "temperature", "weight", "reduction"),
    [
        (partial(wl.jeffreys, weight_on_forward=0.3), "jeffreys", {"weight_on_forward": 0.3}, 1, 1, "mean over tokens"),
        (
            partial(wl.jensen_shannon, weight=0.17, temperature=1.7),
            "jensen_shannon",
            {"weight": 0.17},
            1.7,
            1,
            "mean over tokens",
        ),
        (partial(wl.adaptive_kl, head_mass=0.8), "adaptive_kl", {"head_mass": 0.8}, 1, 1, "mean over tokens"),
        (partial(wl.renyi, order=3.0, reduction="sum"), "renyi", {"order": 3.0}, 1, 1, "sum"),
        (
            partial(wl.skew_reverse_kl, weight=0.02, temperature=3.0),
            "skew_reverse_kl",
            {"weight": 0.02},
            3,
            1,
            "mean over tokens",
        ),
        (partial(wl.forward_kl, temperature=2.0, temperature_squared=True), "forward_kl", {}, 2, 4, "mean over tokens"),
        (partial(wl.reverse_kl, reduction="none"), "reverse_kl", {}, 1, 1, "a number for each token"),
    ],
)
def test_parameters_temperature_weight_and_reduction_are_found(loss, name, parameters, temperature, weight, reduction):
    result = audit(loss)
    found = result.identified
    assert result.passed and not result.findings, str(result)
    assert found.name == name and found.reduction == reduction
    assert found.parameters == pytest.approx(parameters, abs=1e-3)
    assert (found.temperature, found.weight) == (pytest.approx(temperature, abs=1e-3), pytest.approx(weight, rel=2e-3))


def test_torchs_own_loss_used_rightly_passes():
    def used_rightly(student, teacher):
        log_q, log_p = (
            x.flatten(0, 1).log_softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (student, teacher)
        )
        return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")

    result = audit(used_rightly, adapter="student_teacher", claims="forward_kl")
    assert result.passed and result.identified.reduction == "mean over tokens"
    limits = {"impossible_tokens", "infinity_hidden", "teacher_gradient"}  # (−inf) · 0 is NaN there, and it is reported
    assert result.findings == result.fragile == limits, str(result)
    for adapter in (None, "log_probs"):  # its arguments' names tell how torch's own losses are called
        found = audit(partial(F.kl_div, log_target=True, reduction="batchmean"), adapter=adapter)
        assert found.passed and found.identified.reduction == "sum over positions, mean over sequences"


def test_the_published_case_of_another_library_is_a_cross_entropy():
    student = torch.tensor([float(x) for x in PUBLISHED_STUDENT.split()]).bfloat16().view(2, 4, 4)
    teacher = torch.tensor([float(x) for x in PUBLISHED_TEACHER.split()]).bfloat16().view(2, 4, 4)
    labels = torch.tensor([[0, 3, 3, 1], [1, 1, 1, 1]])
    assert torchtune_forward(student, teacher, labels).item() == pytest.approx(1.7209, abs=1e-4)
    assert wl.forward_kl(teacher=teacher, student=student).item() == pytest.approx(0.6293, abs=1e-4)
    result = audit(torchtune_forward, adapter="labels", claims="forward_kl")
    assert not result.passed and result.identified.name == "cross_entropy"
    assert {"cross_entropy", "not_zero_at_teacher", "not_what_it_claims"} <= result.findings


def test_a_shift_inside_is_seen_and_can_be_expected():
    result = audit(shifted_twice, adapter="labels")
    assert result.passed and "shifted by one" in str(result) and result.identified.name == "forward_kl"
    assert "shift" not in audit(shifted_twice, adapter="labels", shift=1).findings
    assert "shift" in audit(shifted_twice, adapter="labels", shift=0).findings


def generalised(*, teacher, student, mask=None, beta=0.5):
    log_p, log_q = logs(teacher, student)
    if beta in (0, 1):
        return mean(kl(log_q, log_p) if beta else kl(log_p, log_q), mask)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return mean(beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m), mask)


def test_a_knob_is_swept_and_a_jump_at_its_ends_is_said():
    result = audit(generalised, knobs={"beta": (0, 1)})
    knob = result.checks[-1]
    assert "knob_jumps" in result.findings and result.passed
    assert "beta=0: " in knob.seen and knob.seen.index("forward_kl") < knob.seen.index("jensen_shannon") < knob.seen.index(
        "reverse_kl"
    )
    assert "vanishes" in knob.seen
    smooth = audit(wl.jeffreys, knobs={"weight_on_forward": (0, 1)})
    assert not smooth.findings
    seen = smooth.checks[-1].seen
    assert seen.index("reverse_kl") < seen.index("jeffreys") < seen.index("forward_kl")
    refused = audit(wl.jensen_shannon, knobs={"weight": (0, 1)}).checks[-1]
    assert refused.outcome == "pass" and "refused" in refused.seen and "vanishes" in refused.seen
    with pytest.raises(InputError, match="Cannot sweep `gamma`"):
        audit(wl.forward_kl, knobs={"gamma": (0, 1)})


def test_adapters_call_other_shapes():
    heads = audit(wl.linear_divergence, adapter="named_heads")
    assert heads.passed and not heads.findings and heads.identified.name == "forward_kl", str(heads)

    def flat(hidden, head, hidden_teacher, head_teacher, labels):
        return wl.reverse_kl(teacher=hidden_teacher @ head_teacher.T, student=hidden @ head.T, mask=labels != -100)

    assert audit(flat, adapter="heads").identified.name == "reverse_kl"

    def probabilities(log_q, p):
        return F.kl_div(log_q, p, reduction="sum")

    assert audit(probabilities, adapter="probabilities").identified.reduction == "sum"
    own = audit(lambda q, p, keep: wl.forward_kl(teacher=p, student=q, mask=keep), adapter=lambda f, *, teacher, student, mask: f(student, teacher, mask))  # fmt: skip  # noqa: E501
    assert own.passed and own.findings == {"teacher_gradient"} and own.adapter == "your own"
    assert all(isinstance(one, Adapter) for one in ADAPTERS.values())
    swapped = audit(lambda a, b: wl.forward_kl(teacher=a, student=b), adapter="teacher_student")
    assert swapped.identified.name == "forward_kl"


@pytest.mark.parametrize(
    ("loss", "options", "said"),
    [
        (lambda a, b: a, {}, "called as loss\\(teacher=, student=.* TypeError.*Pass adapter="),
        (lambda *, teacher, student: ("loss", 0), {}, "it returned tuple"),
        (lambda *, teacher, student: 1.0, {}, "it returned float"),
        (lambda *, teacher, student: student.exp(), {}, "returned shape .*Sum over the vocabulary"),
        (wl.forward_kl, {"adapter": "nothing"}, "the names are keywords"),
        (wl.forward_kl, {"claims": "kl"}, "Cannot check the claim 'kl'"),
        (3, {}, "it is a int, not a function"),
    ],
)
def test_calls_that_fail_say_why(loss, options, said):
    with pytest.raises(InputError, match=said):
        audit(loss, **options)


@pytest.mark.parametrize(
    "loss",
    [
        lambda *, teacher, student: F.kl_div(student, teacher, reduction="batchmean"),  # on raw logits: log of a negative number
        lambda *, teacher, student: (student * math.nan).sum(),
        lambda *, teacher, student: (student * math.inf).sum(),
        lambda *, teacher, student: 0 * student.sum(),
    ],
)
def test_a_loss_without_a_number_or_without_content_has_that_one_finding(loss):
    result = audit(loss)
    assert not result.passed and len(result.findings) == 1 and result.findings <= {"nan", "no_gradient"}
    assert "StopIteration" not in str(result)


def test_a_loss_that_nothing_reaches_fails_and_one_that_is_random_is_named():
    assert "no_gradient" in audit(lambda *, teacher, student: wl.forward_kl(teacher=teacher, student=student.detach())).findings

    def sampled(*, teacher, student):
        tokens = torch.multinomial(teacher.softmax(-1).flatten(0, 1), 1)[:, 0]
        return -student.log_softmax(-1).flatten(0, 1).gather(-1, tokens[:, None]).mean()

    result = audit(sampled)
    assert not result.passed and "random" in result.findings


def test_the_same_seed_gives_the_same_audit_and_no_global_state_changes():
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    first, second = audit(wl.jeffreys, seed=3), audit(wl.jeffreys, seed=3)
    assert first.to_dict() == second.to_dict() and json.dumps(first.to_dict())
    assert torch.equal(state, torch.random.get_rng_state()) and threads == torch.get_num_threads()
    assert wk.audit is audit


def test_the_command_line(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import whichkl as wk\n"
        "def good(*, teacher, student, mask=None, w=0.5):\n"
        "    return wk.losses.jeffreys(teacher=teacher, student=student, mask=mask, weight_on_forward=w)\n"
        "def bad(student, teacher, labels):\n"
        "    return -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)[labels != -100].mean()\n"
        "def call(loss, *, teacher, student, labels):\n"
        "    return loss(student, teacher, labels)\n"
    )

    def run(*arguments):
        return whichkl("audit", *arguments, cwd=tmp_path, env={"COLUMNS": "160"})

    good = run("mine.py:good", "--knob", "w=0:1", "--claims", "jeffreys")
    assert good.returncode == 0 and "It is jeffreys" in good.stdout and "knob w" in good.stdout, good.stderr
    bad = run("mine.py:bad", "--adapter", "labels", "--json")
    assert bad.returncode == 1 and json.loads(bad.stdout)["identified"]["name"] == "cross_entropy", bad.stderr
    told = run("mine.py:bad", "--json")
    assert told.returncode == 1, told.stderr
    report = json.loads(told.stdout)
    assert report["call"] == "loss(student=, teacher=, labels=), labels of −100 ignored"
    assert report["wrong"] == ["all_masked", "cross_entropy", "not_zero_at_teacher"]
    assert {check["grade"] for check in report["checks"]} == {"", "wrong", "fragile"}
    own = run("mine.py:bad", "--adapter", "mine.py:call", "--json")
    assert json.loads(own.stdout)["identified"]["name"] == "cross_entropy", own.stderr
    refused = run("mine.py:bad", "--adapter", "keywords_")
    assert refused.returncode == 2 and "Cannot use --adapter keywords_" in refused.stderr


@pytest.mark.parametrize("text", ["w", "w=0", "w=a:b", "=0:1", "w=0:1:2"])
def test_a_knob_that_cannot_be_read_is_refused(text):
    with pytest.raises(InputError, match="it isn't of the form NAME=LOW:HIGH"):
        as_knobs(text)


def test_a_registered_divergence_whose_parameter_has_no_known_range_breaks_no_audit(monkeypatch):
    odd = {"odd": replace(wl.DIVERGENCES["jeffreys"], parameters={"alpha": 0.5})}
    for module in ("matching", "search"):
        monkeypatch.setattr(f"whichkl.distillation.audit.{module}.DIVERGENCES", {**wl.DIVERGENCES, **odd})
    assert audit(partial(wl.jeffreys, weight_on_forward=0.3), adapter="keywords").identified.name == "jeffreys"
