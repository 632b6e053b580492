"""Samples: divergences between two samples alone: neighbours, classifiers, bounds and distances."""
