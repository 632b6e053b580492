"""An energy over states of 0 and 1: a restricted Boltzmann machine, fitted by independent columns and by a network."""

import whichkl as wk

machine = wk.problems.RestrictedBoltzmann(visible=8, hidden=4)  # any function or module, (n, d) states to (n,) energies
target = wk.Target(energy=machine, dim=8, support="boolean")
print(wk.advise(target))

columns = wk.fit(target)  # all 256 states are listed, so that nothing is drawn
network = wk.fit(target, wk.families.Autoregressive(hidden=(32,)))
print(columns)
print(network)
for fit in (columns, network):
    print(f"log Z = {machine.log_z:.4f}, ELBO {-fit.diagnostics.optima[0].loss:.4f} of {fit.family}")

large = wk.fit(wk.problems.restricted_boltzmann(60, 12), judge=False)  # 2⁶⁰ states: coordinate ascent on draws
print(large)

assert network.value.value < 0.01 < columns.value.value
assert -network.diagnostics.optima[0].loss <= machine.log_z
assert large.status == "converged"
