"""The story of the demo: its numbers for a reader who has never heard of KL, as one page and one JSON file."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from whichkl._checks import plain
from whichkl.demo import textbook
from whichkl.demo.run import Demo, Schools
from whichkl.demo.textbook import bifurcation, case_curves, integrand_curves, normal
from whichkl.divergences import Estimate
from whichkl.files.writing import is_demo, write_whole
from whichkl.fitting import Fit
from whichkl.importance import shown_khat
from whichkl.plots import plot
from whichkl.plots.arms import differences
from whichkl.plots.fitted import add_ellipses
from whichkl.plots.style import Figure, add_area, add_line, add_points, error_bars, new_figure, style
from whichkl.problems import bimodal
from whichkl.problems.real_data import EFFECTS, ERRORS
from whichkl.reporting.fit_report import finding_blocks
from whichkl.reporting.page import Block, Section, write_page
from whichkl.reporting.study_tables import needs_table
from whichkl.targets import Target

_NAMES = {"forward_kl": "forward", "reverse_kl": "reverse"}
_LEAD = (
    "You have a target distribution p and a family of models q that can't match it exactly. The Kullback–Leibler divergence "
    "measures the mismatch. It is zero only if q equals p, and it depends on the direction. Forward KL, KL(p‖q), averages over "
    "the target: it punishes q for missing what p does. Reverse KL, KL(q‖p), averages over the model: it punishes q for going "
    "where p doesn't. What you can do with p decides which of them you can minimise."
)
_FOOTER = (
    "Written by whichkl demo. N(m, s) names mean and standard deviation. All divergences are in nats (one nat is 1.44 bits). "
    "report.json has the same numbers with all digits."
)
_WORDS = (
    ("target p, model q", "the distribution to be matched, and the one that approximates it"),
    ("family", "the models that the fit chooses from; a full Gaussian has any covariance, a diagonal one no correlations"),
    ("KL divergence", "how far one distribution is from another, in nats; 0 only if they are equal; not symmetric"),
    ("cross-entropy, H(p)", "−log q averaged over p; it is KL(p‖q) plus the entropy H(p), which no fit can change"),
    ("log Z", "the logarithm of the constant that would make an unnormalised density integrate to one"),
    ("ELBO", "log Z minus KL(q‖p): it can be computed without Z, and is larger for a better q"),
    ("held out, unseen", "rows or draws that the fit has not used, so that they can judge it"),
    ("importance weights", "p/q at draws of q. ESS: the number of draws left after weighting. k̂: how heavy the weights' tail is"),
    ("Jeffreys", "KL(p‖q) + KL(q‖p)"),
    ("nodes", "fixed points at which averages over q are taken, so that the fit is deterministic"),
)


def write_demo(demo: Demo, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write `report.html` and `report.json` into a folder.

    Raises:
        ResourceError: they can't be written.
    """
    x = torch.linspace(-9, 9, 721, dtype=torch.float64, device="cpu")
    book = demo.textbook
    picture = [_answer(demo), _two_bumps(book.cases[0], x), _where_reverse_seeks(book, x), _limits(book)]
    sections = [
        *picture,
        _petals(demo),
        _schools(demo),
        _both(demo),
        _neither(demo, x),
        Section("Words", "What the terms on this page mean.", (Block.table(("word", "meaning"), _WORDS),)),
    ]
    data = Path(folder) / "report.json"
    write_whole(data, json.dumps(plain(demo.to_dict()), indent=1, allow_nan=False).encode(), is_own=is_demo)
    title = "Forward or reverse KL: which, when, and did it work?"
    return write_page(Path(folder) / "report.html", title, _LEAD, sections, _FOOTER), data


def _answer(demo: Demo) -> Section:
    first, elbo = demo.textbook.cases[0].table, demo.schools.fit.diagnostics.elbo
    forward, reverse = first["forward_kl", "forward_kl"], first["reverse_kl", "reverse_kl"]
    best = f"KL(p‖q) {forward.value:.2f} (forward fit), KL(q‖p) {reverse.value:.2f} (reverse fit)"
    held, density = f"held-out −log q {demo.petals.fit.value.number}", f"ELBO {elbo.number}" if elbo else ""
    rows = [
        ("draw samples, not evaluate p", "forward KL", "maximum likelihood; covers mass", held),
        ("evaluate p up to a constant, not sample", "reverse KL", "variational inference; tends to seek modes", density),
        ("both", "either", "decide by experiment", best),
        (
            "neither",
            "what is left, converted",
            "comparisons, a simulator, moments, labels",
            f"KL(p‖q) {demo.neither.forward.number}",
        ),
    ]
    reading = (
        f"How to read the numbers: 0 nats means that p and q are the same. A KL(p‖q) of {forward.value:.2f} nats means that a "
        f"typical draw of p is e^{forward.value:.2f} = {math.exp(forward.value):.1f} times as likely under p as under q "
        "(geometric mean). 0.01 is hardly visible, 1 is a factor of 2.7. ± is one standard error."
    )
    table = Block.table(("with p you can …", "minimise", "character", "measured in this run"), rows)
    lead = "Access decides. This page shows each row of this table on a real input, with the evidence."
    return Section("The short answer", lead, (table, Block.paragraph(reading)))


def _two_bumps(case: textbook.Case, x: torch.Tensor) -> Section:
    rows = [
        (f"{_NAMES[name]} fit, {normal(fit.model)}", case.table[name, "forward_kl"].number, case.table[name, "reverse_kl"].number)
        for name, fit in (("forward_kl", case.forward), ("reverse_kl", case.reverse))
    ]
    optima = _count(len(case.reverse.diagnostics.optima))
    curves = f"Blue: the forward fit spans both bumps. Orange: {optima} reverse optima; solid is global, dashed is local."
    columns, both = (f"p = {case.label}", "KL(p‖q), nats", "KL(q‖p), nats"), "Each fit wins in its own direction, and only there."
    gap = f"{case.cross_entropy:.6f} − {case.entropy:.6f} = {case.cross_entropy - case.entropy:.6f}"
    loss = (
        "The forward fit has exactly the mean and variance of p. Its loss is the cross-entropy, and a cross-entropy is not a KL: "
        f"forward KL = cross-entropy − H(p) = {gap} nats."
    )
    integrands = (
        "Where each divergence comes from: its value is the signed area under its curve. Missing a bump is dear in forward KL "
        "(below); spanning the empty middle is dear in reverse KL (above)."
    )
    blocks = (
        Block.chart(case_curves(case, x), curves),
        Block.table(columns, rows, both),
        Block.paragraph(loss),
        Block.chart(integrand_curves(case, x), integrands),
    )
    lead = f"The target is {case.label}; the family is a single Gaussian. Every optimum that several starts found is shown."
    return Section("Two bumps, one Gaussian", lead, blocks, "1 · The textbook experiment")


def _where_reverse_seeks(book: textbook.Textbook, x: torch.Tensor) -> Section:
    _, near, unequal = book.cases
    optima, (largest, other, *_) = near.reverse.diagnostics.optima, unequal.reverse.diagnostics.optima
    branches = (
        "Means of all reverse-KL optima for ½ N(−M, 1) + ½ N(M, 1) as M grows. Solid: global. Hollow: local. Dotted lines: where "
        "one-bump optima first exist, and where they become global."
    )
    thresholds = (
        f"One-bump optima exist from M ≈ {book.exists_from:.2f}, and are better than the centred one from M ≈ "
        f"{book.wins_from:.2f}. Below that, reverse KL covers both bumps. Above it, the covering solution is still a local "
        "optimum, where an unlucky start can end."
    )
    leaning = (
        f"Unequal bumps, {unequal.label}: the forward fit leans to the left. Reverse KL has a global optimum on the larger bump "
        f"({largest.loss:.4f} nats) and a local one on the smaller ({other.loss:.4f})."
    )
    blocks = (
        Block.chart(case_curves(near, x), "Closer bumps: both directions span them."),
        Block.chart(bifurcation(book), branches),
        Block.finding(thresholds),
        Block.chart(case_curves(unequal, x), leaning),
    )
    lead = (
        f"For {near.label} there is {_count(len(optima))} reverse optimum, and it is centred: {normal(optima[0].model)}. "
        "Reverse KL seeks a mode only where the bumps are far enough apart."
    )
    return Section("Reverse KL does not always seek a mode", lead, blocks)


def _limits(book: textbook.Textbook) -> Section:
    outside = float(book.infinite.notes[0].split(" of the mass")[0])
    infinite = (
        f"{outside:.1%} of the mass of N lies where U is zero (x < 0 and x > 1). There log(N/U) is infinite, and so is the "
        "divergence. No sample size changes that."
    )
    label, richer = book.cases[0].label, "With two components both directions find p itself."
    columns = (f"family for {label}", *(f"{f} fit, {kl}" for f in _NAMES.values() for kl in ("KL(p‖q)", "KL(q‖p)")))
    rows = [
        (
            "one Gaussian" if components == 1 else f"a mixture of {components}",
            *(table[fitted, measured].number for fitted in _NAMES for measured in _NAMES),
        )
        for components, table in book.capacity.items()
    ]
    uniform = (("KL(U‖N)", book.finite.number), ("KL(N‖U)", book.infinite.number))
    blocks = (
        Block.table(("U = uniform on (0, 1), N = N(0, 1)", "nats"), uniform, infinite),
        Block.table(columns, rows, richer),
        Block.finding(
            "The direction matters only where the family is too small. If you can afford a richer family, start there."
        ),
    )
    title = "When KL is infinite, and when the choice stops mattering"
    return Section(title, "KL(p‖q) is finite only if q is positive wherever p is.", blocks)


def _petals(demo: Demo) -> Section:
    found, result = demo.petals, demo.petals.fit
    figure, (x, y), (low, high) = plot(result), result.model.mean.tolist(), found.gap
    add_ellipses(figure, found.richer[-1], "other", "mixture of 3")
    families = []
    for one in (result, *found.richer):
        gain = one.diagnostics.richer_gain
        families.append((one.family.label, one.value.number, "—" if gain is None else gain.number))
    groups = (
        "Each point is a petal. The Gaussian (blue) covers them all, with the gap between the groups. The mixture of three "
        "(green), fitted by the same objective, follows the groups."
    )
    covers = (
        f"Forward KL covers mass, even where there is none. The Gaussian's mean, {x:.2f} cm × {y:.2f} cm, is between the groups, "
        f"and {found.gap_mass:.0%} of its mass is on lengths between {low:g} and {high:g} cm, where there is no petal."
    )
    score = (
        f"Mean −log q of rows that the fit has not seen ({result.value.method}), ± one standard error. It is forward KL plus the "
        "unknown entropy H(p), so that only differences have a meaning."
    )
    blocks = (
        Block.chart(figure, groups),
        Block.finding(covers),
        Block.table(("family", "held-out −log q, nats", "gain of one step up"), families, score),
        *finding_blocks(result),
    )
    lead = f"Lengths and widths of iris petals (Fisher, 1936). Nobody knows their density. Advice: {_advice(result)}"
    return Section("Samples only: 150 petals", lead, blocks, "2 · Samples only → forward KL")


def _schools(demo: Demo) -> Section:
    result, d = demo.schools.fit, demo.schools.fit.diagnostics
    if d.elbo is None or d.ess is None or d.khat is None or d.elbo.n is None:
        raise TypeError("a reverse fit has an ELBO")
    optima = f"{_count(len(d.optima))} optim{'um' if len(d.optima) == 1 else 'a'}"
    rows = [
        ("ELBO = log Z − KL(q‖p)", f"{d.elbo.number} nats", "on fresh draws of q; only differences between fits have a meaning"),
        ("importance ESS", f"{d.ess:,.0f} of {d.elbo.n:,}", "the number of q's draws that are left after reweighting to p"),
        ("PSIS k̂", shown_khat(d.khat), "tail of the weights; up to 0.5 reweighting can repair what the Gaussian gets wrong"),
        ("status", result.status, f"gradient {d.residual:.0e}; {optima} found from several starts"),
        ("KL(q‖p), at least", f"{max(d.least_kl or 0.0, 0.0):.2f} nats", "estimated from the importance weights"),
        ("node error", f"{d.node_error:.3f}", "largest shift of a mean, in sd, when the nodes are doubled"),
    ]
    effects = (
        "Each school's effect under the fitted posterior (orange: median and 95 % interval), and what was published (grey: "
        "effect ± 2 standard errors). The model pulls noisy effects towards each other."
    )
    no_draws = (
        "No draw of the true posterior was used. The fit has no learning rate: it stops when the natural gradient vanishes."
    )
    blocks = (
        Block.chart(_school_effects(demo.schools), effects),
        Block.table(("measure", "number", "meaning"), rows, no_draws),
        *finding_blocks(result),
    )
    lead = (
        "The posterior of a small hierarchical model (Rubin, 1981): ten unknowns, a formula up to a constant, no way to sample. "
        f"Advice: {_advice(result)}"
    )
    return Section("Log density only: eight schools", lead, blocks, "3 · Log density only → reverse KL")


def _school_effects(schools: Schools) -> Figure:
    """Draw each school's effect under q, and what was published."""
    low, middle, high = schools.effects.tolist()
    figure, rows = new_figure(), range(len(EFFECTS))
    published = {"type": "data", "array": [2 * e for e in ERRORS], "thickness": 2, "width": 0}
    add_points(figure, EFFECTS, [i + 0.22 for i in rows], "target", "published effect ± 2 s.e.", error_x=published)
    interval = error_bars(low, middle, high, thickness=3)
    add_points(figure, middle, [*rows], "reverse_kl", "under q, 95 %", size=9, error_x=interval)
    style(figure, "effect on the test score", "", 430)
    labels = [f"school {i + 1}" for i in rows]
    figure.update_yaxes(tickvals=[i + 0.11 for i in rows], ticktext=labels, autorange="reversed")
    return figure


def _both(demo: Demo) -> Section:
    rows = []
    for one in demo.both:
        values = (one.forward.number, one.reverse.number, one.jeffreys.number)
        name = f"{_NAMES[one.fit.objective.name]} fit, {normal(one.fit.model)}"
        rows.append((name, *values, f"{one.coverage:.1%}", f"{one.precision:.1%}"))
    exact = "; ".join(
        f"{_NAMES[fitted]} fit {demo.textbook.cases[0].table[fitted, 'forward_kl'].number} and "
        f"{demo.textbook.cases[0].table[fitted, 'reverse_kl'].number}"
        for fitted in _NAMES
    )
    scores = (
        f"Monte Carlo with 20,000 fresh draws, ± one standard error. The exact values of KL(p‖q) and KL(q‖p) are: {exact}. "
        "Jeffreys is the sum of both KLs, computed from the density times e⁷: the normaliser cancels. Coverage: share of p's "
        "draws above the 1 % density level of q. Precision: share of q's draws above the 1 % density level of p."
    )
    covers, other = sorted(demo.both, key=lambda one: one.forward.value)
    precise, rest = sorted(demo.both, key=lambda one: one.reverse.value)
    choice = (
        f"For coverage take the {_NAMES[covers.fit.objective.name]} fit: its KL(p‖q) is "
        f"{_against(covers.forward, other.forward)}, and it reaches {covers.coverage:.0%} of p's draws against "
        f"{other.coverage:.0%}. For precision take the {_NAMES[precise.fit.objective.name]} fit: its KL(q‖p) is "
        f"{_against(precise.reverse, rest.reverse)}, and {precise.precision:.0%} of its draws are plausible against "
        f"{rest.precision:.0%}."
    )
    repeated = (
        "One fit of each proves little: another seed may give another answer. whichkl compare repeats both, here from "
        f"{len(demo.study.config['seeds'])} seeds, scores each pair on the same unseen draws, and names a winner only where "
        "tests find one after correction for their number. The density is again multiplied by e⁷."
    )
    worse = (
        "How much worse the other direction is than the one that leads for each need, with 95 % intervals over the seeds. "
        "Orange: detectably worse."
    )
    verdict = demo.study.verdict
    blocks = (
        Block.table(("fit", "KL(p‖q)", "KL(q‖p)", "Jeffreys, Z-free", "coverage", "precision"), rows, scores),
        Block.finding(choice),
        Block.paragraph(repeated),
        Block.finding(verdict.sentence, "Verdict of the study"),
        Block.charts(differences(verdict), worse),
        *needs_table(verdict),
    )
    lead = (
        "The same two bumps, with a sampler and a density, as in distillation, where a teacher offers both. Either direction "
        "can be minimised, so fit both, and score both on draws that neither has seen."
    )
    return Section("Both: let the experiment decide", lead, blocks, "4 · Both → decide by experiment")


def _neither(demo: Demo, x: torch.Tensor) -> Section:
    found = demo.neither
    origin: Any = found.target.origin
    figure = new_figure()
    add_area(figure, x.tolist(), Target.of(bimodal(3.0)).log_prob(x[:, None]).exp().tolist(), "the two bumps, p")
    add_line(figure, x.tolist(), found.target.log_prob(x[:, None]).exp().tolist(), "forward_kl", "made of the answers", width=2.5)
    caption = (
        f"{found.pairs} times somebody was asked which of two points is likelier, and answered with the odds p(a)/p(b). The density "
        f"that explains the answers is {found.forward.value:.3f} nats from p, KL(p‖q), without a draw or a value of p."
    )
    rows = [(one.left, one.becomes, one.source) for one in found.advice.conversions]
    blocks = (
        Block.chart(style(figure, "x", "density"), caption),
        Block.table(("", "what"), origin.rows, f"Made of {origin.source}"),
        Block.table(("if you have …", "it becomes …", "source"), rows, "What `convert` takes.".replace("`", "")),
        Block.finding(found.advice.cheapest, "Cheapest access to acquire"),
    )
    lead = f"{found.advice.situation} {found.advice.verdict} But something may be left, and convert makes a target of it."
    return Section("Neither: convert what is left", lead, blocks, "5 · Neither → converted")


def _advice(fit: Fit) -> str:
    best = fit.advice.best
    return f"{_NAMES[fit.objective.name]} KL, because {best.reason}." if best else ""


def _against(one: Estimate, other: Estimate) -> str:
    return f"{one.value:.2f} nats against {other.value:.2f}"


def _count(count: int) -> str:
    return {1: "one", 2: "two", 3: "three"}.get(count, str(count))
