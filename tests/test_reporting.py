"""Reports: one file, nothing fetched, markup in names stays text, an old file survives a failure."""

import json
import re

import numpy as np
import pytest

import whichkl as wk
from whichkl._checks import InputError, ResourceError
from whichkl.divergences import Estimate
from whichkl.solvers import StickingTheLanding

EVIL = ["</script><script>alert(1)</script>", '<img src=x onerror="alert(2)">']


def own_html(text):
    """The page without plotly's script, whose source names sites in comments and defaults."""
    return re.sub(r"<script nonce=\"[^\"]+\">.*?</script>", "", text, flags=re.DOTALL)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    x = np.random.default_rng(0).normal(size=(80, 2))
    fit = wk.fit(wk.Target(samples=x, names=EVIL))
    return wk.report(fit, tmp_path_factory.mktemp("report") / "deep" / "report.html").read_text()


def test_a_report_is_one_file_that_fetches_nothing(page):
    text = own_html(page)
    assert "://" not in text
    assert not re.search(r"<(link|img|iframe|script[^>]*src)", text)
    assert "default-src 'none'" in text
    assert "Plotly.react" in page
    assert len(page) > 3_000_000


def test_markup_in_names_stays_text(page):
    text = own_html(page)
    assert "<img" not in text
    assert "<script>alert" not in text
    assert "&lt;img src=x" in page


@pytest.mark.parametrize(
    "make",
    [
        lambda: wk.fit(wk.problems.bimodal(), objective="reverse_kl"),
        lambda: wk.fit(wk.problems.petals(), wk.families.Mixture(2)),
        lambda: wk.fit(np.random.default_rng(0).normal(size=(80, 1))),
        lambda: wk.fit(np.exp(np.random.default_rng(0).normal(size=(80, 2)))),
        lambda: wk.fit(wk.Target(samples=np.exp(np.random.default_rng(0).normal(size=(80, 2))), support="positive")),
        lambda: wk.fit(wk.problems.eight_schools()),
    ],
)
def test_every_kind_of_fit_can_be_drawn_and_reported_also_after_loading(make, tmp_path):
    fit = make()
    figure = wk.plot(fit)
    assert len(figure.data) >= 1
    json.loads(figure.to_json())
    path = wk.report(fit, tmp_path / "r.html")
    text = path.read_text()
    assert fit.value.number in text
    for name in fit.findings:
        assert name.replace("_", " ") in text
    fit.save(tmp_path / "fit")
    assert len(wk.plot(wk.Fit.load(tmp_path / "fit")).data) >= 1


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path):
    fit = wk.fit(np.random.default_rng(0).normal(size=(80, 1)))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ResourceError, match="Name another path"):
        wk.report(fit, tmp_path / "file" / "r.html")
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "r.html").mkdir()
    with pytest.raises(InputError, match="it is a folder"):
        wk.report(fit, tmp_path / "r.html")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_estimates_print_their_digits_and_refuse_to_be_mixed():
    exact = Estimate("forward_kl", 0.4619946, exact=True, finite="certified", method="quadrature")
    rough = Estimate("forward_kl", 1.84231, 0.0766, up_to="entropy_p", method="held out", n=150)
    assert str(exact) == "forward_kl = 0.461995 nats (quadrature)"
    assert str(rough) == "cross-entropy KL(p‖q) + H(p) = 1.842 ± 0.077 nats (held out)"
    assert rough.sentence == "The cross-entropy, KL(p‖q) + H(p), lies between 1.692 and 1.992 with 95 % confidence."
    assert exact.bits.value == pytest.approx(0.4619946 / np.log(2))
    assert exact.bits.bits is not None
    assert exact.bits.bits.unit == "bits"
    with pytest.raises(ValueError, match=r"one is absolute in nats, the other up to H\(p\) in nats"):
        exact - rough
    assert (rough - rough).up_to is None
    assert (rough - rough).stderr == pytest.approx(0.0766 * np.sqrt(2))
    infinite = Estimate("reverse_kl", np.inf, finite="infinite", exact=True)
    assert infinite.number == "∞"
    assert Estimate.from_dict(json.loads(json.dumps(infinite.to_dict()))) == infinite


def _binary(x):
    return x.sum(-1) + x[:, 0] * x[:, 1]


@pytest.mark.parametrize(
    ("target", "family", "arguments"),
    [
        (wk.problems.eight_schools, "gaussian", {}),
        (wk.problems.eight_schools, "gaussian:diagonal", {}),
        (wk.problems.two_moons, "mixture:2", {}),
        (wk.problems.petals, "mixture:2", {}),
        (wk.problems.petals, "student_t", {}),
        (lambda: wk.problems.bimodal(3.0), "gaussian", {"objective": "jeffreys:0.3"}),
        (lambda: wk.Target(log_prob=_binary, dim=2, support="boolean"), wk.families.Product("bernoulli"), {}),
        (lambda: wk.Target(log_prob=_binary, dim=2, support="boolean"), wk.families.Autoregressive((4,)), {}),
        (
            wk.problems.two_moons,
            wk.families.Flow(transforms=1, hidden=(8,)),
            {"solver": StickingTheLanding(steps=60, cycles=1, draws=32, judged_on=256, starts=1)},
        ),
    ],
    ids=["natural", "mean-field", "sample-average", "em", "student", "two-sided", "table", "enumeration", "landing"],
)
def test_how_the_loss_fell_ends_at_the_optimum_and_is_drawn(target, family, arguments, tmp_path):
    fit = wk.fit(target(), family, judge=False, **arguments)
    trail, best = fit.diagnostics.history, fit.diagnostics.optima[0].loss
    assert len(trail) >= 1
    assert trail[-1] == pytest.approx(best, abs=0.2 if fit.solver == "sticking_the_landing" else 2e-3)
    fit.save(tmp_path / "fit")
    assert wk.Fit.load(tmp_path / "fit").diagnostics.history == trail
    page = wk.report(fit, tmp_path / "r.html").read_text()
    assert ("How the loss fell" in page) is (len(trail) > 1)


def test_control_characters_of_names_are_shown_in_charts_too(tmp_path):
    x = np.random.default_rng(0).normal(size=(100, 2))
    fit = wk.fit(wk.Target(samples=x, names=("a\x1b[31m", "b")), judge=False)
    wk.report(fit, tmp_path / "page.html")
    charts = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', (tmp_path / "page.html").read_text(), re.DOTALL)
    assert charts and any("a\\\\x1b[31m" in one for one in charts)
    assert not any("\\u001b" in one for one in charts)


def test_the_sentence_of_trust_names_a_value_that_is_not_reliable():
    x = np.random.default_rng(0).normal(size=(300, 2))
    held, in_sample = (wk.fit(x, judge=judged)._repr_html_() for judged in (True, False))
    assert "nothing speaks against it;" in held
    assert "nothing speaks against it, but its value isn&#x27;t reliable;" in in_sample
