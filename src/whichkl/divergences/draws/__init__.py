"""Draws: divergences as means over draws of p or q whose log densities can be evaluated."""
