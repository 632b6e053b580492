"""Particles: weighted points that follow p, from its log density alone, and how much of p's mass is where."""

from whichkl.particles.tempering import Particles, Reference, temper

__all__ = ["Particles", "Reference", "temper"]
