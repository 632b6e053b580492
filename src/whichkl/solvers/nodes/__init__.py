"""Nodes: reverse KL, and divergences between the directions, on fixed nodes of q that are doubled until the optimum stays."""
