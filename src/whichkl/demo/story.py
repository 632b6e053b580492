"""The story of the demo: its numbers told to somebody who has never heard of KL, as one page and one JSON file."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from whichkl._checks import plain
from whichkl.demo import textbook
from whichkl.demo.figures import bifurcation, case_curves, fixed, integrand_curves, mean_of, school_effects
from whichkl.demo.run import Demo
from whichkl.diagnostics import shown_khat
from whichkl.divergences import Estimate
from whichkl.files.writing import is_demo, write_whole
from whichkl.fitting import Fit
from whichkl.plots import add_ellipses, plot
from whichkl.plots.arms import differences
from whichkl.reporting.page import Block, Section, write_page
from whichkl.reporting.study_tables import need_rows

_NAMES = {"forward_kl": "forward", "reverse_kl": "reverse"}
_LEAD = (
    "You have a target distribution p and a family of models q that can't match it exactly. Something has to give. "
    "The Kullback–Leibler divergence measures what: it is zero only when q equals p, and it depends on the direction. "
    "Forward KL, KL(p‖q), averages over the target and punishes q for missing what p does. Reverse KL, KL(q‖p), "
    "averages over the model and punishes q for going where p doesn't. What you can do with p decides which one you can minimise."
)


def write_demo(demo: Demo, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write `report.html` and `report.json` into a folder.

    Raises:
        ResourceError: they can't be written.
    """
    sections = [_answer(demo), *_textbook(demo), _petals(demo), _schools(demo), _both(demo), _neither(demo), _words()]
    footer = (
        "Written by whichkl demo. N(m, s) names mean and standard deviation. All divergences are in nats (one nat is 1.44 bits). "
        "The same numbers, with all digits, are in report.json."
    )
    data = Path(folder) / "report.json"
    write_whole(data, json.dumps(plain(demo.to_dict()), indent=1, allow_nan=False).encode(), is_own=is_demo)
    page = write_page(
        Path(folder) / "report.html", "Forward or reverse KL: which, when, and did it work?", _LEAD, sections, footer
    )
    return page, data


def _answer(demo: Demo) -> Section:
    first = demo.textbook.cases[0].table
    elbo = demo.schools.fit.diagnostics.elbo
    rows = [
        (
            "draw samples, not evaluate p",
            "forward KL",
            "maximum likelihood; covers mass",
            f"held-out −log q {demo.petals.fit.value.number}",
        ),
        (
            "evaluate p up to a constant, not sample",
            "reverse KL",
            "variational inference; tends to seek modes",
            f"ELBO {elbo.number}" if elbo else "",
        ),
        (
            "both",
            "either",
            "decide by experiment",
            f"KL(p‖q) {_short(first['forward_kl', 'forward_kl'])} (forward fit), KL(q‖p) {_short(first['reverse_kl', 'reverse_kl'])} (reverse fit)",
        ),
        ("neither", "none yet", "convert what is left, or acquire an access", "—"),
    ]
    columns = ("with p you can …", "minimise", "character", "measured in this run")
    return Section(
        "The short answer",
        "Access decides. This page shows each row of this table on a real input, with the evidence.",
        (
            Block.table(columns, rows),
            Block.paragraph(
                "How to read the numbers: divergences are in nats. 0 means that p and q are the same. A KL(p‖q) of "
                f"{_short(demo.textbook.cases[0].table['forward_kl', 'forward_kl'])} nats means that a typical draw of p is e^"
                f"{_short(demo.textbook.cases[0].table['forward_kl', 'forward_kl'])} = "
                f"{math.exp(demo.textbook.cases[0].table['forward_kl', 'forward_kl'].value):.1f} times as likely under p as under q (geometric mean); "
                "0.01 is hardly visible, 1 is a factor of 2.7. ± is one standard error."
            ),
        ),
    )


def _textbook(demo: Demo) -> list[Section]:
    x = torch.linspace(-9, 9, 721, dtype=torch.float64, device="cpu")
    return [_picture(demo, x), _seeking(demo, x), _limits(demo)]


def _picture(demo: Demo, x: torch.Tensor) -> Section:
    first = demo.textbook.cases[0]
    far = first.reverse.diagnostics.optima
    rows = [
        (f"{_NAMES[name]} fit, {label}", _exact(first.table[name, "forward_kl"]), _exact(first.table[name, "reverse_kl"]))
        for name, label in (("forward_kl", _model(first.forward)), ("reverse_kl", _model(first.reverse)))
    ]
    gap = f"{first.cross_entropy:.6f} − {first.entropy:.6f} = {first.cross_entropy - first.entropy:.6f}"
    return Section(
        "Two bumps, one Gaussian",
        f"The target is {first.label}; the family is a single Gaussian. N(m, s) names the mean and the standard deviation. Every optimum that several starts found is shown, not one by luck.",
        (
            Block.chart(
                case_curves(first, x),
                f"Blue: the forward fit, which spans both bumps. Orange: all {len(far)} reverse optima; solid ones tie for the best, the dashed one is only locally best.",
            ),
            Block.table(
                (f"p = {first.label}", "KL(p‖q), nats", "KL(q‖p), nats"),
                rows,
                "Both divergences at both fits. Each fit wins in its own direction, and only there.",
            ),
            Block.paragraph(
                f"The forward fit has exactly the mean and variance of p. Its loss is the cross-entropy, and a cross-entropy is not a KL: "
                f"forward KL = cross-entropy − H(p) = {gap} nats, where H(p) is the entropy of the target, which no fit can change."
            ),
            Block.chart(
                integrand_curves(first, x),
                "Where each divergence is paid: the signed area under a curve is the divergence. Missing a whole bump costs forward KL dearly (below), while spanning the empty middle is what reverse KL pays for (above).",
            ),
        ),
        "1 · The textbook experiment",
    )


def _seeking(demo: Demo, x: torch.Tensor) -> Section:
    book = demo.textbook
    _, second, third = book.cases
    near = second.reverse.diagnostics.optima
    return Section(
        "Reverse KL does not always seek a mode",
        f"For {second.label} there is {_number(len(near))} reverse optimum, and it is centred: mean {mean_of(near[0])}, sd {_sd(near[0])}. The folklore holds only for bumps far enough apart.",
        (
            Block.chart(case_curves(second, x), "Closer bumps: both directions span them."),
            Block.chart(
                bifurcation(demo),
                "Means of all reverse-KL optima for ½ N(−M, 1) + ½ N(M, 1) as M grows. Solid: best overall. Hollow: only locally best. The dotted lines: where one-bump optima first exist, and where they become the best.",
            ),
            Block.finding(
                f"One-bump optima first exist at M ≈ {book.exists_from:.2f}, and beat the centred one from M ≈ {book.wins_from:.2f}. "
                "Below that, reverse KL covers; above it, the covering solution stays a local optimum, so an unlucky start can end there."
            ),
            Block.chart(
                case_curves(third, x),
                f"Unequal bumps, {third.label}: the forward fit leans to the left; reverse KL has a global optimum on the larger bump ({third.reverse.diagnostics.optima[0].loss:.4f} nats) and a local one on the smaller ({third.reverse.diagnostics.optima[1].loss:.4f}).",
            ),
        ),
    )


def _limits(demo: Demo) -> Section:
    book = demo.textbook
    first = book.cases[0]
    outside = book.infinite.notes[0].split(" of the mass")[0]
    return Section(
        "When KL is infinite, and when the choice stops mattering",
        "KL(p‖q) is finite only if q is positive wherever p is.",
        (
            Block.table(
                ("U = uniform on (0, 1), N = N(0, 1)", "nats"),
                (("KL(U‖N)", _exact(book.finite)), ("KL(N‖U)", _exact(book.infinite))),
                f"{float(outside):.1%} of the mass of N lies where U is zero (x < 0 and x > 1): there log(N/U) is infinite, and so is the divergence. No sample size changes that.",
            ),
            Block.table(
                (
                    "family for " + first.label,
                    "forward fit, KL(p‖q)",
                    "forward fit, KL(q‖p)",
                    "reverse fit, KL(p‖q)",
                    "reverse fit, KL(q‖p)",
                ),
                [
                    (
                        "one Gaussian" if row.components == 1 else f"a mixture of {row.components}",
                        *(_exact(row.table[fitted, measured]) for fitted in _NAMES for measured in _NAMES),
                    )
                    for row in book.capacity
                ],
                "A richer family dissolves the difference: with two components both directions find p itself.",
            ),
            Block.finding(
                "The direction matters only as far as the family is too small. If you can afford a richer family, start there."
            ),
        ),
    )


def _petals(demo: Demo) -> Section:
    result = demo.petals.fit
    mean = result.model.mean.tolist()
    families = [(one.family.label, one.value.number, _gain(one)) for one in (result, *demo.petals.richer)]
    figure = plot(result)
    add_ellipses(figure, demo.petals.richer[-1], "other", "mixture of 3")
    held = result.value
    return Section(
        "Samples only: 150 petals",
        "Lengths and widths of iris petals (Fisher, 1936). They can't be evaluated: nobody knows their density. "
        f"Advice: {_advice(result)}",
        (
            Block.chart(
                figure,
                "Each point is a petal. The Gaussian (blue) covers them all, with the gap between; the mixture of three (green), fitted by the same objective, follows the groups.",
            ),
            Block.finding(
                f"Forward KL covers mass, even where there is none. The Gaussian is centred at {mean[0]:.2f} cm × {mean[1]:.2f} cm, between the groups, "
                f"and puts {demo.petals.gap_mass:.0%} of its mass on lengths strictly between {demo.petals.gap[0]:g} and {demo.petals.gap[1]:g} cm, where there is not one petal."
            ),
            Block.table(
                ("family", "held-out −log q, nats", "gain of one step up"),
                families,
                f"Mean negative log-likelihood of rows that the fit has not seen ({held.method}), ± one standard error. It is forward KL plus the unknown entropy H(p), so only differences mean something.",
            ),
            *_findings(result),
        ),
        "2 · Samples only → forward KL",
    )


def _schools(demo: Demo) -> Section:
    result = demo.schools.fit
    d = result.diagnostics
    if d.elbo is None or d.ess is None or d.khat is None or d.elbo.n is None:
        raise TypeError("a reverse fit has an ELBO")
    rows = [
        (
            "ELBO = log Z − KL(q‖p)",
            f"{d.elbo.number} nats",
            "evidence lower bound, on fresh draws of q; the normaliser Z is unknown, so only differences between fits mean something",
        ),
        (
            "importance ESS",
            f"{d.ess:,.0f} of {d.elbo.n:,}",
            "effective sample size: how many of q's draws are left when they are reweighted to p",
        ),
        (
            "PSIS k̂",
            shown_khat(d.khat),
            "shape of the weights' tail; below 0.7 reweighting can repair what the Gaussian gets wrong",
        ),
        (
            "status",
            result.status,
            f"gradient {d.residual:.0e}; {_number(len(d.optima))} optim{'um' if len(d.optima) == 1 else 'a'} found from several starts",
        ),
        ("KL(q‖p), at least", f"{max(d.least_kl or 0.0, 0.0):.2f} nats", "estimated from the importance weights"),
        ("node error", f"{d.node_error:.3f}", "largest shift of a mean, in sd, when the nodes are doubled"),
    ]
    return Section(
        "Log density only: eight schools",
        "The posterior of a small hierarchical model (Rubin, 1981): ten unknowns, a formula up to a constant, no way to draw from it. "
        f"Advice: {_advice(result)}",
        (
            Block.chart(
                school_effects(demo),
                "What the fitted posterior says of each school (orange: median and 95 % interval under q) beside what was published (grey: effect ± 2 standard errors). The model pulls the noisy ones towards each other.",
            ),
            Block.table(
                ("measure", "number", "meaning"),
                rows,
                "No draw of the true posterior was used. The fit has no learning rate: it stops when the natural gradient vanishes.",
            ),
            *_findings(result),
        ),
        "3 · Log density only → reverse KL",
    )


def _both(demo: Demo) -> Section:
    rows = [
        (
            f"{_NAMES[one.fit.objective.name]} fit, {_model(one.fit)}",
            one.forward.number,
            one.reverse.number,
            one.jeffreys.number,
            f"{one.coverage:.1%}",
            f"{one.precision:.1%}",
        )
        for one in demo.both
    ]
    exact = demo.textbook.cases[0].table
    covers, other = sorted(demo.both, key=lambda one: one.forward.value)
    precise, rest = sorted(demo.both, key=lambda one: one.reverse.value)
    return Section(
        "Both: let the experiment decide",
        "Now the same two bumps, with a sampler and a density, as in distillation, where a teacher offers both. Either direction can be minimised, "
        "so fit both, and score both on draws that neither has seen.",
        (
            Block.table(
                ("fit", "KL(p‖q)", "KL(q‖p)", "Jeffreys, Z-free", "coverage", "precision"),
                rows,
                f"Monte Carlo, 20,000 fresh draws, ± one standard error: what a real study would have. The exact values, from the first section, are {_exact(exact['forward_kl', 'forward_kl'])} and {_exact(exact['forward_kl', 'reverse_kl'])} for the forward fit, {_exact(exact['reverse_kl', 'forward_kl'])} and {_exact(exact['reverse_kl', 'reverse_kl'])} for the reverse fit. Jeffreys is the sum of both KLs, computed from the density multiplied by e⁷: "
                "the normaliser cancels, so it works for unnormalised targets, and bounds either KL. Coverage: share of the target's draws above the 1 % density level of q. "
                "Precision: share of q's draws above the 1 % density level of p.",
            ),
            Block.finding(
                f"For coverage take the {_NAMES[covers.fit.objective.name]} fit: KL(p‖q) is {_short(covers.forward)} nats against {_short(other.forward)}, and it reaches "
                f"{covers.coverage:.0%} of the target's draws against {other.coverage:.0%}. For precision take the {_NAMES[precise.fit.objective.name]} fit: KL(q‖p) is "
                f"{_short(precise.reverse)} against {_short(rest.reverse)}, and {precise.precision:.0%} of its draws are plausible against {rest.precision:.0%}.",
                "What it shows",
            ),
            Block.paragraph(
                "One fit of each proves little: another seed may say otherwise. whichkl compare repeats both, here from "
                f"{len(demo.study.config['seeds'])} seeds, each pair scored on the same unseen draws, and names a winner only where "
                "tests find one after correction for their number. The density is again multiplied by e⁷."
            ),
            Block.finding(demo.study.verdict.sentence, "Verdict of the study"),
            Block.charts(
                differences(demo.study.verdict),
                "By how much the other direction is worse than the one that leads for each need, with 95 % intervals over the seeds. "
                "Orange: detectably worse.",
            ),
            Block.table(("you need", "that is", "take", "by"), need_rows(demo.study.verdict)),
        ),
        "4 · Both → decide by experiment",
    )


def _neither(demo: Demo) -> Section:
    advice = demo.neither
    rows = [(one.left, one.becomes, one.source) for one in advice.conversions]
    return Section(
        "Neither: convert what is left",
        f"{advice.situation} {advice.verdict} whichkl refuses to fit, and says what would change that.",
        (
            Block.table(("if you have …", "it becomes …", "source"), rows, "What could still be converted."),
            Block.finding(advice.cheapest, "Cheapest access to acquire"),
        ),
        "5 · Neither → no fit yet",
    )


def _words() -> Section:
    rows = [
        ("target p, model q", "what is to be matched, and what stands in for it"),
        (
            "family",
            "the set of models that the fit may choose from; a full Gaussian has any covariance, a diagonal one no correlations",
        ),
        ("KL divergence", "how far one distribution is from another, in nats; 0 only if they are equal; not symmetric"),
        ("cross-entropy, H(p)", "−log q averaged over p; KL(p‖q) plus the entropy of p, which is a property of p alone"),
        ("log Z", "the logarithm of the constant that would make an unnormalised density integrate to one"),
        ("ELBO", "log Z minus KL(q‖p): it can be computed without Z, and is larger for a better q"),
        ("held out, unseen", "rows or draws that the fit has not used, so that they can judge it"),
        (
            "importance weights, ESS, k̂",
            "p/q at q's draws; how many draws are left after weighting; how heavy the tail of the weights is",
        ),
        ("Jeffreys", "KL(p‖q) + KL(q‖p)"),
        ("nodes", "fixed points at which averages over q are taken, so that the fit is deterministic"),
    ]
    return Section("Words", "What the terms on this page mean.", (Block.table(("word", "meaning"), rows),))


def _findings(fit: Fit) -> list[Block]:
    texts = zip(sorted(fit.findings), fit.explanations, strict=True)
    found = [Block.warning(text.replace("`", ""), f"Finding: {name.replace('_', ' ')}") for name, text in texts]
    return found or [Block.finding("Nothing speaks against this fit in what could be measured.", "No findings")]


def _advice(fit: Fit) -> str:
    best = fit.advice.best
    return f"{_NAMES[fit.objective.name]} KL, because {best.reason}." if best else ""


def _gain(fit: Fit) -> str:
    gain = fit.diagnostics.richer_gain
    return gain.number if gain is not None else "—"


def _model(fit: Fit) -> str:
    mean, variance = textbook.moments(fit.model)
    return f"N({fixed(mean)}, {math.sqrt(variance):.2f})"


def _sd(optimum: Any) -> str:
    return f"{math.sqrt(textbook.moments(optimum.model)[1]):.2f}"


def _exact(estimate: Estimate) -> str:
    return estimate.number


def _short(estimate: Estimate) -> str:
    return f"{estimate.value:.2f}"


def _number(count: int) -> str:
    return {1: "one", 2: "two", 3: "three"}.get(count, str(count))
