"""Distillation of classifiers: what is trained, what is measured, and that neither network of the user's is touched."""

import copy
import json
import math
import signal
import time

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

import whichkl as wk
from programs import Program
from whichkl.distillation import Distillation, DistillationTarget, reliability, scored
from whichkl.distillation.job import read_job
from whichkl.distillation.losses.specs import row_divergence_of, spec_of
from whichkl.distillation.training import Loss


def rows(n=600, d=6, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def mlp(d=6, classes=4, hidden=16, seed=0, dropout=0.0, norm=False):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(d, hidden), *([nn.BatchNorm1d(hidden)] if norm else []), nn.ReLU(), nn.Dropout(dropout)]
        return nn.Sequential(*layers, nn.Linear(hidden, classes))


def labelled(teacher, n=600, seed=0):
    x = rows(n, seed=seed)
    with torch.no_grad():
        law = torch.distributions.Categorical(logits=2 * copy.deepcopy(teacher).eval()(x))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return x, law.sample()


def same(a, b):
    return all(torch.equal(one, other) for one, other in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("objective", [*wk.losses.DIVERGENCES, "jeffreys:0.3", "renyi:2"])
def test_every_objective_brings_the_same_architecture_near_its_teacher(objective):
    teacher = nn.Linear(6, 4)
    with torch.no_grad():
        teacher.weight.copy_(rows(4, 6, seed=3))
    result = wk.distill(
        teacher=teacher, student=nn.Linear(6, 4), data=rows(), objective=objective, epochs=40, learning_rate=0.1, patience=None
    )
    before = result.history[0][1]
    assert result.history[result.best_epoch][1] < 0.01 * before or "total" in objective
    for kl in (result.scores.forward_kl, result.scores.reverse_kl):
        assert 0 <= kl.value < 0.02
    assert result.scores.agreement.value > 0.95
    assert result.settings["objective"] == spec_of(row_divergence_of(objective))


def test_a_student_that_is_the_teacher_is_at_zero_and_stays():
    teacher = mlp(norm=True)
    result = wk.distill(teacher=teacher, student=teacher, data=rows(), epochs=2, learning_rate=1e-6)
    assert result.history[0][1] < 1e-6
    assert result.scores.forward_kl.value < 1e-6
    assert result.scores.agreement.value == 1


def test_measures_are_what_one_computes_by_hand():
    p, q, y = 2 * rows(300, 5, seed=1), rows(300, 5, seed=2), torch.randint(5, (300,), generator=torch.Generator().manual_seed(3))
    found = scored(teacher=p, student=q, labels=y)
    p, q, y = p.double().numpy(), q.double().numpy(), y.numpy()

    def law(logits):
        e = np.exp(logits)
        return e / e.sum(1, keepdims=True)

    p, q = law(p), law(q)
    forward, reverse = (p * np.log(p / q)).sum(1), (q * np.log(q / p)).sum(1)
    assert found.forward_kl.value == pytest.approx(forward.mean(), abs=1e-12)
    assert found.forward_kl.stderr == pytest.approx(forward.std(ddof=1) / math.sqrt(300), rel=1e-9)
    assert found.reverse_kl.value == pytest.approx(reverse.mean(), abs=1e-12)
    assert found.agreement.value == (p.argmax(1) == q.argmax(1)).mean()
    nll = [-np.log(one[np.arange(300), y]) for one in (q, p)]
    for side, one, each in (("student", q, nll[0]), ("teacher", p, nll[1])):
        assert getattr(found.accuracy, side).value == (one.argmax(1) == y).mean()
        assert getattr(found.nll, side).value == pytest.approx(each.mean(), abs=1e-12)
        confidence, right, ece = one.max(1), one.argmax(1) == y, 0.0
        for m in range(15):
            inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
            if inside.any():
                ece += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
        assert getattr(found.ece, side).value == pytest.approx(ece, abs=1e-12)
    assert found.nll.difference.stderr == pytest.approx((nll[0] - nll[1]).std(ddof=1) / math.sqrt(300), rel=1e-9)
    assert found.accuracy.difference.value == pytest.approx(found.accuracy.student.value - found.accuracy.teacher.value)


def test_the_error_of_the_ece_is_the_spread_over_fresh_rows():
    generator = torch.Generator().manual_seed(0)
    values, errors = [], []
    for _ in range(40):
        logits = torch.randn(400, 3, generator=generator)
        y = torch.multinomial((2 * logits).softmax(-1), 1, generator=generator)[:, 0]
        one = scored(teacher=logits, student=logits, labels=y).ece.student
        values.append(one.value)
        errors.append(one.stderr)
    spread = float(np.std(values, ddof=1))
    assert abs(np.mean(errors) - spread) < 4 * spread / math.sqrt(2 * 39)  # standard error of a standard deviation


def test_a_perfectly_calibrated_bin_has_no_error():
    logits = torch.log(torch.tensor([0.75, 0.25])).expand(4, 2)
    one = reliability(logits, torch.tensor([0, 0, 0, 1]), bins=10)
    assert sum(one.counts) == 4 and one.counts[7] == 4  # (0.7, 0.8]
    assert one.ece == pytest.approx(0.0, abs=1e-6)


def test_infinite_divergences_say_so():
    p, q = torch.tensor([[0.0, 0.0], [0.0, -math.inf]]), torch.tensor([[0.0, -math.inf], [0.0, 0.0]])
    found = scored(teacher=p, student=q, labels=torch.tensor([1, 0]))
    assert found.forward_kl.value == found.reverse_kl.value == math.inf
    assert found.forward_kl.finite == "infinite"
    assert found.nll.difference is None


def test_the_loss_is_the_weighted_sum_that_it_says():
    p, q, y = rows(50, 4, seed=1), rows(50, 4, seed=2), torch.arange(50) % 4
    kl = wk.losses.reverse_kl(teacher=p, student=q, temperature=3.0, reduction="none")
    hard = nn.functional.cross_entropy(q, y, reduction="none")
    plain = Loss(row_divergence_of("reverse_kl"), 0.3, 3.0)
    torch.testing.assert_close(plain.rows(p, q, y), 0.7 * kl + 0.3 * hard)
    torch.testing.assert_close(Loss(row_divergence_of("reverse_kl"), 0.3, 3.0, True).rows(p, q, y), 0.7 * 9 * kl + 0.3 * hard)
    torch.testing.assert_close(Loss(row_divergence_of("reverse_kl"), 1.0, 3.0).rows(p, q, y), hard)
    torch.testing.assert_close(Loss(row_divergence_of("reverse_kl"), 0.0, 3.0).rows(p, q, None), kl)
    assert str(plain) == "0.7 · reverse_kl at T = 3 + 0.3 · cross-entropy of the labels"


def test_hard_labels_alone_are_maximum_likelihood():
    from sklearn.linear_model import LogisticRegression

    x, y = labelled(mlp(), 800)
    result = wk.distill(
        teacher=mlp(),
        student=nn.Linear(6, 4),
        data=(x, y),
        hard_label_weight=1.0,
        stopping=(x, y),
        held_out=(x, y),
        epochs=60,
        learning_rate=0.05,
        weight_decay=0.0,
    )
    best = LogisticRegression(C=1e6, max_iter=1000).fit(x.numpy(), y.numpy())
    nll = -best.predict_log_proba(x.numpy())[np.arange(800), y.numpy()].mean()
    assert nll - 1e-6 <= result.scores.nll.student.value < nll + 0.003
    assert result.scores.rows == 800


def test_neither_module_is_changed_and_the_teacher_is_in_evaluation_mode():
    teacher, student = mlp(dropout=0.5, norm=True), mlp(hidden=8, seed=1, norm=True)
    teacher.train()
    student.eval()
    student[0].weight.requires_grad_(False)
    before = [copy.deepcopy(one) for one in (teacher, student)]
    result = wk.distill(teacher=teacher, student=student, data=rows(), epochs=3, learning_rate=0.03)
    assert same(teacher, before[0]) and same(student, before[1])
    assert teacher.training and not student.training and not result.student.training
    assert all(one.requires_grad and one.grad is None for one in teacher.parameters())
    assert torch.equal(result.student[0].weight, student[0].weight)  # frozen by the user
    assert not torch.equal(result.student[-1].weight, student[-1].weight)

    x = rows(100, seed=9)
    again = wk.distill(teacher=teacher, student=student, data=rows(), epochs=3, learning_rate=0.03, held_out=x)
    with torch.no_grad():
        p, q = before[0].eval()(x), again.student(x)
    assert again.scores.forward_kl.value == pytest.approx(float(wk.losses.forward_kl(teacher=p, student=q)), abs=1e-6)


def test_the_teacher_sees_each_fixed_example_once():
    class Counting(nn.Module):
        calls = []

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x):
            self.calls.append(len(x))
            return self.layer(x)

    wk.distill(teacher=Counting(), student=mlp(), data=DataLoader(TensorDataset(rows()), batch_size=32, shuffle=True), epochs=5)
    assert 600 <= sum(Counting.calls) <= 600 + 30  # single rows that tell the size
    Counting.calls.clear()
    target = DistillationTarget(Counting(), rows(), {"epochs": 2})
    wk.compare(target, {"student": mlp}, "forward_kl", seeds=3)
    assert 600 <= sum(Counting.calls) <= 600 + 30
    Counting.calls.clear()
    wk.distill(teacher=Counting(), student=mlp(), data=Noisy(), epochs=5)
    assert sum(Counting.calls) >= 5 * 0.7 * 200


class Noisy(Dataset):
    """Another view of each example each time."""

    def __len__(self):
        return 200

    def __getitem__(self, i):
        return rows(200)[i] + 0.1 * torch.randn(6), i % 4


class Stream(IterableDataset):
    def __iter__(self):
        return iter((row, i % 4) for i, row in enumerate(rows(100)))


def test_early_stopping_keeps_the_best_weights():
    teacher = mlp(hidden=32)
    x, stop = rows(40), rows(300, seed=5)
    result = wk.distill(
        teacher=teacher,
        student=mlp(hidden=256, seed=1),
        data=x,
        stopping=stop,
        held_out=stop,
        epochs=200,
        learning_rate=0.03,
        patience=10,
    )
    losses = [one for _, one in result.history]
    assert result.status == "stopped early"
    assert result.epochs == result.best_epoch + 10 < 200
    assert min(losses) == losses[result.best_epoch] < losses[-1]
    assert result.scores.forward_kl.value == pytest.approx(losses[result.best_epoch], rel=1e-5)


def test_training_that_only_harms_gives_the_start_back():
    teacher = mlp()
    result = wk.distill(teacher=teacher, student=teacher, data=rows(), objective="reverse_kl", epochs=3, learning_rate=1.0)
    assert result.best_epoch == 0 and "never did better" in result.notes[0]
    assert same(result.student, teacher)


@pytest.mark.parametrize("kind", ["tensors", "loader", "augmented", "weighted", "workers"])
def test_the_same_seed_gives_the_same_bits(kind):
    x, y = labelled(mlp())
    loader = {
        "tensors": lambda: (x, y),
        "loader": lambda: DataLoader(TensorDataset(x, y), batch_size=50, shuffle=True),
        "augmented": lambda: DataLoader(Noisy(), batch_size=50, shuffle=True),
        "weighted": lambda: DataLoader(
            TensorDataset(x, y), batch_size=50, sampler=WeightedRandomSampler(torch.rand(600), 300, generator=torch.Generator())
        ),
        "workers": lambda: DataLoader(Noisy(), batch_size=50, num_workers=1),
    }[kind]
    more = {"stopping": (x, y), "held_out": (x, y)} if kind == "weighted" else {}

    def run(seed, data):
        return wk.distill(teacher=mlp(), student=mlp(hidden=4, dropout=0.3), data=data, seed=seed, epochs=2, **more)

    torch.manual_seed(7)
    data = loader()
    a = run(3, data)
    torch.rand(10)
    b, c = run(3, data), run(4, data)
    assert same(a.student, b.student) and a.to_dict() == b.to_dict()
    assert not same(a.student, c.student)
    state = torch.random.get_rng_state()
    run(3, data)
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_stream_takes_other_data_to_judge_by():
    loader = DataLoader(Stream(), batch_size=20)
    with pytest.raises(ValueError, match="Cannot split this loader: .* Pass other data"):
        wk.distill(teacher=mlp(), student=mlp(hidden=4), data=loader)
    x = rows(50, seed=4)
    result = wk.distill(teacher=mlp(), student=mlp(hidden=4), data=loader, stopping=x, held_out=x, epochs=2)
    assert result.epochs == 2 and result.scores.accuracy is None


_LONG = """
import torch
from torch import nn
from whichkl.distillation import distill
torch.set_num_threads(1)
with torch.random.fork_rng():
    torch.manual_seed(0)
    teacher = nn.Linear(6, 4)
    student = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 4))
    x, y = torch.randn(800, 6), torch.arange(800) % 4
distill(
    teacher=teacher, student=student, data=(x, y), epochs=30, patience=None, objective="jeffreys:0.3", hard_label_weight=0.2,
    journal=JOURNAL, tell=TELL,
).save(OUT)
"""


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    journal, seen = tmp_path / "journal", []
    slow = "lambda step, done: __import__('time').sleep(0.1)"  # time to be killed in
    code = f"JOURNAL, OUT, TELL = {str(journal)!r}, {str(tmp_path / 'never')!r}, {slow}\n{_LONG}"
    process = Program("-c", code)
    deadline = time.monotonic() + 120
    while not list(journal.glob("*/*.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "never").exists()

    def run(folder, out):
        seen.clear()
        threads = torch.get_num_threads()
        exec(_LONG, {"JOURNAL": folder, "OUT": out, "TELL": lambda step, done: seen.append(done)})  # noqa: S102
        torch.set_num_threads(threads)

    run(journal, tmp_path / "killed")
    assert seen[1] > 0  # it resumed
    run(tmp_path / "other", tmp_path / "whole")
    assert seen[1] == 0
    names = {one.name for one in (tmp_path / "whole").iterdir()}
    assert names == {one.name for one in (tmp_path / "killed").iterdir()}
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_a_journal_belongs_to_one_distillation(tmp_path):
    first = wk.distill(teacher=mlp(), student=mlp(hidden=4), data=rows(), epochs=2, journal=tmp_path)
    seen = []
    again = wk.distill(
        teacher=mlp(), student=mlp(hidden=4), data=rows(), epochs=2, journal=tmp_path, tell=lambda step, done: seen.append(step)
    )
    assert same(first.student, again.student) and first.to_dict() == again.to_dict()
    assert not any("training" in step for step in seen)  # nothing is done twice
    other = wk.distill(teacher=mlp(), student=mlp(hidden=4), data=rows(seed=1), epochs=2, journal=tmp_path)
    assert not same(first.student, other.student)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    x, y = labelled(mlp())
    result = wk.distill(teacher=mlp(), student=mlp(hidden=4, norm=True), data=(x, y), epochs=2)
    result.save(tmp_path / "kept")
    back = Distillation.load(tmp_path / "kept", student=mlp(hidden=4, norm=True, seed=5))
    assert same(back.student, result.student) and str(back) == str(result) and back.to_dict() == result.to_dict()
    with pytest.raises(ValueError, match="aren't those of such a `Sequential`"):
        Distillation.load(tmp_path / "kept", student=mlp(hidden=5, norm=True))
    text = (tmp_path / "kept" / "distillation.json").read_text()
    (tmp_path / "kept" / "distillation.json").write_text(text.replace('"finished"', '"stopped early"'))
    with pytest.raises(ValueError, match="the checksum of distillation.json differs"):
        Distillation.load(tmp_path / "kept", student=mlp(hidden=4, norm=True))
    with pytest.raises(ValueError, match="there is no distillation in it"):
        Distillation.load(tmp_path, student=mlp())


def test_digits_from_a_larger_network():
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    torch.manual_seed(0)
    teacher = mlp(64, 10, 64)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(teacher(torch.as_tensor(x[:1000])), torch.as_tensor(y[:1000])).backward()
        optimizer.step()
    result = wk.distill(
        teacher=teacher,
        student=mlp(64, 10, 16, seed=1),
        data=(x[:1000], y[:1000]),
        held_out=(x[1000:], y[1000:]),
        learning_rate=0.01,
    )
    page = str(result)
    assert "accuracy" in page and "797 examples" in page and "KL(teacher‖student)" in page
    assert result.scores.accuracy.student.value > 0.85
    assert result.scores.agreement.value > 0.85
    assert result.scores.forward_kl.value < 0.5


class Broken(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value, self.layer = value, nn.Linear(6, 4)

    def forward(self, x):
        return self.layer(x) + self.value


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"data": rows(), "hard_label_weight": 0.5}, "Cannot mix in hard labels: the data have none"),
        ({"student": mlp(classes=3)}, r"it returns shape \(\d+, 3\), the teacher \(\d+, 4\)"),
        ({"student": mlp(d=5)}, "Cannot call this student: it fails"),
        ({"teacher": Broken(math.nan)}, "Cannot use this teacher: its logits are NaN or infinite"),
        ({"student": Broken(math.nan)}, "Cannot train this student: its logits are NaN"),
        ({"teacher": nn.Sequential(mlp(), nn.Unflatten(1, (2, 2)))}, "Return logits"),
        ({"data": (torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))}, "it has no examples"),
        ({"data": DataLoader(TensorDataset(torch.zeros(0, 6)))}, "it has no examples"),
        ({"data": rows(2)}, "Give more examples"),
        ({"data": (rows(), torch.zeros(600))}, "Pass whole numbers"),
        ({"data": (rows(), torch.zeros(599, dtype=torch.long))}, "for 600 examples"),
        ({"data": (rows(), torch.full((600,), -100))}, "Number the classes from 0"),
        ({"data": (rows(), torch.full((600,), 7))}, "one is 7, and there are 4 classes"),
        ({"data": rows().fill_(math.nan)}, "NaN or infinite"),
        ({"data": "x.csv"}, "Cannot read `data`"),
        ({"objective": "kl"}, "Use one of forward_kl"),
        ({"objective": "forward_kl:2"}, "it is written forward_kl"),
        ({"objective": "jeffreys:2"}, "weight_on_forward"),
        ({"objective": 3}, "an `int` isn't a text"),
        ({"hard_label_weight": 1.5}, "from 0 to 1"),
        ({"temperature": 0.0}, "positive"),
        ({"held_out": 1.5}, "a share lies between 0 and 1"),
        ({"epochs": 0}, "whole number"),
        ({"optimizer": "sgd"}, "Use adamw or adam"),
        ({"learning_rate": math.nan}, "positive"),
        ({"seed": -1}, "whole number"),
        ({"student": mlp().requires_grad_(False)}, "none of its parameters asks for a gradient"),
        ({"student": 3}, "Pass a torch.nn.Module"),
        ({"teacher": nn.Linear(6, 1)}, "one logit per example.*torch.cat"),
        ({"student": lambda: 3}, "Return a torch.nn.Module"),
    ],
)
def test_bad_input_is_refused_in_the_one_grammar(change, match):
    given = {"teacher": mlp(), "student": mlp(hidden=4), "data": (rows(), torch.zeros(600, dtype=torch.long)), "epochs": 1}
    with pytest.raises(ValueError, match=match) as error:
        wk.distill(**{**given, **change})
    assert str(error.value).startswith("Cannot ") and str(error.value).endswith(".")


def test_an_infinite_objective_is_refused_and_bounded_ones_are_not():
    class Sure(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x):
            return self.layer(x).index_fill(1, torch.tensor([2]), -math.inf)

    with pytest.raises(ValueError, match="`reverse_kl` is infinite at the start.*jensen_shannon"):
        wk.distill(teacher=Sure(), student=nn.Linear(6, 4), data=rows(), objective="reverse_kl")
    result = wk.distill(teacher=Sure(), student=nn.Linear(6, 4), data=rows(), objective="jensen_shannon", epochs=5)
    assert result.scores.reverse_kl.value == math.inf and math.isfinite(result.scores.forward_kl.value)


def test_a_distillation_is_a_target_of_compare(tmp_path):
    x, y = labelled(mlp(), 200)
    target = DistillationTarget(mlp(), (x, y), {"epochs": 2, "learning_rate": 0.03})
    students = {"wide": lambda: mlp(hidden=8), "broken": lambda: mlp(classes=3)}
    study = wk.compare(target, students, ["forward_kl", "jeffreys:0.3"], seeds=6, out=tmp_path / "study")
    assert len(study.cells) == 24 and len(study.failed) == 12
    assert "the teacher" in study.failed[0].row["error"]
    alone = target.distill(students["wide"], "jeffreys:0.3", seed=4)
    row = next(r for r in study.rows if (r["family"], r["objective"], r["seed"]) == ("wide", "jeffreys:0.3", 4))
    assert row["forward_kl"] == alone.scores.forward_kl.value
    assert row["accuracy"] == alone.scores.accuracy.student.value
    assert row["evaluations"] == alone.examples == 2 * 140
    back = Distillation.load(study.cells[0].folder / "fit", student=mlp(hidden=8))
    assert back.to_dict() == json.loads((study.cells[0].folder / "cell.json").read_text())["details"]

    seen = []
    again = wk.compare(target, students, ["forward_kl", "jeffreys:0.3"], seeds=6, out=tmp_path / "study", tell=seen.append)
    assert seen[0].skipped == 24 and again.rows == study.rows
    assert {one.column for one in study.verdict.choices} >= {"accuracy", "nll", "ece", "forward_kl", "reverse_kl"}
    assert "wide · forward_kl" in str(study)
    for change, match in (
        ({"families": {"a": 3}}, "Cannot compare these students"),
        ({"objectives": ["renyi", "renyi:0.5"]}, "in the list twice"),
        ({"budget": 100}, "Cannot set `budget=`"),
    ):
        with pytest.raises(ValueError, match=match):
            wk.compare(target, **{"families": students, "seeds": 2, **change})
    with pytest.raises(ValueError, match="`compare` sets seed itself"):
        DistillationTarget(mlp(), x, {"seed": 3})


def test_the_report_is_one_page(tmp_path):
    x, y = labelled(mlp())
    result = wk.distill(teacher=mlp(), student=mlp(hidden=4), data=(x, y), epochs=3)
    page = wk.report(result, tmp_path / "page.html").read_text()
    for said in ("Student against teacher", result.scores.accuracy.student.number, "KL(teacher‖student)", "ECE"):
        assert said in page
    assert 'src="http' not in page
    unlabelled = wk.distill(teacher=mlp(), student=mlp(hidden=4), data=x, epochs=3)
    assert "There were no labels" in wk.report(unlabelled, tmp_path / "other.html").read_text()


_CODE = """
import torch
from torch import nn
teacher = nn.Linear(6, 4)
class Student(nn.Linear):
    def __init__(self):
        super().__init__(6, 4)
def data():
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    return x, x[:, :4].argmax(-1)
"""


def test_a_job_with_objectives_and_seeds_is_a_study(tmp_path):
    from typer.testing import CliRunner

    from whichkl.cli import app

    (tmp_path / "nets.py").write_text(_CODE)
    job = ["teacher: nets.py:teacher", "student: nets.py:Student", "data: nets.py:data", "epochs: 2"]
    (tmp_path / "job.yaml").write_text("\n".join([*job, "objectives: [forward_kl, jeffreys:0.3]", "seeds: 2", ""]))
    said = CliRunner().invoke(app, ["compare", str(tmp_path / "job.yaml"), "--json"])
    assert said.exit_code == 0, said.output
    told = json.loads(said.stdout)
    arms = [(row["family"], row["objective"], row["seed"]) for row in told["rows"]]
    assert arms == [("Student", name, seed) for seed in (0, 1) for name in ("forward_kl", "jeffreys:0.3")]
    assert (tmp_path / "job.out" / "report.html").exists() and told["failed"] == 0


def test_a_job_is_a_file_or_options_on_top(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(_CODE)
    lines = ["teacher: nets.py:teacher", "student: nets.py:Student", "data: nets.py:data", "epochs: 5", "patience: null"]
    (tmp_path / "job.yaml").write_text("\n".join(lines))
    read = read_job(tmp_path / "job.yaml", {"epochs": 2})
    assert read["epochs"] == 2 and read["patience"] is None and len(read["data"]) == 2
    assert wk.distill(**read).epochs == 2
    monkeypatch.chdir(tmp_path)
    from typer.testing import CliRunner

    from whichkl.cli import app

    said = CliRunner().invoke(app, ["distill", "job.yaml", "--objective", "reverse_kl", "--out", "out", "--json"])
    assert said.exit_code == 0, said.output
    told = json.loads(said.stdout)
    assert told["settings"]["objective"] == "reverse_kl" and told["settings"]["epochs"] == 5
    assert (tmp_path / "out" / "report.html").exists()
    assert Distillation.load(tmp_path / "out" / "student", student=nn.Linear(6, 4)).to_dict()["scores"] == told["scores"]
    for line, match in (
        ("epoch: 3", r"bad\.yaml, line 6: Cannot use `epoch`: `distill` takes no such argument"),
        ("dat[a: 3", r"bad\.yaml, line 6: Cannot use `dat\[a`: `distill` takes no such argument"),
        ("batch: many", r"bad\.yaml, line 6: .*has no meaning"),
        ("objective: 3", "no meaning"),
    ):
        (tmp_path / "bad.yaml").write_text("\n".join([*lines, line]))
        with pytest.raises(ValueError, match=match):
            read_job(tmp_path / "bad.yaml")
    (tmp_path / "few.yaml").write_text(lines[0])
    with pytest.raises(ValueError, match=r"few\.yaml: Cannot distill: `student` is missing"):
        read_job(tmp_path / "few.yaml")
