"""Targets: `Target`, the distribution p that is matched, and what is known about it."""

from whichkl.targets.target import Target

__all__ = ["Target"]
