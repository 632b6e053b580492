"""fit, from a target to a saved result: objective, model, value, findings, and files that survive a kill."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.distributions import Beta, Distribution, Gamma, Independent, LogNormal, MultivariateNormal, Uniform

import whichkl as wk
from whichkl._checks import InputError, IntegrityError, ResourceError
from whichkl.diagnostics import cross_fitted_losses
from whichkl.divergences.draws import monte_carlo
from whichkl.families import Gaussian, Mixture
from whichkl.solvers import ClosedForm, ExpectationMaximization

D = torch.float64


def rows(n=300, dim=2, seed=0):
    return np.random.default_rng(seed).normal(size=(n, dim)) * 2 + 1


def test_samples_alone_give_maximum_likelihood():
    x = rows()
    fit = wk.fit(x)
    assert (fit.objective.name, fit.solver, fit.status) == ("forward_kl", "closed_form", "converged")
    assert isinstance(fit.model, Distribution)
    np.testing.assert_allclose(fit.model.mean, x.mean(0), atol=1e-12)
    np.testing.assert_allclose(fit.model.covariance_matrix, np.cov(x.T, bias=True), atol=1e-12)
    assert fit.value.up_to == "entropy_p"
    assert fit.findings == frozenset()
    assert fit.advice.best.objective.name == "forward_kl"


@pytest.mark.slow
def test_held_out_value_estimates_the_cross_entropy():
    truth = MultivariateNormal(torch.zeros(3, dtype=D), torch.eye(3, dtype=D))
    entropy = float(truth.entropy())
    gaps = []
    for seed in range(20):
        x = torch.randn(400, 3, generator=torch.Generator().manual_seed(seed), dtype=D)
        value = wk.fit(x).value
        gaps.append((value.value - entropy) / value.stderr)
    # the fit itself costs about (number of parameters)/(2n) = 0.011 nats, a third of the standard error
    assert abs(np.mean(gaps)) < 4 / np.sqrt(len(gaps)) + 0.4
    assert 0.5 < np.std(gaps) < 1.6


def test_weights_are_maximum_likelihood_of_repeated_rows():
    x = rows(60)
    w = np.arange(60) % 4 + 0.0
    a = wk.fit(wk.Target(samples=x, weights=w)).model
    b = wk.fit(np.repeat(x, w.astype(int), axis=0)).model
    torch.testing.assert_close(a.mean, b.mean)
    torch.testing.assert_close(a.covariance_matrix, b.covariance_matrix)


def test_a_log_density_alone_gives_variational_inference():
    fit = wk.fit(wk.problems.eight_schools())
    d = fit.diagnostics
    assert (fit.objective.name, fit.solver, fit.status) == ("reverse_kl", "natural_gradient", "converged")
    assert fit.value.up_to == "log_z"
    assert fit.value.value == -d.elbo.value
    assert d.residual < 1e-6
    assert d.node_error < 0.05
    assert 1000 < d.ess <= 10_000
    assert d.khat < 0.7


@pytest.mark.parametrize(
    "function",
    [
        lambda x: -0.5 * ((x - 2) ** 2).sum(-1),
        lambda x: -0.5 * np.sum((np.asarray(x) - 2) ** 2, axis=-1),
        lambda x: -0.5 * np.einsum("ij,ij->i", x - 2, x - 2),
    ],
    ids=["torch", "asarray", "numpy"],
)
def test_log_densities_of_tensors_and_of_arrays_give_the_same_fit(function):
    fit = wk.fit(wk.Target(log_prob=function, dim=3))
    assert fit.model.mean.tolist() == pytest.approx([2, 2, 2], abs=1e-6)
    assert fit.model.variance.tolist() == pytest.approx([1, 1, 1], abs=1e-5)


def test_functions_of_one_point_and_given_scores():
    one = wk.Target(log_prob=lambda x: -0.5 * (x @ x), dim=2, batched=False)
    assert wk.fit(one).model.variance.tolist() == pytest.approx([1, 1], abs=1e-6)
    calls = []

    def score(x):
        calls.append(len(x))
        return -x

    by_hand = wk.Target(log_prob=lambda x: -0.5 * x.square().sum(-1).detach(), score=score, dim=2)
    assert wk.fit(by_hand).model.variance.tolist() == pytest.approx([1, 1], abs=1e-6)
    assert calls


def test_both_accesses_start_with_forward_kl_and_point_to_the_experiment():
    fit = wk.fit(wk.problems.bimodal())
    assert fit.objective.name == "forward_kl"
    assert "experiment" in fit.advice.verdict
    assert [option.objective.name for option in fit.advice.options][:2] == ["forward_kl", "reverse_kl"]
    assert fit.value.exact
    assert fit.value.value == pytest.approx(0.461995, abs=6e-7)
    assert "family_too_small" in fit.findings


@pytest.mark.parametrize("family", [Mixture(2), wk.families.StudentT()])
def test_diagnostics_print_a_line_each_and_no_rows(family):
    x = np.random.default_rng(0).normal(size=(3_000, 2))
    d = wk.fit(x, family, solver=ExpectationMaximization()).diagnostics
    lines = str(d).splitlines()
    assert {line.split(":")[0] for line in lines} >= {
        "optima",
        "held_out",
        "richer_gain",
        "two_sample",
        "calibration",
        "iterations",
    }
    assert all(len(line) < 250 for line in lines)
    assert "tensor(" not in str(d) and "tensor(" not in repr(d) and len(repr(d)) < 4_000
    assert d.held is not None and "held=" not in repr(d)


def test_a_family_may_be_named_by_a_text():
    x = np.random.default_rng(0).normal(size=(200, 2))
    assert wk.fit(x, "mixture:2:diagonal").family == Mixture(2, "diagonal")
    assert wk.advise(x, "gaussian:diagonal").family == Gaussian("diagonal")
    with pytest.raises(InputError, match=r"it isn't a known one. Did you mean `mixture`\? Choose among"):
        wk.fit(x, "mixtur")


def test_findings_come_with_the_next_step():
    fit = wk.fit(wk.problems.bimodal(), objective="reverse_kl")
    assert fit.findings == {"family_too_small", "modes_missing", "other_modes_exist", "weights_unreliable"}
    assert fit.diagnostics.separate == 2
    assert len(fit.diagnostics.optima) == 3
    assert [one.is_global for one in fit.diagnostics.optima] == [True, True, False]
    assert "Mixture(2" in " ".join(fit.explanations)
    assert "family_too_small" in str(fit)
    assert wk.fit(wk.problems.bimodal(), Mixture(2)).findings == frozenset()


def correlated(n: int, rho: float) -> np.ndarray:
    x = np.random.default_rng(1).normal(size=(n, 2))
    return np.column_stack([x[:, 0], rho * x[:, 0] + math.sqrt(1 - rho**2) * x[:, 1]])


NEXT = [
    (correlated(600, 0.8), Gaussian("diagonal"), "Gaussian()"),
    (correlated(600, 0.8), wk.families.Product("normal"), "Gaussian()"),
    (wk.Target(samples=np.exp(correlated(600, 0.8)), support="positive"), Gaussian("diagonal"), "Gaussian()"),
    (
        MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.8], [0.8, 1.0]])),
        Gaussian("diagonal"),
        "Gaussian()",
    ),
    (
        wk.Target(log_prob=lambda x: -(x[:, 0] ** 2 + x[:, 1] ** 2 - 1.8 * x[:, 0] * x[:, 1]), dim=2),
        Gaussian("diagonal"),
        "Gaussian()",
    ),
    (
        np.abs(correlated(600, 0.0)) ** 0.5 * np.sign(correlated(600, 0.0)),
        Gaussian("diagonal"),
        "Mixture(2, covariance='diagonal'",
    ),
]


@pytest.mark.parametrize(("target", "family", "larger"), NEXT)
def test_correlated_columns_ask_for_a_full_covariance_before_components(target, family, larger, tmp_path):
    fit = wk.fit(target, family)
    assert "family_too_small" in fit.findings
    said = dict(zip(sorted(fit.findings), fit.explanations, strict=True))["family_too_small"]
    assert larger in said
    fit.save(tmp_path / "fit")
    assert wk.Fit.load(tmp_path / "fit").explanations == fit.explanations


SUPPORTS = [
    (LogNormal(torch.tensor(0.3, dtype=D), torch.tensor(0.5, dtype=D)), 1e-4),
    (Gamma(torch.tensor(9.0, dtype=D), torch.tensor(2.0, dtype=D)), 0.02),
    (Beta(torch.tensor(5.0, dtype=D), torch.tensor(7.0, dtype=D)), 0.02),
    (Uniform(torch.tensor(-1.0, dtype=D), torch.tensor(5.0, dtype=D)), 0.2),
]


@pytest.mark.parametrize(("p", "close"), SUPPORTS)
@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl"])
def test_the_model_lives_on_the_support_of_the_target(p, close, objective, tmp_path):
    fit = wk.fit(p, objective=objective)
    assert 0 <= fit.value.value < close
    x = fit.model.sample((2000,))
    assert bool(p.support.check(x).all())
    fit.save(tmp_path / "fit")
    again = wk.Fit.load(tmp_path / "fit")
    torch.testing.assert_close(again.model.log_prob(x), fit.model.log_prob(x))


def test_supports_a_column_and_a_simplex():
    p = Independent(Uniform(torch.tensor([0.0, -3.0], dtype=D), torch.tensor([1.0, 5.0], dtype=D)), 1)
    x = wk.fit(p, objective="reverse_kl").model.sample((500,))
    assert bool(((x > torch.tensor([0.0, -3.0])) & (x < torch.tensor([1.0, 5.0]))).all())
    mixed = wk.Target(samples=np.abs(rows()) + [0.0, 0.1], support=["positive", "real"])
    assert bool((wk.fit(mixed).model.sample((500,))[:, 0] > 0).all())
    dirichlet = torch.distributions.Dirichlet(torch.tensor([3.0, 4.0, 5.0], dtype=D))
    fit = wk.fit(dirichlet, objective="reverse_kl")
    assert fit.model.sample().sum() == pytest.approx(1)
    assert 0 <= fit.value.value < 0.1


def test_dtype_follows_the_samples_and_the_same_seed_gives_the_same_fit():
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(1))
    assert wk.fit(x).model.mean.dtype == torch.float32
    assert wk.fit(x.double()).model.mean.dtype == torch.float64
    torch.manual_seed(11)
    a = wk.fit(x, Mixture(3), seed=4)
    state = torch.random.get_rng_state()
    torch.manual_seed(12)
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    b = wk.fit(x, Mixture(3), seed=4)
    assert torch.equal(a.model.mean, b.model.mean)
    assert a.value == b.value
    torch.manual_seed(11)
    assert torch.equal(state, torch.random.get_rng_state())
    assert (np.random.get_state()[1] == before).all()


def test_integer_samples_rounding_and_duplicates_do_not_collapse_a_mixture():
    x = np.random.default_rng(0).poisson(20, size=(400, 2))
    fit = wk.fit(x, Mixture(4))
    smallest = torch.linalg.eigvalsh(fit.model.component_distribution.covariance_matrix).min()
    assert smallest > 1 / 12
    assert fit.diagnostics.richer_gain.value < 0.5


def test_a_fit_is_saved_whole_and_loaded_as_it_was(tmp_path):
    fit = wk.fit(wk.problems.bimodal(), objective="reverse_kl")
    fit.save(tmp_path / "fit")
    again = wk.Fit.load(tmp_path / "fit")
    assert str(again) == str(fit)
    assert again.value == fit.value
    assert again.advice == fit.advice
    for one, other in zip(again.diagnostics.optima, fit.diagnostics.optima, strict=True):
        assert torch.equal(one.model.mean, other.model.mean)
    described = json.loads((tmp_path / "fit" / "fit.json").read_text())
    assert sorted(path.name for path in (tmp_path / "fit").iterdir()) == ["fit.json", described["weights"]]


def test_infinities_survive_the_file(tmp_path):
    fit = wk.fit(rows(3, 2))
    fit.save(tmp_path / "fit")
    assert str(wk.Fit.load(tmp_path / "fit")) == str(fit)


def test_a_changed_cut_or_missing_file_is_noticed(tmp_path):
    fit = wk.fit(rows())
    fit.save(tmp_path / "fit")
    (weights,) = (tmp_path / "fit").glob("*.safetensors")
    data = weights.read_bytes()
    for broken in (data[:-1], data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]):
        weights.write_bytes(broken)
        with pytest.raises(IntegrityError, match="SHA-256"):
            wk.Fit.load(tmp_path / "fit")
    weights.write_bytes(data)
    text = (tmp_path / "fit" / "fit.json").read_text()
    for broken in (
        text[:100],
        text.replace('"Gaussian"', '"Gauss"'),
        text.replace('"format": 1', '"format": 9'),
        text.replace("model-", "../model-"),
    ):
        (tmp_path / "fit" / "fit.json").write_text(broken)
        with pytest.raises(IntegrityError):
            wk.Fit.load(tmp_path / "fit")
    with pytest.raises(InputError, match="is missing"):
        wk.Fit.load(tmp_path / "nowhere")


def test_a_save_never_harms_what_is_there(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    fit = wk.fit(rows())
    with pytest.raises(InputError, match="holds something else"):
        fit.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError):
        fit.save(tmp_path / "file" / "below")


_LOOP = """
import os, sys, whichkl as wk, numpy as np
fits = [wk.fit(np.random.default_rng(i).normal(size=(50, 3))) for i in range(2)]
fits[0].save(sys.argv[1])
for _ in sys.stdin:
    child = os.fork()
    while child == 0:
        for fit in fits:
            fit.save(sys.argv[1])
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


def test_a_kill_in_the_middle_of_a_save_leaves_a_whole_fit(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", _LOOP, str(tmp_path / "fit")], **pipes) as process:
        for delay in (0.003, 0.011, 0.024, 0.05, 0.07, 0.09):
            print(file=process.stdin, flush=True)
            child = int(process.stdout.readline())
            time.sleep(0.05 + delay)
            os.kill(child, signal.SIGKILL)
            assert process.stdout.readline() == "ended\n"
            assert wk.Fit.load(tmp_path / "fit").model.mean.shape == (3,)
        process.stdin.close()
    wk.fit(rows()).save(tmp_path / "fit")
    assert len(list((tmp_path / "fit").iterdir())) == 2


def test_a_diagonal_family_stays_diagonal():
    p = MultivariateNormal(torch.zeros(2, dtype=D), torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=D))
    for objective, variance in (("forward_kl", 1.0), ("reverse_kl", 0.19)):
        fit = wk.fit(p, Gaussian("diagonal"), objective=objective)
        assert fit.model.variance.tolist() == pytest.approx([variance] * 2, rel=0.05)
        assert isinstance(fit.model, Independent)


def test_a_missed_mode_is_counted_though_the_weights_look_perfect():
    means = torch.tensor([[3.0, 3.0], [3.0, -3.0], [-3.0, 3.0], [-3.0, -3.0]], dtype=D)
    parts = MultivariateNormal(means, torch.eye(2, dtype=D))
    four = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.ones(4, dtype=D)), parts)
    fit = wk.fit(wk.Target(log_prob=four.log_prob, dim=2))
    assert fit.diagnostics.separate == 4
    assert fit.diagnostics.least_kl == pytest.approx(np.log(4), abs=0.01)
    assert {"family_too_small", "other_modes_exist", "weights_unreliable"} <= fit.findings
    assert "Mixture(4" in " ".join(fit.explanations)


def test_a_log_density_with_a_kink_has_one_optimum_and_converges():
    fit = wk.fit(wk.Target(log_prob=lambda x: -x.abs().sum(-1), dim=2))
    assert fit.status == "converged"
    assert len(fit.diagnostics.optima) == 1


def test_samples_that_contradict_the_log_density_are_noticed():
    def log_prob(x):
        return -0.5 * x.square().sum(-1) - np.log(2 * np.pi)

    right = wk.fit(wk.Target(samples=torch.randn(500, 2, dtype=D), log_prob=log_prob, normalized=True))
    assert "accesses_disagree" not in right.findings
    assert right.value.up_to is None
    assert abs(right.value.value) < 4 * right.value.stderr + 0.02
    for wrong in (torch.randn(500, 2, dtype=D) + 10, 3 * torch.randn(500, 2, dtype=D)):
        assert "accesses_disagree" in wk.fit(wk.Target(samples=wrong, log_prob=log_prob)).findings


@pytest.mark.parametrize("df", [1.2, 1.5, 2.0])
def test_tails_without_variance_are_refused_for_forward_kl(df):
    with pytest.raises(ValueError, match="no variance"):
        wk.fit(torch.distributions.StudentT(torch.tensor(df, dtype=D)), objective="forward_kl")
    assert wk.fit(torch.distributions.StudentT(torch.tensor(df, dtype=D)), objective="reverse_kl").value.value > 0


@pytest.mark.parametrize("dim", [1, 2])
def test_a_density_that_is_said_to_be_normalised_and_is_not(dim):
    with pytest.raises(ValueError, match="below 0: its integral isn't one"):
        wk.fit(wk.Target(log_prob=lambda x: -x.square().sum(-1), dim=dim, normalized=True))


def test_too_rich_a_mixture_is_said_to_be():
    fit = wk.fit(np.random.default_rng(3).normal(size=(40, 2)), Mixture(5))
    assert fit.diagnostics.simpler_gain is not None
    assert fit.findings & {"family_too_rich", "heavy_tails"}


def unseen_loss(x: np.ndarray):
    order, loss, how = cross_fitted_losses(wk.Target(samples=x), Gaussian(), ClosedForm(), 0)
    return monte_carlo.cross_entropy(loss, how)


@pytest.mark.parametrize("rows", [15, 60, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (12, 20, 25, 30))])
def test_few_rows_are_no_evidence_of_heavy_tails(rows):
    def is_heavy(value):
        return not value.reliable and value.khat is not None and value.khat >= 1

    values = [unseen_loss(np.random.default_rng(seed).normal(size=(rows, 2))) for seed in range(200)]
    assert sum(map(is_heavy, values)) <= 4


def test_a_fit_of_few_rows_says_that_their_tail_cannot_be_told():
    fit = wk.fit(np.random.default_rng(0).normal(size=(15, 2)))
    assert "heavy_tails" not in fit.findings
    assert "15 draws are too few to tell how heavy the tail of the log ratio is" in str(fit.value)
    assert "heavy_tails" in wk.fit(np.random.default_rng(0).standard_cauchy(size=(300, 1))).findings


SKEWED = {
    "exponential": lambda rng: rng.exponential(size=150),
    "chi-squared": lambda rng: rng.normal(size=150) ** 2,
    "Weibull": lambda rng: rng.weibull(0.8, size=150),
    "beta": lambda rng: rng.beta(0.5, 5, size=150),
}


@pytest.mark.parametrize("name", SKEWED)
def test_skewed_rows_are_called_skewed_and_not_heavy(name):
    found = [wk.fit(SKEWED[name](np.random.default_rng(seed)), Gaussian()).findings for seed in range(6)]
    assert sum("heavy_tails" in one for one in found) <= 1
    assert sum("skewed_rows" in one for one in found) >= 2


def test_rows_of_heavy_tails_are_not_called_skewed():
    found = [wk.fit(np.random.default_rng(seed).standard_cauchy(size=150), Gaussian()).findings for seed in range(6)]
    assert all("heavy_tails" in one and "skewed_rows" not in one for one in found)


def test_a_search_survives_points_where_the_function_breaks():
    def funnel(x):  # torch's own check raises where the scale underflows
        first = torch.distributions.Normal(0, 3).log_prob(x[:, 0])
        return first + torch.distributions.Normal(0, torch.exp(x[:, :1] / 2)).log_prob(x[:, 1:]).sum(-1)

    fit = wk.fit(wk.Target(log_prob=funnel, dim=5))
    assert fit.status == "converged"
    assert "family_too_small" in fit.findings


def test_single_precision_distributions_are_fitted_too():
    fit = wk.fit(Gamma(torch.tensor(2.0), torch.tensor(1.0)))
    assert fit.model.sample().dtype == torch.float32
    assert 0 < fit.value.value < 0.1


@pytest.mark.parametrize("family", ["gaussian", "mixture:2", "student_t"])
def test_rows_without_which_a_column_is_constant_are_not_held_out(family):
    x = torch.randn(300, 2, dtype=D, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 0.0
    x[7, 1] = 1.0  # one fold has the only other value
    value = wk.fit(x, family).value
    assert not value.reliable and "in-sample" in value.method
