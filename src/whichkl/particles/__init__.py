"""Particles: weighted points that follow p, from its log density alone, and how much of p's mass is where."""

from whichkl.particles.result import Particles
from whichkl.particles.tempering import Reference, temper

__all__ = ["Particles", "Reference", "temper"]
