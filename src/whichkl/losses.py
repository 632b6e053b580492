"""Losses for distillation, by their public name; `whichkl.distillation.losses` holds them."""

from whichkl.distillation.losses import *  # noqa: F403
from whichkl.distillation.losses import __all__ as __all__
