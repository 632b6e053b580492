"""Goodness of fit: whether unseen rows could be draws of a model, by a classifier and by calibration."""

from whichkl.goodness.transform import MAX_ROWS_RANKED, Calibration, ColumnCalibration, transform_calibration
from whichkl.goodness.two_sample import MAX_ROWS_COMPARED, TwoSample, c2st, two_sample_test

__all__ = [
    "MAX_ROWS_COMPARED",
    "MAX_ROWS_RANKED",
    "Calibration",
    "ColumnCalibration",
    "TwoSample",
    "c2st",
    "transform_calibration",
    "two_sample_test",
]
