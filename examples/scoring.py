"""You have a table with labels and gaps: fit it, and see which rows are strange, and which columns make them so."""

import numpy as np
import pandas as pd

import whichkl as wk

rng = np.random.default_rng(0)
table = pd.DataFrame({"city": rng.choice(["Lima", "Oslo", "Rome"], 500, p=[0.6, 0.3, 0.1])})
table["amount"] = np.exp(rng.normal(7, 1, 500)).round(2)
table["age"] = rng.normal(40, 10, 500).round(1)
table.loc[::50, "age"] = np.nan

try:
    wk.Target(samples=table)
except wk.InputError as error:
    print(error)  # every column that can't be read, and the arguments that read it

fit = wk.fit(wk.Target(samples=table, categories=["city"], missing="drop"))
print(fit)

table.loc[7, "amount"] = 400_000.0
scores = fit.score(table)
print(scores)
for row in scores.top(3):
    print(row.place, dict(row.values), row.driven_by)
