"""You can neither sample the target nor evaluate it: no KL can be minimised, and the advice says what would help."""

import whichkl as wk

target = wk.Target(dim=2)
advice = wk.advise(target)
print(advice)
assert advice.best is None

try:
    wk.fit(target)
except ValueError as error:
    print(error)
else:
    raise SystemExit("a fit without access must be refused")
