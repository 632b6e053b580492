"""You have both accesses, and the choice is empirical: an experiment over families, objectives and seeds, on unseen draws."""

import whichkl as wk


def spread(model, draws):
    """A metric of one's own: the standard deviation of the model, whose truth is 3.162."""
    return float(model.variance.sqrt())


study = wk.compare(
    wk.problems.bimodal(half_distance=3.0),
    families=["gaussian", "mixture:2"],
    objectives=["forward_kl", "reverse_kl"],
    seeds=2,
    metrics=["forward_kl", "reverse_kl", "coverage", spread],
    out="out/study",  # if interrupted, run the same call again to resume
)
print(study)  # an arm a line; study.table has every cell, study.fit(0) the fit behind one
for cell in study.cells[:2]:
    missed = [f"{one['share']:.0%} about {one['centre'][0]:.1f}" for one in cell.details["coverage"]["missed"]]
    print(f"{cell.row['objective']}: sd {cell.row['spread']:.2f}, never comes to {', '.join(missed) or 'no part of p'}")

print(study.verdict)  # two seeds are too few for one: it takes six
print(wk.report(study, "out/study/report.html"))

assert not study.failed
assert study.verdict.outcome == "too_few_seeds"
assert [row["missed"] for row in study.rows[:2]] == [0, 1]  # forward KL covers both bumps, reverse KL one
