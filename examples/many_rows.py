"""Samples in a folder of files: read in parts, never all at once; the number of components is chosen on unseen rows."""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

import whichkl as wk


def main() -> None:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(3):
            x = rng.normal(size=(4_000, 2)) + np.array([-3.0, 3.0])[rng.integers(0, 2, 4_000)][:, None]
            pyarrow.parquet.write_table(pa.table({"a": x[:, 0], "b": x[:, 1]}), Path(folder) / f"{shard}.parquet")
        fit = wk.fit(folder, wk.families.Mixture("auto"))  # cluster="auto" has a Ray cluster read the parts
    print(fit)
    assert fit.family.components == 2


if __name__ == "__main__":
    main()
