"""Petals: lengths and widths of 150 iris petals in centimetres, 50 from each of three species."""

from __future__ import annotations

from importlib.resources import as_file, files

from whichkl.process.torch_modes import plain_modes
from whichkl.samples import read_samples
from whichkl.targets import Target


@plain_modes()
def petals() -> Target:
    """Return the samples as a target; the species aren't in it.

    Source: Fisher (1936), "The use of multiple measurements in taxonomic problems", measured by Anderson (1935).

    >>> petals()
    Target(dim=2, n=150, access: samples)
    """
    with as_file(files("whichkl.problems") / "data" / "petals.csv") as path:
        table = read_samples(path)
    return Target(samples=table.values, names=[name.replace("_", " ") for name in table.names])
