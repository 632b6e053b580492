"""Every public function, with every kind of bad input as each of its arguments: an error of the grammar, or the right answer.

A value that a parameter takes, by its annotation, is no bad input: see `TAKEN`.
"""

import datetime
import inspect
import operator
import re
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.distributions import Normal

import whichkl as wk
from whichkl import families, losses

X = np.random.default_rng(0).normal(size=(60, 2))


class Thing:
    pass


def raises(*args, **kwargs):
    raise KeyError("from the user's function")


def closed_file():
    with open(__file__) as file:
        pass
    return file


BAD = {
    "None": lambda: None,
    "text": lambda: "nonsense",
    "empty text": lambda: "",
    "bytes": lambda: b"\x00\xff",
    "dict": lambda: {"a": 1},
    "set": lambda: {1, 2},
    "empty list": lambda: [],
    "ragged list": lambda: [[1.0, 2.0], [3.0]],
    "NaN": lambda: float("nan"),
    "infinity": lambda: float("inf"),
    "negative": lambda: -1,
    "zero": lambda: 0,
    "half": lambda: 0.5,
    "too large": lambda: 10**30,
    "bool": lambda: True,
    "NumPy's bool": lambda: np.bool_(True),
    "complex": lambda: 1 + 2j,
    "time difference": lambda: datetime.timedelta(1),
    "0-d array": lambda: np.array(3.5),
    "4-d array": lambda: np.zeros((2, 2, 2, 2)),
    "complex array": lambda: np.zeros((60, 2)) + 1j,
    "array of objects": lambda: np.array([object()] * 60),
    "array of dates": lambda: np.array(["2025-01-01"] * 60, dtype="datetime64[D]"),
    "array of time differences": lambda: np.arange(60).astype("timedelta64[s]"),
    "array of NaN": lambda: np.full((60, 2), np.nan),
    "array of infinities": lambda: np.full((60, 2), np.inf),
    "array of text": lambda: np.array(["a"] * 60),
    "frame of dates": lambda: pd.DataFrame({"t": pd.date_range("2025-01-01", periods=60)}),
    "sparse tensor": lambda: torch.eye(4).to_sparse(),
    "object": object,
    "class": lambda: Thing,
    "class of frames": lambda: pd.DataFrame,
    "closed file": closed_file,
    "generator": lambda: (i for i in range(3)),
    "function that raises": lambda: raises,
    "module": lambda: nn.Linear(2, 2),
}
TAKEN = {
    "None": {"None"},
    "bool": {"bool", "NumPy's bool"},
    "int": {"zero", "negative"},
    "float": {"zero", "half", "negative", "0-d array"},
    "PathLike": {"text"},
    "Function": {"function that raises", "module"},  # called later
    "Callable": {"function that raises", "module", "class", "class of frames"},
    "Prefixes": {"None"},
    "Metric": {"function that raises", "module", "class", "class of frames", "empty list"},
}
"""The kinds that annotations take, by their words."""
ALSO = {
    "Target.categories": {"empty list"},
    "Target.drop": {"empty list"},
    "Target.samples": {"None"},
    "Target.support": {"None"},
    "Module.module": {"module"},
    "Target.weights": {"None"},
    "Target.log_weights": {"None"},
    "Labels.model": {"None"},
    "Moments.stderr": {"None", "half", "zero", "0-d array"},  # one error of all values
    "Moments.support": {"None"},
    "Moments.names": {"None"},
    "Target.chains": {"None"},
    "Access.parse.text": {"empty text"},
    "Product.margins": {"empty list"},
    "Product.categories": {"empty list"},
    "compare.families": {"None"},
    "compare.objectives": {"None"},
    "compare.seeds": {"set"},
    "Fit.linear_response.columns": {"zero", "negative", "None", "dict", "array of text"},  # both name the column a
    "audit.knobs": {"None"},
    "renyi.order": {"too large"},
    "distill.stopping": {"half"},
    "distill.held_out": {"half"},
    "language_model.held_out": {"half"},
    "Fit.check.target": {"None"},
    "Fit.expect.target": {"None"},
    "Fit.summary.target": {"None"},
    "Fit.linear_response.target": {"None"},
    "Fit.draws.target": set(BAD),  # without `corrected` it isn't read
    "to_arviz.target": {"None"},
    "Comparisons.support": {"None"},
    "Comparisons.noise": {"too large"},
    "Simulator.proposal": {"None"},
    "Simulator.journal": {"empty text"},  # opened later
    "Simulations.proposal": {"None"},
    "Simulations.data": {"array of NaN", "array of infinities"},  # failed simulations
    **{f"{name}.hidden": {"empty list"} for name in families.__all__},
    **{f"{name}.smoothing": {"too large"} for name in ("Categorical", "Product")},
    "GeneralizedLinear.penalty": {"too large"},
    **{f"{name}.teacher": {"None"} for name in ("LanguageTrainer", "language_model")},  # text alone
    "LanguageTarget.teacher": {"None", "module"},  # called later
    "LanguageTarget.data": {"array of text"},  # read later, by a tokenizer
    **{f"{name}.tokenizer": {"None"} for name in ("capture", "StoredTeacher.open", "LanguageTarget")},
    **{f"{name}.args": {"None"} for name in ("LanguageTrainer", "language_model")},
    **{f"{name}.memo": {"dict"} for name in ("sequence_kl", "language_model")},
    **{f"{name}.tokenizer": {"None"} for name in ("sequence_kl", "language_model")},
    **{f"LanguageTrainer.{name}": {"None"} for name in ("eval_dataset", "processing_class")},
    **{f"{name}.budget": {"too large"} for name in ("LanguageTrainer", "language_model")},
    **{f"{name}.temperature": {"too large"} for name in ("LanguageTrainer", "language_model")},
    **{f"distill.{name}": {"too large"} for name in ("learning_rate", "weight_decay", "clip")},
    **{
        f"{name}.{field}": {"too large"}
        for name, field in (
            ("Categorical", "categories"),
            ("Flow", "transforms"),
            ("Flow", "bins"),
            ("Mixture", "components"),
            ("BlockMixture", "components"),
            ("BlockMixture", "blocks"),
            ("MixtureDensityNetwork", "components"),
            ("VariationalAutoencoder", "latent"),
        )
    },
    **{f"{name}.hidden": {"empty list", "too large"} for name in families.__all__},
}
"""The kinds that single parameters take: a family as large as any number, for example, which `fit` refuses for its memory."""


def log_prob(x):
    return -x.square().sum(-1) / 2


@pytest.fixture(scope="module")
def fits():
    target = wk.Target(log_prob=log_prob, dim=2, names=["a", "b"])
    return wk.fit(target, "gaussian:diagonal"), wk.fit(X, judge=False)


def losses_of_logits():
    logits = {"teacher": torch.randn(4, 5), "student": torch.randn(4, 5)}
    hidden = {f"hidden_{who}": torch.randn(4, 3) for who in ("student", "teacher")}
    heads = {f"weight_{who}": torch.randn(5, 3) for who in ("student", "teacher")}
    drawn = {"policy": -torch.rand(4, 5), "reference": -torch.rand(4, 5)}
    given = {**logits, **hidden, **heads, **drawn, "divergence": losses.RowForwardKL(), "name": "forward_kl"}
    for name in losses.__all__:
        function = getattr(losses, name)
        if inspect.isfunction(function):
            taken = inspect.signature(function).parameters
            yield (
                name,
                function,
                {k: v for k, v in given.items() if k in taken and (k != "divergence" or "hidden_student" not in taken)},
            )


def converted(kind):
    """Return a function that makes evidence of a kind, and converts it: some of it is read only then."""

    def function(**given):
        return wk.convert(kind(**given))

    function.__signature__ = inspect.signature(kind)
    return function


def calls(fits, tmp_path):
    found, on_rows = fits
    yield "Target", wk.Target, {"samples": X}
    yield "Target", wk.Target, {"log_prob": log_prob, "dim": 2}
    yield "fit", wk.fit, {"target": X, "family": "gaussian", "judge": False}
    yield "fit", wk.fit, {"target": wk.Target(log_prob=log_prob, dim=2), "family": "gaussian", "judge": False}
    yield "estimate", wk.estimate, {"p": Normal(0.0, 1.0), "q": Normal(1.0, 1.0)}
    yield "estimate", wk.estimate, {"p": X[:, :1], "q": Normal(1.0, 1.0), "n": 100}
    yield "advise", wk.advise, {"target": X}
    yield "convert", wk.convert, {"evidence": wk.Moments(of=X, values=[0.1, 0.1], reference=X)}
    yield "Labels", converted(wk.Labels), {"draws": X, "passed": X[:, 0] > 0, "model": wk.Target(log_prob=log_prob, dim=2)}
    yield "Moments", converted(wk.Moments), {"of": lambda x: x, "values": [0.1, 0.1], "reference": X}
    yield "report", wk.report, {"result": on_rows, "path": tmp_path / "report.html"}
    yield "plot", wk.plot, {"fit": found}
    yield "to_arviz", wk.to_arviz, {"fit": found, "n": 10}
    yield "Access.parse", wk.Access.parse, {"text": "samples"}
    yield "ForwardKL", wk.ForwardKL, {}
    yield "ReverseKL", wk.ReverseKL, {}
    yield "Fit.draws", found.draws, {"n": 10}
    yield "Fit.expect", found.expect, {"f": lambda x: x[:, 0]}
    yield "Fit.score", on_rows.score, {"samples": X[:5]}
    yield "Fit.summary", found.summary, {}
    yield "Fit.check", found.check, {}
    yield "Fit.linear_response", found.linear_response, {}
    yield "Fit.save", found.save, {"folder": tmp_path / "fit"}
    yield "Fit.load", wk.Fit.load, {"folder": tmp_path / "none"}
    comparisons = {"winners": X, "losers": np.flip(X, 0) + 1}
    yield "Comparisons", wk.Comparisons, comparisons
    yield "Comparisons.as_target", wk.Comparisons(**comparisons).as_target, {"n": 10}
    prior = Normal(torch.zeros(2), torch.ones(2))
    yield "convert", wk.convert, {"evidence": wk.Simulations(prior=prior, parameters=X, data=X)}
    yield "Simulator", wk.Simulator, {"prior": prior, "simulate": lambda theta: theta}
    yield "Simulations", wk.Simulations, {"prior": prior, "parameters": X, "data": X}
    yield "SimulationOrigin.unlikeness", wk.convert(wk.Simulations(prior=prior, parameters=X, data=X)).origin.unlikeness, {"x": X}
    yield from losses_of_logits()
    for name in families.__all__:
        family = getattr(families, name)
        if inspect.isclass(family) and not inspect.isabstract(family):
            yield (
                name,
                family,
                {"components": 2} if name == "Mixture" else {"module": nn.Linear(1, 1)} if name == "Module" else {},
            )


def slow_calls():
    yield "compare", wk.compare, {"target": X, "families": ["gaussian"], "seeds": 2, "draws": 100}
    yield "audit", wk.audit, {"loss_fn": losses.forward_kl}
    networks = {"teacher": nn.Linear(2, 3), "student": nn.Linear(2, 3)}
    yield "distill", wk.distill, {**networks, "data": torch.randn(50, 2), "epochs": 1}


def kinds_taken(name, parameter):
    words = set(re.findall(r"\w+", str(parameter.annotation))) if parameter.annotation is not parameter.empty else set()
    taken = set().union(*(kinds for word, kinds in TAKEN.items() if word in words))
    return taken | ALSO.get(f"{name}.{parameter.name}", set())


def check(name, function, given):
    wrong = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD or parameter.name in ("tell", "cluster"):
            continue
        taken = kinds_taken(name, parameter)
        for kind, make in BAD.items():
            arguments = {**given, parameter.name: make()}
            place = f"{name}({parameter.name}={kind})"
            try:
                function(**arguments)
            except wk.WhichklError as error:
                if not str(error).startswith("Cannot "):
                    wrong.append(f"{place}: {error}")
            except Exception as error:
                wrong.append(f"{place}: {type(error).__name__}: {error}")
            else:
                if kind not in taken:
                    wrong.append(f"{place} is taken")
    return wrong


def test_bad_input_is_refused_in_words(fits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = [one for name, function, given in calls(fits, tmp_path) for one in check(name, function, given)]
    assert not wrong, "\n".join(wrong)


LANGUAGE = ["LanguageTrainer", "sequence_kl", "capture", "StoredTeacher.open", "TokenScores", "LanguageTarget"]


@pytest.mark.parametrize("name", [*LANGUAGE, pytest.param("language_model", marks=pytest.mark.slow)])
def test_bad_input_is_refused_in_words_by_language_models(name, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from test_language_trainer import DATA, arguments, llama

    monkeypatch.chdir(tmp_path)
    args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=2)
    trained = {"args": args, "max_new_tokens": 2}
    stored = {"teacher": llama(0), "data": DATA[:2], "folder": tmp_path / "stored", "k": 2}
    models = {"teacher": llama(0), "student": llama(1)}
    given = {
        "LanguageTrainer": {**models, "train_dataset": DATA, **trained},
        "sequence_kl": {**models, "prompts": [[3, 4]] * 2, "max_new_tokens": 2},
        "capture": stored,
        "StoredTeacher.open": {"folder": stored["folder"]},
        "TokenScores": {},
        "LanguageTarget": {"teacher": llama(0), "data": DATA},
        "language_model": {**models, "data": DATA[:12], "held_out": 0.5, **trained},
    }[name]
    if name == "StoredTeacher.open":
        wk.distillation.capture(**stored)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = check(name, operator.attrgetter(name)(wk.distillation), given)
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "function", "given"), [*slow_calls()], ids=lambda one: one if isinstance(one, str) else "")
def test_bad_input_is_refused_in_words_by_long_calls(name, function, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not (wrong := check(name, function, given)), "\n".join(wrong)


NUMBERS = [np.int64(3), np.int32(3), np.uint8(3), np.array(3), torch.tensor(3)]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda one: f"{type(one).__name__} {getattr(one, 'dtype', '')}")
def test_whole_numbers_of_numpy_and_torch_are_numbers(number, fits):
    large = number * 0 + np.int64(100)
    assert (
        wk.estimate(p=X[:, 0], q=Normal(0.0, 1.0), n=large, seed=number).value
        == wk.estimate(p=X[:, 0], q=Normal(0.0, 1.0), n=100, seed=3).value
    )
    assert wk.fit(X, seed=number, judge=False).seed == 3
    assert families.Mixture(number) == families.Mixture(3) and repr(families.Mixture(number)) == repr(families.Mixture(3))
    assert families.Neural("normal", hidden=[number]).hidden == (3,)
    assert wk.Target(log_prob=log_prob, dim=number).dim == 3
    assert fits[0].draws(number, seed=number).tolist() == fits[0].draws(3, seed=3).tolist()
    assert len(fits[1].score(X, top=number).top(3)) == 3
    assert wk.problems.funnel(number).dim == 3


@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), np.array(0.25), torch.tensor(0.25)])
def test_real_numbers_of_numpy_and_torch_are_numbers(number):
    assert wk.estimate(p=Normal(0.0, 1.0), q=Normal(1.0, 1.0), divergence="jensen_shannon", weight=number).value == pytest.approx(
        wk.estimate(p=Normal(0.0, 1.0), q=Normal(1.0, 1.0), divergence="jensen_shannon", weight=0.25).value
    )
    logits = {"teacher": torch.tensor([[1.0, 0.0]]), "student": torch.zeros(1, 2)}
    assert losses.jensen_shannon(**logits, weight=number) == losses.jensen_shannon(**logits, weight=0.25)
    assert families.Categorical(smoothing=number) == families.Categorical(smoothing=0.25)
