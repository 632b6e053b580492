"""Nodes: solvers of reverse KL, and of divergences between the directions, on fixed nodes of q."""
