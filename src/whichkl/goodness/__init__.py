"""Goodness of fit: whether unseen rows could be draws of a model, by a classifier and by calibration."""

from whichkl.goodness.transform import Calibration, ColumnCalibration, transform_calibration
from whichkl.goodness.two_sample import TwoSample, c2st, two_sample_test

__all__ = ["Calibration", "ColumnCalibration", "TwoSample", "c2st", "transform_calibration", "two_sample_test"]
