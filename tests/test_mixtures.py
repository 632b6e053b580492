"""Mixtures and Student-t by EM: known laws found again, on rows in memory and in files, and killed fits that go on."""

import json
import math
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import scipy.stats
import torch
from torch.distributions import Normal

import whichkl as wk
from programs import Program
from whichkl._checks import InputError
from whichkl.cluster import Threads
from whichkl.distributions import draws_of, log_prob_of_rows
from whichkl.families import Gaussian, Mixture, StudentT, family_from_config
from whichkl.families.student_t import MultivariateStudentT
from whichkl.files.journal import Journal
from whichkl.samples import Block, Slice
from whichkl.samples.stream import slices
from whichkl.solvers import ExpectationMaximization
from whichkl.solvers.rows.em_features import ROWS, Features, pairs_of
from whichkl.solvers.rows.em_partial import partial_cycles
from whichkl.solvers.rows.em_starts import merge, moves_to, split, split_and_merge, state_of
from whichkl.solvers.rows.em_steps import Background, Densities, Frame, State, expectation
from whichkl.solvers.rows.rows import Rows
from whichkl.solvers.work import Work

D = torch.float64


def clouds(n, seed=0, dim=3, count=4, apart=5.0):
    rng = np.random.default_rng(seed)
    centres = apart * np.random.default_rng(99).normal(size=(count, dim))
    return centres[rng.integers(0, count, n)] + rng.normal(size=(n, dim))


def solved(x, family, **options):
    return ExpectationMaximization(**options).solve(wk.Target(samples=x), family, 0)


def same(a, b, family, atol=0.0):
    for name, value in family.parameters(a).items():
        torch.testing.assert_close(family.parameters(b)[name], value, rtol=0, atol=atol)


# ---- the Student-t law itself


def test_student_t_is_scipys():
    loc, scale = np.array([0.5, -1.0, 2.0]), np.array([[2.0, 0.3, 0.1], [0.3, 1.0, 0.0], [0.1, 0.0, 0.5]])
    law = MultivariateStudentT(torch.tensor(3.5, dtype=D), torch.tensor(loc), torch.linalg.cholesky(torch.tensor(scale)))
    other = scipy.stats.multivariate_t(loc, scale, df=3.5)
    x = other.rvs(size=50, random_state=0)
    np.testing.assert_allclose(law.log_prob(torch.tensor(x)), other.logpdf(x), rtol=1e-12)
    np.testing.assert_allclose(law.covariance_matrix, scale * 3.5 / 1.5, rtol=1e-12)


def test_student_t_draws_have_its_covariance_and_gradients():
    torch.manual_seed(0)
    df = torch.tensor(9.0, dtype=D, requires_grad=True)
    law = MultivariateStudentT(df, torch.zeros(2, dtype=D), torch.eye(2, dtype=D))
    x = law.rsample((100_000,))
    y = x.detach().square()
    assert float((y.mean(0) - law.variance.detach()).abs().max()) < 4 * float(y.std()) / math.sqrt(len(y))
    x.square().sum().backward()
    assert df.grad is not None and float(df.grad) < 0  # fewer degrees of freedom, wider


@pytest.mark.parametrize("df", [0.9, 1.9])
def test_student_t_moments_that_do_not_exist_are_not_numbers(df):
    law = MultivariateStudentT(torch.tensor(df), torch.zeros(2), torch.eye(2))
    assert bool(law.mean.isnan().all()) == (df <= 1)
    assert bool((law.variance == math.inf).all())


def test_student_t_is_fitted_as_scipy_does():
    x = scipy.stats.t(4, loc=1, scale=2).rvs(size=800, random_state=1)
    df, loc, scale = scipy.stats.t.fit(x)
    model = solved(x, StudentT(), tolerance=1e-12).best.model
    theirs = scipy.stats.t(df, loc, scale).logpdf(x).mean()
    assert float(model.log_prob(torch.tensor(x)[:, None]).mean()) >= theirs - 1e-7
    assert [float(model.df), float(model.loc[0]), float(model.scale_tril[0, 0])] == pytest.approx([df, loc, scale], rel=1e-3)


def test_student_t_stands_outliers_and_the_report_says_that_a_gaussian_does_not():
    x = np.concatenate([np.random.default_rng(0).normal(size=(400, 2)), np.full((8, 2), 60.0) + np.arange(16).reshape(8, 2)])
    fit = wk.fit(x, StudentT())
    assert float(fit.model.loc.abs().max()) < 0.2
    assert fit.value.value < wk.fit(x).value.value - 1


def test_diagonal_student_t_has_no_correlations():
    x = clouds(500, count=1)
    scale = solved(x, StudentT("diagonal")).best.model.scale_tril
    assert torch.equal(scale, torch.diag(scale.diagonal()))


# ---- mixtures


@pytest.mark.parametrize("family", [Mixture(4), Mixture(4, "diagonal"), Mixture(4, "tied"), Mixture(4, law="student_t")], ids=str)
def test_four_clouds_are_found(family):
    x = clouds(2_000)
    solution = solved(x, family)
    truth = Mixture(4).model(
        {
            "probs": torch.full((4,), 0.25, dtype=D),
            "loc": torch.tensor(5.0 * np.random.default_rng(99).normal(size=(4, 3))),
            "scale_tril": torch.eye(3, dtype=D).expand(4, 3, 3),
        }
    )
    assert solution.best.converged
    assert solution.best.loss <= -float(truth.log_prob(torch.tensor(x)).mean()) + 1e-9


def test_tied_covariances_are_one():
    scale = solved(clouds(600), Mixture(3, "tied")).best.model.component_distribution.scale_tril
    assert torch.equal(scale[0], scale[1]) and torch.equal(scale[0], scale[2])


def test_split_and_merge_leaves_a_poor_optimum():
    x = clouds(3_000, count=10, apart=6.0)
    losses = {moves: [solved_with(x, moves, seed) for seed in range(8)] for moves in (False, True)}
    best = min(losses[True])
    assert max(losses[True]) - best < 1e-3
    assert max(losses[False]) - best > 0.05  # without, one start of eight isn't enough


def solved_with(x, moves, seed):
    solver = ExpectationMaximization(starts=1, moves=moves)
    return solver.solve(wk.Target(samples=x), Mixture(8), seed).best.loss


def test_weights_are_repeated_rows():
    x, w = clouds(300), np.arange(300) % 3 + 1.0
    again = ExpectationMaximization().solve(wk.Target(samples=x, weights=w), Mixture(2), 0).best
    repeated = solved(np.repeat(x, w.astype(int), axis=0), Mixture(2)).best
    assert again.loss == pytest.approx(repeated.loss, abs=1e-4)


def test_duplicated_points_do_not_collapse_a_component():
    x = np.concatenate([clouds(200), np.repeat([[40.0, 40.0, 40.0]], 50, axis=0)])
    model = solved(x, Mixture(2)).best.model
    assert float(model.component_distribution.scale_tril.diagonal(dim1=-2, dim2=-1).min()) > 1e-4
    assert bool(model.log_prob(torch.tensor(x)).isfinite().all())


def near_collinear(step, n=1_000, apart=0.0):
    """Rows (x, x + step · (a noise, at ± apart)), and a third column."""
    g = np.random.default_rng(3)
    x, side = g.normal(size=n), np.sign(g.normal(size=n))
    return np.column_stack([x, x + step * (apart * side + g.normal(size=n)), g.normal(size=n)])


def gaussian_optimum(rows):
    """½ (log |2πS| + d), the least mean −log q of a Gaussian; QR of the rows gives |S| without squaring them."""
    n, d = rows.shape
    triangle = np.linalg.qr(rows - rows.mean(0), mode="r")
    return np.log(np.abs(triangle.diagonal()) / math.sqrt(n)).sum() + d * (1 + math.log(2 * math.pi)) / 2


@pytest.mark.parametrize("step", [1e-2, 1e-3, 1e-5])
def test_columns_that_nearly_agree_do_not_rest_on_the_floor(step):
    rows = near_collinear(step)
    truth = gaussian_optimum(rows)
    for family in (Mixture(1), Mixture(1, "tied"), Gaussian("low_rank", rank=2)):
        fit = wk.fit(rows, family)
        assert fit.diagnostics.optima[0].loss == pytest.approx(truth, abs=1e-3)
        assert fit.value.reliable and not any("floor" in note for note in fit.value.notes)
    assert solved(rows, StudentT()).best.loss == pytest.approx(truth, abs=5e-3)  # ν isn't infinite in a sample


def test_components_are_found_across_a_narrow_direction():
    """In whitened coordinates these are two unit Gaussians eight apart: the entropy grows by log 2."""
    step = 1e-4
    rows = near_collinear(step, apart=4.0)
    entropy = 1.5 * (1 + math.log(2 * math.pi)) + math.log(step) + math.log(2)
    for family in (Mixture(2), Mixture(2, "tied"), Mixture(2, law="student_t")):
        best = solved(rows, family).best
        assert best.loss == pytest.approx(entropy, abs=4 * math.sqrt(1.5 / len(rows)))
        assert best.model.mixture_distribution.probs.min() > 0.4


@pytest.mark.parametrize("family", [Mixture(2), Mixture(2, "tied"), StudentT(), Mixture("auto")], ids=str)
def test_columns_that_determine_each_other_are_refused(family):
    x = clouds(300)[:, :2]
    with pytest.raises(InputError, match="`x1`, `x2`, `x3` are linearly dependent"):
        wk.fit(np.column_stack([x, x.sum(1)]), family)


def test_a_value_that_the_floor_sets_is_not_reliable():
    rows = np.repeat(clouds(300)[:5, :2], 100, 0)
    zeros = np.column_stack([clouds(300)[:, 0], np.where(np.arange(300) % 3, 0.0, clouds(300, seed=2)[:, 1])])
    for x, family in ((rows, Mixture(5)), (zeros, Mixture(2)), (zeros, Mixture(2, "diagonal"))):
        value = wk.fit(x, family).value
        assert not value.reliable
        assert any("lies at its floor" in note for note in value.notes)
    assert solved(clouds(300)[:, :2], Mixture(2)).doubts == ()


def test_auto_finds_the_number_and_shows_its_curve(tmp_path):
    fit = wk.fit(clouds(1_000), Mixture("auto"))
    assert fit.family == Mixture(4)
    curve = dict(fit.diagnostics.curve)
    assert min(curve, key=lambda k: curve[k].value) >= 4
    assert curve[1].value - curve[4].value > 1
    assert any("4 components were chosen" in note for note in fit.diagnostics.notes)
    fit.save(tmp_path / "fit")
    assert dict(wk.Fit.load(tmp_path / "fit").diagnostics.curve)[4].value == curve[4].value


def test_auto_of_one_cloud_is_one():
    assert wk.fit(clouds(500, count=1), Mixture("auto", "tied")).family.components == 1


def test_auto_says_what_it_needs():
    with pytest.raises(InputError, match="one component can't be fitted in 4 folds of 4 rows: .* needs at least 4 rows"):
        wk.fit(clouds(4), Mixture("auto"))
    with pytest.raises(ValueError, match="held-out samples, and the target has none"):
        wk.fit(wk.Target(log_prob=lambda x: -x.square().sum(-1), dim=2), Mixture("auto"))


@pytest.mark.parametrize("family", [StudentT(), StudentT("diagonal"), Mixture(2, "tied"), Mixture(2, law="student_t")], ids=str)
def test_families_are_rebuilt_from_their_configuration_and_file(family, tmp_path):
    assert family_from_config(family.config()) == family
    fit = wk.fit(clouds(300), family)
    fit.save(tmp_path / "fit")
    x = torch.tensor(clouds(20, seed=5))
    torch.testing.assert_close(wk.Fit.load(tmp_path / "fit").model.log_prob(x), fit.model.log_prob(x))


BAD = [
    (lambda: Mixture("many"), "whole number of at least 1. Give, say, components=2, or components='auto'"),
    (lambda: Mixture(0), "at least 1"),
    (lambda: Mixture(2, "round"), "Choose 'full', 'diagonal' or 'tied'"),
    (lambda: Mixture(2, law="cauchy"), "Choose 'gaussian' or 'student_t'"),
    (lambda: StudentT("tied"), "Choose 'full' or 'diagonal'"),
    (lambda: wk.fit(clouds(3), StudentT()), "needs at least 5 rows"),
    (lambda: wk.fit(wk.problems.bimodal(), Mixture(2, "tied"), objective="reverse_kl"), "doesn't minimise `reverse_kl`"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=range(len(BAD)))
def test_what_cannot_be_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- many rows: parts, single precision, held-out rows, files, threads


def many(n=150_000):
    return clouds(n, dim=4, count=3)


def test_single_precision_on_the_way_ends_where_double_does():
    x = many()
    single = solved(x, Mixture(3), starts=2).best
    whole = Slice(Block(torch.tensor(x), torch.ones(len(x), dtype=D)))
    double = ExpectationMaximization(starts=2).run(Rows((whole,), tuple("abcd")), Mixture(3), 0).best  # one part: all double
    assert single.loss == pytest.approx(double.loss, abs=1e-6)
    same(*(_sorted(one.model) for one in (single, double)), Mixture(3), atol=2e-3)


def _sorted(model):
    family = Mixture(3)
    order = family.parameters(model)["loc"][:, 0].argsort()
    return family.model({name: value[order] for name, value in family.parameters(model).items()})


def test_a_fit_of_many_rows_holds_rows_out_and_still_uses_them_all():
    x = many()
    fit = wk.fit(x, Mixture(3))
    assert "rows held out" in fit.value.method
    assert fit.value.n == pytest.approx(len(x) / 7, rel=0.05)
    entropy = 0.5 * 4 * (1 + math.log(2 * math.pi)) + math.log(3)
    assert abs(fit.value.value - entropy) < 4 * fit.value.stderr + 0.01
    again = solved(x, Mixture(3)).best.model  # on all rows from the beginning
    same(_sorted(fit.model), _sorted(again), Mixture(3), atol=1e-3)
    assert fit.findings == frozenset()


def test_files_and_memory_threads_and_one_thread_give_the_same_bits(tmp_path):
    x = many(140_000)
    for i, part in enumerate(np.split(x, 2)):
        table = pa.table({name: part[:, j] for j, name in enumerate("abcd")})
        pyarrow.parquet.write_table(table, tmp_path / f"part-{i}.parquet", row_group_size=35_000)
    target = wk.Target.of(tmp_path)
    solver = ExpectationMaximization(starts=2)
    found = [solver.solve(target.unconstrained(), Mixture(3), 0, Work(Threads(k)), 7).best.model for k in (1, 2)]
    same(*found, Mixture(3))
    inside = solved(x, Mixture(3), starts=2).best
    streamed = solver.solve(target.unconstrained(), Mixture(3), 0).best
    assert streamed.loss == pytest.approx(inside.loss, abs=2.2e-5)  # what EM may leave: 0.005 nats for each of 44 parameters
    fit = wk.fit(target, Mixture(3))
    assert fit.status == "converged"
    assert "rows held out" in fit.value.method


# ---- killed, and begun again


def test_an_interrupted_climb_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr("whichkl.solvers.rows.em._SECONDS_BETWEEN_ENTRIES", 0.0)

    class Stop(Exception):
        pass

    def journal(folder):
        return Work(Threads(1), journal=Journal.of(tmp_path / folder, {"a": 1}))

    x, family = clouds(20_000, count=6), Mixture(5, law="student_t")
    solver, target = ExpectationMaximization(starts=2), wk.Target(samples=x)
    whole = solver.solve(target, family, 0, journal("whole")).best.model
    for patience in (3, 9, 20):
        left = [patience]

        def tell(step, done, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise Stop

        with pytest.raises(Stop):
            solver.solve(target, family, 0, Work(Threads(1), tell, journal(f"broken-{patience}").journal))
        assert any((tmp_path / f"broken-{patience}").rglob("*.safetensors"))
        again = solver.solve(target, family, 0, journal(f"broken-{patience}")).best.model
        same(whole, again, family)


@pytest.mark.parametrize("family", [pytest.param("mixture:auto", marks=pytest.mark.slow), "mixture:6"])
def test_the_command_killed_goes_on_and_ends_as_if_it_had_not_been(tmp_path, family):
    x = clouds(12_000, dim=4, count=5, apart=1.5)
    pyarrow.parquet.write_table(pa.table({f"c{j}": x[:, j] for j in range(4)}), tmp_path / "data.parquet")

    def start(out):
        return Program("-m", "whichkl", "fit", "data.parquet", "--family", family, "--out", out, "--json", cwd=tmp_path)

    whole = start("whole")
    kills = 0
    broken = start("broken")
    deadline = time.monotonic() + 60
    while broken.poll() is None and time.monotonic() < deadline:
        if any((tmp_path / "broken" / ".journal").glob("*/*.safetensors")):
            broken.send_signal(signal.SIGKILL)
            kills += 1
            break
        time.sleep(0.05)
    broken.communicate()
    assert kills == 1, "the fit ended before it could be killed: give it more to do"
    kept = list((tmp_path / "broken" / ".journal").glob("*/*.safetensors"))
    assert kept
    assert not (tmp_path / "broken" / "report.html").exists()
    out, error = start("broken").communicate()
    expected, _ = whole.communicate()
    assert error == "An interrupted run left its state in broken. If this is the same run, it resumes from there.\n"
    assert json.loads(out)["parameters"] == json.loads(expected)["parameters"]
    assert (tmp_path / "broken" / "report.html").exists()
    assert not (tmp_path / "broken" / ".journal").exists()
    assert sorted(os.listdir(tmp_path / "broken")) == ["fit", "report.html"]


def test_a_journal_of_other_data_is_not_read(tmp_path):
    a, b = clouds(300), clouds(300, seed=1)
    one = Journal.of(tmp_path, {"data": "a"})
    ExpectationMaximization().solve(wk.Target(samples=a), Mixture(2), 0, Work(journal=one))
    plain = wk.fit(b, Mixture(2)).model
    again = wk.fit(b, Mixture(2), journal=tmp_path).model
    same(plain, again, Mixture(2))
    assert [path.name for path in tmp_path.iterdir()] == [one.key]


def test_the_gaussian_below_a_mixture_of_one_is_the_same():
    x = clouds(300)
    one = solved(x, Mixture(1)).best
    assert one.loss == pytest.approx(wk.solvers.ClosedForm().solve(wk.Target(samples=x), Gaussian(), 0).best.loss, abs=1e-9)


# ---- starts near another mixture


def moments(state):
    probs, loc = state.probs[0], state.loc[0]
    mean = probs @ loc
    apart = loc - mean
    return torch.cat(
        [mean[None], torch.einsum("k,kij->ij", probs, state.cov[0]) + torch.einsum("k,ki,kj->ij", probs, apart, apart)]
    )


def test_splits_and_mergers_keep_weight_and_moments_and_a_neighbour_is_its_own_start():
    x = torch.from_numpy(clouds(2_000))
    family = Mixture(4)
    model = solved(x, family).best.model
    frame = Frame.of(Block(x, torch.ones(len(x), dtype=D)), family, "abc")
    state = state_of(model, frame)
    same(frame.model(state, 0), model, family, atol=1e-9)
    for other in (split(state, 2), merge(state, 1, 3), *(move.state for move in split_and_merge(state))):
        assert float(other.probs.sum()) == pytest.approx(1.0, abs=1e-12)
        torch.testing.assert_close(moments(other), moments(state), rtol=0, atol=1e-9)
    for moves in (moves_to(3, state), moves_to(5, state), split_and_merge(state)):
        assert moves and all(len(move.new) + len(move.kept) == move.state.probs.shape[1] for move in moves)
        for move in moves:  # the others are those of the state, in its order
            others = [k for k in range(move.state.probs.shape[1]) if k not in move.new]
            assert torch.equal(move.state.cov[0, others], state.cov[0, list(move.kept)])
    assert state_of(model, replace(frame, count=6)) is None and state_of(Normal(0.0, 1.0), frame) is None


@pytest.mark.parametrize(("law", "covariance"), [("gaussian", "full"), ("student_t", "full"), ("gaussian", "diagonal")])
def test_a_cycle_of_some_components_raises_the_likelihood_and_leaves_the_others(law, covariance):
    x = torch.from_numpy(clouds(2_000))
    family = Mixture(4, covariance, law=law)
    block = Block(x, torch.ones(len(x), dtype=D))
    frame, rows = Frame.of(block, family, "abc"), Rows(slices(block), "abc")
    state = state_of(solved(clouds(1_000, seed=1), family).best.model, frame)
    moves = split_and_merge(state)
    before = [frame.update(rows, D, move.state)[0] for move in moves]
    moved, likelihood, gain, iterations = partial_cycles(rows, frame, state, moves, 2)
    after, _ = frame.update(rows, D, moved)
    assert iterations == 6 and bool((after >= likelihood - 1e-12).all() and (gain > 0).all() and (likelihood.diff() <= 0).all())
    assert float(after.max()) > float(torch.cat(before).max()) and float(after.min()) > float(torch.cat(before).min())
    assert torch.allclose(moved.probs.sum(1), torch.ones(len(moves), dtype=D))
    for one in range(len(moves)):
        shared = (moved.cov[one][:, None] == state.cov[0]).all((-1, -2)).any(1)
        assert int(shared.sum()) == 1  # of four components three are new


@pytest.mark.parametrize("law", ["gaussian", "student_t"])
def test_some_components_before_a_background_have_the_mixtures_likelihood_and_sums(law):
    x = torch.from_numpy(clouds(500))
    family, block = Mixture(4, law=law), Block(x, torch.ones(len(x), dtype=D))
    frame = Frame.of(block, family, "abc")
    state = state_of(solved(clouds(1_000, seed=1), family).best.model, frame)
    whole = expectation(Densities.of(state, D, diagonal=False), frame, iter([block]))
    some, kept = torch.tensor([1, 3]), torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=D)
    background = Background(Densities.of(state, D, diagonal=False), kept)
    part = expectation(Densities.of(state.each(lambda one: one[:, some]), D, diagonal=False), frame, iter([block]), background)
    for name, expected in (
        ("likelihood", whole["likelihood"]),
        ("moments", whole["moments"][some]),
        ("mass", whole["mass"][:, some]),
    ):
        torch.testing.assert_close(part[name], expected)


def test_em_near_its_own_optimum_stays_there():
    x = clouds(2_000)
    found = solved(x, Mixture(4))
    again = ExpectationMaximization().quick().near(found.best.model, 1e-4).solve(wk.Target(samples=x), Mixture(4), 1)
    assert again.best.loss == pytest.approx(found.best.loss, abs=1e-4) and again.iterations < found.iterations


def mixed(dtype=D, validate_args=False):
    generator = torch.Generator().manual_seed(0)
    loc = 3 * torch.randn(3, 4, generator=generator, dtype=dtype)
    tril = torch.randn(3, 4, 4, generator=generator, dtype=dtype).tril(-1) + torch.eye(4, dtype=dtype) / 4
    weights = torch.distributions.Categorical(torch.tensor([0.6, 0.3, 0.1], dtype=dtype))
    parts = torch.distributions.MultivariateNormal(loc, scale_tril=tril)
    return torch.distributions.MixtureSameFamily(weights, parts, validate_args=validate_args)


def test_log_densities_by_one_product_are_torchs():
    law, x = mixed(), 4 * torch.randn(3_000, 4, generator=torch.Generator().manual_seed(1), dtype=D)
    assert torch.allclose(log_prob_of_rows(law, x), law.log_prob(x), rtol=1e-12, atol=1e-12)
    assert log_prob_of_rows(law, x[:0]).shape == (0,)
    x.requires_grad_()
    scores = [torch.autograd.grad(log.sum(), x)[0] for log in (log_prob_of_rows(law, x), law.log_prob(x))]
    assert torch.allclose(*scores, rtol=1e-9, atol=1e-9)


def test_rows_of_another_width_or_type_are_left_to_torch():
    law = mixed()
    for x in (torch.zeros(2, 1, dtype=D), torch.zeros(2, 4), torch.zeros(2, 5, 4, dtype=D)):
        answers = []
        for log_prob in (law.log_prob, lambda x: log_prob_of_rows(law, x)):
            try:
                answers.append(log_prob(x))
            except (ValueError, RuntimeError) as error:
                answers.append(str(error))
        assert type(answers[0]) is type(answers[1])
        assert torch.equal(*answers) if isinstance(answers[0], torch.Tensor) else answers[0] == answers[1]
    with pytest.raises(ValueError, match="within the support"):
        log_prob_of_rows(mixed(validate_args=True), torch.full((1, 4), math.nan, dtype=D))


def test_draws_of_a_mixture_have_its_moments_and_the_shares_of_its_components():
    law, n = mixed(), 100_000
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = draws_of(law, torch.Size((n,)))
        assert draws_of(law, torch.Size((2, 3))).shape == (2, 3, 4) and draws_of(law, torch.Size()).shape == (4,)
    assert bool(((x.mean(0) - law.mean).abs() < 4 * (law.variance / n).sqrt()).all())
    fourth = ((x - law.mean) ** 4).mean(0)
    assert bool(((x.var(0) - law.variance).abs() < 4 * ((fourth - law.variance**2) / n).sqrt()).all())
    logs = law.component_distribution.log_prob(x[:, None]) + law.mixture_distribution.logits
    share, p = logs.softmax(1).mean(0), law.mixture_distribution.probs
    assert bool(((share - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all())


# ---- features of an E step


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 7, 8])
def test_features_are_one_each_product_of_columns_once_and_the_columns(dim, diagonal):
    space, row, column = Features(dim, D, diagonal=diagonal), *pairs_of(dim, diagonal=diagonal)
    pairs = {tuple(sorted(pair)) for pair in zip(row.tolist(), column.tolist(), strict=True)}
    assert len(pairs) == len(row) == (dim if diagonal else dim * (dim + 1) // 2)
    for rows in (ROWS, 5):  # a second, shorter block in the same buffer
        y = torch.randn(rows, dim, generator=torch.Generator().manual_seed(rows), dtype=D)
        assert torch.equal(space.of(y), torch.cat([torch.ones(1, rows, dtype=D), (y[:, row] * y[:, column]).T, y.T]))


def test_a_component_far_from_every_row_has_no_share_of_them():
    """Its shares would be subnormal numbers, and slow; they are far below rounding, and so is what it adds to the others."""
    x = torch.tensor(clouds(300, count=1))
    block = Block(x, torch.full((300,), 1 / 300, dtype=D))
    frame = Frame.of(block, Mixture(2), ("a", "b", "c"))
    rows = Rows(frame.parts(block, 1), ("a", "b", "c"))
    loc = torch.stack([torch.zeros(3, dtype=D), torch.full((3,), 40.0, dtype=D)])[None]
    near, far = (State(torch.tensor([[1 - p, p]], dtype=D), loc, torch.eye(3, dtype=D).expand(1, 2, 3, 3)) for p in (1e-9, 0.5))
    for state in (near, far):
        likelihood, after = frame.update(rows, D, state)
        alone = torch.distributions.MultivariateNormal(loc[0, 0], torch.eye(3, dtype=D)).log_prob(frame.standard(x))
        assert float(likelihood) == pytest.approx(float(alone.mean() + state.probs[0, 0].log()), abs=1e-12)
        assert torch.allclose(after.loc[0, 0], frame.standard(x).mean(0), atol=1e-12)
        assert float(after.probs[0, 1]) < 1e-11


def test_parts_in_memory_are_even_and_keep_every_row():
    for n, size, count in ((10, 4, 4), (8, 4, 2), (11, 4, 4), (3, 4, 1), (200_000, 65_536, 4)):
        block = Block(torch.arange(n, dtype=D)[:, None], torch.ones(n, dtype=D))
        parts = slices(block, size)
        assert len(parts) == count and max(map(sized, parts)) - min(map(sized, parts)) < count
        assert torch.equal(torch.cat([part.block.x for part in parts]), block.x)


def sized(part):
    return len(part.block)
