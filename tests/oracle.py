"""Oracle: models as vectors of free parameters, rules carried to models, densities and losses, all from their formulas.

Nothing here is used by the library, so that the laws compare it with something that was written separately.
"""

import math

import torch
from scipy.stats import multivariate_normal, multivariate_t

from whichkl.families import Gaussian

D = torch.float64


def vector_length(family, dim):
    """The number of entries of `vector_of`; the log weights of K components count as K."""
    one = 2 * dim + (0 if family.covariance == "diagonal" else dim * (dim - 1) // 2)
    if isinstance(family, Gaussian):
        return one
    heads = _heads(family)
    return heads + (one + (family.components - 1) * dim if family.covariance == "tied" else family.components * one)


def vector_of(family, model):
    """Write a model as one unconstrained vector.

    A Gaussian is m, log diag L and, for a full covariance, the strict lower triangle of L. A mixture is log π, log ν of
    Student-t components, and then each component; with a tied covariance only the first component has an L.
    """
    named = family.parameters(model)
    if isinstance(family, Gaussian):
        tril = torch.diag(named["scale"]) if family.covariance == "diagonal" else named["scale_tril"]
        return _gaussian_vector(family, named["loc"], tril)
    parts = [named["probs"].log()] + ([named["df"].log()] if "df" in named else [])
    for k, (loc, tril) in enumerate(zip(named["loc"], named["scale_tril"], strict=True)):
        parts.append(loc if family.covariance == "tied" and k else _gaussian_vector(family, loc, tril))
    return torch.cat(parts)


def model_of(family, theta, dim):
    """Build the model that a vector describes; differentiable in the vector."""
    return family.model(parameters_of(family, theta, dim))


def parameters_of(family, theta, dim):
    """Read the named parameters from a vector."""
    if isinstance(family, Gaussian):
        loc, tril = _loc_and_tril(family, theta, dim)
        return {"loc": loc, "scale": tril.diagonal()} if family.covariance == "diagonal" else {"loc": loc, "scale_tril": tril}
    count, heads, one = family.components, _heads(family), vector_length(Gaussian(_shape(family)), dim)
    named = {"probs": theta[:count].softmax(0)} | ({"df": theta[count:heads].exp()} if family.law == "student_t" else {})
    if family.covariance == "tied":
        first, tril = _loc_and_tril(family, theta[heads : heads + one], dim)
        loc = torch.cat([first[None], theta[heads + one :].reshape(-1, dim)])
        return named | {"loc": loc, "scale_tril": tril.expand(count, dim, dim)}
    loc, tril = zip(*(_loc_and_tril(family, part, dim) for part in theta[heads:].reshape(count, -1)), strict=True)
    return named | {"loc": torch.stack(loc), "scale_tril": torch.stack(tril)}


def random_model(family, dim, seed=0):
    """A model whose free parameters are N(0, 0.5)."""
    generator = torch.Generator().manual_seed(seed)
    return model_of(family, 0.5 * torch.randn(vector_length(family, dim), generator=generator, dtype=D), dim)


def components_of(family, model):
    """The weights, means, scale matrices and ν (or None) of a model; a Gaussian has one component."""
    named = family.parameters(model)
    if isinstance(family, Gaussian):
        tril = torch.diag(named["scale"]) if family.covariance == "diagonal" else named["scale_tril"]
        return torch.ones(1, dtype=D), named["loc"][None], tril[None], None
    return named["probs"], named["loc"], named["scale_tril"], named.get("df")


def density(family, model, x):
    """q(x) of each row by SciPy's densities of the components."""
    probs, loc, tril, df = components_of(family, model)
    total = torch.zeros(len(x), dtype=D)
    for k, weight in enumerate(probs):
        mean, scale = loc[k].numpy(), (tril[k] @ tril[k].T).numpy()
        law = multivariate_normal(mean, scale) if df is None else multivariate_t(mean, scale, df=float(df[k]))
        total += weight * torch.as_tensor(law.pdf(x.numpy()), dtype=D).reshape(-1)
    return total


def nodes_of(family, model, z, w):
    """Carry a rule for N(0, I) to a normal model or a mixture of normals: mₖ + Lₖ z with weights πₖ w."""
    probs, loc, tril, df = components_of(family, model)
    assert df is None
    x = loc[:, None] + torch.einsum("kij,mj->kmi", tril, z)
    return x.reshape(-1, z.shape[1]), (probs[:, None] * w).reshape(-1)


def moments_of(family, model):
    """The mean of a model and a lower-triangular scale of its covariance (diagonal where the family's is), by Σ πₖ …"""
    probs, loc, tril, _ = components_of(family, model)
    mean = probs @ loc
    apart = loc - mean
    covariance = torch.einsum("k,kij,klj->il", probs, tril, tril) + torch.einsum("k,ki,kj->ij", probs, apart, apart)
    if family.covariance == "diagonal":
        return mean, torch.diag(covariance.diagonal().sqrt())
    return mean, torch.linalg.cholesky(covariance)


def moved(family, model, shift, scale):
    """The law of shift + scale x for x ~ model, in the same family."""
    named = dict(family.parameters(model))
    named["loc"] = shift + named["loc"] @ scale.T
    if "scale" in named:
        named["scale"] = scale.diagonal() * named["scale"]
    else:
        named["scale_tril"] = scale @ named["scale_tril"]
    return family.model(named)


def forward_loss(model, x, w):
    """The cross-entropy −Σ wᵢ log q(xᵢ), which is forward KL plus H(p)."""
    return -(w @ model.log_prob(x))


def log_prob_with_gradient(value_and_score, x):
    """log p at points that depend on parameters; its derivative in x is the score."""
    value, score = value_and_score(x)
    return value + ((x - x.detach()) * score).sum(-1)


def reverse_loss(family, model, value_and_score, z, w, *, sticking_the_landing=False):
    """−ELBO on a rule for N(0, I): Σ wᵢ (log q(xᵢ) − log p(xᵢ)), xᵢ = m + L zᵢ.

    Sticking the landing holds q's parameters fixed inside log q (Roeder, Wu & Duvenaud, 2017).
    """
    x, weight = nodes_of(family, model, z, w)
    if sticking_the_landing:
        model = family.model({name: value.detach() for name, value in family.parameters(model).items()})
    return weight @ (model.log_prob(x) - log_prob_with_gradient(value_and_score, x))


def between_loss(objective, family, model, target, points, rule):
    """The loss of a divergence between the directions, on points of p and a rule for N(0, I)."""
    x, w = points
    at_q, weight = nodes_of(family, model, *rule)
    log_p = log_prob_with_gradient(target.value_and_score, at_q)
    return objective.loss(target.log_prob(x) - model.log_prob(x), w, log_p - model.log_prob(at_q), weight)


def log_volume(scale):
    """log |det scale| of a lower-triangular matrix."""
    return math.fsum(scale.diagonal().abs().log().tolist())


def _shape(family):
    return "diagonal" if family.covariance == "diagonal" else "full"


def _heads(family):
    """The entries before the components: log weights, and log ν of Student-t."""
    return family.components * (2 if family.law == "student_t" else 1)


def _gaussian_vector(family, loc, tril):
    row, column = torch.tril_indices(len(loc), len(loc), -1)
    below = [] if family.covariance == "diagonal" else [tril[row, column]]
    return torch.cat([loc, tril.diagonal().log(), *below])


def _loc_and_tril(family, theta, dim):
    tril = torch.diag(theta[dim : 2 * dim].exp())
    if family.covariance != "diagonal":
        row, column = torch.tril_indices(dim, dim, -1)
        tril = tril.index_put((row, column), theta[2 * dim :])
    return theta[:dim], tril
