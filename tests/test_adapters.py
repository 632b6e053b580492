"""Functions of JAX, pairs of value and gradient, NumPyro models and ArviZ: the same numbers as torch's, in both directions."""

import math
import subprocess
import sys
import warnings
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import torch

import whichkl as wk
from whichkl.adapters.jax import SIZES, Rows, double_precision, log_density, pieces, to_jax
from whichkl.adapters.numpyro import NumPyroModel
from whichkl.adapters.pairs import paired
from whichkl.problems.real_data import EFFECTS, ERRORS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import arviz as az

A = np.array([[2.0, 0.3, 0.0], [0.3, 1.0, 0.2], [0.0, 0.2, 0.5]])


def by_torch(x):
    return -0.5 * ((x @ torch.from_numpy(A)) * x).sum(-1) - torch.logaddexp(x[:, 0], x[:, 1])


def by_rows(x):
    return -0.5 * jnp.sum((x @ A) * x, axis=-1) - jnp.logaddexp(x[:, 0], x[:, 1])


def by_point(x):
    return -0.5 * x @ A @ x - jnp.logaddexp(x[0], x[1])


JAX_FUNCTIONS = {
    "rows": by_rows,
    "point": by_point,
    "jitted": jax.jit(by_point),
    "takes a tensor": lambda x: by_rows(jnp.asarray(x)),
    "wrapped": log_density(by_point),
    "wrapped rows": log_density(by_rows, batched=True),
}


def points(n, d=3, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def is_single():
    return jnp.ones(1).dtype == jnp.float32 and not jax.config.jax_enable_x64


@pytest.mark.parametrize("n", [1, 16, 37, 600])
@pytest.mark.parametrize("function", JAX_FUNCTIONS.values(), ids=JAX_FUNCTIONS)
def test_a_jax_density_has_the_values_and_gradients_of_torchs(function, n):
    x = points(n)
    target, reference = wk.Target(log_prob=function, dim=3), wk.Target(log_prob=by_torch, dim=3)
    torch.testing.assert_close(target.log_prob(x), reference.log_prob(x), atol=1e-13, rtol=1e-13)
    for mine, theirs in zip(target.value_and_score(x), reference.value_and_score(x), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-13, rtol=1e-13)
    assert target.access == wk.Access.LOG_PROB | wk.Access.DIFFERENTIABLE
    assert is_single()


def test_one_point_at_a_time_in_jax_is_mapped_over_the_rows():
    target = wk.Target(log_prob=by_point, dim=3, batched=False)
    torch.testing.assert_close(target.log_prob(points(20)), by_torch(points(20)), atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("score", [jax.grad(by_point), jax.vmap(jax.grad(by_point))], ids=["point", "rows"])
def test_a_jax_score_is_used(score):
    target = wk.Target(log_prob=by_point, score=score, dim=3)
    _, gradient = target.value_and_score(points(40))
    expected = wk.Target(log_prob=by_torch, dim=3).value_and_score(points(40))[1]
    torch.testing.assert_close(gradient, expected, atol=1e-13, rtol=1e-13)
    with pytest.raises(ValueError, match="`score` is not the gradient"):
        wk.Target(log_prob=by_point, score=lambda x: 3 * x, dim=3).value_and_score(points(40))


def test_a_fit_of_a_jax_density_is_that_of_torchs():
    mine = wk.fit(wk.Target(log_prob=by_point, dim=3))
    theirs = wk.fit(wk.Target(log_prob=by_torch, dim=3))
    torch.testing.assert_close(mine.model.mean, theirs.model.mean, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(mine.model.covariance_matrix, theirs.model.covariance_matrix, atol=1e-9, rtol=1e-9)
    assert mine.value.value == pytest.approx(theirs.value.value, abs=1e-9)
    assert is_single()


def test_a_fit_compiles_a_function_once_for_each_size_and_never_again():
    traced = []

    def counted(x):
        traced.append(x.shape)
        return by_point(x)

    target = wk.Target(log_prob=counted, dim=3)
    wk.fit(target)
    compiled = len(traced)
    assert compiled <= len(SIZES) + 4  # two looks at its shapes, and one or two calls that show what it takes
    wk.fit(target, wk.families.Mixture(2))
    assert len(traced) == compiled


TOGETHER = """
import sys, numpy as np, jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, whichkl as wk
from numpyro.infer import MCMC, NUTS
group, inner, order = np.arange(30) % 3, sys.argv[1], sys.argv[2].split()
y = np.array([0.0, 1.0, 2.0])[group] + np.linspace(-0.3, 0.3, 30)
log_prob = lambda mu: -0.5 * jnp.sum((y - mu[group]) ** 2) / 0.09 - 0.5 * jnp.sum(mu**2) / 100
log_prob = jax.jit(log_prob) if inner == "jitted" else log_prob
def model():
    numpyro.factor("likelihood", log_prob(numpyro.sample("mu", dist.Normal(0, 10).expand([3]).to_event(1))))
kernel = MCMC(NUTS(model), num_warmup=50, num_samples=50, progress_bar=False)
def mcmc():
    kernel.run(jax.random.PRNGKey(0))
    return kernel.get_samples()["mu"].mean(0)
steps = {
    "fit": lambda: wk.fit(wk.Target(log_prob=log_prob, dim=3)).model.mean,
    "model": lambda: wk.fit(wk.Target.of(model)).model.mean,
    "nuts": mcmc,
    "shape": lambda: (jax.eval_shape(log_prob, jax.ShapeDtypeStruct((3,), "float32")), None)[1],
    "grad": lambda: jax.jit(jax.grad(log_prob))(jnp.zeros(3)) / 111 if not jax.config.jax_enable_x64 else None,
}
with jax.enable_x64("double" in order):
    for step in order:
        found = steps.get(step, lambda: None)()
        if found is not None:
            assert np.abs(np.asarray(found) - [0.0, 1.0, 2.0]).max() < 0.15, (step, found)
            assert step in ("fit", "model") or (found.dtype == jnp.float64) == ("double" in order)
"""


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jitted"])
def test_no_trace_of_the_other_precision_is_met(wrap):
    group = np.arange(30) % 3
    f = wrap(lambda mu: -jnp.sum(mu[group] ** 2))
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        assert jax.jit(jax.grad(f))(jnp.ones(3)).tolist() == [-20.0] * 3
        assert jax.eval_shape(f, jax.ShapeDtypeStruct((3,), "float32")).dtype == jnp.float32
        (gradient,) = torch.autograd.grad(log_density(f)(x).sum(), x)
        assert gradient.tolist() == [[-20.0] * 3] * 2 and gradient.dtype == torch.float64


def test_data_are_in_double_precision_after_a_trace_in_single():
    y = np.linspace(0.1, 0.7, 30)
    f = lambda mu: -jnp.sum((mu[0] - y) ** 2)  # noqa: E731
    kept = jax.jit(f)
    assert kept(jnp.ones(1)).dtype == jnp.float32
    assert float(log_density(f)(torch.ones(1, 1, dtype=torch.float64))[0]) == pytest.approx(-((1 - y) ** 2).sum(), rel=1e-14)
    assert kept(jnp.ones(1)).dtype == jax.jit(f)(jnp.ones(1)).dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inner", "order"),
    [
        ("plain", "fit nuts grad fit model"),
        ("plain", "nuts fit nuts shape grad model fit"),
        ("jitted", "shape fit nuts grad model nuts"),
        ("jitted", "model nuts fit grad"),
        ("plain", "double fit nuts model"),
    ],
)
def test_jax_and_numpyro_work_in_single_precision_before_and_after_a_fit(inner, order):
    done = subprocess.run([sys.executable, "-c", TOGETHER, inner, order], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_support_is_respected():
    def log_prob(x):  # Gamma(3, 2)
        return jnp.sum(2 * jnp.log(x) - 2 * x)

    fit = wk.fit(wk.Target(log_prob=log_prob, dim=1, support="positive"))
    gamma = torch.distributions.Gamma(torch.tensor(3.0, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64))
    expected = wk.fit(wk.Target(log_prob=lambda x: gamma.log_prob(x[:, 0]), dim=1, support="positive"))
    draws = fit.model.sample((5,))
    torch.testing.assert_close(fit.model.log_prob(draws), expected.model.log_prob(draws), atol=1e-8, rtol=1e-8)


def test_a_search_may_leave_the_support_with_every_row():
    for function in (lambda x: -x.sum(-1), lambda x: -jnp.sum(x)):
        free = wk.Target(log_prob=function, dim=1, support="positive").unconstrained()
        value, gradient = free.trial(torch.full((2, 1), 3000.0, dtype=torch.float64))  # exp(3000) = ∞
        assert torch.equal(value, torch.full((2,), -math.inf, dtype=torch.float64))
        assert torch.equal(gradient, torch.zeros(2, 1, dtype=torch.float64))


def test_single_precision_is_respected():
    target = wk.Target(log_prob=by_point, dim=3, dtype=torch.float32)
    assert target.log_prob(points(4).float()).dtype == torch.float32


def test_tensors_go_to_jax_and_back_in_place():
    x = points(SIZES[0])
    with double_precision():
        array = to_jax(x)
    assert array.unsafe_buffer_pointer() == x.data_ptr()
    assert torch.utils.dlpack.from_dlpack(array).data_ptr() == x.data_ptr()


def test_rows_of_any_number_are_those_of_each_alone():
    rows = Rows(lambda x: {"square": x**2, "sum": (x.sum(-1),)})
    x = points(SIZES[-1] + SIZES[0] + 3)
    found = rows(x)
    assert found["square"].shape == x.shape
    assert torch.equal(found["square"], x**2)
    torch.testing.assert_close(found["sum"][0], x.sum(-1))


def test_batches_are_cut_into_the_compiled_sizes():
    for n in range(1, 3 * SIZES[-1]):
        cut = pieces(n)
        assert set(cut) <= set(SIZES)
        assert n <= sum(cut) <= max(SIZES[0], 2 * n)
        assert sum(cut) - cut[-1] < n
        assert len(cut) <= n // SIZES[-1] + 5


def test_a_batch_of_no_rows_is_one_of_no_values():
    value, gradient = wk.Target(log_prob=by_point, dim=3).value_and_score(points(0))
    assert value.shape == (0,)
    assert gradient.shape == (0, 3)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: jnp.linalg.cholesky(x[0]) @ x, r"Cannot evaluate `log_prob`: it raised .*test_adapters.py:\d+"),
        (lambda x: jnp.zeros((4, 4)) @ x, r"it raised TypeError: dot_general.*test_adapters.py:\d+"),
        (lambda x: jnp.sum(x)[None], r"returned shape \(1,\) for one point of dimension 3, and \(1,\) for 5"),
        (lambda x: float(jnp.sum(x)), r"it raised ConcretizationTypeError: .*test_adapters.py:\d+"),
        (lambda x: jnp.log(-1 - x @ x), r"`log_prob` is NaN at 8 of 8 points, first at"),
        (lambda x: jnp.sqrt(jnp.abs(jnp.sum(x) * 0.0)), r"gradient of `log_prob` is not finite"),
        (lambda x: jax.lax.while_loop(lambda s: s < 3, lambda s: s + 1, x.sum()), r"Reverse-mode differentiation does not work"),
        (lambda x: -jnp.sum((x - x.mean(0)) ** 2, axis=1), r"depends on the batch"),
    ],
)
def test_errors_in_jax_functions_are_named(function, message):
    with pytest.raises(ValueError, match=message):
        wk.Target(log_prob=function, dim=3).value_and_score(points(8))
    assert is_single()


def test_what_is_not_jax_stays_what_it_was():
    with pytest.raises(ValueError, match="it raised RuntimeError: size mismatch"):
        wk.Target(log_prob=lambda x: x @ torch.ones(7, dtype=torch.float64), dim=3).log_prob(points(2))
    numpys = wk.Target(log_prob=lambda x: -np.sum(np.square(np.asarray(x)), axis=-1), dim=3)
    assert numpys.access == wk.Access.LOG_PROB


def test_jax_and_numpyro_are_loaded_for_those_who_use_them_alone():
    code = "import sys, whichkl as wk; wk.fit(wk.problems.bimodal()); wk.Target.of([[0.0]])\n"
    code += "assert not {'jax', 'numpyro', 'arviz'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("missing", "call"),
    [
        ("jax", "from whichkl.adapters.jax import Rows; Rows(abs)"),
        ("arviz", "wk.to_arviz(wk.fit(wk.Target(samples=[[0.0], [1.0], [3.0], [4.0]]), judge=False))"),
    ],
)
def test_a_missing_extra_is_told_with_its_line(missing, call):
    code = f"import sys; sys.modules[{missing!r}] = None\nimport whichkl as wk; {call}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"Cannot import `{missing}`: it comes with the `bayes` extra. Run: pip install arviz numpyro." in result.stderr


# value and gradient in one call


def pair_of_arrays(x):
    x = x.copy() if isinstance(x, np.ndarray) else np.asarray(None)  # arrays alone
    return -0.5 * np.einsum("ni,ij,nj->n", x, A, x), -x @ A


PAIRS = {
    "arrays": (pair_of_arrays, True),
    "tensors": (lambda x: (-0.5 * ((x @ torch.from_numpy(A)) * x).sum(-1), -x @ torch.from_numpy(A)), True),
    "points": (lambda x: (float(-0.5 * np.asarray(x) @ A @ np.asarray(x)), -A @ np.asarray(x)), False),
}


@pytest.mark.parametrize(("function", "batched"), PAIRS.values(), ids=PAIRS)
def test_a_function_may_return_its_gradient_too(function, batched):
    target = wk.Target(log_prob=function, score=True, dim=3, batched=batched)
    value, gradient = target.value_and_score(points(30))
    torch.testing.assert_close(gradient, -points(30) @ torch.from_numpy(A))
    torch.testing.assert_close(target.log_prob(points(30)), value)
    fit = wk.fit(target)
    torch.testing.assert_close(fit.model.covariance_matrix, torch.from_numpy(np.linalg.inv(A)), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("batched", [True, False])
def test_such_a_function_is_called_once_a_point(batched):
    seen = []

    def both(x):
        x = np.asarray(x)
        seen.append(len(x) if batched else 1)
        return -np.sum(x**2, axis=-1), -2 * x

    target = wk.Target(log_prob=both, score=True, dim=3, batched=batched)
    target.value_and_score(points(30))  # the first call also looks at what it takes and holds the gradient against differences
    seen.clear()
    target.value_and_score(points(30))
    target.trial(points(30))
    assert sum(seen) == 60


def test_an_infinite_row_does_not_spoil_the_gradients_of_others():
    def both(x):
        inside = x[:, 0] > 0
        return torch.where(inside, -x.square().sum(-1), -math.inf), torch.where(inside[:, None], -2 * x, math.nan)

    x = points(10)
    value, gradient, rejected = wk.Target(log_prob=both, score=True, dim=3).density.trial(x)
    inside = x[:, 0] > 0
    assert torch.equal(value > -math.inf, inside)
    assert torch.equal(gradient[inside], -2 * x[inside])
    assert rejected == 0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: -x.square().sum(-1), "has to return the pair .value, gradient., and it returned a Tensor"),
        (lambda x: (-x.square().sum(-1), -2 * x[:, :1]), r"returned a gradient of shape \(1, 1\) for points of shape \(1, 3\)"),
        (lambda x: (-x.square().sum(-1), -3 * x), "is not the gradient of its values"),
        (lambda x: (1 / 0, x), r"it raised ZeroDivisionError: division by zero \(.*test_adapters.py:\d+\)"),
        (lambda x: (np.float32(np.zeros(len(x))), -np.float32(x)), "got float64 points and returned float32"),
        (jax.vmap(jax.value_and_grad(lambda x: -jnp.sum(x**2))), "got float64 points and returned float32"),
    ],
)
def test_errors_in_such_functions_are_named(function, message):
    with pytest.raises(ValueError, match=message):
        wk.Target(log_prob=function, score=True, dim=3).value_and_score(points(8))


def test_second_derivatives_are_refused_rather_than_zero():
    x = points(2).requires_grad_(True)
    (gradient,) = torch.autograd.grad(log_density(by_point)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiat"):
        torch.autograd.grad(gradient.sum(), x)


def test_a_gradient_needs_its_value():
    with pytest.raises(ValueError, match="Cannot use `score=True`"):
        wk.Target(score=True, dim=3)
    assert wk.Target(log_prob=by_torch, score=False, dim=3).access == wk.Access.LOG_PROB | wk.Access.DIFFERENTIABLE


def test_one_point_goes_through_a_wrapped_function():
    assert paired(lambda x: (-x.square().sum(-1), -2 * x))(torch.tensor([3.0, 4.0])) == -25.0


# NumPyro


def schools(y, s):
    with numpyro.plate("schools", len(y)):
        z = numpyro.sample("z", dist.Normal(0, 1))
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    theta = numpyro.deterministic("theta", mu + tau * z)
    numpyro.sample("y", dist.Normal(theta, s), obs=y)


DATA = (np.array(EFFECTS), np.array(ERRORS))


def test_a_numpyro_posterior_is_the_one_written_by_hand():
    target, by_hand = wk.Target.of(schools, DATA[0], s=DATA[1]), wk.problems.eight_schools()
    assert target.names == (*(f"z[{i}]" for i in range(8)), "mu", "tau, free")
    u = 2 * points(100, 10)
    difference = target.log_prob(u) - by_hand.log_prob(u)
    assert float(difference.std()) < 1e-12 * float(by_hand.log_prob(u).abs().max())
    torch.testing.assert_close(target.value_and_score(u)[1], by_hand.value_and_score(u)[1], atol=1e-11, rtol=1e-11)
    assert is_single()


def test_a_numpyro_fit_comes_back_under_the_models_names():
    fit = wk.fit(wk.Target.of(schools, *DATA))
    by_hand = wk.fit(wk.problems.eight_schools())
    assert fit.value.value - by_hand.value.value == pytest.approx(39.2616, abs=0.05)  # the constants that were left out by hand
    u = fit.model.sample((500,))
    draws = fit.target.origin.constrain(u)
    assert {name: value.shape for name, value in draws.items()} == {
        "mu": (500,),
        "tau": (500,),
        "theta": (500, 8),
        "z": (500, 8),
    }
    assert all(value.dtype == np.float64 for value in draws.values())
    np.testing.assert_allclose(draws["tau"], u[:, 9].exp().numpy(), rtol=1e-13)
    np.testing.assert_allclose(draws["theta"], draws["mu"][:, None] + draws["tau"][:, None] * draws["z"], rtol=1e-12)


def constrained(counts):
    numpyro.sample("scale", dist.HalfNormal(2.0))
    share = numpyro.sample("share", dist.Dirichlet(jnp.ones(3)))
    numpyro.sample("counts", dist.Multinomial(int(counts.sum()), share), obs=counts)


def test_constrained_sites_have_their_jacobians():
    model = NumPyroModel(constrained, (np.array([20, 30, 50]),))
    assert model.names == ("scale, free", "share[0], free", "share[1], free")
    u = points(40)
    x, share = u[:, 0].exp(), torch.distributions.biject_to(torch.distributions.constraints.simplex)
    half_normal = torch.distributions.HalfNormal(torch.tensor(2.0, dtype=torch.float64)).log_prob(x) + u[:, 0]
    w = share(u[:, 1:])
    posterior = torch.distributions.Dirichlet(torch.tensor([21.0, 31.0, 51.0], dtype=torch.float64))
    by_hand = half_normal + posterior.log_prob(w) + share.log_abs_det_jacobian(u[:, 1:], w)
    assert float((model.log_prob(u) - by_hand).std()) < 1e-12 * float(by_hand.abs().max())
    draws = model.constrain(u)
    np.testing.assert_allclose(draws["share"], w.numpy(), rtol=1e-12)


def test_constrained_sites_are_fitted():
    target = wk.Target.of(partial(constrained, np.array([20, 30, 50])))
    draws = target.origin.constrain(wk.fit(target).model.sample((4000,)))
    np.testing.assert_allclose(draws["share"].mean(0), [21 / 103, 31 / 103, 51 / 103], atol=0.01)
    np.testing.assert_allclose(draws["share"].sum(-1), 1.0, rtol=1e-12)
    assert (draws["scale"] > 0).all()
    assert draws["scale"].mean() == pytest.approx(2 * math.sqrt(2 / math.pi), abs=0.15)


def test_matrices_improper_priors_supports_that_depend_and_factors():
    def model():
        root = numpyro.sample("root", dist.LKJCholesky(3))
        width = numpyro.sample("width", dist.ImproperUniform(dist.constraints.positive, (), (2,)))
        numpyro.sample("inside", dist.Uniform(0, 1 + width[0]))
        numpyro.sample("pair", dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)))
        numpyro.deterministic("square", root @ root.T)
        numpyro.factor("weight", -width.sum())

    target = wk.Target.of(model)
    assert target.dim == 3 + 2 + 1 + 2
    assert target.names[-2:] == ("pair[0]", "pair[1]")
    draws = target.origin.constrain(points(20, 8))
    assert draws["root"].shape == draws["square"].shape == (20, 3, 3)
    assert (draws["inside"] < 1 + draws["width"][:, 0]).all()
    assert "weight" not in draws
    assert target.log_prob(points(20, 8)).isfinite().all()


def test_handlers_condition_a_model():
    def model():
        mean = numpyro.sample("mean", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(mean, 1))

    target = wk.Target.of(numpyro.handlers.condition(model, {"y": 2.0}))
    fit = wk.fit(target)
    assert float(fit.model.mean) == pytest.approx(1.0, abs=1e-9)
    assert float(fit.model.variance) == pytest.approx(0.5, abs=1e-9)
    assert fit.value.value == pytest.approx(-float(dist.Normal(0, math.sqrt(2)).log_prob(2.0)), abs=1e-6)  # −log Z


def subsampled():
    with numpyro.plate("rows", 100, subsample_size=10):
        numpyro.sample("z", dist.Normal(0, 1))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: numpyro.sample("k", dist.Poisson(3.0)), "`k` is a latent Poisson.*Sum it out"),
        (lambda: numpyro.sample("k", dist.Normal(0, 1), obs=1.0), "no latent site"),
        (lambda: numpyro.param("a", 1.0), "`a` is a `numpyro.param`, which has no prior"),
        (lambda: numpyro.sample("a", dist.Delta(1.0)), "`a` is a point mass"),
        (subsampled, "plate `rows` shows 10 of 100 rows"),
        (lambda: (numpyro.sample("a", dist.Normal(0, 1)), 1 / 0), r"it raised ZeroDivisionError.*test_adapters.py:\d+"),
        (schools, "Target.of.model, data"),
    ],
)
def test_models_that_have_no_density_on_the_reals_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        wk.Target.of(model)


def test_what_a_model_lacks_is_said():
    with pytest.raises(ValueError, match=r"it raised TypeError: schools\(\) missing.*pass the arguments that it lacks"):
        wk.Target.of(schools, DATA[0])
    with pytest.raises(ValueError, match="Cannot use further arguments: a `list` takes none"):
        wk.Target.of([1.0, 2.0], 3)
    with pytest.raises(ValueError, match=r"they have shape \(5, 3\), and the model has 10 free coordinates"):
        NumPyroModel(schools, DATA).constrain(points(5))


# ArviZ


def test_to_arviz_has_the_models_names_shapes_and_weights():
    fit = wk.fit(wk.Target.of(schools, *DATA))
    data = wk.to_arviz(fit, n=2000)
    posterior, stats = data["posterior"], data["sample_stats"]
    assert posterior["theta"].shape == (1, 2000, 8)
    assert set(posterior.data_vars) == {"mu", "tau", "theta", "z"}
    summary = az.summary(data, var_names=["mu", "theta"])
    assert len(summary) == 9
    assert posterior.attrs["objective"] == "reverse_kl"
    assert posterior.attrs["status"] == fit.status
    assert posterior.attrs["findings"] == ", ".join(sorted(fit.findings))
    assert posterior.attrs["inference_library_version"] == wk.__version__
    np.testing.assert_allclose(stats["lp"] - stats["log_q"], stats["log_weight"])
    elbo = fit.diagnostics.elbo
    assert float(stats["log_weight"].mean()) == pytest.approx(elbo.value, abs=5 * elbo.stderr * math.sqrt(elbo.n / 2000))
    again = wk.to_arviz(fit, n=2000)
    assert np.array_equal(again["posterior"]["mu"], posterior["mu"])
    assert not np.array_equal(wk.to_arviz(fit, n=2000, seed=1)["posterior"]["mu"], posterior["mu"])


def test_to_arviz_of_other_fits(tmp_path):
    fit = wk.fit(wk.Target(samples=points(200, 2), names=["height", "width"]))
    fit.save(tmp_path / "fit")
    for one in (fit, wk.Fit.load(tmp_path / "fit")):
        data = wk.to_arviz(one, n=50)
        assert list(data["posterior"].data_vars) == ["height", "width"]
        assert list(data["sample_stats"].data_vars) == ["log_q"]
    positive = wk.fit(wk.Target(log_prob=lambda x: -x.sum(-1), dim=1, support="positive"))
    assert float(wk.to_arviz(positive, n=50)["posterior"]["x1"].min()) > 0
    gaussian = wk.to_arviz(wk.fit(wk.Target(log_prob=lambda x: -x.square().sum(-1), dim=2)), n=50)
    assert float(gaussian["sample_stats"]["log_weight"].std()) < 1e-9  # q is p


def test_to_arviz_corrects_draws_and_names_those_of_a_loaded_fit(tmp_path):
    target = wk.Target.of(constrained, np.array([2, 3, 5]))
    wk.fit(target).save(tmp_path / "fit")
    fit = wk.Fit.load(tmp_path / "fit")
    assert "share[0], free" in wk.to_arviz(fit, n=50)["posterior"]
    data = wk.to_arviz(fit, n=4000, corrected=True, target=target)
    np.testing.assert_allclose(data["posterior"]["share"].mean(("chain", "draw")), np.array([3, 4, 6]) / 13, atol=0.015)
    assert set(data["sample_stats"].data_vars) == {"lp", "log_q"}
    with pytest.raises(ValueError, match="Cannot correct this fit's draws"):
        wk.to_arviz(fit, corrected=True)


def test_to_arviz_refuses_what_it_cannot_hold():
    fit = wk.fit(wk.Target(samples=(points(100, 1), points(100, 1, seed=1))), wk.families.LinearGaussian())
    with pytest.raises(ValueError, match=r"Cannot draw from this fit alone: it is a conditional model"):
        wk.to_arviz(fit)
    with pytest.raises(ValueError, match="Cannot draw n=0 points"):
        wk.to_arviz(wk.fit(wk.problems.petals(), judge=False), n=0)


class Wrapped:
    """An array of a library of its own, which takes no tensors."""

    def __init__(self, values):
        if isinstance(values, torch.Tensor):
            raise TypeError("this library takes no tensors")
        self.values = np.asarray(values)


class Library:
    """An adapter of that library, and of its models, which are dicts."""

    FOLDERS = ("/wrapped/",)
    KIND = "a wrapped model"
    claims_error = claims_function = staticmethod(lambda *given, **more: False)

    @staticmethod
    def claims_value(value):
        return isinstance(value, Wrapped)

    @staticmethod
    def log_density(function, batched=None):
        return lambda x: torch.as_tensor(function(x.detach().numpy()).values) + 0 * x.sum(-1)

    @staticmethod
    def claims(obj, args, kwargs):
        return isinstance(obj, dict)

    @staticmethod
    def posterior(obj, args, kwargs):
        return SimpleNamespace(log_prob=obj["log_prob"], dim=2, names=("a", "b"), constrain=lambda u: {"ab": u.numpy()})


def test_another_library_is_one_adapter_and_one_registration(monkeypatch):
    monkeypatch.setattr("whichkl.targets.calling.FUNCTION_ADAPTERS", (Library,))
    monkeypatch.setattr("whichkl.targets.conversion.MODEL_ADAPTERS", (Library,))
    x = points(5, 2)
    target = wk.Target(log_prob=lambda x: Wrapped(-np.square(np.asarray(Wrapped(x).values)).sum(-1)), dim=2)
    torch.testing.assert_close(target.log_prob(x), -x.square().sum(-1))
    assert wk.Access.DIFFERENTIABLE in target.access
    model = wk.Target.of({"log_prob": lambda x: -x.square().sum(-1)})
    assert (model.names, model.dim) == (("a", "b"), 2)
    assert list(model.origin.constrain(x)) == ["ab"]
